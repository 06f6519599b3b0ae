"""bench/results/*.json -> the tables in README.md, docs/speed.md and docs/cifar10.md, and bench/metrics.json for `dvc metrics`.

`python -m bench.page` writes all, with the standard library alone; with --check it says whether they are what the results say.
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
README = HERE.parent / "README.md"
CIFAR10 = HERE.parent / "docs" / "cifar10.md"
METRICS = HERE / "metrics.json"
BEGIN, END = "<!-- results: python -m bench.page -->\n", "<!-- end of results -->\n"


@dataclass(frozen=True)
class Row:
    """What is measured, the module that does it in a function of the row's name, where it makes sense, and whether it has a
    goal."""

    work: str
    module: str
    devices: tuple[str, ...] = ("cpu",)
    goal: bool = True


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
    "growth": Row("how cost grows, and the machine's limits", "growth", BOTH, goal=False),
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
            lines += _summary(f"| {row.work} (`{name}`) | {device} |", found.get((name, device)))
    for (name, device), about in found.items():
        lines += ["", f"### {name}, {device}", "", f"{about['work']}. One call: {about['per_call']}.", ""]
        if about["times"]:
            lines += ["| side | seconds a call: median (range) | processor seconds |", "|---|---|---|"]
        for side, kinds in about["times"].items():
            wall, cpu = kinds["wall"], kinds.get("cpu")
            span = f"{_number(statistics.median(wall))} ({_number(min(wall))} ... {_number(max(wall))})"
            lines.append(f"| {side} | {span} | {_number(statistics.median(cpu)) if cpu else ''} |")
        checks = "; ".join(f"{key}: {_check(value)}" for key, value in about["checks"].items())
        lines += [""] + ([f"Asserted or noted: {checks}."] if checks else [])
        lines += _growth(about) if "growth" in about else []
        if limit := about.get("limit"):
            lines.append(
                f"Ours runs at {100 * limit['share']:.0f} % of this machine's rate of matrix products,"
                f" {limit['matmul_rate'] / 1e9:,.0f} GFLOP/s ({limit['operations'] / 1e9:,.0f} GFLOP a call, convolutions"
                " counted as direct ones: Winograd's can be above 100 %)."
            )
        lines.append(_place(about))
    return "\n".join(lines) + "\n"


def _summary(begin: str, about: dict[str, Any] | None) -> list[str]:
    if about is None:
        return [f"{begin} not measured | | |"]
    lines = []
    for figure in about["figures"]:
        value, _, goal = shown(figure).partition("; goal ")
        goal, _, met = goal.partition(": ")
        lines.append(f"{begin} {value} | {goal} | {met} |")
    return lines


def _growth(about: dict[str, Any]) -> list[str]:
    lines = ["| phase | by | at: seconds per image (peak memory, GiB) | a call takes as much as |", "|---|---|---|---|"]
    for one in about["growth"]:
        cells = [
            f"{row['value']:,}: {_number(row['seconds'] / row['images'])} ({row['peak_bytes'] / 2**30:.1f})"
            for row in one["rows"]
        ]
        lines.append(f"| {one['phase']} | {one['by']} | {'; '.join(cells)} | {one['by']} ^ {one['power']:.2f} |")
    lines += ["", "| phase | share of the machine's own rate | of |", "|---|---|---|"]
    for phase in about["phases"]:
        unit = "GB/s" if "memory" in phase["of"] else "GFLOP/s"
        lines.append(
            f"| {phase['phase']} | {100 * phase['share']:.0f} % | {phase['of']}: {phase['rate'] / 1e9:,.0f} {unit} |"
        )
    return [*lines, ""]


def render_readme(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The figures that have a goal."""
    lines = ["| work | CPU | GPU |", "|---|---|---|"]
    for name, row in ((name, row) for name, row in ROWS.items() if row.goal):
        cells = []
        for device in ("cpu", "cuda"):
            goals = [shown(figure) for figure in found.get((name, device), {}).get("figures", ()) if "goal" in figure]
            cells.append("<br>".join(goals) or (NONE if device in row.devices else ""))
        lines.append(f"| {row.work} | {cells[0]} | {cells[1]} |")
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


# Unconditional CIFAR-10, 50,000 samples against train: DDIM and eta from Song et al. 2020, table 1; DPM-Solver++ and UniPC from
# Zhao et al. 2023, on the network of Song et al. 2021; the curve is of a public replication of Ho et al. 2020, whose name
# did not come with the numbers.
REPLICATION = {46_800: 9.162, 93_600: 5.778, 187_000: 4.083, 421_000: 3.31, 796_000: 3.188}
PUBLISHED = {
    **{f"ddim-{n}": fid for n, fid in {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16}.items()},
    **{f"ddim_eta1-{n}": fid for n, fid in {10: 41.07, 20: 18.36, 50: 8.01, 100: 5.78}.items()},
    **{f"ddpm-{n}": fid for n, fid in {10: 367.43, 20: 133.37, 50: 32.72, 100: 9.99}.items()},
    **{f"dpmpp_2m-{n}": fid for n, fid in {5: 28.53, 10: 4.01, 20: 2.90}.items()},
    **{f"unipc-{n}": fid for n, fid in {5: 23.71, 10: 3.93, 20: 2.73}.items()},
}
NONE = "not measured"


def _read(name: str) -> dict[str, Any]:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def render_cifar10() -> str:
    """Throughput; every variant in a row; then the curve, the sweep and the rest of the two recipes."""
    names = {"paper", "fast"} | {path.stem.partition("-")[2] for path in (HERE / "results").glob("cifar10-*.json")}
    found = {name: _read(f"cifar10-{name}") for name in sorted(names - {"throughput"}, reverse=True)}
    lines = [*_throughput(_read("cifar10-throughput")), "", "### Variants", "", *_variants(found)]
    lines += ["", "### FID along the way", "", *_along(found), "", "### Samplers and steps", "", *_swept(found)]
    return "\n".join([*lines, "", "### On this kind of CPU", "", *_on_cpu()]) + "\n"


def _throughput(about: dict[str, Any]) -> list[str]:
    lines = ["### Training throughput, the paper's network, bfloat16", ""]
    lines += ["| batch | | images/s | share of the matmul rate | hours to 800k steps of 128 | peak memory |"]
    lines += ["|---|---|---|---|---|---|"]
    cells = {(cell["compiled"], cell["batch"]): cell for cell in about.get("cells", ())}
    for compiled in (False, True):
        for batch in sorted({batch for _, batch in cells}) or (128, 256, 512, 1024):
            kind = "compiled" if compiled else "eager"
            if (cell := cells.get((compiled, batch))) is None:
                lines.append(f"| {batch} | {kind} | {NONE} | | | |")
                continue
            memory = f"{cell['memory_bytes'] / 2**30:.1f} GiB" if cell["memory_bytes"] else ""
            rate, hours = f"{cell['images_per_second']:,.0f}", _number(cell["hours_to_800k"])
            lines.append(f"| {batch} | {kind} | {rate} | {100 * cell['share']:.0f} % | {hours} | {memory} |")
    if about:
        rate = max(cell["matmul_rate"] for cell in cells.values()) / 1e12
        lines += ["", f"{_where(about)}; its rate of matrix products is {rate:,.0f} TFLOP/s."]
    return lines


def _where(about: dict[str, Any]) -> str:
    machine = about["machine"]
    return f"{machine.get('gpu', 'CPU')}, torch {machine['torch']}"


def _variants(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| variant | steps x batch | minutes | images/s | FID along the way, at the end | FID, 50,000 | bits/dim, test |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, about in found.items():
        if not about:
            lines.append(f"| `{name}` | {NONE} | | | {NONE} | {NONE} | {NONE} |")
            continue
        last, final, bound = (about["curve"] or [None])[-1], about["final"], about["bound"]
        rate = f"{about['images_per_second']:,.0f}" if about["images_per_second"] else ""
        row = [f"{about['step']:,} x {about['recipe']['batch']}", f"{about['minutes']:.1f}", rate]
        row.append(f"{_interval(last)} of {last['images']:,}" if last else NONE)
        row.append(f"{_interval(final)} of {final['images']:,}, {final['point']}" if final else NONE)
        of = f" ({bound['images']:,} images, {bound['times']} times each)" if bound else ""
        row.append(f"{bound['bits_per_dim']:.3f} ± {bound['standard_error']:.3f}{of}" if bound else NONE)
        lines.append(f"| `{name}` | {' | '.join(row)} |")
    return lines


def _interval(row: dict[str, Any]) -> str:
    return f"{row['fid']:.2f} ({row['low']:.2f} ... {row['high']:.2f})"


def _along(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| variant | minutes | step | images seen | FID | as of 50,000 samples |", "|---|---|---|---|---|---|"]
    for name in ("paper", "fast"):
        rows = found[name].get("curve") or []
        lines += [] if rows else [f"| `{name}` | {NONE} | | | | |"]
        for row in rows:
            more = f"{row['as_of_50000']:.2f}" if "as_of_50000" in row else ""
            minutes, seen = f"{row['minutes']:.1f}", f"{row['images_seen']:,}"
            lines.append(f"| `{name}` | {minutes} | {row['step']:,} | {seen} | {_interval(row)} | {more} |")
    return lines + [
        f"| the public replication | | {step:,} | {128 * step:,} | | {fid} |" for step, fid in REPLICATION.items()
    ]


def _swept(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| sampler-steps | `paper` | `fast` | published |", "|---|---|---|---|"]
    sweeps = [found[name].get("sweep") or {} for name in ("paper", "fast")]
    for point in dict.fromkeys([*PUBLISHED, *sweeps[0], *sweeps[1]]):
        cells = [_interval(sweep[point]) if point in sweep else NONE for sweep in sweeps]
        lines.append(f"| `{point}` | {' | '.join(cells)} | {PUBLISHED.get(point, '')} |")
    return lines


def _on_cpu() -> list[str]:
    lines = ["| recipe | steps | minutes | processor minutes | FID | protocol |", "|---|---|---|---|---|---|"]
    for name in ("digits", "cifar10-cpu"):
        about = _read(f"curve-{name}")
        lines += [] if about else [f"| `{name}` | {NONE} | | | | |"]
        for row in about.get("curve", ()):
            times = f"{row['minutes']:.2f} | {row['processor_minutes']:.2f}"
            protocol = f"{row['images']:,} samples, layer {about['layer']}, {about['point']}"
            lines.append(f"| `{name}` | {row['step']:,} | {times} | {_interval(row)} | {protocol} |")
    lines += ["", "### Trials of `cifar10-cpu`, in equal processor time", ""]
    lines += [
        "| one change | parameters | steps | processor seconds | error on test images | FID |",
        "|---|---|---|---|---|---|",
    ]
    trials = _read("trials-cifar10-cpu").get("trials", {})
    for name, row in trials.items():
        size = f"{row['parameters']:,} | {row['steps']:,} | {row['processor_seconds']:.0f}"
        lines.append(
            f"| {name} | {size} | {row['error']:.4f} | {_interval(row)} of {row['images']:,}, layer {row['layer']} |"
        )
    return lines if trials else [*lines, f"| all | {NONE} | | | | |"]


def metrics(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    values = {
        f"{name}-{device}": {figure["name"]: figure["value"] for figure in about["figures"]}
        for (name, device), about in found.items()
    }
    return json.dumps(values, indent=1) + "\n"


def _between(page: Path, text: str) -> str:
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + text + "\n" + END + after


def expected() -> dict[Path, str]:
    found = results()
    pages = {README: _between(README, render_readme(found)), PAGE: _between(PAGE, render(found))}
    pages |= {CIFAR10: _between(CIFAR10, render_cifar10())}
    return {**pages, METRICS: metrics(found)}


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
