"""The extractor CLIP. CMMD compares features of CLIP (Jayasumana et al. 2024, arXiv:2401.09603). The network is in towers.py."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.scores import towers

# EXTRACTORS reads these lines as JSON.
TITLE = "CLIP"
LAYERS = [768]
DEFAULT = 768
JUDGES = {"cmmd": 768}

WEIGHTS_VARIABLE = "DDPM_CLIP_WEIGHTS"


def load(layer: int, cache: Path, device: torch.device | str = "cpu") -> towers.Tower:
    """Loads CLIP. The only layer is the image embedding. Raises WeightsError if the weights are missing or wrong."""
    return towers.clip(WEIGHTS_VARIABLE, device)
