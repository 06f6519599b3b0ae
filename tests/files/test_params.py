"""Checks that the recipes are valid, and that every fault in params.yaml gives one line that names its place."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ddpm.errors import InputError
from ddpm.files.params import Params
from ddpm.parameters import Point

ROOT = Path(__file__).parents[2]


def raw(name: str = "smoke") -> dict:
    return YAML(typ="safe").load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_sound(path: Path) -> None:
    from ddpm.files.checkpoint import network
    from ddpm.runtime.drawing import check_row
    from ddpm.stages.train import network_entry, noise_schedule

    params = Params.load(path)
    assert {point.schedule for point in params.points()} == set(params.sweep.schedules)
    for name, row in params.samplers.items():
        check_row(name, row)
    for schedule in params.sweep.schedules:
        noise_schedule(params, schedule)
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 32, 32), "cifar10": (3, 32, 32)}
    data = params.data
    shape = (data.channels, data.size, data.size) if data.source == "image_folder" else shapes[data.source]
    network(network_entry(params, shape))


def test_the_default_is_the_mnist_recipe() -> None:
    assert Params.load(ROOT / "params.yaml") == Params.load(ROOT / "recipes" / "mnist.yaml")


def test_cifar10_is_the_papers_table() -> None:
    from ddpm.files.checkpoint import network
    from ddpm.stages.train import network_entry

    params = Params.load(ROOT / "recipes" / "cifar10.yaml")
    net = network(network_entry(params, (3, 32, 32)))
    assert sum(parameter.numel() for parameter in net.parameters()) == 35_746_307
    training = params.training
    assert (training.steps, training.batch, training.learning_rate, training.warmup) == (800_000, 128, 2e-4, 5000)
    assert (training.ema, training.clip, training.flip, params.network.dropout) == (0.9999, 1.0, True, 0.1)


FAULTS = [
    (("training", "setps"), 100, "training.setps"),
    (("training", "steps"), 0, "training.steps"),
    (("training", "steps"), "many", "training.steps"),
    (("training", "steps"), 10.5, "training.steps"),
    (("training", "steps"), True, "training.steps"),
    (("training", "learning_rate"), float("nan"), "training.learning_rate"),
    (("training", "learning_rate"), -1e-3, "training.learning_rate"),
    (("training", "ema"), 1.0, "training.ema"),
    (("training", "precision"), "float8", "training.precision"),
    (("data", "source"), "Image Net", "data.source"),
    (("data", "source"), "../digits", "data.source"),
    (("data", "test_fraction"), 1.0, "data.test_fraction"),
    (("network", "channels"), 12, "network.channels"),
    (("network", "multipliers"), [], "network.multipliers"),
    (("diffusion", "target"), "score", "diffusion.target"),
    (("evaluation", "layer"), 100, "evaluation.layer"),
    (("sampling", "clip"), 1.5, "sampling.clip: expected true, false, or a quantile"),
    (("sampling", "clip"), 1.0, "sampling.clip: expected true, false, or a quantile"),
    (("sampling", "clip"), 0.0, "sampling.clip: expected true, false, or a quantile"),
    (("sampling", "clip"), "yes", "sampling.clip: expected true, false, or a quantile"),
    (("samplers", "ddim", "eta"), float("inf"), "samplers.ddim.eta"),
    (("samplers", "Bad-Name"), {"sampler": "ddim"}, "samplers.Bad-Name"),
    (("sweep", "samplers"), ["nobody"], "sweep.samplers: no row 'nobody'"),
    (("sweep", "schedules"), ["nobody"], "sweep.schedules: no row 'nobody'"),
    (("schedules", "cosine", "start"), 1.5, "schedules.cosine.start"),
    (("schedules", "cosine", "zero_terminal_snr"), True, "schedules.cosine: alpha_bar_T is 0, so eps says nothing"),
    (("schedules", "cosine"), {"schedule": "rectified"}, "schedules.cosine: alpha_bar_T is 0, so eps says nothing"),
    (("compute", "preview_fid"), 1, "compute.preview_fid: FID takes two images or more"),
    (("sweep", "steps"), [5, 5], "sweep.steps: names something twice"),
    (("sweep", "steps"), [101], "more than diffusion.timesteps"),
    (("sweep", "schedules"), ["lin-ear"], "sweep.schedules"),
    (("training", "loss"), "l1", "training.loss"),
    (("training", "loss"), "hybrid", "training.loss: hybrid trains a variance"),
    (("diffusion", "variance"), "learned", "training.loss: simple would leave the variance"),
    (("samplers", "ddpm", "variance"), "learned", "samplers.ddpm.variance: learned needs diffusion.variance"),
    (("promotion",), {"judges": ["sfid"]}, "promotion.judges: sfid is not among evaluation.judges"),
    (("tracking",), {"name": "My cats"}, "tracking.name"),
    (("tracking",), {"name": ""}, "tracking.name"),
    (("seed",), -1, "seed"),
    (("surprise",), {}, "surprise"),
]


@pytest.mark.parametrize(("place", "value", "message"), FAULTS, ids=lambda value: str(value)[:30])
def test_one_fault_one_line(place: tuple[str, ...], value: object, message: str, tmp_path: Path) -> None:
    values = raw()
    section = values
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    path = tmp_path / "params.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(values, file)
    with pytest.raises(InputError) as caught:
        Params.load(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("clip", [True, False, 0.001, 0.995])
def test_clip_is_a_choice_or_a_quantile(clip: bool | float) -> None:
    values = raw()
    values["sampling"]["clip"] = clip
    assert Params.check(values, "params.yaml").sampling.clip == clip


@pytest.mark.parametrize(
    ("old", "new"), [("fashion-mnist", "fashion_mnist"), ("image-folder", "image_folder"), ("digits", "digits")]
)
def test_an_old_name_of_a_source_is_read(old: str, new: str) -> None:
    values = raw()
    values["data"]["source"] = old
    params = Params.check(values, "params.yaml")
    assert params.data.source == new
    assert params.dataset_name == old  # experiments and registered models keep their names


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1, 2", "\x00", "seed: 0\nseed: 1\n", "just words"])
def test_files_that_are_no_parameters(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"params\.yaml") as caught:
        Params.load(path)
    assert "\n" not in str(caught.value)


def test_the_params_yaml_of_another_project_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("data: {path: raw}\ntrain: {lr: 0.1}\n")
    assert Params.find(path) is None
    path.write_text("diffusion: {timesteps: 1000}\n")
    with pytest.raises(InputError, match="Field required"):
        Params.find(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Params.load(tmp_path / "params.yaml")


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=5), x),
        max_leaves=5,
    )
)
def test_any_value_in_any_section_is_taken_or_refused_in_one_line(value: object) -> None:
    for section in raw():
        try:
            Params.check({**raw(), section: value}, "params.yaml")
        except InputError as error:
            assert str(error).startswith("params.yaml: ") and "\n" not in str(error)


def test_rows_that_differ_in_the_seed_alone_are_trainings_of_one_schedule() -> None:
    raw = Params.load(ROOT / "recipes" / "smoke.yaml").to_json()
    raw["schedules"] = {
        "cosine": {"schedule": "cosine"},
        "wide": {"schedule": "cosine", "s": 0.02, "seed": 1},
        "again": {"schedule": "cosine", "seed": 1},
        # this is the seed of the file, so it is the same training as the first row
        "same": {"schedule": "cosine", "seed": 0},
    }
    raw["sweep"]["schedules"] = list(raw["schedules"])
    found = Params.check(raw, "params")
    assert found.replicates() == [["cosine", "again"], ["wide"]]
    assert [found.training_seed(name) for name in raw["schedules"]] == [0, 1, 1, 0]


def test_points() -> None:
    params = Params.check(raw(), "smoke")
    assert [point.name for point in params.points()] == [
        "cosine-ddpm-2",
        "cosine-ddpm-5",
        "cosine-ddim-2",
        "cosine-ddim-5",
    ]
    for point in params.points():
        assert Point.parse(point.name) == point


@pytest.mark.parametrize(
    "name",
    ["linear", "linear-ddim", "linear-ddim-0", "linear-ddim-x", "a-b-c-1", "Linear-ddim-5", "", "-ddim-5", "l-d-5\n"],
)
def test_names_that_are_no_points(name: str) -> None:
    with pytest.raises(InputError, match="no point of a sweep") as caught:
        Point.parse(name)
    assert "\n" not in str(caught.value)


def test_fields_at_their_default_do_not_enter_the_record_of_a_row() -> None:
    """The order of the options also matters, because the keys of cached images and runs are hashes of these options."""
    row = Params.load(ROOT / "recipes" / "digits.yaml").samplers["ddim"]
    assert json.dumps(row.options()) == '{"sampler": "ddim", "spacing": "leading", "eta": 0.0}'
