"""Checks MLflow's files in S3, on a real server whose connection refuses, drops or is slow.

In the end each file is there once.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client
from mlflow.tracking import MlflowClient

from ddpm import tracking
from ddpm.errors import InputError
from ddpm.files import paths
from ddpm.files.params import Params
from ddpm.tracking import place


@pytest.fixture
def params(smoke: Callable[..., Params]) -> Params:
    return smoke(training={"steps": 24})


@pytest.fixture
def bucket(
    s3: Any, request: pytest.FixtureRequest, setting: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> str:
    """Creates a new bucket in which MLflow keeps its files."""
    name = "b" + hashlib.sha256(request.node.name.encode()).hexdigest()[:20]
    for variable, value in s3.environment.items():
        setting(variable, value)
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", f"s3://{s3.bucket(name)}/mlflow")
    monkeypatch.setattr(place, "_warned", set())
    return name


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Returns setting(name, value), which sets a variable of the AWS chain and clears the caches of boto3 and MLflow."""

    def setting(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        _cached_get_s3_client.cache_clear()

    return setting


def assert_whole(s3: Any, bucket: str, root: Path, params: Params) -> None:
    """Asserts that every file of every run is in the bucket once, with the bytes on disk, and that no other file is there."""
    client = MlflowClient(tracking.tracking_uri(root))
    experiment = client.get_experiment_by_name("ddpm-digits")
    location = experiment.artifact_location.removeprefix(f"s3://{bucket}/") + "/"
    assert re.fullmatch("mlflow/ddpm-digits-[0-9a-f]{8}/", location)
    keys = [key.removeprefix(location) for key in s3.keys(bucket)]
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    (model,) = client.search_logged_models([experiment.experiment_id])
    assert {key.split("/")[0] for key in keys} <= {"models", *runs.values()}
    assert all(f"/{model.model_id}/" in key for key in keys if key.startswith("models/"))
    for name in ("model.safetensors", "model.json"):
        key = f"{location}models/{model.model_id}/artifacts/{name}"
        body = s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        assert body == (root / paths.model_dir("cosine") / name).read_bytes()
    for sampler in params.sweep.samplers:
        run = client.get_run(runs[f"cosine-{sampler}"])
        images = [Path(key).name for key in keys if key.startswith(f"{run.info.run_id}/artifacts/images/")]
        steps = Counter((int(name.split("+")[2]), Path(name).suffix) for name in images)
        assert steps == {(step, kind): 1 for step in (0, 2, 5) for kind in (".png", ".webp")}
        assert run.data.tags["mlflow.loggedImages"] == "True"


@pytest.mark.chaos
def test_a_line_that_crawls_and_drops(
    checkout: Path, params: Params, s3: Any, bucket: str, bad_line: Any, setting: Callable[[str, str], None]
) -> None:
    """The connection drops three times in the middle of the weights.

    One call of publish still succeeds, and a second adds nothing.
    """
    setting("AWS_ENDPOINT_URL", bad_line.url)
    weights = (checkout / "models/cosine/model.safetensors").stat().st_size
    bad_line.cut, bad_line.cuts, bad_line.delay = weights // 2, 3, 0.002
    tracking.publish(params, checkout)
    assert bad_line.dropped == 3
    assert_whole(s3, bucket, checkout, params)
    before = s3.keys(bucket)
    assert tracking.publish(params, checkout) == {}
    assert s3.keys(bucket) == before and not (checkout / "mlartifacts").exists()


@pytest.mark.chaos
def test_a_dead_server_costs_a_line_and_is_made_up_for(
    checkout: Path, params: Params, s3: Any, bucket: str, bad_line: Any, setting: Callable[[str, str], None]
) -> None:
    """The connection is cut at one place after another.

    Each time there is one error line, and the next publication continues.
    """
    setting("AWS_ENDPOINT_URL", bad_line.url)
    setting("AWS_MAX_ATTEMPTS", "1")
    bad_line.cut, failures = 0, 0
    for allowed in range(200):
        bad_line.dropped, bad_line.cuts = 0, 10**6
        # `cut` counts all requests of a connection together, so a larger `cut` lets more requests pass
        bad_line.cut = 3000 * (allowed + 1) ** 2
        try:
            tracking.publish(params, checkout)
            break
        except InputError as error:
            assert "S3" in str(error) and "ddpm publish" in str(error) and "\n" not in str(error)
            failures += 1
    assert failures > 3
    assert_whole(s3, bucket, checkout, params)


@pytest.mark.chaos
def test_a_refusal_is_one_line(
    checkout: Path, params: Params, s3: Any, bucket: str, setting: Callable[[str, str], None]
) -> None:
    setting("AWS_SECRET_ACCESS_KEY", "not-the-one")
    with pytest.raises(InputError, match="MLflow cannot use its files in S3") as caught:
        tracking.publish(params, checkout)
    assert "not-the-one" not in str(caught.value) and "\n" not in str(caught.value)
    said: list[str] = []
    tracking.publish_or_warn(
        params, checkout, only="train@cosine", say=said.append
    )  # the end of a stage prints only this warning
    assert len(said) == 1 and said[0].startswith("warning: MLflow cannot use its files in S3")
    setting("AWS_SECRET_ACCESS_KEY", s3.environment["AWS_SECRET_ACCESS_KEY"])
    tracking.publish(params, checkout)
    assert_whole(s3, bucket, checkout, params)
