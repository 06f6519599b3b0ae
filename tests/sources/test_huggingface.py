"""Checks the source `huggingface`: three forms of local copies, a dataset of a local Hub, and every refusal."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pictures

from ddpm.errors import InputError
from ddpm.files.dataset import Dataset, read_dataset
from ddpm.files.params import Params
from ddpm.stages.prepare import prepare

datasets = pytest.importorskip("datasets", reason="the extra `huggingface` is not installed")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.timeout(300)

Smoke = Callable[..., Params]
CLASSES = ["cat", "dog", "eel"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def picture(index: int, side: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(index).integers(0, 256, (side, side, 3), np.uint8)


def encoded(index: int, side: int = 8) -> bytes:
    file = io.BytesIO()
    Pictures.fromarray(picture(index, side)).save(file, "PNG")
    return file.getvalue()


def rows(start: int, end: int, **columns: list[Any]) -> Any:
    """Returns rows with images and labels, as datasets of the Hub have them."""
    typed = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    content = {
        "image": [{"bytes": encoded(index), "path": f"{index}.png"} for index in range(start, end)],
        "label": [index % 3 for index in range(start, end)],
    }
    features = datasets.Features({**typed, **{name: datasets.Image() for name in columns}})
    return datasets.Dataset.from_dict({**content, **columns}, features=features)


def both() -> Any:
    return datasets.DatasetDict(train=rows(0, 9), test=rows(9, 12))


def as_parquet(splits: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))


def made(root: Path, smoke: Smoke, path: str = "copy", **data: Any) -> Dataset:
    prepare(smoke(data={"source": "huggingface", "path": path, **data}), root)
    return read_dataset(root)


def refused(root: Path, smoke: Smoke, **data: Any) -> str:
    with pytest.raises(InputError) as caught:
        made(root, smoke, **data)
    message = str(caught.value)
    assert message.isprintable() and not (root / "dataset").exists()
    return message


def is_right(dataset: Dataset, train: range, test: range) -> None:
    for images, labels, indices in (
        (dataset.train, dataset.train_labels, train),
        (dataset.test, dataset.test_labels, test),
    ):
        assert np.array_equal(images, [picture(index).transpose(2, 0, 1) for index in indices])
        assert labels is not None and labels.tolist() == [index % 3 for index in indices]
    assert dataset.record.classes == CLASSES


# Columns, labels and splits.


def test_a_folder_of_parquet_files(tmp_path: Path, smoke: Smoke) -> None:
    as_parquet(both(), tmp_path / "copy")
    is_right(made(tmp_path, smoke), range(9), range(9, 12))
    assert not (tmp_path / ".cache/huggingface").exists()


def test_a_folder_of_save_to_disk_whose_test_split_is_called_validation(tmp_path: Path, smoke: Smoke) -> None:
    datasets.DatasetDict(validation=rows(9, 12), train=rows(0, 9)).save_to_disk(str(tmp_path / "copy"))
    is_right(made(tmp_path, smoke), range(9), range(9, 12))


def test_a_third_split_is_left_out(tmp_path: Path, smoke: Smoke) -> None:
    as_parquet({**both(), "validation": rows(12, 15)}, tmp_path / "copy")
    is_right(made(tmp_path, smoke), range(9), range(9, 12))


def test_files_that_other_tools_wrote_hold_bytes_and_no_classes(tmp_path: Path, smoke: Smoke) -> None:
    """The columns and their types have other names than those of the library. A fraction is held out, as in a folder."""
    import pyarrow as pa

    (tmp_path / "folder").mkdir()
    for index in range(10):
        (tmp_path / f"folder/{index}.png").write_bytes(encoded(index))
    pixels = [{"bytes": encoded(index), "path": f"{index}.png"} for index in range(10)]
    for name, values in (("struct", pixels), ("plain", [each["bytes"] for each in pixels])):
        pq.write_table(pa.table({"caption": ["a picture"] * 10, "picture": values}), tmp_path / f"{name}.parquet")
        dataset = made(tmp_path, smoke, f"{name}.parquet", test_fraction=0.3, size=4, fit="resize", channels=1)
        assert dataset.train_labels is None and (len(dataset.train), len(dataset.test)) == (7, 3)
        found = sorted(image.tobytes() for split in (dataset.train, dataset.test) for image in split)
        prepare(
            smoke(data={"path": "folder", "source": "image_folder", "size": 4, "fit": "resize", "channels": 1}),
            tmp_path,
        )
        folder = read_dataset(tmp_path)
        assert found == sorted(image.tobytes() for split in (folder.train, folder.test) for image in split)


def test_images_are_converted_and_left_out_as_those_of_a_folder(tmp_path: Path, smoke: Smoke) -> None:
    """Row 3 names a pipe that nobody writes to, and row 5 holds no image."""
    import pyarrow as pa

    (tmp_path / "copy").mkdir()
    os.mkfifo(tmp_path / "copy/pipe.png")
    values: list[Any] = []
    for index in range(8):
        file = io.BytesIO()
        Pictures.fromarray(picture(index)).quantize(256).save(file, "PNG")
        values.append({"bytes": file.getvalue(), "path": None})
    values[3], values[5] = {"bytes": None, "path": str(tmp_path / "copy/pipe.png")}, None
    typed = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": typed}), tmp_path / "copy/train.parquet")

    assert "; data.convert: true converts some of them" in refused(tmp_path, smoke, unusable="skip")
    message = refused(tmp_path, smoke, convert=True)
    assert "2 of 8 images cannot be used: train[3] (not a regular file), train[5] (no image); " in message
    assert message.endswith("; repair or remove them, or leave them out with data.unusable: skip")
    dataset = made(tmp_path, smoke, convert=True, unusable="skip", test_fraction=0.0)
    left = [picture(index).transpose(2, 0, 1) for index in (0, 1, 2, 4, 6, 7)]
    assert np.abs(dataset.train.astype(int) - left).max() <= 8  # 64 pixels have 64 colours, which quantize() rounds
    listed = (tmp_path / "dataset/unusable.csv").read_text()
    assert listed == "path,reason\ntrain[3],not a regular file\ntrain[5],no image\n"


def test_the_page_s_way_to_choose_among_columns(tmp_path: Path, smoke: Smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset with two columns of classes is refused. After the snippet of docs/huggingface.md, it is accepted."""
    as_parquet({"train": two_labels().rename_columns({"coarse": "fine_label"})}, tmp_path / "hub")
    assert "2 columns of class labels" in refused(tmp_path, smoke, path="hub")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/huggingface.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```\n(from datasets.*?)```", page, re.DOTALL)
    assert '"uoft-cs/cifar100"' in code
    exec(code.replace("uoft-cs/cifar100", "hub"), {"COMMIT": COMMIT})
    assert made(tmp_path, smoke, path="cifar100").record.classes == CLASSES


# Refusals.


def without(column: str) -> Any:
    return rows(0, 4).remove_columns(column)


def unlabelled() -> Any:
    return rows(0, 4).map(lambda row, index: {"label": -1 if index == 2 else row["label"]}, with_indices=True)


def two_labels() -> Any:
    return rows(0, 4).add_column("coarse", [0, 1, 0, 1]).cast_column("coarse", datasets.ClassLabel(names=["a", "b"]))


FORMS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no images": (lambda: {"train": without("image")}, "copy: 0 columns of images among label: none; expected one; "),
    "two columns of images": (
        lambda: {"train": rows(0, 2, mask=[{"bytes": encoded(1), "path": None}] * 2)},
        "copy: 2 columns of images among image, label, mask: image, mask; expected one; ",
    ),
    "two columns of classes": (
        lambda: {"train": two_labels()},
        "copy: 2 columns of class labels among image, label, coarse: label, coarse; expected one; ",
    ),
    "splits of unknown meaning": (
        lambda: {"train": rows(0, 3), "test": rows(3, 6), "extra": rows(6, 9)},
        "copy: its splits are train, test, extra; expected train and test, train and validation, or a single split; ",
    ),
    "classes that differ": (
        lambda: {
            "train": rows(0, 3),
            "test": rows(3, 6).cast_column("label", datasets.ClassLabel(names=["x", "y", "z"])),
        },
        "copy: the splits have different classes in the column label; ",
    ),
    "a row without a class": (
        lambda: {"train": unlabelled()},
        "copy: 1 row of the split train without a class in the column label; ",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_could_mean_several_things(form: str, tmp_path: Path, smoke: Smoke) -> None:
    build, start = FORMS[form]
    datasets.DatasetDict(build()).save_to_disk(str(tmp_path / "copy"))
    assert refused(tmp_path, smoke).startswith(start)


def test_images_that_do_not_fit_are_named_by_split_and_row(tmp_path: Path, smoke: Smoke) -> None:
    train = datasets.Dataset.from_dict({"image": [encoded(0), encoded(1, side=16), None, encoded(3)]})
    train.save_to_disk(str(tmp_path / "copy"))
    message = refused(tmp_path, smoke)
    assert message.startswith(
        "copy: 2 of 4 images cannot be used: train[1] (16x16 instead of 8x8), train[2] (no image); "
    )


def test_a_row_names_no_file_elsewhere(tmp_path: Path, smoke: Smoke) -> None:
    import pyarrow as pa

    (tmp_path / "copy").mkdir()
    for name in ("secret.png", "copy/mine.png"):
        (tmp_path / name).write_bytes(encoded(1))
    inside, outside = (
        {"bytes": None, "path": str(tmp_path / name)} for name in ("copy/mine.png", "copy/../secret.png")
    )
    for values in ([inside, inside], [inside, outside]):
        typed = pa.array(values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"image": typed}), tmp_path / "copy/train.parquet")
        if outside not in values:
            assert np.array_equal(made(tmp_path, smoke, test_fraction=0.0).train[1], picture(1).transpose(2, 0, 1))
            continue
        with pytest.raises(
            InputError,
            match=r"1 of 2 images cannot be used: train\[1\] \(the row holds no image, and its file .* lies outside the dataset",
        ):
            made(tmp_path, smoke, test_fraction=0.0)


def test_a_file_that_is_cut_off_and_a_folder_of_something_else(tmp_path: Path, smoke: Smoke) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/notes.txt").write_text("nothing")
    assert refused(tmp_path, smoke).startswith(
        "copy: no parquet files there, and no dataset that save_to_disk wrote; set data.path to "
    )
    rows(0, 4).to_parquet(str(tmp_path / "copy/train.parquet"))
    content = (tmp_path / "copy/train.parquet").read_bytes()
    (tmp_path / "copy/train.parquet").write_bytes(content[:-20])
    message = refused(tmp_path, smoke)
    assert message.startswith("copy: not readable: ") and message.endswith("; download it again")


def test_without_the_library(tmp_path: Path, smoke: Smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refused(tmp_path, smoke).endswith("takes the package `datasets`: pip install 'ddpm[huggingface]'")


@pytest.mark.parametrize(
    "name", ["me/pictures", "me/pictures@main", f"me/../pictures@{COMMIT}", f"me/pictures@{COMMIT[1:]}"]
)
def test_a_dataset_of_the_hub_without_a_commit_could_change(name: str, smoke: Smoke) -> None:
    with pytest.raises(InputError, match=r"data\.hub: expected NAME@COMMIT"):
        smoke(data={"source": "huggingface", "hub": name})


# The Hub.


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers the library's requests as the Hub does, for a single dataset in `folder`."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        path, api = unquote(urlsplit(self.path).path), "/api/datasets/me/pictures"
        names = sorted(file.name for file in self.folder.iterdir())
        if path in (f"{api}/revision/{COMMIT}", api):
            about = {"id": "me/pictures", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(200, json.dumps(about).encode())
        if path == f"{api}/tree/{COMMIT}":
            return self.answer(200, json.dumps([self.entry(name) for name in names]).encode())
        name = path.removeprefix(f"/datasets/me/pictures/resolve/{COMMIT}/")
        if name in names:
            tag = {"ETag": f'"{self.entry(name)["oid"]}"', "X-Repo-Commit": COMMIT}
            return self.answer(200, (self.folder / name).read_bytes(), tag)
        self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound" if "me/pictures" in path else "RepoNotFound"})

    do_HEAD = do_GET

    def entry(self, name: str) -> dict[str, Any]:
        content = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a Hub on this machine, with both() as me/pictures. Child processes use this Hub too."""
    as_parquet(both(), tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"folder": tmp_path / "hub"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield f"me/pictures@{COMMIT}"
    server.shutdown()
    server.server_close()


def test_a_dataset_of_the_hub_is_a_stage_of_dvc_like_any_other(copied: Any, hub: str) -> None:
    """data.path remains an existing folder, and the commit is a parameter of the stage."""
    copied.edit("source: digits\n", f"source: huggingface\n  hub: {hub}\n")
    copied.dvc("repro", "prepare")
    is_right(read_dataset(copied.root), range(9), range(9, 12))
    assert "didn't change, skipping" in copied.dvc("repro", "prepare")
    for name in (f"me/pictures@{COMMIT[::-1]}", f"me/unknown@{COMMIT}"):
        copied.edit(f"hub: {hub}\n", f"hub: {name}\n")
        done = copied.run(sys.executable, "-B", "-m", "ddpm", "prepare")
        (*_, line) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith(f"ddpm: {name}: not readable: "), done.stderr
        copied.edit(f"hub: {name}\n", f"hub: {hub}\n")


def test_without_a_network_it_is_one_line(copied: Any, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    copied.edit("source: digits\n", f"source: huggingface\n  hub: {hub}\n")
    done = copied.run(sys.executable, "-B", "-m", "ddpm", "prepare")
    (*_, line) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"ddpm: {hub}: not readable: "), done.stderr
    assert line.endswith("or download a copy and name its folder in data.path")
