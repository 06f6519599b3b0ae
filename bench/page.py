"""bench/results/*.json -> the table in docs/speed.md, and bench/metrics.json for `dvc metrics`. Standard library alone.

`python -m bench.page` writes both; with --check it says whether they are what the results say.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"
METRICS = HERE / "metrics.json"
BEGIN, END = "<!-- results: python -m bench.page -->\n", "<!-- end of results -->\n"


@dataclass(frozen=True)
class Row:
    """What is measured, the module that does it in a function of the row's name, and where it makes sense."""

    work: str
    module: str
    devices: tuple[str, ...] = ("cpu",)


BOTH = ("cpu", "cuda")
ROWS = {
    "train": Row("training step, paper UNet", "network", BOTH),
    "ddim": Row("sampling, DDIM 50, same weights", "network", BOTH),
    "ancestral": Row("ancestral sampling, 1000 steps, same weights", "network", BOTH),
    "fid_sets": Row("features and FID of several sets, one reference", "scores", BOTH),
    "statistics": Row("statistics and intervals, 50k x 2048", "scores", BOTH),
    "prepare": Row("prepare, PNG from a zip", "data"),
    "demo": Row("whole demo", "pipeline"),
    "start": Row("start of a stage's process", "pipeline"),
}


def results() -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for name, row in ROWS.items():
        for device in row.devices:
            path = HERE / "results" / f"{name}-{device}.json"
            if path.exists():
                found[name, device] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def shown(figure: dict[str, Any]) -> str:
    unit = {"x": "x", "%": " %"}.get(figure["unit"], f" {figure['unit']}")
    text = (
        f"{figure['name']}: {_number(figure['value'])}{unit} ({_number(figure['low'])} ... {_number(figure['high'])})"
    )
    if "goal" in figure:
        text += f"; goal at {figure['at']} {_number(figure['goal'])}{unit}: {'met' if figure['met'] else 'missed'}"
    return text


def render(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = ["| work | on | measured: median (range) | goal | |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        for device in row.devices:
            if (name, device) not in found:
                lines.append(f"| {row.work} (`{name}`) | {device} | not measured | | |")
                continue
            for figure in found[name, device]["figures"]:
                value, _, goal = shown(figure).partition("; goal ")
                goal, _, met = goal.partition(": ")
                lines.append(f"| {row.work} (`{name}`) | {device} | {value} | {goal} | {met} |")
    for (name, device), about in found.items():
        lines += ["", f"### {name}, {device}", "", f"{about['work']}. One call: {about['per_call']}.", ""]
        lines += ["| side | seconds a call: median (range) | processor seconds |", "|---|---|---|"]
        for side, kinds in about["times"].items():
            wall, cpu = kinds["wall"], kinds.get("cpu")
            span = f"{_number(statistics.median(wall))} ({_number(min(wall))} ... {_number(max(wall))})"
            lines.append(f"| {side} | {span} | {_number(statistics.median(cpu)) if cpu else ''} |")
        checks = "; ".join(f"{key}: {_check(value)}" for key, value in about["checks"].items())
        lines += [""] + ([f"Asserted or noted: {checks}."] if checks else [])
        if limit := about.get("limit"):
            lines.append(
                f"Ours runs at {100 * limit['share']:.0f} % of this machine's rate of matrix products,"
                f" {limit['matmul_rate'] / 1e9:,.0f} GFLOP/s ({limit['operations'] / 1e9:,.0f} GFLOP a call)."
            )
        lines.append(_place(about))
    return "\n".join(lines) + "\n"


def _check(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_check(item) for item in value)
    return str(value) if isinstance(value, bool) or not isinstance(value, int) else f"{value:,}"


def _place(about: dict[str, Any]) -> str:
    machine = about["machine"]
    hardware = machine["hardware"]
    gpu = f", {hardware['gpu']}" if "gpu" in hardware else ""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"\n{hardware['cpu']}, {hardware['cores']} cores, {machine['threads']} threads{gpu}; load {machine['load']:.2g}"
        f" at the end; peak memory of all sides {about['peak_memory_bytes'] / 2**30:.1f} GiB. {versions}."
    )


def metrics(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    values = {
        f"{name}-{device}": {figure["name"]: figure["value"] for figure in about["figures"]}
        for (name, device), about in found.items()
    }
    return json.dumps(values, indent=1) + "\n"


def expected() -> dict[Path, str]:
    found = results()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return {PAGE: before + BEGIN + "\n" + render(found) + "\n" + END + after, METRICS: metrics(found)}


def write() -> None:
    for path, text in expected().items():
        path.write_text(text, encoding="utf-8")


def stale() -> list[str]:
    return [
        path.name for path, text in expected().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


if __name__ == "__main__":
    if "--check" in sys.argv:
        found = stale()
        if found:
            sys.exit(f"{', '.join(found)}: not what bench/results says; run `python -m bench.page`")
    else:
        write()
