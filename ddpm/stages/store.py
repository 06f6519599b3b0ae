"""Every file the pipeline reads or writes: paths, images, checkpoints, metrics.

Layout, below the root of a checkout (`*.run.json` files lie beside outputs and are not tracked):

    dataset/                      train.npy, test.npy (uint8 N,C,H,W), *-labels.npy (int64 N), dataset.json, preview.png
    models/SCHEDULE/              model.safetensors, model.json
    imported/NAME/                the same, from elsewhere: what `ddpm train NAME` copies
    samples/POINT.npz, .png       images (uint8 N,C,H,W), evaluations, labels (int64 N, if conditional); a preview grid
    metrics/POINT.json            scores of a point; POINT.influence.npy what each image did to its FID (float32 N)
    metrics/train/SCHEDULE.json   last training and validation loss; SCHEDULE.csv their curves; SCHEDULE.by_time.csv where
                                  among the network times they arise
    metrics/likelihood/SCHEDULE.json  bits per dimension; SCHEDULE.csv rate and distortion
    report/                       index.html, points.csv, best.json, front.json, fid.png, samples.png
    schedules/                    table.csv, snr.png, strip.png (not tracked)

Writing is atomic: a file or folder is complete or not there. Reading is checked: each JSON record of the pipeline holds the
hash of its own content and of the files that it describes, and whoever reads those bytes compares them with it.
"""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Annotated, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddpm.stages.errors import InputError
from ddpm.stages.params import Point, one_line, read_yaml

Images = NDArray[np.uint8]  # N,C,H,W

CACHE = Path(".cache")  # kept across runs, outside DVC: resume states, converted weights, reference features
PREVIEW = 64  # images in the grid of a sample set
CHART = CACHE / "mlflow-chart"  # of MLflow's pages the one with FID against steps: the end of its address


# Paths, relative to a root.


def dataset_dir() -> Path:
    return Path("dataset")


def model_dir(schedule: str) -> Path:
    return Path("models") / schedule


def imported_dir(name: str) -> Path:
    return Path("imported") / name


def samples_file(point: Point) -> Path:
    return Path("samples") / f"{point.name}.npz"


def metrics_file(point: Point) -> Path:
    return Path("metrics") / f"{point.name}.json"


def influence_file(point: Point) -> Path:
    return Path("metrics") / f"{point.name}.influence.npy"


def training_metrics_file(schedule: str) -> Path:
    return Path("metrics") / "train" / f"{schedule}.json"


def history_file(schedule: str) -> Path:
    return Path("metrics") / "train" / f"{schedule}.csv"


def losses_by_time_file(schedule: str) -> Path:
    return Path("metrics") / "train" / f"{schedule}.by_time.csv"


def likelihood_file(schedule: str) -> Path:
    return Path("metrics") / "likelihood" / f"{schedule}.json"


def likelihood_curve_file(schedule: str) -> Path:
    return Path("metrics") / "likelihood" / f"{schedule}.csv"


def downloads_dir(source: str) -> Path:
    return CACHE / "downloads" / source


def schedules_dir() -> Path:
    return Path("schedules")


def report_dir() -> Path:
    return Path("report")


def run_file(output: Path) -> Path:
    """The untracked file beside an output that says when, where and how fast it was made."""
    return output.with_name(output.name.removesuffix(output.suffix) + ".run.json")


# Atomic writing.

MASK = os.umask(0o077)  # it can only be asked for by setting it
os.umask(MASK)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_full_is_one_line(path: Path) -> Iterator[None]:
    """Raises InputError where the block, which writes `path`, finds no room on the disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(
            f"{path}: no room on the disk ({os.strerror(error.errno)}); what was there before is as it was:"
            " free some space and run this again"
        ) from None


def _temporary_beside(path: Path) -> str:
    """The start of a temporary name, which .dvcignore knows. What a killed process left under such a name is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        import psutil  # by nobody who only reads, such as a registered model

        owner = left.name.rpartition(".tmp-")[2].partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return f".{path.name}.tmp-{os.getpid()}-"


@contextmanager
def replacing(path: Path, keep: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and is gone when it doesn't.

    keep: what another process has put there meanwhile stays, where the file system has hard links.
    Raises InputError when the disk is full.
    """
    with disk_full_is_one_line(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_temporary_beside(path))
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~MASK)
            if not (keep and _linked(temporary, path)):
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _linked(file: Path, path: Path) -> bool:
    """Whether there is something at `path` now: what was there, or else the file."""
    try:
        path.hardlink_to(file)
    except FileExistsError:
        pass
    except OSError:
        return path.exists()
    return True


@contextmanager
def replacing_dir(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and is gone when it doesn't.

    Raises InputError when the disk is full.
    """
    with disk_full_is_one_line(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_temporary_beside(path)))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            temporary.chmod(0o777 & ~MASK)
            _swap(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Gives a folder its name. What has that name goes aside first and is removed last, so that a kill meanwhile does no harm."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=_temporary_beside(path)))
    try:
        with suppress(FileNotFoundError):
            path.replace(aside / path.name)
        try:
            new.replace(path)
        except OSError:
            with suppress(FileNotFoundError):
                (aside / path.name).replace(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class Record(BaseModel):
    """What readers of a JSON file rely on; it may hold more."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def read_json(path: Path, kind: type[Record] = Record) -> dict[str, Any]:
    """Raises InputError when the file is missing or no JSON object, or not of that kind."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; an earlier stage makes it (dvc repro)") from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}; restore it, or make it again (dvc repro)") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; restore it, or make it again (dvc repro)")
    _require(path, value, kind)
    return value


def _require(path: Path, value: dict[str, Any], kind: type[Record]) -> None:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{path}: {one_line(error)}; restore it, or make it again (dvc repro)") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")  # we write none, and nothing good follows from one


# Records: JSON files that hold the hash of their own content, and of the files that they describe.

CHECKSUM = "record_sha256"
MODEL_FORMAT = 2  # of model.json; 1 had no checksum
LARGE = 1 << 26  # bytes of a file whose hash is remembered between processes
SETTLED = 2.0  # seconds without a change, after which a later change is sure to change a file's times


def record_digest(value: Mapping[str, Any]) -> str:
    """Hashes the content of a record, whatever its layout as text."""
    content = {key: item for key, item in value.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(path: Path, value: Mapping[str, Any], files: Sequence[Path] = ()) -> dict[str, Any]:
    """Writes a JSON record with its checksum. Returns what `read_record` would read.

    Args:
        path: of the record.
        value: its content.
        files: what it describes, already written; their sha256 go into the record under `files`, by name.
    """
    content = dict(value) | ({"files": {file.name: sha256(file) for file in files}} if files else {})
    write_json(path, {**content, CHECKSUM: record_digest(content)})
    return content


def read_record(path: Path, kind: type[Record] = Record) -> dict[str, Any]:
    """Reads a record and compares it with its checksum, which is left out of the result. Raises InputError."""
    content = _checked(path, read_json(path))
    _require(path, content, kind)
    return content


def _checked(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    content = {key: item for key, item in value.items() if key != CHECKSUM}
    if CHECKSUM not in value:
        raise InputError(f"{path}: holds no checksum, so another version of ddpm made it; make it again (dvc repro)")
    if value[CHECKSUM] != record_digest(content):
        raise InputError(
            f"{path}: its content is not what its checksum says: it was edited or damaged; restore it, or make it again"
            " (dvc repro)"
        )
    return content


def read_model_record(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's model.json. One of format 1, which had no checksum, is read as it is. Raises InputError."""
    path = folder / "model.json"
    about = read_json(path)
    if about.get("format") != 1 or CHECKSUM in about:
        about = _checked(path, about)
        if about.get("format") != MODEL_FORMAT:
            raise InputError(
                f"{folder}: checkpoint format {about.get('format')} is not {MODEL_FORMAT}; it was made by another version"
            )
    if not isinstance(about.get("weights_sha256"), str):
        raise InputError(f"{path}: holds no hash of the weights; train again or restore it")
    return about


def check_weights(folder: Path, about: Mapping[str, Any]) -> Path:
    """Compares model.safetensors with model.json. Returns its path. Raises InputError."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise InputError(f"{weights}: no such file; train again or restore it")
    if sha256(weights) != about["weights_sha256"]:
        raise InputError(
            f"{folder}: not a usable checkpoint: the checksum of model.safetensors is not the one in model.json; train"
            " again or restore it"
        )
    return weights


def read_trained(root: Path, schedule: str) -> dict[str, Any]:
    """Reads models/SCHEDULE/model.json. Raises InputError, also for another schedule's model."""
    folder = root / model_dir(schedule)
    about = read_model_record(folder)
    name = about["schedule"].get("name") if isinstance(about.get("schedule"), dict) else None
    if name != schedule:
        raise InputError(f"{folder}: holds the model of schedule '{name}'; train again or restore it (dvc repro)")
    return about


def read_described(record: Path, about: Mapping[str, Any], path: Path) -> Path:
    """Compares a file with the hash in the record that describes it.

    Args:
        record: where the record lies, for messages.
        about: its content.
        path: the file.

    Returns:
        `path`.

    Raises:
        InputError: the file is missing, or is not the one that was recorded.
    """
    _compare(record, about, path, sha256)
    return path


def read_report(root: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Reads the report, once all its files are those that front.json describes. Raises InputError.

    Returns:
        What best.json holds, and the rows of points.csv if front.json names it.
    """
    folder = root / report_dir()
    record = folder / "front.json"
    front = read_record(record)
    for name in front["files"]:
        read_described(record, front, folder / name)
    rows = read_csv(folder / "points.csv") if "points.csv" in front["files"] else []
    return read_record(folder / "best.json"), rows


def _compare(record: Path, about: Mapping[str, Any], path: Path, digest: Callable[[Path], str]) -> None:
    files = about.get("files")
    expected = files.get(path.name) if isinstance(files, dict) else None
    if not path.is_file():
        raise InputError(f"{path}: no such file; restore it, or make it again (dvc repro)")
    if expected is None or digest(path) != expected:
        raise InputError(f"{path}: not the file that {record} describes; restore it, or make it again (dvc repro)")


def _remembered_sha256(path: Path, memory: Path) -> str:
    """sha256 of a file. The hash of a large file is kept in the JSON file `memory` until the file changes."""
    about = path.stat()
    if about.st_size < LARGE:
        return sha256(path)
    key, version = str(path.resolve()), [about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    known: dict[str, Any] = {}
    with suppress(InputError):  # absent or damaged: it only saves time
        known = read_record(memory)
    entry = known.get(key)
    if isinstance(entry, list) and entry[:-1] == version:
        return str(entry[-1])
    digest = sha256(path)
    if time.time() - max(about.st_mtime, about.st_ctime) > SETTLED:
        with suppress(InputError, OSError):  # a full disk, or a checkout that can only be read
            write_record(memory, {**known, key: [*version, digest]})
    return digest


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same keys, in order. An absent value is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Raises InputError for a file that is no table."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, restkey="", restval=None))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as CSV: {error}; make it again (dvc repro)") from None
    for number, row in enumerate(rows, 2):
        if "" in row or None in row.values():
            raise InputError(f"{path}: row {number} has not as many cells as the first; make it again (dvc repro)")
    return rows


def sha256(path: Path) -> str:
    """Of a file's bytes, or of a folder's names and bytes."""
    if path.is_dir():
        total = hashlib.sha256()
        for item in sorted(item for item in path.rglob("*") if item.is_file()):
            total.update(f"{item.relative_to(path).as_posix()}\0{sha256(item)}\n".encode())
        return total.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Images.


def grid(images: Images, columns: int | None = None) -> Images:
    """uint8 N,C,H,W -> one uint8 C,H',W' picture, images side by side with a pixel between, small ones enlarged."""
    count, channels, height, width = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    scale = max(1, 64 // max(height, width))
    picture = np.full((channels, rows * (height * scale + 1) + 1, columns * (width * scale + 1) + 1), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = 1 + row * (height * scale + 1), 1 + column * (width * scale + 1)
        large = image.repeat(scale, axis=1).repeat(scale, axis=2)
        picture[:, top : top + height * scale, left : left + width * scale] = large
    return picture


def preview(samples: Images) -> Images:
    """The first PREVIEW samples as one picture."""
    return grid(samples[:PREVIEW])


def write_png(path: Path, picture: Images) -> None:
    """uint8 C,H,W with one or three channels."""
    from PIL import Image

    pixels = picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
    with replacing(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG", optimize=False)


# Datasets.


def _unreadable(error: Exception) -> str:
    """Why numpy cannot read a file, without its advice to run what may be in it."""
    why = " ".join(str(error).split()) or type(error).__name__
    if "pickled (object) data" in why:
        return "neither a numpy array nor a zip archive of them"
    objects = "allow_pickle" in why or "Python objects in dtype" in why
    return "Python objects, which are not read here" if objects else why


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset.

    train, test: uint8 N,C,H,W, memory-mapped. train_labels, test_labels: int64 N, or None.
    about: dataset.json: name, sha256 (of the arrays: the dataset's version), shape [C,H,W], counts {train, test},
    classes (list of names, or null), class_counts (training images of each, or null), mean and std per channel in 0..1,
    flip (whether mirrored images are still valid).
    """

    train: Images
    test: Images
    train_labels: NDArray[np.int64] | None
    test_labels: NDArray[np.int64] | None
    about: dict[str, Any]


def read_dataset(root: Path = Path()) -> Dataset:
    """The dataset that `prepare` wrote. Raises InputError."""
    folder = root / dataset_dir()
    about = read_dataset_record(root)

    def array(name: str, kind: type) -> Any:
        path = folder / f"{name}.npy"
        if not path.exists():
            return None
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # noqa: BLE001 - numpy raises half a dozen types on a damaged file
            raise ValueError(f"{path.name}: {_unreadable(error)}") from None
        if not isinstance(found, np.ndarray) or found.dtype != kind:
            raise ValueError(f"{path.name} holds no array of {kind.__name__}")
        return found

    try:
        images = array("train", np.uint8), array("test", np.uint8)
        labels = array("train-labels", np.int64), array("test-labels", np.int64)
        for split, *pair in zip(("train", "test"), images, labels, strict=True):
            _check_split(about, split, *pair)
        _check_arrays(root, about)
    except ValueError as error:
        raise InputError(f"{folder}: not a prepared dataset: {error}; run `ddpm prepare` again") from None
    return Dataset(*images, *labels, about)


def read_dataset_record(root: Path = Path()) -> dict[str, Any]:
    """Reads dataset.json. Raises InputError."""
    return read_record(root / dataset_dir() / "dataset.json", _About)


def _check_arrays(root: Path, about: Mapping[str, Any]) -> None:
    """Raises ValueError where an array is not the one that dataset.json describes."""
    folder, memory = root / dataset_dir(), root / CACHE / "verified.json"
    for path in sorted(folder.glob("*.npy")):
        if _remembered_sha256(path, memory) != about["files"].get(path.name):
            raise ValueError(f"{path.name}: its bytes are not those that dataset.json describes")


class _About(Record):
    """dataset.json."""

    name: str
    sha256: str
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=3, max_length=3)]
    counts: dict[Literal["train", "test"], Annotated[int, Field(ge=0)]]
    classes: list[str] | None
    class_counts: list[Annotated[int, Field(ge=0)]] | None = None
    mean: list[Annotated[float, Field(ge=0, le=1)]]
    std: list[Annotated[float, Field(ge=0, le=1)]]
    flip: bool
    files: dict[str, str]


def _check_split(about: dict[str, Any], split: str, images: Any, labels: Any) -> None:
    """Raises ValueError where a split is not what dataset.json says of it."""
    if images is None:
        raise ValueError(f"{split}.npy is missing")
    expected = (about["counts"].get(split), *about["shape"])
    if images.shape != expected:
        raise ValueError(f"{split}.npy has shape {images.shape}, dataset.json says {expected}")
    if (labels is None) != (about["classes"] is None):
        raise ValueError(
            f"{split}-labels.npy is {'missing' if labels is None else 'there, and dataset.json has no classes'}"
        )
    if labels is None:
        return
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{split}-labels.npy has shape {labels.shape}, for {len(images)} images")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(about["classes"]):
        raise ValueError(f"{split}-labels.npy has labels that are none of the {len(about['classes'])} classes")


@contextmanager
def writing_dataset(
    root: Path,
    shape: tuple[int, int, int],
    counts: tuple[int, int],
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    preview: Callable[[Dataset], Images],
) -> Iterator[Dataset]:
    """A new dataset of `counts` train and test images C,H,W: its arrays are zeros on disk, its `about` is empty.

    The block fills both. When it ends well the dataset, with `preview` of it as a picture, takes the place of the old
    one; when it doesn't, the old one stays. Raises InputError when there is no room on the disk.
    """
    with replacing_dir(root / dataset_dir()) as folder:
        train, test = (
            _new_array(folder / f"{split}.npy", (count, *shape))
            for split, count in zip(("train", "test"), counts, strict=True)
        )
        if labels is not None:
            for split, values in zip(("train", "test"), labels, strict=True):
                with (folder / f"{split}-labels.npy").open("wb") as file:
                    _write_array(file, values)
        train_labels, test_labels = labels or (None, None)
        dataset = Dataset(train, test, train_labels, test_labels, about={})
        yield dataset
        for array in (train, test):
            array.flush()  # type: ignore[attr-defined]
        dataset.about.update(write_record(folder / "dataset.json", dataset.about, sorted(folder.glob("*.npy"))))
        write_png(folder / "preview.png", preview(dataset))


def _write_array(file: IO[bytes], array: NDArray[Any]) -> None:
    """Writes the bytes of np.save, through `file`: on a full disk, numpy's own writing raises an error that has no errno."""
    np.lib.format.write_array(cast(IO[bytes], SimpleNamespace(write=file.write)), array, allow_pickle=False)


def _new_array(path: Path, shape: tuple[int, ...]) -> Images:
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:  # or a full disk would kill the process while it writes to the mapping
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise InputError(f"{path.name}: no room for {math.prod(shape):,} bytes: {error.strerror}") from None
    return array


# Sample sets.


def write_samples(
    path: Path,
    images: Images,
    evaluations: int,
    model: str,
    labels: NDArray[np.int64] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a sample set, one compressed file. The same images give the same bytes.

    Args:
        path: samples/POINT.npz.
        images: uint8 N,C,H,W.
        evaluations: of the network, for each image.
        model: sha256 of the network's weights.
        labels: int64 N, the class that each image was asked for, if any.
        settings: the parameters that the images were drawn with.
    """
    arrays: dict[str, NDArray[Any]] = {"images": images, "evaluations": np.asarray(evaluations, np.int64)}
    if labels is not None:
        arrays["labels"] = labels
    about: dict[str, Any] = {"point": path.stem, "model": model, "evaluations": int(evaluations)}
    about["settings"] = dict(settings or {})
    about["arrays"] = {name: _array_digest(array) for name, array in arrays.items()}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        text = json.dumps({**about, CHECKSUM: record_digest(about)}, indent=2)
        archive.writestr(zipfile.ZipInfo(RECORD), text, zipfile.ZIP_DEFLATED)
        for name, array in arrays.items():
            # Not numpy's savez: it asks for 64 bit sizes, whose header Python 3.11.2 writes otherwise than 3.11.7.
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED
            member.file_size = array.nbytes
            with archive.open(member, "w") as file:
                _write_array(file, array)


RECORD = "record.json"  # in a sample set


@dataclass(frozen=True)
class Samples:
    """A sample set.

    images: uint8 N,C,H,W. evaluations: of the network, for each image. model: sha256 of its weights. sha256: of all that the
    set holds, whatever the bytes of its archive.
    """

    images: Images
    evaluations: int
    model: str
    sha256: str


def read_samples(path: Path, dataset: Dataset | None = None) -> Samples:
    """Reads a sample set. Raises InputError, also where the images are unlike those of `dataset`."""
    with _sample_set(path) as (archive, about):
        shape = _declared(archive.zip)
        if dataset is not None and shape[1:] != dataset.train.shape[1:]:
            raise InputError(
                f"{path}: images of shape {list(shape[1:])}, the dataset's are {list(dataset.train.shape[1:])};"
                " train and sample again (dvc repro)"
            )
        images = archive["images"]
        if _array_digest(images) != about["arrays"].get("images"):
            raise ValueError(f"its images are not those that its {RECORD} describes")
        return Samples(images, about["evaluations"], about["model"], about[CHECKSUM])


def read_samples_record(path: Path) -> dict[str, Any]:
    """Reads what a sample set says of itself, without its images: point, model, settings, evaluations, and its hash as
    `record_sha256`.

    Raises InputError.
    """
    with _sample_set(path) as (_, about):
        return about


class _AboutSamples(Record):
    point: str
    model: str
    evaluations: Annotated[int, Field(ge=1)]
    settings: dict[str, Any]
    arrays: dict[str, str]


@contextmanager
def _sample_set(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        archive = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            yield archive, _samples_record(path, archive)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such sample set; make it with `ddpm sample {path.stem}`") from None
    except Exception as error:  # noqa: BLE001 - numpy and zipfile raise a dozen types on a damaged archive
        raise InputError(
            f"{path}: not a sample set: {_unreadable(error)}; make it again with `ddpm sample {path.stem}`"
        ) from None


def _samples_record(path: Path, archive: Any) -> dict[str, Any]:
    if RECORD not in archive.files:
        raise ValueError(f"no {RECORD} in it: another version of ddpm made it")
    value = json.loads(archive[RECORD], parse_constant=_no_constant)
    if not isinstance(value, dict) or value.get(CHECKSUM) != record_digest(value):
        raise ValueError(f"its {RECORD} is not what its checksum says")
    try:
        _AboutSamples.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{RECORD}: {one_line(error)}") from None
    if value["point"] != path.stem:
        raise ValueError(f"it holds the images of {value['point']}")
    return value


def _declared(archive: Any) -> tuple[int, ...]:
    """The shape of images.npy, if it holds that much, before room is made for it. Raises ValueError, KeyError."""
    with archive.open("images.npy") as file:
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, kind = readers[np.lib.format.read_magic(file)](file)
        start = file.tell()
    if kind != np.uint8 or len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"expected images of uint8 N,C,H,W, found {kind} {shape}")
    if archive.getinfo("images.npy").file_size != start + math.prod(shape):
        raise ValueError(f"images.npy does not hold the {shape} that it declares")
    return tuple(shape)


class KeptImages:
    """Images N,C,H,W of a sampling under way, on disk below `folder`, so that memory stays bounded whatever their number.

    batches: the network evaluations of each finished batch, by its first image; after a kill too, if the key and the shape
    are the same and their checksums hold. What another key left in the folder is removed. As a context it gives the array.
    Raises InputError when there is no room on the disk.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, ...]) -> None:
        self._folder, self._log = folder, folder / "batches.jsonl"
        self.batches: dict[int, int] = {}
        about, array, content = folder / "about.json", folder / "images.npy", {"key": key, "shape": list(shape)}
        try:
            if read_json(about) != content:
                raise ValueError("of another sampling")
            self._images: Images = np.lib.format.open_memmap(array, mode="r+")
        except (InputError, ValueError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._images = _new_array(array, shape)
            write_json(about, content)  # last: whoever finds it finds the array
        for line in self._log.read_bytes().splitlines() if self._log.exists() else []:
            try:
                entry = json.loads(line)
                start, stop = entry["batch"]
                if self._entry(range(start, stop), entry["evaluations"]) == entry:
                    self.batches[start] = entry["evaluations"]
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill: that batch is made again

    def __enter__(self) -> Images:
        return self._images

    def __exit__(self, *_: object) -> None:
        del self._images

    def keep(self, batch: range, evaluations: int) -> None:
        """The images of that batch are made: from now on a kill doesn't cost them."""
        assert isinstance(self._images, np.memmap)
        self._images.flush()
        entry = self._entry(batch, evaluations)
        with disk_full_is_one_line(self._log), self._log.open("ab") as file:
            file.write(f"\n{json.dumps(entry)}\n".encode())  # the first line break ends what a kill cut off
            file.flush()
            os.fsync(file.fileno())
        self.batches[batch.start] = evaluations

    def _entry(self, batch: range, evaluations: int) -> dict[str, Any]:
        """What the log says of a finished batch."""
        digest = hashlib.sha256(f"{batch.start} {batch.stop} {evaluations}".encode())
        digest.update(np.ascontiguousarray(self._images[batch.start : batch.stop]).data)
        return {"batch": [batch.start, batch.stop], "evaluations": evaluations, "sha256": digest.hexdigest()}

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _array_digest(array: NDArray[Any]) -> str:
    """Hashes an array's type, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# Cached arrays.


def write_arrays(path: Path, key: str, **arrays: Any) -> None:
    """Writes named arrays in one file, with a checksum of them and of `key`, which names what they are."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, sha256=np.asarray(_arrays_digest(key, arrays)))


def read_arrays(path: Path, key: str) -> dict[str, NDArray[Any]]:
    """Reads what write_arrays wrote. Raises InputError when the file is missing, damaged or of another key."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        if str(arrays.pop("sha256")) != _arrays_digest(key, arrays):
            raise ValueError("its arrays are not those of its checksum")
    except Exception as error:  # noqa: BLE001 - numpy and zipfile raise a dozen types on a damaged archive
        raise InputError(f"{path}: not readable: {_unreadable(error)}") from None
    return arrays


def _arrays_digest(key: str, arrays: Mapping[str, Any]) -> str:
    parts = {name: _array_digest(np.asarray(array)) for name, array in arrays.items()}
    return record_digest({"key": key, **parts})


# Influence values.


def read_point_influence(root: Path, point: Point, scores: Mapping[str, Any]) -> NDArray[np.float32]:
    """Reads the influence values of a point, those that its scores were recorded with. Raises InputError."""
    path = root / influence_file(point)
    files = scores.get("files")
    return read_influence(path, str(files.get(path.name)) if isinstance(files, dict) else "")


def write_influence(path: Path, influence: NDArray[np.floating]) -> None:
    """float32 [N], in the order of the images."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        _write_array(file, influence.astype(np.float32))


def read_influence(path: Path, digest: str) -> NDArray[np.float32]:
    """Reads influence values whose file has that sha256. Raises InputError."""
    try:
        if path.is_file() and sha256(path) != digest:
            raise ValueError("its bytes are not those that were recorded with the scores")
        influence: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(influence, np.ndarray) or influence.dtype != np.float32 or influence.ndim != 1:
            raise ValueError("expected float32 values, one per image")
        influence = np.array(influence)
        if not np.isfinite(influence).all():
            raise ValueError("not all values are finite")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `ddpm evaluate` writes it beside the scores") from None
    except Exception as error:  # noqa: BLE001 - numpy raises half a dozen types on a damaged file
        raise InputError(
            f"{path}: not the influence values of a point: {_unreadable(error)}; evaluate it again"
        ) from None
    return influence


# What DVC knows.


def dvc_lock(root: Path) -> dict[str, Any]:
    """The stages of dvc.lock, or nothing. Not to be changed: who asks again gets the same."""
    path = root / "dvc.lock"
    if not path.exists():
        return {}
    about = path.stat()
    return _dvc_lock(path.resolve(), about.st_ino, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=1)
def _dvc_lock(path: Path, *version: int) -> dict[str, Any]:
    lock = read_yaml(path)
    stages = (lock or {}).get("stages") if isinstance(lock or {}, dict) else lock
    if not isinstance(stages or {}, dict):
        raise InputError(f"{path}: expected DVC's stages; bring it back with git")
    return dict(stages or {})


def locked_md5(stages: Mapping[str, Any], stage: str, kind: str, path: Path) -> str | None:
    """The hash that dvc.lock holds for a stage's "outs" or "deps" at that path."""
    entries = stages.get(stage, {}).get(kind, [])
    return next((entry.get("md5") for entry in entries if entry.get("path") == path.as_posix()), None)


def is_locked(stages: Mapping[str, Any], stage: str, root: Path, path: Path) -> bool:
    """Whether an output of a stage is the very file that dvc.lock speaks of, so that DVC's cache has it too."""
    recorded = locked_md5(stages, stage, "outs", path)
    if recorded is None or not (root / path).is_file():
        return False
    with (root / path).open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == recorded
