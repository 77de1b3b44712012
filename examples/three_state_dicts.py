"""tracefl.trace with nothing but PyTorch: three states, their mean, a prediction to explain."""

import torch
from torch import nn

from tracefl import trace

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
clients = {
    who: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).state_dict() for who in ("ann", "bob", "eve")
}
examples = {"ann": 100, "bob": 50, "eve": 50}

share = {who: n / sum(examples.values()) for who, n in examples.items()}
model.load_state_dict({name: sum(share[who] * clients[who][name] for who in clients) for name in model.state_dict()})

found = trace(model, clients, torch.randn(2, 4), weights=examples, method="influence")
print(found)
print(found.to_frame())
