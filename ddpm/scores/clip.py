"""The extractor CLIP. CMMD compares its features (Jayasumana et al. 2024, arXiv:2401.09603). towers.py has the network."""

from __future__ import annotations

from pathlib import Path

import torch

from ddpm.scores import towers

# EXTRACTORS reads these literals.
TITLE = "CLIP"
LAYERS = (768,)
DEFAULT = 768
JUDGES = {"cmmd": 768}

WEIGHTS_VARIABLE = "DDPM_CLIP_WEIGHTS"


def load(layer: int, cache: Path, device: torch.device | str = "cpu") -> towers.Tower:
    """Loads the network. The only layer is the image embedding. Raises WeightsError."""
    return towers.clip(WEIGHTS_VARIABLE, device)
