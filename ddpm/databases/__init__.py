"""Checks the database files and addresses of servers before a server opens them.

Neither mlflow nor prefect is imported here.
"""
