"""Checks that the pictures of `ddpm generate` show the library's results, and that wrong requests give one line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ddpm import SAMPLERS, SCHEDULES, encode, sample, tracking
from ddpm.cli import app
from ddpm.errors import InputError
from ddpm.files import checkpoint, dataset, records, scores
from ddpm.files.params import Params
from ddpm.runtime.drawing import draw, to_uint8
from ddpm.stages.train import train
from ddpm.tools.generate import _other_sampler, generate
from ddpm.tools.schedules import schedules
from ddpm.training.fit import scaled

MODEL = "models/cosine"


@pytest.fixture
def params(smoke: Callable[..., Params]) -> Params:
    return smoke(training={"steps": 10}, samplers={"ddpm": {"sampler": "ddpm"}, "heun": {"sampler": "heun"}})


@pytest.fixture(scope="module")
def trained(digits: Path, smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    (root / "dataset").symlink_to(digits / "dataset")
    train(smoke(training={"steps": 10}), "cosine", root)
    return root


@pytest.fixture(autouse=True)
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def cells(path: Path, columns: int) -> np.ndarray:
    """Returns the 8x8 images of a picture, row by row."""
    picture = np.asarray(Image.open(path))[1:, 1:]
    side = picture.shape[1] // columns
    rows = picture.reshape(-1, side, columns, side).transpose(0, 2, 1, 3)[:, :, :-1, :-1]
    return rows[:, :, :: (side - 1) // 8, :: (side - 1) // 8].reshape(-1, 8, 8)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a.astype(int) - b.astype(int)).max() <= 1)


def test_a_chain_ends_at_the_images_of_the_grid(params: Params, tmp_path: Path) -> None:
    said = {
        kind: generate(params, out=tmp_path / f"{kind}.png", kind=kind, count=4, model=MODEL, steps=20)
        for kind in ("grid", "progressive", "strip")
    }
    grid = cells(tmp_path / "grid.png", 2)
    made_out = cells(tmp_path / "progressive.png", 10).reshape(4, 10, 8, 8)
    strip = cells(tmp_path / "strip.png", 11).reshape(4, 11, 8, 8)
    assert close(made_out[:, -1], grid) and close(strip[:, -1], grid)
    assert not close(strip[:, 0], strip[:, -1])
    assert said["grid"] == f"{tmp_path}/grid.png: 4 images"


def test_there_and_back_with_its_figures(params: Params, tmp_path: Path) -> None:
    out = tmp_path / "back.png"
    said = generate(params, out=out, kind="encode-decode", of=(13,), model=MODEL, sampler="heun", steps=10)
    figures = records.read_json(tmp_path / "back.json")
    denoiser, _ = checkpoint.load(Path(MODEL), clip=True)
    x_0 = scaled(torch.from_numpy(dataset.spread(dataset.read_dataset().test, 13)))
    again = sample(denoiser, encode(denoiser, x_0, "heun", 10), "heun", 10)
    assert figures["mean_squared_error"] == pytest.approx(
        float(((x_0 - again.clamp(-1, 1)) / 2).square().mean()), rel=1e-3
    )
    apart = np.abs(to_uint8(x_0).numpy().astype(int) - to_uint8(again).numpy().astype(int)).max()
    assert abs(figures["grey_levels_apart"] - apart) <= 1 and f"{figures['grey_levels_apart']} grey levels" in said
    shown = cells(out, 10).reshape(4, 10, 8, 8)
    assert close(shown[0], to_uint8(x_0[:10, 0]).numpy()) and close(shown[1], to_uint8(again[:10, 0]).numpy())
    assert close(shown[2, :3], to_uint8(x_0[10:, 0]).numpy()) and (shown[2:, 3:] == 255).all()


@pytest.mark.parametrize("kind", ["interpolate", "blend"])
def test_the_originals_stand_at_the_ends(kind: str, params: Params, tmp_path: Path) -> None:
    generate(params, out=tmp_path / "row.png", kind=kind, of=(3, 5), count=4, model=MODEL, steps=5)
    rows = cells(tmp_path / "row.png", 6).reshape(-1, 6, 8, 8)
    test = dataset.read_dataset().test
    assert len(rows) == (4 if kind == "blend" else 1)
    for row in rows:
        assert np.array_equal(row[0], test[3, 0]) and np.array_equal(row[-1], test[5, 0])
        assert not close(row[1], row[-2])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_with_its_own_options_where_no_row_has_its_name(sampler: str, tmp_path: Path) -> None:
    """The parameters are None, as in a folder without params.yaml."""
    generate(None, out=tmp_path / "grid.png", count=4, model=MODEL, sampler=sampler, steps=5)
    denoiser, record = checkpoint.load(Path(MODEL), clip=True)
    expected, _ = draw(
        denoiser,
        tuple(record.data.shape),
        range(4),
        seed=0,
        batch=4,
        steps=5,
        settings={"sampler": sampler},
        device=torch.device("cpu"),
    )
    assert close(cells(tmp_path / "grid.png", 2), expected[:, 0])


def test_a_row_of_params_wins_over_the_sampler_of_its_name(params: Params, smoke: Callable[..., Params]) -> None:
    rows = {"heun": {"sampler": "ddim", "eta": 1.0}}
    kept = {"sampler": "ddim", "spacing": "trailing", "steps": 7, "eta": 0.5}
    assert _other_sampler(smoke(samplers=rows).samplers, "heun", kept) == {
        "sampler": "ddim",
        "spacing": "leading",
        "eta": 1.0,
        "steps": 7,
    }
    assert _other_sampler({}, "heun", kept) == {"sampler": "heun", "spacing": "trailing", "steps": 7}
    with pytest.raises(InputError, match=r"^--sampler hen: neither a row .* choose one of .*heun"):
        _other_sampler(params.samplers, "hen", kept)


def test_the_schedule_of_a_model_is_shown_as_it_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --model and without params.yaml, every schedule is shown."""
    denoiser, _ = checkpoint.load(Path(MODEL))
    model = Path(MODEL).absolute()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["schedules", "--model", str(model), "--out", "own"])
    assert done.exit_code == 0, done.output
    (row,) = records.read_csv(tmp_path / "own/table.csv")
    assert (row["schedule"], int(row["T"])) == ("cosine", denoiser.schedule.T)
    assert float(row["alpha_bar_T"]) == pytest.approx(float(denoiser.schedule.alpha_bar[-1]))
    (longer,) = schedules(None, out=tmp_path / "longer", timesteps=300, model=str(model))[0].values()
    assert longer.T == 300
    assert list(schedules(None)[0]) == list(SCHEDULES)
    assert {path.name for path in tmp_path.iterdir()} == {"own", "longer", "schedules"}


def test_refused(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(match: str, **request: object) -> None:
        with pytest.raises(InputError, match=match) as caught:
            generate(params, out=tmp_path / "no.png", model=str(trained_model), **request)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())

    trained_model = Path(MODEL).absolute()
    refuse("draws noise of its own", kind="interpolate", of=(0, 1), sampler="ddpm")
    refuse("numbered 0 ...", kind="interpolate", of=(0, 100_000))
    refuse("the test split has only 359 images", kind="encode-decode", of=(100_000,))
    refuse("leave -n out", kind="encode-decode", of=(4,), count=4)
    refuse("times repeat", kind="progressive", steps=1000)
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(InputError, match="name a model with --model"):
        generate(None, out=tmp_path / "no.png")
    refuse(r"dataset\.json: no such file", kind="encode-decode", of=(4,))


def test_without_a_champion_the_best_point_is_drawn_and_named(
    checkout: Path, smoke: Callable[..., Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    params, best = smoke(training={"steps": 24}), scores.read_best(checkout).row
    said = generate(params, out=tmp_path / "grid.png", count=4)
    assert (
        said == f"{tmp_path}/grid.png: 4 images of {best.point}, the report's best point"
        " (there is no champion yet; `ddpm promote` makes one)"
    )
    named = {"model": f"models/{best.schedule}", "sampler": best.sampler, "steps": best.steps}
    generate(params, out=tmp_path / "named.png", count=4, **named)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "named.png").read_bytes()
    tracking.promote(params, checkout)
    assert generate(params, out=tmp_path / "champion.png", count=4) == f"{tmp_path}/champion.png: 4 images"
    shutil.rmtree(checkout / "report")
    with pytest.raises(InputError, match=r"no such model; `ddpm promote` registers one, after `dvc repro` has written"):
        generate(smoke(tracking={"name": "others"}), out=tmp_path / "no.png")


def test_one_picture_at_a_time() -> None:
    done = CliRunner().invoke(app, ["generate", "--strip", "--interpolate", "0", "1"])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith("--strip and --interpolate are different pictures")


def test_the_help_of_every_verb_has_a_short_name_and_no_type_for_a_flag() -> None:
    verbs = [command.name or str(command.callback.__name__) for command in app.registered_commands]  # type: ignore[union-attr]
    assert "generate" in verbs
    for verb in ("", *(verb.replace("_", "-") for verb in verbs)):
        said = CliRunner().invoke(app, [*verb.split(), "-h"], terminal_width=200)
        assert said.exit_code == 0 and "--help" in said.output and "<bool>" not in said.output, verb


@pytest.mark.parametrize(
    ("words", "found"), [("ddpm gen", "generate"), ("ddpm generate --sa", "--sampler"), ("ddpm train --f", "--fresh")]
)
def test_a_shell_completes_verbs_and_options(words: str, found: str) -> None:
    asked = {"_DDPM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    said = CliRunner().invoke(app, [], prog_name="ddpm", env=asked)
    assert said.output.split() == [found]


@pytest.mark.parametrize(("verb", "zeros"), [("generate", 1), ("schedules", 0)])  # for the seed, 0 is a real value
def test_the_help_shows_no_number_that_stands_for_none(verb: str, zeros: int) -> None:
    said = CliRunner().invoke(app, [verb, "--help"], terminal_width=200).output
    assert "--out" in said and said.count("default: 0]") == zeros


def test_what_runs_here_is_one_line() -> None:
    said = CliRunner().invoke(app, ["--version"])
    pattern = r"ddpm \S+, Python 3\.\d+\.\d+\S*, torch \S+, device (cpu|cuda \(.+\))(, commit [0-9a-f]{7,}(-dirty)?)?\n"
    assert said.exit_code == 0 and re.fullmatch(pattern, said.output), said.output
    assert f"torch {torch.__version__}," in said.output
