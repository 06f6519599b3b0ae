"""Reads model.json and checks the weights that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ddpm.errors import InputError
from ddpm.files import paths, records

MODEL_FORMAT = 2  # the format of model.json; format 1 has no checksum
MOST_IMAGES = 2**40  # the most images of a class
MOST_TIMES = 100_000  # the largest T, as in params.yaml; larger tables would fill the memory

R = TypeVar("R", "TrainingRecord", "BoundRecord")


@dataclass(frozen=True)
class ScheduleEntry:
    """The noise schedule of a model.

    Args:
        name: the name of the schedule's row in params.yaml.
        timesteps: T.
        schedule: a key of ddpm.SCHEDULES.
        options: the remaining entries of the row.
    """

    name: str
    timesteps: int
    schedule: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any, place: str) -> ScheduleEntry:
        known = ("name", "timesteps", "schedule")
        if isinstance(value, dict):  # in the file, the options stand beside the known entries
            value = {key: value[key] for key in known if key in value} | {
                "options": {key: item for key, item in value.items() if key not in known}
            }
        return records.build(cls, value, place)

    @property
    def row(self) -> dict[str, Any]:
        """The schedule's row in params.yaml."""
        return {"schedule": self.schedule, **self.options}

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "timesteps": self.timesteps, **self.row}


@dataclass(frozen=True)
class NetworkEntry:
    """The entry `network` of model.json.

    Args:
        kind: a key of ddpm.networks.NETWORKS.
        image_channels: channels of the network's input.
        image_size: side of the network's input, or [height, width] if these differ.
        out_channels: channels of the network's output; None means image_channels.
        classes: 0 for an unconditional network.
        null_class: whether a conditional network can predict without a label.
        content: the whole entry, with the settings that have no field here.
    """

    kind: str
    image_channels: int
    image_size: int | list[int]
    out_channels: int | None = None
    classes: int = 0
    null_class: bool = True
    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, settings: Mapping[str, Any]) -> NetworkEntry:
        """Builds the entry from the value of network.kind and the arguments of the network's class. Raises ValueError."""
        return records.build(cls, {"kind": kind, **settings}, "network")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the network's class."""
        return {key: item for key, item in self.content.items() if key != "kind"}

    @property
    def shape(self) -> list[int]:
        """C, H, W of the network's input."""
        size = self.image_size
        return [self.image_channels, *(size if isinstance(size, list) else (size, size))]

    @property
    def learned_variance(self) -> bool:
        return (self.out_channels or 0) > self.image_channels

    @property
    def guidable(self) -> bool:
        """Whether guidance is possible: the network predicts with and without a label."""
        return self.classes > 0 and self.null_class


@dataclass(frozen=True)
class DataEntry:
    """The data that a model was trained on.

    Args:
        shape: C, H, W of an image.
        name: name of the dataset; "" for a model from diffusers.
        sha256: version of the dataset; "" for a model from diffusers.
        classes: names of the classes; None without labels.
        class_counts: number of training images of each class.
        content: the whole entry.
    """

    shape: list[int]
    name: str = ""
    sha256: str = ""
    classes: list[str] | None = None
    class_counts: list[int] | None = None
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingEntry:
    """The training of a model. A number that model.json lacks is 0, for example for a model from diffusers.

    Args:
        seed: the seed of the training.
        steps: optimiser steps.
        batch: images per step.
        content: all entries, as in params.yaml.
    """

    seed: int = 0
    steps: int = 0
    batch: int = 0
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRecord:
    """The content of model.json.

    Args:
        weights_sha256: hash of model.safetensors.
        target: a key of ddpm.TARGETS.
        variance: "fixed" or "learned".
        snapshots: hash of the content of snapshots/SCHEDULE/snapshots.json; "" without snapshots.
        ema: the length of the weights' average (see PowerAverage) if snapshots.checkpoint_of made it; None otherwise.
        content: all entries of model.json.
    """

    weights_sha256: str
    schedule: ScheduleEntry
    target: str
    network: NetworkEntry
    data: DataEntry
    variance: str = "fixed"
    training: TrainingEntry = TrainingEntry()
    snapshots: str = ""
    ema: float | None = None
    content: Mapping[str, Any] = field(default_factory=dict)

    def described_by(self, **entries: Any) -> dict[str, Any]:
        """Returns this model's `description` for checkpoint.save. `entries` replace or add to the recorded entries."""
        kept = {key: item for key, item in self.content.items() if key not in ("format", "weights_sha256")}
        return {**kept, **entries}


@dataclass(frozen=True)
class TrainingRecord:
    """The content of metrics/train/SCHEDULE.json: the result of a training.

    Args:
        parameters: the number of the network's parameters.
        loss, validation_loss: the last values of the curves.
        timesteps: T of an imported model, which may differ from params.yaml; None for a model that was trained here.
        files: sha256 of the curves' files, by name.
    """

    schedule: str
    steps: int
    parameters: int
    loss: float | None
    validation_loss: float | None
    timesteps: int | None = None
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timesteps is not None and not 1 <= self.timesteps <= MOST_TIMES:
            raise ValueError(f"timesteps: {self.timesteps} is not in 1 ... {MOST_TIMES}")


@dataclass(frozen=True)
class BoundOfSplit:
    """The variational bound on the train or test images in bits/dim, and the number of these images.

    The bound is given in total and in three parts, each with its standard error.
    """

    bits_per_dim: float
    bits_per_dim_error: float
    prior: float
    prior_error: float
    kl: float
    kl_error: float
    decoder: float
    decoder_error: float
    images: int


@dataclass(frozen=True)
class BoundRecord:
    """The content of metrics/likelihood/SCHEDULE.json: the variational bound of a model.

    Args:
        model: sha256 of the weights.
        dataset: sha256 of the dataset.
        seed, variance, clip, times: the settings of the estimate.
        train, test: the bound on each split; None if the split was not measured.
        files: sha256 of the curve's file, by name.
    """

    schedule: str
    model: str
    dataset: str
    seed: int
    variance: str
    times: int
    clip: Any
    train: BoundOfSplit | None = None
    test: BoundOfSplit | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, BoundOfSplit]:
        """The bounds that were measured, by split."""
        return {name: bound for name, bound in (("train", self.train), ("test", self.test)) if bound is not None}


def read_training(root: Path, schedule: str) -> TrainingRecord:
    """Reads metrics/train/SCHEDULE.json. Raises InputError if the file is unusable or names another schedule."""
    return _read_of_schedule(root / paths.training_metrics_file(schedule), schedule, TrainingRecord)


def read_bound(root: Path, schedule: str) -> BoundRecord:
    """Reads metrics/likelihood/SCHEDULE.json. Raises InputError if the file is unusable or names another schedule."""
    return _read_of_schedule(root / paths.likelihood_file(schedule), schedule, BoundRecord)


def _read_of_schedule(path: Path, schedule: str, kind: type[R]) -> R:
    """Reads a record. Raises InputError if the file is unusable or names another schedule."""
    record = records.read_typed(path, kind)
    if record.schedule != schedule:
        raise InputError(f"{path}: belongs to schedule '{record.schedule}', not '{schedule}'; {records.REMEDY}")
    return record


def read_model_record(folder: Path) -> ModelRecord:
    """Reads a checkpoint's model.json. Format 1 has no checksum and is not verified. Raises InputError."""
    path = folder / "model.json"
    content = records.read_json(path)
    if content.get("format") != 1 or records.CHECKSUM in content:
        content = records._checked(path, content)
        if content.get("format") != MODEL_FORMAT:
            raise InputError(
                f"{folder}: checkpoint format {content.get('format')} is not {MODEL_FORMAT}; another version of ddpm made it:"
                " train again"
            )
    try:
        return records.build(ModelRecord, content)
    except ValueError as error:
        raise unusable(folder, f"model.json: {error}") from None


def unusable(folder: Path, why: str) -> InputError:
    """Returns the error for a checkpoint that cannot be used."""
    return InputError(f"{folder}: not a usable checkpoint: {why}; train again or restore it")


def check_weights(folder: Path, record: ModelRecord) -> Path:
    """Verifies the hash of model.safetensors and returns its path. Raises InputError."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise InputError(f"{weights}: no such file; train again or restore it")
    # protects: tests/files/test_bad_input.py::test_a_checkpoint[a flipped bit]
    if records.sha256(weights) != record.weights_sha256:
        raise unusable(folder, "the checksum of model.safetensors is not the one in model.json")
    return weights


def check_data(record: ModelRecord) -> None:
    """Raises ValueError if the data entry of a model does not fit its network."""
    network, data = record.network, record.data
    if data.shape != network.shape:
        raise ValueError(f"its data are {data.shape}, its network takes {network.shape}")
    classes = len(data.classes or ())
    if network.classes and network.classes != classes:
        raise ValueError(f"its network has {network.classes} classes, its data have {classes}")
    counts = data.class_counts
    if counts is not None and (len(counts) != classes or not all(0 <= count < MOST_IMAGES for count in counts)):
        raise ValueError("its class_counts do not hold one number of images for each class")


def read_trained(root: Path, schedule: str) -> ModelRecord:
    """Reads models/SCHEDULE/model.json. Raises InputError if the file is unusable or describes another schedule's model."""
    folder = root / paths.model_dir(schedule)
    record = read_model_record(folder)
    if record.schedule.name != schedule:
        raise InputError(
            f"{folder}: holds the model of schedule '{record.schedule.name}'; train again or restore it (dvc repro)"
        )
    return record
