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
from ddpm.files.dataset import read_dataset
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
MOMENTS = 10  # the number of states of a chain that a row shows
DEPTHS = (1.0, 0.75, 0.5, 0.25)  # noise levels of a blend, as a share of the chain; 1 is pure noise
PAIRS = 40  # the most pairs that the picture of a reconstruction shows; the errors cover all pairs


@dataclass(frozen=True)
class Model:
    """A denoiser, its sampler settings and device, and the model's record."""

    denoiser: Denoiser
    settings: dict[str, Any]  # a sampler row's options, and `steps`
    record: ModelRecord
    device: torch.device
    label: str | None = None  # the class of all images; None: the classes take turns
    origin: str = ""  # the model's origin, if it is neither the champion nor a named model

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.record.data.shape
        return channels, height, width

    @property
    def call(self) -> dict[str, Any]:
        """The settings as arguments of `ddpm.sample`."""
        return arguments(self.settings, self.denoiser.schedule.T)[0]

    def labelled(self, count: int) -> dict[str, Any]:
        """Returns labels and guidance for `count` images of a conditional model, or else {}. Raises ValueError."""
        labels, guidance = class_labels(self.record, count, self.label), arguments(self.settings, 1)[1]
        if labels is not None:
            return {"labels": torch.from_numpy(labels), **guidance}
        if guidance:
            raise ValueError(f"guidance {UNGUIDED}")
        return {}


@dataclass(frozen=True)
class Request:
    """The contents of a picture to make."""

    of: tuple[int, ...]  # indices of test images, or their number
    count: int  # the number of images or rows; 0: the default of the kind
    seed: int
    batch: int
    report: Report


@dataclass(frozen=True)
class Picture:
    """Images, uint8 N,C,H,W, in rows of `columns` (None: a square), a message about them, and figures for a JSON file."""

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
    """Writes a picture to `out` (PNG), and its figures, if any, to a JSON file beside it. Returns a line about the picture.

    Args:
        params: the parameters of the sweep; None without a params.yaml, in which case `model` is needed.
        out: the file of the picture; its name ends in .png.
        kind: a key of KINDS.
        of: indices of test images, or their number, depending on the kind.
        count: the number of images or rows; 0 for the default of the kind.
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint folder; "" for the champion
            of the dataset, or without a champion, for the best point of the report.
        seed: seed of the noise.
        sampler: a row of params.samplers or else a key of SAMPLERS; "" for the sampler that the model was registered with, or
            DDIM for a folder.
        steps: S; 0 for the steps that the model was registered with, or 50 for a folder.
        label: the class of all images of a conditional model, by name or number; None: the classes take turns.
        guidance: the guidance scale; None for the scale in the settings.
        report: receives the progress.

    Raises:
        InputError: an argument is invalid, or the model or the test images cannot be read.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"{out}: the picture is a PNG; give --out a name that ends in .png")
    if kind in OF_TEST_IMAGES and (label is not None or guidance is not None):
        raise InputError(f"generate: --{kind} starts from images of the test split; leave --label and --guidance out")
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
        denoiser, record = prepared_denoiser(folder, device, clip, precision="float32", compiled=False)
        try:
            check_fitted(settings, record)
        except ValueError as error:
            raise InputError(f"generate: {error}") from None
    if settings.get("guidance") is not None and not record.network.guidable:
        raise InputError(f"generate: guidance {UNGUIDED}")
    return Model(denoiser, settings, record, device, label, origin)


@contextmanager
def _found(params: Params | None, model: str) -> Iterator[tuple[Path, Mapping[str, Any], str]]:
    """Gives the checkpoint folder, its sampler settings, and where the model is from ("" if `model` itself says so)."""
    if model:
        with located(model) as (folder, promoted):
            yield folder, promoted, ""
        return
    if params is None:
        raise InputError("generate: no params.yaml here says which champion is meant; name a model with --model")
    from ddpm import tracking

    with TemporaryDirectory(prefix="ddpm-generate-") as temporary:
        yield tracking.fetch_champion(params, Path(temporary))


def _other_sampler(rows: Mapping[str, Sampler], name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a row of params.yaml or, if no row has that name, of a sampler of SAMPLERS. Raises InputError."""
    if name in rows:
        check_row(name, rows[name])
        return {**rows[name].options(), "steps": settings["steps"]}
    if name not in SAMPLERS:
        there = ", ".join(sorted({*rows, *SAMPLERS}))
        raise InputError(f"--sampler {name}: neither a row of samplers in params.yaml nor a sampler; there are {there}")
    return with_sampler(settings, name)


def _grid(model: Model, request: Request) -> Picture:
    """Draws `count` images."""
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
    """Draws `count` rows: the predicted clean image, from the first step of the chain to the last."""
    states = _states(model, request)
    return _rows(
        [state.x0_hat for state in states], f"{len(states[0].x)} images: the predicted clean image, step by step"
    )


def _strip(model: Model, request: Request) -> Picture:
    """Draws `count` rows: x_t from noise to image."""
    states = _states(model, request)
    x_T = gaussian(request.seed, range(len(states[0].x)), 0, model.shape, model.device)
    return _rows([x_T, *(state.x for state in states)], f"{len(x_T)} images on their way from noise")


def _states(model: Model, request: Request) -> list[Any]:
    rows = range(request.count or 8)

    def noise(k: int) -> Tensor:
        return gaussian(request.seed, rows, k, model.shape, model.device)

    denoiser = replace(_watched(model, 1, request), **model.labelled(len(rows)))
    return snapshots(denoiser, noise(0), MOMENTS, **model.call, noise=lambda k: noise(k + 1))


def _rows(columns: list[Tensor], message: str) -> Picture:
    images = torch.stack(columns, dim=1).flatten(0, 1)
    return Picture(to_uint8(images).cpu().numpy(), len(columns), message)


def _interpolate(model: Model, request: Request) -> Picture:
    """Draws a row: a test image at either end, and `count` images between, decoded from codes between their codes."""
    x_0, y_0 = _test_images(model, request.of)
    images = interpolate(_watched(model, 2, request), x_0, y_0, _weights(request), **model.call)
    row = torch.stack([x_0, *images, y_0])
    message = f"test images {request.of[0]} and {request.of[1]}, and {len(images)} images from codes between theirs"
    return Picture(to_uint8(row).cpu().numpy(), len(row), message)


def _blend(model: Model, request: Request) -> Picture:
    """Draws rows with a test image at either end and `count` mixtures between them. Each row mixes at a lower noise level."""
    x_0, y_0 = _test_images(model, request.of)
    denoiser = _watched(model, len(DEPTHS), request)
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
    message = (
        f"test images {request.of[0]} and {request.of[1]}, mixed under noise and denoised from {depths} of the chain"
    )
    return Picture(to_uint8(torch.stack(images)).cpu().numpy(), columns, message)


def _weights(request: Request) -> list[float]:
    count = request.count or 9
    return torch.linspace(0, 1, count).tolist() if count > 1 else [0.5]


def _encode_decode(model: Model, request: Request) -> Picture:
    """Draws rows of test images, each above its reconstruction from the codes, and measures the errors."""
    if request.count:
        raise InputError("generate: --encode-decode already gives the number of images; leave -n out")
    (count,) = request.of
    if count > (there := len(read_dataset().test)):
        raise InputError(f"--encode-decode {count}: the test split has {there} images")
    x_0 = _test_images(model, range(count))
    denoiser = _watched(model, 2 * -(-count // request.batch), request)
    again = torch.cat(
        [sample(denoiser, encode(denoiser, part, **model.call), **model.call) for part in x_0.split(request.batch)]
    )
    error = pixel_error(x_0, again).double()
    before, after = (to_uint8(images).cpu().numpy() for images in (x_0, again))
    apart = np.abs(before.astype(int) - after).reshape(count, -1).max(1)
    figures = {
        "images": count,
        "mean_squared_error": float(error.mean()),  # error per value, on the [0, 1] scale
        "worst_image": int(error.argmax()),
        "grey_levels_apart": int(apart.max()),
        **model.settings,
        "clip": model.denoiser.clip,
        "dataset_sha256": model.record.data.sha256,
        "weights_sha256": model.record.weights_sha256,
    }
    columns = min(count, 10)
    message = (
        f"{count} test images, each above its reconstruction after {model.settings['steps']} steps each way: mean"
        f" squared error {figures['mean_squared_error']:.3g} (values in 0 ... 1), at most {apart.max()} grey levels apart"
    )
    return Picture(_alternating(before[:PAIRS], after[:PAIRS], columns), columns, message, figures)


def _alternating(above: arrays.Images, below: arrays.Images, columns: int) -> arrays.Images:
    """Returns rows of `columns` images, taken in turn from `above` and `below`. White images fill up the last rows."""
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
    """Returns images of the prepared test split, scaled for the model: [N, C, H, W] in [-1, 1]. Raises InputError."""
    dataset, chosen = read_dataset(), list(indices)
    if dataset.test.shape[1:] != model.shape:
        raise InputError(
            f"{paths.dataset_dir()}: its images are {dataset.test.shape[1:]}, the model's are {model.shape} (channels,"
            " height, width); prepare the dataset that the model was trained on"
        )
    if wrong := [index for index in chosen if not 0 <= index < len(dataset.test)]:
        last = len(dataset.test) - 1
        raise InputError(f"{paths.dataset_dir()}: test images are numbered 0 ... {last}; there is no {wrong[0]}")
    return scaled(torch.from_numpy(np.array(dataset.test[chosen])).to(model.device))


def _watched(model: Model, passes: int, request: Request) -> Denoiser:
    """Returns the denoiser with a network that reports each evaluation. passes: the number of runs through the chain."""
    net, done, total = model.denoiser.net, 0, passes * evaluations(model.denoiser.schedule, **model.call)

    def counted(*inputs: Any) -> Any:
        nonlocal done
        done += 1
        request.report(Progress(min(done, total), total, "evaluations"))
        return net(*inputs)

    return replace(model.denoiser, net=counted)
