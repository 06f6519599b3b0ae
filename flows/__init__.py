"""Runs stages with Prefect, which decides when and where a stage runs.

DVC decides whether a stage runs, and MLflow shows the results.
"""

import os
import sys

# On a full disk, Python 3.11 leaves a truncated .pyc (https://github.com/python/cpython/issues/126606), and every later start
# fails on that file. So neither this process nor its children write bytecode.
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
