"""Starts and guards the servers of `make up` and the worker, with their addresses and passwords.

The flow itself stands in flows.train_eval.
"""
