"""Checks that report/run.js adds times and the comparison with the previous report to the page, in Chromium at three widths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.files import paths
from ddpm.files.params import Params
from ddpm.files.samples import write_samples
from ddpm.files.scores import read_point_influence, read_scores
from ddpm.parameters import Point
from ddpm.provenance.runs import RunRecord, write_run
from ddpm.reporting import compared
from ddpm.reporting.compared import Measured, changes, gaps
from ddpm.reporting.previous import gap_of_best
from ddpm.reporting.published import write_local
from ddpm.scores.intervals import Estimate, difference
from ddpm.stages.report import report

Smoke = Callable[..., Params]
Report = Callable[..., Path]
WIDTHS = (1280, 1920, 390)
ALL_COLUMNS = {
    "fid_infinity": 3.0,
    "density": 0.8,
    "coverage": 0.7,
    "copying": 0.5,
    "copying_z": 0.1,
    "inception_score": 2.0,
}


@pytest.fixture
def make(root: Path, write_scores: Callable[..., None]) -> Report:
    """Returns make(params, fid, error, **entries), which writes made-up samples and scores, and their report with its run.js."""

    def make_report(params: Params, fid: float, error: float = 0.1, **entries: Any) -> Path:
        random = np.random.default_rng(0)
        for path in (root / "samples", root / "metrics"):
            shutil.rmtree(path, ignore_errors=True)
        for index, point in enumerate(params.points()):
            images = random.integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
            settings = {"seed": params.seed, "row": {}, "sampling": {}}
            write_samples(root / paths.samples_file(point), images, point.steps, "m", settings=settings)
            write_scores(root, point, fid + index, error, **entries)
            made = RunRecord(
                f"sample@{point.name}", 1_700_000_000_000, 1_700_000_064_000, 64.0, 64, "images", per_second=1.0
            )
            write_run(root / paths.samples_file(point), made)
        report(params, root)
        write_run(root / paths.report_dir(), RunRecord("report", 1_700_000_000_000, 1_700_000_100_000, 100.0))
        write_local(params, root)
        return root

    return make_report


def parts(root: Path) -> dict[str, str]:
    """Returns the parts of the page that run.js holds."""
    text = (root / paths.REPORT_SCRIPT).read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return found


def measured(root: Path, point: Point, seed: int | None) -> Measured:
    scores = read_scores(root, point)
    return Measured(point.name, scores.estimate(read_point_influence(root, point, scores)), seed)


def test_the_first_report_has_nothing_to_compare_with(make: Report, smoke: Smoke) -> None:
    found = parts(make(smoke(), 40.0))
    assert "nothing to compare with yet" in found["compared"]
    assert "2023-11-14 22:13" in found["published"] and "1 images/s" in found["published"]


def test_the_second_report_tells_what_changed_and_what_that_did(make: Report, smoke: Smoke, tmp_path: Path) -> None:
    first = make(smoke(), 40.0, error=0.1)
    before = {point: measured(first, point, 0) for point in smoke().points()}
    more = smoke(training={"steps": 4321})
    second = make(more, 39.5, error=0.3)
    found = parts(second)["compared"]
    (changed,) = [line for line in found.splitlines() if "training.steps" in line]
    assert f">{smoke().training.steps}<" in changed and ">4321<" in changed and found.count('class="word mono"') == 2
    assert "2023-11-14 22:15" in found and "not paired" not in found
    for gap in gaps([(measured(second, point, 0), before[point]) for point in more.points()]):
        error = difference(gap.now.estimate, gap.before.estimate).error
        assert error == pytest.approx(0.2, rel=1e-4)  # the errors of paired images are proportional
        assert gap.difference == pytest.approx(-0.5) and 1.96 * error <= gap.high - gap.difference <= 4 * error
        assert f"{gap.difference:.3g} " in found and f"({gap.low:.3g} to {gap.high:.3g})" in found
        assert gap.words == ("better" if gap.high < 0 else "may be chance") and f">{gap.words}<" in found


def test_another_seed_of_the_noise_is_not_paired(make: Report, smoke: Smoke) -> None:
    make(smoke(), 40.0, error=0.1)
    found = parts(make(smoke(seed=1), 39.5, error=0.3))["compared"]
    assert found.count("not paired") == len(smoke().points()) and ">seed<" in found


def test_scores_of_another_dataset_are_not_subtracted(make: Report, smoke: Smoke) -> None:
    make(smoke(), 40.0)
    found = parts(make(smoke(), 39.0, reference="f" * 64))["compared"]
    assert "The scores cannot be compared, since the dataset changed." in found and "FID before" not in found


def test_points_that_came_and_went_and_another_best(make: Report, smoke: Smoke) -> None:
    make(smoke(sweep={"steps": [2, 5]}), 40.0)
    found = parts(make(smoke(sweep={"steps": [5, 10]}), 30.0))["compared"]
    assert "New points: cosine-ddpm-10, cosine-ddim-10." in found
    assert "Removed points: cosine-ddpm-2, cosine-ddim-2." in found
    assert "cosine-ddpm-2 → cosine-ddpm-5" in found


def test_the_best_scores_of_two_reports_are_compared(make: Report, smoke: Smoke) -> None:
    root = make(smoke(sweep={"steps": [2, 5]}), 40.0)
    assert gap_of_best(root) is None
    for sweep, before, now, best in (([2, 5], 40.0, 39.5, "cosine-ddpm-2"), ([5, 10], 39.5, 30.0, "cosine-ddpm-5")):
        make(smoke(sweep={"steps": sweep}), now, error=0.1 + now / 1000)
        gap = gap_of_best(root)
        assert gap is not None and (gap.before.point, gap.now.point) == ("cosine-ddpm-2", best)
        assert gap.difference == pytest.approx(now - before)
        assert gap.low < gap.difference < gap.high and gap.words == ("better" if gap.high < 0 else "may be chance")
    make(smoke(sweep={"steps": [5, 10]}), 29.0, reference="f" * 64)
    assert gap_of_best(root) is None


def test_the_same_report_again_is_no_new_run(make: Report, smoke: Smoke) -> None:
    make(smoke(), 40.0)
    root = make(smoke(training={"steps": 7}), 39.0)
    once = parts(root)
    report(smoke(training={"steps": 7}), root)
    write_local(smoke(training={"steps": 7}), root)
    assert parts(root) == once
    # params.yaml was edited after the report, which is still that of 7 steps
    write_local(smoke(training={"steps": 8}), root)
    assert parts(root) == once
    assert sorted(path.name for path in (root / ".cache" / "reports").iterdir()) == ["present", "previous"]


def test_a_damaged_earlier_report_is_a_warning(make: Report, smoke: Smoke) -> None:
    make(smoke(), 40.0)
    root, said = make(smoke(), 39.0), list[str]()
    next((root / ".cache" / "reports" / "previous" / "metrics").glob("*.json")).write_text("{")
    write_local(smoke(), root, said.append)
    (line,) = said
    assert line.startswith("warning: the report is not compared with the previous one: ") and "\n" not in line
    assert "22:13" in parts(root)["published"]
    said.clear()
    write_local(smoke(), root, said.append)  # the warning comes once, since no stage makes the copy again
    assert not said and (root / ".cache" / "reports" / "present").is_dir()
    (root / ".cache" / "reports" / "present" / "kept.json").write_text("{}")  # another version may write such a file
    for expected in (1, 0):  # the warning comes once, and then the report is kept again
        said.clear()
        write_local(smoke(), root, said.append)
        assert len(said) == expected


def test_a_cache_that_cannot_be_written_is_a_warning(make: Report, smoke: Smoke) -> None:
    root, said = make(smoke(), 40.0), list[str]()
    shutil.rmtree(root / ".cache" / "reports")
    (root / ".cache" / "reports").touch()
    write_local(smoke(), root, said.append)
    (line,) = said
    assert line.startswith("warning: the report is not compared with the previous one: ")
    assert "22:13" in parts(root)["published"]


def test_the_page_is_the_same_whatever_was_before(make: Report, smoke: Smoke) -> None:
    first = (make(smoke(), 40.0) / "report" / "index.html").read_bytes()
    make(smoke(training={"steps": 7}), 39.0)
    again = make(smoke(), 40.0)
    assert (again / "report" / "index.html").read_bytes() == first
    assert "training.steps" in parts(again)["compared"]


def test_intervals_of_many_differences_hold_together() -> None:
    """With 20 equal points, the intervals of all differences contain 0 in about 95% of the cases.

    With another seed, the test would fail by chance in about 1 of 260 runs.
    """
    random, held, trials = np.random.default_rng(0), 0, 60
    for _ in range(trials):
        pairs = []
        for name in range(20):
            now, before = random.normal(size=(2, 50))
            pairs.append((measure(str(name), now), measure(str(name), before)))
        held += all(gap.low <= 0 <= gap.high for gap in gaps(pairs))
    assert held / trials > 0.85


def measure(name: str, values: np.ndarray) -> Measured:
    centred = values - values.mean()
    return Measured(name, Estimate(values.mean(), values.std(ddof=1) / len(values) ** 0.5, centred), 0)


def test_names_are_text_and_no_markup() -> None:
    found = [compared.Compared("<b>", "&amp;", changes({"a": {"b": "<i>"}}, {"a": {"c": [1]}}))]
    html = compared.html(found)
    assert "<b>" not in html and "<i>" not in html and "&amp;amp;" in html and ">a.b<" in html and ">[1]<" in html


# Tests in a browser.


@pytest.fixture
def opened(make: Report, smoke: Smoke, page: Any) -> Any:
    make(smoke(), 40.0, **ALL_COLUMNS)
    root = make(smoke(training={"steps": 4321}), 39.0, **ALL_COLUMNS)
    page.errors = []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto((root / "report" / "index.html").as_uri(), wait_until="load")
    return page


def edges(locator: Any) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"], box["x"] + box["width"]


def test_everything_can_be_seen_at_every_width(opened: Any, shoot: Callable[[Any, str], None]) -> None:
    for width in WIDTHS:
        opened.set_viewport_size({"width": width, "height": 900})
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        for figure in opened.locator("figure img").all():
            left, right = edges(figure)
            assert left >= 0 and right <= width
        columns = opened.locator("#points thead th")
        assert columns.count() >= 12
        last = columns.last
        if width < 600:  # on a narrow screen the table scrolls, and the names of the points stay visible
            last.scroll_into_view_if_needed()
            assert edges(opened.locator("#points tbody td").first)[0] >= 0
        for column in (columns.first, last):
            left, right = edges(column)
            assert left >= 0 and right <= width
        opened.locator("#compared").scroll_into_view_if_needed()
        shoot(opened, f"report-{width}")
    assert not opened.errors


def test_a_click_enlarges_samples_and_figures(opened: Any, shoot: Callable[[Any, str], None]) -> None:
    dialog = opened.get_by_role("dialog")
    for width in WIDTHS:
        opened.set_viewport_size({"width": width, "height": 900})
        small = opened.locator("#samples button.zoom").first
        height = small.bounding_box()["height"]
        small.click()
        cells = dialog.locator("i")
        assert cells.count() == 10
        assert all(cell.bounding_box()["height"] > 1.9 * height for cell in cells.all())
        assert edges(cells.first)[0] >= 0 and edges(cells.nth(1))[1] <= width
        more = dialog.get_by_role("link").evaluate("link => link.href")
        assert more.endswith("/samples/cosine-ddpm-2.png") and "/report/" not in more
        shoot(opened, f"report-samples-{width}")
        opened.keyboard.press("Escape")
        opened.locator("#front button.zoom").click()
        assert dialog.locator("img").bounding_box()["width"] >= 875
        dialog.get_by_role("button", name="Close").click()
        assert not dialog.is_visible()
    assert not opened.errors


def test_the_page_shows_times_and_comparisons_of_its_own_run_alone(opened: Any, make: Report, smoke: Smoke) -> None:
    opened.get_by_text("training.steps").first.wait_for()
    opened.get_by_text("2023-11-14 22:13").first.wait_for()
    script = make(smoke(), 40.0, **ALL_COLUMNS) / paths.REPORT_SCRIPT
    stale = script.read_text(encoding="utf-8")
    make(smoke(training={"steps": 5}), 38.0, **ALL_COLUMNS)
    script.write_text(stale, encoding="utf-8")
    opened.reload(wait_until="load")
    opened.get_by_text("is missing or belongs to another report").first.wait_for()
    assert "2023-11-14" not in opened.content()
