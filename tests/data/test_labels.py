"""Labels keep their meaning: sorted as the data write them, and refused where they are no classes."""

import datetime
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pytest

from tests.data.tables import BERT, texts, write

N = 40


def both(folder, labels, test=None, **more):
    test = labels if test is None else test
    return write(
        folder,
        {"text": texts(len(labels)), "label": labels, **more},
        test={"text": texts(len(test)), "label": test, **more},
    )


@pytest.mark.parametrize(
    ("kinds", "names", "first"),
    [
        ([3, 1, 5, 2, 4], ["1", "2", "3", "4", "5"], [2, 0, 4, 1, 3]),
        ([1, -1], ["-1", "1"], [1, 0]),
        ([7, 0, 100], ["0", "7", "100"], [1, 0, 2]),
        ([2.0, 1.0], ["1", "2"], [1, 0]),
        ([Decimal(2), Decimal(1)], ["1", "2"], [1, 0]),
        ([True, False], ["False", "True"], [1, 0]),
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["10", "2", "-1"], ["-1", "2", "10"], [2, 1, 0]),
        (["10.0", "2.0"], ["2.0", "10.0"], [1, 0]),
        (["10.0", "4.5"], ["4.5", "10.0"], [1, 0]),
        (["v10", "v2"], ["v10", "v2"], [0, 1]),
        ([2**63 - 1, 2**63 - 2], [str(2**63 - 2), str(2**63 - 1)], [1, 0]),
    ],
)
def test_classes_are_the_sorted_labels_as_they_are_written(read, tmp_path, kinds, names, first):
    source = read(both(tmp_path / "d", (kinds * N)[:N]), BERT)
    assert source.class_names == names
    for split in (source.train, source.test):
        assert source.labels(split)[: len(first)].tolist() == first
        assert source.labels(split).dtype == np.int64


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_strings_are_strings_however_they_are_stored(read, tmp_path, kind):
    labels = pa.array((["dog", "cat"] * N)[:N]).cast(kind)
    source = read(both(tmp_path / "d", labels), BERT)
    assert (source.class_names, source.labels(source.test)[:2].tolist()) == (["cat", "dog"], [1, 0])


def column(good: list, row: int, bad) -> list:
    values = (good * N)[:N]
    values[row] = bad
    return values


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (column([0.0, 1.0], 3, 0.5), "split train, row 3 holds 0.5, which is no class"),
        (column([0.0, 1.0], 3, float("inf")), "split train, row 3 holds inf, which is no class"),
        (column([0.0, 1.0], 3, float("nan")), "split train, row 3 has no label, as 1 of 40: drop such rows"),
        (column([0, 1], 5, None), "split train, row 5 has no label"),
        (column(["a", "b"], 5, None), "split train, row 5 has no label"),
        (column(["a", "b"], 5, " "), "split train, row 5 has a blank label"),
        (column(["a", "b"], 5, "a "), "writes one label as 'a' and as 'a '"),
        (column(["1", "2"], 5, "01"), "writes one label as '1' and as '01'"),
        ([[0], [1, 2]] * (N // 2), "holds lists or structures in split train"),
        ([{"a": 1}] * N, "holds lists or structures in split train"),
        ([datetime.date(2020, 1, 1)] * N, "holds dates or times in split train"),
        ([datetime.datetime(2020, 1, 1)] * N, "holds dates or times in split train"),
        ([b"a"] * N, "holds bytes in split train"),
        (pa.nulls(N), "split train, row 0 has no label, as 40 of 40"),
        ([0] * N, "holds only the label 0 in split train, and a classifier needs two"),
        (list(range(N)), "holds 40 different values in 40 rows (0, 1, 2, ...), too many for classes"),
        ([f"id{k}" for k in range(N)], "holds 40 different values in 40 rows"),
        ([2.0**60, 0.0] * (N // 2), "too large for an exact number"),
    ],
)
def test_what_is_no_class_is_refused(read, tmp_path, labels, said):
    assert said in read.refusal(both(tmp_path / "d", labels), BERT)


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (
            [0, 1],
            [0, 5],
            "split test, row 1 has the label 5, which split train lacks (it has 0, 1): drop such rows or ",
        ),
        (["a", "b"], ["a", "c"], "row 1 has the label c, which split train lacks (it has a, b): drop such rows."),
        ([True, False], [0, 1], "row 0 has the label"),
        ([0, 1], [0, None], "split test, row 1 has no label, as 20 of 40"),
    ],
)
def test_test_labels_that_the_training_split_lacks_are_refused(read, tmp_path, train, test, said):
    folder = tmp_path / "d"
    tables = {
        name: datasets.Dataset.from_dict({"text": texts(N), "label": (kinds * N)[:N]})
        for name, kinds in (("train", train), ("test", test))
    }
    datasets.DatasetDict(tables).save_to_disk(str(folder))  # it keeps the type of each split
    assert said in read.refusal(folder, BERT)


def test_names_that_stand_in_another_order_in_the_test_split_keep_their_meaning(read, tmp_path):
    tables = {}
    for name, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=names))
        tables[name] = datasets.Dataset.from_dict({"text": texts(N), "label": [0, 1] * (N // 2)}, features=features)
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "d"))
    source = read(tmp_path / "d", BERT)
    assert source.labels(source.train)[:2].tolist() == [0, 1]
    assert source.labels(source.test)[:2].tolist() == [1, 0]


@pytest.mark.parametrize("hidden", [-1, None])
@pytest.mark.parametrize("named", [True, False])
def test_a_test_split_without_labels_names_the_one_that_has_them(read, tmp_path, hidden, named):
    kind = datasets.ClassLabel(names=["no", "yes"]) if named else datasets.Value("int64")
    features = datasets.Features(text=datasets.Value("string"), label=kind)
    for name, label in (("train", 1), ("validation", 1), ("test", hidden)):
        labels = [label if label == hidden else k % 2 for k in range(N)]
        table = datasets.Dataset.from_dict({"text": texts(N), "label": labels}, features=features)
        (tmp_path / "d").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "d" / f"{name}-0.parquet"))
    assert "split test has no labels: set dataset.test_split=validation." in read.refusal(tmp_path / "d", BERT)
    assert len(read(tmp_path / "d", BERT, "dataset.test_split=validation").test) == N


@pytest.mark.parametrize(
    ("kinds", "count", "names"),
    [
        ([0, 1], 4, ["0", "1", "2", "3"]),
        ([0, 2], 3, ["0", "1", "2"]),
        ([1, 2, 3], 5, ["0", "1", "2", "3", "4"]),
        ([1, 2, 3, 4, 5], 6, ["0", "1", "2", "3", "4", "5"]),
        ([-1, 1], 3, ["-1", "1", "2"]),
        (["a", "b"], 4, ["a", "b", "2", "3"]),
        ([4, 9], 3, ["4", "9", "10"]),
    ],
)
def test_the_number_of_classes_fills_up_whole_numbers_from_zero(read, tmp_path, kinds, count, names):
    source = read(both(tmp_path / "d", (kinds * N)[:N]), BERT, f"dataset.num_classes={count}")
    assert source.class_names == names
    assert source.labels(source.train)[0] == names.index(str(kinds[0]))


def test_mixed_kinds_in_json_are_refused(read, tmp_path):
    (tmp_path / "d").mkdir()
    lines = ['{"text": "a b c", "label": 1}', '{"text": "d e f", "label": "x"}'] * 20
    for split in ("train", "test"):
        (tmp_path / "d" / f"{split}.jsonl").write_text("\n".join(lines))
    assert "label_column=label holds values of several kinds in split train" in read.refusal(tmp_path / "d", BERT)
