"""Runs work on this machine: device, compilation, processes, signals, progress.

Nothing here depends on a dataset, a model file or a stage.
"""
