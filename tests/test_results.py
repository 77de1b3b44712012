"""Result files: a table is read back under its own key only; timings keep what was not measured again."""

import pandas as pd

from tests.report.recorded import record
from tracefl import Run
from tracefl.results import cached, read_timings, update_timings


def test_a_table_is_made_once_for_each_key_and_model(tmp_path):
    made, run = [], Run.open(record(tmp_path))

    def make() -> pd.DataFrame:
        made.append(1)
        return pd.DataFrame({"round": [len(made)], "client": ["3"]})

    def table(key: str, **options) -> list[int]:
        return cached(run, "feddebug.parquet", {"threshold": key}, make, **options)["round"].tolist()

    assert [table("a"), table("a")] == [[1], [1]]
    assert [table("b"), table("b"), table("a")] == [[2], [2], [3]]
    assert table("a", reuse=False) == [4]
    assert table("a") == [4]
    run.rounds.pop()  # other models
    assert table("a") == [5]
    assert pd.read_parquet(tmp_path / "feddebug.parquet")["client"].tolist() == ["3"]


def timing(method: str, seconds: float) -> pd.DataFrame:
    rows = [(method, 10, seconds, seconds / 10)]
    return pd.DataFrame(rows, columns=["method", "localizations", "seconds", "seconds_per_localization"])


def test_timings_keep_what_was_not_measured_again(tmp_path):
    assert read_timings(tmp_path).empty
    for measured in (timing("neuron", 1.0), timing("FedDebug", 2.0), timing("neuron", 3.0), timing("x", 0.0)[:0]):
        update_timings(tmp_path, measured)
    found = read_timings(tmp_path).set_index("method")["seconds"].to_dict()
    assert found == {"FedDebug": 2.0, "neuron": 3.0}
