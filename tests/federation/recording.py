"""Record an app of one's own, and look at what was recorded."""

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from tests.federation.own import OwnGrid, arrays
from tracefl import trace
from tracefl.federation.recorder import Recorder

THREE = {11: "a", 12: "b", 13: "c"}


class FromScratch(Strategy):
    """No class of Flower's: asks all nodes, takes the plain mean, weighs by nothing and knows no examples."""

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]

    def aggregate_train(self, server_round, replies):
        states = [reply.content["arrays"].to_torch_state_dict() for reply in replies]
        return ArrayRecord({n: sum(s[n] for s in states) / len(states) for n in states[0]}), None

    def configure_evaluate(self, server_round, arrays, config, grid):
        return []

    def aggregate_evaluate(self, server_round, replies):
        return None

    def summary(self):
        pass


def plain(**changes) -> FedAvg:
    return FedAvg(**{"fraction_evaluate": 0.0} | changes)


def record(folder, grid=None, rounds=2, strategy=None, initial=None, start=None, **changes):
    grid = grid or OwnGrid(THREE)
    recorder = Recorder(strategy or plain(), folder, grid, **{"node_timeout": 0.3} | changes)
    initial = arrays() if initial is None else initial
    return recorder.start(grid, initial, num_rounds=rounds, **{"timeout": 0.3} | (start or {}))


def shares(run, number=1) -> dict[str, float]:
    return {client.id: client.weight for client in run.round(number).clients}


def mean_of(run, number, name="w"):
    return sum(c.weight * run.round(number).client_state(c.id)[name] for c in run.round(number).clients)


def same(a, b) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def linear(state) -> nn.Module:
    """A model of these entries."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in state.items():
                setattr(self, name, nn.Parameter(value.clone(), requires_grad=value.is_floating_point()))

        def forward(self, x):
            return x @ self.w * self.a + self.b

    return Model()


def trace_round(run, number=1):
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    model = linear(run.global_state(number))
    return trace(model, run.client_states(number), x, weights=shares(run, number), method="influence")
