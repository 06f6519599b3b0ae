"""Reads and writes files: paths, atomic writes, records, checkpoints, samples, params.yaml.

No other room knows the format of a file. Only DVC's and MLflow's own files stand elsewhere.
"""
