"""Reads and writes snapshots: the power-function averages of a training's weights after some of its steps.

A training keeps its snapshots in the cache, since a longer training needs them too. At the end, the training writes its
snapshots to snapshots/SCHEDULE. model.json holds the hash of their record.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpm.errors import InputError
from ddpm.files import atomic, checkpoint, paths, records
from ddpm.files.models import ModelRecord, unusable
from ddpm.training import averages

RECORD = "snapshots.json"


@dataclass(frozen=True)
class SnapshotsRecord:
    """The content of snapshots/SCHEDULE/snapshots.json.

    Args:
        schedule: the name of the trained row of `schedules` in params.yaml.
        lengths: the lengths of the weight averages in each snapshot (see averages.PowerAverage).
        files: sha256 of the snapshots, by name.
        content: all entries of the file.
    """

    schedule: str
    lengths: list[float]
    files: dict[str, str] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)


def file(folder: Path, step: int) -> Path:
    """Returns the path of the snapshot after a step."""
    return folder / f"{step:09d}.safetensors"


def keep(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a snapshot into the cache. tensors: the averages; their keys are LENGTH.NAME, with the parameter's name."""
    with atomic.replacing(path) as temporary:
        checkpoint.write_tensors(temporary, dict(tensors))
        digest = records.sha256(temporary)
    records.write_json(path.with_suffix(".json"), {"sha256": digest})


def is_kept(path: Path) -> bool:
    """Returns whether the cache holds an undamaged snapshot."""
    try:
        about = records.read_json(path.with_suffix(".json"))
    except InputError:  # the file is missing or damaged
        return False
    return path.exists() and records.sha256(path) == about.get("sha256")


def write(root: Path, schedule: str, kept: Iterable[Path], last: tuple[int, Mapping[str, Tensor]] | None) -> str:
    """Writes snapshots/SCHEDULE. Returns the hash of its record, or "" if there are no snapshots.

    Args:
        root: the top of the checkout.
        schedule: the name of the schedule's row.
        kept: the files of the training's earlier snapshots in the cache.
        last: the last step of the training, and the averages after it; None if the training keeps no snapshots.
    """
    with atomic.replacing_dir(root / paths.snapshots_dir(schedule)) as folder:
        for path in kept:
            shutil.copyfile(path, folder / path.name)
        if last is not None:
            checkpoint.write_tensors(file(folder, last[0]), dict(last[1]))
        content = {"schedule": schedule, "lengths": list(averages.LENGTHS) if last else []}
        written = records.write_record(folder / RECORD, content, sorted(folder.glob(checkpoint.STATES)))
    return records.record_digest(written) if last else ""


def averaged(folder: Path, model: ModelRecord, length: float) -> dict[str, Tensor]:
    """Returns an average of a model's weights with a given length, approximated from the snapshots of the training.

    Args:
        folder: the model's folder, models/SCHEDULE. The snapshots lie in snapshots/SCHEDULE, where snapshots/ is
            the folder beside models/.
        model: the record of the model.
        length: the length of the average: the standard deviation of the averaged steps, as a share of the training.

    Raises:
        InputError: the model has no snapshots, too few for this length, or they are missing, damaged or of another training.
    """
    place = folder.parents[1] / paths.snapshots_dir(folder.name)
    if not model.snapshots or not (place / RECORD).exists():
        raise InputError(
            f"{place}: {folder} has no snapshots, which `ema` in a sampler row needs; train the model with"
            " training.snapshot_every, or restore its snapshots (dvc checkout)"
        )
    record = records.read_typed(place / RECORD, SnapshotsRecord)
    if records.record_digest(record.content) != model.snapshots:
        raise InputError(f"{place}: holds the snapshots of another training than {folder}; {records.REMEDY}")
    names = sorted(record.files)
    taken = [(int(Path(name).stem), each) for name in names for each in record.lengths]
    try:
        found = averages.coefficients(taken, max(step for step, _ in taken), length)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None

    def tensors() -> Iterator[dict[str, Tensor]]:
        """Yields one snapshot at a time, so that the memory holds one file."""
        for name in names:
            path = records.read_described(place / RECORD, record.files, place / name)
            try:
                loaded = load_file(path)
            except (SafetensorError, OSError) as error:
                raise unusable(place, " ".join(str(error).split())) from None
            for each in record.lengths:
                start = f"{each}."
                yield {key.removeprefix(start): x for key, x in loaded.items() if key.startswith(start)}

    return averages.combined(tensors(), found.tolist())


def checkpoint_of(root: Path, schedule: str, length: float) -> Path:
    """Makes a checkpoint from models/SCHEDULE and its snapshots. Returns the checkpoint's folder in the cache.

    The weights are a power-function average of this length (see averages.PowerAverage). The new checkpoint needs no snapshots
    itself. Raises InputError in the same cases as averaged(), or if models/SCHEDULE is unusable.
    """
    folder = root / paths.model_dir(schedule)
    denoiser, model = checkpoint.load(folder)
    checkpoint.replace_weights(denoiser.net, averaged(folder, model, length), folder)
    description = model.described_by(ema=length)
    del description["snapshots"]
    made = root / paths.CACHE / "averages" / f"{schedule}-{length}"
    checkpoint.save(made, denoiser.net, description)
    return made
