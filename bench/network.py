"""Measures training and sampling of the paper's network beside diffusers and denoising-diffusion-pytorch.

Our code runs with the values that `precision: auto` and `compile: auto` choose on the machine. Each peer runs as its docs
show it, and in the fastest of several settings, which the row finds first.
"""

from __future__ import annotations

import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import TINY, alternate, limit, ratios
from ddpm import Denoiser, NoiseSchedule, UNet, interop, sample
from ddpm.networks import winograd
from ddpm.parameters import Auto
from ddpm.runtime import compiling
from ddpm.training.fit import TrainingState, autocast, fit
from ddpm.training.objective import Objective

PAPER: dict[str, Any] = {  # 35.7M parameters
    "image_channels": 3,
    "image_size": 32,
    "channels": 128,
    "multipliers": [1, 2, 2, 2],
    "blocks": 2,
    "attention": [16],
    "heads": 1,
    "dropout": 0.1,
}
SHRUNK = {**PAPER, "channels": 32, "multipliers": [1, 2], "attention": [16], "blocks": 1}
SETTINGS = SHRUNK if TINY else PAPER


@dataclass(frozen=True)
class Size:
    """The amount of work for a device: images per batch, steps per call, calls of each side."""

    batch: int
    steps: int
    repeats: int


TRAIN = {"cpu": Size(8, 1, 9), "cuda": Size(128, 20, 7)}
DDIM = {"cpu": Size(8, 5, 9), "cuda": Size(256, 50, 5)}
ANCESTRAL = {"cpu": Size(8, 5, 9), "cuda": Size(256, 1000, 3)}
WORK = {"ddim": "sampling by ddim", "ancestral": "ancestral sampling"}


def same_networks(device: str) -> tuple[UNet, Any, dict[str, Any]]:
    """Returns our network, the network of diffusers with the same weights, and the checks of both."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    ours = UNet(**SETTINGS)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)  # layers that start at 0 would make every output 0
    theirs = UNet2DModel.from_config(interop.settings_to_diffusers(SETTINGS))
    theirs.load_state_dict(interop.weights_to_diffusers(ours.state_dict(), SETTINGS))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    if SETTINGS is PAPER:
        assert count == 35_746_307
    ours, theirs = ours.to(device).to(memory_format=torch.channels_last).eval(), theirs.to(device).eval()
    x, t = torch.randn(2, 3, 32, 32, device=device), torch.tensor([3.0, 700.0], device=device)
    with torch.no_grad():
        gap = float((ours(x, t) - theirs(x, t).sample).abs().max())
    assert gap < (1e-2 if device == "cuda" else 1e-4), gap  # a GPU uses TF32
    return ours, theirs, {"parameters": count, "largest difference of outputs": gap}


def images(count: int = 256) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _repeated(step: Callable[[], Any], steps: int) -> Callable[[], Any]:
    return lambda: [step() for _ in range(steps)][-1]


@dataclass(frozen=True)
class Setting:
    """The memory format, precision and compiler of a peer, which is one of the packages that ours is compared with."""

    channels_last: bool = False
    bfloat16: bool = False  # by autocast
    compiled: bool = False  # by torch.compile

    def __str__(self) -> str:
        words = {"channels_last": self.channels_last, "bfloat16": self.bfloat16, "torch.compile": self.compiled}
        return ", ".join(word for word, used in words.items() if used) or "float32"


@dataclass(frozen=True)
class Side:
    """A peer in one setting. seconds: of one call. compilation: extra seconds of the first call, if the peer compiles."""

    peer: str
    setting: Setting
    call: Callable[[], Any]
    seconds: float
    compilation: float

    @property
    def name(self) -> str:
        return f"{self.peer} ({self.setting})"


Make = Callable[[Setting], Callable[[], Any]]  # returns a function that does the work of one call


@contextmanager
def _without_caches() -> Iterator[None]:
    """Gives ddpm and torch.compile empty caches of compiled code while the block runs, so that they must compile."""
    with TemporaryDirectory() as folder:
        places = {"TORCH_HOME": f"{folder}/torch", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        before = {name: os.environ.get(name) for name in places}
        os.environ.update(places)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _try(peer: str, make: Make, setting: Setting, device: str) -> Side:
    """Builds a side and calls it a few times."""
    call = make(setting)
    times, _ = alternate({"call": call}, 4, warmups=0, device=device)
    first, *rest = times["call"]["wall"]
    seconds = min(rest, default=first)
    return Side(peer, setting, call, seconds, first - seconds if setting.compiled else 0.0)


def _tried(peer: str, make: Make, device: str) -> Iterator[Side]:
    """Tries all settings without torch.compile, and, unless TINY, torch.compile in the faster memory format.

    Leaves bfloat16 out if its convolutions are far slower than those in float32, since a training step would take minutes.
    Compiling takes minutes too, so a precision that is more than twice as slow as the other one is not compiled.
    """
    precisions = (False, True) if _bfloat16_cost(device) < 4 else (False,)
    plain = [_try(peer, make, Setting(last, bf16), device) for last in (False, True) for bf16 in precisions]
    yield from plain
    best = min(plain, key=lambda side: side.seconds)
    for bf16 in () if TINY else precisions:
        if min(side.seconds for side in plain if side.setting.bfloat16 == bf16) < 2 * best.seconds:
            yield _try(peer, make, Setting(best.setting.channels_last, bf16, compiled=True), device)


def _bfloat16_cost(device: str) -> float:
    """Returns the time of a convolution in bfloat16, as a multiple of its time in float32."""
    x, layer = torch.randn(2, 128, 16, 16, device=device), nn.Conv2d(128, 128, 3, padding=1, device=device)
    sides = {}
    for dtype in (torch.float32, torch.bfloat16):
        net, image = copy.deepcopy(layer).to(dtype), x.to(dtype)
        sides[str(dtype)] = lambda net=net, image=image: net(image)
    times, _ = alternate(sides, 3, device=device)
    return min(times[str(torch.bfloat16)]["wall"]) / min(times[str(torch.float32)]["wall"])


def _versus(
    ours: Callable[[], Any],
    peers: Mapping[str, tuple[Make, Setting, float]],
    device: str,
    repeats: int,
    goals: tuple[float, float],
    compilation: float,
) -> tuple[dict[str, Any], dict[str, Side]]:
    """Measures our code beside each peer as its docs show it and in its fastest setting.

    Args:
        ours: the work of one call.
        peers: name -> how to build a side, the setting in its docs, and the operations of its network as a share of ours.
            Ratios compare equal numbers of operations: the times of a peer are divided by that share.
        device: "cpu" or "cuda".
        repeats: number of timed turns.
        goals: for the first peer as its docs show it, and for the fastest peer.
        compilation: seconds that our code has spent on compiling so far.

    Returns:
        Entries of a row's result, and the fastest side of each peer.
    """
    began = time.perf_counter()
    ours()
    first = time.perf_counter() - began
    tried = {name: {side.setting: side for side in _tried(name, make, device)} for name, (make, *_) in peers.items()}
    shown = {name: sides[peers[name][1]] for name, sides in tried.items()}
    best = {name: min(sides.values(), key=lambda side: side.seconds) for name, sides in tried.items()}
    sides = {"ours": ours, **{side.name: side.call for name in peers for side in (shown[name], best[name])}}
    times, _ = alternate(sides, repeats, device=device)
    share = {side.name: peers[name][2] for name in peers for side in (shown[name], best[name])}
    equal = {
        side: {kind: [value / share.get(side, 1) for value in values] for kind, values in kinds.items()}
        for side, kinds in times.items()
    }
    median = {name: statistics.median(kinds["wall"]) for name, kinds in equal.items()}
    fastest = min(best.values(), key=lambda side: median[side.name])
    figures = []
    for name, goal in zip(peers, (goals[0], *[None] * (len(peers) - 1)), strict=True):
        figures += ratios(equal, shown[name].name, goal, name=f"{name} as its docs show it / ours")
    figures += ratios(
        equal, fastest.name, goals[1], name=f"best of the peers ({fastest.peer}: {fastest.setting}) / ours"
    )
    entries = {
        "times": times,
        "figures": figures,
        "compilation": {"ours": compilation + max(0.0, first - median["ours"])}
        | {side.name: side.compilation for side in best.values() if side.setting.compiled},
        "tried": [
            {"side": side.name, "seconds": side.seconds, "compilation": side.compilation}
            for sides_of_peer in tried.values()
            for side in sides_of_peer.values()
        ],
    }
    return entries, best


def _resolved(device: str) -> tuple[Auto, float]:
    """Returns the values of `auto` on this machine, and the seconds that compiling took."""
    began = time.perf_counter()
    auto, _ = compiling.probe(torch.device(device))
    return auto, time.perf_counter() - began


def _dtype(auto: Auto) -> torch.dtype:
    return torch.bfloat16 if auto.precision == "bfloat16" else torch.float32


def train(device: str) -> dict[str, Any]:
    """Measures a training step of the paper's recipe: flips, dropout, Adam, clipping, EMA."""
    with _without_caches():
        return _train(device)


def _train(device: str) -> dict[str, Any]:
    size, schedule = TRAIN[device], NoiseSchedule.named("linear", 1000)
    auto, compilation = _resolved(device)
    ours, theirs, checks = same_networks(device)
    objective = Objective.of(schedule, "eps", device)
    checks["loss, ours and diffusers"] = _same_loss(ours, theirs, objective, device)
    operations = _operations(ours, device)
    state = TrainingState(ours)
    steps = fit(
        state,
        images().to(device),
        objective,
        batch=size.batch,
        learning_rate=2e-4,
        seed=0,
        warmup=5000,
        flip=True,
        precision=auto.precision,
        forward=winograd.compiled(ours) if auto.compile else ours,
    )

    def diffusers(setting: Setting) -> Callable[[], Any]:
        return _repeated(_diffusers_training(copy.deepcopy(theirs), size.batch, device, setting), size.steps)

    def lucidrains(setting: Setting) -> Callable[[], Any]:
        return _repeated(_lucidrains_training(size.batch, device, setting), size.steps)

    share = _share(operations, device, checks)
    default = Setting(bfloat16=device == "cuda")
    goals = (2.5, 1.3) if device == "cuda" else (4.0, 1.25) if auto.precision == "bfloat16" else (1.5, 1.25)
    measured, _ = _versus(
        _repeated(lambda: next(steps).loss, size.steps),
        {"diffusers": (diffusers, default, 1.0), "denoising-diffusion-pytorch": (lucidrains, default, share)},
        device,
        size.repeats,
        goals,
        compilation,
    )
    work = 3 * operations * size.batch * size.steps  # a backward pass costs as much as two forward passes
    return {
        "work": f"training the paper's UNet, batch {size.batch}, {_instructions(device)}; ours: {auto}",
        "per_call": f"{size.steps} step{'s' if size.steps > 1 else ''}",
        "checks": checks,
        **measured,
        "limit": limit(work, min(measured["times"]["ours"]["wall"]), device, _dtype(auto)),
    }


def _operations(net: Callable[..., Any], device: str) -> int:
    """Counts the floating point operations of one evaluation for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(1, 3, 32, 32, device=device), torch.zeros(1, device=device))
    return int(counter.get_total_flops())


def _share(operations: int, device: str, checks: dict[str, Any]) -> float:
    """Returns the operations of denoising-diffusion-pytorch's own network as a share of ours, and adds its size to `checks`."""
    other = _lucidrains(device).model
    share = _operations(other, device) / operations
    checks["parameters of denoising-diffusion-pytorch's own network"] = sum(each.numel() for each in other.parameters())
    checks["its operations, as a share of ours"] = round(share, 3)
    return share


def _instructions(device: str) -> str:
    """Returns the instruction set that torch uses on the CPU, or the name of the GPU."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    return torch.backends.cpu.get_cpu_capability() + (" with AMX" if winograd.uses_amx() else "")


def _set_up(net: Any, setting: Setting) -> Any:
    """Applies the memory format and torch.compile to a peer's network."""
    if setting.channels_last:
        net = net.to(memory_format=torch.channels_last)
    if setting.compiled:
        net.compile()
    return net


def _same_loss(ours: UNet, theirs: Any, objective: Objective, device: str) -> list[float]:
    """Returns the loss of both networks on one batch. diffusers creates its own noisy images."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(1000, beta_schedule="linear")
    x_0, eps = torch.randn(4, 3, 32, 32, device=device), torch.randn(4, 3, 32, 32, device=device)
    t = torch.tensor([0, 250, 600, 999], device=device)
    with torch.no_grad():
        mine = float(objective.losses(ours, x_0, t, eps).mean())
        other = float(F.mse_loss(theirs(scheduler.add_noise(x_0, eps, t), t).sample, eps))
    assert abs(mine - other) < (1e-3 if device == "cuda" else 1e-5) * abs(other), (mine, other)
    return [mine, other]


def _diffusers_training(net: Any, batch: int, device: str, setting: Setting) -> Callable[[], Any]:
    """Returns one step of diffusers' examples/unconditional_image_generation: accelerate, a DataLoader, EMAModel."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset
    from torchvision.transforms import v2

    flip = v2.RandomHorizontalFlip()
    data = [flip(image.float() / 127.5 - 1) for image in images()]
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # otherwise all Accelerators have the precision of the first one
    accelerator = Accelerator(mixed_precision="bf16" if setting.bfloat16 else "no", cpu=device == "cpu")
    average = EMAModel(
        net.parameters(), decay=0.9999, use_ema_warmup=True, model_cls=type(net), model_config=net.config
    )
    average.to(accelerator.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=5000)
    loader = DataLoader(TensorDataset(torch.stack(data)), batch, shuffle=True, drop_last=True)
    model: Any
    model, optimizer, loader, rate = accelerator.prepare(net.train(), optimizer, loader, rate)
    model = _set_up(model, setting)
    scheduler: Any = DDPMScheduler(1000, beta_schedule="linear")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format

    def step() -> float:
        (x_0,) = next(batches)
        x_0 = x_0.to(memory_format=layout)
        eps = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),), device=x_0.device)
        prediction = model(scheduler.add_noise(x_0, eps, t), t).sample
        loss = F.mse_loss(prediction.float(), eps)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(net.parameters())
        return loss.detach().item()

    return step


def _lucidrains(device: str, **options: Any) -> Any:
    """Returns denoising-diffusion-pytorch's GaussianDiffusion with its own network of the same widths."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    net = Unet(SETTINGS["channels"], dim_mults=tuple(SETTINGS["multipliers"]), dropout=0.1, flash_attn=device == "cuda")
    return GaussianDiffusion(net, image_size=32, timesteps=1000, **options).to(device)


def _lucidrains_training(batch: int, device: str, setting: Setting) -> Callable[[], Any]:
    """Returns one step of denoising-diffusion-pytorch's Trainer."""
    from ema_pytorch import EMA

    diffusion = _lucidrains(device)
    average = EMA(diffusion, beta=0.995, update_every=10)
    _set_up(diffusion.model, setting)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-4)
    data = images().to(device)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format

    def step() -> float:
        x_0 = data[torch.randint(0, len(data), (batch,), device=device)].float() / 255
        with torch.autocast(device, torch.bfloat16, enabled=setting.bfloat16):
            loss = diffusion(x_0.to(memory_format=layout))
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return loss.item()

    return step


def _pipeline(kind: str, net: Any) -> tuple[Any, dict[str, Any]]:
    """Returns diffusers' pipeline for "ddim" or "ancestral", and further arguments of its call."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    if kind == "ddim":
        made: Any = DDIMPipeline(net, DDIMScheduler(1000, beta_schedule="linear"))
        more: dict[str, Any] = {"use_clipped_model_output": True}
    else:
        made, more = DDPMPipeline(net, DDPMScheduler(1000, beta_schedule="linear", variance_type="fixed_large")), {}
    made.set_progress_bar_config(disable=True)
    return made, more


def _lucidrains_sampling(kind: str, batch: int, steps: int, device: str, setting: Setting) -> Callable[[], Any]:
    """Returns a function that runs `steps` steps of denoising-diffusion-pytorch's sampler on its own network."""
    diffusion = _lucidrains(device, **({"sampling_timesteps": steps} if kind == "ddim" else {})).eval()
    _set_up(diffusion.model, setting)

    def call() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=setting.bfloat16):
            if kind == "ddim":
                return diffusion.sample(batch_size=batch).cpu()
            x = torch.randn(batch, 3, 32, 32, device=device)
            for t in reversed(range(1000 - steps, 1000)):
                x, _ = diffusion.p_sample(x, t)
            return x.cpu()

    return call


def _sampling(device: str, size: Size, kind: str, full: int) -> dict[str, Any]:
    """Measures `sample` beside diffusers' pipeline and denoising-diffusion-pytorch's sampler.

    diffusers starts from the same weights and noise.

    Args:
        device: "cpu" or "cuda".
        size: batch, steps of a call, repetitions.
        kind: "ddim" or "ancestral".
        full: number of steps of a whole sampling.
    """
    auto, compilation = _resolved(device)
    ours, theirs, checks = same_networks(device)
    schedule = NoiseSchedule.named("linear", 1000)
    options: dict[str, Any] = {"sampler": "ddim"} if kind == "ddim" else {"sampler": "ddpm", "variance": "fixed_large"}
    few, shape = min(size.steps, 10), (size.batch, 3, 32, 32)
    forward: Callable[..., Any] = ours

    def fast(x: Tensor, t: Tensor) -> Tensor:
        with autocast(torch.device(device), auto.precision):
            return forward(x, t).float()

    def run(net: Callable[..., Any], steps: int) -> np.ndarray:
        random = torch.Generator().manual_seed(3)
        x_T = torch.randn(shape, generator=random).to(device).to(memory_format=torch.channels_last)
        denoiser = Denoiser(net, schedule, "eps", clip=True)
        x = sample(
            denoiser, x_T, steps=steps, noise=lambda k: torch.randn(shape, generator=random).to(device), **options
        )
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

    def peer(setting: Setting, steps: int = size.steps) -> Callable[[], np.ndarray]:
        pipeline, more = _pipeline(kind, _set_up(copy.deepcopy(theirs), setting))

        def call() -> np.ndarray:
            random = torch.Generator().manual_seed(3)
            with torch.autocast(device, torch.bfloat16, enabled=setting.bfloat16):
                return pipeline(size.batch, random, num_inference_steps=steps, output_type="np", **more).images

        return call

    # An error of eps is multiplied by 1 / a in the image, which is 60 in the first step. TF32 and bfloat16 make such errors,
    # so for them the mean difference is compared instead of the largest one.
    plain = peer(Setting(), few)()

    def compared(images: np.ndarray, rough: bool, most: float) -> float:
        gaps = np.abs(images - plain)
        gap = float(gaps.mean() if rough else gaps.max())
        assert gap < most, gap
        return gap

    gpu, rough = device == "cuda", device == "cuda" or auto.precision == "bfloat16"
    checks[f"{'mean' if gpu else 'largest'} difference of pixels in [0, 1]"] = compared(
        run(ours, few), gpu, 1e-3 if gpu else 1 / 255
    )
    operations = _operations(ours, device)
    forward = winograd.compiled(ours) if auto.compile else ours
    checks[f"{'mean' if rough else 'largest'} difference of pixels in [0, 1], {auto}"] = compared(
        run(fast, few), rough, 5e-3 if rough else 1 / 255
    )
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    t = torch.full((size.batch,), 700.0, device=device)
    with torch.no_grad():  # `sample` computes no gradients either
        gap = float((fast(x, t) - theirs(x, t).sample).abs().max())
    assert gap < (0.1 if rough else 1e-3), gap
    checks[f"largest difference of outputs, {auto}"] = gap

    def lucidrains(setting: Setting) -> Callable[[], Any]:
        return _lucidrains_sampling(kind, size.batch, size.steps, device, setting)

    goals = (2.0, 1.25) if device == "cpu" and auto.precision == "float32" else (4.0, 1.25)
    measured, best = _versus(
        lambda: run(fast, size.steps),
        {
            "diffusers": (peer, Setting(), 1.0),
            "denoising-diffusion-pytorch": (lucidrains, Setting(bfloat16=gpu), _share(operations, device, checks)),
        },
        device,
        size.repeats,
        goals,
        compilation,
    )
    if few == size.steps:
        side = best["diffusers"]
        checks[f"mean difference of pixels in [0, 1], {side.name}"] = compared(side.call(), True, 5e-3)
    work = operations * size.batch * size.steps
    return {
        "work": f"{WORK[kind]}, the paper's UNet, batch {size.batch}, {size.steps} steps, {_instructions(device)}; ours: {auto}",
        "per_call": f"{size.steps} of {full} steps; all take {full / size.steps:g} times as long",
        "checks": checks,
        **measured,
        "limit": limit(work, min(measured["times"]["ours"]["wall"]), device, _dtype(auto)),
    }


def ddim(device: str) -> dict[str, Any]:
    """Measures DDIM with 50 steps."""
    with _without_caches():
        return _sampling(device, DDIM[device], "ddim", 50)


def ancestral(device: str) -> dict[str, Any]:
    """Measures ancestral sampling with 1000 steps."""
    with _without_caches():
        return _sampling(device, ANCESTRAL[device], "ancestral", 1000)
