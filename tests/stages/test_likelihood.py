"""Checks the files that `likelihood` and `schedules` read and write."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.diffusion.bound import mean_and_error, variational_bound
from ddpm.errors import InputError
from ddpm.files import checkpoint, models, records
from ddpm.files.dataset import read_dataset, spread
from ddpm.files.params import Params
from ddpm.stages.likelihood import likelihood
from ddpm.tools.schedules import data_mean_square, schedules

Smoke = Callable[..., Params]


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Path:
    for name in ("dataset", "models"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def settings(smoke: Smoke, **changes: object) -> Params:
    return smoke(training={"steps": 24}, likelihood={"images": 12, "times": 6, **changes})


def test_the_files_hold_the_bound(trained: Path, smoke: Smoke) -> None:
    scores = likelihood(settings(smoke), "cosine", trained)
    assert scores == records.read_record(trained / "metrics/likelihood/cosine.json")
    denoiser, about = checkpoint.load(trained / "models/cosine", clip=True)
    test = torch.from_numpy(spread(read_dataset(trained).test, 12))
    bound = variational_bound(denoiser, test, times=6)
    mean, error = mean_and_error(bound.total)
    parts = scores["test"]
    assert parts["bits_per_dim"] == pytest.approx(mean, rel=1e-5)
    assert parts["bits_per_dim_error"] == pytest.approx(error, rel=1e-3)
    assert parts["prior"] + parts["kl"] + parts["decoder"] == pytest.approx(mean, rel=1e-5)
    assert parts["images"] == scores["train"]["images"] == 12 and scores["model"] == about.weights_sha256
    rows = [
        {key: float(value) for key, value in row.items()}
        for row in records.read_csv(trained / "metrics/likelihood/cosine.csv")
    ]
    assert sum(row["times"] for row in rows) == 100 and [row["time"] for row in rows][-1] == 0
    assert sum(row["term"] for row in rows) + parts["prior"] == pytest.approx(mean, rel=1e-4)
    assert all(later["rate"] > earlier["rate"] for earlier, later in pairwise(rows))


def test_the_batch_changes_nothing_and_a_second_run_no_byte(trained: Path, smoke: Smoke) -> None:
    files = [trained / f"metrics/likelihood/cosine.{suffix}" for suffix in ("json", "csv")]
    first = likelihood(settings(smoke), "cosine", trained)
    before = [path.read_bytes() for path in files]
    likelihood(settings(smoke), "cosine", trained)
    assert [path.read_bytes() for path in files] == before
    other = likelihood(settings(smoke, batch=5), "cosine", trained)
    for split in ("train", "test"):
        assert other[split] == pytest.approx(first[split], rel=2e-5)


def test_the_variance_that_counts_is_the_one_named(trained: Path, smoke: Smoke, tmp_path: Path) -> None:
    _, about = checkpoint.load(trained / "models/cosine")
    assert likelihood(settings(smoke, images=2, times=2), "cosine", trained)["variance"] == "fixed_large"
    larger = {**about.network.settings, "out_channels": 2 * about.network.image_channels}
    network = models.NetworkEntry.of("unet", larger)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/dataset").symlink_to(trained / "dataset")
    description = about.described_by(network=network.content, variance="learned")
    checkpoint.save(tmp_path / "root/models/cosine", checkpoint.network(network), description)
    assert likelihood(settings(smoke, images=2, times=2), "cosine", tmp_path / "root")["variance"] == "learned"


def test_the_images_are_spread_over_the_split() -> None:
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    assert spread(images, 4).ravel().tolist() == [0, 25, 50, 75]
    np.testing.assert_array_equal(spread(images, 200), images)
    assert len(spread(images[:0], 5)) == 0


def test_wrong_input_is_one_line_and_leaves_nothing(trained: Path, smoke: Smoke) -> None:
    with pytest.raises(InputError, match="models/linear"):
        likelihood(settings(smoke), "linear", trained)
    with pytest.raises(InputError, match=r"likelihood.times: 101 is more than diffusion.timesteps = 100"):
        settings(smoke, times=101)
    assert not (trained / "metrics").exists()


# The verb `schedules`.


def test_schedules_writes_a_table_and_pictures(root: Path, smoke: Smoke) -> None:
    params = smoke(diffusion={"timesteps": 1000})
    rows, about = schedules(params, root)
    assert "digits" in about and list(rows) == list(params.schedules)
    table = {row["schedule"]: row for row in records.read_csv(root / "schedules/table.csv")}
    assert float(table["linear"]["alpha_bar_T"]) == pytest.approx(4.035829765e-5)
    assert [name for name, row in table.items() if row["warnings"]] == ["sqrt"]
    written = {path.name: path.read_bytes() for path in (root / "schedules").iterdir()}
    assert sorted(written) == ["snr.png", "strip.png", "table.csv"]
    assert all(len(content) < 150_000 for content in written.values())
    schedules(params, root, Path("elsewhere"))
    assert {path.name: path.read_bytes() for path in (root / "elsewhere").iterdir()} == written


def test_schedules_without_a_dataset(tmp_path: Path, smoke: Smoke) -> None:
    """Without a dataset, strip.png is removed, and the KL assumes E[x_0^2] = 1/4. T comes from the command line."""
    (tmp_path / "schedules").mkdir()
    (tmp_path / "schedules" / "strip.png").write_bytes(b"of a dataset that is gone")
    rows, about = schedules(smoke(), tmp_path, timesteps=1000)
    assert rows["linear"].prior == pytest.approx(7.278676963885e-6) and "0.25" in about
    assert not (tmp_path / "schedules" / "strip.png").exists()
    with pytest.raises(InputError, match=r"schedules\.bad: no schedule 'exponential'"):
        schedules(smoke(schedules={"bad": {"schedule": "exponential"}}), tmp_path)


def test_mean_square_of_the_digits(digits: Path) -> None:
    dataset = read_dataset(digits)
    assert data_mean_square(dataset.record) == pytest.approx(float(np.mean((dataset.train / 127.5 - 1) ** 2)), rel=1e-5)
