"""Takes protections out of the source, one at a time, and requires that the test of each protection then fails.

A protection is a statement of ddpm/ or flows/ below a comment that names its test:

    # protects: tests/files/test_params.py::test_name[case]
    if fault:
        raise InputError(...)

A copy of the checkout has `pass` in place of that statement, and the test runs in this copy. `make test` shows that the test
passes with the statement.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^ *# protects: (tests/\S+\.py::(test_\w+)(?:\[.+\])?)$")
FEWEST, MOST = 25, 40  # number of protections; more would take too long


class Protection(NamedTuple):
    """A marked statement.

    Args:
        file: the source file below ROOT.
        line: the line of the marker.
        test: the test's node id in pytest.
        function: the name of the test function alone.
    """

    file: Path
    line: int
    test: str
    function: str

    def __str__(self) -> str:
        return f"{self.file} {self.function}"

    def without(self, text: str) -> str:
        """Returns the source text with `pass` in place of the statement below the marker.

        Raises AssertionError if there is none.
        """
        starting = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt) and node.lineno == self.line + 1
        ]
        assert starting, f"{self.file}, line {self.line}: no statement starts below this marker"
        lines, statement = text.splitlines(keepends=True), starting[0]
        lines[statement.lineno - 1 : statement.end_lineno] = [f"{' ' * statement.col_offset}pass\n"]
        return "".join(lines)


def markers() -> list[Protection]:
    """Finds all markers, in the order of files and lines. Raises AssertionError for a malformed marker."""
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


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.parametrize("protection", MARKED, ids=str)
def test_without_its_protection_a_test_fails(
    protection: Protection, tmp_path: Path, fill: Callable[[Path], None], run_in: Callable[[Path, str], tuple[int, str]]
) -> None:
    fill(tmp_path)
    path = tmp_path / protection.file
    path.write_text(protection.without(path.read_text(encoding="utf-8")), encoding="utf-8")
    code, said = run_in(tmp_path, protection.test)
    assert code == 1 and re.search(r"^1 failed(, \d+ warnings?)? in ", said, re.MULTILINE), said
    assert not re.search("NameError|UnboundLocalError", said), (
        f"the test fails because of a missing name, not because of the missing protection:\n{said}"
    )
