"""The pictures of one run (ROC, score histogram, generated beside training images)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffmia_exp import metrics
from diffmia_exp.data import Pixels
from diffmia_exp.scores import ScoreTable

MEMBER, HELD_OUT, INK = "#c2410c", "#1d4ed8", "#334155"


def _axes(width: float, height: float, left: float = 0.75, bottom: float = 0.55) -> tuple[Figure, Axes]:
    """A figure and its axes, in inches: margins that are known take half of the time of margins that are measured."""
    figure = Figure(figsize=(width, height), dpi=120)
    axes = figure.add_axes((left / width, bottom / height, (width - left - 0.15) / width, (height - bottom - 0.35) / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


def roc(path: Path, table: ScoreTable, title: str) -> None:
    """The exact ROC curve on log-log axes, down to the smallest FPR that the non-members resolve."""
    curve = metrics.roc(table.is_member, table.score)
    floor = 1 / int((~table.is_member).sum())
    area, (low, high) = metrics.auc(table.is_member, table.score)
    figure, axes = _axes(4.8, 4.6)
    # A step curve: between two thresholds the larger FPR buys nothing. Zero FPR stands at the left edge.
    fpr = np.concatenate([[floor / 2], np.maximum(curve.fpr, floor / 2), [1]])
    tpr = np.concatenate([[curve.tpr[0]], curve.tpr, [1]])
    axes.plot(fpr, tpr, drawstyle="steps-post", color=MEMBER, lw=2, label=f"AUC {area:.3f} [{low:.3f}, {high:.3f}]")
    chance = np.geomspace(floor / 2, 1, 50)
    axes.plot(chance, chance, color=INK, lw=1, ls="--", label="chance")
    axes.axvspan(floor / 2, floor, color=INK, alpha=0.08, lw=0, label=f"below 1/{round(1 / floor)}: not resolved")
    axes.set(xscale="log", yscale="log", xlim=(floor / 2, 1), ylim=(floor / 2, 1.05))
    axes.minorticks_off()
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.set_title(title, fontsize=10, color=INK)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.grid(True, which="major", alpha=0.25)
    figure.savefig(path)


def histogram(path: Path, table: ScoreTable, title: str) -> None:
    """Scores of members and non-members; a long tail is drawn within the 0.5% to 99.5% range and said so."""
    low, high = np.quantile(table.score, [0.005, 0.995])
    bins = np.linspace(low, high if high > low else low + 1, 41).tolist()
    figure, axes = _axes(5.6, 3.4)
    for mask, colour, name in ((table.is_member, MEMBER, "members"), (~table.is_member, HELD_OUT, "non-members")):
        clipped = np.clip(table.score[mask], bins[0], bins[-1])
        axes.hist(clipped, bins=bins, color=colour, alpha=0.5, label=f"{name} ({mask.sum()})")
        axes.hist(clipped, bins=bins, color=colour, histtype="step", lw=1.5)
    axes.set(xlabel="score (higher = member; outer 1% drawn at the edges)", ylabel="images")
    axes.set_title(title, fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def samples(path: Path, generated: Pixels, members: Pixels, side: int = 8) -> None:
    """A grid of generated images beside one of training images, uint8 [n, C, H, W] each."""
    figure = Figure(figsize=(7.2, 3.9), dpi=120)
    panels = figure.subplots(1, 2, gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.01, "top": 0.92, "wspace": 0.03})
    for axes, pixels, name in zip(panels, (generated, members), ("generated", "training images"), strict=True):
        axes.imshow(_grid(pixels[: side * side], side, side), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(name, fontsize=10, color=INK)
        axes.set_axis_off()
    figure.savefig(path)


def near_copies(path: Path, generated: Pixels, training: Pixels, ratio: NDArray[np.float64], columns: int = 4) -> None:
    """Pairs side by side, a generated image and the training image it comes closest to, uint8 [k, C, H, W], with the ratio [k]."""
    rows = -(-len(ratio) // columns)
    figure, axes = _axes(7.2, 0.5 + 1.1 * rows, left=0.15, bottom=0.05)
    sheet = _grid(np.stack([generated, training], 1).reshape(-1, *generated.shape[1:]), 2 * columns, rows)
    lines = sheet.reshape(rows, -1, *sheet.shape[1:])
    label = -(-lines.shape[1] // 4)  # pixels of white above each row of pairs
    lines = np.pad(lines, [(0, 0), (label, 0)] + [(0, 0)] * (lines.ndim - 2), constant_values=255)
    axes.imshow(lines.reshape(-1, *sheet.shape[1:]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for n, r in enumerate(ratio):
        axes.text(n % columns * sheet.shape[1] / columns, n // columns * lines.shape[1], f"{r:.2f}", fontsize=8, color=INK, va="top")
    axes.set_axis_off()
    axes.set_title("generated image | nearest training image; ratio of distances (a copy below 0.50)", fontsize=9, color=INK)
    figure.savefig(path)


def _grid(pixels: Pixels, columns: int, rows: int) -> Pixels:
    n, c, h, w = pixels.shape
    sheet = np.full((rows, columns, c, h + 1, w + 1), 255, np.uint8)
    sheet.reshape(rows * columns, c, h + 1, w + 1)[:n, :, :h, :w] = pixels
    sheet = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * (h + 1), columns * (w + 1), c)
    return sheet[..., 0] if c == 1 else sheet
