"""An input of one's own goes through the run's preparation."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.tables import encoded, write
from tracefl import Run, TraceFLError
from tracefl.data.prepare import prepare
from tracefl.evaluation.own import image_inputs, text_inputs


def pictures(config, folder: Path, images: list[Image.Image]) -> Run:
    """A run of two classes of these pictures; its model is not asked."""
    columns = {"image": [encoded(image) for image in images], "label": [k % 2 for k in range(len(images))]}
    write(folder / "pictures", columns, test=columns)
    data = prepare(config(f"dataset.path={folder}/pictures", "num_clients=1", "clients_per_round=1"))
    header = {
        "model": {"name": "resnet18", "num_classes": 2},
        "data_folder": os.path.relpath(data.folder, folder / "r"),
    }
    return Run.create(
        folder / "r",
        initial={"w": torch.zeros(1)},
        clients=[],
        data_sha256=data.digest,
        class_names=["0", "1"],
        **header,
    )


def coloured(k: int) -> Image.Image:
    return Image.linear_gradient("L").resize((40, 20 + k % 9)).convert("RGB").rotate(10 * k, fillcolor=(k, 200, 9 * k))


def test_a_picture_of_ones_own_goes_through_the_runs_preparation(config, tmp_path):
    run = pictures(config, tmp_path, [coloured(k) for k in range(24)])
    recorded = run.server_examples().inputs
    coloured(7).save(tmp_path / "own.png")
    own = image_inputs(run, tmp_path / "own.png")
    assert own.shape == (1, 3, 32, 32)
    assert (recorded == own).all(dim=(1, 2, 3)).sum() == 1
    grey = Image.new("L", (5, 7), 100)
    grey.save(tmp_path / "grey.jpg")
    assert image_inputs(run, tmp_path / "grey.jpg").shape == (1, 3, 32, 32)
    deep, clear = Image.new("I;16", (4, 4), 7), Image.new("RGBA", (4, 4), (1, 2, 3, 0))
    deep.save(tmp_path / "deep.png")
    clear.save(tmp_path / "clear.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    (tmp_path / "empty.png").touch()
    for name, said in {
        "deep.png": "deep.png is a 16-bit image, but no training image is",
        "clear.png": "clear.png is transparent, but no training image is",
        "no.png": "no.png has no readable image",
        "empty.png": "empty.png has an image of zero bytes",
        "gone.png": "gone.png cannot be read",
        "": "cannot be read",
    }.items():
        with pytest.raises(TraceFLError, match=said):
            image_inputs(run, tmp_path / name)
    with pytest.raises(TraceFLError, match=r"is a run of images: give the file of one instead of a text"):
        text_inputs(run, "words")
    (tmp_path / "r" / run["data_folder"] / "data.json").write_text('{"sha256": {}}')
    with pytest.raises(TraceFLError, match="is of an earlier version, without a hash"):
        image_inputs(run, tmp_path / "own.png")
