"""The run's result files: rounds.csv, provenance.parquet, TensorBoard's events."""

import io
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from tracefl.runs import write_atomically

PROVENANCE = "provenance.parquet"


def write_provenance(folder: Path, provenance: pd.DataFrame, settings: dict[str, Any]) -> None:
    """Write provenance.parquet, with the settings that it was made under in its metadata."""
    provenance.attrs = {"settings": settings}
    content = io.BytesIO()
    provenance.to_parquet(content, index=False)
    write_atomically(folder / PROVENANCE, content.getvalue())


def read_provenance(folder: Path, settings: dict[str, Any]) -> pd.DataFrame | None:
    """What `write_provenance` wrote, or None if it is not there or was made under other settings."""
    if not (folder / PROVENANCE).exists():
        return None
    provenance = pd.read_parquet(folder / PROVENANCE)
    return provenance if provenance.attrs.get("settings") == settings else None


def write_csv(file: Path, table: pd.DataFrame) -> None:
    write_atomically(file, table.to_csv(index=False).encode())


def write_events(folder: Path, rounds: pd.DataFrame) -> None:
    """Every metric of `rounds` as a TensorBoard scalar by round, in place of what `folder` held."""
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(folder) as writer:
        for row in rounds.to_dict("records"):
            for name, value in row.items():
                if name != "round" and pd.notna(value):
                    writer.add_scalar(str(name), value, row["round"])
