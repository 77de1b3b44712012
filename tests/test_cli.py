"""The command: what it answers about a recorded run, as tables and as JSON, and how it says what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import composed, keep_log
from tests.data.tables import write
from tests.federation import local
from tests.test_help import PAGE
from tracefl import Run, __version__, cli, whatif
from tracefl.checks import load
from tracefl.evaluation.own import text_inputs
from tracefl.pipeline import run_experiment
from tracefl.record import ClientInfo
from tracefl.report import read, write_page
from tracefl.results import write_result
from tracefl.sealed import KEY, sealed

WORDS = (("red apple and cherry", "a ripe plum"), ("blue sea and sky", "a deep lake"))
SETTINGS = (
    "exp_key=words", "model.name=gpt2", "model.config={n_layer:1,n_embd:16,n_head:2}", "dataset.max_tokens=16",
    "num_clients=4", "clients_per_round=4", "num_rounds=3", "client.lr=0.01", "dirichlet_alpha=100",
    "faulty_clients_ids=[3]", "label2flip={0:1,1:0}",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with logs/words-HASH, a small run of texts whose client 3 swaps the classes."""
    folder = tmp_path_factory.mktemp("place")
    labels = [k % 2 for k in range(160)]
    columns = {"text": [f"{WORDS[k][i % 4 // 2]} {i}" for i, k in enumerate(labels)], "label": labels}
    write(folder / "set", columns, test={name: values[:40] for name, values in columns.items()})
    config = load(composed((*SETTINGS, f"dataset.path={folder}/set", f"storage.dir={folder}/logs")))
    with pytest.MonkeyPatch.context() as patch:
        keep_log(patch)
        patch.setattr("tracefl.federation.grid.PULL_INTERVAL_S", 0)
        run_experiment(config, OmegaConf.to_yaml(OmegaConf.structured(config)), simulate=local.simulate)
    return folder


@pytest.fixture
def run(place) -> Run:
    (folder,) = place.glob("logs/words-*")
    return Run.open(folder)


@pytest.fixture
def command(place, monkeypatch, capfd):
    """`command("audit", ...)` in that folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*typed: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(typed)
        return (end.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def answer(command):
    """The JSON that a command prints, which must be strict and alone."""

    def ask(*typed: str) -> dict:
        status, out, err = command(*typed, "--json")
        assert (status, err) == (0, "")
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return ask


def test_a_prediction_of_the_server(answer, run):
    found = answer("trace", "words", "--round", "2", "--index", "5")
    expected = run.trace(index=5, round=2)
    assert found.keys() == {
        "schema", "run", "round", "input", "label", "predicted", "explained", "probability", "method", "evaluations",
        "clients", "set", "set_from", "server",
    }  # fmt: skip
    assert (found["schema"], found["run"], found["round"]) == (1, f"logs/{run.path.name}", 2)
    assert (found["label"], found["predicted"]) == (
        str(run.server_examples().labels[5].item()),
        str(run.predictions(2)[5].item()),
    )
    ranked = [(client["client"], client["contribution"]) for client in found["clients"]]
    assert [who for who, _ in ranked] == [who for who, *_ in expected.ranking(0)]
    assert [value for _, value in ranked] == pytest.approx([value for _, value, _ in expected.ranking(0)], rel=1e-4)
    for client in found["clients"]:
        assert client["label_counts"] == {
            str(k): n for k, n in info(run, client["client"]).trained_label_counts.items()
        }
        assert client["fault"] == ("label_flip" if client["client"] == "3" else None)
    assert found["set_from"] == "19 other predictions of the class"
    assert found["set"] is not None


def info(run: Run, client: str) -> ClientInfo:
    return next(info for info in run.clients if info.id == client)


def test_shapley_has_standard_errors_and_a_set_from_them(answer, run):
    found = answer("trace", "words", "--index", "0", "--method", "shapley", "--evaluations", "16")
    expected = run.trace(index=0, method="shapley", evaluations=16)
    assert [client["standard_error"] for client in found["clients"]] == [0] * 4
    assert [client["client"] for client in found["clients"]] == [who for who, *_ in expected.ranking(0)]
    assert (found["set"], found["set_from"]) == (expected.sets().sets[0], "standard errors")
    fewest = answer("trace", "words", "--index", "0", "--method", "shapley")
    assert [client["standard_error"] for client in fewest["clients"]] == [None] * 4


def test_a_traced_prediction_has_the_answer_of_the_page(answer, place, run):
    traced = [0, 1, 4, 7, 8]
    rows = run.trace(index=traced, round=2).to_frame()
    rows = rows.assign(round=2, method="influence", input=[traced[n] for n in rows["input"]], label=0, server=0.0)
    rows = rows.assign(predicted=rows["target"], noise=0.0)
    copy = Path(shutil.copytree(run.path, place / "logs" / "traced"))
    try:
        write_result(copy, "provenance.parquet", rows.to_parquet(index=False))
        shown = read(write_page(copy)).predictions
        for row, part in shown.groupby("input"):
            found = answer("trace", "traced", "--round", "2", "--index", str(row))
            assert [client["client"] for client in found["clients"]] == part["client"].tolist()
            assert found["set"] == part[part["named"]]["client"].tolist()
            assert found["set_from"] == "4 other predictions traced in the round"
        others = answer("trace", "traced", "--round", "2", "--index", "2")
        write_result(copy, "provenance.parquet", rows.assign(contribution=1.0).to_parquet(index=False))
        triggered = answer("trace", "traced", "--round", "2", "--index", "0")  # it was traced with something on it
    finally:
        shutil.rmtree(copy)
    assert others["set_from"] == triggered["set_from"] == "19 other predictions of the class"


def test_a_class_is_explained_that_was_not_predicted(answer, run):
    other = 1 - int(run.predictions(3)[0])
    found = answer("trace", "words", "--index", "0", "--target", str(other), "--method", "neuron")
    assert (found["predicted"], found["explained"]) == (str(1 - other), str(other))
    expected = run.trace(index=0, method="neuron", targets=[other])
    assert [client["client"] for client in found["clients"]] == [who for who, *_ in expected.ranking(0)]


def test_a_text_of_ones_own_goes_through_the_runs_preparation(answer, place, run, tmp_path):
    text = f"{WORDS[1][0]} 1"  # which is row 1 of the test split
    (row,) = [i for i in range(40) if same_text(run, i, text)]
    found = answer("trace", "words", "--text", text)
    asked = answer("trace", "words", "--index", str(row))
    assert (found["label"], found["predicted"]) == (None, asked["predicted"])
    assert found["probability"] == pytest.approx(asked["probability"], rel=1e-5)
    one, other = ([client["contribution"] for client in of["clients"]] for of in (found, asked))
    assert one == pytest.approx(other, rel=1e-4)
    assert found["input"] == {"text": text, "tokens": found["input"]["tokens"], "tokens_left_out": 0}
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert answer("trace", "words", "--text-file", str(tmp_path / "text"))["clients"] == found["clients"]
    long = answer("trace", "words", "--text", "red apple " * 40)
    assert long["input"]["tokens"] == 16
    assert long["input"]["tokens_left_out"] > 0


def same_text(run: Run, row: int, text: str) -> bool:
    there = run.server_examples()[torch.tensor([row])].inputs["input_ids"]
    own = text_inputs(run, text)[0]["input_ids"]
    return there.shape == own.shape and bool((there == own).all())


def test_the_audit(answer, run, command):
    found = answer("audit", "words")
    verdict = json.loads((run.path / "verdict.json").read_text())
    assert found["faulty"] == verdict["faulty"]
    assert {client["client"] for client in found["clients"]} == {"0", "1", "2", "3"}
    assert found["clients"][0].keys() == {
        "client", "faulty", "why", "z", "rounds", "value", "aim", "agreement", "norm", "by_class",
    }  # fmt: skip
    (run.path / "audit.parquet").rename(run.path / "kept")
    assert answer("audit", "words") == found  # made again
    assert (run.path / "audit.parquet").exists()
    (run.path / "kept").unlink()
    shown = command("audit", "words")[1]
    assert shown.startswith("Verdict: ")
    assert sum(bool(re.match(r" \d ", line)) for line in shown.splitlines()) == 4


def test_what_if(answer, run):
    found = answer("whatif", "words", "--without", "c3", "--without", "1", "--since", "2", "--memory", "0.5")
    expected = whatif(run, ["3", "1"], since=2, memory=0.5)
    assert (found["without"], found["since"], found["rounds"], found["memory"]) == (["1", "3"], 2, [2, 3], 0.5)
    assert found["accuracy_after"] == expected.after.accuracy
    assert found["by_class"] == expected.to_frame().to_dict("records")


def reseal(folder: Path, header: dict) -> None:
    """Write run.json with a hash that fits."""
    (folder / "run.json").write_bytes(sealed(json.dumps({k: v for k, v in header.items() if k != KEY}, indent=1)))


def test_the_list_tells_runs_apart(answer, command, place, run):
    other = place / "logs" / "deeper" / "words-00000000"
    shutil.copytree(run.path, other)
    header = json.loads((other / "run.json").read_text())
    header["settings"]["client.lr"] = 0.5
    reseal(other, header)
    columns = "round,localization_accuracy,chance_accuracy,localization_accuracy_influence"
    write_result(other, "rounds.csv", f"{columns}\n1,0.25,0.25,1\n2,,,\n3,0.75,0.25,1.0\n".encode())
    broken = {
        "gone": "global.safetensors is missing",
        "cut": "is no JSON",
        "odd": "must hold a JSON object",
    }
    for name in (*broken, "worse"):
        shutil.copytree(run.path, place / "logs" / name)
    (place / "logs" / "gone" / "rounds" / "0002" / "global.safetensors").unlink()
    (place / "logs" / "cut" / "run.json").write_text('{"schema": 2')
    (place / "logs" / "odd" / "run.json").write_text("[]")
    (place / "logs" / "worse" / "verdict.json").write_text('{"clients": [1]}')
    try:
        found = answer("list")
        status, shown, _ = command("list", "logs")
    finally:
        for name in ("deeper", "worse", *broken):
            shutil.rmtree(place / "logs" / name)
    runs = {Path(entry["run"]).name: entry for entry in found["runs"]}
    assert list(runs) == ["cut", "words-00000000", "gone", "odd", run.path.name, "worse"]
    assert {name: bool(re.search(said, runs[name]["error"])) for name, said in broken.items()} == dict.fromkeys(
        broken, True
    )
    assert found["differing"] == ["client.lr"]
    entry = runs[run.path.name]
    assert (entry["rounds"], entry["wanted_rounds"], entry["clients"]) == (3, 3, 4)
    assert entry["accuracy"] == run.rounds[-1].accuracy
    assert runs["words-00000000"]["localization"] == {
        "neuron": {"share": 0.5, "chance": 0.25}, "influence": {"share": 1.0, "chance": 0.25},
    }  # fmt: skip
    assert entry["bytes"] > 10_000
    assert status == 0
    assert " client.lr " in shown
    assert sum(line.startswith("damaged: ") for line in shown.splitlines()) == 3
    assert (runs["worse"]["faulty"], entry["lost"]) == (None, [])
    assert "verdict.json was changed since it was written" in runs["worse"]["lost"][0]
    assert "verdict.json is of other rounds" in runs["words-00000000"]["lost"][0]  # its header was changed since
    assert sum(line.startswith("not shown: ") for line in shown.splitlines()) == 2


def test_an_empty_folder_is_listed_as_such(command, tmp_path):
    assert command("list", str(tmp_path))[:2] == (0, f"{tmp_path} holds no recorded run\n")


def test_a_report_is_written_where_it_is_asked_for(command, answer, place, run, tmp_path):
    folder = Path("logs") / run.path.name
    assert command("report", "words")[:2] == (0, f"{folder}/report.html\n")
    file = tmp_path / "b" / "a.html"
    assert answer("report", "words", "--out", str(file))["pages"] == [{"run": str(folder), "page": str(file)}]
    assert file.read_bytes() == (run.path / "report.html").read_bytes()
    other = shutil.copytree(run.path, place / "logs" / "other")
    try:
        found = answer("report", "words", "logs/other", "--out", str(tmp_path / "c"))
    finally:
        shutil.rmtree(other)
    assert [Path(of["page"]).name for of in found["pages"]] == [f"{run.path.name}.html", "other.html"]
    assert all(Path(of["page"]).stat().st_size > 10_000 for of in found["pages"])
    status, _, err = command("report", "words", str(run.path), "--out", str(tmp_path))
    assert (status, f"two runs have the same name, {run.path.name}:" in err) == (1, True)


@pytest.mark.parametrize(
    ("typed", "status", "said"),
    [
        ("trace words", 2, "Give one of --index, --image, --text, --text-file, got none"),
        ("trace words --index 1 --text a", 2, "got --index, --text"),
        ("trace words --index one", 2, "'one' is not a valid integer"),
        ("trace words --index -1", 2, "-1 is not in the range"),
        ("trace words --index 1 --method magic", 2, "'magic' is not one of"),
        ("trace words --index 1 --evaluations 3", 2, "--evaluations goes with --method shapley"),
        ("trace words --index 1 --evaluations 7 --method shapley", 1, "evaluations must be"),
        ("trace words --index 40", 1, "whole numbers from 0 to 39, of the server's examples, got 40"),
        ("trace words --index 1 --round 4", 1, "round 4 is not recorded"),
        ("trace words --index 1 --target=", 1, "or its number from 0, got ''"),
        ("trace words --index 1 --target cat", 1, "target must be a class of the run, 0, 1, or its number"),
        ("trace words --image x.png", 1, "is a run of texts"),
        ("trace words --text-file gone", 1, "gone cannot be read (No such file"),
        ("trace words --text-file logs", 1, "logs cannot be read (Is a directory)"),
        ("trace words --bogus 1", 2, "No such option"),
        ("audit", 2, "Missing argument 'RUN'; see tracefl audit --help"),
        ("audit word", 1, "word is no folder, and logs has no run called so: did you mean words"),
        ("audit zzz", 1, "zzz is no folder, and logs has no run called so: tracefl list shows those there"),
        ("audit logs", 1, "logs holds no recorded run itself (no run.json): it holds logs/words-"),
        ("audit set", 1, "set holds no recorded run itself (no run.json): give a run's folder"),
        ("audit set/train-0.parquet", 1, "is a file: give a run's folder"),
        (f"audit {300 * 'x'}", 1, f"error: {100 * 'x'} is no folder"),
        ("whatif words", 2, "Missing option '--without'"),
        ("whatif words --without 9", 1, "without must name clients, got '9'"),
        ("whatif words --without 3 --since 4", 1, "since must be a round from 1 to round=3, got 4"),
        ("whatif words --without 3 --memory 2", 2, "2.0 is not in the range"),
        ("report words nothing", 1, "nothing is no folder"),
        ("report words --out set", 1, "--out set is a folder: name the file of the page"),
        ("trace words --text-file set --index 1", 2, "got --index, --text-file"),
        ("list nowhere", 1, "nowhere is no folder"),
        ("lst", 2, "No such command 'lst'"),
        ("run num_clients=0", 1, "num_clients must be at least 1, got 0."),
        ("run --json num_clients=0", 1, "num_clients must be at least 1, got 0."),
    ],
)
def test_what_is_wrong_is_one_sentence(command, typed, status, said):
    got, out, err = command(*typed.split())
    assert (got, out) == (status, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    again = command(*typed.split(), *([] if "--json" in typed else ["--json"]))
    assert again[:2] == (status, "")  # the same, and nothing on standard output


def test_a_text_that_says_nothing_is_refused(command):
    assert command("trace", "words", "--text", " ")[0] == 1
    assert "the text is empty" in command("trace", "words", "--text", "")[2]


def test_a_folder_that_is_no_run_hides_no_run_of_its_name(command, place, run):
    (place / "words").mkdir()
    try:
        assert command("audit", "words", "--json")[0] == 0
    finally:
        (place / "words").rmdir()


def test_two_runs_of_one_name_are_told_apart(command, place, run):
    shutil.copytree(run.path, place / "logs" / "words-00000000")
    try:
        err = command("audit", "words")[2]
        assert command("audit", "words-00000000", "--json")[0] == 0
    finally:
        shutil.rmtree(place / "logs" / "words-00000000")
    assert err == f"error: 2 runs in logs are called words, words-00000000 and {run.path.name}: name one\n"


def test_a_run_of_an_own_app_is_refused_with_what_to_do(command, tmp_path):
    Run.create(tmp_path, initial={"w": torch.zeros(1)}, clients=[ClientInfo("0")])
    for typed in (["trace", "--index", "0"], ["audit"], ["whatif", "--without", "0"]):
        status, _, err = command(typed[0], str(tmp_path), *typed[1:])
        assert (status, "own Flower app" in err, "in Python" in err) == (1, True, True)


def test_names_cannot_steer_a_terminal(answer, command, place, run):
    copy = shutil.copytree(run.path, place / "logs" / "hostile")
    try:
        header = json.loads((copy / "run.json").read_text())
        header["class_names"] = ["\x1b[31m[red]a", "[/b]ä"]
        reseal(copy, header)
        status, out, _ = command("trace", str(copy), "--index", "0")
        found = answer("trace", str(copy), "--index", "0", "--target", "[/b]ä")
    finally:
        shutil.rmtree(copy)
    assert status == 0
    assert "\x1b" not in out
    assert "\\x1b[31m[red]a" in out
    assert found["explained"] == "[/b]ä"


def test_the_job_can_be_run_and_told_as_json(answer, command, place, run):
    words = ["run", *SETTINGS, f"dataset.path={place}/set", f"storage.dir={place}/logs"]
    status, out, err = command(*words, "--json")  # all is recorded: nothing is trained
    assert (status, "nothing is trained" in err) == (0, True)
    (found,) = json.loads(out)["runs"]
    assert found["run"] == str(run.path)
    assert found == {**answer("list")["runs"][0], "run": str(run.path)}
    status, out, err = command("run", "--multirun", "seed=1,2", "dry_run=true", "--json")
    assert (status, json.loads(out)["runs"], err.count("dry run")) == (0, [], 2)


def test_run_is_the_main_job(command):
    assert command("run", "num_rounds=7", "--cfg", "job")[1].count("num_rounds: 7\n") == 1
    assert command("run", "--help")[1].count("num_rounds: 5\n") == 1


def test_an_interrupt_ends_with_130(command, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tracefl.commands.tracing.Run.open", interrupted)
    assert command("audit", "words") == (130, "", "interrupted\n")


def test_the_version_and_the_help(command):
    assert command("--version") == (0, f"tracefl {__version__}\n", "")
    for name in ("trace", "audit", "whatif", "report", "list"):
        status, out, _ = command(name, "--help")
        assert (status, "--json" in out) == (0, True)
    assert command()[0] == 2
    assert "Exit status: 0 done" in command("--help")[1]


def test_a_closed_output_is_no_error(command, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert command("list")[0] == 0


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_quietly(place):
    line = f"{sys.executable} -m tracefl list --json | head -c 1"
    path = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, text=True, env=path)
    assert (done.stdout, done.stderr) == ("{", "")


def test_every_key_of_an_answer_is_documented(answer):
    documented = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    for words in (
        ["trace", "words", "--index", "0"],
        ["audit", "words"],
        ["whatif", "words", "--without", "3"],
        ["list"],
    ):
        found = answer(*words)
        inner = [key for name in ("clients", "runs", "by_class") for entry in found.get(name, ()) for key in entry]
        assert found.keys() | set(inner) <= documented | {"schema"}
