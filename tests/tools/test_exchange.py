"""Folders to and from the real diffusers package, and an import as a part of the sweep."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ddpm import NoiseSchedule
from ddpm.cli import app
from ddpm.diffusion.samplers import Level, ddim, ddpm
from ddpm.errors import InputError
from ddpm.files import checkpoint, dataset, models, records, samples
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.reporting.page import _schedules
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
from ddpm.tools.exchange import WEIGHTS, export_diffusers, import_diffusers
from ddpm.training.objective import Objective
from ddpm.training.validation import Validation

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the smoke recipe as a DDPMPipeline folder. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    export_diffusers(made / "models/cosine", folder)
    return folder


@pytest.fixture
def checkout(root: Path) -> Path:
    """A root with the smoke recipe as its params.yaml."""
    shutil.copyfile(RECIPES / "smoke.yaml", root / "params.yaml")
    return root


@torch.no_grad()
def test_the_real_pipeline_loads_an_export_and_steps_as_we_do(made: Path, exported: Path) -> None:
    pipeline = diffusers.DDPMPipeline.from_pretrained(exported, low_cpu_mem_usage=False)
    implicit = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    implicit.set_timesteps(100)
    denoiser, _ = checkpoint.load(made / "models/cosine", clip=True)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def noise(k: int) -> torch.Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    for t in (99, 60, 1):
        eps = pipeline.unet(x, t).sample
        assert float((denoiser.net(x, torch.full((4,), float(t))) - eps).abs().max()) < 1e-5
        levels = [Level(time, float(denoiser.schedule.alpha_bar[time + 1])) for time in (t, t - 1)]
        # Their DDIM keeps the eps of before the clipping, unless it is told.
        for sampler, scheduler, options in (
            (ddpm, pipeline.scheduler, {"generator": torch.Generator().manual_seed(5)}),
            (ddim, implicit, {"use_clipped_model_output": True}),
        ):
            ((ours, _),) = sampler(denoiser, x, levels, noise)
            theirs = scheduler.step(eps, t, x, **options).prev_sample
            assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
            assert float((ours - x).abs().max()) > 1e-3


def test_the_page_s_command_draws_where_T_is_not_1000(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    (command,) = re.findall(r'(?m)^python -c "(.+)"$', page)
    (tmp_path / "exported").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    assert Image.open("one.png").size == (8, 8)


def test_the_program_says_how_many_steps_the_pipeline_takes(made: Path, tmp_path: Path) -> None:
    """Their pipeline takes 1000 unless it is told, and refuses more than T."""
    said = CliRunner().invoke(app, ["export-diffusers", str(made / "models/cosine"), str(tmp_path / "out")]).output
    assert "call it with num_inference_steps=100" in said
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    with pytest.raises(ValueError, match="cannot be larger"):
        pipeline()


def test_exported_and_imported_it_makes_the_same_images(made: Path, exported: Path, checkout: Path) -> None:
    before = (checkout / "params.yaml").read_text()
    lines = import_diffusers(exported, "hub", checkout)
    after = (checkout / "params.yaml").read_text()
    weights = records.sha256(made / "models/cosine/model.safetensors")
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert added == [f"  hub: {{schedule: cosine, imported: {weights}}}"]  # the same bytes as the original's
    assert [line for line in after.splitlines() if line not in added] == before.splitlines()
    assert "fixed_large" in lines[0] and "T = 100" in lines[1]

    params = Params.load(checkout / "params.yaml")
    metrics = train(params, "hub", checkout)
    original, _ = checkpoint.load(made / "models/cosine")
    images = torch.from_numpy(np.array(dataset.read_dataset(made).test))
    loss = Validation(images, Objective.of(original.schedule, "eps"), 32).loss(original.net)
    assert metrics["steps"] == 0 and metrics["validation_loss"] == loss
    assert metrics["parameters"] == records.read_record(made / "metrics/train/cosine.json")["parameters"]
    (row,) = records.read_csv(checkout / "metrics/train/hub.csv")
    assert (row["step"], float(row["validation_loss"])) == ("0", metrics["validation_loss"])
    for point in ("ddpm-2", "ddim-5"):
        sample_point(params, Point.parse(f"hub-{point}"), checkout)
        ours, expected = (
            samples.read_samples(path)
            for path in (checkout / f"samples/hub-{point}.npz", made / f"samples/cosine-{point}.npz")
        )
        assert ours.evaluations == expected.evaluations and len(np.unique(expected.images)) > 10
        assert np.array_equal(ours.images, expected.images)


def test_it_is_published_and_promoted_like_our_own(
    exported: Path,
    checkout: Path,
    empty_database: Path,
    write_scores: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddpm import tracking

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_database, checkout / "mlflow.db")
    import_diffusers(exported, "hub", checkout)
    path = checkout / "params.yaml"
    path.write_text(path.read_text().replace("schedules: [cosine]", "schedules: [hub]"))
    params = Params.load(path)
    train(params, "hub", checkout)
    for index, point in enumerate(params.points()):
        sample_point(params, point, checkout)
        write_scores(checkout, point, 40.0 - index)
    tracking.publish(params, checkout, say=lambda line: None)
    decision = tracking.promote(params, checkout, say=lambda line: None)
    assert decision.promoted and decision.point.startswith("hub-")
    folder, settings = tracking.fetch_model("models:/ddpm-digits@champion", checkout / "fetched", checkout)
    assert records.sha256(folder / "model.safetensors") == params.schedules["hub"].imported
    assert settings["sampler"] == "ddim"


def test_the_google_repositories_layout_is_read(exported: Path, checkout: Path, tmp_path: Path) -> None:
    """Their config.json lies beside model_index.json, with no folders."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in exported.rglob("*.*"):
        if path.is_file():
            shutil.copyfile(path, flat / path.name)
    import_diffusers(flat, "hub", checkout)
    assert Params.load(checkout / "params.yaml").schedules["hub"].schedule == "cosine"
    lines = import_diffusers(exported / "unet", "bare", checkout)
    assert "linear schedule, T = 1000, target eps" in lines[0]
    assert models.read_model_record(checkout / "imported/bare").schedule.timesteps == 1000


def test_it_may_be_imported_again_but_never_over_a_row_of_ones_own(exported: Path, checkout: Path) -> None:
    import_diffusers(exported, "hub", checkout)
    first = (checkout / "params.yaml").read_text()
    import_diffusers(exported, "hub", checkout)
    assert (checkout / "params.yaml").read_text() == first
    with pytest.raises(InputError, match=r"schedules\.cosine: is your own row"):
        import_diffusers(exported, "cosine", checkout)
    with pytest.raises(InputError, match="a-z, 0-9 and _"):
        import_diffusers(exported, "my-hub", checkout)


def test_a_target_and_length_of_its_own_stand(exported: Path, checkout: Path) -> None:
    """Params say eps at T = 100; the import predicts v along 300 times to zero SNR, and is sampled so."""
    other = checkout / "other"
    shutil.copytree(exported, other)
    path = other / "scheduler/scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "num_train_timesteps": 300, "rescale_betas_zero_snr": True}
    records.write_json(path, {**records.read_json(path), **changes})
    import_diffusers(other, "hub", checkout)
    text = (checkout / "params.yaml").read_text().replace("schedules: [cosine]", "schedules: [cosine, hub]")
    (checkout / "params.yaml").write_text(text)
    params = Params.load(checkout / "params.yaml")
    assert params.diffusion.target == "eps" and params.diffusion.timesteps == 100
    messages: list[str] = []
    train(params, "hub", checkout, lambda progress: messages.append(progress.message))
    assert "imported, with target v at T = 300" in messages
    denoiser, _ = checkpoint.load(checkout / "models/hub")
    assert (denoiser.target, denoiser.schedule.T, float(denoiser.schedule.alpha_bar[-1])) == ("v", 300, 0.0)
    trained = models.read_training(checkout, "hub")
    about = dataset.read_dataset_record(checkout)
    shown = _schedules(params, {"hub": trained}, about)  # in the report, each at its own length
    assert {name: (row.T, row.alpha_bar) for name, row in shown["rows"].items()} == {
        "cosine": (100, pytest.approx(float(NoiseSchedule.named("cosine", 100).alpha_bar[-1]))),
        "hub": (300, 0.0),
    }
    assert _schedules(params, {}, about)["unknown"] == ["hub"]


def test_a_changed_missing_or_unfitting_import_is_one_line(exported: Path, checkout: Path) -> None:
    import_diffusers(exported, "hub", checkout)
    params = Params.load(checkout / "params.yaml")
    folder = checkout / "imported/hub"

    about = models.read_model_record(folder).content
    records.write_record(folder / "model.json", {**about, "schedule": {**about["schedule"], "s": 0.1}})
    with pytest.raises(InputError, match=r"imported/hub: not the model that the row schedules\.hub describes"):
        train(params, "hub", checkout)
    larger = {**about["network"], "image_size": 16, "attention": [8]}  # the same weights
    records.write_record(
        folder / "model.json", {**about, "network": larger, "data": {**about["data"], "shape": [1, 16, 16]}}
    )
    with pytest.raises(InputError, match=r"shape \[1, 16, 16\], the dataset's are \[1, 8, 8\]"):
        train(params, "hub", checkout)
    records.write_record(folder / "model.json", about)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="checksum"):
        train(params, "hub", checkout)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"schedules\.hub: imported/hub is not here; run `ddpm import-diffusers"):
        train(params, "hub", checkout)
    assert not (checkout / "models").exists()


def broken(exported: Path, to: Path, how: str) -> Path:
    """A copy of the export with one fault."""
    shutil.copytree(exported, to)
    weights, config = to / "unet" / WEIGHTS, to / "unet/config.json"
    state = load_file(weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "pickle":
        weights.unlink()
        torch.save(state, to / "unet/diffusion_pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "missing":
        save_file({key: value for key, value in state.items() if key != "conv_in.bias"}, weights)
    elif how == "unexpected":
        save_file({**state, "class_embedding.weight": torch.zeros(3)}, weights)
    elif how == "not finite":
        save_file({**state, "conv_in.bias": torch.full_like(state["conv_in.bias"], torch.nan)}, weights)
    elif how == "class":
        config.write_text(config.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    elif how == "json":
        config.write_text("{")
    elif how == "pipeline":
        index = to / "model_index.json"
        index.write_text(index.read_text().replace("DDPMPipeline", "LDMPipeline"))
    elif how == "schedule":
        path = to / "scheduler/scheduler_config.json"
        path.write_text(path.read_text().replace("squaredcos_cap_v2", "laplace"))
    return to


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "not readable"),
        ("pickle", r"a pickle \(.bin\), which can run code"),
        ("no weights", "no such file"),
        ("missing", "1 of the weights missing: conv_in.bias"),
        ("unexpected", r"1 of the weights unexpected: class_embedding.weight"),
        ("not finite", "are not finite"),
        ("class", "_class_name = 'UNet2DConditionModel'"),
        ("json", "not readable as JSON"),
        ("pipeline", "a LDMPipeline"),
        ("schedule", "beta_schedule = 'laplace'"),
    ],
)
def test_a_broken_folder_is_one_line_and_writes_nothing(
    exported: Path, checkout: Path, tmp_path: Path, how: str, message: str
) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with pytest.raises(InputError, match=message) as refused:
        import_diffusers(broken(exported, tmp_path / "broken", how), "hub", checkout)
    assert "\n" not in str(refused.value)
    assert (checkout / "params.yaml").read_bytes() == before
    assert not (checkout / "imported").exists()


def test_what_cannot_be_exported_is_one_line_and_writes_nothing(made: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(made / "models/cosine", source)
    about = models.read_model_record(source).content
    records.write_record(source / "model.json", {**about, "labels": 10})
    with pytest.raises(InputError, match="no place for 'labels'"):
        export_diffusers(source, out)
    assert not out.exists()
    out.mkdir()
    records.write_record(source / "model.json", about)
    with pytest.raises(InputError, match="exists already"):
        export_diffusers(source, out)
    assert list(out.iterdir()) == []
