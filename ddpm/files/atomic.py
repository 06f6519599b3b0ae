"""Writes files and folders atomically: each is complete or absent."""

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

MASK = os.umask(0o077)  # Python has no call that only reads the umask
os.umask(MASK)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_full_is_one_line(path: Path) -> Iterator[None]:
    """Converts a disk-full error in the `with` block into InputError. path: the file or folder that the block writes."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(
            f"{path}: no room on the disk ({os.strerror(error.errno)}); an earlier version is unchanged:"
            " free some space and run this again"
        ) from error


def _temporary_beside(path: Path) -> str:
    """Returns a prefix for the names of temporary files beside `path`. .dvcignore excludes names with this prefix.

    Creates the parent folder. Removes temporary files that killed processes left beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        import psutil  # imported here, because code that only reads files must not need psutil

        owner = left.name.rpartition(".tmp-")[2].partition("-")[0]
        # protects: tests/stages/test_faults.py::test_what_a_killed_writer_leaves_is_removed_by_the_next_and_hashed_by_nobody
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return f".{path.name}.tmp-{os.getpid()}-"


@contextmanager
def replacing(path: Path, keep: bool = False) -> Iterator[Path]:
    """Yields a temporary file that replaces `path` when the `with` block succeeds, and is removed when the block fails.

    keep: do not replace an existing file, so the first of several writers wins. Raises InputError when the disk is full.
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
            if not (keep and _link_unless_exists(temporary, path)):
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _link_unless_exists(file: Path, path: Path) -> bool:
    """Makes `path` a hard link to `file`, unless `path` exists. Returns False if the link failed and `path` is still missing."""
    try:
        path.hardlink_to(file)
    except FileExistsError:
        pass
    except OSError:
        return path.exists()
    return True


@contextmanager
def replacing_dir(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `path` when the `with` block succeeds, and is removed when the block fails.

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
    """Renames `new` to `path`. The old folder is moved aside first and removed last, so `path` is never half written."""
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
    """Waits until the bytes of a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
