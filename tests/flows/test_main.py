"""Checks `python -m flows`, the command that `make demo` runs."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from rich.console import Console

from ddpm.files.params import Params
from ddpm.tools import project
from flows.servers import embedded
from flows.terminal import Terminal
from flows.watch import Outcome

MAIN = (sys.executable, "-m", "flows")
HEAVY = {"torch", "torchvision", "torch_fidelity", "sklearn", "safetensors", "matplotlib", "mlflow"}


@pytest.fixture(scope="module")
def here(
    tmp_path_factory: pytest.TempPathFactory, template: Path, scratch_maker: Callable[[Path, Path], Any]
) -> Iterator[Any]:
    """Creates one repository for all these tests, because a new database costs Prefect ten seconds."""
    # The path contains characters that have a special meaning in a URL.
    made = scratch_maker(tmp_path_factory.mktemp("main") / "a%41b?c#d", template)
    yield made
    made.end()


def test_flows_imports_no_torch() -> None:
    modules = sorted(
        path.stem for path in (Path(__file__).parent.parent.parent / "flows").glob("*.py") if path.stem != "__main__"
    )
    code = f"import importlib, json, sys\nfor name in {modules}: importlib.import_module(f'flows.{{name}}')\n"
    code += "import flows.__main__\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "flows.train_eval" in loaded
    assert not HEAVY & loaded


def test_wrong_input_is_one_line_at_once(here: Any) -> None:
    done = here.run(*MAIN, "-S", "training.stops=1")
    assert done.returncode == 2
    assert done.stderr == "train-eval: override 'training.stops=1': params.yaml has no 'training.stops'\n"
    assert not (here.root / ".prefect" / "server.log").exists()  # no server was started


def test_the_help_has_a_short_name(here: Any) -> None:
    done = here.run(*MAIN, "-h")
    assert done.returncode == 0 and "--recipe" in done.stdout


@pytest.mark.proof
@pytest.mark.timeout(300)
def test_everything_runs_without_a_server_and_leaves_none(here: Any) -> None:
    """prefect.toml names an API where no server listens, and the environment names a proxy."""
    toml = here.root / "prefect.toml"
    toml.write_text(toml.read_text().replace(":4200/", f":{here.free_port()}/"))
    nobody = f"http://127.0.0.1:{here.free_port()}"
    done = here.run(*MAIN, "--recipe", "more", "-S", "training.steps=7", http_proxy=nobody, HTTP_PROXY=nobody)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("params.yaml: now recipes/more.yaml, with overrides") for line in lines)
    for stage in here.names:
        assert lines.count(f"{stage}: began") == 1
        assert lines.count(f"{stage}: 2 steps in 0.0 s") == 1
    assert lines.index("prepare: 2 steps in 0.0 s") < lines.index("train@linear: began")
    assert any(line.startswith("linear-ddim-10 ") and "1.5" in line for line in lines)
    assert lines.index("publish: done by a stand-in") < lines.index("promote: done by a stand-in")
    answer = lines.index("best: linear-ddim-10, FID 1.5 (1.4 to 1.6)")
    assert lines[answer + 1 : answer + 3] == ["report: report/index.html", "next:"] and len(lines) <= answer + 7
    assert "Traceback" not in done.stderr
    assert not here.running()
    assert (here.root / ".prefect" / "prefect.db").exists()
    assert [path.name for path in here.root.parent.iterdir()] == [here.root.name]
    assert "Running stage" not in here.repro()

    here.control(train_linear={"exit": 2})
    done = here.run(*MAIN, "-S", "training.steps=8")
    assert done.returncode == 1
    assert done.stderr.startswith("train-eval: train@linear: ddpm: train@linear can't")
    assert not here.running()


@pytest.mark.chaos
@pytest.mark.timeout(120)
def test_kill_9_ends_the_api_and_the_stages(here: Any) -> None:
    here.control(train_linear={"until": "never"}, train_cosine={"until": "never"})
    here.forget("train@linear")
    flow = here.start(*MAIN, "-S", "training.steps=9")
    here.pid("train@linear", 90)
    assert len(here.running()) >= 4  # the flow, its API, DVC, the stage
    sockets = [socket for process in here.processes() for socket in process.net_connections("inet")]
    assert {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    flow.kill()
    flow.wait()
    began = time.monotonic()
    here.wait(lambda: not here.running(), 30, "all that it started ends")
    print(f"kill -9 of the flow: nothing left after {time.monotonic() - began:.1f} s")


@pytest.mark.chaos
@pytest.mark.timeout(240)
def test_a_killed_api_is_started_again_and_the_flow_goes_on(here: Any) -> None:
    here.control(train_linear={"until": "go"})
    here.forget("train@linear")
    flow = here.start(*MAIN, "-S", "training.steps=10", log="flow.log")
    here.pid("train@linear", 90)
    (api,) = [process for process in here.processes() if "flows.servers.embedded" in process.cmdline()]
    api.kill()
    (here.root / "go").touch()
    assert flow.wait(120) == 0
    said = (here.root / "flow.log").read_text()
    assert "promote: done by a stand-in" in said
    assert "Traceback" not in said
    assert not here.running()


@contextmanager
def up(here: Any) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs the Prefect server of `make up` while the block runs. Yields the address of its API, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here.environment["PREFECT_PORT"] = str(port)
    server = here.start(sys.executable, "-m", "flows.servers.up", "prefect", log="up.log")
    api = f"http://127.0.0.1:{port}/api"
    try:
        here.wait(lambda: "ready" in (here.root / "up.log").read_text(), 120, "the server answers")
        here.environment["PREFECT_API_URL"] = api
        yield api, server
    finally:
        here.environment.pop("PREFECT_API_URL", None)
        del here.environment["PREFECT_PORT"]
        with suppress(ProcessLookupError):
            server.send_signal(signal.SIGINT)
        server.wait(60)


@pytest.mark.timeout(240)
def test_a_server_of_this_checkout_is_used(here: Any) -> None:
    """Beside `make up`, `python -m flows` uses the server of `make up`, and starts no second server."""
    with up(here) as (api, _):
        flow = here.start(*MAIN, "--no-promote", log="flow.log")
        seen: set[str] = set()
        while flow.poll() is None:
            seen |= {word for process in here.processes() for word in _words(process)}
            time.sleep(0.2)
        assert flow.returncode == 0, (here.root / "flow.log").read_text()
        assert "flows.servers.embedded" not in seen
        asked = Request(f"{api}/task_runs/filter", b"{}", {"Content-Type": "application/json"})
        with urlopen(asked) as answer:
            states = {run["name"]: run["state"]["type"] for run in json.load(answer)}
        assert {"publish", "report"} <= states.keys() and set(states.values()) == {"COMPLETED"}


@pytest.mark.chaos
@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.timeout(240)
def test_a_flow_that_loses_the_server_of_make_up_goes_on(here: Any, stopped: bool) -> None:
    """`make up` is stopped by Ctrl-C, or all its processes are killed, while a stage of another shell's flow runs."""
    here.control(train_linear={"until": "go"})
    here.forget("train@linear")
    (here.root / "go").unlink(missing_ok=True)
    with up(here) as (_, server):
        flow = here.start(*MAIN, "-S", f"training.steps={20 + stopped}", log="flow.log")
        here.pid("train@linear", 90)
        if stopped:
            server.send_signal(signal.SIGINT)
            server.wait(60)
        else:
            whole = psutil.Process(server.pid)
            for process in [*whole.children(recursive=True), whole]:
                process.kill()
        here.wait(
            lambda: any("flows.servers.embedded" in _words(each) for each in here.processes()), 60, "its own server"
        )
        (here.root / "go").touch()
        assert flow.wait(120) == 0, (here.root / "flow.log").read_text()
    said = (here.root / "flow.log").read_text()
    assert "promote: done by a stand-in" in said and "Traceback" not in said
    assert not here.running()


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_until_flat_trains_longer_while_the_best_score_is_surely_better(tmp_path: Path) -> None:
    project.init(tmp_path, "smoke")
    names = ("DDPM", "MLFLOW", "PREFECT", "GIT_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [*MAIN, "--no-promote", "--until-flat", "-S", "training.steps=20"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^([\d,]+) instead of ([\d,]+) steps: FID .*: ([a-z ]+)$", done.stdout, re.MULTILINE)
    steps, words = [20], [word for *_, word in found]
    for now, before, _ in found:
        assert (now, before) == (f"{round(1.5 * steps[-1]):,}", f"{steps[-1]:,}")
        steps.append(round(1.5 * steps[-1]))
    assert words == ["better"] * (len(words) - 1) + words[-1:] and len(words) > 1 and words[-1] != "better"
    assert Params.load(tmp_path / "params.yaml").training.steps == steps[-1]
    assert f"`ddpm run training.steps={steps[-2]}` goes back" in done.stdout
    assert (tmp_path / "report" / "front.json").exists()


def _words(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error, FileNotFoundError):
        return process.cmdline()
    return []


@pytest.mark.parametrize(
    ("answer", "used"),
    [({"home": "HERE"}, True), ({"home": "/elsewhere/.prefect"}, False), ({"home": ".prefect"}, False), ([], False)],
)
def test_the_server_of_another_checkout_is_left_alone(
    answer: Any, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(answer).replace("HERE", str(tmp_path))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/admin/settings" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments: Any) -> None: ...

    monkeypatch.chdir(tmp_path)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/api"
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
        assert embedded.running(tmp_path) is None  # neither prefect.toml nor a variable names the server
        (tmp_path / "prefect.toml").write_text(f'[api]\nurl = "{address}"\n')
        assert embedded.running(tmp_path) == (address if used else None)
        monkeypatch.setenv("PREFECT_API_URL", "http://192.0.2.1/api")  # servers on other machines are ignored
        assert embedded.running(tmp_path) == (address if used else None)
        server.shutdown()
    assert embedded.running(tmp_path) is None


def test_what_the_terminal_shows() -> None:
    screen = io.StringIO()
    with Terminal(Console(file=screen, width=200)) as terminal:
        for stage in ("train@linear", "train@cosine", "sample@linear-ddim-50"):
            terminal.started(stage)
        terminal.progress("train@linear", {"done": 5, "total": 10, "unit": "steps", "values": {"loss": 0.25}})
        (task,) = [task for task in terminal.bars.tasks if task.description == "train@linear"]
        assert (task.completed, task.total, task.fields["unit"], task.fields["values"]) == (5, 10, "steps", "loss 0.25")
        terminal.line("train@linear", "train@linear: 10 steps in 3.0 s")
        terminal.ended("train@linear", Outcome("Completed", "10 steps in 3.0 s"))
        terminal.ended("train@cosine", Outcome("Failed", "ddpm: no"))
        terminal.ended("sample@linear-ddim-50", Outcome("Restored", "restored from DVC's cache"))
        terminal.ended("prepare", Outcome("Unchanged", "unchanged"))
        assert not terminal.bars.tasks
        assert terminal.unchanged == 1
        assert len(terminal.tasks) == 4
    lines = [line for line in screen.getvalue().splitlines() if line.strip()]
    assert lines[:2] == ["train@linear: 10 steps in 3.0 s", "train@cosine: failed: ddpm: no"]
    assert lines[2].startswith("sample@linear-ddim-50: restored from DVC's cache in ")
    assert len(lines) == 3


@pytest.mark.parametrize("links", [True, False])
def test_a_new_database_takes_nobodys_place(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new database never replaces another one, even without hard links. No other file is left in the folder."""
    (tmp_path / "empty.db").write_bytes(b"empty")
    monkeypatch.setattr(embedded, "EMPTY", tmp_path / "empty.db")
    for name in embedded.DATABASE:
        monkeypatch.delenv(name, raising=False)

    def refused(*names: Path) -> None:
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    home = tmp_path / "home"
    embedded.create_database(home)
    assert [(path.name, path.read_bytes()) for path in home.iterdir()] == [("prefect.db", b"empty")]
    (home / "prefect.db").write_bytes(b"of before")
    embedded.create_database(home)
    assert [(path.name, path.read_bytes()) for path in home.iterdir()] == [("prefect.db", b"of before")]
