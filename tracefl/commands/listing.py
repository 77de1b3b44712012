"""`tracefl list`: the runs in a folder, what tells their settings apart, and what came out."""

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from rich import filesize
from rich.table import Table

from tracefl.commands.find import run_folders
from tracefl.commands.show import Answer, number, printable, share, table
from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.report.sweep import SETTINGS
from tracefl.results import ROUNDS, VERDICT, content_of, read_result
from tracefl.runs import Run

# What rounds.csv calls a localization accuracy and its chance level, by method.
LOCALIZATION = {"neuron": "localization_accuracy", "influence": "localization_accuracy_influence"}
CHANCE = "chance_accuracy"
ALWAYS = ("dataset.name", "model.name")  # what the title says where all runs have the same
COLUMNS = 3  # settings that are columns of the table
T = TypeVar("T")
ODD = (OSError, LookupError, TypeError, ValueError, AttributeError)  # of files that hold something else
EMPTY: tuple[object, ...] = (None, [], {})


def runs_in(folder: Path) -> Answer:
    """The runs in a folder, each as `entry`; `differing` are the settings in which they differ.

    Raises:
        TraceFLError: there is no such folder.
    """
    require(folder.is_dir(), f"{folder} is no folder: give one that holds runs")
    runs = [entry(found) for found in run_folders(folder)]
    settings = [run["settings"] for run in runs if "settings" in run]
    keys = sorted({key for some in settings for key in some})
    differing = [key for key in keys if any(some.get(key) != settings[0].get(key) for some in settings)]
    return {"folder": str(folder), "differing": differing, "runs": runs}


def entry(folder: Path) -> Answer:
    """What is recorded in a run's folder; of a damaged one only the sentence, as `error`."""
    try:
        with as_sentence(f"{folder} cannot be read", "restore it or train again", *ODD):
            return {"run": str(folder), **_read(folder)}
    except TraceFLError as error:
        return {"run": str(folder), "error": str(error)}


def tables(found: Answer) -> Iterator[Table | str]:
    """The answer of `runs_in` for people.

    A few settings that differ are columns, more are lines below, and so are damaged runs.
    """
    good, folder = [run for run in found["runs"] if "error" not in run], Path(found["folder"])
    usual = [*ALWAYS, *SETTINGS.values(), *found["differing"]]
    differing = [key for key in dict.fromkeys(usual) if key in found["differing"]]  # the usual ones first
    shown = differing if len(differing) <= COLUMNS else []
    if not found["runs"]:
        yield f"{folder} holds no recorded run"
    if good:
        columns = ["run", *shown, "rounds", "accuracy", "localized", "by\nchance", "verdict", "disk"]
        rows = [_row(run, folder, shown) for run in good]
        first = good[0]["settings"]  # none in an own app
        same = [_value(first[key]) for key in ALWAYS if key not in differing and key in first]
        title = f"Runs in {folder}: {', '.join([*same, 'shares in %, means over rounds'])}"
        yield printable(title)
        yield table(columns, rows, words=("run", "verdict"))
    for run in good if len(differing) > COLUMNS else []:
        given = [f"{key}={_value(run['settings'][key])}" for key in differing if run["settings"].get(key) not in EMPTY]
        yield printable(f"{_name(run, folder)}: {' '.join(given)}")
    yield from (printable(f"not shown: {sentence}") for run in good for sentence in run["lost"])
    yield from (printable(f"damaged: {run['error']}") for run in found["runs"] if "error" in run)


def _read(folder: Path) -> Answer:
    run = Run.open(folder)
    settings: Any = {}
    if "settings" in run:  # not in one of an own Flower app
        settings = run["settings"]
    require(isinstance(settings, Mapping), f"{folder / 'run.json'}: settings must be a mapping, got {settings!r}")
    for record in run.rounds:
        for file in ("global.safetensors", *(client.file for client in record.clients if record.kept)):
            gone = f"{record.folder / file} is missing: restore it, or train again"
            require((record.folder / file).exists(), gone)
    last, lost = run.rounds[-1] if run.rounds else None, list[str]()
    results = {"localization": _found(_localization, folder, lost) or {}, "faulty": _found(_faulty, folder, lost)}
    return {
        "rounds": len(run.rounds),
        "wanted_rounds": settings.get("num_rounds"),
        "clients": len(run.clients),
        "settings": dict(settings),
        "accuracy": last.accuracy if last else None,
        "loss": last.loss if last else None,
        **results,
        "lost": lost,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _found(read: Callable[[Path], T], folder: Path, lost: list[str]) -> T | None:
    """What is read of a run's results; None where they cannot be, and `lost` gets the sentence."""
    try:
        with as_sentence(f"a result of {folder} cannot be read", "run the same command again", csv.Error, *ODD):
            return read(folder)
    except TraceFLError as error:
        lost.append(str(error))
        return None


def _localization(folder: Path) -> Answer:
    """Method -> its mean over rounds beside that of chance; nothing if no round was traced."""
    if (content := _result(folder, ROUNDS)) is None:
        return {}
    rows = list(csv.DictReader(content.decode().splitlines()))
    found, chance = {method: _mean(rows, name) for method, name in LOCALIZATION.items()}, _mean(rows, CHANCE)
    return {method: {"share": value, "chance": chance} for method, value in found.items() if value is not None}


def _result(folder: Path, name: str) -> bytes | None:
    """A result; None if there is none. One of other rounds is refused."""
    there = os.path.lexists(folder / name)
    return read_result(folder, name) if there else content_of(folder, name)


def _mean(rows: list[dict[str, str]], column: str) -> float | None:
    numbers = [float(row[column]) for row in rows if row.get(column)]
    known = [value for value in numbers if not math.isnan(value)]
    return mean(known) if known else None


def _faulty(folder: Path) -> list[str] | None:
    """Who is accused; None where there is no verdict, or nobody could be judged."""
    if (content := _result(folder, VERDICT)) is None:
        return None
    verdict = json.loads(content)
    judged = any(client["z"] is not None for client in verdict["clients"].values())
    return [str(who) for who in verdict["faulty"]] if judged else None


def _row(run: Answer, folder: Path, shown: list[str]) -> list[str]:
    settings = [_value(run["settings"].get(key)) for key in shown]
    rounds = f"{run['rounds']} of {run['wanted_rounds']}" if run["wanted_rounds"] else str(run["rounds"])
    localized = [f"{share(of['share'])} {method}" for method, of in run["localization"].items()] or ["-"]
    chance = share(next((of["chance"] for of in run["localization"].values()), None))
    accuracy = run["accuracy"]
    own = accuracy is not None and not 0 <= accuracy <= 1  # an app's own, perhaps in percent
    results = [
        number(accuracy, ".1f") if own else share(accuracy),
        "\n".join(localized),
        chance,
        _verdict(run["faulty"]),
    ]
    return [_name(run, folder), *settings, rounds, *results, filesize.decimal(run["bytes"])]


def _name(run: Answer, folder: Path) -> str:
    return run["run"] if Path(run["run"]) == folder else os.path.relpath(run["run"], folder)


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _verdict(faulty: list[str] | None) -> str:
    if faulty is None:
        return "-"
    return f"faulty: {', '.join(f'c{who}' for who in faulty)}" if faulty else "nobody"
