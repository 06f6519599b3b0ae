"""Names every file that the pipeline reads or writes.

Layout, below the root of a checkout. POINT is SCHEDULE-SAMPLER-STEPS, the name of a point of the sweep. `*.run.json` files lie
beside outputs and are not tracked.

    auto.json                     the values that `auto` in params.yaml stands for, found by the stage `probe`
    dataset/                      train.npy, test.npy (uint8 N,C,H,W), *-labels.npy (int64 N), dataset.json, preview.png
    models/SCHEDULE/              model.safetensors, model.json
    snapshots/SCHEDULE/           averages of the weights after some steps (training.snapshot_every); snapshots.json
    imported/NAME/                model.safetensors, model.json of an imported model, which `ddpm train NAME` copies
    samples/POINT.npz, .png       images (uint8 N,C,H,W), evaluations, labels (int64 N, if conditional); a preview grid
    metrics/POINT.json            scores of a point; POINT.influence.npy: the influence of each image on the FID (float32 N).
                                  If evaluation.judges lists J more scores, the array is float32 1+J,N: row 0 belongs to the
                                  FID, and each further row to one of these scores
    metrics/train/SCHEDULE.json   last training and validation loss; SCHEDULE.csv their curves; SCHEDULE.by_time.csv the
                                  validation loss in each range of the time t
    metrics/likelihood/SCHEDULE.json  bits per dimension; SCHEDULE.csv the rate-distortion curve
    report/                       index.html, points.csv, best.json, front.json, samples.png, fid.png; run.js (not tracked)
    schedules/                    table.csv, snr.png, strip.png (not tracked)

Writing is atomic: a file or folder is complete or absent. Reading is verified: each JSON record holds the hash of its own
content and of the files that it describes. The code that reads those files compares the hashes.
"""

from __future__ import annotations

from pathlib import Path

from ddpm.parameters import Point

CACHE = Path(".cache")  # files kept across runs, outside DVC: resume states, converted weights, reference features
PREVIEW = 64  # the number of images in the grid of a sample set
REPORT_SCRIPT = Path("report") / "run.js"  # times and comparisons for the report's page; DVC does not track this file
SPEED_PLOT = CACHE / "speed.json"  # the latest plot of scores against seconds, for the report's page
CHART = CACHE / "mlflow-chart"  # holds the end of the address of MLflow's chart of scores against steps


# All paths are relative to the root of a checkout.


def auto_file() -> Path:
    return Path("auto.json")


def dataset_dir() -> Path:
    return Path("dataset")


def model_dir(schedule: str) -> Path:
    return Path("models") / schedule


def snapshots_dir(schedule: str) -> Path:
    return Path("snapshots") / schedule


def imported_dir(name: str) -> Path:
    return Path("imported") / name


def samples_file(point: Point) -> Path:
    return Path("samples") / f"{point.name}.npz"


def metrics_file(point: Point) -> Path:
    return Path("metrics") / f"{point.name}.json"


def influence_file(point: Point) -> Path:
    return Path("metrics") / f"{point.name}.influence.npy"


def training_metrics_file(schedule: str) -> Path:
    return Path("metrics") / "train" / f"{schedule}.json"


def history_file(schedule: str) -> Path:
    return Path("metrics") / "train" / f"{schedule}.csv"


def losses_by_time_file(schedule: str) -> Path:
    return Path("metrics") / "train" / f"{schedule}.by_time.csv"


def likelihood_file(schedule: str) -> Path:
    return Path("metrics") / "likelihood" / f"{schedule}.json"


def likelihood_curve_file(schedule: str) -> Path:
    return Path("metrics") / "likelihood" / f"{schedule}.csv"


def preview_fids_file(schedule: str) -> Path:
    return CACHE / "previews" / schedule / "fids.json"


def downloads_dir(source: str) -> Path:
    return CACHE / "downloads" / source


def schedules_dir() -> Path:
    return Path("schedules")


def report_dir() -> Path:
    return Path("report")


def run_file(output: Path) -> Path:
    """Returns the untracked file beside an output that records when, where and how fast the output was made."""
    return output.with_name(output.name.removesuffix(output.suffix) + ".run.json")
