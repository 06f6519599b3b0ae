"""Checks FID, KID and the other metrics against closed forms, direct sums and other packages."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.scores import inception
from ddpm.scores.features import extract
from ddpm.scores.fidelity import (
    MANY,
    Sets,
    Statistics,
    cmmd,
    density_coverage,
    fid,
    inception_score,
    jackknife,
    kid,
    kid_influence,
    nearest_distances,
    precision_recall,
    statistics,
)
from ddpm.scores.intervals import standard_error


def with_moments(mean: Any, covariance: Any, count: int, seed: int = 0) -> np.ndarray:
    """Returns features with exactly this sample mean and covariance."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(np.asarray(covariance)).T + mean


def blob(count: int, dimensions: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, dimensions)) + shift).astype(np.float32)


def test_statistics_are_the_prescribed_ones() -> None:
    mean, covariance = np.array([1.0, -2.0]), np.array([[2.0, 0.5], [0.5, 1.0]])
    x = with_moments(mean, covariance, 40)
    before = x.copy()
    found = statistics(x)
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)
    np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match="two images"):
        statistics(x[:1])


def test_fid_of_gaussians_with_diagonal_covariances() -> None:
    """FID is sum (m1 - m2)^2 + sum (sqrt v1 - sqrt v2)^2."""
    a = statistics(with_moments([0, 0, 0], np.diag([1.0, 4.0, 9.0]), 50))
    b = statistics(with_moments([1, -1, 2], np.diag([4.0, 4.0, 1.0]), 70, seed=1))
    assert fid(a, b) == pytest.approx(6 + 1 + 0 + 4, rel=1e-10)


def test_fid_of_gaussians_whose_covariances_do_not_commute() -> None:
    """In two dimensions, tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    cross = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    found = fid(statistics(with_moments([0, 0], a, 30)), statistics(with_moments([3, 4], b, 30)))
    assert found == pytest.approx(25 + np.trace(a + b) - 2 * cross, rel=1e-10)


def test_fid_is_nothing_to_itself_symmetric_and_blind_to_rotation() -> None:
    x, y = blob(200, 8, 0), blob(150, 8, 1, shift=0.3)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))[0]
    distance = fid(statistics(x), statistics(y))
    assert 0 <= fid(statistics(x), statistics(x)) < 1e-6
    assert fid(statistics(y), statistics(x)) == pytest.approx(distance, rel=1e-9)
    turned = fid(statistics(x.astype(float) @ rotation), statistics(y.astype(float) @ rotation))
    assert turned == pytest.approx(distance, rel=1e-9)


def test_fid_with_fewer_images_than_features() -> None:
    """Compares with scipy's matrix root, and with the exact value of FID.

    tr (C1 C2)^(1/2) is the nuclear norm of X1 X2^T, centred and scaled.
    """
    from scipy.linalg import sqrtm

    x, y = blob(20, 64, 0).astype(float), blob(15, 64, 1, shift=0.5).astype(float)
    a, b = statistics(x), statistics(y)
    gap = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a.covariance) + np.trace(b.covariance)
    centred = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(19 * 14)
    exact = gap - 2 * np.linalg.svd(centred, compute_uv=False).sum()
    assert fid(a, b) == pytest.approx(exact, rel=1e-7)
    root = gap - 2 * np.trace(sqrtm(a.covariance @ b.covariance)).real
    assert fid(a, b) == pytest.approx(root, rel=1e-4)
    assert fid(a, a) < 1e-5


@pytest.mark.parametrize(
    ("count", "dimensions", "others"), [(40, 6, 50), (7, 6, 50), (6, 6, 9), (20, 48, 30), (20, 4, 4)]
)
def test_the_jackknife_is_leaving_out_one_after_the_other(count: int, dimensions: int, others: int) -> None:
    """Includes singular covariances, where either set has fewer images than features."""
    scales = np.linspace(0.2, 2, dimensions)
    x = (blob(count, dimensions, 0, shift=0.3) * scales).astype(np.float32)
    reference = statistics(blob(others, dimensions, 1))
    found = jackknife(x, reference)
    without = np.array([fid(statistics(np.delete(x, i, axis=0)), reference) for i in range(count)])
    assert found.fid == pytest.approx(fid(statistics(x), reference), rel=1e-6)
    expected = (count - 1) * (without.mean() - without)
    np.testing.assert_allclose(found.influence, expected, atol=1e-5 * np.abs(expected).max())
    assert found.bias == pytest.approx((count - 1) * (without.mean() - found.fid), rel=1e-4)


HARD = [
    *("plain", "compared with itself", "large means", "nearly singular", "singular", "alike"),
    *("heavy tails", "an outlier", "images alone in a feature", "tiny", "huge"),
]


def hard(kind: str, count: int, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns two sets of features that are difficult for float32."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(count, dimensions)), random.normal(size=(count, dimensions))
    fall, low = np.logspace(0, -6, dimensions), random.normal(size=(dimensions // 2, dimensions))
    x, y = {
        "plain": lambda: (1.1 * x + 0.1, y),
        "compared with itself": lambda: (x, x),
        "large means": lambda: (x + 1000, y + 1000.1),
        "nearly singular": lambda: (x * fall, 1.1 * y * fall),
        "singular": lambda: (x[:, : dimensions // 2] @ low, y),
        "alike": lambda: (x[random.integers(0, dimensions, count)], y),  # few distinct images
        "heavy tails": lambda: (x * random.standard_t(3, size=(count, 1)), y),
        "an outlier": lambda: (x * np.where(np.arange(count) == 7, 1000, 1)[:, None], y),
        "images alone in a feature": lambda: (np.eye(count, dimensions), y),
        "tiny": lambda: (x * 1e-12, y * 1.2e-12),
        "huge": lambda: (x * 1e9, y * 1.2e9),
    }[kind]()
    return x.astype(np.float32), y.astype(np.float32)


@pytest.mark.parametrize("kind", HARD)
def test_float32_changes_no_influence_by_a_ten_thousandth(kind: str) -> None:
    """With this many images, `jackknife` rotates them in float32. The expected influence and FID are computed in float64."""
    count, dimensions = 16 * MANY, 16
    x, y = hard(kind, count, dimensions)
    reference = statistics(y)
    found = jackknife(x, reference)
    without = np.array([fid(statistics(np.delete(x, i, axis=0)), reference) for i in range(count)])
    expected = (count - 1) * (without.mean() - without)
    np.testing.assert_allclose(found.influence, expected, atol=1e-4 * np.abs(expected).max())
    assert standard_error(found.influence) == pytest.approx(standard_error(expected), rel=1e-4)
    assert found.fid == pytest.approx(
        fid(statistics(x), reference), rel=1e-6, abs=1e-7 * np.trace(reference.covariance)
    )


def test_the_jackknife_finds_the_bias_of_fid() -> None:
    """In one dimension E FID_N is known: (m^2 + v/N) + v + 1 - 2 c4(N) sqrt(v), with E s = c4(N) sigma.

    With another seed, the test would fail by chance in about 1 of 250 runs (3 standard errors; the two means move together).
    """
    from scipy.special import gammaln

    count, mean, deviation = 25, 0.4, 1.3
    c4 = np.sqrt(2 / (count - 1)) * np.exp(gammaln(count / 2) - gammaln((count - 1) / 2))
    truth = mean**2 + (deviation - 1) ** 2
    expected = mean**2 + deviation**2 * (1 + 1 / count) + 1 - 2 * c4 * deviation
    reference, generator = Statistics(np.zeros(1), np.ones((1, 1))), np.random.default_rng(0)
    found = [jackknife(generator.normal(mean, deviation, size=(count, 1)), reference) for _ in range(500)]
    plain, corrected = (np.array([one.fid - part * one.bias for one in found]) for part in (0, 1))
    assert plain.mean() == pytest.approx(expected, abs=3 * plain.std() / np.sqrt(500))
    assert corrected.mean() == pytest.approx(truth, abs=3 * corrected.std() / np.sqrt(500))
    bias = np.array([one.bias for one in found])  # the bias varies much less than FID itself
    assert bias.mean() == pytest.approx(expected - truth, rel=0.05)


def test_images_that_are_all_alike_have_no_influence() -> None:
    found = jackknife(np.ones((5, 3), np.float32), statistics(blob(20, 3, 0)))
    np.testing.assert_allclose(found.influence, 0, atol=1e-12)
    with pytest.raises(ValueError, match="three images"):
        jackknife(blob(2, 3, 0), statistics(blob(20, 3, 0)))


@pytest.mark.parametrize(("count", "others"), [(60, 40), (60, 9), (15, 40)])
def test_products_in_parts_are_the_whole_products(count: int, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Includes a singular reference, and fewer images than features."""
    x, y = blob(count, 20, 0, shift=0.3), blob(others, 20, 1)
    whole = statistics(x), fid(statistics(x), statistics(y)), jackknife(x, statistics(y))
    monkeypatch.setattr("ddpm.scores.fidelity._PART", 7)
    monkeypatch.setattr("ddpm.scores.fidelity._STRIP", 6)
    parts = statistics(x), fid(statistics(x), statistics(y)), jackknife(x, statistics(y))
    np.testing.assert_allclose(parts[0].covariance, whole[0].covariance, atol=1e-14)
    assert parts[1] == pytest.approx(whole[1], rel=1e-7)
    np.testing.assert_allclose(parts[2].influence, whole[2].influence, atol=1e-5)
    root = statistics(y).root
    np.testing.assert_allclose(root @ root.T, statistics(y).covariance, atol=1e-14)
    np.testing.assert_array_equal(root, np.tril(root))


def test_precision_and_recall_by_hand() -> None:
    """With one neighbour, the radii of the real images are 1, 1 and 9, and those of the fake images are 0.4, 0.4 and 99.1."""
    real = np.array([[0.0], [1.0], [10.0]], np.float32)
    fake = np.array([[0.5], [0.9], [100.0]], np.float32)
    assert precision_recall(fake, real, neighbours=1) == (2 / 3, 2 / 3)
    assert precision_recall(fake[:2], real, neighbours=1) == (1.0, 1 / 3)
    with pytest.raises(ValueError, match="3 neighbours take 4 images, found 3"):
        precision_recall(fake, real)


def test_distances_to_the_nearest_and_to_the_nearest_other() -> None:
    real, fake = blob(30, 6, 0), np.concatenate([blob(9, 6, 1), blob(30, 6, 0)[4:5]])
    far = np.linalg.norm(fake[:, None].astype(float) - real, axis=2)
    others = np.linalg.norm(real[:, None].astype(float) - real, axis=2) + np.diag(np.full(30, np.inf))
    samples, unseen = nearest_distances(fake, real)
    np.testing.assert_allclose(samples, far.min(1), rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(unseen, others.min(1), rtol=1e-5)
    assert samples[-1] < 1e-2 < samples[:-1].min()
    with pytest.raises(ValueError, match="two images"):
        nearest_distances(fake, real[:1])


def test_precision_falls_with_bad_images_and_recall_with_missing_ones() -> None:
    """With other seeds, recall would fail by chance in about 1 of 100 runs. The other bounds are 4 deviations away."""
    real = np.concatenate([blob(150, 4, 0), blob(150, 4, 1, shift=20.0)])
    half, noisy = (
        blob(300, 4, 2),
        np.concatenate([blob(300, 4, 3), blob(300, 4, 4, shift=20.0), blob(300, 4, 5, shift=-90.0)]),
    )
    precision, recall = precision_recall(half, real)
    assert precision > 0.8 and 0.4 < recall < 0.5
    precision, recall = precision_recall(noisy, real)
    assert 0.5 < precision < 2 / 3 and recall > 0.9
    assert precision_recall(real, real) == (1.0, 1.0)


def test_the_inception_score_of_certain_and_balanced_images_is_the_number_of_classes() -> None:
    logits = np.tile(100 * np.eye(5), (40, 1)).astype(np.float32)
    assert inception_score(logits, splits=1)[0] == pytest.approx(5)
    assert inception_score(np.zeros((20, 5), np.float32)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="10 parts"):
        inception_score(logits[:9])


def test_kid_is_the_direct_sum() -> None:
    x, y = blob(12, 5, 0).astype(float), blob(12, 5, 1, shift=0.4).astype(float)

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float((p @ q / 5 + 1) ** 3)

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i, j in itertools.permutations(range(12), 2)) / (12 * 11)
    across = sum(kernel(p, q) for p in x for q in y) / 144
    mean, deviation = kid(x, y, subsets=3, subset_size=12)
    assert mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert deviation < 1e-12  # each subset is the whole set


@pytest.mark.parametrize(("fake", "real", "size"), [(4, 4, 2), (3, 9, 2), (9, 12, 4), (40, 13, 6)])
def test_subsets_of_kid_are_at_most_half_of_a_set(fake: int, real: int, size: int) -> None:
    x, y = blob(fake, 3, 0), blob(real, 3, 1)
    assert Sets(x, y, statistics(y)).kid == kid(x, y, subset_size=size)


def test_kid_is_unbiased() -> None:
    """Over independent pairs of sets from one distribution, KID averages to 0. The biased estimate is far from 0 there.

    With other seeds, the test would fail by chance in about 1 of 300 runs (3 standard errors).
    """
    found = [kid(blob(20, 3, 2 * i), blob(20, 3, 2 * i + 1), subsets=1, subset_size=20)[0] for i in range(400)]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert min(found) < 0 < max(found)
    assert kid(blob(100, 3, 0), blob(100, 3, 1, shift=1.0), subsets=5, subset_size=50)[0] > 10 * error


@pytest.mark.parametrize("count", [3, 20])
def test_the_influence_on_kid_is_leaving_out_one_after_the_other(count: int) -> None:
    """Compares with the sum over all pairs. The two sets have different numbers of images."""
    x, y = blob(count, 5, 0, shift=0.3), blob(30, 5, 1)

    def whole(p: np.ndarray) -> float:
        within, across = ((p @ q.T / 5.0 + 1) ** 3 for q in (p.astype(float), y.astype(float)))
        return float((within.sum() - within.trace()) / (len(p) * (len(p) - 1)) - 2 * across.mean())

    without = np.array([whole(np.delete(x, i, axis=0).astype(float)) for i in range(count)])
    np.testing.assert_allclose(kid_influence(x, y), (count - 1) * (without.mean() - without), atol=1e-10)
    with pytest.raises(ValueError, match="three images"):
        kid_influence(x[:2], y)


def test_cmmd_is_the_direct_sum_and_its_influence_is_leaving_out_one_after_the_other() -> None:
    x, y = (part / np.linalg.norm(part, axis=1)[:, None] for part in (blob(20, 5, 0, shift=0.3), blob(30, 5, 1)))

    def kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.exp(-((p.astype(float) - q) ** 2).sum() / 200))

    def whole(fake: np.ndarray) -> float:
        within = (
            sum(kernel(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)) / (len(s) * (len(s) - 1))
            for s in (fake, y)
        )
        return 1000 * (sum(within) - 2 * sum(kernel(p, q) for p in fake for q in y) / (len(fake) * len(y)))

    value, influence = cmmd(x, y)
    assert value == pytest.approx(whole(x), rel=1e-9)
    without = np.array([whole(np.delete(x, i, axis=0)) for i in range(20)])
    np.testing.assert_allclose(influence, 19 * (without.mean() - without), atol=1e-8)
    with pytest.raises(ValueError, match="three images"):
        cmmd(x[:2], y)
    with pytest.raises(ValueError, match="two reference"):
        cmmd(x, y[:1])


def test_the_authors_cmmd_is_larger_by_what_its_docstring_says() -> None:
    x, y = (part / np.linalg.norm(part, axis=1)[:, None] for part in (blob(20, 5, 0, shift=0.3), blob(30, 5, 1)))
    sets = {"x": x.astype(float), "y": y.astype(float)}
    k = {a + b: np.exp(-((sets[a][:, None] - sets[b]) ** 2).sum(2) / 200) for a in "xy" for b in "xy"}
    biased = 1000 * (k["xx"].mean() + k["yy"].mean() - 2 * k["xy"].mean())
    apart = [(k[s].sum() - len(k[s])) / (len(k[s]) * (len(k[s]) - 1)) for s in ("xx", "yy")]
    assert biased - cmmd(x, y)[0] == pytest.approx(
        1000 * sum((1 - a) / n for a, n in zip(apart, (20, 30), strict=True))
    )


def test_sums_in_parts_are_the_whole_sums(monkeypatch: Any) -> None:
    x, y = blob(20, 5, 0), blob(30, 5, 1)
    value, influence = cmmd(x, y)
    monkeypatch.setattr("ddpm.scores.fidelity._ROWS", 7)
    again, values = cmmd(x, y)
    assert again == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(values, influence, rtol=1e-9, atol=1e-12)
    assert density_coverage(x, y) == density_coverage(x, y, device=torch.device("cpu"))


def test_density_and_coverage_by_hand() -> None:
    """With one neighbour, the radii of the real images 0, 1 and 10 are 1, 1 and 9.

    The fake image 0.5 lies within two radii, 2 within one, and 100 within none.
    """
    real, fake = np.array([[0.0], [1.0], [10.0]], np.float32), np.array([[0.5], [2.0], [100.0]], np.float32)
    assert density_coverage(fake, real, neighbours=1) == pytest.approx((3 / 3, 3 / 3))
    assert density_coverage(fake[2:], real, neighbours=1) == (0.0, 0.0)
    assert density_coverage(fake[:1], real, neighbours=1) == pytest.approx((2.0, 2 / 3))
    with pytest.raises(ValueError, match="5 neighbours take 6 images, found 3"):
        density_coverage(fake, real)


def test_density_and_coverage_are_those_of_a_plain_search() -> None:
    real, fake = blob(60, 4, 0), blob(45, 4, 1, shift=0.4)
    far = np.linalg.norm(real[:, None].astype(float) - fake, axis=2)
    reach = np.sort(np.linalg.norm(real[:, None].astype(float) - real, axis=2), axis=1)[:, 5]
    inside = far < reach[:, None]
    assert density_coverage(fake, real) == pytest.approx((inside.sum(0).mean() / 5, inside.any(1).mean()))
    assert 0.3 < density_coverage(fake, real)[1] < 1


@pytest.mark.parametrize("size", [1, 13])
def test_kid_subsets_must_fit(size: int) -> None:
    with pytest.raises(ValueError, match="KID subsets"):
        kid(blob(12, 3, 0), blob(20, 3, 1), subset_size=size)


def test_scores_are_torch_fidelitys_on_the_same_features() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = blob(300, 32, 0), blob(250, 32, 1, shift=0.2)
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    assert fid(statistics(x), statistics(y)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    theirs = kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=100, rng_seed=7, verbose=False)
    mean, deviation = kid(x, y, subsets=20, subset_size=100, seed=7)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)


def test_precision_recall_and_inception_score_are_torch_fidelitys_on_the_same_features() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = blob(300, 8, 0), blob(250, 8, 1, shift=0.8)
    theirs = prc_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        prc_neighborhood=3,
        prc_batch_size=100,
        save_cpu_ram=False,
        verbose=False,
    )
    assert 0.1 < theirs["recall"] < theirs["precision"] + 0.5 < 1.5
    assert precision_recall(x, y) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    theirs = isc_features_to_metric(torch.from_numpy(3 * x))
    assert inception_score(3 * x) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9
    )


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_scores_are_torch_fidelitys_from_images_to_numbers(inception_cache: Path, inception_weights: Path) -> None:
    from sklearn.datasets import load_digits
    from torch_fidelity import calculate_metrics

    digits = (load_digits().images[:90, None] * (255 / 16)).round().astype(np.uint8)
    real, fake = digits[:50], 255 - digits[50:]
    theirs = calculate_metrics(
        input1=Pictures(fake),
        input2=Pictures(real),
        cuda=False,
        fid=True,
        kid=True,
        kid_subsets=10,
        kid_subset_size=30,
        rng_seed=3,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_extractor_weights_path=str(inception_weights),
        save_cpu_ram=True,
        verbose=False,
    )
    extractor = inception.load(64, inception_cache)
    x, y = (extract(extractor, images) for images in (fake, real))
    assert fid(statistics(x), statistics(y)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    mean, deviation = kid(x, y, subsets=10, subset_size=30, seed=3)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
