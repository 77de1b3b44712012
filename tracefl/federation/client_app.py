"""The client: a pure function of (seed, round, partition), its data and the model it is sent.

Settings come inside the message, so that the same app runs in the simulation and deployed. It needs
torch, Flower and the library of its model, and nothing else of what TraceFL depends on.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tracefl.data.examples import Examples, load_examples, load_prepared
from tracefl.data.faults import client_seed, faulty_examples, opposite
from tracefl.errors import as_sentence, require
from tracefl.federation.identity import ACTION, identify
from tracefl.models import NothingDrawn, build_model, exchanged_state, load_exchanged_state
from tracefl.training import keep_freed_memory, train

app = ClientApp()
app.query(ACTION)(identify)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the received model on this client's examples and send it back."""
    config = message.content.config_records["config"]
    task = json.loads(str(config["task"]))
    partition, server_round = int(context.node_config["partition-id"]), int(config["server-round"])  # type: ignore[arg-type]
    seed = client_seed(task["seed"], server_round, partition)
    torch.set_num_threads(task["threads"])
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True

    examples = own_examples(task, context)
    fault = task["fault"] if partition in task["faulty_clients_ids"] else {"kind": None}
    if fault["kind"]:
        examples = faulty_examples(examples, fault, client_seed(task["seed"], 0, partition))
    with NothingDrawn():
        model = build_model(task["model"])
    received = message.content.array_records["arrays"].to_torch_state_dict()
    load_exchanged_state(model, received)
    loss = float("nan")
    if fault["kind"] != "free_rider":
        proximal_mu = float(config.get("proximal-mu", 0.0))  # type: ignore[arg-type]
        loss = train(model.to(task["device"]), examples, seed=seed, proximal_mu=proximal_mu, **task["training"])
    state = exchanged_state(model)
    sent = ArrayRecord(opposite(received, state) if fault["kind"] == "sign_flip" else state)
    metrics = MetricRecord({"num-examples": len(examples), "train-loss": loss})
    return Message(RecordDict({"arrays": sent, "metrics": metrics}), reply_to=message)


def own_examples(task: dict[str, Any], context: Context) -> Examples:
    """The examples of this node: its own file, or its part of the data on this machine.

    A deployed node's configuration names its file by data-path; it stays on the node.

    Raises:
        TraceFLError: there is no such file, or it is not the one that the run is recorded with.
    """
    partition = str(context.node_config["partition-id"])
    named = context.node_config.get("data-path")
    if named is None and task["data"]:
        return load_prepared(Path(task["data"]), f"clients/{partition}.safetensors")
    require(named, f"client {partition}: the node's configuration has no data-path: start it with data-path='FILE'")
    file, must = Path(str(named)), f"client {partition}: data-path={named} must be its file of the prepared data"
    wrong = (OSError, ValueError, KeyError, RuntimeError)
    with as_sentence(f"{must}, which cannot be read", "name the file", *wrong):
        examples, found = load_examples(file), hashlib.sha256(file.read_bytes()).hexdigest()
    wanted = task.get("sha256", {}).get(partition)
    require(wanted in (None, found), f"{must}, got another (SHA-256 {found[:8]}, not {str(wanted)[:8]}): name that one")
    return examples
