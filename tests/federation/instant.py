"""A grid of instant clients: twelve nodes that answer every message at once, in an order of its own."""

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

NODES = {900 + 7 * k: str(k) for k in range(12)}
START = {"w": torch.zeros(3), "bn.running_var": torch.ones(2), "a": torch.zeros(2, 2)}


def state_of(client: int, server_round: int) -> dict[str, torch.Tensor]:
    """Two parameters and a buffer, in another order than that of their names."""
    state = {"w": torch.full((3,), float(client)) + server_round, "bn.running_var": torch.full((2,), 1.0 + client)}
    return state | {"a": torch.full((2, 2), 0.1 * client)}


class InstantGrid:
    """Answers every message at once, in an order of its own; `faults` maps a client to what it does instead."""

    def __init__(self, faults=None, seed: int = 0) -> None:
        self.faults, self.rng, self.mailbox, self.sent = faults or {}, np.random.default_rng(seed), [], []

    def get_node_ids(self):
        return list(NODES)

    def push_messages(self, messages):
        messages = list(messages)
        for index, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{len(self.sent)}-{index}"
        self.mailbox += messages
        self.sent.append([NODES[m.metadata.dst_node_id] for m in messages])
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        while self.mailbox:
            reply = self.reply(self.mailbox.pop(self.rng.integers(len(self.mailbox))))
            if reply is not None:
                return [reply]
        return []

    def reply(self, message):
        client = int(NODES[message.metadata.dst_node_id])
        server_round = int(message.content.config_records["config"]["server-round"])
        state, examples = state_of(client, server_round), 10 + client
        fault = self.faults.get(client)
        if fault == "raise":
            return Message(Error(2, "Traceback ...\nValueError: out of data"), reply_to=message)
        if fault == "silent":
            return None
        if fault == "nan":
            state["w"][1] = float("nan")
        if fault == "shape":
            state["w"] = torch.zeros(4)
        if fault == "dtype":
            state["w"] = state["w"].double()
        if fault == "missing":
            del state["w"]
        if fault == "empty":
            state = {}
        if fault == "local normalisation":
            del state["bn.running_var"]
        if fault == "extra":
            state["v"] = torch.zeros(1)
        if fault == "no examples":
            examples = 0
        content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": examples, "train-loss": 1.0})}
        return Message(RecordDict(content), reply_to=message)
