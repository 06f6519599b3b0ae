"""params.yaml as frozen models. Unknown keys, wrong types and impossible values are errors, with the place they stand at."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ddpm.errors import InputError
from ddpm.files import yaml_file
from ddpm.scores.extractors import EXTRACTORS, USUAL

LONGEST_NAME = 64  # characters: three of them and an ending are the name of a file
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=LONGEST_NAME)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
FAULTS, SHOWN = 5, 60  # named in one line, and characters shown of a wrong value
Precision = Literal["float32", "bfloat16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _sequences_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Data(Section):
    """What `prepare` reads."""

    source: Name
    path: Annotated[str, Field(min_length=1, max_length=4095)]
    fit: Literal["error", "crop", "pad", "resize"] = "error"
    size: Annotated[int, Field(ge=4, le=4096)] | None = None
    channels: Literal[1, 3] | None = None
    test_fraction: Fraction = 0.2

    @field_validator("source", mode="before")
    @classmethod
    def _dashes_are_old(cls, value: Any) -> Any:
        """Reads names with dashes, which older files hold. A source is named like its module."""
        return value.replace("-", "_") if isinstance(value, str) else value

    @field_validator("path")
    @classmethod
    def _can_be_a_path(cls, value: str) -> str:
        if "\0" in value or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
            raise ValueError("no file system has such a path: a part is over 255 bytes long, or there is a zero byte")
        return value


class Diffusion(Section):
    """The forward process and what the network predicts."""

    timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    target: Literal["eps", "x0", "v", "mu"] = "eps"
    variance: Literal["fixed", "learned"] = "fixed"
    conditional: bool = False


USUAL_NETWORK = "unet"  # where params.yaml names none


class Network(Section):
    """UNet of Ho et al. 2020, appendix B."""

    kind: Literal["unet"] = "unet"
    channels: Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
    multipliers: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)]
    blocks: Annotated[int, Field(ge=1, le=64)]
    attention: tuple[Count, ...] = ()
    heads: Count = 1
    dropout: Fraction = 0.0


class OtherNetwork(Section):
    """A network of another module in ddpm/networks. Its class checks the entries when the network is made."""

    model_config = ConfigDict(extra="allow")

    kind: Name


def _kind_of_network(value: Any) -> str:
    kind = value.get("kind", USUAL_NETWORK) if isinstance(value, dict) else getattr(value, "kind", USUAL_NETWORK)
    return UNET if kind == USUAL_NETWORK else OTHER


UNET, OTHER = "the unet", "another network"  # in the place of a fault, where no reader needs them
AnyNetwork = Annotated[
    Annotated[Network, Tag(UNET)] | Annotated[OtherNetwork, Tag(OTHER)], Discriminator(_kind_of_network)
]


class Training(Section):
    """Algorithm 1 and the optimiser."""

    loss: Literal["simple", "vlb", "hybrid", "min_snr"] = "simple"
    steps: Count
    batch: Annotated[int, Field(ge=1, le=2**20)]
    accumulate: Count = 1  # equal parts of a batch, one after the other
    learning_rate: Positive
    warmup: Annotated[int, Field(ge=0, lt=2**31)] = 0
    clip: Positive = 1.0
    ema: Fraction = 0.9999
    flip: bool = False
    label_dropout: Fraction = 0.1
    precision: Precision = "float32"
    compile: bool = False
    threads: Count = 1
    log_every: Count = 50
    validate_every: Count = 500
    validation_images: Annotated[int, Field(ge=0, lt=2**31)] = 1024  # at most

    @model_validator(mode="after")
    def _parts_are_equal(self) -> Training:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate: a batch of {self.batch} does not divide into {self.accumulate} equal parts")
        return self


class Sampling(Section):
    """How many images each point makes, and how they are computed."""

    images: Count
    batch: Count
    clip: bool | float = True  # a number: dynamic thresholding at that quantile
    precision: Precision = "float32"
    compile: bool = False
    threads: Count = 1

    @field_validator("clip", mode="before")
    @classmethod
    def _quantile(cls, value: Any) -> Any:
        if not isinstance(value, bool) and not (isinstance(value, float) and 0 < value < 1):
            raise ValueError("expected true, false, or a quantile between 0 and 1, such as 0.995")
        return value


class Evaluation(Section):
    """The protocol of the scores. layer: what the extractor offers."""

    extractor: Name = USUAL
    layer: int
    images: Annotated[int, Field(ge=4, lt=2**31)]
    batch: Count = 50
    threads: Count = 1

    @model_validator(mode="before")
    @classmethod
    def _usual_layer(cls, given: Any) -> Any:
        """Fills in the layer that the extractor's published scores use."""
        name = given.get("extractor", USUAL) if isinstance(given, dict) else None
        return {"layer": EXTRACTORS[name].default, **given} if isinstance(name, str) and name in EXTRACTORS else given

    @field_validator("extractor")
    @classmethod
    def _is_an_extractor(cls, value: str) -> str:
        if value not in EXTRACTORS:
            raise ValueError(f"expected one of {', '.join(EXTRACTORS)}")
        return value

    @field_validator("layer")
    @classmethod
    def _is_a_layer(cls, value: int, info: ValidationInfo) -> int:
        layers = EXTRACTORS[info.data["extractor"]].layers if "extractor" in info.data else (value,)
        if value not in layers:
            raise ValueError(f"expected one of {', '.join(map(str, layers))}")
        return value

    def recorded(self) -> dict[str, Any]:
        """Returns the section as scores and runs record it: without the usual extractor, so that earlier runs are found again."""
        section = self.model_dump(mode="json")
        return {name: value for name, value in section.items() if (name, value) != ("extractor", USUAL)}


class Likelihood(Section):
    """How the bound in bits/dim is estimated. times: None for all T."""

    images: Annotated[int, Field(ge=2, lt=2**31)]
    times: Annotated[int, Field(ge=2)] | None = None
    batch: Count
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    clip: bool = True
    threads: Count = 1


class Sampler(Section):
    """One row of the samplers table: the arguments of `ddpm.sample`, and the denoiser's guidance. What a sampler doesn't
    take is an error. A new sampler's options stand below `own`, so that it needs no field here.
    """

    sampler: str
    spacing: str = "leading"
    eta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    variance: Literal["fixed_large", "fixed_small", "learned"] | None = None
    order: Annotated[int, Field(ge=1, le=3)] | None = None
    along: Name | None = None
    guidance: Annotated[float, Field(allow_inf_nan=False)] | None = None
    own: dict[
        Name, bool | int | Annotated[float, Field(allow_inf_nan=False)] | str
    ] = {}  # options without a field here

    @field_validator("own")
    @classmethod
    def _own_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        if fields := sorted(value.keys() & cls.model_fields.keys()):
            raise ValueError(f"{', '.join(fields)}: write it in the row itself, not below `own`")
        return value

    def options(self) -> dict[str, Any]:
        """What this row sets."""
        common = self.model_dump(exclude={"own"})
        return {key: value for key, value in common.items() if value is not None} | self.own


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


class Promotion(Section):
    """When a challenger replaces the champion; no stage depends on it."""

    confidence: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.95
    fewer_evaluations: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0


class Tracking(Section):
    """What MLflow calls the dataset: runs and models go to ddpm-NAME. No stage depends on it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$", max_length=64)] | None = None


class Compute(Section):
    """Where and how often; never changes a result, so no stage depends on it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    slots: Count = 1
    processes: Count = 1  # of one training, each with its share of the batch
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
        if len(parts) != 3 or not re.fullmatch(r"0*[1-9]\d{0,9}", parts[2]):
            raise InputError(
                f"'{name}' is no point of a sweep: expected SCHEDULE-SAMPLER-STEPS, such as linear-ddim-50"
            )
        try:
            return cls(schedule=parts[0], sampler=parts[1], steps=int(parts[2]))
        except ValidationError as error:
            raise InputError(f"'{name}' is no point of a sweep: {one_line(error)}") from None


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of a larger one torch's CPU generator takes 32 bits
    data: Data
    diffusion: Diffusion
    network: AnyNetwork
    training: Training
    sampling: Sampling
    evaluation: Evaluation
    likelihood: Likelihood
    schedules: dict[Name, Schedule]
    samplers: dict[Name, Sampler]
    sweep: Sweep
    promotion: Promotion = Promotion()
    tracking: Tracking = Tracking()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _names_resolve(self) -> Params:
        for axis, rows in (("schedules", self.schedules), ("samplers", self.samplers)):
            for name in getattr(self.sweep, axis):
                if name not in rows:
                    raise ValueError(f"sweep.{axis}: no row '{name}' in {axis}; there are {', '.join(rows)}")
        return self

    @model_validator(mode="after")
    def _schedules_fit_the_target(self) -> Params:
        for name in self.sweep.schedules:
            row = self.schedules[name]
            if row.zero_terminal_snr and self.diffusion.target == "eps" and row.imported is None:
                raise ValueError(
                    f"schedules.{name}: with zero_terminal_snr, eps says nothing of the image at T; set diffusion.target to v"
                )
        return self

    @model_validator(mode="after")
    def _samplers_fit_the_networks(self) -> Params:
        imported = [name for name in self.sweep.schedules if self.schedules[name].imported]
        for name in self.sweep.samplers:
            if imported and (self.samplers[name].guidance is not None or self.samplers[name].variance == "learned"):
                raise ValueError(
                    f"samplers.{name}: guidance and a learned variance are not for {imported[0]}: an imported network has"
                    " neither classes nor a variance; take one of them out of the sweep"
                )
            if self.samplers[name].guidance is not None and not self.diffusion.conditional:
                raise ValueError(
                    f"samplers.{name}: guidance takes a class-conditional model: diffusion.conditional: true"
                )
        return self

    @model_validator(mode="after")
    def _steps_fit_the_process(self) -> Params:
        for steps in self.sweep.steps:
            if steps > self.diffusion.timesteps:
                raise ValueError(f"sweep.steps: {steps} is more than diffusion.timesteps = {self.diffusion.timesteps}")
        if (self.likelihood.times or 0) > self.diffusion.timesteps:
            raise ValueError(
                f"likelihood.times: {self.likelihood.times} is more than diffusion.timesteps = {self.diffusion.timesteps}"
            )
        return self

    @model_validator(mode="after")
    def _shares_are_equal(self) -> Params:
        part, processes = self.training.batch // self.training.accumulate, self.compute.processes
        if part % processes:
            raise ValueError(f"compute.processes: {part} images at once do not divide among {processes} processes")
        return self

    @model_validator(mode="after")
    def _variance_is_trained(self) -> Params:
        learned, loss = self.diffusion.variance == "learned", self.training.loss
        if learned and loss in ("simple", "min_snr"):
            raise ValueError(
                f"training.loss: {loss} would leave the variance of diffusion.variance = learned untrained; take hybrid or vlb"
            )
        if loss == "hybrid" and not learned:
            raise ValueError(
                "training.loss: hybrid trains a variance; set diffusion.variance = learned, or take another loss"
            )
        for name in self.sweep.samplers:
            if self.samplers[name].variance == "learned" and not learned:
                raise ValueError(f"samplers.{name}.variance: learned needs diffusion.variance = learned")
        return self

    @classmethod
    def load(cls, path: Path = Path("params.yaml")) -> Params:
        """Reads and checks a parameter file. Raises InputError with every fault in one line."""
        raw = yaml_file.read_yaml(path)
        if not isinstance(raw, dict):
            found = "nothing" if raw is None else f"a {type(raw).__name__}"
            raise InputError(
                f"{path}: expected sections such as data and training, found {found}; recipes/ has examples"
            )
        return cls.check(raw, str(path))

    @classmethod
    def check(cls, raw: dict[str, Any], where: str) -> Params:
        """A plain dict -> Params. Raises InputError with every fault in one line, headed by `where`."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise InputError(f"{where}: {one_line(error)}") from None

    @property
    def dataset_name(self) -> str:
        """The name that users know the dataset by: tracking.name, or else the source, with dashes for underscores."""
        return self.tracking.name or self.data.source.replace("_", "-")

    def points(self) -> list[Point]:
        """Every point of the sweep, in DVC's order."""
        sweep = self.sweep
        return [
            Point(schedule=schedule, sampler=sampler, steps=steps)
            for schedule in sweep.schedules
            for sampler in sweep.samplers
            for steps in sweep.steps
        ]


def one_line(error: ValidationError) -> str:
    """The first few faults, each with its place and the value found there."""
    found, faults = error.errors(include_url=False), []
    for fault in found[:FAULTS]:
        place = ".".join(str(part) for part in fault["loc"] if part not in (UNET, OTHER))
        message = fault["msg"].removeprefix("Value error, ")
        given = fault["input"]
        if isinstance(given, (str, int, bool)) or (isinstance(given, float) and not math.isnan(given)):
            shown = repr(given)
            message += f" (given: {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'})"
        faults.append(f"{place}: {message}" if place else message)
    more = f"; and {len(found) - FAULTS:,} more" if len(found) > FAULTS else ""
    return "; ".join(faults) + more
