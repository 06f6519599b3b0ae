"""The image networks of DINOv2 and CLIP, with the preprocessing that defines FD (DINOv2) and CMMD.

DINOv2 (Oquab et al. 2023, arXiv:2304.07193) runs in timm, with the settings of Stein et al. 2023 (arXiv:2306.04675, the package
dgm-eval):

- The network is ViT-L/14. The features are the class token after the last norm.
- Images are resized to 224x224 by PIL's bicubic filter, and scaled by ImageNet's mean and deviation.
- The position embeddings in the weights belong to 37x37 patches. They are resized to 16x16 by the method of DINOv2's own code,
  which differs from timm's method.

CLIP (Radford et al. 2021, arXiv:2103.00020) runs in open_clip, with the settings of Jayasumana et al. 2024 (arXiv:2401.09603,
CMMD):

- The network is ViT-L/14 at 336 pixels. The features are the embedding, scaled to unit length.
- The square in the middle of each image, with values in 0 ... 1, is resized by the bicubic filter with antialiasing, and scaled
  by CLIP's mean and deviation.

The weights come from a file that an environment variable names. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ddpm.scores.features import State, WeightsError, one_line, read_weights

DINOV2, CLIP = "vit_large_patch14_dinov2", "ViT-L-14-336-quickgelu"  # names of the networks in timm and open_clip
_DINOV2_SIDE = 224
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, deviation
_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_CPU_IMAGES = 4  # images per pass on a CPU


class Tower:
    """An image network: uint8 [N, 1 or 3, H, W] -> float32 [N, layer], both on `device`.

    Args:
        name: identifies the features in records and caches.
        network: a network that turns prepared images into features.
        layer: the number of features.
        sha256: the hash of the weights file.
        device: the device of the network.
        prepare: a function that resizes and scales images: uint8 [N, 3, H, W] -> float32 [N, 3, side, side].
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        layer: int,
        sha256: str,
        device: torch.device,
        prepare: Callable[[Tensor], Tensor],
    ) -> None:
        self.name, self.layer, self.sha256, self.device, self._prepare = name, layer, sha256, device, prepare
        self._network = network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        pieces = images.split(_CPU_IMAGES) if self.device.type == "cpu" else (images,)
        # By default, cuDNN may round float32 to TF32.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
            return torch.cat([self._network(self._prepare(piece.expand(-1, 3, -1, -1))) for piece in pieces])

    def logits(self, features: NDArray[np.float32]) -> None:
        """Returns None, because there is no classifier."""


def dinov2(variable: str, device: torch.device | str = "cpu", architecture: str = DINOV2) -> Tower:
    """Loads DINOv2.

    Args:
        variable: the environment variable that names the weights file, in Meta's or timm's format.
        device: the device of the network.
        architecture: timm's name of the network; tests use a smaller network.

    Raises:
        WeightsError: timm or the weights are missing, or the weights are wrong.
    """
    state, sha256 = _weights(variable, "timm", "dinov2_vitl14_pretrain.pth")
    import timm

    with torch.device("meta"):
        network: Any = timm.create_model(architecture, pretrained=False, num_classes=0, img_size=_DINOV2_SIDE)
    state = {name: tensor for name, tensor in state.items() if name != "mask_token"}  # used only in training
    if "pos_embed" in state:
        state["pos_embed"] = _resized_positions(state["pos_embed"].float(), network.patch_embed.grid_size[0])
    _load(network, state, variable)
    target = torch.device(device)

    def prepare(images: Tensor) -> Tensor:
        from PIL import Image

        shape = (_DINOV2_SIDE, _DINOV2_SIDE)
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        resized = [np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC)) for image in pixels]
        return _scaled(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(target).float() / 255, *_IMAGENET)

    return Tower("dinov2-vit-l-14", network, network.num_features, sha256, target, prepare)


def clip(variable: str, device: torch.device | str = "cpu", architecture: str = CLIP) -> Tower:
    """Loads the image network of CLIP.

    Args:
        variable: the environment variable that names the weights file, in open_clip's format.
        device: the device of the network.
        architecture: open_clip's name of the network; tests use a smaller network.

    Raises:
        WeightsError: open_clip or the weights are missing, or the weights are wrong.
    """
    state, sha256 = _weights(
        variable, "open_clip", "open_clip_model.safetensors of timm/vit_large_patch14_clip_336.openai"
    )
    import open_clip

    config = open_clip.get_model_config(architecture)
    with torch.device("meta"):
        network = open_clip.CLIP(**config).visual
    prefix = "visual."  # the other tensors belong to the text network
    _load(network, {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}, variable)
    shape = (config["vision_cfg"]["image_size"],) * 2

    def prepare(images: Tensor) -> Tensor:
        resized = functional.interpolate(_middle(images).float() / 255, shape, mode="bicubic", antialias=True)
        return _scaled(resized, *_OPENAI)

    unit = nn.Sequential(network, _UnitLength())
    return Tower("clip-vit-l-14-336-openai", unit, config["embed_dim"], sha256, torch.device(device), prepare)


class _UnitLength(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1)


def _middle(images: Tensor) -> Tensor:
    """Returns the largest square in the middle of each image."""
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    return images[..., top : top + side, left : left + side]


def _scaled(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Returns (images - mean) / deviation, by channel."""
    m, d = (images.new_tensor(values)[:, None, None] for values in (mean, deviation))
    return (images - m) / d


def _resized_positions(positions: Tensor, side: int) -> Tensor:
    """Resizes position embeddings [1, 1 + n*n, D] to [1, 1 + side*side, D].

    DINOv2's `interpolate_pos_encoding` adds 0.1 to the new side before dividing by the old side (`interpolate_offset`), and
    doesn't smooth (`interpolate_antialias`). Positions that already fit, or that form
    no square, are returned unchanged.
    """
    token, patches = positions[:, :1], positions[:, 1:]
    old = round(patches.shape[1] ** 0.5)
    if old == side or old * old != patches.shape[1]:
        return positions
    grid = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _weights(variable: str, package: str, example: str) -> tuple[State, str]:
    """Returns the tensors and the sha256 of a weights file.

    Args:
        variable: the environment variable that names the file.
        package: the package that the network needs.
        example: the name of a suitable file, for the error message.

    Raises:
        WeightsError: the package or the file is missing, or the file is no weights file.
    """
    if importlib.util.find_spec(package) is None:
        raise WeightsError(f"{package} is not installed: pip install 'ddpm[judges]'")
    path = os.environ.get(variable)
    if not path:
        raise WeightsError(f"no weights: set {variable} to the path of a weights file, such as {example}")
    return read_weights(Path(path))


def _load(network: Any, state: State, variable: str) -> None:
    """Loads weights into a network on the meta device. Raises WeightsError unless every tensor fits."""
    try:
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise WeightsError(f"{os.environ[variable]}: wrong weights for {variable}: {one_line(error)}") from None
