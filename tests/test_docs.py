"""The docs name what is there."""

from pathlib import Path

from ddpm import LOSSES, SAMPLERS, SCHEDULES, SPACINGS, TARGETS
from ddpm.stages.params import Params, Sampler

ROOT = Path(__file__).parents[1]


def test_every_parameter_is_documented() -> None:
    text = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    keys = set(Sampler.model_fields)
    for name, field in Params.model_fields.items():
        keys |= {name, *getattr(field.annotation, "model_fields", ())}
    missing = [key for key in keys if f"`{key}`" not in text]
    assert not missing
    values = [*SAMPLERS, *SCHEDULES, *SPACINGS, *TARGETS, *LOSSES]
    assert not [value for value in values if f"`{value}`" not in text]
