"""Runs DVC: the graph of dvc.yaml, one stage at a time, its locks, dvc.lock.

Nothing here knows Prefect.
"""
