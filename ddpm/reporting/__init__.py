"""Presents results: the report page, plots, the model card, and the last lines of a run.

Scores are computed in ddpm.scores and read from files in ddpm.files.
"""
