"""Converts networks and schedules to and from diffusers' UNet2DModel and DDPMScheduler, the format of google/ddpm-*.

The functions are pure: they take and return dicts of tensors and the parsed config.json and scheduler_config.json. The
network is the same on both sides, layer for layer. Only names differ, and diffusers' attention has three matrices (q,
k, v) where UNet has one. "The family" below means the UNet2DModels that UNet can express. Every function raises
ValueError with the configuration key that has no counterpart on the other side.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.schedule import ALIASES, SCHEDULES, NoiseSchedule
from ddpm.networks.unet import MOST_BLOCKS, UNet

# Keys of UNet2DModel that are fixed in the family: (diffusers' default for a missing key, the values allowed here).
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "freq_shift": (0, (1,)),
    "flip_sin_to_cos": (True, (False,)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "downsample_type": ("conv", ("conv",)),
    "upsample_type": ("conv", ("conv",)),
    "act_fn": ("silu", ("silu", "swish")),
    "norm_eps": (1e-5, (1e-6,)),
    "resnet_time_scale_shift": ("default", ("default",)),
    "add_attention": (True, (True,)),
    "class_embed_type": (None, (None,)),
    "num_class_embeds": (None, (None,)),
}
# Keys that describe a network, with diffusers' default for a missing key; `...` marks a required key.
_LAYOUT: dict[str, Any] = {
    "sample_size": ...,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ...,
    "up_block_types": ...,
    "block_out_channels": ...,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "time_embedding_dim": None,
    "num_train_timesteps": None,  # used only by learned time embeddings
}
# UNet's parameters and their defaults.
_SETTINGS: dict[str, Any] = {
    name: parameter.default for name, parameter in list(inspect.signature(UNet.__init__).parameters.items())[1:]
}

_OURS_ALONE = ("out_channels", "classes")  # for a learned variance and for class labels; not converted

DEEPEST = 16  # the most resolutions of an imported network

_TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}

_TOP = {
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "first": "conv_in",
    "last_norm": "conv_norm_out",
    "last": "conv_out",
}
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "out": "to_out.0"}
_QKV = ("to_q", "to_k", "to_v")
# Parts of tensor names before diffusers 0.13, and their present names.
_OLD = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def _bad_value(key: str, value: Any, why: str) -> ValueError:
    return ValueError(f"{key} = {value!r}: {why}")


def _check_whole(key: str, value: Any, most: int = 2**16) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise _bad_value(key, value, f"expected a whole number from 1 to {most:,}")
    return value


# Networks.


def _layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of _LAYOUT's keys. Raises ValueError for a missing key or a network of another family."""
    if config.get("_class_name") != "UNet2DModel":
        raise _bad_value("_class_name", config.get("_class_name"), "expected UNet2DModel")
    for key, (default, allowed) in _FIXED.items():
        if config.get(key, default) not in allowed:
            missing = "" if key in config else " (the key is missing, so diffusers' default applies)"
            raise _bad_value(key, config.get(key, default), f"must be {allowed[0]!r}{missing}")
    for key, value in config.items():
        if key not in _FIXED and key not in _LAYOUT and not key.startswith("_") and value:
            raise _bad_value(key, value, "ddpm's UNet has no counterpart")
    layout = _LAYOUT | {key: value for key, value in config.items() if key in _LAYOUT}
    for key, value in layout.items():
        if value is ...:
            raise ValueError(f"{key}: missing")
    return layout


def settings_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Converts config.json of a UNet2DModel to the arguments of UNet. Raises ValueError if it is not of the family."""
    layout = _layout(config)
    widths = layout["block_out_channels"]
    if not isinstance(widths, (list, tuple)) or not 1 <= len(widths) <= DEEPEST:
        raise _bad_value("block_out_channels", widths, f"expected a list of 1 to {DEEPEST} widths")
    widths = [_check_whole("block_out_channels", width) for width in widths]
    size = layout["sample_size"]
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise _bad_value("sample_size", size, "the network takes square images of one size")
    _check_whole("sample_size", size)
    for key in ("in_channels", "norm_num_groups"):
        _check_whole(key, layout[key])
    _check_whole("layers_per_block", layout["layers_per_block"], MOST_BLOCKS)
    head, groups, attention = layout["attention_head_dim"], layout["norm_num_groups"], _attention(layout, len(widths))
    attended = {width for width, attends in zip(widths, attention, strict=True) if attends} | {widths[-1]}
    for key, wrong, why in (
        ("sample_size", size % 2 ** (len(widths) - 1), f"cannot be halved {len(widths) - 1} times"),
        ("out_channels", layout["out_channels"] != layout["in_channels"], "differs from in_channels"),
        ("block_out_channels", widths[0] < 8 or widths[0] % 2, "the first must be even, and 8 or more"),
        ("norm_num_groups", any(width % groups for width in widths), f"does not divide the widths {widths}"),
        ("attn_norm_num_groups", layout["attn_norm_num_groups"] not in (None, groups), "differs from norm_num_groups"),
        (
            "attention_head_dim",
            head is not None and any(width % _check_whole("attention_head_dim", head) for width in attended),
            f"does not divide the widths with attention, {sorted(attended)}",
        ),
        ("downsample_padding", layout["downsample_padding"] not in (0, 1), "must be 0 or 1"),
        (
            "time_embedding_dim",
            layout["time_embedding_dim"] not in (None, 4 * widths[0]),
            "must be null or 4 times the first width",
        ),
        (
            "dropout",
            type(layout["dropout"]) not in (int, float) or not 0 <= layout["dropout"] < 1,
            "must lie in [0, 1)",
        ),
    ):
        if wrong:
            raise _bad_value(key, layout[key], why)
    return {
        "image_channels": layout["in_channels"],
        "image_size": size,
        "channels": widths[0],
        "multipliers": [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths],
        "blocks": layout["layers_per_block"],
        "attention": [size // 2**level for level, attends in enumerate(attention) if attends],
        "heads": 1,
        "dropout": layout["dropout"],
        "norm_groups": groups,
        "head_channels": head,
        "symmetric_padding": layout["downsample_padding"] == 1,
    }


def _attention(layout: Mapping[str, Any], levels: int) -> list[bool]:
    """Returns for each level whether it has attention. Raises ValueError unless the way up mirrors the way down."""
    down, up = layout["down_block_types"], layout["up_block_types"]
    for key, kinds, allowed in (
        ("down_block_types", down, ("DownBlock2D", "AttnDownBlock2D")),
        ("up_block_types", up, ("UpBlock2D", "AttnUpBlock2D")),
    ):
        if not isinstance(kinds, (list, tuple)) or len(kinds) != levels:
            raise _bad_value(key, kinds, f"expected {levels} blocks, one for each of block_out_channels")
        for kind in kinds:
            if kind not in allowed:
                raise _bad_value(key, kind, f"expected {' or '.join(allowed)}")
    attends = [kind.startswith("Attn") for kind in down]
    if attends != [kind.startswith("Attn") for kind in reversed(up)]:
        raise _bad_value("up_block_types", list(up), "must have attention where down_block_types has it")
    return attends


def settings_to_diffusers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the arguments of UNet to config.json of a UNet2DModel. Raises ValueError if there is no such model."""
    for key, value in settings.items():
        if (key not in _SETTINGS or key in _OURS_ALONE) and value:
            raise _bad_value(f"network {key}", value, "cannot be converted to diffusers' UNet2DModel")
    full = _SETTINGS | {key: value for key, value in settings.items() if key in _SETTINGS}
    net = _empty(full)
    widths = [round(full["channels"] * multiplier) for multiplier in full["multipliers"]]
    if widths[0] != full["channels"]:
        raise _bad_value(
            "network multipliers", list(full["multipliers"]), "must begin with 1 for diffusers' UNet2DModel"
        )
    attends = [full["image_size"] // 2**level in full["attention"] for level in range(len(widths))]
    attended = {width for width, attend in zip(widths, attends, strict=True) if attend} | {widths[-1]}
    head = full["head_channels"]
    if head is None and full["heads"] > 1:
        if len(attended) > 1:
            raise _bad_value(
                "network heads",
                full["heads"],
                f"needs several attention_head_dim, one for each of the widths {sorted(attended)}",
            )
        head = widths[-1] // full["heads"]
    return {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "add_attention": True,
        "attention_head_dim": head,
        "block_out_channels": widths,
        "center_input_sample": False,
        "class_embed_type": None,
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "downsample_padding": 1 if full["symmetric_padding"] else 0,
        "downsample_type": "conv",
        "dropout": full["dropout"],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": full["image_channels"],
        "layers_per_block": full["blocks"],
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": net.last_norm.num_groups,
        "num_class_embeds": None,
        "out_channels": full["image_channels"],
        "resnet_time_scale_shift": "default",
        "sample_size": full["image_size"],
        "time_embedding_type": "positional",
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "upsample_type": "conv",
    }


def _empty(settings: Mapping[str, Any]) -> UNet:
    """Builds the network on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return UNet(**settings)


def _names(net: UNet) -> dict[str, tuple[str, ...]]:
    """Maps our tensor names to theirs: to one name, or to three (q, k, v) if our tensor stacks three of theirs."""
    modules: dict[str, str] = {}
    for path, kind in (("down", "downsamplers"), ("up", "upsamplers")):
        level = index = 0
        for number, layer in enumerate(getattr(net, path)):
            if hasattr(layer, "block"):
                modules[f"{path}.{number}.block"] = f"{path}_blocks.{level}.resnets.{index}"
                modules[f"{path}.{number}.attention"] = f"{path}_blocks.{level}.attentions.{index}"
                index += 1
            else:
                modules[f"{path}.{number}"] = f"{path}_blocks.{level}.{kind}.0"
                level, index = level + 1, 0
    for number in (0, 1):
        modules[f"middle.{number}.block"] = f"mid_block.resnets.{number}"
    modules["middle.0.attention"] = "mid_block.attentions.0"

    names: dict[str, tuple[str, ...]] = {}
    for ours in net.state_dict():
        module, _, kind = ours.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if module in _TOP:
            names[ours] = (f"{_TOP[module]}.{kind}",)
        elif leaf == "qkv":
            names[ours] = tuple(f"{modules[parent]}.{theirs}.{kind}" for theirs in _QKV)
        else:
            leaves = _ATTENTION if parent.endswith("attention") else {**_BLOCK, "conv": "conv"}
            names[ours] = (f"{modules[parent]}.{leaves[leaf]}.{kind}",)
    return names


def weights_from_diffusers(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts a UNet2DModel's tensors to the float32 state of UNet(**settings).

    Raises ValueError if a tensor is missing, has no counterpart or has another shape.
    """
    given = {_modern_name(name): tensor for name, tensor in weights.items()}
    net = _empty(settings)
    names, shapes = _names(net), {name: tensor.shape for name, tensor in net.state_dict().items()}
    expected = {theirs for several in names.values() for theirs in several}
    for fault, faulty in (("missing", expected - given.keys()), ("unexpected", given.keys() - expected)):
        if faulty:
            raise ValueError(
                f"{len(faulty)} of the weights {fault}: {', '.join(sorted(faulty)[:3])}{' ...' * (len(faulty) > 3)}"
            )
    for ours, several in names.items():
        shape = (shapes[ours][0] // len(several), *shapes[ours][1:])
        for theirs in several:
            if given[theirs].shape != shape:
                raise ValueError(f"{theirs}: shape {list(given[theirs].shape)}, but config.json implies {list(shape)}")
    return {ours: torch.cat([given[theirs].float() for theirs in several]) for ours, several in names.items()}


def weights_to_diffusers(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts the state of UNet(**settings) to a UNet2DModel's tensors. Raises ValueError for another state."""
    net = _empty({key: value for key, value in settings.items() if key in _SETTINGS})
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError("the weights are not those of the network that the settings describe: names or shapes differ")
    return {
        theirs: part.clone().contiguous()
        for ours, several in _names(net).items()
        for theirs, part in zip(several, weights[ours].chunk(len(several)), strict=True)
    }


def _modern_name(name: str) -> str:
    for old, new in _OLD.items():
        name = name.replace(old, new)
    return name


# Schedules.


def schedule_from_diffusers(config: Mapping[str, Any]) -> tuple[dict[str, Any], int, str]:
    """Converts scheduler_config.json to (row, T, target).

    `row` holds the arguments of NoiseSchedule.named, with the schedule's name under `schedule`. Settings of the sampler
    (variance_type, clip_sample, timestep_spacing) are not converted: here they are no part of a model.

    Raises:
        ValueError: the schedule or the prediction has no counterpart here.
    """
    targets = {theirs: ours for ours, theirs in _TARGETS.items()}
    _check_configuration(config, targets)
    steps = _check_whole("num_train_timesteps", config.get("num_train_timesteps", 1000), 100_000)
    prediction = config.get("prediction_type", "epsilon")
    rescaled = bool(config.get("rescale_betas_zero_snr", False))
    betas = config.get("trained_betas")
    row = _row_from_names(config) if betas is None else _row_from_betas(betas, steps)
    if rescaled:
        row["zero_terminal_snr"] = True
    if row.get("zero_terminal_snr") and prediction == "epsilon":
        raise _bad_value("prediction_type", prediction, "eps does not determine the image at zero terminal SNR")
    try:
        NoiseSchedule.named(row["schedule"], steps, **{key: value for key, value in row.items() if key != "schedule"})
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"beta_schedule: {error}") from None
    return row, steps, targets[prediction]


def _row_from_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row for beta_schedule, beta_start and beta_end."""
    names = {theirs: ours for ours, theirs in _SCHEDULES.items()}
    theirs = config.get("beta_schedule", "linear")
    if theirs not in [*names]:
        raise _bad_value("beta_schedule", theirs, f"expected one of {', '.join(names)}")
    row: dict[str, Any] = {"schedule": names[theirs]}
    for ours, key, default in (("start", "beta_start", 1e-4), ("end", "beta_end", 2e-2)):
        if names[theirs] != "cosine" and config.get(key, default) != default:
            row[ours] = config[key]
    return row


def _check_configuration(config: Mapping[str, Any], predictions: Collection[str]) -> None:
    kind = config.get("_class_name")
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise _bad_value("_class_name", kind, "expected DDPMScheduler or DDIMScheduler")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in [*predictions]:  # a list: the value may be unhashable
        raise _bad_value("prediction_type", prediction, f"expected one of {', '.join(predictions)}")
    variance = config.get("variance_type", "fixed_small")
    if str(variance).startswith("learned"):
        raise _bad_value("variance_type", variance, "a network with a learned variance cannot be imported")
    if config.get("clip_sample", True) and config.get("clip_sample_range", 1.0) != 1:
        raise _bad_value("clip_sample_range", config["clip_sample_range"], "must be 1: images lie in [-1, 1]")


def _row_from_betas(betas: Any, steps: int) -> dict[str, Any]:
    """Returns the row with these betas: one of SCHEDULES with default parameters, or sqrt with any end points."""
    try:
        table = torch.tensor(betas, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        table = torch.zeros(0)
    if table.shape != (steps,):
        raise ValueError(f"trained_betas: expected a list of num_train_timesteps = {steps} numbers")
    rows: list[dict[str, Any]] = [{"schedule": name} for name in SCHEDULES]
    rows += [{**row, "zero_terminal_snr": True} for row in rows]
    if 0 < float(table[0]) < 1 and 0 < float(table[-1]) < 1:
        rows.append({"schedule": "sqrt", "start": float(table[0]) ** 2, "end": float(table[-1]) ** 2})
    for row in rows:
        candidate = NoiseSchedule.named(row["schedule"], steps, **{k: v for k, v in row.items() if k != "schedule"})
        if torch.allclose(candidate.betas, table, rtol=1e-5, atol=1e-7):
            return row
    raise ValueError(f"trained_betas: none of the schedules here ({', '.join(SCHEDULES)}) has these betas by default")


def schedule_to_diffusers(
    row: Mapping[str, Any], steps: int, target: str, variance: str = "fixed_large"
) -> dict[str, Any]:
    """Converts a schedule row to scheduler_config.json of a DDPMScheduler.

    A schedule without a name in diffusers is stored as its table, `trained_betas`.

    Args:
        row: the arguments of NoiseSchedule.named, with the schedule's name under `schedule`.
        steps: T.
        target: what the network predicts: eps, x0 or v.
        variance: the scheduler's variance_type.

    Raises:
        ValueError: diffusers has no such target, or the row is not a schedule.
    """
    if target not in _TARGETS:
        raise _bad_value("target", target, f"diffusers has {', '.join(_TARGETS)}")
    options = {key: value for key, value in row.items() if key != "schedule"}
    schedule = NoiseSchedule.named(row["schedule"], steps, **options)
    name = ALIASES.get(row["schedule"], row["schedule"])
    rescaled = bool(options.get("zero_terminal_snr", False))
    named = name in _SCHEDULES and "s" not in options
    return {
        "_class_name": "DDPMScheduler",
        "beta_end": options.get("end", 2e-2) if named else 2e-2,
        "beta_schedule": _SCHEDULES[name] if named else "linear",
        "beta_start": options.get("start", 1e-4) if named else 1e-4,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_train_timesteps": steps,
        "prediction_type": _TARGETS[target],
        "rescale_betas_zero_snr": rescaled and named,
        "steps_offset": 0,
        "thresholding": False,
        "timestep_spacing": "trailing"
        if rescaled
        else "leading",  # only the last time has zero SNR, and `leading` omits it
        "trained_betas": None if named else schedule.betas.tolist(),
        "variance_type": variance,
    }
