"""Checks class-conditional networks and guidance: a mixture with known scores, guidance 0 and 1, and label dropout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddpm import SAMPLERS, TARGETS, Denoiser, NoiseSchedule, UNet, fit, sample, trajectory
from ddpm.diffusion.denoiser import NO_LABEL, coefficients
from ddpm.diffusion.noise import gaussian
from ddpm.training.fit import TrainingState
from ddpm.training.objective import Objective

# Two classes of numbers, x_0 | y ~ N(MEANS[y], VARIANCES[y]), with the probabilities SHARES.
MEANS, VARIANCES, SHARES = (
    torch.tensor(values, dtype=torch.float64) for values in ((-0.7, 0.5), (0.04, 0.25), (0.3, 0.7))
)
SCHEDULE = NoiseSchedule.named("cosine", 1000)


def log_densities(x: torch.Tensor, a: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Returns log p_t(x, y) of x [B] for both classes y: [B, 2]."""
    normal = torch.distributions.Normal(a[:, None] * MEANS, (a[:, None] ** 2 * VARIANCES + s[:, None] ** 2).sqrt())
    return normal.log_prob(x[:, None]) + SHARES.log()


def exact_net(target: str) -> Callable[..., torch.Tensor]:
    """Returns a network that computes E[x_0 | x_t, y] by Bayes' rule, or E[x_0 | x_t] for label -1.

    The network predicts `target`, and its input x is float64 [B, 1].
    """

    def net(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        a, s, c_skip, c_out = coefficients(SCHEDULE, target, t.double())
        gain = a[:, None] * VARIANCES / (a[:, None] ** 2 * VARIANCES + s[:, None] ** 2)
        means = MEANS + gain * (x - a[:, None] * MEANS)  # [B, 2]
        posterior = log_densities(x[:, 0], a, s).softmax(1)
        told = nn.functional.one_hot(labels.clamp(min=0), 2).double()
        x0_hat = (means * torch.where(labels[:, None] == NO_LABEL, posterior, told)).sum(1)
        return ((x0_hat - c_skip * x[:, 0]) / c_out)[:, None]

    return net


def exact(target: str, label: int, guidance: float, count: int) -> Denoiser:
    return Denoiser(exact_net(target), SCHEDULE, target, labels=torch.full((count,), label), guidance=guidance)


@pytest.mark.parametrize("guidance", [-1.0, 0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_it_follows_the_score_of_p_times_p_label_to_the_w(target: str, guidance: float) -> None:
    """x0_hat = (x_t + s^2 score) / a. The score is the gradient of log(p(x) p(y | x)^w), computed by autograd."""
    x = torch.linspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    for label, t in itertools.product((0, 1), (20.0, 400.5, 900.0)):
        log_alpha_bar = SCHEDULE.log_alpha_bar_at(torch.full((41,), t))
        a, s = (log_alpha_bar / 2).exp(), (1 - log_alpha_bar.exp()).sqrt()
        joint = log_densities(x, a, s)
        whole = joint.logsumexp(1)
        (score,) = torch.autograd.grad((whole + guidance * (joint[:, label] - whole)).sum(), x)
        expected = (x + s**2 * score) / a
        ours = exact(target, label, guidance, 41)(x.detach()[:, None], t)[:, 0]
        assert torch.allclose(ours, expected.detach(), rtol=1e-6, atol=1e-8), (label, t)


def test_samples_are_of_the_class_the_mixture_or_further_out() -> None:
    count = 400
    # evenly spaced quantiles of N(0, 1)
    x_T = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]

    def moments(label: int, guidance: float) -> tuple[float, float]:
        x_0 = sample(exact("v", label, guidance, count), x_T, "dpmpp_2m", 50, "logsnr")
        return float(x_0.mean()), float(x_0.std())

    for label in (0, 1):
        mean, deviation = float(MEANS[label]), float(VARIANCES[label].sqrt())
        assert moments(label, 1.0) == pytest.approx((mean, deviation), abs=0.02)
        away = moments(label, 3.0)[0]
        assert away > mean + 0.02 if label else away < mean - 0.02  # away from the other class
    mixed = float(SHARES @ MEANS)
    spread = float((SHARES @ (VARIANCES + MEANS**2) - mixed**2).sqrt())
    assert moments(0, 0.0) == pytest.approx((mixed, spread), abs=0.03)


def conditional(classes: int = 3) -> UNet:
    """Returns a network with random weights everywhere, even where training starts from zero."""
    net, generator = UNet(1, 8, 16, (1, 2), 1, (4,), classes=classes), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.01)
    return net.eval().requires_grad_(False)


def test_w_1_is_the_labelled_network_w_0_the_unlabelled_and_each_costs_one_evaluation() -> None:
    net, calls = conditional(), []

    def counted(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return net(x, t, labels)

    x, t, labels = gaussian(0, range(4), 0, (1, 8, 8)), torch.full((4,), 300.0), torch.tensor([0, 2, 1, 2])
    at = {w: Denoiser(counted, SCHEDULE, "x0", labels=labels, guidance=w)(x, 300.0) for w in (0.0, 1.0, 2.5)}
    assert calls == [4, 4, 8]
    assert torch.equal(at[1.0], net(x, t, labels)) and torch.equal(at[0.0], net(x, t))
    assert torch.equal(net(x, t), net(x, t, torch.full((4,), NO_LABEL)))
    assert torch.equal(at[1.0], Denoiser(net, SCHEDULE, "x0", labels=labels)(x, 300.0))
    assert torch.allclose(at[2.5], at[0.0] + 2.5 * (at[1.0] - at[0.0]), atol=1e-5)
    assert float((at[1.0] - at[0.0]).abs().amax((1, 2, 3)).min()) > 1e-3  # each label changes the output


def test_the_row_for_no_label_is_no_class() -> None:
    net = UNet(1, 8, 8, [1], 1, [], classes=3)
    x, t = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    net(x, t, torch.tensor([-1, 2]))
    with pytest.raises(IndexError):
        net(x, t, torch.tensor([0, 3]))


def test_evaluations_are_those_of_each_image() -> None:
    net = exact_net("v")
    seen = 0

    def counted(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(x)
        return net(x, t, labels)

    for sampler, guidance in itertools.product(SAMPLERS, (0.0, 1.0, 2.0)):
        seen = 0
        denoiser = Denoiser(counted, SCHEDULE, "v", labels=torch.zeros(3, dtype=torch.int64), guidance=guidance)
        states = list(trajectory(denoiser, torch.zeros(3, 1, dtype=torch.float64), sampler, 9, "trailing"))
        assert len(states) == 9 and states[-1].evaluations == seen / 3
        assert seen / 3 == (17 if sampler == "heun" else 9) * (2 if guidance == 2 else 1)


def test_other_weights_start_the_same_with_and_without_classes() -> None:
    def fresh(classes: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return UNet(1, 8, 16, (1, 2), 1, (4,), classes=classes).state_dict()

    without, with_classes = fresh(0), fresh(10)
    assert set(with_classes) - set(without) == {"label.weight"} and with_classes["label.weight"].shape == (11, 64)
    assert all(torch.equal(with_classes[name], tensor) for name, tensor in without.items())


class Recorder(nn.Module):
    """Records the inputs that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.detach(), t, *labels))
        return x * self.weight


def shown(steps: int, batch: int, **options: object) -> list[tuple[torch.Tensor, ...]]:
    """Returns the inputs that training gives a network, for images of a uniform grey: image i has the grey level i, 0 ... 49."""
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 4, 4).contiguous()
    tables = {"a": 1.0, "s": 0.0, "from_x0": 0.0, "from_eps": 1.0}  # x_t = x_0
    objective = Objective.of(NoiseSchedule.named("linear", 1), "eps")
    clean = replace(objective, **{name: torch.tensor([value]) for name, value in tables.items()})
    state = TrainingState(Recorder())
    training = fit(state, images, clean, batch=batch, learning_rate=0.0, seed=0, flip=True, **options)
    list(itertools.islice(training, steps))
    return state.net.seen


def test_each_image_keeps_its_label_or_loses_it_as_often_as_asked() -> None:
    """With another seed, the test would fail by chance in about 1 of 750,000 runs (5 standard errors, twice)."""
    labels = torch.arange(50) % 7
    for dropout in (0.0, 0.1, 0.5):
        seen = shown(4, 1000, labels=labels, label_dropout=dropout)
        told = torch.cat([given for _, _, given in seen])
        number = torch.cat([((x[:, 0, 0, 0] + 1) * 127.5).round().long() for x, _, _ in seen])
        kept = told != NO_LABEL
        assert torch.equal(told[kept], labels[number[kept]])
        # 4,000 draws: allows five standard deviations of the share of dropped labels.
        assert float((~kept).double().mean()) == pytest.approx(dropout, abs=5 * (dropout * (1 - dropout) / 4000) ** 0.5)


def test_labels_change_nothing_else_of_what_training_draws() -> None:
    without, with_labels = shown(5, 20), shown(5, 20, labels=torch.zeros(50, dtype=torch.int64))
    for (x, t), (x_too, t_too, _) in zip(without, with_labels, strict=True):
        assert torch.equal(x, x_too) and torch.equal(t, t_too)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "needs labels"),
        ({"guidance": float("nan"), "labels": torch.zeros(2, dtype=torch.int64)}, "finite"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "3 labels for 2 images"),
    ],
)
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoiser(conditional(), SCHEDULE, **options)(torch.zeros(2, 1, 8, 8), 5.0)
    with pytest.raises(ValueError, match="unconditional"):
        UNet(1, 8, 8, (1,), 1, ())(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(IndexError):
        conditional(3)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.tensor([4]))


def sigma_at(t: float) -> float:
    return float(torch.expm1(-SCHEDULE.log_alpha_bar_at(t)).sqrt())


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_guidance_acts_inside_its_interval_and_the_plain_network_outside(target: str) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    interval = (sigma_at(300), sigma_at(600))  # from just above sigma(300) to sigma(600)
    limited = replace(exact(target, 1, 3.0, 9), guidance_interval=interval)
    for t, w, evaluations in ((100.0, 1.0, 1), (300.0, 1.0, 1), (301.0, 3.0, 2), (600.0, 3.0, 2), (601.5, 1.0, 1)):
        assert torch.equal(limited(x, t), exact(target, 1, w, 9)(x, t)), t
        assert limited.evaluations(t) == evaluations, t
    times = torch.linspace(100, 900, 9)  # each image has its own noise level
    apart = torch.cat([limited(x, t.item())[i : i + 1] for i, t in enumerate(times)])
    assert torch.allclose(limited(x, times), apart, atol=1e-12) and limited.evaluations(times) == 2


def test_steps_outside_the_interval_take_one_evaluation() -> None:
    seen = 0

    def counted(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += len(x)
        return exact_net("v")(x, t, labels)

    labels = torch.zeros(3, dtype=torch.int64)
    limited = Denoiser(
        counted, SCHEDULE, "v", labels=labels, guidance=2.0, guidance_interval=(sigma_at(250), sigma_at(650))
    )
    for sampler in ("ddim", "unipc", "heun"):
        seen = 0
        (*_, last) = trajectory(limited, torch.zeros(3, 1, dtype=torch.float64), sampler, 10, "leading")
        # The times are 900, 800 ... 0. Heun evaluates each time but the first twice. 600, 500, 400 and 300 lie inside the
        # interval.
        assert last.evaluations == seen / 3 == ((18 + 1) + 2 * 4 if sampler == "heun" else 10 + 4)


def test_the_rescaled_prediction_has_the_labelled_ones_deviation() -> None:
    """The network's prediction is rescaled by eq. 15 and 16 of Lin et al. 2024."""
    net = conditional()
    x, labels, t = gaussian(0, range(4), 0, (1, 8, 8)), torch.tensor([0, 2, 1, 2]), torch.full((4,), 300.0)
    labelled, free = net(x, t, labels), net(x, t)
    guided = free + 3 * (labelled - free)

    def deviation(images: torch.Tensor) -> torch.Tensor:
        return ((images - images.mean((1, 2, 3), keepdim=True)) ** 2).mean((1, 2, 3), keepdim=True).sqrt()

    for share in (0.0, 0.3, 1.0):
        denoiser = Denoiser(net, SCHEDULE, "x0", labels=labels, guidance=3.0, guidance_rescale=share)
        expected = share * guided * deviation(labelled) / deviation(guided) + (1 - share) * guided
        assert torch.allclose(denoiser(x, 300.0), expected, atol=1e-5)
    assert torch.allclose(deviation(denoiser(x, 300.0)), deviation(labelled), rtol=1e-4)
    assert float((deviation(guided) / deviation(labelled) - 1).abs().max()) > 0.01


@pytest.mark.parametrize(
    "wrong",
    [{"guidance_interval": (2.0, 1.0)}, {"guidance_interval": (-1.0, 1.0)}, {"guidance_rescale": 1.5}],
)
def test_an_interval_or_share_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="guidance_"):
        Denoiser(exact_net("v"), SCHEDULE, "v", labels=torch.zeros(1, dtype=torch.int64), guidance=2.0, **wrong)
