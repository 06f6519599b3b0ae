"""Defines the sections of params.yaml as plain dataclasses.

docs/parameters.md explains every entry. The docstrings here explain only entries whose names and limits do not say enough.

`ddpm.files.params` checks a file against these classes. The metadata of each field holds the limits of its entry, in the terms of
pydantic and JSON Schema: ge, gt, lt, multiple_of, pattern. This module imports neither pydantic nor torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from ddpm.errors import InputError

LONGEST_NAME = 64  # characters; a file name holds up to three names and a suffix
NAME: dict[str, Any] = {"pattern": "^[a-z0-9_]+$", "max_length": LONGEST_NAME}
COUNT = {"ge": 1, "lt": 2**31}
POSITIVE = {"gt": 0, "allow_inf_nan": False}
FRACTION = {"ge": 0, "lt": 1, "allow_inf_nan": False}
FINITE = {"allow_inf_nan": False}
INSIDE = {"gt": 0, "lt": 1}
SEED = {"ge": 0, "lt": 2**32}  # torch's CPU generator uses only 32 bits
USUAL_NETWORK = "unet"  # the default of network.kind
USUAL_EXTRACTOR = "inception"  # the default of evaluation.extractor, and the extractor of old scores that name none
MOST_PAIRED = 4096  # the largest batch with immiscible noise: assigning the noise takes time cubic in the batch
AUTO = "auto"  # a value of precision and compile: `ddpm probe` chooses the fastest value on its machine
AUTOMATIC = ("training", "sampling")  # sections in which precision and compile may be AUTO
Precision = Literal["float32", "bfloat16", "auto"]


# Keys of a field's metadata. EACH: the limits of every item. ALONE: the class itself checks this entry. LATER: as_json omits
# the entry at its default, so that sections still compare equal with the records of earlier versions.
EACH, ALONE, LATER = "each", "alone", "later"


def entry(limits: Mapping[str, Any], default: Any = MISSING, each: Mapping[str, Any] | None = None) -> Any:
    """Returns a dataclass field whose metadata holds the limits of the entry. each: the limits of each item of a sequence."""
    return field(default=default, metadata={**limits, **({EACH: each} if each else {})})


def later(default: Any, limits: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Returns a field that a later version of ddpm added. as_json omits the field at its default (see LATER)."""
    return field(default=default, metadata={**limits, LATER: True})


def is_name(text: str) -> bool:
    """Returns whether a text can be a name in params.yaml: a-z, 0-9 and _, at most LONGEST_NAME of them."""
    return re.fullmatch(r"[a-z0-9_]+", text) is not None and len(text) <= LONGEST_NAME


def check_clip(clip: Any) -> None:
    """Raises ValueError unless `clip` is true, false or a quantile."""
    if not isinstance(clip, bool) and not (isinstance(clip, float) and 0 < clip < 1):
        raise ValueError(
            f"clip: expected true, false, or a quantile between 0 and 1, such as 0.995 (given: {clip!r:.60})"
        )


def check_compile(value: Any) -> None:
    """Raises ValueError unless `value` is true, false or auto."""
    if not isinstance(value, bool) and value != AUTO:
        raise ValueError(f"compile: expected true, false or auto (given: {value!r:.60})")


def check_size(size: Any) -> None:
    """Raises ValueError unless `size` is None, the side of a square, or height and width."""
    sides = size if isinstance(size, tuple) else (size, size)
    if size is not None and not (len(sides) == 2 and all(type(side) is int and 4 <= side <= 4096 for side in sides)):
        given = list(size) if isinstance(size, tuple) else size
        raise ValueError(f"size: expected null, a side of 4 ... 4096 pixels, or [height, width] (given: {given!r:.60})")


def as_json(section: Any) -> Any:
    """Returns a section as JSON values: dataclasses as objects, tuples as lists."""
    if is_dataclass(section):
        own = {
            item.name: as_json(getattr(section, item.name))
            for item in fields(section)
            if LATER not in item.metadata or getattr(section, item.name) != item.default
        }
        rest = own.pop(REST, {})
        return {**own, **rest}
    if isinstance(section, Mapping):
        return {str(key): as_json(item) for key, item in section.items()}
    return [as_json(item) for item in section] if isinstance(section, list | tuple) else section


REST = "rest"  # the field for entries that this module does not define


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images that `prepare` reads.

    Args:
        background: with `convert`, the colour #rrggbb behind transparent pixels and around padded images.
        hub: NAME@COMMIT of a dataset of the Hugging Face Hub.
    """

    source: str = entry(NAME)
    path: str = entry({"min_length": 1, "max_length": 4095})
    fit: Literal["error", "crop", "pad", "resize"] = "error"
    size: int | tuple[int, int] | None = entry({ALONE: True}, None)
    channels: Literal[1, 3] | None = None
    test_fraction: float = entry(FRACTION, 0.2)
    convert: bool = False
    background: str = entry({ALONE: True}, "#ffffff")
    unusable: Literal["error", "skip"] = "error"
    hub: str | None = None

    def __post_init__(self) -> None:
        check_size(self.size)
        if not isinstance(self.background, str) or re.fullmatch("#[0-9a-fA-F]{6}", self.background) is None:
            raise ValueError(
                'background: expected "#rrggbb", six hexadecimal digits, in quotes, since YAML takes # for a comment'
                f" (given: {self.background!r:.60})"
            )
        if self.hub is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}", self.hub, re.ASCII) is None:
            raise ValueError(
                "hub: expected NAME@COMMIT, such as ylecun/mnist@ followed by the 40 hexadecimal digits of a commit; a branch"
                f" is not accepted, since branches move (given: {self.hub!r:.60})"
            )
        if "\0" in self.path or any(len(os.fsencode(part)) > 255 for part in self.path.split("/")):
            raise ValueError(
                "path: no file system has such a path: a part is longer than 255 bytes, or the path contains a zero byte"
            )

    @property
    def place(self) -> str:
        """The place of the images, for messages."""
        return self.hub or self.path

    @property
    def sides(self) -> tuple[int, int] | None:
        """The height and width in pixels that `size` sets for every image, or None if `size` is not set."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """The forward process and what the network predicts."""

    timesteps: int = entry({"ge": 2, "le": 100_000}, 1000)
    target: Literal["eps", "x0", "v", "mu", "flow"] = "eps"
    variance: Literal["fixed", "learned"] = "fixed"
    conditional: bool = False


@dataclass(frozen=True, kw_only=True)
class Network:
    """The settings of the U-Net of Ho et al. 2020, appendix B."""

    kind: Literal["unet"] = "unet"
    channels: int = entry({"ge": 8, "le": 4096, "multiple_of": 8})
    multipliers: tuple[int, ...] = entry({"min_length": 1, "max_length": 8}, each={"ge": 1, "le": 64})
    blocks: int = entry({"ge": 1, "le": 64})
    attention: tuple[int, ...] = entry({}, (), each=COUNT)
    heads: int = entry(COUNT, 1)
    dropout: float = entry(FRACTION, 0.0)
    patch: int = entry({"ge": 1, "le": 64}, 1)


@dataclass(frozen=True, kw_only=True)
class OtherNetwork:
    """The settings of another network than the U-Net, from ddpm/networks. The network's class checks them when it is built."""

    kind: str = entry(NAME)
    rest: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the network is trained: algorithm 1 of Ho et al. 2020, and the optimiser.

    Args:
        accumulate: the number of equal parts in which a batch is computed.
        decay: the shape of the learning rate's decay over the last `decay_share` of the steps.
        decay_to: the learning rate after the decay, as a share of the full rate.
        pairing: how the images of a batch are paired with noise.
        times: how the network's time input t is drawn.
        snapshot_every: the number of steps between two snapshots of averaged weights. 0 keeps no snapshots. A row of
            `samplers` with `ema` needs snapshots.
    """

    loss: Literal["simple", "vlb", "hybrid", "min_snr"] = "simple"
    steps: int = entry(COUNT)
    batch: int = entry({"ge": 1, "le": 2**20})
    accumulate: int = entry(COUNT, 1)
    learning_rate: float = entry(POSITIVE)
    warmup: int = entry({"ge": 0, "lt": 2**31}, 0)
    clip: float = entry(POSITIVE, 1.0)
    ema: float = entry(FRACTION, 0.9999)
    flip: bool = False
    label_dropout: float = entry(FRACTION, 0.1)
    precision: Precision = "float32"
    compile: bool | str = entry({ALONE: True}, False)
    threads: int = entry(COUNT, 1)
    log_every: int = entry(COUNT, 50)
    validate_every: int = entry(COUNT, 500)
    validation_images: int = entry({"ge": 0, "lt": 2**31}, 1024)  # at most
    optimizer: Literal["adam", "adamw", "muon"] = later("adam")
    weight_decay: float = later(0.0, {"ge": 0, **FINITE})
    decay: Literal["none", "linear", "cosine"] = later("none")
    decay_share: float = later(0.3, {"gt": 0, "le": 1, **FINITE})
    decay_to: float = later(0.0, FRACTION)
    pairing: Literal["random", "immiscible"] = later("random")
    times: Literal["uniform", "loss_aware", "log_normal"] = later("uniform")
    snapshot_every: int = later(0, {"ge": 0, "lt": 2**31})

    def __post_init__(self) -> None:
        check_compile(self.compile)
        if (self.optimizer == "adam") != (self.weight_decay == 0) and self.optimizer != "muon":
            raise ValueError("weight_decay: more than 0 for adamw, and 0 for adam, which has no weight decay")
        if self.decay == "none" and (self.decay_share, self.decay_to) != (0.3, 0.0):
            raise ValueError("decay_share, decay_to: they have no effect without decay; set decay, or leave them out")
        if self.pairing == "immiscible" and self.batch > MOST_PAIRED:
            raise ValueError(f"pairing: immiscible takes a batch of at most {MOST_PAIRED:,} (given: {self.batch:,})")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: a batch of {self.batch} does not divide into {self.accumulate} equal parts")

    @property
    def whole(self) -> int:
        """The number of steps before the learning rate starts to decay. Without decay, the number of all steps."""
        return self.steps if self.decay == "none" else self.steps - round(self.decay_share * self.steps)

    def before_descent(self) -> dict[str, Any]:
        """Returns, as JSON values, the entries that affect the weights before the learning rate starts to decay."""
        descent = ("steps", "decay", "decay_share", "decay_to")
        return {name: value for name, value in as_json(self).items() if name not in descent}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many images are drawn for each point of the sweep, and how.

    Args:
        clip: whether x0_hat is clipped to [-1, 1]. A number is the quantile of dynamic thresholding.
    """

    images: int = entry(COUNT)
    batch: int = entry(COUNT)
    clip: bool | float = entry({ALONE: True}, True)
    precision: Precision = "float32"
    compile: bool | str = entry({ALONE: True}, False)
    threads: int = entry(COUNT, 1)

    def __post_init__(self) -> None:
        check_clip(self.clip)
        check_compile(self.compile)


Automatic = TypeVar("Automatic", Training, Sampling)


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The content of auto.json: the values of `precision` and `compile` that `auto` stands for."""

    precision: str
    compile: bool

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision: {self.precision!r:.60} is neither float32 nor bfloat16")

    def __str__(self) -> str:
        return f"{self.precision}, {'compiled' if self.compile else 'not compiled'}"

    def within(self, section: Automatic) -> Automatic:
        """Returns a section of params.yaml with these values in place of `auto`."""
        return replace(section, **{name: value for name, value in vars(self).items() if getattr(section, name) == AUTO})


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How samples are scored.

    Args:
        layer: a layer of the extractor, named by its number of features, such as 2048.
        judges: names of further scores, which use other extractors or layers.
    """

    extractor: str = entry(NAME, USUAL_EXTRACTOR)
    layer: int
    images: int = entry({"ge": 4, "lt": 2**31})
    batch: int = entry(COUNT, 50)
    threads: int = entry(COUNT, 1)
    judges: tuple[str, ...] = entry({}, (), each=NAME)

    def __post_init__(self) -> None:
        if len(set(self.judges)) < len(self.judges):
            raise ValueError("judges: names something twice; remove the repetition")

    def recorded(self) -> dict[str, Any]:
        """Returns the section as JSON values for records. Omits `extractor` and `judges` at their defaults, as old records do."""
        newer = {"extractor": USUAL_EXTRACTOR, "judges": []}
        return {name: value for name, value in as_json(self).items() if name not in newer or value != newer[name]}


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How the variational bound in bits/dim is estimated.

    Args:
        times: network evaluations per image; None means all T.
    """

    images: int = entry({"ge": 2, "lt": 2**31})
    times: int | None = entry({"ge": 2}, None)
    batch: int = entry(COUNT)
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    clip: bool = True
    threads: int = entry(COUNT, 1)


def _count(steps: Any) -> int:
    """Converts a number of steps, which is text in JSON, to int. Raises ValueError for other values."""
    if type(steps) is not int and not (isinstance(steps, str) and steps.isdecimal()):
        raise ValueError(steps)
    return int(steps)


def _time(t: Any) -> float:
    """Converts the network's time input t to float. Raises ValueError unless t is a finite number."""
    if type(t) not in (int, float) or not math.isfinite(t):
        raise ValueError(t)
    return float(t)


def _are_falling(steps: int, times: tuple[float, ...]) -> bool:
    """Returns whether `times` are `steps` timesteps of 0 or more, in falling order."""
    return len(times) == steps > 0 and times[-1] >= 0 and all(now > to for now, to in pairwise(times))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A row of `samplers` in params.yaml: the arguments of `ddpm.sample`, and the denoiser's guidance.

    An argument that the sampler does not take is an error.

    Args:
        times: the timesteps to visit, for each number of steps.
        fitted_to: sha256 of the weights to which `times` were fitted.
        own: options that have no field here. With `own`, a new sampler needs no new field.
        ema: the length of the weights' average: the standard deviation of the averaged steps, as a share of the training (see
            ddpm.training.averages). None for the average that `training.ema` describes.
    """

    sampler: str
    spacing: str | None = None  # leading, unless the row has times
    eta: float | None = entry({"ge": 0, "le": 1, **FINITE}, None)
    variance: Literal["fixed_large", "fixed_small", "learned"] | None = None
    order: int | None = entry({"ge": 1, "le": 3}, None)
    along: str | None = entry(NAME, None)
    guidance: float | None = entry(FINITE, None)
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = entry({"ge": 0, "le": 1, **FINITE}, None)
    times: Mapping[int, tuple[float, ...]] | None = entry({ALONE: True}, None)
    fitted_to: str | None = entry({"pattern": "^[0-9a-f]{64}$"}, None)
    ema: float | None = later(None, {"ge": 0.01, "le": 0.2, **FINITE})
    own: Mapping[str, bool | int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_times()
        self._check_guidance()
        if known := sorted(self.own.keys() & {item.name for item in fields(self)}):
            raise ValueError(f"own: {', '.join(known)}: write it in the row itself, not below `own`")
        for name, value in self.own.items():
            if not is_name(name):
                raise ValueError(f"own: {name!r:.60}: a name is made of a-z, 0-9 and _, at most {LONGEST_NAME} of them")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"own.{name}: not a finite number")

    def _check_times(self) -> None:
        if self.times is None:
            if self.fitted_to is not None:
                raise ValueError(
                    "fitted_to: only a row with times is fitted to a model; add times, or remove fitted_to"
                )
            return
        if self.spacing is not None or self.along is not None:
            raise ValueError("times: a row with times has neither spacing nor along; remove them")
        try:
            times = {_count(steps): tuple(map(_time, each)) for steps, each in self.times.items()}
        except (AttributeError, OverflowError, TypeError, ValueError):
            times = {}
        if not times or not all(_are_falling(steps, each) for steps, each in times.items()):
            raise ValueError("times: expected S falling timesteps for each S, such as {3: [900, 400, 0]}")
        object.__setattr__(self, "times", times)

    def _check_guidance(self) -> None:
        if self.guidance is None and (self.guidance_interval is not None or self.guidance_rescale is not None):
            raise ValueError(
                "guidance: missing, but guidance_interval and guidance_rescale need it; add a value such as 2.0"
            )
        low, high = self.guidance_interval or (0.0, 1.0)
        if not 0 <= low < high < math.inf:
            raise ValueError(f"guidance_interval: expected two noise levels, 0 <= low < high (given: {[low, high]})")

    @classmethod
    def arrange(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arranges options as a row of `samplers` in params.yaml. Options that have no field here become entries of `own`."""
        known = {item.name for item in fields(cls)}
        own = {key: value for key, value in options.items() if key not in known}
        return {key: value for key, value in options.items() if key in known} | ({"own": own} if own else {})

    def options(self) -> dict[str, Any]:
        """Returns the options that this row sets."""
        spacing = self.spacing or (None if self.times else "leading")
        given = as_json(self) | {"spacing": spacing}
        common = {key: value for key, value in given.items() if key != "own" and value is not None}
        return common | dict(self.own)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A row of `schedules` in params.yaml: the arguments of `NoiseSchedule.named`.

    An argument that the schedule does not take is an error. Rows that differ in `seed` alone are replicates: trainings of one
    schedule.

    Args:
        imported: sha256 of imported weights, which are not trained here.
        seed: the seed of the training. None means the `seed` at the top of params.yaml.
        base: NAME@SHA256. The training starts from the model in imported/NAME, whose weights have this sha256.
    """

    schedule: str
    start: float | None = entry(INSIDE, None)
    end: float | None = entry(INSIDE, None)
    s: float | None = entry(INSIDE, None)
    zero_terminal_snr: bool = False
    imported: str | None = entry({"pattern": "^[0-9a-f]{64}$"}, None)
    seed: int | None = entry(SEED, None)
    base: str | None = later(None, {"pattern": "^[a-z0-9_]{1,64}@[0-9a-f]{64}$"})

    def __post_init__(self) -> None:
        for name in ("seed", "base"):
            if self.imported is not None and getattr(self, name) is not None:
                raise ValueError(f"{name}: an imported network is not trained here; remove this entry")

    def options(self) -> dict[str, Any]:
        """Returns the entries that differ from their defaults and belong to the noise schedule."""
        others = ("imported", "seed", "base")
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in others}
        defaults = {item.name: item.default for item in fields(self)}
        return {name: value for name, value in given.items() if value != defaults[name]}

    @property
    def origin(self) -> dict[str, str]:
        """The entry `base`, or {} if it is not set. A training depends only on this row's `base`, noise schedule and seed."""
        return {} if self.base is None else {"base": self.base}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The points: schedules x samplers x steps."""

    schedules: tuple[str, ...] = entry({"min_length": 1}, each=NAME)
    samplers: tuple[str, ...] = entry({"min_length": 1}, each=NAME)
    steps: tuple[int, ...] = entry({"min_length": 1}, each=COUNT)

    def __post_init__(self) -> None:
        for axis in fields(self):
            values = getattr(self, axis.name)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis.name}: names something twice; remove the repetition")


@dataclass(frozen=True, kw_only=True)
class Report:
    """How the report chooses the best point.

    Args:
        margin: how much worse than the best point a cheaper point may be, as a share of the best score.
    """

    margin: float = entry({"ge": 0, **FINITE}, 0.05)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """When a challenger replaces the champion. No stage depends on this section.

    Args:
        confidence: the confidence of the intervals of differences.
        fewer_evaluations: a challenger without a better score wins only if it takes this many times fewer network evaluations.
        margin: how much worse than the best champion so far such a challenger may be, as a share of that champion's score.
            For `judges`, how much worse than the present champion any challenger may be, as a share of the champion's score.
        judges: entries of evaluation.judges, which are further scores. In each of them, a challenger must not be worse than
            the present champion by more than `margin`.
    """

    confidence: float = entry({**INSIDE, **FINITE}, 0.95)
    fewer_evaluations: float = entry({"gt": 1, **FINITE}, 2.0)
    margin: float = entry({"ge": 0, **FINITE}, 0.05)
    judges: tuple[str, ...] = entry({}, (), each=NAME)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """The dataset's name in MLflow: runs and models go to ddpm-NAME. No stage depends on this section."""

    name: str | None = entry({"pattern": "^[a-z0-9_-]+$", "max_length": 64}, None)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where stages run and how often they save. No stage depends on this section.

    Args:
        device: where stages compute. `ddpm probe` chooses the values of `auto` for this device. After a change of `device`, the
            values for the old device stay in use until `ddpm probe` runs again.
        slots: the number of stages that the flow runs at once.
        processes: the number of processes of one training. Each process computes its share of the batch.
        preview_fid: the number of images whose FID is logged at each preview, 2 or more; 0 for none.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    slots: int = entry(COUNT, 1)
    processes: int = entry(COUNT, 1)
    checkpoint_every: int = entry(COUNT, 1000)
    preview_every: int = entry(COUNT, 1000)
    preview_fid: int = later(0, {"ge": 0, "lt": 2**20})

    def __post_init__(self) -> None:
        if self.preview_fid == 1:
            raise ValueError("preview_fid: FID takes two images or more; 0 turns it off")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of the sweep: schedule, sampler and steps. DVC stages, files and task runs are named after the point."""

    schedule: str
    sampler: str
    steps: int

    def __post_init__(self) -> None:
        # protects: tests/files/test_bad_input.py::test_a_command_line[a point that is a path]
        if not is_name(self.schedule) or not is_name(self.sampler):
            raise InputError(
                f"'{self.name}' is no point of a sweep: the names of schedule and sampler are made of a-z, 0-9 and _, at most"
                f" {LONGEST_NAME} characters each"
            )
        if not 1 <= self.steps < COUNT["lt"]:
            raise InputError(f"'{self.name}' is no point of a sweep: {self.steps} is no valid number of steps")

    @property
    def name(self) -> str:
        return f"{self.schedule}-{self.sampler}-{self.steps}"

    @classmethod
    def parse(cls, name: str) -> Point:
        """Parses SCHEDULE-SAMPLER-STEPS. Raises InputError."""
        parts = name.split("-")
        if len(parts) != 3 or not re.fullmatch(r"0*[1-9]\d{0,9}", parts[2]):
            raise InputError(
                f"'{name}' is no point of a sweep: expected SCHEDULE-SAMPLER-STEPS, such as linear-ddim-50"
            )
        return cls(schedule=parts[0], sampler=parts[1], steps=int(parts[2]))
