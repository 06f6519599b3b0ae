"""Checks Dockerfile, compose.yaml, the Kubernetes files and the audit. `make proof` also builds the image."""

from __future__ import annotations

import asyncio
import json
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from ddpm.files import paths

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


KUBERNETES = ROOT / "deploy" / "kubernetes"
JOB: dict[str, Any] = json.loads((KUBERNETES / "job.json").read_text(encoding="utf-8"))
POD: dict[str, Any] = JOB["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
WORKER: list[dict[str, Any]] = list(YAML(typ="safe").load_all((KUBERNETES / "worker.yaml").read_text(encoding="utf-8")))


def test_every_variable_of_the_job_is_declared_used_and_has_a_default_or_is_required() -> None:
    declared = JOB["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(JOB["job_configuration"])))
    assert used == set(declared)
    validator = Draft202012Validator(JOB["variables"])
    validator.check_schema(JOB["variables"])
    defaults = {name: about["default"] for name, about in declared.items() if "default" in about}
    validator.validate({**defaults, "image": "ddpm", "repository": "https://example.org/ddpm.git"})
    assert set(declared) == set(defaults) | {"image", "repository", "command"}  # Prefect has a default command


def test_the_pod_fits_the_image() -> None:
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    folder = re.search(r"(?m)^WORKDIR (/workspace)$", image)
    user = re.search(r"(?m)^USER (\d+):(\d+)$", image)
    assert folder and user
    security = POD["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert security["runAsNonRoot"] and security["fsGroup"] == int(user[2])
    for container in (*POD["containers"], *POD["initContainers"]):
        assert container["workingDir"] == folder[1]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["workspace"] == folder[1]
        assert mounts.get("states", "").removeprefix(folder[1]) in ("", f"/{paths.CACHE}/training")
    (main,) = POD["containers"]
    assert {"name": "DDPM_CHECKOUT", "value": folder[1]} in main["env"]  # deploy/hosts.yaml uses this variable
    assert "$DDPM_CHECKOUT" in (ROOT / "deploy" / "hosts.yaml").read_text(encoding="utf-8")


def test_nothing_in_the_cluster_has_more_rights_than_it_needs() -> None:
    (deployment,) = (item for item in WORKER if item["kind"] == "Deployment")
    for pod in (POD, deployment["spec"]["template"]["spec"]):
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
    assert POD["automountServiceAccountToken"] is False
    assert {item["kind"] for item in WORKER} == {
        "ServiceAccount",
        "Role",
        "RoleBinding",
        "Deployment",
    }  # and no ClusterRole
    (role,) = (item for item in WORKER if item["kind"] == "Role")
    assert "*" not in json.dumps(role["rules"]) and "secrets" not in json.dumps(role["rules"])


def test_the_worker_in_the_cluster_is_of_the_locked_version() -> None:
    locked = re.search(r"(?m)^prefect==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"))
    assert locked and f"prefecthq/prefect:{locked[1]}-python" in (KUBERNETES / "worker.yaml").read_text(
        encoding="utf-8"
    )


@pytest.mark.chaos
def test_prefect_makes_a_job_of_the_template() -> None:
    """Prefect validates the template, and the manifest contains no secret."""
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="the extra kubernetes; `make chaos` installs it")
    from prefect.client.schemas.objects import FlowRun

    said = {"image": "registry/ddpm:1", "repository": "https://example.org/ddpm.git", "commit": "abc", "gpus": 2}
    made = asyncio.run(worker.KubernetesWorkerJobConfiguration.from_template_and_values(JOB, said))
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="train@cosine", parameters={}))
    pod = made.job_manifest["spec"]["template"]["spec"]
    (main,), (clone,) = pod["containers"], pod["initContainers"]
    assert "{{" not in json.dumps(made.job_manifest)
    assert main["args"] == ["prefect", "flow-run", "execute"]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"name": "COMMIT", "value": "abc"} in clone["env"]
    assert {"name": "states", "emptyDir": {}} in pod["volumes"]
    assert main["envFrom"] == [{"secretRef": {"name": "ddpm"}}]


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
    """Builds the image on a base from Debian's mirror.

    The container runs as an unprivileged user, trains, and reports a missing worker.
    """
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
