"""Registers the best model in MLflow's registry, decides whether the model becomes the champion, and rolls back.

The runs in MLflow are published by ddpm.tracking.publish.
"""
