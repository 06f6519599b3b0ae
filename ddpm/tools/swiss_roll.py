"""`swiss-roll`: trains and samples a model of points in the plane, as in figure 1 of Sohl-Dickstein et al. 2015.

The picture has three rows: the forward process from data to noise, the reverse process of a small network, and the drift of the
reverse process.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.samplers import trajectory
from ddpm.diffusion.schedule import NoiseSchedule
from ddpm.errors import InputError
from ddpm.files import atomic
from ddpm.networks.layers import time_embedding
from ddpm.reporting.plots import drawing
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.training.fit import TrainingState, fit
from ddpm.training.objective import Objective

POINTS, STEPS, T = 10_000, 3_000, 200
SHOWN = (0, 25, 60, 110, 200)  # t of each column: 0 is data, T is noise
DRAWN = 1_500  # points per panel


class PointNet(nn.Module):
    """A network of residual layers for points in the plane: net(x, t) returns a prediction, [B, 2] like x.

    Each layer adds an embedding of t to its input.
    """

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(2, width)
        self.time = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedding, h = time_embedding(t, self.width), self.first(x)
        for time, hidden in zip(self.time, self.hidden, strict=True):
            h = h + hidden(F.silu(h + time(embedding)))
        return self.last(F.silu(h))


def roll(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws points of a Swiss roll.

    Returns:
        The points, float32 [count, 2], roughly within [-2, 2], and their positions along the roll, [count], 0 ... 1.
    """
    from sklearn.datasets import make_swiss_roll

    points, angle = make_swiss_roll(count, noise=0.3, random_state=seed)
    return torch.from_numpy(points[:, [0, 2]] / 7).float(), torch.from_numpy(angle / (3 * math.pi) - 0.5).float()


def train_on_roll(steps: int = STEPS, seed: int = 0, report: Report = silent) -> Denoiser:
    """Trains a small network on the cosine schedule by Algorithm 1 of Ho et al. 2020.

    The target is v: x_T holds no signal, so at T a prediction of eps would not determine x_0.
    """
    schedule = NoiseSchedule.named("cosine", T)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = TrainingState(PointNet())
    objective = Objective.of(schedule, "v")
    data, _ = roll(POINTS, seed)
    training = fit(state, data, objective, batch=256, learning_rate=4e-3, seed=seed, warmup=100, ema=0.998)
    while state.step < steps:
        next(training)
        report(Progress(state.step, steps, "steps"))
    return Denoiser(state.ema, schedule, "v")


@torch.no_grad()
def reverse(denoiser: Denoiser, count: int, seed: int = 0) -> dict[int, Tensor]:
    """Samples by Algorithm 2 of Ho et al. 2020. Returns a dict from each t = T ... 0 to the points x_t, [count, 2]."""
    points = {denoiser.schedule.T: gaussian(seed, range(count), 0, (2,))}
    states = trajectory(
        denoiser,
        points[denoiser.schedule.T],
        "ddpm",
        denoiser.schedule.T,
        noise=lambda k: gaussian(seed, range(count), k + 1, (2,)),
        variance="fixed_small",
    )
    return points | {denoiser.schedule.T - 1 - state.k: state.x for state in states}


@torch.no_grad()
def drift(denoiser: Denoiser, x_t: Tensor, t: int) -> Tensor:
    """Returns mu(x_t, t) - x_t, the mean change in the reverse step at t = 1 ... T (eq. 7 of Ho et al. 2020), shaped like x_t."""
    a_bar, a_bar_before = (float(value) for value in denoiser.schedule.alpha_bar[[t, t - 1]])
    beta = 1 - a_bar / a_bar_before
    x0_hat = denoiser(x_t, t - 1)
    mean = a_bar_before**0.5 * beta * x0_hat + (1 - beta) ** 0.5 * (1 - a_bar_before) * x_t
    return mean / (1 - a_bar) - x_t


def swiss_roll(out: Path, seed: int = 0, report: Report = silent) -> None:
    """Trains and samples the model, and writes the picture to `out` (PNG). The same seed gives the same picture.

    Raises InputError if the name of `out` does not end in .png.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: the picture is a PNG; give --out a name that ends in .png")
    torch.set_num_threads(
        1
    )  # gives the same picture everywhere, and is as fast as several threads for so small a network
    denoiser = train_on_roll(seed=seed, report=report)
    data, along = roll(DRAWN, seed + 1)
    schedule = denoiser.schedule
    eps = gaussian(seed + 1, range(DRAWN), 0, (2,))
    forward = {
        t: (schedule.alpha_bar[t].sqrt() * data + (1 - schedule.alpha_bar[t]).sqrt() * eps).float() for t in SHOWN
    }
    back = reverse(denoiser, DRAWN, seed)
    # A generated point has the colour of the data point that is nearest to its position at t = 0.
    ends = along[torch.cdist(back[0], data).argmin(1)]
    rows = (
        ("forward: $q(x_t)$", forward, along),
        ("reverse: $p_\\theta(x_t)$", back, ends),
    )
    with drawing(out, 1100, 688, dpi=110) as figure:
        panels = figure.subplots(3, len(SHOWN), sharex=True, sharey=True)
        for panel in panels.flat:
            panel.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
            panel.spines[:].set_color("0.8")
        for column, t in enumerate(SHOWN):
            panels[0, column].set_title(
                f"t = {t}" + (" (data)" if t == 0 else " (noise)" if t == T else ""), fontsize=9
            )
            for line, (_, points, colours) in zip(panels, rows, strict=False):
                line[column].scatter(*points[t].T, c=colours, cmap="turbo", s=3, linewidths=0)
            _draw_drift(panels[2, column], denoiser, max(t, 1))
        for line, label in zip(panels, (*(row[0] for row in rows), "drift: $\\mu_\\theta(x_t, t) - x_t$"), strict=True):
            line[0].set_ylabel(label, fontsize=9)
        figure.subplots_adjust(left=0.03, right=0.995, bottom=0.01, top=0.95, wspace=0.04, hspace=0.04)
    _fewer_colours(out)


def _fewer_colours(path: Path) -> None:
    """Reduces the picture to 256 colours, so that the file takes a third of the bytes."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with atomic.replacing(path) as temporary:
        small.save(temporary, format="PNG", optimize=True)


def _draw_drift(panel: Any, denoiser: Denoiser, t: int) -> None:
    """Draws the drift as arrows of equal length. The colour of an arrow shows the size of the drift, relative to the largest."""
    ticks = torch.linspace(-2.7, 2.7, 19)
    x, y = torch.meshgrid(ticks, ticks, indexing="xy")
    field = drift(denoiser, torch.stack([x.flatten(), y.flatten()], 1), t)
    size = field.norm(dim=1)
    u, v = (field / size[:, None]).T
    panel.quiver(
        x, y, u, v, size / size.max(), cmap="viridis_r", pivot="mid", scale=22, width=0.006, headwidth=3.5, headlength=4
    )
