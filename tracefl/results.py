"""The tables beside a recorded run: rounds.csv, timings.csv, and Parquet files of answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from tracefl.errors import as_sentence
from tracefl.files import write_atomically
from tracefl.runs import Run
from tracefl.settings import fingerprint

PROVENANCE, FEDDEBUG, ROUNDS, TIMINGS = "provenance.parquet", "feddebug.parquet", "rounds.csv", "timings.csv"
AUDIT, VERDICT, CLASS_BY_CLIENT = "audit.parquet", "verdict.json", "class_by_client.csv"
WHOLE_RUN, LAYERS = "whole_run.parquet", "layers.parquet"


def cached(run: Run, name: str, settings: Any, make: Callable[[], pd.DataFrame], *, reuse: bool = True) -> pd.DataFrame:
    """The table in a Parquet file if it was made of the same models with the same settings.

    Otherwise it is made and written, with a key for both in the file's metadata.

    Args:
        run: the run whose models the table is about.
        name: of the file in the run's folder.
        settings: all that the table depends on, beside the models; plain JSON.
        make: computes the table.
        reuse: False computes it in any case.
    """
    file = run.path / name
    key = {"settings": fingerprint(settings), "models": _models(run)}
    if reuse and file.exists():
        table = pd.read_parquet(file)
        if table.attrs.get("settings") == key:
            return table
    table = make()
    table.attrs = {"settings": key}
    write_atomically(file, table.to_parquet(index=False))
    return table


def write_layers(run: Run, tables: list[pd.DataFrame]) -> None:
    """layers.parquet of the tables of a tracing (`tracing.LAYER_COLUMNS`); none is an empty one."""
    filled = [table for table in tables if len(table)] or tables[:1]
    table = pd.concat(filled) if filled else pd.DataFrame()
    table.attrs = {"settings": {"models": _models(run)}}
    write_atomically(run.path / LAYERS, table.to_parquet(index=False))


def of_this_run(run: Run, name: str) -> pd.DataFrame | None:
    """The table in a Parquet file of the run's folder; None if it is absent or of other models."""
    file = run.path / name
    if not file.exists():
        return None
    with as_sentence(f"{file} cannot be read", "remove it, and run the same command again", OSError, ValueError):
        table = pd.read_parquet(file)
    made_of = table.attrs.get("settings", {}).get("models")
    return table if made_of in (None, _models(run)) else None


def _models(run: Run) -> str:
    """What identifies the recorded models."""
    return fingerprint([record.as_json() for record in run.rounds])


def write_csv(file: Path, table: pd.DataFrame) -> None:
    write_atomically(file, table.to_csv(index=False).encode())


def read_rounds(folder: Path) -> pd.DataFrame:
    """rounds.csv of a run's folder, one row per round."""
    return pd.read_csv(folder / ROUNDS)


def update_timings(folder: Path, measured: pd.DataFrame) -> None:
    """Put what was measured into timings.csv; rows of other methods are kept."""
    if len(measured):
        kept = read_timings(folder)
        kept = kept[~kept["method"].isin(measured["method"])]
        write_csv(folder / TIMINGS, pd.concat([kept, measured] if len(kept) else [measured]))


def read_timings(folder: Path) -> pd.DataFrame:
    """timings.csv, a row per method: localizations, seconds, seconds_per_localization."""
    file = folder / TIMINGS
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["method", "seconds_per_localization"])
