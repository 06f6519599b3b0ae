"""Checks that `auto` is resolved once per sweep, and that another host uses the same values or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm.errors import InputError
from ddpm.files import models, paths, samples
from ddpm.files.params import Params
from ddpm.files.records import write_record
from ddpm.networks import winograd
from ddpm.parameters import Auto, Point
from ddpm.runtime import compiling
from ddpm.runtime.progress import Progress
from ddpm.stages.probe import probe
from ddpm.stages.sample import sample_point, sampling_key
from ddpm.stages.train import train, training_key

POINT = Point.parse("cosine-ddim-2")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAIN = Auto(precision="float32", compile=False)
BOTH = {"precision": "auto", "compile": "auto"}
AUTO: dict[str, Any] = {"training": {**BOTH, "steps": 3}, "sampling": {**BOTH, "images": 4}}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool, str], None]]:
    """Returns machine(bfloat16, obstacle), which pretends to be a machine with or without bfloat16 units.

    `obstacle` is the reason why nothing can be compiled, or "".
    """

    def become(bfloat16: bool, obstacle: str) -> None:
        compiling.probe.cache_clear()
        monkeypatch.setattr(compiling, "multiplies_bfloat16", lambda: bfloat16)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
        monkeypatch.setattr(compiling, "_obstacle", lambda device: obstacle)

    yield become
    compiling.probe.cache_clear()


def resolve(root: Path, auto: Auto) -> None:
    write_record(root / paths.auto_file(), vars(auto))


def messages(run: Callable[[Callable[[Progress], None]], object]) -> str:
    said: list[Progress] = []
    run(said.append)
    return "\n".join(progress.message for progress in said if progress.message)


@pytest.mark.parametrize(
    ("device", "bfloat16", "obstacle", "found", "reason"),
    [
        (GPU, True, "", Auto(precision="bfloat16", compile=True), "this GPU has bfloat16 units"),
        (GPU, True, "no C compiler", Auto(precision="bfloat16", compile=False), "(no C compiler); install gcc"),
        (GPU, False, "", Auto(precision="float32", compile=True), "this GPU has no bfloat16 units"),
        (CPU, True, "", Auto(precision="bfloat16", compile=True), "this CPU has AVX512-BF16"),
        (CPU, False, "", Auto(precision="float32", compile=True), "this CPU has no AVX512-BF16"),
        (CPU, True, "no C compiler", PLAIN, "(no C compiler); install gcc, then run `dvc repro --force"),
    ],
)
def test_auto_is_what_the_machine_does_fastest(
    machine: Callable[[bool, str], None], device: torch.device, bfloat16: bool, obstacle: str, found: Auto, reason: str
) -> None:
    machine(bfloat16, obstacle)
    auto, why = compiling.probe(device)
    assert auto == found and reason in why


def test_a_compiler_that_cannot_compile_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed compiler may lack headers or libraries, which shows only when it compiles."""
    for name in ("cc", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'stdio.h: No such file' >&2\n[ \"$1\" = --version ]\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    winograd._library.cache_clear()
    assert compiling._obstacle(CPU) == "the C compiler failed: stdio.h: No such file"
    winograd._library.cache_clear()


def test_the_meaning_stands_in_keys_and_records(
    root: Path, smoke: Callable[..., Params], machine: Callable[[bool, str], None]
) -> None:
    params = smoke(**AUTO)
    keys = {}
    for auto in (PLAIN, Auto(precision="float32", compile=True), Auto(precision="bfloat16", compile=True)):
        resolve(root, auto)
        resolved, explicit = params.resolved(root), smoke(**{name: {**AUTO[name], **vars(auto)} for name in AUTO})
        assert resolved == explicit
        keys[str(auto)] = training_key(resolved, "cosine", "data")
    assert len(set(keys.values())) == 3
    machine(False, "no C compiler")
    assert "auto means float32, not compiled: nothing can" in messages(lambda report: probe(params, root, report))
    train(params, "cosine", root)
    sample_point(params, POINT, root)
    model = models.read_trained(root, "cosine")
    drawn = samples.read_samples_record(root / paths.samples_file(POINT)).settings["sampling"]
    for record in (model.training.content, drawn):
        assert (record["precision"], record["compile"]) == ("float32", False)
    others = [params.resolved(root), smoke(**AUTO | {"sampling": {**AUTO["sampling"], "precision": "bfloat16"}})]
    assert len({sampling_key(each.resolved(root), POINT, model, CPU) for each in others}) == 2


def test_a_training_resumes_with_the_values_that_it_began_with(
    root: Path, smoke: Callable[..., Params], machine: Callable[[bool, str], None]
) -> None:
    resolve(root, PLAIN)
    train(smoke(**AUTO), "cosine", root)
    machine(True, "")  # another machine, to which .cache and auto.json were copied
    longer = smoke(**AUTO | {"training": {**AUTO["training"], "steps": 6}})
    said = messages(lambda report: train(longer, "cosine", root, report))
    assert "resuming after step 3" in said and "precision: float32, compile: false, as auto was resolved" in said
    assert models.read_trained(root, "cosine").training.content["precision"] == "float32"
    resolve(
        root, Auto(precision="bfloat16", compile=False)
    )  # `auto` has new values: states of the old values are not used
    assert "resuming" not in messages(lambda report: train(longer, "cosine", root, report))
    assert models.read_trained(root, "cosine").training.content["precision"] == "bfloat16"


def test_another_host_draws_with_the_values_of_the_sweep_and_says_so(
    root: Path, smoke: Callable[..., Params], machine: Callable[[bool, str], None]
) -> None:
    params = smoke(**AUTO)
    resolve(root, PLAIN)
    machine(False, "no C compiler")
    train(params, "cosine", root)
    assert "auto" not in messages(lambda report: sample_point(params, POINT, root, report))
    own = (root / paths.samples_file(POINT)).read_bytes()
    machine(True, "")
    said = messages(lambda report: sample_point(params, POINT, root, report))
    assert "on this machine it would be precision: bfloat16, compile: true (`dvc repro --force" in said
    assert (root / paths.samples_file(POINT)).read_bytes() == own


def test_a_host_that_cannot_compile_refuses_in_one_line(
    root: Path, smoke: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(net: object) -> None:
        raise winograd.NoCompiler("no C compiler found (cc, gcc, or the command in $CC)")

    monkeypatch.setattr(winograd, "compiled", missing)
    compiling.probe.cache_clear()
    resolve(root, Auto(precision="float32", compile=True))
    with pytest.raises(InputError) as refused:
        train(smoke(**AUTO), "cosine", root)
    line = str(refused.value)
    assert line.startswith("training.compile: no C compiler found") and "install gcc" in line and "\n" not in line
    assert line.endswith("if the value is auto, `dvc repro --force --single-item probe` chooses again for this machine")
    compiling.probe.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "auto.json: no such file; an earlier stage makes it"),
        ({"precision": "float32"}, "auto.json: compile: missing"),
        ({"precision": "auto", "compile": True}, "auto.json: precision: 'auto' is neither float32 nor bfloat16"),
        ({"precision": "float32", "compile": "auto"}, "auto.json: compile: expected true or false"),
    ],
)
def test_values_that_probe_did_not_write_are_refused(
    root: Path, smoke: Callable[..., Params], content: dict[str, Any] | None, message: str
) -> None:
    if content is not None:
        write_record(root / "auto.json", content)
    with pytest.raises(InputError) as refused:
        train(smoke(**AUTO), "cosine", root)
    assert message in str(refused.value)


def test_a_sweep_never_mixes_values(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DVC, a compiler that goes missing later changes nothing.

    If `auto` is resolved again, every training and sampling must rerun.
    """
    copied.edit("  threads: 1\n  log_every", "  threads: 1\n  precision: auto\n  compile: auto\n  log_every")
    first, second = "sample@cosine-ddim-2", "sample@cosine-ddim-5"
    copied.dvc("repro", "--quiet", first)
    found = json.loads((copied.root / "auto.json").read_text())
    monkeypatch.setenv("CC", "nothing-of-this-name")
    assert "Stage 'probe' didn't change" in copied.dvc("repro", second)
    assert json.loads((copied.root / "auto.json").read_text()) == found
    said = copied.dvc("repro", "--force", "--single-item", "probe")
    assert "probe: auto means float32, not compiled: nothing can be compiled here (no C compiler found" in said
    changed = json.loads(copied.dvc("status", "--json"))
    for stage in ("train@cosine", first, second):
        assert {"changed deps": {"auto.json": {"compile": "modified", "precision": "modified"}}} in changed[stage] or (
            {"changed deps": {"auto.json": {"compile": "modified"}}} in changed[stage]
        )
