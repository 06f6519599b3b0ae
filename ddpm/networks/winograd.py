"""Compiles a network for its device: torch.compile on a GPU, and Winograd's F(4x4, 3x3) for 3x3 convolutions on a CPU.

The transforms are written in C (winograd.c), which this machine's C compiler compiles once.

A tile of 4x4 outputs takes 36 multiplications per pair of channels instead of 144 (Lavin & Gray 2016, section 4).
Between the transforms, torch computes 36 matrix products. The gradients are the exact adjoints, tile by tile: 36 more
products for the gradient of x, and 36 for that of the kernel. Outputs differ from those of a direct convolution by
about 1e-5 of their size, since the transforms amplify rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.networks.layers import NormSwish

SOURCE = Path(__file__).with_name("winograd.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-Wno-psabi")
WIDE = 8  # channels in a vector of the C code
TILES = 1024  # tiles per pass, or those of one image if more: transformed tiles then stay in the processor's cache
FEW = 8  # fewer tiles are too little work for reading the transformed kernel: convolved directly

# The transform of kernels, G of Lavin & Gray.
G = torch.tensor(
    [[1 / 4, 0, 0], [-1 / 6] * 3, [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)
GG = torch.einsum("ia,jb->ijab", G, G).reshape(36, 9)

Network = TypeVar("Network", bound=nn.Module)


class NoCompiler(RuntimeError):
    """There is no C compiler, or it failed, or its library cannot be kept or loaded."""


def compiled(net: Network, dynamic: bool | None = None) -> Network:
    """Returns a faster form of the network: on a GPU from torch.compile, on a CPU the network itself, changed in place.

    Parameters, gradients and state_dict stay the same. On a CPU, float32 inputs in channels_last are faster, and the
    first call compiles the C code in about 1 s. torch.compile gets `dynamic`. Raises NoCompiler.
    """
    device = next(net.parameters()).device
    if device.type == "cuda":
        _compiler(("gcc", "clang"))  # Triton needs one; torch.compile would fail only when the network is first called
    if device.type != "cpu":
        return torch.compile(net, dynamic=dynamic)  # type: ignore[return-value]
    _library()
    for module in net.modules():
        if type(module) is nn.Conv2d and _suits(module, 3):
            module.__class__ = Convolution
        elif type(module) is nn.Conv2d and _suits(module, 1):
            module.__class__ = Pointwise
        elif type(module) is NormSwish and module.num_channels % WIDE == 0:
            module.__class__ = Normalisation
    return net


def _suits(layer: nn.Conv2d, size: int) -> bool:
    """Returns whether a layer is a plain convolution with a kernel of that size that keeps the image's size."""
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    wide = size == 1 or (layer.in_channels % WIDE == 0 and layer.out_channels % WIDE == 0)
    return shape == ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros") and wide


def _plain(x: Tensor) -> bool:
    """Returns whether the C code can compute on x: float32, and no autocast."""
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class Convolution(nn.Conv2d):
    """A 3x3 convolution, padded by one, by Winograd's method."""

    _known: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not _plain(x) or len(x) * _tiles(x) < FEW:
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _Winograd.apply(x, self.weight, self.bias)
        state = (None if self.weight.is_inference() else self.weight._version, self.weight.data_ptr())
        if self._known is None or self._known[0] != state:
            self._known = (state, _kernel(self.weight))
        return _convolve(x, self._known[1], self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as one matrix product, which is faster than oneDNN's convolution, above all for gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Normalisation(NormSwish):
    """Group normalisation and swish in one pass, if no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if grad or not _plain(x):
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        n, c, h, w = x.shape
        _call("normalised_swish", x, self.weight, self.bias, y, n, h * w, c, self.num_groups, self.eps)
        return y


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, kernel = x.contiguous(memory_format=torch.channels_last), _kernel(weight)
        ctx.save_for_backward(x, kernel)
        return _convolve(x, kernel, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        x, kernel = ctx.saved_tensors
        return *_backward(x, kernel, gradient, of_x, of_weight), gradient.sum((0, 2, 3)) if of_bias else None


def _tiles(x: Tensor) -> int:
    """Returns the number of tiles of one image."""
    return -(-x.shape[2] // 4) * -(-x.shape[3] // 4)


def _kernel(weight: Tensor) -> Tensor:
    """Transforms a kernel [K, C, 3, 3] to [36, C, K]: G w G^T."""
    by_place = weight.detach().permute(2, 3, 1, 0).reshape(9, -1)
    return (GG @ by_place).view(36, weight.shape[1], weight.shape[0])


_space = threading.local()


def _planes(slot: int, tiles: int, channels: int) -> Tensor:
    """Returns a buffer [36, tiles, channels], reused by later calls: allocating costs more than what is computed in it.

    An even number of tiles is raised by one: planes that lie a power of two apart would share a few cache lines.
    """
    rows = tiles | 1
    size = 36 * rows * channels
    buffers = _space.__dict__.setdefault("buffers", {})
    if slot not in buffers or buffers[slot].numel() < size:
        with torch.inference_mode(False):  # a tensor of inference mode could not be used in training later
            buffers[slot] = torch.empty(size)
    return buffers[slot][:size].view(36, rows, channels)


def _parts(x: Tensor) -> list[slice]:
    """Splits a batch into parts of at most TILES tiles, one image at least."""
    size = max(1, TILES // _tiles(x))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """Convolves x [N, C, H, W] with a transformed kernel [36, C, K]: returns [N, K, H, W] in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    k = kernel.shape[2]
    y = torch.empty((n, k, h, w), memory_format=torch.channels_last)
    for part in _parts(x):
        images = part.stop - part.start
        tiles = images * _tiles(x)
        inputs, outputs = _planes(0, tiles, c), _planes(1, tiles, k)
        _call("input_planes", x[part], inputs, images, h, w, c, inputs.shape[1])
        torch.bmm(inputs, kernel, out=outputs)
        _call("output_images", outputs, bias, y[part], images, h, w, k, outputs.shape[1])
    return y


def _backward(
    x: Tensor, kernel: Tensor, gradient: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of x, in channels_last, and of the weights [K, C, 3, 3] from `gradient`, that of y."""
    _, c, h, w = x.shape
    k = gradient.shape[1]
    total = torch.zeros_like(kernel) if of_weight else None
    gradient_x = torch.empty_like(x) if of_x else None
    for part in _parts(x):
        images = part.stop - part.start
        tiles = images * _tiles(x)
        inputs, gradients = _planes(0, tiles, c), _planes(1, tiles, k)
        _call("gradient_planes", gradient[part], gradients, images, h, w, k, gradients.shape[1])
        if total is not None:
            _call("input_planes", x[part], inputs, images, h, w, c, inputs.shape[1])
            inputs[:, tiles:] = gradients[:, tiles:] = 0.0
            total.baddbmm_(inputs.transpose(1, 2), gradients)
        if gradient_x is not None:
            torch.bmm(gradients, kernel.transpose(1, 2), out=inputs)
            _call("input_gradients", inputs, gradient_x[part], images, h, w, c, inputs.shape[1])
    if total is None:
        return gradient_x, None
    return gradient_x, (GG.T @ total.view(36, -1)).view(3, 3, c, k).permute(3, 2, 0, 1)


def _call(name: str, *arguments: Any) -> None:
    """Calls a C function: passes tensors as addresses, ints as long and other numbers as double."""
    converted: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        else:
            converted.append((ctypes.c_long if isinstance(argument, int) else ctypes.c_double)(argument))
    getattr(_library(), name)(*converted)


@cache
def _library() -> ctypes.CDLL:
    """Loads winograd.c, compiled for this processor. Raises NoCompiler.

    The library is kept beside torch.hub's folder and compiled again if it is damaged.
    """
    compiler, threads = _compiler(), _openmp()
    code = [_digest(path) for path in (SOURCE, Path(__file__))]
    inputs = (code, compiler, _run([*compiler, "--version"]), threads, _processor())
    folder = Path(torch.hub.get_dir()).parent / "ddpm"
    name = f"native-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}"
    try:
        return ctypes.CDLL(str(_find_library(folder, name) or _compile_library(folder, name, compiler, threads)))
    except OSError as error:  # a full disk, or a folder that cannot be written to or run from
        raise NoCompiler(f"the compiled library cannot be kept or loaded: {error}") from None


def _find_library(folder: Path, name: str) -> Path | None:
    """Returns the library of an earlier process, if its bytes have the hash in its file name."""
    return next((path for path in folder.glob(f"{name}-*.so") if path.name == f"{name}-{_digest(path)}.so"), None)


def _compile_library(folder: Path, name: str, compiler: list[str], threads: str) -> Path:
    """Compiles winograd.c. Returns the library's file. Raises NoCompiler or OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        compiled_file, library = Path(temporary) / "native.o", Path(temporary) / "native.so"
        _run([*compiler, *FLAGS, *(["-fopenmp"] if threads else []), "-c", str(SOURCE), "-o", str(compiled_file)])
        _run([*compiler, "-shared", str(compiled_file), *([threads] if threads else []), "-o", str(library)])
        with library.open("rb") as file:
            os.fsync(file.fileno())
        return library.replace(folder / f"{name}-{_digest(library)}.so")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compiler(names: Sequence[str] = ("cc", "gcc")) -> list[str]:
    """Returns the command that CC names, or else the first of `names` that is installed. Raises NoCompiler."""
    named = shlex.split(os.environ.get("CC", ""))
    command = named or [name for name in names if shutil.which(name)][:1]
    if not command or shutil.which(command[0]) is None:
        raise NoCompiler(f"no C compiler found ({' '.join(named) or ', '.join([*names, 'or what CC names'])})")
    return command


def _run(command: list[str]) -> str:
    """Runs the compiler; returns its standard output. Raises NoCompiler."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it printed no message"])[0]
        raise NoCompiler(f"the C compiler failed: {said}")
    return done.stdout


def _openmp() -> str:
    """Returns the OpenMP library that torch has loaded, or "". The C code is linked to it to share torch's threads."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text(encoding="utf-8").splitlines():
            file = line.split(maxsplit=5)[-1]  # the path, which may contain spaces
            if "/lib" in file and Path(file).name.startswith(("libgomp", "libiomp5")):
                return file
    return ""


def _processor() -> str:
    """Describes the processor and its features, which the compiled code depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    named = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")  # on x86 and ARM
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(named))])
