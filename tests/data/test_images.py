"""Images of every mode become bytes that still show what the image shows."""

import io
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw

from tests.data.tables import encoded, picture, texts, write
from tracefl.data.images import Form, _to_bytes, find_form, pixels
from tracefl.data.splits import Split
from tracefl.errors import TraceFLError

SIZE = 32
LABELS = [0, 1] * 10


def mask(kind: int) -> Image.Image:
    """A bar: upright for class 0, lying for class 1."""
    image = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(image).rectangle((12, 2, 19, 29) if kind == 0 else (2, 12, 29, 19), fill=255)
    return image


def shown(mode: str, kind: int, low=10, high=200) -> Image.Image:
    """The bar in a mode, bright on dark."""
    bars = np.where(np.asarray(mask(kind)) > 0, high, low)
    if mode.startswith("I;16"):
        order = ">u2" if mode == "I;16B" else "<u2"
        return Image.frombytes(mode, (SIZE, SIZE), bars.astype(order).tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(bars.astype(np.int32 if mode == "I" else np.float32))
    grey = Image.fromarray(bars.astype(np.uint8))
    if mode in ("La", "RGBa"):
        return grey.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    if mode == "PA":
        return grey.convert("P").convert("PA")
    if mode in ("HSV", "YCbCr", "CMYK", "RGBX"):
        return grey.convert("RGB").convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", [grey, Image.new("L", grey.size, 128), Image.new("L", grey.size, 128)])
    return grey.point(lambda v: 255 * (v > 100)).convert("1") if mode == "1" else grey.convert(mode)


MODES = [
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"),
    *("I", "I;16", "I;16B", "I;16L", "I;16N", "F"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_two_classes_differ_in_every_mode(mode, channels):
    span, split = (10.0, 200.0), Split("train", Dataset.from_dict({}))
    form = Form(channels, None, {"16-bit": span, "whole-number": span, "floating-point": span})
    first, second = (
        np.asarray(_to_bytes(form, split, "image", 0, shown(mode, kind)).convert("L")).astype(int) for kind in (0, 1)
    )
    bars = [np.asarray(mask(kind)) > 0 for kind in (0, 1)]
    assert (first[bars[0]].min() - first[~bars[0]].max()) > 100
    assert (second[bars[1]].min() - second[~bars[1]].max()) > 100
    assert np.abs(first - second).max() > 100


def folder_of(tmp_path, train: list[bytes], test: list[bytes] | None = None, labels=None):
    test = train if test is None else test
    return write(
        tmp_path / "d",
        {"image": train, "label": (labels or LABELS)[: len(train)]},
        test={"image": test, "label": (labels or LABELS)[: len(test)]},
    )


def tensors(source, split, channels=None) -> tuple[Form, torch.Tensor]:
    form = find_form(source.train, "image", channels)
    return form, pixels(form, "image", split, np.arange(len(split)))["pixels"]


FILES = [
    *[(mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    *[
        (mode, "tiff")
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
    ],
    *[("CMYK", "jpeg"), ("L", "gif"), ("RGBA", "webp"), ("RGB", "bmp"), ("I;16B", "tiff"), ("RGBA", "gif")],
]


@pytest.mark.parametrize(("mode", "kind"), FILES)
@pytest.mark.slow
@pytest.mark.slow
def test_two_classes_differ_in_every_file(read, tmp_path, mode, kind):
    source = read(folder_of(tmp_path, [encoded(shown(mode, label), kind) for label in LABELS]))
    _, found = tensors(source, source.test)
    assert (found[0].int() - found[1].int()).abs().max() > 100
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_greys_share_one_range_and_the_test_images_are_clipped_to_it(read, tmp_path, mode):
    kind = "png" if mode == "I;16" else "tiff"
    train = [encoded(shown(mode, label, 1000, 3000 + 2000 * label), kind) for label in LABELS]
    test = [encoded(shown(mode, 0, 0, 9000), kind), encoded(shown(mode, 1, 1000, 3000), kind)]
    source = read(folder_of(tmp_path, train, test))
    form, found = tensors(source, source.train)
    assert list(form.ranges.values()) == [(1000, 5000)]
    assert (found[0].min(), found[0].max(), found[1].max()) == (0, 128, 255)  # brightness tells the classes
    _, found = tensors(source, source.test)
    assert (found[0].min(), found[0].max(), found[1].max()) == (0, 255, 128)
    assert "greys from 1000 to 5000, those of the training images, become 0 to 255" in next(form.notes())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_that_are_no_numbers_are_refused_by_row(read, tmp_path, bad, split):
    good = [encoded(shown("F", label), "tiff") for label in LABELS]
    values = np.asarray(shown("F", 0)).copy()
    values[3, 3] = bad
    mended = [*good[:7], encoded(Image.fromarray(values), "tiff"), *good[8:]]
    source = read(folder_of(tmp_path, mended if split == "train" else good, mended if split == "test" else good))
    with pytest.raises(TraceFLError, match=rf"^split {split}, row 7, column image has pixels that are NaN or infinite"):
        tensors(source, source.test)


def strokes(shade: int, kind: int, mode: str = "RGBA") -> bytes:
    """A bar of one shade on nothing."""
    image = Image.merge("LA", [Image.new("L", (SIZE, SIZE), shade), mask(kind)])
    if mode == "P":  # the palette's entry 0 is transparent
        image = mask(kind).point(lambda v: int(v > 0)).convert("P")
        image.putpalette([shade] * 6)
        return encoded_with_transparency(image)
    return encoded(image.convert(mode))


def encoded_with_transparency(image: Image.Image) -> bytes:
    image.info["transparency"] = 0
    return encoded(image)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
@pytest.mark.parametrize(
    ("shades", "ground"),
    [((0, 0), 255), ((255, 255), 0), ((0, 255), 128), ((127, 127), 255), ((128, 128), 0), ((40, 60), 255)],
)
@pytest.mark.slow
@pytest.mark.slow
def test_strokes_of_every_shade_stay_visible_on_one_ground(read, tmp_path, mode, shades, ground):
    source = read(folder_of(tmp_path, [strokes(shades[label], label, mode) for label in LABELS]))
    form, found = tensors(source, source.test)
    assert form.ground == ground
    for label in (0, 1):
        bar = np.asarray(mask(label)) > 0
        assert (found[label, 0].numpy()[~bar] == ground).all()
        assert (found[label, 0].numpy()[bar] == shades[label]).all()
    assert form.channels == 1


def test_black_white_and_grey_strokes_get_a_ground_between_them(read, tmp_path):
    shades = (0, 255, 128)
    source = read(folder_of(tmp_path, [strokes(shades[k % 3], k % 2) for k in range(20)]))
    form, found = tensors(source, source.train)
    assert form.ground in (64, 192)
    assert all(int(image.max()) - int(image.min()) >= 63 for image in found)


def test_a_ground_that_the_training_images_do_not_show_is_refused(read, tmp_path):
    opaque = [encoded(shown("RGBA", label)) for label in LABELS]
    source = read(folder_of(tmp_path, opaque, [strokes(0, 0), *opaque[1:]]))
    with pytest.raises(
        TraceFLError, match=r"^split test, row 0, column image is transparent, but no training image is"
    ):
        tensors(source, source.test)
    plain = read(folder_of(tmp_path, [picture(9 * label) for label in LABELS], opaque))
    assert tensors(plain, plain.test)[1].max() == 200  # opaque ones need no ground


def test_images_without_a_visible_pixel_are_empty_ones(read, tmp_path):
    nothing = encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)))
    source = read(folder_of(tmp_path, [nothing] * 20))
    assert (tensors(source, source.test)[1] == 255).all()
    source = read(folder_of(tmp_path, [nothing, *(strokes(255, label) for label in LABELS[1:])]))
    assert tensors(source, source.test)[0].ground == 0  # as the others want it


def test_a_depth_that_the_training_images_do_not_show_is_refused(read, tmp_path):
    deep = [encoded(shown("I;16", label)) for label in LABELS]
    source = read(folder_of(tmp_path, [picture(9 * label) for label in LABELS], deep))
    with pytest.raises(
        Exception, match=r"^split test, row 0, column image is a 16-bit image, but no training image is"
    ):
        tensors(source, source.test)


def test_there_is_colour_if_any_training_image_has_it(read, tmp_path):
    grey = [picture(10 * label) for label in LABELS]
    red = encoded(Image.new("RGB", (8, 8), (255, 0, 0)))
    mixed = read(folder_of(tmp_path, [*grey[:-1], red]))
    assert tensors(mixed, mixed.test)[1][-1, :, 0, 0].tolist() == [255, 0, 0]
    assert tensors(mixed, mixed.test, channels=1)[1].shape[1] == 1
    plain = read(folder_of(tmp_path, grey))
    assert tensors(plain, plain.test)[0].channels == 1
    paletted = read(folder_of(tmp_path, [encoded(shown("P", label)) for label in LABELS]))
    assert tensors(paletted, paletted.test)[0].channels == 1  # a palette of greys


def test_of_several_frames_the_first_is_taken(read, tmp_path):
    files = []
    for label in LABELS:
        file = io.BytesIO()
        shown("L", label).save(file, "gif", save_all=True, append_images=[shown("L", 1 - label)])
        files.append(file.getvalue())
    source = read(folder_of(tmp_path, files))
    assert tensors(source, source.test)[1][0, 0, 4, 15] > 100  # of the upright bar


def test_a_mixed_set_keeps_every_picture(read, tmp_path):
    ways = [("L", "png"), ("RGB", "png"), ("I;16", "png"), ("F", "tiff"), ("CMYK", "tiff"), ("P", "png"), ("1", "png")]
    files = [encoded(shown(*ways[k // 2 % 7][:1], label), ways[k // 2 % 7][1]) for k, label in enumerate(LABELS)]
    source = read(folder_of(tmp_path, [*files[:-4], *[strokes(0, label) for label in LABELS[-4:]]]))
    form, found = tensors(source, source.train)
    assert (form.channels, form.ground) == (3, 255)
    for k in range(0, 20, 2):
        assert (found[k].int() - found[k + 1].int()).abs().max() > 100


def bomb() -> bytes:
    """A small file that says it is a huge image."""
    content = bytearray(picture())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "has no image: drop such rows"),
        ({"bytes": None, "path": None}, "has no image: drop such rows"),
        (b"", "has an image of zero bytes"),
        (b"garbage", "has no readable image (no format that Pillow knows)"),
        (encoded(shown("RGBA", 0))[:90], "has no readable image ("),
        (bomb(), "has no readable image (Image size (3600000000 pixels) exceeds limit"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_by_its_row(read, tmp_path, split, value, said):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fine = [{"bytes": encoded(shown("RGBA", label)), "path": None} for label in LABELS]
    bad = [*fine[:4], {"bytes": value, "path": None} if isinstance(value, bytes) else value, *fine[5:]]
    columns = {name: pa.array(bad if name == split else fine, kind) for name in ("train", "test")}
    source = read(folder_of(tmp_path, **columns))
    start = f"split {split}, row 4, column image"
    with pytest.raises(TraceFLError, match=start) as error:
        tensors(source, source.test)
    found = str(error.value)
    assert found.startswith(start)
    assert all(part in found for part in said.split(".*"))


def test_an_image_that_stands_in_a_file_is_read_from_it(read, tmp_path):
    paths = []
    for label in LABELS:
        paths.append({"bytes": None, "path": str(tmp_path / "d" / ".images" / f"{label}.png")})
        (tmp_path / "d" / ".images").mkdir(parents=True, exist_ok=True)
        shown("L", label).save(paths[-1]["path"])
    source = read(folder_of(tmp_path, paths))
    assert tensors(source, source.test)[1][0, 0, 4, 15] == 200
    Path(paths[0]["path"]).unlink()
    with pytest.raises(TraceFLError, match=r"row 0, column image.* has no readable image \(.*No such file"):
        tensors(source, source.train)


def test_bytes_that_are_no_image_are_no_column_of_images(read, tmp_path):
    rows = {"blob": [b"abc"] * 20, "words": texts(20), "label": LABELS}
    folder = write(tmp_path / "d", rows, test=rows)
    assert "holds texts (column words)" in read.refusal(folder)


def test_a_first_image_that_is_broken_is_named_and_further_fields_do_not_matter(read, tmp_path):
    good = [{"bytes": picture(k), "path": None, "width": 8} for k in range(20)]
    source = read(folder_of(tmp_path, good))
    assert tensors(source, source.test)[1][:, 0, 0, 0].tolist() == list(range(20))
    source = read(folder_of(tmp_path, [b"garbage", *(picture(k) for k in range(19))]))
    with pytest.raises(TraceFLError, match=r"^split train, row 0, column image has no readable image"):
        tensors(source, source.test)


def test_a_broken_file_is_named(read, tmp_path):
    for label, name in ((0, "cat"), (1, "dog")):
        for split in ("train", "test"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            (tmp_path / "pets" / split / name / "1.png").write_bytes(picture(label)[: 30 if split == "test" else None])
    source = read(tmp_path / "pets")
    with pytest.raises(TraceFLError, match=r"^split test, row 0, column image, file .*test/cat/1.png has no readable"):
        tensors(source, source.test)


def test_rows_are_those_of_the_data_after_drawing(read, tmp_path):
    good = [encoded(shown("L", label)) for label in LABELS]
    good[13] = b"garbage"
    folder = write(tmp_path / "d", {"image": good, "label": LABELS})
    source = read(folder, "dataset.test_share=0.2", "dataset.test_split=train")
    holder = source.train if 13 in source.train.rows else source.test
    with pytest.raises(TraceFLError, match=r"^split train, row 13, column image has no readable image"):
        pixels(Form(1, None, {}), "image", holder, np.arange(len(holder)))
    assert sorted([*source.train.rows, *source.test.rows]) == list(range(20))
