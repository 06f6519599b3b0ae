# The image of the worker and of both servers. docs/deploy.md shows how to use this image.
#
#   docker build --tag ddpm .                                               CUDA, with the torch of requirements.lock
#   docker build --tag ddpm --build-arg TORCH_INDEX=<address of an index> . another torch, such as the CPU-only one
#   docker build --tag ddpm --build-arg BASE_IMAGE=<image> .                a site's own Debian 12, or newer, or Ubuntu 24.04
#
# deploy/image.sh builds the image without a Docker engine. If no image registry can be reached, it also builds the base image.
ARG BASE_IMAGE=debian:12.12-slim

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS python
# torch.compile calls gcc at run time. DVC and MLflow's lineage call git.
# Packages are not pinned: Debian's mirrors hold only the latest version of a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc git libc6-dev python3 python3-dev python3-venv \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/*


FROM python AS packages
ARG TORCH_INDEX=
# Uses the base image's certificates, so that a site can add its own.
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt UV_SYSTEM_CERTS=1 UV_NO_CACHE=1 UV_LINK_MODE=copy
WORKDIR /build
COPY Makefile pyproject.toml requirements.lock ./
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Installs the entries of requirements.lock that pyproject.toml needs, as `make` does, but without development tools.
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --quiet --no-cache-dir --disable-pip-version-check "$(sed -n 's/^UV := //p' Makefile)" \
    && /opt/uv/bin/uv venv --quiet /opt/venv \
    && /opt/uv/bin/uv pip compile --quiet --no-header --no-annotate --python /opt/venv/bin/python \
        --extra pipeline --group files --constraint requirements.lock pyproject.toml --output-file wanted.txt \
    && awk 'NR == FNR { wanted[$1]; next } /^[^ ]/ { keep = $1 in wanted } keep' wanted.txt requirements.lock >requirements.txt
RUN if [ -n "$TORCH_INDEX" ]; then \
        grep -oE '^(torch|torchvision)==[^ ]+' requirements.txt >torch.txt \
        && /opt/uv/bin/uv pip install --quiet --no-deps --compile-bytecode --python /opt/venv/bin/python \
            --default-index "$TORCH_INDEX" --requirements torch.txt \
        && sed -E -i '/^(cuda-|nvidia-|torch==|torchvision==|triton==)/,/[^\\]$/d' requirements.txt; \
    fi \
    && /opt/uv/bin/uv pip install --quiet --no-deps --compile-bytecode --python /opt/venv/bin/python \
        --require-hashes --requirements requirements.txt


FROM python
RUN useradd --uid 10001 --no-log-init --create-home --home-dir /home/ddpm --shell /usr/sbin/nologin ddpm \
    && git config --system --add safe.directory /workspace
COPY --from=packages /opt/venv /opt/venv
# DVC works in this checkout. Mount your own checkout over it to keep the outputs.
COPY --chown=10001:10001 . /workspace
# Bytecode is compiled here and never at run time: on a full disk, Python would leave truncated files.
RUN --mount=type=bind,from=packages,source=/opt/uv,target=/opt/uv \
    printf '[core]\n    no_scm = true\n' >/workspace/.dvc/config.local \
    && /opt/uv/bin/uv pip install --quiet --no-deps --no-build-isolation --python /opt/venv/bin/python --editable /workspace \
    && sed -i 's/^from dvc.cli import main/from ddpm.tools.dvc import main/' /opt/venv/bin/dvc \
    && /opt/venv/bin/python -m compileall -q /workspace/ddpm /workspace/flows \
    && chown -R 10001:10001 /workspace
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/ddpm \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=true \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_WORKER_WEBSERVER_PORT=8080
WORKDIR /workspace
USER 10001:10001
# The worker answers 503 when it cannot reach Prefect. compose.yaml has the health checks of the servers.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=5)"]
CMD ["python", "-m", "flows.servers.up", "worker"]
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ddpm" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
