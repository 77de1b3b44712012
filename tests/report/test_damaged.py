"""What is damaged in a run is one sentence, and no page."""

import json
import re

import pandas as pd
import pytest

from tests.report.paged import record_page
from tracefl.errors import TraceFLError
from tracefl.report import write_page
from tracefl.results import write_result


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("verdict.json", "{"), ("verdict.json", "[]"), ("rounds.csv", 'a,"b\n'), ("provenance.parquet", "PAR1"),
        ("class_by_client.csv", "client,all\n0,many\n"), ("class_by_client.csv", ""), ("config.yaml", "[1"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_sentence(tmp_path, name, content):
    folder = record_page(tmp_path / "run", num_inputs=2)
    (folder / name).write_text(content)
    with pytest.raises(TraceFLError, match=f"{re.escape(name)} was changed since it was written"):
        write_page(folder)
    write_result(folder, name, content.encode())  # as a forger would
    with pytest.raises(TraceFLError, match=re.escape(name)):
        write_page(folder)


def spoil_parquet(change):
    def spoil(file):
        change(pd.read_parquet(file)).to_parquet(file)

    return spoil


def spoil_verdict(change):
    def spoil(file):
        verdict = json.loads(file.read_text())
        change(verdict)
        file.write_text(json.dumps(verdict))

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("provenance.parquet", spoil_parquet(lambda t: t.drop(columns="client"))),
        ("provenance.parquet", spoil_parquet(lambda t: t.drop(columns="input"))),
        ("provenance.parquet", spoil_parquet(lambda t: t.iloc[1:])),
        ("provenance.parquet", spoil_parquet(lambda t: t.assign(client="x"))),
        ("provenance.parquet", spoil_parquet(lambda t: t.assign(label=None))),
        ("layers.parquet", spoil_parquet(lambda t: t.drop(columns="layer"))),
        ("audit.parquet", spoil_parquet(lambda t: t.drop(columns="norm"))),
        ("verdict.json", spoil_verdict(lambda v: v["clients"]["1"].pop("why"))),
        ("verdict.json", spoil_verdict(lambda v: v["clients"].update({"0": [1]}))),
        ("verdict.json", spoil_verdict(lambda v: v["removal"].pop("righted"))),
        ("verdict.json", spoil_verdict(lambda v: v.update(removal=3))),
    ],
)  # fmt: skip
def test_results_of_another_form_are_a_sentence(tmp_path, name, spoil):
    folder = record_page(tmp_path / "run", num_inputs=2, faulty=["1"])
    spoil(folder / name)
    write_result(folder, name, (folder / name).read_bytes())  # as a forger would
    with pytest.raises(TraceFLError, match="run the same command again"):
        write_page(folder)
    assert not (folder / "report.html").exists()
