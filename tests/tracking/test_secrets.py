"""Plants secrets in the environment, publishes a whole history, and searches everything that was written."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm import tracking
from ddpm.files.params import Params

SECRETS = {
    "AWS_ACCESS_KEY_ID": "planted-key-30c1",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-5d27",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-91ab",
    "PREFECT_API_AUTH_STRING": "ddpm:planted-auth-77fe",
}
IN_ADDRESS = "planted-in-address-c4d0"


def holders(folder: Path) -> list[str]:
    """Returns the files below a folder, and the rows of databases, that contain a planted word."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and b"planted-" in path.read_bytes()]
    for path in folder.rglob("*.db"):
        database = sqlite3.connect(path)  # reads the write-ahead log too, which may hold rows that are not in the file
        found += [str(path) for line in database.iterdump() if "planted-" in line]
        database.close()
    return found


def test_no_secret_reaches_mlflow_the_outputs_or_the_log(
    checkout: Path,
    smoke: Callable[..., Params],
    mlflow_server: str,
    mlflow_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = smoke(training={"steps": 24})
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.replace("://", f"://ddpm:{IN_ADDRESS}@"))
    said: list[Any] = []
    added = tracking.publish(params, checkout, say=said.append)
    decision = tracking.promote(params, checkout, say=said.append)
    assert added["runs"] and decision
    captured = capfd.readouterr()
    shown = f"{said} {decision} {captured.out} {captured.err} {caplog.text}"
    assert "planted-" not in shown
    assert holders(checkout) == []
    assert holders(mlflow_home) == []
    (checkout / "control").write_text(IN_ADDRESS)
    assert len(holders(checkout)) == 1
