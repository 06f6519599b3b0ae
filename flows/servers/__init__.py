"""Starts and protects the servers and the worker of `make up`.

The flow itself is in flows.train_eval.
"""
