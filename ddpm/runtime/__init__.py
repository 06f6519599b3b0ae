"""Runs work on this machine: device, compilation, processes, signals, progress.

Nothing here knows a dataset, a model file or a stage.
"""
