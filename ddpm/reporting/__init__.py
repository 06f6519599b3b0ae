"""Shows results to a reader: the report page, plots, the model card, MLflow's description.

Scores are computed in ddpm.scores and read in ddpm.files.
"""
