"""Identifies a report: the parameters that its page shows, and a key that hashes parameters, dataset and scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ddpm.files import records
from ddpm.files.dataset import DatasetRecord
from ddpm.files.params import Params
from ddpm.files.scores import Row

# The sections of params.yaml that the page shows, and on which the stage `report` depends.
SECTIONS: tuple[str, ...] = ("seed", "data", "diffusion", "network", "training", "sampling", "evaluation", "likelihood")
SECTIONS += ("schedules", "samplers", "sweep", "report")


def key(params: Params, rows: Sequence[Row], data: DatasetRecord) -> str:
    """Returns the key of a report: a hash of the parameters, the dataset and the scores."""
    points = [[row.point, {name: float(value) for name, value in row.values.items()}] for row in rows]
    about = {"parameters": parameters(params), "dataset": data.sha256, "points": points}
    return records.record_digest(about)


def key_of(page: str) -> str:
    """Returns the key in a page, or "" if an older version of ddpm wrote the page, without a key."""
    found = re.search(r'<html lang="en" data-report="([0-9a-f]{64})">', page)
    return found[1] if found else ""


def parameters(params: Params) -> dict[str, dict[str, Any]]:
    """Returns the parameters that decide the outputs, by section and name. Omits schedules and samplers outside the sweep."""
    raw = params.to_json(*SECTIONS)
    shown: dict[str, dict[str, Any]] = {"": {"seed": raw["seed"]}}
    shown |= {name: raw[name] for name in SECTIONS if name not in ("seed", "schedules", "samplers")}
    shown["schedules"] = {
        name: {"schedule": params.schedules[name].schedule, **params.schedules[name].options()}
        | ({"seed": params.schedules[name].seed} if params.schedules[name].seed is not None else {})
        | params.schedules[name].origin
        for name in params.sweep.schedules
    }
    shown["samplers"] = {name: params.samplers[name].options() for name in params.sweep.samplers}
    return shown
