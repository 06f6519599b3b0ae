"""Builds the schedules of params.yaml, and measures the prepared data to which they add noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ddpm.errors import InputError
from ddpm.files.dataset import DatasetRecord
from ddpm.files.params import Params

if TYPE_CHECKING:
    from ddpm.diffusion.schedule import NoiseSchedule


def schedule_of(params: Params, name: str, timesteps: int) -> NoiseSchedule:
    """Returns the schedule of a row of params.schedules at T = timesteps. Raises InputError."""
    from ddpm.diffusion.schedule import NoiseSchedule  # here, because it imports torch, and publishing needs no torch

    row = params.schedules[name].options()
    try:
        return NoiseSchedule.named(row.pop("schedule"), timesteps, **row)
    except ValueError as error:
        raise InputError(f"schedules.{name}: {error}") from None


def data_mean_square(record: DatasetRecord) -> float:
    """Returns E[x_0^2] of images in [-1, 1], from dataset.json's mean and deviation per channel in [0, 1]."""
    squares = [(2 * mean - 1) ** 2 + 4 * std**2 for mean, std in zip(record.mean, record.std, strict=True)]
    return float(np.mean(squares))
