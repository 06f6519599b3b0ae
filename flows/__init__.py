"""Prefect's part: when and where a stage runs. DVC decides whether, MLflow shows."""

import os
import sys

# Python 3.11 leaves half of a .pyc when the disk fills (https://github.com/python/cpython/issues/126606), and every later start
# fails on that. So neither this process nor what it starts writes bytecode.
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
