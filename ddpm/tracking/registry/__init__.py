"""Promotes the best model in MLflow's registry: the decision, the version, the way back.

Runs and metrics stand in ddpm.tracking.publish.
"""
