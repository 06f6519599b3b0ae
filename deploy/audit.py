"""Looks up known vulnerabilities of the packages in requirements.lock with pip-audit: `make audit`.

Exits with 1 if a package has a vulnerability. If no vulnerability database answers, prints a line that the audit was not done,
and exits with 0, because a build behind a mirror would otherwise never pass. With AUDIT=required, the exit code is then 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCK = Path(__file__).parent.parent / "requirements.lock"
SERVICES = ("pypi", "osv")
CANARY = "jinja2==2.4.1"  # has advisories, so a database that reports none for this version gives empty answers
# Advisories that do not concern this project, each with the reason.
ACCEPTED: dict[str, str] = {}


def main() -> int:
    failures = []
    for service in SERVICES:
        canary, error = audit(service, "--no-deps", "--requirement", "-", given=CANARY)
        if canary is None or not any(item.get("vulns") for item in canary):
            failures.append(f"{service}: {error or f'reports no vulnerability of {CANARY}, which has some'}")
            continue
        report, error = audit(service, "--require-hashes", "--requirement", str(LOCK))
        if report is None:
            failures.append(f"{service}: {error}")
            continue
        return verdict([item for item in report if "vulns" in item], len(report))
    print(f"audit: NOT DONE, no database of vulnerabilities answers ({'; '.join(failures)})")
    return int(os.environ.get("AUDIT") == "required")


def audit(service: str, *arguments: str, given: str = "") -> tuple[list[dict[str, Any]] | None, str]:
    """Runs pip-audit.

    Args:
        service: the vulnerability database.
        arguments: further arguments. "-" stands for a file that contains `given`.
        given: the content of that file.

    Returns:
        pip-audit's result for each package and "", or None and the last line of the error output.
    """
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--vulnerability-service",
        service,
        "--disable-pip",
        "--timeout",
        "10",
    ]
    output = ["--format", "json", "--progress-spinner", "off"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(given)
        file.flush()
        chosen = [file.name if item == "-" else item for item in arguments]
        done = subprocess.run([*command, *output, *chosen], capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (json.JSONDecodeError, KeyError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return None, last.partition("(Caused by")[0][:120]


def verdict(known: list[dict[str, Any]], asked: int) -> int:
    """Prints the open vulnerabilities and a summary. Returns the exit code."""
    found = [(item, vulnerability) for item in known for vulnerability in item["vulns"]]
    open_ = [
        (item, vulnerability)
        for item, vulnerability in found
        if not {vulnerability["id"], *vulnerability.get("aliases", ())} & set(ACCEPTED)
    ]
    for item, vulnerability in open_:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no release"
        print(f"audit: {item['name']} {item['version']}: {vulnerability['id']}, fixed in {fixed}")
    print(
        f"audit: {len(known)} of {asked} packages known, {len(open_)} vulnerabilities, {len(found) - len(open_)} accepted"
    )
    return int(bool(open_))


if __name__ == "__main__":
    sys.exit(main())
