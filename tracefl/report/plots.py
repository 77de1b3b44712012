"""Plots of a run, as PNG and PDF."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

mpl.use("Agg")
# Okabe and Ito's palette: distinguishable by the colour-blind, and in grey by line style.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"


def plot_rounds(rounds: pd.DataFrame, folder: Path) -> list[Path]:
    """Accuracy of the global model and of localization by round, with the chance level drawn in."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    lines = [
        ("accuracy", "global model", BLACK, "-", "o"),
        ("localization_accuracy", "localization", BLUE, "-", "s"),
        ("chance_accuracy", "localization by chance", BLUE, ":", None),
        ("top_holder_accuracy", "top holder named", ORANGE, "--", "^"),
        ("top_holder_chance", "top holder by chance", ORANGE, ":", None),
    ]
    for column, label, colour, style, marker in lines:
        if column in rounds:
            axes.plot(rounds["round"], 100 * rounds[column], style, color=colour, marker=marker, label=label, ms=4)
    axes.set(xlabel="round", ylabel="accuracy (%)", ylim=(-2, 102))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"rounds.{kind}" for kind in ("png", "pdf")]
    for file in files:
        figure.savefig(file, dpi=200)
    return files
