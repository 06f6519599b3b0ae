from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from ddpm.runtime import ending, watchdog
from flows.processes import children
from flows.repro import commands


def test_lines_come_as_they_are_printed(tmp_path: Path) -> None:
    code = "import sys, time; print('one'); print('two', file=sys.stderr); time.sleep(1); print('three'); sys.exit(3)"
    lines: list[tuple[str, float]] = []
    assert (
        children.run((sys.executable, "-c", code), tmp_path, lambda line: lines.append((line, time.monotonic()))) == 3
    )
    assert [line for line, _ in lines] == ["one", "two", "three"]
    assert lines[2][1] - lines[0][1] > 0.5


def test_stop_ends_the_deaf_grandchildren_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "STAGE", 1.0)
    deaf = (
        "import os, signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    started, pids, ends = threading.Event(), [], []

    def line(text: str) -> None:
        pids.append(int(text))
        started.set()

    def work() -> None:
        try:
            children.run((sys.executable, "-c", parent), tmp_path, line)
        except children.FlowStopped:
            ends.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(20)
    children.stop()
    thread.join(10)
    assert ends == ["stopped"]
    end = (
        time.monotonic() + 10
    )  # a killed process needs a moment to end; a process that survived would sleep for a minute
    while _alive(pids[0]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _alive(pids[0])
    with pytest.raises(children.FlowStopped):
        children.run((sys.executable, "-c", "pass"), tmp_path, print)


def test_stop_lets_a_child_save(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(143)))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    with pytest.raises(children.FlowStopped):
        children.run(
            (sys.executable, "-c", code), tmp_path, lambda line: threading.Thread(target=children.stop).start()
        )
    assert (tmp_path / "saved").exists()


def test_a_child_whose_lines_nobody_can_read_is_ended(tmp_path: Path) -> None:
    pids: list[int] = []

    def line(text: str) -> None:
        pids.append(int(text))
        raise ZeroDivisionError

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(ZeroDivisionError):
        children.run((sys.executable, "-c", code), tmp_path, line)
    left = _alive(pids[0])
    if left:
        psutil.Process(pids[0]).kill()
    assert not left


def test_a_line_in_a_report_of_the_progress_costs_the_report_alone(tmp_path: Path) -> None:
    code = """print('@progress {"stage": "x", "done": 1}warning: MLflow'); print('@progress {"done": 2}'); print('@progress 3')"""
    said: list[object] = []

    class Watcher:
        def started(self, stage: str) -> None: ...

        def line(self, stage: str, text: str) -> None:
            said.append(text)

        def progress(self, stage: str, report: dict[str, object]) -> None:
            said.append(report)

    outcome = commands.run("x", (sys.executable, "-c", code), tmp_path, Watcher())  # type: ignore[arg-type]
    assert outcome.kind == "Completed"
    assert said == ['@progress {"stage": "x", "done": 1}warning: MLflow', {"done": 2}, "@progress 3"]


# A flow run that watches its parent, and the worker process that starts this flow run.
FLOW_RUN = """\
import os, time
from flows.processes.children import end_with_the_worker
end_with_the_worker()
print(os.getpid(), flush=True)
time.sleep(60)
"""
WORKER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_flow_run_ends_with_its_worker(tmp_path: Path) -> None:
    """No supervisor such as `make up` is there to kill the flow run, so it must end by itself."""
    home = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT__FLOW_RUN_ID": "x"}
    home.pop(watchdog.VARIABLE, None)
    command = [sys.executable, "-c", WORKER, FLOW_RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=home) as worker:
        assert worker.stdout is not None
        run = int(worker.stdout.readline())
        assert _alive(run)
        worker.kill()
    end = time.monotonic() + 10
    while _alive(run) and time.monotonic() < end:
        time.sleep(0.05)
    left = _alive(run)
    if left:
        psutil.Process(run).kill()
    assert not left


# A job that ends at once, and leaves a process in a session of its own.
JOB = """\
import subprocess, sys
away = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)  # else the reader of our output waits for `left`
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True, **away)
open("left", "w").write(str(left.pid))
"""


def test_make_up_leaves_nothing_of_what_it_started(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "Procfile").write_text(f"job: exec {sys.executable} job.py\n")
    code = "from ddpm.runtime import ending; from flows.servers import up; ending.FLOW_RUNS = 1.0; up.main([])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (tmp_path / "left").exists(), done.stderr
    left = int((tmp_path / "left").read_text())
    if survived := _alive(left):
        psutil.Process(left).kill()
    assert not survived


@pytest.mark.parametrize("end", ["SIGHUP", "SIGTERM", "nobody reads"])
def test_make_up_leaves_nothing_however_it_ends(end: str, tmp_path: Path) -> None:
    """The terminal is closed, the process gets SIGTERM, or the reader of a pipe such as `head` exits."""
    (tmp_path / "Procfile").write_text(
        f"job: exec {sys.executable} -c 'import time; time.sleep(1); print(1); time.sleep(60)'\n"
    )
    (tmp_path / "folder").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "folder")}
    # Under nohup, SIGHUP is ignored, by pytest's children too.
    command = ["env", "--default-signal=HUP", sys.executable, "-m", "flows.servers.up"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "started (pid=" in line)
        job = int(line.rpartition("=")[2].rstrip(")\n"))
        if end == "nobody reads":
            process.stdout.close()
        else:
            process.send_signal(getattr(signal, end))
        pids, end_by = (process.pid, job), time.monotonic() + 10
        while any(map(_alive, pids)) and time.monotonic() < end_by:
            time.sleep(0.05)
        left = [pid for pid in pids if _alive(pid)]
        for pid in left:
            psutil.Process(pid).kill()
    assert not left
    assert not list((tmp_path / "folder").glob("ddpm-up-*"))


def test_what_a_killed_make_up_left_is_named(tmp_path: Path) -> None:
    """`kill -9` leaves the servers running. The next `make up` names the processes that hold its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    serve = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print('serves'); time.sleep(60)"
    (tmp_path / "Procfile").write_text(f'mlflow: exec {sys.executable} -c "{serve}"\n')
    environment = {**os.environ, "MLFLOW_PORT": port}
    command = [sys.executable, "-m", "flows.servers.up", "mlflow"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "started (pid=" in line)
        job = int(line.rpartition("=")[2].rstrip(")\n"))
        assert any("serves" in line for line in process.stdout)
        process.kill()
    try:
        again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert again.returncode == 1
        pids = re.search(r"`kill ([0-9 ]+)` ends the servers that a killed `make up` left", again.stderr)
        assert pids and str(job) in pids[1].split()
    finally:
        for left in (process for process in psutil.process_iter() if _in(process, tmp_path)):
            left.kill()


def _in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()) == folder
    except psutil.Error:
        return False


def test_one_run_at_a_time_works_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    from flows.repro.checkout_lock import alone
    from flows.watch import watcher

    said, entered, waits = [], threading.Event(), threading.Event()

    class Watcher:
        def line(self, stage: str, text: str) -> None:
            said.append(text)
            waits.set()

    def second() -> None:
        watcher.set(Watcher())  # type: ignore[arg-type]
        with alone(tmp_path):
            entered.set()

    thread = threading.Thread(target=second)
    with alone(tmp_path):
        thread.start()
        assert waits.wait(20)
        assert said == [f"waiting: another run (process {os.getpid()}) is at work in this checkout"]
        assert not entered.wait(1.5)
    thread.join(20)
    assert entered.is_set() and len(said) == 1


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
