"""Reads and checks the JSON that `promote` writes into the tags of a registered version.

A user may edit tags in MLflow. `promote` reports a damaged score, protocol or influence tag, and continues without it. A damaged
settings tag is an error, because with wrong settings the model would draw images other than those that were scored.
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
AGAIN = "`ddpm promote --replace` makes the report's best point the champion instead"


@dataclass(frozen=True, kw_only=True)
class _Settings(Sampler):
    steps: int = entry(COUNT)
    clip: bool | float = entry({ALONE: True}, True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip)


@dataclass(frozen=True)
class _Influence:
    """The artifact that holds the influence values of a score.

    Args:
        run: the id of the run.
        path: the path of the artifact in the run.
        seed: the seed of the noise from which the images start; None if unknown.
        sha256: the hash of the file. Tags that ddpm wrote before its version 0.2.0 have no
            hash; the influence values that they name are not used.
    """

    run: str
    path: str
    seed: int | None
    sha256: str = ""


def score_tag(protocol: Protocol) -> str:
    return f"ddpm.score.{protocol.id}"


def influence_tag(protocol: Protocol) -> str:
    return f"ddpm.influence.{protocol.id}"


def settings(version: ModelVersion) -> dict[str, Any]:
    """Returns the sampler settings of a version: the options of a `samplers` row, `steps` and `clip`. Raises InputError."""
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
    """Returns the protocol under which a version was scored at its promotion; None if it has no such tag. Raises InputError."""
    if PROTOCOL not in version.tags:
        return None
    found = _object(version, PROTOCOL)
    kinds = {field.name: int if field.type == "int" else str for field in fields(Protocol)}
    if found.keys() != kinds.keys() or not all(type(found[name]) is kind for name, kind in kinds.items()):
        raise _damaged(version, PROTOCOL, f"expected the entries {', '.join(kinds)}")
    return Protocol(**found)


def score(version: ModelVersion, under: Protocol) -> Score | None:
    """Returns the score of a version under a protocol; None if there is no score, or one without interval. Raises InputError."""
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
        raise _damaged(version, tag, f"the score is under another protocol: {under.differences(read.protocol)}")
    return read


def influence(version: ModelVersion, under: Protocol) -> _Influence | None:
    """Returns the artifact with the influence values of a score; None if the values were not stored. Raises InputError."""
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
        raise _damaged(version, tag, f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise _damaged(version, tag, "not a JSON object")
    return found


def _damaged(version: ModelVersion, tag: str, why: str) -> InputError:
    return InputError(
        f"{version.name} version {version.version}: the tag {tag} is damaged ({' '.join(why.split())}); {AGAIN}"
    )
