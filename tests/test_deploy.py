"""Dockerfile, compose.yaml and what checks them; the image itself is built by `make proof`."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = YAML(typ="safe").load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_ports_are_on_loopback_and_everything_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "healthcheck" in service or service["image"].startswith("${DDPM_IMAGE"), name
        assert not service.get("privileged") and service.get("network_mode") != "host", name
        assert "no-new-privileges:true" in service["security_opt"], name
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_no_secret_has_a_default() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    for name in ("POSTGRES_PASSWORD", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"):
        uses = re.findall(r"\$\{?" + name + r"([^}]*)", text)
        assert uses and all(re.fullmatch(r":\?\S.+", use) for use in uses), name


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        if not service["image"].startswith("${"):
            assert re.search(r":\d+\.\d+", service["image"]), name
    base = re.search(r"(?m)^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert base and re.search(r":\d+\.\d+", base[1])
    assert f"${{BASE_IMAGE:-{base[1]}}}" in (ROOT / "compose.yaml").read_text(encoding="utf-8")


AUDIT = runpy.run_path(str(ROOT / "deploy" / "audit.py"))


def test_a_vulnerability_fails_the_audit_and_an_accepted_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    advisory = {"id": "PYSEC-2019-217", "aliases": ["CVE-2016-10745"], "fix_versions": ["2.8.1"]}
    known = [
        {"name": "jinja2", "version": "2.4.1", "vulns": [advisory]},
        {"name": "torch", "version": "2", "vulns": []},
    ]
    assert AUDIT["verdict"](known, 2) == 1
    assert "jinja2 2.4.1: PYSEC-2019-217, fixed in 2.8.1" in capsys.readouterr().out
    AUDIT["verdict"].__globals__["ACCEPTED"]["CVE-2016-10745"] = "a test"
    assert AUDIT["verdict"](known, 2) == 0


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_the_image_is_built_and_works(tmp_path: Path) -> None:
    """On a base from Debian's mirror: it runs as nobody in particular, trains, and says that no worker is there."""
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here: apt-get install buildah debootstrap")
    if os.getuid() != 0:
        pytest.skip("debootstrap needs root")
    environment = {**os.environ, "STORAGE": str(tmp_path), "BASE_IMAGE": "debootstrap"}
    subprocess.run([str(ROOT / "deploy" / "image.sh"), "ddpm"], env=environment, check=True, stdin=subprocess.DEVNULL)
    buildah = ("buildah", "--root", str(tmp_path / "images"), "--runroot", str(tmp_path / "run"))

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*buildah, *command], capture_output=True, text=True, check=False)

    try:
        container = call("from", "ddpm").stdout.strip()

        def run(script: str) -> subprocess.CompletedProcess[str]:
            return call("run", "--isolation", "chroot", container, "--", "sh", "-ec", script)

        assert run("id -u").stdout.strip() == "10001"
        assert run("touch /opt/venv/bin/ddpm || echo refused").stdout.strip() == "refused"
        assert "train" in run("ddpm --help").stdout
        trained = run("cp recipes/smoke.yaml params.yaml; dvc repro prepare train@cosine; ls models/cosine")
        assert trained.returncode == 0, trained.stdout + trained.stderr
        assert {"model.json", "model.safetensors"} <= set(trained.stdout.split())
        tools = run("for tool in pytest mypy ruff playwright uv; do ! command -v $tool; done")
        assert tools.returncode == 0, tools.stdout
        health = call("inspect", "--format", "{{.Docker.Config.Healthcheck.Test}}", "--type", "image", "ddpm").stdout
        probe = health.partition("python -c ")[2].rstrip("]\n")
        assert "8080/health" in probe
        assert run(f'python -c "{probe}"').returncode != 0
    finally:
        call("rm", "--all")
        call("rmi", "--all", "--force")
