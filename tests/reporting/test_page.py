"""Checks the page of the report: it shows the content of the files, and loads nothing from outside."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from scipy.stats import beta, betabinom

from ddpm.files import paths
from ddpm.files.arrays import grid
from ddpm.files.dataset import read_dataset, read_dataset_record, writing_dataset
from ddpm.files.params import Params
from ddpm.files.records import read_csv, read_record, write_csv, write_record
from ddpm.files.samples import read_samples, write_samples
from ddpm.files.scores import PICTURE, Answer, Row, read_report, write_influence
from ddpm.parameters import Point
from ddpm.provenance.runs import RunRecord
from ddpm.reporting import published as published_module
from ddpm.reporting.identity import SECTIONS
from ddpm.reporting.page import SHOWN, _lengths, how_sure, publish_with, verdict
from ddpm.reporting.published import fastest, published
from ddpm.scores.copying import Copying, Suspects, affordable, copying, nearest, suspect
from ddpm.scores.metrics import HEADLINE, RANKING
from ddpm.stages.report import report
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

VOID = {"meta", "link", "img", "br", "hr", "source"}
HOSTILE = '<script>alert("x")</script>&amp;'


class Reader(HTMLParser):
    """Collects tags, texts and tables. Fails if tags are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def made_report(
    smoke: Callable[..., Params], bound_of: Callable[[str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Creates a root with made-up outputs of every stage of the smoke recipe, class names that contain HTML, and the report."""
    root, random = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    about = {"name": "digits", "sha256": "c" * 64, "shape": [1, 8, 8], "counts": {"train": 60, "test": 30}}
    about |= {"classes": [HOSTILE, "1"], "mean": [0.3], "std": [0.4], "flip": False}
    labels = np.arange(60) % 2, np.arange(30) % 2
    with writing_dataset(root, (1, 8, 8), (60, 30), labels) as new:
        new.train[:], new.test[:] = (random.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8) for n in (60, 30))
        new.description, new.picture = about, grid(new.train[:2])
    curve = [{"step": step, "loss": 1 / step, "validation_loss": "" if step < 3 else 0.5} for step in (1, 2, 3)]
    write_csv(root / paths.history_file("cosine"), curve)
    write_csv(root / paths.losses_by_time_file("cosine"), [{"t": t, "loss_simple": 1 / (t + 1)} for t in (5, 50, 95)])
    trained = {"steps": 1234, "parameters": 56_789, "loss": 0.04567, "validation_loss": 0.05678}
    curves = [root / paths.history_file("cosine"), root / paths.losses_by_time_file("cosine")]
    write_record(root / paths.training_metrics_file("cosine"), {"schedule": "cosine", **trained}, curves)
    bound = [{"time": 90, "rate": 0.5, "distortion": 40.0}, {"time": 10, "rate": 1.5, "distortion": 20.0}]
    table = root / paths.likelihood_curve_file("cosine")
    write_csv(table, bound)
    about = bound_of("cosine")
    write_record(root / paths.likelihood_file("cosine"), about, [table])
    for index, point in enumerate(smoke().points()):
        images = random.integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
        write_samples(root / paths.samples_file(point), images, point.steps, "m", np.arange(12) % 2)
        values = root / paths.influence_file(point)
        write_influence(values, random.normal(size=12))
        fid = 12.34567 - index
        scores = {
            "fid": fid,
            "fid_low": fid - 0.54321,
            "fid_high": fid + 0.54321,
            "confidence": 0.95,
            "kid": fid / 300,
            "kid_low": -0.01234,
            "kid_high": 0.4321,
        }
        scores |= {"kid_std": 0.002, "precision": 0.6, "recall": 0.4, "evaluations": point.steps, "images": 12}
        scores |= {"reference_images": 60, "layer": 64, "reference": "c" * 64, "extractor_sha256": "e" * 64}
        scores |= {"samples": "f" * 64, "model": "m"}
        write_record(root / paths.metrics_file(point), {"point": point.name, **scores}, [values])
    report(smoke(), root)
    return root


@pytest.fixture(scope="module")
def page(made_report: Path) -> str:
    return (made_report / "report" / "index.html").read_text(encoding="utf-8")


def test_it_is_whole_and_needs_no_network(page: str) -> None:
    reader = Reader(page)
    addresses = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("src", "href", "data")]
    assert [value for value in addresses if not str(value).startswith(("data:", "#"))] == ["run.js"]
    assert "http" not in re.sub(r"data:[^\"]*", "", page).replace("http-equiv", "")
    assert not re.search(r"url\((?!\"\$\{image\.src\}\")|@import", page)
    ids = {attrs["id"] for _, attrs in reader.tags if attrs.get("id")}
    assert {str(value)[1:] for value in addresses if str(value).startswith("#")} <= ids
    assert all(attrs.get("alt") for tag, attrs in reader.tags if tag == "img")
    assert len(page) < 3_000_000


def test_every_number_is_the_files(page: str, made_report: Path) -> None:
    reader, rows = Reader(page), read_csv(made_report / "report" / "points.csv")
    shown = [[str(attrs["data-value"]) for _, attrs in reader.tags if "data-value" in attrs]]
    columns = ("point", "schedule", "sampler", "evaluations", "fid", "kid", "precision", "recall")
    assert shown == [[row[column] for row in rows for column in columns]]
    (points,) = [table for table in reader.tables if table[0][1:3] == ["schedule", "sampler"]]
    for cells, row in zip(points[1:], rows, strict=True):
        fid, low, high = (f"{float(row[key]):.3g}" for key in ("fid", "fid_low", "fid_high"))
        assert cells[4] == f"{fid} ({low} to {high})"
        assert cells[5] == f"{float(row['kid']):.3g} (-0.0123 to 0.432)"
    front = read_record(made_report / "report" / "front.json")
    for entry in {json.dumps(entry): entry for entry in front["budgets"].values()}.values():
        assert f"FID {entry['fid']:.3g} ({entry['fid_low']:.3g} to {entry['fid_high']:.3g})" in reader.text
    assert "4.32 ± 0.01" in reader.text
    about = read_dataset_record(made_report)
    trained = read_record(made_report / paths.training_metrics_file("cosine"))
    for text in (
        about.sha256,
        f"{trained['parameters']:,}",
        f"{trained['loss']:.3g}",
        f"{about.counts['train']:,}",
    ):
        assert text in reader.text
    assert "learning_rate0.002" in reader.text


def pictures_of(page: str) -> dict[str, str]:
    """Returns the address of each picture, by its alternative text."""
    return {str(attrs["alt"]): str(attrs["src"]) for tag, attrs in Reader(page).tags if tag == "img"}


def test_every_class_has_a_row_of_its_own_samples(page: str, made_report: Path) -> None:
    best = read_report(made_report)[0].row.point
    images, pictures = read_samples(made_report / "samples" / f"{best}.npz").images, pictures_of(page)
    for label, name in enumerate((HOSTILE, "1")):
        shown = Image.open(io.BytesIO(base64.b64decode(pictures[f"samples of class {name}"].partition(",")[2])))
        np.testing.assert_array_equal(np.asarray(shown), grid(images[label::2], columns=6)[0])


def test_every_point_shows_its_first_images_pixel_for_pixel(
    page: str, made_report: Path, smoke: Callable[..., Params]
) -> None:
    pictures = pictures_of(page)
    for point in smoke().points():
        source = base64.b64decode(pictures[f"{SHOWN} samples of {point.name}"].partition(",")[2])
        images = read_samples(made_report / paths.samples_file(point)).images[:SHOWN]
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(source))), grid(images, columns=SHOWN)[0])


def test_names_are_text_and_no_markup(page: str) -> None:
    reader = Reader(page)
    assert HOSTILE in reader.text
    assert [tag for tag, _ in reader.tags].count("script") == 2  # the page's own script, and run.js


def test_same_inputs_same_bytes(page: str, made_report: Path, smoke: Callable[..., Params]) -> None:
    report(smoke(), made_report)
    again = (made_report / "report" / "index.html").read_text(encoding="utf-8")
    assert again == page
    assert str(made_report) not in page
    for picture in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", page):
        assert b"<dc:date>" not in base64.b64decode(picture)


def test_the_stage_depends_on_the_sections_it_shows_and_on_its_template() -> None:
    stage = YAML(typ="safe").load((Path(__file__).parents[2] / "dvc.yaml").read_text())["stages"]["report"]
    *sections, auto = stage["params"]
    assert tuple(sections) == SECTIONS and auto == {"auto.json": ["precision", "compile"]}
    assert {"ddpm/reporting/report.html.jinja", "dataset", "metrics", "samples"} <= set(stage["deps"])
    assert {"report/index.html", f"report/{PICTURE}"} <= set(stage["outs"])


def test_dvcs_plot_shows_the_score_that_ranks_points() -> None:
    stage = YAML(typ="safe").load((Path(__file__).parents[2] / "dvc.yaml").read_text())["stages"]["report"]
    (plot,) = stage["plots"]
    about = plot["report/points.csv"]
    assert (about["y"], about["title"]) == (HEADLINE, f"{RANKING.title} against network evaluations")


def test_how_sure() -> None:
    entry = Answer("a", 10, 1.0, 0.9, 1.1, lowest="a", may_be_best=("a",))
    assert how_sure(entry, 1, 0.95, 0.05) == "a is the only point that the budget allows."
    assert how_sure(entry, 4, 0.95, 0.05) == "With 95% confidence, a is the best of the 4 points."
    among = "With 95% confidence, the best of the 9 points that the budget allows is one of these"
    tied = how_sure(replace(entry, may_be_best=("a", "b", "c")), 9, 0.95, 0.05)
    assert tied.startswith("Not certain. This point has the lowest FID, but may not be the best.") and tied.endswith(
        f"{among} 3: a, b, c."
    )
    luck = how_sure(replace(entry, point="b", may_be_best=tuple("abcdefgh")), 9, 0.95, 0.05)
    nearly = (
        "a has a lower FID, but b takes fewer evaluations and, with 95% confidence, is at most 5% worse than the truly"
    )
    nearly += " best point."
    assert luck == f"{nearly} {among} 8: a, b, c, d, e, f and 2 more."
    assert how_sure(replace(entry, point="b"), 9, 0.95, 0.05) == nearly


# Nearest neighbours.


def test_the_nearest_neighbour_of_a_training_image_is_itself(made_report: Path) -> None:
    train = read_dataset(made_report).train
    index, distance = nearest(np.asarray(train[[5, 59, 0]]), train)
    assert index.tolist() == [5, 59, 0] and distance.tolist() == [0, 0, 0]


def test_neighbours_are_those_of_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    train, images = (random.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8) for count in (57, 9))
    monkeypatch.setattr("ddpm.scores.copying.CHUNK", 8 * 48 * 10)  # ten training images at a time
    far = np.sqrt(((images[:, None].astype(float) - train) ** 2).mean((2, 3, 4)))
    index, distance = nearest(images, train)
    np.testing.assert_array_equal(index, far.argmin(1))
    np.testing.assert_allclose(distance, far.min(1), rtol=1e-12)
    turned = train[[3, 50], :, :, ::-1]
    index, distance = nearest(turned, train, mirrored=True)
    assert index.tolist() == [3, 50] and distance.tolist() == [0, 0]
    assert nearest(turned, train)[1].min() > 0


def test_copies_are_told_from_new_images() -> None:
    from scipy.stats import mannwhitneyu

    random = np.random.default_rng(1)
    unseen = random.normal(30, 5, 200)
    for samples in (random.normal(30, 5, 200), random.normal(28, 5, 150)):
        found, expected = (
            copying(samples, unseen),
            mannwhitneyu(unseen, samples, method="asymptotic", use_continuity=False),
        )
        assert found.closer == pytest.approx(expected.statistic / (len(samples) * 200))
        assert 2 * (1 - _normal(abs(found.z))) == pytest.approx(expected.pvalue, rel=1e-6)
    copies = copying(np.zeros(50), unseen)
    assert (copies.closer, copies.copies) == (1.0, 50) and copies.z > 10
    assert copying(unseen, unseen).closer == 0.5


def test_the_verdict_follows_from_both_comparisons() -> None:
    far, near = Copying(0.4, -4.0, 0), Copying(0.7, 4.0, 0)
    said = {(a, b): verdict(a, b) for a in (None, far, near) for b in (None, far, near)}
    assert said[None, None].startswith("Unknown")
    assert all(said[pair].startswith("No sign") for pair in ((far, far), (far, None), (None, far)))
    assert said[near, near].startswith("A strong sign of memorising: by pixels and features")
    assert said[near, far].startswith("A sign") and said[near, far].endswith("but not by features.")
    assert said[far, near].endswith("but not by pixels.") and "but" not in said[None, near]
    chance, copies = (Suspects(tuple(range(count)), 9.0, 0.0, 0.02, 1.0, 4) for count in (4, 5))
    assert verdict(far, far, chance) == verdict(far, far)
    assert verdict(far, far, copies).startswith("5 samples are suspected copies, but chance explains at most 4. Most")
    assert verdict(near, near, copies).endswith(verdict(near, near))


def digits_from(folder: Path) -> np.ndarray:
    data = read_dataset(folder)
    return np.concatenate([data.train, data.test])


def test_the_number_of_suspected_copies_that_chance_explains_is_beta_binomial() -> None:
    random = np.random.default_rng(0)
    for m, n, confidence in ((400, 360, 0.95), (64, 1000, 0.9), (50, 3, 0.95), (3, 50, 0.5)):
        count = betabinom(m, 1, n)
        found = suspect(random.uniform(size=m), random.uniform(size=n), confidence)
        assert found.most == count.ppf(confidence) and count.sf(found.most) <= 1 - confidence < count.sf(found.most - 1)
        assert found.expected == pytest.approx(count.mean())
        tail = (1 - confidence) / 2
        assert (found.rate_low, found.rate_high) == pytest.approx(beta(1, n).ppf([tail, 1 - tail]))
    with pytest.raises(ValueError, match="one image to compare with"):
        suspect(np.ones(3), np.ones(0))


def test_copies_with_a_little_noise_are_suspected_one_by_one(digits: Path) -> None:
    """Finds the 5 noisy copies of training images among 100 samples, and 20 copies in a set of 20 samples."""
    images, random = digits_from(digits), np.random.default_rng(0)
    train, unseen, new = images[:20], images[20:380], images[400:495]
    noisy = (train.astype(int) + random.integers(-12, 13, train.shape)).clip(0, 255).astype(np.uint8)
    threshold = nearest(unseen, train)[1]
    few = suspect(nearest(np.concatenate([new, noisy[:5]]), train)[1], threshold)
    assert set(few.samples) >= {95, 96, 97, 98, 99} and few.beyond_chance
    index, distance = nearest(noisy, train)
    found = suspect(distance, threshold)
    assert set(found.samples) == set(range(20)) and found.beyond_chance
    assert index.tolist() == list(range(20)) and found.samples[0] == distance.argmin()


def test_new_images_are_suspected_as_often_as_promised(digits: Path) -> None:
    """Draws 300 samples and 300 unseen images 2,000 times, both from the 1,397 digits that are not for training.

    With another seed, the test would fail by chance in about 1 of 300 runs.
    """
    images, random = digits_from(digits), np.random.default_rng(0)
    distance, counts, warned = nearest(images[400:], images[:400])[1], [], 0
    for _ in range(2000):
        drawn = random.permutation(distance)
        found = suspect(drawn[:300], drawn[300:600])
        counts.append(len(found.samples))
        warned += found.beyond_chance
    assert np.mean(counts) == pytest.approx(300 / 301, abs=3 * np.std(counts) / np.sqrt(2000))
    assert warned <= 2000 * 0.05


def test_a_model_that_copies_is_caught_and_its_data_is_not(
    made_report: Path, smoke: Callable[..., Params], tmp_path: Path
) -> None:
    """The page belongs to a sweep whose samples are the training images."""
    root = tmp_path / "copies"
    shutil.copytree(made_report, root)
    train = read_dataset(root).train
    for point in smoke().points():
        write_samples(root / paths.samples_file(point), np.asarray(train[:12]), point.steps, "m")
        scores = read_record(root / paths.metrics_file(point))
        write_record(root / paths.metrics_file(point), {**scores, "copying": 0.99, "copying_z": 6.0})
    report(smoke(), root)
    text = Reader((root / "report" / "index.html").read_text(encoding="utf-8")).text
    assert (
        "12 samples are suspected copies, but chance explains at most" in text and "A strong sign of memorising" in text
    )
    assert "suspected copy?" in text and "12 samples. A sample is suspected if its distance is below" in text
    assert "12 samples. Distance to the nearest training image: median 0.0, smallest 0.0. Exact copies: 12" in text
    assert "30 images of the test split" in text and "In 100% of the pairs" in text and "In 99% of the pairs" in text
    assert "No sign of memorising: by pixels" in Reader((made_report / "report" / "index.html").read_text()).text


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_a_network_trained_on_20_images_copies_them_and_one_trained_on_1000_does_not(
    digits: Path, smoke: Callable[..., Params], tmp_path: Path
) -> None:
    """Draws 64 samples from each network, after 2,000 training steps."""
    images, rarely = digits_from(digits), {"log_every": 2000, "validate_every": 2000}
    compute = {"checkpoint_every": 2000, "preview_every": 2000}
    params = smoke(training={"steps": 2000, "ema": 0.99, **rarely}, sweep={"steps": [50]}, compute=compute)
    warned = {}
    for count in (20, 1000):
        folder = tmp_path / str(count) / "dataset"
        folder.mkdir(parents=True)
        np.save(folder / "train.npy", images[:count])
        np.save(folder / "test.npy", images[1000:1360])
        counts = {"train": count, "test": 360}
        about = read_record(digits / "dataset" / "dataset.json") | {"counts": counts, "classes": None}
        about = {name: value for name, value in about.items() if name not in ("class_counts", "files", "record_sha256")}
        write_record(folder / "dataset.json", about, [folder / "train.npy", folder / "test.npy"])
        train(params, "cosine", folder.parent)
        sample_point(params, point := Point.parse("cosine-ddpm-50"), folder.parent)
        drawn = read_samples(folder.parent / paths.samples_file(point)).images
        found = suspect(*(nearest(part, images[:count])[1] for part in (drawn, images[1000:1360])))
        warned[count] = found.beyond_chance, len(found.samples)
    assert warned[20][0] and warned[20][1] > 32, warned
    assert not warned[1000][0], warned


def test_what_would_take_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    train = np.zeros((100, 1, 4, 4), np.uint8)
    assert affordable(1000, train) == 1000
    monkeypatch.setattr("ddpm.scores.copying.AFFORDED", 1600 * 7.5)
    assert [affordable(count, train) for count in (5, 7, 8, 1000)] == [5, 7, 7, 7]


def _normal(z: float) -> float:
    from statistics import NormalDist

    return NormalDist().cdf(z)


# The page as it is published.


def _sampled(rows: Sequence[Row]) -> dict[str, RunRecord]:
    return {
        f"sample@{row.point}": RunRecord(
            stage=f"sample@{row.point}",
            started=1_700_000_000_000,
            ended=1_700_000_010_000,
            seconds=10.0,
            unit="images",
            per_second=2.0 + index,
            peak_memory_bytes=500_000_000,
            device="cpu",
            hardware={"cpu": HOSTILE},
            git_commit="0123456789abcdef",
            git_dirty=True,
        )
        for index, row in enumerate(rows)
    }


def test_the_plot_of_the_published_copy_is_drawn_once(
    made_report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ddpm report`, the publisher and `ddpm promote` show the same picture."""
    rows = read_report(made_report)[1]
    records, slower = _sampled(rows), _sampled(rows[::-1])
    drawn: list[int] = []
    original = published_module.pictures

    def pictures(*arguments: Any) -> dict[str, str]:
        drawn.append(1)
        return original(*arguments)

    monkeypatch.setattr(published_module, "pictures", pictures)
    for given, expected in ((records, 1), (records, 1), (slower, 2)):
        assert published(rows, given, {}, root=tmp_path) == published(rows, given, {}, root=None)
        drawn.pop()  # drawn by the second call
        assert len(drawn) == expected
    (tmp_path / paths.SPEED_PLOT).write_text("{")
    published(rows, slower, {}, root=tmp_path)
    assert len(drawn) == 3


def test_the_published_copy_adds_lineage_and_nothing_else(page: str, made_report: Path) -> None:
    rows = read_report(made_report)[1]
    records = _sampled(rows)
    runs = {f"sample@{rows[0].point}": ("cosine-ddpm", "http://localhost:5000/#/runs/abc")}
    section = published(rows, records, runs, "the place", "http://x/#/chart?a='b'")
    whole = publish_with(page, {"published": section, "compared": "as before", "local": ""})
    reader = Reader(whole)
    for mark in ("compared", "published"):
        begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
        assert page.partition(begin)[0][-500:] == whole.partition(begin)[0][-500:]
        assert page.partition(end)[2][:500] == whole.partition(end)[2][:500]
    assert "run.js" in page and 'src="run.js"' not in whole and "as before" in reader.text
    for text in (
        "0123456789, edited",
        HOSTILE,
        "2023-11-14 22:13",
        "500 MB",
        "FID against seconds per image",
        "the place",
    ):
        assert text in reader.text
    assert "22:13" not in page
    for link in ("http://localhost:5000/#/runs/abc", "http://x/#/chart?a='b'"):
        assert ("a", {"href": link}) in reader.tags
    with pytest.raises(ValueError, match="no section"):
        publish_with("<html></html>", {"published": ""})
    old = "<!-- published: begin -->...<!-- published: end -->"  # a page of version 0.4 or older
    assert "new" in publish_with(old, {"published": "new", "compared": "...", "local": ""})


def test_the_front_against_seconds() -> None:
    points = [("slow", 3.0, 1.0), ("fast", 1.0, 9.0), ("dear", 4.0, 2.0), ("mid", 2.0, 3.0), ("worse", 2.0, 4.0)]
    rows = [
        Row(name, "linear", "ddim", 9, 9, 0.95, {"fid": fid}, 9, 9, 64, seconds=seconds)
        for name, seconds, fid in points
    ]
    assert fastest(rows) == ["fast", "mid", "slow"]


def test_scores_are_drawn_against_the_length_of_the_average(smoke: Callable[..., Params]) -> None:
    """Rows that differ in `ema` alone share a line. Other rows have no line, and without any line there is no picture."""
    samplers = {
        "short": {"sampler": "ddim", "ema": 0.05},
        "long": {"sampler": "ddim", "ema": 0.2},
        "single": {"sampler": "ddpm", "ema": 0.1},
        "usual": {"sampler": "ddim"},
    }
    params = smoke(
        training={"snapshot_every": 1},
        samplers=samplers,
        sweep={"schedules": ["cosine"], "samplers": list(samplers), "steps": [5]},
    )
    about = {"evaluations": 5, "confidence": 0.95, "images": 9, "reference_images": 9, "layer": 64}
    rows = [
        Row(
            f"cosine-{name}-5", "cosine", name, 5, values={"fid": fid, "fid_low": fid - 1, "fid_high": fid + 1}, **about
        )
        for name, fid in (("short", 3.0), ("long", 4.0), ("single", 5.0), ("usual", 6.0))
    ]
    pictures = _lengths(params, rows)
    assert pictures is not None
    drawn = base64.b64decode(pictures["wide"].partition(",")[2]).decode()
    assert drawn.count(">cosine, 5 steps<") == 1 and "single" not in drawn and "usual" not in drawn
    few = {"schedules": ["cosine"], "samplers": ["short", "single"], "steps": [5]}
    assert _lengths(smoke(training={"snapshot_every": 1}, samplers=samplers, sweep=few), rows) is None
