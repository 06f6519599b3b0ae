"""Compares the report's best point with the champion, for the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.files.params import Params
from ddpm.reporting.compared import Compared, Gap, Measured, changes
from ddpm.scores.intervals import against_one
from ddpm.tracking.lineage import flat, identity_of_model
from ddpm.tracking.place import Say, Target, champion_uri
from ddpm.tracking.registry import tags
from ddpm.tracking.registry.registry import Challenger, _challenger, _looked_at, _score, _version, _with_influence

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def with_champion(target: Target, params: Params, root: Path, say: Say) -> Compared | None:
    """Compares the best point with the champion; if the best point is the champion, with the previous champion.

    Returns None without a champion. Raises InputError if an output is missing or stale.
    """
    champion = _version(target.client, champion_uri(params))
    if champion is None:
        return None
    best = _challenger(params, root)
    other, title = champion, "The champion"
    if best.is_version(champion):
        said = f"{best.point.name} is the champion: version {champion.version} of {champion.name}."
        before = champion.tags.get("ddpm.previous")
        former = _version(target.client, f"models:/{champion.name}/{before}") if before else None
        if former is None:
            return Compared(title, f"{said} There was no champion before.")
        other, title = former, "The champion before"
    else:
        said = f"The champion is version {champion.version} of {champion.name}, {champion.tags.get('ddpm.point')}."
    if other is not champion:
        said += f" It replaced version {other.version}, {other.tags.get('ddpm.point')}."
    changed = changes(_settings(target, other), _own_settings(best))
    score = _score(other, best.score.protocol, say)
    if score is None:
        return Compared(
            title, f"{said} That version has no score under the present protocol; `ddpm promote` scores it.", changed
        )
    score = _with_influence(target, other, score, say)
    confidence = params.promotion.confidence
    reach = against_one(score.estimate, _looked_at(root, best.score.protocol), confidence)
    point = str(other.tags.get("ddpm.point"))
    now = Measured(best.point.name, best.score.estimate, best.seed)
    gap = Gap.of(now, Measured(point, score.estimate, score.seed), reach)
    return Compared(title, said, changed, [gap], confidence)


def _own_settings(best: Challenger) -> dict[str, Any]:
    return flat({**identity_of_model(best.model), "sampler": best.settings})


def _settings(target: Target, version: ModelVersion) -> Mapping[str, Any]:
    """Returns the parameters of a version's training, from the run of the training, and of its sampler."""
    sampler = flat({"sampler": tags.settings(version)})
    run = target.client.get_run(version.run_id) if version.run_id else None
    parent = run and run.data.tags.get("mlflow.parentRunId")
    return {**(target.client.get_run(parent).data.params if parent else {}), **sampler}
