"""Writes the tables of README.md, docs/{speed,cifar10,ledger,recipes}.md and bench/metrics.json from bench/results/*.json.

`python -m bench.page` needs only the standard library. With --check it fails if one of the files is out of date.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"
README = HERE.parent / "README.md"
CIFAR10 = HERE.parent / "docs" / "cifar10.md"
LEDGER = HERE.parent / "docs" / "ledger.md"
RECIPES = HERE.parent / "docs" / "recipes.md"
METRICS = HERE / "metrics.json"
# the end of the name of a figure that bench.harness.ratios computes from processor seconds
PROCESSOR = ", processor time"
BEGIN, END = "<!-- results: python -m bench.page -->\n", "<!-- end of results -->\n"


@dataclass(frozen=True)
class Row:
    """A benchmark.

    Args:
        work: the title of the row.
        module: the module below bench that measures the row.
        devices: the devices to measure on.
        goal: whether README shows the row.
        function: the function of the module; "" for the name of the row.
        environment: environment variables of the measuring process.
    """

    work: str
    module: str
    devices: tuple[str, ...] = ("cpu",)
    goal: bool = True
    function: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


BOTH = ("cpu", "cuda")
# Limits torch, oneDNN, MKL and torch.compile to AVX2 on a processor that has more. Our C code follows torch.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ROWS = {
    "train": Row("training step, paper UNet", "network", BOTH),
    "ddim": Row("sampling, DDIM 50, same weights", "network", BOTH),
    "ancestral": Row("ancestral sampling, 1000 steps, same weights", "network", BOTH),
    "train_avx2": Row("training step, AVX2 alone, without AMX", "network", function="train", environment=AVX2),
    "ddim_avx2": Row("sampling, DDIM 50, AVX2 alone, without AMX", "network", function="ddim", environment=AVX2),
    "ancestral_avx2": Row(
        "ancestral sampling, AVX2 alone, without AMX", "network", function="ancestral", environment=AVX2
    ),
    "fid_sets": Row("FID of several sets against one reference", "scores", BOTH),
    "statistics": Row("FID and its interval from given features, 50k x 2048", "scores", BOTH),
    "rounding": Row("effect of bfloat16 and compiled kernels on FID", "scores", BOTH),
    "prepare": Row("prepare, PNG from a zip", "pipeline"),
    "demo": Row("whole demo", "pipeline"),
    "sweeps": Row("sweeps of 12, 50 and 200 points", "pipeline"),
    "start": Row("start of a stage's process", "pipeline"),
    "growth": Row("growth of the cost, and the machine's limits", "growth", BOTH, goal=False),
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
    text = f"{figure['name']}: {_value(figure)}"
    return f"{text}; goal {_goal(figure)}" if "goal" in figure else text


def _unit(figure: dict[str, Any]) -> str:
    return {"x": "x", "%": " %"}.get(figure["unit"], f" {figure['unit']}")


def _value(figure: dict[str, Any]) -> str:
    """Formats the median and the range."""
    return f"{_number(figure['value'])}{_unit(figure)} ({_number(figure['low'])} ... {_number(figure['high'])})"


def _goal(figure: dict[str, Any]) -> str:
    bound = {"most": "at most ", "least": "at least ", "within": "within ±"}[figure["at"]]
    return f"{bound}{_number(figure['goal'])}{_unit(figure)}: {'met' if figure['met'] else 'missed'}"


def render(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Renders the tables of docs/speed.md: all figures and goals, then the times of each row, then machines and versions."""
    lines = ["| work | figure | clock time: median (range) | processor time | goal |", "|---|---|---|---|---|"]
    missing = []
    for name, row in ROWS.items():
        for device in row.devices:
            if (name, device) in found:
                lines += _summary(f"{row.work} (`{name}`, {device})", found[name, device]["figures"])
            else:
                missing.append(f"`{name}` ({device})")
    lines += ["", f"Not measured: {', '.join(missing)}."] if missing else []
    for (name, device), about in found.items():
        lines += ["", *_section(f"{name}, {device}", about)]
    return "\n".join([*lines, "", "### Machine and versions", "", *_places(found)]) + "\n"


def _summary(title: str, figures: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each figure. The processor time, which is a separate figure in the results, becomes a column."""
    processor = {figure["name"]: _value(figure) for figure in figures if figure["name"].endswith(PROCESSOR)}
    lines = []
    for figure in figures:
        if figure["name"] not in processor:
            cells = [figure["name"], _value(figure), processor.get(figure["name"] + PROCESSOR, "")]
            lines.append(f"| {title} | {' | '.join(cells)} | {_goal(figure) if 'goal' in figure else ''} |")
            title = ""
    return lines


def _section(title: str, about: dict[str, Any]) -> list[str]:
    work = about["work"][:1].upper() + about["work"][1:]
    lines = [f"### {title}", "", f"{work}. One call: {about['per_call']}.", ""]
    figures = {figure["name"] for figure in about["figures"]}  # the first table has the times of these figures
    sides = {side: kinds for side, kinds in about["times"].items() if side not in figures}
    if sides:
        lines += ["| side | seconds a call: median (range) | processor seconds |", "|---|---|---|"]
    for side, kinds in sides.items():
        wall, cpu = kinds["wall"], kinds.get("cpu")
        span = f"{_number(statistics.median(wall))} ({_number(min(wall))} ... {_number(max(wall))})"
        lines.append(f"| {side} | {span} | {_number(statistics.median(cpu)) if cpu else ''} |")
    lines += [""] if sides else []
    lines += _growth(about) if "growth" in about else []
    lines += _tried(about) if "tried" in about else []
    if checks := "; ".join(f"{key}: {_check(value)}" for key, value in about["checks"].items()):
        lines.append(f"Checks: {checks}.")
    if limit := about.get("limit"):
        lines.append(
            f"Our code reaches {100 * limit['share']:.0f} % of the matrix-product rate, {limit['matmul_rate'] / 1e9:,.0f}"
            f" GFLOP/s ({limit['operations'] / 1e9:,.0f} GFLOP a call)."
        )
    return [*lines, f"Peak memory: {about['peak_memory_bytes'] / 2**30:.1f} GiB."]


def _tried(about: dict[str, Any]) -> list[str]:
    """Returns the compile times, and the table of the peers' settings that the row tried first."""
    compiled = ", ".join(f"{side} {_number(seconds)} s" for side, seconds in about["compilation"].items())
    lines = [f"Compile times, not counted above: {compiled}. These settings of the peers were tried:", ""]
    lines += ["| side | seconds a call, tried briefly | seconds to compile |", "|---|---|---|"]
    for row in about["tried"]:
        compilation = _number(row["compilation"]) if row["compilation"] else ""
        lines.append(f"| {row['side']} | {_number(row['seconds'])} | {compilation} |")
    return [*lines, ""]


def _growth(about: dict[str, Any]) -> list[str]:
    """Shows how each phase grows with one setting, from first to last value, and its share of the machine's rate."""
    lines = ["| phase | setting | seconds per image | peak memory, GiB | time of a call |", "|---|---|---|---|---|"]
    for series in about["growth"]:
        first, last = series["rows"][0], series["rows"][-1]
        ends = [f"{series['by']} {first['value']:,} ... {last['value']:,}"]
        ends += [f"{_number(first['seconds'] / first['images'])} ... {_number(last['seconds'] / last['images'])}"]
        ends += [f"{first['peak_bytes'] / 2**30:.1f} ... {last['peak_bytes'] / 2**30:.1f}"]
        lines.append(f"| {series['phase']} | {' | '.join(ends)} | {series['by']} ^ {series['power']:.2f} |")
    lines += ["", "| phase | share of the machine's rate | rate of |", "|---|---|---|"]
    for phase in about["phases"]:
        unit = "GB/s" if "memory" in phase["of"] else "GFLOP/s"
        lines.append(
            f"| {phase['phase']} | {100 * phase['share']:.0f} % | {phase['of']}: {phase['rate'] / 1e9:,.0f} {unit} |"
        )
    return [*lines, ""]


def render_readme(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Renders the table of README.md: the figures that have a goal."""
    lines = ["| work | CPU | GPU |", "|---|---|---|"]
    for name, row in ((name, row) for name, row in ROWS.items() if row.goal):
        cells = []
        for device in ("cpu", "cuda"):
            goals = [shown(figure) for figure in found.get((name, device), {}).get("figures", ()) if "goal" in figure]
            cells.append("<br>".join(goals) or (NONE if device in row.devices else "CPU only"))
        lines.append(f"| {row.work} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _check(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_check(item) for item in value)
    return str(value) if isinstance(value, bool) or not isinstance(value, int) else f"{value:,}"


def _places(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """Returns machine, threads and package versions, once for all rows that share them."""
    rows: dict[str, list[str]] = {}
    for (name, device), about in found.items():
        machine = about["machine"]
        hardware = machine["hardware"]
        gpu = f", {hardware['gpu']}" if "gpu" in hardware else ""
        versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
        place = f"{hardware['cpu']}, {hardware['cores']} cores, {machine['threads']} threads{gpu}. {versions}."
        rows.setdefault(place, []).append(f"`{name}` ({device})")
    return [f"{', '.join(names) if len(rows) > 1 else 'All rows'}: {place}" for place, names in rows.items()]


# FID of unconditional CIFAR-10, 50,000 samples against the training images.
#
# REPLICATION: step -> FID of a public replication of Ho et al. 2020, source unknown.
#
# PUBLISHED: DDIM and eta from Song et al. 2020, table 1. DPM-Solver++ and UniPC from Zhao et al. 2023, on the network of Song
# et al. 2021.
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
    """Renders the tables of docs/cifar10.md: throughput, variants, FID during training, sweeps, recipes on a CPU."""
    names = {"paper", "fast"} | {path.stem.partition("-")[2] for path in (HERE / "results").glob("cifar10-*.json")}
    found = {name: _read(f"cifar10-{name}") for name in sorted(names - {"throughput"}, reverse=True)}
    lines = [*_throughput(_read("cifar10-throughput")), "", "### Variants", "", *_variants(found)]
    lines += ["", "### FID during training", "", *_curves(found), "", "### Samplers and steps", "", *_swept(found)]
    return "\n".join([*lines, "", "### Recipes on this kind of CPU", "", *_on_cpu()]) + "\n"


def _missing(names: list[str], what: str = "Not measured") -> list[str]:
    return ["", f"{what}: {', '.join(f'`{name}`' for name in names)}."] if names else []


def _throughput(about: dict[str, Any]) -> list[str]:
    lines = ["### Training throughput, the paper's network, bfloat16", ""]
    if not about:
        return [*lines, "Not measured."]
    lines += ["| batch | | images/s | share of the matmul rate | hours to 800k steps of 128 | peak memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for cell in sorted(about["cells"], key=lambda cell: (cell["compiled"], cell["batch"])):
        kind = "compiled" if cell["compiled"] else "eager"
        memory = f"{cell['memory_bytes'] / 2**30:.1f} GiB" if cell["memory_bytes"] else ""
        rate, hours = f"{cell['images_per_second']:,.0f}", _number(cell["hours_to_800k"])
        lines.append(f"| {cell['batch']} | {kind} | {rate} | {100 * cell['share']:.0f} % | {hours} | {memory} |")
    rate = max(cell["matmul_rate"] for cell in about["cells"]) / 1e12
    machine = about["machine"]
    place = f"{machine.get('gpu', 'CPU')}, torch {machine['torch']}"
    return [*lines, "", f"{place}; its rate of matrix products is {rate:,.0f} TFLOP/s."]


def _variants(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| variant | steps x batch | minutes | images/s | FID at the end of training | FID, 50,000 | bits/dim, test |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    measured = {name: about for name, about in found.items() if about}
    for name, about in measured.items():
        last, final, bound = (about["curve"] or [None])[-1], about["final"], about["bound"]
        rate = f"{about['images_per_second']:,.0f}" if about["images_per_second"] else ""
        row = [f"{about['step']:,} x {about['recipe']['batch']}", f"{about['minutes']:.1f}", rate]
        row.append(f"{_interval(last)} of {last['images']:,}" if last else NONE)
        row.append(f"{_interval(final)} of {final['images']:,}, {final['point']}" if final else NONE)
        size = f" ({bound['images']:,} images, {bound['times']} times each)" if bound else ""
        row.append(f"{bound['bits_per_dim']:.3f} ± {bound['standard_error']:.3f}{size}" if bound else NONE)
        lines.append(f"| `{name}` | {' | '.join(row)} |")
    missing = _missing([name for name in found if name not in measured])
    return [*lines, *missing] if measured else missing[1:]


def _interval(row: dict[str, Any]) -> str:
    return f"{row['fid']:.2f} ({row['low']:.2f} ... {row['high']:.2f})"


def _curves(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| variant | minutes | step | images seen | FID | as of 50,000 samples |", "|---|---|---|---|---|---|"]
    missing = []
    for name in ("paper", "fast"):
        rows = found[name].get("curve") or []
        missing += [] if rows else [name]
        for row in rows:
            more = f"{row['as_of_50000']:.2f}" if "as_of_50000" in row else ""
            minutes, seen = f"{row['minutes']:.1f}", f"{row['images_seen']:,}"
            lines.append(f"| `{name}` | {minutes} | {row['step']:,} | {seen} | {_interval(row)} | {more} |")
    lines += [f"| replication | | {step:,} | {128 * step:,} | | {fid} |" for step, fid in REPLICATION.items()]
    return lines + _missing(missing)


def _swept(found: dict[str, dict[str, Any]]) -> list[str]:
    sweeps = {name: found[name].get("sweep") or {} for name in ("paper", "fast")}
    measured = {name: sweep for name, sweep in sweeps.items() if sweep}
    titles = ["sampler-steps", *(f"`{name}`" for name in measured), "published"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for point in dict.fromkeys([*PUBLISHED, *(point for sweep in measured.values() for point in sweep)]):
        cells = [_interval(sweep[point]) if point in sweep else NONE for sweep in measured.values()]
        lines.append(f"| `{point}` | {' | '.join([*cells, str(PUBLISHED.get(point, ''))])} |")
    return lines + _missing([name for name in sweeps if name not in measured])


def _on_cpu() -> list[str]:
    """Returns the last score of the curve of `digits`. docs/images has the whole curve."""
    about = _read("curve-digits")
    if not about.get("curve"):
        return ["Not measured."]
    row = about["curve"][-1]
    times = f"{row['minutes']:.2f} | {row['processor_minutes']:.2f}"
    protocol = f"{row['images']:,} samples, layer {about['layer']}, {about['point']}"
    return [
        "| recipe | steps | minutes | processor minutes | FID | protocol |",
        "|---|---|---|---|---|---|",
        f"| `digits` | {row['step']:,} | {times} | {_interval(row)} | {protocol} |",
    ]


def render_ledger() -> str:
    """Renders the tables of docs/ledger.md: every row of the screening, then the curves, then the scores as in papers."""
    about = _read("ledger-cifar10-cpu")
    if not about:
        return "Not measured.\n"
    protocol = f"{about['images']:,} samples, Inception layer {about['layer']}, {about['point']}"
    lines = [
        f"Scores: {protocol}, unless the table says otherwise.",
        "",
        "### Single changes and combinations, 300 processor seconds",
        "",
    ]
    screened = about.get("screening", {})
    lines += _ledger_rows(screened) if screened else ["Not measured."]
    # The baseline and the peers change nothing.
    known = {*screened, *about.get("curves", {})}
    lines += _missing(
        [name for name, change in about["changes"].items() if change and name not in known],
        "Rows not measured yet",
    )
    for phase, title in PHASES.items():
        if about.get(phase):
            lines += ["", f"### {title}", "", *_ledger_rows(about[phase])]
    lines += _missing([title for phase, title in PHASES.items() if not about.get(phase)], "Tables not measured yet")
    return "\n".join(lines) + "\n"


def render_recipes() -> str:
    """Renders the table of docs/recipes.md: the settings whose mean FID in the screening is clearly below the baseline's."""
    about = _read("ledger-cifar10-cpu")
    if not about.get("screening"):
        return "Not measured.\n"
    gains = []
    for name, rows in about["screening"].items():
        found = [row["difference"] for row in rows.values() if "difference" in row]
        if found:
            gains.append((statistics.fmean(100 * each["value"] / each["of"] for each in found), name))
    lines = ["| settings | FID, against the baseline |", "|---|---|"]
    return "\n".join(
        lines
        + [f"| {_settings(about['changes'][name])} | {gain:+.1f} % |" for gain, name in sorted(gains) if gain < CLEAR]
    )


CLEAR = -15  # percent; trainings of the baseline from two seeds differ by about as much


def _settings(change: dict[str, Any]) -> str:
    """Writes a change of the ledger as keys of params.yaml."""
    written = []
    for key, value in change.items():
        if key == "network":
            written += [f"network.{name}: {entry}" for name, entry in value.items()]
        elif key == "schedule":
            written.append(f"schedule: {value['name']}")
        elif key == "descent":
            written += [f"decay: {value[0]}", f"decay_share: {value[1]}"]
        else:
            written.append(f"{key}: {value}")
    return ", ".join(f"`{each}`" for each in written)


PHASES = {
    "curves": "Longer trainings of the baseline, combinations and the peers",
    "large": "Layer 2048, 5,000 samples",
    "hour": "An hour of two cores",
}


def _ledger_rows(rows: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Returns a line for each row and time. Rows of the same time are sorted by FID."""
    lines = [
        "| row | processor seconds | parameters | steps | error | FID: mean (each seed) | against the baseline, same seeds |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    cells: list[tuple[int, float, str]] = []
    for name, found in rows.items():
        times: dict[int, list[dict[str, Any]]] = {}
        for key, row in found.items():
            seconds = int(key.partition(", ")[2].removesuffix(" s"))
            if "failed" in row:
                cells.append((seconds, math.inf, f"| {name} | {seconds} |  |  |  | failed: {row['failed']} |  |"))
            else:
                times.setdefault(seconds, []).append(row)
        for seconds, seeds in times.items():
            fids = [row["fid"] for row in seeds]
            mean = statistics.fmean(fids)
            each = f" ({', '.join(f'{fid:.4g}' for fid in fids)})" if len(fids) > 1 else ""
            steps, error = (statistics.fmean(row[key] for row in seeds) for key in ("steps", "error"))
            text = f"| {name} | {seconds} | {seeds[0]['parameters']:,} | {steps:,.0f} | {error:.4f} | {mean:.4g}{each}"
            cells.append((seconds, mean, f"{text} | {_against([row.get('difference') for row in seeds])} |"))
    return lines + [text for _, _, text in sorted(cells)]


def _against(differences: list[dict[str, float] | None]) -> str:
    """Returns the mean difference from the baseline in percent of the baseline's FID, with its interval.

    The interval comes from the sampling for one or two trainings, and from Student's t over the trainings for three to five.
    """
    known = [found for found in differences if found]
    if not known:
        return ""
    shares = [100 * found["value"] / found["of"] for found in known]
    reach = [100 * (found["high"] - found["low"]) / 2 / found["of"] for found in known]
    mean, count = statistics.fmean(shares), len(shares)
    half = sum(each**2 for each in reach) ** 0.5 / count
    if count in STUDENT:
        half = STUDENT[count] * statistics.stdev(shares) / count**0.5
    return f"{mean:+.1f} % ({mean - half:+.1f} ... {mean + half:+.1f})"


STUDENT = {3: 4.3027, 4: 3.1824, 5: 2.7764}  # the 97.5% quantile of Student's t by the number of trainings


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
    pages |= {CIFAR10: _between(CIFAR10, render_cifar10()), LEDGER: _between(LEDGER, render_ledger())}
    pages |= {RECIPES: _between(RECIPES, render_recipes())}
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
