"""Checks the sample stage: the same images with any batch size, deterministic bytes, and how it fails."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm import Denoiser, NoiseSchedule, sample
from ddpm.diffusion.noise import gaussian
from ddpm.errors import InputError
from ddpm.files import checkpoint, models, paths, samples
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.runtime import drawing
from ddpm.runtime.drawing import to_uint8
from ddpm.runtime.progress import Progress
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

POINT = Point.parse("cosine-ddpm-5")


@pytest.fixture(scope="module")
def trained(digits: Path, smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    (root / "dataset").symlink_to(digits / "dataset")
    train(smoke(training={"steps": 10}), "cosine", root)
    return root


def draw(root: Path, params: Params, point: Point = POINT) -> np.ndarray:
    sample_point(params, point, root)
    return samples.read_samples(root / paths.samples_file(point)).images


def test_bytes_are_the_same_again_and_what_is_written_is_whole(trained: Path, smoke: Callable[..., Params]) -> None:
    params, path = smoke(sampling={"images": 10}), trained / paths.samples_file(POINT)
    reports: list[Progress] = []
    assert sample_point(params, POINT, trained, reports.append) == 5
    first = path.read_bytes(), path.with_suffix(".png").read_bytes()
    found = samples.read_samples(path)
    images, evaluations = found.images, found.evaluations
    assert images.shape == (10, 1, 8, 8) and evaluations == 5
    assert reports[-1].done == reports[-1].total == 10
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    sample_point(params, POINT, trained)
    assert (path.read_bytes(), path.with_suffix(".png").read_bytes()) == first
    assert sorted(item.name for item in path.parent.iterdir()) == sorted([path.name, path.with_suffix(".png").name])


def test_a_sample_file_has_no_header_that_pythons_patch_versions_write_differently(tmp_path: Path) -> None:
    path, images = tmp_path / "samples.npz", np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    samples.write_samples(path, images, 7, "m", labels=np.array([4, 2]))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            version, extra = (struct.unpack_from("<H", content, member.header_offset + at)[0] for at in (4, 28))
            assert (version, extra) == (20, 0)  # APPNOTE 4.3.7: deflate, and no field for 64-bit sizes
    with np.load(path, allow_pickle=False) as arrays:
        assert (arrays["images"] == images).all() and arrays["evaluations"] == 7 and arrays["labels"].tolist() == [4, 2]


def test_batch_size_moves_no_image_by_more_than_one_grey_level(trained: Path, smoke: Callable[..., Params]) -> None:
    whole = draw(trained, smoke(sampling={"images": 23, "batch": 23})).astype(int)
    for batch in (1, 7):
        split = draw(trained, smoke(sampling={"images": 23, "batch": batch})).astype(int)
        assert np.abs(whole - split).max() <= 1
    more = draw(trained, smoke(sampling={"images": 30, "batch": 23})).astype(int)
    assert np.abs(whole - more[:23]).max() <= 1


def test_points_share_their_noise_and_seeds_differ(trained: Path, smoke: Callable[..., Params]) -> None:
    params = smoke(sampling={"images": 8})
    assert not np.array_equal(draw(trained, params), draw(trained, smoke(seed=1, sampling={"images": 8})))
    # DDIM with eta = 1 uses the same x_T and the same draws as DDPM with fixed_small, so the images are equal.
    rows = {"ddim": {"eta": 1.0}, "ddpm": {"variance": "fixed_small"}}
    shared = smoke(sampling={"images": 8, "clip": False}, samplers=rows)
    ours, theirs = (draw(trained, shared, Point.parse(name)).astype(int) for name in ("cosine-ddim-5", "cosine-ddpm-5"))
    assert np.abs(ours - theirs).max() <= 1


def test_it_is_the_public_sample_function(trained: Path, smoke: Callable[..., Params]) -> None:
    images = draw(trained, smoke(sampling={"images": 6, "batch": 6}), Point.parse("cosine-ddim-5"))
    denoiser, _ = checkpoint.load(trained / "models/cosine", clip=True)
    x_0 = sample(denoiser, gaussian(0, range(6), 0, (1, 8, 8)), sampler="ddim", steps=5)
    assert np.abs(to_uint8(x_0).numpy().astype(int) - images.astype(int)).max() <= 1


def test_to_uint8() -> None:
    x = torch.tensor([-7.0, -1, 0, 1 / 127.5 - 1 + 1e-4, 1, 3])
    assert to_uint8(x).tolist() == [0, 0, 128, 1, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)


def test_generate_fills_what_it_is_given() -> None:
    denoiser = Denoiser(lambda x, t: torch.zeros_like(x), NoiseSchedule.named("linear", 10), "x0")
    into = np.full((5, 1, 2, 2), 9, np.uint8)
    images, evaluations = drawing.draw(
        denoiser,
        (1, 2, 2),
        range(5),
        seed=0,
        batch=2,
        steps=3,
        settings={"sampler": "ddim"},
        device=torch.device("cpu"),
        into=into,
    )
    assert images is into and (into == 128).all() and evaluations == 3


def test_the_preview_shows_the_first_images(trained: Path, smoke: Callable[..., Params]) -> None:
    images = draw(trained, smoke(sampling={"images": 9}))
    picture = np.asarray(Image.open((trained / paths.samples_file(POINT)).with_suffix(".png")))
    scale = (picture.shape[0] - 1) // 3 // 8
    cell = picture[1 : 1 + 8 * scale, 1 : 1 + 8 * scale][::scale, ::scale]
    assert np.array_equal(cell, images[0, 0])


def test_refused(trained: Path, smoke: Callable[..., Params], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row 'heun'"):
        sample_point(smoke(), Point.parse("cosine-heun-5"), trained)
    with pytest.raises(InputError, match="takes no eta"):
        sample_point(smoke(samplers={"odd": {"sampler": "ddpm", "eta": 1.0}}), Point.parse("cosine-odd-5"), trained)
    with pytest.raises(InputError, match="cosine-learned-5: variance learned: this network has learned no variance"):
        rows = {"learned": {"sampler": "ddpm", "variance": "learned"}}
        sample_point(smoke(samplers=rows), Point.parse("cosine-learned-5"), trained)
    assert not (trained / "samples/cosine-learned-5.npz").exists()
    with pytest.raises(InputError, match="no such file"):
        sample_point(smoke(), POINT, tmp_path)
    with pytest.raises(InputError, match="times repeat"):
        sample_point(smoke(), Point.parse("cosine-ddim-101"), trained)
    assert not (trained / "samples/cosine-ddim-101.npz").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"hello"])
def test_a_damaged_sample_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "samples" / "cosine-ddpm-5.npz"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a sample set") as caught:
        samples.read_samples(path)
    assert "\n" not in str(caught.value)


def test_times_of_a_row_are_visited_and_belong_to_the_model_that_they_were_fitted_to(
    trained: Path, smoke: Callable[..., Params]
) -> None:
    record = models.read_trained(trained, "cosine")
    times = {3: [9.0, 4.5, 0.0], 2: [8, 1]}
    rows = {"fitted": {"sampler": "unipc", "times": times, "fitted_to": record.weights_sha256}}
    params = smoke(sampling={"images": 6, "batch": 6}, samplers=rows)
    point = Point.parse("cosine-fitted-3")
    images = draw(trained, params, point)
    denoiser, _ = checkpoint.load(trained / "models/cosine", clip=True)
    x_0 = sample(denoiser, gaussian(0, range(6), 0, (1, 8, 8)), sampler="unipc", steps=3, times=times)
    assert np.abs(to_uint8(x_0).numpy().astype(int) - images.astype(int)).max() <= 1
    settings = samples.read_samples_record(trained / paths.samples_file(point)).settings
    assert settings["row"] == {**rows["fitted"], "times": {"3": [9.0, 4.5, 0.0], "2": [8.0, 1.0]}}
    with pytest.raises(InputError, match="cosine-fitted-4: times: no entry for 4 steps; there are entries for 3, 2"):
        sample_point(params, Point.parse("cosine-fitted-4"), trained)
    other = smoke(samplers={"fitted": {**rows["fitted"], "fitted_to": "a" * 64}})
    with pytest.raises(InputError, match=r"samplers\.fitted\.fitted_to: the times were fitted to weights aaaaaaaaaaaa"):
        sample_point(other, point, trained)


def test_a_row_draws_with_an_average_of_its_own_length(
    root: Path, smoke: Callable[..., Params], tmp_path: Path
) -> None:
    def of(ema: float | None, **training: object) -> Params:
        about = {"steps": 30, "snapshot_every": 6, **training}
        return smoke(training=about, sampling={"images": 6, "batch": 6}, samplers={"ddim": {"ema": ema}})

    point = Point.parse("cosine-ddim-5")
    train(of(None), "cosine", root)
    usual, short, long = (draw(root, of(ema), point).astype(int) for ema in (None, 0.05, 0.15))
    assert np.abs(usual - short).max() > 1 and np.abs(short - long).max() > 1
    # 0.05 is the length of an average that the training kept, so its last snapshot holds the weights.
    denoiser, _ = checkpoint.load(root / "models/cosine", clip=True)
    kept = load_file(root / "snapshots/cosine/000000030.safetensors")
    denoiser.net.load_state_dict({name[5:]: tensor for name, tensor in kept.items() if name.startswith("0.05.")})
    x_0 = sample(denoiser, gaussian(0, range(6), 0, (1, 8, 8)), sampler="ddim", steps=5)
    assert np.abs(to_uint8(x_0).numpy().astype(int) - short).max() <= 1

    with pytest.raises(
        InputError, match=r"snapshots/cosine: the closest average to length 0\.01 that 5 snapshots give"
    ):
        draw(root, of(0.01), point)
    with pytest.raises(InputError, match=r"samplers\.ddim: ema needs snapshots of the training; set training\.snapsh"):
        of(0.1, snapshot_every=0)
    record = root / "snapshots/cosine/snapshots.json"
    (snapshot,) = (root / "snapshots/cosine").glob("*12.safetensors")
    held, about = snapshot.read_bytes(), record.read_bytes()
    snapshot.write_bytes(held[:-1] + b"?")
    with pytest.raises(InputError, match=r"000000012\.safetensors: not the file that .*snapshots\.json describes"):
        draw(root, of(0.1), point)
    snapshot.write_bytes(held)
    other = tmp_path / "other"
    (other / "dataset").parent.mkdir()
    (other / "dataset").symlink_to(root / "dataset")
    train(of(None, learning_rate=1e-4), "cosine", other)
    record.write_bytes((other / "snapshots/cosine/snapshots.json").read_bytes())
    with pytest.raises(
        InputError, match=r"snapshots/cosine: holds the snapshots of another training than .*models/cosi"
    ):
        draw(root, of(0.1), point)
    record.unlink()
    with pytest.raises(
        InputError, match=r"snapshots/cosine: .*models/cosine has no snapshots, which `ema` in a sampler"
    ):
        draw(root, of(0.1), point)
    record.write_bytes(about)
    assert np.array_equal(draw(root, of(0.05), point).astype(int), short)
