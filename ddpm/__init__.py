"""Denoising diffusion: noise schedules, denoisers, samplers and the network of Ho et al. 2020, on torch and numpy.

>>> from ddpm import Denoiser, NoiseSchedule, UNet, load, sample

`help()` explains each function and class. The tables map names to variants:

    SCHEDULES   noise schedules, for NoiseSchedule.named
    TARGETS     what a network can predict, for Denoiser
    SAMPLERS    how to step from noise to an image, for sample
    SPACINGS    which times a sampler visits, for sample
    LOSSES      what training minimises, for the objective of fit
    NETWORKS    network classes, by the value of network.kind in params.yaml
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm.diffusion.denoiser import TARGETS, Denoiser
    from ddpm.diffusion.noise import gaussian
    from ddpm.diffusion.paths import blend, encode, interpolate, snapshots
    from ddpm.diffusion.samplers import SAMPLERS, sample, trajectory
    from ddpm.diffusion.schedule import SCHEDULES, NoiseSchedule
    from ddpm.diffusion.timesteps import SPACINGS
    from ddpm.networks.network import NETWORKS
    from ddpm.networks.unet import UNet
    from ddpm.tools.load import load
    from ddpm.training.fit import fit
    from ddpm.training.objective import LOSSES

__all__ = [
    "LOSSES",
    "NETWORKS",
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
    "load",
    "sample",
    "snapshots",
    "trajectory",
]

# The module of each name. A name is imported on first use. So `import ddpm` is fast, and a stage depends only on the modules that
# it uses.
_MODULES = {
    "Denoiser": "diffusion.denoiser",
    "LOSSES": "training.objective",
    "NETWORKS": "networks.network",
    "NoiseSchedule": "diffusion.schedule",
    "SAMPLERS": "diffusion.samplers",
    "SCHEDULES": "diffusion.schedule",
    "SPACINGS": "diffusion.timesteps",
    "TARGETS": "diffusion.denoiser",
    "UNet": "networks.unet",
    "blend": "diffusion.paths",
    "encode": "diffusion.paths",
    "fit": "training.fit",
    "gaussian": "diffusion.noise",
    "interpolate": "diffusion.paths",
    "load": "tools.load",
    "sample": "diffusion.samplers",
    "snapshots": "diffusion.paths",
    "trajectory": "diffusion.samplers",
}


def __getattr__(name: str) -> Any:
    # The version is not written here: every stage depends on this file, so a new version would rerun all stages.
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("ddpm")
    if name not in _MODULES:
        raise AttributeError(f"module 'ddpm' has no attribute '{name}'")
    return getattr(importlib.import_module(f"ddpm.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
