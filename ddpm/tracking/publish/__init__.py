"""Publishes outputs to MLflow's runs.

The model registry stands in ddpm.tracking.registry.
"""
