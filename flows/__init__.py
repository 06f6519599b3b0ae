"""Runs stages with Prefect, which decides when and where a stage runs. DVC decides whether it runs; MLflow shows the results."""

import os
import sys

# Python 3.11 leaves half of a .pyc when the disk fills (https://github.com/python/cpython/issues/126606), and every later start
# fails on that file. So neither this process nor its children write bytecode.
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
