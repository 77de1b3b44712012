"""What a run shows while it goes on: the log, on the console and in a file, and its progress."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.runs import Run

LINE = "%(levelname)s - %(message)s"
log = logging.getLogger("tracefl")


class _Stdout(logging.Handler):
    """Prints to the current `sys.stdout`, which a progress display replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def log_to_console() -> None:
    """Send the package's log to standard output, once."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        handler = _Stdout()
        handler.setFormatter(logging.Formatter(LINE))
        log.addHandler(handler)


class _File(logging.FileHandler):
    """A log file; that it cannot be written is a sentence."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        with as_sentence(f"{self.baseFilename} cannot be written", "make room and run the command again", OSError):
            raise error


@contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Send the package's log to this file too, and the error that ends the block.

    Raises:
        TraceFLError: it cannot be written.
    """
    with as_sentence(f"{file} cannot be written", "correct the path or make room", OSError):
        require(file.is_file() or not file.exists(), f"{file} must be a file, and is something else: remove it")
        handler = _File(file, mode="a", encoding="utf-8")
    handler.setFormatter(logging.Formatter(LINE))
    log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        with suppress(TraceFLError):
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, str(error) or repr(error), (), None))
        raise
    finally:
        log.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class Bars(Progress):
    """Bars on standard error, where that is a terminal, and not a dumb one."""

    def __init__(self, *, transient: bool = False, counted: bool = True) -> None:
        steps = [MofNCompleteColumn()] if counted else []
        columns = (TextColumn("{task.description}"), BarColumn(), *steps, TimeElapsedColumn())
        console, lines = Console(stderr=True), sys.stdout.isatty()
        shown = sys.stderr.isatty() and not console.is_dumb_terminal
        options: dict[str, Any] = {"redirect_stdout": lines, "transient": transient, "disable": not shown}
        super().__init__(*columns, console=console, **options)  # lines go above the bars
        self.alone = shown and lines


@contextmanager
def bar(doing: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """A bar while something is done, which leaves nothing behind; call what it gives for a step."""
    with Bars(transient=True, counted=total is not None) as bars:
        task = bars.add_task(doing, total=total)
        yield lambda: None if bars.finished else bars.advance(task)  # some take more steps than they say


class TrainingProgress(Bars):
    """Bars for rounds and clients on a terminal, a line per client and round elsewhere."""

    def __init__(self, num_rounds: int, clients_per_round: int, done: int) -> None:
        super().__init__()
        self.rounds = self.add_task("rounds ", total=num_rounds, completed=done)
        self.clients = self.add_task("clients", total=clients_per_round)

    def on_client(self, number: int, client: str, metrics: Mapping[str, Any]) -> None:
        self.advance(self.clients)
        if not self.alone:
            line = "[Round %d] client c%s trained on %s examples, loss %s (%d of %d)"
            loss, bar = metrics.get("train-loss"), self.tasks[self.clients]
            shown = f"{loss:.3f}" if isinstance(loss, int | float) else "not said"
            log.info(line, number, client, metrics.get("num-examples", "?"), shown, bar.completed, bar.total)

    def on_round(self, run: Run) -> None:
        record = run.rounds[-1]
        self.update(self.rounds, completed=record.number)
        self.update(self.clients, completed=0)
        for client, reason in record.failures.items():
            log.warning("[Round %d] client c%s is left out: %s", record.number, client, reason)
        line = "[Round %d] global model: loss %.2f, accuracy %.2f (round %d of %d)"
        log.info(line, record.number, record.loss, record.accuracy, record.number, self.tasks[self.rounds].total)
