"""Compiles a network for its device: with torch.compile on a GPU, and with this project's C code on a CPU.

The C code (winograd.c) has convolutions, group normalisation with swish, and dropout, each with gradients. This machine's C
compiler compiles the code once for float32, and once for bfloat16 if the processor multiplies bfloat16 numbers (AVX512_BF16).

Convolutions use Winograd's method (Lavin & Gray 2016, section 4). In float32, F(4x4, 3x3) takes 36 multiplications per pair of
channels for 4x4 outputs, instead of 144. The outputs differ from those of a direct convolution by about 3e-6 of their size.
In bfloat16, under torch's autocast, F(2x2, 3x3) takes 16 multiplications for 2x2 outputs, instead of 36. Its transforms
amplify rounding errors less than those of F(4x4, 3x3).

On processors with AMX (matrix instructions for bfloat16), convolutions in bfloat16 are direct, without Winograd's method. Linear
layers then use the same matrix products.
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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ddpm.networks.layers import AddingConvolution, NormSwish, SharedDropout

SOURCE = Path(__file__).with_name("winograd.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-Wno-psabi")
WIDE = 8  # channels in a vector of the C code
# Convolutions of fewer pixels are left to torch, since reading the transformed kernel would take more time than Winograd's method
# saves (FEW). Each step of a training must also transform the kernel again (FEW_TRAINED).
FEW, FEW_TRAINED = 128, 256

Network = TypeVar("Network", bound=nn.Module)


class NoCompiler(RuntimeError):
    """Raised if there is no C compiler, if the compiler fails, or if the compiled library cannot be saved or loaded."""


def compiled(net: Network, dynamic: bool | None = None) -> Network:
    """Returns a faster form of the network: on a GPU from torch.compile, on a CPU the network itself, changed in place.

    Parameters, gradients and state_dict stay the same. On a CPU, inputs in channels_last are faster. If no compiled library is
    saved, this function compiles the C code in about 2 s. `dynamic` is passed to torch.compile. Raises NoCompiler.
    """
    device = next(net.parameters()).device
    if device.type == "cuda":
        # Triton needs a compiler. Without this check, torch.compile would fail only when the network is first called.
        _compiler(("gcc", "clang"))
    if device.type != "cpu":
        return torch.compile(net, dynamic=dynamic)  # type: ignore[return-value]
    _library(torch.float32)
    if multiplies_bfloat16():
        _library(torch.bfloat16)
    for module in net.modules():
        module.__class__ = _faster_class(module)
    return net


def _faster_class(module: nn.Module) -> type[nn.Module]:
    """Returns this file's class that computes the same as a layer, or the layer's own class if this file has none."""
    faster: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: Dropout, SharedDropout: DropoutOfRows}
    if isinstance(module, nn.Conv2d) and _is_plain(module, 3):
        faster |= {nn.Conv2d: Convolution, AddingConvolution: ConvolutionOnto}
    elif isinstance(module, nn.Conv2d) and _is_plain(module, 1):
        faster |= {nn.Conv2d: Pointwise}
    elif isinstance(module, nn.GroupNorm) and module.num_channels % WIDE == 0:
        faster |= {nn.GroupNorm: Normalisation, NormSwish: NormalisedSwish}
    elif isinstance(module, nn.Linear) and module.in_features % WIDE == module.out_features % WIDE == 0:
        faster |= {nn.Linear: Linear} if uses_amx() else {}
    return faster.get(type(module), type(module))


@cache
def multiplies_bfloat16() -> bool:
    """Returns whether the C code computes in bfloat16 on this machine, which needs AVX512_BF16."""
    return "avx512_bf16" in _processor().split() and not _avx512_disabled()


def _avx512_disabled() -> bool:
    """Returns whether ATEN_CPU_CAPABILITY keeps torch from using the processor's AVX-512. Then the C code avoids AVX-512 too."""
    return "avx512f" in _processor().split() and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def _may_use_amx() -> bool:
    """Asks Linux to let this process use AMX, the matrix instructions. Returns False if AMX is absent, disabled or refused."""
    if "amx_bf16" not in _processor().split() or _avx512_disabled():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def uses_amx() -> bool:
    """Returns whether the C code computes with AMX in bfloat16."""
    return _computes_with_amx(torch.bfloat16)


def _computes_with_amx(dtype: torch.dtype | None) -> bool:
    """Returns whether the C code computes with AMX in this dtype. It then also computes 1x1 convolutions and linear layers."""
    return dtype == torch.bfloat16 and multiplies_bfloat16() and bool(_library(dtype).by_matrices())


def _is_plain(layer: nn.Conv2d, side: int) -> bool:
    """Returns whether a layer is a side x side convolution of stride 1 with zero padding that this file's classes support."""
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    whole_vectors = side == 1 or (layer.in_channels % WIDE == 0 and layer.out_channels % WIDE == 0)
    return shape == ((side, side), (1, 1), (side // 2, side // 2), (1, 1), 1, "zeros") and whole_vectors


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Returns the type in which the C code computes on x: autocast's type, or else the type of x. None if it cannot."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if weight.dtype != torch.float32 or x.dtype not in (torch.float32, dtype):
        return None
    return dtype if dtype == torch.float32 or (autocast and dtype == torch.bfloat16 and multiplies_bfloat16()) else None


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _CachesKernel(nn.Module):
    """A layer that keeps its transformed kernel between calls that need no gradients."""

    # A key (type, version and address of the weight), the kernel transformed from this weight, and the weight. The reference
    # to the weight prevents another tensor from getting the same address.
    _cached: tuple[Any, Tensor, Tensor] | None = None

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
        """Returns the convolution of x [N, C, H, W] with `weight`, plus `bias` and `onto` if they are given.

        Args:
            x: the images, in the type of the computation.
            weight: [K, C, side, side].
            bias: [K], or None.
            onto: added to the convolution, [N, K, H, W], or None.
        """
        if _needs_gradient(x, weight, bias, onto):
            return _Convolved.apply(x, weight, bias, onto)
        key = (x.dtype, None if weight.is_inference() else weight._version, weight.data_ptr())
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, _transformed_kernel(weight, x.dtype, keep=True), weight.detach())
        return _convolve(x, self._cached[1], bias, onto, *weight.shape[::2])

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the transformed kernel out of copies and pickles."""
        return {name: value for name, value in self.__dict__.items() if name != "_cached"}


class Convolution(_CachesKernel, nn.Conv2d):
    """A 3x3 convolution, padded by one."""

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        dtype = _compute_dtype(x, self.weight)
        fewest = 1 if _computes_with_amx(dtype) else FEW_TRAINED if _needs_gradient(x, self.weight) else FEW
        fits = onto is None or onto.shape == (len(x), self.out_channels, *x.shape[2:])
        if dtype is None or x[:, 0].numel() < fewest or not fits:
            y = nn.Conv2d.forward(self, x)
            return y if onto is None else onto + y
        return self._convolved(x.to(dtype), self.weight, self.bias, None if onto is None else onto.to(dtype))


class ConvolutionOnto(Convolution, AddingConvolution):
    """A 3x3 convolution, padded by one, that adds its result to the tensor `onto`."""


class Pointwise(_CachesKernel, nn.Conv2d):
    """A 1x1 convolution as one matrix product. This is faster than oneDNN's convolution, above all for gradients."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = _compute_dtype(x, self.weight)
        if _computes_with_amx(dtype) and self.in_channels % WIDE == self.out_channels % WIDE == 0 and x.numel():
            return self._convolved(x.to(dtype), self.weight, self.bias)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Linear(_CachesKernel, nn.Linear):
    """A linear layer, computed as a 1x1 convolution of an image one pixel high."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = _compute_dtype(x, self.weight)
        if not _computes_with_amx(dtype) or not x.numel():
            return super().forward(x)
        rows = x.to(dtype).reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        y = self._convolved(rows, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).view(*x.shape[:-1], self.out_features)


class Normalisation(nn.GroupNorm):
    """Group normalisation in two passes over the images, and two passes for the gradients."""

    linear = True

    def forward(self, x: Tensor) -> Tensor:
        dtype = _compute_dtype(x, self.weight)
        return super().forward(x) if dtype is None else _normalised(self, x.to(dtype), None)


class NormalisedSwish(NormSwish):
    """Adds a shift, normalises in groups and applies swish, in the same passes over the images as `Normalisation`."""

    linear = False

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        dtype = _compute_dtype(x, self.weight)
        if dtype is None:
            return super().forward(x, shift)
        if shift is not None:
            shift = shift.float().expand(len(x), x.shape[1]).contiguous()
        return _normalised(self, x.to(dtype), shift)


class Dropout(nn.Dropout):
    """Dropout that draws and applies its random numbers in one pass. torch's global generator draws the seed of each call."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32
        if not self.training or not 0 < self.p < 1 or x.dtype != dtype or x.numel() % WIDE:
            return super().forward(x)
        first = self.rank * x.numel() if isinstance(self, SharedDropout) else 0
        return _Dropped.apply(x, first, int(torch.randint(2**62, ())), self.p)


class DropoutOfRows(Dropout, SharedDropout):
    """`Dropout` for one of several processes that share each batch (see `SharedDropout`)."""


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
        x = _channels_last(x)
        ctx.save_for_backward(x, weight)
        return _convolve(x, _transformed_kernel(weight, x.dtype), bias, onto, *weight.shape[::2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = _channels_last(gradients[0].to(x.dtype))
        x_wanted, weight_wanted, bias_wanted, onto_wanted = ctx.needs_input_grad
        turned = _transformed_kernel(weight, x.dtype, turned=True) if x_wanted else None
        sums = _kernel_gradients(x, gradient, weight.shape[2]) if weight_wanted or bias_wanted else (None, None)
        return (
            None if turned is None else _convolve(gradient, turned, None, None, *weight.shape[1:3]),
            sums[0],
            sums[1] if bias_wanted else None,
            gradient if onto_wanted else None,
        )


def _normalised(layer: Normalisation | NormalisedSwish, x: Tensor, shift: Tensor | None) -> Tensor:
    """Applies a layer to x [N, C, H, W], with a shift [N, C] or None added to x first. Supports gradients."""
    arguments = x, shift, layer.weight, layer.bias, layer.num_groups, layer.eps, layer.linear
    return (
        _Normalised.apply(*arguments)
        if _needs_gradient(x, shift, layer.weight, layer.bias)
        else _normalise(*arguments)[0]
    )


def _normalise(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, linear: bool
) -> tuple[Tensor, Tensor]:
    """Returns the normalised x, and the mean and inverse deviation of each group, [N, groups, 2].

    Args:
        x: [N, C, H, W].
        shift: added to x before the normalisation, [N, C], or None.
        weight: factors after the normalisation, [C].
        bias: added after these factors, [C].
        groups: the number of groups.
        eps: added to the variances.
        linear: False to apply swish at the end.
    """
    x = _channels_last(x)
    y, moments = torch.empty_like(x), torch.empty(len(x), groups, 2)
    n, c, h, w = x.shape
    _call(x.dtype, "normalised", x, shift, weight, bias, y, moments, n, h * w, c, groups, float(eps), int(linear))
    return y, moments


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, linear: bool
    ) -> Tensor:
        y, moments = _normalise(x, shift, weight, bias, groups, eps, linear)
        ctx.save_for_backward(x, shift, weight, bias, moments)
        ctx.linear = linear
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, moments = ctx.saved_tensors
        x, gradient = _channels_last(x), _channels_last(gradients[0].to(x.dtype))
        x_gradient, parameter_gradients = torch.empty_like(x), torch.empty(len(x), 3, x.shape[1])
        n, c, h, w = x.shape
        results = (x_gradient, parameter_gradients)
        arguments = (x, shift, gradient, weight, bias, moments, *results, n, h * w, c, moments.shape[1])
        _call(x.dtype, "normalised_gradients", *arguments, int(ctx.linear))
        weight_gradient, bias_gradient = parameter_gradients[:, :2].sum(0)
        shift_gradient = parameter_gradients[:, 2] if ctx.needs_input_grad[1] else None
        return x_gradient, shift_gradient, weight_gradient, bias_gradient, None, None, None


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, seed: int, rate: float) -> Tensor:
        ctx.mask, ctx.layout = (first, seed, rate), torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return _dropped(x.contiguous(memory_format=ctx.layout), *ctx.mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(gradients[0].contiguous(memory_format=ctx.layout), *ctx.mask), None, None, None


def _dropped(x: Tensor, first: int, seed: int, rate: float) -> Tensor:
    """Applies dropout to x. A gradient goes through the same function, with the same mask.

    Args:
        x: any shape, in float32 or bfloat16.
        first: offset of x's first element in the flattened batch of all processes together.
        seed: the seed of the mask.
        rate: the probability of a zero.
    """
    y = torch.empty_like(x)
    _call(x.dtype, "dropped", x, y, x.numel(), first, seed, rate)
    return y


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_space = threading.local()


def _buffer(name: str, elements: int) -> Tensor:
    """Returns a float32 buffer of at least `elements` numbers. Later calls with this name reuse it, since allocation is slow."""
    buffers: dict[str, Tensor] = _space.__dict__
    if name not in buffers or buffers[name].numel() < elements:
        with torch.inference_mode(False):  # otherwise training could not use a buffer that sampling allocated
            buffers[name] = torch.empty(elements)
    return buffers[name]


def _transformed_kernel(weight: Tensor, dtype: torch.dtype, turned: bool = False, keep: bool = False) -> Tensor:
    """Transforms a kernel for `_convolve`.

    Args:
        weight: [K, C, side, side].
        dtype: the type in which the convolution computes.
        turned: whether to turn the kernel by 180 degrees and swap its channels, which gives the kernel for the gradient of x.
        keep: whether the result gets memory of its own. Otherwise the next call overwrites it.
    """
    library, (k, c, side, _) = _library(dtype), weight.shape
    elements = library.kernel_elements(*((k, c) if turned else (c, k)), side)
    planes = torch.empty(elements) if keep else _buffer("kernel", elements)
    _call(dtype, "kernel_planes", _channels_last(weight.detach()), planes, c, k, side, int(turned))
    return planes


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, onto: Tensor | None, channels: int, side: int) -> Tensor:
    """Convolves x with a transformed kernel, and adds `bias` and `onto` if they are given.

    Args:
        x: [N, C, H, W].
        kernel: made by `_transformed_kernel`.
        bias: [channels], or None.
        onto: added to the convolution, [N, channels, H, W], or None.
        channels: channels of the result.
        side: side of the kernel, 3 or 1.

    Returns:
        [N, channels, H, W] in channels_last.
    """
    x, library = _channels_last(x), _library(x.dtype)
    n, c, h, w = x.shape
    y = torch.empty((n, channels, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    space = _buffer("space", library.space_to_convolve(w, c, channels, side, threads))
    onto = None if onto is None else _channels_last(onto)
    _call(x.dtype, "convolve", x, kernel, bias, onto, y, space, n, h, w, c, channels, side, threads)
    return y


def _kernel_gradients(x: Tensor, gradient: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients of a convolution's weights and bias.

    Args:
        x: the input of the convolution, [N, C, H, W].
        gradient: the gradient of the output, [N, K, H, W].
        side: side of the kernel, 3 or 1.

    Returns:
        The gradients of the weights, [K, C, side, side] in channels_last, and of the bias, [K].
    """
    library, (n, c, h, w), k = _library(x.dtype), x.shape, gradient.shape[1]
    weight_gradient = torch.empty((k, c, side, side), memory_format=torch.channels_last)
    bias_gradient = torch.empty(k)
    space = _buffer("space", library.space_for_gradients(w, c, k, side))
    _call(x.dtype, "kernel_gradients", x, gradient, weight_gradient, bias_gradient, space, n, h, w, c, k, side)
    return weight_gradient, bias_gradient


def _call(dtype: torch.dtype, name: str, *arguments: Any) -> None:
    """Calls the C function `name`, compiled for `dtype`. Passes tensors as addresses, ints as long, other numbers as double."""
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

    The compiled library is saved beside torch.hub's folder, and compiled again if the file is damaged.
    """
    flags = (
        *FLAGS,
        *(("-mno-avx512f",) if _avx512_disabled() else ()),
        *(("-DBFLOAT16",) if dtype == torch.bfloat16 else ()),
        *(("-DMATRICES",) if _may_use_amx() else ()),
    )
    compiler, threads = _compiler(), _openmp()
    code = [_digest(path) for path in (SOURCE, Path(__file__))]
    inputs = (code, compiler, _run([*compiler, "--version"]), flags, threads, _processor())
    folder = Path(torch.hub.get_dir()).parent / "ddpm"
    name = f"native-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}"
    try:
        file = _find_library(folder, name) or _compile_library(folder, name, [*compiler, *flags], threads)
        library = ctypes.CDLL(str(file))
        for function in (library.kernel_elements, library.space_to_convolve, library.space_for_gradients):
            function.restype = ctypes.c_long
        return library
    except OSError as error:  # a full disk, or a folder that cannot be written to or has no execute permission
        raise NoCompiler(f"the compiled library cannot be saved or loaded: {error}") from None


def _find_library(folder: Path, name: str) -> Path | None:
    """Returns the library that an earlier process compiled, or None if it is missing or its bytes lack the hash in its name."""
    return next((path for path in folder.glob(f"{name}-*.so") if path.name == f"{name}-{_digest(path)}.so"), None)


def _compile_library(folder: Path, name: str, compiler: list[str], threads: str) -> Path:
    """Compiles winograd.c to a library.

    Args:
        folder: the folder of the library, created if it is missing.
        name: the beginning of the file's name. A hash of the file's bytes follows.
        compiler: the command of the C compiler, with flags.
        threads: the OpenMP library to link, or "".

    Returns:
        The file of the library.

    Raises:
        NoCompiler: the compiler failed.
        OSError: the file could not be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        object_file, library = Path(temporary) / "native.o", Path(temporary) / "native.so"
        _run([*compiler, *(["-fopenmp"] if threads else []), "-c", str(SOURCE), "-o", str(object_file)])
        _run([*compiler, "-shared", str(object_file), *([threads] if threads else []), "-o", str(library)])
        with library.open("rb") as file:
            os.fsync(file.fileno())
        return library.replace(folder / f"{name}-{_digest(library)}.so")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compiler(names: Sequence[str] = ("cc", "gcc")) -> list[str]:
    """Returns the command in the variable CC, or else the first of `names` that is installed. Raises NoCompiler."""
    from_variable = shlex.split(os.environ.get("CC", ""))
    command = from_variable or [name for name in names if shutil.which(name)][:1]
    if not command or shutil.which(command[0]) is None:
        raise NoCompiler(
            f"no C compiler found ({' '.join(from_variable) or ', '.join([*names, 'or the command in $CC'])})"
        )
    return command


def _run(command: list[str]) -> str:
    """Runs the compiler; returns its standard output. Raises NoCompiler."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it printed no message"]
        message = next((line for line in lines if "error" in line), lines[0])
        raise NoCompiler(f"the C compiler failed: {message}")
    return done.stdout


def _openmp() -> str:
    """Returns the OpenMP library that torch has loaded, or "". The C code links to the same library to share torch's threads."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text(encoding="utf-8").splitlines():
            file = line.split(maxsplit=5)[-1]  # the path, which may contain spaces
            if "/lib" in file and Path(file).name.startswith(("libgomp", "libiomp5")):
                return file
    return ""


def _processor() -> str:
    """Returns a description of the processor and its features, on which the compiled code depends."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    fields = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")  # on x86 and ARM
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(fields))])
