"""Damages every file that the pipeline reads. The verb that reads the file refuses in one line, or writes the correct result.

A file has one bit flipped at one of three places, is cut off, is emptied, or is replaced by a valid file of the same kind.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ddpm import cli, tracking
from ddpm.files import models, paths
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.runtime.progress import Progress
from ddpm.stages.evaluate import evaluate
from ddpm.stages.likelihood import likelihood
from ddpm.stages.prepare import prepare
from ddpm.stages.report import report
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke.yaml"
LOCK = (RECIPE.parents[1] / "dvc.lock").read_text(encoding="utf-8")
POINT, OTHER = Point.parse("cosine-ddim-5"), Point.parse("cosine-ddim-2")
NOWHERE = "http://127.0.0.1:9"  # no server listens here: these tests do not check what a stage publishes

pytestmark = pytest.mark.timeout(120)


class Stopped(Exception):
    """Raised by a test in the middle of a stage."""


def write_params(root: Path, seed: int = 0, imported: str | None = None) -> Params:
    raw = YAML(typ="safe").load(RECIPE.read_text(encoding="utf-8"))
    raw["seed"], raw["training"]["steps"], raw["sampling"]["batch"] = seed, 24, 32
    raw["compute"]["checkpoint_every"] = 8
    raw["likelihood"] |= {"images": 8, "times": 4}
    if imported:
        raw["schedules"]["hub"] = {"schedule": "cosine", "imported": imported}
    with (root / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(raw, file)
    return Params.load(root / "params.yaml")


def run_stages(params: Params, root: Path) -> None:
    prepare(params, root)
    train(params, "cosine", root)
    likelihood(params, "cosine", root)
    for point in params.points():
        sample_point(params, point, root)
        evaluate(params, point, root)
    report(params, root)


def stop_sampling(params: Params, point: Point, root: Path) -> None:
    """Interrupts a sampling after one of two batches."""

    def stop(progress: Progress) -> None:
        if progress.done > 32:
            raise Stopped

    with pytest.raises(Stopped):
        sample_point(params, point, root, stop)


@dataclass(frozen=True)
class Whole:
    """A checkout for tests to damage (`root`), an undamaged copy of that checkout (`pristine`), and another one (`other`)."""

    root: Path
    pristine: Path
    other: Path

    def mend(self) -> None:
        """Restores `root` from `pristine`. mlflow.db stays, because this process has it open."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("mlflow.db"):
                path.unlink()
        shutil.copytree(
            self.pristine, self.root, symlinks=True, ignore=shutil.ignore_patterns("mlflow.db*"), dirs_exist_ok=True
        )


@pytest.fixture(scope="module")
def whole(inception_cache: Path, empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets this variable for the whole process
        return make_whole(inception_cache, empty_database, tmp_path_factory.mktemp("whole"))


def make_whole(inception_cache: Path, empty_database: Path, base: Path) -> Whole:
    found = Whole(base / "root", base / "pristine", base / "other")
    for root, seed in ((found.other, 1), (found.root, 0)):
        (root / paths.CACHE).mkdir(parents=True)
        (root / paths.CACHE / "inception").symlink_to(inception_cache)
        run_stages(write_params(root, seed), root)
        (root / "dvc.lock").write_text(LOCK.replace("md5: 0", f"md5: {seed}"), encoding="utf-8")
    root = found.root
    shutil.copytree(root / paths.model_dir("cosine"), root / paths.imported_dir("hub"))
    params = write_params(root, imported=models.read_model_record(root / paths.imported_dir("hub")).weights_sha256)
    stop_sampling(params, replace(POINT, steps=3), root)
    stop_sampling(params, replace(POINT, steps=4), root)
    shutil.copyfile(empty_database, root / "mlflow.db")
    tracking.promote(params, root, say=lambda line: None)
    shutil.copytree(root, found.pristine, symlinks=True)
    return found


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    whole: Whole,
    empty_database: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Run:
    """Returns run("train", "cosine"), which gives exit code, standard output and error. `publish` gets an empty store."""
    whole.mend()
    monkeypatch.chdir(whole.root)
    for variable in ("DVC_STAGE", "DDPM_WATCH_PID"):
        monkeypatch.delenv(variable, raising=False)

    def run(*verb: str) -> tuple[int, str, str]:
        if verb[0] == "generate":
            monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        elif verb[0] == "publish":
            file = Path(tempfile.mkdtemp(dir=tmp_path)) / "mlflow.db"
            shutil.copyfile(empty_database, file)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
        monkeypatch.setattr(sys, "argv", ["ddpm", *verb])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@dataclass(frozen=True)
class Case:
    """A file to damage, and the verb that reads this file.

    Args:
        path: a pattern for the file.
        verb: the verb that reads the file, with its arguments.
        outputs: the files that the verb writes.
        swap: a valid file of the same kind, below `root`, or below the other checkout if the path begins with "other/".
    """

    path: str
    verb: tuple[str, ...]
    outputs: tuple[str, ...]
    swap: str


MODEL = ("models/cosine/model.safetensors", "models/cosine/model.json")
TRAINED = (*MODEL, "metrics/train/cosine.json", "metrics/train/cosine.csv", "metrics/train/cosine.by_time.csv")
SAMPLES = (str(paths.samples_file(POINT)),)
SCORES = (str(paths.metrics_file(POINT)), str(paths.influence_file(POINT)))
REPORT = tuple(f"report/{name}" for name in ("best.json", "front.json", "points.csv", "index.html"))
HALF = replace(POINT, steps=3).name
KEPT, KEPT_OTHER = f".cache/sampling/{HALF}", ".cache/sampling/cosine-ddim-4"
CASES = [
    Case("dataset/train.npy", ("train", "cosine", "--fresh"), TRAINED, "dataset/test.npy"),
    Case("dataset/train.npy", ("evaluate", POINT.name), SCORES, "other/dataset/train.npy"),
    Case("dataset/test.npy", ("likelihood", "cosine"), ("metrics/likelihood/cosine.json",), "dataset/train.npy"),
    Case("dataset/train-labels.npy", ("train", "cosine", "--fresh"), TRAINED, "other/dataset/train-labels.npy"),
    Case("dataset/test-labels.npy", ("report",), REPORT, "other/dataset/test-labels.npy"),
    Case("dataset/dataset.json", ("train", "cosine", "--fresh"), TRAINED, "other/dataset/dataset.json"),
    *(Case(path, ("sample", POINT.name), SAMPLES, f"other/{path}") for path in MODEL),
    *(Case(path, ("publish",), (), f"other/{path}") for path in MODEL),
    Case(".cache/training/*/000000024.safetensors", ("train", "cosine"), TRAINED, "000000016.safetensors"),
    Case(".cache/training/*/000000024.json", ("train", "cosine"), TRAINED, "000000016.json"),
    Case(f"{KEPT}/images.npy", ("sample", HALF), (f"samples/{HALF}.npz",), f"{KEPT_OTHER}/images.npy"),
    Case(f"{KEPT}/about.json", ("sample", HALF), (f"samples/{HALF}.npz",), f"{KEPT_OTHER}/about.json"),
    Case(f"{KEPT}/batches.jsonl", ("sample", HALF), (f"samples/{HALF}.npz",), f"{KEPT_OTHER}/batches.jsonl"),
    *(
        Case(SAMPLES[0], verb, outputs, f"samples/{OTHER.name}.npz")
        for verb, outputs in ((("evaluate", POINT.name), SCORES), (("report",), REPORT), (("publish",), ()))
    ),
    Case(SCORES[0], ("report",), REPORT, str(paths.metrics_file(OTHER))),
    Case(SCORES[0], ("publish",), (), f"other/{SCORES[0]}"),
    Case(SCORES[1], ("report",), REPORT, str(paths.influence_file(OTHER))),
    Case(".cache/features/*.npz", ("evaluate", POINT.name), SCORES, "other/.cache/features/*.npz"),
    *(
        Case(path, verb, outputs, f"other/{path}")
        for path in TRAINED[2:]
        for verb, outputs in ((("report",), REPORT), (("publish",), ()))
    ),
    *(
        Case(f"metrics/likelihood/cosine.{suffix}", verb, outputs, f"other/metrics/likelihood/cosine.{suffix}")
        for suffix in ("json", "csv")
        for verb, outputs in ((("report",), REPORT), (("publish",), ()))
    ),
    *(Case(path, ("publish",), (), f"other/{path}") for path in REPORT),
    *(
        Case("dvc.lock", verb, outputs, "other/dvc.lock")
        for verb, outputs in ((("report",), REPORT), (("publish",), ()))
    ),
    *(
        Case(
            path.replace("models/cosine", "imported/hub"), ("train", "hub"), ("models/hub/model.json",), f"other/{path}"
        )
        for path in MODEL
    ),
    *(
        Case(
            f"mlartifacts/*/models/*/artifacts/artifacts/checkpoint/{Path(path).name}",
            ("generate", "-n", "2", "--steps", "2", "--model", "models:/ddpm-digits@champion"),
            ("grid.png",),
            f"other/{path}",
        )
        for path in MODEL
    ),
]
DAMAGES = ("flipped first", "flipped last", "flipped", "cut off", "emptied", "swapped")


def found(root: Path, pattern: str) -> Path:
    (path,) = root.glob(pattern)
    return path


def damage(whole: Whole, case: Case, how: str) -> None:
    path = found(whole.root, case.path)
    content = bytearray(path.read_bytes())
    choice = random.Random(f"{case.path} {how}")
    if how == "swapped":
        away = case.swap.startswith("other/")
        source = whole.other if away else whole.root if "/" in case.swap else path.parent
        content = bytearray(found(source, case.swap.removeprefix("other/")).read_bytes())
    elif how == "emptied":
        content.clear()
    elif how == "cut off":
        del content[choice.randrange(len(content)) :]
    else:
        where = {"flipped first": 0, "flipped last": len(content) - 1}.get(how, choice.randrange(len(content)))
        content[where] ^= 1 << choice.randrange(8)
    assert bytes(content) != path.read_bytes()
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def good() -> dict[tuple[str, ...], Any]:
    """Caches what each verb writes in an undamaged checkout: its outputs, or its message about what it published."""
    return {}


def written(whole: Whole, case: Case, said: str) -> Any:
    return [(whole.root / output).read_bytes() for output in case.outputs] or said.partition("added")[2]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path} by {case.verb[0]}")
def test_damage_is_refused_or_mended(
    whole: Whole, run: Run, good: dict[tuple[str, ...], Any], case: Case, how: str
) -> None:
    if case.verb not in good:
        code, published, said = run(*case.verb)
        assert (code, said) == (0, "")
        good[case.verb] = written(whole, case, published)
        whole.mend()
    damage(whole, case, how)
    code, published, said = run(*case.verb)
    if "is not published, since its model or samples have changed" in published:
        assert how == "swapped"  # the file belongs to another model, so it is not published
    elif code == 0:
        assert written(whole, case, published) == good[case.verb]
    else:
        assert code == 2, said
        assert said.startswith("ddpm: ") and said.count("\n") == 1 and "Traceback" not in said
