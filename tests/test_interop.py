"""Networks and schedules against the real diffusers package, both ways."""

from __future__ import annotations

import json
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
    """attends: one letter a level, A where it has attention."""
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
}


def theirs(config: dict[str, Any], seed: int = 0) -> Any:
    """A UNet2DModel with every weight random: biases too, and norms and last layers that begin at one or zero."""
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
    x = torch.randn(3, config["in_channels"], size, size, generator=generator)
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
    assert 0.1 < float(expected.std()) < 10  # no layer is dead, none blows up
    assert float((ours(x, t) - expected).abs().max()) < 1e-5

    # And back: through JSON, as the files go.
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
    written = interop.settings_to_diffusers({})  # UNet's own defaults
    assert {**written, "_diffusers_version": "0.0.4"}.items() >= CIFAR10.items()


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
        ({"down_block_types": ["DownBlock2D"] * 2}, "up_block_types"),
        ({"up_block_types": None}, "up_block_types = None"),
        ({"block_out_channels": [32, "64"]}, "block_out_channels = '64'"),
        ({"attention_head_dim": 24}, "attention_head_dim = 24"),
        ({"norm_num_groups": 24}, "norm_num_groups = 24"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05"),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos"),
        ({"freq_shift": 0}, "freq_shift"),
        ({"num_class_embeds": 10}, "num_class_embeds = 10"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"downsample_padding": 2}, "downsample_padding = 2"),
        ({"out_channels": 2}, "out_channels = 2"),
        ({"sample_size": None}, "sample_size = None"),
        ({"sample_size": [8, 16]}, "sample_size"),
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
    """A default UNet2DModel has freq_shift 0, which is not the family's."""
    config = {key: value for key, value in LAYOUTS["digits"].items() if key != "freq_shift"}
    with pytest.raises(ValueError, match=r"freq_shift = 0.*key is missing"):
        interop.settings_from_diffusers(config)
    config = {key: value for key, value in LAYOUTS["digits"].items() if key != "attention_head_dim"}
    assert interop.settings_from_diffusers(config)["head_channels"] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 10}, "classes = 10"),
        ({"out_channels": 6}, "out_channels = 6"),
        ({"multipliers": [2, 2, 2, 2]}, "multipliers"),
        ({"attention": [32, 16], "heads": 4}, "heads = 4"),
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
    with pytest.raises(ValueError, match="not those of the network"):  # two outputs a channel: a learned variance
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
    # Rescaling divides differences of float32 numbers there.
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
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"variance_type": "learned_range"}, "variance_type"),
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
