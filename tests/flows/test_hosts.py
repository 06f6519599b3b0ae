"""Runs a sweep on two hosts: clones that share only git, an S3 server and the Prefect API."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import cloudpickle
import httpx
import psutil
import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext, serialize_context
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Completed

from ddpm.errors import InputError
from ddpm.provenance import dvc_lock
from flows.hosts import dispatch, engines
from flows.repro.checkout_lock import alone
from flows.train_eval import _show_artifacts, _show_on_page, train_eval
from flows.watch import watcher

ROOT = Path(__file__).parents[2]
MANY = [f"{stage}@{schedule}" for stage in ("train", "sample") for schedule in ("linear", "cosine")]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def clones(
    scratch: Any, s3: Any, tmp_path: Path, scratch_maker: Callable[[Path, Path], Any]
) -> Iterator[Callable[[str, str], Any]]:
    """Returns clones(bucket, name), which clones `scratch` with that bucket as its DVC remote."""
    for name in ("Makefile", "deploy/hosts.yaml"):
        (scratch.root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, scratch.root / name)
    with (scratch.root / ".gitignore").open("a") as file:
        file.write("\n*.pid\n*.saved\nlog\nup-*.log\n.prefect\nmlflow.db*\n.cache\n")
    scratch.environment.update(s3.environment)
    empty, made = tmp_path / "empty", []
    empty.mkdir()

    def clone(bucket: str, name: str) -> Any:
        if not made:
            assert scratch.run("make", "remote", "INSTALLED=", f"URL=s3://{bucket}").returncode == 0
            author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
            for command in (("add", "--all"), (*author, "commit", "--quiet", "--message", "all")):
                assert scratch.run("git", *command).returncode == 0
        assert scratch.run("git", "clone", "--quiet", ".", str(tmp_path / name)).returncode == 0
        made.append(scratch_maker(tmp_path / name, empty))
        made[-1].environment.update(s3.environment)
        return made[-1]

    yield clone
    for item in made:
        item.end()


def pool(scratch: Any, hosts: list[Any], api: str) -> bool:
    for host in hosts:
        host.start(sys.executable, "-m", "flows.servers.worker", "hosts", PREFECT_API_URL=api)
    for host in hosts:
        host.wait(lambda log=host.root / "log": "started!" in log.read_text(), 120, "a host waits for work")
    return True


def dask(scratch: Any, hosts: list[Any], api: str) -> str:
    """Starts a Dask scheduler with the hosts as its workers. Returns its address."""
    pytest.importorskip("prefect_dask", reason="the extra dask is not installed; `make chaos` does that")
    port, mine = scratch.free_port(), ("--host", "127.0.0.1", "--no-dashboard")
    address = f"tcp://127.0.0.1:{port}"
    scheduler = ("distributed.cli.dask_scheduler", "--port", str(port))
    scratch.start(sys.executable, "-m", *scheduler, *mine, log="scheduler.log")
    for host in hosts:
        worker = ("distributed.cli.dask_worker", address, "--nthreads", "1")
        host.start(sys.executable, "-m", *worker, *mine, PREFECT_API_URL=api)
    for host in hosts:
        host.wait(lambda log=host.root / "log": "Registered to" in log.read_text(), 120, "a host joins the cluster")
    return address


# how hosts offer themselves -> a function that returns the value of the flow's parameter `hosts`
JOINED = {"pool": pool, "dask": dask}


@pytest.mark.parametrize("hosts", [False, True])
def test_the_pool_and_this_checkout_need_no_cluster(hosts: bool) -> None:
    with engines.connected(hosts):
        assert engines.cluster.get(None) is None
    assert not {"distributed", "prefect_dask"} & set(sys.modules)


@pytest.mark.parametrize(
    "hosts", ["", "true", "dask", "scheduler:8786", "tcp://", "http://scheduler:8786", "ray://head:10001"]
)
def test_what_is_no_address_of_a_cluster_is_refused_in_one_line(hosts: str) -> None:
    with (
        pytest.raises(InputError, match=r"^hosts: .*tcp://scheduler:8786$"),
        engines.connected(hosts),
    ):
        pass


def test_a_missing_extra_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    line = r"^hosts: tcp://a:1 needs the extra dask, .*uv pip install .*'\.\[dask\]'$"
    with pytest.raises(InputError, match=line), engines.connected("tcp://a:1"):
        pass
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["dask"][0].startswith("prefect-dask")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (TimeoutError(), "TimeoutError"),
        (OSError("refused"), "refused"),
        (OSError("Timed out\nafter 30 s"), "Timed out after 30 s"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_line_with_the_reason(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away:
        def __enter__(self) -> None:
            raise error

    monkeypatch.setattr(engines, "_runner", lambda hosts: Away())
    with pytest.raises(InputError) as refused, engines.connected("tcp://scheduler:8786"):
        pass
    assert str(refused.value) == f"hosts: cannot connect to a Dask scheduler at tcp://scheduler:8786 ({why})"
    assert engines.cluster.get(None) is None


def test_a_task_takes_neither_passwords_nor_the_flows_code_along() -> None:
    class Recorder:
        def submit(self, task: Any, parameters: dict[str, Any]) -> dict[str, Any]:
            return serialize_context()  # the context that the task runner sends

    asking = FlowRunContext.model_construct(
        flow=train_eval, flow_run=FlowRun(id=uuid4(), flow_id=uuid4()), result_store=None
    )
    here = {PREFECT_API_URL: "http://here/api", PREFECT_API_AUTH_STRING: "name:planted-password"}
    token = engines.cluster.set(Recorder())  # type: ignore[arg-type]
    with temporary_settings(here), asking:
        # Prefect sends the password by default
        assert b"planted-password" in cloudpickle.dumps(serialize_context()["settings_context"])
        sent: Any = engines.submit(dispatch.on_a_host, {})
    engines.cluster.reset(token)
    packed = cloudpickle.dumps(sent)
    assert not any(text in packed for text in (b"planted-password", b"http://here", b"flows.train_eval"))
    assert not sent["settings_context"]  # without settings from here, Prefect keeps the host's own
    assert sent["flow_run_context"]["flow_run"]["id"] == asking.flow_run.id


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Creates a repository with one empty commit, and makes it the working folder."""
    monkeypatch.chdir(tmp_path)
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (("init", "--quiet"), (*author, "commit", "--quiet", "--allow-empty", "--message", "all")):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_a_clone_at_another_commit_refuses_in_one_line(repository: Path) -> None:
    state = dispatch._run_on_this_host("train@cosine", 40 * "0", "changed: true", str(uuid4()))
    assert (state.name, state.type.value) == ("InputError", "FAILED")
    here = dispatch.head(Path())[:10]
    assert state.message == f"this host's clone is at {here}, but the run needs 0000000000: check out that commit here"
    assert [path.name for path in repository.iterdir()] == [".git"]


def test_a_worker_in_the_clone_that_asks_refuses_in_one_line(repository: Path) -> None:
    """The worker would wait for the flow run, and the flow run for the worker."""
    asks = str(uuid4())
    said: list[State] = []
    with alone(repository, asks):
        host = threading.Thread(
            target=lambda: said.append(
                dispatch._run_on_this_host("train@cosine", dispatch.head(repository), "changed: true", asks)
            ),
            daemon=True,
        )
        host.start()
        host.join(20)
        assert not host.is_alive()
    assert (said[0].name, said[0].type.value) == ("InputError", "FAILED")
    assert said[0].message == ("the flow is already running in this clone; start the worker in a clone of its own")
    assert not (repository / "params.yaml").exists()


def test_an_api_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two errors below are those that Prefect's client raises after its own retries."""
    monkeypatch.setattr(dispatch, "POLL", 0.01)
    request = httpx.Request("GET", "http://127.0.0.1/api")
    busy = httpx.HTTPStatusError("busy", request=request, response=httpx.Response(503, request=request))
    answers = [busy, httpx.ConnectError("away"), Completed()]

    class Client:
        def read_flow_run(self, run: object) -> SimpleNamespace:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(state=answer)

    state = dispatch._wait_for_end(Client(), uuid4())  # type: ignore[arg-type]
    assert state is not None and state.is_completed()


def test_a_page_that_cannot_be_shown_fails_no_run(tmp_path: Path) -> None:
    said: list[str] = []

    class Watcher:
        def line(self, stage: str, text: str) -> None:
            said.append(text)

    (tmp_path / "report" / "front.json").mkdir(parents=True)
    token = watcher.set(Watcher())  # type: ignore[arg-type]
    _show_on_page(_show_artifacts, tmp_path)
    watcher.reset(token)
    assert len(said) == 1 and said[0].startswith("the page of this run is incomplete (")


@pytest.mark.chaos
@pytest.mark.parametrize("how", JOINED)
def test_a_sweep_on_two_hosts_of_which_one_dies_ends_as_a_serial_one(
    how: str, scratch: Any, s3: Any, clones: Callable[..., Any], up_starter: Callable[[Any], Any]
) -> None:
    bucket = s3.bucket(f"hosts-{how}")
    hosts = [clones(bucket, f"host {number}") for number in range(2)]
    serial = clones(bucket, "serial")
    serial.repro()
    lock = dvc_lock.read(serial.root)

    up = up_starter(scratch)
    for host in hosts:
        host.control(train_linear={"until": "go"}, train_cosine={"until": "go"})
    run = up.start(hosts=JOINED[how](scratch, hosts, up.api))
    for host in hosts:
        host.wait(lambda root=host.root: list(root.glob("train@*.pid")), 120, "each host trains")
    for process in hosts[0].processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # the process ended together with one killed before
            process.kill()
    (hosts[1].root / "go").touch()

    def ended() -> Any:
        with contextlib.suppress(OSError):  # the server may be busy
            return up.get(f"/flow_runs/{run}")["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    scratch.wait(ended, 400, "the sweep ends")  # a missing heartbeat is noticed only after 150 s
    about = up.get(f"/flow_runs/{run}")["state"]
    assert about["name"] == "Completed", (
        about,
        up.log.read_text()[-3000:],
        (hosts[1].root / "log").read_text()[-3000:],
    )
    # DVC writes stages in the order in which they ended, so the files themselves may differ
    assert dvc_lock.read(scratch.root) == lock
    assert "Running stage" not in scratch.repro()
    assert sorted(path.stem for path in scratch.root.glob("*.pid")) == ["prepare", "report"]
    assert sorted(path.stem for path in hosts[1].root.glob("*.pid")) == sorted(MANY)
    states = up.states(run)
    assert {states[name] for name in MANY} == {"Restored"}, states  # restored in this checkout


@pytest.mark.chaos
@pytest.mark.parametrize("how", JOINED)
def test_a_cancelled_run_ends_on_its_host(
    how: str, scratch: Any, s3: Any, clones: Callable[..., Any], up_starter: Callable[[Any], Any]
) -> None:
    bucket = s3.bucket(f"cancelled-{how}")
    host = clones(bucket, "host")
    up = up_starter(scratch)
    up.injected += ["stopped with the flow", "Task run cancelled by the task runner"]
    host.control(train_linear={"until": "go", "saves": True}, train_cosine={"until": "go", "saves": True})
    run = up.start(hosts=JOINED[how](scratch, [host], up.api))
    host.wait(lambda: list(host.root.glob("train@*.pid")), 200, "the host trains")
    done = scratch.run(sys.executable, "-m", "prefect", "flow-run", "cancel", run)
    assert done.returncode == 0, done.stdout + done.stderr
    host.wait(lambda: list(host.root.glob("train@*.saved")), 60, "the training saves and ends")
    host.wait(lambda: not up.open_runs(), 120, "nothing shows as running")
