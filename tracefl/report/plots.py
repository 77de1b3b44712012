"""Figures, each as PNG and PDF: one function per figure, from tables to a file.

The colours are Okabe and Ito's, which colour-blind readers can tell apart; line styles and markers
differ too, for grey print. Localization is never drawn without its chance level. Columns are those
of rounds.csv.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

mpl.use("Agg")
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
# column of rounds.csv, label, style; a column that the table lacks is not drawn
CURVES: list[tuple[str, str, dict[str, Any]]] = [
    ("accuracy", "global model", {"color": BLACK, "ls": "-", "marker": "o"}),
    ("localization_accuracy", "localization (paper)", {"color": BLUE, "ls": "-", "marker": "s"}),
    ("localization_accuracy_influence", "localization (influence)", {"color": VERMILION, "ls": "-", "marker": "D"}),
    ("feddebug_accuracy", "localization (FedDebug)", {"color": PURPLE, "ls": "-.", "marker": "v"}),
    ("chance_accuracy", "localization by chance", {"color": BLUE, "ls": ":"}),
    ("top_holder_accuracy", "top holder named (paper)", {"color": ORANGE, "ls": "--", "marker": "^"}),
    ("top_holder_chance", "top holder by chance", {"color": ORANGE, "ls": ":"}),
]
PALETTE, HATCHES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK), ("", "//", "..", "xx")
PANEL = (3.4, 2.4)  # inches
DPI, KINDS = 200, ("png", "pdf")  # of the files


def plot_accuracies(tables: Mapping[str, pd.DataFrame], x: str, file: Path) -> None:
    """Accuracy of the global model and of localization in percent, a panel per table.

    Args:
        tables: a panel's title -> table with the columns of rounds.csv, and `x`.
        x: the column to draw against: round, or a setting of the runs.
        file: the figure's, without suffix.
    """
    columns, handles = min(len(tables), 4), dict[str, Artist]()
    rows = -(-len(tables) // columns)
    figure = Figure(figsize=(max(PANEL[0] * columns, 6), PANEL[1] * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (title, table) in zip(panels.flat, tables.items(), strict=False):
        for column, label, style in CURVES:
            if column in table and table[column].notna().any():
                (handles[label],) = axes.plot(table[x], 100 * table[column], label=label, ms=4, lw=1.4, **style)
        axes.set(xlabel=x, ylim=(-3, 103), xticks=sorted(table[x].unique()))
        axes.set_title(textwrap.fill(title, 40), fontsize=8)
        axes.grid(alpha=0.3)
        if x == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for first in panels[:, 0]:
        first.set_ylabel("accuracy (%)")
    for unused in panels.flat[len(tables) :]:
        unused.set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, file)


def plot_contributions(answers: pd.DataFrame, class_names: Sequence[str], file: Path) -> None:
    """Who contributed to which prediction: inputs by clients, the last round, one panel per method.

    Shares are scaled to [-1, 1] per input; a green dot marks the client that holds the most
    examples of the label.
    """
    last = answers[answers["round"] == answers["round"].max()]
    methods = list(last["method"].unique())
    clients = sorted(last["client"].unique(), key=lambda name: (len(name), name))
    rows = last[["input", "predicted"]].drop_duplicates().sort_values(["predicted", "input"])
    size = (max(3.0, 0.28 * len(clients)) * len(methods) + 1.2, max(2.0, 0.18 * len(rows)) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    for axes, method in zip(np.atleast_1d(figure.subplots(1, len(methods), sharey=True)), methods, strict=True):
        part = last[last["method"] == method]
        cells = part.pivot(index="input", columns="client").reindex(rows["input"])
        shares, held = (cells[name][clients].to_numpy() for name in ("contribution", "label_examples"))
        shares = shares - shares.mean(axis=1, keepdims=True) if method == "neuron" else shares
        scaled = shares / np.abs(shares).max(axis=1, keepdims=True).clip(1e-300)
        image = axes.imshow(scaled, cmap="PuOr", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        y, x = np.nonzero((held == held.max(axis=1, keepdims=True)) & (held > 0))
        axes.plot(x, y, "o", ms=4, mfc=GREEN, mec="white", mew=0.6)
        axes.set(xlabel="client", title=f"{method}, round {int(last['round'].max())}")
        axes.set_xticks(range(len(clients)), clients, fontsize=7, rotation=90 if len(clients) > 12 else 0)
        axes.set_yticks(range(len(rows)), [class_names[p].replace("$", r"\$") for p in rows["predicted"]], fontsize=7)
    figure.axes[0].set_ylabel("predicted class of the input")
    figure.colorbar(image, ax=figure.axes, label="share, scaled per input", shrink=0.8)
    _save(figure, file)


def plot_values(values: pd.DataFrame, file: Path) -> None:
    """Who makes the model good or bad at which class: a heat map of clients by classes.

    Args:
        values: of `class_by_client`: how much the loss would rise without the client.
        file: the figure's, without suffix.
    """
    cells = values.to_numpy(dtype=float).T
    most = np.nanmax(np.abs(cells), initial=1e-300)
    figure = Figure(figsize=(max(4.5, 0.4 * len(values) + 2), 1.2 + 0.22 * len(cells)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="PuOr", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    names = [str(name).replace("$", r"\$") for name in values.columns]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xticks(range(len(values)), values.index, fontsize=7, rotation=90 if len(values) > 12 else 0)
    axes.set(xlabel="client", ylabel="class")
    figure.colorbar(image, ax=axes, label="loss without it - loss")
    _save(figure, file)


def plot_labels(counts: Mapping[str, Mapping[int, int]], class_names: Sequence[str], file: Path) -> None:
    """Training examples per client and label: a heat map and stacked bars (figure 1)."""
    clients = list(counts)
    table = np.array([[counts[client].get(label, 0) for label in range(len(class_names))] for client in clients])
    width = max(4.5, 0.3 * len(clients) + 1.5) + 0.12 * max(len(name) for name in class_names)
    figure = Figure(figsize=(width, 2.2 + 0.2 * len(class_names) + 2.2), layout="constrained")
    heat, bars = figure.subplots(2, 1, sharex=True, height_ratios=(0.2 * len(class_names) + 0.6, 2.2))
    image = heat.imshow(table.T, cmap="cividis", aspect="auto", interpolation="nearest")
    class_names = [name.replace("$", r"\$") for name in class_names]  # no TeX
    heat.set_yticks(range(len(class_names)), class_names, fontsize=7)
    heat.set_ylabel("label")
    figure.colorbar(image, ax=heat, label="examples")
    for label, name in enumerate(class_names):
        style = {"color": PALETTE[label % len(PALETTE)], "hatch": HATCHES[label // len(PALETTE) % len(HATCHES)]}
        below = table[:, :label].sum(axis=1)
        bars.bar(range(len(clients)), table[:, label], bottom=below, edgecolor="white", lw=0.4, label=name, **style)
    if len(class_names) <= 20:
        place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "reverse": True}
        bars.legend(title="label", fontsize=6, title_fontsize=7, **place)
    bars.set_xticks(range(len(clients)), clients, fontsize=7, rotation=90 if len(clients) > 12 else 0)
    bars.set(xlabel="client", ylabel="examples", ylim=(0, 1.05 * table.sum(axis=1).max()))
    _save(figure, file)


def plot_times(table: pd.DataFrame, file: Path) -> None:
    """Seconds per localization of TraceFL and FedDebug (figure 6), and how often each is right."""
    figure = Figure(figsize=(2 * PANEL[0], PANEL[1] + 0.4), layout="constrained")
    time, right = figure.subplots(1, 2)
    methods = [
        ("TraceFL (paper)", "seconds_neuron", "localization_accuracy", BLUE, ""),
        ("TraceFL (influence)", "seconds_influence", "localization_accuracy_influence", VERMILION, "//"),
        ("FedDebug", "seconds_feddebug", "feddebug_accuracy", PURPLE, ".."),
    ]
    methods = [entry for entry in methods if {*entry[1:3]} <= {*table}]
    place = np.arange(len(table))
    for shift, (label, seconds, accuracy, colour, hatch) in enumerate(methods):
        x = place + (shift - (len(methods) - 1) / 2) * 0.25
        style = {"width": 0.23, "color": colour, "hatch": hatch, "edgecolor": "white"}
        time.bar(x, table[seconds], label=label, **style)
        right.bar(x, 100 * table[accuracy], **style)
    chance = 100 * table["chance_accuracy"]
    right.hlines(chance, place - 0.4, place + 0.4, colors="k", linestyles=":", label="by chance")
    time.set(ylabel="seconds per localization", yscale="log")
    right.set(ylabel="localization accuracy (%)", ylim=(0, 105))
    for axes in (time, right):
        axes.set_xticks(place, table["name"], fontsize=7, rotation=20)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        figure.savefig(file.with_name(f"{file.name}.{kind}"), dpi=DPI)
