"""The command line `ddpm`. Each command runs a stage or a tool.

The command of a stage shows the progress, writes the run record, and publishes the output to MLflow unless a later command does.
Heavy packages are imported by the command that uses them.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from ddpm.errors import InputError
from ddpm.files import atomic, paths
from ddpm.files.params import Params
from ddpm.parameters import Point
from ddpm.provenance import checkout, lock_mending
from ddpm.provenance.inputs import unchanged
from ddpm.runtime import stopping, watchdog
from ddpm.runtime.display import SAID_LATER, display, say
from ddpm.runtime.progress import Progress, Report


class Verbs(typer.core.TyperGroup):
    """The group of all commands. Its help shows options that take no value, such as --debug, without `<bool>`."""

    def get_params(self, ctx: Any) -> Any:
        return _without_type(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _without_type(command.get_params(ctx))
        return command


def _without_type(params: Any) -> Any:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


app = typer.Typer(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A pipeline for Denoising Diffusion Probabilistic Models. `dvc repro` runs the stages below one by one.",
)

FOLLOWED = "DDPM_FOLLOWED" in os.environ  # `ddpm publish --follow` runs beside this stage

Debug = False  # set by --debug: show tracebacks


def _version(requested: bool) -> None:
    if requested:
        from ddpm.provenance.run_record import versions

        say(versions())
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Show the versions, device and commit in use."
        ),
    ] = False,
) -> None:
    global Debug  # noqa: PLW0603
    Debug = debug
    # protects: tests/flows/test_checkout.py::test_no_entry_works_with_the_code_of_another_checkout[ddpm]
    checkout.require_own(Path())
    lock_mending.check(Path(), say)


def _run(
    stage: str,
    output: Path,
    execute: Callable[[Params, Report], Any],
    watch: Callable[[Params, ExitStack], Report] | None = None,
    publishes: bool = True,
) -> None:
    """Runs one stage with a progress display, writes its run record, and publishes its output to MLflow.

    Args:
        stage: the DVC stage, such as train@linear.
        output: the run record is written beside this file or folder.
        execute: does the work of the stage.
        watch: returns a function that also gets each progress report, for example to stream the training to MLflow.
        publishes: False if a later stage or `ddpm publish --follow` publishes this output. This saves three seconds, the
            import of MLflow.
    """
    started, resumed_from, last = time.time(), 0, Progress(0, 0, "")
    with unchanged(stage), ExitStack() as stack:
        params = Params.load()
        show = stack.enter_context(display(stage))
        watcher = watch(params, stack) if watch else None

        def report(progress: Progress) -> None:
            nonlocal last, resumed_from
            if progress.message and last.done == 0:
                resumed_from = progress.done  # earlier runs did this work
            last = progress
            show(progress)
            if watcher:
                watcher(progress)

        execute(params, report)
    from ddpm.provenance.run_record import record

    run = record(output, stage, started, time.time(), last.done - resumed_from, last.unit)
    say(f"{stage}: {last.done:,} {last.unit} in {run.seconds:.1f} s" if last.unit else f"{stage}: done")
    if publishes:
        from ddpm import tracking

        tracking.publish_or_warn(params, Path(), only=stage, say=say)


@app.command()
def prepare() -> None:
    """Read the data source and write dataset/: uint8 arrays, labels, statistics, a preview."""
    from ddpm.stages.prepare import prepare
    from ddpm.tools.foresight import check_contents

    def execute(params: Params, report: Report) -> None:
        prepare(params, Path(), report, partial(check_contents, params))

    _run("prepare", paths.dataset_dir(), execute, publishes=False)


@app.command()
def probe() -> None:
    """Choose what `precision: auto` and `compile: auto` mean on this machine. Write it to auto.json for the whole sweep."""
    from ddpm.stages.probe import probe

    _run("probe", paths.auto_file(), lambda params, report: probe(params, Path(), report), publishes=False)


def _item_from_dvc(verb: str, argument: str) -> Callable[[], str]:
    """Returns a function that reads a missing argument of `verb` from DVC_STAGE, such as train@linear.

    DVC sets DVC_STAGE for each item of a matrix in dvc.yaml. So the commands in dvc.yaml need not contain names from
    params.yaml. A shell would interpret special characters in such a name.
    """

    def item() -> str:
        stage, _, name = os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")  # DIRECTORY/dvc.yaml:STAGE
        if (stage != verb or not name) and "_DDPM_COMPLETE" not in os.environ:  # set during shell completion
            raise InputError(f"Missing argument '{argument}'; see ddpm {verb} --help")
        return name

    return item


@app.command()
def train(
    schedule: Annotated[
        str,
        typer.Argument(
            help="A row of schedules in params.yaml, such as linear or cosine.",
            default_factory=_item_from_dvc("train", "SCHEDULE"),
            show_default=False,
        ),
    ],
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the saved states and start again.")] = False,
) -> None:
    """Train the network on one noise schedule and write models/SCHEDULE. Resumes from the last saved state."""
    from ddpm.runtime import ranks

    params = Params.load()
    imported = schedule in params.schedules and params.schedules[schedule].imported  # copied, not trained
    if params.compute.processes > 1 and not ranks.started() and not imported:
        from ddpm.runtime.launch import launch

        launch(params.compute.processes, sys.argv[1:])
        return

    from ddpm.stages.train import train

    if ranks.number() > 0:  # process 0 shows, records and publishes
        if not imported:
            _train_as_worker(params, schedule)
        return

    def execute(params: Params, report: Report) -> None:
        if not imported:
            _check_points(params, schedule)
            _check_dataset(params, report)
        train(params, schedule, Path(), report, fresh=fresh)

    watch = None if imported else partial(_watch_training, schedule)
    _run(f"train@{schedule}", paths.model_dir(schedule), execute, watch)


def _train_as_worker(params: Params, schedule: str) -> None:
    """Trains in a process of rank 1 or higher in a distributed training. Only rank 0 reports the progress."""
    from ddpm.stages.train import train

    try:
        train(params, schedule)
    except InputError:
        time.sleep(5)  # gives process 0 time to report the same error; then the launcher ends this process
        raise


def _check_points(params: Params, schedule: str) -> None:
    """Raises InputError before the training if the network could not sample a point of the sweep (schedule, sampler and steps).

    Checks only the points of this schedule.
    """
    from ddpm.runtime.drawing import check_point
    from ddpm.stages.train import noise_schedule

    made, process = noise_schedule(params, schedule), params.diffusion
    for point in params.points():
        if point.schedule == schedule:
            check_point(params, point, made, process.variance == "learned", process.conditional)


def _check_dataset(params: Params, report: Report) -> None:
    """Raises InputError before the training if a later stage would fail on this dataset."""
    from ddpm.files.dataset import read_dataset_record
    from ddpm.tools.foresight import check_record

    for warning in check_record(params, read_dataset_record()):
        report(Progress(0, params.training.steps, "steps", message=warning))


def _watch_training(schedule: str, params: Params, stack: ExitStack) -> Report:
    """Returns a function that logs each progress report to MLflow, with preview samples and their FID."""
    from ddpm import tracking
    from ddpm.tools.preview import previews

    params = params.resolved()
    watcher = stack.enter_context(tracking.watch_training(params, schedule, Path(), say=say))
    preview = previews(params, Path(), schedule, watcher.log_preview, watcher.log_preview_fid)

    def report(progress: Progress) -> None:
        watcher(progress)
        preview(progress)

    return report


def _point(verb: str) -> Any:
    return typer.Argument(
        help="A point of the sweep: SCHEDULE-SAMPLER-STEPS, such as linear-ddim-50.",
        default_factory=_item_from_dvc(verb, "POINT"),
        show_default=False,
    )


@app.command()
def sample(point: Annotated[str, _point("sample")]) -> None:
    """Draw the images of one point of the sweep and write samples/POINT.npz and .png."""
    from ddpm.stages.sample import sample_point

    parsed = Point.parse(point)
    _run(
        f"sample@{parsed.name}",
        paths.samples_file(parsed),
        lambda params, report: sample_point(params, parsed, Path(), report),
        publishes=False,
    )


@app.command()
def evaluate(point: Annotated[str, _point("evaluate")]) -> None:
    """Score the samples of one point of the sweep against the dataset and write metrics/POINT.json."""
    from ddpm.stages.evaluate import evaluate

    parsed = Point.parse(point)
    _run(
        f"evaluate@{parsed.name}",
        paths.metrics_file(parsed),
        lambda params, report: evaluate(params, parsed, Path(), report),
        publishes=not FOLLOWED,
    )


@app.command()
def likelihood(
    schedule: Annotated[
        str,
        typer.Argument(
            help="A row of schedules in params.yaml that has a trained network.",
            default_factory=_item_from_dvc("likelihood", "SCHEDULE"),
            show_default=False,
        ),
    ],
) -> None:
    """Measure a network's bits per dimension and rate-distortion curve; write metrics/likelihood/SCHEDULE.json and .csv."""
    from ddpm.stages.likelihood import likelihood

    _run(
        f"likelihood@{schedule}",
        paths.likelihood_file(schedule),
        lambda params, report: likelihood(params, schedule, Path(), report),
        publishes=not FOLLOWED,
    )


@app.command()
def report() -> None:
    """Collect the scores of the sweep in report/: a page (index.html), a table, the best point, plots."""
    from ddpm.reporting.published import write_local
    from ddpm.stages.report import report

    _run("report", paths.report_dir(), lambda params, watch: report(params, Path(), watch), publishes=False)
    params = Params.load()
    write_local(params, Path(), say)
    if not FOLLOWED:
        from ddpm import tracking

        tracking.publish_or_warn(params, Path(), only="report", say=say)
    from ddpm.reporting.answer import answer

    if SAID_LATER not in os.environ:
        for line in answer():
            say(line)


@app.command()
def publish(
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Publish the output of each stage as it appears, until standard input ends."),
    ] = False,
) -> None:
    """Log the outputs of this checkout to MLflow, except those that MLflow already has."""
    from ddpm import tracking

    params = Params.load()
    if follow:
        ended = threading.Event()

        def wait_for_end_of_input() -> None:
            sys.stdin.read()
            ended.set()

        threading.Thread(target=wait_for_end_of_input, daemon=True).start()
        tracking.follow(params, Path(), ended, say=say)
    tracking.publish(params, Path(), say=say)
    tracking.mark_best_champion(params, Path(), say=say)


@app.command()
def promote(
    replace: Annotated[
        bool, typer.Option("--replace", help="Promote the best point even if the champion is better or not comparable.")
    ] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Restore the previous champion instead.")] = False,
) -> None:
    """Register the best point of the report as ddpm-DATASET and make it the champion, if it beats the present champion.

    The point wins if its score is significantly better than the champion's. A point that takes far fewer network evaluations
    also wins if its score is, with the same confidence, nearly as good as that of the best champion so far. Without a champion,
    the point wins.
    """
    from ddpm import tracking

    if replace and rollback:
        raise InputError("--replace and --rollback exclude each other: give one of them")
    params = Params.load()
    if rollback:
        say(tracking.rollback(params, Path()).reason)
        return

    def score(checkpoint: Path, settings: dict[str, Any]) -> Any:
        from ddpm.tools.rescore import rescore

        with display("champion") as watch:
            return rescore(params, checkpoint, settings, Path(), watch)

    decision = tracking.promote(params, Path(), replace=replace, rescore=score, say=say)
    tracking.publish_or_warn(params, Path(), only="report", say=say)  # the report's page shows the champion
    say(decision.line)


@app.command()
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the listed files. Without this option, gc only lists them.")
    ] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", min=1, metavar="DAYS", help="Keep files used in the last DAYS days.")
    ] = 7,
) -> None:
    """List old files in .cache that no run would resume from: training states, kept images, features, weights, previews."""
    from ddpm.tools import cleaning

    found = list(cleaning.leftovers(Params.load(), Path(), time.time() - older_than * 86400))
    for item in found:
        used = time.strftime("%Y-%m-%d", time.localtime(item.used))
        say(f"{item.kind}: {item.name}: last used on {used}, {item.size / 1e6:,.1f} MB")
        if delete:
            item.remove()
    if not found:
        say("gc: nothing to remove")
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(item.kind for item in found).items())
    total = f"{sum(item.size for item in found) / 1e6:,.1f} MB"
    say(
        f"gc: {'removed' if delete else 'would remove'} {kinds}, {total}"
        + ("" if delete else "; --delete removes them")
    )


@app.command()
def card(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path("MODEL_CARD.md"),
) -> None:
    """Write the model card of the report's best point: the model's purpose, training data and scores, and how to load it."""
    from ddpm import tracking

    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file with --out")
    atomic.write_text(out, tracking.model_card(Params.load(), Path()))
    say(f"{out}: the model card")


@app.command()
def run(
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values to set in params.yaml, such as training.steps=1600."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A name in recipes/, or the path of a recipe. The recipe replaces params.yaml first.")
    ] = "",
    promote: Annotated[
        bool,
        typer.Option("--promote/--no-promote", help="Make the best point the champion if it beats the present one."),
    ] = True,
    until_flat: Annotated[
        bool,
        typer.Option(
            "--until-flat",
            help="Raise training.steps by half and run again, until the best score no longer improves significantly.",
        ),
    ] = False,
) -> None:
    """Set values in params.yaml, run the stages that depend on them, publish, promote, and print the best point."""
    options = [*(["--recipe", recipe] if recipe else []), *(f"--set={value}" for value in values or ())]
    options += [*([] if promote else ["--no-promote"]), *(["--until-flat"] if until_flat else [])]
    flow = [sys.executable, "-B", "-m", "flows", *options]
    os.execv(sys.executable, flow)  # replaces this process, because ddpm must not import flows


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder of the project, which may be new.")] = Path(),
    recipe: Annotated[str, typer.Option(help="The recipe that becomes params.yaml.")] = "digits",
    renew: Annotated[
        bool,
        typer.Option("--update", help="Renew dvc.yaml and ddpm.json of a project after an upgrade of the package."),
    ] = False,
) -> None:
    """Make a project outside of a checkout: params.yaml, recipes, the stages for DVC, the deployment for Prefect."""
    from ddpm.tools import project

    for line in project.update(folder) if renew else project.init(folder, recipe):
        say(line)


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write (PNG).")] = Path("grid.png"),
    count: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=1,
            help="Number of images or rows; default: 64 in a grid, 8 rows of a chain, 9 between two images.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as models/linear; default: the champion, or"
            " the best point of the report if no champion exists.",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    sampler: Annotated[
        str,
        typer.Option(
            help="A row of samplers in params.yaml, or a sampler such as heun; default: the model's own, ddim for a folder."
        ),
    ] = "",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Number of sampling steps; default: the number of the model, or 50 for a folder."),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="The class to draw with a conditional model, by name or number; default: all classes."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance strength; 1 is the plain conditional network; default: the sampler's guidance."),
    ] = None,
    progressive: Annotated[
        bool,
        typer.Option(
            "--progressive", help="Show rows of x0_hat, the predicted clean image, from the first step to the last."
        ),
    ] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Show rows of x_t, from noise to image.")] = False,
    interpolate: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="A B",
            help="Interpolate between test images A and B: encode both to noise, decode codes in between.",
        ),
    ] = None,
    blend: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="A B", help="Interpolate between test images A and B: add noise to both, mix them, denoise."
        ),
    ] = None,
    encode_decode: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show N test images above their reconstructions from encoded noise."),
    ] = None,
) -> None:
    """Draw a picture with a registered model, by default the champion, or with a checkpoint folder.

    The picture is a grid of images unless --progressive, --strip, --interpolate, --blend or --encode-decode is given.
    """
    from ddpm.tools.generate import generate

    requested: dict[str, tuple[int, ...] | None] = {
        "progressive": () if progressive else None,
        "strip": () if strip else None,
        "interpolate": interpolate,
        "blend": blend,
        "encode-decode": None if encode_decode is None else (encode_decode,),
    }
    kinds = {kind: numbers for kind, numbers in requested.items() if numbers is not None} or {"grid": ()}
    if len(kinds) > 1:
        raise InputError(f"--{' and --'.join(kinds)} are different pictures; give one of these options at a time")
    ((kind, numbers),) = kinds.items()
    with display("generate") as watch:
        message = generate(
            Params.find(),
            out=out,
            kind=kind,
            of=numbers,
            count=count or 0,
            model=model,
            seed=seed,
            sampler=sampler,
            steps=steps or 0,
            label=label,
            guidance=guidance,
            report=watch,
        )
    say(message)


@app.command("fit-times")
def fit_times(
    model: Annotated[str, typer.Argument(help="A checkpoint folder such as models/linear, or models:/NAME@ALIAS.")],
    steps: Annotated[str, typer.Option(help="Numbers of sampling steps, at most 100, separated by commas.")] = "5,8,10",
    sampler: Annotated[
        str, typer.Option(help="A row of samplers in params.yaml, for its solver and guidance; default: UniPC.")
    ] = "",
    images: Annotated[int, typer.Option(min=1, help="Number of images that the times are fitted to.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same times.")] = 0,
) -> None:
    """Find timesteps with which a few sampling steps come closest to the images of 1,000 network evaluations.

    Prints the times as a row for the section `samplers` of params.yaml.
    """
    from ddpm.tools.fit_times import fit_row
    from ddpm.tools.load import located

    counts = steps.split(",")
    if not all(each.isdecimal() for each in counts):
        raise InputError(f"--steps {steps}: expected numbers separated by commas, such as 5,8,10")
    with located(model) as (folder, _), display("fit-times") as watch:
        row, errors = fit_row(Params.load(), folder, [int(each) for each in counts], sampler, images, seed, watch)
    for count, error in errors.items():
        say(f"{count} steps: an RMS distance of {error:.4f} to the images of 1,000 evaluations (values in -1 ... 1)")
    say(f"fitted: {row}")


@app.command()
def schedules(
    timesteps: Annotated[
        int | None,
        typer.Option(
            "--timesteps",
            min=2,
            max=100_000,
            help="Number of timesteps T; default: the T of the model or of params.yaml, or 1000.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Show the schedule of this model, a folder or models:/NAME@ALIAS; default: the schedules in params.yaml.",
        ),
    ] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = paths.schedules_dir(),  # noqa: B008
) -> None:
    """Compare noise schedules in a table and plots: the distance of x_T from pure noise, and the noise levels of the steps."""
    from ddpm.provenance.run_record import record
    from ddpm.runtime.display import table
    from ddpm.tools.schedules import BAND_NAMES, schedules

    params, started = Params.find(), time.time()
    rows, data = schedules(params, Path(), out, timesteps, model)
    table(
        ["schedule", "alpha_bar_T", "SNR_T", "L_T", *BAND_NAMES],
        [
            [name, *(f"{x:.3g}" for x in (row.alpha_bar, row.snr, row.prior)), *(f"{x:.0%}" for x in row.shares)]
            for name, row in rows.items()
        ],
    )
    say(
        f"L_T: distance of x_T from pure noise in bits/dim ({data}). Last columns: share of the steps by signal-to-noise ratio."
    )
    for name, row in rows.items():
        for warning in row.warnings:
            say(f"warning: {name}: {warning}")
    say(", ".join(str(path) for path in sorted(out.glob("*")) if path.suffix in (".csv", ".png")))
    if params is None or model:  # MLflow gets only the schedules of a sweep
        return
    record(out, "schedules", started, time.time(), len(rows), "schedules")
    from ddpm import tracking

    tracking.publish_or_warn(params, Path(), only=f"schedules@{out}", say=say)


@app.command("swiss-roll")
def swiss_roll(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write (PNG).")] = Path("swiss-roll.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 2, help="The same seed gives the same picture.")] = 0,
) -> None:
    """Train a small network on a two-dimensional Swiss roll and draw the forward process, the reverse process and its drift."""
    from ddpm.tools.swiss_roll import swiss_roll

    with display("swiss-roll") as watch:
        swiss_roll(out, seed, watch)
    say(f"{out}: forward, reverse and drift")


@app.command("export-diffusers")
def export_diffusers(
    model: Annotated[str, typer.Argument(help="A checkpoint folder such as models/linear, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, for DDPMPipeline.from_pretrained.")],
) -> None:
    """Write a model as a diffusers DDPMPipeline folder."""
    from ddpm.tools.exchange import export_diffusers
    from ddpm.tools.load import located

    with located(model) as (folder, settings):
        lines = export_diffusers(folder, out, settings.get("variance", "fixed_large"))
    for line in lines:
        say(line)


@app.command("import-diffusers")
def import_diffusers(
    folder: Annotated[Path, typer.Argument(help="The folder of a UNet2DModel or a DDPMPipeline.")],
    name: Annotated[str, typer.Argument(help="The name of the model here: a-z, 0-9 and _.")],
    null_class: Annotated[
        bool,
        typer.Option("--null-class", help="The last class embedding stands for no label; guidance needs this."),
    ] = False,
) -> None:
    """Copy a diffusers model to imported/NAME and add a schedules row to params.yaml, so that a sweep can use the model."""
    from ddpm.tools.exchange import import_diffusers

    for line in import_diffusers(folder, name, null_class=null_class):
        say(line)


UsageError: Any = typer.BadParameter.__base__  # click's UsageError; typer exports only its subclass BadParameter


def main() -> None:
    """Runs the command line. Prints an error in one line on standard error. Exits with 2 for wrong input and 143 for SIGTERM."""
    # protects: tests/stages/test_faults.py::test_sigterm_is_one_line_and_143_whatever_runs
    stopping.on_sigterm()
    watchdog.start()
    try:
        sys.exit(app(prog_name="ddpm", standalone_mode=False))
    except stopping.Stopped as stopped:
        print(f"ddpm: {stopped}", file=sys.stderr, flush=True)
        os._exit(128 + stopped.number)  # exits at once, since a thread may be waiting for a server
    except KeyboardInterrupt:
        print("ddpm: interrupted", file=sys.stderr)
        sys.exit(130)
    except UsageError as error:
        _say_usage(error)
        sys.exit(2)
    except Exception as error:
        if Debug:
            raise
        line, code = _line(error)
        print(f"ddpm: {line}", file=sys.stderr)
        sys.exit(code)


def _say_usage(error: Any) -> None:
    if len(sys.argv) > 1:  # without arguments, typer has shown the help
        where = error.ctx.command_path if error.ctx else "ddpm"
        print(f"ddpm: {error.format_message().rstrip('.')}; see {where} --help", file=sys.stderr)
    else:
        error.format_message()


def _line(error: Exception) -> tuple[str, int]:
    """Returns the line that describes an error, and the exit code: 2 if the user can correct the error, else 1."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, ModuleNotFoundError):
        return checkout.missing(error), 2
    # An error with a file name is that of a file, which ddpm.files.atomic describes.
    if isinstance(error, OSError) and error.errno in atomic.NO_ROOM and error.filename is None:
        full = os.strerror(error.errno)
        return f"no room for the output of this command ({full}); free some space and run this again", 2
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # the user gave this name
        return str(InputError(f"{error.filename}: this file name is too long; give a shorter name")), 2
    return f"{type(error).__name__}: {' '.join(str(error).split())} (ddpm --debug shows where)", 1
