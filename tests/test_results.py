"""Result files: a table is read back under its own key only; timings keep what was not measured again."""

import pandas as pd
import pytest

from tests.report.recorded import record
from tests.rewriting import rewrite
from tracefl import Run
from tracefl.commands.listing import entry
from tracefl.errors import TraceFLError
from tracefl.results import cached, content_of, intact, read_result, read_rounds, read_timings, write_result


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


def timed(method: str, seconds: float) -> list[dict]:
    return [{"method": method, "localizations": 10, "seconds": seconds}]


def test_timings_stay_with_the_answers(tmp_path):
    assert read_timings(tmp_path).empty
    write_result(tmp_path, "provenance.parquet", b"a", timed("neuron", 1.0))
    write_result(tmp_path, "feddebug.parquet", b"b", timed("FedDebug", 2.0))
    write_result(tmp_path, "provenance.parquet", b"a", timed("neuron", 3.0))
    write_result(tmp_path, "rounds.csv", b"c")
    found = read_timings(tmp_path).set_index("method")
    assert found["seconds"].to_dict() == {"FedDebug": 2.0, "neuron": 3.0}
    assert found["seconds_per_localization"].to_dict() == {"FedDebug": 0.2, "neuron": 0.3}


@pytest.mark.parametrize(
    "damage", ["changed", "missing", "folder", "no hashes", "hashes changed", "forged hashes", "forged timings"]
)
def test_a_damaged_table_is_made_again_and_said_so(tmp_path, caplog, damage):
    run = Run.open(record(tmp_path))
    made = []

    def make() -> pd.DataFrame:
        made.append(1)
        return pd.DataFrame({"round": [1, 2]})

    first = cached(run, "audit.parquet", [], make)
    file, hashes = tmp_path / "audit.parquet", tmp_path / "results.json"
    content = file.read_bytes()
    match damage:
        case "changed":
            file.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
        case "missing" | "folder":
            file.unlink()
        case "no hashes":
            hashes.unlink()
        case "hashes changed":
            hashes.write_text(hashes.read_text().replace("a", "b", 1))
        case "forged hashes":
            rewrite(hashes, lambda entries: {"files": ["x"]})
        case "forged timings":
            rewrite(hashes, lambda entries: {"files": {"audit.parquet": {"sha256": "ab" * 32, "timings": ["x"]}}})
    if damage == "folder":
        file.mkdir()
        with pytest.raises(TraceFLError, match=r"audit\.parquet cannot be written \(.*directory"):
            cached(run, "audit.parquet", [], make)
        return
    with pytest.raises(TraceFLError, match=r"audit\.parquet"):
        read_result(tmp_path, "audit.parquet")
    pd.testing.assert_frame_equal(cached(run, "audit.parquet", [], make), first)
    assert len(made) == 2
    assert file.read_bytes() == content == intact(tmp_path, "audit.parquet")
    assert ("audit.parquet was changed since it was written" in caplog.text) == (damage != "missing")


def test_what_a_report_reads_is_compared(tmp_path):
    record(tmp_path)
    assert len(read_rounds(tmp_path)) == 2
    file = tmp_path / "rounds.csv"
    file.write_text(file.read_text().replace("1.0", "0.9", 1))
    with pytest.raises(TraceFLError, match=r"rounds\.csv was changed since it was written: run its command again"):
        read_rounds(tmp_path)


def test_results_of_another_run_are_not_taken_for_this_ones(tmp_path):
    one, other = (Run.open(record(tmp_path / name)) for name in ("one", "other"))
    write_result(one.path, "provenance.parquet", b"a", timed("neuron", 1.0))
    other.note_unsaved(["x"])
    other._save()  # another header stands for another run
    for file in one.path.glob("*.*"):
        if file.name != "run.json" and file.is_file():
            (other.path / file.name).write_bytes(file.read_bytes())
    assert content_of(other.path, "rounds.csv") is None
    assert read_timings(other.path).empty
    with pytest.raises(TraceFLError, match=r"rounds\.csv is of other rounds than .*run\.json has, or of another run"):
        read_rounds(other.path)
    assert "rounds.csv is of other rounds" in entry(other.path)["lost"][0]
    write_result(other.path, "rounds.csv", b"round\n1\n")
    assert len(read_rounds(other.path)) == 1


def test_a_forged_table_is_made_again(tmp_path):
    """Its hash fits, its columns do not."""
    run = Run.open(record(tmp_path))
    first = cached(run, "audit.parquet", [], lambda: pd.DataFrame({"value": [1.0]}))
    table = pd.read_parquet(tmp_path / "audit.parquet")
    attrs, table["value"] = dict(table.attrs), table["value"].astype(str)
    table.attrs = attrs
    write_result(tmp_path, "audit.parquet", table.to_parquet(index=False))
    assert cached(run, "audit.parquet", [], lambda: pd.DataFrame({"value": [1.0]})).equals(first)
