"""The console: log lines, a progress display for rounds and clients, and the closing table."""

import logging
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tracefl.evaluation.attribution import SUFFIX
from tracefl.runs import Run

LINE = "%(levelname)s - %(message)s"
log = logging.getLogger("tracefl")


class _Stdout(logging.StreamHandler):
    """Writes to what is `sys.stdout` at that moment: a progress display replaces it to keep its bars below."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def log_to_console() -> None:
    """Send the package's log to standard output, once."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = _Stdout()
        handler.setFormatter(logging.Formatter(LINE))
        log.addHandler(handler)


class LogFile(AbstractContextManager):
    """While open, the package's log goes to this file too."""

    def __init__(self, file: Path) -> None:
        self.handler = logging.FileHandler(file, mode="a", encoding="utf-8")
        self.handler.setFormatter(logging.Formatter(LINE))

    def __enter__(self) -> "LogFile":
        log.addHandler(self.handler)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error) or repr(error), (), None))
        log.removeHandler(self.handler)
        self.handler.close()


class TrainingProgress(AbstractContextManager):
    """Bars for rounds and clients on a terminal, a line per client and round elsewhere."""

    def __init__(self, num_rounds: int, clients_per_round: int, done: int) -> None:
        self.num_rounds, self.clients_per_round = num_rounds, clients_per_round
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Progress(*columns, console=Console(), disable=not sys.stdout.isatty())
        self.rounds = self.bars.add_task("rounds ", total=num_rounds, completed=done)
        self.clients = self.bars.add_task("clients", total=clients_per_round)
        self.heard = 0

    def __enter__(self) -> "TrainingProgress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def on_client(self, number: int, client: str, metrics: Mapping[str, Any]) -> None:
        self.heard += 1
        self.bars.update(self.clients, completed=self.heard)
        if self.bars.disable:
            log.info(
                "[Round %d] client c%s trained on %d examples, loss %.3f (%d of %d)",
                number, client, metrics["num-examples"], metrics["train-loss"], self.heard, self.clients_per_round,
            )  # fmt: skip

    def on_round(self, run: Run) -> None:
        record, self.heard = run.rounds[-1], 0
        self.bars.update(self.rounds, completed=record.number)
        self.bars.update(self.clients, completed=0)
        for client, reason in record.failures.items():
            log.warning("[Round %d] client c%s is left out: %s", record.number, client, reason)
        log.info(
            "[Round %d] global model: loss %.2f, accuracy %.2f (round %d of %d)",
            record.number, record.loss, record.accuracy, record.number, self.num_rounds,
        )  # fmt: skip


def print_summary(rounds: pd.DataFrame, methods: list[str]) -> None:
    """One line per round; every localization accuracy stands beside its chance level, in percent."""
    suffixes = {method: SUFFIX[method] for method in methods}
    columns = {"accuracy": "accuracy"}
    if "num_inputs" in rounds:
        columns |= {"inputs": "num_inputs"}
        for title, metric, chance in (
            ("localized", "localization_accuracy", "chance_accuracy"),
            ("top holder", "top_holder_accuracy", "top_holder_chance"),
        ):
            columns |= {f"{title}\n{method}": metric + suffix for method, suffix in suffixes.items()}
            columns |= {f"{title}\nby chance": chance}
    table = Table(title="Accuracy of the global model, and of naming the responsible client, in %")
    for header in ("round", *columns):
        table.add_column(header, justify="right")
    means = {"round": "mean", **rounds.drop(columns="round").mean().to_dict()}
    for row in [*rounds.to_dict("records"), means]:
        cells = [f"{row[name]:.3g}" if name == "num_inputs" else _percent(row[name]) for name in columns.values()]
        table.add_row(str(row["round"]), *cells, end_section=row["round"] == len(rounds))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def print_faulty(rounds: pd.DataFrame, methods: list[str], faulty: set[str]) -> None:
    """One line per method that looked for the faulty clients: means over the rounds in which it could.

    What FedDebug names is as many suspects as there are faulty participants, so that its accuracy, the share of them
    that it found, is its precision and its recall.
    """
    table = Table(title="Naming the faulty clients: mean over rounds (by chance), precision and recall in %")
    several = ("precision", "recall") if len(faulty) > 1 else ()
    for header in ("method", "rounds", "accuracy", *several, "rank", "seconds per\nlocalization"):
        table.add_column(header, justify="left" if header == "method" else "right")

    def add(name: str, judged: pd.Series, accuracy: str, *rest: str) -> None:
        seconds = f"seconds_{name.lower()}"
        took = f"{rounds[seconds].iloc[0]:.3g}" if seconds in rounds else "-"
        table.add_row(name, str(judged.notna().sum()), accuracy, *rest, took)

    for method in methods:
        suffix = SUFFIX[method]
        mean = rounds.mean()
        pairs = [(f"faulty_{name}{suffix}", f"faulty_{name}_chance") for name in several]
        pairs = [(f"localization_accuracy{suffix}", "chance_accuracy"), *pairs]
        rank = mean[[f"rank_of_c{client}{suffix}" for client in faulty]].mean()
        add(
            method,
            rounds[f"localization_accuracy{suffix}"],
            *(f"{_percent(mean[name])} ({_percent(mean[chance])})" for name, chance in pairs),
            "-" if pd.isna(rank) else f"{rank:.1f} ({mean['faulty_rank_chance']:.1f})",
        )
    if "feddebug_accuracy" in rounds:
        mean = rounds[["feddebug_accuracy", "feddebug_chance"]].mean()
        found = f"{_percent(mean['feddebug_accuracy'])} ({_percent(mean['feddebug_chance'])})"
        add("FedDebug", rounds["feddebug_accuracy"], *[found] * (len(several) + 1), "-")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _percent(share: float) -> str:
    return "-" if pd.isna(share) else f"{100 * share:.1f}"
