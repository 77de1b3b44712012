"""The client: a pure function of (seed, round, partition), its data and the model it is sent.

Settings come inside the message, so that the same app runs in the simulation and deployed.
"""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tracefl.data.examples import load_examples
from tracefl.data.faults import client_seed, faulty_examples, opposite
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

    examples = load_examples(Path(task["data"]) / "clients" / f"{partition}.safetensors")
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
