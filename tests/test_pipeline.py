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
from PIL import Image

from tests.conftest import composed
from tests.data.tables import encoded, write
from tests.federation import local
from tests.rewriting import rewrite
from tests.test_main import process
from tracefl import Run, whatif
from tracefl.checks import load
from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError
from tracefl.pipeline import run_experiment
from tracefl.report import read

SMALL = [
    "exp_key=small", "num_clients=3", "clients_per_round=2", "num_rounds=3", "client.epochs=1",
    "data_dist.max_per_client_data_size=40", "data_dist.max_server_data_size=60", "dirichlet_alpha=1",
]  # fmt: skip


def the_run(storage: Path) -> Path:
    (folder,) = storage.glob("logs/small-*")
    return folder


def weights(storage: Path) -> dict[str, bytes]:
    folder = the_run(storage)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    done = process(*SMALL, "plotting=true", "convert_cache_to_csv=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture
def in_process(monkeypatch):
    """Clients train in this process instead of on Ray."""
    monkeypatch.setattr("tracefl.federation.simulation.simulate", local.simulate)
    monkeypatch.setattr("tracefl.federation.grid.PULL_INTERVAL_S", 0)


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


@pytest.mark.slow
def test_faults_and_lines_name_labels_and_columns_as_the_data_write_them(config, tmp_path, in_process, capsys):
    labels = [1 + k % 3 for k in range(120)]
    images = [encoded(Image.new("L", (8, 8), 60 * label)) for label in labels]
    write(tmp_path / "d", {"scan": images, "label": labels}, test={"scan": images, "label": labels})
    words = ("num_clients=2", "clients_per_round=2", "num_rounds=1", "client.epochs=1", "dirichlet_alpha=100")
    faults = ("faulty_clients_ids=[0]", "label2flip={1:2}", "do_provenance=false", "exp_key=small", "report=false")
    settings = config(f"dataset.path={tmp_path}/d", *words, *faults)
    for _ in range(2):  # the second time from the prepared data
        run_experiment(settings, "")
        out = capsys.readouterr().out
        assert "data: input scan, label label, 3 classes (1, 2, 3)" in out
        assert "label2flip: labels as the data write them: 1 is class 0, 2 is class 1" in out
    run = Run.open(the_run(tmp_path))
    assert not (run.path / "report.html").exists()
    faulty, other = run.clients
    assert run["class_names"] == ["1", "2", "3"]
    assert faulty.trained_label_counts.keys() == {1, 2}  # the label 1 is class 0, and was flipped
    assert other.trained_label_counts.keys() == {0, 1, 2}


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


@pytest.mark.slow
def test_a_faulty_client_is_named_on_real_images(real_data, tmp_path):
    flips = "{" + ",".join(f"{label}:0" for label in range(1, 10)) + "}"
    done = process(
        "dataset.name=mnist", f"dataset.path={real_data / 'mnist'}", "num_clients=5", "clients_per_round=5",
        "num_rounds=2", "dirichlet_alpha=0.7", "data_dist.max_per_client_data_size=400", "faulty_clients_ids=[0]",
        f"label2flip={flips}", "exp_key=small", cwd=tmp_path, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rounds = pd.read_csv(the_run(tmp_path) / "rounds.csv")
    traced = rounds[rounds["num_inputs"] > 0]
    assert len(traced) > 0
    assert (traced["chance_accuracy"] == 0.2).all()
    assert traced["localization_accuracy"].max() >= 0.8
    assert traced["localization_accuracy_influence"].max() >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (
            "google-bert/bert-base-cased",
            "num_hidden_layers=1 hidden_size=32 num_attention_heads=2 intermediate_size=64",
        ),
        ("openai-community/openai-gpt", "n_layer=1 n_embd=32 n_head=2"),
    ],
)
def test_a_text_model_goes_all_the_way_and_repeats_to_the_byte(real_data, tmp_path, name, sizes):
    command = [
        f"dataset.path={real_data / 'dbpedia_14'}", f"model.name={name}", "dataset.max_tokens=16", "num_clients=2",
        "clients_per_round=2", "num_rounds=2", "client.lr=0.005", "data_dist.max_server_data_size=300",
        "exp_key=small", *(f"model.config.{size}" for size in sizes.split()),
    ]  # fmt: skip
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        done = process(*command, cwd=folder, timeout=900)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") < 5, done.stderr  # no library's chatter
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    rounds = pd.read_csv(the_run(tmp_path / "one") / "rounds.csv")
    assert rounds["accuracy"].iloc[-1] > 2 / 14
    assert rounds["num_inputs"].iloc[-1] > 0
    assert Run.open(the_run(tmp_path / "one"))["class_names"][0] == "Company"


@pytest.mark.slow
def test_feddebug_runs_in_the_same_run_and_other_settings_of_it_repeat_nothing_else(
    config, tmp_path, in_process, capsys
):
    def run(*overrides: str) -> str:
        faults = ("faulty_clients_ids=[0,1]", "fault.kind=random_labels", "num_rounds=2")
        run_experiment(config(*SMALL, f"storage.dir={tmp_path}/logs", *faults, *overrides), "")
        return capsys.readouterr().out

    out = run()
    assert "FedDebug: Localization = " in out
    assert "Naming the faulty clients" in out
    folder = the_run(tmp_path)
    infos = {client.id: (client.fault, client.flipped_label_counts is None) for client in Run.open(folder).clients}
    assert infos == {"0": ("random_labels", False), "1": ("random_labels", False), "2": (None, True)}
    assert set(pd.read_csv(folder / "timings.csv")["method"]) == {"neuron", "influence", "FedDebug"}
    rounds = pd.read_csv(folder / "rounds.csv")
    assert {"feddebug_accuracy", "feddebug_chance", "rank_of_c0", "rank_of_c1_influence", "faulty_recall"} <= set(
        rounds
    )
    assert {"seconds_neuron", "seconds_influence", "seconds_feddebug"} <= set(rounds)

    def stamps() -> list[int]:
        return [(folder / name).stat().st_mtime_ns for name in ("provenance.parquet", "feddebug.parquet")]

    before = stamps()
    run()
    assert stamps() == before
    run("neuron_activation_threshold=0.1")
    assert stamps()[0] == before[0]
    assert stamps()[1] > before[1]


@pytest.mark.slow
def test_excluded_clients_never_train_and_keep_their_data(config, tmp_path, in_process, capsys):
    words = [*SMALL, "num_clients=4", f"storage.dir={tmp_path}/logs", "exp_key=out", "faulty_clients_ids=[1,2]"]
    settings = config(*words, "fault.kind=random_labels", "exclude_clients=[2,0]", "do_feddebug=false", "num_rounds=1")
    run_experiment(settings, OmegaConf.to_yaml(OmegaConf.structured(settings)))
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "logs").glob("out-*")
    run, data = Run.open(folder), prepare(config(*words[:-1]))
    assert [[client.id for client in record.clients] for record in run.rounds] == [["1", "3"]]
    assert {client.id: client.label_counts for client in run.clients} == data.label_counts
    assert [client.fault for client in run.clients] == [None, "random_labels", None, None]
    assert run["data_sha256"] == data.digest
    assert "exclude_clients: c0, c2 never train, with " in out
    assert "training rounds 1 to 1 with 2 clients" in out
    judged = pd.read_csv(folder / "rounds.csv").columns
    assert ("rank_of_c1" in judged, "rank_of_c2" in judged) == (True, False)
    assert repr(whatif(folder, [1])).startswith("Without c1 in round 1: accuracy ")


@pytest.mark.slow
def test_a_private_run_says_what_it_spent_and_whose_the_noise_is(config, tmp_path, in_process, capsys):
    settings = config(
        *SMALL, f"storage.dir={tmp_path}/logs", "num_rounds=1", "noise_multiplier=0.01", "clipping_norm=5"
    )
    run_experiment(settings, "")
    out = capsys.readouterr().out
    assert "Differential privacy of the parameters after 1 rounds: epsilon = " in out
    assert "noise alone" in out
    assert pd.read_csv(the_run(tmp_path) / "rounds.csv")["noise_share"].iloc[0] > 0


@pytest.mark.slow
def test_a_run_that_keeps_its_last_round_answers_for_it_and_goes_on_as_recorded(config, in_process, tmp_path):
    typed = [*SMALL, "num_rounds=2", "faulty_clients_ids=[0]", "fault.kind=random_labels"]
    typed += ["clients_per_round=3", f"storage.dir={tmp_path}/logs", "data_dist.max_server_data_size=20"]
    typed += ["faster_input_generation=true", "provenance.max_mispredictions=2"]
    kept = config(*typed, "storage.keep=last:1", "storage.dtype=float16")
    run_experiment(kept, OmegaConf.to_yaml(OmegaConf.structured(kept)))
    folder = the_run(tmp_path)
    log, run = (folder / "TraceFL_clients_contributions.log").read_text(), Run.open(folder)
    assert "storage.keep=last:1: the clients' states of round 1 are gone; round 2 can be traced and audited" in log
    assert "storage.dtype=float16: answers and audits are of clients' states that are rounded to it" in log
    assert "INFO - Disk: " in log
    assert "[Round 1] TraceFL" not in log
    assert "[Round 2] TraceFL" in log
    rounds = pd.read_csv(folder / "rounds.csv")
    assert rounds["accuracy"].notna().all()
    assert rounds["feddebug_accuracy"].notna().tolist() == [False, True]
    assert set(pd.read_parquet(folder / "audit.parquet")["round"]) == {2}
    assert set(pd.read_parquet(folder / "provenance.parquet")["round"]) <= {2}
    with pytest.raises(TraceFLError, match=r"the clients' states of round 1 are gone, as storage.keep=last:1 asks"):
        run.trace(0, round=1)
    other = config(*typed)
    run_experiment(other, "")  # all is recorded
    assert "other storage settings change nothing" in (folder / "TraceFL_clients_contributions.log").read_text()
    rewrite(folder / "run.json", lambda header: {**header, "rounds": [header["rounds"][0] | {"kept": True}]})
    with pytest.raises(TraceFLError, match=r"was recorded with storage.keep=last:1, got all: give storage.keep=last:1"):
        run_experiment(other, "")
