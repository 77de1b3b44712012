"""Trackers get every number of a run once; a missing or failing one is said in a sentence."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from tests.report.recorded import record
from tracefl.config import TRACKERS as NAMES
from tracefl.errors import TraceFLError
from tracefl.report import tracking
from tracefl.report.tracking import TRACKERS, Tracked, log_run, wanted

ROUNDS = pd.DataFrame({"round": [1, 2], "accuracy": [0.5, 0.75], "spearman": [float("nan"), 0.25]})
STEPS = [(1, {"accuracy": 0.5}), (2, {"accuracy": 0.75, "spearman": 0.25})]


def tracked(folder, rounds=ROUNDS) -> Tracked:
    return Tracked(folder, "mine", {"num_clients": 3, "label2flip": {1: 0}}, rounds)


def test_the_schema_knows_every_tracker():
    assert tuple(TRACKERS) == NAMES


def test_tensorboard_gets_every_number(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracking.to_tensorboard(tracked(tmp_path, ROUNDS.assign(spearman=0.0)))  # is replaced
    tracking.to_tensorboard(tracked(tmp_path))
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [(1, 0.5), (2, 0.75)]
    assert [(e.step, e.value) for e in events.Scalars("spearman")] == [(2, 0.25)]


def test_tensorboard_leaves_alone_what_a_link_leads_to(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "events").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").symlink_to(tmp_path / "others")
    tracking.to_tensorboard(tracked(tmp_path / "run"))
    assert [file.name for file in (tmp_path / "others").iterdir()] == ["events"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with its file store."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    yield mlflow
    mlflow.set_tracking_uri(None)


@pytest.mark.slow
def test_mlflow_gets_every_number_once(tmp_path, mlflow):
    for rounds in (ROUNDS, ROUNDS, ROUNDS.assign(accuracy=0.1)):
        tracking.to_mlflow(tracked(tmp_path / "mine-1234", rounds))
    other, first = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    assert first.info.run_name == "mine-1234"
    assert first.data.params == {"num_clients": "3", "label2flip": "{1: 0}"}
    history = mlflow.MlflowClient().get_metric_history
    assert [(m.step, m.value) for m in history(first.info.run_id, "accuracy")] == [(1, 0.5), (2, 0.75)]
    assert [(m.step, m.value) for m in history(first.info.run_id, "spearman")] == [(2, 0.25)]
    assert other.data.metrics["accuracy"] == 0.1


@pytest.mark.slow
def test_a_run_is_logged_to_mlflow_as_configured(tmp_path, config, mlflow):
    folder = record(tmp_path / "run")
    log_run(config("tracking=[mlflow]", "exp_key=mine", "num_clients=7", "clients_per_round=7"), folder)
    (logged,) = mlflow.search_runs(experiment_names=["mine"], output_format="list")
    assert logged.data.params["num_clients"] == "7"
    assert logged.data.metrics["localization_accuracy_influence"] == 1.0
    (tmp_path / "mlruns").rename(tmp_path / "gone")
    (tmp_path / "mlruns").write_text("no folder")
    with pytest.raises(TraceFLError, match=r"tracking=mlflow: the metrics of .*run, which is complete, could not be"):
        log_run(config("tracking=[mlflow]", "exp_key=mine"), folder)


class Wandb(SimpleNamespace):
    """What is used of wandb."""

    def __init__(self, **options) -> None:
        super().__init__(options=options, logged=[], finished=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.finished = True

    def log(self, metrics, step):
        self.logged.append((step, metrics))


def test_wandb_gets_every_number(tmp_path, monkeypatch):
    runs = []
    init = lambda **options: runs.append(Wandb(**options)) or runs[-1]  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for rounds in (ROUNDS, ROUNDS, ROUNDS.assign(accuracy=0.1)):
        tracking.to_wandb(tracked(tmp_path / "mine-1234", rounds))
    assert runs[0].logged == STEPS
    assert runs[0].finished
    assert runs[0].options["project"] == "mine"
    assert runs[0].options["config"]["num_clients"] == 3
    assert runs[0].options["dir"] == tmp_path / "mine-1234"
    ids = [run.options["id"] for run in runs]
    assert ids[0] == ids[1] != ids[2]
    assert all(name.startswith("mine-1234-") for name in ids)


def test_by_default_tensorboard_where_it_is(config, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda _: SimpleNamespace(origin="there"))
    assert wanted(config()) == ["tensorboard"]
    assert wanted(config("tracking=[]")) == []
    assert wanted(config("tracking=[wandb,mlflow,wandb]")) == ["wandb", "mlflow"]
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    assert wanted(config()) == []


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of that name"])
@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_is_refused_before_anything_is_trained(config, monkeypatch, name, found):
    from tracefl.pipeline import run_experiment

    monkeypatch.setattr(tracking, "find_spec", lambda _: found)
    monkeypatch.setattr("tracefl.pipeline.prepare", lambda _: pytest.fail("data were prepared"))
    sentence = f"tracking={name} needs the package {name}, which is not installed: pip install {name}, or leave"
    with pytest.raises(TraceFLError, match=sentence):
        run_experiment(config(f"tracking=[{name}]"), "")


@pytest.mark.parametrize("value", ["[nobody]", "[mlflow,x]", "[[mlflow]]"])
def test_one_that_is_unknown_is_refused(config, value):
    with pytest.raises(TraceFLError, match=r"tracking must (name some of tensorboard, mlflow, wandb|be a list)"):
        config(f"tracking={value}")


def test_one_that_fails_leaves_the_run_and_says_so(config, monkeypatch, tmp_path):
    folder, seen = record(tmp_path / "run"), []

    def failing(tracked):
        seen.append(tracked)
        raise ConnectionError("no server\nat all")

    monkeypatch.setitem(TRACKERS, "tensorboard", failing)
    monkeypatch.setattr(tracking, "find_spec", lambda _: SimpleNamespace(origin="there"))
    with pytest.raises(TraceFLError, match=r"could not be logged \(no server\): correct it and give the same command"):
        log_run(config(), folder)
    assert seen[0].experiment == "tracefl"
    assert seen[0].settings["client.lr"] == 0.0003
    assert [step for step, _ in seen[0].steps()] == [1, 2]
