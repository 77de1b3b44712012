"""Splits are whole, sliced or drawn, never overlap, and come from folders of several layouts."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.data.tables import BERT, picture, texts, write
from tracefl.data.sources import load_source
from tracefl.data.splits import load_splits
from tracefl.errors import TraceFLError

N = 40


def rows(count: int = N, start: int = 0) -> dict:
    return {"text": texts(count, start), "label": [k % 2 for k in range(count)]}


def test_a_share_of_every_class_is_drawn_by_the_seed(read, tmp_path):
    folder = write(tmp_path / "d", {"text": texts(100), "label": [int(k >= 80) for k in range(100)]})
    first, again, other = (
        read(folder, BERT, "dataset.test_share=0.2", "dataset.test_split=train", f"seed={k}") for k in (0, 0, 1)
    )
    assert np.bincount(first.labels(first.test)).tolist() == [16, 4]
    assert np.bincount(first.labels(first.train)).tolist() == [64, 16]
    assert sorted([*first.train.rows, *first.test.rows]) == list(range(100))
    assert first.test.rows.tolist() == again.test.rows.tolist() != other.test.rows.tolist()
    for split in (first.train, first.test):
        assert first.texts(split, np.array([3])) == [texts(100)[split.rows[3]]]
        assert first.labels(split)[3] == int(split.rows[3] >= 80)


def test_a_share_needs_no_name_of_a_test_split_that_is_not_there(read, tmp_path):
    folder = write(tmp_path / "d", rows())
    assert len(read(folder, BERT, "dataset.test_share=0.25").test) == 10
    assert "test_share=0.001 of 40 examples in 2 classes is no example: raise it" in read.refusal(
        folder, BERT, "dataset.test_share=0.001"
    )
    assert "test_share=0.99 of 40 examples in 2 classes is all of them: lower it" in read.refusal(
        folder, BERT, "dataset.test_share=0.99"
    )
    both = write(tmp_path / "e", rows(), test=rows())
    assert "there is also a split test: leave one out, with dataset.test_split=train" in read.refusal(
        both, BERT, "dataset.test_share=0.2"
    )


def test_a_set_without_a_test_split_names_both_ways_out(read, tmp_path):
    said = read.refusal(write(tmp_path / "d", rows()), BERT)
    assert "dataset.test_split=test is no split of" in said
    assert "it has train: name one of them, set dataset.test_share=0.2 and dataset.test_split=train" in said
    assert "or slice it, as 'dataset.train_split=train[:80%]' 'dataset.test_split=train[80%:]'." in said


@pytest.mark.parametrize(
    ("train", "test", "sizes", "first"),
    [
        ("train[:80%]", "train[80%:]", (32, 8), 32),
        ("train[10:]", "train[:10]", (30, 10), 0),
        ("train[:-5]", "train[-5:]", (35, 5), 35),
        ("train[:10]+train[20:]", "train[10:20]", (30, 10), 10),
    ],
)
def test_slices_are_those_of_the_datasets_library(read, tmp_path, train, test, sizes, first):
    folder = write(tmp_path / "d", rows())
    source = read(folder, BERT, f'dataset.train_split="{train}"', f'dataset.test_split="{test}"')
    assert (len(source.train), len(source.test)) == sizes
    assert source.texts(source.test, np.array([0])) == [texts(N)[first]]


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ("train", "train", "share 40 rows of train: name slices"),
        ("train[:80%]", "train[70%:]", "share 4 rows of train: name slices that do not overlap"),
        ("train", "train[90%:]", "share 4 rows of train"),
        ("train+train", "test", "dataset.train_split=train+train names rows of train twice"),
        ("train[:0]", "test", "dataset.train_split=train[:0] has no rows"),
        ("train[:80", "test", "dataset.train_split=train[:80 is no split of"),
        ("train", "test[90:]", "dataset.test_split=test[90:] has no rows"),
        ("dev", "test", "dataset.train_split=dev is no split of"),
    ],
)
def test_rows_that_overlap_or_are_none_are_refused(read, tmp_path, train, test, said):
    folder = write(tmp_path / "d", rows(), test=rows(10, start=500))
    words = (f'dataset.train_split="{train}"', f'dataset.test_split="{test}"')
    assert said in read.refusal(folder, BERT, *words)


def test_a_configuration_is_chosen_and_the_refusal_lists_them(read, tmp_path):
    for name, start in (("one", 0), ("two", 100)):
        write(tmp_path / name, rows(start=start), test=rows(start=start))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train*\n"
            f"  - split: test\n    path: {c}/test*\n"
            for c in ("one", "two")
        )
        + "---\n"
    )
    assert "it has several configurations, ['one', 'two']: set dataset.config=NAME" in read.refusal(tmp_path, BERT)
    source = read(tmp_path, BERT, "dataset.config=two")
    assert source.texts(source.test, np.array([0])) == [texts(1, start=100)[0]]
    said = read.refusal(tmp_path, BERT, "dataset.config=three")
    assert "three" in said
    assert "one" in said


def test_a_bundled_set_has_one_configuration(config):
    with pytest.raises(TraceFLError, match=r"dataset\.config=other names a configuration, but digits has only one"):
        load_source(config("dataset.config=other"))


def test_what_save_to_disk_wrote_is_read(read, tmp_path):
    tables = {name: datasets.Dataset.from_dict(rows(start=start)) for name, start in (("train", 0), ("test", 100))}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "both"))
    source = read(tmp_path / "both", BERT)
    assert source.texts(source.test, np.array([1])) == [texts(2, start=100)[1]]
    tables["train"].save_to_disk(str(tmp_path / "one"))
    assert len(read(tmp_path / "one", BERT, "dataset.test_share=0.2").test) == 8
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"half")
    assert "cannot be read, although save_to_disk wrote it" in read.refusal(
        tmp_path / "one", BERT, "dataset.test_share=0.2"
    )


def test_folders_of_images_and_tables_of_texts(read, tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for k in range(3):
                (tmp_path / "pets" / split / name / f"{k}.png").write_bytes(picture(k))
        lines = [f"{text},{label}" for text, label in zip(*rows().values(), strict=True)]
        (tmp_path / "csv").mkdir(exist_ok=True)
        (tmp_path / "csv" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    source = read(tmp_path / "pets")
    assert (source.class_names, source.labels(source.test).tolist()) == (["cat", "dog"], [0, 0, 0, 1, 1, 1])
    assert read(tmp_path / "csv", BERT).class_names == ["0", "1"]


def kaggle(folder):
    lines = [f"{k},{text},{k % 2}" for k, text in enumerate(texts(N))]
    (folder / "train.csv").write_text("\n".join(["id,text,label", *lines]))
    (folder / "test.csv").write_text("\n".join(["id,text", *[line[:-2] for line in lines]]))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train.parquet": b"", "test.parquet": b""}, "0 bytes"),
        ({"train.parquet": b"PAR1 no", "test.parquet": b"PAR1 no"}, "cannot be read as a dataset ("),
        ({"train.csv": b"", "test.csv": b""}, "No columns to parse"),
        ({"train.csv": b"text,label\n", "test.csv": b"text,label\n"}, "no data"),
        ({"train.json": b"", "test.json": b""}, "a file holds nothing"),
        ({"train.json": b"{nope", "test.json": b"{nope"}, "JSON parse error"),
        ({"train.csv": "text,label\ncafé,1\n".encode("latin-1")}, "codec can't decode"),
        ({"train.zip": b"PK no"}, "is no archive that can be read ("),
        ({"train.png": b"no"}, "no label column"),
        ({"train.txt": b"a b\nc d\n"}, "no label column"),
    ],
)
def test_files_that_hold_no_data_are_refused_in_one_sentence(read, tmp_path, caplog, files, said):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert said in read.refusal(tmp_path, BERT, *([] if len(files) == 2 else ["dataset.test_share=0.2"]))
    assert not caplog.records


def test_an_empty_split_is_refused(read, tmp_path):
    empty = {"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}
    assert "each with rows" in read.refusal(write(tmp_path / "d", rows(), test=empty), BERT)
    tables = {
        "train": datasets.Dataset.from_dict(rows()),
        "test": datasets.Dataset.from_dict({"text": [], "label": []}),
    }
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "e"))
    assert "save it again, with rows in every split" in read.refusal(tmp_path / "e", BERT)


def test_columns_that_the_test_split_lacks_are_named(read, tmp_path):
    kaggle(tmp_path)
    assert "split test has no labels: set dataset.test_share=0.2 and dataset.test_split=train" in read.refusal(
        tmp_path, BERT
    )
    assert len(read(tmp_path, BERT, "dataset.test_share=0.2", "dataset.test_split=train").test) == 8
    tables = {"train": datasets.Dataset.from_dict(rows()), "test": datasets.Dataset.from_dict({"text": texts(3)})}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "e"))
    assert "split test has no labels: set dataset.test_share=0.2" in read.refusal(tmp_path / "e", BERT)
    tables["test"] = datasets.Dataset.from_dict({"words": texts(2), "label": [0, 1]})
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "f"))
    said = read.refusal(tmp_path / "f", BERT)
    assert "split test has no column text, which split train has: it has words, label; give both the same" in said
    tables["test"] = datasets.Dataset.from_dict({"text": [1, 2], "label": [0, 1]})
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "g"))
    assert "column text of split test holds something else than that of split train" in read.refusal(
        tmp_path / "g", BERT
    )


@pytest.mark.parametrize("nothing", [None, "", "  "])
def test_texts_that_are_empty_in_every_row_are_refused(read, tmp_path, nothing):
    folder = write(tmp_path / "d", rows(), test=rows() | {"text": pa.array([nothing] * N, pa.string())})
    assert "column text of split test is empty in every row" in read.refusal(folder, BERT)
    folder = write(tmp_path / "e", rows() | {"text": pa.array([nothing] * N, pa.string())}, test=rows())
    assert "of split train is empty" in read.refusal(folder, BERT, "dataset.input_columns=[text]")


def test_a_slice_of_a_test_split_is_not_passed_over_for_a_share(read, tmp_path):
    folder = write(tmp_path / "d", rows(), test=rows())
    words = ("dataset.test_share=0.2", 'dataset.test_split="test[:50%]"')
    assert "there is also a split test[:50%]: leave one out" in read.refusal(folder, BERT, *words)


@pytest.mark.parametrize("name", ["a [1]", "a::b", "what? *"])
@pytest.mark.parametrize("form", ["parquet", "images", "saved"])
def test_a_folder_whose_name_is_a_pattern_to_the_datasets_library(config, tmp_path, name, form):
    folder = tmp_path / name
    table = datasets.Dataset.from_dict({"text": ["one text", "other text"] * 20, "label": [0, 1] * 20})
    both = datasets.DatasetDict(train=table, test=table)
    if form == "saved":
        both.save_to_disk(str(tmp_path / "plain"))
        (tmp_path / "plain").rename(folder)
    for split, part in both.items() if form == "parquet" else ():
        part.to_parquet(str(tmp_path / f"{split}-0.parquet"))
        folder.mkdir(exist_ok=True)
        (tmp_path / f"{split}-0.parquet").rename(folder / f"{split}-0.parquet")
    for k in range(20) if form == "images" else ():
        for split in both:
            (folder / split / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 100 * (k % 2)).save(folder / split / "ab"[k % 2] / f"{k}.png")
    train, test, _ = load_splits(config("dataset.path=" + '"' + str(folder) + '"').dataset)
    assert len(train) == len(test) == (20 if form == "images" else 40)
    if form == "images":
        assert np.asarray(train.table[19]["image"]).mean() == 100


def test_the_librarys_bars_are_not_between_our_lines(read, tmp_path, capfd):
    assert not datasets.are_progress_bars_disabled()
    read(write(tmp_path / "d", rows(), test=rows()), BERT)
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()
