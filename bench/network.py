"""Measures training and sampling of the paper's network beside diffusers and denoising-diffusion-pytorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import TINY, alternate, limit, ratios
from ddpm import Denoiser, NoiseSchedule, UNet, interop, sample
from ddpm.networks import winograd
from ddpm.training.fit import TrainingState, fit
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
LITTLE = {**PAPER, "channels": 32, "multipliers": [1, 2], "attention": [16], "blocks": 1}
SETTINGS = LITTLE if TINY else PAPER


@dataclass(frozen=True)
class Size:
    """Work that fits a device: images per batch, steps per call, calls of each side."""

    batch: int
    steps: int
    repeats: int


TRAIN = {"cpu": Size(8, 1, 9), "cuda": Size(128, 20, 7)}
DDIM = {"cpu": Size(8, 5, 9), "cuda": Size(256, 50, 5)}
ANCESTRAL = {"cpu": Size(8, 5, 9), "cuda": Size(256, 1000, 3)}
WORK = {"ddim": "sampling by ddim", "ancestral": "ancestral sampling"}


def same_networks(device: str) -> tuple[UNet, Any, dict[str, Any]]:
    """Returns our network, diffusers' with the same weights, and what was checked about both."""
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
    assert gap < (1e-2 if device == "cuda" else 1e-4), gap  # TF32 on a GPU
    return ours, theirs, {"parameters": count, "largest difference of outputs": gap}


def images(count: int = 256) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _repeated(step: Callable[[], Any], steps: int) -> Callable[[], Any]:
    return lambda: [step() for _ in range(steps)][-1]


def train(device: str) -> dict[str, Any]:
    """Measures a training step of the paper's recipe: flips, dropout, Adam, clipping, EMA."""
    size, schedule = TRAIN[device], NoiseSchedule.named("linear", 1000)
    ours, theirs, checks = same_networks(device)
    objective = Objective.of(schedule, "eps", device)
    checks["loss, ours and diffusers"] = _same_loss(ours, theirs, objective, device)
    precision = "bfloat16" if device == "cuda" else "float32"
    compiled = device == "cuda"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(torch.randn(1, 3, 32, 32, device=device), torch.zeros(1, device=device))
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
        precision=precision,
        forward=winograd.compiled(ours),
    )
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: next(steps).loss}
    sides["diffusers"] = _diffusers_training(theirs, size.batch, device, compiled=False)
    if compiled:
        again = same_networks(device)[1]
        sides["diffusers compiled"] = _diffusers_training(again, size.batch, device, compiled=True)
    sides["denoising-diffusion-pytorch"], others = _lucidrains_training(size.batch, device)
    checks["parameters of denoising-diffusion-pytorch's own network"] = others
    times, _ = alternate(
        {side: _repeated(step, size.steps) for side, step in sides.items()},
        size.repeats,
        warmups=3 if compiled else 1,
        device=device,
    )
    work = 3 * counter.get_total_flops() * size.batch * size.steps  # backward costs two forwards
    dtype = torch.bfloat16 if compiled else torch.float32
    goals = {"diffusers": 2.5, "diffusers compiled": 1.3} if compiled else {"diffusers": 1.5}
    return {
        "work": f"training the paper's UNet, batch {size.batch}, {precision}",
        "per_call": f"{size.steps} step{'s' if size.steps > 1 else ''}",
        "checks": checks,
        "times": times,
        "figures": [part for peer in list(sides)[1:] for part in ratios(times, peer, goals.get(peer))],
        "limit": limit(work, min(times["ours"]["wall"]), device, dtype),
    }


def _same_loss(ours: UNet, theirs: Any, objective: Objective, device: str) -> list[float]:
    """Returns the loss of both networks on one batch. diffusers makes its own noisy images."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(1000, beta_schedule="linear")
    x_0, eps = torch.randn(4, 3, 32, 32, device=device), torch.randn(4, 3, 32, 32, device=device)
    t = torch.tensor([0, 250, 600, 999], device=device)
    with torch.no_grad():
        mine = float(objective.losses(ours, x_0, t, eps).mean())
        other = float(F.mse_loss(theirs(scheduler.add_noise(x_0, eps, t), t).sample, eps))
    assert abs(mine - other) < (1e-3 if device == "cuda" else 1e-5) * abs(other), (mine, other)
    return [mine, other]


def _diffusers_training(net: Any, batch: int, device: str, compiled: bool) -> Callable[[], Any]:
    """Returns one step of diffusers' examples/unconditional_image_generation: accelerate, a DataLoader, EMAModel."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader, TensorDataset
    from torchvision.transforms import v2

    flip = v2.RandomHorizontalFlip()
    data = [flip(image.float() / 127.5 - 1) for image in images()]
    accelerator = Accelerator(mixed_precision="bf16" if device == "cuda" else "no", cpu=device == "cpu")
    average = EMAModel(
        net.parameters(), decay=0.9999, use_ema_warmup=True, model_cls=type(net), model_config=net.config
    )
    average.to(accelerator.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    rate = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=5000)
    loader = DataLoader(TensorDataset(torch.stack(data)), batch, shuffle=True, drop_last=True)
    model: Any
    model, optimizer, loader, rate = accelerator.prepare(net.train(), optimizer, loader, rate)
    model = torch.compile(model) if compiled else model
    scheduler: Any = DDPMScheduler(1000, beta_schedule="linear")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        (x_0,) = next(batches)
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


def _lucidrains_training(batch: int, device: str) -> tuple[Callable[[], Any], int]:
    """Returns one step of denoising-diffusion-pytorch's Trainer on its own network of the same widths, and its size."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    net = Unet(SETTINGS["channels"], dim_mults=tuple(SETTINGS["multipliers"]), dropout=0.1, flash_attn=device == "cuda")
    diffusion = GaussianDiffusion(net, image_size=32, timesteps=1000).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-4)
    average = EMA(diffusion, beta=0.995, update_every=10)
    data = images().to(device)

    def step() -> float:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = diffusion(data[torch.randint(0, len(data), (batch,), device=device)].float() / 255)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return loss.item()

    return step, sum(parameter.numel() for parameter in net.parameters())


def _sampling(device: str, size: Size, kind: str, full: int) -> dict[str, Any]:
    """Measures `sample` beside diffusers' pipeline, from the same weights and noise.

    Args:
        device: "cpu" or "cuda".
        size: batch, steps of a call, repetitions.
        kind: "ddim" or "ancestral".
        full: steps of a whole sampling.
    """
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    ours, theirs, checks = same_networks(device)
    schedule = NoiseSchedule.named("linear", 1000)
    pipeline: Any
    if kind == "ddim":
        pipeline = DDIMPipeline(theirs, DDIMScheduler(1000, beta_schedule="linear"))
        options: dict[str, Any] = {"sampler": "ddim"}
        more: dict[str, Any] = {"use_clipped_model_output": True}
    else:
        pipeline = DDPMPipeline(theirs, DDPMScheduler(1000, beta_schedule="linear", variance_type="fixed_large"))
        options, more = {"sampler": "ddpm", "variance": "fixed_large"}, {}
    pipeline.set_progress_bar_config(disable=True)

    few = min(size.steps, 10)
    forward: Callable[..., Any] = ours

    def fast(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return forward(x, t).float()

    def run(net: Callable[..., Any], steps: int) -> np.ndarray:
        random = torch.Generator().manual_seed(3)
        shape = (size.batch, 3, 32, 32)
        x_T = torch.randn(shape, generator=random).to(device).to(memory_format=torch.channels_last)
        denoiser = Denoiser(net, schedule, "eps", clip=True)
        x = sample(
            denoiser, x_T, steps=steps, noise=lambda k: torch.randn(shape, generator=random).to(device), **options
        )
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()

    def peer(steps: int) -> np.ndarray:
        random = torch.Generator().manual_seed(3)
        return pipeline(size.batch, random, num_inference_steps=steps, output_type="np", **more).images

    # An error of eps is multiplied by 1 / a in the image, at first by 60. On a GPU, TF32 and bfloat16 make such errors,
    # so the mean difference is compared there instead of the largest.
    statistic = "mean" if device == "cuda" else "largest"

    def compared(net: Callable[..., Any], most: float) -> float:
        gaps = np.abs(run(net, few) - peer(few))
        gap = float(gaps.mean() if device == "cuda" else gaps.max())
        assert gap < most, gap
        return gap

    checks[f"{statistic} difference of pixels in [0, 1]"] = compared(ours, 1e-3 if device == "cuda" else 1 / 255)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(torch.randn(1, 3, 32, 32, device=device), torch.zeros(1, device=device))
    forward = winograd.compiled(ours)
    checks[f"{statistic} difference of pixels in [0, 1], compiled"] = compared(
        fast, 5e-3 if device == "cuda" else 1 / 255
    )
    x = torch.randn(size.batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    t = torch.full((size.batch,), 700.0, device=device)
    with torch.no_grad():  # as sample does
        gap = float((fast(x, t) - theirs(x, t).sample).abs().max())
    assert gap < (0.1 if device == "cuda" else 1e-3), gap  # bfloat16 on a GPU
    checks["largest difference of outputs, compiled"] = gap
    times, _ = alternate(
        {"ours": lambda: run(fast, size.steps), "diffusers": lambda: peer(size.steps)},
        size.repeats,
        warmups=2 if device == "cuda" else 0,
        device=device,
    )
    work = counter.get_total_flops() * size.batch * size.steps
    return {
        "work": f"{WORK[kind]}, the paper's UNet, batch {size.batch}, {size.steps} steps",
        "per_call": f"{size.steps} of {full} steps; all take {full / size.steps:g} times as long",
        "checks": checks,
        "times": times,
        "figures": ratios(times, "diffusers", 4.0 if device == "cuda" else 2.0),
        "limit": limit(work, min(times["ours"]["wall"]), device, torch.bfloat16 if device == "cuda" else torch.float32),
    }


def ddim(device: str) -> dict[str, Any]:
    """Measures DDIM with 50 steps."""
    return _sampling(device, DDIM[device], "ddim", 50)


def ancestral(device: str) -> dict[str, Any]:
    """Measures ancestral sampling with 1000 steps."""
    return _sampling(device, ANCESTRAL[device], "ancestral", 1000)
