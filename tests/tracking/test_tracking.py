"""Checks publishing to MLflow: everything is there once, on a database or a real server, and work continues without a server."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from ruamel.yaml import YAML

from ddpm import tracking
from ddpm.databases import mlflow_page
from ddpm.errors import InputError
from ddpm.files import checkpoint, paths, records
from ddpm.files.models import read_model_record
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.runtime.progress import Progress
from ddpm.stages.likelihood import likelihood
from ddpm.stages.train import train
from ddpm.tools.schedules import schedules
from ddpm.tracking import place, runs, streaming
from ddpm.tracking.publish import publishing
from flows import links

Smoke = Callable[..., Params]
Scores = Callable[..., None]

POINT = Point(schedule="cosine", sampler="ddim", steps=5)


@pytest.fixture
def params(smoke: Smoke) -> Params:
    return smoke(training={"steps": 24})


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_warned", set())


class Seen:
    """All content of a store about one experiment, as clients see it."""

    def __init__(self, root: Path, name: str = "ddpm-digits") -> None:
        self.client = MlflowClient(tracking.tracking_uri(root))
        experiment = self.client.get_experiment_by_name(name)
        assert experiment is not None
        self.experiment = experiment.experiment_id
        self.runs = list(self.client.search_runs([self.experiment]))
        self.models = list(self.client.search_logged_models([self.experiment]))

    def named(self, name: str) -> Run:
        (run,) = [run for run in self.runs if run.info.run_name == name]
        return self.client.get_run(run.info.run_id)

    def history(self, run: Run, key: str) -> list[tuple[int, float, int]]:
        history = self.client.get_metric_history(run.info.run_id, key)
        return sorted((metric.step, metric.value, metric.timestamp) for metric in history)

    def files(self, run: Run, folder: str = "") -> list[str]:
        found = []
        for file in self.client.list_artifacts(run.info.run_id, folder or None):
            found += self.files(run, file.path) if file.is_dir else [file.path]
        return sorted(found)

    def everything(self, ids: bool = True) -> Any:
        """Returns a value to compare. ids: includes values that MLflow draws at random."""
        names = {run.info.run_id: run.info.run_name for run in self.runs}
        found = []
        for run in self.runs:
            tags = dict(run.data.tags)
            if not ids and "mlflow.parentRunId" in tags:
                tags["mlflow.parentRunId"] = names[tags["mlflow.parentRunId"]]
            files = self.files(run)
            if not ids:
                files = sorted("+".join(name.split("+")[:5]) + Path(name).suffix for name in files)
            inputs = [
                (item.dataset.digest, sorted((tag.key, tag.value) for tag in item.tags))
                for item in run.inputs.dataset_inputs
            ]
            found.append(
                (
                    run.info.run_name,
                    run.info.run_id if ids else "",
                    run.info.status,
                    run.info.start_time,
                    run.info.end_time,
                    sorted(run.data.params.items()),
                    sorted(tags.items()),
                    [(key, self.history(run, key)) for key in sorted(run.data.metrics)],
                    files,
                    inputs,
                )
            )
        models = [
            (model.name, model.model_id if ids else "", sorted(model.tags.items()), str(model.status))
            for model in self.models
        ]
        return sorted(found), sorted(models)


def curves(root: Path) -> dict[str, list[tuple[int, float]]]:
    rows = records.read_csv(root / paths.history_file("cosine"))
    keys = ("loss", "learning_rate", "gradient_norm", "validation_loss")
    return {key: [(int(row["step"]), float(row[key])) for row in rows if row[key]] for key in keys}


def assert_complete(seen: Seen, root: Path, params: Params) -> None:
    """Asserts that every value on disk is in the store once, and that nothing else is."""
    assert all(run.info.status == "FINISHED" and runs.PUBLISHER not in run.data.tags for run in seen.runs)
    training = seen.named("cosine")
    assert training.info.status == "FINISHED"
    for key, values in curves(root).items():
        assert [(step, value) for step, value, _ in seen.history(training, key)] == values
    for key in ("loss_simple", "loss_vlb"):
        rows = records.read_csv(root / paths.losses_by_time_file("cosine"))
        found = [(step, value) for step, value, _ in seen.history(training, f"by_time/{key}")]
        assert found == [(int(row["t"]), float(row[key])) for row in rows] and len(found) == 10
    for sampler in params.sweep.samplers:
        run = seen.named(f"cosine-{sampler}")
        assert run.data.tags["mlflow.parentRunId"] == training.info.run_id
        scores = [
            records.read_record(root / paths.metrics_file(point))
            for point in params.points()
            if point.sampler == sampler
        ]
        for key in ("fid", "kid", "precision", "recall"):
            expected = sorted((entry["evaluations"], entry[key]) for entry in scores)
            assert [(step, value) for step, value, _ in seen.history(run, key)] == expected
        images = [Path(name).name for name in seen.files(run, "images")]
        steps = Counter(int(name.split("+")[2]) for name in images if name.endswith(".png"))
        assert steps == {0: 1} | {entry["evaluations"]: 1 for entry in scores}  # step 0 holds real images


# The place of the store.


def test_the_store_lies_at_the_root_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    experiment = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    experiment.mkdir(parents=True)
    assert tracking.tracking_uri(experiment) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking.tracking_uri(experiment) == "http://127.0.0.1:1"


ODD = {"b#c é": "a b#c é", "quotes": 'it\'s "so"', "a percent sign": "50%20x", "a question mark": "why?x=1"}


@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
@pytest.mark.parametrize("new", [False, True], ids=["a database", "no database"])
def test_a_folder_with_odd_characters(checkout: Path, params: Params, name: str, new: bool) -> None:
    """The database has no experiment 0 yet. Creating that experiment must quote the folder's name correctly."""
    root = checkout.rename(checkout.with_name(name))
    if new:
        (root / "mlflow.db").unlink()
    tracking.publish(params, root)
    assert_complete(Seen(root), root, params)
    assert {path.name for path in root.parent.iterdir()} == {root.name}
    assert (root / "mlartifacts").is_dir()


def test_many_processes_prepare_one_store(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fork = multiprocessing.get_context("fork")
    together, answers = fork.Barrier(4), fork.Queue()

    def prepare() -> None:
        together.wait()
        answers.put(tracking.prepare_store(params, tmp_path))

    processes = [fork.Process(target=prepare) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 4
    (experiment,) = {answers.get(timeout=5) for _ in processes}
    found = MlflowClient(tracking.tracking_uri(tmp_path)).search_experiments()
    assert {item.name: item.experiment_id for item in found} == {"Default": "0", "ddpm-digits": experiment}


# A database and its artifacts, one of which was moved, copied, lost or damaged.


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_a_process(work: Callable[..., Any], *arguments: Any) -> None:
    """Runs `work` in a new process, because MLflow caches the artifact folder of each run until its process ends."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(100)
    assert process.exitcode == 0


@pytest.fixture
def published(checkout: Path, params: Params) -> Path:
    in_a_process(tracking.publish, params, checkout, "train@cosine")
    return checkout


def refusal(params: Params, root: Path) -> str:
    """Returns the line with which both publishing and reading a model are refused. Asserts that neither changes a file."""
    before, lines = files_of(root), list[str]()
    for verb in (tracking.publish, tracking.promote):
        with pytest.raises(InputError) as caught:
            verb(params, root)
        lines.append(str(caught.value))
    with pytest.raises(InputError) as caught:
        tracking.fetch_model("models:/ddpm-digits@champion", root / "fetched", root)
    assert {*lines, str(caught.value)} == {lines[0]} and "\n" not in lines[0]
    locks = {Path("mlflow.db.lock"), Path("mlflow.db.lock.promote")}
    assert {path: data for path, data in files_of(root).items() if path not in locks} == {
        path: data for path, data in before.items() if path not in locks
    }
    return lines[0]


def test_a_copy_leaves_the_original_s_artifacts_alone(published: Path, params: Params, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "another place", symlinks=True))
    original = files_of(published)
    added = tracking.publish(params, copy)
    assert added["images"] and added["files"]
    assert files_of(published) == original
    seen = Seen(copy)
    assert_complete(seen, copy, params)
    for run in seen.client.search_runs([seen.experiment]):
        assert run.info.artifact_uri.startswith((copy / "mlartifacts").as_uri())
    assert tracking.publish(params, copy) == {}


def test_a_moved_checkout_never_makes_the_old_place_anew(
    checkout: Path, params: Params, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    in_a_process(tracking.promote, params, checkout)
    moved = checkout.rename(tmp_path / "moved")
    tracking.publish(params, moved)
    assert capfd.readouterr().err.count("was moved or copied") == 1
    folder, _ = tracking.fetch_model("models:/ddpm-digits@champion", tmp_path / "fetched", moved)
    checkpoint.load(folder)
    assert tracking.promote(params, moved).version == "1"
    assert not checkout.exists() and "was moved" not in capfd.readouterr().err


def test_records_whose_artifacts_lie_elsewhere(published: Path, params: Params, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(published, alone, symlinks=True, ignore=shutil.ignore_patterns("mlartifacts"))
    line = refusal(params, alone)
    assert f"{alone}/mlflow.db is a copy of a database whose artifacts lie in {published}/mlartifacts; copy" in line
    published.rename(tmp_path / "away")
    line = refusal(params, alone)
    here = alone / "mlartifacts" / "ddpm-digits"
    assert f"names artifacts in {published}/mlartifacts/ddpm-digits, which are neither there nor in {here};" in line
    assert f"or make an empty {here}" in line
    here.mkdir(parents=True)
    tracking.publish(params, alone)
    assert not published.exists()


def locations(root: Path) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        return dict(database.execute("SELECT name, artifact_location FROM experiments"))


def test_experiments_of_another_place_keep_their_addresses(published: Path, params: Params, tmp_path: Path) -> None:
    """The other disk may not be mounted.

    Unused and deleted experiments there stop nothing, and an experiment with runs is named.
    """
    away = tmp_path / "disk" / "mlartifacts"

    def record() -> None:
        client = MlflowClient(tracking.tracking_uri(published))
        for name in ("unused", "deleted"):
            number = client.create_experiment(name, artifact_location=str(away / name))
            if name == "deleted":
                client.create_run(number)
                client.delete_experiment(number)

    in_a_process(record)
    before = locations(published)
    assert before["unused"] == str(away / "unused")
    tracking.publish(params, published)
    assert locations(published) == before

    def use() -> None:
        client = MlflowClient(tracking.tracking_uri(published))
        client.create_run(client.get_experiment_by_name("unused").experiment_id)

    in_a_process(use)
    line = refusal(params, published)
    assert f"{away}/unused" in line and f"{published}/mlartifacts/unused" in line
    away.mkdir(parents=True)  # the disk is mounted, and this experiment has no files there yet
    tracking.publish(params, published)
    assert locations(published) == before
    away.rmdir()
    (published / "mlartifacts" / "unused").mkdir()
    tracking.publish(params, published)
    # the deleted experiment moves too
    here = {name: f"{published}/mlartifacts/{name}" for name in ("unused", "deleted")}
    assert locations(published) == before | here
    assert not away.exists()


def test_an_experiment_without_files_writes_nothing_at_an_old_place(
    checkout: Path, params: Params, tmp_path: Path
) -> None:
    in_a_process(tracking.prepare_store, params, checkout)
    copy, moved = tmp_path / "copy", tmp_path / "moved"
    (checkout / "mlartifacts").mkdir(exist_ok=True)
    shutil.copytree(checkout, copy, symlinks=True)
    tracking.publish(params, copy, only="train@cosine")
    assert files_of(checkout / "mlartifacts") == {} and files_of(copy / "mlartifacts" / "ddpm-digits")
    checkout.rename(moved)
    with pytest.raises(InputError, match=f"or make an empty {moved}/mlartifacts/ddpm-digits"):
        tracking.publish(params, moved, only="train@cosine")
    (moved / "mlartifacts" / "ddpm-digits").mkdir()
    tracking.publish(params, moved, only="train@cosine")
    assert not checkout.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a folder twice")
def test_one_store_that_is_mounted_twice_keeps_its_addresses(published: Path, params: Params, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    before = locations(published)
    if subprocess.run(["mount", "--bind", published, second], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        in_a_process(tracking.publish, params, second)
        assert locations(published) == before
    finally:
        subprocess.run(["umount", second], check=True)


def test_artifacts_that_are_kept_apart_stay_where_they_are(
    checkout: Path, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user named the folder, which may have any name."""
    large = tmp_path / "large" / "mlartifacts"
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", str(large))
    tracking.publish(params, checkout, only="train@cosine")
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT")
    tracking.publish(params, checkout, only="sample@cosine-ddim-5")
    assert not (checkout / "mlartifacts").exists()
    assert len(files_of(large)) > 2


def test_artifacts_behind_a_link(checkout: Path, params: Params, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (checkout / "mlartifacts").symlink_to(tmp_path / "disk")
    # `make up` records the path like this
    with contextlib.closing(sqlite3.connect(checkout / "mlflow.db")) as database, database:
        location = f"{tmp_path}/disk/ddpm-digits"
        database.execute(
            "INSERT INTO experiments (name, artifact_location, lifecycle_stage) VALUES (?, ?, 'active')",
            ("ddpm-digits", location),
        )
    tracking.publish(params, checkout, only="train@cosine")
    assert tracking.prepare_store(params, checkout) and files_of(tmp_path / "disk" / "ddpm-digits")


LOST = {
    "emptied": lambda file, empty: file.write_bytes(b""),
    "deleted": lambda file, empty: file.unlink(),
    "that of a new store": lambda file, empty: shutil.copyfile(empty, file),
}


@pytest.mark.parametrize("how", LOST)
def test_lost_records_are_not_taken_for_a_new_store(
    published: Path, params: Params, empty_database: Path, how: str
) -> None:
    LOST[how](published / "mlflow.db", empty_database)
    line = refusal(params, published)
    assert "mlflow.db holds no experiment" in line and "without earlier champions and their history" in line
    (published / "mlartifacts").rename(published / "aside")
    assert tracking.publish(params, published, only="train@cosine")["runs"] == 1


def test_a_second_database_beside_the_artifacts_of_the_first(
    published: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{published}/second.sqlite")
    assert tracking.publish(params, published, only="train@cosine")["runs"] == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (published / "mlflow.db").rename(published / "mlflow.db.backup")
    # the second database has the artifacts' records
    assert tracking.publish(params, published, only="train@cosine")["runs"] == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{published}/second.sqlite")
    (published / "mlflow.db").unlink()
    (published / "second.sqlite").write_bytes(b"")
    assert "second.sqlite holds no experiment" in refusal(params, published)


def test_records_of_another_store_are_not_taken_for_those_of_a_new_experiment(published: Path, params: Params) -> None:
    (published / "mlflow.db").unlink()
    (published / "mlartifacts").rename(published / "aside")
    MlflowClient(tracking.tracking_uri(published)).create_experiment("of another project")
    (published / "aside").rename(published / "mlartifacts")
    with pytest.raises(InputError, match=r"has no experiment ddpm-digits, but .*mlartifacts/ddpm-digits holds"):
        tracking.publish(params, published)


def overwritten(file: Path, start: int, stop: int) -> None:
    data = bytearray(file.read_bytes())
    data[start:stop] = b"\xff" * (stop - start)
    file.write_bytes(data)


BROKEN = {
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "cut off in a page": lambda file: os.truncate(file, file.stat().st_size - 100),
    "a text": lambda file: file.write_text("not a database"),
    "another first byte": lambda file: overwritten(file, 0, 1),
    "a page overwritten": lambda file: overwritten(file, 20 * 4096, 21 * 4096),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_database_is_one_line(published: Path, params: Params, how: str) -> None:
    BROKEN[how](published / "mlflow.db")
    assert f"{published}/mlflow.db is damaged" in refusal(params, published)


# Published content.


def test_everything_is_there_once_and_a_second_time_adds_nothing(checkout: Path, params: Params) -> None:
    said: list[str] = []
    added = tracking.publish(params, checkout, say=said.append)
    assert added["runs"] == 4 and added["images"] == 6 and added["models"] == 1
    seen = Seen(checkout)
    assert_complete(seen, checkout, params)
    before = seen.everything()
    assert tracking.publish(params, checkout, say=said.append) == {}
    assert Seen(checkout).everything() == before
    assert "nothing to add" in said[-1]


def test_what_a_run_says_of_itself(checkout: Path, params: Params) -> None:
    md5 = "0123456789abcdef0123456789abcdef.dir"
    lock = {"stages": {"prepare": {"cmd": "ddpm prepare", "outs": [{"path": "dataset", "md5": md5}]}}}
    with (checkout / "dvc.lock").open("w") as file:
        YAML(typ="safe").dump(lock, file)
    tracking.publish(params, checkout)
    seen, about = Seen(checkout), read_model_record(checkout / "models/cosine")
    training, sampler = seen.named("cosine"), seen.named("cosine-ddim")
    assert training.data.params["training.learning_rate"] == "0.002"
    assert training.data.params["network.multipliers"] == "[1, 2]"
    assert training.data.params["schedule"] == "cosine" and training.data.params["seed"] == "0"
    assert training.data.tags["ddpm.model_sha256"] == about.weights_sha256
    assert training.data.tags["mlflow.source.git.commit"] == "0123456789abcdef0123456789abcdef01234567"
    shown = {"schedule": "cosine", "sampler": "ddim", "dataset": "digits", "eta": "0.0", "spacing": "leading"}
    assert sampler.data.params == shown  # these are shown by MLflow's page Compare
    assert sampler.data.tags["ddpm.row.eta"] == "0.0" and sampler.data.tags["ddpm.evaluation.layer"] == "64"
    # images/s: 24 steps of 32 images in 60 s
    assert seen.history(training, "images_per_second") == [(24, pytest.approx(24 * 32 / 60), 1_700_000_060_000)]
    assert [step for step, _, _ in seen.history(sampler, "seconds_per_image")] == [2, 5]
    assert (training.info.start_time, training.info.end_time) == (1_700_000_000_000, 1_700_000_060_000)
    for run, context in ((training, "training"), (sampler, "evaluation")):
        (data,) = run.inputs.dataset_inputs
        tags = {tag.key: tag.value for tag in data.tags}
        assert tags == {
            "mlflow.data.context": context,
            "ddpm.dataset_sha256": about.data.sha256,
            "ddpm.dataset_md5": md5,
        }
    # The checkpoint is there byte for byte, and the sampler's run leads to it.
    (model,) = seen.models
    assert [output.model_id for output in training.outputs.model_outputs] == [model.model_id]
    assert [item.model_id for item in sampler.inputs.model_inputs] == [model.model_id]
    location = Path(model.artifact_location.removeprefix("file://"))
    for name in ("model.safetensors", "model.json"):
        assert (location / name).read_bytes() == (checkout / "models/cosine" / name).read_bytes()
    assert seen.files(seen.named("report")) == ["report/best.json", "report/front.json", "report/points.csv"]


def test_a_run_of_an_older_version_gets_the_options_of_its_sampler(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        few = {"schedule": "cosine", "sampler": "ddim", "dataset": "digits"}
        patch.setattr(publishing, "_point_params", lambda *_: few)
        tracking.publish(params, checkout)
    old = Seen(checkout).named("cosine-ddim")
    assert old.data.params == few
    assert tracking.publish(params, checkout) == {}
    new = Seen(checkout).named("cosine-ddim")
    assert new.info.run_id == old.info.run_id and new.data.params == {**few, "eta": "0.0", "spacing": "leading"}


def test_a_copied_database_leads_to_its_chart(
    checkout: Path, smoke: Smoke, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only mlflow.db and mlartifacts are copied, to a folder that never published."""
    named = smoke(training={"steps": 24}, tracking={"name": "another"})
    tracking.publish(named, checkout)
    tracking.publish(params, checkout)
    address, copy = "http://127.0.0.1:5000", tmp_path / "copy"
    shutil.copytree(checkout / "mlartifacts", copy / "mlartifacts")
    store = f"sqlite:///{shutil.copy(checkout / 'mlflow.db', copy)}"
    for name, chosen in (("digits", params), ("another", named)):
        YAML(typ="safe").dump(chosen.to_json(), copy / "params.yaml")
        assert (
            links.mlflow(copy, address, store)
            == f"{address}/{mlflow_page.chart(Seen(copy, f'ddpm-{name}').experiment)}"
        )
    (copy / "params.yaml").unlink()
    assert "compareRunsMode=CHART" in links.mlflow(copy, address, store)
    assert links.mlflow(tmp_path, address, f"sqlite:///{tmp_path / 'none.db'}") == address


def test_two_new_stores_get_the_same_history(checkout: Path, params: Params, empty_database: Path) -> None:
    for path in [*checkout.rglob("*.run.json")][::2]:
        path.unlink()  # some outputs were restored from a cache, so their times are unknown
    tracking.publish(params, checkout)
    first = Seen(checkout).everything(ids=False)
    other = checkout.with_name("other")
    shutil.copytree(checkout, other, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    shutil.copyfile(empty_database, other / "mlflow.db")
    for path in other.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (1, 1))
    tracking.publish(params, other)
    assert Seen(other).everything(ids=False) == first


def test_stage_by_stage_gives_what_all_at_once_gives(checkout: Path, params: Params, empty_database: Path) -> None:
    tracking.publish(params, checkout)
    values = {run.info.run_name: run.data.metrics for run in Seen(checkout).runs}
    other = checkout.with_name("other")
    shutil.copytree(checkout, other, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    shutil.copyfile(empty_database, other / "mlflow.db")
    stages = ["prepare", "train@cosine"]
    stages += [f"{verb}@{point.name}" for verb in ("sample", "evaluate") for point in params.points()]
    for stage in [*stages, "report"]:
        tracking.publish(params, other, only=stage)
    seen = Seen(other)
    assert_complete(seen, other, params)
    assert {run.info.run_name: run.data.metrics for run in seen.runs} == values
    assert tracking.publish(params, other) == {}


def test_an_interrupted_publication_is_filled_in(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seventh call to MLflow fails. Repeated publishing ends with everything once."""
    calls = 0

    def cut(name: str) -> None:
        original = getattr(MlflowClient, name)

        def limited(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 7 == 0:
                raise OSError("connection lost")
            return original(self, *arguments, **options)

        monkeypatch.setattr(MlflowClient, name, limited)

    for name in (
        "create_run",
        "log_batch",
        "log_image",
        "log_dict",
        "log_inputs",
        "log_model_artifacts",
        "set_terminated",
    ):
        cut(name)
    failures = 0
    for _ in range(50):
        try:
            tracking.publish(params, checkout)
            break
        except InputError:
            failures += 1
    assert failures > 3
    assert_complete(Seen(checkout), checkout, params)
    assert len(Seen(checkout).models) == 1


def test_a_picture_whose_thumbnail_never_came_gets_it(checkout: Path, params: Params) -> None:
    """MLflow sends a picture, then its thumbnail, and then sets a tag. Here only the picture arrived."""
    tracking.publish(params, checkout)
    thumbnails = sorted((checkout / "mlartifacts").rglob("samples+step+5+*.webp"))
    content = thumbnails[0].read_bytes()
    thumbnails[0].unlink()
    run = thumbnails[0].parents[2].name
    client = MlflowClient(f"sqlite:///{checkout / 'mlflow.db'}")
    client.delete_tag(run, "mlflow.loggedImages")
    client.delete_tag(run, "ddpm.samples.5")  # a point gets this tag once all of it was sent
    assert tracking.publish(params, checkout)["images"] == 1
    assert thumbnails[0].read_bytes() == content
    assert client.get_run(run).data.tags["mlflow.loggedImages"] == "True"
    assert tracking.publish(params, checkout) == {}


def test_the_bound_below_its_training(checkout: Path, smoke: Smoke, params: Params) -> None:
    """Each number is published once.

    Another protocol gets another run, and other numbers of the same protocol supersede the old run.
    """

    def measured(**changes: Any) -> dict[str, Any]:
        settings = smoke(training={"steps": 24}, likelihood={"images": 4, "times": 3, **changes})
        return likelihood(settings, "cosine", checkout)

    scores = measured()
    added = tracking.publish(params, checkout, only="likelihood@cosine")
    assert added["runs"] == 2  # the training's run, and its child
    seen = Seen(checkout)
    run, training = seen.named("cosine-likelihood"), seen.named("cosine")
    assert run.data.tags["mlflow.parentRunId"] == training.info.run_id and run.data.params["likelihood.times"] == "3"
    for split in ("train", "test"):
        for name in ("bits_per_dim", "bits_per_dim_error", "prior", "kl", "decoder"):
            assert [entry[:2] for entry in seen.history(run, f"{name}_{split}")] == [(24, scores[split][name])]
    rows = records.read_csv(checkout / paths.likelihood_curve_file("cosine"))
    for key in ("rate", "distortion"):
        expected = sorted((int(row["time"]), float(row[key])) for row in rows)
        assert [entry[:2] for entry in seen.history(run, key)] == expected
    tracking.publish(params, checkout)
    assert tracking.publish(params, checkout) == {}

    measured(times=5)
    tracking.publish(params, checkout)
    assert sum(run.info.run_name == "cosine-likelihood" for run in Seen(checkout).runs) == 2
    path = checkout / paths.likelihood_file("cosine")
    changed = records.read_record(path)
    changed["test"]["bits_per_dim"] += 1  # as if code was edited
    records.write_record(path, changed)
    tracking.publish(params, checkout)
    names = Counter(run.info.run_name for run in Seen(checkout).runs)
    assert (names["cosine-likelihood"], names["cosine-likelihood (superseded)"]) == (2, 1)
    records.write_record(path, {**changed, "model": "of another training"})
    assert tracking.publish(params, checkout) == {}


def test_the_schedules_are_a_run(checkout: Path, params: Params) -> None:
    rows, _ = schedules(params, checkout)
    tracking.publish(params, checkout, only="schedules@schedules")
    seen = Seen(checkout)
    run = seen.named("schedules")
    assert seen.files(run) == ["schedules/snr.png", "schedules/strip.png", "schedules/table.csv"]
    assert run.data.metrics["alpha_bar_T/linear"] == pytest.approx(rows["linear"].alpha_bar, rel=1e-9)
    shares = [value for _, value, _ in seen.history(run, "share_of_steps/sqrt")]
    assert shares == pytest.approx(rows["sqrt"].shares, rel=1e-5)
    assert tracking.publish(params, checkout, only="schedules@schedules") == {}

    schedules(params, checkout, Path("short"), timesteps=10)
    tracking.publish(params, checkout, only="schedules@short")
    seen = Seen(checkout)
    assert seen.named("schedules (superseded)").info.run_id == run.info.run_id
    assert seen.named("schedules").data.params["diffusion.timesteps"] == "10"


# Changed outputs.


def test_other_scores_go_to_a_run_of_their_own(checkout: Path, params: Params, write_scores: Scores) -> None:
    tracking.publish(params, checkout)
    old = Seen(checkout).named("cosine-ddim").info.run_id
    before = records.read_record(checkout / paths.metrics_file(POINT))["fid"]

    write_scores(checkout, POINT, 12.5)  # as if evaluation code was edited
    tracking.publish(params, checkout, only=f"evaluate@{POINT.name}")
    tracking.publish(params, checkout)
    seen = Seen(checkout)
    assert_complete(seen, checkout, params)
    new = seen.named("cosine-ddim").info.run_id
    assert new != old
    assert seen.named("cosine-ddim (superseded)").info.run_id == old
    assert seen.client.get_run(old).data.tags["ddpm.superseded"] == new
    assert [value for step, value, _ in seen.history(seen.client.get_run(old), "fid") if step == 5] == [before]

    write_scores(checkout, POINT, before)  # as if the edit was undone
    tracking.publish(params, checkout)
    seen = Seen(checkout)
    assert seen.named("cosine-ddim").info.run_id == old
    assert "ddpm.superseded" not in seen.named("cosine-ddim").data.tags
    assert tracking.publish(params, checkout) == {}


def test_another_protocol_is_another_run(checkout: Path, smoke: Smoke, params: Params, write_scores: Scores) -> None:
    tracking.publish(params, checkout)
    deeper = smoke(training={"steps": 24}, evaluation={"layer": 192})
    write_scores(checkout, POINT, 3.0, layer=192)
    tracking.publish(deeper, checkout, only=f"evaluate@{POINT.name}")
    runs = [run for run in Seen(checkout).runs if run.info.run_name == "cosine-ddim"]
    assert sorted(run.data.tags["ddpm.evaluation.layer"] for run in runs) == ["192", "64"]
    assert sorted(run.data.metrics["fid"] for run in runs) == [3.0, 37.0]  # the last FID of each run


def test_outputs_tell_what_made_them(checkout: Path, smoke: Smoke, params: Params) -> None:
    """params.yaml is edited, but no stage has run.

    Outputs keep their own settings, and outputs of an old model are not published.
    """
    tracking.publish(params, checkout)
    before = Seen(checkout).everything()
    edited = smoke(
        training={"steps": 8}, sampling={"images": 32}, evaluation={"layer": 192}, samplers={"ddim": {"eta": 1.0}}
    )
    assert tracking.publish(edited, checkout) == {}
    assert Seen(checkout).everything() == before

    train(edited, "cosine", checkout)  # the model is new, and the samples are old
    said: list[str] = []
    assert "images" not in tracking.publish(edited, checkout, say=said.append)
    assert sum("is not published, since its model or samples have changed" in line for line in said) == 4


# Runs of trainings.


def test_a_training_is_streamed_and_not_published_twice(
    checkout: Path, smoke: Smoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "FLUSH_SECONDS", 0.1)
    params = smoke(training={"steps": 40})
    running: list[Run] = []

    with tracking.watch_training(params, "linear", checkout) as watch:

        def report(progress: Progress) -> None:
            watch(progress)
            if progress.done == 20:
                watch.log_preview(20, np.zeros((1, 30, 30), np.uint8))
                end = time.monotonic() + 60
                while not running and time.monotonic() < end:
                    time.sleep(0.1)
                    found = Seen(checkout)
                    running.extend(run for run in found.runs if "loss" in run.data.metrics)

        train(params, "linear", checkout, report)
    (run,) = running
    assert run.info.status == "RUNNING" and run.info.run_name == "linear"
    tracking.publish(params, checkout, only="train@linear")
    seen = Seen(checkout)
    (after,) = seen.runs
    assert after.info.run_id == run.info.run_id and after.info.status == "FINISHED"
    rows = records.read_csv(checkout / paths.history_file("linear"))
    assert [(step, value) for step, value, _ in seen.history(after, "loss")] == [
        (int(row["step"]), float(row["loss"])) for row in rows
    ]
    assert seen.history(after, "system/cpu_utilization_percentage")
    assert sum(name.endswith(".png") for name in seen.files(after, "images")) == 1

    # A repeated training with the same result leaves no second run.
    before = seen.everything()
    with tracking.watch_training(params, "linear", checkout) as watch:
        train(params, "linear", checkout, watch, fresh=True)
    tracking.publish(params, checkout, only="train@linear")
    assert Seen(checkout).everything() == before


@pytest.mark.parametrize(("error", "status"), [(InputError("diverged"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_stopped_training_goes_on_in_the_same_run(
    checkout: Path, smoke: Smoke, error: BaseException, status: str
) -> None:
    params = smoke(training={"steps": 30}, compute={"checkpoint_every": 12})

    def stop(progress: Progress) -> None:
        watch(progress)
        if progress.done == 20 and not progress.message:
            raise error

    with pytest.raises(type(error)), tracking.watch_training(params, "linear", checkout) as watch:
        train(params, "linear", checkout, stop)
    (stopped,) = Seen(checkout).runs
    assert stopped.info.status == status
    assert stopped.data.metrics["loss"] > 0
    with tracking.watch_training(params, "linear", checkout) as watch:
        train(params, "linear", checkout, watch)  # continues from step 12, so steps 13 ... 20 are reported twice
    tracking.publish(params, checkout, only="train@linear")
    seen = Seen(checkout)
    (run,) = seen.runs
    assert run.info.run_id == stopped.info.run_id and run.info.status == "FINISHED"
    rows = records.read_csv(checkout / paths.history_file("linear"))
    assert [step for step, _, _ in seen.history(run, "loss")] == [int(row["step"]) for row in rows]


def test_a_killed_process_leaves_no_run_running(checkout: Path, params: Params) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
    program = f"""
import time
from pathlib import Path
from ddpm import tracking
from ddpm.files.params import Params
from ddpm.runtime.progress import Progress
with tracking.watch_training(Params.load(Path({str(recipe)!r})), "linear", Path({str(checkout)!r})) as watch:
    watch(Progress(10, 60, "steps", {{"loss": 1.0}}))
    time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.3)
            client = MlflowClient(tracking.tracking_uri(checkout))
            if client.get_experiment_by_name("ddpm-digits") and any(run.data.metrics for run in Seen(checkout).runs):
                break
        tracking.publish(params, checkout)
        assert Seen(checkout).named("linear").info.status == "RUNNING"  # its process lives, so the run is not touched
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        tracking.publish(params, checkout)
        assert Seen(checkout).named("linear").info.status == "KILLED"
    finally:
        process.kill()
        process.wait(10)


def test_a_killed_publication_leaves_no_run_running(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next publication ends the run, even if all outputs are gone."""
    program = "from ddpm.runtime.processes import this_process; print(this_process())"
    dead = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()

    def cut(*_: Any, **__: Any) -> None:
        raise OSError("killed here")

    with monkeypatch.context() as dying:
        dying.setattr(runs, "this_process", lambda: dead)
        dying.setattr(MlflowClient, "log_inputs", cut)
        with pytest.raises(InputError, match="killed here"):
            tracking.publish(params, checkout, only="train@cosine")
    assert [run.info.status for run in Seen(checkout).runs] == ["RUNNING"]
    for folder in ("models", "samples", "metrics", "report"):
        shutil.rmtree(checkout / folder, ignore_errors=True)
    tracking.publish(params, checkout)
    assert [run.info.status for run in Seen(checkout).runs] == ["KILLED"]


# MLflow servers.


@pytest.fixture
def on_server(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return mlflow_server


def test_through_a_server(checkout: Path, smoke: Smoke, on_server: str, mlflow_home: Path) -> None:
    """Values logged through the server are visible in its database, and the other way round."""
    params = smoke(training={"steps": 24}, data={"source": "fashion_mnist"})
    points = params.points()
    tracking.publish(params, checkout, only="train@cosine")
    for point in points[:2]:
        tracking.publish(params, checkout, only=f"evaluate@{point.name}")
    with pytest.MonkeyPatch.context() as directly:
        directly.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_home / 'mlflow.db'}")
        added = tracking.publish(params, checkout)
        assert added["runs"] == 2 and added["images"] == 3  # the runs cosine-ddim and report
        before = Seen(checkout, "ddpm-fashion-mnist").everything()
    seen = Seen(checkout, "ddpm-fashion-mnist")
    assert seen.everything() == before
    assert_complete(seen, checkout, params)
    assert tracking.publish(params, checkout) == {}


def test_artifacts_behind_a_server(checkout: Path, smoke: Smoke, on_server: str, mlflow_home: Path) -> None:
    """A server for several hosts keeps the artifacts, and passes them through."""
    params = smoke(training={"steps": 24}, data={"source": "cifar10"})
    MlflowClient(on_server).create_experiment("ddpm-cifar10", artifact_location="mlflow-artifacts:/behind")
    tracking.publish(params, checkout)
    seen = Seen(checkout, "ddpm-cifar10")
    assert_complete(seen, checkout, params)
    assert tracking.publish(params, checkout) == {}
    assert any((mlflow_home / "mlartifacts" / "behind").rglob("model.safetensors"))
    with pytest.MonkeyPatch.context() as directly:
        directly.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_home / 'mlflow.db'}")
        with pytest.raises(InputError, match="can be reached only through an MLflow server"):
            tracking.publish(params, checkout)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_without_a_server_the_work_goes_on(
    checkout: Path, smoke: Smoke, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = smoke(training={"steps": 24}, tracking={"name": "away"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{closed_port()}")
    said: list[str] = []
    with tracking.watch_training(params, "cosine", checkout, say=said.append) as watch:
        train(params, "cosine", checkout, watch)
    for stage in ("prepare", "train@cosine", "sample@cosine-ddim-5", "report"):
        tracking.publish_or_warn(params, checkout, only=stage, say=said.append)
    (line,) = said
    assert "cannot be reached; publish later with `ddpm publish`" in line and "secret" not in line
    with pytest.raises(InputError, match="cannot be reached"):
        tracking.publish(params, checkout)
    with pytest.raises(InputError, match=r"cannot be reached; start MLflow .*, or name a checkpoint folder"):
        tracking.fetch_model("models:/ddpm-away@champion", checkout / "fetched")
    (checkout / "ddpm.json").touch()  # a project has no `make ui`
    with pytest.raises(InputError, match=r"start MLflow \(`python -m flows.servers.up mlflow`\), or name"):
        tracking.fetch_model("models:/ddpm-away@champion", checkout / "fetched", checkout)
    (checkout / "ddpm.json").unlink()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    tracking.publish(params, checkout)
    assert_complete(Seen(checkout, "ddpm-away"), checkout, params)


def test_a_database_that_is_away_is_one_line_at_once(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("postgresql+psycopg://127.0.0.1", "postgresql://x:y/z@127.0.0.1"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{address}:{closed_port()}/mlflow")
        started = time.monotonic()
        shown = re.escape("postgresql+psycopg://127.0.0.1")  # the address names the installed driver
        with pytest.raises(InputError, match=f"^MLflow at {shown}:.* cannot be reached; publish later"):
            tracking.publish(params, checkout)
        assert time.monotonic() - started < 5


def test_who_waits_for_a_promotion_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(place, "LOCK_SECONDS", 0.05)
    where = place.Place("postgresql://db/mlflow", tmp_path / "lock", None)
    done: list[str] = []

    def wait() -> None:
        with place.locked(where, ".promote"):
            done.append("promoted")

    waiting = threading.Thread(target=wait)
    with place.locked(where, ".promote"), place.locked(where):
        waiting.start()
        while not (said := capsys.readouterr().err):
            time.sleep(0.01)
        assert (
            said == "MLflow at postgresql://db/mlflow: waiting for another process that promotes a model there\n"
            and not done
        )
        with pytest.raises(InputError, match="is in use by another process"), place.locked(where):
            pass
    waiting.join()
    assert done == ["promoted"]


def test_a_new_database_never_takes_the_place_of_a_server_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server creates its own database at the same moment, and holds no lock."""
    monkeypatch.setattr(place.empty, "EMPTY", tmp_path / "empty.db")
    (tmp_path / "empty.db").write_bytes(b"empty")
    read = Path.read_bytes

    def meanwhile(self: Path) -> bytes:
        (tmp_path / "mlflow.db").write_bytes(b"a server's")
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", meanwhile)
        place.empty.create(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == b"a server's"
    for kept in (True, False):  # with hard links and without
        (tmp_path / "mlflow.db").unlink()
        if not kept:
            monkeypatch.setattr(
                os, "link", lambda *names, **how: (_ for _ in ()).throw(PermissionError("no links here"))
            )
        place.empty.create(tmp_path / "mlflow.db")
        assert (tmp_path / "mlflow.db").read_bytes() == b"empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.db", "mlflow.db"]


def test_a_database_that_goes_away_is_one_line(tmp_path: Path) -> None:
    """The database fails after the first connection, or refuses the password."""
    from sqlalchemy.exc import OperationalError

    error = OperationalError("SELECT 1", None, Exception("server closed the connection"))
    where = place.Place("postgresql://a:secret@db/mlflow", tmp_path / "lock", None)
    line = r"^MLflow at postgresql://db/mlflow cannot be reached \(.*server closed.*\); publish later"
    with pytest.raises(InputError, match=line) as said, place.plain_errors(where):
        raise error
    assert "secret" not in str(said.value)
    with pytest.raises(OperationalError), place.plain_errors(place.Place("sqlite:///x", where.lock, None, tmp_path)):
        raise error


def test_what_a_training_had_to_say_while_mlflow_was_away_is_sent_later(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(place, "_warned", set())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
    said: list[str] = []
    refusal, log_batch = threading.Event(), MlflowClient.log_batch

    def refused(self: MlflowClient, *arguments: Any, **options: Any) -> None:
        if options.get("metrics") and not refusal.is_set():
            refusal.set()
            raise OSError("connection lost")
        log_batch(self, *arguments, **options)

    with tracking.watch_training(params, "linear", checkout, say=said.append) as watch:
        for step in (1, 2):
            watch(Progress(step, 60, "steps", {"loss": float(step)}))
            end = time.monotonic() + 60
            while not said and time.monotonic() < end:
                time.sleep(0.1)
        monkeypatch.setattr(MlflowClient, "log_batch", refused)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        watch(Progress(3, 60, "steps", {"loss": 3.0}))
        assert refusal.wait(60)
    assert len(said) == 2 and "cannot be reached" in said[0] and "connection lost" in said[1]
    seen = Seen(checkout)
    (run,) = seen.runs
    assert [(step, value) for step, value, _ in seen.history(run, "loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.fixture
def mute_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_never_answers(
    checkout: Path, params: Params, mute_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mute_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    said: list[str] = []
    tracking.publish_or_warn(params, checkout, only="train@cosine", say=said.append)
    assert len(said) == 1 and "cannot be reached" in said[0]


def test_a_store_that_cannot_be_used_is_one_line(checkout: Path, params: Params) -> None:
    (checkout / "mlflow.db").write_text("not a database")
    said: list[str] = []
    tracking.publish_or_warn(params, checkout, only="train@cosine", say=said.append)
    assert len(said) == 1 and "\n" not in said[0]


def test_the_key_of_a_model_is_the_key_of_its_parameters(checkout: Path, params: Params) -> None:
    """Streaming knows only the parameters, and publishing only model.json. Both must give the same key."""
    from ddpm.tracking.lineage import identity_of_model, training_identity

    _, about = checkpoint.load(checkout / "models/cosine")
    given = training_identity(params, "cosine", about.data.sha256)
    assert json.loads(json.dumps(given)) == identity_of_model(about)


def test_following_publishes_each_stage_as_it_ends(checkout: Path, params: Params) -> None:
    """A new entry in dvc.lock is published before the follower is told to end. A half-written dvc.lock is ignored."""
    lock, ended, said = checkout / "dvc.lock", threading.Event(), list[str]()

    follower = threading.Thread(target=tracking.follow, args=(params, checkout, ended, said.append))
    follower.start()

    def scores() -> list[str]:
        return [key for run in Seen(checkout).runs for key in run.data.metrics if key == "fid"]

    try:
        for text in ("", "stages:\n  evaluate@cosine-ddim-5: {"):  # as if the file was read in the middle of a write
            lock.write_text(text)
            time.sleep(2 * publishing.FOLLOW_SECONDS)
            assert follower.is_alive() and not scores()
        lock.write_text(f"stages:\n  evaluate@{POINT.name}: {{cmd: ddpm evaluate {POINT.name}}}\n")
        end = time.monotonic() + 60
        while not scores():
            assert time.monotonic() < end, said
            time.sleep(0.2)
    finally:
        ended.set()
        follower.join(60)
    assert not follower.is_alive() and not said
    assert {run.info.run_name for run in Seen(checkout).runs} == {"cosine", "cosine-ddim"}
