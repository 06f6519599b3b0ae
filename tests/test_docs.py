"""Checks that parameters, examples and pictures in the docs match the code, and that the Python in the docs runs."""

import re
import runpy
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from ddpm import LOSSES, SAMPLERS, SCHEDULES, SPACINGS, TARGETS, Denoiser, NoiseSchedule, UNet
from ddpm.files.params import Params, section
from ddpm.parameters import (
    Compute,
    Data,
    Diffusion,
    Evaluation,
    Likelihood,
    Network,
    Promotion,
    Report,
    Sampler,
    Sampling,
    Schedule,
    Training,
)

ROOT = Path(__file__).parents[1]


def test_every_parameter_is_documented() -> None:
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    keys = {field.name for kind in (Sampler, Network) for field in fields(kind)}
    for name, entry in Params.model_fields.items():
        keys |= (
            {name, *(field.name for field in fields(entry.annotation))} if is_dataclass(entry.annotation) else {name}
        )
    missing = [key for key in keys if f"`{key}`" not in text]
    assert not missing
    values = [*SAMPLERS, *SCHEDULES, *SPACINGS, *TARGETS, *LOSSES]
    assert not [value for value in values if f"`{value}`" not in text]


KINDS = {"data": Data, "diffusion": Diffusion, "network": Network, "training": Training, "sampling": Sampling}
KINDS |= {"evaluation": Evaluation, "likelihood": Likelihood, "samplers": Sampler, "schedules": Schedule}
KINDS |= {"report": Report, "promotion": Promotion, "compute": Compute}
# Other entries that a section needs to accept a value at the end of its range.
BESIDE: dict[str, dict[str, Any]] = {
    "samplers": {"sampler": "ddim", "guidance": 2.0},
    "schedules": {"schedule": "linear"},
    "training": {"optimizer": "muon", "decay": "linear"},
    "evaluation": {"layer": 64},
}


def ends(values: str) -> tuple[list[float], list[float]]:
    """Parses a range of the docs. Returns values at its ends, and the nearest ones outside."""
    values = values.removesuffix(", or `null`").replace(",", "")
    if found := re.fullmatch(r"([\d.]+) \.\.\. ([\d.^]+)( - 1)?", values):
        low, high = (2.0**32 if text == "2^32" else float(text) for text in found.group(1, 2))
        high -= bool(found[3])
        if "." in found[1]:
            return [low, high], [low - 1e-9, high + 1e-9]
        return [int(low), int(high)], [int(low) - 1, int(high) + 1]
    if found := re.fullmatch(r"(0 or )?(\d+) or more", values):
        low = int(found[2])
        return ([0, low], [-1, low - 1]) if found[1] else ([low], [low - 1])
    if found := re.fullmatch(r"(>=?) (\d)", values):
        low = float(found[2])
        return ([low], [low - 1e-9]) if found[1] == ">=" else ([low + 1e-9], [low])
    if found := re.fullmatch(r"([\[(])(\d) (\d)([\])])", values):
        low, high = float(found[2]), float(found[3])
        good, bad = [low + 1e-9, high - 1e-9], [low - 1e-9, high + 1e-9]
        (good if found[1] == "[" else bad).append(low)
        (good if found[4] == "]" else bad).append(high)
        return good, bad
    return [], []


def test_the_ranges_in_the_docs_are_those_that_are_checked() -> None:
    """Values at both ends of each range are accepted, and the nearest values outside are refused."""
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    smoke = YAML(typ="safe").load((ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8"))
    seen, wrong = set[tuple[str, str]](), []
    for name, part in re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        for keys, values in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", part, re.MULTILINE):
            for key, given in zip(re.findall(r"`(\w+)`", keys), values.split("; "), strict=False):
                good, bad = ends(given)
                known = name in KINDS and key in {field.name for field in fields(KINDS[name])}
                if not known or (name, key) in seen or not good:
                    continue  # a network of another kind has a second table
                seen.add((name, key))
                base = {**smoke[name], **BESIDE.get(name, {})} if name in smoke else {}
                base = BESIDE[name] if name in ("samplers", "schedules") else base
                for value in (*good, *bad):
                    try:
                        section(KINDS[name], {**base, key: value})
                        accepted = True
                    except ValueError:
                        accepted = False
                    wrong += [(name, key, value)] if accepted != (value in good) else []
    assert not wrong and len(seen) >= 35, (wrong, len(seen))


def test_the_defaults_in_the_docs_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    seen, wrong = set[tuple[str, str]](), []
    for name, part in re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        defaults = {field.name: field.default for field in fields(KINDS[name])} if name in KINDS else {}
        for cell, meaning in re.findall(r"^\| ([^|]+) \|[^|]+\| ([^|]+\)) \|$", part, re.MULTILINE):
            keys, values = re.findall(r"`(\w+)`", cell), re.findall(r" \(([^()]+)\)", meaning)
            for key, value in zip(reversed(keys), reversed(values), strict=False):
                given = () if value == "none" else YAML(typ="safe").load(value.strip("`").removesuffix(" steps"))
                if defaults.get(key, MISSING) in (MISSING, None) or (name, key) in seen:
                    continue  # None stands for the default of the sampler or the schedule
                seen.add((name, key))
                wrong += [(name, key, given, defaults[key])] if given != defaults[key] else []
    assert not wrong and len(seen) >= 30, (wrong, len(seen))


def test_every_extra_for_users_is_documented() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert not [name for name in extras if name not in ("bench", "dev", "mutation") and f"`ddpm[{name}]`" not in text]


EXAMPLES = ("sources/toy_source", "networks/toy_network", "scores/toy_metric", "diffusion/toy_sampler")


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_architecture_page_are_those_of_the_tests(example: str) -> None:
    code = (ROOT / "tests" / f"{example}.py").read_text(encoding="utf-8")
    assert code in snippets("docs/architecture.md")


def test_the_picture_of_the_architecture_is_what_the_code_imports() -> None:
    scope = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    assert scope["draw"]() == scope["PICTURE"].read_text(encoding="utf-8"), "run: python docs/draw_architecture.py"


def snippets(page: str) -> list[str]:
    return [block.partition("```")[0] for block in (ROOT / page).read_text(encoding="utf-8").split("```python\n")[1:]]


# For each case: the page, the number of the snippet, and replacements that make it smaller.
RUN: dict[str, tuple[str, int, dict[str, str]]] = {
    "a trained model": ("README.md", 0, {"28, 28": "8, 8", "steps=20": "steps=5"}),
    "the library": ("README.md", 1, {"channels=128": "channels=32", "randn(16,": "randn(2,", "blocks=2": "blocks=1"}),
    "a model that is loaded": ("docs/library.md", 0, {"steps=50": "steps=5"}),
    "a training on classes": (
        "docs/conditional.md",
        0,
        {"islice(training, 800)": "islice(training, 40)", "steps=50": "steps=5"},
    ),
    "images and codes": ("docs/generate.md", 0, {"steps=200": "steps=20"}),
    "the bound": ("docs/likelihood.md", 0, {"times=100": "times=5"}),
}


@pytest.mark.parametrize("case", RUN)
def test_python_in_the_docs_runs(case: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    page, which, smaller = RUN[case]
    code = snippets(page)[which]
    for text, less in smaller.items():
        assert text in code
        code = code.replace(text, less)
    torch.manual_seed(0)
    schedule = NoiseSchedule.named("cosine", steps=1000)
    net = UNet(image_channels=1, image_size=8, channels=8, multipliers=(1,), blocks=1, attention=())
    given: dict[str, Any] = {"denoiser": Denoiser(net, schedule, target="eps", clip=True)}
    if case == "images and codes":
        given |= {"images": torch.rand(2, 1, 8, 8), "x_T": torch.randn(2, 1, 8, 8)}
    if case == "the bound":
        given["images"] = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    exec(code, found := dict(given))
    for name in ("images", "digits", "threes_and_sevens", "again", "mean"):
        if isinstance(found.get(name), torch.Tensor):
            assert torch.isfinite(found[name].float()).all(), name
    if "step" in found:
        assert found["state"].step == 40
        assert float(found["step"].loss) < 0.8  # a network that predicts zero has a loss of 1


def test_every_snippet_of_the_docs_is_run() -> None:
    """Every snippet is run by this file, except those that other tests run.

    The snippets in docs/architecture.md are files of tests/. test_exchange.py runs docs/diffusers.md, and test_rectangles.py
    makes the calls of docs/mlflow.md.
    """
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages.remove(ROOT / "docs" / "architecture.md")
    there = [(str(page.relative_to(ROOT)), number) for page in pages for number in range(len(snippets(str(page))))]
    assert sorted(there) == sorted(
        [*((page, which) for page, which, _ in RUN.values()), ("docs/diffusers.md", 0), ("docs/mlflow.md", 0)]
    )
