"""The whole way with other settings: faults, texts, FedDebug, exclusion, privacy, storage."""

import pandas as pd
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.data.tables import encoded, write
from tests.rewriting import rewrite
from tests.small_run import SMALL, the_run, weights
from tests.test_main import process
from tracefl import Run, whatif
from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError
from tracefl.pipeline import run_experiment


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
