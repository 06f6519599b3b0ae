"""Compares DINOv2 and CLIP with timm's and open_clip's own forward, at random weights, and checks where weights come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm.scores import clip, dinov2, towers
from ddpm.scores.extractors import EXTRACTORS, judges
from ddpm.scores.features import WeightsError, extract
from ddpm.scores.metrics import METRICS

timm = pytest.importorskip("timm", reason="the extra `judges` is not installed")
open_clip = pytest.importorskip("open_clip", reason="the extra `judges` is not installed")

SMALL = "vit_tiny_patch14_dinov2"
TINY = "tiny-clip"
RNG = np.random.default_rng(0)
PICTURES = {
    "grey": RNG.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8),
    "small": RNG.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
    "large and oblong": RNG.integers(0, 256, (1, 3, 310, 401), dtype=np.uint8),
    "high": RNG.integers(0, 256, (2, 3, 41, 24), dtype=np.uint8),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_dinov2(side: int) -> Any:
    """Returns timm's DINOv2 network with few and narrow blocks, for images of side x side pixels."""
    size = {"patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 1e-5, "num_classes": 0}
    return timm.models.vision_transformer.VisionTransformer(side, **size)


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Registers the small networks under names of timm and open_clip."""

    def vit_tiny_patch14_dinov2(img_size: int, **_: Any) -> Any:
        return small_dinov2(img_size)

    vit_tiny_patch14_dinov2.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(vit_tiny_patch14_dinov2)
    folder = tmp_path_factory.mktemp("configurations")
    config = open_clip.get_model_config(towers.CLIP)
    config |= {"embed_dim": 24}
    config["vision_cfg"] |= {"layers": 2, "width": 64, "head_width": 32, "image_size": 56}
    config["text_cfg"] |= {"layers": 1, "width": 32, "heads": 1, "vocab_size": 10}
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def random_weights(network: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns weights as large as trained ones, so that rounding hides no term.

    This includes layer scales, which start at 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def keys(x: np.ndarray, a: float) -> np.ndarray:
    """Computes the cubic kernel of Keys 1981."""
    x = abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def dinov2_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolates position embeddings to side x side patches as DINOv2 does, by matrix products.

    The kernel has a = -0.75, the sample points are (i + 1/2) old/(side + 0.1) - 1/2, and edges are repeated.
    """
    old = int((positions.shape[1] - 1) ** 0.5)
    at = (np.arange(side) + 0.5) * old / (side + 0.1) - 0.5
    weights = np.zeros((side, old))
    for i, x in enumerate(at):
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            weights[i, min(max(j, 0), old - 1)] += keys(x - j, -0.75)
    grid = positions[0, 1:].double().numpy().reshape(old, old, -1)
    resized = np.einsum("ia,jb,abd->ijd", weights, weights, grid).reshape(1, side * side, -1)
    return torch.cat([positions[:, :1], torch.from_numpy(resized).float()], 1)


def jax_resized(images: np.ndarray, side: int) -> np.ndarray:
    """Does the same as jax.image.resize(..., method="bicubic"), which CMMD's code calls.

    The kernel has a = -0.5 and is antialiased, and the weights add up to 1.
    """
    for axis in (2, 3):
        old = images.shape[axis]
        at = (np.arange(side) + 0.5) * old / side - 0.5
        weights = keys((at[:, None] - np.arange(old)) / max(1.0, old / side), -0.5)
        weights /= weights.sum(1, keepdims=True)
        images = np.moveaxis(np.moveaxis(images, axis, -1) @ weights.T, -1, axis)
    return images


def cropped(images: np.ndarray) -> np.ndarray:
    """Crops images to the box that CMMD's `_center_crop_and_resize` takes from an image first."""
    height, width = images.shape[2:]
    side = min(height, width)
    left, upper = (width - side) // 2, (height - side) // 2
    return images[:, :, upper : upper + side, left : left + side]


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes random weights in Meta's format, for 518 pixels and with the mask token."""
    state = random_weights(small_dinov2(518))
    path = tmp_path_factory.mktemp("dinov2") / "weights.pth"
    torch.save(state | {"mask_token": torch.zeros(1, 64)}, path)
    return path


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "weights.safetensors"
    save_file(random_weights(open_clip.create_model(TINY)), path)
    return path


@pytest.mark.parametrize("kind", PICTURES)
def test_dinov2_is_timms_forward_on_dgm_evals_images(kind: str, dinov2_file: Path, monkeypatch: Any) -> None:
    from PIL import Image
    from torchvision import transforms

    steps = [transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC), transforms.ToTensor()]
    steps.append(transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    repeated = PICTURES[kind].repeat(3 // PICTURES[kind].shape[1], axis=1).transpose(0, 2, 3, 1)
    images = torch.stack([transforms.Compose(steps)(Image.fromarray(image)) for image in repeated])
    theirs, state = small_dinov2(224), torch.load(dinov2_file)
    state["pos_embed"] = dinov2_positions(state["pos_embed"], 16)
    del state["mask_token"]
    theirs.load_state_dict(state)
    with torch.no_grad():
        expected = theirs.eval()(images).numpy()

    monkeypatch.setenv(dinov2.WEIGHTS_VARIABLE, str(dinov2_file))
    ours = towers.dinov2(dinov2.WEIGHTS_VARIABLE, architecture=SMALL)
    found = extract(ours, PICTURES[kind])
    assert found.shape == (len(repeated), 64) and ours.layer == 64
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert ours.sha256 == hashlib.sha256(dinov2_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", PICTURES)
def test_clip_is_open_clips_forward_on_cmmds_images(kind: str, clip_file: Path, monkeypatch: Any) -> None:
    theirs = open_clip.create_model(TINY)
    monkeypatch.setenv(clip.WEIGHTS_VARIABLE, str(clip_file))
    ours = towers.clip(clip.WEIGHTS_VARIABLE, architecture=TINY)
    theirs.load_state_dict(load_file(clip_file))
    images = jax_resized(cropped(PICTURES[kind]).repeat(3 // PICTURES[kind].shape[1], axis=1) / 255.0, 56)
    moments = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    mean, deviation = (np.array(values)[:, None, None] for values in moments)
    scaled = torch.from_numpy((images - mean) / deviation).float()
    with torch.no_grad():
        expected = theirs.eval().encode_image(scaled, normalize=True).numpy()
    found = extract(ours, PICTURES[kind])
    assert found.shape == (len(images), 24) and ours.layer == 24
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert ours.sha256 == hashlib.sha256(clip_file.read_bytes()).hexdigest()


def test_batches_change_nothing(clip_file: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv(clip.WEIGHTS_VARIABLE, str(clip_file))
    ours = towers.clip(clip.WEIGHTS_VARIABLE, architecture=TINY)
    images = PICTURES["grey"]
    np.testing.assert_allclose(extract(ours, images, batch=2), extract(ours, images), rtol=1e-4, atol=1e-6)


@pytest.mark.proof
@pytest.mark.parametrize(("module", "layer"), [(dinov2, 1024), (clip, 768)])
def test_the_large_networks_take_weights_of_their_own_size(
    module: Any, layer: int, tmp_path: Path, monkeypatch: Any
) -> None:
    if module is dinov2:
        network = timm.create_model(towers.DINOV2, pretrained=False, num_classes=0)
    else:
        network = open_clip.create_model(towers.CLIP)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    del network
    monkeypatch.setenv(module.WEIGHTS_VARIABLE, str(tmp_path / "weights.pth"))
    found = extract(module.load(layer, tmp_path), PICTURES["grey"][:1])
    assert found.shape == (1, layer) and np.isfinite(found).all()


@pytest.mark.parametrize("module", [dinov2, clip])
def test_missing_or_wrong_weights_are_one_line(module: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def refused(match: str) -> None:
        with pytest.raises(WeightsError, match=match) as caught:
            module.load(module.DEFAULT, tmp_path)
        assert "\n" not in str(caught.value)

    monkeypatch.delenv(module.WEIGHTS_VARIABLE, raising=False)
    refused(f"set {module.WEIGHTS_VARIABLE} to the path")
    monkeypatch.setenv(module.WEIGHTS_VARIABLE, str(tmp_path / "weights.pth"))
    refused("no such weights file")
    (tmp_path / "weights.pth").write_text("no weights")
    refused("not a weights file")
    torch.save({"visual.conv1.weight": torch.zeros(1), "cls_token": torch.zeros(1)}, tmp_path / "weights.pth")
    refused(f"wrong weights for {module.WEIGHTS_VARIABLE}")
    monkeypatch.setattr(towers.importlib.util, "find_spec", lambda name: None)
    refused("is not installed: pip install 'ddpm")


def test_every_judge_has_an_extractor_and_a_metric() -> None:
    assert {name for name, metric in METRICS.items() if metric.judge} == set(judges())
    assert {name: row.judges[name] for name, row in judges().items()} == {"sfid": 2023, "fd_dinov2": 1024, "cmmd": 768}
    assert {"inception", "dinov2", "clip"} <= set(EXTRACTORS)
    assert METRICS["fd_dinov2"].title == "FD (DINOv2)" and METRICS["fid"].title == "FID"
