"""`ddpm gc` on real stores: what nothing refers to goes, when asked; what anything refers to stays, champions above all."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ddpm.cli import app
from ddpm.stages import checkpoint, cleaning, store, tracking
from ddpm.stages.errors import InputError
from ddpm.stages.params import Params
from ddpm.stages.train import train

Smoke = Callable[..., Params]


def later() -> float:
    """A moment that all is older than."""
    return time.time() + 60


def kinds(found: list[cleaning.Garbage]) -> Counter[str]:
    return Counter(item.kind for item in found)


def test_mlflow_keeps_what_is_referred_to(checkout: Path, smoke: Smoke) -> None:
    params = smoke(training={"steps": 24})
    decision = tracking.promote(params, checkout)
    tracking.publish(params, checkout)
    client = MlflowClient(tracking.tracking_uri(checkout))
    experiment = client.get_experiment_by_name("ddpm-digits")
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    champion = client.get_model_version_by_alias("ddpm-digits", "champion").run_id
    other = next(run for name, run in runs.items() if name.startswith("cosine-") and run != champion)
    assert tracking.unreferenced(later(), checkout) == []

    for run in (champion, other, runs["cosine"]):
        client.delete_run(run)
    (lost,) = [checkout / "mlartifacts" / "ddpm-digits" / ("0" * 32)]
    (lost / "artifacts").mkdir(parents=True)
    (lost / "artifacts" / "file").write_bytes(bytes(1000))
    theirs = client.create_run(client.create_experiment("of another project")).info.run_id
    client.delete_run(theirs)
    abandoned = client.create_logged_model(experiment.experiment_id, source_run_id=other)

    assert (
        tracking.unreferenced(time.time() - 86400, checkout)[:-1] == []
    )  # too young, but for the folder without a record
    found = tracking.unreferenced(later(), checkout)
    assert kinds(found) == {"deleted runs": 2, "models without a run": 1, "folders without a record": 1}
    assert {item.name for item in found if item.kind == "deleted runs"} == {
        "cosine",
        next(name for name, run in runs.items() if run == other),
    }
    assert next(item.size for item in found if item.kind == "folders without a record") == 1000
    assert lost.exists() and client.get_run(other)  # only looked at

    for item in found:
        item.remove()
    assert not lost.exists()
    left = {run.info.run_id for run in client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)}
    assert left == set(runs.values()) - {other, runs["cosine"]}
    assert abandoned.model_id not in {
        model.model_id for model in client.search_logged_models([experiment.experiment_id])
    }
    assert client.get_run(theirs)
    assert {path.name for path in lost.parent.iterdir()} <= {*left, "models"}
    folder, _ = tracking.fetch_model("models:/ddpm-digits@champion", checkout / "fetched", checkout)
    checkpoint.load(folder)  # whole: its checksum is right
    assert tracking.unreferenced(later(), checkout) == []
    tracking.publish(params, checkout)
    assert tracking.promote(params, checkout).version == decision.version


def test_behind_a_server_it_says_where_to_go(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(InputError, match="its database"):
        tracking.unreferenced(later(), checkout)


def test_two_databases_below_one_root_leave_each_other_alone(
    checkout: Path, smoke: Smoke, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = smoke(training={"steps": 24})
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", str(checkout.parent / "shared"))
    tracking.publish(params, checkout, only="train@cosine")
    other = checkout.with_name("other")
    other.mkdir()
    shutil.copyfile(empty_database, other / "mlflow.db")
    tracking.prepare_store(params, other)
    assert tracking.unreferenced(later(), other) == []


def test_states_that_nobody_goes_on_from(root: Path, smoke: Smoke) -> None:
    now, before = smoke(training={"steps": 4}), smoke(training={"steps": 4, "learning_rate": 1e-3})
    for params in (now, before):
        train(params, "cosine", root)
    folders = set((root / ".cache" / "training").iterdir())
    assert len(folders) == 2
    assert list(cleaning.training_states(now, root, time.time() - 86400)) == []
    (gone,) = cleaning.training_states(now, root, later())
    assert "4 steps" in gone.why and (gone.size or 0) > 1000
    gone.remove()
    (kept,) = (root / ".cache" / "training").iterdir()
    said: list[str] = []
    longer = smoke(training={"steps": 6})
    train(longer, "cosine", root, lambda progress: said.append(progress.message))
    assert kept in folders and "resuming after step 4" in said


def name_remote(root: Path, bucket: str) -> None:
    """Before the first commit: DVC pushes what a commit has to the remote that it names."""
    (root / ".dvc" / "config").write_text(
        f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = s3://{bucket}/results\n"
    )


@pytest.fixture
def versions(tmp_path: Path) -> Callable[[str], bool]:
    """A DVC repository with four versions of a file: a and b committed in turn, c never, d in the workspace.
    versions("a"): whether its cache has that one.
    """
    from dvc.repo import Repo

    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    Repo.init(str(tmp_path)).close()
    name_remote(tmp_path, "cleaned")
    with Repo(str(tmp_path)) as repo:
        for text in "abcd":
            (tmp_path / "file").write_text(text)
            repo.add(str(tmp_path / "file"))
            if text in "ab":
                for command in (["add", "--all"], [*author, "commit", "--quiet", "--message", text]):
                    subprocess.run(["git", *command], cwd=tmp_path, check=True)

    def has(text: str) -> bool:
        files = (tmp_path / ".dvc" / "cache" / "files").rglob("*")
        return text in {path.read_text() for path in files if path.is_file()}

    return has


def test_dvc_keeps_the_results_of_every_commit_or_of_the_tips(tmp_path: Path, versions: Callable[[str], bool]) -> None:
    (found,) = cleaning.dvc_objects(tmp_path)
    assert (found.name, found.size) == ("1 files", 1) and all(map(versions, "abcd"))
    found.remove()
    assert [text for text in "abcd" if versions(text)] == ["a", "b", "d"]
    assert list(cleaning.dvc_objects(tmp_path)) == []
    (found,) = cleaning.dvc_objects(tmp_path, tips=True)
    found.remove()
    assert [text for text in "abcd" if versions(text)] == ["b", "d"]


def test_what_other_clones_may_need_is_left_alone(
    tmp_path: Path, versions: Callable[[str], bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    shallow = tmp_path_factory.mktemp("shallow") / "clone"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", tmp_path.as_uri(), shallow], check=True)
    with pytest.raises(InputError, match="this clone is shallow"):
        list(cleaning.dvc_objects(shallow, cloud=True))
    said: list[str] = []
    shared = tmp_path_factory.mktemp("shared")
    (tmp_path / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {shared}\n")
    assert list(cleaning.dvc_objects(tmp_path, say=said.append)) == [] and all(map(versions, "abcd"))
    assert str(shared) in said[0] and "left alone" in said[0]


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., set[str]]:
    """A clone of a DVC repository that has committed its folder `data` in versions a and b; the clone's cache is empty.
    folders("c"): writes that version, adds it, and gives which files the cache has.
    """
    from dvc.repo import Repo

    origin, clone = tmp_path / "origin", tmp_path / "clone"
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")

    def add(root: Path, text: str) -> None:
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / "file").write_text(text)
        with Repo(str(root)) as repo:
            repo.add(str(root / "data"))

    origin.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=origin, check=True)
    Repo.init(str(origin)).close()
    name_remote(origin, "listed")
    for text in "ab":
        add(origin, text)
        for command in (["add", "--all"], [*author, "commit", "--quiet", "--message", text]):
            subprocess.run(["git", *command], cwd=origin, check=True)
    subprocess.run(["git", "clone", "--quiet", origin, clone], check=True)

    def files(text: str = "") -> set[str]:
        if text:
            add(clone, text)
        cache = clone / ".dvc" / "cache" / "files"
        return {path.read_text() for path in cache.rglob("*") if path.is_file() and path.suffix != ".dir"}

    return files


def test_a_clone_without_the_results_of_other_commits(
    tmp_path: Path, folders: Callable[..., set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked, also on a terminal; what is known is kept, and what is not is said."""

    def asked(*_: Any, **__: Any) -> bool:
        raise AssertionError("DVC asks")

    monkeypatch.setattr("dvc.prompt.confirm", asked)
    clone, said = tmp_path / "clone", list[str]()
    folders("c")
    assert folders("d") == {"c", "d"}
    for tips, count in ((True, 1), (False, 2)):
        said.clear()
        (found,) = cleaning.dvc_objects(clone, tips, say=said.append)
        assert (found.name, folders()) == ("2 files", {"c", "d"})  # c, and the list that names it
        (line,) = said
        assert line.startswith(f"gc: {count} folders of other commits are not in the cache (`dvc fetch")
    found.remove()
    assert folders() == {"d"}
    assert list(cleaning.dvc_objects(clone, say=said.append)) == []


def test_what_a_stash_or_a_queued_or_running_experiment_names_stays(
    tmp_path: Path, folders: Callable[..., set[str]]
) -> None:
    clone = tmp_path / "clone"
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")
    for text, ref in (
        ("stashed", None),
        ("queued", "refs/exps/celery/stash"),
        ("queued later", "refs/exps/celery/stash"),
    ):
        folders(text)
        subprocess.run([*git, "stash", "push", "--quiet"], cwd=clone, check=True)
        if ref:  # as DVC's queue does: each entry is in the reflog of its own reference
            commit = subprocess.check_output([*git, "rev-parse", "stash@{0}"], cwd=clone, text=True).strip()
            subprocess.run([*git, "stash", "drop", "--quiet"], cwd=clone, check=True)
            subprocess.run([*git, "update-ref", "--create-reflog", "-m", "queued", ref, commit], cwd=clone, check=True)
    folders("running")
    running = clone / ".dvc" / "tmp" / "exps" / "tmp1234"
    running.mkdir(parents=True)
    shutil.copyfile(clone / "data.dvc", running / "dvc.lock")
    assert folders("garbage") == {"stashed", "queued", "queued later", "running", "garbage"}
    assert folders("present") == {"stashed", "queued", "queued later", "running", "garbage", "present"}
    for tips in (False, True):
        for found in cleaning.dvc_objects(clone, tips, say=lambda line: None):
            found.remove()
        assert folders() == {"stashed", "queued", "queued later", "running", "present"}


def test_a_look_is_quick_however_many_commits(tmp_path: Path, versions: Callable[[str], bool]) -> None:
    """git reads each version of a dvc.lock once; DVC would take a third of a second for every commit."""
    parent = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    commits = "".join(
        f"commit refs/heads/many\ncommitter test <test@example.org> {1000 + number} +0000\ndata 1\nx\n"
        + (f"from {parent}\n" if not number else "")
        for number in range(2000)
    )
    subprocess.run(["git", "fast-import", "--quiet"], cwd=tmp_path, input=commits, text=True, check=True)
    began = time.monotonic()
    (found,) = cleaning.dvc_objects(tmp_path)
    assert found.name == "1 files" and time.monotonic() - began < 30


def test_s3_is_cleaned_when_asked(
    tmp_path: Path, versions: Callable[[str], bool], s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.repo import Repo

    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)
    bucket = s3.bucket("cleaned")
    with Repo(str(tmp_path)) as repo:
        repo.push(all_commits=True)
    upload = s3.client().create_multipart_upload(Bucket=bucket, Key="results/files/md5/half")["UploadId"]
    elsewhere = s3.client().create_multipart_upload(Bucket=bucket, Key="not-ours")["UploadId"]
    for uploads in ("results/files/md5/half", upload), ("not-ours", elsewhere):
        s3.client().upload_part(Bucket=bucket, Key=uploads[0], UploadId=uploads[1], PartNumber=1, Body=bytes(1000))
    pushed = len(s3.keys(bucket, "results/"))
    assert pushed == 3  # a, b and the workspace's

    assert kinds(list(cleaning.dvc_objects(tmp_path, tips=True))) == {"objects of DVC's cache": 1}
    found = list(cleaning.dvc_objects(tmp_path, tips=True, cloud=True))
    assert kinds(found) == {"objects of DVC's cache": 1, "objects of DVC's remote": 1}
    remote = cleaning.dvc_remote(tmp_path)
    assert remote == (f"s3://{bucket}/results", None)
    assert list(cleaning.incomplete_uploads(*remote, time.time() - 86400)) == []
    (half,) = cleaning.incomplete_uploads(*remote, later())
    assert half.name == f"s3://{bucket}/results/files/md5/half"
    for item in (*found, half):
        item.remove()
    assert len(s3.keys(bucket, "results/")) == 2
    left = s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [entry["Key"] for entry in left] == ["not-ours"]


def test_a_remote_is_left_alone_where_a_list_is_nowhere(
    tmp_path: Path, folders: Callable[..., set[str]], s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may be uploading that folder: its list comes last."""
    from dvc.repo import Repo

    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)
    bucket, said = s3.bucket("listed"), list[str]()
    clone, origin = tmp_path / "clone", tmp_path / "origin"
    folders("d")
    with Repo(str(clone)) as repo:
        repo.push()
    folders("e")
    keys = s3.keys(bucket, "results/")
    found = list(cleaning.dvc_objects(clone, cloud=True, say=said.append))
    assert kinds(found) == {"objects of DVC's cache": 1} and s3.keys(bucket, "results/") == keys
    (line,) = said
    assert line.startswith("gc: 2 folders of other commits are neither in the cache nor in the remote")
    assert "DVC's remote is left alone (--unlisted: it is not)" in line
    unlisted = [item.kind for item in cleaning.dvc_objects(clone, cloud=True, unlisted=True, say=said.append)]
    assert unlisted == ["objects of DVC's cache", "objects of DVC's remote"]

    with Repo(str(origin)) as repo:
        repo.push(all_commits=True)
    said.clear()
    found = list(cleaning.dvc_objects(clone, cloud=True, say=said.append))  # the lists are read where they lie
    assert [(item.kind, item.name) for item in found] == [
        ("objects of DVC's cache", "2 files"),
        ("objects of DVC's remote", "2 files"),
    ]
    assert not said and folders() == {"d", "e"}
    for item in found:
        item.remove()
    assert folders() == {"e"}
    assert set(s3.keys(bucket, "results/")).isdisjoint(keys) and len(s3.keys(bucket, "results/")) == 4


def test_the_command_shows_first(checkout: Path, smoke: Smoke, monkeypatch: pytest.MonkeyPatch) -> None:
    params = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
    shutil.copy(params, checkout / "params.yaml")
    monkeypatch.chdir(checkout)
    old = checkout / store.CACHE / "training" / "cosine-of-old"
    old.mkdir(parents=True)
    (old / "000000040.safetensors").write_bytes(bytes(2_000_000))
    assert "nothing to remove" in CliRunner().invoke(app, ["gc"]).output
    for path in (old, *old.iterdir()):
        os.utime(path, (1, 1))
    shown = CliRunner().invoke(app, ["gc"]).output
    assert "40 steps" in shown and "would remove 1 training states, 2.0 MB" in shown and old.exists()
    assert "removed 1 training states" in CliRunner().invoke(app, ["gc", "--delete"]).output
    assert not old.exists()
