"""A network compiled for where it is: by torch.compile on a GPU; on a CPU, its 3x3 convolutions by Winograd's F(4x4, 3x3),
with transforms in C (native.c) that this machine's C compiler makes once.

A tile of 4x4 outputs takes 36 multiplications for each pair of channels instead of 144 (Lavin & Gray 2016, section 4). What is
between the transforms are 36 matrix products, which are torch's. The gradients are the exact adjoints, tile by tile:
36 products again for that of x, and 36 for that of the kernel.
Outputs differ from a direct convolution's by about 1e-5 of their size, as rounding is multiplied by the transforms' numbers.
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
WIDE = 8  # channels that the C code takes at once
TILES = 1024  # worked on at once, or one image's: what is between the transforms then stays in the processor's cache
FEW = 8  # below, the kernel's transform is read for too little work

# The kernel's transform, G of Lavin & Gray.
G = torch.tensor(
    [[1 / 4, 0, 0], [-1 / 6] * 3, [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)
GG = torch.einsum("ia,jb->ijab", G, G).reshape(36, 9)

Network = TypeVar("Network", bound=nn.Module)


class NoCompiler(RuntimeError):
    """There is no C compiler here, or it failed, or what it makes cannot be kept or loaded."""


def compiled(net: Network, dynamic: bool | None = None) -> Network:
    """The network, which computes faster from now on: torch.compile's on a GPU; on a CPU the same one, changed in place.

    Parameters, gradients and state_dict stay what they are. On a CPU it takes float32 in channels_last to gain, and 1 s once.
    dynamic: as torch.compile's. Raises NoCompiler.
    """
    device = next(net.parameters()).device
    if device.type == "cuda":
        _compiler(("gcc", "clang"))  # Triton's; torch.compile would miss it only when the network is first called
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
    """Whether it is a plain convolution of that size, which keeps the image's."""
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    wide = size == 1 or (layer.in_channels % WIDE == 0 and layer.out_channels % WIDE == 0)
    return shape == ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros") and wide


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class Convolution(nn.Conv2d):
    """A 3x3 convolution, padded by one."""

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
    """A 1x1 convolution: one matrix product, where oneDNN's takes longer, above all its gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Normalisation(NormSwish):
    """Group normalisation and swish in one go, where no gradient is asked for."""

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
    """Of an image."""
    return -(-x.shape[2] // 4) * -(-x.shape[3] // 4)


def _kernel(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] -> [36, C, K]: G w G^T."""
    by_place = weight.detach().permute(2, 3, 1, 0).reshape(9, -1)
    return (GG @ by_place).view(36, weight.shape[1], weight.shape[0])


_space = threading.local()


def _planes(place: int, tiles: int, channels: int) -> Tensor:
    """Room for [36, tiles, channels], kept from call to call: fresh memory costs more than what is done with it.

    With one tile more where their number is even: planes a power of two apart would share a few lines of the cache.
    """
    rows = tiles | 1
    size = 36 * rows * channels
    rooms = _space.__dict__.setdefault("rooms", {})
    if place not in rooms or rooms[place].numel() < size:
        with torch.inference_mode(False):  # or no training could use it later
            rooms[place] = torch.empty(size)
    return rooms[place][:size].view(36, rows, channels)


def _parts(x: Tensor) -> list[slice]:
    size = max(1, TILES // _tiles(x))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, C, H, W], kernel [36, C, K] -> [N, K, H, W], channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    k = kernel.shape[2]
    y = torch.empty((n, k, h, w), memory_format=torch.channels_last)
    for part in _parts(x):
        images = part.stop - part.start
        tiles = images * _tiles(x)
        given, made = _planes(0, tiles, c), _planes(1, tiles, k)
        _call("input_planes", x[part], given, images, h, w, c, given.shape[1])
        torch.bmm(given, kernel, out=made)
        _call("output_images", made, bias, y[part], images, h, w, k, made.shape[1])
    return y


def _backward(
    x: Tensor, kernel: Tensor, gradient: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient of y, like y: those of x, [N, C, H, W] in channels_last, and of the weights, [K, C, 3, 3]."""
    _, c, h, w = x.shape
    k = gradient.shape[1]
    total = torch.zeros_like(kernel) if of_weight else None
    back = torch.empty_like(x) if of_x else None
    for part in _parts(x):
        images = part.stop - part.start
        tiles = images * _tiles(x)
        given, told = _planes(0, tiles, c), _planes(1, tiles, k)
        _call("gradient_planes", gradient[part], told, images, h, w, k, told.shape[1])
        if total is not None:
            _call("input_planes", x[part], given, images, h, w, c, given.shape[1])
            given[:, tiles:] = told[:, tiles:] = 0.0
            total.baddbmm_(given.transpose(1, 2), told)
        if back is not None:
            torch.bmm(told, kernel.transpose(1, 2), out=given)
            _call("input_gradients", given, back[part], images, h, w, c, given.shape[1])
    if total is None:
        return back, None
    return back, (GG.T @ total.view(36, -1)).view(3, 3, c, k).permute(3, 2, 0, 1)


def _call(name: str, *arguments: Any) -> None:
    """Tensors go as addresses, whole numbers as long, others as double; whoever calls holds the tensors meanwhile."""
    given: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            given.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
        else:
            given.append((ctypes.c_long if isinstance(argument, int) else ctypes.c_double)(argument))
    getattr(_library(), name)(*given)


@cache
def _library() -> ctypes.CDLL:
    """native.c, compiled for this processor. The file is kept beside what torch.hub keeps, and made anew if it is damaged.

    Raises NoCompiler.
    """
    compiler, threads = _compiler(), _openmp()
    code = [_digest(path) for path in (SOURCE, Path(__file__))]
    about = (code, compiler, _run([*compiler, "--version"]), threads, _processor())
    folder = Path(torch.hub.get_dir()).parent / "ddpm"
    name = f"native-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"
    try:
        return ctypes.CDLL(str(_kept(folder, name) or _made(folder, name, compiler, threads)))
    except OSError as error:  # no room, or a home that cannot be written to or run from
        raise NoCompiler(f"what the C compiler makes cannot be kept or loaded: {error}") from None


def _kept(folder: Path, name: str) -> Path | None:
    """A library that an earlier process left, if its bytes are those that the second part of its name is the hash of."""
    return next((path for path in folder.glob(f"{name}-*.so") if path.name == f"{name}-{_digest(path)}.so"), None)


def _made(folder: Path, name: str, compiler: list[str], threads: str) -> Path:
    """Compiles native.c. Returns the library's file. Raises NoCompiler, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made, whole = Path(place) / "native.o", Path(place) / "native.so"
        _run([*compiler, *FLAGS, *(["-fopenmp"] if threads else []), "-c", str(SOURCE), "-o", str(made)])
        _run([*compiler, "-shared", str(made), *([threads] if threads else []), "-o", str(whole)])
        with whole.open("rb") as file:
            os.fsync(file.fileno())
        return whole.replace(folder / f"{name}-{_digest(whole)}.so")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compiler(names: Sequence[str] = ("cc", "gcc")) -> list[str]:
    """What CC names, or else the first of the names that is here. Raises NoCompiler."""
    named = shlex.split(os.environ.get("CC", ""))
    command = named or [name for name in names if shutil.which(name)][:1]
    if not command or shutil.which(command[0]) is None:
        raise NoCompiler(f"no C compiler found ({' '.join(named) or ', '.join([*names, 'or what CC names'])})")
    return command


def _run(command: list[str]) -> str:
    """Runs the compiler; returns its standard output. Raises NoCompiler."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise NoCompiler(f"the C compiler failed: {said}")
    return done.stdout


def _openmp() -> str:
    """The file of the OpenMP that torch has loaded: its threads, and their number, are then ours too. "" where there is none."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text(encoding="utf-8").splitlines():
            file = line.split(maxsplit=5)[-1]  # which may hold spaces
            if "/lib" in file and Path(file).name.startswith(("libgomp", "libiomp5")):
                return file
    return ""


def _processor() -> str:
    """Which processor this is and what it can do: the compiler makes code for it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").partition("\n\n")[0].splitlines() if about.exists() else []
    named = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")  # on x86 and ARM
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(named))])
