"""The tables beside a recorded run: rounds.csv, timings.csv, and two Parquet files of answers."""

import io
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from tracefl.runs import write_atomically

PROVENANCE, FEDDEBUG, ROUNDS, TIMINGS = "provenance.parquet", "feddebug.parquet", "rounds.csv", "timings.csv"


def cached(file: Path, key: dict[str, Any], make: Callable[[], pd.DataFrame], *, reuse: bool = True) -> pd.DataFrame:
    """The table in a Parquet file if it was made under the same key; otherwise make and write it.

    Args:
        file: where the table is kept, with its key in the metadata.
        key: all that the table depends on, as plain JSON.
        make: computes the table.
        reuse: False computes it in any case.
    """
    if reuse and file.exists():
        table = pd.read_parquet(file)
        if table.attrs.get("settings") == key:
            return table
    table = make()
    table.attrs = {"settings": key}
    content = io.BytesIO()
    table.to_parquet(content, index=False)
    write_atomically(file, content.getvalue())
    return table


def write_csv(file: Path, table: pd.DataFrame) -> None:
    write_atomically(file, table.to_csv(index=False).encode())


def read_rounds(folder: Path) -> pd.DataFrame:
    """rounds.csv of a run's folder, one row per round."""
    return pd.read_csv(folder / ROUNDS)


def update_timings(folder: Path, measured: pd.DataFrame) -> None:
    """Put what was measured into timings.csv; rows of other methods are kept."""
    kept = read_timings(folder)
    if len(measured):
        kept = kept[~kept["method"].isin(measured["method"])]
        write_csv(folder / TIMINGS, pd.concat([kept, measured] if len(kept) else [measured]))


def read_timings(folder: Path) -> pd.DataFrame:
    """timings.csv, a row per method: localizations, seconds, seconds_per_localization."""
    file = folder / TIMINGS
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["method", "seconds_per_localization"])


def write_events(folder: Path, rounds: pd.DataFrame) -> None:
    """Every metric of `rounds` as a TensorBoard scalar by round, in place of what `folder` held.

    Nothing is written where tensorboard is not installed (pip install tracefl[tensorboard]).
    """
    if find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(folder) as writer:
        for name in rounds.columns.drop("round"):
            for number, value in rounds.set_index("round")[name].dropna().items():
                writer.add_scalar(str(name), value, number)
