"""Where torch computes."""

from __future__ import annotations

import torch

from ddpm.stages.errors import InputError


def find_device(name: str) -> torch.device:
    """ "auto" takes the GPU where there is one. Raises InputError for "cuda" without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device is cuda, but torch finds no GPU here; set it to auto or cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
