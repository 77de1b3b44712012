"""Random damage of a storage: every kind takes the storage, a file of it and a generator of random numbers."""

import json
import os
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

import pandas as pd

from tests.rewriting import rewrite

Mutation = Callable[[Path, Path, Random], None]
KINDS: dict[str, Mutation] = {}
FORGED = ("json reseal", "json old schema", "json text")  # a forger's, who can write another hash: no traceback


def kind(name: str) -> Callable[[Mutation], Mutation]:
    def add(mutation: Mutation) -> Mutation:
        KINDS[name] = mutation
        return mutation

    return add


def files_of(storage: Path) -> list[Path]:
    """Every file but the log, which is only added to."""
    return sorted(file for file in storage.rglob("*") if file.is_file() and file.suffix != ".log")


@kind("bit flip")
def flip(storage: Path, file: Path, rng: Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 8))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@kind("truncate")
def truncate(storage: Path, file: Path, rng: Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size or 1))


@kind("empty")
def empty(storage: Path, file: Path, rng: Random) -> None:
    file.write_bytes(b"")


@kind("append")
def append(storage: Path, file: Path, rng: Random) -> None:
    with file.open("ab") as handle:
        handle.write(rng.choice((b"\0", b"\n", b" ", rng.randbytes(40))))


@kind("zero range")
def zeros(storage: Path, file: Path, rng: Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) or 1)
    end = min(len(content), start + rng.randrange(1, 64))
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


@kind("garbage range")
def garbage(storage: Path, file: Path, rng: Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) or 1)
    content[start : start + 16] = rng.randbytes(16)
    file.write_bytes(content)


@kind("delete")
def delete(storage: Path, file: Path, rng: Random) -> None:
    file.unlink()


@kind("delete folder")
def delete_folder(storage: Path, file: Path, rng: Random) -> None:
    shutil.rmtree(rng.choice(sorted({each.parent for each in files_of(storage)} - {storage})))


@kind("swap")
def swap(storage: Path, file: Path, rng: Random) -> None:
    same = [each for each in files_of(storage) if each != file and each.suffix == file.suffix]
    other = rng.choice(same or [each for each in files_of(storage) if each != file])
    a, b = file.read_bytes(), other.read_bytes()
    file.write_bytes(b)
    other.write_bytes(a)


@kind("copy of another")
def copied(storage: Path, file: Path, rng: Random) -> None:
    file.write_bytes(rng.choice(files_of(storage)).read_bytes())


@kind("folder in its place")
def folder(storage: Path, file: Path, rng: Random) -> None:
    file.unlink()
    file.mkdir()
    if rng.random() < 0.5:
        (file / "x").write_text("x")


@kind("link to another")
def link(storage: Path, file: Path, rng: Random) -> None:
    other = rng.choice([each for each in files_of(storage) if each != file])
    file.unlink()
    file.symlink_to(other.resolve())


@kind("link to nothing")
def dangling(storage: Path, file: Path, rng: Random) -> None:
    file.unlink()
    file.symlink_to(rng.choice(("gone", str(file), "/dev/null", "/dev/zero")))


@kind("pipe")
def pipe(storage: Path, file: Path, rng: Random) -> None:
    file.unlink()
    os.mkfifo(file)


@kind("unreadable")
def unreadable(storage: Path, file: Path, rng: Random) -> None:
    file.chmod(0)


def _places(value: object, place: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, entry in entries for found in _places(entry, (*place, key)))]


def _other(value: object, rng: Random) -> object:
    """Another value, of its type or of another."""
    odd = [None, True, -1, 0, 2**70, 1e300, float("nan"), "", "x", "../../etc", "\ud800", [], {}, [[]], {"a": {}}, "1"]
    if isinstance(value, (int, float)) and rng.random() < 0.6:
        return rng.choice([value + 1, -value - 1, value * 1.01, value / 2])
    if isinstance(value, str) and value and rng.random() < 0.5:
        index = rng.randrange(len(value))
        return value[:index] + rng.choice("0a9z/") + value[index + 1 :]
    return rng.choice(odd)


def _edit(entries: dict, rng: Random) -> dict:
    """Change, remove or double one value anywhere."""
    place = rng.choice([place for place in _places(entries) if place])
    holder = entries
    for key in place[:-1]:
        holder = holder[key]
    how = rng.random()
    if how < 0.7:
        holder[place[-1]] = _other(holder[place[-1]], rng)
    elif how < 0.85:
        del holder[place[-1]]
    elif isinstance(holder, list):
        holder.append(holder[place[-1]])
    else:
        holder[f"{place[-1]}x"] = holder[place[-1]]
    return entries


def _json(storage: Path, file: Path, rng: Random) -> Path:
    """The file if it is JSON, or else one that is."""
    return file if file.suffix == ".json" else rng.choice([f for f in files_of(storage) if f.suffix == ".json"])


@kind("json edit")
def edit(storage: Path, file: Path, rng: Random) -> None:
    """The hash inside stays as it was."""
    file = _json(storage, file, rng)
    file.write_text(json.dumps(_edit(json.loads(file.read_text()), rng), indent=1))


@kind("json reseal")
def reseal(storage: Path, file: Path, rng: Random) -> None:
    rewrite(_json(storage, file, rng), lambda entries: _edit(entries, rng))


@kind("json old schema")
def old_schema(storage: Path, file: Path, rng: Random) -> None:
    """As an earlier version would have written it, without a hash, and something else changed."""
    file = next(storage.glob("tiny-*/run.json"))
    header = json.loads(file.read_text())
    header.pop("content_sha256", None)
    file.write_text(json.dumps(_edit(header | {"schema": rng.choice((1, 2, 3))}, rng), indent=1))


@kind("json text")
def text(storage: Path, file: Path, rng: Random) -> None:
    """Not what one expects of JSON."""
    odd = (
        b"[" * 200_000,
        b"{}",
        b"[]",
        b"null",
        b"NaN",
        b"1" * 5000,
        b'{"schema": 1e999}',
        b'"\\ud800"',
        b"\xff\xfe{}",
    )
    _json(storage, file, rng).write_bytes(rng.choice(odd))


@kind("swapped columns")
def columns(storage: Path, file: Path, rng: Random) -> None:
    tables = [each for each in files_of(storage) if each.suffix in (".csv", ".parquet")]
    file = file if file in tables else rng.choice(tables)
    table = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    a, b = rng.sample(range(len(table.columns)), 2)
    names = list(table.columns)
    names[a], names[b] = names[b], names[a]
    table.columns = pd.Index(names)
    if file.suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        content = BytesIO()
        table.to_parquet(content, index=False)
        file.write_bytes(content.getvalue())
