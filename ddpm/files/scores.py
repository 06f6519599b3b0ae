"""Reads, checks and writes scores: metrics/POINT.json, influence values (see scores.intervals), and the report's files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddpm.errors import InputError
from ddpm.files import arrays, atomic, paths, records
from ddpm.parameters import USUAL_EXTRACTOR
from ddpm.scores.conclusions import Trainings
from ddpm.scores.extractors import EXTRACTORS, Extractor
from ddpm.scores.intervals import Estimate, quantile
from ddpm.scores.metrics import HEADLINE, METRICS, RANKING, entries

if TYPE_CHECKING:
    from ddpm.parameters import Point

# The entries of metrics/POINT.json other than the metrics.
COUNTS = ("evaluations", "images", "reference_images", "layer")
HASHES = ("reference", "extractor_sha256", "samples", "model")
OBJECTS = ("evaluation", "files", "judges")
PROTOCOL = (*HASHES[:2], "layer", "images", "reference_images")
MOST = 2**31 - 1  # the largest count
CONFIDENCES = (0.01, 0.9999)  # the lowest and the highest confidence
# The entries that a comparison of two scores needs.
COMPARED = (HEADLINE, f"{HEADLINE}_high", "confidence", "evaluations", *PROTOCOL)


@dataclass(frozen=True)
class Scores:
    """The content of metrics/POINT.json: the scores of a point, with hashes of the inputs.

    Args:
        point: the name of the point.
        evaluations: network evaluations per image.
        images, reference_images: the number of images compared.
        layer: the layer of the extractor.
        reference: sha256 of the dataset.
        extractor_sha256: hash of everything that decides the features, such as a weights file.
        confidence: the confidence of all intervals.
        values: the numbers of all metrics that were computed, by name, such as fid and fid_low.
        samples: sha256 of the sample set.
        model: sha256 of the weights that drew the samples.
        features: the name of the loaded extractor (see Features.name).
        evaluation: the section `evaluation` of params.yaml.
        files: sha256 of the influence values, by the name of the file.
        judges: for each judge in evaluation.judges, by name: the extractor, its layer and its hash. The file of influence
            values has the judges in the same order.
    """

    point: str
    evaluations: int
    images: int
    reference_images: int
    layer: int
    reference: str
    extractor_sha256: str
    confidence: float
    values: Mapping[str, float]
    samples: str = ""
    model: str = ""
    features: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    judges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any], needed: Collection[str] = ()) -> Scores:
        """Checks the content of metrics/POINT.json.

        Args:
            found: the content.
            needed: entries that must be present. If empty, the entries that every evaluation writes must be present.

        Raises:
            ValueError: an entry is missing or has an impossible value.
        """
        known = entries()
        # Drops a negative value, which version 0.3 wrote for few images.
        if isinstance(old := found.get("fid_infinity"), float) and old < 0:
            found = {name: value for name, value in found.items() if name != "fid_infinity"}
        needed = needed or [
            *COUNTS,
            *(name for name, entry in known.items() if not entry.optional),
            "confidence",
            *HASHES,
        ]
        if absent := [name for name in needed if name not in found]:
            raise ValueError(f"{', '.join(absent)}: missing")
        optional = [name for name in (*known, *OBJECTS) if name in found and name not in needed]
        if wrong := _unsound(found, [*needed, *optional]):
            raise ValueError(f"no sound value of {', '.join(wrong)}")
        own = {name: found[name] for name in (*COUNTS, *HASHES, *OBJECTS, "confidence") if name in found}
        values = {name: found[name] for name in known if name in found}
        if absent := [name for judge in own.get("judges", {}) for name in _entry_names(judge) if name not in values]:
            raise ValueError(f"{', '.join(absent)}: missing")
        return cls(point=str(found.get("point", "")), features=str(found.get("extractor", "")), values=values, **own)

    def to_json(self) -> dict[str, Any]:
        about = asdict(self)
        if not self.judges:
            del about["judges"]
        return {"point": about.pop("point"), **about.pop("values"), "extractor": about.pop("features"), **about}

    @property
    def extractor(self) -> Extractor:
        """The extractor that computed these scores. Raises InputError if this version of ddpm lacks the extractor."""
        return extractor(str(self.evaluation.get("extractor", USUAL_EXTRACTOR)))

    def estimate(self, influence: NDArray[np.floating] | None = None, name: str = HEADLINE) -> Estimate:
        """Returns the score `name`, which is HEADLINE or a key of `judges`, with its standard error and `influence`."""
        value = self.values[name]
        return Estimate(value, (self.values[f"{name}_high"] - value) / quantile(self.confidence), influence)


def _entry_names(judge: str) -> tuple[str, ...]:
    """Returns the names of a judge's numbers in metrics/POINT.json.

    For an unknown judge, returns the judge's own name, so that `from_json` reports this name as missing.
    """
    return METRICS[judge].names if judge in METRICS else (judge,)


def extractor(name: str) -> Extractor:
    """Returns the extractor with this name. Raises InputError for an unknown name."""
    if name not in EXTRACTORS:
        raise InputError(f"no extractor '{name}'; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]


def read_scores(root: Path, point: Point) -> Scores:
    """Reads metrics/POINT.json. Raises InputError for the scores of another point, a missing entry, or an impossible value."""
    path = root / paths.metrics_file(point)
    content, again = records.read_record(path), f"run `ddpm evaluate {point.name}` again"
    if content.get("point") != point.name:
        raise InputError(f"{path}: holds the scores of {content.get('point')}, not of {point.name}; {again}")
    try:
        return Scores.from_json(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}; {again}") from None


def write_scores(root: Path, point: Point, scores: Scores, influence: NDArray[np.floating]) -> Scores:
    """Writes metrics/POINT.json and POINT.influence.npy. Returns the scores as `read_scores` would read them."""
    values = root / paths.influence_file(point)
    write_influence(values, influence)
    content = {name: value for name, value in scores.to_json().items() if name != "files"}
    return Scores.from_json(records.write_record(root / paths.metrics_file(point), content, (values,)))


def _unsound(found: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Returns the names whose values are impossible: of a wrong type, out of range, or outside their interval."""
    wrong = [name for name in names if not _sound(name, found[name])]
    for entry in {id(entry): entry for entry in entries().values()}.values():
        bounds = [found[name] for name in entry.names if name in names and name not in wrong]
        if bounds != sorted(bounds):
            wrong.append(entry.name)
    return wrong


def _sound(name: str, value: Any) -> bool:
    if name in HASHES:
        return isinstance(value, str)
    if name in OBJECTS:
        return isinstance(value, dict) and (name != "judges" or all(map(_is_judge, value.values())))
    if name in COUNTS:
        return type(value) is int and 1 <= value <= MOST
    known = entries()
    low, high = (known[name].low, known[name].high) if name in known else CONFIDENCES
    return type(value) in (int, float) and low <= value <= high


def _is_judge(about: Any) -> bool:
    return isinstance(about, dict) and isinstance(about.get("extractor_sha256"), str)


# The report.

PICTURE = f"{HEADLINE}.png"  # the file in report/ with the plot of all points


@dataclass(frozen=True)
class Row:
    """A row of points.csv: a point of the sweep with its scores.

    Args:
        point: the name of the point.
        evaluations: network evaluations per image.
        confidence: the confidence of all intervals.
        values: the numbers of the point's metrics, by name, such as fid and fid_low.
        extractor: a key of EXTRACTORS.
        seconds: the time to draw one image, or None; points.csv has no such column.
    """

    point: str
    schedule: str
    sampler: str
    steps: int
    evaluations: int
    confidence: float
    values: Mapping[str, float]
    images: int
    reference_images: int
    layer: int
    extractor: str = USUAL_EXTRACTOR
    seconds: float | None = None

    @classmethod
    def of(cls, point: Point, scores: Scores) -> Row:
        about = {name: getattr(scores, name) for name in (*COUNTS, "confidence", "values")}
        return cls(point.name, point.schedule, point.sampler, point.steps, extractor=scores.extractor.name, **about)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Row:
        """Reads a row of points.csv, whose cells are text, or the row in best.json. Raises ValueError."""
        known = entries()
        try:
            values = {name: float(found[name]) for name in known if found.get(name) not in (None, "")}
            counts = {name: int(found[name]) for name in (*COUNTS, "steps")}
            names = {name: str(found[name]) for name in ("point", "schedule", "sampler")}
            scored = cls(**names, **counts, confidence=float(found["confidence"]), values=values)  # type: ignore[arg-type]
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: missing") from None
        if absent := [name for name in RANKING.names if name not in values]:
            raise ValueError(f"{', '.join(absent)}: missing")
        return replace(scored, extractor=str(found.get("extractor", USUAL_EXTRACTOR)))

    def to_json(self) -> dict[str, Any]:
        """Returns the row by column names, without the entries that the point lacks."""
        about = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seconds"}
        return {
            **{name: about.pop(name) for name in ("point", "schedule", "sampler", "steps", "evaluations")},
            **about.pop("values"),
            **about,
        }

    @property
    def value(self) -> float:
        """The headline score."""
        return self.values[HEADLINE]

    @property
    def low(self) -> float:
        return self.values[f"{HEADLINE}_low"]

    @property
    def high(self) -> float:
        return self.values[f"{HEADLINE}_high"]

    @property
    def text(self) -> str:
        """The headline score and its interval as text."""
        return f"{RANKING.title} {RANKING.text(self.value)} ({RANKING.text(self.low)} to {RANKING.text(self.high)})"


def columns(rows: Sequence[Row]) -> list[str]:
    """Returns the columns of points.csv: every entry that any of these points has."""
    there = {name for row in rows for name in row.to_json()}
    first = list(rows[0].to_json())
    scores = [name for name in entries() if name in there]
    before = [name for name in first if name not in entries()]
    return [*before[:5], *scores, *before[5:]]


@dataclass(frozen=True)
class Best:
    """The content of best.json: the best point of the sweep, chosen by `conclusions.choose`.

    Args:
        row: the best point and its scores, as in points.csv (see `conclusions.choose`).
        points: the number of points.
        lowest: the name of the point with the best score. It may lead by chance, and it may differ from the best point.
        tied: the number of points that cannot be told apart from the truly best point.
        trainings: the scores of all trainings of the best point's schedule, sampled with its sampler and its number of
            steps; None in files from before 0.4.0.
    """

    row: Row
    points: int
    lowest: str
    tied: int
    trainings: Trainings | None = None

    @property
    def line(self) -> str:
        """The best point in one line, which a run prints at its end."""
        return f"best: {self.row.point}, {self.row.text}"

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Best:
        """Raises ValueError."""
        try:
            return cls(
                Row.from_json(found),
                int(found["points"]),
                str(found["lowest"]),
                int(found["tied"]),
                records.build(Trainings, found["trainings"], "trainings") if "trainings" in found else None,
            )
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: missing") from None

    def to_json(self) -> dict[str, Any]:
        about = {"points": self.points, "lowest": self.lowest, "tied": self.tied}
        return self.row.to_json() | about | ({"trainings": asdict(self.trainings)} if self.trainings else {})


@dataclass(frozen=True)
class Standing:
    """A point in front.json, with its headline score."""

    point: str
    evaluations: int
    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        about = asdict(self)
        score = {name: about.pop(key) for name, key in zip(RANKING.names, ("low", "value", "high"), strict=True)}
        return {"point": about.pop("point"), "evaluations": about.pop("evaluations"), **score, **about}


@dataclass(frozen=True)
class Answer(Standing):
    """The best point within a budget of network evaluations (see `conclusions.choose`).

    Args:
        lowest: the name of the point with the best score. It may differ from the best point.
        may_be_best: the names of the points that cannot be told apart from the truly best point.
    """

    lowest: str
    may_be_best: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "tied": len(self.may_be_best)}


@dataclass(frozen=True)
class Gap:
    """The score of a point minus the score of the previous point on the front.

    Args:
        difference, difference_low, difference_high: the difference and its interval.
        significant: whether the interval excludes zero.
        paired: whether the images were compared in pairs.
    """

    difference: float
    difference_low: float
    difference_high: float
    significant: bool
    paired: bool


@dataclass(frozen=True)
class FrontStep(Standing):
    """A point of the front: no point with the same number of evaluations or fewer has a better score.

    Args:
        gap: the difference from the previous point; None for the first point of the front.
    """

    gap: Gap | None

    def to_json(self) -> dict[str, Any]:
        about = super().to_json()
        return about | (about.pop("gap") or {})


@dataclass(frozen=True)
class Front:
    """The content of front.json.

    Args:
        confidence: the confidence of all intervals.
        margin: how much worse than the best point a cheaper point may be, as a share of the best score.
        budgets: the best point for each limit on evaluations.
        steps: the points of the front, sorted by evaluations.
    """

    confidence: float
    margin: float
    budgets: Mapping[int, Answer]
    steps: Sequence[FrontStep]

    def to_json(self) -> dict[str, Any]:
        budgets = {str(budget): answer.to_json() for budget, answer in self.budgets.items()}
        front = [step.to_json() for step in self.steps]
        about = {"metric": HEADLINE, "confidence": self.confidence, "margin": self.margin}
        return {**about, "budgets": budgets, "front": front}


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes points.csv."""
    names = columns(rows)
    records.write_csv(path, [{name: row.get(name) for name in names} for row in (row.to_json() for row in rows)])


def read_report(root: Path) -> tuple[Best, list[Row]]:
    """Reads the report and verifies its files against the hashes in front.json. Raises InputError.

    Returns:
        The content of best.json, and the rows of points.csv ([] if front.json does not name that file).
    """
    folder = root / paths.report_dir()
    record = folder / "front.json"
    front = records.read_record(record)
    for name in front["files"]:
        records.read_described(record, front["files"], folder / name)
    table = folder / "points.csv"
    try:
        rows = [Row.from_json(row) for row in records.read_csv(table)] if table.name in front["files"] else []
    except ValueError as error:
        raise InputError(f"{table}: {error}; make it again (dvc repro)") from None
    return read_best(root), rows


def read_best(root: Path) -> Best:
    """Reads best.json alone. Raises InputError."""
    path = root / paths.report_dir() / "best.json"
    try:
        return Best.from_json(records.read_record(path))
    except ValueError as error:
        raise InputError(f"{path}: {error}; make it again (dvc repro)") from None


# Influence values.


def read_point_influence(root: Path, point: Point, scores: Scores, name: str = HEADLINE) -> NDArray[np.float32]:
    """Reads the influence values [N] of the score `name`: HEADLINE, or a key of `scores.judges`. Raises InputError."""
    influence: NDArray[np.float32] = read_all_influence(root, point, scores)[[HEADLINE, *scores.judges].index(name)]
    return influence


def read_all_influence(root: Path, point: Point, scores: Scores) -> NDArray[np.float32]:
    """Reads the influence values [1 + J, N] of a point: first of the score HEADLINE, then of the J scores in `scores.judges`.

    Verifies that the values belong to `scores`. Raises InputError.
    """
    path = root / paths.influence_file(point)
    return read_influence(path, str(scores.files.get(path.name)), 1 + len(scores.judges))


def write_influence(path: Path, influence: NDArray[np.floating]) -> None:
    """Writes influence values as float32: [N] in the order of the images, or [1 + J, N] with J judges."""
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        arrays._write_array(file, influence.astype(np.float32))


def read_influence(path: Path, digest: str, rows: int = 1) -> NDArray[np.float32]:
    """Reads the influence values of a headline score and its judges, float32 [rows, N].

    Args:
        path: the file.
        digest: the expected sha256 of the file.
        rows: the number of scores in the file.

    Raises:
        InputError: the file is missing, damaged, or has another sha256.
    """
    try:
        # protects: tests/files/test_bad_input.py::test_what_a_report_reads[another point's influence]
        if path.is_file() and records.sha256(path) != digest:
            raise ValueError("its sha256 is not the one recorded with the scores")
        influence: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(influence, np.ndarray) or influence.dtype != np.float32:
            raise ValueError("expected float32 values")
        if influence.ndim != min(rows, 2) or (rows > 1 and len(influence) != rows):
            raise ValueError(
                f"expected float32 values, one per image for each of {rows} score(s); found shape {influence.shape}"
            )
        influence = np.array(np.atleast_2d(influence))
        if not np.isfinite(influence).all():
            raise ValueError("not all values are finite")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `ddpm evaluate` writes it beside the scores") from None
    except Exception as error:  # noqa: BLE001 - numpy raises half a dozen types on a damaged file
        raise InputError(
            f"{path}: not the influence values of a point: {arrays._unreadable(error)}; evaluate the point again"
        ) from None
    return influence
