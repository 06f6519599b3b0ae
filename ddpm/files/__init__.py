"""Reads and writes files: paths, atomic writes, records, checkpoints, samples, params.yaml.

No other package knows the format of a file, except for the files of DVC and MLflow.
"""
