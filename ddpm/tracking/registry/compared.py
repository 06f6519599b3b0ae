"""Compares the best point of the report (schedule, sampler and steps) with the champion, for the report page."""

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
from ddpm.tracking.registry.registry import Challenger, _challenger, _report_scores, _score, _version, _with_influence

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def with_champion(target: Target, params: Params, root: Path, say: Say) -> Compared | None:
    """Compares the report's best point with the champion. If the best point is the champion, uses the previous champion.

    Returns None if there is no champion. The comparison has no scores if there is no previous champion, or if the score under the
    present protocol is unknown. Raises InputError if an output is missing or older than its inputs.
    """
    champion = _version(target.client, champion_uri(params))
    if champion is None:
        return None
    best = _challenger(params, root)
    version, title = champion, "The champion"
    if best.is_version(champion):
        about = f"{best.point.name} is the champion: version {champion.version} of {champion.name}."
        before = champion.tags.get("ddpm.previous")
        previous = _version(target.client, f"models:/{champion.name}/{before}") if before else None
        if previous is None:
            return Compared(title, f"{about} There was no earlier champion.")
        version, title = previous, "The previous champion"
    else:
        about = f"The champion is version {champion.version} of {champion.name}, {champion.tags.get('ddpm.point')}."
    if version is not champion:
        about += f" It replaced version {version.version}, {version.tags.get('ddpm.point')}."
    changed = changes(_settings(target, version), _own_settings(best))
    score = _score(version, best.score.protocol, say)
    if score is None:
        about += f" Version {version.version} has no score under the present protocol"
        about += "; `ddpm promote` scores it again." if version is champion else "."
        return Compared(title, about, changed)
    score = _with_influence(target, version, score, say)
    confidence = params.promotion.confidence
    reach = against_one(score.estimate, _report_scores(root, best.score.protocol), confidence)
    point = str(version.tags.get("ddpm.point"))
    now = Measured(best.point.name, best.score.estimate, best.seed)
    gap = Gap.of(now, Measured(point, score.estimate, score.seed), reach)
    return Compared(title, about, changed, [gap], confidence)


def _own_settings(best: Challenger) -> dict[str, Any]:
    return flat({**identity_of_model(best.model), "sampler": best.settings})


def _settings(target: Target, version: ModelVersion) -> Mapping[str, Any]:
    """Returns the parameters of a registered version: the training parameters from a run, the sampler settings from a tag."""
    sampler = flat({"sampler": tags.settings(version)})
    run = target.client.get_run(version.run_id) if version.run_id else None
    parent = run and run.data.tags.get("mlflow.parentRunId")
    return {**(target.client.get_run(parent).data.params if parent else {}), **sampler}
