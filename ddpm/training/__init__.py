"""Trains networks, on torch and numpy: objectives, the training loop, averages, several devices.

Files, records and signals do not belong here: the stage ddpm.stages.train adds them.
"""
