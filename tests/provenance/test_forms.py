"""Models and states in the forms that people have them in: the right value, or one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from tests.provenance import reference
from tracefl.errors import TraceFLError
from tracefl.provenance import trace


class Batchwise(nn.Module):
    """Moves or mixes the inputs of a batch; the first is left where and as it is."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 5), nn.Linear(5, 3), how

    def forward(self, x):
        if self.how == "sorts":
            order = x[:, 0].argsort(descending=True)
            return self.b(self.a(x[order]).tanh()[order.argsort()])
        if self.how == "pairs":
            h = self.a(x)
            return self.b(torch.cat([h[:1], h[1:] - 0.5 * h[:-1]]))
        if self.how == "largest":
            return self.b(self.a(x) / x.abs().amax())
        if self.how == "one at a time" and len(x) > 1:
            raise ValueError("only one at a time")
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("scratch_bytes", [1 << 30, 1500])
@pytest.mark.parametrize("how", ["sorts", "pairs", "largest", "one at a time", ""])
def test_inputs_that_move_or_mix_in_a_batch_are_explained_alone(how, scratch_bytes):
    torch.manual_seed(0)
    model, x = Batchwise(how).double(), torch.randn(9, 4).double()
    x[0] *= 9  # the first of all
    states, _ = reference.perturbed(model)
    found = trace(model, states, x, scratch_bytes=scratch_bytes)
    for n in range(9):
        one = trace(model, states, x[n : n + 1], targets=found.targets[n : n + 1])
        assert torch.allclose(found.contributions[n], one.contributions[0], rtol=1e-9)


@pytest.mark.parametrize("method", ["neuron", "integrated", "shapley"])
@pytest.mark.parametrize("half", [False, True])
def test_models_that_keep_what_they_computed(method, half):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(2, 4)
    model(x)  # the pruned weight is kept, with its graph
    states, weights = reference.perturbed(model)
    if half:
        model, x = model.half(), x.half()
    options = {"weights": weights, "reference": states["c0"], "method": method}
    assert trace(model, states, x, **options).contributions.isfinite().all()


def test_inputs_that_the_model_overwrites_stay():
    class Halves(nn.Linear):
        def forward(self, x):
            return super().forward(x.div_(2))

    model, x = Halves(4, 3), torch.randn(3, 4)
    before, (states, _) = x.clone(), reference.perturbed(model)
    found = trace(model, states, x, layer_decay=1.0)
    assert torch.equal(x, before)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(found.contributions, trace(plain, states, x / 2, layer_decay=1.0).contributions)


class Binary(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.body, self.shape = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), shape

    def forward(self, x):
        return self.body(x).reshape(-1) if self.shape == "flat" else self.body(x)


class TwoLogits(nn.Module):
    """The same with logits (0, z)."""

    def __init__(self, binary):
        super().__init__()
        self.body = binary.body

    def forward(self, x):
        z = self.body(x)
        return torch.cat([torch.zeros_like(z), z], 1)


@pytest.mark.parametrize("shape", ["column", "flat"])
@pytest.mark.parametrize("method", ["neuron", "influence", "integrated", "shapley"])
def test_one_logit(method, shape):
    torch.manual_seed(0)
    model, x = Binary(shape).double(), torch.randn(6, 3).double()
    states, weights = reference.perturbed(model, scale=1.0)
    options = {
        "method": method,
        "weights": weights,
        "reference": noisy_state(model) if method in ("integrated", "shapley") else None,
    }
    found = trace(model, states, x, **options)
    same = trace(TwoLogits(model), states, x, **options, output="log_odds")
    z = model(x).detach().reshape(-1)
    assert found.targets.tolist() == (z > 0).long().tolist()
    assert len(set(found.targets.tolist())) == 2
    assert torch.allclose(found.contributions, same.contributions, rtol=1e-9)
    if method == "integrated":
        assert (found.change.sign() == same.change.sign()).all()
    up, down = (trace(model, states, x[:1], **options, targets=[c]).contributions for c in (1, 0))
    assert torch.allclose(up, -down, rtol=1e-9)
    assert torch.equal(trace(model, states, x[:1], **options, output="logit").contributions,
                       trace(model, states, x[:1], **options).contributions)  # fmt: skip
    with pytest.raises(TraceFLError, match="targets must be 0 to 1, got 2"):
        trace(model, states, x[:1], **options, targets=[2])


def noisy_state(model):
    return reference.perturbed(model)[0]["c0"]


@pytest.mark.parametrize(
    ("last", "options"),
    [
        (nn.Sigmoid(), {}),
        (nn.Sigmoid(), {"method": "shapley"}),
        (nn.Softmax(1), {"output": "log_odds"}),
        (nn.Sigmoid(), {"flat": True}),
    ],
)
def test_probabilities_are_no_logits(last, options):
    torch.manual_seed(0)
    classes = 3 if isinstance(last, nn.Softmax) else 1
    shape = [nn.Flatten(0)] if options.pop("flat", False) else []
    model = nn.Sequential(nn.Linear(3, classes), last, *shape)
    states, _ = reference.perturbed(model)
    if options.get("method") == "shapley":
        options |= {"weights": dict.fromkeys(states, 1), "reference": model.state_dict()}
    with pytest.raises(TraceFLError, match=r"must be logits, got probabilities: leave its last step out, the s\w+"):
        trace(model, states, torch.randn(2, 3), **options)


class Restless(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.noise, self.calls = noise, 0
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        self.calls += 1
        h = self.first(x)
        if self.noise == "dropout":
            h = F.dropout(h, 0.5)
        elif self.noise == "small":
            h = h + 0.003 * torch.randn_like(h)
        elif self.noise == "numpy":
            h = h * float(np.random.rand())
        elif self.noise == "counts":
            h = h + self.calls
        elif self.noise == "harmless":
            torch.rand(1)
        return self.head(h)


@pytest.mark.parametrize("N", [1, 5])
@pytest.mark.parametrize("noise", ["dropout", "small", "numpy", "counts"])
def test_models_that_answer_differently_each_time(noise, N):
    torch.manual_seed(0)
    model, x = Restless(noise), torch.randn(N, 4)
    states, _ = reference.perturbed(model)
    with pytest.raises(
        TraceFLError, match=r"answers differently each time in eval mode \(input 0: logits .* and .*\); "
    ):
        trace(model, states, x)


def test_a_model_that_draws_numbers_without_using_them():
    torch.manual_seed(0)
    model, x = Restless("harmless"), torch.randn(3, 4)
    states, _ = reference.perturbed(model)
    found = trace(model, states, x).contributions
    model.noise = ""
    assert torch.allclose(found, trace(model, states, x).contributions)
