"""Checks networks and schedules against the real diffusers package, in both directions."""

from __future__ import annotations

import inspect
import json
import random
from typing import Any

import pytest
import torch

from ddpm import NoiseSchedule, UNet, interop

diffusers = pytest.importorskip("diffusers")

CIFAR10 = {  # google/ddpm-cifar10-32
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def layout(attends: str, widths: list[int], **changes: Any) -> dict[str, Any]:
    """Returns a configuration. attends: one letter per level, A for a level with attention."""
    return {
        **CIFAR10,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if level == "A" else "DownBlock2D" for level in attends],
        "up_block_types": ["AttnUpBlock2D" if level == "A" else "UpBlock2D" for level in reversed(attends)],
        "norm_num_groups": 8,
        **changes,
    }


LAYOUTS = {
    "cifar10": layout("-A--", [16, 32, 32, 32]),
    "celebahq-256": layout("----A-", [16, 16, 32, 32, 64, 64], sample_size=64),
    "heads of 8": layout("-AA", [16, 32, 64], attention_head_dim=8, sample_size=16),
    "one head, one block": layout("A-", [16, 24], attention_head_dim=None, layers_per_block=1, sample_size=16),
    "digits": layout("-A", [32, 64], in_channels=1, out_channels=1, sample_size=8, layers_per_block=1),
    "symmetric padding": layout("-A-", [24, 40, 64], downsample_padding=1, sample_size=16, dropout=0.1),
    "one level": layout("-", [16], sample_size=8),
    "wide": layout("-A-", [16, 24, 32], sample_size=[16, 24]),
    "high, attention on the way up alone": layout(
        "---", [16, 24, 32], sample_size=[32, 12], up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    ),
}


def theirs(config: dict[str, Any], seed: int = 0) -> Any:
    """Creates a UNet2DModel with random weights everywhere, even in biases, norms and last layers."""
    net = diffusers.UNet2DModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
            scale = fan_in**-0.5 if fan_in else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return net


def inputs(config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    size = config["sample_size"]
    sides = (size, size) if isinstance(size, int) else size
    x = torch.randn(3, config["in_channels"], *sides, generator=generator)
    return x, torch.tensor([0.0, 417.0, 999.0])


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_outputs_agree_both_ways_and_the_round_trip_changes_no_bit(name: str) -> None:
    config = LAYOUTS[name]
    origin = theirs(config)
    settings = interop.settings_from_diffusers(config)
    ours = UNet(**settings).eval()
    state = interop.weights_from_diffusers(origin.state_dict(), settings)
    ours.load_state_dict(state)
    x, t = inputs(config)
    expected = origin(x, t).sample
    assert 0.1 < float(expected.std()) < 10  # outputs are neither constant nor huge
    assert float((ours(x, t) - expected).abs().max()) < 1e-5

    # The way back goes through JSON, as files do.
    written = json.loads(json.dumps(interop.settings_to_diffusers(settings)))
    back = diffusers.UNet2DModel.from_config(written).eval()
    tensors = interop.weights_to_diffusers(state, settings)
    back.load_state_dict(tensors)
    assert torch.equal(back(x, t).sample, expected)
    again = interop.settings_from_diffusers(written)
    assert again == settings
    once_more = interop.weights_from_diffusers(tensors, again)
    assert once_more.keys() == state.keys()
    assert all(torch.equal(once_more[key], state[key]) for key in state)


def test_the_cifar10_configuration_has_35_746_307_parameters_on_both_sides() -> None:
    with torch.device("meta"):
        ours, origin = UNet(**interop.settings_from_diffusers(CIFAR10)), diffusers.UNet2DModel.from_config(CIFAR10)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 35_746_307
    assert sum(parameter.numel() for parameter in origin.parameters()) == 35_746_307
    written = interop.settings_to_diffusers({})  # the defaults of UNet
    assert {**written, "_diffusers_version": "0.0.4"}.items() >= CIFAR10.items()


TUTORIAL = {  # diffusers' tutorial on training an unconditional model; all other options have their defaults
    "_class_name": "UNet2DModel",
    "sample_size": 128,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}


def assert_imports(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Asserts that a UNet2DModel, its import, and the export of that import predict the same. Returns the settings."""
    origin, settings = theirs(config, seed), interop.settings_from_diffusers(config)
    state = interop.weights_from_diffusers(origin.state_dict(), settings, config.get("flip_sin_to_cos", True))
    ours = UNet(**settings).eval()
    ours.load_state_dict(state)
    x, t = inputs(config)
    labels = (torch.arange(3) % config["num_class_embeds"],) if config.get("num_class_embeds") else ()
    if "classes" in settings:  # the row past the last class is the null class
        assert settings["classes"] + settings.get("null_class", True) == config["num_class_embeds"]
        own = [torch.where(label < settings["classes"], label, -1) for label in labels]
    else:
        own = []
    expected, got = origin(x, t, *labels).sample, ours(x, t, *own)
    scale = max(1.0, float(expected.std()))
    assert float(expected.std()) > 0.05
    assert float((got - expected).abs().max()) < 1e-5 * scale

    written = json.loads(json.dumps(interop.settings_to_diffusers(settings)))
    back = diffusers.UNet2DModel.from_config(written).eval()
    back.load_state_dict(interop.weights_to_diffusers(state, settings))
    assert float((back(x, t, *labels).sample - expected).abs().max()) < 1e-5 * scale
    assert interop.settings_from_diffusers(written) == settings
    return settings


@torch.no_grad()
def test_the_tutorial_s_default_network_is_imported() -> None:
    with torch.device("meta"):
        ours, origin = UNet(**interop.settings_from_diffusers(TUTORIAL)), diffusers.UNet2DModel.from_config(TUTORIAL)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 113_673_219
    assert sum(parameter.numel() for parameter in origin.parameters()) == 113_673_219
    assert_imports({**TUTORIAL, "sample_size": 64, "block_out_channels": [32, 32, 64, 64, 128, 128]})


def random_layout(seed: int) -> dict[str, Any]:
    """Returns a configuration of UNet2DModel with random values of the options that are converted."""
    draw = random.Random(seed)
    levels, channels = draw.randint(1, 3), draw.choice([1, 3])
    widths = [draw.choice([8, 16, 24, 40]) for _ in range(levels)]
    down = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetResAttnDownBlock2D"]
    up = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "UNetResUpBlock2D"]
    config = {
        "sample_size": draw.choice([4, 8, [4, 8], [12, 8]]),
        "in_channels": channels,
        "out_channels": channels * draw.choice([1, 2]),
        "time_embedding_dim": draw.choice([None, 4 * widths[0]]),
        "freq_shift": draw.choice([0, 1]),
        "flip_sin_to_cos": draw.choice([True, False]),
        "down_block_types": [draw.choice(down) for _ in widths],
        "up_block_types": [draw.choice(up) for _ in widths],
        "block_out_channels": widths,
        "layers_per_block": draw.choice([1, 2, 3]),
        "downsample_padding": draw.choice([0, 1]),
        "downsample_type": draw.choice(["conv", "resnet", None]),
        "upsample_type": draw.choice(["conv", "resnet", None]),
        "dropout": draw.choice([0.0, 0.1]),
        "act_fn": draw.choice(["silu", "swish"]),
        "attention_head_dim": draw.choice([None, 1, 2, 4, 8]),
        "norm_num_groups": draw.choice([1, 2, 4, 8]),
        "attn_norm_num_groups": draw.choice([None, 1, 4]),
        "norm_eps": draw.choice([1e-5, 1e-6, 1e-3]),
        "resnet_time_scale_shift": draw.choice(["default", "scale_shift"]),
        "add_attention": draw.choice([True, False]),
        "num_class_embeds": draw.choice([None, None, 5]),
        "_null_class": draw.choice([True, False]),
    }
    defaults = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    for key, value in [*config.items()]:  # for a missing key, diffusers uses its default
        if key in defaults and value == defaults[key].default and draw.random() < 0.5:
            del config[key]
    return {"_class_name": "UNet2DModel", "in_channels": channels, **config}


@pytest.mark.parametrize("seed", range(40))
@torch.no_grad()
def test_every_layout_of_the_options_that_are_converted_is_imported(seed: int) -> None:
    assert_imports(random_layout(seed), seed)


REFUSED: dict[str, list[Any]] = {  # values of UNet2DModel's other options, which diffusers itself accepts
    "center_input_sample": [True],
    "time_embedding_type": ["fourier", "learned"],
    "time_embedding_dim": [36],
    "mid_block_type": [None],
    "mid_block_scale_factor": [2**0.5],
    "act_fn": ["mish", "gelu", "relu"],
    "attention_head_dim": [7],
    "class_embed_type": ["timestep", "identity"],
    "in_channels": [2, 4],
    "out_channels": [5],
    "down_block_types": [["SkipDownBlock2D"] * 3, ["AttnSkipDownBlock2D"] * 3],
    "up_block_types": [["SkipUpBlock2D"] * 3, ["AttnSkipUpBlock2D"] * 3],
    "sample_size": [None, [8, 0], [8, 8, 8], [8, "8"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_the_other_options_are_refused_by_their_name(key: str, value: Any) -> None:
    for seed in range(40):
        config = random_layout(seed)
        if len(config["block_out_channels"]) != 3 and key.endswith("block_types"):
            continue
        config |= {"add_attention": True, "num_class_embeds": None, key: value, "num_train_timesteps": 1000}
        with pytest.raises(ValueError, match=f"^{key} = ") as refused:
            interop.settings_from_diffusers(config)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("null_class", [True, False])
@torch.no_grad()
def test_classes_and_a_learned_variance_of_ours_are_the_same_there(null_class: bool) -> None:
    """In a UNet2DModel, the null class has the label after the last class, 10. In UNet, it is -1 or no label."""
    settings = {"image_channels": 1, "image_size": 8, "channels": 16, "multipliers": [1, 2], "blocks": 1}
    settings |= {"attention": [4], "classes": 10, "out_channels": 2, "null_class": null_class}
    ours = UNet(**settings).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.05)
    assert ours.label is not None
    ours.label.weight.mul_(10)
    config = interop.settings_to_diffusers(settings)
    assert (config["num_class_embeds"], config["out_channels"]) == (10 + null_class, 2)
    origin = diffusers.UNet2DModel.from_config(config).eval()
    origin.load_state_dict(interop.weights_to_diffusers(ours.state_dict(), settings))
    x, t = inputs({"sample_size": 8, "in_channels": 1})
    labels = torch.tensor([0, 9, 4])
    predictions = [ours(x, t, labels)]
    assert float((origin(x, t, labels).sample - predictions[0]).abs().max()) < 1e-6
    if null_class:
        predictions += [ours(x, t), ours(x, t, torch.full_like(labels, -1))]
        unlabelled = origin(x, t, torch.full_like(labels, 10)).sample
        assert float((unlabelled - predictions[1]).abs().max()) < 1e-6
        assert torch.equal(predictions[1], predictions[2])
        assert float((predictions[0] - predictions[1]).abs().max()) > 1e-3
    else:
        with pytest.raises(ValueError, match="no null class"):
            ours(x, t)
        with pytest.raises(IndexError):
            ours(x, t, torch.full_like(labels, -1))


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_a_network_of_ours_is_the_same_there(heads: int) -> None:
    settings = {
        "image_channels": 1,
        "image_size": 8,
        "channels": 32,
        "multipliers": [1, 2],
        "blocks": 1,
        "heads": heads,
    }
    settings |= {"attention": [4], "dropout": 0.1}
    ours = UNet(**settings).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + 0.05)
    origin = diffusers.UNet2DModel.from_config(interop.settings_to_diffusers(settings)).eval()
    origin.load_state_dict(interop.weights_to_diffusers(ours.state_dict(), settings))
    x, t = inputs({"sample_size": 8, "in_channels": 1})
    assert float(ours(x, t).std()) > 0.1
    assert torch.allclose(origin(x, t).sample, ours(x, t), atol=1e-5, rtol=0)


def test_the_attention_names_of_before_2023_are_read() -> None:
    config = LAYOUTS["heads of 8"]
    state = theirs(config).state_dict()
    new = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))
    old = {}
    for name, tensor in state.items():
        for now, before in new:
            name = name.replace(now, before)  # noqa: PLW2901
        old[name] = tensor
    assert old.keys() != state.keys()
    settings = interop.settings_from_diffusers(config)
    a, b = (interop.weights_from_diffusers(weights, settings) for weights in (state, old))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name = 'UNet2DConditionModel'"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types = 'SkipDownBlock2D'"),
        ({"up_block_types": None}, "up_block_types = None"),
        ({"up_block_types": ["UpBlock2D", "AttnDownBlock2D"]}, "up_block_types = 'AttnDownBlock2D'"),
        ({"downsample_type": "fir"}, "downsample_type = 'fir': must be 'conv' or 'resnet' or None"),
        ({"norm_eps": "1e-5"}, "norm_eps = '1e-5'"),
        ({"norm_eps": 0}, "norm_eps = 0"),
        ({"freq_shift": 16}, "freq_shift = 16"),
        ({"attn_norm_num_groups": 7}, "attn_norm_num_groups = 7"),
        ({"num_class_embeds": 1, "_null_class": True}, "num_class_embeds = 1"),
        ({"num_class_embeds": True}, "num_class_embeds = True"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift = 'spatial'"),
        ({"in_channels": True}, "in_channels = True"),
        ({"block_out_channels": [32, "64"]}, "block_out_channels = '64'"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24"),
        ({"norm_num_groups": 24}, "norm_num_groups = 24"),
        ({"downsample_padding": 2}, "downsample_padding = 2"),
        ({"sample_size": None}, "sample_size = None"),
        ({"sample_size": [8, 9]}, "sample_size"),
        ({"sample_size": 9}, "sample_size"),
        ({"layers_per_block": 0}, "layers_per_block = 0"),
        ({"encoder_hid_dim": 64}, "encoder_hid_dim = 64"),
    ],
)
def test_what_the_family_does_not_have_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        interop.settings_from_diffusers({**LAYOUTS["digits"], **changes})
    assert "\n" not in str(refused.value)


def test_a_missing_key_means_what_it_means_to_diffusers() -> None:
    config = {key: value for key, value in LAYOUTS["digits"].items() if key not in ("freq_shift", "norm_eps")}
    settings = interop.settings_from_diffusers(config)
    assert (settings["freq_shift"], settings["norm_eps"]) == (0, 1e-5)
    config = {key: value for key, value in LAYOUTS["digits"].items() if key != "attention_head_dim"}
    assert interop.settings_from_diffusers(config)["head_channels"] == 8
    config = {key: value for key, value in LAYOUTS["digits"].items() if key != "in_channels"}
    with pytest.raises(ValueError, match="out_channels = 1"):
        interop.settings_from_diffusers(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multipliers": [2, 2, 2, 2]}, "multipliers"),
        ({"attention": [32, 16], "heads": 4}, "heads = 4"),
        ({"image_channels": 4}, "image_channels = 4"),
        ({"attention": [32, 16], "residual_down": [32]}, "residual_down"),
        ({"attention": [16, 8], "residual_up": [16]}, "residual_up"),
        ({"middle_groups": 0}, "middle_groups = 0"),
        ({"patch": 2}, "patch = 2.*train with network.patch: 1"),
    ],
)
def test_a_network_that_diffusers_cannot_express_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interop.settings_to_diffusers(settings)


def test_weights_that_are_not_the_networks_are_refused() -> None:
    config = LAYOUTS["digits"]
    settings, state = interop.settings_from_diffusers(config), theirs(config).state_dict()
    ours = interop.weights_from_diffusers(state, settings)
    with pytest.raises(ValueError, match=r"1 of the weights missing: conv_in.bias"):
        interop.weights_from_diffusers({key: value for key, value in state.items() if key != "conv_in.bias"}, settings)
    with pytest.raises(ValueError, match=r"1 of the weights unexpected: class_embedding.weight"):
        interop.weights_from_diffusers({**state, "class_embedding.weight": torch.zeros(10, 128)}, settings)
    with pytest.raises(ValueError, match=r"conv_in.bias: shape \[3\]"):
        interop.weights_from_diffusers({**state, "conv_in.bias": torch.zeros(3)}, settings)
    with pytest.raises(ValueError, match="not those of the network"):  # two outputs per channel mean a learned variance
        interop.weights_to_diffusers({**ours, "last.bias": torch.zeros(2)}, settings)


# Schedules.

ROWS: list[dict[str, Any]] = [
    {"schedule": "linear"},
    {"schedule": "linear", "start": 2e-4, "end": 0.03},
    {"schedule": "scaled_linear", "start": 8.5e-4, "end": 0.012},
    {"schedule": "cosine"},
    {"schedule": "sigmoid"},
    {"schedule": "sqrt"},
    {"schedule": "linear", "zero_terminal_snr": True},
    {"schedule": "sqrt", "zero_terminal_snr": True},
]


@pytest.mark.parametrize("steps", [100, 1000])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_schedules_have_the_same_betas_there_and_come_back_the_same(row: dict[str, Any], steps: int) -> None:
    config = json.loads(json.dumps(interop.schedule_to_diffusers(row, steps, "v")))
    scheduler = diffusers.DDPMScheduler.from_config(config)
    options = {key: value for key, value in row.items() if key != "schedule"}
    betas = NoiseSchedule.named(row["schedule"], steps, **options).betas
    # diffusers rescales with differences of float32 numbers.
    tolerance = 2e-4 if row.get("zero_terminal_snr") and row["schedule"] != "sqrt" else 2e-7
    assert float((scheduler.betas.double() - betas).abs().max()) < tolerance
    assert scheduler.config.prediction_type == "v_prediction"
    assert interop.schedule_from_diffusers(dict(scheduler.config)) == (row, steps, "v")


def test_a_cosine_of_another_offset_goes_as_its_table() -> None:
    config = interop.schedule_to_diffusers({"schedule": "cosine", "s": 0.02}, 50, "eps")
    betas = NoiseSchedule.named("cosine", 50, s=0.02).betas
    assert torch.equal(diffusers.DDPMScheduler.from_config(config).betas, betas.float())
    with pytest.raises(ValueError, match="trained_betas: none of the schedules here"):
        interop.schedule_from_diffusers(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "KarrasVeScheduler"}, "_class_name"),
        ({"beta_schedule": "laplace"}, "beta_schedule = 'laplace'"),
        ({"beta_start": 0.0}, "beta"),
        ({"beta_start": None}, "^beta_start = None: expected a number$"),
        ({"beta_end": "0.02"}, "^beta_end = '0.02': expected a number$"),
        ({"variance_type": "learned"}, "variance_type = 'learned'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"clip_sample_range": 3.0}, "clip_sample_range"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ],
)
def test_schedules_that_cannot_be_had_are_refused_by_their_key(changes: dict[str, Any], message: str) -> None:
    config = interop.schedule_to_diffusers({"schedule": "linear"}, 1000, "eps")
    with pytest.raises(ValueError, match=message):
        interop.schedule_from_diffusers({**config, **changes})
