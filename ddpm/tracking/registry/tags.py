"""The JSON that `promote` writes into the tags of a registered version. Reading a tag checks it.

Anyone can edit a tag in MLflow. `promote` reports and ignores a damaged score, protocol or address of influence values. Damaged
settings are an error, since they would draw other images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ddpm.errors import InputError
from ddpm.files import records
from ddpm.files.params import section
from ddpm.parameters import ALONE, COUNT, Sampler, check_clip, entry
from ddpm.scores.metrics import HEADLINE
from ddpm.tracking.registry.decision import Protocol, Score
from ddpm.tracking.runs import SETTINGS

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

PROTOCOL = "ddpm.protocol"
AGAIN = "`ddpm promote --replace` registers the report's best point without this tag"


@dataclass(frozen=True, kw_only=True)
class _Settings(Sampler):
    steps: int = entry(COUNT)
    clip: bool | float = entry({ALONE: True}, True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip)


@dataclass(frozen=True)
class _Influence:
    run: str
    path: str
    seed: int | None
    sha256: str = ""  # hash of the file; versions before 0.2.0 lack it, and their values are not used


def score_tag(protocol: Protocol) -> str:
    return f"ddpm.score.{protocol.id}"


def influence_tag(protocol: Protocol) -> str:
    return f"ddpm.influence.{protocol.id}"


def settings(version: ModelVersion) -> dict[str, Any]:
    """Returns the sampler settings with which a version was promoted: a row's options, `steps` and `clip`. Raises InputError."""
    from ddpm.runtime.drawing import check_row

    found = _object(version, SETTINGS)
    # protects: tests/tracking/test_promote.py::test_settings_that_are_damaged_draw_nothing[{}]
    try:
        section(_Settings, _Settings.arrange(found))
        row = {name: value for name, value in found.items() if name not in ("steps", "clip")}
        check_row("champion", section(Sampler, Sampler.arrange(row)))
    except (InputError, ValueError) as error:
        raise _damaged(version, SETTINGS, str(error)) from None
    return found


def protocol(version: ModelVersion) -> Protocol | None:
    """Returns the protocol under which a version was promoted, or None if the tag is missing. Raises InputError."""
    if PROTOCOL not in version.tags:
        return None
    found = _object(version, PROTOCOL)
    kinds = {field.name: int if field.type == "int" else str for field in fields(Protocol)}
    if found.keys() != kinds.keys() or not all(type(found[name]) is kind for name, kind in kinds.items()):
        raise _damaged(version, PROTOCOL, f"expected {', '.join(kinds)}")
    return Protocol(**found)


def score(version: ModelVersion, under: Protocol) -> Score | None:
    """Returns a version's score under a protocol, or None if there is no score with an interval. Raises InputError."""
    tag = score_tag(under)
    if tag not in version.tags:
        return None
    found = _object(version, tag)
    if HEADLINE in found and f"{HEADLINE}_high" not in found:
        return None  # written before scores had intervals
    try:
        read = Score.from_json(found)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise _damaged(version, tag, str(error)) from None
    if read.protocol != under:
        raise _damaged(version, tag, f"it is a score under another protocol: {under.differences(read.protocol)}")
    return read


def influence(version: ModelVersion, under: Protocol) -> _Influence | None:
    """Returns where the influence values of a score are kept, or None if they were not kept. Raises InputError."""
    tag = influence_tag(under)
    if tag not in version.tags:
        return None
    try:
        return records.build(_Influence, _object(version, tag))
    except ValueError as error:
        raise _damaged(version, tag, str(error)) from None


def _object(version: ModelVersion, tag: str) -> dict[str, Any]:
    try:
        found = json.loads(version.tags[tag])
    except (ValueError, RecursionError) as error:
        raise _damaged(version, tag, f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(version, tag, "no JSON object")
    return found


def _damaged(version: ModelVersion, tag: str, why: str) -> InputError:
    return InputError(
        f"{version.name} version {version.version}: its tag {tag} is damaged ({' '.join(why.split())}); {AGAIN}"
    )
