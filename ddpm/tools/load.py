"""`ddpm.load`: opens a model by the folder of its checkpoint, or by its name in MLflow's registry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ddpm.errors import InputError
from ddpm.files import checkpoint
from ddpm.provenance import checkout

if TYPE_CHECKING:
    import torch

    from ddpm.diffusion.denoiser import Denoiser

REGISTERED = "models:"  # the prefix of a registered model's name


def load(
    model: str | os.PathLike[str], device: torch.device | str = "cpu", clip: bool | float | None = None
) -> Denoiser:
    """Loads a trained, imported or registered model. Loading a folder needs only torch, numpy and safetensors.

    >>> denoiser = load("models/cosine")
    >>> images = sample(denoiser, torch.randn(16, 1, 8, 8), sampler="ddim", steps=50)

    The network has the averaged weights (EMA), whose hash is checked. The network is in eval mode and channels-last format. To
    choose the classes of a conditional network, use `dataclasses.replace(denoiser, labels=...)`.

    Args:
        model: a folder that `ddpm train` or `ddpm import-diffusers` wrote, models:/NAME@ALIAS or models:/NAME/VERSION.
        device: the device of the network.
        clip: the argument `clip` of Denoiser. None means the setting of a registered model, and True for a folder.

    Returns:
        The denoiser: the network with its schedule and target.

    Raises:
        InputError: the model is missing, damaged or inconsistent. For a registered model, also if MLflow is not installed or
            does not answer.
    """
    with located(model) as (folder, settings):
        denoiser, _ = checkpoint.load(folder, device, settings.get("clip", True) if clip is None else clip)
    return denoiser


@contextmanager
def located(model: str | os.PathLike[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the checkpoint folder of a model, and the sampler settings of a registered model ({} for a folder).

    The folder of a registered model is temporary: it exists only inside the `with` block. Raises InputError.
    """
    name = os.fspath(model)
    if not name.startswith(REGISTERED):
        yield _folder(name), {}
        return
    with TemporaryDirectory(prefix="ddpm-model-") as temporary:
        try:
            from ddpm import tracking

            found = tracking.fetch_model(name, Path(temporary))
        except ModuleNotFoundError as error:
            raise InputError(f"{name}: {checkout.missing(error)}") from None
        yield found


def _folder(name: str) -> Path:
    """Returns the folder of a checkpoint. If there is no such folder, raises an InputError that lists the models here."""
    folder = Path(name)
    if not folder.is_dir():
        known = [str(path.parent) for top in ("models", "imported") for path in sorted(Path(top).glob("*/model.json"))]
        advice = (
            f"choose one of {', '.join(known)}"
            if known
            else "`ddpm train` and `ddpm import-diffusers` write such folders"
        )
        raise InputError(f"{name}: no such folder; {advice}")
    return folder
