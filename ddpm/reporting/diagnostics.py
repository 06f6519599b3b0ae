"""Builds the schedules of params.yaml, and computes E[x_0^2] of the prepared data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddpm.errors import InputError
from ddpm.files.dataset import DatasetRecord
from ddpm.files.params import Params

if TYPE_CHECKING:
    from ddpm.diffusion.schedule import NoiseSchedule


def schedule_of(params: Params, name: str, timesteps: int) -> NoiseSchedule:
    """Builds the schedule of a row of params.schedules, with T = timesteps. Raises InputError."""
    from ddpm.diffusion.schedule import (
        NoiseSchedule,
    )  # imported here, since this imports torch, which publishing does not need

    row = params.schedules[name].options()
    try:
        return NoiseSchedule.named(row.pop("schedule"), timesteps, **row)
    except ValueError as error:
        raise InputError(f"schedules.{name}: {error}") from None


def data_mean_square(record: DatasetRecord) -> float:
    """Returns E[x_0^2] of images in [-1, 1], computed from the mean and deviation of each channel in dataset.json."""
    squares = [(2 * mean - 1) ** 2 + 4 * std**2 for mean, std in zip(record.mean, record.std, strict=True)]
    return float(np.mean(squares))
