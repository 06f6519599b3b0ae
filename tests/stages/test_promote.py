"""Who is champion: the rule on numbers, and its bookkeeping in a real registry."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from ddpm.stages import checkpoint, store, tracking
from ddpm.stages.errors import InputError
from ddpm.stages.params import Params, Point
from ddpm.stages.promote import Protocol, Score, decide

Smoke = Callable[..., Params]
Scores = Callable[..., None]

PROTOCOL = Protocol("d" * 64, 64, 500, 1437, "e" * 64)
FIRST, SECOND = (Point(schedule="cosine", sampler=name, steps=5) for name in ("ddim", "ddpm"))
OTHERS = [Point(schedule="cosine", sampler=name, steps=2) for name in ("ddim", "ddpm")]


# The rule.


@pytest.mark.parametrize(
    ("challenger", "champion", "replace", "wins"),
    [
        ((9.9, 50), (10.0, 10), False, True),
        ((10.1, 10), (10.0, 1000), False, False),
        ((10.0, 10), (10.0, 1000), False, False),  # a tie keeps the champion
        ((10.1, 10), (10.0, 10), True, True),
    ],
)
def test_only_a_better_score_wins(
    challenger: tuple[float, int], champion: tuple[float, int], replace: bool, wins: bool
) -> None:
    decided, reason = decide(Score(*challenger, PROTOCOL), Score(*champion, PROTOCOL), replace)
    assert decided is wins
    assert reason


def test_scores_under_different_protocols_are_never_compared() -> None:
    other = Score(1.0, 10, Protocol("d" * 64, 2048, 500, 1437, "e" * 64))
    with pytest.raises(ValueError, match="protocols"):
        decide(other, Score(2.0, 10, PROTOCOL))
    assert not other.beats(Score(2.0, 10, PROTOCOL))


def test_a_protocol_says_what_changed() -> None:
    changed = Protocol("f" * 64, 2048, 500, 1437, "e" * 64)
    assert changed.differences(PROTOCOL) == "dataset version, layer 64 -> 2048"
    assert changed.id != PROTOCOL.id == Protocol("d" * 64, 64, 500, 1437, "e" * 64).id


@pytest.mark.parametrize("fid", [float("nan"), float("inf"), None])
def test_a_score_that_is_no_number_is_refused(fid: float | None) -> None:
    with pytest.raises(InputError, match="cannot be compared"):
        Score.of({"fid": fid, "evaluations": 10})


# The registry.


@pytest.fixture
def params(smoke: Smoke) -> Params:
    return smoke(training={"steps": 24})


def never(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("scored again for nothing")


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


def test_the_history_of_a_championship(checkout: Path, params: Params, write_scores: Scores) -> None:
    first = tracking.promote(params, checkout, rescore=never)
    assert (first.promoted, first.version, first.point) == (True, "1", "cosine-ddim-5")
    registry = Registry(checkout)
    champion = registry.champion()
    about = store.read_json(checkout / "models/cosine/model.json")
    scores = store.read_json(checkout / store.metrics_file(FIRST))
    assert champion.tags["ddpm.model_sha256"] == about["weights_sha256"]
    assert json.loads(champion.tags["ddpm.settings"]) == {
        "sampler": "ddim",
        "eta": 0.0,
        "spacing": "leading",
        "steps": 5,
        "clip": True,
    }
    assert float(champion.tags["ddpm.fid"]) == scores["fid"]
    assert champion.tags["ddpm.dataset_sha256"] == about["data"]["sha256"]
    assert json.loads(champion.tags["ddpm.protocol"]) == {
        "dataset": about["data"]["sha256"],
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

    # A worse one is best of its own report, but no better than the champion: no version, a reason, told once.
    write_scores(checkout, FIRST, 90.0)
    for point in OTHERS:
        write_scores(checkout, point, 91.0)
    write_scores(checkout, SECOND, 55.0)
    for _ in range(2):
        kept = tracking.promote(params, checkout, rescore=never)
        assert not kept.promoted and kept.version == "1"
        assert (
            kept.reason
            == "cosine-ddpm-5 does not replace champion version 1 (cosine-ddim-5): FID 55 is not better than 37"
        )
    assert registry.count() == 1 and len(registry.decisions()) == 2

    write_scores(checkout, SECOND, scores["fid"])
    assert "tie" in tracking.promote(params, checkout, rescore=never).reason

    write_scores(checkout, SECOND, 8.0)
    better = tracking.promote(params, checkout, rescore=never)
    assert (better.promoted, better.version, better.previous) == (True, "2", "1")
    champion, before = registry.champion(), registry.client.get_model_version("ddpm-digits", "1")
    assert str(champion.version) == "2"
    assert champion.tags["ddpm.previous"] == "1" and before.tags["ddpm.replaced_by"] == "2"
    assert [entry["promoted"] for entry in registry.decisions()] == [True, False, False, True]
    assert registry.decisions()[-1]["before_fid"] == scores["fid"]

    # --replace takes the place without a comparison; going back needs no new version.
    write_scores(checkout, SECOND, 99.0)
    write_scores(checkout, FIRST, scores["fid"])
    forced = tracking.promote(params, checkout, replace=True, rescore=never)
    assert forced.promoted and forced.version == "1" and "--replace" in forced.reason
    assert registry.count() == 2


def test_another_protocol_scores_the_champion_again(
    checkout: Path, params: Params, write_scores: Scores, tmp_path: Path
) -> None:
    tracking.promote(params, checkout)
    registry = Registry(checkout)
    for point in (FIRST, *OTHERS):
        write_scores(checkout, point, 50.0, layer=192)
    write_scores(checkout, SECOND, 20.0, layer=192)
    asked: list[dict[str, Any]] = []
    weights = load_file(checkout / "models/cosine/model.safetensors")

    def rescore(fid: float) -> Callable[[Path, dict[str, Any]], dict[str, Any]]:
        def score(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
            denoiser, _ = checkpoint.load(folder)  # the champion's own checkpoint, whole
            assert not folder.is_relative_to(checkout)
            assert all((weights[name] == value).all() for name, value in denoiser.net.state_dict().items())
            asked.append(settings)
            return {**store.read_json(checkout / store.metrics_file(SECOND)), "fid": fid}

        return score

    with pytest.raises(InputError, match="layer 64 -> 192"):
        tracking.promote(params, checkout)  # nobody there to score it
    said: list[str] = []
    kept = tracking.promote(params, checkout, rescore=rescore(19.0), say=said.append)
    assert not kept.promoted and "FID 20 is not better than 19" in kept.reason
    assert asked == [{"sampler": "ddim", "eta": 0.0, "spacing": "leading", "steps": 5, "clip": True}]
    assert any("again" in line and "layer 64 -> 192" in line for line in said)
    # that score stays with the version
    assert not tracking.promote(params, checkout, rescore=never).promoted
    write_scores(checkout, SECOND, 18.0, layer=192)
    assert tracking.promote(params, checkout, rescore=never).promoted
    assert float(registry.client.get_model_version("ddpm-digits", "1").tags["ddpm.fid"]) == 37.0  # as it was promoted

    # another dataset version, and a champion that cannot be scored there
    for point in (SECOND, *OTHERS):
        write_scores(checkout, point, 60.0, reference="f" * 64)
    write_scores(checkout, FIRST, 30.0, reference="f" * 64)

    def refuse(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        raise InputError("images of another shape")

    with pytest.raises(InputError, match=r"another shape \(`ddpm promote --replace` skips that\)"):
        tracking.promote(params, checkout, rescore=refuse)
    assert tracking.promote(params, checkout, replace=True, rescore=never).promoted
    assert registry.count() == 2  # that model was registered before


def test_a_report_older_than_its_scores_is_refused(checkout: Path, params: Params, write_scores: Scores) -> None:
    best = (checkout / "report" / "best.json").read_bytes()
    write_scores(checkout, FIRST, 5.0)
    (checkout / "report" / "best.json").write_bytes(best)
    with pytest.raises(InputError, match="older than its scores"):
        tracking.promote(params, checkout)
    shutil.rmtree(checkout / "report")
    with pytest.raises(InputError, match=r"best\.json: no such file"):
        tracking.promote(params, checkout)


def test_promoting_into_an_empty_store_publishes_the_point(checkout: Path, params: Params) -> None:
    tracking.promote(params, checkout)
    assert tracking.publish(params, checkout)["runs"] == 2  # the other sampler's and the report
    assert tracking.promote(params, checkout).version == "1"


@pytest.mark.parametrize("uri", ["models:/ddpm-digits@champion", "models:/ddpm-digits/3", "models:/ddpm-digits", "m"])
def test_a_model_that_is_not_there(checkout: Path, uri: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model|names no registered model"):
        tracking.fetch_model(uri, tmp_path / "model", checkout)


# Two at once, from two checkouts with one server: no lock is common to them.


@pytest.fixture
def rivals(
    checkout: Path, smoke: Smoke, write_scores: Scores, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A champion of an old protocol, and two checkouts: FID 20 in one, FID 10 in the other, under the new one."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    params = smoke(training={"steps": 24}, data={"source": "image-folder"})
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


def champion_scores(root: Path) -> dict[str, Any]:
    return {**store.read_json(root / store.metrics_file(FIRST)), "fid": 60.0}


@pytest.mark.parametrize("better_first", [True, False])
def test_one_promotes_while_the_other_compares(rivals: Any, better_first: bool) -> None:
    params, worse, better, registry = rivals
    slow, quick = (worse, better) if better_first else (better, worse)

    def rescore(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        inner = tracking.promote(params, quick, rescore=lambda folder, settings: champion_scores(quick))
        assert inner.promoted
        return champion_scores(slow)

    outcome = tracking.promote(params, slow, rescore=rescore)
    assert outcome.promoted is not better_first
    assert float(registry.champion().tags["ddpm.fid"]) == 10.0


def test_two_in_step_end_with_the_better(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read the registry before either wrote, and the worse one sets the alias last."""
    params, worse, better, registry = rivals
    both, order = threading.Barrier(2, timeout=60), threading.Event()
    original = MlflowClient.set_registered_model_alias

    def in_order(self: MlflowClient, name: str, alias: str, version: str) -> None:
        fid = float(self.get_model_version(name, version).tags["ddpm.fid"])
        if not order.is_set():
            both.wait()  # both have made their version and are about to set the alias
        if fid > 10.0 and not order.wait(60):
            raise AssertionError("the other never came")
        original(self, name, alias, version)
        order.set()

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", in_order)

    def promote(root: Path) -> Any:
        return tracking.promote(params, root, rescore=lambda folder, settings: champion_scores(root))

    with ThreadPoolExecutor(2) as pool:
        overtaken, promoted = pool.map(promote, (worse, better))
    assert float(registry.champion().tags["ddpm.fid"]) == 10.0
    assert promoted.promoted and not overtaken.promoted
    assert "overtaken" in overtaken.reason


def test_two_score_the_champion_at_once(rivals: Any) -> None:
    """Both set the same new tags of the same version: MLflow's insert fails for one of them."""
    params, worse, better, registry = rivals
    at_once = threading.Barrier(2, timeout=60)

    def rescore(root: Path) -> dict[str, Any]:
        at_once.wait()
        return champion_scores(root)

    def promote(root: Path) -> Any:
        return tracking.promote(params, root, rescore=lambda folder, settings: rescore(root))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(promote, (worse, better)))
    assert float(registry.champion().tags["ddpm.fid"]) == 10.0
