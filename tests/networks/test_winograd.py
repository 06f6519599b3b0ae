"""Compares Winograd's convolutions, compiled on this machine, with torch's own in double precision."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm import NoiseSchedule, UNet
from ddpm.networks import winograd
from ddpm.networks.layers import AddingConvolution, NormSwish, attention
from ddpm.training.fit import TrainingState, fit
from ddpm.training.objective import Objective


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> UNet:
    torch.manual_seed(0)
    net = UNet(1, 16, channels=16, multipliers=[1, 2], attention=[8], blocks=1, dropout=0.0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.05)
    return net.to(memory_format=torch.channels_last)


def close(found: Tensor, expected: Tensor, part: float) -> None:
    expected = expected.detach()
    assert float((found.detach().double() - expected).abs().max()) < part * float(expected.abs().max())


BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not winograd.multiplies_bfloat16(), reason="this processor has no AVX512_BF16"),
)
# The largest error as a share of the largest value. The bfloat16 numbers are rounded to 8 bits several times.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def spread(found: Tensor, expected: Tensor) -> float:
    """Returns the deviation of the errors, as a share of the deviation of the values."""
    return float((found.detach().double() - expected.detach()).std() / expected.detach().std())


@pytest.fixture(scope="module", params=["AMX", "no AMX"])
def small_blocks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles the C code with small blocks, so that even small inputs are split. Runs tests with and without AMX."""
    if request.param == "AMX" and not winograd.uses_amx():
        pytest.skip("this processor has no AMX, or Linux does not allow it")
    with pytest.MonkeyPatch.context() as patch:
        without = "-mno-amx-bf16" if winograd._may_use_amx() and request.param != "AMX" else ""
        options = f"-DBLOCK=5 -DSUMMED=14 -DPOSITIONS=32 {without}"
        patch.setenv("CC", f"{' '.join(winograd._compiler())} {options}")
        for name in ("FEW", "FEW_TRAINED"):
            patch.setattr(winograd, name, 1)
        winograd._library.cache_clear()
        assert winograd.uses_amx() == (request.param == "AMX")
        yield
    winograd._library.cache_clear()


def same_with_gradients(
    layer: nn.Module, inputs: list[Tensor], dtype: torch.dtype, part: float, kinds: tuple[type, ...]
) -> None:
    """Compares a layer's fast form with the layer in double precision: outputs, and gradients of inputs and parameters."""
    fast, layer = winograd.compiled(copy.deepcopy(layer)), copy.deepcopy(layer).double()
    assert type(fast) in kinds
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    with autocast(dtype):
        found = fast(*mine)
        with torch.no_grad():
            assert torch.equal(fast(*inputs), found)
    expected = layer(*exact)
    assert found.dtype == dtype
    close(found, expected, part)
    gradient = random(*found.shape, seed=1).to(dtype)
    found.backward(gradient)
    expected.backward(gradient.double())
    pairs = [*zip(mine, exact, strict=True), *zip(fast.parameters(), layer.parameters(), strict=True)]
    for one, other in pairs:
        assert one.grad is not None and other.grad is not None and one.grad.dtype == one.dtype
        close(one.grad, other.grad, part)


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (32, 16), (5, 7), (1, 13), (6, 3)])
@pytest.mark.parametrize("channels", [(8, 16), (40, 24), (16, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_a_convolution_and_its_gradients(
    size: tuple[int, int], channels: tuple[int, int], dtype: torch.dtype, small_blocks: None
) -> None:
    """Includes sizes that tiles do not divide, and work in several parts."""
    x = random(9, channels[0], *size).to(dtype)
    same_with_gradients(nn.Conv2d(*channels, 3, padding=1), [x], dtype, ROUNDING[dtype], (winograd.Convolution,))
    onto = random(9, channels[1], *size, seed=2).to(dtype)
    same_with_gradients(
        AddingConvolution(*channels, 3, padding=1), [x, onto], dtype, ROUNDING[dtype], (winograd.ConvolutionOnto,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_shifts_and_images_that_are_not_whole(dtype: torch.dtype) -> None:
    """Covers one shift for all images, a slice of a wider shift, and one image that is added to all."""
    norm, layer = winograd.compiled(NormSwish(4, 16)), winograd.compiled(AddingConvolution(16, 16, 3, padding=1))
    x, wide = random(3, 16, 16, 16).to(dtype), random(3, 32, seed=1)
    with torch.no_grad(), autocast(dtype):
        for shift in (wide[:, :16], wide[:, 16:], wide[:1, :16], wide[:1, :16].expand(3, -1)):
            assert torch.equal(norm(x, shift), norm(x, shift.expand(3, -1).clone()))
        for onto in (x[:1], x[:1].expand(3, -1, -1, -1), x.contiguous(memory_format=torch.channels_last)):
            close(layer(x, onto), layer(x, onto.expand(3, -1, -1, -1).clone()).double(), ROUNDING[dtype])


@pytest.mark.parametrize("make", [lambda: nn.GroupNorm(2, 16), lambda: nn.Conv2d(16, 16, 3, padding=1)])
def test_a_bias_alone_may_be_trained(make: Callable[[], nn.Module]) -> None:
    layer = winograd.compiled(make())
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter is layer.bias)
    layer(random(4, 16, 8, 8)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((16,), 256.0))


@pytest.mark.parametrize("channels", [(8, 16), (40, 24), (16, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_layers_that_are_products(channels: tuple[int, int], dtype: torch.dtype, small_blocks: None) -> None:
    for shape in ((7,), (2, 5), (3, 4, 31)):
        x = random(*shape, channels[0]).to(dtype)
        same_with_gradients(nn.Linear(*channels), [x], dtype, ROUNDING[dtype], (winograd.Linear, nn.Linear))
    x = random(3, channels[0], 5, 7).to(dtype)
    same_with_gradients(nn.Conv2d(*channels, 1), [x], dtype, ROUNDING[dtype], (winograd.Pointwise,))


@pytest.mark.skipif(not winograd.multiplies_bfloat16(), reason="this processor has no AVX512_BF16")
def test_bfloat16_costs_little_more_than_in_a_direct_convolution() -> None:
    """The error is at most three times that of torch's own bfloat16 convolution, in the output and in both gradients."""
    layer = nn.Conv2d(64, 64, 3, padding=1)
    x, gradient = random(8, 64, 16, 16).bfloat16(), random(8, 64, 16, 16, seed=1).bfloat16()
    errors = []
    for net in (layer, winograd.compiled(copy.deepcopy(layer))):
        mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        double = copy.deepcopy(layer).double()
        net.zero_grad()
        with autocast(torch.bfloat16):
            found = net(mine)
        expected = double(exact)
        found.backward(gradient)
        expected.backward(gradient.double())
        pairs = (found, expected), (mine.grad, exact.grad), (net.weight.grad, double.weight.grad)
        errors.append([spread(*pair) for pair in pairs])
    assert all(fast < 3 * plain for plain, fast in zip(*errors, strict=True)), errors
    assert max(errors[1]) < 5e-3


def test_the_gradients_are_the_adjoint() -> None:
    """v = <g, conv(x)> is linear in x and in w, so <x, dv/dx> = <w, dv/dw> = v."""
    layer = winograd.compiled(nn.Conv2d(16, 8, 3, padding=1, bias=False))
    x = random(2, 16, 12, 20, seed=2).requires_grad_()
    gradient = random(2, 8, 12, 20, seed=3)
    value = (gradient * layer(x)).double().sum()
    value.backward()
    assert x.grad is not None and layer.weight.grad is not None
    for one, of in ((x, x.grad), (layer.weight, layer.weight.grad)):
        assert float((one.detach() * of).double().sum()) == pytest.approx(float(value.detach()), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("kind", [NormSwish, nn.GroupNorm])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_normalisation_and_swish(kind: type[nn.GroupNorm], scale: float, dtype: torch.dtype) -> None:
    """Checks the gradients of both layers too, and swish after a shift."""
    layer = kind(4, 16, eps=1e-6)
    with torch.no_grad():
        layer.weight.copy_(scale * random(16))
        layer.bias.copy_(random(16, seed=1))
    inputs = [(3 * random(3, 16, 5, 7, seed=2) + 2).to(dtype)]
    if kind is NormSwish:
        inputs.append(random(3, 16, seed=4).to(dtype))
    part = {torch.float32: 4e-6, torch.bfloat16: 5e-3}[dtype]
    same_with_gradients(layer, inputs, dtype, part, (winograd.Normalisation, winograd.NormalisedSwish))
    same_with_gradients(layer, inputs[:1], dtype, part, (winograd.Normalisation, winograd.NormalisedSwish))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_dropout(dtype: torch.dtype) -> None:
    """Dropout drops the requested share of values and of their gradients, each independently. The seed decides everything."""
    layer, rate = winograd.compiled(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(0.3)))[1], 0.3
    x = torch.ones(8, 64, 32, 32, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    y.backward(torch.full_like(y, 2))
    assert x.grad is not None and torch.equal(x.grad, 2 * y)
    kept = y.detach() != 0
    assert set(y.detach().unique().tolist()) == {0, torch.tensor(1 / (1 - rate), dtype=dtype).item()}
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - (1 - rate)) < 5 * deviation
    flat = kept.permute(0, 2, 3, 1).flatten().float() - (1 - rate)
    for apart in (1, 2, 8, 64, 4096):  # checks correlations between distant numbers
        assert abs(float((flat[apart:] * flat[:-apart]).mean()) / (rate * (1 - rate))) < 5 / kept.numel() ** 0.5
    again = layer(x)
    assert abs(float(((again != 0) == kept).float().mean()) - (rate**2 + (1 - rate) ** 2)) < 5 / kept.numel() ** 0.5
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("trained", [False, True])
def test_attention_in_bfloat16_is_attention(trained: bool) -> None:
    q, k, v = (random(2, 2, 12, 16, seed=seed).bfloat16().requires_grad_(trained) for seed in range(3))
    close(attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double()), 2e-2)


def test_a_network_and_its_training_stay_what_they_are() -> None:
    plain, schedule = network(), NoiseSchedule.named("cosine", 100)
    fast = winograd.compiled(copy.deepcopy(plain))
    kinds = {type(module) for module in fast.modules()}
    assert kinds >= {winograd.Convolution, winograd.Pointwise, winograd.NormalisedSwish, winograd.Normalisation}
    assert list(fast.state_dict()) == list(plain.state_dict())
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses = []
    for net in (plain, fast):
        state = TrainingState(net)
        objective = Objective.of(schedule, "eps", torch.device("cpu"))
        steps = fit(state, images, objective, batch=8, learning_rate=1e-3, seed=0)
        losses.append(torch.stack([next(steps).loss for _ in range(10)]))
        net.eval()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    x, t = random(4, 1, 16, 16), torch.tensor([0.0, 3.0, 50.0, 99.0])
    with torch.no_grad():
        before, expected = fast(x, t), plain(x, t)
        torch.testing.assert_close(before, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        for parameter in fast.parameters():
            parameter.mul_(0.9)  # the cached form of the weights must be computed again
        again = copy.deepcopy(fast)
        assert not torch.allclose(fast(x, t), before)
        assert torch.equal(fast(x, t), again(x, t))


def test_a_kept_kernel_is_made_anew_when_the_weights_have_changed() -> None:
    """The weights change by a training step, by averaging, or by loading a saved state."""
    plain = network()
    state = TrainingState(winograd.compiled(copy.deepcopy(plain)))
    images = torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    objective = Objective.of(NoiseSchedule.named("cosine", 100), "eps", torch.device("cpu"))
    saved, x, t = state.tensors(), random(2, 1, 16, 16), torch.tensor([3.0, 50.0])

    def right() -> None:
        for net in (state.net, state.ema):
            plain.load_state_dict(net.state_dict())
            with torch.no_grad():
                close(net.eval()(x, t), plain(x, t), 1e-4)

    right()
    steps = fit(state, images, objective, batch=8, learning_rate=1e-2, seed=0)
    for _ in range(2):
        next(steps)
        right()
    state.load(0, saved)
    right()


def test_it_trains_after_it_has_sampled() -> None:
    """Tensors created in inference mode stay inference tensors, so the cached workspace must be an ordinary tensor."""
    layer = winograd.compiled(nn.Conv2d(16, 16, 3, padding=1))
    x = random(2, 16, 16, 16)
    winograd._space.__dict__.clear()
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_it_learns_as_torch_does(dtype: torch.dtype) -> None:
    """The losses of ten steps differ from torch's in float32 by at most twice the difference of torch's own kernels."""
    images = torch.randint(0, 256, (64, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    losses = []
    for net, precision in (
        (network(), "float32"),
        (network(), str(dtype).removeprefix("torch.")),
        (winograd.compiled(network()), str(dtype).removeprefix("torch.")),
    ):
        state = TrainingState(net)
        objective = Objective.of(NoiseSchedule.named("cosine", 100), "eps", torch.device("cpu"))
        steps = fit(state, images, objective, batch=8, learning_rate=1e-3, seed=0, precision=precision)
        losses.append(torch.stack([next(steps).loss for _ in range(10)]))
    exact, plain, fast = losses
    assert float((fast - exact).abs().max()) < 2 * float((plain - exact).abs().max()) + 1e-4


@pytest.mark.skipif(winograd.multiplies_bfloat16(), reason="the C code computes in bfloat16 here")
def test_bfloat16_is_left_to_torch_where_the_processor_cannot() -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1)
    fast, x = winograd.compiled(copy.deepcopy(layer)), random(4, 16, 16, 16)
    with torch.no_grad(), autocast(torch.bfloat16):
        assert torch.equal(fast(x), layer(x))


def test_other_types_are_left_to_torch() -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1)
    fast = winograd.compiled(copy.deepcopy(layer)).double()
    x = random(4, 16, 16, 16).double()
    with torch.no_grad():
        assert layer.bias is not None
        assert torch.equal(fast(x), F.conv2d(x, layer.weight.double(), layer.bias.double(), padding=1))


def test_without_avx512_the_results_are_the_same() -> None:
    """ATEN_CPU_CAPABILITY limits torch to AVX2, and the C code follows. Processors without AVX-512 give the same results."""
    code = (
        "import torch; from ddpm.networks import winograd\n"
        "print(winograd.multiplies_bfloat16(), winograd._library(torch.float32).lanes())\n"
        "layer = winograd.compiled(torch.nn.Conv2d(40, 24, 3, padding=1))\n"
        "x = torch.randn(4, 40, 16, 16, generator=torch.Generator().manual_seed(0))\n"
        "with torch.no_grad():\n"
        "    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)\n"
        "    print(float((layer(x) - expected).abs().max() / expected.abs().max()) < 2e-5)\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "8", "True"]


@pytest.mark.parametrize(
    ("compiler", "line"),
    [
        ("", r"no C compiler found \(cc, gcc, or the command in \$CC\)"),
        ("nothing-of-this-name -O2", r"no C compiler found \(nothing-of-this-name -O2\)"),
        (str(shutil.which("false")), "the C compiler failed: it printed no message"),
    ],
)
def test_without_a_compiler_it_says_so(compiler: str, line: str, tmp_path: Path) -> None:
    code = "import torch; from ddpm.networks import winograd\ntry: winograd.compiled(torch.nn.Conv2d(16, 16, 3, padding=1))\n"
    code += "except winograd.NoCompiler as error: print(error)"
    environment = {**os.environ, "CC": compiler, "PATH": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(line, done.stdout.strip())
    assert not list(tmp_path.rglob("*.so"))


class Elsewhere(nn.Module):
    """Pretends that its parameters are on a GPU."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter([SimpleNamespace(device=torch.device("cuda"))])


def test_without_a_compiler_it_says_so_on_a_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile would fail only when the network is first called."""
    net, given = Elsewhere(), object()
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: given if module is net else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(winograd.NoCompiler, match=r"no C compiler found \(gcc, clang, or the command in \$CC\)"):
        winograd.compiled(net)
    (tmp_path / "clang").touch(0o755)
    assert winograd.compiled(net) is given


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a byte flipped": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "cut off": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_library_is_compiled_anew(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    make = winograd._library.__wrapped__
    make(torch.float32)
    (file,) = tmp_path.rglob("*.so")
    whole = file.read_bytes()
    file.unlink()  # this process has the old file mapped into its memory
    file.write_bytes(DAMAGE[how](whole))
    library = make(torch.float32)
    assert file.read_bytes() == whole
    monkeypatch.setattr(winograd, "_library", lambda dtype: library)
    layer, x = nn.Conv2d(16, 16, 3, padding=1), random(4, 16, 8, 8)
    with torch.no_grad():
        close(winograd.compiled(copy.deepcopy(layer))(x), layer.double()(x.double()), 1e-5)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_without_a_place_to_keep_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    code = "import torch; from ddpm.networks import winograd\ntry: winograd.compiled(torch.nn.Conv2d(16, 16, 3, padding=1))\n"
    code += "except winograd.NoCompiler as error: print(error)"
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (
        done.stdout.startswith("the compiled library cannot be saved or loaded: ")
        and len(done.stdout.splitlines()) == 1
    )
