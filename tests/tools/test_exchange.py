"""Checks exports to and imports from the real diffusers package, and an imported model in the sweep."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ddpm import NoiseSchedule, UNet
from ddpm.cli import app
from ddpm.diffusion.samplers import Level, ddim, ddpm
from ddpm.errors import InputError
from ddpm.files import checkpoint, dataset, models, paths, records, samples
from ddpm.files.models import NetworkEntry
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.reporting.page import _schedules
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train
from ddpm.tools.exchange import WEIGHTS, export_diffusers, import_diffusers
from ddpm.tools.generate import generate
from ddpm.training.objective import Objective
from ddpm.training.validation import Validation

diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports the model of the smoke recipe as a DDPMPipeline folder. Tests must not change this folder."""
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    export_diffusers(made / "models/cosine", folder)
    return folder


@pytest.fixture
def checkout(root: Path) -> Path:
    """Creates a root with the smoke recipe as its params.yaml."""
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
        # Without use_clipped_model_output, diffusers' DDIM uses the eps from before clipping.
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
    """diffusers' pipeline takes 1000 steps by default, and refuses more than T."""
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
    # the weights are the same bytes as the original's
    assert added == [f"  hub: {{schedule: cosine, imported: {weights}}}"]
    assert [line for line in after.splitlines() if line not in added] == before.splitlines()
    assert "fixed_large" in lines[0] and "T = 100" in lines[1]

    params = Params.load(checkout / "params.yaml")
    metrics = train(params, "hub", checkout)
    original, _ = checkpoint.load(made / "models/cosine")
    test = dataset.read_dataset(made).test
    images = torch.from_numpy(test[np.random.RandomState(0).permutation(len(test))])
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
    """In these repositories config.json lies beside model_index.json, without folders."""
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
    with pytest.raises(
        InputError, match=r"schedules\.cosine: params\.yaml already has this row, which was not imported"
    ):
        import_diffusers(exported, "cosine", checkout)
    with pytest.raises(InputError, match="a-z, 0-9 and _"):
        import_diffusers(exported, "my-hub", checkout)


def test_an_import_outside_of_a_checkout_is_the_folder_alone(exported: Path, tmp_path: Path, made: Path) -> None:
    lines = import_diffusers(exported, "hub", tmp_path)
    assert lines[-1] == "`ddpm generate --model imported/hub` draws images with this model"
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]
    ours, original = (
        load_file(root / "model.safetensors") for root in (tmp_path / "imported/hub", made / "models/cosine")
    )
    assert all(torch.equal(ours[name], original[name]) for name in original)


def test_a_target_and_length_of_its_own_stand(exported: Path, checkout: Path) -> None:
    """params.yaml says eps at T = 100. The import keeps its own v prediction, T = 300 and zero terminal SNR."""
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
    shown = _schedules(params, {"hub": trained}, about)  # the report shows each schedule at its own length
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
    with pytest.raises(InputError, match=r"imported/hub: the model is not the one that schedules\.hub describes"):
        train(params, "hub", checkout)
    larger = {**about["network"], "image_size": 16, "attention": [8]}  # has the same weights
    records.write_record(
        folder / "model.json", {**about, "network": larger, "data": {**about["data"], "shape": [1, 16, 16]}}
    )
    with pytest.raises(InputError, match=r"shape \[1, 16, 16\], but the dataset holds images of shape \[1, 8, 8\]"):
        train(params, "hub", checkout)
    records.write_record(folder / "model.json", about)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(InputError, match="checksum"):
        train(params, "hub", checkout)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"schedules\.hub: no folder imported/hub; run `ddpm import-diffusers"):
        train(params, "hub", checkout)
    assert not (checkout / "models").exists()


# Folders that diffusers itself writes.

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def tiny(seed: int = 0, **changes: Any) -> Any:
    """Returns a UNet2DModel with the default values of its options."""
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**{**TINY, **changes})


def weights_of(checkout: Path, name: str = "hub") -> str:
    return models.read_model_record(checkout / paths.imported_dir(name)).weights_sha256


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def test_of_a_checkpoint_the_averaged_weights_are_taken(checkout: Path, tmp_path: Path) -> None:
    """The folder is as diffusers' training examples write it: EMAModel writes unet_ema, with its own settings in config.json."""
    from diffusers.training_utils import EMAModel

    raw, averaged = tiny(0), tiny(1)
    folder = tmp_path / "checkpoint-500"
    raw.save_pretrained(folder / "unet")
    EMAModel(averaged.parameters(), model_cls=type(raw), model_config=raw.config).save_pretrained(folder / "unet_ema")
    assert "decay" in json.loads((folder / "unet_ema/config.json").read_text())
    lines = import_diffusers(folder, "both", checkout)
    assert "checkpoint-500/unet_ema: imported the averaged weights" in lines[0]
    for name in ("unet", "unet_ema"):
        lines = import_diffusers(folder / name, name, checkout)
        assert not any("averaged" in line for line in lines)
    assert weights_of(checkout, "both") == weights_of(checkout, "unet_ema") != weights_of(checkout, "unet")
    denoiser, _ = checkpoint.load(checkout / "imported/both")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 600.0])
    with torch.no_grad():
        assert float((denoiser.net(x, t) - averaged.eval()(x, t).sample).abs().max()) < 1e-5


def test_shards_are_put_together(checkout: Path, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "whole")
    tiny().save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for name in ("whole", "shards"):
        import_diffusers(tmp_path / name, name, checkout)
    assert weights_of(checkout, "shards") == weights_of(checkout, "whole")
    index = tmp_path / "shards" / f"{WEIGHTS}.index.json"
    sound = json.loads(index.read_text())["weight_map"]
    for weight_map, message in (
        ({**sound, "conv_in.bias": "gone.safetensors"}, "1 of .* shards are missing, such as gone.safetensors"),
        ({**sound, "conv_in.bias": f"../whole/{WEIGHTS}"}, "expected a weight_map that names files in the same folder"),
        ([], "expected a weight_map"),
    ):
        edited(index, weight_map=weight_map)
        with pytest.raises(InputError, match=message):
            import_diffusers(tmp_path / "shards", "other", checkout)
    index.unlink()
    with pytest.raises(InputError, match=r"for shards, .*index.json; it has .*-00001-of-"):
        import_diffusers(tmp_path / "shards", "other", checkout)


@pytest.mark.parametrize("size", ["1GB", "30KB"])
def test_a_variant_is_taken_if_there_is_nothing_else(checkout: Path, tmp_path: Path, size: str) -> None:
    folder = tmp_path / "half"
    tiny().half().save_pretrained(folder, variant="fp16", max_shard_size=size)
    lines = import_diffusers(folder, "hub", checkout)
    assert any("fp16" in line and "imported this variant" in line for line in lines)
    tiny().half().float().save_pretrained(tmp_path / "rounded")
    import_diffusers(tmp_path / "rounded", "rounded", checkout)
    assert weights_of(checkout) == weights_of(checkout, "rounded")
    tiny().save_pretrained(folder, variant="non_ema")
    with pytest.raises(InputError, match=r"2 variants of the weights, .*non_ema.*; keep only one"):
        import_diffusers(folder, "hub", checkout)
    tiny(1).save_pretrained(folder)
    assert not any("imported this variant" in line for line in import_diffusers(folder, "hub", checkout))
    assert weights_of(checkout) != weights_of(checkout, "rounded")


def test_a_byte_order_mark_changes_nothing_and_no_advice_names_dvc(checkout: Path, exported: Path) -> None:
    import_diffusers(exported, "plain", checkout)
    other = checkout / "other"
    shutil.copytree(exported, other)
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        (other / name).write_bytes(b"\xef\xbb\xbf" + (other / name).read_bytes())
    import_diffusers(other, "marked", checkout)
    assert weights_of(checkout, "marked") == weights_of(checkout, "plain")
    for text in ("{", "[]"):
        (other / "unet/config.json").write_text(text)
        with pytest.raises(InputError, match=r"unet/config.json: .*; download it again$"):
            import_diffusers(other, "marked", checkout)


def test_what_belongs_to_sampling_is_said(checkout: Path, exported: Path) -> None:
    other = checkout / "other"
    shutil.copytree(exported, other)
    path = other / "scheduler/scheduler_config.json"
    (line,) = [line for line in import_diffusers(other, "hub", checkout) if "the pipeline" in line]
    assert "variance_type fixed_large, clip_sample true, timestep_spacing leading" in line
    changes = {"thresholding": True, "sample_max_value": 1.5, "timestep_spacing": "trailing", "steps_offset": 1}
    edited(path, **changes, set_alpha_to_one=False)
    said = "\n".join(import_diffusers(other, "hub", checkout))
    for words in (
        "timestep_spacing trailing",
        "dynamic thresholding (quantile 0.995, sample_max_value 1.5); the same in params.yaml is sampling.clip: 0.995",
        "steps_offset 1",
        "set_alpha_to_one false",
    ):
        assert words in said
    edited(path, sample_max_value=1.0)  # diffusers' quantile cannot exceed this value
    assert "sampling.clip: true" in "\n".join(import_diffusers(other, "hub", checkout))


# Models with classes and a learned variance.


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a checkpoint with ten classes and a learned variance. Tests must not change this checkpoint."""
    torch.manual_seed(0)
    sizes = {"image_channels": 1, "image_size": 8, "channels": 16, "multipliers": [1, 2], "blocks": 1, "attention": [4]}
    entry = NetworkEntry.of("unet", {**sizes, "out_channels": 2, "classes": 10})
    net = UNet(**entry.settings)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    data = {"shape": [1, 8, 8], "range": [-1, 1], "classes": [str(digit) for digit in range(10)]}
    description = {"schedule": {"name": "cosine", "timesteps": 100, "schedule": "cosine"}, "target": "eps"}
    folder = tmp_path_factory.mktemp("conditional") / "model"
    checkpoint.save(folder, net, {**description, "variance": "learned", "network": entry.content, "data": data})
    return folder


@torch.no_grad()
def test_classes_and_a_learned_variance_step_there_as_here(conditional: Path, tmp_path: Path) -> None:
    lines = export_diffusers(conditional, tmp_path / "out")
    assert "class_labels 0 to 9; 10 is the null class" in lines[0]
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    with pytest.raises(ValueError, match="class_labels"):
        pipeline(num_inference_steps=2)
    pipeline.scheduler.set_timesteps(100)
    denoiser, _ = checkpoint.load(conditional, clip=True)
    denoiser = dataclasses.replace(denoiser, labels=torch.tensor([0, 3, 9, 10 - 1]))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def noise(k: int) -> torch.Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(5))

    for t in (99, 60, 1):
        levels = [Level(time, float(denoiser.schedule.alpha_bar[time + 1])) for time in (t, t - 1)]
        ((ours, _),) = ddpm(denoiser, x, levels, noise, variance="learned")
        output = pipeline.unet(x, t, denoiser.labels).sample
        theirs = pipeline.scheduler.step(output, t, x, generator=torch.Generator().manual_seed(5)).prev_sample
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)


def test_the_page_s_loop_draws_with_labels(conditional: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"(?s)```python\n(.+?)```", page)
    export_diffusers(conditional, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    drawn: dict[str, Any] = {}
    exec(code, drawn)
    assert drawn["x"].shape == (4, 1, 8, 8) and bool(drawn["x"].isfinite().all())


def test_they_come_back_and_are_swept_with_guidance(conditional: Path, checkout: Path, tmp_path: Path) -> None:
    """params.yaml need not say conditional or learned, since these settings are for networks that are trained here."""
    export_diffusers(conditional, tmp_path / "out")
    lines = import_diffusers(tmp_path / "out", "hub", checkout)
    assert "the network has 10 classes, and a null class for guidance" in lines
    assert weights_of(checkout) == records.sha256(conditional / "model.safetensors")
    origin, back = (models.read_model_record(path) for path in (conditional, checkout / "imported/hub"))
    assert (back.network.classes, back.network.out_channels, back.variance) == (10, 2, "learned")
    assert back.data.classes == origin.data.classes
    path = checkout / "params.yaml"
    text = path.read_text().replace("schedules: [cosine]", "schedules: [hub]")
    text = text.replace("variance: fixed_large", "variance: learned").replace("eta: 0.0", "eta: 0.0, guidance: 2.0")
    path.write_text(text)
    params = Params.load(path)
    assert train(params, "hub", checkout)["validation_loss"] > 0
    for point, evaluations in (("ddpm-2", 2), ("ddim-5", 10)):
        assert sample_point(params, Point.parse(f"hub-{point}"), checkout) == evaluations
        with np.load(checkout / f"samples/hub-{point}.npz") as archive:
            assert archive["labels"][:12].tolist() == [image % 10 for image in range(12)]
    path.write_text(text.replace("schedules: [hub]", "schedules: [hub, cosine]"))
    with pytest.raises(InputError, match=r"samplers\.ddpm\.variance: learned needs"):
        Params.load(path)


def test_without_a_null_class_guidance_is_refused(checkout: Path, tmp_path: Path) -> None:
    tiny(num_class_embeds=10).save_pretrained(tmp_path / "ten")
    lines = import_diffusers(tmp_path / "ten", "hub", checkout)
    assert "10 classes and no null class" in lines[1]
    path = checkout / "params.yaml"
    text = path.read_text().replace("schedules: [cosine]", "schedules: [hub]")
    path.write_text(text.replace("eta: 0.0", "eta: 0.0, guidance: 2.0"))
    params = Params.load(path)
    train(params, "hub", checkout)
    assert sample_point(params, Point.parse("hub-ddpm-2"), checkout) == 2
    with pytest.raises(InputError, match="hub-ddim-5: guidance needs a class-conditional model"):
        sample_point(params, Point.parse("hub-ddim-5"), checkout)
    with pytest.raises(InputError, match="generate: guidance needs a class-conditional model"):
        generate(params, model=str(checkout / "imported/hub"), out=tmp_path / "x.png", guidance=2.0)
    generate(params, model=str(checkout / "imported/hub"), out=tmp_path / "x.png", count=4, steps=2)

    # the user declares that the last class is the null class
    lines = import_diffusers(tmp_path / "ten", "null", checkout, null_class=True)
    assert "the network has 9 classes, and a null class for guidance" in lines
    generate(params, model=str(checkout / "imported/null"), out=tmp_path / "x.png", count=4, steps=2, guidance=2.0)
    with pytest.raises(InputError, match=r"imported/null: the model has 9 classes, but the dataset has 10"):
        train(Params.load(path), "null", checkout)
    tiny().save_pretrained(tmp_path / "none")
    with pytest.raises(InputError, match="leave --null-class out"):
        import_diffusers(tmp_path / "none", "none", checkout, null_class=True)


@pytest.mark.parametrize(("out_channels", "variance"), [(2, "fixed_small"), (1, "learned_range")])
def test_a_learned_variance_takes_its_scheduler(
    checkout: Path, tmp_path: Path, out_channels: int, variance: str
) -> None:
    """With a scheduler that does not fit, diffusers would fail at the first step."""
    scheduler = diffusers.DDPMScheduler(variance_type=variance)
    diffusers.DDPMPipeline(tiny(out_channels=out_channels), scheduler).save_pretrained(tmp_path / "mixed")
    with pytest.raises(InputError, match=rf"out_channels = {out_channels} does not fit the scheduler's variance_type"):
        import_diffusers(tmp_path / "mixed", "hub", checkout)
    assert not (checkout / "imported").exists()


# Faults.


def broken(exported: Path, to: Path, how: str) -> Path:
    """Returns a copy of the export with one fault."""
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
        ("no weights", "has neither diffusion_pytorch_model.safetensors nor"),
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


def test_a_model_with_snapshots_is_exported_with_the_weights_of_its_folder(
    made: Path, exported: Path, tmp_path: Path
) -> None:
    denoiser, model = checkpoint.load(made / "models/cosine")
    assert isinstance(denoiser.net, torch.nn.Module)
    checkpoint.save(tmp_path / "model", denoiser.net, model.described_by(snapshots="f" * 64, ema=0.05))
    export_diffusers(tmp_path / "model", tmp_path / "out")
    files = [path.relative_to(exported) for path in exported.rglob("*") if path.is_file()]
    assert files and all((tmp_path / "out" / path).read_bytes() == (exported / path).read_bytes() for path in files)


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
