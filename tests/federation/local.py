"""Clients in this process, without Ray: a grid whose nodes are TraceFL's own client, one after the other."""

from collections.abc import Callable
from typing import cast

import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from tracefl.config import Config
from tracefl.federation import client_app
from tracefl.federation.grid import GridView


class LocalGrid:
    """Nodes 100, 101, ... hold partitions 0, 1, ...; every message is answered when the replies are asked for."""

    def __init__(self, num_clients: int, train: Callable[[Message, Context], Message] = client_app.train_round) -> None:
        self.num_clients, self.train, self.mailbox, self.count = num_clients, train, [], 0

    def get_node_ids(self):
        return [100 + partition for partition in range(self.num_clients)]

    def push_messages(self, messages):
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = str(self.count)
            self.mailbox.append(message)
        return [message.metadata.message_id for message in self.mailbox]

    def pull_messages(self, message_ids):
        waiting, self.mailbox = self.mailbox, []
        return [self.answer(message) for message in waiting]

    def answer(self, message):
        partition, threads = message.metadata.dst_node_id - 100, torch.get_num_threads()
        context = Context(
            run_id=1, node_id=1, node_config={"partition-id": partition}, state=RecordDict(), run_config={}
        )
        work = client_app.identify if message.metadata.message_type == "query.identify" else self.train
        try:
            return work(message, context)
        finally:
            torch.set_num_threads(threads)  # the client's own number is for its own process


def simulate(config: Config, serve: Callable[[Grid], None]) -> None:
    """Stands for `tracefl.federation.simulation.simulate`."""
    identity = {f"_{name}": 1 for name in ("task_id", "run_id", "node_id")}
    before = {name: getattr(TaskIdentity, name, None) for name in identity}
    for name, value in identity.items():
        setattr(TaskIdentity, name, value)  # Flower refuses to build messages outside of a run
    try:
        serve(cast(Grid, GridView(cast(Grid, LocalGrid(config.num_clients)))))
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
