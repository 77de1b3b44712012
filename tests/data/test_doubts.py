"""What would make data mean something else than they seem to: refused, or said."""

import numpy as np
import pytest
from PIL import Image

from tests.data.tables import BERT, encoded, picture, texts, write
from tracefl.data.faults import unchanged
from tracefl.data.images import find_form, pixels
from tracefl.data.prepare import prepare

N = 24
LABELS = [k % 2 for k in range(N)]


def of_images(folder, files, test=None):
    columns = {"image": [{"bytes": file, "path": None} for file in files], "label": [k % 2 for k in range(len(files))]}
    others = [{"bytes": file, "path": None} for file in test or files]
    return write(folder, columns, test={"image": others, "label": [k % 2 for k in range(len(others))]})


def grey(values, mode="I;16") -> bytes:
    kind = np.float32 if mode == "F" else np.uint16
    return encoded(Image.fromarray(np.asarray(values, dtype=kind).reshape(2, 2)), "tiff")


def png_of_16_bits(values) -> bytes:
    """An RGB PNG of 16 bits, which Pillow cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + struct.pack(">6H", *[value] * 6) for value in values)
    header = struct.pack(">IIBBBBB", 2, len(values), 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def prepared(read, folder):
    source = read(folder)
    form = find_form(source.train, "image", None)
    return pixels(form, "image", source.test, np.arange(len(source.test)))["pixels"]


def refused(read, folder) -> str:
    with pytest.raises(Exception) as error:  # noqa: PT011 (the sentence is looked at)
        prepared(read, folder)
    assert type(error.value).__name__ == "TraceFLError"
    return str(error.value)


def test_colour_of_16_bits_is_refused(read, tmp_path):
    folder = of_images(tmp_path / "d", [png_of_16_bits([k, 200]) for k in range(6)])
    said = "split train, row 0, column image has 16 bits in several channels, of which 8 would be read: convert it"
    assert said in refused(read, folder)


@pytest.mark.parametrize(("mode", "odd"), [("F", -9999.0), ("F", 3e38), ("I;16", 65535)])
def test_one_value_far_from_all_others_is_refused(read, tmp_path, mode, odd):
    top = 0.9 if mode == "F" else 90
    usual = [grey([0, 0.1 * top, 0.5 * top, (0.5 + 0.05 * k) * top], mode) for k in range(6)]
    assert prepared(read, of_images(tmp_path / "usual", usual)).float().std() > 20
    with_one = [*usual, grey([0, odd, 0.3 * top, top], mode)]
    assert f"images is {odd:g}, all others lie from" in refused(read, of_images(tmp_path / "odd", with_one))


def test_two_greys_far_apart_are_a_picture(read, tmp_path):
    files = [grey([0, 65535, 0, 65535 * (k % 2)]) for k in range(6)]
    assert {0, 255} <= set(prepared(read, of_images(tmp_path / "d", files)).unique().tolist())


def test_a_mark_on_an_opaque_body_is_not_laid_on_its_own_colour(read, tmp_path):
    files = []
    for k in range(6):
        image = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
        image.putpixel((0, 0), (0, 0, 0, 0))
        for x in range(12):
            for y in range(4):
                image.putpixel((16 * (k % 2) + x, 20 + y), (255, 255, 255, 255) if y else (0, 0, 0, 0))
        files.append(encoded(image))
    found = prepared(read, of_images(tmp_path / "d", files)).float()
    assert (found[::2].mean(0) - found[1::2].mean(0)).abs().max() > 100


def test_test_images_of_another_scale_are_refused(read, tmp_path):
    deep = [grey([0, 1000, 2000, 4000 + k]) for k in range(6)]
    other = [grey([9000, 1000, 20000, 40000 + k]) for k in range(6)]
    said = "more than half of the values of split test, column image are outside of the training split's"
    assert said in refused(read, of_images(tmp_path / "a", deep, other))
    said = "split test, row 0, column image is an 8-bit image, but all training images are deeper"
    assert said in refused(read, of_images(tmp_path / "b", deep, [picture(9)] * 6))


@pytest.mark.parametrize("start", ["", "/PRNewswire/ -- ", "https://t.co/x "])
def test_prose_that_is_left_out_is_asked_for(read, tmp_path, start):
    many = [f"{start}{text}" for text in texts(N)]
    many = [many[k % 11] for k in range(4 * 11)] if not start else many  # each text several times, with its one label
    labels = [k % 11 % 2 for k in range(len(many))]
    beside = {"other": [f"some words of author {k} here" for k in range(len(many))]}
    folder = write(
        tmp_path / "d", {"text": many, **beside, "label": labels}, test={"text": many, **beside, "label": labels}
    )
    assert "several columns that may be the text, text, other" in read.refusal(folder, BERT)


def test_lists_of_texts_and_labels_in_the_text_are_said(read, tmp_path):
    said = [f"{text} -- Category: {('Sports', 'World')[k % 2]}" for k, text in enumerate(texts(N))]
    columns = {
        "text": said,
        "tokens": [text.split() for text in said],
        "label": [("sports", "world")[k] for k in LABELS],
    }
    source = read(write(tmp_path / "d", columns, test=columns), BERT)
    notes = list(source.notes())
    assert source.input_columns == ["text"]
    assert "data: not taken as input: tokens (lists of texts)" in notes
    assert "data: nearly every text names its own class, which a model will read off" in notes
    plain = {**columns, "text": texts(N)}
    assert len(list(read(write(tmp_path / "e", plain, test=plain), BERT).notes())) == 2


def test_doubtful_labels_are_said_or_refused(read, tmp_path):
    columns = {"text": texts(N), "label": [k % 3 - 1 for k in range(N)]}
    notes = list(read(write(tmp_path / "d", columns, test=columns), BERT).notes())
    assert "data: the label -1 is a class here; drop such rows if it means that there is no label" in notes
    spelt = {"text": texts(N), "label": [("caf\u00e9", "cafe\u0301", "b")[k % 3] for k in range(N)]}
    assert "writes one label as" in read.refusal(write(tmp_path / "e", spelt, test=spelt), BERT)
    numbers = {"text": texts(N), "label": [f"0{k % 3}" for k in range(N)]}
    source = read(write(tmp_path / "f", numbers, test=numbers), BERT, "dataset.num_classes=4")
    assert source.class_names == ["00", "01", "02", "3"]


def test_names_that_the_datasets_library_passes_over_are_refused(read, tmp_path):
    columns = {"text": texts(N), "label": LABELS}
    folder = write(tmp_path / "d", columns, Test=columns)
    assert "Test-0.parquet is no name of a split: write test" in read.refusal(folder, BERT)
    for kind in ("cat", "dog"):
        for split in ("train", "test"):
            (tmp_path / "i" / split / kind).mkdir(parents=True)
            (tmp_path / "i" / split / kind / "a.png").write_bytes(picture())
    (tmp_path / "eel").mkdir()
    (tmp_path / "i" / "train" / "eel").symlink_to(tmp_path / "eel")
    assert "train/eel is a link to a folder, which is not read" in read.refusal(tmp_path / "i")
    (tmp_path / "i" / "train" / "eel").unlink()
    (tmp_path / "i" / "loop").symlink_to(tmp_path / "i" / "loop")
    assert len(read(tmp_path / "i").train) == 2


def test_faults_that_change_nothing_are_known(config):
    few = ("data_dist.dist_type=PathologicalPartitioner-1", "num_clients=2", "clients_per_round=2")
    for words, expected in (
        (("faulty_clients_ids=[0]", "label2flip={5:3}"), ["0"]),
        (("faulty_clients_ids=[0,1]", "label2flip={0:3}"), ["1"]),
        (("faulty_clients_ids=[0]", "label2flip={0:0}"), ["0"]),
        (("faulty_clients_ids=[0]", "fault.kind=random_labels", "noise_rate=0"), ["0"]),
        (("faulty_clients_ids=[0]", "fault.kind=backdoor", "noise_rate=0.5"), []),
        (("faulty_clients_ids=[0]", "fault.kind=sign_flip"), []),
    ):
        c = config(*few, *words)
        assert unchanged(c, prepare(c)) == expected
