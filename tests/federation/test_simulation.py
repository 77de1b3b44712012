"""Flower's simulation on Ray: a client that raises or dies ends the run with one sentence, and the run can go on."""

import os
import signal
import threading
from functools import partial

import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp

from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError
from tracefl.federation import client_app
from tracefl.federation.server_app import serve
from tracefl.federation.simulation import simulate
from tracefl.models import build_model, exchanged_state, initial_model
from tracefl.record import ClientInfo
from tracefl.runs import Run

SMALL = [
    "num_clients=3", "clients_per_round=3", "num_rounds=2", "client.epochs=1", "data_dist.max_per_client_data_size=40",
    "data_dist.max_server_data_size=20",
]  # fmt: skip


def broken_app(how: str) -> ClientApp:
    """The real client, but client 1 breaks in round 2."""
    app = ClientApp()
    app.query("identify")(client_app.identify)

    @app.train()
    def train(message: Message, context) -> Message:
        server_round = message.content.config_records["config"]["server-round"]
        if context.node_config["partition-id"] == 1 and server_round == 2:
            if how == "die":
                os._exit(1)
            raise ValueError("the disk of this client is full")
        return client_app.train_round(message, context)

    return app


def new_run(c, folder):
    """A run of this configuration, and what the server does for it."""
    data = prepare(c)
    initial = exchanged_state(initial_model(c, data))
    clients = [ClientInfo(client, counts) for client, counts in data.label_counts.items()]
    run = Run.create(folder, initial=initial, clients=clients, seed=0)
    model = build_model({"name": "resnet18", "num_classes": 10})
    drive = partial(serve, config=c, data=data, run=run, model=model, examples=data.server())
    return run, drive


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [("raise", "the disk of this client is full"), ("die", "its process died")])
def test_a_client_that_breaks_is_named_and_the_run_goes_on_later(config, tmp_path, how, words):
    c = config(*SMALL)
    run, drive = new_run(c, tmp_path / "run")
    with pytest.raises(TraceFLError, match=rf"round 2, client 1: .*{words}"):
        simulate(c, drive, broken_app(how))
    assert len(Run.open(run.path).rounds) == 1
    if how == "die":
        simulate(c, drive)
        assert [len(record.clients) for record in Run.open(run.path).rounds] == [3, 3]


def lying_app(folder) -> ClientApp:
    """The real client, but: round 1, client 1's worker is killed once; 2, client 2's always; 3, client 0 sends 1e38."""
    app = ClientApp()
    app.query("identify")(client_app.identify)

    @app.train()
    def train(message: Message, context) -> Message:
        who = message.content.config_records["config"]["server-round"], context.node_config["partition-id"]
        if who == (2, 2) or (who == (1, 1) and not (folder / "killed").exists()):
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        reply = client_app.train_round(message, context)
        if who == (3, 0):
            state = reply.content["arrays"].to_torch_state_dict()
            reply.content["arrays"] = ArrayRecord({name: torch.full_like(v, 1e38) for name, v in state.items()})
        return reply

    return app


@pytest.mark.slow
def test_on_one_worker_a_client_that_dies_or_lies_harms_no_other(config, tmp_path):
    """A worker that dies once is forgiven; whoever dies again fails alone, though all share one worker."""
    c = config(*SMALL, "num_rounds=3", "total_cpus=1", "accept_failures=true")
    run, drive = new_run(c, tmp_path / "run")
    simulate(c, drive, lying_app(tmp_path))
    records = Run.open(run.path).rounds
    assert [list(record.failures) for record in records] == [[], ["2"], ["0"]]
    assert "its process died" in records[1].failures["2"]
    assert "the released model has " in records[2].failures["0"]
    assert "its update stands apart" in records[2].failures["0"]


@pytest.mark.slow
def test_a_simulation_that_cannot_start_ends_at_once(config, tmp_path):
    c = config(*SMALL)
    data = prepare(c)
    model = build_model({"name": "resnet18", "num_classes": 10})
    run = Run.create(tmp_path / "run", initial=exchanged_state(model), clients=[], seed=0)
    c.client_cpus = 10_000.0  # more than the check of the configuration lets through
    drive = partial(serve, config=c, data=data, run=run, model=model, examples=data.server())
    before = set(threading.enumerate())
    with pytest.raises(TraceFLError, match=r"client_cpus=10000\.0"):
        simulate(c, drive)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()
