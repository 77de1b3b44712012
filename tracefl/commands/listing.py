"""`tracefl list`: the runs in a folder, what tells their settings apart, and what came out."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from tracefl.commands.find import run_folders
from tracefl.commands.show import Answer, printable, share, table
from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.report.sweep import SETTINGS
from tracefl.results import ROUNDS, VERDICT
from tracefl.runs import Run

# What rounds.csv calls a localization accuracy and its chance level, by method.
LOCALIZATION = {"neuron": "localization_accuracy", "influence": "localization_accuracy_influence"}
CHANCE = "chance_accuracy"
ALWAYS = ("dataset.name", "model.name")  # settings that are shown in any case
SHOWN_SETTINGS = 6
EMPTY = (None, [], {})


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
        with as_sentence(f"{folder} cannot be read", "restore it or train again", OSError, LookupError, TypeError):
            return {"run": str(folder), **_read(folder)}
    except TraceFLError as error:
        return {"run": str(folder), "error": str(error)}


def tables(found: Answer) -> Iterator[Table | str]:
    """The answer of `runs_in` for people; damaged runs below, a line each."""
    good = [run for run in found["runs"] if "error" not in run]
    if not found["runs"]:
        yield f"{found['folder']} holds no recorded run"
    if good:
        known = [*SETTINGS.values(), *found["differing"]]  # the usual ones first
        shown = list(dict.fromkeys([*ALWAYS, *(key for key in known if key in found["differing"])]))
        columns = ["run", "settings", "rounds", "accuracy", "localized", "by chance", "verdict", "disk"]
        rows = [_row(run, shown) for run in good]
        title = f"Runs in {found['folder']}; shares in %, means over rounds"
        yield table(title, columns, rows, left=("run", "settings", "verdict"))
    yield from (printable(f"damaged: {run['error']}") for run in found["runs"] if "error" in run)


def _read(folder: Path) -> Answer:
    run = Run.open(folder)
    settings: Any = {}
    if "settings" in run:  # not in one of an own Flower app
        settings = run["settings"]
    require(isinstance(settings, Mapping), f"{folder / 'run.json'}: settings must be a mapping, got {settings!r}")
    for record in run.rounds:
        for file in ("global.safetensors", *(client.file for client in record.clients if record.kept)):
            lost = f"{record.folder / file} is missing: restore it, or train again"
            require((record.folder / file).exists(), lost)
    last = run.rounds[-1] if run.rounds else None
    return {
        "rounds": len(run.rounds),
        "wanted_rounds": settings.get("num_rounds"),
        "clients": len(run.clients),
        "settings": dict(settings),
        "accuracy": last.accuracy if last else None,
        "loss": last.loss if last else None,
        "localization": _localization(folder / ROUNDS),
        "faulty": _faulty(folder / VERDICT),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _localization(file: Path) -> Answer:
    """Method -> its mean over rounds beside that of chance; nothing if no round was traced."""
    if not file.exists():
        return {}
    with as_sentence(f"{file} cannot be read", "remove it, and run the same command again", ValueError, csv.Error):
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        found = {method: _mean(rows, name) for method, name in LOCALIZATION.items()}
        chance = _mean(rows, CHANCE)
    return {method: {"share": value, "chance": chance} for method, value in found.items() if value is not None}


def _mean(rows: list[dict[str, str]], column: str) -> float | None:
    numbers = [float(row[column]) for row in rows if row.get(column)]
    known = [value for value in numbers if not math.isnan(value)]
    return mean(known) if known else None


def _faulty(file: Path) -> list[str] | None:
    """Who is accused; None where there is no verdict, or nobody could be judged."""
    if not file.exists():
        return None
    with as_sentence(f"{file} cannot be read", "remove it, and run the same command again", ValueError):
        verdict = json.loads(file.read_bytes())
    judged = any(client["z"] is not None for client in verdict["clients"].values())
    return [str(who) for who in verdict["faulty"]] if judged else None


def _row(run: Answer, keys: list[str]) -> list[str]:
    found = run["localization"]
    best = [f"{share(of['share'])} {method}" for method, of in found.items()]
    chance = share(next(iter(found.values()))["chance"]) if found else "-"
    given = [f"{key}={_value(run['settings'][key])}" for key in keys if run["settings"].get(key) not in EMPTY]
    more = [f"and {len(given) - SHOWN_SETTINGS} more"] if len(given) > SHOWN_SETTINGS else []
    settings = "\n".join(given[:SHOWN_SETTINGS] + more)
    rounds = f"{run['rounds']} of {run['wanted_rounds']}" if run["wanted_rounds"] else str(run["rounds"])
    accuracy, size = share(run["accuracy"]), f"{run['bytes'] / 1e6:,.1f} MB"
    return [run["run"], settings, rounds, accuracy, "\n".join(best) or "-", chance, _verdict(run["faulty"]), size]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _verdict(faulty: list[str] | None) -> str:
    if faulty is None:
        return "-"
    return f"faulty: {', '.join(f'c{who}' for who in faulty)}" if faulty else "nobody"
