"""A recorded round of two hand-made clients."""

import pytest
import torch
from torch import nn

from tracefl.data.examples import Examples
from tracefl.models import exchanged_state
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import Evaluation


class OneChannel(nn.Module):
    def forward(self, x):
        return x[:, :1]


@pytest.fixture
def recorded(tmp_path):
    """Client 0 pushes every logit of class 0 up, client 1 that of class 1."""
    model = nn.Sequential(OneChannel(), nn.Flatten(), nn.Linear(4, 2))
    states = []
    for client in (0, 1):
        weight = torch.zeros(2, 4)
        weight[client, 2 * client : 2 * client + 2] = 1.0
        states.append({"2.weight": weight, "2.bias": torch.zeros(2)})
    released = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    labels = torch.arange(12) % 2
    inputs = torch.zeros(12, 1, 2, 2)
    inputs[labels == 0, :, 0] = 1.0
    inputs[labels == 1, :, 1] = 1.0
    run = Run.create(
        tmp_path, initial=exchanged_state(model), clients=[ClientInfo("0", {0: 30}), ClientInfo("1", {1: 10})], seed=0
    )
    participants = [run.record_client(1, str(k), states[k], n, n / 40) for k, n in ((0, 30), (1, 10))]
    run.record_round(1, participants, released, Evaluation(0.1, 1.0, labels), {})
    return run, model, Examples(inputs, labels)
