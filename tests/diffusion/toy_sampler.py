"""Shows how to add a sampler to ddpm/diffusion/samplers.py: one function and one row of SAMPLERS."""

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ddpm.diffusion.samplers import SAMPLERS, Denoise, Level, Noise, Sampler


def renoised(
    denoise: Denoise, x: Tensor, levels: list[Level], noise: Noise, *, share: float = 0.5
) -> Iterator[tuple[Tensor, Tensor]]:
    """Euler's method on the probability-flow ODE. At each step, `share` of the remaining noise is drawn anew."""
    for k, (now, to) in enumerate(pairwise(levels)):
        x0_hat = denoise(x, now.t)
        eps = (x - now.a * x0_hat) / now.s
        if share > 0 and to.s > 0:
            eps = (1 - share**2) ** 0.5 * eps + share * noise(k)
        x = to.a * x0_hat + to.s * eps
        yield x, x0_hat


SAMPLERS["renoised"] = Sampler(renoised, deterministic=lambda options: options["share"] == 0)
