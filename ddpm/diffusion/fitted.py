"""Fits the S timesteps of a sampler to one model, as "GITS" (Chen et al. 2024) and "Align your steps" do.

The target is the end of the model's own trajectory of REFERENCE evaluations. The curvature of this trajectory gives the
first guess, as in GITS. The cost of a step between two levels is the error of a DDIM step there. Dynamic programming finds
the S levels of lowest total cost. Then single times are moved. A move is kept if the sampler ends closer to the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.samplers import SAMPLERS, Counted, sample
from ddpm.diffusion.solvers import flow
from ddpm.diffusion.timesteps import SPACINGS, Level, noise_levels

REFERENCE = 1000  # number of evaluations of the target trajectory
GRID = 100  # number of levels of the trajectory from which times are chosen
STARTS = 2  # number of guesses that are improved, the best among the guesses from the curvature and the spacings


@dataclass(frozen=True)
class Path:
    """The trajectory of a model from noise to images.

    Args:
        x_T: the noise from which the trajectory starts, [B, ...].
        levels: GRID noise levels of the trajectory.
        costs: [GRID, GRID], the error of a DDIM step from one level to a later level; infinite for other pairs.
        end: the images at the end, like x_T.
    """

    x_T: Tensor
    levels: list[Level]
    costs: np.ndarray
    end: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, denoiser: Denoiser, x_T: Tensor, done: Callable[[int], None] = lambda evaluations: None) -> Path:
        """Computes the trajectory with dpmpp_2m. Calls `done` with the number of evaluations so far."""
        levels = noise_levels(denoiser.schedule, REFERENCE, "logsnr")
        kept: list[tuple[Level, Tensor, Tensor]] = []
        x, stride = x_T, REFERENCE // GRID
        steps = SAMPLERS["dpmpp_2m"].step(Counted(denoiser), x_T, levels, lambda k: x_T)
        for k, (next_x, x0_hat) in enumerate(steps):
            if k % stride == 0:
                kept.append((levels[k], x, x0_hat))
            x = next_x
            done(k + 1)
        costs = np.full((len(kept), len(kept)), np.inf)
        for i, (now, start, x0_hat) in enumerate(kept):
            for j, (to, target, _) in enumerate(kept[i + 1 :], i + 1):
                error = rms(flow(start, x0_hat, now, to), target)
                costs[i, j] = error / to.a if to.a else np.inf
        return cls(x_T, [level for level, _, _ in kept], costs, x)


def rms(x: Tensor, y: Tensor) -> float:
    """Returns the root of the mean squared difference."""
    return float((x - y).square().mean().sqrt())


def cheapest(costs: np.ndarray, steps: int) -> list[int]:
    """Returns `steps` rising indices from the first to the last, with the lowest sum of costs[from, to] between neighbours."""
    if steps == 1:
        return [0]
    rest, best_next = costs[:, -1].copy(), []
    for _ in range(steps - 2):
        total = costs + rest
        best_next.append(total.argmin(axis=1))
        rest = total.min(axis=1)
    path = [0]
    for choice in reversed(best_next):
        path.append(int(choice[path[-1]]))
    return [*path, len(costs) - 1]


def fit_times(
    denoiser: Denoiser,
    path: Path,
    steps: int,
    sampler: str = "unipc",
    done: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[list[float], float]:
    """Finds the timesteps with which S steps of a sampler end closest to the end of the model's trajectory.

    Args:
        denoiser: the model.
        path: the trajectory of the model.
        steps: S, at most GRID.
        sampler: the sampler. With these `options`, it must not draw noise.
        done: called each time that the search has run the sampler.
        options: the sampler's own options.

    Returns:
        S falling timesteps, and the RMS distance between the sampler's images and the end of the trajectory.

    Raises:
        ValueError: an option is wrong, or S is larger than the number of levels to choose from.
    """
    if not 1 <= steps <= len(path.levels):
        raise ValueError(f"steps = {steps} must lie in 1 ... {len(path.levels)}")
    known: dict[tuple[int, ...], float] = {}

    def error(chosen: list[int]) -> float:
        if (key := tuple(chosen)) not in known:
            times = {steps: [path.levels[i].t for i in chosen]}
            known[key] = rms(sample(denoiser, path.x_T, sampler, steps, times=times, **options), path.end)
            done()
        return known[key]

    starts = sorted(_guesses(denoiser, path, steps), key=error)[:STARTS]
    best = min((_improved(start, len(path.levels), error) for start in starts), key=error)
    return [path.levels[i].t for i in best], error(best)


def _guesses(denoiser: Denoiser, path: Path, steps: int) -> list[list[int]]:
    """Returns guesses as lists of grid indices: one from the curvature, and one from each spacing.

    The guess from a spacing has the grid levels nearest to the spacing's levels. A spacing for which two of these levels
    are the same gives no guess.
    """
    guesses, lams = [cheapest(path.costs, steps)], np.array([level.lam for level in path.levels])
    for spacing in SPACINGS:
        wanted = noise_levels(denoiser.schedule, steps, spacing)[:-1]
        nearest = [0 if level.alpha_bar == 0 else int(np.abs(lams - level.lam).argmin()) for level in wanted]
        if all(i < j for i, j in pairwise(nearest)):
            guesses.append(nearest)
    return guesses


def _improved(chosen: list[int], count: int, error: Callable[[list[int]], float]) -> list[int]:
    """Improves the chosen grid indices: moves one index at a time as long as the error falls. The moves shrink from 16 to 1."""
    step = 16
    while step:
        moved = False
        for k in range(len(chosen)):
            for index in (chosen[k] - step, chosen[k] + step):
                tried = [*chosen[:k], index, *chosen[k + 1 :]]
                in_order = all(i < j for i, j in pairwise([-1, *tried, count]))
                if in_order and error(tried) < error(chosen):
                    chosen, moved = tried, True
        step = step if moved else step // 2
    return chosen
