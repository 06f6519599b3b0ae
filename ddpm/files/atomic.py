"""Writes files and folders atomically: each is complete or not there."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddpm.errors import InputError

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
        # protects: tests/stages/test_faults.py::test_what_a_killed_writer_leaves_is_removed_by_the_next_and_hashed_by_nobody
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
                # protects: tests/stages/test_faults.py::test_a_file_is_on_the_disk_before_it_has_its_name
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
