"""Reads and checks params.yaml. Unknown keys, wrong types and impossible values are errors that name the entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from ddpm.errors import InputError
from ddpm.files import paths, records, yaml_file
from ddpm.parameters import (
    ALONE,
    AUTO,
    AUTOMATIC,
    EACH,
    LATER,
    NAME,
    REST,
    SEED,
    USUAL_EXTRACTOR,
    USUAL_NETWORK,
    Auto,
    Compute,
    Data,
    Diffusion,
    Evaluation,
    Likelihood,
    Network,
    OtherNetwork,
    Point,
    Promotion,
    Report,
    Sampler,
    Sampling,
    Schedule,
    Sweep,
    Tracking,
    Training,
    as_json,
    is_name,
)
from ddpm.scores.extractors import EXTRACTORS, judges

FAULTS, SHOWN = 5, 60  # the most faults in a message; the most characters shown of a wrong value
Name = Annotated[str, Field(**NAME)]
S = TypeVar("S")
# A params.yaml without any of these sections belongs to another project.
OWN_SECTIONS = {"diffusion", "schedules", "samplers", "sweep"}


class Section(BaseModel):
    # protects: tests/files/test_bad_input.py::test_a_value[seed-0-seed: ]
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _sequences_are_tuples(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


@cache
def _model(kind: Any) -> type[Section]:
    """Returns the pydantic model that checks a dict against a class of ddpm.parameters."""
    hints, entries = get_type_hints(kind), dict[str, Any]()
    for item in fields(kind):
        limits, hint = {key: value for key, value in item.metadata.items() if key != LATER}, hints[item.name]
        if each := limits.pop(EACH, None):
            (items, _) = get_args(hint)
            hint = GenericAlias(tuple, (Annotated[items, Field(**each)], ...))
        if limits.pop(ALONE, False):
            hint = Any
        if item.default_factory is not MISSING:
            limits["default_factory"] = item.default_factory
        elif item.default is not MISSING:
            limits["default"] = item.default
        entries[item.name] = (hint, Field(**limits))
    return create_model(kind.__name__, __base__=Section, **entries)


def _build(kind: type[S], value: Any) -> S:
    return value if isinstance(value, kind) else kind(**dict(_model(cast(Any, kind)).model_validate(value)))


def section(kind: type[S], value: Any) -> S:
    """Checks a dict against a class of ddpm.parameters. Raises ValueError with the first FAULTS faults in one line."""
    try:
        return _build(kind, value)
    except ValidationError as error:
        raise ValueError(one_line(error)) from None


def _data(value: Any) -> Data:
    """Builds the section `data`. Replaces dashes in the source's name, as older files write it, by underscores."""
    if isinstance(value, dict) and isinstance(value.get("source"), str):
        value = {**value, "source": value["source"].replace("-", "_")}
    return _build(Data, value)


def _network(value: Any) -> Network | OtherNetwork:
    """Builds the section `network`: a Network for the U-Net, else an OtherNetwork."""
    if isinstance(value, Network | OtherNetwork):
        return value
    if not isinstance(value, dict) or (kind := value.get("kind", USUAL_NETWORK)) == USUAL_NETWORK:
        return _build(Network, value)
    return _build(OtherNetwork, {"kind": kind, REST: {key: item for key, item in value.items() if key != "kind"}})


def _evaluation(value: Any) -> Evaluation:
    """Builds the section `evaluation`. Fills in the extractor's default layer. Checks extractor, layer and judges."""
    name = value.get("extractor", USUAL_EXTRACTOR) if isinstance(value, dict) else None
    if isinstance(name, str) and is_name(name):
        if name in EXTRACTORS:
            value = {"layer": EXTRACTORS[name].default, **value}
        else:
            raise ValueError(f"extractor: expected one of {', '.join(EXTRACTORS)} (given: {name!r:.{SHOWN}})")
    made = _build(Evaluation, value)
    if made.layer not in (layers := EXTRACTORS[made.extractor].layers):
        raise ValueError(f"layer: expected one of {', '.join(map(str, layers))} (given: {made.layer})")
    if unknown := [name for name in made.judges if name not in judges()]:
        raise ValueError(f"judges: expected some of {', '.join(judges())} (given: {unknown[0]!r:.{SHOWN}})")
    return made


def _checked(kind: type) -> PlainValidator:
    build: Callable[[Any], Any] = partial(_build, kind)
    return PlainValidator(build)


class Params(Section):
    """The content of params.yaml."""

    seed: Annotated[int, Field(**SEED)] = 0
    data: Annotated[Data, PlainValidator(_data)]
    diffusion: Annotated[Diffusion, _checked(Diffusion)]
    network: Annotated[Network | OtherNetwork, PlainValidator(_network)]
    training: Annotated[Training, _checked(Training)]
    sampling: Annotated[Sampling, _checked(Sampling)]
    evaluation: Annotated[Evaluation, PlainValidator(_evaluation)]
    likelihood: Annotated[Likelihood, _checked(Likelihood)]
    schedules: dict[Name, Annotated[Schedule, _checked(Schedule)]]
    samplers: dict[Name, Annotated[Sampler, _checked(Sampler)]]
    sweep: Annotated[Sweep, _checked(Sweep)]
    report: Annotated[Report, _checked(Report)] = Report()
    promotion: Annotated[Promotion, _checked(Promotion)] = Promotion()
    tracking: Annotated[Tracking, _checked(Tracking)] = Tracking()
    compute: Annotated[Compute, _checked(Compute)] = Compute()

    def to_json(self, *sections: str) -> dict[str, Any]:
        """Returns the named sections as JSON values; all sections if no name is given."""
        return {name: as_json(getattr(self, name)) for name in sections or type(self).model_fields}

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
            silent = row.zero_terminal_snr or row.schedule == "rectified"
            if silent and self.diffusion.target == "eps" and row.imported is None:
                raise ValueError(
                    f"schedules.{name}: alpha_bar_T is 0, so eps says nothing about the image at T; set diffusion.target to v"
                )
        return self

    @model_validator(mode="after")
    def _samplers_fit_the_networks(self) -> Params:
        """Raises ValueError if a sampler does not fit the networks trained here. The stage `sample` checks imported networks."""
        if all(self.schedules[name].imported for name in self.sweep.schedules):
            return self
        for name in self.sweep.samplers:
            if self.samplers[name].guidance is not None and not self.diffusion.conditional:
                raise ValueError(
                    f"samplers.{name}: guidance needs a class-conditional model; set diffusion.conditional: true"
                )
            if self.samplers[name].ema is not None and not self.training.snapshot_every:
                raise ValueError(f"samplers.{name}: ema needs snapshots of the training; set training.snapshot_every")
            if self.samplers[name].variance == "learned" and self.diffusion.variance != "learned":
                raise ValueError(f"samplers.{name}.variance: learned needs diffusion.variance = learned")
        return self

    @model_validator(mode="after")
    def _steps_fit_the_process(self) -> Params:
        for name, steps in product(self.sweep.samplers, self.sweep.steps):
            times = self.samplers[name].times
            if times is not None and steps not in times:
                there = ", ".join(map(str, times))
                raise ValueError(
                    f"samplers.{name}.times: no entry for {steps} (sweep.steps); there are entries for {there}"
                )
        for steps in self.sweep.steps:
            if steps > self.diffusion.timesteps:
                raise ValueError(f"sweep.steps: {steps} is more than diffusion.timesteps = {self.diffusion.timesteps}")
        if (self.likelihood.times or 0) > self.diffusion.timesteps:
            raise ValueError(
                f"likelihood.times: {self.likelihood.times} is more than diffusion.timesteps = {self.diffusion.timesteps}"
            )
        return self

    @model_validator(mode="after")
    def _judges_have_scored(self) -> Params:
        if absent := set(self.promotion.judges) - set(self.evaluation.judges):
            raise ValueError(
                f"promotion.judges: {min(absent)} is not among evaluation.judges, so no point has this score; add it there"
            )
        return self

    @model_validator(mode="after")
    def _shares_are_equal(self) -> Params:
        part, processes = self.training.batch // self.training.accumulate, self.compute.processes
        if part % processes:
            raise ValueError(
                f"compute.processes: {part} images at once do not divide among {processes} processes; choose a number of"
                f" processes that divides {part}"
            )
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
        return self

    @classmethod
    def load(cls, path: Path = Path("params.yaml")) -> Params:
        """Reads and checks a parameter file. Raises InputError with the first FAULTS faults in one line."""
        raw = yaml_file.read_yaml(path)
        if not isinstance(raw, dict):
            found = "nothing" if raw is None else f"a {type(raw).__name__}"
            raise InputError(
                f"{path}: expected sections such as data and training, found {found}; recipes/ has examples"
            )
        return cls.check(raw, str(path))

    @classmethod
    def find(cls, path: Path = Path("params.yaml")) -> Params | None:
        """Reads and checks a parameter file. Returns None if the file is missing or belongs to another project.

        Every project that uses DVC may have a file of this name. Raises InputError.
        """
        if not path.exists():
            return None
        raw = yaml_file.read_yaml(path)
        return None if isinstance(raw, dict) and OWN_SECTIONS.isdisjoint(raw) else cls.load(path)

    @classmethod
    def check(cls, raw: dict[str, Any], where: str) -> Params:
        """Checks a plain dict. Raises InputError with the first FAULTS faults in one line that starts with `where`."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise InputError(f"{where}: {one_line(error)}") from None

    def resolved(self, root: Path = Path()) -> Params:
        """Returns the parameters with the values of auto.json in place of `auto`. All points of a sweep share these values.

        root: the top of the checkout. Raises InputError if a value is needed that the stage `probe` has not written.
        """
        sections = {name: getattr(self, name) for name in AUTOMATIC}
        if all(AUTO not in (section.precision, section.compile) for section in sections.values()):
            return self
        auto = records.read_typed(root / paths.auto_file(), Auto)
        return self.model_copy(update={name: auto.within(section) for name, section in sections.items()})

    @property
    def dataset_name(self) -> str:
        """The dataset's name for users: tracking.name if set, or else the source's name with dashes for underscores."""
        return self.tracking.name or self.data.source.replace("_", "-")

    def training_seed(self, schedule: str) -> int:
        """Returns the seed of a schedule's training: the row's `seed` if set, or else the `seed` of the file."""
        own = self.schedules[schedule].seed
        return self.seed if own is None else own

    def training_entry(self, schedule: str) -> dict[str, Any]:
        """Returns the entry `training` of model.json: the seed, the schedule's `base` if set, and the section `training`."""
        return {
            "seed": self.training_seed(schedule),
            **self.schedules[schedule].origin,
            **as_json(self.training),
        }

    def replicates(self) -> list[list[str]]:
        """Groups the schedules of the sweep whose rows differ only in `seed`. Leaves out repetitions with an equal seed."""
        groups: dict[Schedule, dict[int, str]] = {}
        for name in self.sweep.schedules:
            alike = replace(self.schedules[name], seed=None)
            groups.setdefault(alike, {}).setdefault(self.training_seed(name), name)
        return [list(group.values()) for group in groups.values()]

    def points(self) -> list[Point]:
        """Returns every point of the sweep, in DVC's order."""
        sweep = self.sweep
        return [
            Point(schedule=schedule, sampler=sampler, steps=steps)
            for schedule in sweep.schedules
            for sampler in sweep.samplers
            for steps in sweep.steps
        ]


def one_line(error: ValidationError) -> str:
    """Returns the first FAULTS faults in one line, each with the name of the entry and the wrong value."""
    found, faults = error.errors(include_url=False), []
    for fault in found[:FAULTS]:
        place, message = (
            ".".join(str(part) for part in fault["loc"] if part != REST),
            fault["msg"].removeprefix("Value error, "),
        )
        if place and fault["type"] == "value_error":  # here the message itself begins with the entry's name
            faults.append(f"{place}.{message}")
            continue
        given = fault["input"]
        if isinstance(given, (str, int, bool)) or (isinstance(given, float) and not math.isnan(given)):
            shown = repr(given)
            message += f" (given: {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'})"
        faults.append(f"{place}: {message}" if place else message)
    more = f"; and {len(found) - FAULTS:,} more" if len(found) > FAULTS else ""
    return "; ".join(faults) + more
