"""Checks that parameters, examples and pictures in the docs match the code, and that the Python in the docs runs."""

import runpy
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm import LOSSES, SAMPLERS, SCHEDULES, SPACINGS, TARGETS, Denoiser, NoiseSchedule, UNet
from ddpm.files.params import Params
from ddpm.parameters import Network, Sampler

ROOT = Path(__file__).parents[1]


def test_every_parameter_is_documented() -> None:
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    keys = {field.name for kind in (Sampler, Network) for field in fields(kind)}
    for name, section in Params.model_fields.items():
        keys |= (
            {name, *(field.name for field in fields(section.annotation))}
            if is_dataclass(section.annotation)
            else {name}
        )
    missing = [key for key in keys if f"`{key}`" not in text]
    assert not missing
    values = [*SAMPLERS, *SCHEDULES, *SPACINGS, *TARGETS, *LOSSES]
    assert not [value for value in values if f"`{value}`" not in text]


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

    Those in docs/architecture.md are the text of tests. test_exchange.py runs docs/diffusers.md, and test_conditional.py runs
    docs/mlflow.md.
    """
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages.remove(ROOT / "docs" / "architecture.md")
    there = [(str(page.relative_to(ROOT)), number) for page in pages for number in range(len(snippets(str(page))))]
    assert sorted(there) == sorted(
        [*((page, which) for page, which, _ in RUN.values()), ("docs/diffusers.md", 0), ("docs/mlflow.md", 0)]
    )
