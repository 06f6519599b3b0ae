"""Detects and mends a truncated dvc.lock.

DVC empties dvc.lock and then writes the whole file again (https://github.com/treeverse/dvc/issues/10629). A kill during the
write leaves the beginning of the new text. The beginning is often valid YAML. DVC then accepts the file and continues with fewer
stages, or with a stage that has lost outputs. So each command and each flow compares dvc.lock with the last whole file, of which
`.cache` holds a copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddpm.errors import InputError
from ddpm.files import atomic, paths
from ddpm.files.yaml_file import read_yaml
from ddpm.provenance import git
from ddpm.provenance.dvc_lock import HEAD, NAME, STAGE

COPY = paths.CACHE / NAME
_DELETED = "deleted\n"  # the content of the copy if there was no dvc.lock
_HASH = re.compile(r"^      md5: '?[0-9a-f]{32}(\.dir)?'?$", re.MULTILINE)
_OTHER_HASH = re.compile(r"^      (etag|checksum|cloud|files):", re.MULTILINE)  # hashes of outputs outside the checkout
# Matches lines of a merge conflict, and the start of a section that this module does not mend.
_FOREIGN = re.compile(r"^(<<<<<<<|=======|>>>>>>>|datasets:)", re.MULTILINE)

Entries = dict[str, str]  # the text of each stage, by its name


def check(root: Path, say: Callable[[str], None]) -> None:
    """Mends a truncated dvc.lock, and reports that in one line. Copies a whole dvc.lock to `.cache`.

    A file is truncated if its last entry is incomplete, or if it holds only the first stages of the last whole file. These files
    count as whole:

    - a file that git has, after a checkout, `dvc exp apply` or a stash;
    - a file that lacks only stages that dvc.yaml lacks too;
    - a deleted file;
    - a file that DVC did not write, such as a file with a merge conflict.

    Raises InputError if the file is truncated, and neither `.cache` nor git has a whole file.
    """
    path = root / NAME
    if not (root / ".dvc").is_dir():
        return
    copy = _read(root / COPY)
    text = _read(path)
    if text == copy or (text is None and copy == _DELETED):
        return
    if text is not None and _mended(root, text, copy) != text:
        from dvc.lock import make_lock

        # Waits for a running DVC, which holds this lock while it writes the file.
        folder = root / ".dvc" / "tmp"
        folder.mkdir(exist_ok=True)
        with make_lock(str(folder / "lock"), tmp_dir=str(folder), friendly=True, wait=True):
            text = _mend(root, copy, say)
    _remember(root, text, say)


def _mend(root: Path, copy: str | None, say: Callable[[str], None]) -> str | None:
    text = _read(root / NAME)
    if text is None:
        return None
    mended = _mended(root, text, copy)
    if mended is None:
        raise InputError(
            f"{root / NAME}: cut off, by a `dvc repro` that was killed while it wrote the file, and neither .cache nor git has"
            " a whole copy: delete it and run this again; DVC restores finished outputs from its cache"
        )
    if mended != text:
        atomic.write_text(root / NAME, mended)
        before, after = entries(text) or {}, entries(mended) or {}
        restored = sum(before.get(name) != entry for name, entry in after.items())
        say(
            f"{NAME}: mended: it was cut off by a `dvc repro` that was killed while it wrote the file;"
            f" {restored} of {len(after)} stages were restored from the last whole file"
        )
    return mended


def _remember(root: Path, text: str | None, say: Callable[[str], None]) -> None:
    try:
        atomic.write_text(root / COPY, _DELETED if text is None else text)
    except (OSError, InputError) as error:
        say(f"{NAME}: could not be copied to {COPY} ({error})")


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "replace")  # the end may lie inside a character
    except FileNotFoundError:
        return None


def entries(text: str) -> Entries | None:
    """Returns the stages of a whole or truncated dvc.lock, or None if DVC did not write the text."""
    if _FOREIGN.search(text) or not (text.startswith(HEAD) or HEAD.startswith(text)):
        return None
    found = STAGE.split(text.removeprefix(HEAD)) if text.startswith(HEAD) else []
    return {entry.partition("\n")[0].strip().removesuffix(":"): entry for entry in found if entry.strip()}


def _mended(root: Path, text: str, copy: str | None) -> str | None:
    """Returns `text` if it is whole. Otherwise joins its complete entries with the missing entries of the last whole file.

    Returns None if no entry is left.
    """
    own = entries(text)
    if own is None:
        return text
    committed = entries((git.ask(root, "show", f"HEAD:./{NAME}") or b"").decode("utf-8", "replace")) or {}
    last = committed if copy is None else entries(copy) or {}
    known = {name: [of[name] for of in (last, committed) if name in of] for name in {**last, **own}}
    stages = _stages(root)
    kept = {name: entry for name, entry in own.items() if _is_complete(entry, known[name], _outputs(stages, name))}
    expected = [name for name in last if name in own or name.partition("@")[0] in stages]
    lost = list(own) == expected[: len(own)] != expected
    if own and ((own == kept and not lost) or (_ends_well(own, known) and _is_in_git(root))):
        return text
    entries_left = "".join(kept.get(name) or next(iter(found), "") for name, found in known.items())
    return HEAD + entries_left if entries_left else None


def _ends_well(own: Entries, known: dict[str, list[str]]) -> bool:
    name, entry = list(own.items())[-1]
    return entry.endswith("\n") and not _begins(entry, known[name])


def _begins(entry: str, known: Sequence[str]) -> bool:
    """Returns whether the entry is a truncated form of a known entry."""
    return any(whole.startswith(entry) and whole != entry for whole in known)


def _is_complete(entry: str, known: Sequence[str], outputs: int) -> bool:
    """Returns whether DVC wrote the whole entry. DVC writes outputs last: path, hash, size and number of files of each.

    Args:
        entry: the text of the stage's entry.
        known: texts of the same stage's entry in files that were not truncated.
        outputs: the number of the stage's outputs in dvc.yaml.
    """
    if entry in known:
        return True
    if not entry.endswith("\n") or _begins(entry, known):
        return False
    found = _output_entries(entry)
    # protects: tests/provenance/test_lock_mending.py::test_every_cut_is_mended[True-likelihood@cosine]
    if len(found) < min([outputs, *(len(_output_entries(whole)) for whole in known)]):
        return False
    return all(_is_complete_output(output) for output in found)


def _output_entries(entry: str) -> list[str]:
    return entry.partition("\n    outs:\n")[2].split("    - path: ")[1:]


def _is_complete_output(output: str) -> bool:
    if _OTHER_HASH.search(output):
        return True
    found = _HASH.search(output)
    fields = ("size", "nfiles") if found and found[1] else ("size",)
    return found is not None and all(re.search(rf"^      {field}: \d+$", output, re.MULTILINE) for field in fields)


def _stages(root: Path) -> dict[str, Any]:
    """Returns the stages of dvc.yaml."""
    wiring = read_yaml(root / "dvc.yaml") if (root / "dvc.yaml").exists() else None
    stages = wiring.get("stages") if isinstance(wiring, dict) else None
    return stages if isinstance(stages, dict) else {}


def _outputs(stages: dict[str, Any], name: str) -> int:
    stage = stages.get(name.partition("@")[0])
    found = [stage.get(kind) for kind in ("outs", "metrics", "plots")] if isinstance(stage, dict) else []
    return sum(len(outputs) for outputs in found if isinstance(outputs, list))


def _is_in_git(root: Path) -> bool:
    """Returns whether git has a file of exactly these bytes."""
    name = git.line(root, "hash-object", NAME)
    return name is not None and git.ask(root, "cat-file", "-e", name) is not None
