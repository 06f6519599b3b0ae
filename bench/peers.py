"""Trains like other packages, for bench.ledger: diffusers' example script and denoising-diffusion-pytorch's Trainer.

Each training keeps its package's network, loss, optimiser, averaging and learning rate. Only the width of its network is scaled,
so that the network has as many operations as the recipe's. Both compute in bfloat16 by autocast where the recipe does.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import cpu_seconds
from ddpm import Denoiser, NoiseSchedule
from ddpm.training.fit import derived_seed

WIDTHS = range(8, 129, 8)


def operations(net: Callable[..., Any], channels: int, size: int) -> int:
    """Counts the floating point operations of one evaluation for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(1, channels, size, size), torch.zeros(1))
    return int(counter.get_total_flops())


def nearest_width(make: Callable[[int], nn.Module], shape: Sequence[int], wanted: int) -> int:
    """Returns the width whose network has the number of operations that is nearest to `wanted`. shape: C, H, W of an image."""

    @cache
    def counted(width: int) -> int:
        with torch.device("meta"):  # counts without computing
            return operations(make(width), shape[0], shape[-1])

    above = bisect.bisect_left(WIDTHS, wanted, key=counted)
    return min(WIDTHS[max(0, above - 1) : above + 1], key=lambda width: abs(math.log(counted(width) / wanted)))


class Peer:
    """A training by another package. All randomness of a step follows from (seed, step), so the training can stop and resume.

    Args:
        images: uint8 [N, C, H, W].
        seed: the seed of the training.
        bfloat16: whether to compute in bfloat16 by autocast.

    Attributes:
        steps: the last step; None if not yet known.
        step: the number of steps that are done.
        processor: processor seconds of training alone.
        seconds: seconds of training alone.
    """

    batch = 16
    accumulate = 1  # batches for each step of the optimiser
    net: Any

    def __init__(self, images: Tensor, seed: int, bfloat16: bool) -> None:
        self.images, self.seed, self.bfloat16 = images, seed, bfloat16
        self.steps: int | None = None
        self.step, self.processor, self.seconds = 0, 0.0, 0.0

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    @property
    def parts(self) -> dict[str, Any]:
        """The networks and optimisers, whose state is saved."""
        raise NotImplementedError

    def loss(self, x_0: Tensor) -> Tensor:
        """Returns the loss of a batch of images in [0, 1]."""
        raise NotImplementedError

    def update(self) -> None:
        """Changes the weights by their gradients, and updates the average."""
        raise NotImplementedError

    def denoiser(self) -> Denoiser:
        """Returns the denoiser of the averaged weights."""
        raise NotImplementedError

    def advance(self) -> Iterator[None]:
        """Trains up to `steps`. Yields every ten steps and after the last. Does not count the caller's time."""
        began, processor = time.perf_counter(), cpu_seconds()
        while self.steps is None or self.step < self.steps:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "peer", self.step))
            torch.manual_seed(derived_seed(self.seed, "global", self.step))
            for _ in range(self.accumulate):
                rows = torch.randint(len(self.images), (self.batch,), generator=generator)
                x_0 = self.images[rows].float() / 255
                flipped = torch.rand(self.batch, 1, 1, 1, generator=generator) < 0.5
                with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                    loss = self.loss(torch.where(flipped, x_0.flip(-1), x_0))
                (loss / self.accumulate).backward()
            self.update()
            self.step += 1
            if self.step % 10 == 0 or self.step == self.steps:
                if not math.isfinite(loss.item()):
                    raise SystemExit(f"the loss is {loss.item()} at step {self.step}")
                self.seconds += time.perf_counter() - began
                self.processor += cpu_seconds() - processor
                yield
                began, processor = time.perf_counter(), cpu_seconds()

    def save(self, folder: Path) -> None:
        """Replaces folder/peer.pt atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {name: getattr(self, name) for name in ("steps", "step", "processor", "seconds")}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"about": about, "states": states}, folder / "peer.tmp")
        (folder / "peer.tmp").replace(folder / "peer.pt")

    def load(self, folder: Path) -> None:
        """Loads what `save` wrote, if there is such a file."""
        if (folder / "peer.pt").exists():
            kept = torch.load(folder / "peer.pt", weights_only=True)
            for name, value in kept["about"].items():
                setattr(self, name, value)
            for name, part in self.parts.items():
                part.load_state_dict(kept["states"][name])


def _diffusers_net(width: int) -> Any:
    from diffusers import UNet2DModel

    down = ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4
    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=[width * factor for factor in (1, 1, 2, 2, 4, 4)],
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=8,
    )


class Diffusers(Peer):
    """Trains like diffusers' examples/unconditional_image_generation/train_unconditional.py, with the arguments of its README.

    wanted: the operations for one image to which the network is scaled.
    """

    WARMUP = 500

    def __init__(self, images: Tensor, seed: int, bfloat16: bool, wanted: int) -> None:
        from diffusers.training_utils import EMAModel

        super().__init__(images, seed, bfloat16)
        width = nearest_width(lambda width: _Plain(_diffusers_net(width)), images.shape[1:], wanted)
        torch.manual_seed(seed)
        self.net = _diffusers_net(width)
        self.average = EMAModel(self.net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.schedule = NoiseSchedule.named("linear", 1000)

    @property
    def parts(self) -> dict[str, Any]:
        return {"net": self.net, "average": self.average, "optimizer": self.optimizer}

    def loss(self, x_0: Tensor) -> Tensor:
        t = torch.randint(1000, (len(x_0),))
        alpha_bar = self.schedule.alpha_bar[t + 1].float().view(-1, 1, 1, 1)
        eps = torch.randn_like(x_0)
        x_t = alpha_bar.sqrt() * (2 * x_0 - 1) + (1 - alpha_bar).sqrt() * eps
        return F.mse_loss(self.net(x_t, t).sample.float(), eps)

    def update(self) -> None:
        done = 0.0 if self.steps is None else max(0.0, (self.step - self.WARMUP) / max(1, self.steps - self.WARMUP))
        part = self.step / self.WARMUP if self.step < self.WARMUP else 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 * part
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.net.parameters())

    def denoiser(self) -> Denoiser:
        averaged = _diffusers_net(self.net.config.block_out_channels[0]).eval()
        averaged.load_state_dict(self.net.state_dict())
        self.average.copy_to(averaged.parameters())
        return Denoiser(_Plain(averaged), self.schedule, "eps", clip=True)


class _Plain(nn.Module):
    """Wraps a diffusers network, so that it returns a tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sample: Tensor = self.net(x, t).sample
        return sample


class Lucidrains(Peer):
    """Trains like GaussianDiffusion and Trainer of denoising-diffusion-pytorch, with the arguments of its README.

    wanted: the operations for one image to which the network is scaled.
    """

    batch, accumulate = 32, 2

    def __init__(self, images: Tensor, seed: int, bfloat16: bool, wanted: int) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        super().__init__(images, seed, bfloat16)

        def net(width: int) -> Any:
            return Unet(dim=width, dim_mults=(1, 2, 4, 8), channels=images.shape[1])

        width = nearest_width(net, images.shape[1:], wanted)
        torch.manual_seed(seed)
        self.diffusion = GaussianDiffusion(net(width), image_size=images.shape[-1], timesteps=1000)
        self.net = self.diffusion.model
        self.average = EMA(self.diffusion, beta=0.995, update_every=10)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))

    @property
    def parts(self) -> dict[str, Any]:
        return {"diffusion": self.diffusion, "average": self.average, "optimizer": self.optimizer}

    def loss(self, x_0: Tensor) -> Tensor:
        loss: Tensor = self.diffusion(x_0)
        return loss

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.diffusion.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()

    def denoiser(self) -> Denoiser:
        averaged = self.average.ema_model.eval()
        schedule = NoiseSchedule(averaged.betas.double(), "sigmoid")
        return Denoiser(averaged.model, schedule, "v", clip=True)


PEERS: dict[str, type[Diffusers | Lucidrains]] = {
    "diffusers": Diffusers,
    "denoising-diffusion-pytorch": Lucidrains,
}
