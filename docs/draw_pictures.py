"""`make pictures`: remakes the pictures in docs/images from the one run that `make demo` left in this checkout.

The pictures are plots of the report, screenshots of the report and of MLflow, and outputs of the commands in the docs.
curve-*.png are not among them: `python -m bench.curves draw` draws those from measurements of longer trainings.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from playwright.sync_api import Browser, Page, expect, sync_playwright

from ddpm.files import paths
from flows import links
from flows.servers import access

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "images"
MODEL = "ddpm-mnist"  # the registered model of the demo
COMMAND = re.compile(r"^\s*(?:\$ )?ddpm (generate .*) -o (\w+)\.png$", re.MULTILINE)  # as docs/generate.md shows it
POINTS = """card => card.querySelector('.js-plotly-plot').data.filter(line => line.mode.includes('markers'))
    .flatMap(line => line.x.map((steps, index) => [`${line.name}-${steps}`, line.y[index]]))"""


def require_demo() -> None:
    """Exits with one line unless `make demo` has run here and the report, with all stages before it, is up to date."""
    if missing := [name for name in ("report/index.html", "mlflow.db", str(paths.CHART)) if not (ROOT / name).exists()]:
        sys.exit(f"make pictures: {', '.join(missing)}: not there; run `make demo` first")
    if shutil.which("chromium") is None:
        sys.exit("make pictures: chromium is not installed: apt-get install chromium")
    dvc = [sys.executable, "-m", "dvc", "status", "--json", "--with-deps", "report"]
    status = subprocess.run(dvc, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    if changed := json.loads(status.stdout):
        sys.exit(
            f"make pictures: `dvc status` finds {len(changed)} changed stages, report or before; run `make demo` first"
        )


def ddpm(*arguments: str) -> None:
    """Runs `ddpm ARGUMENTS` in this checkout. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "ddpm", *arguments], cwd=ROOT, check=True)


def draw_by_commands(folder: Path) -> None:
    """Runs the commands that docs/generate.md, docs/schedules.md and docs/swiss-roll.md show, and keeps the pictures.

    folder: an empty folder for the files that `ddpm generate` writes beside a picture.
    """
    commands = COMMAND.findall((ROOT / "docs" / "generate.md").read_text(encoding="utf-8"))
    if not commands:
        raise ValueError("docs/generate.md shows no `ddpm generate ... -o NAME.png`")
    for command, name in commands:
        ddpm(*shlex.split(command), "-o", str(folder / f"{name}.png"))
        shutil.copyfile(folder / f"{name}.png", PICTURES / f"generate-{name}.png")
    ddpm("schedules")
    for name in ("snr", "strip"):
        shutil.copyfile(ROOT / paths.schedules_dir() / f"{name}.png", PICTURES / f"schedules-{name}.png")
    ddpm("swiss-roll", "--out", str(PICTURES / "swiss-roll.png"))


@contextmanager
def mlflow_server(log: Path) -> Iterator[str]:
    """Runs the server of `make ui` on a free port during the block, and yields its address. Raises RuntimeError if it ends."""
    with socket.create_server((access.LOOPBACK, 0)) as probe:
        port = str(probe.getsockname()[1])
    address = f"http://{access.LOOPBACK}:{port}"
    others = ("HOST", "MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI")
    environment = {name: value for name, value in os.environ.items() if name not in others} | {"MLFLOW_PORT": port}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "flows.servers.up", "mlflow"]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not access.answers(f"{address}/health"):
            if server.poll() is not None:
                raise RuntimeError(f"MLflow's server has ended:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def open_page(browser: Browser, address: str, width: int, height: int) -> Page:
    """Opens an address in a fresh profile. width, height: of the visible part, in pixels."""
    context = browser.new_context(viewport={"width": width, "height": height}, locale="en-GB", timezone_id="UTC")
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(address, wait_until="domcontentloaded")
    return page


def shoot_chart(browser: Browser, server: str) -> None:
    """Shoots MLflow's chart, with the samples at the last step. Raises ValueError if its FIDs are not the report's."""
    page = open_page(
        browser, links.mlflow(ROOT, server), 1280, 1430
    )  # shows all cards; others are drawn only on scrolling
    page.get_by_role("button", name="Close").click()  # the assistant
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    fid = cards.filter(has_text=re.compile("^fid"))
    fid.locator(".scatterlayer .trace").first.wait_for()
    with (ROOT / "report" / "points.csv").open(encoding="utf-8", newline="") as file:
        reported = {row["point"]: float(row["fid"]) for row in csv.DictReader(file)}
    if (shown := dict(fid.evaluate(POINTS))) != reported:
        raise ValueError(f"MLflow's chart shows {shown}, report/points.csv {reported}")
    images = cards.filter(has_text=re.compile("^samples"))
    images.scroll_into_view_if_needed()
    first = images.locator("img").first
    real: Any = first.get_attribute("src")  # at step 0
    track: Any = images.locator(".TRACK").bounding_box()
    page.mouse.click(track["x"] + track["width"] - 2, track["y"] + track["height"] / 2)
    expect(first).not_to_have_attribute("src", real)
    first.evaluate("image => image.decode()")  # waits until the image is loaded
    page.screenshot(path=PICTURES / "mlflow-chart.png")


def shoot_champion(browser: Browser, server: str) -> None:
    """Shoots MLflow's page of the champion's version."""
    query = f"{server}/api/2.0/mlflow/registered-models/alias?name={MODEL}&alias=champion"
    with urlopen(query, timeout=60) as answer:
        version = json.load(answer)["model_version"]["version"]
    page = open_page(browser, f"{server}/#/models/{MODEL}/versions/{version}", 1280, 900)
    page.get_by_role("button", name="Close").click()  # the assistant
    page.get_by_text("95% interval").locator("visible=true").first.wait_for()
    page.screenshot(path=PICTURES / "mlflow-version.png")


def main() -> None:
    require_demo()
    os.environ.update(access.direct(os.environ))
    for name in ("fid.png", "samples.png"):
        shutil.copyfile(ROOT / "report" / name, PICTURES / name)
    with tempfile.TemporaryDirectory(prefix="ddpm-pictures-") as folder:
        with mlflow_server(Path(folder, "server.log")) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = open_page(browser, (ROOT / "report" / "index.html").as_uri(), 1120, 1290)
            page.screenshot(path=PICTURES / "report.png")
            shoot_chart(browser, server)
            shoot_champion(browser, server)
        draw_by_commands(Path(folder))


if __name__ == "__main__":
    main()
