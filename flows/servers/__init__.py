"""Starts and protects the servers of `make up` and the worker, with their addresses and passwords.

The flow itself is in flows.train_eval.
"""
