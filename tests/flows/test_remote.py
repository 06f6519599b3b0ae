"""Checks that results go from one clone to another through a real S3 server."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpm.provenance import dvc_lock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clones(
    scratch: Any, s3: Any, tmp_path: Path, scratch_maker: Callable[[Path, Path], Any]
) -> Iterator[Callable[..., Any]]:
    """Returns clones(), which commits and clones `scratch`, and gives the clone the credentials of `s3`."""
    scratch.environment.update(s3.environment)
    shutil.copy(ROOT / "Makefile", scratch.root)
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    made = []

    def clone(without: tuple[str, ...] = ()) -> Any:
        for name in without:
            (scratch.root / name).unlink()
        for command in (("add", "--all"), (*author, "commit", "--quiet", "--message", "all")):
            assert scratch.run("git", *command).returncode == 0
        other = tmp_path / f"clone {len(made)}"
        assert scratch.run("git", "clone", "--quiet", ".", str(other)).returncode == 0
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        made.append(scratch_maker(other, empty))
        made[-1].environment.update(s3.environment)
        return made[-1]

    yield clone
    for item in made:
        item.end()


def make_remote(scratch: Any, *settings: str) -> Any:
    return scratch.run("make", "remote", "INSTALLED=", *settings)


def dvc(scratch: Any, *arguments: str) -> str:
    done = scratch.run("dvc", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.proof
def test_a_clone_pulls_a_result_and_has_nothing_to_do(scratch: Any, s3: Any, clones: Callable[..., Any]) -> None:
    bucket = s3.bucket("clones")
    done = make_remote(scratch, f"URL=s3://{bucket}/a/folder", f"ENDPOINT={s3.url}")
    assert done.returncode == 0, done.stderr
    assert "only-of-these-tests" not in (scratch.root / ".dvc" / "config").read_text()
    scratch.repro()
    dvc(scratch, "push", "--run-cache")
    assert all(key.startswith("a/folder/") for key in s3.keys(bucket))

    other = clones()
    del other.environment["AWS_ENDPOINT_URL"]  # .dvc/config names the address
    dvc(other, "pull", "--run-cache")
    assert "Running stage" not in other.repro()
    assert (other.root / "trained-linear").read_bytes() == (scratch.root / "trained-linear").read_bytes()


@pytest.mark.proof
def test_what_was_run_elsewhere_is_known_without_its_dvc_lock(
    scratch: Any, s3: Any, clones: Callable[..., Any]
) -> None:
    bucket = s3.bucket("unlocked")
    assert make_remote(scratch, f"URL=s3://{bucket}").returncode == 0  # AWS_ENDPOINT_URL names the server
    scratch.repro()
    lock = (scratch.root / "dvc.lock").read_bytes()
    dvc(scratch, "push", "--run-cache")
    other = clones(without=("dvc.lock",))
    other.run("dvc", "fetch", "--run-cache")
    said = dvc(other, "repro", "--pull")
    assert "Running stage" not in said and "is cached - skipping run" in said
    assert (other.root / "dvc.lock").read_bytes() == lock


@pytest.mark.chaos
def test_a_damaged_object_is_refused(scratch: Any, s3: Any, clones: Callable[..., Any]) -> None:
    bucket = s3.bucket("damaged")
    assert make_remote(scratch, f"URL=s3://{bucket}", f"ENDPOINT={s3.url}").returncode == 0
    scratch.repro()
    dvc(scratch, "push")
    (key,) = [
        key
        for key in s3.keys(bucket)
        if s3.client().get_object(Bucket=bucket, Key=key)["Body"].read() == b"train@linear"
    ]
    s3.client().put_object(Bucket=bucket, Key=key, Body=b"train@lineaR")
    other = clones()
    done = other.run("dvc", "pull")
    assert done.returncode != 0 and not (other.root / "trained-linear").exists()
    assert (other.root / "trained-cosine").exists()
    s3.client().delete_object(Bucket=bucket, Key=key)
    dvc(scratch, "push")
    dvc(other, "pull")
    assert (other.root / "trained-linear").read_text() == "train@linear"


def test_no_bucket_is_one_line(scratch: Any) -> None:
    shutil.copy(ROOT / "Makefile", scratch.root)
    done = make_remote(scratch)
    assert done.returncode == 2 and "URL=s3://bucket/folder" in done.stderr
    assert not (scratch.root / ".dvc" / "config").read_text().strip()


@pytest.mark.chaos
def test_a_push_that_is_cut_off_goes_on(scratch: Any, s3: Any, bad_line: Any, clones: Callable[..., Any]) -> None:
    """Every connection drops in the middle of a file of 40 MB. A second push on a better line uploads only the missing files."""
    bucket = s3.bucket("cut-off")
    assert make_remote(scratch, f"URL=s3://{bucket}", f"ENDPOINT={bad_line.url}").returncode == 0
    scratch.repro()
    large = scratch.root / "large"
    with large.open("wb") as file:
        for block in range(40):
            file.write(hashlib.sha256(str(block).encode()).digest() * 32768)
    dvc(scratch, "add", "large")
    bad_line.cut, bad_line.cuts = 3_000_000, 10**6
    done = scratch.run("dvc", "push", "--run-cache")
    assert done.returncode != 0 and "Traceback" not in done.stderr and bad_line.dropped
    sent = {key: s3.client().head_object(Bucket=bucket, Key=key)["LastModified"] for key in s3.keys(bucket)}
    digest = hashlib.md5(large.read_bytes()).hexdigest()
    assert f"files/md5/{digest[:2]}/{digest[2:]}" not in sent  # no partial object is left

    bad_line.cuts = bad_line.dropped + 2  # the connection drops twice more, and retries succeed
    dvc(scratch, "push", "--run-cache")
    now = {key: s3.client().head_object(Bucket=bucket, Key=key)["LastModified"] for key in s3.keys(bucket)}
    assert {key: now[key] for key in sent if key.startswith("files/")} == {
        key: when for key, when in sent.items() if key.startswith("files/")
    }
    other = clones()
    dvc(other, "pull")
    assert (other.root / "large").read_bytes() == large.read_bytes()
    assert "Running stage" not in other.repro()


@pytest.mark.chaos
def test_a_remote_that_refuses_leaves_everything_as_it_was(scratch: Any, s3: Any, clones: Callable[..., Any]) -> None:
    bucket = s3.bucket("refused")
    assert make_remote(scratch, f"URL=s3://{bucket}", f"ENDPOINT={s3.url}").returncode == 0
    scratch.repro()
    scratch.environment["AWS_SECRET_ACCESS_KEY"] = "not-the-one"
    done = scratch.run("dvc", "push")
    assert done.returncode != 0 and "Traceback" not in done.stderr and "not-the-one" not in done.stderr
    assert not s3.keys(bucket) and "Running stage" not in scratch.repro()
    scratch.environment.update(s3.environment)
    dvc(scratch, "push")
    pushed = {key.removeprefix("files/md5/").replace("/", "") for key in s3.keys(bucket)}
    locked = [entry["md5"] for stage in dvc_lock.read(scratch.root).values() for entry in stage["outs"]]
    assert pushed == set(locked)
