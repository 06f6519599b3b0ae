"""Reads and writes files: paths, atomic writes, records, checkpoints, samples, params.yaml.

No other package knows a file format, except the formats of DVC and MLflow.
"""
