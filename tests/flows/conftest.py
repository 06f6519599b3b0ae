"""Provides a small repository with a real DVC and instant stages, and the servers that run in this repository."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from flows.processes import children

ROOT = Path(__file__).parent.parent.parent

STAGE = '''\
"""Usage: stage.py NAME OUT. control.json holds for each NAME: a file to wait for, an exit code, whether to die by SIGKILL,
and whether to save something on SIGTERM or to ignore SIGTERM."""
import json, os, pathlib, signal, sys, time
from contextlib import ExitStack
from ddpm.files import records
from ddpm.provenance import inputs
from ddpm.runtime import watchdog

watchdog.start()
name, out = sys.argv[1:]
stack = ExitStack()
stack.enter_context(inputs.unchanged(name))
control = json.loads(pathlib.Path("control.json").read_text()).get(name, {})
def save(*_):
    pathlib.Path(f"{name}.saved").touch()
    sys.exit(143)
if control.get("saves"):
    signal.signal(signal.SIGTERM, save)
if control.get("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(f"{name}.pid").write_text(str(os.getpid()))
report = {"stage": name, "done": 1, "total": 2, "unit": "steps", "values": {"loss": 0.5}}
print("@progress " + json.dumps(report), flush=True)
print(f"{name}: began", flush=True)
while "until" in control and not pathlib.Path(control["until"]).exists():
    time.sleep(0.1)
if control.get("die"):
    pathlib.Path("control.json").write_text("{}")  # once
    os.kill(os.getpid(), signal.SIGKILL)
if control.get("exit"):
    print(f"ddpm: {name} can't", file=sys.stderr)
    sys.exit(control["exit"])
try:
    stack.close()
except inputs.InputError as error:
    sys.exit(f"ddpm: {error}")
path = pathlib.Path(out)
path.parent.mkdir(exist_ok=True)
header = "point,schedule,sampler,steps,evaluations,fid,fid_low,fid_high,kid,kid_low,kid_high,confidence,images,reference_images"
row = "linear-ddim-10,linear,ddim,10,10,1.5,1.4,1.6,0.1,0.05,0.15,0.95,500,500"
header, row = f"{header},layer", f"{row},64"
path.write_text(f"{header}\\n{row}\\n" if name == "report" else name)
if name == "report":
    best = dict(zip(header.split(","), row.split(","), strict=True)) | {"points": 1, "lowest": "linear-ddim-10", "tied": 1}
    records.write_record(path.with_name("best.json"), best)
    records.write_record(path.with_name("front.json"), {}, [path, path.with_name("best.json")])
print(f"{name}: 2 steps in 0.0 s")
'''

DVC = """\
stages:
  prepare:
    cmd: python stage.py prepare prepared
    deps: [source]
    outs: [prepared]
  train:
    matrix:
      schedule: ${sweep.schedules}
    cmd: python stage.py train@${item.schedule} trained-${item.schedule}
    deps: [prepared, stage.py]
    params: [training.steps]
    outs: ["trained-${item.schedule}"]
  sample:
    matrix:
      schedule: ${sweep.schedules}
    cmd: python stage.py sample@${item.schedule} sampled-${item.schedule}
    deps: ["trained-${item.schedule}"]
    params: [sampling]
    outs: ["sampled-${item.schedule}"]
  report:
    cmd: python stage.py report report/points.csv
    deps: [sampled-linear, sampled-cosine]
    outs: [report/points.csv, report/best.json, report/front.json]
"""
# Replaces `python -B -m ddpm VERB`. Each call removes a line of the file `away`, and fails if there was a line to remove.
STAND_IN = f"""\
#!/bin/sh
[ "$1 $2 $3" = "-B -m ddpm" ] || exec '{sys.executable}' "$@"
shift 3
if [ -s away ]; then
    sed -i 1d away
    echo "ddpm: MLflow at somewhere cannot be reached; publish later with \\`ddpm publish\\`" >&2
    exit 2
fi
echo "$1: done by a stand-in"
"""
NAMES = ("prepare", "train@linear", "train@cosine", "sample@linear", "sample@cosine", "report")


def wait(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Scratch:
    """A repository, and the processes that run in it.

    Args:
        root: the repository.
        environment: the environment of all its processes.
        mark: the value of SCRATCH in that environment, by which `processes` finds these processes.
    """

    root: Path
    environment: dict[str, str]
    mark: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    names = NAMES
    wait = staticmethod(wait)
    free_port = staticmethod(free_port)

    def control(self, **stages: dict[str, Any]) -> None:
        """Writes control.json. Each keyword is the name of a stage, with `_` in place of `@`."""
        (self.root / "control.json").write_text(
            json.dumps({name.replace("_", "@"): how for name, how in stages.items()})
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
            check=False,
        )

    def start(self, *command: str, log: str = "log", **environment: str) -> subprocess.Popen[str]:
        with (self.root / log).open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env={**self.environment, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def repro(self) -> str:
        done = self.run(sys.executable, "-m", "dvc", "repro")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """Returns all living processes that were started here."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SCRATCH") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def running(self) -> list[str]:
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # the process has ended in the meantime
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        return found

    def pid(self, stage: str, seconds: float = 60) -> int:
        """Waits until a stage runs. Returns the id of its process."""
        path = self.root / f"{stage}.pid"
        return int(wait(lambda: path.exists() and path.read_text(), seconds, f"{stage} runs"))

    def forget(self, *stages: str) -> None:
        """Deletes the recorded process ids of these stages, so that pid() waits for their next run."""
        for stage in stages:
            (self.root / f"{stage}.pid").unlink(missing_ok=True)

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        for process in self.started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
        for left in self.processes():
            left.kill()
        wait(lambda: not self.processes(), 30, "nothing is left running")


def make_scratch(root: Path, template: Path) -> Scratch:
    shutil.copytree(template, root, dirs_exist_ok=True)
    path = os.pathsep.join((str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "DDPM_"))
    }
    mark = str(root)
    telemetry_off = {"DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return Scratch(root, {**environment, **telemetry_off, "PATH": path, "SCRATCH": mark}, mark)


@pytest.fixture(autouse=True)
def running() -> Iterator[None]:
    """Allows child processes, as a running flow does.

    The end of a flow in an earlier test has forbidden new child processes.
    """
    children.start()
    yield
    children.stop()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    for command in (["git", "init", "--quiet"], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=root, check=True)
    for name in ("params.yaml", "prefect.toml", "prefect.yaml", "Procfile"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "recipes").mkdir()
    (root / "recipes" / "more.yaml").write_text((ROOT / "params.yaml").read_text().replace("seed: 0", "seed: 7"))
    (root / "dvc.yaml").write_text(DVC)
    (root / "stage.py").write_text(STAGE)
    (root / "source").write_text("1")
    (root / "control.json").write_text("{}")
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(STAND_IN)
    (root / "bin" / "python").chmod(0o755)
    return root


@pytest.fixture(scope="session")
def scratch_maker() -> Callable[[Path, Path], Scratch]:
    return make_scratch


@pytest.fixture
def scratch(tmp_path: Path, template: Path) -> Iterator[Scratch]:
    made = make_scratch(tmp_path / "a checkout", template)
    yield made
    made.end()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Returns disk(n), which resizes a small file system to n MiB and returns its mount point."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")

    def resize(size: int) -> Path:
        mount("remount", f"size={size}m")
        return path

    mount("size=1m")
    yield resize
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def clone_maker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Scratch]:
    """Returns a function that clones this repository, with its uncommitted changes."""
    source = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *command], cwd=source, check=True)

    def make(root: Path) -> Scratch:
        made = make_scratch(root, source)
        made.environment["PYTHONPATH"] = os.fspath(root)  # runs the code of the clone instead of the installed code
        return made

    return make


FLOW = (
    sys.executable,
    "-c",
    "import json, sys; from flows.train_eval import train_eval\n"
    "state = train_eval(**json.loads(sys.argv[1]), return_state=True); print(f'{state.name}: {state.message}')",
)


class Up(SimpleNamespace):
    """The servers and the worker of `make up`, in a scratch repository.

    Args:
        api: the address of Prefect's API.
        injected: texts of errors that a test causes on purpose. Any other error in the log fails the test.
    """

    FLOW = FLOW

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.api}{path}", timeout=30) as answer:
            return json.load(answer)

    def open_runs(self) -> list[str]:
        """Returns the names of the flow runs and task runs that have not ended."""
        state = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING", "PAUSED"]}}
        flows = self.post("/flow_runs/filter", flow_runs={"state": state})
        return [run["name"] for run in flows + self.post("/task_runs/filter", task_runs={"state": state})]

    def start(self, **parameters: Any) -> str:
        """Starts a flow run as `prefect deployment run` does, and returns its id. Retries when Prefect on SQLite answers 503."""

        def start() -> str:
            try:
                deployment = self.post("/deployments/filter")[0]["id"]
                return str(self.post(f"/deployments/{deployment}/create_flow_run", parameters=parameters)["id"])
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                return ""

        return str(wait(start, 60, "the run is taken"))

    def flow_run(self) -> dict[str, Any]:
        """Returns the newest flow run."""
        return dict(self.post("/flow_runs/filter", sort="EXPECTED_START_TIME_DESC", limit=1)[0])

    def tasks(self, flow_run: str) -> dict[str, dict[str, Any]]:
        """Returns the task runs of a flow run, by name."""
        return {run["name"]: run for run in self.post("/task_runs/filter", flow_runs={"id": {"any_": [flow_run]}})}

    def states(self, flow_run: str) -> dict[str, str]:
        return {name: run["state"]["name"] for name, run in self.tasks(flow_run).items()}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, template: Path, check_log: Callable[..., list[str]]) -> Iterator[Up]:
    scratch = make_scratch(tmp_path_factory.mktemp("up"), template)
    try:
        yield (made := start_up(scratch))
        assert not check_log(made.log, *made.injected)
    finally:
        scratch.end()


def start_up(scratch: Scratch) -> Up:
    ports = {"PREFECT_PORT": str(scratch.free_port()), "MLFLOW_PORT": str(scratch.free_port())}
    toml = scratch.root / "prefect.toml"  # `prefect` reads this file if no environment variable is set
    toml.write_text(re.sub(r":\d+/api", f":{ports['PREFECT_PORT']}/api", toml.read_text()))
    name = f"up-{ports['PREFECT_PORT']}.log"  # each start gets a new log
    process = scratch.start(sys.executable, "-m", "flows.servers.up", log=name, **ports)
    log = scratch.root / name
    wait(lambda: "\nready; " in log.read_text() or process.poll() is not None, 300, "`make up` is ready")
    assert process.poll() is None, log.read_text()
    api = f"http://127.0.0.1:{ports['PREFECT_PORT']}/api"
    return Up(scratch=scratch, process=process, log=log, ports=ports, api=api, injected=[])


@pytest.fixture
def up_starter(check_log: Callable[..., list[str]]) -> Iterator[Callable[[Scratch], Up]]:
    """Returns a function that starts `make up` in any repository."""
    made: list[Up] = []

    def start(scratch: Scratch) -> Up:
        made.append(start_up(scratch))
        return made[-1]

    yield start
    for up in made:
        assert not check_log(up.log, *up.injected)
