"""Checks the choice of the champion: the rule with numbers, and its records in a real registry."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file
from scipy.stats import binom

from ddpm import load, tracking
from ddpm.errors import InputError
from ddpm.files import arrays, checkpoint, paths, records
from ddpm.files.models import read_model_record
from ddpm.files.params import Params
from ddpm.files.samples import read_samples
from ddpm.files.scores import (
    COMPARED,
    Scores,
    read_all_influence,
    read_point_influence,
    read_scores,
    write_influence,
)
from ddpm.parameters import Point, Promotion
from ddpm.reporting.card import LONGEST, card, with_front_matter
from ddpm.runtime.drawing import weights_id
from ddpm.scores import fidelity
from ddpm.scores.intervals import Estimate, standard_error
from ddpm.sources.source import SOURCES
from ddpm.stages.report import report
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
from ddpm.tools.generate import generate
from ddpm.tracking.registry.decision import Protocol, Score, Verdict, decide

Smoke = Callable[..., Params]
WriteScores = Callable[..., None]

PROTOCOL = Protocol("d" * 64, 64, 500, 1437, "e" * 64)
FIRST, SECOND = (Point(schedule="cosine", sampler=name, steps=5) for name in ("ddim", "ddpm"))
OTHERS = [Point(schedule="cosine", sampler=name, steps=2) for name in ("ddim", "ddpm")]


# The rule of promotion.


RULE = Promotion(confidence=0.95, fewer_evaluations=2.0, margin=0.05)


def scored(value: float, error: float, evaluations: int = 50, seed: int | None = None, luck: Any = None) -> Score:
    return Score(Estimate(value, error, luck), evaluations, PROTOCOL, seed)


@pytest.mark.parametrize(
    ("challenger", "champion", "wins", "words"),
    [
        ((9.0, 0.2, 50), (10.0, 0.3, 10), True, "is better than"),  # 1 > 1.96 sqrt(0.2^2 + 0.3^2) = 0.707
        ((9.4, 0.2, 50), (10.0, 0.3, 50), False, "not significantly better"),
        ((9.7, 0.2, 26), (10.0, 0.3, 50), False, "not significantly better"),
        ((9.7, 0.2, 25), (10.0, 0.3, 50), True, "is at most 0.407 worse than the champion's 10"),  # the margin is 0.5
        ((9.8, 0.2, 25), (10.0, 0.3, 50), False, "may be 0.507 worse than the champion's 10 (the margin is 0.5)"),
        ((10.3, 0.0, 25), (10.0, 0.0, 50), True, "25 evaluations instead of 50"),
        ((10.8, 0.2, 1), (10.0, 0.3, 1000), False, "is worse than"),
        ((10.0, 0.0, 50), (10.0, 0.0, 50), False, "not significantly better"),
    ],
)
def test_only_a_significant_advantage_or_many_fewer_evaluations_win(
    challenger: tuple[float, float, int], champion: tuple[float, float, int], wins: bool, words: str
) -> None:
    verdict = decide(scored(*challenger), scored(*champion), RULE)
    assert verdict.wins is wins
    assert words in verdict.reason
    reach = 1.959964 * np.hypot(challenger[1], champion[1])
    gap = challenger[0] - champion[0]
    expected = {"difference": gap, "low": gap - reach, "high": gap + reach, "confidence": 0.95, "paired": False}
    assert {name: verdict.evidence[name] for name in expected} == pytest.approx(expected)


def test_force_needs_no_advantage_and_not_even_a_score() -> None:
    worse = decide(scored(11.0, 0.1), scored(10.0, 0.1), RULE, force=True)
    assert worse.wins and worse.evidence["difference"] == 1.0
    assert decide(scored(11.0, 0.1), None, RULE, force=True) == Verdict(True, "--replace was given")


def test_images_of_the_same_noise_are_compared_in_pairs() -> None:
    """The noise that both scores share says nothing about which model is better.

    With another seed, the test would practically never fail: the gap is 10 times the half-width of the paired interval, and
    0.7 times the half-width of the independent interval.
    """
    shared, own = np.random.default_rng(0).normal(size=(2, PROTOCOL.images))
    a, b = (shared + part for part in (0.1 * own, 0.0))
    errors = [standard_error(values) for values in (a, b)]
    gap = 2 * max(errors)  # not significant for two independent scores
    champion = scored(10.0, errors[1], seed=3, luck=b)
    verdict = decide(scored(10.0 - gap, errors[0], seed=3, luck=a), champion, RULE)
    assert verdict.wins and verdict.evidence["paired"]
    low, high = verdict.evidence["low"], verdict.evidence["high"]
    assert high - low == pytest.approx(2 * 1.959964 * 0.1 * standard_error(own))
    for other in (scored(10.0 - gap, errors[0], seed=4, luck=a), scored(10.0 - gap, errors[0], seed=3)):
        verdict = decide(other, champion, RULE)
        assert not verdict.wins and not verdict.evidence["paired"]


@pytest.mark.parametrize("quality", ["far from the data", "the data's own distribution"])
def test_the_gate_refuses_luck_and_accepts_what_is_better(quality: str) -> None:
    """Compares sample sets of one model under two seeds. Chance promotes at most as often as the confidence allows.

    With another seed, the case far from the data would fail by chance in about 1 of 350 runs, and the other in 1 of 25,000.
    """
    generator, repetitions, count, dimensions = np.random.default_rng(0), 400, 200, 4
    scales = np.array([1.0, 0.7, 0.5, 0.3])
    reference = fidelity.statistics(generator.normal(size=(2000, dimensions)) * scales)
    shift = 0.4 if quality == "far from the data" else 0.0
    protocol = Protocol("d" * 64, 64, count, 2000, "e" * 64)

    def score(shift: float, seed: int) -> Score:
        found = fidelity.jackknife(generator.normal(size=(count, dimensions)) * scales + shift, reference)
        return Score(Estimate(found.fid, standard_error(found.influence), found.influence), 50, protocol, seed)

    pairs = [(score(shift, 0), score(shift, 1)) for _ in range(repetitions)]
    verdicts = [decide(challenger, champion, RULE) for challenger, champion in pairs]
    lucky = sum(verdict.evidence["difference"] < 0 for verdict in verdicts)
    assert lucky > 0.4 * repetitions  # the lower FID alone would have been promoted this often
    promoted = sum(verdict.wins for verdict in verdicts)
    assert promoted <= binom.ppf(0.999, repetitions, 0.025)  # one side of 95 %
    if shift:  # and the intervals are not too wide
        assert promoted >= binom.ppf(0.001, repetitions, 0.025)
        better = [decide(score(shift / 2, 0), champion, RULE).wins for _, champion in pairs[:50]]
        assert all(better)


def test_scores_under_different_protocols_are_never_compared() -> None:
    other = Score(Estimate(1.0, 0.1), 10, Protocol("d" * 64, 2048, 500, 1437, "e" * 64))
    with pytest.raises(ValueError, match="protocols"):
        decide(other, scored(2.0, 0.1), RULE)
    with pytest.raises(ValueError, match="protocols"):
        decide(other, None, RULE)


def test_a_protocol_says_what_changed() -> None:
    changed = Protocol("f" * 64, 2048, 500, 1437, "e" * 64)
    assert changed.differences(PROTOCOL) == "dataset version, layer 64 -> 2048"
    assert changed.id != PROTOCOL.id == Protocol("d" * 64, 64, 500, 1437, "e" * 64).id


@pytest.mark.parametrize("fid", [float("nan"), float("inf"), None])
def test_a_score_that_is_no_number_is_refused(fid: float | None) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        Score.from_json({"fid": fid, "evaluations": 10})


def test_influence_values_of_other_images_are_refused() -> None:
    protocol = {"reference": "d", "layer": 64, "images": 5, "reference_images": 9, "extractor_sha256": "e"}
    scores = {"fid": 1.0, "fid_high": 1.2, "confidence": 0.95, "evaluations": 10, **protocol}
    assert Score.of(Scores.from_json(scores, COMPARED), np.zeros(5)).estimate.error == pytest.approx(0.2 / 1.959964)
    with pytest.raises(InputError, match="4 influence values for 5 images"):
        Score.of(Scores.from_json(scores, COMPARED), np.zeros(4))
    for key, value in (("fid_high", 0.9), ("confidence", 1.0), ("evaluations", "ten"), ("fid", 10**400)):
        with pytest.raises(InputError, match="cannot be compared"):
            Score.from_json({**scores, key: value})
    del scores["fid_high"]
    with pytest.raises(InputError, match="cannot be compared"):
        Score.from_json(scores)


# Records in the registry.


@pytest.fixture
def params(smoke: Smoke) -> Params:
    return smoke(training={"steps": 24})


def never(checkpoint: Path, settings: dict[str, Any]) -> Any:
    raise AssertionError("scored again for nothing")


def scores_at(root: Path, point: Point, fid: float) -> tuple[Scores, Any]:
    """Returns a new scoring of the champion: the entries and influence values of a point, with another FID."""
    scores = read_scores(root, point)
    change = fid - scores.values["fid"]
    values = {name: scores.values[name] + change for name in ("fid", "fid_low", "fid_high")}
    return replace(scores, values={**scores.values, **values}), read_point_influence(root, point, scores)


class Registry:
    def __init__(self, root: Path, name: str = "ddpm-digits") -> None:
        self.client, self.name = MlflowClient(tracking.tracking_uri(root)), name

    def champion(self) -> Any:
        return self.client.get_model_version_by_alias(self.name, "champion")

    def count(self) -> int:
        return len(self.client.search_model_versions(f"name = '{self.name}'"))

    def decisions(self) -> list[dict[str, Any]]:
        tags = self.client.get_registered_model(self.name).tags
        return [json.loads(tags[tag]) for tag in sorted(tags) if tag.startswith("ddpm.decision.")]


@pytest.mark.parametrize("change", ["another model", "another target"])
def test_a_registered_model_whose_files_were_replaced_is_refused(
    checkout: Path, params: Params, tmp_path: Path, change: str
) -> None:
    """Weights and model.json belong together, but are not those that were registered."""
    tracking.promote(params, checkout, rescore=never)
    (folder,) = checkout.glob("mlartifacts/*/models/*/artifacts/artifacts/checkpoint")
    about = read_model_record(folder)
    net = checkpoint.network(about.network)
    if change == "another target":
        records.write_record(folder / "model.json", {**about.content, "target": "v"})
    else:
        checkpoint.save(folder, net, about.described_by())
    checkpoint.load(folder)  # the checkpoint itself is valid
    with pytest.raises(InputError, match="version 1: the files differ from those that were registered"):
        tracking.fetch_model("models:/ddpm-digits@champion", tmp_path, checkout)


def test_the_champion_opens_as_a_denoiser_with_the_clip_of_its_promotion(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.promote(params, checkout, rescore=never)
    client = Registry(checkout).client
    settings = json.loads(client.get_model_version("ddpm-digits", "1").tags["ddpm.settings"])
    client.set_model_version_tag("ddpm-digits", "1", "ddpm.settings", json.dumps({**settings, "clip": 0.9}))
    monkeypatch.chdir(checkout)
    opened, trained = load("models:/ddpm-digits@champion"), load("models/cosine")
    assert (opened.clip, trained.clip, opened.target) == (0.9, True, trained.target)
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0, 90.0])
    assert torch.equal(opened.net(x, t), trained.net(x, t))


def test_an_averaged_model_is_registered_with_its_weights(
    checkout: Path, smoke: Smoke, write_scores: WriteScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promotes a point whose sampler row has `ema`. The registered model draws the scored images without any snapshots."""
    params = smoke(
        training={"steps": 24, "snapshot_every": 6},
        samplers={"short": {"sampler": "ddim", "ema": 0.05}, "long": {"sampler": "ddim", "ema": 0.1}},
        sweep={"schedules": ["cosine"], "samplers": ["short"], "steps": [5]},
    )
    point = Point(schedule="cosine", sampler="short", steps=5)
    train(params, "cosine", checkout)
    row = params.samplers["short"]
    times = {5: [90.0, 70.0, 50.0, 30.0, 10.0]}
    fitted_to = weights_id(read_model_record(checkout / "models/cosine"), 0.05)
    params = params.model_copy(
        update={"samplers": {**params.samplers, "short": replace(row, times=times, fitted_to=fitted_to)}}
    )
    sample_point(params, point, checkout)
    write_scores(checkout, point, 5.0)
    report(params, checkout)
    assert tracking.promote(params, checkout, rescore=never).promoted
    assert not tracking.promote(params, checkout, rescore=never).promoted  # it is the champion already
    folder, settings = tracking.fetch_model("models:/ddpm-digits@champion", tmp_path, checkout)
    about = read_model_record(folder)
    assert "ema" not in settings and (about.ema, about.snapshots) == (0.05, "")
    assert "a power-function average of length 0.05" in tracking.model_card(params, checkout)
    snapshot = load_file(checkout / "snapshots/cosine/000000024.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, snapshot[f"0.05.{name}"], rtol=0, atol=1e-6)
    shutil.rmtree(checkout / "snapshots")
    monkeypatch.chdir(checkout)
    generate(params, out=tmp_path / "grid.png", count=9, seed=params.seed)
    scored = read_samples(checkout / paths.samples_file(point)).images[:9]
    with Image.open(tmp_path / "grid.png") as picture:
        apart = np.asarray(picture).astype(int) - arrays.grid(scored, None)[0]
    assert np.abs(apart).max() <= 1
    with pytest.raises(InputError, match=r"checkpoint has no snapshots, which `ema` in a sampler row needs"):
        generate(params, out=tmp_path / "other.png", sampler="long")


def test_influence_values_that_were_replaced_are_not_compared_in_pairs(
    checkout: Path, params: Params, write_scores: WriteScores
) -> None:
    tracking.promote(params, checkout, rescore=never)
    (kept,) = checkout.glob("mlartifacts/*/*/artifacts/influence/*.npy")
    write_influence(kept, np.load(kept)[::-1])
    write_scores(checkout, SECOND, 8.0)
    said: list[str] = []
    tracking.promote(params, checkout, rescore=never, say=said.append)
    assert "its sha256 is not the one recorded with the scores" in said[0]
    assert Registry(checkout).decisions()[-1]["paired"] is False


def test_the_history_of_a_championship(checkout: Path, params: Params, write_scores: WriteScores) -> None:
    first = tracking.promote(params, checkout, rescore=never)
    assert (first.promoted, first.version, first.point) == (True, "1", "cosine-ddim-5")
    registry = Registry(checkout)
    champion = registry.champion()
    about = read_model_record(checkout / "models/cosine")
    scores = records.read_record(checkout / paths.metrics_file(FIRST))
    assert champion.tags["ddpm.model_sha256"] == about.weights_sha256
    assert json.loads(champion.tags["ddpm.settings"]) == {
        "sampler": "ddim",
        "eta": 0.0,
        "spacing": "leading",
        "steps": 5,
        "clip": True,
    }
    assert float(champion.tags["ddpm.fid"]) == scores["fid"]
    assert champion.tags["ddpm.dataset_sha256"] == about.data.sha256
    assert json.loads(champion.tags["ddpm.protocol"]) == {
        "dataset": about.data.sha256,
        "layer": 64,
        "images": 64,
        "reference_images": 64,
        "extractor_sha256": "e" * 64,
    }
    run = registry.client.get_run(champion.run_id)
    assert run.info.run_name == "cosine-ddim" and run.data.metrics["fid"] == scores["fid"]

    again = tracking.promote(params, checkout, rescore=never)
    assert not again.promoted and again.version == "1" and "already" in again.reason
    assert registry.count() == 1 and len(registry.decisions()) == 1

    # The best point of a worse report does not beat the champion. There is no new version, and the reason is recorded once.
    write_scores(checkout, FIRST, 90.0)
    for point in OTHERS:
        write_scores(checkout, point, 91.0)
    write_scores(checkout, SECOND, 55.0)
    for _ in range(2):
        kept = tracking.promote(params, checkout, rescore=never)
        assert not kept.promoted and kept.version == "1"
        assert kept.reason.startswith(
            "cosine-ddpm-5 does not replace champion version 1 (cosine-ddim-5): FID 55 is worse than 37 (difference 18"
        )
    assert registry.count() == 1 and len(registry.decisions()) == 2

    write_scores(checkout, SECOND, scores["fid"] - 0.05)  # lower, but by less than chance gives
    assert "not significantly better" in tracking.promote(params, checkout, rescore=never).reason
    assert registry.count() == 1

    write_scores(checkout, SECOND, 8.0)
    better = tracking.promote(params, checkout, rescore=never)
    assert (better.promoted, better.version, better.previous) == (True, "2", "1")
    champion, before = registry.champion(), registry.client.get_model_version("ddpm-digits", "1")
    assert str(champion.version) == "2"
    assert champion.tags["ddpm.previous"] == "1" and before.tags["ddpm.replaced_by"] == "2"
    assert [entry["promoted"] for entry in registry.decisions()] == [True, False, False, True]
    decision = registry.decisions()[-1]
    assert decision["before_fid"] == scores["fid"]
    own = [np.load(checkout / paths.influence_file(point)).astype(float) for point in (SECOND, FIRST)]
    error = standard_error(own[0] - own[1])  # paired: the champion's values came from the registry
    gap = 8.0 - scores["fid"]
    evidence = {"difference": gap, "confidence": 0.95, "paired": True, "points": 4}
    assert {key: decision[key] for key in evidence} == pytest.approx(evidence, rel=1e-6)
    reaches = [gap - decision["low"], decision["high"] - gap]
    # Four differences, one of them zero, give a wider interval than one difference, and a narrower one than Bonferroni for
    # three.
    assert reaches[0] == pytest.approx(reaches[1]) and 1.96 < reaches[0] / error < 2.394
    assert json.loads(champion.tags["ddpm.evidence"]) == {key: decision[key] for key in (*evidence, "low", "high")}
    assert champion.tags["ddpm.best_champion"] == "2"

    # --replace promotes without a comparison. Promoting an earlier model needs no new version.
    write_scores(checkout, SECOND, 99.0)
    write_scores(checkout, FIRST, scores["fid"])
    forced = tracking.promote(params, checkout, replace=True, rescore=never)
    assert forced.promoted and forced.version == "1" and "--replace" in forced.reason
    assert registry.count() == 2


def test_the_report_is_compared_with_the_champion(checkout: Path, params: Params, write_scores: WriteScores) -> None:
    def compared() -> str:
        report(params, checkout)
        tracking.publish(params, checkout, only="report")
        assert tracking.publish(params, checkout, only="report") == {}
        text = (checkout / paths.REPORT_SCRIPT).read_text(encoding="utf-8")
        found: str = json.loads(text[text.index("{") : text.rindex("}") + 1])["compared"]
        (run,) = [run for run in Registry(checkout).client.search_runs(["1"]) if run.info.run_name == "report"]
        page = Registry(checkout).client.download_artifacts(run.info.run_id, "report/index.html", str(checkout))
        assert found.strip() in Path(page).read_text(encoding="utf-8")
        return found

    first, *_, second = params.points()
    assert "The champion" not in compared()
    write_scores(checkout, first, 30.0)
    tracking.promote(params, checkout, replace=True)
    assert f"{first.name} is the champion: version 1 of ddpm-digits. There was no earlier champion." in compared()
    write_scores(checkout, second, 20.0)
    found = compared()
    assert f"The champion is version 1 of ddpm-digits, {first.name}." in found and "not paired" not in found
    assert "sampler.sampler" in found and "training." not in found
    assert tracking.promote(params, checkout).promoted
    evidence = Registry(checkout).decisions()[-1]
    row = f"{first.name} → {second.name}</th><td>30</td><td>20</td>"
    interval = f"({evidence['low']:.3g} to {evidence['high']:.3g})"
    assert row in found and interval in found.rpartition(row)[2].partition("</tr>")[0]
    found = compared()
    assert (
        f"It replaced version 1, {first.name}." in found and interval in found.rpartition(row)[2].partition("</tr>")[0]
    )


def test_the_best_champion_stays_the_measure(checkout: Path, smoke: Smoke, write_scores: WriteScores) -> None:
    """Version 2 wins by its evaluations, and version 3 beats version 2 by its score. Neither is better than version 1."""
    params = smoke(training={"steps": 24}, promotion={"margin": 0.5})
    tracking.promote(params, checkout, rescore=never)
    fid, registry = read_scores(checkout, FIRST).values["fid"], Registry(checkout)
    for point in (FIRST, SECOND, OTHERS[1]):
        write_scores(checkout, point, 10 * fid)
    write_scores(checkout, OTHERS[0], 1.3 * fid)
    cheaper = tracking.promote(params, checkout, rescore=never)
    assert cheaper.promoted and "2 evaluations instead of 5" in cheaper.reason
    assert registry.champion().tags["ddpm.best_champion"] == "1"
    write_scores(checkout, OTHERS[0], 10 * fid)
    write_scores(checkout, SECOND, 1.1 * fid)
    better = tracking.promote(params, checkout, rescore=never)
    assert better.promoted and "is better than" in better.reason
    champion = registry.champion()
    assert champion.tags["ddpm.best_champion"] == "1"
    # An older registry lacks this tag, so the best champion is found among the predecessors.
    registry.client.delete_model_version_tag(champion.name, champion.version, "ddpm.best_champion")
    write_scores(checkout, SECOND, 10 * fid)
    write_scores(checkout, OTHERS[0], 1.55 * fid)  # within the margin of 1.1, but not of 1
    kept = tracking.promote(params, checkout, rescore=never)
    assert not kept.promoted and f"worse than the best champion's {fid:.4g}" in kept.reason
    tracking.mark_best_champion(params, checkout)  # `ddpm publish` does the same
    assert registry.champion().tags["ddpm.best_champion"] == "1"


def test_a_champion_that_a_judge_has_not_scored_is_scored_first(
    checkout: Path, smoke: Smoke, write_scores: WriteScores
) -> None:
    changes = {"judges": {"fd_dinov2": {"extractor": "d", "layer": 1024, "extractor_sha256": "f" * 64}}}

    def judged(point: Point, fid: float, fd: float) -> None:
        write_scores(checkout, point, fid, **changes, fd_dinov2=fd, fd_dinov2_low=fd - 1, fd_dinov2_high=fd + 1)

    def rescore(folder: Path, settings: dict[str, Any]) -> Any:
        asked.append(settings["sampler"])
        found = read_scores(checkout, SECOND)
        values = {**found.values, "fid": 37.0, "fid_low": 36.0, "fid_high": 38.0}
        values |= {"fd_dinov2": 90.0, "fd_dinov2_low": 89.0, "fd_dinov2_high": 91.0}
        return replace(found, values=values), read_all_influence(checkout, SECOND, found)

    asked: list[str] = []
    tracking.promote(smoke(training={"steps": 24}), checkout, rescore=never)
    params = smoke(training={"steps": 24}, evaluation={"judges": ["fd_dinov2"]}, promotion={"judges": ["fd_dinov2"]})
    write_scores(checkout, SECOND, 8.0)
    with pytest.raises(InputError, match=r"no score by fd_dinov2, which promotion\.judges names; run dvc repro"):
        tracking.promote(params, checkout, rescore=never)
    for point in (FIRST, *OTHERS):
        judged(point, 60.0, 95.0)
    judged(SECOND, 8.0, 100.0)
    kept = tracking.promote(params, checkout, rescore=rescore)
    assert not kept.promoted and asked == ["ddim"]
    assert "FID 8 is better than 37" in kept.reason and "but FD (DINOv2) 100 is perhaps" in kept.reason
    judged(SECOND, 8.0, 91.0)
    won = tracking.promote(params, checkout, rescore=never)  # the champion's new score was stored
    assert won.promoted and "FD (DINOv2) 91 is at most" in won.reason
    decision = Registry(checkout).decisions()[-1]
    assert decision["fd_dinov2"]["difference"] == pytest.approx(1.0) and decision["fd_dinov2"]["paired"]


def test_under_another_protocol_the_champion_may_be_the_best(
    checkout: Path, smoke: Smoke, write_scores: WriteScores
) -> None:
    """Version 1 was best, and version 2 wins by its evaluations. With 48 images, version 2 is far ahead of version 1."""
    params = smoke(training={"steps": 24}, promotion={"margin": 0.5})
    tracking.promote(params, checkout, rescore=never)
    fid, registry = read_scores(checkout, FIRST).values["fid"], Registry(checkout)
    for point, value in ((FIRST, 10.0), (SECOND, 10.0), (OTHERS[1], 10.0), (OTHERS[0], 1.3)):
        write_scores(checkout, point, value * fid)
    assert tracking.promote(params, checkout, rescore=never).promoted
    assert registry.champion().tags["ddpm.best_champion"] == "1"

    def rescore(folder: Path, settings: dict[str, Any]) -> Any:
        found = read_scores(checkout, FIRST)
        values = {"fid": 100.0 if settings["steps"] == 5 else 10.0}
        values |= {"fid_low": values["fid"] - 1, "fid_high": values["fid"] + 1}
        return replace(found, values={**found.values, **values}), read_all_influence(checkout, FIRST, found)

    for point in (FIRST, SECOND, OTHERS[0]):
        write_scores(checkout, point, 300.0, images=48)
    write_scores(checkout, OTHERS[1], 120.0, images=48, evaluations=1)
    kept = tracking.promote(params, checkout, rescore=rescore)
    assert not kept.promoted and "FID 120 is worse than 10" in kept.reason


def test_the_best_champion_needs_no_score_by_a_judge(checkout: Path, smoke: Smoke, write_scores: WriteScores) -> None:
    """Judges compare the challenger only with the champion."""
    changes = {"judges": {"cmmd": {"extractor": "c", "layer": 768, "extractor_sha256": "f" * 64}}}
    changes |= {"cmmd": 1.0, "cmmd_low": 0.99, "cmmd_high": 1.01}
    tracking.promote(smoke(training={"steps": 24}), checkout, rescore=never)
    fid = read_scores(checkout, FIRST).values["fid"]
    for point, value in ((FIRST, 10.0), (SECOND, 10.0), (OTHERS[1], 10.0), (OTHERS[0], 1.3)):
        write_scores(checkout, point, value * fid, **changes)
    sections: dict[str, Any] = {"training": {"steps": 24}, "evaluation": {"judges": ["cmmd"]}}
    tracking.promote(smoke(**sections, promotion={"margin": 0.5}), checkout, rescore=never)
    assert Registry(checkout).champion().tags["ddpm.best_champion"] == "1"
    write_scores(checkout, OTHERS[0], 10 * fid, **changes)
    write_scores(checkout, SECOND, 1.1 * fid, **changes)
    params = smoke(**sections, promotion={"margin": 0.5, "judges": ["cmmd"]})
    assert tracking.promote(params, checkout, rescore=never).promoted


def test_another_protocol_scores_the_champion_again(
    checkout: Path, params: Params, write_scores: WriteScores, tmp_path: Path
) -> None:
    tracking.promote(params, checkout)
    registry = Registry(checkout)
    for point in (FIRST, *OTHERS):
        write_scores(checkout, point, 50.0, layer=192)
    write_scores(checkout, SECOND, 20.0, layer=192)
    asked: list[dict[str, Any]] = []
    weights = load_file(checkout / "models/cosine/model.safetensors")

    def rescore(fid: float) -> Callable[[Path, dict[str, Any]], Any]:
        def score(folder: Path, settings: dict[str, Any]) -> Any:
            denoiser, _ = checkpoint.load(folder)  # the champion's own whole checkpoint
            assert not folder.is_relative_to(checkout)
            assert all((weights[name] == value).all() for name, value in denoiser.net.state_dict().items())
            asked.append(settings)
            return scores_at(checkout, SECOND, fid)

        return score

    with pytest.raises(InputError, match="layer 64 -> 192"):
        tracking.promote(params, checkout)  # there is no function to score the champion
    said: list[str] = []
    kept = tracking.promote(params, checkout, rescore=rescore(19.0), say=said.append)
    assert not kept.promoted and "FID 20 is worse than 19" in kept.reason
    assert registry.decisions()[-1]["paired"]
    assert asked == [{"sampler": "ddim", "eta": 0.0, "spacing": "leading", "steps": 5, "clip": True}]
    assert any("again" in line and "layer 64 -> 192" in line for line in said)
    # The new score and its influence values stay with the version.
    assert not tracking.promote(params, checkout, rescore=never).promoted
    assert registry.decisions()[-1]["paired"]
    write_scores(checkout, SECOND, 18.0, layer=192)
    assert tracking.promote(params, checkout, rescore=never).promoted
    # the FID at its promotion
    assert float(registry.client.get_model_version("ddpm-digits", "1").tags["ddpm.fid"]) == 37.0

    # With another dataset version, the champion cannot be scored.
    for point in (SECOND, *OTHERS):
        write_scores(checkout, point, 60.0, reference="f" * 64)
    write_scores(checkout, FIRST, 30.0, reference="f" * 64)

    def refuse(folder: Path, settings: dict[str, Any]) -> Any:
        raise InputError("images of another shape")

    with pytest.raises(InputError, match=r"another shape; `ddpm promote --replace` skips the comparison"):
        tracking.promote(params, checkout, rescore=refuse)
    assert tracking.promote(params, checkout, replace=True, rescore=never).promoted
    assert registry.count() == 2  # that model was already registered


def test_other_images_without_a_name_take_no_champion(checkout: Path, smoke: Smoke, write_scores: WriteScores) -> None:
    unnamed = smoke(training={"steps": 24}, data={"source": "image_folder"})
    assert tracking.promote(unnamed, checkout, rescore=never).promoted
    for point in (FIRST, SECOND, *OTHERS):
        write_scores(checkout, point, 60.0, reference="f" * 64)
    write_scores(checkout, SECOND, 1.0, reference="f" * 64)
    kept = tracking.promote(unnamed, checkout, rescore=never)
    registry = Registry(checkout, "ddpm-image-folder")
    data = read_model_record(checkout / "models/cosine").data.sha256
    assert not kept.promoted and kept.version == "1" and kept.champion == "cosine-ddim-5" and registry.count() == 1
    assert (
        kept.reason
        == registry.decisions()[-1]["reason"]
        == (
            "cosine-ddpm-5 does not replace champion version 1 (cosine-ddim-5): the champion was trained on other images"
            f" (dataset {data[:12]}, now ffffffffffff); to compare them, set tracking.name in params.yaml,"
            " or skip the comparison with `ddpm promote --replace`"
        )
    )

    # With a name, the dataset has a champion of its own, and other images are a new version of that dataset.
    named = smoke(training={"steps": 24}, data={"source": "image_folder"}, tracking={"name": "cats"})
    assert tracking.champion_uri(named) == "models:/ddpm-cats@champion"
    first = tracking.promote(named, checkout, rescore=never)
    assert first.promoted and first.line == "champion: version 1 (cosine-ddpm-5): cosine-ddpm-5 is the first champion"
    assert registry.client.get_experiment_by_name("ddpm-cats").tags["ddpm.dataset"] == "cats"
    for point in (SECOND, *OTHERS):
        write_scores(checkout, point, 60.0, reference="a" * 64)
    write_scores(checkout, FIRST, 2.0, reference="a" * 64)
    better = tracking.promote(named, checkout, rescore=lambda folder, settings: scores_at(checkout, FIRST, 30.0))
    assert better.promoted and "FID 2 is better than 30" in better.reason
    assert str(registry.champion().version) == "1"

    write_scores(checkout, SECOND, 1.0, reference="a" * 64)
    assert tracking.promote(unnamed, checkout, replace=True, rescore=never).promoted


def test_a_champion_without_influence_values_is_compared_as_independent(
    checkout: Path, params: Params, write_scores: WriteScores
) -> None:
    tracking.promote(params, checkout)
    registry = Registry(checkout)
    write_scores(checkout, SECOND, 36.0)
    kept = list((checkout / "mlartifacts").rglob("influence/*.npy"))
    assert len(kept) == 1
    kept[0].unlink()
    said: list[str] = []
    assert tracking.promote(params, checkout, rescore=never, say=said.append).promoted
    assert registry.decisions()[-1]["paired"] is False
    assert any("cannot read the influence values of version 1" in line for line in said)


def test_a_champion_from_before_there_were_intervals_is_scored_again(
    checkout: Path, params: Params, write_scores: WriteScores
) -> None:
    tracking.promote(params, checkout)
    registry = Registry(checkout)
    tag = next(tag for tag in registry.champion().tags if tag.startswith("ddpm.score."))
    old = json.loads(registry.champion().tags[tag])
    for key in ("fid_low", "fid_high", "confidence"):
        del old[key]
    registry.client.set_model_version_tag("ddpm-digits", "1", tag, json.dumps(old))
    write_scores(checkout, SECOND, 20.0)
    with pytest.raises(InputError, match="its score has no interval"):
        tracking.promote(params, checkout)
    kept = tracking.promote(params, checkout, rescore=lambda folder, settings: scores_at(checkout, FIRST, 19.0))
    assert not kept.promoted and "FID 20 is worse than 19" in kept.reason


# Rollbacks.


def test_rollback_brings_the_last_champion_back_and_the_next_promotion_respects_it(
    checkout: Path, params: Params, write_scores: WriteScores
) -> None:
    with pytest.raises(InputError, match="ddpm-digits: no champion to roll back"):
        tracking.rollback(params, checkout)
    tracking.promote(params, checkout)
    with pytest.raises(InputError, match="there was no champion before version 1"):
        tracking.rollback(params, checkout)
    registry = Registry(checkout)
    for fid, point in ((20.0, SECOND), (10.0, OTHERS[0])):
        write_scores(checkout, point, fid)
        assert tracking.promote(params, checkout, rescore=never).promoted
    back = tracking.rollback(params, checkout)
    assert (back.version, back.previous, back.point) == ("2", "3", "cosine-ddpm-5")
    assert str(registry.champion().version) == "2"
    assert "rolled back from version 3 to version 2" in registry.champion().tags["ddpm.decision"]
    text = registry.client.get_registered_model("ddpm-digits").description
    assert text.startswith("# ddpm-digits: cosine-ddpm-5\n") and "rolled back from version 3" in text
    assert registry.decisions()[-1] == {
        "rollback": True,
        "point": "cosine-ddpm-5",
        "champion": "2",
        "before": "3",
    }
    again = tracking.promote(params, checkout, rescore=never)  # the report still says that version 3 is best
    assert not again.promoted and "was rolled back as version 3" in again.reason
    assert str(registry.champion().version) == "2"
    assert tracking.rollback(params, checkout).version == "1"
    with pytest.raises(InputError, match="no champion before version 1"):
        tracking.rollback(params, checkout)
    assert tracking.promote(params, checkout, replace=True, rescore=never).version == "3"
    assert registry.count() == 3
    assert tracking.rollback(params, checkout).version == "1"  # version 1 was champion before, and not version 2


def cut_off(_: Any, *__: Any, **___: Any) -> None:
    raise ConnectionError("away")


def test_a_promotion_or_rollback_cut_off_behind_the_alias_keeps_its_books(
    checkout: Path, params: Params, write_scores: WriteScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.promote(params, checkout)
    write_scores(checkout, SECOND, 20.0)
    with monkeypatch.context() as away:
        away.setattr("ddpm.tracking.registry.registry._decided", cut_off)
        with pytest.raises(InputError, match="cannot be reached"):
            tracking.promote(params, checkout, rescore=never)
    assert "already" in tracking.promote(params, checkout, rescore=never).reason
    registry = Registry(checkout)
    assert "cosine-ddpm-5 replaces champion version 1" in registry.champion().tags["ddpm.decision"]
    with monkeypatch.context() as away:
        away.setattr("ddpm.tracking.registry.registry._describe_model", cut_off)
        with pytest.raises(InputError, match="cannot be reached"):
            tracking.rollback(params, checkout)
    assert str(registry.champion().version) == "1"
    assert "was rolled back as version 2" in tracking.promote(params, checkout, rescore=never).reason


def test_a_model_that_could_not_be_registered_is_not_kept_twice(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "create_model_version", cut_off)
        for _ in range(2):
            with pytest.raises(InputError, match="cannot be reached"):
                tracking.promote(params, checkout)
    assert tracking.promote(params, checkout).promoted
    client = Registry(checkout).client
    version = client.get_model_version("ddpm-digits", "1")
    experiment = client.get_run(version.run_id).info.experiment_id
    models = client.search_logged_models([experiment])
    of_run = [model for model in models if model.source_run_id == version.run_id]
    assert len(of_run) == 1 and version.source == f"models:/{of_run[0].model_id}"


def test_rollback_to_a_version_that_was_deleted(checkout: Path, params: Params, write_scores: WriteScores) -> None:
    tracking.promote(params, checkout)
    write_scores(checkout, SECOND, 20.0)
    tracking.promote(params, checkout)
    registry = Registry(checkout)
    registry.client.delete_model_version("ddpm-digits", "1")
    with pytest.raises(InputError, match="no champion before version 2"):
        tracking.rollback(params, checkout)
    assert str(registry.champion().version) == "2"


def test_a_report_older_than_its_scores_is_refused(checkout: Path, params: Params, write_scores: WriteScores) -> None:
    before = {path: path.read_bytes() for path in (checkout / "report").iterdir()}
    write_scores(checkout, FIRST, 5.0)
    for path, content in before.items():
        path.write_bytes(content)
    with pytest.raises(InputError, match="older than its scores"):
        tracking.promote(params, checkout)
    shutil.rmtree(checkout / "report")
    with pytest.raises(InputError, match=r"best\.json: no such file"):
        tracking.promote(params, checkout)


def test_promoting_into_an_empty_store_publishes_the_point(checkout: Path, params: Params) -> None:
    tracking.promote(params, checkout)
    assert tracking.publish(params, checkout)["runs"] == 2  # the other sampler's run and the report
    assert tracking.promote(params, checkout).version == "1"


@pytest.mark.parametrize("uri", ["models:/ddpm-digits@champion", "models:/ddpm-digits/3", "models:/ddpm-digits", "m"])
def test_a_model_that_is_not_there(checkout: Path, uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model|not the name of a registered model"):
        tracking.fetch_model(uri, tmp_path / "model", checkout)


DAMAGED = ["nonsense", "[]", "{}", "null", '{"steps": 0}', '{"fid": 1.0, "fid_high": "much", "confidence": 0.95}']


@pytest.mark.parametrize("value", DAMAGED)
def test_settings_that_are_damaged_draw_nothing(checkout: Path, params: Params, tmp_path: Path, value: str) -> None:
    tracking.promote(params, checkout)
    Registry(checkout).client.set_model_version_tag("ddpm-digits", "1", "ddpm.settings", value)
    with pytest.raises(InputError, match=r"ddpm-digits version 1: the tag ddpm\.settings is damaged") as caught:
        tracking.fetch_model("models:/ddpm-digits@champion", tmp_path / "model", checkout)
    assert "\n" not in str(caught.value) and "`ddpm promote --replace`" in str(caught.value)
    assert not (tmp_path / "model").exists()
    assert tracking.promote(params, checkout, replace=True).version == "2"
    tracking.fetch_model("models:/ddpm-digits@champion", tmp_path / "model", checkout)


def test_a_report_of_several_protocols_is_no_challenge(
    checkout: Path, params: Params, write_scores: WriteScores
) -> None:
    """The best point was picked from more points than those under one protocol."""
    tracking.promote(params, checkout)
    write_scores(checkout, SECOND, 8.0, images=48)
    with pytest.raises(InputError, match=r"cosine-\w+-\d was scored under another protocol; run dvc repro"):
        tracking.promote(params, checkout, rescore=never)


@pytest.mark.parametrize("value", DAMAGED[:3])
@pytest.mark.parametrize("tag", ["ddpm.protocol", "ddpm.score.", "ddpm.influence."])
def test_a_comparison_does_without_damaged_tags_and_says_so(
    checkout: Path, params: Params, write_scores: WriteScores, tag: str, value: str
) -> None:
    tracking.promote(params, checkout)
    registry, said = Registry(checkout), list[str]()
    name = next(name for name in registry.champion().tags if name.startswith(tag))
    registry.client.set_model_version_tag("ddpm-digits", "1", name, value)
    for point in (FIRST, *OTHERS, SECOND):
        if point == SECOND or tag == "ddpm.protocol":
            changes = {"images": 48} if tag == "ddpm.protocol" else {}
            write_scores(checkout, point, 20.0 if point == SECOND else 60.0, **changes)

    won = tracking.promote(params, checkout, rescore=lambda *_: scores_at(checkout, SECOND, 19.0), say=said.append)
    assert won.promoted == (tag == "ddpm.influence.")  # only here the champion's own score, 37, is compared
    assert sum(f"version 1: the tag {name} is damaged" in line for line in said) == 1
    assert not any("\n" in line for line in said)


# Two promotions at once, from two checkouts with one server. No lock covers both.


@pytest.fixture
def rivals(
    checkout: Path, smoke: Smoke, write_scores: WriteScores, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Creates a champion under an old protocol, and two checkouts with FID 20 and FID 10 under the new one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    params = smoke(training={"steps": 24}, data={"source": "image_folder"})
    for version in MlflowClient(mlflow_server).search_model_versions("name = 'ddpm-image-folder'"):
        MlflowClient(mlflow_server).delete_model_version(version.name, version.version)
    tracking.promote(params, checkout)
    other = checkout.with_name("other")
    shutil.copytree(checkout, other, symlinks=True)
    for root, best, fid in ((checkout, OTHERS[0], 20.0), (other, SECOND, 10.0)):
        for point in (FIRST, SECOND, *OTHERS):
            write_scores(root, point, 80.0, layer=192)
        write_scores(root, best, fid, layer=192)
    return params, checkout, other, Registry(checkout, "ddpm-image-folder")


@pytest.mark.parametrize("better_first", [True, False])
def test_one_promotes_while_the_other_compares(
    rivals: Any, better_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worse model is never champion after the better one, not even for a moment."""
    params, worse, better, registry = rivals
    champions: list[float] = []
    original = MlflowClient.set_registered_model_alias

    def noted(self: MlflowClient, name: str, alias: str, version: str) -> None:
        champions.append(float(self.get_model_version(name, version).tags["ddpm.fid"]))
        original(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", noted)
    slow, quick = (worse, better) if better_first else (better, worse)

    def rescore(folder: Path, settings: dict[str, Any]) -> Any:
        inner = tracking.promote(params, quick, rescore=lambda folder, settings: scores_at(quick, FIRST, 60.0))
        assert inner.promoted
        return scores_at(slow, FIRST, 60.0)

    outcome = tracking.promote(params, slow, rescore=rescore)
    assert outcome.promoted is not better_first
    assert float(registry.champion().tags["ddpm.fid"]) == 10.0
    assert champions == ([10.0] if better_first else [20.0, 10.0])


def test_two_in_step_end_with_the_better(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both processes read the registry before either writes, and the worse one sets the alias last."""
    params, worse, better, registry = rivals
    both, order = threading.Barrier(2, timeout=60), threading.Event()
    original = MlflowClient.set_registered_model_alias

    def in_order(self: MlflowClient, name: str, alias: str, version: str) -> None:
        fid = float(self.get_model_version(name, version).tags["ddpm.fid"])
        if not order.is_set():
            both.wait()  # both have created their version and are about to set the alias
        if fid > 10.0 and not order.wait(60):
            raise AssertionError("the other promotion never set its alias")
        original(self, name, alias, version)
        order.set()

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", in_order)

    def promote(root: Path) -> Any:
        return tracking.promote(params, root, rescore=lambda folder, settings: scores_at(root, FIRST, 60.0))

    with ThreadPoolExecutor(2) as pool:
        overtaken, promoted = pool.map(promote, (worse, better))
    assert float(registry.champion().tags["ddpm.fid"]) == 10.0
    assert promoted.promoted and not overtaken.promoted
    assert "which was promoted at the same time" in overtaken.reason


def test_two_score_the_champion_at_once(rivals: Any) -> None:
    """Both processes set the same new tags of the same version, and MLflow's insert fails for one of them."""
    params, worse, better, registry = rivals
    at_once = threading.Barrier(2, timeout=60)

    def rescore(root: Path) -> Any:
        at_once.wait()
        return scores_at(root, FIRST, 60.0)

    def promote(root: Path) -> Any:
        return tracking.promote(params, root, rescore=lambda folder, settings: rescore(root))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(promote, (worse, better)))
    assert float(registry.champion().tags["ddpm.fid"]) == 10.0


# The model card.


def parts(text: str) -> tuple[dict[str, Any], str]:
    """Splits a card into front matter and body."""
    _, matter, body = text.split("---\n", 2)
    return YAML(typ="safe").load(matter), body.lstrip()


def test_the_cards_numbers_are_the_registrys(checkout: Path, params: Params) -> None:
    tracking.promote(params, checkout)
    client = MlflowClient(f"sqlite:///{checkout / 'mlflow.db'}")
    version = client.get_model_version_by_alias("ddpm-digits", "champion")
    (scores,) = [json.loads(value) for tag, value in version.tags.items() if tag.startswith("ddpm.score.")]
    assert str(scores["fid"]) == version.tags["ddpm.fid"]
    low, high = (f"{scores[f'fid_{side}']:.3g}" for side in ("low", "high"))
    for text in (
        f"# ddpm-digits: {version.tags['ddpm.point']}\n",
        f"| FID (lower is better) | {scores['fid']:.3g} | {low} to {high} |",
        f"| KID (lower is better) | {scores['kid']:.3g} | {scores['kid_low']:.3g} to {scores['kid_high']:.3g} |",
        f"{scores['images']} samples with {scores['reference_images']} training images, at Inception layer 64",
        f"{version.tags['ddpm.evaluations']} network evaluations",
        version.tags["ddpm.model_sha256"],
        version.tags["ddpm.dataset_sha256"],
        'load_model("models:/ddpm-digits@champion")',
    ):
        assert text in version.description
    assert len(version.description) < LONGEST - 1000  # leaves room for the decision below the description
    (model,) = [m for m in client.search_logged_models([client.get_run(version.run_id).info.experiment_id])
                if m.model_id == version.source.rpartition("/")[2]]  # fmt: skip
    beside = (Path(model.artifact_location.removeprefix("file://")) / "model-card.md").read_text(encoding="utf-8")
    assert beside == tracking.model_card(params, checkout)
    matter, body = parts(beside)
    assert body == version.description
    assert (matter["license"], matter["datasets"], matter["metrics"]) == (
        "apache-2.0",
        ["digits"],
        ["fid", "kid", "precision", "recall"],
    )
    (result,) = matter["model-index"][0]["results"]
    assert result["dataset"]["revision"] == version.tags["ddpm.dataset_sha256"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        name: scores[name] for name in matter["metrics"]
    }
    assert client.get_registered_model("ddpm-digits").description.startswith(version.description)
    assert "is the first champion" in client.get_registered_model("ddpm-digits").description


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_has_its_licence_and_odd_names_stay_in_their_place(made: Path, source: str) -> None:
    about = read_model_record(made / paths.model_dir("cosine"))
    data = replace(about.data, name=source, classes=["---\nlicense: mit", "| x |\n# y"])
    about, scores = replace(about, data=data), read_scores(made, FIRST)
    text = card("ddpm-x", "cosine-ddim-5", {"sampler": "ddim"}, scores, about)
    shareable = source in ("digits", "fashion_mnist")
    assert SOURCES[source].licence in text and ("Check the data's terms" in text) is not shareable
    matter, body = parts(with_front_matter(text, "ddpm-x", scores, about))
    assert body == text and "# y" not in text
    assert matter["license"] == ("apache-2.0" if shareable else "other")


@pytest.mark.parametrize(
    ("name", "licence"), [("fashion-mnist", "(Xiao et al. 2017), MIT"), ("gone", "the licence is unknown")]
)
def test_a_card_of_an_older_model_or_of_a_source_that_is_gone(made: Path, name: str, licence: str) -> None:
    about = read_model_record(made / paths.model_dir("cosine"))
    about = replace(about, data=replace(about.data, name=name))
    assert licence in card("ddpm-x", "cosine-ddim-5", {"sampler": "ddim"}, read_scores(made, FIRST), about)
