"""report.html: its data can be read back, whatever names others gave; it fits, and it loads nothing."""

import base64
import hashlib
import io
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import composed
from tests.report.paged import REMOVAL, record_page
from tests.rewriting import rewrite
from tracefl.checks import load
from tracefl.errors import TraceFLError
from tracefl.evidence.verdict import UNKNOWN, Judgement, Verdict, verdict_json
from tracefl.record import ClientInfo
from tracefl.report import read, write_page
from tracefl.report.charts import Line, line_chart
from tracefl.report.commands import run_command
from tracefl.report.content import _read_csv, columns
from tracefl.report.view import MOST_ROWS
from tracefl.results import write_result
from tracefl.runs import Run
from tracefl.storage import Storing
from tracefl.training import Evaluation

HOSTILE = [
    "</script><img src=x onerror=alert(1)>", "<!--<script>", "]]>", "'\"`", "\u202eevil\u2066", "a\x00b\x1b[31m",
    "x" * 10_000, "=1+1", "{{ 7 * 7 }}", "&lt;b&gt;", "\u2028line", "%3Cb%3E", "${x}", "",
]  # fmt: skip


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.text, self._raw = list[tuple[str, dict[str, str | None]]](), "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        self.text += "" if self._raw else data


def tags(file) -> Tags:
    return Tags(file.read_text("utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paged") / "run"
    return record_page(folder, faulty=["1"], coalitions=True)


@pytest.fixture(scope="module")
def page(run):
    return write_page(run)


def test_the_data_can_be_read_back(run, page):
    assert page == run / "report.html"
    found, answers = read(page), pd.read_parquet(run / "provenance.parquet")
    keys = ["round", "method", "input", "client"]
    joined = found.predictions.merge(answers, on=keys, suffixes=("", "_run"), validate="one_to_one")
    assert len(joined) == len(answers) == len(found.predictions) == 2 * 3 * 8 * 5
    for name in ("label", "predicted", "rank"):
        assert joined[name].tolist() == joined[f"{name}_run"].tolist()
    assert joined["contribution"].to_numpy() == pytest.approx(joined["contribution_run"].to_numpy(), rel=1e-4)
    assert (joined[joined["method"] == "shapley"]["standard_error"] == 0.01).all()
    layers = found.layers.merge(pd.read_parquet(run / "layers.parquet"), on=[*keys[:3], "layer"], suffixes=("", "_run"))
    assert len(layers) == len(found.layers) == 2 * 2 * 8 * 8  # eight layers each
    assert layers["contribution"].to_numpy() == pytest.approx(layers["contribution_run"].to_numpy(), rel=1e-4)
    opened = Run.open(run)
    held = {c.id: [c.label_counts[label] for label in range(3)] for c in opened.clients}
    assert {who: row.tolist() for who, row in found.label_counts.iterrows()} == held
    assert list(found.label_counts.columns) == opened["class_names"]
    assert found.clients["fault"].fillna("").tolist() == ["", "label_flip", "", "", ""]
    assert found.verdict == json.loads((run / "verdict.json").read_text())
    assert found.verdict["removal"] == REMOVAL
    values = pd.read_csv(run / "class_by_client.csv", dtype={"client": str}).set_index("client")
    assert found.class_by_client.to_numpy() == pytest.approx(values.to_numpy(), rel=1e-3)
    rounds = pd.read_csv(run / "rounds.csv")
    assert found.rounds[rounds.columns].to_numpy() == pytest.approx(rounds.to_numpy())
    assert read(run).inputs == found.inputs


def test_a_picture_is_the_input(run, page):
    pixels = load_file(run / "data" / "server.safetensors")["pixels"]
    for row, told in read(page).inputs.items():
        image = Image.open(io.BytesIO(base64.b64decode(told["picture"])))
        assert (np.asarray(image) == pixels[row, 0].numpy()).all()


def test_a_text_is_shown_as_the_model_reads_it(tmp_path):
    texts = ["the cat sat", "<b>bold</b> &amp; \u202e words", "=1 " * 500, "</script>"]
    page = write_page(record_page(tmp_path / "run", num_inputs=4, texts=texts))
    assert {row: told["text"] for row, told in read(page).inputs.items()} == {
        0: texts[0], 1: texts[1], 2: f"{texts[2][:1200]}…", 3: texts[3],
    }  # fmt: skip
    quoted = [attributes for tag, attributes in tags(page).found if tag == "blockquote"]
    assert quoted == [{"dir": "auto"}] * 4
    assert "<b>bold</b> &amp;" in tags(page).text


def test_the_verdict_and_its_evidence_come_first(page):
    found = tags(page)
    text = found.text[found.text.index("1 of 5 clients is faulty: client \u20681\u2069.") :]
    order = ["sends back what it received", "12 of 20", "Rounds"]
    places = [text.index(told) for told in [*order, "Who holds what", "Class by client", "Predictions"]]
    assert places == sorted(places)
    heading = next(attributes for tag, attributes in found.found if tag == "h1")
    assert heading["class"] == "faulty"


def test_it_loads_nothing_and_its_policy_says_so(page):
    text, found = page.read_text("utf-8"), tags(page)
    policy = next(a["content"] for tag, a in found.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for kind, pattern in (("style", "<style>(.*?)</style>"), ("script", "<script>(.*?)</script>")):
        (content,) = re.findall(pattern, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert len(content) < 20_000
    for tag, attributes in found.found:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
        for place in ("src", "href"):
            assert attributes.get(place, "#").startswith(("#", "data:")), attributes
    assert text.isprintable() or not re.search("[\x00-\x08\x0b-\x1f]", text)


def test_tables_are_tables(page):
    found = tags(page).found
    count = {tag: sum(other == tag for other, _ in found) for tag in ("table", "caption", "thead", "tbody")}
    assert len(set(count.values())) == 1
    assert count["table"] > 10
    assert all(a.get("scope") in ("col", "row") for tag, a in found if tag == "th")
    assert sum(a.get("role") == "img" for tag, a in found if tag == "svg") == 3


def test_names_of_others_stay_text(tmp_path):
    folder = record_page(tmp_path / "run", clients=HOSTILE, class_names=HOSTILE, faulty=HOSTILE[:1], num_inputs=28)
    config = OmegaConf.load(folder / "config.yaml")
    config.dataset.name = config.model.name = HOSTILE[0]
    write_result(folder, "config.yaml", OmegaConf.to_yaml(config).encode())
    page = write_page(folder)
    found, back = tags(page), read(page)
    assert sum(tag == "script" for tag, _ in found.found) == 2
    assert all(a["src"].startswith("data:image/png") for tag, a in found.found if tag == "img")
    assert HOSTILE[0] in found.text
    assert "{{ 7 * 7 }}" in found.text
    assert "x" * 100 not in found.text
    assert back.clients["client"].tolist() == HOSTILE
    assert list(back.label_counts.columns) == HOSTILE
    assert list(back.class_by_client.columns) == ["all", *HOSTILE]
    assert set(back.predictions["client"]) == set(HOSTILE)
    assert page.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("clients", "inputs", "rounds", "colours", "limit"),
    [(10, 20, 5, 1, 300_000), pytest.param(100, 1000, 1, 3, 1_000_000, marks=pytest.mark.slow)],
)
def test_it_fits(tmp_path, clients, inputs, rounds, colours, limit, request):
    ids = [str(n) for n in range(clients)]
    folder = record_page(tmp_path / "run", ids, "abcdefghij", num_inputs=inputs, num_rounds=rounds, colours=colours)
    if colours == 1:  # as digits are: no noise
        smooth = torch.arange(32, dtype=torch.uint8).expand(inputs, 1, 32, 32).contiguous()
        from safetensors.torch import save_file

        save_file({"pixels": smooth, "labels": torch.arange(inputs) % 10}, folder / "data" / "server.safetensors")
    page, answers = write_page(folder), pd.read_parquet(folder / "provenance.parquet")
    assert page.stat().st_size < limit
    found = read(page)
    predictions = answers[["round", "method", "input"]].drop_duplicates()
    assert len(found.content["predictions"]) + found.content["left_out"] == len(predictions) == 2 * rounds * inputs
    assert found.content["left_out"] == 0
    first = found.predictions[found.predictions["rank"] == 1]
    assert len(first) == len(predictions)
    rest = [(one["v"], one.get("rest", 0)) for one in found.content["predictions"]]
    sums = answers.groupby(["round", "method", "input"], sort=False)["contribution"].sum()
    assert [sum(told) + others for told, others in rest] == pytest.approx(sums.tolist(), abs=1e-2)


def test_what_does_not_fit_is_a_table_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("tracefl.report.page.MOST_BYTES", 140_000)
    folder = record_page(tmp_path / "run", ["=cmd|' /C calc'!A0", "b"], num_inputs=60, num_rounds=3)
    page = write_page(folder)
    assert page.stat().st_size < 150_000
    found = read(page)
    link = next(a for tag, a in tags(page).found if tag == "a" and "download" in a)
    lines = base64.b64decode(link["href"].removeprefix("data:text/csv;base64,"))
    table = pd.read_csv(io.BytesIO(lines))
    assert 0 < len(table) == found.content["listed"] == found.content["left_out"]
    assert len(table) + len(found.content["predictions"]) == 3 * 2 * 60
    assert set(table["client"]) == {"'=cmd|' /C calc'!A0", "b"}
    assert table["round"].max() <= min(one["r"] for one in found.content["predictions"])


def own_run(folder, **storing) -> Run:
    clients, state = [ClientInfo("a"), ClientInfo("b"), ClientInfo("c")], {"w": torch.zeros(2)}
    run = Run.create(folder, initial=state, clients=clients, **storing)
    for t in (1, 2, 3):
        parts = [run.record_client(t, c.id, state, n, 0.5) for c, n in zip(clients[:2], (3, 0), strict=True)]
        run.record_round(t, parts, state, None, {"c": "timed out"}, metrics={"loss": 1.0 / t, "list": [1, 2]})
    return run


def test_a_run_of_an_own_app(tmp_path):
    page = write_page(own_run(tmp_path / "own").path)
    found, text = read(page), tags(page).text
    assert found.content["command"] is None
    assert found.verdict is None
    assert found.predictions.empty
    assert found.rounds["train: loss"].tolist() == pytest.approx([1, 0.5, 0.33333])
    assert found.rounds["failures"].tolist() == [1, 1, 1]
    assert found.clients["examples"].tolist()[0] == 3
    assert "No verdict: the clients of this run were not audited." in text
    assert "recorded by a Flower app of its own" in text
    for absent in ("Who holds what", "Class by client", "Predictions", "The whole run"):
        assert absent not in text


def test_rounds_whose_states_are_gone(tmp_path):
    page = write_page(own_run(tmp_path / "own", storing=Storing("last:1")).path)
    assert "states of 2 rounds are gone (storage.keep=last:1)" in tags(page).text


def test_a_run_without_rounds(tmp_path):
    Run.create(tmp_path / "run", initial={"w": torch.zeros(2)}, clients=[])
    assert "No round is complete." in tags(write_page(tmp_path / "run")).text


@pytest.mark.parametrize(
    "gone", ["verdict.json", "audit.parquet", "provenance.parquet", "layers.parquet", "rounds.csv"]
)
def test_what_is_absent_is_left_out(tmp_path, gone):
    folder = record_page(tmp_path / "run")
    (folder / gone).unlink()
    with pytest.raises(TraceFLError, match=re.escape(gone)):  # lost
        write_page(folder)
    rewrite(
        folder / "results.json", lambda entries: {"files": {k: v for k, v in entries["files"].items() if k != gone}}
    )
    found = read(write_page(folder))
    assert (found.verdict is None) == (gone == "verdict.json")
    assert found.predictions.empty == (gone == "provenance.parquet")
    assert found.layers.empty == (gone in ("provenance.parquet", "layers.parquet"))
    assert found.rounds["accuracy"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("clients", [3, 150])
def test_the_whole_run_stands_also_where_nobody_can_be_judged(tmp_path, clients):
    folder = record_page(tmp_path / "run", clients=[str(k) for k in range(clients)], num_inputs=2)
    answers = pd.read_parquet(folder / "provenance.parquet")
    whole = answers[(answers["round"] == 2) & (answers["method"] == "influence")].assign(method="replay")
    write_result(folder, "whole_run.parquet", whole.to_parquet(index=False))
    unknown = Verdict([], {str(k): Judgement(float("nan"), 2, UNKNOWN) for k in range(clients)})
    write_result(folder, "verdict.json", verdict_json(unknown))
    text = " ".join(tags(write_page(folder)).text.split())
    assert "No verdict: the clients cannot be judged" in text
    assert "Clients over all rounds." in text
    assert ("more clients are in whole_run.parquet" in text) == (clients > MOST_ROWS)


def test_data_that_are_gone_leave_the_numbers(tmp_path):
    folder = record_page(tmp_path / "run")
    (folder / "data" / "server.safetensors").unlink()
    page = write_page(folder)
    assert read(page).inputs == {}
    assert "The inputs cannot be shown: the server's examples of" in " ".join(tags(page).text.split())


def test_an_answer_about_other_models_is_not_shown(tmp_path):
    folder = record_page(tmp_path / "run")
    table = pd.read_parquet(folder / "provenance.parquet")
    table.attrs = {"settings": {"settings": "x", "models": "of another run"}}
    write_result(folder, "provenance.parquet", table.to_parquet())
    assert read(write_page(folder)).predictions.empty


def test_no_run_and_no_page_are_sentences(tmp_path, run):
    with pytest.raises(TraceFLError, match="holds no recorded run"):
        write_page(tmp_path)
    (tmp_path / "other.html").write_text("<p>Hello")
    with pytest.raises(TraceFLError, match="is no page of a run"):
        read(tmp_path / "other.html")
    with pytest.raises(TraceFLError, match="cannot be read"):
        read(tmp_path / "none.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceFLError, match="cannot be written"):
        write_page(run, tmp_path / "file" / "report.html")
    data = '<script type="application/json" id="data">{}</script>'
    for damaged in (data.format('{"format":9}'), data.format("{}"), data.format("[")):
        (tmp_path / "other.html").write_text(damaged)
        with pytest.raises(TraceFLError, match="page"):
            read(tmp_path / "other.html")


def test_the_same_run_gives_the_same_page(run, page, tmp_path):
    assert write_page(run, tmp_path / "b" / "c.html").read_bytes() == page.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["seed=3", "num_rounds=2", "report=false"],
        ["exp_key=my-run", "storage.dir=my runs/größe=1 (a)", "client.lr=0.0001", "dirichlet_alpha=1e-3"],
        ["faulty_clients_ids=[0,3]", "label2flip={8:7,0:7}", "noise_rate={8:0.5,0:1}", "plotting=true"],
        ["dataset.name=mnist", "client.lr=0.0003", "strategy.name=fedprox", "strategy.options.proximal_mu=0.1"],
        ["dataset.name=a/b", "dataset.input_columns=[Text,größe]"],
        ["dataset.name=a/b", "dataset.train_split='train[:8%]'", "dataset.config='1'"],
        ["model.name=google-bert/bert-base-cased", "model.config.num_hidden_layers=2", "model.pretrained=true"],
        ["noise_multiplier=0.001", "clipping_norm=15", "dataset.label_column='null'", "storage.keep=last:2"],
        ["dataset.name=x/y", "dataset.config=it's; rm -rf $HOME `id`"],
    ],
)  # fmt: skip
def test_the_command_gives_the_same_settings(words):
    config = load(composed(tuple(words)))
    line = run_command(OmegaConf.to_container(OmegaConf.structured(config)))
    assert line.startswith("python -m tracefl.main")
    typed = shlex.split(line)[3:]
    assert load(composed(tuple(typed))) == config
    assert len(typed) <= len(words)


def test_a_prediction_is_traced_again_by_the_command_that_it_shows(run, page):
    text = tags(page).text
    assert f"tracefl trace {run} --round 2 --index 0 --method influence" in text


def test_with_a_trigger_only_the_run_gives_the_answer_again(tmp_path):
    settings = {"faulty_clients_ids": [1], "fault": {"kind": "backdoor"}}
    folder = record_page(tmp_path / "run", faulty=["1"], settings=settings)
    page = write_page(folder)
    assert "tracefl trace" not in tags(page).text
    plain = load_file(folder / "data" / "server.safetensors")["pixels"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(read(page).inputs[3]["picture"]))))
    assert (image[-1, -1] == 255).all()
    assert (image[0] == plain[3, 0, 0].numpy()).all()


def flat(page) -> str:
    return " ".join(tags(page).text.split())


def test_the_first_screen_says_how_sure_it_is(tmp_path):
    few = flat(write_page(record_page(tmp_path / "few", num_rounds=1)))
    assert "Wrong labels show only from 3 rounds of a client on" in few
    assert "50.0 % in round 1; by chance 33.3 %" in few
    assert "over 1 round " in few
    assert tags(tmp_path / "few" / "report.html").text.count("Accuracy of the global model") == 0  # no chart of a point
    more = flat(write_page(record_page(tmp_path / "more", num_rounds=3)))
    assert "Wrong labels show" not in more
    assert "Faulty is a client whose updates have hardly any length (below 0.10)" in more


def test_who_never_took_part_is_counted(tmp_path):
    assert "2 of them took part, over 3 rounds" in flat(write_page(own_run(tmp_path / "own").path))


def test_a_chart_of_nothing_is_none():
    assert line_chart([], [], "x") == ""
    assert line_chart([1, 2], [Line("a", [float("nan")] * 2)], "x") == ""
    assert "<b>" not in line_chart([1], [Line("<b>", [0.0])], "<b>")


def test_evaluations_that_are_not_finite(tmp_path):
    run = Run.create(tmp_path / "run", initial={"w": torch.zeros(2)}, clients=[ClientInfo("0", {0: 1})], seed=0)
    part = run.record_client(1, "0", {"w": torch.zeros(2)}, 1, 1.0)
    run.record_round(1, [part], {"w": torch.zeros(2)}, Evaluation(float("inf"), 0.5, torch.tensor([0])), {})
    assert read(write_page(run.path)).rounds["accuracy"].tolist() == [0.5]


def test_a_round_in_which_nothing_was_traced_has_no_number(tmp_path):
    write_result(tmp_path, "rounds.csv", b"round,localization_accuracy\n1,0.5\n2,\n")
    found = columns(_read_csv(tmp_path, "rounds.csv"))
    assert found == {"round": [1, 2], "localization_accuracy": [0.5, None]}
