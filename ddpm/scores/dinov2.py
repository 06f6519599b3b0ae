"""The extractor DINOv2. FD (DINOv2) compares its features (Stein et al. 2023, arXiv:2306.04675). The network is in towers.py."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.scores import towers

# EXTRACTORS reads these lines as JSON.
TITLE = "DINOv2"
LAYERS = [1024]
DEFAULT = 1024
JUDGES = {"fd_dinov2": 1024}

WEIGHTS_VARIABLE = "DDPM_DINOV2_WEIGHTS"


def load(layer: int, cache: Path, device: torch.device | str = "cpu") -> towers.Tower:
    """Loads DINOv2. The only layer is the class token. Raises WeightsError if the weights are missing or wrong."""
    return towers.dinov2(WEIGHTS_VARIABLE, device)
