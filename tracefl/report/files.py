"""The run's result files: rounds.csv, provenance.parquet, config.yaml."""

import io
from pathlib import Path
from typing import Any

import pandas as pd

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
