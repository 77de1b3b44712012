"""The tables beside a recorded run: rounds.csv, timings.csv, and Parquet files of answers.

results.json holds the SHA-256 of each of them, which rounds it is of, and how long it took to make;
whoever reads one compares it. What was changed, is of another run, or was written by an earlier
version, is computed again by the command that made it.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from json import dumps
from os.path import lexists
from pathlib import Path
from typing import Any

import pandas as pd

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.files import read_file, write_atomically
from tracefl.header import LIST, NUMBER, OBJECT, SHA256, TEXT, WHOLE, Checker
from tracefl.runs import Run
from tracefl.sealed import read_sealed, seal_of, sealed
from tracefl.settings import fingerprint

PROVENANCE, FEDDEBUG, ROUNDS, TIMINGS = "provenance.parquet", "feddebug.parquet", "rounds.csv", "timings.csv"
AUDIT, VERDICT, CLASS_BY_CLIENT = "audit.parquet", "verdict.json", "class_by_client.csv"
WHOLE_RUN, LAYERS, CONFIG, HASHES = "whole_run.parquet", "layers.parquet", "config.yaml", "results.json"
AGAIN = "run its command again with do_provenance=true, which writes it anew"
TIMING = {"method": TEXT, "localizations": WHOLE, "seconds": NUMBER}
log = logging.getLogger("tracefl")


def cached(run: Run, name: str, settings: Any, make: Callable[[], pd.DataFrame], *, reuse: bool = True) -> pd.DataFrame:
    """The table in a Parquet file if it was made of the same models with the same settings.

    Otherwise, or if the file was changed, it is made and written, with a key for both in the file's
    metadata.

    Args:
        run: the run whose models the table is about.
        name: of the file in the run's folder.
        settings: all that the table depends on, beside the models; plain JSON.
        make: computes the table; `attrs["timings"]` may say how long it took (`read_timings`).
        reuse: False computes it in any case.
    """
    key = {"settings": fingerprint(settings), "models": _models(run)}
    if reuse and (content := intact(run.path, name)) is not None:
        table = pd.read_parquet(BytesIO(content))
        if table.attrs.get("settings") == key | {"numeric": _numeric(table)}:
            return table
    table = make()
    timings = table.attrs.get("timings", [])
    table.attrs = {"settings": key | {"numeric": _numeric(table)}}
    write_result(run.path, name, table.to_parquet(index=False), timings)
    return table


def _numeric(table: pd.DataFrame) -> dict[str, bool]:
    """Whether a column holds numbers, by its name."""
    return {str(name): pd.api.types.is_numeric_dtype(kind) for name, kind in table.dtypes.items()}


def write_layers(run: Run, tables: list[pd.DataFrame]) -> None:
    """layers.parquet of the tables of a tracing (`tracing.LAYER_COLUMNS`); none is an empty one."""
    filled = [table for table in tables if len(table)] or tables[:1]
    table = pd.concat(filled) if filled else pd.DataFrame()
    table.attrs = {"settings": {"models": _models(run)}}
    write_result(run.path, LAYERS, table.to_parquet(index=False))


def of_this_run(run: Run, name: str) -> pd.DataFrame | None:
    """The table in a Parquet file of the run's folder; None if it is absent or of other models.

    Raises:
        TraceFLError: it was changed since it was written, or is of an earlier version.
    """
    if (content := content_of(run.path, name)) is None:
        return None
    table = _as_table(run.path / name, content)
    made_of = table.attrs.get("settings", {}).get("models")
    return table if made_of in (None, _models(run)) else None


def _models(run: Run) -> str:
    """What identifies the recorded models."""
    return fingerprint([record.as_json() for record in run.rounds])


def write_result(folder: Path, name: str, content: bytes, timings: Sequence[dict[str, Any]] = ()) -> None:
    """Write a file of a run's folder, and its SHA-256 into results.json; a process may die between.

    Args:
        folder: the run's.
        name: of the file.
        content: what it is to hold.
        timings: rows of `read_timings`, of the methods whose answers it holds.
    """
    file, hashes, of = folder / name, _hashes(folder), _rounds(folder)
    entry: dict[str, Any] = {"sha256": hashlib.sha256(content).hexdigest()}
    entry |= {"rounds": of} if of and name != CONFIG else {}  # which is written before there are any
    entry |= {"timings": list(timings)} if timings else {}
    before = None
    with suppress(TraceFLError):
        before = _as_written(folder, name, hashes)
    if before is None and file.exists():
        log.warning("%s was changed since it was written, or is of an earlier version: it is computed again", file)
    if before != content:
        write_atomically(file, content)
    if hashes.get(name) != entry:
        files = dict(sorted((hashes | {name: entry}).items()))
        write_atomically(folder / HASHES, sealed(dumps({"files": files}, indent=1)))


def intact(folder: Path, name: str) -> bytes | None:
    """The content of a run's file if it is as `write_result` has written it, else None."""
    try:
        return read_result(folder, name)
    except TraceFLError:
        return None


def read_result(folder: Path, name: str) -> bytes:
    """The content of a run's file.

    Args:
        folder: the run's.
        name: of the file.

    Raises:
        TraceFLError: it is missing, was changed since it was written, or is of an earlier version
            or other rounds.
    """
    hashes = _hashes(folder)
    content = _as_written(folder, name, hashes)
    others = f"{folder / name} is of other rounds than {folder / 'run.json'} has, or of another run"
    require(_is_of(folder, hashes[name]), f"{others}: {AGAIN}")
    return content


def _as_written(folder: Path, name: str, hashes: Mapping[str, dict[str, Any]]) -> bytes:
    """The content of a run's file, compared with its hash."""
    content, known = read_file(folder / name, AGAIN), hashes.get(name)
    unknown = f"{folder / HASHES} does not know {name}, which may be of an earlier version"
    require(known is not None, f"{unknown}: {AGAIN}")
    same = known is not None and hashlib.sha256(content).hexdigest() == known["sha256"]
    require(same, f"{folder / name} was changed since it was written: {AGAIN}")
    return content


def content_of(folder: Path, name: str) -> bytes | None:
    """As `read_result`; None if there is no such result of these rounds."""
    known = _hashes(folder).get(name)
    there = lexists(folder / name) if known is None else _is_of(folder, known)
    return read_result(folder, name) if there else None


def _is_of(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a result is of the rounds that the run has now; an earlier version did not say."""
    return entry.get("rounds") in (None, _rounds(folder))


def _rounds(folder: Path) -> str | None:
    """What identifies a run with its rounds: the hash of its header; None where there is none."""
    with suppress(TraceFLError):
        return seal_of(read_file(folder / "run.json", AGAIN))
    return None


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its entry in results.json; nothing if that is damaged or missing."""
    try:
        _, found = read_sealed(folder / HASHES, AGAIN)
        check = Checker(str(folder / HASHES), AGAIN)
        check.record("", found, {"files": OBJECT})
        for name, entry in found["files"].items():
            check.record(f"files[{name!r}]", entry, {"sha256": SHA256, "rounds": SHA256, "timings": LIST})
            check.entry(f"files[{name!r}].sha256", entry.get("sha256"), SHA256)
            for row in entry.get("timings", []):
                check.record(f"files[{name!r}].timings", row, TIMING)
                check.require(row.keys() == TIMING.keys(), f"timings must hold {', '.join(TIMING)}")
        return found["files"]
    except (TraceFLError, KeyError):
        return {}


def read_table(folder: Path, name: str) -> pd.DataFrame:
    """A Parquet file of a run's folder.

    Raises:
        TraceFLError: as `read_result`.
    """
    return _as_table(folder / name, read_result(folder, name))


def _as_table(file: Path, content: bytes) -> pd.DataFrame:
    with as_sentence(f"{file} is no table", AGAIN, OSError, ValueError):
        return pd.read_parquet(BytesIO(content))


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """A table as a CSV file of a run's folder."""
    write_result(folder, name, table.to_csv(index=False).encode())


def write_csv(file: Path, table: pd.DataFrame) -> None:
    """A table as a CSV file anywhere."""
    write_atomically(file, table.to_csv(index=False).encode())


def read_rounds(folder: Path) -> pd.DataFrame:
    """rounds.csv of a run's folder, one row per round.

    Raises:
        TraceFLError: as `read_result`.
    """
    return pd.read_csv(BytesIO(read_result(folder, ROUNDS)))


def read_timings(folder: Path) -> pd.DataFrame:
    """How long the answers took, a row per method.

    Columns: method, localizations, seconds, seconds_per_localization. They are kept with the hashes
    of the answers, so that no answers are without them; timings.csv is a copy.
    """
    hashes = _hashes(folder)
    known = [hashes[name] for name in (PROVENANCE, FEDDEBUG) if name in hashes]
    rows = [row for entry in known if _is_of(folder, entry) for row in entry.get("timings", [])]
    table = pd.DataFrame(rows, columns=["method", "localizations", "seconds"])
    return table.assign(seconds_per_localization=table["seconds"] / table["localizations"])
