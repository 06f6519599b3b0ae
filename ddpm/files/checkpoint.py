"""Reads and writes checkpoints (model.safetensors and model.json, which describes the network) and resume states.

Resume states of a training are kept in the cache. Each is written atomically and has a checksum.
"""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.schedule import NoiseSchedule
from ddpm.errors import InputError
from ddpm.files import atomic, models, paths, records
from ddpm.files.models import ModelRecord, NetworkEntry, ScheduleEntry
from ddpm.networks.network import NETWORKS

if TYPE_CHECKING:
    from ddpm.files.params import Params


# The arguments of a network that are no keys of the section `network`, and what they follow from.
DECIDED_BY = {
    "image_channels": "the dataset",
    "image_size": "the dataset",
    "out_channels": "diffusion.variance",
    "classes": "diffusion.conditional and the dataset's classes",
}


def network(entry: NetworkEntry) -> nn.Module:
    """Builds the network that model.json describes, with fresh weights. Raises InputError."""
    kind = NETWORKS.select(entry.kind)
    parameters = inspect.signature(kind).parameters
    unknown = entry.settings.keys() - parameters
    if unknown and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        known = ", ".join(name for name in parameters if name not in DECIDED_BY)
        key = min(unknown)
        hint = f"which follows from {DECIDED_BY[key]}" if key in DECIDED_BY else f"only {known}"
        raise InputError(f"network: {entry.kind} takes no {key}, {hint}")
    try:
        return kind(**entry.settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"network: {str(error).splitlines()[0]}") from None


def complete(entry: NetworkEntry) -> dict[str, Any]:
    """Returns the entry `network` of model.json with the defaults of the keys that it omits."""
    parameters = inspect.signature(NETWORKS.select(entry.kind)).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {**defaults, **entry.content}


def noise_schedule(entry: ScheduleEntry) -> NoiseSchedule:
    """Builds the noise schedule that model.json describes. Raises ValueError."""
    if entry.timesteps > models.MOST_TIMES:
        raise ValueError(f"T = {entry.timesteps} is more than {models.MOST_TIMES}")
    return NoiseSchedule.named(entry.schedule, entry.timesteps, **entry.options)


def save(path: Path, net: Any, description: Mapping[str, Any]) -> None:
    """Writes a checkpoint folder: the weights, and model.json with the description, the format and the weights' sha256."""
    with atomic.replacing_dir(path) as folder:
        weights = folder / "model.safetensors"
        write_tensors(weights, {name: x.detach().cpu().contiguous() for name, x in net.state_dict().items()})
        known = {"format": models.MODEL_FORMAT, "weights_sha256": records.sha256(weights)}
        records.write_record(folder / "model.json", {**known, **description})


def require_trained(params: Params, schedule: str, root: Path) -> None:
    """Raises InputError with the command to run if models/SCHEDULE is missing and `dvc repro` would not make it."""
    record = paths.model_dir(schedule) / "model.json"
    if (root / record).exists() or schedule in params.sweep.schedules:
        return
    if schedule not in params.schedules:
        raise InputError(f"params.yaml: no row '{schedule}' in schedules; the rows are {', '.join(params.schedules)}")
    raise InputError(
        f"{record}: no such file; make it with `ddpm train {schedule}`, since {schedule} is not in sweep.schedules"
    )


def load(path: Path, device: torch.device | str = "cpu", clip: bool | float = False) -> tuple[Denoiser, ModelRecord]:
    """Loads a checkpoint folder.

    Args:
        path: the folder.
        device: the device of the network.
        clip: how the denoiser clips x0_hat (see Denoiser).

    Returns:
        The denoiser, its network in eval mode and channels-last format, and the model's record.

    Raises:
        InputError: the checkpoint is missing, damaged or inconsistent.
    """
    record = models.read_model_record(path)
    weights = models.check_weights(path, record)
    try:
        models.check_data(record)
        net = _network_with_weights(record.network, load_file(weights))
        denoiser = Denoiser(net, noise_schedule(record.schedule), record.target, clip)
    except (
        InputError,
        SafetensorError,
        RuntimeError,
        MemoryError,
        ArithmeticError,
        AttributeError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        why = " ".join(str(error).partition("\nException raised")[0].split())  # cuts off torch's own stack
        raise models.unusable(path, why) from None
    net.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return denoiser, record


class _NoInitialisation(TorchFunctionMode):
    """Skips the functions of torch.nn.init, which initialise layers.

    On the meta device, such a function would import a thousand modules, although no tensor there has values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (*args, *(kwargs or {}).values())[0]
        return func(*args, **(kwargs or {}))


def _network_with_weights(entry: NetworkEntry, state: dict[str, Tensor]) -> nn.Module:
    """Builds the network of model.json with these weights. Checks the shapes before allocating memory. Raises ValueError."""
    with torch.device("meta"), _NoInitialisation():
        net = network(entry)
    expected = {name: list(x.shape) for name, x in net.state_dict().items()}
    for name in sorted({*expected, *state}, key=lambda name: (name in expected and name in state, name)):
        if name not in state or name not in expected:
            raise ValueError(f"{name}: {'missing' if name in expected else 'unexpected'} among the weights")
        if list(state[name].shape) != expected[name]:
            raise ValueError(
                f"{name}: the weights have shape {list(state[name].shape)}, model.json says {expected[name]}"
            )
        # protects: tests/files/test_bad_input.py::test_a_checkpoint[NaN]
        if state[name].dtype != torch.float32 or not bool(state[name].isfinite().all()):
            raise ValueError(f"{name}: expected finite float32 weights")
    # Copies the tensors, since the file may be replaced.
    net.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
    return net


def replace_weights(net: Any, weights: Mapping[str, Tensor], place: Path) -> None:
    """Replaces all parameters of a network in place. Raises InputError if the weights belong to another network.

    place: the folder of the model, for the message.
    """
    parameters = dict(net.named_parameters())
    if {name: x.shape for name, x in parameters.items()} != {name: x.shape for name, x in weights.items()}:
        raise models.unusable(place, "its snapshots belong to another network")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


@dataclass(frozen=True)
class ResumeState:
    """The state of a training after `step` steps.

    Args:
        step: the number of finished steps.
        tensors: the result of TrainingState.tensors().
        rows: the loss history so far, the rows of metrics/train/SCHEDULE.csv.
        losses: the loss of each step after the last of these rows.
    """

    step: int
    tensors: dict[str, Tensor]
    rows: list[dict[str, Any]]
    losses: list[float]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes CPU tensors with save_file of safetensors. Converts the disk errors of save_file into OSError.

    save_file first writes a temporary file, and a kill leaves that file behind. So this function calls save_file in a temporary
    folder whose name starts with the name of `path`. A later run finds and removes such a folder.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as folder:
            save_file(tensors, Path(folder) / path.name, metadata)
            (Path(folder) / path.name).replace(path)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), str(error)) from None


STATES = "[0-9]" * 9 + ".safetensors"  # matches resume states; sorted by name, they are in the order of the steps
KEPT = 2  # the number of resume states kept for one training length


def resume_file(folder: Path, step: int) -> Path:
    return folder / f"{step:09d}.safetensors"


def write_resume(folder: Path, state: ResumeState) -> None:
    """Writes a state to `folder`, then removes old states.

    Keeps the newest KEPT states up to this step, and the newest KEPT states of later steps.
    """
    path = resume_file(folder, state.step)
    with atomic.replacing(path) as temporary:
        history = {"training": folder.name, "step": state.step, "rows": state.rows, "losses": state.losses}
        # One metadata entry only: safetensors writes several entries in any order, so the bytes would vary.
        write_tensors(temporary, state.tensors, {"history": json.dumps(history)})
        digest = records.sha256(temporary)
    records.write_json(path.with_suffix(".json"), {"step": state.step, "sha256": digest})
    _prune(folder, path)


def _prune(folder: Path, path: Path) -> None:
    states = sorted(folder.glob(STATES))
    beyond = states.index(path) + 1
    for old in states[: max(0, beyond - KEPT)] + states[beyond:-KEPT]:
        _remove(old)


def _remove(path: Path) -> None:
    """Removes the checksum of a state, then the state. read_resume removes a state whose checksum is missing after a kill."""
    for file in (path.with_suffix(".json"), path):
        file.unlink(missing_ok=True)


def read_resume(folder: Path, at_most: int) -> tuple[ResumeState | None, list[str]]:
    """Returns the newest undamaged state up to step `at_most`, or None, and a message for each damaged state.

    Removes the damaged states.
    """
    from safetensors import safe_open

    complaints: list[str] = []
    for path in sorted(folder.glob(STATES), reverse=True):
        if int(path.stem) > at_most:
            continue
        try:
            if not path.with_suffix(".json").exists():
                raise InputError("its checksum is missing")
            # protects: tests/stages/test_faults.py::test_a_damaged_state_is_passed_over_in_one_line_and_gone[flipped]
            if records.sha256(path) != records.read_json(path.with_suffix(".json"))["sha256"]:
                raise InputError("its checksum does not match")
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                history = json.loads(file.metadata()["history"])
            training, state = history.pop("training"), ResumeState(tensors=tensors, **history)
            # protects: tests/stages/test_faults.py::test_a_damaged_state_is_passed_over_in_one_line_and_gone[of another training]
            if (training, state.step) != (folder.name, int(path.stem)):
                raise InputError(f"it belongs to step {state.step} of {training}")
            _prune(folder, path)  # a kill may have left states that should have been removed
            return state, complaints
        except (InputError, SafetensorError, KeyError, TypeError, ValueError) as error:
            complaints.append(f"{path}: damaged, passed over ({' '.join(str(error).split())})")
            _remove(path)
    return None, complaints
