"""`ddpm gc`: what nothing refers to, and how to remove it. To find and to remove are two steps, so a look changes nothing.

Here: saved states of training, DVC's cache and remote, uploads that were never finished. MLflow's part is tracking.unreferenced.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ddpm.stages import store
from ddpm.stages.errors import InputError
from ddpm.stages.params import Params


@dataclass(frozen=True)
class Garbage:
    """Something that nothing refers to. kind: plural, as it is counted. size: bytes, None where only a query would tell."""

    kind: str
    name: str
    why: str
    size: int | None
    remove: Callable[[], Any]


def training_states(params: Params, root: Path, before: float) -> Iterator[Garbage]:
    """Saved states last written before that moment (seconds since 1970) from which no schedule of `params` would go on.

    Those that one would are kept, finished or not: more `training.steps` go on from them. Without a dataset nobody can tell:
    all are kept.
    """
    folders = sorted(path for path in (root / store.CACHE / "training").glob("*") if path.is_dir())
    about = root / store.dataset_dir() / "dataset.json"
    if not folders or not about.exists():
        return
    from ddpm.stages.train import training_key

    data = store.read_dataset_record(root)["sha256"]
    current = {f"{schedule}-{training_key(params, schedule, data)[:16]}" for schedule in params.schedules}
    for folder in folders:
        files = [path.stat() for path in folder.rglob("*") if path.is_file()]
        newest = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
        if folder.name in current or newest >= before:
            continue
        steps = max((int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdigit()), default=0)
        why = f"{steps:,} steps under settings, data or code that are not the present ones"
        size = sum(file.st_size for file in files)
        yield Garbage(
            "training states",
            str(folder.relative_to(root)),
            why,
            size,
            partial(shutil.rmtree, folder, ignore_errors=True),
        )


# DVC.


# Where results are named. `git` reads these patterns, the regular expression what the files hold.
LOCKS = (":(glob)**/dvc.lock", ":(glob)**/?*.dvc")
NAMED = re.compile(rb"^ *(?:- )?(?:(deps|outs):|md5: *['\"]?([0-9a-f]{32}(?:\.dir)?)\b)", re.MULTILINE)
QUEUES = ("refs/stash", "refs/exps/stash", "refs/exps/celery")  # their reflogs are the entries


def dvc_objects(
    root: Path, tips: bool = False, cloud: bool = False, unlisted: bool = False, say: Callable[[str], None] = print
) -> Iterator[Garbage]:
    """What is in DVC's cache (cloud: and in its remote) and in no dvc.lock of the workspace, of any commit, stash and
    experiment, run, running or queued.

    tips: of the commits, only the tips of branches and tags count. A folder's files are in its list, an object of its own; where
    that is missing nobody can tell which they are. In the cache they go: without the list nothing could be made of them, and who
    fetches it fetches them. The remote is left alone then, for somebody's upload may be under way, whose list comes last;
    unlisted: it is not. Raises InputError.
    """
    if not (root / ".dvc").is_dir():
        return
    if (cache := _cache(root)) and not cache.is_relative_to((root / ".dvc").resolve()):
        say(f"gc: DVC's cache is {cache}, which other clones may use too: left alone (`dvc gc --projects` asks them)")
        return
    if cloud and _git(root, "rev-parse", "--is-shallow-repository").strip() == b"true":
        raise InputError(
            "gc --cloud: this clone is shallow, and the remote may serve commits that it lacks; git fetch --unshallow"
        )
    with _unnamed(root, tips, cloud) as found:
        sizes = [Path(path).stat().st_size for path in found.cache.paths]
    clean_remote = unlisted or not found.unlisted
    if found.unlisted:
        where = (
            "not in the cache (`dvc fetch --all-commits` brings those that a remote has)"
            if not cloud
            else "neither in the cache nor in the remote"
        )
        left = "" if clean_remote or not cloud else "; DVC's remote is left alone (--unlisted: it is not)"
        say(f"gc: {found.unlisted:,} folders of other commits are {where}: their files cannot be told apart{left}")
    why = f"in no dvc.lock of any {'branch or tag' if tips else 'commit'}"
    if sizes:
        remove = partial(_remove_from_cache, root, tips, cloud)
        yield Garbage("objects of DVC's cache", f"{len(sizes):,} files", why, sum(sizes), remove)
    if clean_remote and found.remote and (count := len(found.remote.paths)):
        yield Garbage(
            "objects of DVC's remote", f"{count:,} files", why, None, partial(_remove_from_remote, root, tips, unlisted)
        )


def _cache(root: Path) -> Path | None:
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        path = getattr(repo.cache.local, "path", None)
        return Path(path).resolve() if path else None


def _remove_from_cache(root: Path, tips: bool, cloud: bool) -> None:
    """Looks again: a stage may have ended since."""
    with _unnamed(root, tips, cloud) as found:
        found.cache.remove()


def _remove_from_remote(root: Path, tips: bool, unlisted: bool) -> None:
    from dvc_data.hashfile.db import get_index

    with _unnamed(root, tips, cloud=True) as found:
        if found.remote and (unlisted or not found.unlisted):
            found.remote.remove()
            get_index(found.remote.database).clear()  # what DVC believes to be there


@dataclass(frozen=True)
class Objects:
    """Of a cache or remote of DVC's."""

    database: Any
    paths: list[str]

    def remove(self) -> None:
        if self.paths:
            self.database.fs.remove(self.paths)


@dataclass(frozen=True)
class Unnamed:
    """What no dvc.lock names. unlisted: folders that are an output of some commit and have no list."""

    cache: Objects
    remote: Objects | None
    unlisted: int


@contextmanager
def _unnamed(root: Path, tips: bool, cloud: bool) -> Iterator[Unnamed]:
    """What is so while no other process of DVC's writes. Raises InputError."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
            cache = repo.cache.repo
            remote = repo.cloud.get_remote_odb(None, "gc", hash_name="md5") if cloud else None
            named, outputs = _named(root, tips)
            unlisted = 0
            for folder in [name for name in named if name.endswith(".dir")]:
                lists = (_listed(database, folder) for database in (cache, remote) if database)
                files = next((files for files in lists if files is not None), None)
                unlisted += files is None and folder in outputs
                named |= files or set()
            yield Unnamed(_others(cache, named), _others(remote, named) if remote else None, unlisted)
    except (DvcException, OSError) as error:
        raise InputError(f"dvc gc: {' '.join(str(error).split())}") from error


def _listed(database: Any, folder: str) -> set[str] | None:
    """The files of a folder, if its list is there and whole."""
    try:
        with database.fs.open(database.oid_to_path(folder), "r") as file:
            return {entry["md5"] for entry in json.load(file)}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _others(database: Any, named: set[str]) -> Objects:
    """All but these, lists of folders first: an interrupted removal leaves no list without its files."""
    names = sorted(set(database.all()) - named, key=lambda name: not name.endswith(".dir"))
    return Objects(database, [database.oid_to_path(name) for name in names])


def _named(root: Path, tips: bool) -> tuple[set[str], set[str]]:
    """-> hashes that a dvc.lock or .dvc file names, and those among them that are an output's folder."""
    named, folders, section = set[str](), set[str](), b""
    for key, value in NAMED.findall(_lock_files(root, tips)):
        section = key or section
        if value:
            named.add(value.decode())
            if section == b"outs" and value.endswith(b".dir"):
                folders.add(value.decode())
    return named, folders


def _lock_files(root: Path, tips: bool) -> bytes:
    """All dvc.lock and .dvc files, one behind the other: the workspace's, those of experiments that run in temporary folders, and
    those that git has, each version once. DVC would go through every commit, a third of a second each.
    """
    present = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *LOCKS)
    files = {root / name for name in os.fsdecode(present).split("\0") if name}
    files |= {path for depth in ("*", "*/*") for path in (root / ".dvc" / "tmp" / "exps").glob(f"{depth}/dvc.lock")}
    texts = [path.read_bytes() for path in files if path.is_file()]

    everywhere = ("refs/heads", "refs/tags", "refs/exps", "refs/stash") if tips else ("refs",)
    commits = _git(root, "for-each-ref", "--format=%(objectname)", *everywhere).split()
    commits += _git(root, "rev-parse", "--revs-only", "HEAD").split()  # on no branch, perhaps
    for queue in _git(root, "for-each-ref", "--format=%(refname)", *QUEUES).decode().split():
        commits += _git(root, "rev-list", "--walk-reflogs", queue).split()
    if commits:
        walk = ("--no-walk",) if tips else ("--full-history",)
        objects = _git(root, "rev-list", "--objects", *walk, "--stdin", "--", *LOCKS, given=b"\n".join(commits))
        blobs = [
            name
            for name, _, path in (line.partition(b" ") for line in objects.splitlines())
            if path.endswith((b"dvc.lock", b".dvc"))
        ]
        texts.append(_git(root, "cat-file", "--batch", given=b"\n".join(blobs)))
    return b"\n".join(texts)


def _git(root: Path, *arguments: str, given: bytes = b"") -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, input=given, capture_output=True, check=True)
    except FileNotFoundError:
        raise InputError("gc: git is not installed: nobody else knows which results the commits name") from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode(errors="replace").split())
        raise InputError(f"gc: git {arguments[0]}: {said[:300]}") from None
    return done.stdout


def dvc_remote(root: Path) -> tuple[str, str | None] | None:
    """The default remote's URL and endpoint, if it has one."""
    from dvc.config import Config

    if not (root / ".dvc").is_dir():
        return None
    config = Config(str(root / ".dvc"))
    name = config["core"].get("remote")
    remote = config["remote"].get(name) if name else None
    return (remote["url"], remote.get("endpointurl")) if remote else None


# S3.


def incomplete_uploads(url: str, endpoint: str | None, before: float) -> Iterator[Garbage]:
    """Parts of uploads to s3://bucket/folder that were begun before that moment and never finished: no listing shows them,
    and they are paid for.
    """
    parts = urlsplit(url)
    if parts.scheme != "s3":
        return
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    prefix = f"{parts.path.strip('/')}/".lstrip("/")
    try:
        client = boto3.client("s3", endpoint_url=endpoint)
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=parts.netloc, Prefix=prefix)
        uploads = [upload for page in pages for upload in page.get("Uploads", [])]
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise InputError(f"{url}: {' '.join(str(error).split())[:300]}") from error
    for upload in uploads:
        if upload["Initiated"].timestamp() < before:
            begun = f"begun {upload['Initiated']:%Y-%m-%d %H:%M} and never finished"
            which = {"Bucket": parts.netloc, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            remove = partial(client.abort_multipart_upload, **which)
            yield Garbage("unfinished uploads", f"s3://{parts.netloc}/{upload['Key']}", begun, None, remove)
