"""Verbs of `ddpm` that are not DVC stages: drawing images, exchange with diffusers, cleaning.

A command that DVC runs belongs to ddpm.stages.
"""
