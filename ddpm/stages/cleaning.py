"""`ddpm gc`: what nothing refers to, and how to remove it. To find and to remove are two steps, so a look changes nothing.

Here: saved states of training, DVC's cache and remote, uploads that were never finished. MLflow's part is tracking.unreferenced.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
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

    data = store.read_json(about)["sha256"]
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


class _Paths(logging.Handler):
    """Collects what DVC says that it would remove."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "Removing %s":
            self.paths.append(record.getMessage().removeprefix("Removing "))


def dvc_objects(root: Path, tips: bool = False, cloud: bool = False) -> Iterator[Garbage]:
    """What is in DVC's cache (cloud: and in its remote) and in no dvc.lock of the workspace, of any commit and experiment.

    tips: of the commits, only the tips of branches and tags count. Where DVC cannot tell what a folder holds it asks, or
    refuses when there is nobody to ask. Raises InputError.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    if not (root / ".dvc").is_dir():
        return
    kept = {"all_branches": True, "all_tags": True} if tips else {"all_commits": True}
    collect = {"workspace": True, "all_experiments": True, "cloud": cloud, **kept}

    def gc(dry: bool) -> None:
        try:
            with Repo(str(root), _wait_for_lock=True) as repo:
                repo.gc(dry=dry, **collect)
        except DvcException as error:
            raise InputError(f"dvc gc: {' '.join(str(error).split())}") from error

    found, logger = _Paths(), logging.getLogger("dvc_data.hashfile.gc")
    level = logger.level
    logger.addHandler(found)
    logger.setLevel(logging.INFO)
    try:
        gc(dry=True)
    finally:
        logger.setLevel(level)
        logger.removeHandler(found)
    here = [path for name in found.paths if (path := Path(name)).is_absolute() and path.exists()]
    for kind, count, size in (
        ("objects of DVC's cache", len(here), sum(path.stat().st_size for path in here)),
        ("objects of DVC's remote", len(found.paths) - len(here), None),
    ):
        if count:
            where = "branch or tag" if tips else "commit"
            yield Garbage(kind, f"{count:,} files", f"in no dvc.lock of any {where}", size, partial(gc, dry=False))


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
