"""The tables that a run ends with."""

import sys

import pandas as pd
from rich.console import Console
from rich.table import Table

from tracefl.evaluation.metrics import MODEL, means
from tracefl.report.lines import percent


def print_summary(metrics: pd.DataFrame, methods: list[str]) -> None:
    """One line per round; every localization accuracy is followed by its chance level, in percent.

    Args:
        metrics: tidy rows (see `evaluation.metrics`); only the global model's if nothing was
            traced.
        methods: the methods that were traced.
    """
    columns = {"accuracy": (MODEL, "accuracy", "value")}
    if "num_inputs" in set(metrics["metric"]):
        columns["inputs"] = (methods[0], "num_inputs", "value")
        for title, metric in (("localized", "localization"), ("top holder", "top_holder")):
            columns |= {f"{title}\n{method}": (method, metric, "value") for method in methods}
            columns[f"{title}\nby chance"] = (methods[-1], metric, "chance")
    table = Table(title="Accuracy of the global model, and of naming the responsible client, in %")
    for header in ("round", *columns):
        table.add_column(header, justify="right")
    for number, part in [*metrics.groupby("round"), ("mean", metrics)]:
        found = means(part)
        numbers = {name: getattr(found[method, metric], field) for name, (method, metric, field) in columns.items()}
        cells = [f"{value:.3g}" if name == "inputs" else percent(value, "-") for name, value in numbers.items()]
        table.add_row(str(number), *cells, end_section=number == metrics["round"].max())
    _print(table)


def print_whole_run(answers: pd.DataFrame) -> None:
    """One line per client that ever took part: its mean contribution, and how often it was first.

    A contribution is what the log-odds of the prediction would lose without the client.

    Args:
        answers: of the last model's predictions (see `evaluation.tracing`).
    """
    inputs = answers["input"].nunique()
    table = Table(title=f"The whole run, {inputs} predictions")
    for header in ("client", "mean contribution", "first"):
        table.add_column(header, justify="right")
    of_client = answers.groupby("client").agg(mean=("contribution", "mean"), first=("rank", lambda r: (r == 1).sum()))
    for client, row in of_client.sort_values("mean", ascending=False).iterrows():
        table.add_row(str(client), f"{row['mean']:+.3g}", f"{row['first']:.0f} of {inputs}")
    _print(table)


def print_faulty(metrics: pd.DataFrame, methods: list[str], faulty: set[str]) -> None:
    """One line per method that looked for the faulty clients: means over its rounds.

    FedDebug names as many suspects as there are faulty participants, so its accuracy, the share of
    them that it found, is its precision and its recall.

    Args:
        metrics: tidy rows (see `evaluation.metrics`).
        methods: the methods that were traced.
        faulty: ids of the faulty clients.
    """
    table = Table(title="Naming the faulty clients: mean over rounds (by chance), precision and recall in %")
    several = ("precision", "recall") if len(faulty) > 1 else ()
    for header in ("method", "rounds", "accuracy", *several, "rank", "seconds per\nlocalization"):
        table.add_column(header, justify="left" if header == "method" else "right")
    found, rounds = means(metrics), metrics.groupby(["method", "metric"])["value"].count()

    def add(method: str, shares: list[str], rank: str) -> None:
        judged = [found[method, share] for share in shares]
        cells = [f"{percent(value, '-')} ({percent(chance, '-')})" for value, chance in judged]
        took = f"{found[method, 'seconds'].value:.3g}" if (method, "seconds") in found else "-"
        table.add_row(method, str(rounds[method, shares[0]]), *cells, rank, took)

    for method in methods:
        ranks = pd.DataFrame(found[method, f"rank_of_c{client}"] for client in faulty).mean()
        rank = "-" if pd.isna(ranks["value"]) else f"{ranks['value']:.1f} ({ranks['chance']:.1f})"
        add(method, ["localization", *(f"faulty_{name}" for name in several)], rank)
    if ("FedDebug", "found") in found:
        add("FedDebug", ["found"] * (len(several) + 1), "-")
    _print(table)


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 110).print(table)
