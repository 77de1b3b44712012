"""A dataset's folder, looked at before the datasets library reads it.

Nothing in a folder is run and no pickle is read; what its files name lies in the folder, and no
archive unpacks beside it or to more than the disk holds.
"""

import bz2
import gzip
import json
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import datasets
import pyarrow.compute as pc
import yaml
from datasets.utils.extract import Extractor
from PIL import Image

from tracefl.errors import TraceFLError, first_line, require
from tracefl.settings import visible_files

MEMBERS, PART = 1_000_000, 2**24  # of an archive; bytes that are unpacked at once
OPENED_BY: dict[str, Callable[[Path], BinaryIO]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}  # type: ignore[dict-item]
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, ValueError,
              NotImplementedError)  # fmt: skip
REMEDY = "take it out, or get the data from where you trust"


def check_dataset(folder: Path, named: str) -> None:
    """Refuse a folder whose files lead out of it, or that are no files.

    Args:
        folder: The dataset's.
        named: How the user wrote it.

    Raises:
        TraceFLError: The message names the file, what is wrong with it, and the remedy.
    """
    _check_kinds(folder, named)
    left = shutil.disk_usage(datasets.config.HF_CACHE_HOME if _there() else folder).free // 2
    for entry in visible_files(folder):
        file = Path(entry.path)
        shown = f"dataset.path={named}: {file.relative_to(folder)}"
        try:
            if (packed := _how_packed(file)) is not None:
                left -= _check_packed(file, packed, shown, left)
        except UNREADABLE as error:
            raise TraceFLError(f"{shown} is no archive that can be read ({first_line(error)}): {REMEDY}.") from error
    for name in ("README.md", "dataset_infos.json", "state.json", "dataset_dict.json"):
        for file in (folder / name, *folder.glob(f"*/{name}")):
            if file.is_file():
                _check_names(_content(file), f"dataset.path={named}: {file.relative_to(folder)}")


def check_paths(splits: datasets.DatasetDict, folder: Path | None, named: str) -> None:
    """Refuse images that are given by a path or an address outside of the dataset.

    Args:
        splits: As loaded.
        folder: The dataset's; None: it is the hub's, and lies in its cache.
        named: How the user wrote it.

    Raises:
        TraceFLError: The message names the first row.
    """
    cache = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, datasets.config.EXTRACTED_DATASETS_PATH)
    roots = tuple(os.path.join(os.path.realpath(root), "") for root in (*cache, *([folder] if folder else [])))
    for split, table in splits.items():
        for column, feature in table.features.items():
            of_images = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "path" in feature)
            for row, path in _paths(table, column) if of_images else ():
                inside = os.path.normpath(path.rpartition("::")[2]).startswith(roots)
                holds = f"dataset {named}: split {split}, row {row}, column {column} names {path!r}"
                require(inside, f"{holds}, which is not in the dataset: put the images themselves there.")


def _paths(table: datasets.Dataset, column: str) -> Iterator[tuple[int, str]]:
    """(row, path) of the images that are not in the table."""
    stored = table.select_columns([column]).with_format("arrow")[:][column]
    chunks = stored.chunks if hasattr(stored, "chunks") else [stored]
    row = 0
    for chunk in chunks:
        chunk = getattr(chunk, "storage", chunk)
        fields = [chunk.type.field(k).name for k in range(chunk.type.num_fields)]
        if "path" in fields:
            paths = pc.struct_field(chunk, "path")
            here = pc.is_valid(pc.struct_field(chunk, "bytes")) if "bytes" in fields else pc.is_null(paths)
            for k, (path, in_table) in enumerate(zip(paths.to_pylist(), here.to_pylist(), strict=True)):
                if path and not in_table:
                    yield row + k, str(path)
        row += len(chunk)


def _check_kinds(folder: Path, named: str) -> None:
    """Refuse pipes and devices, on which a reader would wait for ever."""
    for place, _, names in os.walk(folder):
        for file in (Path(place, name) for name in names):
            mode = file.stat().st_mode if file.exists() else stat.S_IFREG
            is_file = f"dataset.path={named}: {file.relative_to(folder)} is a pipe or a device, not a file"
            require(stat.S_ISREG(mode), f"{is_file}: {REMEDY}.")


def _how_packed(file: Path) -> str | None:
    """What the datasets library unpacks a file as, whatever it is called; None: it does not."""
    if file.name.lower().endswith((".zip", ".tar")):
        return file.name.lower()[-3:]
    if file.suffix.lower() in (".parquet", *Image.registered_extensions()):
        return None
    found = Extractor.infer_extractor_format(file)
    return None if found is None else str(found)


def _check_packed(file: Path, packed: str, shown: str, left: int) -> int:
    """The bytes that a file unpacks to; refuse what would unpack elsewhere, or fill the disk.

    It may take half of what is free, as the library writes it once more as a table.
    """
    total = 0
    for number, (name, size, odd) in enumerate(_members(file, packed)):
        parts = PurePosixPath(name.replace("\\", "/"))
        plain = not (odd or parts.is_absolute() or ".." in parts.parts or ":" in name[:2])
        require(plain, f"{shown} holds {name!r}, {odd or 'which leads out of the archive'}: {REMEDY}.")
        total += size
        too_large = f"{shown} unpacks to more than {total / 2**30:.3g} GiB, and {left / 2**30:.3g} GiB are free for it"
        require(total < left and number < MEMBERS, f"{too_large}, half of the disk's rest: {REMEDY}, or make room.")
    return total


def _there() -> bool:
    return Path(datasets.config.HF_CACHE_HOME).exists()


def _members(file: Path, packed: str) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, what is odd about it) of what an archive holds, or of a packed file's parts."""
    if packed == "zip":
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                linked = stat.S_ISLNK(info.external_attr >> 16)
                yield info.filename, info.file_size, "a link" if linked else ""
    elif packed == "tar":
        with tarfile.open(file) as unpacked:
            for member in unpacked:
                plain = member.isreg() or member.isdir()
                yield member.name, member.size, "" if plain else "a link or a device"
    elif packed in OPENED_BY:
        with OPENED_BY[packed](file) as stream:
            while size := len(stream.read(PART)):
                yield file.name, size, ""
    else:
        yield file.name, 0, f"packed as {packed}, which does not say how large it becomes"


def _content(file: Path) -> Any:
    """What a JSON file or the head of a README says; None where it is not written so."""
    try:
        text = file.read_text(encoding="utf-8")
        return yaml.safe_load(text.split("---")[1]) if file.suffix == ".md" else json.loads(text)
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError):
        return None  # its reader says so


def _check_names(content: Any, shown: str) -> None:
    """Refuse files that are named above the folder, by a whole path or an address."""
    for name in _file_names(content):
        out = "://" in name or "::" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        require(not out, f"{shown} names {name!r}, which is not in the folder: {REMEDY}.")


def _file_names(content: Any, inside: bool = False) -> Iterator[str]:
    """Every text below data_files, data_dir, filename and splits, however deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _file_names(value, inside or key in ("data_files", "_data_files", "data_dir", "splits"))
    elif isinstance(content, list):
        for entry in content:
            yield from _file_names(entry, inside)
    elif inside and isinstance(content, str):
        yield content
