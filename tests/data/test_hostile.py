"""Datasets that were made to do harm: each is one sentence; nothing of them is run, nothing outside is read."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tracefl.data.guard import check_dataset
from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError

TEXT = "model.name=gpt2"
LINES = "text,label\n" + "good words,0\nbad words,1\n" * 30
ROWS = LINES.encode() + b"good words,0\n" * 100_000


def png(side: int = 8, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(harmed) (w) file closefile\n%%EOF\n"


def images(of_one: dict | None = None) -> Callable[[Path], object]:
    """40 images in Parquet, of which one is stored as given."""

    def write(folder: Path) -> None:
        rows = [{"bytes": png(seed=k), "path": None} for k in range(40)]
        if of_one is not None:
            rows[7] = of_one
        table = {"image": pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "label": [0, 1] * 20}
        for split in ("train", "test"):
            pq.write_table(pa.table(table), folder / f"{split}-0.parquet")

    return write


def texts(**files: str | bytes) -> Callable[[Path], object]:
    """A set of texts that is well, with files in place of some or beside them."""

    def write(folder: Path) -> None:
        for name, content in {"train.csv": LINES, "test.csv": LINES, **files}.items():
            place = folder / name
            place.write_bytes(content) if isinstance(content, bytes) else place.write_text(content)

    return write


def only(**files: str | bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        texts(**files)(folder)
        for name in {"train.csv", "test.csv"} - files.keys():
            (folder / name).unlink()

    return write


def zipped(**members: bytes) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        texts()(folder)
        with zipfile.ZipFile(folder / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    return write


def huge_zip(folder: Path) -> None:
    zipped(**{"train.csv": b"x" * 1000})(folder)
    content = bytearray((folder / "train.zip").read_bytes())
    place = content.rindex(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 2**32 - 2)  # the size that it says it unpacks to
    (folder / "train.zip").write_bytes(content)


def tarred(*members: tarfile.TarInfo) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        with tarfile.open(folder / "train.tar", "w") as archive:
            for member in members:
                archive.addfile(member, io.BytesIO(b"x" * member.size))
        (folder / "test.tar").write_bytes((folder / "train.tar").read_bytes())

    return write


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 1, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def packed_zip(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, LINES)
    return content.getvalue()


def packed_tar(*members: tarfile.TarInfo) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for each in members:
            archive.addfile(each, io.BytesIO(b"x" * each.size))
    return content.getvalue()


def cut_tar(folder: Path) -> None:
    tarred(member("0001.png", size=5000), member("0001.cls"))(folder)
    for name in ("train.tar", "test.tar"):
        (folder / name).write_bytes((folder / name).read_bytes()[:1500])


def saved(change: Callable[[dict], dict], name: str = "state.json") -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        columns = {"text": ["good words", "bad words"] * 30, "label": [0, 1] * 30}
        both = datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split in ("train", "test")})
        both.save_to_disk(str(folder))
        file = folder / name if name == "dataset_dict.json" else folder / "train" / name
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return write


class Payload:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


QUICK = (  # the others are slow only because they are many
    "an image's path elsewhere", "an image of 100 million pixels", "a ragged table", "a zip that leads out",
    "a tar with a link", "a table that is a zip", "half a packed table",
    "a README that names files above", "a saved set that names files above", "a pipe",
)  # fmt: skip
OUT = "not in the (folder|dataset)"
HOSTILE = {
    # images
    "an image's path elsewhere": (images({"bytes": None, "path": "/etc/hostname"}), OUT),
    "an image's path above": (images({"bytes": None, "path": "../../secret.png"}), OUT),
    "an image's address": (images({"bytes": None, "path": "http://127.0.0.1:9/a.png"}), OUT),
    "a path chained to another": (images({"bytes": None, "path": "zip://a.png::/etc/a.zip"}), OUT),
    "an image of 400 million pixels": (images({"bytes": bomb(20_000), "path": None}), "row 7, column image"),
    "an image of 100 million pixels": (images({"bytes": bomb(10_000), "path": None}), "10000 x 10000 pixels: drop"),
    "half an image": (images({"bytes": png(64)[:2000], "path": None}), "row 7, column image has no readable image"),
    "an image that is none": (images({"bytes": b"MZ\x90\0", "path": None}), "row 7, .*no format that Pillow knows"),
    "a drawing that is a program": (images({"bytes": EPS, "path": None}), "row 7, .*EPS, which other programs"),
    "a pickle as image": (images({"bytes": pickle.dumps(Payload()), "path": None}), "row 7, .* no readable image"),
    # tables
    "Parquet that is none": (only(**{"train.parquet": b"PAR1 garbage", "test.parquet": b"PAR1"}), "cannot be read"),
    "Arrow that is none": (only(**{"train.arrow": b"ARROW1\0\0garbage", "test.arrow": b""}), "cannot be read"),
    "JSON that breaks off": (only(**{"train.json": '{"text": "a', "test.json": "{}"}), "cannot be read"),
    "JSON lines of two kinds": (
        only(**{"train.jsonl": '{"text": 1, "label": 0}\n{"text": [1], "label": {}}\n', "test.jsonl": "{}"}), "."),
    "deep JSON": (only(**{"train.json": "[" * 100_000, "test.json": "[]"}), "cannot be read"),
    "a table of bytes": (texts(**{"train.csv": bytes(range(256)) * 40}), "cannot be read"),
    "a ragged table": (texts(**{"train.csv": LINES + "a,b,c,d,e\n"}), "cannot be read"),
    "an empty table": (texts(**{"train.csv": ""}), "cannot be read"),
    "pickles alone": (only(**{"train.pkl": pickle.dumps(Payload()), "test.pkl": b""}), "hub's layout"),
    "HDF5 that is none": (only(**{"train.h5": b"\x89HDF\r\n\x1a\n", "test.h5": b""}), "cannot be read"),
    # archives
    "a zip that leads out": (zipped(**{"../../evil.csv": b"a"}), "leads out of the archive"),
    "a zip by whole paths": (zipped(**{"/tmp/evil.csv": b"a"}), "leads out of the archive"),
    "a zip of another system": (zipped(**{"C:\\evil.csv": b"a"}), "leads out of the archive"),
    "a zip that is none": (texts(**{"train.zip": b"PK\x03\x04garbage"}), "no archive that can be read"),
    "a tar that leads out": (tarred(member("../../evil.png"), member("0.cls")), "leads out of the archive"),
    "a tar with a link": (tarred(member("0.png", tarfile.SYMTYPE, 0, "/etc/passwd")), "a link or a device"),
    "a tar with a hard link": (tarred(member("0.png", tarfile.LNKTYPE, 0, "/etc/passwd")), "a link or a device"),
    "a tar with a device": (tarred(member("0.png", tarfile.CHRTYPE, 0)), "a link or a device"),
    "a tar that breaks off": (cut_tar, "no archive that can be read|cannot be read"),
    "a tar that is none": (only(**{"train.tar": b"garbage" * 200, "test.tar": b""}), "no archive that can be read"),
    "a tar with a pickle": (
        tarred(member("a.pickle", size=4), member("a.cls"), member("b.pickle", size=4), member("b.cls")), "."),
    "a table that is a zip": (texts(**{"train.csv": packed_zip("../../evil.csv")}), "leads out of the archive"),
    "a table that is a tar": (texts(**{"train.csv": packed_tar(member("a.csv", tarfile.SYMTYPE, 0, "/etc/passwd"))}),
                              "a link or a device"),
    "a packed tar with a link": (
        texts(**{"train.tar.gz": gzip.compress(packed_tar(member("a.csv", tarfile.LNKTYPE, 0, "/etc/passwd")))}),
        "a link or a device"),
    "half a packed table": (texts(**{"train.csv.gz": gzip.compress(ROWS)[:40]}), "no archive that can be read"),
    "a table packed in a way of its own": (texts(**{"train.csv": b"\x28\xb5\x2f\xfd garbage"}), "packed as zstd"),
    # what describes them
    "a README that names files above": (
        texts(**{"README.md": "---\nconfigs:\n- config_name: a\n  data_files: ../../*\n---\n"}), OUT),
    "a README that names an address": (
        texts(**{"README.md": "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n"
                              "    path: http://127.0.0.1:9/a.csv\n---\n"}), OUT),
    "a README by whole paths": (
        texts(**{"README.md": "---\nconfigs:\n- config_name: a\n  data_dir: /etc\n---\n"}), OUT),
    "a README that makes objects": (
        texts(**{"README.md": "---\nconfigs: !!python/object/apply:os.mkdir [harmed]\n---\n"}), "."),
    "a saved set that names files above": (saved(lambda c: c | {"_data_files": [{"filename": "../../a.arrow"}]}), OUT),
    "a saved set of other splits": (saved(lambda _: {"splits": ["../../etc"]}, "dataset_dict.json"), OUT),
    "a saved set without its files": (saved(lambda c: c | {"_data_files": [{"filename": "a"}]}), "cannot be read"),
    "a pipe": (lambda folder: [texts()(folder), os.mkfifo(folder / "more.csv")], "a pipe or a device"),
}  # fmt: skip


KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in HOSTILE]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_dataset_is_one_sentence(config, tmp_path, monkeypatch, kind):
    write, words = HOSTILE[kind]
    folder = tmp_path / "data" / "hostile"
    folder.mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(png())
    write(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model = [] if "image" in kind or "drawing" in kind else [TEXT, "model.config={num_hidden_layers: 1}"]
    ones = ("num_clients=1", "clients_per_round=1", "data_dist.min_examples_per_class=1")
    with pytest.raises(TraceFLError, match=words) as error:
        prepare(config(f"dataset.path={folder}", *ones, *model))
    assert len(str(error.value)) < 900
    assert not [file for file in tmp_path.rglob("*") if file.name in ("harmed", "evil.csv", "evil.png")]


def test_a_zip_that_fills_the_disk_is_refused(config, tmp_path, monkeypatch):
    huge_zip(tmp_path)
    free = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr("tracefl.data.guard.shutil.disk_usage", lambda _: free)
    with pytest.raises(TraceFLError, match=r"train\.zip unpacks to more than 4 GiB, and 0\.5 GiB are free"):
        prepare(config(f"dataset.path={tmp_path}", TEXT))


BOMBS = {
    "train.csv.gz": gzip.compress(ROWS),
    "train.csv.bz2": bz2.compress(ROWS),
    "train.csv.xz": lzma.compress(ROWS),
    "train.csv": gzip.compress(ROWS),  # whatever it is called
    "train.tar.gz": gzip.compress(packed_tar(member("train.csv", size=len(ROWS)))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_unpacks_to_more_than_half_of_the_disks_rest_is_refused(config, tmp_path, monkeypatch, name):
    only(**{name: BOMBS[name], "test.csv": LINES})(tmp_path)
    free = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("tracefl.data.guard.shutil.disk_usage", lambda _: free)
    with pytest.raises(TraceFLError, match=rf"{name} unpacks to more than .* are free for it"):
        prepare(config(f"dataset.path={tmp_path}", TEXT))


def test_packed_files_count_together(tmp_path, monkeypatch):
    texts(**{"train.csv.gz": gzip.compress(ROWS), "test.csv.gz": gzip.compress(ROWS)})(tmp_path)
    for free, refused in ((5 * len(ROWS), False), (3 * len(ROWS), True)):
        monkeypatch.setattr("tracefl.data.guard.shutil.disk_usage", lambda _, f=free: type("Usage", (), {"free": f}))
        with pytest.raises(TraceFLError, match="unpacks to more") if refused else nullcontext():
            check_dataset(tmp_path, "here")


def test_a_full_disk_is_said_as_one(config, tmp_path, monkeypatch):
    texts()(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(TraceFLError, match=r"cannot be used \(No space left on device\): make room there"):
        prepare(config(f"dataset.path={tmp_path}", TEXT))


def test_images_in_the_folder_are_read(config, tmp_path):
    for split in ("train", "test"):
        for k in range(24):
            file = tmp_path / "pets" / split / "ab"[k % 2] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(seed=k))
    data = prepare(config(f"dataset.path={tmp_path}/pets", "num_clients=1", "clients_per_round=1"))
    assert sum(data.label_counts["0"].values()) == 24
