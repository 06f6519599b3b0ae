"""Verbs of `ddpm` that are no DVC stage: drawing images, exchange with diffusers, cleaning.

A verb that DVC runs belongs to ddpm.stages.
"""
