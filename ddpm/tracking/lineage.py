"""Collects the parameters of a model's training, and those of the samples and scores of a point (schedule, sampler, steps)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.files import models, paths, samples
from ddpm.files.models import ModelRecord
from ddpm.files.params import Params
from ddpm.files.scores import read_scores
from ddpm.parameters import USUAL_NETWORK, Point


@dataclass(frozen=True)
class PointSettings:
    """The parameters with which a point (schedule, sampler and steps) was sampled and scored.

    Args:
        seed: the seed of the noise.
        row: the sampler's options, from its row of `samplers` in params.yaml.
        sampling: the section `sampling` of params.yaml.
        evaluation: the section `evaluation` of params.yaml.
    """

    seed: int
    row: dict[str, Any]
    sampling: dict[str, Any]
    evaluation: dict[str, Any]

    @classmethod
    def read(cls, params: Params, point: Point, root: Path) -> PointSettings | None:
        """Reads the parameters from the files of a point. If the point has no scores, takes `evaluation` from `params`.

        Returns None if the samples were drawn by another model than the present one, or if the scores belong to other samples.
        Raises InputError if a file is damaged.
        """
        record = samples.read_samples_record(root / paths.samples_file(point))
        fits, evaluation = True, params.evaluation.recorded()
        if (root / paths.model_dir(point.schedule) / "model.json").exists():
            fits = record.model == models.read_trained(root, point.schedule).weights_sha256
        if (root / paths.metrics_file(point)).exists():
            scores = read_scores(root, point)
            fits, evaluation = fits and record.record_sha256 == scores.samples, dict(scores.evaluation)
        return cls(**record.settings, evaluation=evaluation) if fits else None


def training_identity(params: Params, schedule: str, dataset: str) -> dict[str, Any]:
    """Returns all parameters that decide the result of a training. dataset: the sha256 of the dataset."""
    sections = {"seed": params.training_seed(schedule), **params.to_json("diffusion", "network", "training")}
    row = params.schedules[schedule]
    sections["network"] = _recorded(sections["network"])
    return {"schedule": schedule, "schedules": row.options(), "dataset_sha256": dataset, **row.origin, **sections}


def _recorded(network: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section `network` without a default `kind`, so that runs of ddpm versions without `kind` are found too."""
    return {key: value for key, value in network.items() if (key, value) != ("kind", USUAL_NETWORK)}


def identity_of_model(model: ModelRecord) -> dict[str, Any]:
    """Returns the same parameters as training_identity, but reads them from model.json."""
    training, network = dict(model.training.content), model.network
    derived = (
        "image_channels",
        "image_size",
        "out_channels",
        "classes",
    )  # entries that the data and `diffusion` determine
    return {
        "schedule": model.schedule.name,
        "schedules": model.schedule.row,
        "dataset_sha256": model.data.sha256,
        "seed": training.pop("seed"),
        **{key: training.pop(key) for key in ("base",) if key in training},
        "diffusion": {
            "timesteps": model.schedule.timesteps,
            "target": model.target,
            "variance": model.variance,
            "conditional": network.classes > 0,
        },
        "network": _recorded({key: value for key, value in network.content.items() if key not in derived}),
        "training": training,
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as MLflow parameters with dotted names."""
    parameters: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            parameters |= flat(item, f"{prefix}{name}.")
        else:
            parameters[prefix + name] = item if isinstance(item, str) else json.dumps(item)
    return parameters
