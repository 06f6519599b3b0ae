"""Publishes outputs as MLflow runs. The model registry is in ddpm.tracking.registry."""
