"""Which figures a run gets, which several runs together, and which prepared data."""

from pathlib import Path

import pandas as pd

from tracefl.data.prepared import read_info
from tracefl.errors import require
from tracefl.evidence.verdict import class_by_client
from tracefl.report.plots import plot_accuracies, plot_contributions, plot_labels, plot_times, plot_values
from tracefl.report.sweep import SETTINGS, read_runs, varying
from tracefl.results import AUDIT, PROVENANCE, read_rounds, read_table, write_csv
from tracefl.runs import Run


def draw_run(folder: Path) -> None:
    """Draw a run: accuracy by round, labels and values of clients, contributions; into plots/."""
    run, plots = Run.open(folder), folder / "plots"
    plot_accuracies({folder.name: read_rounds(folder)}, "round", plots / "rounds")
    plot_labels({c.id: c.trained_label_counts for c in run.clients}, run["class_names"], plots / "labels")
    if (folder / PROVENANCE).exists() and len(answers := read_table(folder, PROVENANCE)):
        plot_contributions(answers, run["class_names"], plots / "contributions")
    if (folder / AUDIT).exists():
        values = class_by_client(read_table(folder, AUDIT), run["class_names"])
        plot_values(values, plots / "class_by_client")


def draw_runs(folders: list[Path], x: str | None, out: Path) -> pd.DataFrame:
    """Draw several runs together: their rounds, and their means against what varies.

    Args:
        folders: of the runs.
        x: the setting to draw against; None: every numeric one that varies.
        out: folder for the figures, and for runs.csv with the numbers behind them.

    Returns:
        The table of runs.csv, one row per run.

    Raises:
        TraceFLError: `x` is no setting of the table.
    """
    require(x in (None, *SETTINGS), f"x must be one of {', '.join(SETTINGS)}, got {x}")
    table = read_runs(folders)
    table = table.sort_values(["model", "dataset", *varying(table)], ignore_index=True)
    table.insert(0, "name", _names(table))
    write_csv(out / "runs.csv", table)
    rounds = {name: read_rounds(Path(folder)) for name, folder in zip(table["name"], table["run"], strict=True)}
    plot_accuracies(rounds, "round", out / "rounds")
    for setting in varying(table) if x is None else [x]:
        groups = {f"{model}, {dataset}": part for (model, dataset), part in table.groupby(["model", "dataset"])}
        means = {title: part.groupby(setting, as_index=False).mean(numeric_only=True) for title, part in groups.items()}
        plot_accuracies(means, setting, out / f"by_{setting}")
    if "feddebug_accuracy" in table and table["feddebug_accuracy"].notna().any():
        plot_times(table.dropna(subset="feddebug_accuracy", ignore_index=True), out / "feddebug")
    return table


def draw_data(folders: list[Path], out: Path) -> None:
    """Draw the examples of each label on each client, a figure per prepared data.

    And labels.csv.
    """
    rows: list[tuple[str, str, int, int]] = []
    for folder in folders:
        info = read_info(folder)
        settings = info["settings"]
        skew = f"_alpha_{settings['dirichlet_alpha']:g}" if "dirichlet_alpha" in settings else ""
        name = f"{settings['dataset.name'].rsplit('/', 1)[-1]}_{settings['data_dist.dist_type']}{skew}"
        name += f"_{folder.name.rsplit('-', 1)[-1]}" if name in {row[0] for row in rows} else ""
        counts = {client: {int(k): n for k, n in labels.items()} for client, labels in info["label_counts"].items()}
        plot_labels(counts, info["class_names"], out / f"labels_{name}")
        rows += [(name, client, label, n) for client, labels in counts.items() for label, n in labels.items()]
    write_csv(out / "labels.csv", pd.DataFrame(rows, columns=["data", "client", "label", "examples"]))


def _names(table: pd.DataFrame) -> list[str]:
    """A name for each run: what differs of model, dataset and settings.

    Runs that would have the same name get the hash of their folder too.
    """
    differing = [name for name in ("model", "dataset", *SETTINGS) if table[name].nunique() > 1] or ["model", "dataset"]
    names = [", ".join(_word(name, row[name]) for name in differing) for row in table.to_dict("records")]
    hashes = [Path(run).name.rsplit("-", 1)[-1] for run in table["run"]]
    return [f"{name}, {hashes[i]}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _word(name: str, value: object) -> str:
    return f"{name} {value:g}" if isinstance(value, (int, float)) else str(value)
