"""The audit against its definition: fusions without each client, and their derivative."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.provenance import reference
from tests.provenance.small import Reversed
from tracefl import TraceFLError, audit


def federation(K=5, seed=0, scale=0.3):
    """A small network with BatchNorm and tokens of its own table, its clients, and labelled examples."""
    torch.manual_seed(seed)
    conv = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)]
    model = nn.Sequential(*conv).double().eval()
    states, weights = reference.perturbed(model, K=K, scale=scale)
    for state in states.values():
        state["1.running_var"] = state["1.running_var"].abs() + 0.1
    model.load_state_dict(fused(states, weights))
    return model, states, weights, torch.randn(40, 1, 5, 5).double(), torch.randint(0, 3, (40,))


def fused(states, weights):
    first, total = next(iter(states.values())), sum(weights[who] for who in states)
    mean = {n: sum(weights[who] * s[n] for who, s in states.items()) / total for n in first}
    return {n: mean[n] if w.is_floating_point() else w for n, w in first.items()}


def losses(model, state, x, labels, some=slice(None)):
    return F.cross_entropy(functional_call(model, state, (x[some],)), labels[some]).item()


def by_definition(model, states, weights, x, labels, some=slice(None)):
    with_all = losses(model, fused(states, weights), x, labels, some)
    rest = [{w: s for w, s in states.items() if w != who} for who in states]
    return [losses(model, fused(others, weights), x, labels, some) - with_all for others in rest]


def test_exact_values_are_those_of_fusions_without_the_client():
    model, states, weights, x, labels = federation()
    found = audit(model, states, x, labels, weights=weights, exact=True)
    assert found.exact
    assert found.client_ids == list(states)
    assert found.values.tolist() == pytest.approx(by_definition(model, states, weights, x, labels), rel=1e-9)
    for c in range(3):
        expected = by_definition(model, states, weights, x, labels, labels == c)
        assert found.by_class[c].tolist() == pytest.approx(expected, rel=1e-9)
    assert found.examples.tolist() == labels.bincount().tolist()


def first_order(model, states, weights, x, labels, some=slice(None), step=1e-6):
    W, total = model.state_dict(), sum(weights.values())
    found = []
    for who, state in states.items():
        p = weights[who] / total
        way = {n: -p / (1 - p) * (state[n] - w) if w.is_floating_point() else 0 * w for n, w in W.items()}
        ends = [losses(model, {n: w + e * way[n] for n, w in W.items()}, x, labels, some) for e in (step, -step)]
        found.append((ends[0] - ends[1]) / (2 * step))
    return found


def test_first_order_values_are_the_derivative_on_the_way_to_the_fusion_without():
    model, states, weights, x, labels = federation()
    before = copy.deepcopy(model.state_dict())
    model[1].train()
    found = audit(model, states, x, labels, weights=weights)
    assert found.values.tolist() == pytest.approx(first_order(model.eval(), states, weights, x, labels), rel=1e-5)
    for c in range(3):
        expected = first_order(model, states, weights, x, labels, labels == c)
        assert found.by_class[c].tolist() == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert "forward" not in vars(model[1])
    assert all(p.requires_grad for p in model.parameters())


def test_small_memory_and_files_change_nothing(tmp_path):
    model, states, weights, x, labels = federation()
    expected = audit(model, states, x, labels, weights=weights)
    for who, state in states.items():
        save_file(state, tmp_path / f"{who}.safetensors")
    files = {who: tmp_path / f"{who}.safetensors" for who in states}
    found = audit(model, files, x, labels, weights=weights, scratch_bytes=1)
    assert torch.allclose(found.by_class, expected.by_class, rtol=1e-9)
    in_full = audit(model, files, x, labels, weights=weights, exact=True)
    assert torch.allclose(
        in_full.values, audit(model, states, x, labels, weights=weights, exact=True).values, rtol=1e-9
    )


def test_a_server_that_moved_the_fusion_is_not_charged_to_the_clients():
    """As by FedAdam or noise: leaving a client out moves along W_k - the mean of all, not along W_k - W."""
    model, states, weights, x, labels = federation()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = audit(model, states, x, labels, weights=weights)
    total = sum(weights.values())
    assert sum(found.values[k].item() * (total - w) for k, w in enumerate(weights.values())) == pytest.approx(
        0, abs=1e-9
    )


def test_norms_and_cosines():
    model, states, weights, x, labels = federation()
    start = {n: w + 0.05 * torch.randn_like(w) if w.is_floating_point() else w for n, w in model.state_dict().items()}
    states["c1"] = start  # a free rider
    model.load_state_dict(fused(states, weights))
    found = audit(model, states, x, labels, weights=weights, reference=start)
    names = [name for name, _ in model.named_parameters()]
    updates = {who: torch.cat([(s[n] - start[n]).flatten() for n in names]) for who, s in states.items()}
    mean = sum(weights[who] * u for who, u in updates.items()) / sum(weights.values())
    assert found.norms.tolist() == pytest.approx([u.norm().item() for u in updates.values()])
    cosines = found.cosines.tolist()
    assert math.isnan(cosines[1])
    for k in (0, 2, 3, 4):
        assert cosines[k] == pytest.approx(F.cosine_similarity(updates[f"c{k}"], mean, dim=0).item())
    assert audit(model, states, x, labels, weights=weights).norms is None


def test_a_class_without_examples_and_a_client_with_all_the_weight():
    model, states, weights, x, labels = federation()
    labels = torch.where(labels == 1, 0, labels)
    found = audit(model, states, x, labels, weights=weights)
    assert found.by_class[1].isnan().all()
    assert not found.values.isnan().any()
    alone = audit(model, states, x, labels, weights={who: float(who == "c2") for who in states})
    assert alone.values[2].isnan()
    assert alone.values[[0, 1, 3, 4]].tolist() == [0, 0, 0, 0]


def test_a_client_that_harms_stands_out():
    """Truth by construction: the model is right, and one client pulls it to the opposite."""
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    labels = (x[:, 0] > 0).long()
    right = torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]])
    states = {f"c{k}": {"weight": (-right if k == 3 else right) + 0.05 * torch.randn(2, 4)} for k in range(8)}
    weights, model = dict.fromkeys(states, 1), nn.Linear(4, 2, bias=False)
    model.load_state_dict(fused(states, weights))
    for exact in (False, True):
        z = audit(model, states, x, labels, weights=weights, exact=exact).z
        assert z.argmax() == 3
        assert z[3] > 5 * z[[0, 1, 2, 4, 5, 6, 7]].max()


def test_texts_and_one_logit():
    torch.manual_seed(0)

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 1)

        def forward(self, text):
            return self.head(F.embedding(text, self.table, padding_idx=0).mean(1))

    model = Bag().double()
    states, weights = reference.perturbed(model, scale=0.5)
    model.load_state_dict(fused(states, weights))
    x, labels = {"text": torch.randint(0, 9, (12, 5))}, torch.randint(0, 2, (12,))
    found = audit(model, states, x, labels, weights=weights)
    W, total, step = model.state_dict(), sum(weights.values()), 1e-6
    for k, (who, state) in enumerate(states.items()):
        p = weights[who] / total
        ends = []
        for e in (step, -step):
            moved = {n: w - e * p / (1 - p) * (state[n] - w) for n, w in W.items()}
            z = functional_call(model, moved, (x["text"],))[:, 0]
            ends.append(F.binary_cross_entropy_with_logits(z, labels.double()).item())
        assert found.values[k].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 1, 3], "labels must be 0 to 2, got 3: leave such examples out"),
        ([0, -1, 2], "labels must be 0 to 2, got -1"),
        ([0, 1], "labels must be 3 integers, one per input"),
        ([0.0, 1.0, 2.0], "labels must be 3 integers, one per input"),
    ],
)
def test_labels_that_cannot_be(labels, sentence):
    model, states, weights, x, _ = federation()
    with pytest.raises(TraceFLError, match=sentence):
        audit(model, states, x[:3], labels, weights=weights)


def test_what_trace_refuses_is_refused_here():
    class Own(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.head, self.how = nn.Linear(4, 3), how

        def forward(self, x):
            z = self.head(x)
            if self.how == "reversed":
                return Reversed.apply(z)
            return F.dropout(z, 0.5) if self.how == "dropout" else z.softmax(1)

    torch.manual_seed(0)
    x, labels = torch.randn(9, 4), torch.randint(0, 3, (9,))
    for how, said in (
        ("reversed", "own function Reversed gives a gradient that is not its derivative"),
        ("dropout", "answers differently each time in eval mode"),
        ("softmax", "must be logits, got probabilities"),
    ):
        states, weights = reference.perturbed(model := Own(how))
        with pytest.raises(TraceFLError, match=said):
            audit(model, states, x, labels, weights=weights)
