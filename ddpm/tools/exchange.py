"""`export-diffusers` and `import-diffusers`: convert checkpoint folders to and from folders of diffusers' DDPMPipeline.

An import writes a checkpoint to imported/NAME, and a row schedules.NAME with its checksum to params.yaml. For such a row, `train`
copies the checkpoint instead of training. With NAME in sweep.schedules, the model is sampled, scored and promoted like others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ddpm import interop
from ddpm.errors import InputError
from ddpm.files import atomic, checkpoint, models, paths, records
from ddpm.files.models import NetworkEntry
from ddpm.files.params import Params
from ddpm.files.yaml_file import flow_row, parse_yaml, rewritten
from ddpm.parameters import LONGEST_NAME

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # the file that lists the shards of large weights
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
KNOWN = {"format", "weights_sha256", "schedule", "target", "variance", "network", "data", "training"}  # of model.json
DIFFUSERS = "0.35.0"  # the version of diffusers whose configuration keys are written


def export_diffusers(folder: Path, out: Path, variance: str = "fixed_large") -> list[str]:
    """Converts a checkpoint folder to a new folder `out`, which DDPMPipeline.from_pretrained loads.

    variance: "fixed_large" or "fixed_small", for the scheduler of a network without a learned variance. Returns lines for the
    user. Raises InputError.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; name a new folder, or remove this one")
    denoiser, model = checkpoint.load(folder)
    assert isinstance(denoiser.net, nn.Module)
    if unknown := {key for key, value in model.content.items() if value} - KNOWN:
        raise InputError(f"{folder}: diffusers has no place for '{sorted(unknown)[0]}' of model.json")
    if model.network.kind != "unet":
        raise InputError(
            f"{folder}: holds a network of kind {model.network.kind}, and a DDPMPipeline runs a UNet2DModel; train with"
            " network.kind: unet"
        )
    settings = model.network.settings
    variance = "learned_range" if model.network.learned_variance else variance
    try:
        config = interop.settings_to_diffusers(settings)
        weights = interop.weights_to_diffusers(denoiser.net.state_dict(), settings)
        scheduler = interop.schedule_to_diffusers(model.schedule.row, denoiser.schedule.T, denoiser.target, variance)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}: cannot be a DDPMPipeline: {error}") from None
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    with atomic.replacing_dir(out) as temporary:
        _write(temporary / "model_index.json", {"_class_name": "DDPMPipeline", **index})
        _write(temporary / "scheduler" / "scheduler_config.json", scheduler)
        _write(temporary / "unet" / "config.json", config)
        (temporary / "unet" / WEIGHTS).write_bytes(
            save(weights, metadata={"format": "pt"})
        )  # save_file's errors have no errno
    if classes := model.network.classes:
        null = f"; {classes} is the null class of guidance" if model.network.null_class else ""
        return [
            f"{out}: a UNet2DModel with class_labels 0 to {classes - 1}{null}",
            "DDPMPipeline passes no class_labels: docs/diffusers.md has a loop that does",
        ]
    T = denoiser.schedule.T
    steps = f"; it takes 1000 steps by default: call it with num_inference_steps={T}" if T < 1000 else ""
    return [f"{out}: a DDPMPipeline{steps}"]


def _write(path: Path, value: Mapping[str, Any]) -> None:
    records.write_json(path, {"_diffusers_version": DIFFUSERS, **value})


def import_diffusers(folder: Path, name: str, root: Path = Path(), null_class: bool = False) -> list[str]:
    """Converts the folder of a UNet2DModel or a DDPMPipeline to imported/NAME, and writes the row schedules.NAME to params.yaml.

    Importing under the same name again replaces both. Without a params.yaml of this project, only the folder is written.

    Args:
        folder: the folder to read.
        name: the name of the model here.
        root: the top of the checkout, or the folder in which to write imported/NAME.
        null_class: whether the last class embedding stands for no label. Exports of `export_diffusers` contain this setting.

    Returns:
        Lines for the user.

    Raises:
        InputError: the model cannot be imported. In this case, nothing was written.
    """
    if not re.fullmatch(rf"[a-z0-9_]{{1,{LONGEST_NAME}}}", name):
        raise InputError(
            f"'{name}': the name of an import is made of a-z, 0-9 and _, and has at most {LONGEST_NAME} characters"
        )
    yaml = root / "params.yaml"
    text = _params_text(yaml, name) if Params.find(yaml) else None
    network, lines = _network_folder(folder)
    config = _read_json(network / "config.json")
    if null_class and config.get("num_class_embeds") is None:
        raise InputError(f"{network}: has no class embeddings (num_class_embeds); leave --null-class out")
    config |= {interop.NULL_CLASS: True} if null_class else {}
    (row, timesteps, target), scheduler = _process(folder)
    lines += _said_of_sampling(folder, scheduler)
    weights, net, entry, more = _network(network, config)
    _check_variance(network, entry, scheduler)
    shape = entry.shape
    description: dict[str, Any] = {
        "schedule": {"name": name, "timesteps": timesteps, **row},
        "target": target,
        **({"variance": "learned"} if entry.learned_variance else {}),
        "network": entry.content,
        "data": {"shape": shape, "range": [-1, 1]},
    }
    if entry.classes:
        description["data"] |= {"classes": [str(number) for number in range(entry.classes)]}
    with atomic.replacing_dir(root / paths.imported_dir(name)) as temporary:
        checkpoint.save(temporary, net, description)
        if text is not None:
            written = {**row, "imported": models.read_model_record(temporary).weights_sha256}
            text = rewritten(text, lambda document: document["schedules"].__setitem__(name, flow_row(written)))
            Params.check(parse_yaml(text, "params.yaml"), "params.yaml")
    if text is not None:
        atomic.write_text(yaml, text)
    count = sum(tensor.numel() for tensor in weights.values())
    return [
        *lines,
        *more,
        f"{paths.imported_dir(name)}: {count:,} parameters, images {'x'.join(map(str, shape))}, {row['schedule']} schedule"
        f" at T = {timesteps}, target {target}{', learned variance' * entry.learned_variance}",
        f"params.yaml: wrote the row schedules.{name}; add {name} to sweep.schedules, and `dvc repro` sweeps it"
        if text is not None
        else f"ddpm generate --model {paths.imported_dir(name)} draws images with it",
    ]


def _network(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], nn.Module, NetworkEntry, list[str]]:
    """Returns the weights, the network with these weights, its entry of model.json, and lines for the user. Raises InputError."""
    try:
        settings = interop.settings_from_diffusers(config)
        given, lines = _read_weights(folder)
        weights = interop.weights_from_diffusers(given, settings, config.get("flip_sin_to_cos", True))
    except ValueError as error:
        raise InputError(f"{folder}: not a network that ddpm's UNet can express: {error}") from None
    if broken := [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise InputError(f"{folder}: the weights {broken[0]} hold values that are not finite; download them again")
    entry = NetworkEntry.of("unet", settings)
    net = checkpoint.network(entry)
    net.load_state_dict(weights)
    if entry.classes and entry.null_class:
        lines.append(f"{entry.classes} classes, and a null class for guidance")
    elif entry.classes:
        lines.append(
            f"{entry.classes} classes without a null class, so guidance is refused; if the last one means no label, import"
            " with --null-class"
        )
    return weights, net, entry, lines


def _check_variance(folder: Path, entry: NetworkEntry, scheduler: Mapping[str, Any] | None) -> None:
    """Raises InputError if only one of network and scheduler has a learned variance."""
    if scheduler is None:
        return
    kind = scheduler.get("variance_type", "fixed_small")
    if entry.learned_variance != (kind == "learned_range"):
        raise InputError(
            f"{folder}: out_channels = {entry.out_channels or entry.image_channels} does not fit the scheduler's"
            f" variance_type = {kind!r}: learned_range takes twice in_channels, the other types in_channels"
        )


def _params_text(path: Path, name: str) -> str:
    """Returns the text of params.yaml. Raises InputError if it is invalid, or if a row of the user's own has that name."""
    params = Params.load(path)
    if name in params.schedules and params.schedules[name].imported is None:
        raise InputError(f"schedules.{name}: is your own row in {path.name}; import under another name")
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object that another program wrote, with or without a byte order mark. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; download it again")
    return value


def _network_folder(folder: Path) -> tuple[Path, list[str]]:
    """Returns the folder that holds config.json, and lines that tell the user if it was chosen among others. Raises InputError.

    It is unet_ema/ of a training's checkpoint, unet/ of a pipeline, or `folder` itself.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download the model first")
    index = folder / "model_index.json"
    if index.exists() and (kind := _read_json(index).get("_class_name")) not in PIPELINES:
        raise InputError(f"{index}: holds a {kind}; only {' and '.join(PIPELINES)} can be imported")
    candidates = [path for path in (folder / "unet_ema", folder / "unet", folder) if (path / "config.json").is_file()]
    if not candidates:
        raise InputError(f"{folder}: neither a UNet2DModel nor a DDPMPipeline: no config.json, and no unet/config.json")
    averaged, *others = candidates
    if averaged.name == "unet_ema" and folder / "unet" in others:
        return averaged, [
            f"{averaged}: took these averaged weights (EMA); for the weights of the last step, import {others[0]}"
        ]
    return averaged, []


def _process(folder: Path) -> tuple[tuple[dict[str, Any], int, str], dict[str, Any] | None]:
    """Returns the schedule row, T and target, and the content of scheduler_config.json or None. Raises InputError."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            config = _read_json(path)
            try:
                return interop.schedule_from_diffusers(config), config
            except ValueError as error:
                raise InputError(f"{path}: {error}") from None
    return ({"schedule": "linear"}, 1000, "eps"), None


def _said_of_sampling(folder: Path, scheduler: Mapping[str, Any] | None) -> list[str]:
    """Returns lines on the pipeline's sampling settings, which are not imported, and where to set the same here."""
    if scheduler is None:
        return [
            f"{folder}: no scheduler_config.json, so Ho et al.'s settings are assumed: linear schedule, T = 1000, target eps"
        ]
    kind, clip = scheduler.get("variance_type", "fixed_small"), bool(scheduler.get("clip_sample", True))
    lines = [
        f"its pipeline samples with variance_type {kind}, clip_sample {str(clip).lower()}, timestep_spacing"
        f" {scheduler.get('timestep_spacing', 'leading')}: in params.yaml these are samplers.*.variance, sampling.clip and"
        " samplers.*.spacing"
    ]
    if scheduler.get("thresholding"):
        quantile, most = scheduler.get("dynamic_thresholding_ratio", 0.995), scheduler.get("sample_max_value", 1.0)
        same = "true" if most == 1 else quantile
        lines.append(
            f"its pipeline samples with dynamic thresholding (quantile {quantile}, sample_max_value {most}): the same in"
            f" params.yaml is sampling.clip: {same}"
        )
    if offset := scheduler.get("steps_offset", 0):
        lines.append(f"its pipeline samples with steps_offset {offset}: samplers here have no offset")
    if not scheduler.get("set_alpha_to_one", True):
        lines.append("its pipeline samples with set_alpha_to_one false: samplers here end without noise")
    return lines


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Reads the safetensors weights of a network folder. Returns them, and lines for the user. Raises InputError."""
    path, lines = _weights_file(folder)
    weights: dict[str, Tensor] = {}
    for file in [path] if path.suffix == ".safetensors" else _shards(path):
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not readable: {error}; download it again") from None
    return weights, lines


def _weights_file(folder: Path) -> tuple[Path, list[str]]:
    """Returns the file of the weights, or the index of their shards, and lines for the user. Raises InputError.

    A variant, such as fp16, is used if there are no other weights.
    """
    stem = WEIGHTS.partition(".")[0]
    variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
    variants += sorted(folder.glob(f"{WEIGHTS}.index.*.json"))
    for path in (folder / WEIGHTS, folder / INDEX):
        if path.is_file():
            return path, []
    if len(variants) == 1:
        (path,) = variants
        return path, [f"{path}: took this variant of the weights, since there is no {WEIGHTS}"]
    if variants:
        raise InputError(
            f"{folder}: holds {len(variants)} variants of the weights, {' and '.join(path.name for path in variants)}; leave"
            " one there"
        )
    if any(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: its weights are a pickle (.bin), which can run code when it is read; write"
            f" {WEIGHTS} with diffusers: save_pretrained(..., safe_serialization=True)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"; there is {', '.join(others[:3])}{' ...' * (len(others) > 3)}" if others else ""
    raise InputError(f"{folder}: no such file as {WEIGHTS} or, for shards, {INDEX}{found}")


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index lists. Raises InputError."""
    files = _read_json(index).get("weight_map")
    names = sorted({str(name) for name in files.values()}) if isinstance(files, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index}: expected a weight_map from weights to files beside it; download it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(
            f"{index}: {len(missing)} of {len(names)} shards are missing: {missing[0]}; download them again"
        )
    return [index.parent / name for name in names]
