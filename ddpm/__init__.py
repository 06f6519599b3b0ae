"""Denoising diffusion: noise schedules, denoisers, samplers and the network of Ho et al. 2020, on torch alone.

>>> from ddpm import Denoiser, NoiseSchedule, UNet, sample
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.denoiser import TARGETS, Denoiser
    from ddpm.noise import gaussian
    from ddpm.objective import LOSSES
    from ddpm.paths import blend, encode, interpolate, snapshots
    from ddpm.samplers import SAMPLERS, sample, trajectory
    from ddpm.schedule import SCHEDULES, NoiseSchedule
    from ddpm.timesteps import SPACINGS
    from ddpm.training import fit
    from ddpm.unet import UNet

__all__ = [
    "LOSSES",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "TARGETS",
    "Denoiser",
    "NoiseSchedule",
    "UNet",
    "blend",
    "encode",
    "fit",
    "gaussian",
    "interpolate",
    "sample",
    "snapshots",
    "trajectory",
]

# Names are imported on first use: `import ddpm` costs nothing, and a stage depends only on the modules it uses.
_HOMES = {
    "Denoiser": "denoiser",
    "LOSSES": "objective",
    "NoiseSchedule": "schedule",
    "SAMPLERS": "samplers",
    "SCHEDULES": "schedule",
    "SPACINGS": "timesteps",
    "TARGETS": "denoiser",
    "UNet": "unet",
    "blend": "paths",
    "encode": "paths",
    "fit": "training",
    "gaussian": "noise",
    "interpolate": "paths",
    "sample": "samplers",
    "snapshots": "paths",
    "trajectory": "samplers",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # not written here: it would be a dependency of every stage
        return importlib.import_module("importlib.metadata").version("ddpm")
    if name not in _HOMES:
        raise AttributeError(f"module 'ddpm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ddpm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
