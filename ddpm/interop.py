"""Converts networks and schedules to and from diffusers' UNet2DModel and DDPMScheduler, the format of google/ddpm-*.

The functions are pure: they take and return dicts of tensors and the parsed config.json and scheduler_config.json. UNet and
UNet2DModel are the same network, layer for layer. Only the names differ, and diffusers' attention has three matrices (q, k, v)
where UNet has a single matrix. If a configuration key has no counterpart on the other side, every function raises a ValueError
that names the key.

- Classes: UNet's label embedding is UNet2DModel's class embedding, row for row. UNet's last row is the null class of
  classifier-free guidance, so num_class_embeds = classes + 1. UNet2DModel has no key for the null class, so the
  export adds the key NULL_CLASS. A config.json without this key describes a network that always takes a label.
- A learned variance doubles out_channels on both sides. The prediction comes first, then v. The scheduler reads v with
  variance_type = learned_range. diffusers' variance_type = learned has no counterpart.
- flip_sin_to_cos swaps the halves of the time embedding, so the import swaps the columns of the layer that reads it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm.diffusion.schedule import ALIASES, SCHEDULES, NoiseSchedule
from ddpm.networks.unet import MOST_BLOCKS, UNet

# Keys of UNet2DModel that UNet can express with some values only: (diffusers' default for a missing key, the values allowed).
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "center_input_sample": (False, (False,)),
    "time_embedding_type": ("positional", ("positional",)),
    "mid_block_type": ("UNetMidBlock2D", ("UNetMidBlock2D",)),
    "mid_block_scale_factor": (1, (1,)),
    "act_fn": ("silu", ("silu", "swish")),
    "class_embed_type": (None, (None,)),
    # The keys below have several allowed values.
    "downsample_type": ("conv", ("conv", "resnet", None)),
    "upsample_type": ("conv", ("conv", "resnet", None)),
    "resnet_time_scale_shift": ("default", ("default", "scale_shift")),
    "flip_sin_to_cos": (True, (True, False)),
    "add_attention": (True, (True, False)),
    "downsample_padding": (1, (0, 1)),
    "in_channels": (3, (1, 3)),
}
# Keys that describe a network, with diffusers' default for a missing key; `...` marks a required key.
_LAYOUT: dict[str, Any] = {
    "sample_size": ...,
    "out_channels": 3,
    "down_block_types": ...,
    "up_block_types": ...,
    "block_out_channels": ...,
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "num_train_timesteps": None,  # used only by learned time embeddings
}
NULL_CLASS = "_null_class"  # true if the last class embedding is the null class; diffusers keeps keys that begin with _
# Keys that diffusers' EMAModel adds to config.json when it saves a network.
_AVERAGING = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
# The block types on the way down and up: plain, with attention, and resized by a residual block without attention.
_BLOCKS = {
    "down": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
# UNet's parameters and their defaults.
_SETTINGS: dict[str, Any] = {
    name: parameter.default for name, parameter in list(inspect.signature(UNet.__init__).parameters.items())[1:]
}

DEEPEST = 16  # the most resolutions of an imported network

_TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}

_TOP = {
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "first": "conv_in",
    "last_norm": "conv_norm_out",
    "last": "conv_out",
    "label": "class_embedding",
}
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
    "conv": "conv",
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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _check_whole(key: str, value: Any, most: int = 2**16) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise _bad_value(key, value, f"expected a whole number from 1 to {most:,}")
    return value


# Networks.


def _layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config's network entries, with diffusers' defaults. Raises ValueError for missing or unsupported entries."""
    if config.get("_class_name") != "UNet2DModel":
        raise _bad_value("_class_name", config.get("_class_name"), "expected UNet2DModel")
    defaults = {key: default for key, (default, _) in _FIXED.items()} | _LAYOUT
    layout = defaults | {key: value for key, value in config.items() if key in defaults}
    for key, (_, allowed) in _FIXED.items():
        if layout[key] not in allowed:
            missing = "" if key in config else " (the key is missing, so diffusers' default applies)"
            raise _bad_value(key, layout[key], f"must be {' or '.join(map(repr, allowed))}{missing}")
    for key, value in config.items():
        if key not in defaults and key not in _AVERAGING and not key.startswith("_") and value:
            raise _bad_value(key, value, "ddpm's UNet has no counterpart")
    for key, value in layout.items():
        if value is ...:
            raise ValueError(f"{key}: missing")
    return layout


def settings_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Converts config.json of a UNet2DModel to the arguments of UNet. Raises ValueError if UNet cannot express the network.

    Arguments that later versions of UNet added are left out where they have UNet's defaults.
    """
    layout = _layout(config)
    widths = _widths(layout)
    size = _image_size(layout, len(widths))
    heights = _heights(size, len(widths))
    _check_whole("in_channels", layout["in_channels"])
    _check_whole("layers_per_block", layout["layers_per_block"], MOST_BLOCKS)
    ways = {way: _way(layout, way, len(widths)) for way in _BLOCKS}
    attends = {way: [attend for attend, _ in levels] for way, levels in ways.items()}
    _check_attention(layout, widths, [any(both) for both in zip(attends["down"], attends["up"], strict=True)])
    _check_numbers(layout, widths)

    def chosen(flags: Iterable[bool]) -> list[int]:
        return [height for height, flag in zip(heights, flags, strict=True) if flag]

    settings = {
        "image_channels": layout["in_channels"],
        "image_size": size,
        "channels": widths[0],
        "multipliers": [width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths],
        "blocks": layout["layers_per_block"],
        "attention": chosen(attends["down"]),
        "heads": 1,
        "dropout": layout["dropout"],
        "norm_groups": layout["norm_num_groups"],
        "head_channels": layout["attention_head_dim"],
        "symmetric_padding": layout["downsample_padding"] == 1,
    }
    later = {
        "norm_eps": layout["norm_eps"],
        "freq_shift": layout["freq_shift"],
        "scale_shift": layout["resnet_time_scale_shift"] == "scale_shift",
        "attention_up": None if attends["up"] == attends["down"] else chosen(attends["up"]),
        "middle_attention": bool(layout["add_attention"]),
        "middle_groups": _middle_groups(layout),
        "residual_down": tuple(chosen(residual for _, residual in ways["down"])),
        "residual_up": tuple(chosen(residual for _, residual in ways["up"])),
        "out_channels": _out_channels(layout),
        **_classes(layout, bool(config.get(NULL_CLASS))),
    }
    return settings | {
        key: [*value] if isinstance(value, tuple) else value for key, value in later.items() if value != _SETTINGS[key]
    }


def _widths(layout: Mapping[str, Any]) -> list[int]:
    widths = layout["block_out_channels"]
    if not isinstance(widths, (list, tuple)) or not 1 <= len(widths) <= DEEPEST:
        raise _bad_value("block_out_channels", widths, f"expected a list of 1 to {DEEPEST} widths")
    widths = [_check_whole("block_out_channels", width) for width in widths]
    if widths[0] < 8 or widths[0] % 2:
        raise _bad_value("block_out_channels", widths, "the first must be even, and 8 or more")
    if layout["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise _bad_value("time_embedding_dim", layout["time_embedding_dim"], "must be null or 4 times the first width")
    return widths


def _image_size(layout: Mapping[str, Any], levels: int) -> int | list[int]:
    """Returns the side of square images, or [height, width] of other images."""
    size = layout["sample_size"]
    pair = [*size] if isinstance(size, (list, tuple)) else [size, size]
    if len(pair) != 2 or any(type(side) is not int for side in pair):
        raise _bad_value("sample_size", size, "expected the side of the images, or their height and width")
    for side in pair:
        _check_whole("sample_size", side)
        if side % 2 ** (levels - 1):
            raise _bad_value("sample_size", size, f"cannot be halved {levels - 1} times")
    return pair[0] if pair[0] == pair[1] else pair


def _heights(image_size: int | Sequence[int], levels: int) -> list[int]:
    """Returns the height of each resolution in pixels."""
    height = image_size if isinstance(image_size, int) else image_size[0]
    return [height // 2**level for level in range(levels)]


def _way(layout: Mapping[str, Any], way: str, levels: int) -> list[tuple[bool, bool]]:
    """Returns (has attention, is resized by a residual block) for each resolution, the highest resolution first.

    way: "down" or "up".
    """
    key, resize = f"{way}_block_types", layout[f"{way}sample_type"]
    kinds = layout[key]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != levels:
        raise _bad_value(key, kinds, f"expected {levels} blocks, one for each of block_out_channels")
    found = []
    for kind in kinds:
        name = str(kind).removeprefix("UNetRes")  # a prefix in old configurations
        if name not in _BLOCKS[way]:
            raise _bad_value(key, kind, f"expected {', '.join(_BLOCKS[way][:-1])} or {_BLOCKS[way][-1]}")
        index = _BLOCKS[way].index(name)
        found.append((index == 1, index == 2 or (index == 1 and resize == "resnet")))
    found[-1] = (found[-1][0], False)  # the last block doesn't resize
    return found if way == "down" else found[::-1]


def _check_attention(layout: Mapping[str, Any], widths: list[int], attends: list[bool]) -> None:
    attended = {width for width, attend in zip(widths, attends, strict=True) if attend}
    attended |= {widths[-1]} if layout["add_attention"] else set()
    head = layout["attention_head_dim"]
    if head is not None and any(width % _check_whole("attention_head_dim", head) for width in attended):
        why = f"does not divide the widths with attention, {sorted(attended)}"
        raise _bad_value("attention_head_dim", head, why)
    for key, grouped in (("norm_num_groups", widths), ("attn_norm_num_groups", widths[-1:])):
        groups = layout[key]
        if key == "attn_norm_num_groups" and (groups is None or not layout["add_attention"]):
            continue
        if any(width % _check_whole(key, groups) for width in grouped):
            raise _bad_value(key, groups, f"does not divide the widths {grouped}")


def _check_numbers(layout: Mapping[str, Any], widths: list[int]) -> None:
    for key, ok, why in (
        ("dropout", lambda value: 0 <= value < 1, "must lie in [0, 1)"),
        ("norm_eps", lambda value: value > 0, "expected a positive number"),
        ("freq_shift", lambda value: value < widths[0] // 2, f"expected a number below {widths[0] // 2}"),
    ):
        value = layout[key]
        if not _is_number(value) or not ok(value):
            raise _bad_value(key, value, why)


def _middle_groups(layout: Mapping[str, Any]) -> int | None:
    """Returns the number of normalisation groups in the attention of the middle block.

    0 means no normalisation. None means as many groups as in the other layers.
    """
    groups = layout["attn_norm_num_groups"]
    if not layout["add_attention"] or groups == layout["norm_num_groups"]:
        return None
    if groups is None:
        return 0 if layout["resnet_time_scale_shift"] == "scale_shift" else None
    return groups


def _out_channels(layout: Mapping[str, Any]) -> int | None:
    channels, out = layout["in_channels"], layout["out_channels"]
    if out not in (channels, 2 * channels):
        raise _bad_value("out_channels", out, "must be in_channels, or twice as many for a learned variance")
    return None if out == channels else out


def _classes(layout: Mapping[str, Any], null_class: bool) -> dict[str, Any]:
    embeddings = layout["num_class_embeds"]
    if embeddings is None:
        return {}
    classes = _check_whole("num_class_embeds", embeddings) - null_class
    if not classes:
        raise _bad_value("num_class_embeds", embeddings, "leaves no class beside the null class")
    return {"classes": classes, "null_class": null_class}


def settings_to_diffusers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the arguments of UNet to config.json of a UNet2DModel. Raises ValueError if there is no such model."""
    for key, value in settings.items():
        if key not in _SETTINGS and value:
            raise _bad_value(f"network {key}", value, "cannot be converted to diffusers' UNet2DModel")
    full = _SETTINGS | {key: value for key, value in settings.items() if key in _SETTINGS}
    if full["patch"] != 1:
        raise _bad_value("network patch", full["patch"], "UNet2DModel has no patches; train with network.patch: 1")
    net = _empty(full)
    widths = [round(full["channels"] * multiplier) for multiplier in full["multipliers"]]
    if widths[0] != full["channels"]:
        raise _bad_value(
            "network multipliers", list(full["multipliers"]), "must begin with 1 for diffusers' UNet2DModel"
        )
    if full["image_channels"] not in _FIXED["in_channels"][1]:
        raise _bad_value("network image_channels", full["image_channels"], "diffusers' pipeline shows 1 or 3 channels")
    blocks = {way: _blocks(full, way, len(widths)) for way in _BLOCKS}
    return {
        "_class_name": "UNet2DModel",
        "act_fn": "silu",
        "add_attention": full["middle_attention"],
        "attention_head_dim": _head_dim(full, widths),
        "attn_norm_num_groups": _attention_groups(full, net.last_norm.num_groups),
        "block_out_channels": widths,
        "center_input_sample": False,
        "class_embed_type": None,
        "down_block_types": blocks["down"][0],
        "downsample_padding": 1 if full["symmetric_padding"] else 0,
        "downsample_type": blocks["down"][1],
        "dropout": full["dropout"],
        "flip_sin_to_cos": False,
        "freq_shift": full["freq_shift"],
        "in_channels": full["image_channels"],
        "layers_per_block": full["blocks"],
        "mid_block_scale_factor": 1,
        "norm_eps": full["norm_eps"],
        "norm_num_groups": net.last_norm.num_groups,
        "num_class_embeds": net.label.num_embeddings if net.label is not None else None,
        "out_channels": full["out_channels"] or full["image_channels"],
        "resnet_time_scale_shift": "scale_shift" if full["scale_shift"] else "default",
        "sample_size": full["image_size"] if isinstance(full["image_size"], int) else [*full["image_size"]],
        "time_embedding_type": "positional",
        "up_block_types": blocks["up"][0],
        "upsample_type": blocks["up"][1],
        **({NULL_CLASS: full["null_class"]} if full["classes"] else {}),
    }


def _attended(settings: Mapping[str, Any], way: str) -> Sequence[int]:
    """Returns the heights with attention on the way down or up."""
    up = settings["attention_up"]
    return settings["attention"] if way == "down" or up is None else up


def _head_dim(settings: Mapping[str, Any], widths: list[int]) -> int | None:
    head, heads = settings["head_channels"], settings["heads"]
    if head is not None or heads == 1:
        return head
    heights = _heights(settings["image_size"], len(widths))
    attends = {*_attended(settings, "down"), *_attended(settings, "up")}
    attended = {width for width, height in zip(widths, heights, strict=True) if height in attends}
    attended |= {widths[-1]} if settings["middle_attention"] else set()
    if len(attended) > 1:
        why = f"needs several attention_head_dim, one for each of the widths {sorted(attended)}"
        raise _bad_value("network heads", heads, why)
    return widths[-1] // heads if not attended else attended.pop() // heads


def _attention_groups(settings: Mapping[str, Any], groups: int) -> int | None:
    """Returns diffusers' attn_norm_num_groups.

    None has two meanings in diffusers. With scale_shift, attention has no normalisation. Without scale_shift, attention has as
    many groups as the other layers.
    """
    own = groups if settings["middle_groups"] is None else settings["middle_groups"]
    if not settings["middle_attention"]:
        return None
    if own == 0 and not settings["scale_shift"]:
        raise _bad_value("network middle_groups", own, "UNet2DModel lacks that normalisation only with scale_shift")
    return None if own == (0 if settings["scale_shift"] else groups) else own


def _blocks(settings: Mapping[str, Any], way: str, levels: int) -> tuple[list[str], str]:
    """Returns {way}_block_types and {way}sample_type, which says how the blocks with attention resize."""
    heights = _heights(settings["image_size"], levels)
    attends = [height in _attended(settings, way) for height in heights]
    residual = [height in settings[f"residual_{way}"] for height in heights]
    last = levels - 1 if way == "down" else 0  # the last block doesn't resize
    kinds = {residual[level] for level in range(levels) if attends[level] and level != last}
    if len(kinds) > 1:
        why = "must list all resolutions with attention, or none of them"
        raise _bad_value(f"network residual_{way}", list(settings[f"residual_{way}"]), why)
    plain, attention, resized = _BLOCKS[way]
    blocks = [
        attention if attend else resized if by_block and level != last else plain
        for level, (attend, by_block) in enumerate(zip(attends, residual, strict=True))
    ]
    return blocks if way == "down" else blocks[::-1], "resnet" if True in kinds else "conv"


def _empty(settings: Mapping[str, Any]) -> UNet:
    """Builds the network on the meta device, which allocates no memory for weights."""
    with torch.device("meta"):
        return UNet(**settings)


def _names(net: UNet) -> dict[str, tuple[str, ...]]:
    """Maps each tensor name of UNet to names of UNet2DModel: three names (q, k, v) for three stacked tensors, else one name."""
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
            leaves = _ATTENTION if parent.endswith("attention") else _BLOCK
            names[ours] = (f"{modules[parent]}.{leaves[leaf]}.{kind}",)
    return names


def weights_from_diffusers(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], flip_sin_to_cos: bool = False
) -> dict[str, Tensor]:
    """Converts a UNet2DModel's tensors to the float32 state of UNet(**settings).

    flip_sin_to_cos: the value in the UNet2DModel's configuration. Raises ValueError if a tensor is missing, has no counterpart
    or has another shape.
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
    state = {ours: torch.cat([given[theirs].float() for theirs in several]) for ours, several in names.items()}
    if flip_sin_to_cos:
        state["time.0.weight"] = torch.cat(state["time.0.weight"].chunk(2, dim=1)[::-1], dim=1)
    return state


def weights_to_diffusers(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts the state of UNet(**settings) to a UNet2DModel's tensors. Raises ValueError if the state does not fit."""
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
    (clip_sample, thresholding, timestep_spacing, steps_offset) are not converted, since they are no part of a model here.

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
        value = config.get(key, default)
        if names[theirs] == "cosine":  # cosine has no end points
            continue
        if not _is_number(value):
            raise _bad_value(key, value, "expected a number")
        if value != default:
            row[ours] = value
    return row


def _check_configuration(config: Mapping[str, Any], predictions: Collection[str]) -> None:
    kind = config.get("_class_name")
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise _bad_value("_class_name", kind, "expected DDPMScheduler or DDIMScheduler")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in [*predictions]:  # a list: the value may be unhashable
        raise _bad_value("prediction_type", prediction, f"expected one of {', '.join(predictions)}")
    if config.get("variance_type") == "learned":
        raise _bad_value("variance_type", "learned", "the only learned variance that can be imported is learned_range")
    if config.get("clip_sample", True) and config.get("clip_sample_range", 1.0) != 1:
        raise _bad_value("clip_sample_range", config["clip_sample_range"], "must be 1: images lie in [-1, 1]")


def _row_from_betas(betas: Any, steps: int) -> dict[str, Any]:
    """Returns a row of `schedules` in params.yaml that has these betas. Raises ValueError if there is none.

    Tries all schedules with default parameters, and sqrt with any end points.
    """
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
        variance: the scheduler's variance_type; learned_range for a network with a learned variance.

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
        # `leading` omits the last time, the only time with zero SNR.
        "timestep_spacing": "trailing" if rescaled else "leading",
        "trained_betas": None if named else schedule.betas.tolist(),
        "variance_type": variance,
    }
