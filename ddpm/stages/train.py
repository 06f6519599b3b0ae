"""`train SCHEDULE`: trains the network on the prepared dataset and writes models/SCHEDULE and the loss curves.

The stage saves its state in the cache every `compute.checkpoint_every` steps, and after SIGTERM or Ctrl-C. A later run resumes
from the newest state and ends with the same weights as an uninterrupted training.

Saved states lie in a folder whose name hashes everything that decides them, except the number of steps and the decay of the
learning rate. So a longer training resumes from the last state before the decay. The states during the decay depend on the number
of steps, so they are in a subfolder. Snapshots of the averaged weights are kept beside the states, and copied to
snapshots/SCHEDULE at the end.

If several processes share a training (ddpm/training/parallel.py), only process 0 saves, writes and reports.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.schedule import NoiseSchedule
from ddpm.errors import InputError
from ddpm.files import arrays, checkpoint, paths, records, snapshots
from ddpm.files.checkpoint import ResumeState
from ddpm.files.dataset import Dataset, read_dataset, spread
from ddpm.files.models import NetworkEntry, ScheduleEntry
from ddpm.files.params import Params
from ddpm.parameters import Training as TrainingSettings
from ddpm.parameters import as_json
from ddpm.provenance import code
from ddpm.runtime import compiling, ranks
from ddpm.runtime.device import find_device, memory_errors
from ddpm.runtime.progress import Progress, Report, silent
from ddpm.runtime.stopping import Stopped, deferred
from ddpm.training import averages
from ddpm.training.fit import Descent, Step, TrainingState, fit
from ddpm.training.objective import Objective
from ddpm.training.parallel import World
from ddpm.training.times import TIMES, Times
from ddpm.training.validation import Validation

# Diverged: the loss stayed above 10x the loss of a zero prediction for 10 logged rows.
DIVERGED_LOSS, DIVERGED_ROWS = 10.0, 10
ZERO_LOSS_IMAGES = 256  # the number of images on which the loss of a zero prediction is measured
IMAGE_MEMORY = 0.5  # the largest share of the GPU's free memory that the images may take
SNAPSHOTS = "snapshots"  # the folder beside the saved states


def noise_schedule(params: Params, name: str) -> NoiseSchedule:
    """Builds the noise schedule of a row of `schedules` in params.yaml. Raises InputError."""
    if name not in params.schedules:
        raise InputError(f"params.yaml: no row '{name}' in schedules; the rows are {', '.join(params.schedules)}")
    try:
        return checkpoint.noise_schedule(schedule_entry(params, name))
    except ValueError as error:
        raise InputError(f"schedules.{name}: {error}") from None


def schedule_entry(params: Params, name: str) -> ScheduleEntry:
    """Returns the entry `schedule` of model.json."""
    row = params.schedules[name].options()
    return ScheduleEntry(name, params.diffusion.timesteps, row.pop("schedule"), row)


def network_entry(params: Params, shape: tuple[int, int, int], classes: int = 0) -> NetworkEntry:
    """Returns the entry `network` of model.json.

    Args:
        params: the parameters of the run.
        shape: C, H, W of the images.
        classes: the number of classes; 0 for an unconditional network.

    Raises:
        InputError: an entry of `network` is not allowed or not finite.
    """
    channels, height, width = shape
    section = as_json(params.network)
    if known := checkpoint.DECIDED_BY.keys() & section.keys():
        raise InputError(f"network.{min(known)}: is determined by the data and by diffusion; remove this entry")
    if unsound := [key for key, value in section.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise InputError(f"network.{unsound[0]}: {section[unsound[0]]} is not a finite number")
    size = height if height == width else [height, width]
    settings = {"image_channels": channels, "image_size": size, **section}
    settings |= {"out_channels": 2 * channels} if params.diffusion.variance == "learned" else {}
    settings |= {"classes": classes} if classes else {}
    return NetworkEntry.of(settings.pop("kind"), settings)


def class_count(params: Params, dataset: str, classes: Collection[str] | None) -> int:
    """Returns the number of classes of the network, which is 0 unless diffusion.conditional is true.

    Args:
        params: the parameters of the run.
        dataset: the name of the dataset.
        classes: the names of the classes; None for a dataset without classes.

    Raises:
        InputError: diffusion.conditional is true, and the dataset has no classes.
    """
    if not params.diffusion.conditional:
        return 0
    if classes is None:
        raise InputError(
            f"diffusion.conditional is true, but the dataset {dataset} has no classes; set it to false or add classes"
            " (image_folder: a folder for each class; huggingface: a column of type ClassLabel)"
        )
    return len(classes)


def training_key(params: Params, schedule: str, dataset: str) -> str:
    """Hashes everything that decides the weights before the learning rate decays, including the code.

    The number of steps and the decay are not hashed, so a training with another number of steps finds the same states.
    """
    settings = {"seed": params.training_seed(schedule), **params.to_json("diffusion", "network")}
    settings["training"] = params.training.before_descent()
    row = params.schedules[schedule]
    decisive = [
        settings,
        {**row.options(), **row.origin},
        dataset,
        code.digest(__name__, *code.selected(params, __name__)),
    ]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def train(
    params: Params, schedule: str, root: Path = Path(), report: Report = silent, fresh: bool = False
) -> dict[str, Any]:
    """Trains the network with one noise schedule, a row of `schedules` in params.yaml.

    Writes models/SCHEDULE, snapshots/SCHEDULE, and metrics/train/SCHEDULE.csv, .by_time.csv and .json.

    If `ddpm import-diffusers` wrote the row, checks and copies the imported network instead.

    Args:
        params: the parameters of the run.
        schedule: the name of the row of `schedules`.
        root: the top of the checkout.
        report: called with the progress.
        fresh: whether to delete the saved states of this training first.

    Returns:
        The content of the JSON file; {} in processes other than process 0.

    Raises:
        InputError: the input is wrong, or the training diverged.
        Stopped: a signal came.
    """
    with memory_errors(
        f"train {schedule}", "raise training.accumulate (the same training in less memory), or lower network.channels"
    ):
        noise_schedule(params, schedule)
        device = find_device(params.compute.device)
        if params.schedules[schedule].imported is not None:
            return _copy_imported(params, schedule, read_dataset(root), root, report)
        params = compiling.resolved(params, "training", device, root, report)
        with ranks.joined(device) as (world, device):
            dataset, own_report = _read_dataset(root, world), report if world.rank == 0 else silent
            training, steps = _set_up(params, schedule, dataset, root, own_report, fresh, world, device)
            _run(training, steps)
            return _write(training, dataset, root) if world.rank == 0 else {}


def _read_dataset(root: Path, world: World) -> Dataset:
    """Reads the dataset. If a process cannot read the dataset, raises InputError in all processes, so that no process hangs."""
    dataset, refusal = None, None
    try:
        dataset = read_dataset(root)
    except InputError as error:
        refusal = error
    if world.largest(int(refusal is not None)):
        raise refusal or InputError("train: another process cannot read its dataset; see the output of that process")
    assert dataset is not None
    return dataset


@dataclass
class Training:
    """A training in progress.

    Args:
        params: the parameters of the run.
        schedule: the name of the row of `schedules` that is trained.
        network: the entry `network` of model.json.
        state: the weights and the state of the optimiser.
        denoiser: the averaged network, for previews.
        validation: computes the loss on test images.
        world: the processes that share the training.
        report: called with the progress.
        folder: the folder of the saved states.
        rows: the loss history, with a row for each logged step.
        losses: the losses of the steps since the last row of the loss history.
        loss_limit: the training diverges if the loss stays above this limit.
        saved: the step of the newest saved state.
    """

    params: Params
    schedule: str
    network: NetworkEntry
    state: TrainingState
    denoiser: Denoiser
    validation: Validation
    world: World
    report: Report
    folder: Path
    rows: list[dict[str, Any]]
    losses: list[torch.Tensor]
    loss_limit: float
    saved: int

    def failure(self, problem: str, step: Step) -> InputError:
        """Returns the error that ends a diverged training. problem: such as "the loss is nan"."""
        folder = _folder_of_step(self.folder, self.params.training, self.saved)
        file = f" ({checkpoint.resume_file(folder, self.saved)})" if self.saved else ", the start"
        return InputError(
            f"train {self.schedule}: {problem} at step {step.step} (learning rate {step.learning_rate:g}); the last good state is"
            f" at step {self.saved}{file}; lower training.learning_rate"
        )


def _run(training: Training, steps: Iterator[Step]) -> None:
    """Runs the steps and saves states. Raises InputError, and Stopped after a signal."""
    params, world, total = training.params, training.world, training.params.training.steps
    with deferred() as signalled:
        while training.state.step < total:
            step = next(steps)
            _log_loss(training, step)
            if world.rank == 0 and step.step in _snapshots(params.training, step.step):
                snapshots.keep(_snapshot(training.folder, params.training, step.step), _averaged(training.state))
            last = step.step == total
            signal = world.largest(signalled())  # a signal to one process stops all processes after the same step
            # While the loss is above the limit, no state is saved. So the newest saved state is good.
            good = not training.rows or training.rows[-1]["loss"] <= training.loss_limit
            due = step.step == params.training.whole or step.step - training.saved >= params.compute.checkpoint_every
            if last or (good and (signal or due)):
                _save(training, step)
            if signal and not last:
                raise Stopped(
                    f"train {training.schedule}: stopped by a signal; the next run resumes after step {training.saved} of"
                    f" {total}",
                    signal,
                )


def _set_up(
    params: Params,
    schedule: str,
    dataset: Dataset,
    root: Path,
    report: Report,
    fresh: bool,
    world: World,
    device: torch.device,
) -> tuple[Training, Iterator[Step]]:
    """Builds the network and loads the newest saved state.

    Args:
        params: the parameters of the run.
        schedule: the name of the row of `schedules`.
        dataset: the prepared dataset.
        root: the top of the checkout.
        report: called with the progress.
        fresh: whether to delete the saved states first.
        world: the processes that share the training.
        device: the device of this process.

    Returns:
        The training, and an iterator that runs one step at a time.

    Raises:
        InputError: the parameters do not fit each other or the dataset.
    """
    settings = params.training
    noise = noise_schedule(params, schedule)
    objective = _objective(params, schedule, device)
    network = network_entry(
        params, dataset.train.shape[1:], class_count(params, dataset.record.name, dataset.record.classes)
    )
    if settings.flip and not dataset.record.flip:
        message = f"training.flip is true, but a mirrored image of {dataset.record.name} may mean something else"
        report(Progress(0, settings.steps, "steps", message=message))
    torch.set_num_threads(settings.threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.training_seed(schedule))
        net = checkpoint.network(network).to(device).to(memory_format=torch.channels_last)
    times = _times(params, schedule, device)
    if params.schedules[schedule].base is not None:
        _start_from_base(net, params, schedule, network, root, world)
    lengths = averages.LENGTHS if settings.snapshot_every else ()
    state = TrainingState(net, settings.optimizer, settings.weight_decay, times, lengths)
    folder = _state_folder(params, schedule, dataset, root, world)
    if fresh and world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    rows, losses = _resume(folder, settings, state, report, world)
    images = _on_device_if_they_fit(dataset.train, device)
    labels = torch.from_numpy(np.array(dataset.train_labels)).to(device) if params.diffusion.conditional else None
    validation = _validation(params, dataset, objective, device, params.diffusion.conditional)
    denoiser = Denoiser(state.ema, noise, params.diffusion.target, clip=True)
    channels = network.out_channels or images.shape[1]
    loss_limit = DIVERGED_LOSS * _zero_prediction_loss(
        torch.from_numpy(spread(dataset.train, ZERO_LOSS_IMAGES)).to(device), objective, channels
    )
    steps = fit(
        state,
        images,
        objective,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        seed=params.training_seed(schedule),
        warmup=settings.warmup,
        clip=settings.clip,
        ema=settings.ema,
        flip=settings.flip,
        precision=settings.precision,
        forward=compiling.compiled(world.module(net), "training") if settings.compile else world.module(net),
        labels=labels,
        label_dropout=settings.label_dropout,
        accumulate=settings.accumulate,
        world=world,
        descent=None
        if settings.decay == "none"
        else Descent(settings.whole, settings.steps, settings.decay, settings.decay_to),
        pair=PAIRINGS[settings.pairing],
    )
    training = Training(
        params,
        schedule,
        network,
        state,
        denoiser,
        validation,
        world,
        report,
        folder,
        rows,
        losses,
        loss_limit,
        saved=state.step,
    )
    return training, steps


def _times(params: Params, schedule: str, device: torch.device) -> Times | None:
    """Returns the distribution of the timesteps; None if they are uniform. Raises InputError."""
    if params.training.times == "uniform":
        return None
    unbiased = params.training.loss in ("vlb", "hybrid")
    try:
        return TIMES[params.training.times](noise_schedule(params, schedule), device, unbiased)
    except ValueError as error:
        raise InputError(f"train {schedule}: training.times: {error}") from None


def _start_from_base(
    net: torch.nn.Module, params: Params, schedule: str, network: NetworkEntry, root: Path, world: World
) -> None:
    """Loads the weights that schedules.SCHEDULE.base names into the network of process 0.

    Later, process 0 sends its weights to all processes. If loading fails, raises InputError in all processes.
    """
    refusal = ""
    if world.rank == 0:
        try:
            net.load_state_dict(_base_weights(params, schedule, network, root))
        except InputError as error:
            refusal = str(error)
    if refusal := world.broadcast(refusal):
        raise InputError(refusal)


def _base_weights(params: Params, schedule: str, network: NetworkEntry, root: Path) -> dict[str, torch.Tensor]:
    """Returns the weights from which the training starts: those of the model that schedules.SCHEDULE.base names.

    That model lies in imported/, and may have another schedule, target and dataset. Raises InputError if it is missing, if its
    weights do not have the checksum in `base`, or if its network differs from the network to train.
    """
    name, _, checksum = str(params.schedules[schedule].base).partition("@")
    folder = paths.imported_dir(name)
    if not (root / folder).is_dir():
        raise InputError(
            f"schedules.{schedule}.base: the folder {folder} does not exist; copy a model's folder, for example"
            f" models/{name}, to {folder}"
        )
    denoiser, model = checkpoint.load(root / folder)
    if model.weights_sha256 != checksum:
        raise InputError(
            f"schedules.{schedule}.base: {folder} holds other weights; restore the folder, or set base to"
            f" {name}@{model.weights_sha256}"
        )
    theirs, ours = (checkpoint.complete(entry) for entry in (model.network, network))
    other = next((key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key) and key != "dropout"), None)
    if other is not None:
        cause = checkpoint.DECIDED_BY.get(other, f"network.{other}")
        raise InputError(
            f"schedules.{schedule}.base: the network in {folder} has {other} {theirs.get(other)}, but this training's"
            f" network has {ours.get(other)}; change {cause}, or choose another base"
        )
    assert isinstance(denoiser.net, torch.nn.Module)
    return denoiser.net.state_dict()


def _state_folder(params: Params, schedule: str, dataset: Dataset, root: Path, world: World) -> Path:
    """Returns the folder of this training's saved states. Raises InputError if the processes have different inputs."""
    key = training_key(params, schedule, dataset.record.sha256)
    inputs = [key, as_json(params.training)]
    if world.largest(int(world.broadcast(inputs) != inputs)):
        raise InputError(
            f"train {schedule}: the processes of this training have different data, parameters or code; start all of them with"
            " the same"
        )
    return root / paths.CACHE / "training" / f"{schedule}-{key[:16]}"


def _folder_of_step(folder: Path, settings: TrainingSettings, step: int) -> Path:
    """Returns the folder of the state after `step`: `folder` itself, or its subfolder once the learning rate decays."""
    if step <= settings.whole:
        return folder
    return descent_folder(folder, settings)


def descent_folder(folder: Path, settings: TrainingSettings) -> Path:
    """Returns the subfolder for states saved while the learning rate decays. Its name contains a hash of the decay settings."""
    descent = [settings.steps, settings.decay, settings.decay_share, settings.decay_to]
    return folder / f"{folder.name}-{hashlib.sha256(json.dumps(descent).encode()).hexdigest()[:16]}"


def _snapshots(settings: TrainingSettings, step: int) -> range:
    """Returns the steps, up to `step`, after which a snapshot is kept."""
    every = settings.snapshot_every
    return range(every, step + 1, every) if every else range(0)


def _snapshot(folder: Path, settings: TrainingSettings, step: int) -> Path:
    return snapshots.file(_folder_of_step(folder, settings, step) / SNAPSHOTS, step)


def _immiscible(x_0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Assigns a noise to each image so that the sum of the distances is least (Li et al. 2024, algorithm 1).

    x_0 and eps: [N, C, H, W]. Returns the index of the noise for each image, [N].
    """
    from scipy.optimize import linear_sum_assignment  # imported here, since the import takes half a second

    distances = torch.cdist(x_0.flatten(1).float(), eps.flatten(1).float())
    return torch.from_numpy(linear_sum_assignment(distances.cpu().numpy())[1]).to(eps.device)


# The argument `pair` of `fit` for each value of training.pairing.
PAIRINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None] = {
    "random": None,
    "immiscible": _immiscible,
}


def _log_loss(training: Training, step: Step) -> None:
    """Records and reports the loss of a step. Raises InputError once the training has diverged."""
    settings, rows, losses = training.params.training, training.rows, training.losses
    losses.append(step.loss)
    values: dict[str, float] = {}
    validate = len(training.validation.images) > 0 and step.step % settings.validate_every == 0
    if step.step % settings.log_every == 0 or validate:
        values = {"loss": float(torch.stack(losses).mean()), "learning_rate": step.learning_rate}
        values["gradient_norm"] = float(step.gradient_norm)
        losses.clear()
        if not math.isfinite(values["loss"]):
            raise training.failure(f"the loss is {values['loss']}", step)
        row: dict[str, Any] = {"step": step.step, **values, "validation_loss": ""}
        if validate and training.world.rank == 0:
            row["validation_loss"] = values["validation_loss"] = training.validation.loss(training.state.ema)
        rows.append(row)
        # protects: tests/stages/test_faults.py::test_a_loss_far_above_that_of_predicting_nothing_stops_it
        if len(rows) >= DIVERGED_ROWS and all(row["loss"] > training.loss_limit for row in rows[-DIVERGED_ROWS:]):
            problem = f"the loss is {values['loss']:g}, and was above {training.loss_limit:g} in the last {DIVERGED_ROWS} rows,"
            raise training.failure(problem, step)
    training.report(Progress(step.step, settings.steps, "steps", values, model=lambda: training.denoiser))


def _averaged(state: TrainingState) -> dict[str, torch.Tensor]:
    """Returns the power-function averages of the weights, on the CPU. A key is LENGTH.NAME, with the parameter's name."""
    return {name: tensor.cpu().contiguous() for name, tensor in state.averaged().items()}


def _save(training: Training, step: Step) -> None:
    """Saves the state after this step. Raises InputError if a weight is not finite."""
    tensors = training.state.tensors()
    # protects: tests/stages/test_faults.py::test_no_state_that_is_not_finite_is_saved
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise training.failure("the weights are not finite", step)
    if training.world.rank == 0:
        losses = [float(loss) for loss in training.losses]
        folder = _folder_of_step(training.folder, training.params.training, step.step)
        checkpoint.write_resume(folder, ResumeState(step.step, tensors, training.rows, losses))
    training.saved = step.step


def _on_device_if_they_fit(images: arrays.Images, device: torch.device) -> torch.Tensor:
    """Copies the images to the GPU if they take at most IMAGE_MEMORY of its free memory. Else leaves them in the mapped file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to the array
        mapped = torch.from_numpy(images)
    if device.type == "cuda" and mapped.nbytes <= IMAGE_MEMORY * torch.cuda.mem_get_info(device)[0]:
        return mapped.to(device)
    return mapped


def _zero_prediction_loss(images: torch.Tensor, objective: Objective, channels: int) -> float:
    """Returns the loss of a network that always predicts 0, averaged over evenly spread times.

    channels: the number of output channels.
    """
    return Validation(images, objective, batch=64).loss(lambda x, t: x.new_zeros(len(x), channels, *x.shape[2:]))


def _validation(
    params: Params, dataset: Dataset, objective: Objective, device: torch.device, conditional: bool
) -> Validation:
    settings, count = params.training, min(params.training.validation_images, len(dataset.test))
    # In random order, so that the first images, which by_time takes, are of every class, and no time belongs to one class.
    order = np.random.RandomState(0).permutation(count)
    images, labels = (
        None if split is None else torch.from_numpy(spread(split, count)[order]).to(device)
        for split in (dataset.test, dataset.test_labels if conditional else None)
    )
    assert images is not None
    return Validation(images, objective, settings.batch, settings.precision, labels)


def _objective(params: Params, schedule: str, device: torch.device) -> Objective:
    try:
        return Objective.of(noise_schedule(params, schedule), params.diffusion.target, device, params.training.loss)
    except ValueError as error:
        raise InputError(f"train {schedule}: diffusion.target: {error}") from None


def _resume(
    folder: Path, settings: TrainingSettings, state: TrainingState, report: Report, world: World
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Loads the newest saved state into `state`. Without a saved state, leaves `state` as it is.

    Process 0 reads the files and sends the state to the other processes. These processes may have no access to the files.

    Args:
        folder: the folder of the saved states.
        settings: the section `training`.
        state: the weights and the state of the optimiser, which the saved state overwrites.
        report: called with messages about the saved states.
        world: the processes that share the training.

    Returns:
        The rows of the loss history, and the losses of the steps since the last row.
    """
    rows: list[dict[str, Any]] = []
    losses: list[float] = []
    steps = settings.steps
    if world.rank == 0:
        resumed, complaints = _newest_state(folder, settings, steps)
        while resumed is not None and (lost := _lost_snapshot(folder, settings, resumed.step)):
            resumed, more = _newest_state(folder, settings, lost - 1)
            complaints += [
                f"{_snapshot(folder, settings, lost)}: missing or damaged: training goes back before step {lost}"
                + ("" if resumed else ", to its start, since no earlier state was saved"),
                *more,
            ]
        if resumed is None and not complaints and any(folder.glob(checkpoint.STATES)):
            complaints.append(
                f"starting from step 0, since the learning rate decays after step {settings.whole} and no state was saved before"
                if settings.whole < steps
                else f"starting from step 0, since all saved states are from after step {steps}"
            )
        for complaint in complaints:
            report(Progress(0, steps, "steps", message=complaint))
        # protects: tests/stages/test_faults.py::test_a_signal_makes_training_save_that_very_step[15]
        if resumed is not None:
            state.load(resumed.step, resumed.tensors)
            rows, losses = resumed.rows, resumed.losses
            report(Progress(resumed.step, steps, "steps", message=f"resuming after step {resumed.step}"))
    state.step, rows, losses = world.broadcast((state.step, rows, losses))
    world.copy(state.live().values())
    device = next(state.net.parameters()).device
    return rows, [torch.tensor(loss, device=device) for loss in losses]


def _newest_state(folder: Path, settings: TrainingSettings, at_most: int) -> tuple[ResumeState | None, list[str]]:
    """Returns the newest saved state up to a step, and complaints. `folder` is that of the states before the rate decays."""
    resumed, complaints = checkpoint.read_resume(_folder_of_step(folder, settings, at_most), at_most=at_most)
    if resumed is None and settings.whole < at_most:
        resumed, more = checkpoint.read_resume(folder, at_most=settings.whole)
        complaints += more
    return resumed, complaints


def _lost_snapshot(folder: Path, settings: TrainingSettings, step: int) -> int | None:
    """Returns the step of the first missing or damaged snapshot up to `step`; None if the cache has all snapshots."""
    taken = _snapshots(settings, step)
    return next((each for each in taken if not snapshots.is_kept(_snapshot(folder, settings, each))), None)


def _write(training: Training, dataset: Dataset, root: Path) -> dict[str, Any]:
    params, schedule, state, rows = training.params, training.schedule, training.state, training.rows
    description: dict[str, Any] = {
        "schedule": schedule_entry(params, schedule).to_json(),
        "target": params.diffusion.target,
        "variance": params.diffusion.variance,
        "network": training.network.content,
        "data": _data_entry(dataset),
        "training": params.training_entry(schedule),
    }
    metrics = {
        "steps": state.step,
        "parameters": sum(parameter.numel() for parameter in state.net.parameters()),
        "loss": rows[-1]["loss"] if rows else None,
        "validation_loss": next(
            (row["validation_loss"] for row in reversed(rows) if row["validation_loss"] != ""), None
        ),
    }
    by_time = training.validation.by_time(state.ema)
    if digest := _write_snapshots(training, root):
        description["snapshots"] = digest
    checkpoint.save(root / paths.model_dir(schedule), state.ema, description)
    return _write_metrics(root, schedule, metrics, rows, by_time)


def _write_snapshots(training: Training, root: Path) -> str:
    """Writes snapshots/SCHEDULE. Returns the hash of the folder's record, or "" if the training keeps no snapshots."""
    settings, state = training.params.training, training.state
    kept = [_snapshot(training.folder, settings, step) for step in _snapshots(settings, state.step - 1)]
    return snapshots.write(
        root, training.schedule, kept, (state.step, _averaged(state)) if settings.snapshot_every else None
    )


def _write_metrics(
    root: Path, schedule: str, metrics: dict[str, Any], rows: list[dict[str, Any]], by_time: list[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the loss history and the losses by timestep, then a JSON record with their hashes. Returns the record."""
    history, losses = root / paths.history_file(schedule), root / paths.losses_by_time_file(schedule)
    records.write_csv(history, rows)
    records.write_csv(losses, by_time)
    about = {"schedule": schedule, **metrics}
    return records.write_record(root / paths.training_metrics_file(schedule), about, (history, losses))


def _data_entry(dataset: Dataset) -> dict[str, Any]:
    """Returns the entry `data` of model.json."""
    known = ("name", "sha256", "shape", "classes", "class_counts")
    return {**{key: getattr(dataset.record, key) for key in known}, "range": [-1, 1]}


def _copy_imported(params: Params, schedule: str, dataset: Dataset, root: Path, report: Report) -> dict[str, Any]:
    """Copies imported/SCHEDULE to models/SCHEDULE, and measures the validation loss.

    The model keeps its own T and target, which may differ from the section `diffusion`. Returns the content of
    metrics/train/SCHEDULE.json. Raises InputError if the model is missing, or does not fit the dataset,
    schedules.SCHEDULE or network.kind.
    """
    folder, row, device = paths.imported_dir(schedule), params.schedules[schedule], find_device(params.compute.device)
    remedy = f"run `ddpm import-diffusers FOLDER {schedule}` again"
    if not (root / folder).is_dir():
        raise InputError(f"schedules.{schedule}: no folder {folder}; {remedy}")
    denoiser, model = checkpoint.load(root / folder, device)
    assert isinstance(denoiser.net, torch.nn.Module)
    if model.weights_sha256 != row.imported or model.schedule.row != row.options():
        raise InputError(f"{folder}: the model is not the one that schedules.{schedule} describes; {remedy}")
    if model.network.kind != params.network.kind:
        raise InputError(
            f"{folder}: the network is of kind {model.network.kind}, but network.kind is {params.network.kind}, and DVC tracks"
            f" only the code of that kind; remove {schedule} from sweep.schedules, or change network.kind"
        )
    if model.data.shape != dataset.record.shape:
        raise InputError(
            f"{folder}: the model makes images of shape {model.data.shape}, but the dataset holds images of shape"
            f" {dataset.record.shape}; remove {schedule} from sweep.schedules, or prepare the model's dataset"
        )
    if model.network.classes not in (0, len(dataset.record.classes or ())):
        raise InputError(
            f"{folder}: the model has {model.network.classes} classes, but the dataset has"
            f" {len(dataset.record.classes or ())}; remove {schedule} from sweep.schedules, or prepare the model's dataset"
        )
    torch.set_num_threads(params.training.threads)
    report(Progress(0, 1, "models", message=f"imported, with target {denoiser.target} at T = {denoiser.schedule.T}"))
    objective = Objective.of(denoiser.schedule, denoiser.target, device)
    validation = _validation(params, dataset, objective, device, model.network.classes > 0)
    loss = validation.loss(denoiser.net) if len(validation.images) else None
    training = {"seed": params.seed, "steps": 0, "imported": row.imported}
    description = model.described_by(data=_data_entry(dataset), training=training)
    description.pop("snapshots", None)  # an imported model has only its weights
    snapshots.write(root, schedule, (), None)
    parameters = sum(parameter.numel() for parameter in denoiser.net.parameters())
    metrics = {"steps": 0, "parameters": parameters, "loss": None, "validation_loss": loss}
    metrics["timesteps"] = denoiser.schedule.T  # the report needs T, and params.yaml does not hold the T of an import
    checkpoint.save(root / paths.model_dir(schedule), denoiser.net, description)
    curve = {"step": 0, "loss": "", "learning_rate": "", "gradient_norm": "", "validation_loss": loss}
    written = _write_metrics(root, schedule, metrics, [curve], validation.by_time(denoiser.net))
    report(Progress(1, 1, "models"))
    return written
