"""`generate`: draws pictures with a registered model or a checkpoint folder, from noise or from test images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.paths import blend, encode, interpolate, pixel_error, snapshots
from ddpm.diffusion.samplers import SAMPLERS, evaluations, sample
from ddpm.errors import InputError
from ddpm.files import arrays, paths, records
from ddpm.files.dataset import read_dataset, spread
from ddpm.files.models import ModelRecord
from ddpm.files.params import Params
from ddpm.parameters import Compute, Sampler, Sampling
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.drawing import (
    UNGUIDED,
    arguments,
    check_fitted,
    check_row,
    class_labels,
    draw,
    prepared_denoiser,
    to_uint8,
    with_sampler,
)
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.tools.load import located
from ddpm.training.fit import scaled

DEFAULT: dict[str, Any] = {"sampler": "ddim", "steps": 50}
SAMPLING = Sampling(images=64, batch=64)  # used without a params.yaml
SNAPSHOTS = 10  # the number of states of a chain that a row shows
DEPTHS = (1.0, 0.75, 0.5, 0.25)  # noise levels at which a blend mixes, as a share of the chain; 1 is pure noise
MOST_PAIRS = 40  # the largest number of pairs in the picture of a reconstruction; the errors cover all pairs


@dataclass(frozen=True)
class Model:
    """An opened model.

    Args:
        denoiser: the network with its schedule and target.
        settings: the sampler's options, as in a row of `samplers` in params.yaml, and the number of steps (`steps`).
        record: the content of model.json.
        device: the device of the network.
        label: the class of all images; None mixes the classes.
        origin: words that say which model this is, for messages; "" for the champion and for a model that the user named.
    """

    denoiser: Denoiser
    settings: dict[str, Any]
    record: ModelRecord
    device: torch.device
    label: str | None = None
    origin: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.record.data.shape
        return channels, height, width

    @property
    def call(self) -> dict[str, Any]:
        """The settings as arguments of `ddpm.sample`."""
        return arguments(self.settings, self.denoiser.schedule.T)[0]

    def labelled(self, count: int) -> dict[str, Any]:
        """Returns Denoiser's `labels` and guidance settings for `count` images; {} for an unconditional model.

        Raises ValueError if there is no such class, or if the model is unconditional and guidance is set.
        """
        labels, guidance = class_labels(self.record, count, self.label), arguments(self.settings, 1)[1]
        if labels is not None:
            return {"labels": torch.from_numpy(labels), **guidance}
        if guidance:
            raise ValueError(f"guidance {UNGUIDED}")
        return {}


@dataclass(frozen=True)
class Request:
    """The user's options for a picture.

    Args:
        of: indices of test images, or the number of test images, depending on the kind of picture.
        count: the number of images or rows; 0 for the default of this kind of picture.
        seed: the seed of the noise.
        batch: images per call of the network.
        report: called with the progress.
    """

    of: tuple[int, ...]
    count: int
    seed: int
    batch: int
    report: Report


@dataclass(frozen=True)
class Picture:
    """The images of a picture, and how to arrange and describe them.

    Args:
        images: uint8 N,C,H,W, row by row.
        columns: images per row; None for about as many columns as rows.
        message: a line about the images, for the user.
        figures: numbers to write to a JSON file beside the picture; None to write no such file.
    """

    images: arrays.Images
    columns: int | None
    message: str
    figures: dict[str, Any] | None = None


def generate(
    params: Params | None,
    *,
    out: Path,
    kind: str = "grid",
    of: tuple[int, ...] = (),
    count: int = 0,
    model: str = "",
    seed: int = 0,
    sampler: str = "",
    steps: int = 0,
    label: str | None = None,
    guidance: float | None = None,
    report: Report = silent,
) -> str:
    """Writes a picture to `out`. Some kinds also write a JSON file with figures beside the picture.

    Args:
        params: the parameters of the sweep; None without a params.yaml, and then `model` is required.
        out: the PNG file to write.
        kind: the kind of picture, a key of KINDS such as "grid".
        of: indices of test images, or the number of test images, depending on the kind of picture.
        count: the number of images or rows; 0 for the default of this kind of picture.
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint folder. "" means the champion of the dataset, or the
            best point of the report (schedule, sampler and steps) if there is no champion.
        seed: the seed of the noise.
        sampler: a row of `samplers` in params.yaml, or else a key of SAMPLERS. "" means the sampler with which a registered
            model was promoted, or DDIM for a folder.
        steps: the number of steps S. 0 means the number with which a registered model was promoted, or 50 for a folder.
        label: the class of all images of a conditional model, by name or number; None mixes the classes.
        guidance: the guidance scale; None for the scale in the sampler's options.
        report: called with the progress.

    Returns:
        A line about the picture.

    Raises:
        InputError: an argument is invalid, or the model or the test images cannot be read.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: the picture is a PNG; give --out a name that ends in .png")
    if kind in OF_TEST_IMAGES and (label is not None or guidance is not None):
        raise InputError(f"generate: --{kind} starts from test images; leave --label and --guidance out")
    opened = _open(params, model, sampler, steps, label, guidance)
    try:
        with memory_errors("generate", "lower -n, or sampling.batch"):
            batch = (params.sampling if params else SAMPLING).batch
            picture = KINDS[kind](opened, Request(of, count, seed, batch, report))
    except ValueError as error:
        raise InputError(f"generate: {error}") from None
    arrays.write_png(out, arrays.grid(picture.images, picture.columns))
    if picture.figures is not None:
        records.write_json(out.with_suffix(".json"), picture.figures)
    return f"{out}: {picture.message}" + (f" of {opened.origin}" if opened.origin else "")


def _open(
    params: Params | None, model: str, sampler: str, steps: int, label: str | None, guidance: float | None
) -> Model:
    if params is not None:
        torch.set_num_threads(params.sampling.threads)
    sampling, compute = (params.sampling, params.compute) if params else (SAMPLING, Compute())
    device = find_device(compute.device)
    with _found(params, model) as (folder, promoted, origin):
        settings = dict(promoted) or {**DEFAULT, "clip": sampling.clip}
        clip = settings.pop("clip", True)
        if sampler:
            settings = _other_sampler(params.samplers if params else {}, sampler, settings)
        if steps:
            settings["steps"] = steps
        if guidance is not None:
            settings["guidance"] = guidance
        ema = settings.pop("ema", None)
        denoiser, record = prepared_denoiser(folder, device, clip, precision="float32", compiled=False, ema=ema)
        try:
            check_fitted(settings, record, ema)
        except ValueError as error:
            raise InputError(f"generate: {error}") from None
    if settings.get("guidance") is not None and not record.network.guidable:
        raise InputError(f"generate: guidance {UNGUIDED}")
    return Model(denoiser, settings, record, device, label, origin)


@contextmanager
def _found(params: Params | None, model: str) -> Iterator[tuple[Path, Mapping[str, Any], str]]:
    """Yields the checkpoint folder of the model, its sampler settings, and the words for `Model.origin`."""
    if model:
        with located(model) as (folder, promoted):
            yield folder, promoted, ""
        return
    if params is None:
        raise InputError(
            "generate: without a params.yaml here, the dataset of the champion is unknown; name a model with --model"
        )
    from ddpm import tracking

    with TemporaryDirectory(prefix="ddpm-generate-") as temporary:
        yield tracking.fetch_champion(params, Path(temporary))


def _other_sampler(rows: Mapping[str, Sampler], name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the sampler `name`: a row of `samplers` in params.yaml or, without such a row, a key of SAMPLERS.

    Takes the number of steps from `settings`. Raises InputError.
    """
    if name in rows:
        check_row(name, rows[name])
        return {**rows[name].options(), "steps": settings["steps"]}
    if name not in SAMPLERS:
        known = ", ".join(sorted({*rows, *SAMPLERS}))
        raise InputError(
            f"--sampler {name}: neither a row of samplers in params.yaml nor a sampler; choose one of {known}"
        )
    return with_sampler(settings, name)


def _grid(model: Model, request: Request) -> Picture:
    """Draws `count` images (64 by default)."""
    settings, count = dict(model.settings), request.count or 64
    images, _ = draw(
        model.denoiser,
        model.shape,
        range(count),
        seed=request.seed,
        batch=request.batch,
        steps=settings.pop("steps"),
        settings=settings,
        device=model.device,
        labels=class_labels(model.record, count, model.label),
        done=lambda images, _: request.report(Progress(images, count, "images")),
    )
    return Picture(images, None, f"{count} images")


def _progressive(model: Model, request: Request) -> Picture:
    """Draws `count` samples (8 by default), one per row. A row shows the predicted clean image, step by step."""
    states = _states(model, request)
    return _rows(
        [state.x0_hat for state in states], f"the predicted clean image of {len(states[0].x)} samples, step by step"
    )


def _strip(model: Model, request: Request) -> Picture:
    """Draws `count` samples (8 by default), one per row. A row shows x_t from noise to image."""
    states = _states(model, request)
    x_T = gaussian(request.seed, range(len(states[0].x)), 0, model.shape, model.device)
    return _rows([x_T, *(state.x for state in states)], f"{len(x_T)} images on their way from noise")


def _states(model: Model, request: Request) -> list[Any]:
    rows = range(request.count or 8)

    def noise(k: int) -> Tensor:
        return gaussian(request.seed, rows, k, model.shape, model.device)

    denoiser = replace(_with_progress(model, 1, request), **model.labelled(len(rows)))
    return snapshots(denoiser, noise(0), SNAPSHOTS, **model.call, noise=lambda k: noise(k + 1))


def _rows(columns: list[Tensor], message: str) -> Picture:
    images = torch.stack(columns, dim=1).flatten(0, 1)
    return Picture(to_uint8(images).cpu().numpy(), len(columns), message)


def _interpolate(model: Model, request: Request) -> Picture:
    """Draws a row of two test images with `count` images (9 by default) between them, decoded from interpolated codes x_T."""
    x_0, y_0 = _test_images(model, request.of)
    images = interpolate(_with_progress(model, 2, request), x_0, y_0, _weights(request), **model.call)
    row = torch.stack([x_0, *images, y_0])
    message = (
        f"test images {request.of[0]} and {request.of[1]}, and {len(images)} images decoded from interpolated codes"
    )
    return Picture(to_uint8(row).cpu().numpy(), len(row), message)


def _blend(model: Model, request: Request) -> Picture:
    """Draws rows of two test images with `count` mixtures (9 by default) between. The rows mix at ever lower noise levels."""
    x_0, y_0 = _test_images(model, request.of)
    denoiser = _with_progress(model, len(DEPTHS), request)
    images: list[Tensor] = []
    for depth in DEPTHS:
        mixed = blend(
            denoiser,
            x_0,
            y_0,
            _weights(request),
            depth,
            lambda k: gaussian(request.seed, [0], k, model.shape, model.device)[0],
            **model.call,
        )
        images += [x_0, *mixed, y_0]
    columns = len(images) // len(DEPTHS)
    depths = ", ".join(f"{depth:g}" for depth in DEPTHS)
    message = f"test images {request.of[0]} and {request.of[1]}: each row mixes them under less noise, at {depths} of the chain"
    return Picture(to_uint8(torch.stack(images)).cpu().numpy(), columns, message)


def _weights(request: Request) -> list[float]:
    count = request.count or 9
    return torch.linspace(0, 1, count).tolist() if count > 1 else [0.5]


def _encode_decode(model: Model, request: Request) -> Picture:
    """Encodes and decodes test images, and measures the errors. Draws each test image above its reconstruction."""
    if request.count:
        raise InputError("generate: --encode-decode already gives the number of images; leave -n out")
    (count,) = request.of
    if count > (available := len(read_dataset().test)):
        raise InputError(f"--encode-decode {count}: the test split has only {available} images; give a smaller number")
    x_0 = _test_images(model, spread(np.arange(available), count).tolist())
    denoiser = _with_progress(model, 2 * -(-count // request.batch), request)
    decoded = torch.cat(
        [sample(denoiser, encode(denoiser, part, **model.call), **model.call) for part in x_0.split(request.batch)]
    )
    error = pixel_error(x_0, decoded).double()
    before, after = (to_uint8(images).cpu().numpy() for images in (x_0, decoded))
    largest_error = int(np.abs(before.astype(int) - after).max())
    figures = {
        "images": count,
        "mean_squared_error": float(error.mean()),  # of values in [0, 1]
        "worst_image": int(error.argmax()),
        "grey_levels_apart": largest_error,
        **model.settings,
        "clip": model.denoiser.clip,
        "dataset_sha256": model.record.data.sha256,
        "weights_sha256": model.record.weights_sha256,
    }
    columns = min(count, 10)
    message = (
        f"{count} test images, each above its reconstruction after {model.settings['steps']} steps each way: mean"
        f" squared error {figures['mean_squared_error']:.3g} (values in 0 ... 1), largest error {largest_error} grey levels"
    )
    return Picture(_alternating(before[:MOST_PAIRS], after[:MOST_PAIRS], columns), columns, message, figures)


def _alternating(above: arrays.Images, below: arrays.Images, columns: int) -> arrays.Images:
    """Returns rows of `columns` images, in turn a row of `above` and a row of `below`. White images fill the last two rows."""
    padding = np.full((-len(above) % columns, *above.shape[1:]), 255, np.uint8)
    pair = [np.concatenate([images, padding]).reshape(-1, columns, *images.shape[1:]) for images in (above, below)]
    return np.stack(pair, axis=1).reshape(-1, *above.shape[1:])


KINDS: dict[str, Callable[[Model, Request], Picture]] = {
    "grid": _grid,
    "progressive": _progressive,
    "strip": _strip,
    "interpolate": _interpolate,
    "blend": _blend,
    "encode-decode": _encode_decode,
}


OF_TEST_IMAGES = ("interpolate", "blend", "encode-decode")


def _test_images(model: Model, indices: Iterable[int]) -> Tensor:
    """Returns images of the test split, scaled for the model: [N, C, H, W] in [-1, 1]. Raises InputError."""
    dataset, chosen = read_dataset(), list(indices)
    if dataset.test.shape[1:] != model.shape:
        raise InputError(
            f"{paths.dataset_dir()}: the dataset's images are {dataset.test.shape[1:]}, but the model's are {model.shape}"
            " (channels, height, width); prepare the dataset that the model was trained on"
        )
    if wrong := [index for index in chosen if not 0 <= index < len(dataset.test)]:
        last = len(dataset.test) - 1
        raise InputError(f"{paths.dataset_dir()}: test images are numbered 0 ... {last}; there is no {wrong[0]}")
    return scaled(torch.from_numpy(np.array(dataset.test[chosen])).to(model.device))


def _with_progress(model: Model, passes: int, request: Request) -> Denoiser:
    """Returns a denoiser that reports each network evaluation. passes: how often the caller runs through the chain."""
    net, done, total = model.denoiser.net, 0, passes * evaluations(model.denoiser.schedule, **model.call)

    def counted(*inputs: Any) -> Any:
        nonlocal done
        done += 1
        request.report(Progress(min(done, total), total, "evaluations"))
        return net(*inputs)

    return replace(model.denoiser, net=counted)
