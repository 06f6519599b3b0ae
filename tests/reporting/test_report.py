"""Checks `report`: the rows, the best point, the pictures, and the removal of points that left the sweep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.errors import InputError
from ddpm.files import arrays, paths, records, samples
from ddpm.files.params import Params
from ddpm.files.scores import Row, read_report, write_influence
from ddpm.parameters import Point, Sweep
from ddpm.reporting.page import SHOWN
from ddpm.reporting.table import table
from ddpm.runtime.progress import Progress
from ddpm.scores.intervals import Estimate, simultaneous, standard_error
from ddpm.scores.metrics import METRICS
from ddpm.stages.report import report

SWEEP = Sweep(schedules=("linear", "cosine"), samplers=("ddpm", "ddim"), steps=(5, 20))
TRAINED = {"steps": 1234, "parameters": 56_789, "loss": 0.04567, "validation_loss": 0.05678}
FIDS = (9.0, 3.0, 4.0, 2.0, 8.0, 2.5, 3.5, 1.0)


def params(sweep: Sweep = SWEEP) -> Params:
    return Params.load(Path(__file__).parents[2] / "params.yaml").model_copy(update={"sweep": sweep})


def influence_of(point: Point, error: float) -> np.ndarray:
    """Returns influence values of 12 images with exactly this standard error. All points share half of their variance."""
    shared = np.random.default_rng(0).normal(size=12)
    own = np.random.default_rng(list(point.name.encode())).normal(size=12)
    values = shared + own - (shared + own).mean()
    return (values * (error / standard_error(values))).astype(np.float32)


def write_point(root: Path, point: Point, fid: float = 1.0, error: float = 0.01, **changes: Any) -> None:
    reach = 1.959964 * error
    scores = {"fid": fid, "fid_low": max(0.0, fid - reach), "fid_high": fid + reach, "confidence": 0.95}
    scores |= {"kid": 0.01, "kid_low": 0.006, "kid_high": 0.014, "kid_std": 0.002}
    scores |= {"precision": 0.6, "recall": 0.4, "evaluations": point.steps, "images": 12}
    scores |= {"reference_images": 30, "layer": 64, "reference": "version", "extractor_sha256": "weights"}
    scores |= {"samples": "sha", "model": "m"}
    values = root / paths.influence_file(point)
    write_influence(values, influence_of(point, error))
    records.write_record(root / paths.metrics_file(point), {"point": point.name} | scores | changes, [values])
    images = np.random.default_rng(len(point.name) + point.steps).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    samples.write_samples(root / paths.samples_file(point), images, point.steps, "m")


@pytest.fixture
def root(tmp_path: Path, digits: Path) -> Path:
    (tmp_path / "dataset").symlink_to(digits / "dataset")
    records.write_record(tmp_path / paths.auto_file(), {"precision": "float32", "compile": True})
    for point, fid in zip(params().points(), FIDS, strict=True):
        write_point(tmp_path, point, fid=fid, kid=fid / 100, kid_low=fid / 200, kid_high=fid / 50)
    return tmp_path


def written(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / paths.report_dir()).iterdir()}


def test_every_point_is_a_row_and_the_best_is_named(root: Path) -> None:
    best = report(params(), root)
    rows = records.read_csv(root / "report" / "points.csv")
    columns = "point schedule sampler steps evaluations fid fid_low fid_high kid kid_low kid_high kid_std"
    columns += " precision recall confidence images reference_images layer extractor"
    assert list(rows[0]) == columns.split()
    assert [row["point"] for row in rows] == [point.name for point in params().points()]
    assert [float(row["fid"]) for row in rows] == list(FIDS)
    assert best.to_json() == records.read_record(root / "report" / "best.json")
    assert (best.row.point, best.row.value, best.points) == ("cosine-ddim-20", 1.0, 8)
    assert (best.lowest, best.tied) == ("cosine-ddim-20", 1)
    assert read_report(root) == (best, [Row.from_json(row) for row in rows])
    assert sorted(written(root)) == ["best.json", "fid.png", "front.json", "index.html", "points.csv", "samples.png"]


def test_scores_that_only_some_points_have_are_empty_cells(root: Path) -> None:
    write_point(root, Point.parse("linear-ddpm-5"), fid=9.0, inception_score=7.5)
    best = report(params(), root)
    rows = records.read_csv(root / "report" / "points.csv")
    assert [row["inception_score"] for row in rows] == ["7.5", *[""] * 7]
    assert "fid_infinity" not in rows[0]
    assert "inception_score" not in best.row.values


def test_a_tie_goes_to_fewer_evaluations(root: Path) -> None:
    write_point(root, Point.parse("linear-ddim-5"), fid=1.0)
    assert report(params(), root).row.point == "linear-ddim-5"


def test_fewer_evaluations_must_be_nearly_as_good_for_sure(root: Path) -> None:
    """20 evaluations give FID 1.0, and 5 give FID 1.02. The margin is 5 %, and the bound for two points is one-sided."""
    cheaper, good = (Point.parse(name) for name in ("cosine-ddim-5", "cosine-ddim-20"))
    gap = influence_of(cheaper, 1.0).astype(float) - influence_of(good, 1.0)
    scale = (0.05 - 0.02) / (1.644854 * standard_error(gap))
    for factor, chosen in ((0.97, "cosine-ddim-5"), (1.03, "cosine-ddim-20")):
        write_point(root, cheaper, fid=1.02, error=scale * factor)
        write_point(root, good, fid=1.0, error=scale * factor)
        best = report(params(Sweep(schedules=("cosine",), samplers=("ddim",), steps=(5, 20))), root)
        assert (best.row.point, best.lowest) == (chosen, "cosine-ddim-20")
        assert best.row.value == (1.02 if factor < 1 else 1.0)
        assert "at most 5% worse than the truly best point" in (root / "report/index.html").read_text() or factor > 1


def test_the_front_and_the_best_for_each_budget(root: Path) -> None:
    fids = {"linear-ddpm-5": 9.0, "linear-ddim-5": 4.0, "cosine-ddpm-5": 8.0, "cosine-ddim-5": 3.5}
    fids |= {"linear-ddpm-20": 3.0, "linear-ddim-20": 2.9, "cosine-ddpm-20": 2.99, "cosine-ddim-20": 2.0}
    evaluations = {"linear-ddpm-20": 100, "linear-ddim-20": 50, "cosine-ddpm-20": 20, "cosine-ddim-20": 1001}
    for name, fid in fids.items():
        point = Point.parse(name)
        write_point(root, point, fid=fid, error=0.1, evaluations=evaluations.get(name, point.steps))
    report(params(), root)
    found = records.read_record(root / "report" / "front.json")
    assert (found["metric"], found["confidence"]) == ("fid", 0.95)
    best = {budget: (entry["point"], entry["lowest"], entry["tied"]) for budget, entry in found["budgets"].items()}
    tie = (
        "linear-ddim-20",
        "linear-ddim-20",
    )  # 2.99 with 20 evaluations may equal 2.9 with 50, but may also be 5 % worse
    assert best == {
        "10": ("cosine-ddim-5", "cosine-ddim-5", 1),
        "20": ("cosine-ddpm-20", "cosine-ddpm-20", 1),
        "50": (*tie, 2),
        "100": (*tie, 3),
        "1000": (*tie, 3),
    }
    names = ["cosine-ddim-5", "cosine-ddpm-20", "linear-ddim-20", "cosine-ddim-20"]
    assert [step["point"] for step in found["front"]] == names
    assert [step["evaluations"] for step in found["front"]] == [5, 20, 50, 1001]
    assert [step.get("significant") for step in found["front"]] == [None, True, False, True]
    step = found["front"][1]
    assert step["fid_high"] == pytest.approx(2.99 + 0.1959964)
    own = [influence_of(Point.parse(name), 0.1).astype(float) for name in names[:2]]
    scores = [Estimate(fids[point.name], 0.1, influence_of(point, 0.1)) for point in params().points()]
    reach = simultaneous(scores)
    reach *= standard_error(own[1] - own[0])
    expected = (2.99 - 3.5, 2.99 - 3.5 - reach, 2.99 - 3.5 + reach)
    assert (step["difference"], step["difference_low"], step["difference_high"]) == pytest.approx(expected, rel=1e-6)
    assert step["paired"]


@pytest.mark.parametrize("fault", ["missing", "of other images", "not finite"])
def test_influence_values_that_do_not_belong_are_refused(root: Path, fault: str) -> None:
    path = root / paths.influence_file(Point.parse("linear-ddim-5"))
    if fault == "missing":
        path.unlink()
    else:
        write_influence(path, np.zeros(11) if fault == "of other images" else np.full(12, np.nan))
        point = Point.parse("linear-ddim-5")
        records.write_record(
            root / paths.metrics_file(point), records.read_record(root / paths.metrics_file(point)), [path]
        )
    with pytest.raises(InputError, match=r"linear-ddim-5.*(evaluate|finite)"):
        report(params(), root)
    assert not (root / paths.report_dir()).exists()


def test_an_interval_that_reaches_0_is_drawn(root: Path) -> None:
    from PIL import Image

    report(params(), root)
    first = np.asarray(Image.open(root / "report" / "fid.png").convert("L"))
    write_point(root, Point.parse("cosine-ddim-20"), fid=1.0, error=2.0)
    assert records.read_record(root / paths.metrics_file(Point.parse("cosine-ddim-20")))["fid_low"] == 0.0
    report(params(), root)
    second = np.asarray(Image.open(root / "report" / "fid.png").convert("L"))
    assert first.shape == second.shape
    assert not np.array_equal(first, second)


def test_same_input_same_bytes_whatever_the_readers_matplotlib_says(
    root: Path, tmp_path_factory: Any, monkeypatch: Any
) -> None:
    import matplotlib

    report(params(), root)
    first = written(root)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    report(params(), root)
    assert written(root) == first
    for name in ("fid.png", "samples.png"):
        assert b"tEXt" not in first[name] and b"tIME" not in first[name]
    assert matplotlib.rcParams["font.size"] == 20.0


def test_samples_lie_side_by_side_pixel_for_pixel(root: Path) -> None:
    from PIL import Image

    report(params(), root)
    picture = np.asarray(Image.open(root / "report" / "samples.png").convert("RGB"))
    points = params().points()
    height = len(picture) // len(points)
    for index, point in enumerate(points):
        images = samples.read_samples(root / paths.samples_file(point)).images
        strip = arrays.grid(images[:SHOWN], columns=SHOWN)[0]
        row = picture[index * height : (index + 1) * height]
        np.testing.assert_array_equal(row[-strip.shape[0] :, -strip.shape[1] :, 0], strip)
        assert row[:, : -strip.shape[1]].min() < 100  # the row has a label


def lock_outputs(root: Path, without: str) -> None:
    """Writes a dvc.lock as DVC does, with every output except those of one point."""
    stages = {}
    for folder, stage in (
        ("samples", "sample"),
        ("metrics", "evaluate"),
        ("metrics/train", "train"),
        ("metrics/likelihood", "likelihood"),
    ):
        for path in (root / folder).iterdir():
            name = path.name.split(".")[0]
            if path.is_file() and name != without and not path.name.endswith(".run.json"):
                md5 = hashlib.md5(path.read_bytes()).hexdigest()
                entry = {"path": path.relative_to(root).as_posix(), "hash": "md5", "md5": md5}
                stages.setdefault(f"{stage}@{name}", {"outs": []})["outs"].append(entry)
    (root / "dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": stages}))


def test_what_has_left_the_sweep_goes_and_nothing_else(root: Path, bound_of: Callable[[str], dict[str, Any]]) -> None:
    for name in ("cosine", "linear", "sqrt"):
        curves = [root / paths.history_file(name), root / paths.losses_by_time_file(name)]
        records.write_csv(curves[0], [{"step": 1, "loss": 0.5, "validation_loss": ""}])
        records.write_csv(curves[1], [{"t": 1, "loss_simple": 0.25}])
        records.write_record(root / paths.training_metrics_file(name), {"schedule": name, **TRAINED}, curves)
        table = root / paths.likelihood_curve_file(name)
        records.write_csv(table, [{"time": 1, "rate": 0.5, "distortion": 40.0}])
        records.write_record(root / paths.likelihood_file(name), bound_of(name), [table])
        records.write_json(root / paths.run_file(paths.likelihood_file(name)), {})
    for point in (*params().points(), Point.parse("sqrt-ddim-20")):
        write_point(root, point)
        (root / paths.samples_file(point)).with_suffix(".png").write_bytes(b"preview")
        for output in (paths.samples_file(point), paths.metrics_file(point)):
            records.write_json(root / paths.run_file(output), {})
    others = ["samples/mine.npz", "samples/linear-ddim-050.npz", "samples/linear-ddim-7.npy", "samples/.keep"]
    others += ["metrics/notes.txt", "metrics/linear-ddim.json", "metrics/train/sqrt.txt", "metrics/train/My.csv"]
    others += ["models/sqrt/model.json", "samples/linear-ddpm-7.npz/inside"]
    for other in others:
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_text("keep")
    alone = Point.parse("linear-unipc-9")  # the user made this point by hand, so DVC has no copy
    write_point(root, alone)
    files = (paths.samples_file(alone), paths.metrics_file(alone), paths.influence_file(alone))
    others += [file.as_posix() for file in files]
    lock_outputs(root, without=alone.name)
    narrow = Sweep(schedules=("linear",), samplers=("ddpm", "ddim"), steps=(20,))
    seen: list[Progress] = []
    report(params(narrow), root, seen.append)
    left = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    stays = {f"report/{name}" for name in written(root)} | {"auto.json", *others}
    stays |= {f"metrics/train/linear{ending}" for ending in (".json", ".csv", ".by_time.csv")}
    stays |= {f"metrics/likelihood/linear.{suffix}" for suffix in ("json", "csv", "run.json")}
    for name in ("linear-ddpm-20", "linear-ddim-20"):
        stays |= {f"samples/{name}.npz", f"samples/{name}.png", f"samples/{name}.run.json"}
        stays |= {f"metrics/{name}.json", f"metrics/{name}.run.json", f"metrics/{name}.influence.npy"}
    assert left == stays | {"dvc.lock"}
    gone, kept = [progress.message for progress in seen if progress.message]
    assert "cosine, cosine-ddim-20, cosine-ddim-5, cosine-ddpm-20, cosine-ddpm-5 and 4 more" in gone
    assert "kept" in kept and "linear-unipc-9" in kept
    seen.clear()
    report(params(narrow), root, seen.append)
    assert [progress.message for progress in seen if progress.message] == [kept]
    assert seen[-1].done == seen[-1].total == 2


def test_missing_scores_are_named_and_nothing_is_removed_or_written(root: Path) -> None:
    stale = root / paths.metrics_file(Point.parse("sqrt-ddim-20"))
    records.write_json(stale, {})
    missing = [Point.parse(name) for name in ("linear-ddpm-5", "cosine-ddim-20")]
    for point in missing:
        (root / paths.metrics_file(point)).unlink()
    with pytest.raises(InputError, match="no scores of linear-ddpm-5, cosine-ddim-20;"):
        report(params(), root)
    assert stale.exists()
    assert not (root / paths.report_dir()).exists()


def test_scores_of_another_kind_are_refused(root: Path) -> None:
    path = root / paths.metrics_file(Point.parse("linear-ddpm-5"))
    records.write_record(path, {"point": "linear-ddpm-5", "fid": 1.0})
    with pytest.raises(
        InputError,
        match=r"linear-ddpm-5\.json: evaluations, images, .*, kid.*: missing",
    ):
        report(params(), root)


def test_scores_under_two_protocols_are_pointed_out(root: Path) -> None:
    write_point(root, Point.parse("linear-ddpm-5"), layer=2048)
    seen: list[Progress] = []
    report(params(), root, seen.append)
    assert [progress.message for progress in seen if "protocol" in progress.message]
    assert records.read_csv(root / "report" / "points.csv")[0]["layer"] == "2048"


def test_scores_by_a_judge_with_other_weights_are_pointed_out(root: Path) -> None:
    """DVC does not track the file of the weights, so replacing that file reruns nothing."""
    for index, point in enumerate(params().points()):
        judge = {"extractor": "clip", "layer": 768, "extractor_sha256": "old" if index else "new"}
        values = root / paths.influence_file(point)
        scores = {"cmmd": 1.0, "cmmd_low": 0.9, "cmmd_high": 1.1, "judges": {"cmmd": judge}}
        write_point(root, point)
        content = records.read_record(root / paths.metrics_file(point)) | scores
        del content["files"]
        write_influence(values, np.stack([influence_of(point, 0.01)] * 2))
        records.write_record(root / paths.metrics_file(point), content, [values])
    seen: list[Progress] = []
    report(params(), root, seen.append)
    assert [progress.message for progress in seen if "protocol" in progress.message]


@pytest.mark.parametrize("judge", [{}, 3, {"extractor_sha256": 3}])
def test_a_judge_without_the_hash_of_its_weights_is_refused(root: Path, judge: Any) -> None:
    cmmd = {"cmmd": 1.0, "cmmd_low": 0.9, "cmmd_high": 1.1}
    write_point(root, Point.parse("linear-ddpm-5"), judges={"cmmd": judge}, **cmmd)
    with pytest.raises(InputError, match=r"linear-ddpm-5\.json: no sound value of judges"):
        report(params(), root)


def test_the_table_is_aligned_with_the_best_point_last() -> None:
    found = {
        "linear-ddim-20": ((0.62351, 0.71234, 0.8), (0.0008, 0.00123, 0.0016)),
        "linear-ddpm-1000": ((11.5, 12.3, 13.1), (0.08, 0.1, 0.12)),
        "linear-ddim-10": ((0.0, 0.71234, 1.5), (-0.0005, -0.0001, 0.0003)),
    }
    names = [*METRICS["fid"].names, *METRICS["kid"].names]
    rows = []
    for name, (fid, kid) in found.items():
        point, values = Point.parse(name), dict(zip(names, (*fid, *kid), strict=True))
        rows.append(Row(name, point.schedule, point.sampler, point.steps, point.steps, 0.95, values, 9, 9, 64))
    assert table(rows).splitlines() == [
        "point             evaluations     FID   95% interval      KID       95% interval",
        "linear-ddpm-1000        1,000    12.3   11.5 to 13.1      0.1       0.08 to 0.12",
        "linear-ddim-20             20  0.7123  0.6235 to 0.8   0.0012   0.0008 to 0.0016",
        "linear-ddim-10             10  0.7123       0 to 1.5  -0.0001  -0.0005 to 0.0003",
    ]
