"""Promotes the best model in MLflow's registry: decides, registers the version, and rolls back.

Runs and metrics are in ddpm.tracking.publish.
"""
