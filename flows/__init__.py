"""Prefect's part: when and where a stage runs. DVC decides whether, MLflow shows."""
