"""Runs the flow in this process, with a Prefect server for this run alone: `python -m flows`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from ddpm.errors import InputError
from ddpm.files import paths, scores
from ddpm.files.params import Params
from ddpm.provenance import checkout, project
from ddpm.scores.metrics import RANKING
from flows import parameters
from flows.processes import children
from flows.servers.embedded import Api

if TYPE_CHECKING:
    from flows.terminal import Terminal

GROWTH = 1.5  # with --until-flat, each run has this many times the training steps of the run before


def main(
    recipe: Annotated[str | None, typer.Option(help="A name in recipes/, or a path. It replaces params.yaml.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-S", metavar="KEY=VALUE", help="Changes a parameter, such as training.steps=200."),
    ] = None,
    promote: Annotated[bool, typer.Option(help="Make the best point the champion if it beats the present one.")] = True,
    until_flat: Annotated[
        bool,
        typer.Option(
            "--until-flat",
            help="Raise training.steps by half and run again, until the best score no longer improves significantly.",
        ),
    ] = False,
) -> None:
    """Train, sample, evaluate, report, publish and promote whatever is missing in this checkout."""
    began = time.monotonic()
    console = Console()
    try:
        checkout.require_own(Path(), "ddpm", "flows")
        children.import_ahead(Path())
        project.require_current(Path())
        parameters.read(Path(), recipe, overrides or ())  # reports wrong input before a server starts
        api = Api(Path())
        # Prefect reads its settings when it is imported. Its console log would repeat the lines of the display.
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
        from flows.terminal import Terminal
        from flows.train_eval import train_eval
        from flows.watch import watcher

        api.wait()
        before = 0  # the training steps of the run before
        while True:
            with Terminal(console) as terminal:
                watcher.set(terminal)
                state = train_eval(recipe=recipe, overrides=overrides, promote=promote, return_state=True)
            if not until_flat or not state.is_completed():
                break
            steps = Params.load(Path("params.yaml")).training.steps
            if before and not _better(before, steps, terminal):
                break
            before, recipe, overrides = steps, None, [f"training.steps={round(GROWTH * steps)}"]
        api.settle(str(state.state_details.flow_run_id), len(terminal.tasks))
    except InputError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted: finished work is kept; the same command continues from there", 130)
    if not state.is_completed():
        _fail(state.message or state.name or "failed", 2 if state.name == "InputError" else 1)
    if terminal.unchanged:
        terminal.say(f"{terminal.unchanged} stages unchanged")
    _summary(terminal, promoted=(state.message or "") if promote else "", seconds=time.monotonic() - began)


def _better(before: int, now: int, terminal: Terminal) -> bool:
    """Prints how the best score changed since the previous run. Returns whether the score is significantly better.

    before, now: the number of training steps in the previous run and in this run, for the printed text.
    """
    from ddpm.reporting.previous import gap_of_best

    gap = gap_of_best()
    better = gap is not None and gap.words == "better"
    if gap is not None:
        terminal.say(
            f"{now:,} instead of {before:,} steps: {RANKING.title} {gap.now.estimate.value:.3g} instead of"
            f" {gap.before.estimate.value:.3g}, difference {gap.difference:.3g} ({gap.low:.3g} to {gap.high:.3g}): {gap.words}"
        )
    if not better:
        terminal.say(f"a longer training is not tried; `ddpm run training.steps={before}` goes back")
    return better


def _fail(message: str, code: int) -> NoReturn:
    print(f"train-eval: {message}", file=sys.stderr)
    sys.exit(code)


def _summary(terminal: Terminal, promoted: str, seconds: float) -> None:
    report, say = paths.report_dir(), terminal.say
    say("")
    if (report / "front.json").exists():
        from ddpm.reporting.table import table

        try:
            say(table(scores.read_report(Path())[1]))
        except InputError as error:  # the run itself has succeeded
            say(str(error))
        say("")
    if promoted:
        say(promoted)
    say(f"took {seconds // 60:.0f} min {seconds % 60:.0f} s")
    say("")
    for line in terminal.answer:
        say(line)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(main)
    app()
