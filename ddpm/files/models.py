"""Reads model.json and checks the weights that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ddpm.errors import InputError
from ddpm.files import paths, records

MODEL_FORMAT = 2  # of model.json; 1 had no checksum
MOST_IMAGES = 2**40  # of a class
MOST_TIMES = 100_000  # as in params.yaml: a table of more would fill the memory

R = TypeVar("R", "TrainingRecord", "BoundRecord")


@dataclass(frozen=True)
class ScheduleEntry:
    """The noise schedule of a model.

    name: of its row in params.yaml. timesteps: T. schedule: a key of ddpm.SCHEDULES. options: what else the row says.
    """

    name: str
    timesteps: int
    schedule: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any, place: str) -> ScheduleEntry:
        known = ("name", "timesteps", "schedule")
        if isinstance(value, dict):  # the options stand beside the other entries
            value = {key: value[key] for key in known if key in value} | {
                "options": {key: item for key, item in value.items() if key not in known}
            }
        return records.build(cls, value, place)

    @property
    def row(self) -> dict[str, Any]:
        """The row of params.yaml."""
        return {"schedule": self.schedule, **self.options}

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "timesteps": self.timesteps, **self.row}


@dataclass(frozen=True)
class NetworkEntry:
    """The network of a model.

    kind: a key of ddpm.networks.NETWORKS. image_channels, image_size: of x. out_channels: if not those of x.
    classes: 0 for an unconditional network. content: all entries.
    """

    kind: str
    image_channels: int
    image_size: int
    out_channels: int | None = None
    classes: int = 0
    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, settings: Mapping[str, Any]) -> NetworkEntry:
        """The entry of a network of that kind, made with these arguments. Raises ValueError."""
        return records.build(cls, {"kind": kind, **settings}, "network")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the network's class takes."""
        return {key: item for key, item in self.content.items() if key != "kind"}

    @property
    def learned_variance(self) -> bool:
        return (self.out_channels or 0) > self.image_channels


@dataclass(frozen=True)
class DataEntry:
    """The data of a model. name, sha256: of the dataset that it was trained on, if it was. shape: C, H, W.

    classes: their names, of labelled data. class_counts: how many training images each has.
    """

    shape: list[int]
    name: str = ""
    sha256: str = ""
    classes: list[str] | None = None
    class_counts: list[int] | None = None
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingEntry:
    """The training of a model. steps: of the optimiser. batch: images a step. content: all entries, as in params.yaml.

    All are 0 for weights that were not trained here.
    """

    seed: int = 0
    steps: int = 0
    batch: int = 0
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRecord:
    """The content of model.json: a model.

    weights_sha256: of model.safetensors. target: a key of ddpm.TARGETS. variance: "fixed" or "learned".
    content: all entries of the file.
    """

    weights_sha256: str
    schedule: ScheduleEntry
    target: str
    network: NetworkEntry
    data: DataEntry
    variance: str = "fixed"
    training: TrainingEntry = TrainingEntry()
    content: Mapping[str, Any] = field(default_factory=dict)

    def described_by(self, **entries: Any) -> dict[str, Any]:
        """Returns the description that save() takes, with some entries replaced."""
        kept = {key: item for key, item in self.content.items() if key not in ("format", "weights_sha256")}
        return {**kept, **entries}


@dataclass(frozen=True)
class TrainingRecord:
    """The content of metrics/train/SCHEDULE.json: a training.

    timesteps: T of an imported model, which params.yaml does not know. files: the sha256 of its curves, by name.
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
    """The variational bound of a split in bits/dim: its parts, each with its standard error, and the number of images."""

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
    """The content of metrics/likelihood/SCHEDULE.json: the bound of a model.

    model: sha256 of its weights. dataset: sha256 of the data. seed, variance, clip, times: how it was estimated.
    files: the sha256 of its curve, by name.
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
        """The bounds that there are, by split."""
        return {name: bound for name, bound in (("train", self.train), ("test", self.test)) if bound is not None}


def read_training(root: Path, schedule: str) -> TrainingRecord:
    """Reads the record of a training. Raises InputError, also for that of another schedule."""
    return _of_schedule(root / paths.training_metrics_file(schedule), schedule, TrainingRecord)


def read_bound(root: Path, schedule: str) -> BoundRecord:
    """Reads the record of a bound. Raises InputError, also for that of another schedule."""
    return _of_schedule(root / paths.likelihood_file(schedule), schedule, BoundRecord)


def _of_schedule(path: Path, schedule: str, kind: type[R]) -> R:
    record = records.read_typed(path, kind)
    if record.schedule != schedule:
        raise InputError(f"{path}: of schedule '{record.schedule}'; {records.REMEDY}")
    return record


def read_model_record(folder: Path) -> ModelRecord:
    """Reads a checkpoint's model.json. One of format 1, which had no checksum, is read as it is. Raises InputError."""
    path = folder / "model.json"
    content = records.read_json(path)
    if content.get("format") != 1 or records.CHECKSUM in content:
        content = records._checked(path, content)
        if content.get("format") != MODEL_FORMAT:
            raise InputError(
                f"{folder}: checkpoint format {content.get('format')} is not {MODEL_FORMAT}; it was made by another version"
            )
    try:
        return records.build(ModelRecord, content)
    except ValueError as error:
        raise unusable(folder, f"model.json: {error}") from None


def unusable(folder: Path, why: str) -> InputError:
    """The line that refuses a checkpoint."""
    return InputError(f"{folder}: not a usable checkpoint: {why}; train again or restore it")


def check_weights(folder: Path, record: ModelRecord) -> Path:
    """Compares model.safetensors with model.json. Returns its path. Raises InputError."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise InputError(f"{weights}: no such file; train again or restore it")
    # protects: tests/files/test_bad_input.py::test_a_checkpoint[a flipped bit]
    if records.sha256(weights) != record.weights_sha256:
        raise unusable(folder, "the checksum of model.safetensors is not the one in model.json")
    return weights


def check_data(record: ModelRecord) -> None:
    """Raises ValueError where the data of a model are not those that its network takes."""
    network, data = record.network, record.data
    takes = [network.image_channels, network.image_size, network.image_size]
    if data.shape != takes:
        raise ValueError(f"its data are {data.shape}, its network takes {takes}")
    classes = len(data.classes or ())
    if network.classes and network.classes != classes:
        raise ValueError(f"its network knows {network.classes} classes, its data have another number")
    counts = data.class_counts
    if counts is not None and (len(counts) != classes or not all(0 <= count < MOST_IMAGES for count in counts)):
        raise ValueError("its class_counts are not a number of images for each class")


def read_trained(root: Path, schedule: str) -> ModelRecord:
    """Reads models/SCHEDULE/model.json. Raises InputError, also for another schedule's model."""
    folder = root / paths.model_dir(schedule)
    record = read_model_record(folder)
    if record.schedule.name != schedule:
        raise InputError(
            f"{folder}: holds the model of schedule '{record.schedule.name}'; train again or restore it (dvc repro)"
        )
    return record
