"""What a client sends back: trained honestly, or with each fault, from the same message."""

import json

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from tracefl.data.faults import opposite
from tracefl.data.prepare import prepare
from tracefl.federation.client_app import train_round
from tracefl.federation.server_app import client_task
from tracefl.models import build_model, exchanged_state, model_spec

SMALL = ["num_clients=3", "clients_per_round=3", "client.epochs=1", "data_dist.max_per_client_data_size=12",
         "dirichlet_alpha=100", "data_dist.max_server_data_size=4", "batch_size=6"]  # fmt: skip


@pytest.fixture
def sent(config):
    """`sent(*overrides)`: the initial model, and what client 1 sends in the first round: its model and metrics."""

    def send(*overrides: str):
        c = config(*SMALL, *overrides)
        data = prepare(c)
        torch.manual_seed(0)
        initial = {k: v.clone() for k, v in exchanged_state(build_model(model_spec(c, data))).items()}
        settings = ConfigRecord({"server-round": 1, "task": json.dumps(client_task(c, data))})
        content = RecordDict({"arrays": ArrayRecord(dict(initial)), "config": settings})
        message = Message(content, message_type="train", dst_node_id=1)
        context = Context(run_id=0, node_id=1, node_config={"partition-id": 1}, state=RecordDict(), run_config={})
        reply = train_round(message, context)
        return initial, dict(reply.content["arrays"].to_torch_state_dict()), dict(reply.content["metrics"])

    return send


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_every_fault_changes_what_the_faulty_client_sends(sent):
    initial, honest, metrics = sent("fault.kind=free_rider", "faulty_clients_ids=[0]")  # client 1 is honest
    assert metrics["num-examples"] == 12

    def with_fault(kind: str):
        return sent(f"fault.kind={kind}", "faulty_clients_ids=[1]")

    _, state, metrics = with_fault("free_rider")
    assert equal(state, initial)
    assert metrics["num-examples"] == 12

    state = with_fault("sign_flip")[1]
    assert equal(state, opposite(initial, honest))
    assert all((state[name] > 0).all() for name in state if name.endswith("running_var"))

    for kind in ("random_labels", "backdoor"):
        state = with_fault(kind)[1]
        assert not equal(state, honest)
        assert state.keys() == honest.keys()
