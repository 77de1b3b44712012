"""The input is the one column that can be meant; a column that tells the label is never taken by itself."""

import numpy as np
import pyarrow as pa
import pytest

from tests.data.tables import BERT, picture, texts, write

N = 60
LABELS = [k % 3 for k in range(N)]
NAMES = [("pos review", "neg review", "mixed review")[k] for k in LABELS]


def both(folder, **columns):
    return write(folder, columns, test=columns)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("label_text", NAMES),
        ("label_id", [str(k) for k in LABELS]),
        ("coarse", ["a kind of good" if k == 0 else "a kind of bad" for k in LABELS]),
        ("nearly", ["some other words", *NAMES[1:]]),
        ("fine", [f"{name} of sort {k % 6}" for k, name in enumerate(NAMES)]),
        ("id", [f"{k:08x}" for k in range(N)]),
        ("url", [f"https://example.org/one page/{k}" for k in range(N)]),
        ("path", [f"images/my picture {k}.jpg" for k in range(N)]),
        ("file", [f"/data/my pictures/{k}" for k in range(N)]),
        ("date", [f"{k % 28 + 1} March 2020" for k in range(N)]),
        ("stamp", [f"Mon Apr 06 22:19:{k:02d} 2009" for k in range(N)]),
        ("number", [f"{k} {k + 1}" for k in range(N)]),
        ("city", [("New York", "Los Angeles", "San Diego", "Santa Fe", "El Paso")[k % 5] for k in range(N)]),
        ("zone", [f"Mon Apr 06 22:19:{k:02d} PDT 2009" for k in range(N)]),
        ("constant", ["the very same words"] * N),
        ("nothing", pa.nulls(N, pa.string())),
        ("blank", [" "] * N),
    ],
)
def test_the_text_is_taken_and_not_what_stands_beside_it(read, tmp_path, name, column):
    source = read(both(tmp_path / "d", **{name: column, "words": texts(N), "label": LABELS}), BERT)
    assert source.input_columns == ["words"]
    assert any(name in note for note in source.notes())


def test_noise_beside_the_label_in_words_is_refused_until_it_is_named(read, tmp_path):
    folder = both(tmp_path / "d", label_text=NAMES, key=[f"user_{k}" for k in range(N)], label=LABELS)
    said = read.refusal(folder, BERT)
    assert "no evident text; not taken: label_text (determines the label), key (single words)" in said
    assert "dataset.input_columns=[label_text,key]" in said
    source = read(folder, BERT, "dataset.input_columns=[label_text]")
    assert "data: the input label_text determines the label" in list(source.notes())


@pytest.mark.parametrize("names", [("premise", "hypothesis"), ("title", "content")])
def test_several_texts_are_no_evident_choice(read, tmp_path, names):
    columns = {name: texts(N, start=100 * k) for k, name in enumerate(names)}
    folder = both(tmp_path / "d", **columns, label=LABELS)
    said = read.refusal(folder, BERT)
    assert f"several columns that may be the text, {names[0]}, {names[1]}" in said
    assert f"dataset.input_columns=[{names[0]},{names[1]}]" in said
    source = read(folder, BERT, f"dataset.input_columns=[{names[1]},{names[0]}]")
    assert source.texts(source.test, np.array([2])) == [f"{columns[names[1]][2]} {columns[names[0]][2]}"]


def test_a_passage_that_repeats_is_a_text_beside_its_questions(read, tmp_path):
    passages = [" ".join(texts(4, start=k % 3)) for k in range(N)]
    labels = [k // 3 % 2 for k in range(N)]
    assert "passage, question" in read.refusal(
        both(tmp_path / "d", passage=passages, question=texts(N), label=labels), BERT
    )


@pytest.mark.parametrize("name", ["dbpedia_14", "fancyzhx/dbpedia_14", None])
def test_the_columns_of_known_sets_stay(read, tmp_path, name):
    folder = both(tmp_path / "dbpedia_14", label=LABELS, title=[""] * N, content=texts(N))
    words = [f"dataset.name={name}"] if name else []
    assert read(folder, BERT, *words).input_columns == ["title", "content"]
    assert read(folder, BERT, *words, "dataset.input_columns=[content]").input_columns == ["content"]


def test_texts_of_scripts_without_spaces_are_texts(read, tmp_path):
    chinese = [f"今天天气很好我们去公园{k}" for k in range(N)]
    assert read(both(tmp_path / "d", content=chinese, label=LABELS), BERT).input_columns == ["content"]


def test_a_skewed_label_is_not_told_by_just_any_column(read, tmp_path):
    labels = [int(k == 7) for k in range(N)]
    passages = [" ".join(texts(3, start=k % 4)) for k in range(N)]
    assert read(both(tmp_path / "d", text=passages, label=labels), BERT).input_columns == ["text"]


def test_the_kind_of_model_chooses_between_images_and_captions(read, tmp_path):
    images = [{"bytes": picture(k), "path": None} for k in range(N)]
    folder = both(tmp_path / "d", image=images, caption=texts(N), label=LABELS)
    assert read(folder).input_columns == ["image"]
    assert read(folder, BERT).input_columns == ["caption"]


def test_a_mask_beside_the_image_is_no_input_by_itself(read, tmp_path):
    images = [picture(k) for k in range(N)]
    folder = both(tmp_path / "d", mask=images, image=images, label=LABELS)
    assert "several image columns, mask, image: name the input with dataset.input_columns=[" in read.refusal(folder)
    assert read(folder, "dataset.input_columns=[image]").input_columns == ["image"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset.input_columns=[label]"], "input_columns=label is neither an image nor a text"),
        (["dataset.input_columns=[kind]", "dataset.label_column=kind"], "input_columns=kind is the label column"),
        (["dataset.input_columns=[text,text]"], "input_columns=text is named twice"),
        (["dataset.input_columns=[parts]"], "input_columns=parts is neither an image nor a text"),
        (["model.name=resnet18"], "resnet18 is a model for images, but dataset.name=d holds texts (column kind)"),
    ],
)
def test_columns_that_cannot_be_the_input_are_refused(read, tmp_path, words, said):
    folder = both(tmp_path / "d", kind=NAMES, text=texts(N), parts=[["a", "b"]] * N, label=LABELS)
    assert said in read.refusal(folder, *([] if "model.name=resnet18" in words else [BERT]), *words)


def test_several_label_columns_are_listed(read, tmp_path):
    folder = both(tmp_path / "d", text=texts(N), label=LABELS, labels=LABELS)
    assert "several label columns, label, labels, among" in read.refusal(folder, BERT)
    assert read(folder, BERT, "dataset.label_column=labels").label_column == "labels"
    capital = both(tmp_path / "c", text=texts(N), Label=LABELS)
    assert read(capital, BERT).label_column == "Label"


def test_paths_of_images_are_no_images(read, tmp_path):
    folder = both(tmp_path / "d", file=[f"train/{k}.PNG" for k in range(N)], label=LABELS)
    assert "column file of" in read.refusal(folder)
    assert "holds paths of images, not images: lay the files out" in read.refusal(folder)


def test_names_with_line_breaks_keep_messages_and_notes_in_one_line(read, tmp_path):
    columns = {"a\nb": texts(N), "c\nd": texts(N, start=100)}
    folder = both(tmp_path / "d", **columns, label=["x\ny" if k % 2 else "z" for k in range(N)])
    assert "several columns that may be the text, a b, c d:" in read.refusal(folder, BERT)
    folder = both(tmp_path / "e", **{"a\nb": texts(N)}, label=["x\ny" if k % 2 else "z" for k in range(N)])
    assert list(read(folder, BERT).notes()) == ["data: input a b, label label, 2 classes (x y, z)"]
