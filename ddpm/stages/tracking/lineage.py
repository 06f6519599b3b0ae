"""What made an output: the parameters of a training or a point, from the outputs themselves and from dvc.lock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm.stages import store
from ddpm.stages.errors import InputError
from ddpm.stages.params import Evaluation, Params, Point, Sampler, Sampling


@dataclass(frozen=True)
class PointSettings:
    """The parameters of a point: its sampler's row, and the sections that its stages depend on."""

    seed: int
    row: dict[str, Any]
    sampling: dict[str, Any]
    evaluation: dict[str, Any]

    @classmethod
    def of(cls, params: Params, point: Point) -> PointSettings:
        """Raises InputError when params has no such row."""
        if point.sampler not in params.samplers:
            raise InputError(f"no row '{point.sampler}' in samplers; there are {', '.join(params.samplers)}")
        return cls(
            params.seed,
            params.samplers[point.sampler].options(),
            params.sampling.model_dump(mode="json"),
            params.evaluation.model_dump(mode="json"),
        )


def settings_of(params: Params, point: Point, root: Path, stages: Mapping[str, Any]) -> PointSettings | None:
    """What a point on disk was made with, by dvc.lock if that knows the file, else by `params`; None when it is stale."""
    sample, evaluate = f"sample@{point.name}", f"evaluate@{point.name}"
    if point.sampler in params.samplers:
        settings = asdict(PointSettings.of(params, point))
    else:
        settings = {"seed": params.seed, "row": None, "sampling": {}, "evaluation": params.evaluation.model_dump()}
    try:
        if store.is_locked(stages, sample, root, store.samples_file(point)):
            model = store.model_dir(point.schedule)
            made = store.locked_md5(stages, f"train@{point.schedule}", "outs", model)
            if made != store.locked_md5(stages, sample, "deps", model):
                return None
            values = stages[sample]["params"]["params.yaml"]
            settings["seed"] = values["seed"]
            settings["row"] = Sampler.model_validate(values[f"samplers.{point.sampler}"]).options()
            settings["sampling"] = Sampling.model_validate(values["sampling"]).model_dump(mode="json")
        if store.is_locked(stages, evaluate, root, store.metrics_file(point)):
            values = stages[evaluate]["params"]["params.yaml"]
            settings["evaluation"] = Evaluation.model_validate(values["evaluation"]).model_dump(mode="json")
    except (KeyError, ValueError):  # made when params.yaml had other keys
        return None
    return PointSettings(**settings) if settings["row"] is not None else None


def training_identity(params: Params, schedule: str, dataset: str) -> dict[str, Any]:
    """All that was configured of a training. dataset: sha256."""
    sections = params.model_dump(mode="json", include={"seed", "diffusion", "network", "training"})
    row = params.schedules[schedule].options()
    return {"schedule": schedule, "schedules": row, "dataset_sha256": dataset, **sections}


def identity_of_model(about: Mapping[str, Any]) -> dict[str, Any]:
    """The same, from model.json."""
    training = dict(about["training"])
    # What follows from the data, the variance and the condition.
    derived = ("kind", "image_channels", "image_size", "out_channels", "classes")
    return {
        "schedule": about["schedule"]["name"],
        "schedules": {key: value for key, value in about["schedule"].items() if key not in ("name", "timesteps")},
        "dataset_sha256": about["data"]["sha256"],
        "seed": training.pop("seed"),
        "diffusion": {
            "timesteps": about["schedule"]["timesteps"],
            "target": about["target"],
            "variance": about.get("variance", "fixed"),
            "conditional": "classes" in about["network"],
        },
        "network": {name: value for name, value in about["network"].items() if name not in derived},
        "training": training,
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings -> MLflow parameters with dotted names."""
    parameters: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            parameters |= flat(item, f"{prefix}{name}.")
        else:
            parameters[prefix + name] = item if isinstance(item, str) else json.dumps(item)
    return parameters


def run_times(root: Path, output: Path) -> dict[str, Any]:
    """When, where and how fast an output was made; empty when that is not known."""
    path = root / store.run_file(output)
    return store.read_json(path) if path.exists() else {}
