"""params.yaml as frozen models. Unknown keys, wrong types and impossible values are errors, with the place they stand at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ddpm.stages.errors import InputError

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Precision = Literal["float32", "bfloat16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _sequences_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Data(Section):
    """What `prepare` reads."""

    source: Literal["digits", "cifar10", "fashion-mnist", "image-folder"]
    path: str
    fit: Literal["error", "crop", "pad", "resize"] = "error"
    size: Annotated[int, Field(ge=4, le=4096)] | None = None
    channels: Literal[1, 3] | None = None
    test_fraction: Fraction = 0.2


class Diffusion(Section):
    """The forward process and what the network predicts."""

    timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    target: Literal["eps", "x0", "v"] = "eps"


class Network(Section):
    """UNet of Ho et al. 2020, appendix B."""

    channels: Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
    multipliers: Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]
    blocks: Count
    attention: tuple[Count, ...] = ()
    heads: Count = 1
    dropout: Fraction = 0.0


class Training(Section):
    """Algorithm 1 and the optimiser."""

    steps: Count
    batch: Count
    learning_rate: Positive
    warmup: Annotated[int, Field(ge=0)] = 0
    clip: Positive = 1.0
    ema: Fraction = 0.9999
    flip: bool = False
    precision: Precision = "float32"
    compile: bool = False
    threads: Count = 1
    log_every: Count = 50
    validate_every: Count = 500


class Sampling(Section):
    """How many images each point makes, and how they are computed."""

    images: Count
    batch: Count
    clip: bool = True
    precision: Precision = "float32"
    compile: bool = False
    threads: Count = 1


class Evaluation(Section):
    """The protocol of the scores."""

    layer: Literal[64, 192, 768, 2048]
    images: Annotated[int, Field(ge=2)]
    batch: Count = 50
    threads: Count = 1


class Sampler(Section):
    """One row of the samplers table: the arguments of `ddpm.sample`. What a sampler doesn't take is an error."""

    sampler: str
    spacing: str = "leading"
    eta: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    variance: Literal["fixed_large", "fixed_small"] | None = None
    order: Annotated[int, Field(ge=1, le=3)] | None = None
    along: Name | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `ddpm.sample` that this row sets."""
        return {key: value for key, value in self.model_dump().items() if value is not None}


class Schedule(Section):
    """One row of the schedules table: the arguments of `NoiseSchedule.named`. What a schedule doesn't take is an error."""

    schedule: str
    start: Annotated[float, Field(gt=0, lt=1)] | None = None
    end: Annotated[float, Field(gt=0, lt=1)] | None = None
    s: Annotated[float, Field(gt=0, lt=1)] | None = None
    zero_terminal_snr: bool = False
    imported: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    def options(self) -> dict[str, Any]:
        """What this row sets, but for where its weights come from."""
        return self.model_dump(exclude_defaults=True, exclude={"imported"})


class Sweep(Section):
    """The points: schedules x samplers x steps."""

    schedules: Annotated[tuple[Name, ...], Field(min_length=1)]
    samplers: Annotated[tuple[Name, ...], Field(min_length=1)]
    steps: Annotated[tuple[Count, ...], Field(min_length=1)]

    @field_validator("schedules", "samplers", "steps")
    @classmethod
    def _no_duplicates(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names something twice")
        return value


class Compute(Section):
    """Where and how often; never changes a result, so no stage depends on it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    slots: Count = 1
    checkpoint_every: Count = 1000
    preview_every: Count = 1000


class Point(Section):
    """One point of the sweep; its name is the DVC stage, the file, the task run and the step on the MLflow run."""

    schedule: Name
    sampler: Name
    steps: Count

    @property
    def name(self) -> str:
        return f"{self.schedule}-{self.sampler}-{self.steps}"

    @classmethod
    def parse(cls, name: str) -> Point:
        """SCHEDULE-SAMPLER-STEPS -> Point. Raises InputError."""
        parts = name.split("-")
        if len(parts) != 3 or not parts[2].isdecimal() or int(parts[2]) < 1:
            raise InputError(
                f"'{name}' is no point of a sweep: expected SCHEDULE-SAMPLER-STEPS, such as linear-ddim-50"
            )
        try:
            return cls(schedule=parts[0], sampler=parts[1], steps=int(parts[2]))
        except ValidationError as error:
            raise InputError(f"'{name}' is no point of a sweep: {_one_line(error)}") from None


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    diffusion: Diffusion
    network: Network
    training: Training
    sampling: Sampling
    evaluation: Evaluation
    schedules: dict[Name, Schedule]
    samplers: dict[Name, Sampler]
    sweep: Sweep
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _names_resolve(self) -> Params:
        for axis, rows in (("schedules", self.schedules), ("samplers", self.samplers)):
            for name in getattr(self.sweep, axis):
                if name not in rows:
                    raise ValueError(f"sweep.{axis}: no row '{name}' in {axis}; there are {', '.join(rows)}")
        for name in self.sweep.schedules:
            row = self.schedules[name]
            if row.zero_terminal_snr and self.diffusion.target == "eps" and row.imported is None:
                raise ValueError(
                    f"schedules.{name}: with zero_terminal_snr, eps says nothing of the image at T; set diffusion.target to v"
                )
        for steps in self.sweep.steps:
            if steps > self.diffusion.timesteps:
                raise ValueError(f"sweep.steps: {steps} is more than diffusion.timesteps = {self.diffusion.timesteps}")
        return self

    @classmethod
    def load(cls, path: Path = Path("params.yaml")) -> Params:
        """Reads and checks a parameter file. Raises InputError with every fault in one line."""
        try:
            raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; run this in a checkout, or copy one from recipes/") from None
        except (YAMLError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(raw, dict):
            raise InputError(f"{path}: expected sections such as data and training, found {type(raw).__name__}")
        return cls.check(raw, str(path))

    @classmethod
    def check(cls, raw: dict[str, Any], where: str) -> Params:
        """A plain dict -> Params. Raises InputError with every fault in one line, headed by `where`."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise InputError(f"{where}: {_one_line(error)}") from None

    def points(self) -> list[Point]:
        """Every point of the sweep, in DVC's order."""
        sweep = self.sweep
        return [
            Point(schedule=schedule, sampler=sampler, steps=steps)
            for schedule in sweep.schedules
            for sampler in sweep.samplers
            for steps in sweep.steps
        ]


def _one_line(error: ValidationError) -> str:
    faults = []
    for fault in error.errors(include_url=False):
        place = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        given = fault["input"]
        if isinstance(given, (str, int, bool)) or (isinstance(given, float) and not math.isnan(given)):
            message += f" (given: {given!r})"
        faults.append(f"{place}: {message}" if place else message)
    return "; ".join(faults)
