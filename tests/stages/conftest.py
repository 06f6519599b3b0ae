"""A checkout's worth of files in a temporary folder: the smoke recipe, and real digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ddpm.stages.params import Params
from ddpm.stages.prepare import prepare

RECIPES = Path(__file__).parents[2] / "recipes"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


@pytest.fixture(scope="session")
def smoke() -> Callable[..., Params]:
    """The smoke recipe with sections changed: smoke(training={"steps": 3})."""
    raw = YAML(typ="safe").load((RECIPES / "smoke.yaml").read_text(encoding="utf-8"))
    return lambda **changes: Params.check(merged(raw, changes), "smoke")


@pytest.fixture(scope="session")
def digits(smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the prepared digits; read-only by agreement."""
    root = tmp_path_factory.mktemp("digits")
    prepare(smoke(), root)
    return root


@pytest.fixture
def root(digits: Path, tmp_path: Path) -> Path:
    """A root of its own that shares the prepared digits."""
    (tmp_path / "dataset").symlink_to(digits / "dataset")
    return tmp_path
