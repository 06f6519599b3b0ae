"""Publishes outputs to MLflow and maintains the model registry in MLflow.

No other package imports mlflow, and no stage imports this package. mlflow is imported where it is needed, because the
import takes 2 s.

Each dataset has one MLflow experiment, `ddpm-DATASET`, with these runs:

- `linear`, for each schedule: loss curves and the checkpoint. The next two are child runs of this run.
- `linear-ddim`, for each schedule and sampler: scores and sample grids. MLflow's step is the number of network
  evaluations.
- `linear-likelihood`, for each schedule: the bound in bits/dim.
- `report` and `schedules`.

Outputs hold no run ids. Instead, the tags of a run say which outputs the run shows: `ddpm.key` hashes the
configuration, `ddpm.model_sha256` identifies the weights, and `ddpm.samples.STEPS` and `ddpm.scores.STEPS` identify the samples
and scores with STEPS steps. If edited code gives other outputs for the same configuration, these outputs go to a new run, and the
old run is tagged `ddpm.superseded`. So each step of a metric has one value.

The start and end of a run come from the *.run.json files beside the outputs. A run dated 2000-01-01 means that such a file is
missing.
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
