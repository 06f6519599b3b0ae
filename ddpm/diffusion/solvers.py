"""Solves the probability flow deterministically with several samplers, and the reverse SDE with SDE-DPM-Solver++.

The arguments of a sampler are described in ddpm.diffusion.samplers.

With xi = x / a and sigma = s / a, the flow is dxi / dsigma = eps, where eps = (x - a x0_hat) / s: eq. 1 of Karras et al. 2022.
Every deterministic step is `flow`, the step of DDIM, with a different x0_hat. The multistep solvers extrapolate x0_hat, or
eps, from past steps in lambda = log(1 / sigma), half the log signal-to-noise ratio.

`usable` limits the extrapolation at every step by one rule. As a function of lambda, x0_hat changes from the mean of the
data to a single image within about one nat. So past estimates cannot predict x0_hat further ahead, and a solver that
extrapolates over a step of several nats overshoots. Steps shorter than REACH have the solver's full order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from ddpm.diffusion.timesteps import Level

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]
Steps = Iterator[tuple[Tensor, Tensor]]  # (x, x0_hat) after each step
Past = list[tuple[Level, Tensor]]  # levels visited and the estimates there, newest first

REACH = 0.7  # nats of lambda; at 1, third order would be less accurate than DDIM (tests/diffusion/test_flow.py)


def flow(x: Tensor, x0_hat: Tensor, now: Level, to: Level) -> Tensor:
    """Takes DDIM's step: follows the probability flow with constant x0_hat. The step is exact if the data is a single image.

    Args:
        x: the images at level `now`, [B, ...].
        x0_hat: the estimate of the clean images, like x.
        now: the noise level of x.
        to: the noise level of the result.
    """
    ratio = to.s / now.s
    return ratio * x + (to.a - ratio * now.a) * x0_hat


def euler(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Samples by Euler's method on the probability-flow ODE (eq. 1 of Karras et al. 2022), which is DDIM at eta = 0."""
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        x = flow(x, x0_hat, now, to)
        yield x, x0_hat


def heun(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Samples by algorithm 1 of Karras et al. 2022: second order, 2S - 1 network evaluations, or 2S - 2 from pure noise.

    With sigma = s / a, the mean of the slopes at both ends of a step gives

        x / a = x0_hat + sigma_to slope + w (x0_hat' - x0_hat),    w = (sigma / sigma_to - 1) / 2,

    where x0_hat' is the estimate at the end. In a step from almost pure noise (cosine, trailing: sigma = 2e4 to 12 at
    S = 20), w would multiply the error of x0_hat' by a thousand. So w is at most 1. Steps with sigma <= 3 sigma_to are as
    in the paper.
    """
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        predicted = flow(x, x0_hat, now, to)
        x = predicted
        if corrected(now, to):
            weight = min((now.s * to.a / (now.a * to.s) - 1) / 2, 1.0)
            x = predicted + to.a * weight * (denoise(predicted, to.t) - x0_hat)
        yield x, x0_hat


def corrected(now: Level, to: Level) -> bool:
    """Returns whether Heun's step has a second evaluation. Steps from pure noise or onto the clean image have none."""
    return 0 < to.alpha_bar < 1 and now.alpha_bar > 0


def usable(past: Past, now: Level, to: Level) -> Past:
    """Returns the past estimates from which a step may extrapolate, newest first. Lengths are differences of lambda.

    - A step of at most REACH uses the newest estimate. It also uses earlier estimates, up to the first gap longer than REACH
      between two estimates.
    - A longer step uses the newest estimate alone, or none if the step is more than twice as long as the step before.
    - Steps onto the clean image and out of pure noise are infinitely long and use no past estimate.
    """
    h = abs(to.lam - now.lam)
    known = [entry for entry in past if math.isfinite(entry[0].lam)]
    if not known or math.isinf(h):
        return []
    if h > REACH:
        return known[:1] if h <= 2 * abs(now.lam - known[0][0].lam) else []
    gaps = [abs(later.lam - earlier.lam) for (later, _), (earlier, _) in pairwise(known)]
    count = 1 + next((i for i, gap in enumerate(gaps) if gap > REACH), len(gaps))
    return known[:count]


def cut_to_reach(h: float) -> float:
    """Returns how far, in nats, a step of h nats may follow a linear trend: h, cut to -REACH ... REACH."""
    return math.copysign(min(abs(h), REACH), h)


# Gauss-Legendre quadrature on [0, 1]
POINTS, WEIGHTS = ((x + bound) / 2 for x, bound in zip(np.polynomial.legendre.leggauss(8), (1, 0), strict=True))


def average_weights(others: Sequence[float], h: float, growth: float) -> list[float]:
    """Returns weights that average a polynomial in u over a step from 0 to h, with the density e^(growth u).

    The polynomial goes through a value at 0 and values at `others`. The average is the value at 0 plus the sum of
    weight x (other value - value at 0). Eight points of Gauss's quadrature are exact to rounding for |h| <= REACH.
    """
    u = POINTS * h
    density = WEIGHTS * np.exp(growth * u)
    basis = [
        u / node * np.prod([(u - other) / (node - other) for other in others if other != node], axis=0)
        for node in others
    ]
    return [float((density * polynomial).sum() / density.sum()) for polynomial in basis]


def extrapolated(value: Tensor, past: Past, weights: Sequence[float]) -> Tensor:
    """Returns value + the sum of weight x (past value - value)."""
    total = value
    for (_, past_value), weight in zip(past, weights, strict=True):
        total = total + weight * (past_value - value)
    return total


def _x0_weights(used: Past, now: Level, to: Level) -> list[float]:
    """Returns the weight of each past x0_hat in a step, for `extrapolated`.

    The weights average the polynomial through all x0_hats over the step with the density e^u, where u = lambda - now.lam.
    With one past x0_hat, a step of at most REACH is that of DPM-Solver++ 2M instead.
    """
    h, past_lams = to.lam - now.lam, [level.lam - now.lam for level, _ in used]
    if len(past_lams) == 1:
        return [cut_to_reach(h) / (2 * past_lams[0])]
    return average_weights(past_lams, h, growth=1)


def _dpmpp(denoise: Denoise, x: Tensor, levels: list[Level], order: int) -> Steps:
    """Samples by DPM-Solver++: algorithm 2 of Lu et al. 2022b, and its third-order form.

    Each step uses up to `order` - 1 earlier x0_hats.
    """
    past: Past = []
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        used = usable(past, now, to)
        x = flow(x, extrapolated(x0_hat, used, _x0_weights(used, now, to)), now, to)
        past = [(now, x0_hat), *past][: order - 1]
        yield x, x0_hat


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Samples by DPM-Solver++ 2M of Lu et al. 2022b: second order, one evaluation per step."""
    return _dpmpp(denoise, x, levels, order=2)


def dpmpp_3m(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Samples by DPM-Solver++ 3M: integrates the quadratic through three estimates exactly.

    The solver has third order if the first two steps are short. At the usual length, these steps reduce every third-order
    solver to second order, since they have too few past estimates. The authors' code gives the curvature half the weight
    used here. So the order of that code tends to 2 even if the first steps are short.
    """
    return _dpmpp(denoise, x, levels, order=3)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Samples by SDE-DPM-Solver++ 2M of Lu et al. 2022b: the reverse SDE, with fresh noise at every step but the last."""
    past: Past = []
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        used, h = usable(past, now, to), to.lam - now.lam
        share = -math.expm1(-2 * h)
        x = (to.s / now.s * math.exp(-h)) * x + (to.a * share) * extrapolated(x0_hat, used, _x0_weights(used, now, to))
        if to.s > 0:
            x = x + to.s * math.sqrt(share) * noise(k)
        past = [(now, x0_hat)]
        yield x, x0_hat


def unipc(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise, *, order: int = 2) -> Steps:
    """Samples by UniPC of Zhao et al. 2023 with B(h) = e^-h - 1 on x0_hat: each evaluation also corrects the previous step.

    The predictor is `_dpmpp`. The corrector repeats the previous step with an average that includes the new estimate:
    eq. 8 and 9. If there is only one other estimate, the new estimate has the weight 1/2, as in the paper. Raises
    ValueError unless order is 1, 2 or 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order = {order} must be 1, 2 or 3")
    past: Past = []
    before = x  # x at the newest entry of past
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        if past and math.isfinite(past[0][0].lam):
            x = _correct(before, now, x0_hat, past)
        past = [(now, x0_hat), *past][:order]
        before = x
        used = usable(past[1:], now, to)
        x = flow(x, extrapolated(x0_hat, used, _x0_weights(used, now, to)), now, to)
        yield x, x0_hat


def _correct(x: Tensor, to: Level, x0_hat: Tensor, past: Past) -> Tensor:
    """Repeats the step from past[0] to `to`, now that x0_hat at `to` is known.

    Args:
        x: the images at the level of past[0], [B, ...].
        to: the level at which the step ends.
        x0_hat: the estimate at `to`, like x.
        past: earlier levels and their estimates, newest first.
    """
    (now, value), *older = past
    older = [] if abs(h := to.lam - now.lam) > REACH else usable(older, now, to)
    nodes = [(to, x0_hat), *older]
    weights = average_weights([level.lam - now.lam for level, _ in nodes], h, growth=1) if older else [0.5]
    return flow(x, extrapolated(value, nodes, weights), now, to)


def _from_eps(
    denoise: Denoise, x: Tensor, levels: list[Level], order: int, weigh: Callable[[list[float], float], list[float]]
) -> Steps:
    """Samples with an eps that is extrapolated from past values.

    Args:
        denoise: see ddpm.diffusion.samplers.
        x: see ddpm.diffusion.samplers.
        levels: see ddpm.diffusion.samplers.
        order: up to order - 1 past values are used.
        weigh: weigh(past_lams, h) returns the weight of each difference past eps - eps. past_lams: the lambdas of the past
            values, minus the present lambda. h: the length of the step in lambda.
    """
    past: Past = []
    for now, to in pairwise(levels):
        x0_hat = denoise(x, now.t)
        eps = (x - now.a * x0_hat) / now.s
        value = x0_hat
        if used := usable(past, now, to):
            weights = weigh([level.lam - now.lam for level, _ in used], to.lam - now.lam)
            value = x0_hat - (now.s / now.a) * (extrapolated(eps, used, weights) - eps)
        x = flow(x, value, now, to)
        past = [(now, eps), *past][: order - 1]
        yield x, x0_hat


# Weights of the differences past eps - eps in the Adams-Bashforth formulas of orders 2, 3 and 4 for equal steps.
ADAMS = ([-1 / 2], [-16 / 12, 5 / 12], [-59 / 24, 37 / 24, -9 / 24])


def _adams(past_lams: list[float], h: float) -> list[float]:
    """Returns the Adams-Bashforth weights of the past values.

    The weight of a single past value is reduced as if the step had a length of at most REACH.
    """
    share = cut_to_reach(h) / h if len(past_lams) == 1 else 1.0
    return [share * weight for weight in ADAMS[len(past_lams) - 1]]


def ipndm(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Samples by iPNDM (Zhang & Chen 2023): extrapolates eps with Adams-Bashforth's fourth-order weights for equal steps.

    The method uses these weights for unequal steps, too. iPNDM has fourth order on equal steps of sigma, and otherwise second
    order. The fixed weights are better in practice. On CIFAR-10 at 5 evaluations, zju-pi/diff-sampler measures an FID of
    13.59 with fixed weights, and 23.58 with weights for unequal steps (`ipndm_v`).
    """
    return _from_eps(denoise, x, levels, 4, _adams)


def _deis(past_lams: list[float], h: float) -> list[float]:
    """Returns the weights that integrate the polynomial through eps and the past values over sigma."""
    if len(past_lams) > 1:
        return average_weights(past_lams, h, growth=-1)
    mean = 1 - h / math.expm1(h) if h < 700 else 1.0  # the mean of u from 0 to h, weighted by e^-u
    return [math.copysign(min(abs(mean), REACH / 2), h) / past_lams[0]]


def deis(denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise) -> Steps:
    """Samples by tAB-DEIS (Zhang & Chen 2023) with t = lambda: integrates the quadratic through three eps exactly over sigma.

    The solver has third order if the first steps are short (see `dpmpp_3m`).
    """
    return _from_eps(denoise, x, levels, 3, _deis)
