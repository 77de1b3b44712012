"""MedMNIST's files: read through its package, with class names, and refused in one sentence where they are wrong."""

import numpy as np
import pytest
import torch

from tracefl.data.examples import MEAN, STD
from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError


def write_npz(folder, flag: str, channels: int, classes: int, without: str = "") -> None:
    """Images whose grey value tells the label, in MedMNIST's layout."""
    arrays = {}
    for split, count in (("train", 300), ("val", 20), ("test", 40)):
        labels = np.arange(count) % classes
        pixels = np.broadcast_to((10 * labels)[:, None, None, None], (count, 28, 28, channels)).astype(np.uint8)
        arrays |= {f"{split}_images": pixels if channels == 3 else pixels[..., 0], f"{split}_labels": labels[:, None]}
    arrays.pop(without, None)
    np.savez(folder / f"{flag}.npz", **arrays)


def wanted(folder, flag: str) -> list[str]:
    return [f"dataset.name={flag}", f"dataset.path={folder}", "num_clients=2", "clients_per_round=2"]


@pytest.mark.parametrize(
    ("flag", "channels", "names"),
    [("pathmnist", 3, ["adipose", "background"]), ("organamnist", 1, ["bladder", "femur-left"])],
)
def test_a_file_is_read_with_its_class_names(config, tmp_path, flag, channels, names):
    write_npz(tmp_path, flag, channels, classes=5)
    data = prepare(config(*wanted(tmp_path, flag), "dirichlet_alpha=10"))
    assert data.class_names[:2] == names
    assert sum(sum(counts.values()) for counts in data.label_counts.values()) > 250
    examples = data.server()
    assert len(examples) == 40
    assert torch.allclose((examples.inputs * STD + MEAN).mean(dim=(1, 2, 3)) * 255, 10.0 * examples.labels, atol=0.01)
    assert len(prepare(config(*wanted(tmp_path, flag), "dataset.test_split=val")).server()) == 20
    assert len(prepare(config(*wanted(tmp_path, flag), 'dataset.test_split="val[:50%]+test"')).server()) == 50


@pytest.mark.parametrize("without", ["train_images", "test_labels"])
def test_missing_arrays_are_named(config, tmp_path, without):
    write_npz(tmp_path, "pathmnist", 3, classes=5, without=without)
    with pytest.raises(TraceFLError, match=rf"pathmnist\.npz cannot be read.*{without}.*dataset\.path=FOLDER"):
        prepare(config(*wanted(tmp_path, "pathmnist")))


def test_a_file_that_is_none_or_absent_is_named(config, tmp_path, monkeypatch):
    with pytest.raises(TraceFLError, match=r"octmnist\.npz does not exist.*zenodo.*dataset\.path=FOLDER"):
        prepare(config(*wanted(tmp_path, "octmnist")))
    (tmp_path / "octmnist.npz").write_bytes(b"PK\x03\x04 half a download")
    with pytest.raises(TraceFLError, match=r"octmnist\.npz cannot be read"):
        prepare(config(*wanted(tmp_path, "octmnist")))
    monkeypatch.setattr("tracefl.data.packaged.reachable", lambda url: False)
    monkeypatch.setattr("medmnist.info.DEFAULT_ROOT", str(tmp_path / "none"))
    with pytest.raises(TraceFLError, match=r"pathmnist\.npz does not exist and cannot be downloaded"):
        prepare(config("dataset.name=pathmnist"))
