"""ddpm <verb>: joins a stage to its display, its record and its tracking. Heavy packages wait for the verb that uses them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ddpm.stages import store, watchdog
from ddpm.stages.display import display, say
from ddpm.stages.errors import InputError
from ddpm.stages.params import Params, Point
from ddpm.stages.progress import Progress, Report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A pipeline for Denoising Diffusion Probabilistic Models. The stages below are what `dvc repro` runs, one by one.",
)

Debug = False  # set by --debug: errors come with their traceback


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    global Debug  # noqa: PLW0603
    Debug = debug


def _run(
    stage: str,
    output: Path,
    work: Callable[[Params, Report], Any],
    watch: Callable[[Params, ExitStack], Report] | None = None,
    publishes: bool = True,
) -> None:
    """Runs one stage: shows and records it, then publishes what it wrote.

    publishes: not where the next stage publishes its output too, since MLflow alone takes three seconds to import.
    """
    params = Params.load()
    started, before, last = time.time(), 0, Progress(0, 0, "")
    with ExitStack() as stack:
        show = stack.enter_context(display(stage))
        watcher = watch(params, stack) if watch else None

        def report(progress: Progress) -> None:
            nonlocal last, before
            if progress.message and last.done == 0:
                before = progress.done  # done by an earlier run that this one goes on from
            last = progress
            show(progress)
            if watcher:
                watcher(progress)

        work(params, report)
    from ddpm.stages.record import record

    about = record(output, stage, started, time.time(), last.done - before, last.unit)
    say(f"{stage}: {last.done:,} {last.unit} in {about['seconds']:.1f} s" if last.unit else f"{stage}: done")
    if publishes:
        from ddpm.stages import tracking

        tracking.publish_or_warn(params, Path(), only=stage, say=say)


@app.command()
def prepare() -> None:
    """Read the data source into dataset/: uint8 arrays, labels, statistics, a preview."""
    from ddpm.stages.prepare import prepare

    _run("prepare", store.dataset_dir(), lambda params, report: prepare(params, Path(), report), publishes=False)


@app.command()
def train(
    schedule: Annotated[str, typer.Argument(help="A noise schedule, such as linear or cosine.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again, from no saved state.")] = False,
) -> None:
    """Train the network on one noise schedule into models/SCHEDULE; goes on by itself where it was stopped."""
    from ddpm.stages.train import train

    def watch(params: Params, stack: ExitStack) -> Report:
        from ddpm.stages import tracking
        from ddpm.stages.preview import previews
        from ddpm.stages.progress import silent

        if schedule in params.schedules and params.schedules[schedule].imported:
            return silent  # nothing is trained

        watcher = stack.enter_context(tracking.watch_training(params, schedule, Path(), say=say))
        preview = previews(params, Path(), schedule, watcher.log_preview)

        def report(progress: Progress) -> None:
            watcher(progress)
            preview(progress)

        return report

    _run(
        f"train@{schedule}",
        store.model_dir(schedule),
        lambda params, report: train(params, schedule, Path(), report, fresh=fresh),
        watch,
    )


PointName = Annotated[str, typer.Argument(help="SCHEDULE-SAMPLER-STEPS, such as linear-ddim-50.")]


@app.command()
def sample(point: PointName) -> None:
    """Draw images at one point of the sweep into samples/POINT.npz and .png."""
    from ddpm.stages.sample import sample_point

    parsed = Point.parse(point)
    _run(
        f"sample@{parsed.name}",
        store.samples_file(parsed),
        lambda params, report: sample_point(params, parsed, Path(), report),
        publishes=False,
    )


@app.command()
def evaluate(point: PointName) -> None:
    """Score the samples of one point against the dataset into metrics/POINT.json."""
    from ddpm.stages.evaluate import evaluate

    parsed = Point.parse(point)
    _run(
        f"evaluate@{parsed.name}",
        store.metrics_file(parsed),
        lambda params, report: evaluate(params, parsed, Path(), report),
    )


@app.command()
def report() -> None:
    """Gather the scores of the sweep into report/: the table, the best point, the pictures."""
    from ddpm.stages.report import report

    _run("report", store.report_dir(), lambda params, watch: report(params, Path(), watch))


@app.command()
def publish() -> None:
    """Bring MLflow up to date with the outputs that are here: fills in what is missing, repeats nothing."""
    from ddpm.stages import tracking

    tracking.publish(Params.load(), Path(), say=say)


@app.command()
def promote(
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the best point even if the champion is better or not comparable.")
    ] = False,
) -> None:
    """Register the best point of the report as ddpm-DATASET; it becomes champion if it beats the one there is."""
    from ddpm.stages import tracking

    params = Params.load()

    def score(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
        from ddpm.stages.rescore import rescore

        with display("champion") as watch:
            return rescore(params, checkpoint, settings, Path(), watch)

    say(tracking.promote(params, Path(), replace=replace, rescore=score, say=say).reason)


@app.command()
def generate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write (PNG).")] = Path("grid.png"),
    count: Annotated[int, typer.Option("-n", min=1, help="How many images.")] = 64,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as models/linear."
        ),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images.")] = 0,
    sampler: Annotated[
        str, typer.Option(help="A row of samplers in params.yaml; default: the one that the model was promoted with.")
    ] = "",
    steps: Annotated[int, typer.Option(min=0, help="Network times visited; default: the model's own.")] = 0,
) -> None:
    """Make images from a model of the registry (the champion, unless another is named) or from a checkpoint folder."""
    from ddpm.stages.generate import generate

    with display("generate") as watch:
        path = generate(
            Params.load(), out=out, count=count, model=model, seed=seed, sampler=sampler, steps=steps, report=watch
        )
    say(f"{path}: {count} images")


@app.command("swiss-roll")
def swiss_roll(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write (PNG).")] = Path("swiss-roll.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 2, help="Same seed, same picture.")] = 0,
) -> None:
    """Learn a Swiss roll, points of the plane, from nothing but the library: forward, reverse and drift in one picture."""
    from ddpm.stages.swiss_roll import swiss_roll

    with display("swiss-roll") as watch:
        swiss_roll(out, seed, watch)
    say(f"{out}: forward, reverse and drift")


@app.command("export-diffusers")
def export_diffusers(
    model: Annotated[str, typer.Argument(help="A checkpoint folder such as models/linear, or models:/NAME@ALIAS.")],
    out: Annotated[Path, typer.Argument(help="The new folder, for DDPMPipeline.from_pretrained.")],
) -> None:
    """Write a model as a diffusers DDPMPipeline folder."""
    from ddpm.stages.exchange import export_diffusers

    with TemporaryDirectory(prefix="ddpm-export-") as temporary:
        folder, settings = Path(model), dict[str, Any]()
        if model.startswith("models:"):
            from ddpm.stages import tracking

            folder, settings = tracking.fetch_model(model, Path(temporary))
        export_diffusers(folder, out, settings.get("variance", "fixed_large"))
    say(f"{out}: a DDPMPipeline")


@app.command("import-diffusers")
def import_diffusers(
    folder: Annotated[Path, typer.Argument(help="The folder of a UNet2DModel or a DDPMPipeline.")],
    name: Annotated[str, typer.Argument(help="What to call it here, in a-z, 0-9 and _.")],
) -> None:
    """Read a diffusers model into imported/NAME and a row of schedules in params.yaml, to be swept like our own."""
    from ddpm.stages.exchange import import_diffusers

    for line in import_diffusers(folder, name):
        say(line)


def main() -> None:
    """The console script: wrong input is one line on standard error and exit code 2."""
    watchdog.start()
    try:
        app()
    except InputError as error:
        if Debug:
            raise
        print(f"ddpm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ddpm: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if Debug:
            raise
        print(
            f"ddpm: {type(error).__name__}: {' '.join(str(error).split())} (ddpm --debug shows where)", file=sys.stderr
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
