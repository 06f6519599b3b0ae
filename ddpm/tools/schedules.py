"""`schedules`: compares the noise schedules of params.yaml: a table, a plot of signal-to-noise ratios, and noised images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm.diffusion.forward import BANDS, Summary, noised, summary
from ddpm.diffusion.noise import gaussian
from ddpm.diffusion.schedule import SCHEDULES, NoiseSchedule
from ddpm.errors import InputError
from ddpm.files import arrays, checkpoint, models, paths, records
from ddpm.files.dataset import read_dataset
from ddpm.files.params import Params
from ddpm.parameters import Diffusion
from ddpm.reporting.diagnostics import data_mean_square, schedule_of
from ddpm.reporting.plots import COLOURS, DASHES, drawing
from ddpm.tools.load import located

BAND_NAMES = ("< 1e-4", "1e-4 - 0.01", "0.01 - 1", "1 - 100", "> 100")
BAND_COLOURS = ("#08306b", "#2171b5", "#6baed6", "#bdd7e7", "#f7f7f7")  # one hue, from noise to image
SHOWN = (-8.0, 4.0)  # log10 of the lowest and highest signal-to-noise ratio in the plot
COLUMNS = 11  # the number of columns of the strip


def schedules(
    params: Params | None,
    root: Path = Path(),
    out: Path | None = None,
    timesteps: int | None = None,
    model: str = "",
) -> tuple[dict[str, Summary], str]:
    """Writes table.csv, snr.png and, if there is a prepared dataset, strip.png.

    Args:
        params: the content of params.yaml, whose section `schedules` is shown; None for every schedule of SCHEDULES.
        root: the top of the checkout.
        out: the folder to write to; None for schedules/.
        timesteps: T; None for the T of the parameters or of the model.
        model: a checkpoint folder or the name of a registered model. Then only the schedule of this model is shown.

    Returns:
        A summary of each schedule, and a line about T and the data.

    Raises:
        InputError: a row of `schedules` is invalid, the model cannot be read, or `out` is a file.
    """
    built = _of_model(model, timesteps) if model else _of_rows(params, timesteps)
    T, seed = next(iter(built.values())).T, params.seed if params else 0
    folder = paths.schedules_dir() if out is None else out
    if (root / folder).exists() and not (root / folder).is_dir():
        raise InputError(f"{folder}: is a file, not a folder; name a folder with --out")
    dataset = None
    if (root / paths.dataset_dir() / "dataset.json").exists():
        dataset = read_dataset(root)
        mean_square = data_mean_square(dataset.record)
        line = f"T = {T:,}, E[x_0^2] = {mean_square:.3g} of {dataset.record.name}"
    else:
        mean_square = 0.25
        line = f"T = {T:,}, E[x_0^2] assumed to be 0.25; for the true value and strip.png, run `ddpm prepare` first"
    rows = {name: summary(schedule, mean_square) for name, schedule in built.items()}
    records.write_csv(root / folder / "table.csv", [_cells(name, row) for name, row in rows.items()])
    _plot(root / folder / "snr.png", built, rows)
    strip = root / folder / "strip.png"
    if dataset is not None:
        index = int(np.random.default_rng(seed).integers(len(dataset.train)))
        _plot_strip(strip, built, dataset.train[index], seed)
    else:
        strip.unlink(missing_ok=True)
    return rows, line


def _of_model(model: str, timesteps: int | None) -> dict[str, NoiseSchedule]:
    with located(model) as (folder, _):
        entry = models.read_model_record(folder).schedule
        try:
            return {entry.name: checkpoint.noise_schedule(replace(entry, timesteps=timesteps or entry.timesteps))}
        except (TypeError, ValueError) as error:
            raise models.unusable(folder, str(error)) from None


def _of_rows(params: Params | None, timesteps: int | None) -> dict[str, NoiseSchedule]:
    if params is None:
        return {name: NoiseSchedule.named(name, timesteps or Diffusion.timesteps) for name in SCHEDULES}
    T = timesteps or params.diffusion.timesteps
    return {name: schedule_of(params, name, T) for name in params.schedules}


def _cells(name: str, row: Summary) -> dict[str, Any]:
    shares = {f"snr {band}": f"{share:.6g}" for band, share in zip(BAND_NAMES, row.shares, strict=True)}
    numbers = {"alpha_bar_T": f"{row.alpha_bar:.10g}", "snr_T": f"{row.snr:.10g}", "prior": f"{row.prior:.6g}"}
    return {"schedule": name, "T": row.T, **numbers, **shares, "warnings": "; ".join(row.warnings)}


def _plot(path: Path, built: dict[str, NoiseSchedule], rows: dict[str, Summary]) -> None:
    """Plots the signal-to-noise ratio over t, and beside this plot the share of the steps in each band of the ratio."""
    with drawing(path, 1350, 240 + 60 * max(len(built), 5), dpi=120) as page:
        curves, bars = page.subplots(1, 2, width_ratios=(3, 4))
        for i, (name, schedule) in enumerate(built.items()):
            t = np.arange(1, schedule.T + 1) / schedule.T
            with np.errstate(divide="ignore"):
                log_snr = np.log10(schedule.snr[1:].numpy())
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            curves.plot(t, np.maximum(log_snr, SHOWN[0] - 1), label=name, **style)
        curves.set_ylim(*SHOWN)
        ticks = range(int(SHOWN[0]), int(SHOWN[1]) + 1, 2)
        curves.set_yticks(list(ticks), [f"$10^{{{tick}}}$" for tick in ticks])
        for edge in BANDS:
            curves.axhline(np.log10(edge), color="grey", linewidth=0.8, linestyle=":")
        curves.set_xlabel("t / T")
        curves.set_ylabel("signal-to-noise ratio")
        curves.set_title(f"T = {next(iter(rows.values())).T:,}", fontsize="medium")
        curves.legend(fontsize="small")
        for i, row in enumerate(rows.values()):
            left = 0.0
            for band, share in enumerate(row.shares):
                bars.barh(i, share, left=left, color=BAND_COLOURS[band], edgecolor="black", linewidth=0.5)
                if share >= 0.05:
                    colour = "white" if band < 2 else "black"
                    bars.text(left + share / 2, i, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
                left += share
        bars.set_yticks(range(len(rows)), list(rows))
        bars.invert_yaxis()
        bars.set_xlim(0, 1)
        bars.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
        bars.set_xlabel("share of the steps, by signal-to-noise ratio")
        names = zip(BAND_COLOURS, BAND_NAMES, strict=True)
        handles = [
            bars.barh(0, 0, color=colour, edgecolor="black", linewidth=0.5, label=band) for colour, band in names
        ]
        bars.legend(handles=handles, ncols=5, fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
        page.set_layout_engine("tight")


def _plot_strip(path: Path, built: dict[str, NoiseSchedule], image: arrays.Images, seed: int) -> None:
    """Draws x_0, ..., x_T of one image, a row per schedule. All rows use the same noise, so that columns can be compared.

    Args:
        path: the PNG file to write.
        built: the schedules by name.
        image: the image x_0, uint8 C,H,W.
        seed: the seed of the noise.
    """
    x_0 = torch.from_numpy(np.array(image)).double() / 127.5 - 1
    eps = gaussian(seed, [0], 0, x_0.shape)[0].double()
    strips = []
    for schedule in built.values():
        x = noised(schedule, x_0, torch.arange(COLUMNS) * schedule.T // (COLUMNS - 1), eps)
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        strips.append(arrays.grid(pixels, columns=COLUMNS).transpose(1, 2, 0))
    label, top, gap = 110, 24, 4  # pixels
    height, width = strips[0].shape[:2]
    total = top + len(strips) * (height + gap)
    with drawing(path, label + width, total, dpi=100) as page:
        for index, (name, strip) in enumerate(zip(built, strips, strict=True)):
            bottom = (len(strips) - 1 - index) * (height + gap)
            page.figimage(np.broadcast_to(strip, (*strip.shape[:2], 3)), xo=label, yo=bottom, origin="upper")
            page.text(
                (label - 8) / (label + width), (bottom + height / 2) / total, name, ha="right", va="center", fontsize=9
            )
        for column in range(COLUMNS):
            x = (label + (column + 0.5) * width / COLUMNS) / (label + width)
            text = "t = 0" if column == 0 else "T" if column == COLUMNS - 1 else f"{column / (COLUMNS - 1):g} T"
            page.text(x, 1 - top / 2 / total, text, ha="center", va="center", fontsize=9)
