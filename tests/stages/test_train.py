"""Checks the train stage: its outputs, resuming to the same bytes, and how it fails."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm import NoiseSchedule
from ddpm.errors import InputError
from ddpm.files import checkpoint, dataset, models, records, samples
from ddpm.files.params import Params
from ddpm.parameters import OtherNetwork, Point
from ddpm.runtime.progress import Progress
from ddpm.stages.sample import sample_point
from ddpm.stages.train import PAIRINGS, train, training_key
from ddpm.tools.exchange import export_diffusers
from ddpm.tracking.lineage import identity_of_model, training_identity
from ddpm.training.objective import Objective
from ddpm.training.validation import Validation

OUTPUTS = (
    "models/cosine/model.safetensors",
    "models/cosine/model.json",
    "metrics/train/cosine.csv",
    "metrics/train/cosine.by_time.csv",
    "metrics/train/cosine.json",
)


def outputs(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in OUTPUTS}


class Stop(Exception):
    pass


def with_snapshots(root: Path) -> dict[str, bytes]:
    return outputs(root) | {path.name: path.read_bytes() for path in (root / "snapshots/cosine").iterdir()}


def another(digits: Path, root: Path) -> Path:
    """Makes a root with the prepared digits."""
    root.mkdir()
    (root / "dataset").symlink_to(digits / "dataset")
    return root


def messages_of(params: Params, root: Path) -> list[str]:
    """Trains, and returns the messages of all progress reports."""
    messages: list[str] = []
    train(params, "cosine", root, lambda progress: messages.append(progress.message))
    return messages


def stop_at(step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.done == step and not progress.message:
            raise Stop

    return report


def resumed_from(messages: list[str]) -> int | None:
    lines = [message for message in messages if message.startswith("resuming")]
    return int(lines[0].split()[-1]) if lines else None


def test_it_writes_a_checkpoint_that_describes_itself(root: Path, smoke: Callable[..., Params]) -> None:
    params = smoke(training={"steps": 12, "log_every": 5, "validate_every": 6})
    metrics = train(params, "cosine", root)
    denoiser, about = checkpoint.load(root / "models/cosine")
    assert (denoiser.schedule.name, denoiser.schedule.T, denoiser.target) == ("cosine", 100, "eps")
    assert about.data.shape == [1, 8, 8] and about.data.name == "digits"
    assert metrics["parameters"] == sum(parameter.numel() for parameter in denoiser.net.parameters())
    rows = records.read_csv(root / "metrics/train/cosine.csv")
    assert [int(row["step"]) for row in rows] == [5, 6, 10, 12]
    assert [row["validation_loss"] != "" for row in rows] == [False, True, False, True]
    assert float(rows[-1]["validation_loss"]) == metrics["validation_loss"]


def test_losses_by_time_of_a_network_that_predicts_zero(digits: Path) -> None:
    """L_simple of eps is one in every range of times, within noise. That of x0 is E[x_0^2]."""
    images = torch.from_numpy(np.array(dataset.read_dataset(digits).test))
    schedule = NoiseSchedule.named("cosine", 100)
    for target in ("eps", "x0"):
        rows = Validation(images, Objective.of(schedule, target), 64).by_time(lambda x, t: 0 * x)
        assert [row["t"] for row in rows] == [4, 14, 24, 34, 44, 54, 64, 74, 84, 94]
        square = float((images[:256].double() / 127.5 - 1).square().mean())
        expected, deviation = {"eps": (1.0, 4 * math.sqrt(2 / (256 * 64))), "x0": (square, 1e-6)}[target]
        assert [row["loss_simple"] for row in rows] == pytest.approx([expected] * 10, abs=deviation)
    # For x0 the terms of the bound have closed forms too. The terms are those of fixed_large, each from about 26 images.
    beta, alpha_bar = schedule.betas, schedule.alpha_bar
    ratio = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    on_x0 = alpha_bar[:-1].sqrt() * beta / (1 - alpha_bar[1:])
    terms = 100 * (ratio - 1 - ratio.log() + on_x0**2 * square / beta) / 2
    assert [row["loss_vlb"] for row in rows[1:]] == pytest.approx(terms.view(10, 10).mean(1)[1:].tolist(), rel=0.1)
    empty = Validation(images[:0], Objective.of(schedule, "eps"), 64).by_time(lambda x, t: 0 * x)
    assert [(row["t"], row["loss_vlb"]) for row in empty] == [(row["t"], "") for row in rows]


def test_a_learned_variance_through_train_checkpoint_and_sample(root: Path, smoke: Callable[..., Params]) -> None:
    learning = {
        "diffusion": {"variance": "learned", "target": "mu"},
        "training": {"steps": 6, "loss": "hybrid"},
        "sampling": {"images": 4, "batch": 4},
    }
    params = smoke(**learning, samplers={"ddpm": {"variance": "learned"}})
    train(params, "cosine", root)
    denoiser, about = checkpoint.load(root / "models/cosine", clip=True)
    assert (about.variance, about.target, about.network.out_channels) == ("learned", "mu", 2)
    x0_hat, v = denoiser.with_variance(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 50.0)
    assert v is not None and x0_hat.shape == v.shape == (2, 1, 8, 8) and bool((v != 0.5).any())
    assert identity_of_model(about) == training_identity(params, "cosine", about.data.sha256)
    assert "kind" not in identity_of_model(about)["network"]  # runs from before `kind` existed have no such entry
    other = replace(about.network, kind="toy", content={**about.network.content, "kind": "toy"})
    assert identity_of_model(replace(about, network=other))["network"]["kind"] == "toy"
    sample_point(params, Point.parse("cosine-ddpm-5"), root)
    learned = samples.read_samples(root / "samples/cosine-ddpm-5.npz").images
    for variance in ("fixed_large", "fixed_small"):
        sample_point(smoke(**learning, samplers={"ddpm": {"variance": variance}}), Point.parse("cosine-ddpm-5"), root)
        assert not np.array_equal(learned, samples.read_samples(root / "samples/cosine-ddpm-5.npz").images)


def test_a_descent_resumes_and_a_longer_training_goes_on_before_it(
    root: Path, digits: Path, smoke: Callable[..., Params]
) -> None:
    """Uses every option that has a state of its own, so that all of this state must be saved."""
    options = {
        "decay": "cosine",
        "decay_share": 0.5,
        "optimizer": "muon",
        "times": "loss_aware",
        "pairing": "immiscible",
        "snapshot_every": 3,
    }

    def of(steps: int, **changes: object) -> Params:
        training = {"steps": steps, "log_every": 4, "validate_every": 8, **options, **changes}
        return smoke(training=training, compute={"checkpoint_every": 3})

    train(of(16), "cosine", root)
    straight = with_snapshots(root)
    stopped = another(digits, root / "stopped")
    with pytest.raises(Stop):
        train(of(16), "cosine", stopped, stop_at(13))
    assert resumed_from(messages_of(of(16), stopped)) == 11 and with_snapshots(stopped) == straight
    longer = another(digits, root / "longer")
    train(of(20), "cosine", longer)
    # In `root`, the training of 16 steps left its state from before the descent.
    assert resumed_from(messages_of(of(20), root)) == 8 and with_snapshots(root) == with_snapshots(longer)
    assert resumed_from(messages_of(of(16), root)) == 16 and with_snapshots(root) == straight
    # A training with another descent, or with none, shares the steps before the descent, so it resumes from their states.
    assert resumed_from(messages_of(of(20, decay="linear", decay_share=0.4), root)) == 10
    assert resumed_from(messages_of(of(20, decay="none", decay_share=0.3), root)) == 12


def test_snapshots_change_no_weights_and_resume_to_the_same_bytes(
    root: Path, digits: Path, smoke: Callable[..., Params]
) -> None:
    """Compares an uninterrupted training with one that stops, one that gets more steps, and one that loses a snapshot."""

    def of(steps: int, **changes: object) -> Params:
        training = {"steps": steps, "log_every": 4, "validate_every": 8, "snapshot_every": 4, **changes}
        return smoke(training=training, compute={"checkpoint_every": 3})

    train(of(18), "cosine", root)
    straight = with_snapshots(root)
    taken = {f"{step:09d}.safetensors" for step in (4, 8, 12, 16, 18)}
    assert straight.keys() - outputs(root).keys() == {"snapshots.json", *taken}
    plain = another(digits, root / "plain")
    train(of(18, snapshot_every=0), "cosine", plain)
    weights = "models/cosine/model.safetensors"
    assert (plain / weights).read_bytes() == straight[weights]
    assert [path.name for path in (plain / "snapshots/cosine").iterdir()] == ["snapshots.json"]

    stopped = another(digits, root / "stopped")
    with pytest.raises(Stop):
        train(of(18), "cosine", stopped, stop_at(14))
    assert resumed_from(messages_of(of(18), stopped)) == 12 and with_snapshots(stopped) == straight
    # A longer training takes the snapshots from the cache. If a snapshot is lost, the training goes back before its step.
    longer = another(digits, root / "longer")
    train(of(21), "cosine", longer)
    assert resumed_from(messages_of(of(21), stopped)) == 18 and with_snapshots(stopped) == with_snapshots(longer)
    (lost,) = (root / ".cache/training").glob("*/snapshots/000000008.safetensors")
    lost.write_bytes(lost.read_bytes()[:-1] + b"?")
    said = messages_of(of(21), root)
    start = "to its start, since no earlier state was saved"
    assert f"{lost}: missing or damaged: training goes back before step 8, {start}" in said
    assert resumed_from(said) is None and with_snapshots(root) == with_snapshots(longer)


def test_a_lost_snapshot_of_the_descent_takes_the_training_back_to_the_state_before_it(
    root: Path, smoke: Callable[..., Params]
) -> None:
    training = {"steps": 20, "decay": "linear", "decay_share": 0.3, "snapshot_every": 2}
    params = smoke(training=training, compute={"checkpoint_every": 5})
    train(params, "cosine", root)
    straight = with_snapshots(root)
    (lost,) = (root / ".cache/training").glob("*/*/snapshots/000000016.safetensors")
    lost.unlink()
    said = messages_of(params, root)
    assert f"{lost}: missing or damaged: training goes back before step 16" in said
    assert resumed_from(said) == 14 and with_snapshots(root) == straight


def test_a_base_may_omit_defaults_that_the_training_states(root: Path, smoke: Callable[..., Params]) -> None:
    def of(rest: dict[str, object], **changes: dict[str, object]) -> Params:
        network = OtherNetwork(kind="dit", rest={"width": 16, "depth": 1, "heads": 2, **rest})
        return smoke(training={"steps": 1}, **changes).model_copy(update={"network": network})

    train(of({}), "cosine", root)
    (root / "imported").mkdir()
    (root / "models" / "cosine").rename(root / "imported" / "base")
    name = f"base@{models.read_model_record(root / 'imported/base').weights_sha256}"
    train(of({"patch": 2, "dropout": 0.0}, schedules={"linear": {"schedule": "linear", "base": name}}), "linear", root)
    with pytest.raises(InputError, match=r"has patch 2, but this training's network has 4; change network\.patch"):
        train(of({"patch": 4}, schedules={"linear": {"schedule": "linear", "base": name}}), "linear", root)


def test_a_transformer_through_train_checkpoint_and_sample(root: Path, smoke: Callable[..., Params]) -> None:
    """Uses a learned variance and bfloat16.

    Diffusers' pipelines cannot express this model, so the export is refused in one line.
    """
    dit = OtherNetwork(kind="dit", rest={"width": 32, "depth": 2, "heads": 2, "patch": 2})
    params = smoke(
        diffusion={"variance": "learned"},
        training={"steps": 6, "loss": "hybrid", "precision": "bfloat16", "compile": True},
        sampling={"images": 4, "batch": 4},
    ).model_copy(update={"network": dit})
    metrics = train(params, "cosine", root)
    denoiser, about = checkpoint.load(root / "models/cosine")
    assert (about.network.kind, about.network.out_channels, about.network.settings["width"]) == ("dit", 2, 32)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in denoiser.net.parameters())
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert float(denoiser.net(x, torch.tensor([3.0, 50.0])).detach().abs().max()) > 0
    sample_point(params, Point.parse("cosine-ddpm-5"), root)
    assert samples.read_samples(root / "samples/cosine-ddpm-5.npz").images.std() > 0
    with pytest.raises(InputError, match="the network is of kind dit, but a DDPMPipeline runs only a UNet2DModel"):
        export_diffusers(root / "models/cosine", root / "exported")
    assert not (root / "exported").exists()


def test_a_training_starts_from_another_model(root: Path, smoke: Callable[..., Params]) -> None:
    """The other model has another schedule and target. A wrong model is refused in one line, and nothing is trained."""
    base = smoke(training={"steps": 30, "validate_every": 30})
    train(base, "cosine", root)
    (root / "imported").mkdir()
    (root / "models" / "cosine").rename(root / "imported" / "base")
    weights = models.read_model_record(root / "imported/base").weights_sha256
    before = load_file(root / "imported/base/model.safetensors")

    def of(name: str, **changes: dict[str, object]) -> Params:
        training = {"steps": 1, "learning_rate": 1e-12, "warmup": 0, "log_every": 1}
        schedules = {"linear": {"schedule": "linear", "base": name}}
        return smoke(**{"training": training, "schedules": schedules, "diffusion": {"target": "v"}, **changes})

    for name, changes, line in (
        (f"none@{weights}", {}, "base: the folder imported/none does not exist"),
        (f"base@{'0' * 64}", {}, f"imported/base holds other weights; .* base@{weights}"),
        (f"base@{weights}", {"network": {"channels": 24}}, "has channels 16, but .* has 24; change network.channels"),
        (
            f"base@{weights}",
            {"diffusion": {"variance": "learned"}, "training": {"steps": 1, "loss": "hybrid"}},
            "has out_channels None, but this training's network has 2; change diffusion.variance",
        ),
    ):
        with pytest.raises(InputError, match=line):
            train(of(name, **changes), "linear", root)
        assert not (root / "models").exists() or not (root / "models/linear").exists()

    params = of(f"base@{weights}", network={"dropout": 0.1})  # dropout has no weights
    train(params, "linear", root)
    for name, tensor in load_file(root / "models/linear/model.safetensors").items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-7)
    _, about = checkpoint.load(root / "models/linear")
    assert (about.schedule.name, about.target, about.training.content["base"]) == ("linear", "v", f"base@{weights}")
    data = about.data.sha256
    assert identity_of_model(about) == training_identity(params, "linear", data)
    alone = of("base@" + "1" * 64)
    assert training_identity(params, "linear", data) != training_identity(alone, "linear", data)
    assert training_key(params, "linear", data) != training_key(alone, "linear", data)


def test_immiscible_noise_is_nearer_to_its_images() -> None:
    """The pairing has the least sum of distances, found by trying all pairings."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(6, 1, 4, 4, generator=generator), torch.randn(6, 1, 4, 4, generator=generator)
    distances = torch.cdist(x_0.flatten(1), eps.flatten(1))

    def total(order: Sequence[int]) -> float:
        return float(distances[torch.arange(6), torch.tensor(order)].sum())

    found = PAIRINGS["immiscible"](x_0, eps).tolist()  # type: ignore[misc]
    assert sorted(found) == [*range(6)] and found != [*range(6)]
    assert total(found) == pytest.approx(min(map(total, permutations(range(6)))))


def test_stopped_at_any_step_it_ends_with_the_same_bytes(
    root: Path, digits: Path, smoke: Callable[..., Params]
) -> None:
    params = smoke(training={"steps": 20, "log_every": 4, "validate_every": 8}, compute={"checkpoint_every": 3})
    train(params, "cosine", root)
    straight = outputs(root)
    for step in (1, 7, 16):
        train_root = root / str(step)
        train_root.mkdir()
        (train_root / "dataset").symlink_to(digits / "dataset")
        with pytest.raises(Stop):
            train(params, "cosine", train_root, stop_at(step))
        assert not (train_root / "models").exists()
        messages: list[str] = []
        train(params, "cosine", train_root, lambda progress, to=messages: to.append(progress.message))
        assert outputs(train_root) == straight, step
        # A report comes before the checkpoint of its step, so the last checkpoint is at or below step - 1.
        assert resumed_from(messages) == ((step - 1) // 3 * 3 or None)


def test_more_steps_alone_go_on_from_the_end(
    root: Path, digits: Path, smoke: Callable[..., Params], tmp_path: Path
) -> None:
    settings = {"log_every": 4, "validate_every": 8}
    train(smoke(training={"steps": 10, **settings}), "cosine", root)
    messages: list[str] = []
    longer = smoke(training={"steps": 17, **settings})
    train(longer, "cosine", root, lambda progress: messages.append(progress.message))
    assert resumed_from(messages) == 10
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "dataset").symlink_to(digits / "dataset")
    train(longer, "cosine", fresh)
    assert outputs(fresh) == outputs(root)


def test_what_decides_the_weights_decides_the_key(smoke: Callable[..., Params]) -> None:
    base = training_key(smoke(), "cosine", "data")
    assert base == training_key(
        smoke(training={"steps": 999}, sampling={"images": 2}, compute={"slots": 7}), "cosine", "data"
    )
    others = [
        training_key(smoke(training={"batch": 33}), "cosine", "data"),
        training_key(smoke(seed=1), "cosine", "data"),
        training_key(smoke(network={"channels": 24}), "cosine", "data"),
        training_key(smoke(diffusion={"target": "v"}), "cosine", "data"),
        training_key(smoke(), "linear", "data"),
        training_key(smoke(), "cosine", "other data"),
        training_key(smoke(schedules={"cosine": {"seed": 2}}), "cosine", "data"),
    ]
    assert len({base, *others}) == 8


def test_the_seed_of_a_row_is_that_of_its_training_alone(
    root: Path, digits: Path, smoke: Callable[..., Params], tmp_path: Path
) -> None:
    """A seed in a row gives the same bytes as this seed at the top of the file. Model and parameters have one identity."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset").symlink_to(digits / "dataset")
    own = smoke(schedules={"cosine": {"seed": 5}}, training={"steps": 3})
    train(own, "cosine", root)
    train(smoke(seed=5, training={"steps": 3}), "cosine", other)
    assert outputs(root) == outputs(other)
    about = models.read_trained(root, "cosine")
    assert identity_of_model(about) == training_identity(own, "cosine", about.data.sha256)
    assert own.seed == 0 and about.training.seed == 5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_resume_state_is_passed_over(damage: str, root: Path, smoke: Callable[..., Params]) -> None:
    params = smoke(training={"steps": 12}, compute={"checkpoint_every": 4})
    train(params, "cosine", root)
    straight = outputs(root)
    newest = sorted((root / ".cache/training").glob("*/*.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    else:
        content.clear()
    newest.write_bytes(content)
    messages: list[str] = []
    train(params, "cosine", root, lambda progress: messages.append(progress.message))
    assert any("damaged, passed over" in message for message in messages)
    assert resumed_from(messages) == 8
    assert outputs(root) == straight


def test_no_more_than_two_resume_states_stay(root: Path, smoke: Callable[..., Params]) -> None:
    train(smoke(training={"steps": 12}, compute={"checkpoint_every": 2}), "cosine", root)
    states = sorted((root / ".cache/training").glob("*/*.safetensors"))
    assert [int(path.stem) for path in states] == [10, 12]


def test_divergence_stops_with_step_rate_and_last_good_state(root: Path, smoke: Callable[..., Params]) -> None:
    params = smoke(training={"steps": 60, "learning_rate": 1e30, "log_every": 1, "warmup": 0})
    with pytest.raises(
        InputError, match=r"the loss is (nan|inf) at step \d+ \(learning rate 1e\+30\); the last good state is at"
    ):
        train(params, "cosine", root)
    assert not (root / "models").exists()


@pytest.mark.parametrize(
    ("changes", "schedule", "message"),
    [
        ({}, "exponential", "no row"),
        ({"network": {"attention": [16]}}, "cosine", "never occurs"),
        ({"network": {"multipliers": [1, 1, 1, 1, 1]}}, "cosine", "cannot be halved"),
        ({"compute": {"device": "cuda"}}, "cosine", "no GPU"),
        ({"diffusion": {"timesteps": 20_000}}, "sqrt", "train sqrt: diffusion.target: target eps does not determine"),
    ],
)
def test_refused(changes: dict, schedule: str, message: str, root: Path, smoke: Callable[..., Params]) -> None:
    if "cuda" in str(changes) and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(InputError, match=message):
        train(smoke(**changes), schedule, root)
    assert not (root / "models").exists()


def test_no_dataset(tmp_path: Path, smoke: Callable[..., Params]) -> None:
    with pytest.raises(InputError, match="no such file"):
        train(smoke(), "cosine", tmp_path)


@pytest.mark.parametrize("damage", ["weights", "json", "format", "shape", "missing"])
def test_a_damaged_checkpoint_is_one_line(damage: str, root: Path, smoke: Callable[..., Params]) -> None:
    train(smoke(training={"steps": 1}), "cosine", root)
    folder = root / "models/cosine"
    about = models.read_model_record(folder).content
    weights = folder / "model.safetensors"
    if damage == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "json":
        (folder / "model.json").write_text("{")
    elif damage == "format":
        records.write_record(folder / "model.json", {**about, "format": 99})
    elif damage == "shape":
        records.write_record(folder / "model.json", {**about, "network": {**about["network"], "channels": 24}})
    else:
        weights.unlink()
    with pytest.raises(InputError) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value) and "cosine" in str(caught.value)


def test_the_checkpoint_holds_the_average(root: Path, smoke: Callable[..., Params]) -> None:
    train(smoke(training={"steps": 8}), "cosine", root)
    state = load_file(sorted((root / ".cache/training").glob("*/*.safetensors"))[-1])
    for name, tensor in load_file(root / "models/cosine/model.safetensors").items():
        assert torch.equal(tensor, state[f"ema.{name}"])
        assert np.isfinite(tensor.numpy()).all()
