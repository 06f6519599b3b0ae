"""`export-diffusers` and `import-diffusers`: convert checkpoint folders to and from folders of diffusers' DDPMPipeline.

An import writes a checkpoint to imported/NAME, and a row schedules.NAME with its checksum to params.yaml. For such a row `train`
copies the checkpoint instead of training. With NAME in sweep.schedules it is swept, evaluated and promoted like any schedule.
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
DIFFUSERS = "0.35.0"  # the version whose configuration keys are written


def export_diffusers(folder: Path, out: Path, variance: str = "fixed_large") -> int:
    """Converts a checkpoint folder to a new folder `out`, which DDPMPipeline.from_pretrained loads. Returns its T.

    variance: "fixed_large" or "fixed_small", for the exported scheduler. Raises InputError.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; name a new folder, or remove this one")
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
    """Converts the folder of a UNet2DModel or a DDPMPipeline to imported/NAME, and writes the row schedules.NAME to params.yaml.

    Importing under the same name again replaces both. Returns lines for the user. Raises InputError, and then has written
    nothing.
    """
    if not re.fullmatch(rf"[a-z0-9_]{{1,{LONGEST_NAME}}}", name):
        raise InputError(
            f"'{name}': the name of an import is made of a-z, 0-9 and _, and has at most {LONGEST_NAME} characters"
        )
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
        raise InputError(f"{network / WEIGHTS}: {broken[0]} holds values that are not finite; download it again")

    entry = NetworkEntry.of("unet", settings)
    net = checkpoint.network(entry)
    net.load_state_dict(weights)
    shape = [settings["image_channels"], settings["image_size"], settings["image_size"]]
    description = {
        "schedule": {"name": name, "timesteps": timesteps, **row},
        "target": target,
        "network": entry.content,
        "data": {"shape": shape, "range": [-1, 1]},
    }
    with atomic.replacing_dir(root / paths.imported_dir(name)) as temporary:
        checkpoint.save(temporary, net, description)
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
        f"params.yaml: wrote the row schedules.{name}; add {name} to sweep.schedules, and `dvc repro` sweeps it",
    ]


def _params_text(path: Path, name: str) -> str:
    """Returns the text of params.yaml. Raises InputError if it is invalid, or if the user's own row has that name."""
    params = Params.load(path)
    if name in params.schedules and params.schedules[name].imported is None:
        raise InputError(f"schedules.{name}: is your own row in {path.name}; import under another name")
    return path.read_text(encoding="utf-8")


def _network_folder(folder: Path) -> Path:
    """Returns the folder of config.json: unet/ of a pipeline, or `folder` itself. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; download the model first")
    index = folder / "model_index.json"
    if index.exists() and (kind := records.read_json(index).get("_class_name")) not in PIPELINES:
        raise InputError(f"{index}: holds a {kind}; only {' and '.join(PIPELINES)} can be imported")
    for candidate in (folder / "unet", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(f"{folder}: neither a UNet2DModel nor a DDPMPipeline: no config.json, and no unet/config.json")


def _process(folder: Path) -> tuple[tuple[dict[str, Any], int, str], list[str]]:
    """Returns the schedule row, T and target, and lines for the user about them. Raises InputError."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            config = records.read_json(path)
            try:
                process = interop.schedule_from_diffusers(config)
            except ValueError as error:
                raise InputError(f"{path}: {error}") from None
            kind, clip = config.get("variance_type", "fixed_small"), bool(config.get("clip_sample", True))
            line = f"its pipeline samples with variance_type {kind}, clip_sample {str(clip).lower()}"
            return process, [f"{line}: in params.yaml these are samplers.*.variance and sampling.clip"]
    line = f"{folder}: no scheduler_config.json, so Ho et al.'s settings are assumed: linear schedule, T = 1000, target eps"
    return ({"schedule": "linear"}, 1000, "eps"), [line]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the safetensors weights of a network folder. Raises InputError."""
    path = folder / WEIGHTS
    if not path.is_file():
        if any(folder.glob("*.bin")):
            raise InputError(
                f"{folder}: its weights are a pickle (.bin), which can run code when it is read; write"
                f" {WEIGHTS} with diffusers: save_pretrained(..., safe_serialization=True)"
            )
        raise InputError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not readable: {error}; download it again") from None
