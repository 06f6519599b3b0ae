"""Checks how a newcomer sees a sweep in a browser: MLflow's pages and the report. Pictures go to test-output/."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from ddpm import tracking
from ddpm.files import paths
from ddpm.files.params import Params
from ddpm.stages.report import report
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

SHOTS = Path(__file__).parents[2] / "test-output"
ROOT = Path(__file__).parents[2]
RUNS = ["cosine-ddim", "cosine-ddpm", "linear-ddim", "linear-ddpm"]
LINES = """card => card.querySelector('.js-plotly-plot').data
    .filter(line => line.mode.includes('markers')).map(line => [line.name, [...line.x], [...line.y]])"""
Scores = Callable[..., None]
Shoot = Callable[[Any, str], None]


def fids(run: str) -> list[float]:
    """Returns a run's FIDs at 2, 5 and 10 steps. cosine-ddim-10 has the best."""
    return [60 / steps + 3 * run.endswith("ddpm") + 2 * run.startswith("linear") for steps in (2, 5, 10)]


@pytest.fixture(scope="module")
def params(smoke: Callable[..., Params]) -> Params:
    return smoke(training={"steps": 2}, sweep={"schedules": ["linear", "cosine"], "steps": [2, 5, 10]})


@pytest.fixture(scope="module")
def sweep(
    params: Params, made: Path, empty_database: Path, write_scores: Scores, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Creates a published sweep of two schedules, two samplers and three numbers of steps, with the best point promoted."""
    root = tmp_path_factory.mktemp("sweep")
    shutil.copytree(made, root, symlinks=True, dirs_exist_ok=True)
    shutil.copyfile(empty_database, root / "mlflow.db")
    train(params, "linear", root)
    for point in params.points():
        if not (root / paths.samples_file(point)).exists():
            sample_point(params, point, root)
        write_scores(root, point, fids(f"{point.schedule}-{point.sampler}")[params.sweep.steps.index(point.steps)])
    report(params, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.publish(params, root)
        tracking.promote(params, root)
        tracking.publish(params, root, only="report")
    return root


@pytest.fixture(scope="module")
def mlflow(sweep: Path, serve_tracking: Callable[[Path], AbstractContextManager[str]]) -> Iterator[str]:
    with serve_tracking(sweep) as url:
        yield url


def test_the_filters_of_the_docs_find_what_they_say(mlflow: str) -> None:
    block = (ROOT / "docs" / "mlflow.md").read_text(encoding="utf-8").split("```")[1]
    found = []
    for line in block.strip().splitlines():
        found.append(sorted(run.info.run_name for run in MlflowClient(mlflow).search_runs(["1"], line)))
    assert found == [
        RUNS,
        ["cosine", "cosine-ddim", "cosine-ddpm"],
        ["cosine-ddim", "linear-ddim"],
        ["cosine", *RUNS[:2], "linear", *RUNS[2:]],
        ["cosine"],  # the other runs have no commit, since their first output has no run file
        ["cosine-ddim", "cosine-ddpm"],
        RUNS,
    ]


def open_experiment(page: Any, mlflow: str) -> Any:
    """Opens the chart by clicks. MLflow first shows its view for agents, and the experiment's description links to the chart."""
    page.goto(f"{mlflow}/#/experiments", wait_until="domcontentloaded")
    page.get_by_role("link", name="ddpm-digits").click()
    page.get_by_role("button", name="Got it").click()
    page.get_by_role("button", name="Close").click()  # closes the assistant
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="FID against steps").click()
    return opened.value


def test_one_click_shows_fid_against_steps_and_the_images(page: Any, mlflow: str, shoot: Shoot) -> None:
    chart = open_experiment(page, mlflow)
    from playwright.sync_api import expect

    cards = chart.get_by_test_id("experiment-view-compare-runs-card")
    fid = cards.filter(has_text=re.compile("^fid"))
    fid.locator(".scatterlayer .trace").first.wait_for()
    assert re.findall(r"([a-z]+-[a-z]+) \(fid\)", fid.inner_text()) == RUNS
    lines = fid.evaluate(LINES)
    assert sorted(lines) == [[name, [2, 5, 10], fids(name)] for name in RUNS]
    images = cards.filter(has_text=re.compile("^samples"))
    images.scroll_into_view_if_needed()
    shown = images.locator("img")
    shown.nth(3).wait_for()  # waits for real images, because the slider stands at 0
    real = shown.first.get_attribute("src")
    track = images.locator(".TRACK").bounding_box()
    chart.mouse.click(track["x"] + track["width"] - 2, track["y"] + track["height"] / 2)
    expect(shown.first).not_to_have_attribute("src", real)
    shown.nth(3).wait_for()
    shoot(chart, "mlflow-chart")


def test_the_runs_page_has_the_samplers_below_their_schedules(page: Any, mlflow: str, shoot: Shoot) -> None:
    page.goto(f"{mlflow}/#/experiments/1/runs?workflowType=machine_learning", wait_until="domcontentloaded")
    for name in ("linear", "cosine", *RUNS):
        page.get_by_role("link", name=name, exact=True).first.wait_for()  # a training also has a model of this name
    shoot(page, "mlflow-runs")
    page.get_by_role("link", name="cosine-ddim", exact=True).click()
    page.get_by_text("Sampler ddim on the cosine schedule").wait_for()
    shoot(page, "mlflow-run")


def test_the_registry_shows_the_champion_and_where_it_comes_from(page: Any, mlflow: str, shoot: Shoot) -> None:
    page.goto(f"{mlflow}/#/models/ddpm-digits", wait_until="domcontentloaded")
    page.get_by_text("champion").locator("visible=true").first.wait_for()
    shoot(page, "mlflow-model")
    page.get_by_role("link", name="Version 1").click()
    for text in ("95%", "ddpm.evaluations", "cosine-ddim-10 is the first champion", "ddpm.dataset_sha256"):
        page.get_by_text(text).locator("visible=true").first.wait_for()
    assert page.get_by_role("link", name="cosine-ddim", exact=True).get_attribute("href")  # a link to the run
    shoot(page, "mlflow-version")


def test_the_report_opens_without_a_network(page: Any, sweep: Path, shoot: Shoot) -> None:
    html = sweep / "report" / "index.html"
    if not html.exists():
        pytest.skip("the report is no page yet")
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.context.set_offline(True)
    page.goto(html.as_uri(), wait_until="load")
    page.get_by_text("cosine-ddim-10").first.wait_for()
    shoot(page, "report")
    page.get_by_text("There was no earlier champion").wait_for()  # run.js says that there was no earlier champion
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, "report-narrow")
    assert not errors


def test_the_report_is_all_there_without_a_script_and_on_paper(browser: Any, sweep: Path, shoot: Shoot) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 794, "height": 1123})
    page = context.new_page()
    page.goto((sweep / "report" / "index.html").as_uri(), wait_until="load")
    hint = page.get_by_text("Click a column heading to sort by that column.")
    assert not hint.is_visible()
    assert page.locator("#points tbody tr").count() == 12
    paper = page.pdf(path=SHOTS / "report.pdf", format="A4")
    assert paper.startswith(b"%PDF") and 3 <= paper.count(b"/Type /Page\n") <= 9
    page.emulate_media(media="print")
    assert not page.get_by_role("navigation").is_visible()
    shoot(page, "report-print")
    context.close()
