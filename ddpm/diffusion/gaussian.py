"""Divergences and likelihoods of Gaussians, for the variational bound of Ho et al. 2020."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """Returns KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) of each element, in nats.

    Args:
        mean1: the mean of the first Gaussian. All arguments broadcast with each other.
        logvar1: the log variance of the first Gaussian.
        mean2: the mean of the second Gaussian.
        logvar2: the log variance of the second Gaussian.
    """
    difference = logvar2 - logvar1
    return ((torch.expm1(-difference) + difference) + (mean1 - mean2).square() * torch.exp(-logvar2)) / 2


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns log p(x0) of each element in nats, the mass of N(mean, exp log_variance) on x0's bin: eq. 13 of Ho et al.

    x0 holds the 256 levels -1, -1 + 1/127.5, ..., 1. A bin reaches half a level to either side. The first and the last
    bin extend to infinity. The result is accurate in the tails, so a mean many standard deviations away still has a
    gradient.
    """
    inverse = torch.exp(-log_variance / 2)
    below, above = (x0 - mean - 1 / 255) * inverse, (x0 - mean + 1 / 255) * inverse
    # log Phi is accurate only in the lower tail, so levels above the mean are mirrored.
    mirrored = x0 > mean
    low, high = torch.where(mirrored, -above, below), torch.where(mirrored, -below, above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1(log_low - log_high))
    first, last = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return torch.where(x0 < -1 + 1 / 255, first, torch.where(x0 > 1 - 1 / 255, last, inside))
