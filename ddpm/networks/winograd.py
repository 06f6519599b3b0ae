"""Compiles a network for its device: torch.compile on a GPU, and Winograd's method for 3x3 convolutions on a CPU.

The C code (winograd.c) holds convolutions, group normalisation with swish, and dropout, with their gradients. This machine's C
compiler compiles it once for float32, and once for bfloat16 if the processor multiplies bfloat16 numbers (AVX512_BF16).

In float32, F(4x4, 3x3) takes 36 multiplications per pair of channels for 4x4 outputs instead of 144 (Lavin & Gray 2016,
section 4). Its outputs differ from those of a direct convolution by about 3e-6 of their size. In bfloat16, which torch's
autocast chooses, F(2x2, 3x3) takes 16 instead of 36: its transforms keep the rounding near that of a direct convolution.
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

from ddpm.networks.layers import NormSwish, SharedDropout

SOURCE = Path(__file__).with_name("winograd.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-Wno-psabi")
WIDE = 8  # channels in a vector of the C code
BLOCK = 48  # tiles that each thread transforms at a time: they then stay in its cache
SUMMED = 512  # tiles that gradients of kernels are summed over at a time
# Convolutions of fewer pixels are left to torch: too little work for reading the transformed kernel, or for transforming it anew
# at each step of a training.
FEW, FEW_TRAINED = 128, 256

Network = TypeVar("Network", bound=nn.Module)


class NoCompiler(RuntimeError):
    """There is no C compiler, or it failed, or its library cannot be kept or loaded."""


def compiled(net: Network, dynamic: bool | None = None) -> Network:
    """Returns a faster form of the network: on a GPU from torch.compile, on a CPU the network itself, changed in place.

    Parameters, gradients and state_dict stay the same. On a CPU, inputs in channels_last are faster, and the
    first call compiles the C code in about 2 s. torch.compile gets `dynamic`. Raises NoCompiler.
    """
    device = next(net.parameters()).device
    if device.type == "cuda":
        _compiler(("gcc", "clang"))  # Triton needs one; torch.compile would fail only when the network is first called
    if device.type != "cpu":
        return torch.compile(net, dynamic=dynamic)  # type: ignore[return-value]
    _library(torch.float32)
    if multiplies_bfloat16():
        _library(torch.bfloat16)
    for module in net.modules():
        module.__class__ = _faster(module)
    return net


def _faster(module: nn.Module) -> type[nn.Module]:
    """Returns the class below that computes what `module` does, or its own class."""
    kind: type[nn.Module] = type(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        return Convolution if _suits(module, 3) else Pointwise if _suits(module, 1) else kind
    if isinstance(module, nn.GroupNorm) and module.num_channels % WIDE == 0:
        return NormalisedSwish if kind is NormSwish else Normalisation if kind is nn.GroupNorm else kind
    return {nn.Dropout: Dropout, SharedDropout: DropoutOfRows}.get(kind, kind)


@cache
def multiplies_bfloat16() -> bool:
    """Returns whether the C code computes in bfloat16 here: the processor has AVX512_BF16."""
    return "avx512_bf16" in _processor().split() and not _narrow()


def _narrow() -> bool:
    """Returns whether ATEN_CPU_CAPABILITY keeps torch, and so the C code, from the processor's AVX-512."""
    return "avx512f" in _processor().split() and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _suits(layer: nn.Conv2d, size: int) -> bool:
    """Returns whether a layer is a plain convolution with a kernel of that size that keeps the image's size."""
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    wide = size == 1 or (layer.in_channels % WIDE == 0 and layer.out_channels % WIDE == 0)
    return shape == ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros") and wide


def _number(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Returns the type in which the C code computes on x; None if it cannot: autocast decides, else x."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if weight.dtype != torch.float32 or x.dtype not in (torch.float32, dtype):
        return None
    return dtype if dtype == torch.float32 or (autocast and dtype == torch.bfloat16 and multiplies_bfloat16()) else None


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class Convolution(nn.Conv2d):
    """A 3x3 convolution, padded by one, by Winograd's method."""

    _known: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        dtype, trained = _number(x, self.weight), _needs_gradient(x, self.weight)
        if dtype is None or x[:, 0].numel() < (FEW_TRAINED if trained else FEW):
            return super().forward(x)
        if trained:
            return _Winograd.apply(x.to(dtype), self.weight, self.bias)
        state = (dtype, None if self.weight.is_inference() else self.weight._version, self.weight.data_ptr())
        if self._known is None or self._known[0] != state:
            self._known = (state, _kernel(self.weight, dtype, keep=True))
        return _convolve(x.to(dtype), self._known[1], self.bias, self.out_channels)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}


class Pointwise(nn.Conv2d):
    """A 1x1 convolution as one matrix product, which is faster than oneDNN's convolution, above all for gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Normalisation(nn.GroupNorm):
    """Group normalisation in two passes over the images, and two for its gradients."""

    linear = True

    def forward(self, x: Tensor) -> Tensor:
        dtype = _number(x, self.weight)
        if dtype is None:
            return super().forward(x)
        return _Normalised.apply(x.to(dtype), self.weight, self.bias, self.num_groups, self.eps, self.linear)


class NormalisedSwish(Normalisation, NormSwish):
    """The same, followed by swish in the same passes."""

    linear = False


class Dropout(nn.Dropout):
    """Dropout whose random numbers are made where they are used. torch's global generator draws the seed of each call."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32
        if not self.training or not 0 < self.p < 1 or x.dtype != dtype or x.numel() % WIDE:
            return super().forward(x)
        first = self.rank * x.numel() if isinstance(self, SharedDropout) else 0
        return _Dropped.apply(x, first, int(torch.randint(2**62, ())), self.p)


class DropoutOfRows(Dropout, SharedDropout):
    """The same for one of several processes."""


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = _channels_last(x)
        ctx.save_for_backward(x, weight)
        return _convolve(x, _kernel(weight, x.dtype), bias, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = _channels_last(gradients[0].to(x.dtype))
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _convolve(gradient, _kernel(weight, x.dtype, turned=True), None, x.shape[1]) if of_x else None,
            _kernel_gradients(x, gradient) if of_weight else None,
            gradient.sum((0, 2, 3), dtype=torch.float32) if of_bias else None,
        )


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, linear: bool) -> Tensor:
        x = _channels_last(x)
        y, moments = torch.empty_like(x), torch.empty(len(x), groups, 2)
        n, c, h, w = x.shape
        _call(x.dtype, "normalised", x, weight, bias, y, moments, n, h * w, c, groups, float(eps), int(linear))
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.linear = linear
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        gradient = _channels_last(gradients[0].to(x.dtype))
        of_x, of_parameters = torch.empty_like(x), torch.empty(len(x), 2, x.shape[1])
        n, c, h, w = x.shape
        arguments = (x, gradient, weight, bias, moments, of_x, of_parameters, n, h * w, c, moments.shape[1])
        _call(x.dtype, "normalised_gradients", *arguments, int(ctx.linear))
        of_weight, of_bias = of_parameters.sum(0)
        return of_x, of_weight, of_bias, None, None, None


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, seed: int, rate: float) -> Tensor:
        ctx.mask, ctx.layout = (first, seed, rate), torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return _dropped(x.contiguous(memory_format=ctx.layout), *ctx.mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(gradients[0].contiguous(memory_format=ctx.layout), *ctx.mask), None, None, None


def _dropped(x: Tensor, first: int, seed: int, rate: float) -> Tensor:
    y = torch.empty_like(x)
    _call(x.dtype, "dropped", x, y, x.numel(), first, seed, rate)
    return y


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_space = threading.local()


def _buffer(name: str, elements: int) -> Tensor:
    """Returns a buffer that later calls reuse: allocating costs more than what is computed in it."""
    buffers: dict[str, Tensor] = _space.__dict__
    if name not in buffers or buffers[name].numel() < elements:
        with torch.inference_mode(False):  # a tensor of inference mode could not be used in training later
            buffers[name] = torch.empty(elements)
    return buffers[name]


def _columns(channels: int, dtype: torch.dtype) -> int:
    """Returns the number of channels, rounded up to whole panels of the C code."""
    panel: int = _library(dtype).panel()
    return -(-channels // panel) * panel


def _kernel(weight: Tensor, dtype: torch.dtype, turned: bool = False, keep: bool = False) -> Tensor:
    """Transforms a kernel [K, C, 3, 3] for _convolve; `turned` for convolving gradients of y to gradients of x.

    The next call overwrites the result, unless it is to be kept.
    """
    library, (k, c) = _library(dtype), weight.shape[:2]
    summed, columns = (k, c) if turned else (c, k)
    elements = library.planes() * summed // library.per() * _columns(columns, dtype)
    planes = torch.empty(elements) if keep else _buffer("kernel", elements)
    _call(dtype, "kernel_planes", _channels_last(weight.detach()), planes, c, k, int(turned))
    return planes


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, channels: int) -> Tensor:
    """Convolves x [N, C, H, W] with a transformed kernel: returns [N, channels, H, W] in channels_last."""
    x, library = _channels_last(x), _library(x.dtype)
    n, c, h, w = x.shape
    y = torch.empty((n, channels, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    block = BLOCK * torch.get_num_threads()
    space = _buffer("planes", library.planes() * block * (c // library.per() + 16 + _columns(channels, x.dtype)))
    _call(x.dtype, "convolve", x, kernel, bias, y, space, n, h, w, c, channels, block)
    return y


def _kernel_gradients(x: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradients of the weights [K, C, 3, 3], in channels_last, from `gradient`, that of y."""
    library, (n, c, h, w), k = _library(x.dtype), x.shape, gradient.shape[1]
    found = torch.empty((k, c, 3, 3), memory_format=torch.channels_last)
    columns = _columns(k, x.dtype)
    space = _buffer("planes", library.planes() * (c * columns + SUMMED // library.per() * (c + 16 + columns)))
    _call(x.dtype, "kernel_gradients", x, gradient, found, space, n, h, w, c, k, SUMMED)
    return found


def _call(dtype: torch.dtype, name: str, *arguments: Any) -> None:
    """Calls a C function for numbers of a type: passes tensors as addresses, ints as long and other numbers as double."""
    converted: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            converted.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        else:
            converted.append((ctypes.c_long if isinstance(argument, int) else ctypes.c_double)(argument))
    getattr(_library(dtype), name)(*converted)


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """Loads winograd.c, compiled for this processor and for float32 or bfloat16. Raises NoCompiler.

    The library is kept beside torch.hub's folder and compiled again if it is damaged.
    """
    flags = (*FLAGS, *(("-mno-avx512f",) if _narrow() else ()), *(("-DBFLOAT16",) if dtype == torch.bfloat16 else ()))
    compiler, threads = _compiler(), _openmp()
    code = [_digest(path) for path in (SOURCE, Path(__file__))]
    inputs = (code, compiler, _run([*compiler, "--version"]), flags, threads, _processor())
    folder = Path(torch.hub.get_dir()).parent / "ddpm"
    name = f"native-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}"
    try:
        found = _find_library(folder, name) or _compile_library(folder, name, [*compiler, *flags], threads)
        return ctypes.CDLL(str(found))
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
        _run([*compiler, *(["-fopenmp"] if threads else []), "-c", str(SOURCE), "-o", str(compiled_file)])
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
