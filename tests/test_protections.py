"""Takes protections out of the source, one at a time, and requires that the test which is there for each one fails.

A protection is a statement of ddpm/ or flows/ below a comment that names its test:

    # protects: tests/files/test_params.py::test_name[case]
    if fault:
        raise InputError(...)

In a copy of the checkout that statement becomes `pass`, and the test runs there. `make test` says that it passes otherwise.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^ *# protects: (tests/\S+\.py::(test_\w+)(?:\[.+\])?)$")
FEWEST, MOST = 25, 40  # protections: more would take longer than anybody waits


class Protection(NamedTuple):
    """A marked statement. file: below ROOT. line: of the marker. test: its node id for pytest. function: its name alone."""

    file: Path
    line: int
    test: str
    function: str

    def __str__(self) -> str:
        return f"{self.file} {self.function}"

    def without(self, text: str) -> str:
        """Returns the source text with `pass` in place of the statement below the marker. Raises AssertionError."""
        starting = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt) and node.lineno == self.line + 1
        ]
        assert starting, f"{self.file}, line {self.line}: no statement starts below this marker"
        lines, statement = text.splitlines(keepends=True), starting[0]
        lines[statement.lineno - 1 : statement.end_lineno] = [f"{' ' * statement.col_offset}pass\n"]
        return "".join(lines)


def markers() -> list[Protection]:
    """Finds all markers, in the order of files and lines. Raises AssertionError for a comment that is nearly a marker."""
    found = []
    for path in sorted(path for package in ("ddpm", "flows") for path in (ROOT / package).rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "# protects:" in line:
                marker = MARKER.match(line)
                assert marker, (
                    f"{path}, line {number}: expected `# protects: tests/FILE.py::test_NAME` on a line of its own"
                )
                found.append(Protection(path.relative_to(ROOT), number, *marker.groups()))
    return found


MARKED = markers()


def test_every_marker_has_its_statement_and_its_test() -> None:
    assert FEWEST <= len(MARKED) <= MOST
    for protection in MARKED:
        text = (ROOT / protection.file).read_text(encoding="utf-8")
        ast.parse(protection.without(text))
        tests = (ROOT / protection.test.partition("::")[0]).read_text(encoding="utf-8")
        assert re.search(rf"^def {protection.function}\(", tests, re.MULTILINE), protection.test


# Forks for each run, so that what takes seconds to import is imported once; none of it is ours, or reads a setting.
RUNS_OF_PYTEST = """
import json, os, signal, sys
import hypothesis, numpy, PIL.Image, psutil, pydantic, pytest, ruamel.yaml, safetensors.torch, scipy.linalg, sklearn.datasets
import torch._dynamo, torchvision, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell would not hear of it
for line in sys.stdin:
    copy, *arguments = json.loads(line)
    pid = os.fork()
    if not pid:
        os.chdir(copy)
        os.environ["PYTHONPATH"] = copy
        sys.path[0] = copy
        for file, place in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open("said", os.O_CREAT | os.O_WRONLY), 1), (1, 2)):
            os.dup2(file, place)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
OPTIONS = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=120", "--tb=short")
Run = Callable[[Path, str], tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """run(copy, test) -> the exit code of pytest in that copy, and its output."""
    names = ("PYTEST", "DDPM", "MLFLOW", "PREFECT", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", RUNS_OF_PYTEST], cwd=ROOT.anchor, env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(copy: Path, test: str) -> tuple[int, str]:
            print(json.dumps([str(copy), *OPTIONS, test]), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            return code, (copy / "said").read_text(encoding="utf-8", errors="replace")

        yield run


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """What git knows of the checkout, and what Python has compiled of it, which it uses where the source has not changed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = [Path(name) for name in listed.split("\0")[:-1]]
    folders = {ROOT / path.parent for path in known if path.suffix == ".py"}
    return known + [path.relative_to(ROOT) for folder in folders for path in folder.glob("__pycache__/*.pyc")]


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.parametrize("protection", MARKED, ids=str)
def test_without_its_protection_a_test_fails(
    protection: Protection, tmp_path: Path, files: list[Path], run: Run
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, tmp_path / file)
    path = tmp_path / protection.file
    path.write_text(protection.without(path.read_text(encoding="utf-8")), encoding="utf-8")
    code, said = run(tmp_path, protection.test)
    assert code == 1 and re.search(r"^1 failed(, \d+ warnings?)? in ", said, re.MULTILINE), said
    assert not re.search("NameError|UnboundLocalError", said), f"not the protection is missing but a name:\n{said}"
