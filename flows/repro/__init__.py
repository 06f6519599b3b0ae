"""Runs DVC: reads the graph of dvc.yaml, runs one stage, and locks the checkout.

Nothing here calls Prefect: output and progress go to the Watcher.
"""
