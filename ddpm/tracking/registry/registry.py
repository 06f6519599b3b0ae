"""The model registry: registers models, promotes a model to champion, rolls back, and writes the model that MLflow serves."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import packages_distributions
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.databases import mlflow_file
from ddpm.errors import InputError
from ddpm.files import atomic, models, paths, records, scores
from ddpm.files.models import BoundRecord, ModelRecord
from ddpm.files.params import Params
from ddpm.files.scores import Scores, read_best, read_report, read_scores
from ddpm.networks.network import NETWORKS
from ddpm.parameters import Point
from ddpm.provenance import code
from ddpm.provenance.project import mlflow_command
from ddpm.reporting.card import LONGEST, card, with_front_matter
from ddpm.scores.intervals import Estimate
from ddpm.scores.metrics import HEADLINE, RANKING
from ddpm.sources.source import SOURCES
from ddpm.tracking.lineage import PointSettings, flat
from ddpm.tracking.place import (
    CHAMPION,
    Place,
    Say,
    Target,
    as_default,
    champion_uri,
    client_of,
    find_place,
    locked,
    model_name,
    open_target,
    plain_errors,
    require_reachable,
)
from ddpm.tracking.publish.publishing import publish_points
from ddpm.tracking.registry import tags
from ddpm.tracking.registry.decision import Decision, Protocol, Score, Verdict, decide
from ddpm.tracking.runs import MODEL, MODEL_RECORD, SETTINGS

if TYPE_CHECKING:
    import numpy as np
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient
    from numpy.typing import NDArray

SERVED = Path(__file__).with_name("served.py")
BEST = "ddpm.best_champion"  # tag of a champion: the version with the best score of this champion and all earlier ones
ROLLED_BACK = "ddpm.rolled_back"  # tag of a version that was rolled back; `promote` brings it back only with --replace


def _start_advice(root: Path) -> str:
    """Returns advice for a user who wants to load a model while MLflow does not answer."""
    command = mlflow_command(root)
    return (
        f"start MLflow{f' (`{command}`)' if command else ''}, or name a checkpoint folder such as models/cosine instead"
    )


class NoSuchModel(InputError):
    """The registry has no model of this name, alias or version."""


def fetch_champion(params: Params, destination: Path, root: Path = Path()) -> tuple[Path, dict[str, Any], str]:
    """Downloads the champion. Without a champion, returns the best point of the report instead.

    Args:
        params: the parameters, which name the dataset.
        destination: the folder to download into.
        root: the checkout with the report.

    Returns:
        The checkpoint folder, the sampler settings as fetch_model returns them, and words for messages that say which model
        this is ("" for the champion).

    Raises:
        InputError: the champion cannot be downloaded; or there is no champion, and the report is missing or out of date.
    """
    try:
        return *fetch_model(champion_uri(params), destination, root), ""
    except NoSuchModel as error:
        if not (root / paths.report_dir() / "best.json").exists():
            raise InputError(f"{error}, after `dvc repro` has written a report") from None
    best = _challenger(params, root)
    return (
        best.folder,
        best.settings,
        f"{best.point.name}, the report's best point (there is no champion yet; `ddpm promote` makes one)",
    )


def fetch_model(uri: str, destination: Path, root: Path = Path()) -> tuple[Path, dict[str, Any]]:
    """Downloads a registered model.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        destination: the folder to download into.
        root: the checkout whose MLflow store holds the model.

    Returns:
        The checkpoint folder below `destination`, and the sampler settings with which the model was promoted: the options of a
        row of `samplers` in params.yaml, `steps` and `clip`.

    Raises:
        InputError: the model does not exist, is damaged or was not registered by `ddpm promote`, or MLflow cannot be reached.
    """
    where = find_place(root)
    if not re.fullmatch(r"models:/[^/@]+(@[^/@]+|/[0-9]+)", uri):
        raise InputError(
            f"'{uri}': not the name of a registered model; expected models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    require_reachable(where, _start_advice(root))
    absent = NoSuchModel(f"{uri}: MLflow at {where.shown} has no such model; `ddpm promote` registers one")
    if where.database and not where.database.exists():
        mlflow_file.check(where.database)  # raises InputError if the database was lost
        raise absent  # the client would create an empty database
    with plain_errors(where, _start_advice(root)):
        with locked(where):
            client = client_of(where)
        version = _version(client, uri)
        if version is None:
            raise absent
        if SETTINGS not in version.tags:
            raise InputError(
                f"{uri}: has no tag {SETTINGS}, since it was not registered by `ddpm promote`; choose another version"
            )
        settings = tags.settings(version)
        return _download(client, where, version, destination), settings


def _version(client: MlflowClient, uri: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    name, sign, which = re.split(r"([@/])", uri.removeprefix("models:/"), maxsplit=1)
    try:
        return client.get_model_version_by_alias(name, which) if sign == "@" else client.get_model_version(name, which)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None  # for an unknown alias, MLflow answers with the second code
        raise


def _download(client: MlflowClient, where: Place, version: ModelVersion, destination: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    location = client.get_model_version_download_uri(version.name, version.version)
    destination.mkdir(parents=True, exist_ok=True)
    path = download_artifacts(f"{location}/artifacts/checkpoint", dst_path=str(destination), tracking_uri=where.uri)
    folder = Path(path)
    record = models.read_model_record(folder)
    models.check_weights(folder, record)
    found = {MODEL: record.weights_sha256, MODEL_RECORD: records.record_digest(record.content)}
    # protects: tests/tracking/test_promote.py::test_a_registered_model_whose_files_were_replaced_is_refused
    if MODEL not in version.tags or any(version.tags.get(tag, value) != value for tag, value in found.items()):
        raise InputError(
            f"{version.name} version {version.version}: the files differ from those that were registered; restore them in the"
            f" artifacts of {where.shown}, or register the model again (ddpm promote --replace)"
        )
    return folder


@dataclass(frozen=True)
class Challenger:
    """The best point of the report, and everything needed to promote its model.

    Args:
        name: the name of the registered model.
        point: the best point: a schedule, a sampler and a number of steps.
        settings: the options of the sampler, plus `steps` and `clip`.
        seed: the seed of the noise from which the images start.
        scores: all scores of the point.
        score: the headline score with its influence values.
        model: the content of model.json.
        folder: the checkpoint folder of the model.
        likelihood: the likelihood bound; None if it was not measured for exactly these weights.
    """

    name: str
    point: Point
    settings: dict[str, Any]
    seed: int
    scores: Scores
    score: Score
    model: ModelRecord
    folder: Path
    likelihood: BoundRecord | None = None

    @property
    def identity(self) -> dict[str, str]:
        """The tags that determine which images the model makes."""
        return {MODEL: self.model.weights_sha256, SETTINGS: json.dumps(self.settings, sort_keys=True)}

    def is_version(self, version: ModelVersion) -> bool:
        return all(version.tags.get(tag) == value for tag, value in self.identity.items())

    @property
    def card(self) -> str:
        return card(self.name, self.point.name, self.settings, self.scores, self.model, self.likelihood)

    @property
    def card_file(self) -> str:
        return with_front_matter(self.card, self.name, self.scores, self.model)

    @property
    def tags(self) -> dict[str, str]:
        return {
            **self.identity,
            MODEL_RECORD: records.record_digest(self.model.content),
            "ddpm.point": self.point.name,
            "ddpm.schedule": self.point.schedule,
            "ddpm.sampler": self.point.sampler,
            "ddpm.steps": str(self.point.steps),
            "ddpm.evaluations": str(self.score.evaluations),
            f"ddpm.{HEADLINE}": str(self.score.value),
            "ddpm.dataset": self.model.data.name,
            "ddpm.dataset_sha256": self.score.protocol.dataset,
            tags.PROTOCOL: json.dumps(asdict(self.score.protocol)),
            tags.score_tag(self.score.protocol): json.dumps(self.scores.to_json()),
        }


def _challenger(params: Params, root: Path) -> Challenger:
    best = read_best(root)
    point = Point.parse(best.row.point)
    found = read_scores(root, point)
    settings = PointSettings.read(params, point, root)
    if found.values[HEADLINE] != best.row.value or settings is None:
        raise InputError(f"{root / paths.report_dir()}: the report is older than its scores; run dvc repro")
    folder, bound = root / paths.model_dir(point.schedule), root / paths.likelihood_file(point.schedule)
    model = models.read_trained(root, point.schedule)
    likelihood = models.read_bound(root, point.schedule) if bound.exists() else None
    if found.model != model.weights_sha256:
        raise InputError(f"{folder}: the scores of {point.name} belong to another model; run dvc repro")
    score = Score.of(found, scores.read_all_influence(root, point, found), settings.seed)
    if absent := set(params.promotion.judges) - score.judges.keys():
        raise InputError(
            f"{root / paths.metrics_file(point)}: no score by {min(absent)}, which promotion.judges names; run dvc repro"
        )
    row = dict(settings.row)
    if (length := row.pop("ema", None)) is not None:
        from ddpm.files import snapshots  # imported here: it imports torch

        folder = snapshots.checkpoint_of(root, point.schedule, length)
        model = models.read_model_record(folder)
        if "fitted_to" in row:  # the copy has the weights to which the times were fitted
            row["fitted_to"] = model.weights_sha256
    return Challenger(
        model_name(params),
        point,
        {**row, "steps": point.steps, "clip": settings.sampling.get("clip", True)},
        settings.seed,
        found,
        score,
        model,
        folder,
        likelihood if likelihood and likelihood.model == model.weights_sha256 else None,
    )


def _report_scores(root: Path, protocol: Protocol) -> list[Estimate]:
    """Reads the scores of all points of the report.

    Raises InputError if the report is incomplete, or if a point was scored under another protocol.
    """
    best, rows = read_report(root)
    if len(rows) != best.points:
        raise InputError(
            f"{root / paths.report_dir()}: best.json counts {best.points} points, but points.csv lists {len(rows)};"
            " run `dvc repro`"
        )
    points = [Point.parse(row.point) for row in rows]
    found = [(point, read_scores(root, point)) for point in points]
    if others := [point.name for point, content in found if Protocol.of(content) != protocol]:
        raise InputError(f"{root / paths.report_dir()}: {others[0]} was scored under another protocol; run dvc repro")
    return [content.estimate(scores.read_point_influence(root, point, content)) for point, content in found]


def model_card(params: Params, root: Path = Path()) -> str:
    """Returns the model card of the report's best point, as a file that a promotion would store beside the model.

    Needs no server, since the card is made from the outputs. Raises InputError.
    """
    return _challenger(params, root).card_file


Rescore = Callable[[Path, dict[str, Any]], tuple[Scores, "NDArray[np.float32]"]]


def promote(
    params: Params, root: Path = Path(), replace: bool = False, rescore: Rescore | None = None, say: Say = print
) -> Decision:
    """Registers the report's best point as `ddpm-DATASET` with the alias `champion`, if it beats the present champion.

    `decision.decide` compares the two scores. If the champion has no score on the present dataset with the present evaluation
    settings, it is first scored again. Exception: if `data.source` reads a user's own images, and these have changed, they may be
    another dataset. Then the champion stays, unless `tracking.name` names the dataset. The decision is stored in tags.

    Args:
        params: the parameters of the sweep.
        root: the top of the checkout.
        replace: whether to promote the point whatever the scores say.
        rescore: scores a champion again: (checkpoint folder, sampler settings) -> scores and influence values. Without this
            function, a champion that must be scored again raises InputError.
        say: prints a line for the user.

    Returns:
        The decision.

    Raises:
        InputError: an output is missing or older than its inputs, the champion cannot be scored, or MLflow cannot be reached.
    """
    challenger = _challenger(params, root)
    target = open_target(params, root)
    with plain_errors(target.place), locked(target.place, ".promote"):
        seen = max((int(version.version) for version in _versions(target.client, challenger.name)), default=0)
        registered: ModelVersion | None = None
        while True:
            champion = _version(target.client, champion_uri(params))
            if champion is not None and challenger.is_version(champion):
                return _keep_champion(target, champion, challenger)
            if (former := _rolled_back(target, challenger)) and not replace:
                reason = f"{challenger.point.name} was rolled back as version {former}; --replace brings it back"
                return _decided(target, challenger, champion, champion, None, Verdict(False, reason))
            verdict, score, best = _compare(target, champion, challenger, params, root, replace, rescore, say)
            if not verdict.wins:
                return _decided(target, challenger, champion, champion, score, verdict)
            registered = registered or _register(target, params, root, challenger)
            now = _version(target.client, champion_uri(params))
            if (now and now.version) == (champion and champion.version):
                break
            # Another process has changed the champion, so compare with the new champion.
        # The tags come before the alias: after a kill in between, no champion lacks its decision or predecessor.
        _tag(target.client, registered, "ddpm.decision", verdict.reason)
        _tag(target.client, registered, BEST, best or registered.version)
        if champion is not None:
            _tag(target.client, registered, "ddpm.previous", champion.version)
        target.client.set_registered_model_alias(challenger.name, CHAMPION, registered.version)
        if not replace:
            registered = _choose_among_rivals(target, challenger, registered, seen, say)
        return _decided(target, challenger, champion, registered, score, verdict)


def rollback(params: Params, root: Path = Path()) -> Decision:
    """Makes the previous champion the champion again.

    Tags the version that loses the alias, so that the next `promote` of the same report does not bring that version back. Returns
    the decision, and stores it in the registry. Raises InputError if there is no earlier champion.
    """
    target = open_target(params, root)
    client, name = target.client, model_name(params)
    with plain_errors(target.place), locked(target.place, ".promote"):
        champion = _version(client, champion_uri(params))
        if champion is None:
            raise InputError(f"{name}: no champion to roll back; `ddpm promote` makes one")
        before = _earlier(client, champion)
        if before is None:
            raise InputError(f"{name}: cannot roll back, since there was no champion before version {champion.version}")
        reason = (
            f"rolled back from version {champion.version} to version {before.version} ({before.tags.get('ddpm.point')})"
        )
        # The tags come before the alias: after a kill in between, no `promote` brings the version back.
        _tag(client, champion, ROLLED_BACK, before.version)
        _tag(client, champion, "ddpm.replaced_by", before.version)
        client.set_registered_model_alias(name, CHAMPION, before.version)
        _describe_model(client, before, reason)
        _tag(client, before, "ddpm.decision", reason)
        point = str(before.tags.get("ddpm.point"))
        to, away = str(before.version), str(champion.version)
        _record_decision(client, name, {"rollback": True, "point": point, "champion": to, "before": away})
        return Decision(False, to, f"{name} {reason}", point, away, point)


def _earlier(client: MlflowClient, champion: ModelVersion) -> ModelVersion | None:
    """Returns the latest earlier champion that was not rolled back.

    Returns None if there is no such champion, or if a version between that champion and `champion` was deleted.
    """
    seen, version = {str(champion.version)}, champion
    while (number := version.tags.get("ddpm.previous")) and number not in seen:
        seen.add(number)
        found = _version(client, f"models:/{champion.name}/{number}")
        if found is None:
            return None
        if ROLLED_BACK not in found.tags:
            return found
        version = found
    return None


def _rolled_back(target: Target, challenger: Challenger) -> str | None:
    """Returns the number of the challenger's version if that version was rolled back, or None."""
    for version in _versions(target.client, challenger.name):
        if challenger.is_version(version) and ROLLED_BACK in version.tags:
            return str(version.version)
    return None


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    versions, token = [], None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        versions += list(page)
        token = page.token
        if not token:
            return versions


def _score(version: ModelVersion, protocol: Protocol, say: Say) -> Score | None:
    """Returns the score of a version under a protocol. Returns None if the tag is missing, damaged, or has no interval."""
    try:
        return tags.score(version, protocol)
    except InputError as error:
        say(f"promote: {error}")
        return None


def _with_influence(target: Target, version: ModelVersion, score: Score, say: Say) -> Score:
    """Returns the score with its influence values. Without readable values, returns the score as it is."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="ddpm-influence-") as name:
        try:
            kept = tags.influence(version, score.protocol)
            if kept is None:
                return score
            path = download_artifacts(
                run_id=kept.run, artifact_path=kept.path, dst_path=name, tracking_uri=target.place.uri
            )
            influence = scores.read_influence(Path(path), kept.sha256, 1 + len(score.judges))
            return score.with_influence(influence, kept.seed)
        except (MlflowException, OSError, InputError) as error:
            say(
                f"promote: cannot read the influence values of version {version.version}, so its score is not compared in"
                f" pairs of images ({' '.join(str(error).split())})"
            )
            return score


def _store_score(target: Target, version: ModelVersion, score: Score, content: Scores) -> None:
    """Stores a score as a tag of the version, and the influence values as an artifact of the version's run."""
    tag, value = tags.score_tag(score.protocol), json.dumps(content.to_json())
    if version.tags.get(tag) == value and tags.influence_tag(score.protocol) in version.tags:
        return
    _tag(target.client, version, tag, value)
    influence = score.influence
    if influence is None or not version.run_id:
        return
    path = f"influence/version-{version.version}-{score.protocol.id}.npy"
    with tempfile.TemporaryDirectory(prefix="ddpm-influence-") as name:
        file = Path(name) / Path(path).name
        scores.write_influence(file, influence if score.judges else influence[0])
        digest = records.sha256(file)
        target.client.log_artifact(version.run_id, str(file), "influence")
    kept = {"run": version.run_id, "path": path, "seed": score.seed, "sha256": digest}
    _tag(target.client, version, tags.influence_tag(score.protocol), json.dumps(kept))


def _compare(
    target: Target,
    champion: ModelVersion | None,
    challenger: Challenger,
    params: Params,
    root: Path,
    force: bool,
    rescore: Rescore | None,
    say: Say,
) -> tuple[Verdict, Score | None, str | None]:
    """Compares the challenger with the champion, and scores the champion again if necessary.

    Args:
        target: the store and experiment.
        champion: the present champion; None without one.
        challenger: the best point of the report.
        params: the parameters of the sweep.
        root: the top of the checkout.
        force: whether the challenger wins whatever the scores say.
        rescore: see `promote`.
        say: prints a line for the user.

    Returns:
        The verdict, the champion's score, and the version of the best champion so far (None if that is the challenger).
    """
    if champion is None:
        return Verdict(True, f"{challenger.point.name} is the first champion"), None, None
    picked_from = [] if force else _report_scores(root, challenger.score.protocol)
    title = f"champion version {champion.version} ({champion.tags.get('ddpm.point')})"
    does_not = f"{challenger.point.name} does not replace {title}"
    if (other := _other_images(champion, challenger, params)) and not force:
        return Verdict(False, f"{does_not}: {other}"), None, None
    judges = params.promotion.judges
    score = _score_or_rescore(target, champion, title, challenger, judges, params.seed, force, rescore, say)
    best, best_score = _best_champion(target.client, champion, challenger.score.protocol, say), score
    if best.version != champion.version and not force:
        best_title = f"best champion version {best.version} ({best.tags.get('ddpm.point')})"
        best_score = _score_or_rescore(target, best, best_title, challenger, (), params.seed, force, rescore, say)
    # Under the present protocol, the champion may be better than the version that was best under another protocol.
    if score and best_score and RANKING.rank(score.value) < RANKING.rank(best_score.value):
        best, best_score = champion, score
    verdict = decide(challenger.score, score, params.promotion, force, picked_from, best_score)
    does = f"{challenger.point.name} replaces {title}" if verdict.wins else does_not
    ahead = best_score is not None and RANKING.rank(best_score.value) <= RANKING.rank(challenger.score.value)
    return (
        replace(verdict, reason=f"{does}: {verdict.reason}"),
        score,
        str(best.version) if ahead and not force else None,
    )


def _score_or_rescore(
    target: Target,
    version: ModelVersion,
    title: str,
    challenger: Challenger,
    judges: Sequence[str],
    seed: int,
    force: bool,
    rescore: Rescore | None,
    say: Say,
) -> Score | None:
    """Returns the score of a version under the challenger's protocol. Scores the version again if that score is unknown.

    Args:
        target: the store and experiment.
        version: the champion, or the best champion so far.
        title: the name of the version in messages.
        challenger: the best point of the report.
        judges: the judges whose scores are needed too.
        seed: the seed of the noise for new samples.
        force: whether to return None instead of scoring again.
        rescore: see `promote`.
        say: prints a line for the user.
    """
    protocol = challenger.score.protocol
    score = _score(version, protocol, say)
    lacking = [] if score is None else score.lacks(judges, challenger.score)
    if score is not None and not (lacking and not force):
        return _with_influence(target, version, score, say)
    if force:
        return None
    changed = f"no score by {', '.join(lacking)} with the same weights" if lacking else _changed(version, protocol)
    if rescore is None:
        raise InputError(
            f"{title} has no comparable score ({changed}); `ddpm promote` scores the version again,"
            " `ddpm promote --replace` skips the comparison"
        )
    say(f"promote: scoring the {title} again: {changed}")
    return _score_again(target, version, protocol, seed, rescore)


def _best_champion(client: MlflowClient, champion: ModelVersion, protocol: Protocol, say: Say) -> ModelVersion:
    """Returns the version with the best score of all champions so far, including the present champion.

    Champions that were rolled back or deleted do not count. Registries that ddpm wrote before its version 0.4.0 do not name the
    best champion. Then the best score under this protocol decides, among the champion and its predecessors.
    """
    if BEST in champion.tags:
        best = _version(client, f"models:/{champion.name}/{champion.tags[BEST]}")
        return champion if best is None or ROLLED_BACK in best.tags else best
    line, before = [champion], _earlier(client, champion)
    while before is not None and before.version not in {version.version for version in line}:
        line.append(before)
        before = _earlier(client, before)
    scored = [(RANKING.rank(score.value), version) for version in line if (score := _score(version, protocol, say))]
    return min(scored, key=lambda entry: entry[0], default=(0.0, champion))[1]


def mark_best_champion(params: Params, root: Path = Path(), say: Say = print) -> None:
    """Tags the champion with the version of the best champion so far, if an older version of ddpm has not written this tag.

    Raises InputError if MLflow cannot be reached.
    """
    target = open_target(params, root)
    with plain_errors(target.place), locked(target.place, ".promote"):
        champion = _version(target.client, champion_uri(params))
        if champion is None or BEST in champion.tags:
            return
        protocol = tags.protocol(champion)
        best = champion if protocol is None else _best_champion(target.client, champion, protocol, say)
        _tag(target.client, champion, BEST, best.version)


def _changed(champion: ModelVersion, protocol: Protocol) -> str:
    """Returns the reason why the champion has no score under a protocol, in words."""
    try:
        before = tags.protocol(champion)
    except InputError as error:
        return str(error)
    if before is None:
        return "it was scored under an unknown protocol"
    return protocol.differences(before) or "its score has no interval"


def _other_images(champion: ModelVersion, challenger: Challenger, params: Params) -> str:
    """Returns the reason why the two models cannot be compared, or "" if they can.

    A folder of images may hold any dataset. So changed images count as the same dataset only if tracking.name names the dataset.
    """
    mine, theirs = challenger.score.protocol.dataset, champion.tags.get("ddpm.dataset_sha256", "")
    if not SOURCES.select(params.data.source).any_images or params.tracking.name or mine == theirs:
        return ""
    return (
        f"the champion was trained on other images (dataset {theirs[:12]}, now {mine[:12]}); to compare them, set tracking.name"
        " in params.yaml, or skip the comparison with `ddpm promote --replace`"
    )


def _score_again(target: Target, champion: ModelVersion, protocol: Protocol, seed: int, rescore: Rescore) -> Score:
    with tempfile.TemporaryDirectory(prefix="ddpm-champion-") as name:
        folder = _download(target.client, target.place, champion, Path(name))
        try:
            found, influence = rescore(folder, tags.settings(champion))
        except InputError as error:
            raise InputError(
                f"the champion cannot be scored again: {error}; `ddpm promote --replace` skips the comparison"
            ) from None
    score = Score.of(found, influence, seed)
    if score.protocol != protocol:
        raise InputError(
            f"the champion's new score has another protocol than the challenger's ({protocol.differences(score.protocol)});"
            " run `dvc repro`, then `ddpm promote` again"
        )
    _store_score(target, champion, score, found)
    return score


def _tag(client: MlflowClient, version: ModelVersion, key: str, value: str) -> None:
    """Sets a tag of a version. If two processes create a tag at once, MLflow refuses one of them, so this function retries."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_model_version_tag(version.name, version.version, key, value)
    except MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        client.set_model_version_tag(version.name, version.version, key, value)


def _keep_champion(target: Target, champion: ModelVersion, challenger: Challenger) -> Decision:
    """Keeps the champion, because the challenger is the same model.

    Stores the challenger's score with the champion if the champion has no score under this protocol.
    """
    _store_score(target, champion, challenger.score, challenger.scores)
    reason = f"{challenger.point.name} is already the champion"
    version, point = str(champion.version), challenger.point.name
    return Decision(False, version, reason, point, version, point)


def _choose_among_rivals(
    target: Target, challenger: Challenger, mine: ModelVersion, seen: int, say: Say
) -> ModelVersion:
    """Gives the alias `champion` to the best of the versions that were promoted at the same time. Returns that version.

    Args:
        target: the store and experiment.
        challenger: the best point of the report.
        mine: the version that this process has promoted.
        seen: the number of the newest version before this process started; versions with higher numbers are rivals.
        say: prints a line for the user.
    """
    rivals = [version for version in _versions(target.client, mine.name) if int(version.version) > seen]
    scored = [
        (RANKING.rank(score.value), int(rival.version), rival)
        for rival in rivals
        if (score := _score(rival, challenger.score.protocol, say))
    ]
    best = min(scored, key=lambda entry: entry[:2], default=(0.0, 0, mine))[2]
    if best.version != mine.version:
        target.client.set_registered_model_alias(mine.name, CHAMPION, best.version)
    return best


def _decided(
    target: Target,
    challenger: Challenger,
    before: ModelVersion | None,
    after: ModelVersion | None,
    score: Score | None,
    verdict: Verdict,
) -> Decision:
    """Stores the decision in the registry, and returns it.

    Args:
        target: the store and experiment.
        challenger: the best point of the report.
        before: the champion before the decision; None without one.
        after: the champion after the decision; None without one.
        score: the score of the champion before the decision, if known.
        verdict: the result of the comparison.
    """
    reason = verdict.reason
    promoted = after is not None and challenger.is_version(after)
    if not promoted and before is not after and after is not None:
        reason = f"{challenger.point.name} lost to {after.tags.get('ddpm.point')}, which was promoted at the same time"
    entry = {
        "promoted": promoted,
        "point": challenger.point.name,
        HEADLINE: challenger.score.value,
        "champion": after.version if after else None,
        "before": before.version if before else None,
        f"before_{HEADLINE}": score.value if score else None,
        **verdict.evidence,
        "protocol": asdict(challenger.score.protocol),
        "reason": reason,
    }
    client = target.client
    _record_decision(client, challenger.name, entry)
    if promoted and after is not None:
        _describe_model(client, after, reason)
        _tag(client, after, "ddpm.decision", reason)
        if verdict.evidence:
            _tag(client, after, "ddpm.evidence", json.dumps(verdict.evidence))
        if ROLLED_BACK in after.tags:
            client.delete_model_version_tag(after.name, after.version, ROLLED_BACK)
        if before is not None:
            _tag(client, after, "ddpm.previous", before.version)
            _tag(client, before, "ddpm.replaced_by", after.version)
    version, previous = (str(item.version) if item else None for item in (after, before))
    holder = after.tags.get("ddpm.point") if after else None
    return Decision(promoted, version, reason, challenger.point.name, previous, holder)


def _record_decision(client: MlflowClient, name: str, entry: dict[str, Any]) -> None:
    """Stores a decision as a tag of the registered model, unless the last stored decision is the same."""
    text, known = json.dumps(entry), client.get_registered_model(name).tags
    past = sorted(tag for tag in known if tag.startswith("ddpm.decision."))
    if not past or known[past[-1]] != text:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        client.set_registered_model_tag(name, f"ddpm.decision.{moment}", text)


def _describe_model(client: MlflowClient, champion: ModelVersion, decision: str) -> None:
    """Sets the description of the registered model: the champion's card, and the reason for the decision."""
    text = f"{champion.description or ''}\n\n## Champion\n\nVersion {champion.version}: {decision}.\n"
    client.update_registered_model(champion.name, text[:LONGEST])


def _register(target: Target, params: Params, root: Path, challenger: Challenger) -> ModelVersion:
    """Returns the registered version of the challenger. Creates the version if it does not exist."""
    from mlflow.exceptions import MlflowException

    client, name = target.client, challenger.name
    for version in _versions(client, name):
        if challenger.is_version(version) and version.status == "READY":
            _store_score(target, version, challenger.score, challenger.scores)
            return client.get_model_version(name, version.version)
    settings = PointSettings.read(params, challenger.point, root)
    with locked(target.place):
        run = publish_points(target, root, [(challenger.point, settings)], Counter()) if settings else None
    if run is None:
        raise InputError(f"{paths.samples_file(challenger.point)}: no such sample set; run dvc repro")
    dataset = challenger.model.data.name
    try:
        client.create_registered_model(
            name,
            tags={"ddpm.dataset": dataset},
            description=f"Denoising diffusion on {dataset}",
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model_id = _log_served(target, run, challenger)
    with as_default(target.place):
        created = client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=run.info.run_id,
            tags=challenger.tags,
            description=challenger.card,
            model_id=model_id,
            await_creation_for=60,
        )
    _store_score(target, created, challenger.score, challenger.scores)
    return created


def _log_served(target: Target, run: Run, challenger: Challenger) -> str:
    """Logs the model that MLflow serves (code and checkpoint) as a logged model of the sampler's run. Returns the model's id.

    If an earlier process has already logged the same model, returns the id of that model.
    """
    from mlflow.entities import LoggedModelOutput

    client = target.client
    key, value = next(iter(challenger.identity.items()))
    for found in client.search_logged_models([target.experiment], f"tags.`{key}` = '{value}'"):
        alike = challenger.identity.items() <= found.tags.items() and found.params == flat(challenger.settings)
        if alike and found.source_run_id == run.info.run_id and str(found.status) == "READY":
            return str(found.model_id)
    model = client.create_logged_model(
        target.experiment,
        name=challenger.point.name,
        source_run_id=run.info.run_id,
        tags=challenger.identity,
        params=flat(challenger.settings),
        model_type="diffusion",
    )
    with tempfile.TemporaryDirectory(prefix="ddpm-served-") as name:
        folder = Path(name) / "model"
        save_served(folder, challenger, run.info.run_id, model.model_id)
        atomic.write_text(folder / "model-card.md", challenger.card_file)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, challenger.score.evaluations)])
    return str(model.model_id)


def save_served(folder: Path, challenger: Challenger, run_id: str | None = None, model_id: str | None = None) -> None:
    """Writes a model folder for mlflow.pyfunc. The folder needs no checkout and contains no pickle.

    Args:
        folder: the folder to write.
        challenger: the best point of the report.
        run_id: the id of the sampler's run.
        model_id: the id of the logged model.
    """
    import mlflow.pyfunc
    import numpy as np
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    inputs: list[ColSpec | TensorSpec] = [
        ColSpec("long", "n"),
        ColSpec("long", "seed", required=False),
        ColSpec("long", "steps", required=False),
        ColSpec("string", "sampler", required=False),
    ]
    example = {"n": [4], "seed": [challenger.seed], "steps": [challenger.settings["steps"]]}
    example["sampler"] = [challenger.settings["sampler"]]
    if challenger.model.network.classes:
        inputs.append(ColSpec("string", "label", required=False))
        example["label"] = [(challenger.model.data.classes or [""])[0]]
    shape = (-1, *challenger.model.data.shape)
    with tempfile.TemporaryDirectory(prefix="ddpm-code-") as name:
        checkpoint = Path(name) / "checkpoint"
        models.check_weights(challenger.folder, challenger.model)
        shutil.copytree(challenger.folder, checkpoint)
        modules = served_modules(challenger.model)
        for file in code.files(*modules):
            (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(code.ROOT / file, Path(name) / file)
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(SERVED),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(Path(name) / code.PACKAGE)],
            signature=ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype(np.uint8), shape)])),
            input_example=pd.DataFrame(example),
            pip_requirements=[f"mlflow=={installed_version('mlflow')}", *map(_requirement, served_packages(modules))],
            model_config={
                "settings": challenger.settings,
                "seed": challenger.seed,
                "weights_sha256": challenger.model.weights_sha256,
            },
            metadata={
                "point": challenger.point.name,
                HEADLINE: challenger.score.value,
                **asdict(challenger.score.protocol),
            },
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )


def served_modules(model: ModelRecord) -> list[str]:
    """Returns the modules that served.py imports, and the module of the network. `code.files` adds the modules these import."""
    return [*code.source(SERVED).imported, NETWORKS.module(model.network.kind)]


def served_packages(modules: Sequence[str]) -> list[str]:
    """Returns the packages, apart from MLflow, that the registered model and these modules import when they are loaded."""
    sources = [code.source(SERVED), *map(code.source, code.modules(modules).values())]
    imported = {name.partition(".")[0] for source in sources for name in source.at_once}
    found = packages_distributions()
    others = imported - sys.stdlib_module_names - {code.PACKAGE, "mlflow"}
    return sorted({package for name in others for package in found[name]})


def _requirement(package: str) -> str:
    """Returns a pip requirement for the installed version or a later one, below the next major version."""
    release = installed_version(package).partition("+")[0]
    return f"{package}>={release},<{int(release.split('.')[0]) + 1}"
