"""Prepared data: what clients and server read is what the dataset holds, prepared once."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from PIL import Image

from tests.rewriting import rewrite
from tracefl.data.examples import MEAN, STD, normalize
from tracefl.data.prepare import prepare
from tracefl.data.prepared import read_info
from tracefl.data.sources import load_source
from tracefl.errors import TraceFLError
from tracefl.federation.client_app import own_examples
from tracefl.federation.server_app import where_data_are


def write_dataset(folder, label: str = "label", names=("cat", "dog"), mode: str = "RGB", count: int = 120) -> None:
    """A local image dataset whose pixels tell the label and whose splits are told apart by brightness."""
    for split, base in (("train", 10), ("test", 100)):
        labels = np.arange(count) % len(names)
        images = [Image.new(mode, (48, 48), base + int(k) if mode == "L" else (base + int(k),) * 3) for k in labels]
        features = datasets.Features({"picture": datasets.Image(), label: datasets.ClassLabel(names=list(names))})
        table = datasets.Dataset.from_dict({"picture": images, label: labels}, features=features)
        folder.mkdir(exist_ok=True)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def test_digits_reach_clients_and_server(config):
    data = prepare(config())
    assert data.num_classes == 10
    assert list(data.label_counts) == [str(client) for client in range(10)]
    for client, counts in data.label_counts.items():
        examples = data.client(client)
        assert examples.inputs.shape == (sum(counts.values()), 3, 32, 32)
        assert {label: int((examples.labels == label).sum()) for label in counts} == counts
        assert min(counts.values()) >= 10
    assert len(data.server()) == 360


def test_normalization_is_imagenets():
    pixels = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    expected = (pixels.float() / 255 - MEAN) / STD
    torch.testing.assert_close(normalize(pixels), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_local_dataset_is_found_by_its_features(config, tmp_path, mode):
    write_dataset(tmp_path / "pets", mode=mode)
    data = prepare(config(f"dataset.path={tmp_path}/pets", "dataset.name=pets", "num_clients=2", "clients_per_round=2"))
    assert data.class_names == ["cat", "dog"]
    examples = data.client("0")
    grey = (examples.inputs * STD + MEAN)[:, 0].mean(dim=(1, 2)) * 255
    assert torch.allclose(grey, 10.0 + examples.labels, atol=0.01)
    assert torch.allclose((data.server().inputs * STD + MEAN).amin() * 255, torch.tensor(100.0), atol=0.01)


def test_it_is_prepared_once_until_the_files_change(config, tmp_path):
    write_dataset(tmp_path / "pets")
    c = config(f"dataset.path={tmp_path}/pets", "dataset.name=pets", "num_clients=2", "clients_per_round=2")
    first = prepare(c)
    stamp = (first.folder / "data.json").stat().st_mtime_ns
    assert (prepare(c).folder / "data.json").stat().st_mtime_ns == stamp
    write_dataset(tmp_path / "pets", count=140)
    again = prepare(c)
    assert again.digest != first.digest
    c.check_dataset_cache = False
    assert prepare(c).digest == again.digest
    assert (again.folder / "data.json").stat().st_mtime_ns > stamp


def test_the_number_of_classes_can_be_raised_but_not_cut(config, tmp_path):
    write_dataset(tmp_path / "pets")
    wanted = (f"dataset.path={tmp_path}/pets", "dataset.name=pets", "num_clients=2", "clients_per_round=2")
    assert prepare(config(*wanted, "dataset.num_classes=4")).num_classes == 4
    write_dataset(tmp_path / "pets", names=("ant", "bee", "cat"))
    with pytest.raises(TraceFLError, match=r"num_classes=2 is too small: pets has 3 classes"):
        prepare(config(*wanted, "dataset.num_classes=2"))


def test_columns_can_be_named_and_wrong_names_are_quoted(config, tmp_path):
    write_dataset(tmp_path / "pets", label="kind")
    wanted = (f"dataset.path={tmp_path}/pets", "dataset.name=pets", "num_clients=2", "clients_per_round=2")
    named = prepare(config(*wanted, "dataset.label_column=kind", "dataset.input_columns=[picture]"))
    assert named.class_names == ["cat", "dog"]
    with pytest.raises(TraceFLError, match=r"dataset\.label_column=sort is no column"):
        prepare(config(*wanted, "dataset.label_column=sort"))
    with pytest.raises(TraceFLError, match=r"dataset\.input_columns=photo is no column"):
        prepare(config(*wanted, "dataset.input_columns=[photo]"))
    with pytest.raises(TraceFLError, match=r"dataset\.test_split=dev is no split"):
        prepare(config(*wanted, "dataset.test_split=dev"))


def test_string_labels_mean_the_same_in_both_splits(config, tmp_path):
    for split, names in (("train", ["ant", "bee", "cat"]), ("test", ["cat", "bee"])):
        images = [Image.new("L", (8, 8), 10 * k) for k in range(60)]
        labels = [names[k % len(names)] for k in range(60)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            str(tmp_path / f"{split}-0.parquet")
        )
    source = load_source(config(f"dataset.path={tmp_path}"))
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.labels(source.test)[:2].tolist() == [2, 1]


def test_labels_outside_the_classes_are_refused(config, tmp_path):
    for split, labels in (("train", [0, 1] * 20), ("test", [0, 2] * 20)):
        images = [Image.new("L", (8, 8), 100)] * 40
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            str(tmp_path / f"{split}-0.parquet")
        )
    lacks = r"split test, row 1 has the label 2, which split train lacks \(it has 0, 1\)"
    with pytest.raises(TraceFLError, match=f"{lacks}: drop such rows or set dataset.num_classes=3"):
        prepare(config(f"dataset.path={tmp_path}"))


def test_a_column_of_neither_images_nor_texts_is_refused(config, tmp_path):
    write_dataset(tmp_path / "pets")
    with pytest.raises(TraceFLError, match=r"input_columns=label is neither an image nor a text"):
        prepare(config(f"dataset.path={tmp_path}/pets", "dataset.input_columns=[label]"))


def test_a_storage_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceFLError, match=r"storage\.dir=.*file cannot be written to"):
        prepare(config(f"storage.dir={tmp_path}/file"))


def test_a_dataset_without_a_label_column_is_refused_and_leaves_nothing(config, tmp_path):
    datasets.Dataset.from_dict({"x": [1.0, 2.0]}).to_parquet(str(tmp_path / "train-0.parquet"))
    datasets.Dataset.from_dict({"x": [1.0, 2.0]}).to_parquet(str(tmp_path / "test-0.parquet"))
    with pytest.raises(TraceFLError, match=r"no label column among \['x'\].*dataset.label_column=NAME"):
        prepare(config(f"dataset.path={tmp_path}", "dataset.name=plain"))
    assert not (tmp_path / "logs").exists()


def test_a_failure_while_writing_leaves_nothing(config, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("tracefl.data.prepare.save", broken)
    with pytest.raises(RuntimeError, match="disk full"):
        prepare(config())
    assert list((tmp_path / "logs" / "data").iterdir()) == []


SMALL = ("num_clients=2", "clients_per_round=2", "data_dist.max_per_client_data_size=12")
FILES = ("clients/1.safetensors", "server.safetensors", "data.json")


@pytest.mark.parametrize(
    ("damage", "name"),
    [("changed", FILES[0]), ("changed", FILES[2]), ("missing", FILES[0]), ("missing", FILES[2]), ("cut", FILES[1]),
     ("another's", FILES[1])],
)  # fmt: skip
def test_damaged_data_are_prepared_again(config, name, damage):
    c = config(*SMALL)
    whole = prepare(c)
    content = {file: (whole.folder / file).read_bytes() for file in FILES}
    file = whole.folder / name
    match damage:
        case "changed":
            file.write_bytes(content[name][:-9] + bytes([content[name][-9] ^ 1]) + content[name][-8:])
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(content[name][:-100])
        case "another's":
            file.write_bytes((whole.folder / "clients/0.safetensors").read_bytes())
    again = prepare(c)
    assert {file: (whole.folder / file).read_bytes() for file in FILES} == content
    assert again.digest == whole.digest
    told = [note for note in again.notes if "is prepared again: " in note]
    assert len(told) == (0 if (name, damage) == ("data.json", "missing") else 1)
    assert all(name in note for note in told)
    assert prepare(c).notes == whole.notes


def test_data_that_change_after_they_were_opened_are_refused(config):
    data = prepare(config(*SMALL))
    for name, read in ((FILES[0], lambda: data.client("1")), (FILES[1], data.server)):
        file = data.folder / name
        file.write_bytes(file.read_bytes()[:-1] + b"\xee")
        with pytest.raises(TraceFLError, match=rf"{name} cannot be read \(it is not as it was prepared\)"):
            read()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(TraceFLError, match=rf"{name} cannot be read \(it is no file\)"):
            read()


def test_a_client_refuses_damaged_data(config):
    data = prepare(config(*SMALL))
    file = data.folder / FILES[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\xee")
    context = Context(run_id=0, node_id=1, node_config={"partition-id": 1}, state=RecordDict(), run_config={})
    with pytest.raises(ValueError, match="it is not as it was prepared"):
        own_examples(where_data_are(data), context)


def test_settings_and_files_of_others_are_no_data(config):
    c = config(*SMALL)
    data = prepare(c)
    rewrite(data.folder / "data.json", lambda info: info | {"settings": info["settings"] | {"seed": 5}})
    assert "with other settings" in prepare(c).notes[0]
    for change, told in [
        ({"sha256": {"../../x.safetensors": "ab" * 32}}, "must name files of prepared data"),
        ({"label_counts": {"0": {"cat": 1}}}, r"label_counts\['0'\] must hold whole numbers"),
        ({"class_names": 7}, "class_names must be a list of texts"),
        ({"sha256": {}}, "must have the server's file and that of each client"),
    ]:
        rewrite(data.folder / "data.json", lambda info, change=change: info | change)
        with pytest.raises(TraceFLError, match=told):
            read_info(data.folder)
        assert prepare(c).digest == data.digest


def test_what_dead_processes_left_is_swept(config, tmp_path):
    """Half-prepared data and temporary files; not those of a process that lives, nor anything of the user's."""
    c = config(*SMALL)
    whole = prepare(c).folder
    parent = whole.parent
    dead, alive, own = parent / "dead-0123abcd", parent / "alive-0123abcd", parent / "mine-0123abcd"
    for folder in (dead, alive, own):
        (folder / "clients").mkdir(parents=True)
        (folder / "clients" / ".0.safetensors.tmp").write_text("half")
        (folder / ".lock").touch()
    (own / "notes.txt").write_text("keep")
    (whole / ".server.safetensors.tmp").write_text("half")
    words = "import sys, filelock; held = filelock.FileLock(sys.argv[1]); held.acquire(); "
    words += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", words, alive / ".lock"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    c.check_dataset_cache = False
    prepare(c)
    assert not dead.exists()
    assert not list(whole.glob(".*.tmp"))
    assert (own / "notes.txt").exists()
    assert (alive / "clients" / ".0.safetensors.tmp").exists()
    other.communicate("")
    prepare(c)
    assert not alive.exists()


@pytest.mark.parametrize(("name", "classes", "first"), [("mnist", 10, "0"), ("cifar10", 10, "airplane")])
@pytest.mark.slow
@pytest.mark.slow
def test_real_images(config, real_data, name, classes, first):
    limits = ("data_dist.max_per_client_data_size=100", "data_dist.max_server_data_size=200")
    data = prepare(config(f"dataset.name={name}", f"dataset.path={real_data / name}", *limits))
    assert data.num_classes == classes
    assert data.class_names[0] == first
    assert len(data.server()) == 200
    assert all(len(data.client(client)) <= 100 for client in data.label_counts)
    assert json.loads((data.folder / "data.json").read_text())["label_counts"]
