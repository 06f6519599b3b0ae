"""Computes features of uint8 images with any extractor, and reads the weights files of extractors."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import InputError
from ddpm.rooms import Room

# The extractors, as ddpm.provenance.code needs them to find the module that params.yaml selects. EXTRACTORS has the same rows,
# without importing torch.
ROWS: Room[tuple[int, ...]] = Room("ddpm.scores", "evaluation.extractor", "LAYERS")


State = dict[str, Tensor]


class WeightsError(InputError):
    """The weights of an extractor are missing or wrong. The message is one line that says what to do."""


class Features(Protocol):
    """A loaded extractor, which turns uint8 images [N, 1 or 3, H, W] into features [N, D], both on `device`.

    Args:
        name: identifies exactly these features in records and caches.
        layer: the layer of the features.
        sha256: the hash of the weights file, or of other data that determines the features.
        device: the device of images and features.
    """

    name: str
    layer: int
    sha256: str
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor: ...

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Returns logits [N, classes] for the Inception Score from features [N, D], or None without a classifier."""
        ...


def load(extractor: str, layer: int, cache: Path, device: torch.device | str = "cpu") -> Features:
    """Loads an extractor.

    Args:
        extractor: the extractor's name, a key of EXTRACTORS.
        layer: one of the extractor's LAYERS, or a layer of its JUDGES.
        cache: the folder where an extractor may store converted weights.
        device: the device of the extractor.

    Raises:
        InputError: the weights are missing or wrong.
    """
    loaded: Features = import_module(ROWS.module(extractor)).load(layer, cache, device)
    return loaded


def extract(
    extractor: Features,
    images: NDArray[np.uint8],
    batch: int = 50,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.float32]:
    """Computes the features of images: float32 [N, D]. Extractors repeat a grey image as three equal channels.

    Args:
        extractor: the extractor, from `load`.
        images: uint8 [N, 1 or 3, H, W], N at least 1.
        batch: the number of images on the device at once, which changes features only by rounding.
        progress: called with the number of images done.

    Raises:
        ValueError: `images` has another type or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"expected uint8 images N,C,H,W with 1 or 3 channels, found {images.dtype} {images.shape}")
    features = np.empty((0, 0), np.float32)
    for start in range(0, len(images), batch):
        part = extractor(torch.from_numpy(np.array(images[start : start + batch])).to(extractor.device)).cpu().numpy()
        if not start:
            features = np.empty((len(images), part.shape[1]), np.float32)
        features[start : start + len(part)] = part
        progress(start + len(part))
    return features


def read_weights(path: Path) -> tuple[State, str]:
    """Returns the tensors and the sha256 of a file that torch or safetensors wrote. Raises WeightsError.

    The tensors come from the same bytes as the hash. Loading executes no code in the file.
    """
    from safetensors.torch import load as load_safetensors

    try:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            state = load_safetensors(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such weights file") from None
    except Exception as error:  # noqa: BLE001 - torch raises a dozen types on other files
        raise WeightsError(f"{path}: not a weights file: {one_line(error)}") from None
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: not a weights file: expected tensors by name, found a {type(state).__name__}")
    return state, hashlib.sha256(content).hexdigest()


def one_line(error: Exception) -> str:
    """Returns the beginning of an error's message in one line."""
    return " ".join(str(error).split())[:200]
