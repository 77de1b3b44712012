"""The log in a file and on the console, and the lines of training."""

import io
import logging
from types import SimpleNamespace

import pytest

from tracefl.report.progress import TrainingProgress, bar, log_to_console, log_to_file

log = logging.getLogger("tracefl")


def test_the_log_goes_to_the_file_while_it_is_open_with_the_error_that_ended_it(tmp_path):
    log_to_console()
    before = list(log.handlers)

    def fail() -> None:
        with log_to_file(tmp_path / "log"):
            log.info("inside")
            raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="the disk is full"):
        fail()
    log.info("outside")
    assert (tmp_path / "log").read_text().splitlines() == ["INFO - inside", "ERROR - the disk is full"]
    assert log.handlers == before


def test_where_there_is_no_terminal_clients_and_rounds_have_their_lines(capsys):
    log_to_console()
    log_to_console()  # adds nothing
    record = SimpleNamespace(number=2, loss=0.5, accuracy=0.75, failures={"4": "its process died"})
    with TrainingProgress(3, 2, 1) as progress:
        for client in ("1", "7"):
            progress.on_client(2, client, {"num-examples": 30, "train-loss": 0.25})
        progress.on_round(SimpleNamespace(rounds=[record]))
    assert capsys.readouterr().out.splitlines() == [
        "INFO - [Round 2] client c1 trained on 30 examples, loss 0.250 (1 of 2)",
        "INFO - [Round 2] client c7 trained on 30 examples, loss 0.250 (2 of 2)",
        "WARNING - [Round 2] client c4 is left out: its process died",
        "INFO - [Round 2] global model: loss 0.50, accuracy 0.75 (round 2 of 3)",
    ]


def test_a_line_needs_nothing_from_a_client(capsys):
    log_to_console()
    with TrainingProgress(1, 3, 0) as progress:
        for metrics in ({}, {"num-examples": 7, "train-loss": [1.0]}, {"train-loss": float("nan")}):
            progress.on_client(1, "4", metrics)
    assert capsys.readouterr().out.splitlines() == [
        "INFO - [Round 1] client c4 trained on ? examples, loss not said (1 of 3)",
        "INFO - [Round 1] client c4 trained on 7 examples, loss not said (2 of 3)",
        "INFO - [Round 1] client c4 trained on ? examples, loss nan (3 of 3)",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_on_standard_error_where_that_is_a_terminal(monkeypatch, capsys):
    with bar("tracing rounds", 3) as done:
        done()
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with bar("tracing rounds", 3) as done:
        done()
        done()
        print("a line of the log")
    shown = terminal.getvalue()
    assert "tracing rounds" in shown
    assert "2/3" in shown
    assert capsys.readouterr().out == "a line of the log\n"  # not the terminal's: it goes where it would without a bar


def test_training_has_bars_on_a_terminal_in_place_of_lines(monkeypatch):
    log_to_console()
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    record = SimpleNamespace(number=2, loss=0.5, accuracy=0.75, failures={})
    with TrainingProgress(3, 2, 1) as progress:
        progress.on_client(2, "1", {"num-examples": 30, "train-loss": 0.25})
        progress.refresh()
        progress.on_round(SimpleNamespace(rounds=[record]))
    shown = terminal.getvalue()
    assert "1/2" in shown
    assert "2/3" in shown
    assert "client c1 trained" not in shown
    assert "global model: loss 0.50" in shown
