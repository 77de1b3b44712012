"""What a run shows while it goes on: the log, on the console and in a file, and its progress."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tracefl.runs import Run

LINE = "%(levelname)s - %(message)s"
log = logging.getLogger("tracefl")


class _Stdout(logging.Handler):
    """Prints to the current `sys.stdout`, which a progress display replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


class _File(logging.FileHandler):
    """Ends the run where the log cannot be written, as any other file; not a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise


def log_to_console() -> None:
    """Send the package's log to standard output, once."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = _Stdout()
        handler.setFormatter(logging.Formatter(LINE))
        log.addHandler(handler)


@contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Send the package's log to this file too, and the error that ends the block."""
    handler = _File(file, mode="a", encoding="utf-8")
    handler.setFormatter(logging.Formatter(LINE))
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # a full disk ends the run, and takes no line about it
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error) or repr(error), (), None))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # what a full disk did not take
            handler.close()


class TrainingProgress(Progress):
    """Bars for rounds and clients on a terminal, a line per client and round elsewhere."""

    def __init__(self, num_rounds: int, clients_per_round: int, done: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, disable=not sys.stdout.isatty())
        self.rounds = self.add_task("rounds ", total=num_rounds, completed=done)
        self.clients = self.add_task("clients", total=clients_per_round)

    def on_client(self, number: int, client: str, metrics: Mapping[str, Any]) -> None:
        self.advance(self.clients)
        if self.disable:
            line = "[Round %d] client c%s trained on %d examples, loss %.3f (%d of %d)"
            examples, loss, bar = metrics["num-examples"], metrics["train-loss"], self.tasks[self.clients]
            log.info(line, number, client, examples, loss, bar.completed, bar.total)

    def on_round(self, run: Run) -> None:
        record = run.rounds[-1]
        self.update(self.rounds, completed=record.number)
        self.update(self.clients, completed=0)
        for client, reason in record.failures.items():
            log.warning("[Round %d] client c%s is left out: %s", record.number, client, reason)
        line = "[Round %d] global model: loss %.2f, accuracy %.2f (round %d of %d)"
        log.info(line, record.number, record.loss, record.accuracy, record.number, self.tasks[self.rounds].total)
