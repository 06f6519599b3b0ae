"""`export-diffusers` and `import-diffusers`: convert checkpoint folders to and from folders of diffusers' DDPMPipeline.

An import writes a checkpoint to imported/NAME, and the row schedules.NAME with its checksum to params.yaml. For such a row, the
stage `train` copies the checkpoint instead of training. With NAME in sweep.schedules, the sweep samples and scores the model like
a trained model, and `ddpm promote` may promote it.
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
# The entries of model.json that an export can express or leave out.
KNOWN = {
    "format",
    "weights_sha256",
    "schedule",
    "target",
    "variance",
    "network",
    "data",
    "training",
    "snapshots",
    "ema",
}
DIFFUSERS = "0.35.0"  # the version of diffusers whose configuration keys are written


def export_diffusers(folder: Path, out: Path, variance: str = "fixed_large") -> list[str]:
    """Converts a checkpoint folder to a new folder that DDPMPipeline.from_pretrained loads.

    Args:
        folder: the checkpoint folder.
        out: the folder to write, which must not exist.
        variance: "fixed_large" or "fixed_small", for the scheduler of a network without a learned variance.

    Returns:
        Lines for the user.

    Raises:
        InputError: diffusers cannot express the model, or `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: the folder exists already; remove it, or name a new folder")
    denoiser, model = checkpoint.load(folder)
    assert isinstance(denoiser.net, nn.Module)
    if unknown := {key for key, value in model.content.items() if value} - KNOWN:
        raise InputError(
            f"{folder}: cannot be exported, since diffusers has no place for '{sorted(unknown)[0]}' of model.json"
        )
    if model.network.kind != "unet":
        raise InputError(
            f"{folder}: the network is of kind {model.network.kind}, but a DDPMPipeline runs only a UNet2DModel; train a model"
            " with network.kind: unet"
        )
    settings = model.network.settings
    variance = "learned_range" if model.network.learned_variance else variance
    try:
        config = interop.settings_to_diffusers(settings)
        weights = interop.weights_to_diffusers(denoiser.net.state_dict(), settings)
        scheduler = interop.schedule_to_diffusers(model.schedule.row, denoiser.schedule.T, denoiser.target, variance)
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}: cannot be converted to a DDPMPipeline: {error}") from None
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    with atomic.replacing_dir(out) as temporary:
        _write(temporary / "model_index.json", {"_class_name": "DDPMPipeline", **index})
        _write(temporary / "scheduler" / "scheduler_config.json", scheduler)
        _write(temporary / "unet" / "config.json", config)
        # write_bytes, since the errors of save_file have no errno
        (temporary / "unet" / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    if classes := model.network.classes:
        null = f"; {classes} is the null class of guidance" if model.network.null_class else ""
        return [
            f"{out}: a UNet2DModel with class_labels 0 to {classes - 1}{null}",
            "DDPMPipeline passes no class_labels to the network; docs/diffusers.md shows a sampling loop that does",
        ]
    T = denoiser.schedule.T
    steps = f"; call it with num_inference_steps={T}, since its default of 1000 is more than T" if T < 1000 else ""
    return [f"{out}: a DDPMPipeline{steps}"]


def _write(path: Path, value: Mapping[str, Any]) -> None:
    records.write_json(path, {"_diffusers_version": DIFFUSERS, **value})


def import_diffusers(folder: Path, name: str, root: Path = Path(), null_class: bool = False) -> list[str]:
    """Converts the folder of a UNet2DModel or a DDPMPipeline to imported/NAME, and writes the row schedules.NAME to params.yaml.

    A second import under the same name replaces the folder and the row. If `root` has no params.yaml of this project, only the
    folder is written.

    Args:
        folder: the folder to read.
        name: the new name of the model.
        root: the top of the checkout, or the folder in which to write imported/NAME.
        null_class: whether the last class embedding stands for "no label". Folders that `export_diffusers` wrote contain
            this setting.

    Returns:
        Lines for the user.

    Raises:
        InputError: the model cannot be imported. Nothing was written.
    """
    if not re.fullmatch(rf"[a-z0-9_]{{1,{LONGEST_NAME}}}", name):
        raise InputError(
            f"'{name}': not a valid name for an import; use only a-z, 0-9 and _, and at most {LONGEST_NAME} characters"
        )
    yaml = root / "params.yaml"
    text = _params_text(yaml, name) if Params.find(yaml) else None
    network, lines = _network_folder(folder)
    config = _read_json(network / "config.json")
    if null_class and config.get("num_class_embeds") is None:
        raise InputError(f"{network}: the network has no class embeddings (num_class_embeds); leave --null-class out")
    config |= {interop.NULL_CLASS: True} if null_class else {}
    (row, timesteps, target), scheduler = _process(folder)
    lines += _sampling_notes(folder, scheduler)
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
        f"params.yaml: wrote the row schedules.{name}; to sample and score the model, add {name} to sweep.schedules and run"
        " `dvc repro`"
        if text is not None
        else f"`ddpm generate --model {paths.imported_dir(name)}` draws images with this model",
    ]


def _network(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], nn.Module, NetworkEntry, list[str]]:
    """Builds the network of a folder.

    Returns:
        The weights, the network with these weights, the entry `network` of model.json, and lines for the user.

    Raises:
        InputError: the UNet of ddpm cannot express the network, or the weights are damaged.
    """
    try:
        settings = interop.settings_from_diffusers(config)
        given, lines = _read_weights(folder)
        weights = interop.weights_from_diffusers(given, settings, config.get("flip_sin_to_cos", True))
    except ValueError as error:
        raise InputError(f"{folder}: the UNet of ddpm cannot express this network: {error}") from None
    if broken := [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise InputError(f"{folder}: the weights {broken[0]} are not finite; download the folder again")
    entry = NetworkEntry.of("unet", settings)
    net = checkpoint.network(entry)
    net.load_state_dict(weights)
    if entry.classes and entry.null_class:
        lines.append(f"the network has {entry.classes} classes, and a null class for guidance")
    elif entry.classes:
        lines.append(
            f"the network has {entry.classes} classes and no null class, so guidance is refused; if the last class means no"
            " label, import again with --null-class"
        )
    return weights, net, entry, lines


def _check_variance(folder: Path, entry: NetworkEntry, scheduler: Mapping[str, Any] | None) -> None:
    """Raises InputError if the network has a learned variance and the scheduler has none, or the other way round."""
    if scheduler is None:
        return
    kind = scheduler.get("variance_type", "fixed_small")
    if entry.learned_variance != (kind == "learned_range"):
        raise InputError(
            f"{folder}: out_channels = {entry.out_channels or entry.image_channels} does not fit the scheduler's"
            f" variance_type = {kind!r}: learned_range needs out_channels = 2 * in_channels, all other types need"
            " out_channels = in_channels"
        )


def _params_text(path: Path, name: str) -> str:
    """Returns the text of params.yaml.

    Raises InputError if the file is invalid, or if its row schedules.NAME belongs to a model that is trained here, since the
    import would overwrite this row.
    """
    params = Params.load(path)
    if name in params.schedules and params.schedules[name].imported is None:
        raise InputError(
            f"schedules.{name}: {path.name} already has this row, which was not imported; import under another name"
        )
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
    """Returns the folder with config.json: unet_ema/ of a diffusers training, unet/ of a pipeline, or `folder` itself.

    If unet_ema/ and unet/ both exist, also returns a line for the user which says so. Raises InputError.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download the model first")
    index = folder / "model_index.json"
    if index.exists() and (kind := _read_json(index).get("_class_name")) not in PIPELINES:
        raise InputError(f"{index}: the pipeline is a {kind}, but only {' and '.join(PIPELINES)} can be imported")
    candidates = [path for path in (folder / "unet_ema", folder / "unet", folder) if (path / "config.json").is_file()]
    if not candidates:
        raise InputError(
            f"{folder}: neither a UNet2DModel nor a DDPMPipeline, since it has no config.json and no unet/config.json; name the"
            " folder of a model"
        )
    averaged, *others = candidates
    if averaged.name == "unet_ema" and folder / "unet" in others:
        return averaged, [
            f"{averaged}: imported the averaged weights (EMA); for the weights of the last step, import {others[0]}"
        ]
    return averaged, []


def _process(folder: Path) -> tuple[tuple[dict[str, Any], int, str], dict[str, Any] | None]:
    """Returns (schedule row, T, target), and the content of scheduler_config.json.

    Without that file, returns the settings of Ho et al. 2020 and None. Raises InputError.
    """
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            config = _read_json(path)
            try:
                return interop.schedule_from_diffusers(config), config
            except ValueError as error:
                raise InputError(f"{path}: {error}") from None
    return ({"schedule": "linear"}, 1000, "eps"), None


def _sampling_notes(folder: Path, scheduler: Mapping[str, Any] | None) -> list[str]:
    """Returns lines on the pipeline's sampling settings, which are not imported, and on the matching entries of params.yaml."""
    if scheduler is None:
        return [
            f"{folder}: no scheduler_config.json, so the import assumes the settings of Ho et al.: linear schedule, T = 1000,"
            " target eps"
        ]
    kind, clip = scheduler.get("variance_type", "fixed_small"), bool(scheduler.get("clip_sample", True))
    lines = [
        f"the pipeline samples with variance_type {kind}, clip_sample {str(clip).lower()}, timestep_spacing"
        f" {scheduler.get('timestep_spacing', 'leading')}; in params.yaml, set samplers.*.variance, sampling.clip and"
        " samplers.*.spacing to sample like that"
    ]
    if scheduler.get("thresholding"):
        quantile, most = scheduler.get("dynamic_thresholding_ratio", 0.995), scheduler.get("sample_max_value", 1.0)
        same = "true" if most == 1 else quantile
        lines.append(
            f"the pipeline samples with dynamic thresholding (quantile {quantile}, sample_max_value {most}); the same in"
            f" params.yaml is sampling.clip: {same}"
        )
    if offset := scheduler.get("steps_offset", 0):
        lines.append(f"the pipeline samples with steps_offset {offset}; the samplers of ddpm have no offset")
    if not scheduler.get("set_alpha_to_one", True):
        lines.append("the pipeline samples with set_alpha_to_one false; the samplers of ddpm always end without noise")
    return lines


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Reads the safetensors weights of a network folder. Returns the weights, and lines for the user. Raises InputError."""
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

    Without a plain weights file, a single variant such as fp16 is used.
    """
    stem = WEIGHTS.partition(".")[0]
    variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
    variants += sorted(folder.glob(f"{WEIGHTS}.index.*.json"))
    for path in (folder / WEIGHTS, folder / INDEX):
        if path.is_file():
            return path, []
    if len(variants) == 1:
        (path,) = variants
        return path, [f"{path}: imported this variant of the weights, since there is no {WEIGHTS}"]
    if variants:
        raise InputError(
            f"{folder}: has {len(variants)} variants of the weights, {' and '.join(path.name for path in variants)}; keep only"
            " one of them there"
        )
    if any(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: the weights are a pickle (.bin), which can run code when it is read; convert them with diffusers:"
            f" save_pretrained(..., safe_serialization=True) writes {WEIGHTS}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    found = f"; it has {', '.join(others[:3])}{' ...' * (len(others) > 3)}" if others else ""
    raise InputError(f"{folder}: has neither {WEIGHTS} nor, for shards, {INDEX}{found}")


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index lists. Raises InputError."""
    files = _read_json(index).get("weight_map")
    names = sorted({str(name) for name in files.values()}) if isinstance(files, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise InputError(f"{index}: expected a weight_map that names files in the same folder; download it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(
            f"{index}: {len(missing)} of {len(names)} shards are missing, such as {missing[0]}; download them again"
        )
    return [index.parent / name for name in names]
