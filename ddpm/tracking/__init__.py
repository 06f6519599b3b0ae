"""Shows outputs in MLflow and keeps its model registry.

No other package imports mlflow, and no stage imports this package.

Each dataset has one MLflow experiment, `ddpm-DATASET`, with these runs:

- `linear`, for each schedule: loss curves and the checkpoint. This run has the next two as child runs.
- `linear-ddim`, for each schedule and sampler: scores and sample grids. MLflow's step is the number of network
  evaluations.
- `linear-likelihood`: the bound in bits/dim.
- `report` and `schedules`.

Outputs hold no run ids. Tags of a run say which outputs it shows: `ddpm.key` hashes the configuration,
`ddpm.model_sha256` names the weights, and `ddpm.samples.STEPS` and `ddpm.scores.STEPS` name the files of a point. If
edited code gives other outputs for the same configuration, the outputs go to a new run, and the old run is tagged
`ddpm.superseded`. So each step of a metric has one value. Times come from the run files beside the outputs;
2000-01-01 means that there is no such file.

mlflow is imported late, because the import takes 2 s.
"""

from ddpm.tracking.outputs import follow, publish, publish_or_warn
from ddpm.tracking.place import champion_uri, model_name, prepare_store, repo_root, tracking_uri
from ddpm.tracking.registry.decision import Decision
from ddpm.tracking.registry.registry import (
    fetch_champion,
    fetch_model,
    mark_best_champion,
    model_card,
    promote,
    rollback,
)
from ddpm.tracking.streaming import TrainingWatch, watch_training

__all__ = [
    "Decision",
    "TrainingWatch",
    "champion_uri",
    "fetch_champion",
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
