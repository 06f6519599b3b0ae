"""Checks MLflow and Prefect on a real PostgreSQL server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from ddpm import tracking
from ddpm.files.params import Params

PAGE = Path(__file__).parents[2] / "docs" / "storage.md"


def program(name: str) -> str:
    """Returns the path of a PostgreSQL program, which Debian keeps off the PATH."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(str(home) for home in reversed(homes)))
    if found is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    return found


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Runs a server on loopback with the databases mlflow and prefect, and yields user@host:port."""
    initdb, server, client = (program(name) for name in ("initdb", "postgres", "psql"))
    pytest.importorskip("psycopg")
    # PostgreSQL refuses to run as root, and its user has no access to pytest's folders.
    other = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ddpm-postgres-") as name:
        home = Path(name)
        home.chmod(0o777)
        quiet = {"cwd": "/", "stdout": subprocess.DEVNULL, **other}
        cluster = ("--auth=trust", "--username=ddpm", "--encoding=UTF8", "--no-sync", f"--pgdata={home}/data")
        subprocess.run([initdb, *cluster], check=True, **quiet)
        options = ("listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={home}", "fsync=off")
        settings = [word for option in options for word in ("-c", option)]
        process = subprocess.Popen([server, "-D", f"{home}/data", *settings], stderr=subprocess.DEVNULL, **quiet)
        try:
            address = f"ddpm@127.0.0.1:{port}"
            ask = [client, f"postgresql://{address}/postgres", "--quiet", "--command"]
            end = time.monotonic() + 60
            while subprocess.run([*ask, "CREATE DATABASE mlflow"], stderr=subprocess.DEVNULL, check=False).returncode:
                assert process.poll() is None and time.monotonic() < end, "PostgreSQL does not start"
                time.sleep(0.2)
            subprocess.run([*ask, "CREATE DATABASE prefect"], check=True)
            yield address
        finally:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for open connections
            process.wait(30)


@pytest.mark.proof
def test_mlflow_on_postgresql(
    checkout: Path, smoke: Callable[..., Params], postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are published once, promoted and cleaned up, as on SQLite."""
    (checkout / "mlflow.db").unlink()
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"postgresql://{postgres}/mlflow")
    params = smoke(training={"steps": 24})
    added = tracking.publish(params, checkout)
    assert added["runs"] == 4 and added["images"] == 6 and added["models"] == 1
    assert tracking.publish(params, checkout) == {}
    assert tracking.promote(params, checkout).promoted
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("ddpm-digits")
    champion = client.get_model_version_by_alias("ddpm-digits", "champion")
    runs = {run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    assert champion.run_id in runs
    for run in runs - {champion.run_id}:
        client.delete_run(run)
    uri = f"postgresql+psycopg://{postgres}/mlflow"
    gc = ["gc", "--backend-store-uri", uri, "--tracking-uri", uri, "--run-ids", ",".join(runs - {champion.run_id})]
    subprocess.run([sys.executable, "-m", "mlflow", *gc], check=True)
    kept = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    assert [run.info.run_id for run in kept] == [champion.run_id]
    folder, _ = tracking.fetch_model("models:/ddpm-digits@champion", checkout / "fetched", checkout)
    assert (folder / "model.safetensors").read_bytes() == (checkout / "models/cosine/model.safetensors").read_bytes()
    assert not (checkout / "mlflow.db").exists()

    save, restore = re.findall(r"```sh\n(pg_(?:dump|restore) .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (checkout.parent / "backup").mkdir()
    path = f"{Path(program('pg_dump')).parent}{os.pathsep}{os.environ['PATH']}"

    def shell(command: str) -> None:
        subprocess.run(["sh", "-e", "-c", command], cwd=checkout, env={**os.environ, "PATH": path}, check=True)

    shell(save)
    shell("psql --quiet --command 'DROP SCHEMA public CASCADE; CREATE SCHEMA public' \"$MLFLOW_BACKEND_STORE_URI\"")
    with pytest.raises(MlflowException):
        client.get_model_version_by_alias("ddpm-digits", "champion")
    shell(restore)
    assert client.get_model_version_by_alias("ddpm-digits", "champion").version == champion.version
    assert len(client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == len(kept)


@pytest.mark.proof
def test_make_up_serves_mlflow_from_postgresql(postgres: str, tmp_path: Path) -> None:
    """The address from docs/storage.md names no driver."""
    shutil.copy(PAGE.parents[1] / "Procfile", tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    store = {"MLFLOW_BACKEND_STORE_URI": f"postgresql://{postgres}/mlflow", "MLFLOW_PORT": port}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.servers.up", "mlflow"],
            cwd=tmp_path,
            env={**os.environ, **store, "PYTHONPATH": str(PAGE.parents[1])},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 120
        while "startup complete" not in (said := (tmp_path / "log").read_text()):
            assert process.poll() is None and time.monotonic() < end, said
            time.sleep(0.2)
        assert MlflowClient(f"http://127.0.0.1:{port}").search_experiments()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.proof
def test_prefect_on_postgresql(tmp_path: Path, postgres: str) -> None:
    """The end of a flow run is in the database. The project starts a server for this run alone."""
    import psycopg

    flow = "\n".join(
        (
            "from pathlib import Path",
            "from flows.servers.embedded import Api",
            "api = Api(Path())",
            "from prefect import flow",
            "api.wait()",
            "flow(lambda: 1, name='on-postgresql')()",
        )
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    url = f"postgresql+asyncpg://{postgres}/prefect"
    done = subprocess.run(
        [sys.executable, "-c", flow],
        cwd=tmp_path,
        env={
            **environment,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": url,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with psycopg.connect(f"postgresql://{postgres}/prefect") as connection:
        states = connection.execute(
            "SELECT flow_run.state_type FROM flow_run JOIN flow ON flow.id = flow_run.flow_id WHERE flow.name = 'on-postgresql'"
        ).fetchall()
    assert states == [("COMPLETED",)]
    assert not list(tmp_path.rglob("*.db"))
