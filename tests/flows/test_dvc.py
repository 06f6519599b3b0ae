"""Checks how the flow uses DVC: it reads the order and the unchanged stages, and runs single stages."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from ddpm.errors import InputError
from ddpm.files.params import Params
from flows import parameters
from flows.processes.dvc_command import Ended
from flows.repro import commands, dag
from flows.watch import Outcome

ROOT = Path(__file__).parent.parent.parent


HOSTILE = "x; touch it_ran; true"


def with_names(root: Path, name: str) -> None:
    """Writes params.yaml with `name` as the data path, and as the only schedule, sampler and number of steps."""
    yaml = YAML()
    values = yaml.load((ROOT / "recipes" / "smoke.yaml").read_text())
    values["data"]["path"] = name
    values["schedules"] = {name: {"schedule": "linear"}}
    values["samplers"] = {name: {"sampler": "ddim"}}
    values["sweep"] = {"schedules": [name], "samplers": [name], "steps": [name]}
    with (root / "params.yaml").open("w") as file:
        yaml.dump(values, file)


@pytest.mark.parametrize("name", [HOSTILE, "$(touch it_ran)", "'", "a b", "\n", "`touch it_ran`"])
def test_no_name_of_params_yaml_is_in_a_command(name: str, scratch: Any) -> None:
    """A shell runs the commands, so a name from params.yaml could run code."""
    shutil.copy(ROOT / "dvc.yaml", scratch.root)

    def commands(name: str) -> list[str]:
        with_names(scratch.root, name)
        with Repo(str(scratch.root)) as repo:
            return [stage.cmd for stage in repo.index.stages]

    assert commands(name) == commands("benign")


def test_a_hostile_name_runs_nothing(tmp_path: Path, clone_maker: Callable[[Path], Any]) -> None:
    clone = clone_maker(tmp_path / "clone")
    with_names(clone.root, HOSTILE)
    for folder in ("dataset", HOSTILE):
        (clone.root / folder).mkdir()
    (clone.root / "auto.json").write_text('{"precision": "float32", "compile": false}')
    done = clone.run(sys.executable, "-m", "dvc", "repro", "--single-item", f"train@{HOSTILE}")
    assert done.returncode != 0
    assert "String should match pattern" in done.stderr  # so the stage did start
    assert not (clone.root / "it_ran").exists()


@pytest.mark.parametrize("name", ["..", "../docs", "../../outside", "/tmp/../../docs"])
def test_dvc_refuses_a_name_that_leads_out_of_the_folder_of_an_output(name: str, scratch: Any) -> None:
    shutil.copy(ROOT / "dvc.yaml", scratch.root)
    with_names(scratch.root, name)
    with pytest.raises(InputError, match=r"dvc\.yaml: .*(overlap|is specified in|outside)"):
        dag.read(scratch.root)


class Record:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reports: list[dict[str, Any]] = []

    def started(self, stage: str) -> None: ...

    def line(self, stage: str, text: str) -> None:
        self.lines.append(text)

    def progress(self, stage: str, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def ended(self, stage: str, outcome: Outcome) -> None: ...


@pytest.fixture
def path(scratch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", scratch.environment["PATH"])
    monkeypatch.setenv("SCRATCH", scratch.mark)


def test_the_order_is_the_one_of_dvc_yaml(scratch: Any) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, scratch.root)
    order = dag.read(scratch.root)
    points = [point.name for point in Params.load(ROOT / "params.yaml").points()]
    schedules = Params.load(ROOT / "params.yaml").sweep.schedules
    assert [name for name in order.waits_for if name.startswith("sample@")] == [f"sample@{point}" for point in points]
    assert order.waits_for["prepare"] == order.waits_for["probe"] == ()
    assert all(order.waits_for[f"train@{schedule}"] == ("prepare", "probe") for schedule in schedules)
    for point in points:
        assert order.waits_for[f"sample@{point}"] == ("probe", f"train@{point.partition('-')[0]}")
        assert order.waits_for[f"evaluate@{point}"] == ("prepare", f"sample@{point}")
    assert {f"evaluate@{point}" for point in points} <= set(order.waits_for["report"])
    assert not order.unchanged


def test_unchanged_is_what_dvc_repro_leaves_alone(scratch: Any) -> None:
    def ran() -> set[str]:
        return {line.split("'")[1] for line in scratch.repro().splitlines() if line.startswith("Running stage '")}

    everything = set(dag.read(scratch.root).waits_for)
    assert not dag.read(scratch.root).unchanged
    assert ran() == everything
    assert dag.read(scratch.root).unchanged == everything
    assert ran() == set()

    # DVC's cache has this output, so only this stage and the stages after it need a check
    (scratch.root / "trained-linear").unlink()
    after = {"train@linear", "sample@linear", "report"}
    assert dag.read(scratch.root).unchanged == everything - after
    assert ran() <= after

    parameters.write(scratch.root, overrides=["sampling.images=7"])
    after = {"sample@linear", "sample@cosine", "report"}
    assert dag.read(scratch.root).unchanged == everything - after
    assert ran() <= after

    (scratch.root / "source").write_text("2")
    assert dag.read(scratch.root).unchanged == set()


@pytest.mark.parametrize(
    ("text", "named"), [("stages: [", "dvc.yaml"), ("stages: {}", "no stages"), ("a: 1", "dvc.yaml")]
)
def test_a_broken_dvc_yaml_is_one_line(scratch: Any, text: str, named: str) -> None:
    (scratch.root / "dvc.yaml").write_text(text)
    with pytest.raises(InputError, match=named) as caught:
        dag.read(scratch.root)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("path")
def test_how_a_stage_ends(scratch: Any) -> None:
    def reproduce(stage: str) -> tuple[Outcome, Record]:
        record = Record()
        return commands.reproduce(stage, scratch.root, record), record

    outcome, record = reproduce("prepare")
    assert outcome == Outcome("Completed", "2 steps in 0.0 s")
    assert record.lines == ["prepare: began", "prepare: 2 steps in 0.0 s"]
    assert record.reports == [{"stage": "prepare", "done": 1, "total": 2, "unit": "steps", "values": {"loss": 0.5}}]
    assert reproduce("prepare")[0].kind == "Unchanged"

    (scratch.root / "source").write_text("2")
    assert reproduce("prepare")[0].kind == "Completed"
    (scratch.root / "source").write_text("1")
    assert reproduce("prepare")[0].kind == "Restored"

    scratch.control(train_linear={"exit": 2}, train_cosine={"die": True})
    outcome, _ = reproduce("train@linear")
    assert outcome == Outcome("Failed", "ddpm: train@linear can't")
    assert reproduce("train@cosine")[0].kind == "Killed"
    assert reproduce("train@cosine")[0].kind == "Completed"


@pytest.mark.usefixtures("path")
def test_what_another_dvc_holds_is_busy(scratch: Any) -> None:
    scratch.control(prepare={"until": "never"})
    scratch.start(sys.executable, "-m", "dvc", "repro", "--single-item", "prepare")
    scratch.pid("prepare")
    outcome = commands.reproduce("prepare", scratch.root, Record())
    assert outcome.kind == "Busy"
    assert "prepared" in outcome.text
    began = time.monotonic()
    assert "prepare" not in dag.read(scratch.root).unchanged
    assert time.monotonic() - began < 20  # the call does not wait until the other DVC has ended


@pytest.mark.usefixtures("path")
def test_several_stages_are_pushed_at_once(scratch: Any, tmp_path: Path) -> None:
    scratch.run("dvc", "remote", "add", "--default", "near", str(tmp_path / "remote"))
    for stage in ("prepare", "train@linear", "train@cosine"):
        assert commands.reproduce(stage, scratch.root, Record()).kind == "Completed"
    commands.exchange("push", "stages", scratch.root, Record(), "prepare", "train@cosine")
    sent = {path.read_text() for path in (tmp_path / "remote" / "files").rglob("*") if path.is_file()}
    assert sent == {"prepare", "train@cosine"}
    assert (tmp_path / "remote" / "runs").is_dir()


@pytest.mark.usefixtures("path")
@pytest.mark.chaos
def test_outputs_that_find_no_room_in_the_cache_fail_the_stage_and_go_there_later(
    scratch: Any, disk: Callable[[int], Path]
) -> None:
    """Plain DVC exits with 0 when a folder does not fit into the cache. The stage itself must run only once."""
    (scratch.root / "dvc.yaml").write_text(
        "stages: {prepare: {outs: [prepared], cmd: echo ran >> runs;"
        " mkdir prepared && head -c 3000000 /dev/zero > prepared/large && echo 1 > prepared/small}}"
    )
    assert scratch.run("dvc", "config", "cache.dir", str(disk(1))).returncode == 0
    for _ in range(2):
        outcome = commands.reproduce("prepare", scratch.root, Record())
        assert outcome == Outcome(
            "Full", "DVC found no room on the disk (No space left on device): free some space and run this again"
        )
    disk(10)
    assert commands.reproduce("prepare", scratch.root, Record()).kind == "Completed"
    assert (scratch.root / "runs").read_text() == "ran\n"
    assert "up to date" in scratch.run("dvc", "status").stdout
    assert commands.reproduce("prepare", scratch.root, Record()).kind == "Unchanged"


@pytest.mark.parametrize(
    ("ended", "kind", "kept"),
    [(Ended(137, killed=True), "Killed", True), (Ended(1, errors=["no"]), None, False), (Ended(0), "Completed", False)],
)
def test_a_commit_counts_only_where_dvc_ended_well(
    ended: Ended, kind: str | None, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_uncommitted", {(tmp_path, "prepare")})
    monkeypatch.setattr(commands, "_dvc", lambda *_: ([], ended))
    outcome = commands._commit("prepare", tmp_path, Record())
    assert (outcome and outcome.kind) == kind
    assert bool(commands._uncommitted) == kept


@pytest.mark.usefixtures("path")
def test_what_a_killed_dvc_held_is_named(scratch: Any) -> None:
    """In a container, the id of a killed DVC may belong to another process later."""
    path = scratch.root / ".dvc" / "tmp" / "rwlock"
    held = {"pid": 1, "cmd": "/usr/bin/dvc repro"}
    path.write_text(json.dumps({"write": {str(scratch.root / "prepared"): held}, "read": {}}))
    outcome = commands.reproduce("prepare", scratch.root, Record())
    assert outcome.kind == "Busy" and "delete .dvc/tmp/rwlock" in outcome.text
    path.unlink()
    assert commands.reproduce("prepare", scratch.root, Record()).kind == "Completed"


def test_what_is_edited_while_a_stage_runs_is_not_recorded_as_its_own(scratch: Any) -> None:
    """DVC reads parameters and code after a stage has ended. So the stage itself must fail if they changed."""
    params, code = scratch.root / "params.yaml", scratch.root / "stage.py"
    prepare = (sys.executable, "-m", "dvc", "repro", "--single-item", "prepare")
    train = (*prepare[:-1], "train@linear")
    assert scratch.run(*prepare).returncode == 0
    lock = (scratch.root / "dvc.lock").read_text()
    for number, (file, old, new, named) in enumerate(
        [(params, "steps: ", "steps: 1", "training.steps"), (code, "import json", "import json as json", "stage.py")]
    ):
        scratch.control(train_linear={"until": f"edited-{number}"})
        scratch.forget("train@linear")
        running = scratch.start(*train)
        scratch.pid("train@linear")
        file.write_text(file.read_text().replace(old, new))
        (scratch.root / f"edited-{number}").touch()
        assert running.wait(60) != 0
        said = (scratch.root / "log").read_text()
        assert (
            f"ddpm: train@linear: {named} changed while it ran, so its outputs belong to neither version; run again"
            in said
        )
        assert (scratch.root / "dvc.lock").read_text() == lock
    scratch.control()
    assert scratch.run(*train).returncode == 0
    assert "train@linear" in (scratch.root / "dvc.lock").read_text()


def test_an_edit_that_is_none_of_the_stage_s_costs_nothing(scratch: Any) -> None:
    scratch.control(prepare={"until": "edited"})
    running = scratch.start(sys.executable, "-m", "dvc", "repro", "--single-item", "prepare")
    scratch.pid("prepare")
    parameters.write(scratch.root, overrides=["training.steps=7"])
    (scratch.root / "edited").touch()
    assert running.wait(60) == 0
