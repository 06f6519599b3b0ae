"""Checks a fresh clone: the lock file, and the installation from that file by the Makefile."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, GROUPS = CONFIG["project"], CONFIG["dependency-groups"]


def locked() -> list[tuple[Requirement, str]]:
    """Returns each package of the lock, with its text in the lock."""
    entries = re.split(r"(?m)^(?=[a-z0-9])", LOCK)
    return [(Requirement(entry.split("\\")[0].strip()), entry) for entry in entries if entry.strip()]


def test_the_lock_names_no_address_and_has_a_hash_for_everything() -> None:
    assert "://" not in LOCK
    assert len(locked()) > 200
    for requirement, entry in locked():
        assert re.fullmatch(r"==[^,]+", str(requirement.specifier)), requirement
        assert "--hash=sha256:" in entry, requirement


def test_the_lock_answers_every_requirement_of_the_project() -> None:
    versions: dict[str, list[str]] = {}
    for requirement, _ in locked():
        versions.setdefault(canonicalize_name(requirement.name), []).append(next(iter(requirement.specifier)).version)
    extras = PROJECT["optional-dependencies"]
    assert extras["pipeline"][0] == "ddpm[cli]"
    checkout = (extras["cli"], extras["pipeline"][1:], extras["dev"], GROUPS["files"])
    for text in (*PROJECT["dependencies"], *chain.from_iterable(checkout)):
        wanted = Requirement(text)
        assert canonicalize_name(wanted.name) in versions, f"{wanted}: run `make lock`"
        for version in versions[canonicalize_name(wanted.name)]:
            assert wanted.specifier.contains(version), f"{wanted}: {version} is locked; run `make lock`"


def test_what_is_installed_is_what_is_locked() -> None:
    if not (Path(sys.prefix) / "installed").exists():
        pytest.skip("this environment was not made by make")
    installed = {canonicalize_name(item.name): item.version.partition("+")[0] for item in distributions()}
    environment = {key: str(value) for key, value in default_environment().items()}
    for requirement, _ in locked():
        name = canonicalize_name(requirement.name)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            if name.startswith(("nvidia-", "cuda-", "triton")) and name not in installed:
                continue  # a CPU-only torch was chosen
            assert requirement.specifier.contains(installed.get(name, "0")), name


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"(?m)^\.PHONY: (.*)$", makefile)[1].split())  # type: ignore[index]
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines() if line.startswith("make ")} == targets


# Installations by the real Makefile and the real uv. The wheels are made here, and folders serve as package indexes.


def wheel(index: Path, name: str, version: str) -> str:
    """Adds an empty package to a package index. Returns its line for a lock."""
    folder = index / name.replace("_", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = '{version}'\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{file},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for file, text in files.items()
    ]
    files[f"{about}/RECORD"] = "\n".join([*record, f"{about}/RECORD,,"]) + "\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    (folder / "index.html").write_text(
        "".join(f'<a href="{item.name}">{item.name}</a>' for item in folder.glob("*.whl"))
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name.replace('_', '-')}=={version.partition('+')[0]} \\\n    --hash=sha256:{digest}\n"


BACKEND = """\
import zipfile


def build_editable(folder, settings=None, metadata=None):
    name = "ddpm-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("ddpm_editable.pth", "")
        wheel.writestr("ddpm-0.1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: ddpm\\nVersion: 0.1.0\\n")
        wheel.writestr("ddpm-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("ddpm-0.1.0.dist-info/RECORD", "ddpm-0.1.0.dist-info/RECORD,,\\n")
    return name
"""


class Clone:
    """A checkout with a small lock and an installed uv, so that nothing is downloaded."""

    def __init__(self, root: Path) -> None:
        uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
        if uv is None:
            pytest.skip("this environment has no uv: it was not made by make")
        self.root = root / "clone"
        self.index, self.other = root / "index", root / "other"
        self.root.mkdir()
        shutil.copy(ROOT / "Makefile", self.root)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=self.root, check=True)
        (self.root / ".venv" / "bin" / "uv").symlink_to(uv)
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            '[project]\nname = "ddpm"\nversion = "0.1.0"\n'
        )

    def make(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "TORCH"))
        }
        return subprocess.run(
            ["make", ".venv/installed", *arguments],
            cwd=self.root,
            env={
                **environment,
                "UV_DEFAULT_INDEX": self.index.as_uri(),
                "UV_CACHE_DIR": str(self.root.parent / "cache"),
                **variables,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def installed(self) -> set[str]:
        return {
            path.stem for path in self.root.glob(".venv/lib/python*/site-packages/*.py") if path.stem != "_virtualenv"
        }

    def version(self, name: str) -> str:
        return next(self.root.glob(f".venv/lib/python*/site-packages/{name}.py")).read_text()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_an_interrupted_installation_is_done_again_and_a_whole_one_is_not(clone: Clone) -> None:
    good = wheel(clone.index, "good", "1.0")
    lock, stamp = clone.root / "requirements.lock", clone.root / ".venv" / "installed"
    lock.write_text(good + "missing==1.0 \\\n    --hash=sha256:" + 64 * "0" + "\n")
    assert clone.make().returncode != 0
    assert not stamp.exists()

    lock.write_text(good)
    done = clone.make()
    assert done.returncode == 0, done.stderr
    assert clone.installed() == {"good"}
    assert list(clone.root.glob(".venv/lib/python*/site-packages/__pycache__/good.*.pyc"))
    assert "up to date" in clone.make().stdout

    lock.write_text(good + wheel(clone.index, "better", "1.0"))
    os.utime(lock, (stamp.stat().st_mtime + 10,) * 2)
    assert clone.make().returncode == 0
    assert clone.installed() == {"good", "better"}


def test_bytecode_is_written_at_installation_only(clone: Clone) -> None:
    (clone.root / "requirements.lock").write_text(wheel(clone.index, "good", "1.0"))
    for name in ("bench", "ddpm", "flows"):
        (clone.root / name).mkdir()
        (clone.root / name / "module.py").touch()
    done = clone.make(
        "--eval", "show: .venv/installed; @echo PYTHONDONTWRITEBYTECODE=$$PYTHONDONTWRITEBYTECODE", "show"
    )
    assert "PYTHONDONTWRITEBYTECODE=1" in done.stdout.splitlines(), done.stderr
    assert len(list(clone.root.glob("*/__pycache__/module.*.pyc"))) == 3


@pytest.mark.parametrize("module", ["flows", "flows.servers.up", "flows.servers.worker", "flows.processes.fork_server"])
def test_a_disk_that_fills_leaves_no_half_of_a_module(module: str, tmp_path: Path) -> None:
    """A limit on file sizes cuts off the bytecode of an edited module, as a full disk does."""
    for name in ("ddpm", "flows"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import runpy, sys; sys.argv = ['flows', '--help']; runpy.run_module('{module}', run_name='imported')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def imported(limit: int) -> str:
        bound = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1)); " if limit else ""
        done = subprocess.run(
            [sys.executable, "-c", bound + code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stderr

    assert imported(8192) == imported(0) == ""
    assert all(path.parent.parent.name == "flows" and path.stat().st_size < 4096 for path in tmp_path.rglob("*.pyc"))


def test_a_changed_wheel_is_refused(clone: Clone) -> None:
    line = wheel(clone.index, "good", "1.0")
    (clone.root / "requirements.lock").write_text(re.sub(r"sha256:.{64}", "sha256:" + 64 * "0", line))
    done = clone.make()
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()
    assert not clone.installed()


def test_another_torch_comes_from_the_index_that_is_named(clone: Clone) -> None:
    names = ("torch", "torchvision", "torch_fidelity", "nvidia_cublas", "cuda_bindings", "triton", "good")
    (clone.root / "requirements.lock").write_text("".join(wheel(clone.index, name, "1.0") for name in names))
    for name in ("torch", "torchvision"):
        wheel(clone.other, name, "1.0+cpu")
    done = clone.make(f"TORCH_INDEX={clone.other.as_uri()}")
    assert done.returncode == 0, done.stderr
    assert clone.installed() == {"torch", "torchvision", "torch_fidelity", "good"}
    assert "1.0+cpu" in clone.version("torch")
    assert "1.0+cpu" in clone.version("torchvision")


def test_the_torch_without_cuda_is_offered_before_the_download_and_kept(clone: Clone, tmp_path: Path) -> None:
    names = ("torch", "torchvision", "nvidia_cublas", "good")
    lock = clone.root / "requirements.lock"
    lock.write_text("".join(wheel(clone.index, name, "1.0") for name in names))
    for name in ("torch", "torchvision"):
        wheel(clone.other, name, "1.0+cpu")
    tools, index = tmp_path / "tools", f"CPU_INDEX={clone.other.as_uri()}"
    tools.mkdir()
    (tools / "nvidia-smi").touch(mode=0o755)
    with_gpu = f"{tools}{os.pathsep}{os.environ['PATH']}"
    offer = "`TORCH=cpu make .venv/installed`, which takes torch from https://download.pytorch.org/whl/cpu"
    broken = {"UV_DEFAULT_INDEX": (tmp_path / "absent").as_uri()}

    before = clone.make(**broken)
    assert before.returncode != 0
    assert not clone.installed()
    if not Path("/proc/driver/nvidia/version").exists():
        assert offer in before.stdout
        assert "2.8 of the 2.9 GB" in before.stdout
        assert f"{offer.partition('`,')[0]} RECIPE=emoji`," in clone.make("RECIPE=emoji", **broken).stdout
    assert offer not in clone.make(**broken, PATH=with_gpu).stdout
    assert "the only value is cpu" in clone.make(TORCH="cuda").stderr

    done = clone.make(index, TORCH="cpu")
    assert done.returncode == 0, done.stderr
    assert offer not in done.stdout
    assert clone.installed() == {"torch", "torchvision", "good"}
    assert "1.0+cpu" in clone.version("torch")

    lock.write_text(lock.read_text() + wheel(clone.index, "better", "1.0"))
    os.utime(lock, ((clone.root / ".venv" / "installed").stat().st_mtime + 10,) * 2)
    assert clone.make().returncode == 0
    assert clone.installed() == {"torch", "torchvision", "good", "better"}
    assert "1.0+cpu" in clone.version("torch")


def test_no_python_is_one_clear_line(clone: Clone) -> None:
    shutil.rmtree(clone.root / ".venv")
    (clone.root / "requirements.lock").write_text("")
    done = clone.make("PYTHON=")
    assert done.returncode != 0
    assert "no Python 3.11 or newer" in done.stderr.splitlines()[0]
    assert not (clone.root / ".venv" / "installed").exists()


def test_git_sees_no_images_of_your_own(tmp_path: Path) -> None:
    """git also sees images/README.md, which keeps the folder there, because data.path is a dependency of `prepare`."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    for name in ("images/README.md", "images/cats/1.png", "images/2.zip"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    asked = ["git", "ls-files", "--others", "--exclude-standard"]
    shown = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert shown.split() == [".gitignore", "images/README.md"]
