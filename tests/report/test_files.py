"""Result files: answers are read back under their own settings only; timings keep what was not measured again."""

import pandas as pd
from tracefl.report.files import read_answers, read_timings, update_timings, write_answers


def test_answers_are_read_under_their_own_settings_only(tmp_path):
    file, table = tmp_path / "feddebug.parquet", pd.DataFrame({"round": [1], "client": ["3"]})
    assert read_answers(file, {}) is None
    write_answers(file, table, {"settings": "a"})
    pd.testing.assert_frame_equal(read_answers(file, {"settings": "a"}), table)
    assert read_answers(file, {"settings": "b"}) is None


def timing(method: str, seconds: float) -> pd.DataFrame:
    rows = [(method, 10, seconds, seconds / 10)]
    return pd.DataFrame(rows, columns=["method", "localizations", "seconds", "seconds_per_localization"])


def test_timings_keep_what_was_not_measured_again(tmp_path):
    assert read_timings(tmp_path).empty
    for measured in (timing("neuron", 1.0), timing("FedDebug", 2.0), timing("neuron", 3.0), timing("x", 0.0)[:0]):
        update_timings(tmp_path, measured)
    found = read_timings(tmp_path).set_index("method")["seconds"].to_dict()
    assert found == {"FedDebug": 2.0, "neuron": 3.0}
