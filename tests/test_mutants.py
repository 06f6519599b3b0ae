"""Changes the source in a few hundred seeded ways, one at a time, and counts how many of these mutants the tests notice.

cosmic-ray makes the mutants: another operator, another number, a negated condition. `make proof` runs this and prints the
survivors. Some survivors are equivalent, so no test could notice them.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SEED = 0
OPTIONS = ("--timeout=40", "-m", "not proof and not chaos")
# BitOr joins types in annotations, which are never evaluated. Any test notices a shift or a bitwise operation on floats.
LEFT_OUT = ("BitOr", "BitAnd", "BitXor", "Shift", "_Is", "ExceptionReplacer", "VariableReplacer", "VariableInserter")


class Group(NamedTuple):
    """A group of mutants.

    Args:
        sources: the source files, each with the tests that run on its mutants.
        count: how many mutants are drawn.
        least: the smallest share that the tests must notice.
    """

    sources: dict[str, tuple[str, ...]]
    count: int
    least: float


def of(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{folder}/test_{name}.py" for name in names)


GROUPS = {
    "maths": Group(
        {
            "diffusion/schedule": of("diffusion", "schedule", "samplers", "bound") + of("training", "objective"),
            "diffusion/timesteps": of("diffusion", "schedule", "samplers", "solvers", "fitted"),
            "diffusion/denoiser": of("diffusion", "samplers", "guidance", "bound", "flow"),
            "diffusion/samplers": of("diffusion", "samplers", "solvers", "guidance"),
            "diffusion/solvers": of("diffusion", "solvers", "flow"),
            "diffusion/fitted": of("diffusion", "fitted"),
            "diffusion/noise": of("diffusion", "noise", "samplers"),
            "diffusion/paths": of("diffusion", "paths", "samplers"),
            "diffusion/bound": of("diffusion", "bound"),
            "diffusion/forward": of("diffusion", "forward"),
            "training/fit": of("training", "fit", "objective", "parallel", "averages"),
            "training/objective": of("training", "objective", "fit"),
        },
        160,
        0.9,
    ),
    "scores": Group(
        {
            "scores/fidelity": of("scores", "fidelity", "intervals") + of("stages", "evaluate"),
            "scores/intervals": of("scores", "intervals", "fidelity"),
            "scores/conclusions": of("scores", "conclusions")
            + of("reporting", "report", "page")
            + of("tracking", "gate"),
            "scores/copying": of("reporting", "page") + of("scores", "fidelity"),
        },
        70,
        0.8,
    ),
    "files": Group(
        {
            "files/records": of("files", "params", "bad_input", "corruption"),
            "files/samples": of("stages", "sample") + of("files", "corruption"),
            "files/scores": of("stages", "evaluate") + of("files", "corruption", "bad_input"),
            "files/models": of("files", "corruption", "bad_input"),
            "files/checkpoint": of("stages", "train", "faults") + of("files", "corruption", "bad_input"),
            "parameters": of("files", "params", "bad_input")
            + of("stages", "probe")
            + of("tools", "foresight")
            + ("tests/test_docs.py",),
        },
        30,
        0.7,
    ),
    "gate": Group({"tracking/registry/decision": of("tracking", "gate", "promote")}, 40, 0.8),
}


class Mutant(NamedTuple):
    """A change of one source file below ROOT.

    operator and occurrence are cosmic-ray's name and number of the change. line is the line in the source.
    """

    source: Path
    operator: str
    occurrence: int
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} {self.operator} ({self.occurrence})"

    def text(self) -> str:
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        changed = mutate_code((ROOT / self.source).read_text("utf-8"), get_operator(self.operator)(), self.occurrence)
        assert changed is not None, self
        return str(changed)


def mutants(source: Path) -> Iterator[Mutant]:
    """Lists every mutant of a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    tree = get_ast((ROOT / source).read_text("utf-8"))
    for name in sorted(operator_names()):
        if any(part in name for part in LEFT_OUT):
            continue
        operator = get_operator(name)()
        places: list[Any] = [place for node in ast_nodes(tree) for place in operator.mutation_positions(node)]
        for occurrence, ((line, _), _) in enumerate(places):
            yield Mutant(source, name, occurrence, line)


def noticed(code: int, said: str) -> bool:
    """Returns whether tests failed: exit code 1, or 2 and 4 if the mutant cannot be imported.

    Raises AssertionError otherwise.
    """
    assert code in (0, 1, 2) or "ImportError while loading conftest" in said, said
    return code > 0


@pytest.mark.proof
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", GROUPS)
def test_enough_mutants_are_noticed(
    name: str, tmp_path: Path, fill: Callable[[Path], None], run_in: Callable[..., tuple[int, str]]
) -> None:
    pytest.importorskip("cosmic_ray", reason="the extra mutation is not installed; `make proof` does that")
    group = GROUPS[name]
    every = [mutant for source in group.sources for mutant in mutants(Path("ddpm", f"{source}.py"))]
    drawn = sorted(random.Random(SEED).sample(every, group.count))
    fill(tmp_path)
    for test in sorted({test for tests in group.sources.values() for test in tests}):
        code, said = run_in(tmp_path, test, *OPTIONS)
        # a test that is too slow here would seem to notice every mutant
        assert code == 0, f"{test} fails without a mutant:\n{said}"
    survivors = []
    for mutant in drawn:
        path = tmp_path / mutant.source
        path.write_text(mutant.text(), encoding="utf-8")
        key = mutant.source.relative_to("ddpm").with_suffix("").as_posix()
        if not any(noticed(*run_in(tmp_path, test, *OPTIONS)) for test in group.sources[key]):
            survivors.append(mutant)
            print(f"{name}: survives: {mutant}", flush=True)
        shutil.copy2(ROOT / mutant.source, path)
    share = 1 - len(survivors) / len(drawn)
    print(f"{name}: {share:.1%} of {len(drawn)} mutants of {len(every):,} noticed", flush=True)
    assert share >= group.least
