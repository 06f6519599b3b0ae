"""Checks that dvc.lock is read stage by stage, with the same meaning as in DVC's own parser."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import dvc.utils.serialize._yaml as serialize
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm.errors import InputError
from ddpm.provenance import dvc_lock

LOCK = (Path(__file__).parents[2] / "dvc.lock").read_text()
HEAD = dvc_lock.HEAD
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prepare", "train@linear", "sample@linear-ddim-50", "null", "true", "1e3", "a b", "'", "-", "#"]
)


def stages(text: str) -> dict[str, Any]:
    texts = dvc_lock.split(text)
    assert texts is not None
    return dict(dvc_lock.Stages(texts, serialize.loads_yaml))


def test_the_committed_file_is_read_as_dvc_reads_it() -> None:
    whole = serialize.loads_yaml(LOCK)
    assert stages(LOCK) == whole["stages"]
    assert list(stages(LOCK)) == list(whole["stages"])


@given(st.dictionaries(NAMES, st.fixed_dictionaries({"cmd": st.text(max_size=300), "params": VALUES}), min_size=1))
def test_whatever_dvc_writes_is_read_as_dvc_reads_it_or_left_to_dvc(content: dict[str, Any]) -> None:
    """Names that YAML writes in quotes are left to DVC's parser."""
    text = serialize.dumps_yaml(OrderedDict(schema="2.0", stages=content))
    if dvc_lock.split(text) is not None:
        assert stages(text) == serialize.loads_yaml(text)["stages"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEAD + "  a:\n    cmd: x\ndatasets:\n- name: d\n",
        HEAD + "  a:\n    cmd: x\n  a:\n    cmd: y\n",
        HEAD + "  # a comment\n  a:\n    cmd: x\n",
        HEAD + "<<<<<<< HEAD\n  a:\n    cmd: x\n=======\n  a:\n    cmd: y\n>>>>>>> other\n",
        HEAD + "  a:\n    cmd: x",
        HEAD + "  null:\n    cmd: x\n",
        "stages:\n  a:\n    cmd: x\nschema: '2.0'\n",
    ],
)
def test_what_dvc_did_not_write_is_left_to_dvc(text: str) -> None:
    assert dvc_lock.split(text) is None


def test_a_damaged_stage_is_one_line_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / dvc_lock.NAME).write_text(HEAD + "  a:\n    cmd: [\n  b:\n    cmd: x\n")
    found = dvc_lock.read(tmp_path)
    assert found["b"] == {"cmd": "x"}
    with pytest.raises(InputError, match=r"dvc\.lock: not readable as YAML"):
        found["a"]


def test_the_version_of_a_stage_changes_with_its_entry_alone(tmp_path: Path) -> None:
    path = tmp_path / dvc_lock.NAME
    path.write_text(LOCK)
    before = dict(dvc_lock.versions(tmp_path))
    old = stages(LOCK)["prepare"]["outs"][0]["md5"]
    path.write_text(LOCK.replace(old, "0" * 32 + ".dir", 1))
    after = dvc_lock.versions(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {next(name for name, text in before.items() if old in text)}
