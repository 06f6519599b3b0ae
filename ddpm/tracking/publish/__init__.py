"""Publishes outputs to MLflow's runs.

The model registry is in ddpm.tracking.registry.
"""
