"""Checks access to the servers of `make up`: by password if HOST is set, otherwise only from this machine."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ddpm.errors import InputError, without_password
from flows.servers import access, up

ROOT = Path(__file__).parents[2]
NAME, PREFECT_PASSWORD, MLFLOW_PASSWORD = "ddpm", "prefect-0f3a91c7", "mlflow-7be2d604"
PASSWORDS = {
    "PREFECT_API_AUTH_STRING": f"{NAME}:{PREFECT_PASSWORD}",
    "MLFLOW_TRACKING_USERNAME": NAME,
    "MLFLOW_TRACKING_PASSWORD": MLFLOW_PASSWORD,
}


@pytest.mark.parametrize(
    ("host", "names", "changes", "missing"),
    [
        ("0.0.0.0", ["prefect", "mlflow"], {"PREFECT_API_AUTH_STRING": ""}, "PREFECT_API_AUTH_STRING"),
        ("0.0.0.0", ["prefect"], {"PREFECT_API_AUTH_STRING": "ddpm"}, "PREFECT_API_AUTH_STRING"),
        ("0.0.0.0", ["prefect"], {"PREFECT_API_AUTH_STRING": "ddpm:short"}, "PREFECT_API_AUTH_STRING"),
        ("0.0.0.0", ["prefect"], {"PREFECT_API_AUTH_STRING": f":{PREFECT_PASSWORD}"}, "PREFECT_API_AUTH_STRING"),
        ("::", ["mlflow"], {"MLFLOW_TRACKING_PASSWORD": ""}, "MLFLOW_TRACKING_PASSWORD"),
        ("10.0.0.7", ["mlflow"], {"MLFLOW_TRACKING_USERNAME": ""}, "MLFLOW_TRACKING_USERNAME"),
        ("trainer", ["mlflow"], {"MLFLOW_TRACKING_PASSWORD": "eleven-char"}, "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_nothing_opens_without_its_password(
    host: str, names: list[str], changes: dict[str, str], missing: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=missing) as refused:
        access.guard(host, "4200", names, PASSWORDS | changes, tmp_path)
    assert not any(value and value in str(refused.value) for value in changes.values() if len(value) > len(NAME))


def test_a_folder_without_a_procfile_is_one_line(tmp_path: Path) -> None:
    start = (sys.executable, "-m", "flows.servers.up", "mlflow")
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "`ddpm init` made" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_alone_needs_no_password(host: str, tmp_path: Path) -> None:
    added = access.guard(host, "4200", ["prefect", "mlflow", "worker"], {}, tmp_path)
    assert set(added) == {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS"}
    assert "*" not in added["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]


def test_an_address_of_ipv6_stands_in_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            monkeypatch.setenv("PREFECT_PORT", port := str(probe.getsockname()[1]))
    except OSError:
        pytest.skip("no IPv6 here")
    environment = up._environment(["prefect"], "::1", "sqlite:///mlflow.db", tmp_path)
    assert environment["PREFECT_API_URL"] == f"http://[::1]:{port}/api"
    assert f"http://[::1]:{port}" in environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")


@pytest.mark.parametrize(
    ("host", "port", "remedy"),
    [
        ("192.0.2.1", "0", "set HOST to an address of this machine"),  # an address that no machine has (RFC 5737)
        ("nowhere.invalid", "0", "set HOST to an address of this machine"),
        ("127.0.0.1", "99999", "choose another port with MLFLOW_PORT=<port>"),
        ("127.0.0.1", "http", "choose another port with MLFLOW_PORT=<port>"),
    ],
)
def test_advice_about_a_port_names_the_setting_at_fault(
    monkeypatch: pytest.MonkeyPatch, host: str, port: str, remedy: str
) -> None:
    monkeypatch.setenv("MLFLOW_PORT", port)
    with pytest.raises(InputError) as refused:
        up._port("MLFLOW_PORT", "5000", host)
    assert str(refused.value).endswith(remedy)


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "a.org,localhost"}, "a.org,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "a.org"}, "a.org,127.0.0.1,localhost,::1"),
    ],
)
def test_no_proxy_is_asked_for_this_machine(given: dict[str, str], then: str) -> None:
    assert access.direct(given) == {"no_proxy": then, "NO_PROXY": then}
    assert access.direct({"no_proxy": "*"}) == {}


@pytest.mark.parametrize(
    ("address", "without"),
    [
        ("postgresql+psycopg://ddpm:secret@db:5432/mlflow", "postgresql+psycopg://db:5432/mlflow"),
        ("https://a:b@c@host/path@x", "https://host/path@x"),
        ("postgresql+psycopg://ddpm:ab/cd@e?f@db/mlflow", "postgresql+psycopg://db/mlflow"),
        (
            "postgresql://db/mlflow?user=a&password=secret&sslmode=require",
            "postgresql://db/mlflow?user=a&password=***&sslmode=require",
        ),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, without: str) -> None:
    assert without_password(address) == without


def test_make_up_refuses_to_open_without_passwords(scratch: Any) -> None:
    done = scratch.run(sys.executable, "-m", "flows.servers.up", HOST="0.0.0.0")
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "PREFECT_API_AUTH_STRING" in done.stderr
    assert not scratch.running()


def ask(url: str, user: str = "", password: str = "", body: Any = None, **headers: str) -> tuple[int, dict[str, str]]:
    """Sends a request. Returns the status and the headers of the answer."""
    if user:
        headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): value for name, value in error.headers.items()}


def addresses(scratch: Any, ports: set[int]) -> set[str]:
    """Returns the addresses at which the processes of `scratch` listen on `ports`."""
    return {
        connection.laddr.ip
        for process in scratch.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
    }


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_with_host_the_servers_ask_everybody_for_a_password(scratch: Any, check_log: Callable[..., list[str]]) -> None:
    """Runs the real servers and the worker of `make up HOST=0.0.0.0`."""
    ports = {"PREFECT_PORT": scratch.free_port(), "MLFLOW_PORT": scratch.free_port()}
    variables = {name: str(port) for name, port in ports.items()}
    process = scratch.start(
        sys.executable, "-m", "flows.servers.up", log="up.log", HOST="0.0.0.0", **variables, **PASSWORDS
    )
    log = scratch.root / "up.log"
    prefect, mlflow = (f"http://127.0.0.1:{port}" for port in ports.values())
    # Our own processes have access: the worker has created its pool and deployment, and waits for work.
    scratch.wait(lambda: "\nready; " in log.read_text() or process.poll() is not None, 400, "`make up` is ready")
    assert process.poll() is None, log.read_text()[-3000:]
    assert addresses(scratch, set(ports.values())) == {"0.0.0.0"}

    runs, found = f"{prefect}/api/flow_runs/filter", f"{mlflow}/api/2.0/mlflow/experiments/search"
    for url, password, body in ((runs, PREFECT_PASSWORD, {}), (found, MLFLOW_PASSWORD, {"max_results": 5})):
        assert ask(url, body=body)[0] == 401
        assert ask(url, NAME, "wrong-password", body)[0] == 401
        assert ask(url, "admin", password, body)[0] == 401
        assert ask(url, NAME, password, body)[0] == 200
    assert ask(f"{mlflow}/ajax-api/2.0/mlflow/experiments/search?max_results=5")[0] == 401
    assert ask(f"{mlflow}/")[0] == 401
    assert ask(f"{mlflow}/api/2.0/mlflow-artifacts/artifacts?path=.")[0] == 401

    # A page of another site, in the browser of a user who is logged in, can neither read nor start anything.
    elsewhere = {"Origin": "http://elsewhere.example"}
    assert "access-control-allow-origin" not in ask(runs, NAME, PREFECT_PASSWORD, {}, **elsewhere)[1]
    assert ask(found, NAME, MLFLOW_PASSWORD, {"max_results": 5}, **elsewhere)[0] == 403
    assert ask(found, NAME, MLFLOW_PASSWORD, {"max_results": 5}, Host="elsewhere.example")[0] == 403

    assert not check_log(log)

    # No password appears in command lines, which all users of the machine can list, or in the servers' output and files.
    for running in scratch.processes():
        assert not any(secret in item for item in running.cmdline() for secret in (PREFECT_PASSWORD, MLFLOW_PASSWORD))
    for path in scratch.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert PREFECT_PASSWORD.encode() not in content, path
            assert MLFLOW_PASSWORD.encode() not in content, path


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_without_host_nothing_listens_beyond_loopback(scratch: Any) -> None:
    """Without HOST, both servers listen on loopback only."""
    ports = {"PREFECT_PORT": scratch.free_port(), "MLFLOW_PORT": scratch.free_port()}
    variables = {name: str(port) for name, port in ports.items()}
    scratch.start(sys.executable, "-m", "flows.servers.up", "mlflow", "prefect", **variables)
    scratch.wait(lambda: all(addresses(scratch, {port}) for port in ports.values()), 240, "both servers listen")
    assert addresses(scratch, set(ports.values())) == {"127.0.0.1"}
