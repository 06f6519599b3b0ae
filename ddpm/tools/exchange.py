"""`export-diffusers` and `import-diffusers`: checkpoint folders to and from the folders of diffusers' DDPMPipeline.

An import becomes imported/NAME, a checkpoint like our own, and a row of the schedules table that holds its checksum: `train`
then copies it instead of training, so that NAME in sweep.schedules is swept, evaluated and promoted like any other.
"""

from __future__ import annotations

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
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
KNOWN = {"format", "weights_sha256", "schedule", "target", "variance", "network", "data", "training"}  # of model.json
DIFFUSERS = "0.35.0"  # the version whose keys the configurations have


def export_diffusers(folder: Path, out: Path, variance: str = "fixed_large") -> int:
    """A checkpoint folder -> a new folder `out` that DDPMPipeline.from_pretrained loads. Returns its T.

    variance: "fixed_large" or "fixed_small", for the scheduler there. Raises InputError.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; name a folder that is not, or remove it")
    denoiser, model = checkpoint.load(folder)
    assert isinstance(denoiser.net, nn.Module)
    if unknown := {key for key, value in model.content.items() if value} - KNOWN:
        raise InputError(f"{folder}: diffusers has no place for '{sorted(unknown)[0]}' of model.json")
    settings = model.network.settings
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
    return denoiser.schedule.T


def _write(path: Path, value: Mapping[str, Any]) -> None:
    records.write_json(path, {"_diffusers_version": DIFFUSERS, **value})


def import_diffusers(folder: Path, name: str, root: Path = Path()) -> list[str]:
    """The folder of a UNet2DModel or a DDPMPipeline -> imported/NAME, and the row schedules.NAME in params.yaml.

    Importing under the same name again replaces both. Returns lines to say to the user. Raises InputError, and then has
    written nothing.
    """
    if not re.fullmatch(rf"[a-z0-9_]{{1,{LONGEST_NAME}}}", name):
        raise InputError(f"'{name}': the name of an import is made of a-z, 0-9 and _, at most {LONGEST_NAME} of them")
    text = _params_text(root / "params.yaml", name)
    network = _network_folder(folder)
    config, (process, lines) = records.read_json(network / "config.json"), _process(folder)
    row, timesteps, target = process
    try:
        settings = interop.settings_from_diffusers(config)
        weights = interop.weights_from_diffusers(_read_weights(network), settings)
    except ValueError as error:
        raise InputError(f"{network}: not a network of the google/ddpm family: {error}") from None
    if broken := [key for key, tensor in weights.items() if not bool(tensor.isfinite().all())]:
        raise InputError(f"{network / WEIGHTS}: not all finite: {broken[0]} here")

    entry = NetworkEntry.of("unet", settings)
    net = checkpoint.network(entry)
    net.load_state_dict(weights)
    shape = [settings["image_channels"], settings["image_size"], settings["image_size"]]
    about = {
        "schedule": {"name": name, "timesteps": timesteps, **row},
        "target": target,
        "network": entry.content,
        "data": {"shape": shape, "range": [-1, 1]},
    }
    with atomic.replacing_dir(root / paths.imported_dir(name)) as temporary:
        checkpoint.save(temporary, net, about)
        written = {**row, "imported": models.read_model_record(temporary).weights_sha256}
        text = rewritten(text, lambda document: document["schedules"].__setitem__(name, flow_row(written)))
        Params.check(parse_yaml(text, "params.yaml"), "params.yaml")
    with atomic.replacing(root / "params.yaml") as file:
        file.write_text(text, encoding="utf-8")
    count = sum(tensor.numel() for tensor in weights.values())
    return [
        *lines,
        f"{paths.imported_dir(name)}: {count:,} parameters, images {'x'.join(map(str, shape))}, {row['schedule']} schedule"
        f" at T = {timesteps}, target {target}",
        f"params.yaml has the row schedules.{name}; with {name} in sweep.schedules, `dvc repro` sweeps it",
    ]


def _params_text(path: Path, name: str) -> str:
    """params.yaml, if it is in order and has room for a schedules row of that name. Raises InputError."""
    params = Params.load(path)
    if name in params.schedules and params.schedules[name].imported is None:
        raise InputError(f"schedules.{name}: is a row of your own in {path.name}; import under another name")
    return path.read_text(encoding="utf-8")


def _network_folder(folder: Path) -> Path:
    """Where config.json lies: in unet/ of a pipeline, or beside its model_index.json, or alone. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download the model first")
    index = folder / "model_index.json"
    if index.exists() and (kind := records.read_json(index).get("_class_name")) not in PIPELINES:
        raise InputError(f"{index}: a {kind}; there are {' and '.join(PIPELINES)}")
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(f"{folder}: neither a UNet2DModel nor a DDPMPipeline: no config.json, and no unet/config.json")


def _process(folder: Path) -> tuple[tuple[dict[str, Any], int, str], list[str]]:
    """The schedule row, T and target, and what to say of them. Raises InputError."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            config = records.read_json(path)
            try:
                process = interop.schedule_from_diffusers(config)
            except ValueError as error:
                raise InputError(f"{path}: {error}") from None
            kind, clip = config.get("variance_type", "fixed_small"), bool(config.get("clip_sample", True))
            said = f"its pipeline samples with variance_type {kind}, clip_sample {str(clip).lower()}"
            return process, [f"{said}: samplers.*.variance and sampling.clip here"]
    line = f"{folder}: no scheduler_config.json, so taken to be Ho et al.'s: linear schedule, T = 1000, target eps"
    return ({"schedule": "linear"}, 1000, "eps"), [line]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Raises InputError."""
    path = folder / WEIGHTS
    if not path.is_file():
        if any(folder.glob("*.bin")):
            raise InputError(
                f"{folder}: its weights are a pickle (.bin), which can run code when it is read; have diffusers write"
                f" {WEIGHTS} with save_pretrained(..., safe_serialization=True)"
            )
        raise InputError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable: {error}; download it again") from None
