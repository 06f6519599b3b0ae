"""Reads and writes files: paths, atomic writes, records, checkpoints, samples, params.yaml.

Other packages handle the formats of DVC, MLflow, diffusers and the image sources, and the report's page.
"""
