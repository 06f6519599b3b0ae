"""MLflow as a view over outputs, and its model registry. No other package imports mlflow, and no stage imports this one.

One experiment per dataset, `ddpm-DATASET`, holds a run per schedule (`linear`: loss curves, the checkpoint), below it a run
per schedule and sampler (`linear-ddim`: scores and sample grids at step = network evaluations) and one for the bound in
bits/dim (`linear-likelihood`), and the runs `report` and `schedules`.

Outputs hold no run ids; tags find the run of an output. `ddpm.key` hashes the configuration, `ddpm.model_sha256` names the
weights, and `ddpm.samples.STEPS` and `ddpm.scores.STEPS` name the files of a point. If the same configuration gave other
outputs (the code was edited), they go to a new run and the old run is tagged `ddpm.superseded`. So no step of a metric has two
values. Times come from the run files beside the outputs; 2000-01-01 means that there is no such file.

mlflow is imported late, because the import takes 2 s.
"""

from ddpm.tracking.outputs import follow, publish, publish_or_warn
from ddpm.tracking.place import champion_uri, model_name, prepare_store, repo_root, tracking_uri
from ddpm.tracking.registry.decision import Decision
from ddpm.tracking.registry.registry import fetch_model, mark_best_champion, model_card, promote, rollback
from ddpm.tracking.streaming import TrainingWatch, watch_training

__all__ = [
    "Decision",
    "TrainingWatch",
    "champion_uri",
    "fetch_model",
    "follow",
    "mark_best_champion",
    "model_card",
    "model_name",
    "prepare_store",
    "promote",
    "publish",
    "publish_or_warn",
    "repo_root",
    "rollback",
    "tracking_uri",
    "watch_training",
]
