"""Checks fitted times: the cheapest path against brute force, and the errors on mixtures against those of the spacings."""

import itertools

import numpy as np
import pytest
import torch

from ddpm import SPACINGS, Denoiser, NoiseSchedule, sample, trajectory
from ddpm.diffusion.fitted import GRID, REFERENCE, Path, cheapest, fit_times, rms
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.samplers import evaluations
from ddpm.diffusion.timesteps import noise_levels

ANGLES = torch.arange(8, dtype=torch.float64) * torch.pi / 4
RING = 0.8 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # eight clusters of standard deviation 0.1
THREE = torch.tensor([[-0.8, -0.4], [0.7, 0.5], [0.1, -0.7]], dtype=torch.float64)


def exact(means: torch.Tensor, deviation: float, name: str) -> Denoiser:
    """Returns a denoiser that computes E[x_0 | x_t] of equally likely clusters."""
    schedule = NoiseSchedule.named(name, 1000)

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = schedule.log_alpha_bar_at(t.double()[:1]).exp()
        a, variance = alpha_bar.sqrt(), alpha_bar * deviation**2 + 1 - alpha_bar
        away = x[:, None] - a * means
        weights = (-away.square().sum(-1) / (2 * variance)).softmax(-1)
        return (weights[..., None] * (means + a * deviation**2 / variance * away)).sum(1)

    return Denoiser(net, schedule, "x0")


def noise(seed: int, count: int, dimensions: int = 2) -> torch.Tensor:
    return gaussian(seed, range(count), 0, (dimensions,)).double()


def fitted_and_spaced(
    means: torch.Tensor, deviation: float, name: str, count: int, fresh: int
) -> tuple[float, dict[str, float]]:
    """Returns the RMS distance from samples to the ends of their trajectories, with fitted times and with each spacing.

    unipc makes 5 evaluations. The times are fitted to `count` points, and the distances are measured on `fresh` other points.
    """
    denoiser, dimensions = exact(means, deviation, name), means.shape[1]
    times, _ = fit_times(denoiser, Path.of(denoiser, noise(0, count, dimensions)), 5)
    x_T = noise(1, fresh, dimensions)
    end = Path.of(denoiser, x_T).end
    spaced = {spacing: rms(sample(denoiser, x_T, "unipc", 5, spacing), end) for spacing in SPACINGS}
    return rms(sample(denoiser, x_T, "unipc", 5, times={5: times}), end), spaced


def test_the_cheapest_path_is_that_of_all_paths() -> None:
    costs = np.triu(np.random.default_rng(0).random((9, 9)), 1)
    costs[np.tril_indices(9)] = np.inf
    for steps in range(2, 7):
        paths = [(0, *between, 8) for between in itertools.combinations(range(1, 8), steps - 2)]
        best = min(paths, key=lambda path: sum(costs[i, j] for i, j in itertools.pairwise(path)))
        assert cheapest(costs, steps) == list(best)


@pytest.mark.parametrize(
    ("means", "deviation", "name"),
    [
        (RING, 0.1, "linear"),
        (THREE, 0.18, "cosine"),
        pytest.param(RING, 0.1, "cosine", marks=pytest.mark.proof),
        pytest.param(THREE, 0.18, "linear", marks=pytest.mark.proof),
    ],
)
def test_five_fitted_steps_end_nearer_to_the_trajectory_than_on_the_best_spacing(
    means: torch.Tensor, deviation: float, name: str
) -> None:
    """Samples with fitted times end at least 40% nearer, from noise to which the times were not fitted."""
    fitted, spaced = fitted_and_spaced(means, deviation, name, 64, 128)
    assert fitted < 0.6 * min(spaced.values()), (fitted, spaced)


def test_a_trajectory_keeps_a_level_of_every_tenth_evaluation() -> None:
    path = Path.of(exact(RING, 0.1, "cosine"), noise(0, 2))
    levels = noise_levels(NoiseSchedule.named("cosine", 1000), REFERENCE, "logsnr")
    assert path.levels == levels[: REFERENCE : REFERENCE // GRID] and len(path.levels) == GRID


def test_times_are_visited_as_given() -> None:
    denoiser = exact(RING, 0.1, "cosine")
    told = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.append(float(t[0]))
        return torch.zeros_like(x)

    watched = Denoiser(net, denoiser.schedule, "x0")
    times = {3: [900.0, 300.5, 0.0], 2: [700, 20]}
    for steps, each in times.items():
        told.clear()
        states = list(trajectory(watched, noise(0, 2), "unipc", steps, times=times))
        assert told == pytest.approx(each) and len(states) == steps == evaluations(
            denoiser.schedule, "unipc", steps, times=times
        )
    # Fitted times that equal a spacing give the same samples as that spacing.
    x_T, leading = noise(0, 4), [float(t) for t in range(900, -1, -100)]
    assert torch.equal(sample(denoiser, x_T, "unipc", 10, times={10: leading}), sample(denoiser, x_T, "unipc", 10))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({4: [3.0, 2.0, 1.0, 0.0]}, "no entry for 3 steps; there are entries for 4"),
        ({3: [3.0, 2.0]}, "3 falling timesteps"),
        ({3: [3.0, 3.0, 0.0]}, "3 falling timesteps"),
        ({3: [3.0, 1.0, -0.5]}, "3 falling timesteps"),
        ({3: [1000.0, 1.0, 0.0]}, "after the last timestep, 999"),
    ],
)
def test_wrong_times_are_refused(times: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(exact(RING, 0.1, "cosine"), noise(0, 2), "unipc", 3, times=times)


def test_times_do_not_visit_pure_noise_twice() -> None:
    """With zero terminal SNR there is no signal at any time after T - 2. So a step between two such times is undefined."""
    schedule = NoiseSchedule.named("cosine", steps=1000, zero_terminal_snr=True)
    denoiser = Denoiser(lambda x, t: 0.3 * x, schedule, target="v")
    with pytest.raises(ValueError, match="times: do not make 3 different noise levels of T = 1000"):
        sample(denoiser, noise(0, 2), "dpmpp_2m_sde", 3, times={3: [999, 998.5, 0]})


if __name__ == "__main__":
    sixteen = 0.6 * gaussian(7, range(6), 0, (16,)).double()
    for title, means, deviation in (
        ("8 clusters in 2 dimensions", RING, 0.1),
        ("3 clusters in 2 dimensions", THREE, 0.18),
        ("6 clusters in 16 dimensions", sixteen, 0.1),
    ):
        for name in ("linear", "cosine"):
            fitted, spaced = fitted_and_spaced(means, deviation, name, 128, 512)
            spacing, least = min(spaced.items(), key=lambda entry: entry[1])
            print(
                f"| {title} | {name} | {least:.4f} ({spacing}) | {fitted:.4f} | {100 - 100 * fitted / least:.0f}% |",
                flush=True,
            )
