"""Checks and creates the database file of MLflow, and builds addresses for MLflow and Prefect.

Neither mlflow nor prefect is imported here.
"""
