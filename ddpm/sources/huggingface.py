"""Reads a dataset of the Hugging Face Hub, or its local copy, with the library `datasets` (the extra `huggingface`).

`data.path` names the local copy: a folder of parquet files, a single parquet file, or a folder that `save_to_disk` wrote.
Alternatively `data.hub` names a dataset of the Hub and its commit: NAME@COMMIT. Without the commit, the same params.yaml could
give different images later.

The types of the columns tell which column holds the images and which, if any, holds the class labels. Without a test split, the
split `validation` becomes the test split. Images are decoded as in `image_folder`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm.errors import InputError
from ddpm.files import paths
from ddpm.files.arrays import Images
from ddpm.parameters import Data
from ddpm.runtime.progress import Progress, Report
from ddpm.sources import decoding, encoded
from ddpm.sources.source import Contents, Labels, Source, held_out

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, TESTS = "train", ("test", "validation")  # the splits in use; the first existing split of TESTS is the test split
COPY = "keep the part you want in a local copy: load_dataset(...) of the library `datasets`, {}, save_to_disk(FOLDER)"


def _open(data: Data, seed: int, root: Path, report: Report) -> Contents:
    where = data.place
    scratch = root / paths.CACHE / "huggingface"  # for the library's arrow files, which are needed only once
    report(Progress(0, 1, "images", message=f"opening {where}"))
    splits = _splits(_load(data, root, scratch), where)
    image, label = _columns(splits, where)
    labels = (
        None if label is None else np.concatenate([_labels(each, label, where, name) for name, each in splits.items()])
    )
    classes = None if label is None else tuple(_class_names(splits, label, where))
    files = _Rows(splits, image, (root / data.path, scratch, *_hub_caches(data)))
    message = f"{where}: images of the column {image}, {'no classes' if label is None else f'classes of {label}'}"
    report(Progress(0, len(files), "images", message=message))

    def assign(names: list[str]) -> encoded.Assignment:
        if len(splits) == 1:
            is_test = held_out(names, data.test_fraction, seed)
        else:
            is_test = np.array([not name.startswith(f"{TRAIN}[") for name in names])
        chosen = None if labels is None else labels[[files.row(name) for name in names]]
        return encoded.Assignment(is_test, classes, chosen)

    found = encoded.contents(data, files, assign, where, report)

    def fill(train: Images, test: Images) -> None:
        found.fill(train, test)
        shutil.rmtree(scratch, ignore_errors=True)

    return replace(found, fill=fill)


# Opening.


def _load(data: Data, root: Path, scratch: Path) -> Any:
    """Loads the dataset as a Dataset or a DatasetDict of the library. Raises InputError."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            "data.source: huggingface takes the package `datasets`: pip install 'ddpm[huggingface]'"
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
    path = (root / data.path).resolve()
    try:
        if data.hub is not None:
            name, _, revision = data.hub.partition("@")
            return datasets.load_dataset(name, revision=revision, cache_dir=str(scratch))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if files := _parquet_files(path):
            named = ("parquet", None, None, files) if path.is_file() else (str(path),)
            return datasets.load_dataset(*named, cache_dir=str(scratch))
    except Exception as error:  # noqa: BLE001 - the library raises two dozen types of its own, of pyarrow and of three HTTP clients
        advice = "name a dataset and a commit of the Hub, or download a copy and name its folder in data.path"
        advice = advice if data.hub else "download it again"
        raise InputError(f"{data.place}: not readable: {_one_line(error)}; {advice}") from None
    raise InputError(
        f"{data.path}: no parquet files there, and no dataset that save_to_disk wrote;"
        " set data.path to a local copy of a dataset, or data.hub to the NAME@COMMIT of a dataset on the Hub"
    )


def _hub_caches(data: Data) -> list[Path]:
    """Returns the folders where the library keeps files of the Hub. Some datasets of the Hub are image files in these folders."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(HF_HUB_CACHE)] if data.hub else []


def _parquet_files(path: Path) -> list[str]:
    found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    return [str(file) for file in found if file.suffix == ".parquet"]


def _one_line(error: BaseException) -> str:
    """Returns the innermost error in one line, since the library wraps the cause in further errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


# Choosing rows and columns.


def _splits(dataset: Any, where: str) -> dict[str, Dataset]:
    """Returns the splits to use: train and test in this order, or a single split. Raises InputError."""
    splits: dict[str, Dataset] = dict(dataset) if isinstance(dataset, dict) else {TRAIN: dataset}
    test = next((name for name in TESTS if name in splits), "")
    if len(splits) == 1:
        return splits
    if splits.keys() <= {TRAIN, *TESTS} and TRAIN in splits:
        return {TRAIN: splits[TRAIN], test: splits[test]}
    named = decoding.shown(", ".join(splits)) or "none"
    raise InputError(
        f"{where}: its splits are {named}; expected train and test, train and validation, or a single split;"
        f" {COPY.format('DatasetDict(train=..., test=...)')}"
    )


def _columns(splits: Mapping[str, Dataset], where: str) -> tuple[str, str | None]:
    """Returns the names of the image column and, if there are classes, of the label column. Raises InputError."""
    from datasets import ClassLabel, Image

    features = next(iter(splits.values())).features
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    images = typed or [name for name, feature in features.items() if _is_encoded(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(images) != 1 or len(labels) > 1:
        kind, found = ("images", images) if len(images) != 1 else ("class labels", labels)
        raise InputError(
            f"{where}: {decoding.counted(len(found), 'column')} of {kind} among"
            f" {decoding.shown(', '.join(features))}: {decoding.shown(', '.join(found)) or 'none'}; expected one;"
            f" {COPY.format('remove_columns(...)')}"
        )
    return images[0], labels[0] if labels else None


def _is_encoded(feature: Any) -> bool:
    """Returns whether a column without the type Image holds files: their bytes, or a struct of bytes and path."""
    if isinstance(feature, dict):
        return feature.keys() <= {"bytes", "path"} and _is_encoded(feature.get("bytes"))
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _class_names(splits: Mapping[str, Dataset], label: str, where: str) -> list[str]:
    first, *others = (each.features[label].names for each in splits.values())
    if any(names != first for names in others):
        raise InputError(
            f"{where}: the splits have different classes in the column {label}; give all splits the same classes"
        )
    return list(first)


def _labels(split: Dataset, label: str, where: str, name: str) -> Labels:
    """Returns the labels of a split, int64 [N]. Raises InputError if a row has no label. where, name: for the message."""
    values = np.array(split[label][:], float)  # None becomes NaN
    unknown = ~(values >= 0)
    if unknown.any():
        raise InputError(
            f"{where}: {decoding.counted(int(unknown.sum()), 'row')} of the split {name} without a class"
            f" in the column {label}; {COPY.format(f'filter(...) or remove_columns({label!r})')}"
        )
    return values.astype(np.int64)


class _Rows(Mapping[str, decoding.Read]):
    """Maps SPLIT[ROW] to a function that reads this image. Makes each function on request: a million functions take 400 MB.

    Args:
        splits: the splits to use.
        image: the name of the column of images.
        folders: an image that is a file must lie in one of these folders.
    """

    def __init__(self, splits: Mapping[str, Dataset], image: str, folders: tuple[Path, ...]) -> None:
        from datasets import Image

        self._splits, self._image, self._starts, self._count = dict[str, Any](), image, dict[str, int](), 0
        self._folders = [folder.resolve() for folder in folders]
        for name, split in splits.items():
            kept = split.select_columns([image]).with_format(None)
            typed = isinstance(split.features[image], Image)
            self._splits[name] = kept.cast_column(image, Image(decode=False)) if typed else kept
            self._starts[name], self._count = self._count, self._count + len(split)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (f"{name}[{row}]" for name, split in self._splits.items() for row in range(len(split)))

    def __getitem__(self, name: str) -> decoding.Read:
        return partial(self._read, *self._place(name))

    def row(self, name: str) -> int:
        """Returns the index of an image, counted over all splits."""
        split, row = self._place(name)
        return self._starts[split] + row

    def _place(self, name: str) -> tuple[str, int]:
        found = re.fullmatch(r"(.*)\[(\d+)\]", name, re.DOTALL)
        if found is None:
            raise KeyError(name)
        return found[1], int(found[2])

    def _read(self, split: str, row: int) -> bytes:
        value = self._splits[split][row][self._image]
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is not None:
            return bytes(content)
        if path is None:
            raise ValueError("no image")
        file = Path(path).resolve()
        # protects: tests/sources/test_huggingface.py::test_a_row_names_no_file_elsewhere
        if not any(file.is_relative_to(folder) for folder in self._folders):
            raise ValueError(f"the row holds no image, and its file {decoding.shown(path)} lies outside the dataset")
        return decoding.read_file(file)


SOURCE = Source(
    _open,
    licence="a dataset of the Hugging Face Hub; its page there names its licence",
    flip=True,  # only users know whether their images may be mirrored: training.flip decides
    any_images=True,
)
