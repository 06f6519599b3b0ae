# `make help` lists the targets. Each target installs what it needs, once.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-library proof chaos bench pictures wheels up ui remote check audit sbom image clean lock

UV := uv==0.13.9
INSTALLED := .venv/installed
EMPTY := .venv/share/empty-databases
PYTHON ?= $(shell for python in python3.11 python3 python; do \
	$$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
# The package index of torch and torchvision, if it is not PyPI. .venv/torch-index remembers this index.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(if $(filter cpu,$(TORCH)),$(CPU_INDEX),$(shell cat .venv/torch-index 2>/dev/null))
# Not empty if this machine has an NVIDIA GPU.
GPU = $(shell command -v nvidia-smi)$(wildcard /proc/driver/nvidia/version /dev/nvidia0)
PIP := .venv/bin/uv pip install --python .venv/bin/python --no-deps
# Patches the environment's `dvc`, which then writes dvc.lock atomically and prints the best point after `dvc repro`
# (ddpm/tools/dvc.py).
ATOMIC := find .venv/bin -name dvc -exec sed -i 's/^from .* import main/from ddpm.tools.dvc import main/' {} +
# Installs the extras of pyproject.toml whose names follow.
EXTRAS = .venv/bin/uv pip install --quiet --python .venv/bin/python --constraint requirements.lock $$(.venv/bin/python -c 'import sys, tomllib; \
	extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(item.replace(" ", "") for name in sys.argv[1:] for item in extras[name]))'
# PEERS: packages that `make bench` compares with, and that are not in requirements.lock. GPU_PACKAGES: packages of
# requirements.lock that a GPU machine with only torch, torchvision and scipy may lack.
PEERS = $$(.venv/bin/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"])')
GPU_PACKAGES := diffusers|torch-fidelity|pydantic|pydantic-core|annotated-types|typing-inspection|ruamel-yaml|psutil|importlib-metadata|zipp

# `make up HOST=...` lets other machines connect, with passwords (docs/deploy.md). A HOST variable of the shell is ignored.
ifneq ($(origin HOST),command line)
unexport HOST
endif
export PREFECT_PORT ?= 4200
export MLFLOW_PORT ?= 5000
# Switches telemetry off. Without make, Prefect and DVC read the same settings from prefect.toml and .dvc/config.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# Without this setting, MLflow's server starts ten more processes, which outlive the server.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
# On a full disk, Python 3.11 leaves a truncated .pyc (https://github.com/python/cpython/issues/126606), on which every later
# start fails. So bytecode is written only at installation. An edited file then costs 2 to 11 ms at each start.
export PYTHONDONTWRITEBYTECODE := 1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'variables: RECIPE=smoke (demo), HOST, PREFECT_PORT, MLFLOW_PORT (up, ui), TORCH=cpu (torch without CUDA, much smaller),'
	@echo '           TORCH_INDEX=<address of a package index> (another torch), PYTHON=<interpreter> (3.11 or newer)'

demo: $(EMPTY) ## run the whole pipeline on real digits, from data to a promoted model, in a few minutes
	@$(RUN) python -m flows $(if $(RECIPE),--recipe $(RECIPE))

test: $(EMPTY) ## run the tests (about 11 minutes on two quiet cores)
	@$(EXTRAS) judges huggingface)
	@$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not proof and not chaos'

test-library: $(INSTALLED) ## run the tests of the maths alone (about 70 seconds)
	@$(RUN) pytest -n 2 -m 'not proof and not chaos' tests/diffusion tests/training tests/networks/test_unet.py \
		tests/scores/test_fidelity.py tests/scores/test_intervals.py

proof: $(EMPTY) ## run the slow proofs, and the tests on mutants of the source
	@$(EXTRAS) judges huggingface mutation notebook)
	@$(RUN) pytest -m proof

chaos: $(EMPTY) ## inject real faults: kills, full disks, dead servers
	@$(EXTRAS) dask kubernetes)
	@$(RUN) pytest -m chaos

bench: $(EMPTY) ## measure speed against other packages and write docs/speed.md (ONLY=train: one row)
	@$(PIP) --quiet $(PEERS)
	@$(RUN) python -m bench $(ONLY)

pictures: $(INSTALLED) ## redraw docs/images from the results of `make demo` (except curve-*.png: python -m bench.curves draw)
	@$(RUN) python docs/draw_pictures.py

wheels: $(INSTALLED) ## download the packages of `make bench` for a GPU machine without a package index to .cifar10/wheels (FOR=3.12: its Python)
	@test -n "$(FOR)" || { echo 'make wheels: name the Python version of the GPU machine, such as FOR=3.12' >&2; exit 2; }
	@rm -rf .cifar10/wheels
	@.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version '$(FOR)' \
		--dest .cifar10/wheels $(PEERS) $$(grep -oE '^($(GPU_PACKAGES))==[^ ]+' requirements.lock)
	@ls .cifar10/wheels

up: $(EMPTY) ## run a Prefect server, an MLflow server and a worker until Ctrl-C
	@$(RUN) python -m flows.servers.up

ui: $(EMPTY) ## run MLflow's server alone
	@$(RUN) python -m flows.servers.up mlflow

remote: $(INSTALLED) ## store DVC's results in S3: URL=s3://bucket/folder, and ENDPOINT=<address> unless the server is Amazon's
	@test -n "$(URL)" || { echo 'make remote: name the bucket: URL=s3://bucket/folder' >&2; exit 2; }
	@$(RUN) dvc remote add --quiet --force --default storage '$(URL)'
	@$(RUN) dvc remote modify storage verify true
	@$(if $(ENDPOINT),$(RUN) dvc remote modify storage endpointurl '$(ENDPOINT)')
	@echo 'wrote .dvc/config; commit this file, so that every clone uses this remote. `dvc push --run-cache` uploads, `dvc pull --run-cache` downloads'

check: $(INSTALLED) ## check format, lint, types, imports, Dockerfile, compose.yaml, known vulnerabilities
	@$(RUN) ruff format --check
	@$(RUN) ruff check
	@$(RUN) mypy
	@$(RUN) lint-imports
	@$(RUN) hadolint Dockerfile
	@$(RUN) check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	@$(RUN) python deploy/audit.py

audit: $(INSTALLED) ## list known vulnerabilities of the packages in requirements.lock
	@$(RUN) python deploy/audit.py

sbom: $(INSTALLED) ## write a bill of materials of requirements.lock (CycloneDX) to build/sbom.json
	@mkdir -p build
	@$(RUN) cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json
	@echo build/sbom.json

image: ## build the container image with buildah (docs/deploy.md)
	@deploy/image.sh

clean: ## remove outputs and caches; DVC's cache, MLflow's and Prefect's records and .venv stay
	rm -rf auto.json dataset models snapshots samples metrics report schedules *.run.json
	rm -rf .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dvc_plots test-output
	@echo 'kept: .dvc/cache (`dvc checkout` restores the outputs), imported, mlflow.db, mlartifacts, .prefect, .venv'

lock: .venv/bin/uv ## update requirements.lock from pyproject.toml (UPGRADE=1: newest versions)
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--extra pipeline --extra dev --group files $(if $(UPGRADE),--upgrade) pyproject.toml --output-file requirements.lock

.venv/bin/uv:
	@test -n "$(PYTHON)" || { echo 'make: no Python 3.11 or newer with venv found; name one: make PYTHON=/path/to/python3' >&2; exit 2; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check '$(UV)'

# The stamp file is written last, so that an interrupted installation is repeated.
$(INSTALLED): requirements.lock pyproject.toml | .venv/bin/uv
	@rm -f $@
	@$(if $(filter-out cpu,$(TORCH)),echo 'make: TORCH=$(TORCH): the only value is cpu; TORCH_INDEX names another index' >&2; exit 2)
	@echo 'installing into .venv'
ifneq ($(TORCH_INDEX),)
	@$(PIP) --compile-bytecode --reinstall --default-index '$(TORCH_INDEX)' \
		$$(grep -oE '^(torch|torchvision)==[^ ]+' requirements.lock)
	@echo '$(TORCH_INDEX)' >.venv/torch-index
	@sed -E '/^(cuda-|nvidia-|torch==|torchvision==|triton==)/,/[^\\]$$/d' requirements.lock >.venv/requirements.txt
else
	@$(if $(GPU),,.venv/bin/python -c 'import torch' 2>/dev/null || \
		echo 'No NVIDIA GPU was found on this machine, but 2.8 of the 2.9 GB to download are for GPUs. To skip them, press Ctrl-C and run' \
		'`TORCH=cpu make $(MAKECMDGOALS)$(if $(MAKEOVERRIDES), $(MAKEOVERRIDES))`, which takes torch from $(CPU_INDEX)')
	@cp requirements.lock .venv/requirements.txt
endif
	@$(PIP) --compile-bytecode --require-hashes --requirements .venv/requirements.txt
	@$(PIP) --no-build-isolation --editable .
	@$(ATOMIC)
	@.venv/bin/python -m compileall -q bench ddpm flows
	@touch $@

# Prefect and MLflow take ten seconds to create their tables. So empty databases are created once and then copied.
$(EMPTY): $(INSTALLED)
	@rm -rf .venv/share/prefect
	@PREFECT_HOME='$(CURDIR)/.venv/share/prefect' .venv/bin/prefect server database upgrade --yes >/dev/null & prefect=$$!; \
		.venv/bin/python -c 'from ddpm.tracking.place import make_empty; make_empty()'; made=$$?; wait $$prefect && exit $$made
	@touch $@
