"""Judges samples: feature extractors, metrics, and their intervals.

The stage ddpm.stages.evaluate reads the samples and writes the scores.
"""
