"""The run's result files: rounds.csv, timings.csv, provenance.parquet, feddebug.parquet, TensorBoard's events."""

import io
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from tracefl.runs import write_atomically

PROVENANCE, FEDDEBUG, TIMINGS = "provenance.parquet", "feddebug.parquet", "timings.csv"


def write_answers(file: Path, answers: pd.DataFrame, settings: dict[str, Any]) -> None:
    """Write a table as Parquet, with the settings that it was made under in its metadata."""
    answers.attrs = {"settings": settings}
    content = io.BytesIO()
    answers.to_parquet(content, index=False)
    write_atomically(file, content.getvalue())


def read_answers(file: Path, settings: dict[str, Any]) -> pd.DataFrame | None:
    """What `write_answers` wrote, or None if it is not there or was made under other settings."""
    if not file.exists():
        return None
    answers = pd.read_parquet(file)
    return answers if answers.attrs.get("settings") == settings else None


def write_csv(file: Path, table: pd.DataFrame) -> None:
    write_atomically(file, table.to_csv(index=False).encode())


def update_timings(folder: Path, measured: pd.DataFrame) -> None:
    """Put what was measured into timings.csv; methods that were not measured again keep their rows."""
    kept = read_timings(folder)
    if len(measured):
        kept = kept[~kept["method"].isin(measured["method"])]
        write_csv(folder / TIMINGS, pd.concat([kept, measured] if len(kept) else [measured]))


def read_timings(folder: Path) -> pd.DataFrame:
    """One row per method: localizations, seconds, seconds_per_localization; none if nothing was ever measured."""
    file = folder / TIMINGS
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["method", "seconds_per_localization"])


def write_events(folder: Path, rounds: pd.DataFrame) -> None:
    """Every metric of `rounds` as a TensorBoard scalar by round, in place of what `folder` held."""
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(folder) as writer:
        for row in rounds.to_dict("records"):
            for name, value in row.items():
                if name != "round" and pd.notna(value):
                    writer.add_scalar(str(name), value, row["round"])
