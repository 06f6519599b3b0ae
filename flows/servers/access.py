"""Restricts access to the servers of `make up`: to this machine, or with HOST set, to users who know the passwords.

The passwords are in variables that the clients of Prefect and MLflow also read: PREFECT_API_AUTH_STRING,
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. So users of the servers export the same variables.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.request import Request, urlopen

from ddpm.errors import InputError

LOOPBACK = "127.0.0.1"
LOCAL = (LOOPBACK, "localhost", "::1")
MIN_PASSWORD = 12  # characters; MLflow has the same limit

# The settings of MLflow's basic-auth app. They lie in one folder with its accounts. Each start creates a new folder, so the
# password in the environment is always valid.
_MLFLOW = """\
[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/accounts.db
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def in_url(host: str) -> str:
    """Returns a host in the form that URLs need, which puts IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def direct(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns `no_proxy` settings that also exempt local addresses, in both spellings of the variable."""
    added = {}
    for name, other in (("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")):
        given = environment.get(name) or environment.get(other, "")
        if given != "*":
            names = [item for item in given.split(",") if item.strip()]
            added[name] = ",".join([*names, *(item for item in LOCAL if item not in names)])
    return added


def guard(host: str, port: str, names: Sequence[str], environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Returns the variables that protect the servers.

    Args:
        host: the address at which the servers listen.
        port: the port of Prefect's server.
        names: the processes to start, such as "prefect" and "mlflow".
        environment: the variables that are already set.
        folder: a private folder for MLflow's accounts.

    Raises:
        InputError: other machines can reach `host`, and a password is missing or shorter than MIN_PASSWORD.
    """
    added = {}
    if "prefect" in names and "PREFECT_SERVER_CORS_ALLOWED_ORIGINS" not in environment:
        # By default, Prefect lets every web page in a browser on this machine read and start runs.
        own = {LOOPBACK, "localhost", host} - {"0.0.0.0", "::"}
        added["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(sorted(f"http://{in_url(name)}:{port}" for name in own))
    if is_loopback(host):
        return added
    if "prefect" in names:
        user, _, password = environment.get("PREFECT_API_AUTH_STRING", "").partition(":")
        # protects: tests/flows/test_access.py::test_make_up_refuses_to_open_without_passwords
        if not user or len(password) < MIN_PASSWORD:
            raise _missing(host, "PREFECT_API_AUTH_STRING=<name>:<password>")
        added["PREFECT_SERVER_API_AUTH_STRING"] = f"{user}:{password}"
    if "mlflow" in names:
        user, password = (environment.get(f"MLFLOW_TRACKING_{item}", "") for item in ("USERNAME", "PASSWORD"))
        if not user or len(password) < MIN_PASSWORD:
            raise _missing(host, "MLFLOW_TRACKING_USERNAME=<name> and MLFLOW_TRACKING_PASSWORD=<password>")
        settings = folder / "basic_auth.ini"
        settings.write_text(_MLFLOW.format(folder=folder), encoding="utf-8")
        added |= {
            "MLFLOW_APP": "--app-name basic-auth",
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_USERNAME": user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        }
    return added


def _missing(host: str, what: str) -> InputError:
    return InputError(
        f"HOST={host} opens the servers to other machines, which requires passwords: export {what} "
        f"({MIN_PASSWORD} characters or more), or leave HOST out to stay on this machine"
    )


def request(url: str) -> Request:
    """Returns a request to Prefect's API, with the password if one is set."""
    given = os.environ.get("PREFECT_API_AUTH_STRING")
    header = {"Authorization": f"Basic {base64.b64encode(given.encode()).decode()}"} if given else {}
    return Request(url, headers=header)


def answers(url: str | Request) -> bool:
    """Returns whether a server answers 200 at `url`. Returns False for an error answer such as 404."""
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
