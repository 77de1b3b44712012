"""The main job for real, small: what it leaves, that it repeats to the byte, and that it survives interruption.

One whole process trains on Ray; what needs no process of its own runs in this one.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import composed
from tests.rewriting import rewrite
from tests.small_run import SMALL, the_run, weights
from tests.test_main import process
from tracefl import Run
from tracefl.checks import load
from tracefl.errors import TraceFLError
from tracefl.pipeline import run_experiment
from tracefl.report import read


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    done = process(*SMALL, "plotting=true", "convert_cache_to_csv=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_leaves_what_the_readme_lists(finished):
    folder = the_run(finished[0])
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {".lock"}
    run = Run.open(folder)
    states = {f"rounds/{t:04d}/{name}.safetensors" for t in (1, 2, 3) for name in ("global", "predictions")}
    states |= {f"rounds/{r.number:04d}/{c.file}" for r in run.rounds for c in r.clients}
    (events,) = [name for name in left if name.startswith("tensorboard/events.out.tfevents")]
    names = ("rounds", "labels", "contributions", "class_by_client")
    plots = {f"plots/{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert left == states | plots | {
        "run.json", "config.yaml", "rounds/0000/global.safetensors", "rounds.csv", "timings.csv", "provenance.parquet",
        "provenance.csv", "TraceFL_clients_contributions.log", events,
        "audit.parquet", "verdict.json", "class_by_client.csv", "layers.parquet", "report.html", "results.json",
    }  # fmt: skip
    assert run["versions"].keys() >= {"torch", "flwr", "tracefl", "python"}
    assert [len(record.clients) for record in run.rounds] == [2, 2, 2]


def test_the_verdict_comes_first(finished):
    folder, out = the_run(finished[0]), finished[1]
    assert out.index("INFO - Verdict: the clients cannot be judged: a round needs at least 4 clients") < out.index(
        "Input Label: "
    )
    verdict, audited = json.loads((folder / "verdict.json").read_text()), pd.read_parquet(folder / "audit.parquet")
    assert verdict["faulty"] == []
    assert set(verdict["clients"]) == set(audited["client"])
    assert all(of["rounds"] == (audited["client"] == who).sum() for who, of in verdict["clients"].items())
    by_class = pd.read_csv(folder / "class_by_client.csv", dtype={"client": str}).set_index("client")
    mean = audited.groupby("client")["value"].mean()
    assert by_class["all"].to_dict() == pytest.approx(mean.to_dict(), nan_ok=True)


def test_tables_hold_both_methods_and_every_chance_level(finished):
    folder = the_run(finished[0])
    rounds, rows = pd.read_csv(folder / "rounds.csv"), pd.read_parquet(folder / "provenance.parquet")
    assert rounds["round"].tolist() == [1, 2, 3]
    metrics = ("localization_accuracy", "top_holder_accuracy", "spearman")
    assert {"loss", "accuracy", "num_inputs", "chance_accuracy", "largest_client_accuracy", "top_holder_chance"} <= set(
        rounds
    )
    assert {name + suffix for name in metrics for suffix in ("", "_influence")} <= set(rounds)
    assert set(rows["method"]) == {"neuron", "influence"}
    answers = rows.groupby(["round", "method", "input"])
    assert answers["score"].sum().to_numpy() == pytest.approx(1)
    assert (answers["rank"].max() == 2).all()
    assert (
        answers.size().groupby(["round", "method"]).size().xs("neuron", level="method").tolist()
        == rounds["num_inputs"].tolist()
    )
    influence = rows[rows["method"] == "influence"].groupby(["round", "input"])["contribution"]
    scale = influence.apply(lambda shares: shares.abs().max())
    assert (influence.sum().abs() <= 1e-3 * scale).all()  # FedAvg leaves nothing over; float32 weights


def test_the_run_gives_its_models_and_the_servers_examples(finished):
    run = Run.open(the_run(finished[0]))
    examples = run.server_examples()
    for number in (1, 3):
        with torch.no_grad():
            predictions = run.model(number)(examples.inputs).argmax(1)
        assert torch.equal(predictions, run.predictions(number))
    assert run.model(0).fc.out_features == 10


def test_the_run_answers_for_a_prediction(finished):
    run = Run.open(the_run(finished[0]))
    rows = pd.read_parquet(run.path / "provenance.parquet")
    rows = rows[(rows["round"] == 2) & (rows["method"] == "influence")]
    first = rows["input"].unique()[:2]
    found = run.trace(first, round=2)
    assert found.contributions.flatten().tolist() == pytest.approx(
        rows[rows["input"].isin(first)]["contribution"].tolist(), rel=1e-3
    )
    assert found.client_ids == [client.id for client in run.round(2).clients]
    one = run.trace(index=int(first[1]), round=2)
    assert one.contributions[0].tolist() == pytest.approx(found.contributions[1].tolist(), rel=1e-3)
    for index in (60, -1, "3", 1.0, True, [0, 60]):
        with pytest.raises(TraceFLError, match="index must be one or more whole numbers from 0 to 59, of the server's"):
            run.trace(index)
    with pytest.raises(TraceFLError, match="got none"):
        run.trace([])


def test_it_prints_the_lines_that_people_grep_for_and_logs_them(finished):
    folder, out = the_run(finished[0]), finished[1]
    log = (folder / "TraceFL_clients_contributions.log").read_text()
    for text in (out, log):
        assert "INFO - *********** Input Label: " in text
        assert " || Tracing = " in text
        assert "TraceFL Clients Contributions Rank:     {'c" in text
        assert "[Round 3] TraceFL Localization Accuracy = " in text
        assert "INFO - Total Rounds: 3" in text
        assert "INFO - TraceFL Average Localization Accuracy: " in text
        assert "[Round 2] client c" in text
    assert f"Everything is in {folder.relative_to(finished[0])}" in out


@pytest.fixture
def small(finished, config):
    """Run the finished job once more in this process, with further settings."""

    def again(*overrides: str) -> None:
        settings = config(*SMALL, f"storage.dir={finished[0]}/logs", *overrides)
        run_experiment(settings, OmegaConf.to_yaml(OmegaConf.structured(settings)))

    return again


@pytest.mark.slow
def test_clients_in_one_process_send_the_same_bytes(finished, config, tmp_path, in_process):
    settings = config(*SMALL, f"storage.dir={tmp_path}/logs")
    run_experiment(settings, "")
    assert weights(tmp_path) == weights(finished[0])


def test_the_page_holds_what_was_traced(finished):
    folder = the_run(finished[0])
    page, answers = read(folder / "report.html"), pd.read_parquet(folder / "provenance.parquet")
    answers = answers.merge(page.predictions, on=["round", "method", "input", "client"], suffixes=("", "_page"))
    assert len(answers) == len(page.predictions) > 0
    assert answers["contribution"].to_numpy() == pytest.approx(answers["contribution_page"].to_numpy(), rel=1e-4)
    assert set(page.inputs) == set(answers["input"])
    assert (folder / "report.html").stat().st_size < 300_000
    assert f"The run's page: logs/{folder.name}/report.html" in finished[1]
    typed = shlex.split(page.content["command"])[3:]
    assert load(composed(tuple(typed))) == load(OmegaConf.load(folder / "config.yaml"))
    layers = pd.read_parquet(folder / "layers.parquet").groupby(["round", "method", "input"])["contribution"].sum()
    first = answers[answers["rank"] == 1].set_index(["round", "method", "input"])["contribution"]
    assert layers.to_dict() == pytest.approx(first.to_dict(), rel=1e-6)


def test_a_finished_run_is_not_trained_or_traced_again(finished, small, capsys):
    folder = the_run(finished[0])
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    traced = (folder / "provenance.parquet").stat().st_mtime_ns
    rounds = (folder / "rounds.csv").read_bytes()
    small()
    out = capsys.readouterr().out
    assert "nothing is trained" in out
    assert "INFO - Total Rounds: 3" in out
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before
    assert (folder / "provenance.parquet").stat().st_mtime_ns == traced
    assert (folder / "rounds.csv").read_bytes() == rounds


def test_other_tracing_settings_trace_the_recorded_run_anew(finished, small):
    folder = the_run(finished[0])
    before = pd.read_parquet(folder / "provenance.parquet")
    small("enable_beta=false", "provenance.methods=[neuron]", "do_training=false")
    after = pd.read_parquet(folder / "provenance.parquet")
    assert set(after["method"]) == {"neuron"}
    merged = after.merge(before, on=["round", "method", "input", "client"])
    assert len(merged) == len(after)
    assert not (merged["contribution_x"] == merged["contribution_y"]).any()


@pytest.mark.slow
def test_coalitions_are_reported_beside_the_methods(finished, small, capsys):
    folder = the_run(finished[0])
    small("evaluation.coalitions=true", "evaluation.coalition_inputs=4", "do_training=false", "plotting=true")
    out, rounds = capsys.readouterr().out, pd.read_csv(folder / "rounds.csv")
    assert "[Round 3] fusing coalitions of 2 clients for 4 inputs" in out
    assert "[Round 3] Shapley values in " in out
    assert out.count("Beside Shapley Values: Neuron: Spearman = ") == 3 + 1
    assert out.count("Answers as Sets: Neuron: Coverage = ") == 3 + 1
    sets = {"coverage", "coverage_chance", "set_size", "named_nobody"}
    assert {f"{name}{method}" for name in sets for method in ("", "_influence", "_shapley")} <= set(rounds)
    assert (rounds["shapley_first_chance"] == 0.5).all()
    assert rounds["shapley_first_influence"].between(0, 1).all()
    rows = pd.read_parquet(folder / "provenance.parquet")
    assert rows[rows["method"] == "shapley"].groupby("round")["input"].nunique().tolist() == [4, 4, 4]


@pytest.mark.slow
def test_the_whole_run_is_traced_beside_the_rounds(finished, small, capsys):
    folder = the_run(finished[0])
    small()
    rounds = (folder / "provenance.parquet").read_bytes()
    capsys.readouterr()
    small("provenance.scope=run")
    shown = capsys.readouterr().out
    assert shown.index("The whole run") < shown.index("Accuracy of the global model")
    assert (folder / "provenance.parquet").read_bytes() == rounds  # not traced again
    whole = pd.read_parquet(folder / "whole_run.parquet")
    assert list(whole.columns) == list(pd.read_parquet(folder / "provenance.parquet").columns)
    run = Run.open(folder)
    assert set(whole["client"]) == {client.id for record in run.rounds for client in record.clients}
    assert set(whole["round"]) == {3}
    assert set(whole["method"]) == {"replay"}
    of_round = pd.read_parquet(folder / "provenance.parquet").query("round == 3")
    assert set(whole["input"]) == set(of_round["input"])
    (folder / "whole_run.parquet").unlink()


def test_other_data_under_the_same_settings_are_refused(finished, small):
    header = the_run(finished[0]) / "run.json"
    original = header.read_text()
    rewrite(header, lambda entries: entries | {"data_sha256": "0" * 64})
    try:
        with pytest.raises(TraceFLError, match="was trained on other data"):
            small()
    finally:
        header.write_text(original)
    log = (the_run(finished[0]) / "TraceFL_clients_contributions.log").read_text()
    assert "ERROR - " in log.splitlines()[-1]


def test_without_a_recorded_run_do_training_false_leaves_no_folder(config, tmp_path):
    settings = config(*SMALL, f"storage.dir={tmp_path}/logs", "do_training=false")
    with pytest.raises(TraceFLError, match="do_training=false needs a recorded run"):
        run_experiment(settings, "")
    assert not list(tmp_path.glob("logs/small-*"))


@pytest.mark.slow
def test_rounds_without_their_run_json_are_not_deleted(config, tmp_path, in_process):
    words = [*SMALL, f"storage.dir={tmp_path}/logs", "do_provenance=false"]
    run_experiment(config(*words, "num_rounds=1"), "")
    folder = the_run(tmp_path)
    (folder / "run.json").unlink()
    before = weights(tmp_path)
    with pytest.raises(TraceFLError, match=r"rounds but no run\.json: restore it, or set check_train_cache=false"):
        run_experiment(config(*words, "num_rounds=1"), "")
    assert weights(tmp_path) == before
    run_experiment(config(*words, "num_rounds=1", "check_train_cache=false"), "")
    assert weights(tmp_path) == before


def interrupt_after(rounds: int, how: signal.Signals, folder: Path) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tracefl.main", *SMALL], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        headers = list(folder.glob("logs/small-*/run.json"))
        if headers and len(json.loads(headers[0].read_text())["rounds"]) >= rounds:
            process.send_signal(how)
            break
        time.sleep(0.02)
    return process.wait(timeout=120), process.stderr.read() if process.stderr else ""


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bytes(finished, tmp_path):
    status, said = interrupt_after(1, signal.SIGINT, tmp_path)
    assert status == 130, said
    assert "interrupted: complete rounds are kept" in said
    assert "Traceback" not in said
    status, _ = interrupt_after(2, signal.SIGKILL, tmp_path)
    assert status == -signal.SIGKILL
    assert len(Run.open(the_run(tmp_path)).rounds) == 2
    done = process(*SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training rounds 3 to 3" in done.stdout
    assert weights(tmp_path) == weights(finished[0])
