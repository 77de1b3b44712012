"""trace on small networks: closed forms, the slow references, and the laws that contributions obey."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torchvision
from torch import nn

from tests.provenance import reference
from tests.provenance.small import close
from tracefl.errors import TraceFLError
from tracefl.evidence.audit import audit
from tracefl.provenance import trace

torch.set_num_threads(2)


def test_two_clients_by_hand():
    """y = w·x + b with x = (1, 2), class 0: T_k = w_k0 · x + b_k0."""
    model = nn.Linear(2, 2)
    states = {
        "a": {"weight": torch.tensor([[1.0, 2.0], [9.0, 9.0]]), "bias": torch.tensor([0.5, 9.0])},
        "b": {"weight": torch.tensor([[3.0, -1.0], [9.0, 9.0]]), "bias": torch.tensor([0.0, 9.0])},
    }
    found = trace(model, states, torch.tensor([[1.0, 2.0]]), targets=torch.tensor([0]))
    assert found.contributions.tolist() == [[5.5, 1.0]]
    assert found.responsible == ["a"]
    close(found.scores, torch.tensor([[5.5, 1.0]]).double().softmax(1))
    weighted = trace(model, states, torch.tensor([[1.0, 2.0]]), targets=torch.tensor([0]), weights={"a": 1, "b": 3})
    assert weighted.contributions.tolist() == [[5.5 / 4, 0.75]]


def test_neuron_is_the_papers_sum(block, x):
    states, _ = reference.perturbed(block)
    found = trace(block, states, x, layer_decay=0.9)
    assert found.layers == ["stem", "norm1", "conv", "norm2", "conv#2", "head"]
    decay = 0.9 ** torch.arange(5, -1, -1).double()
    slow = torch.stack([reference.neuron(block, states, x[n : n + 1], found.targets[n]) for n in range(5)], 1)
    close(found.by_layer, slow * decay[:, None, None])
    close(found.contributions, (slow * decay[:, None, None]).sum(0))


def test_influence_is_autograds(block, x):
    states, weights = reference.perturbed(block)
    found = trace(block, states, x, method="influence", weights=weights)
    slow = [reference.influence(block, states, weights, x[n : n + 1], found.targets[n]) for n in range(len(x))]
    close(found.contributions, torch.stack(slow))
    logit = trace(block, states, x, method="influence", weights=weights, output="logit")
    slow = [reference.influence(block, states, weights, x[n : n + 1], found.targets[n], "logit") for n in range(5)]
    close(logit.contributions, torch.stack(slow))


def test_influence_adds_up_to_what_the_server_did(block, x):
    states, weights = reference.perturbed(block)
    block.load_state_dict(reference.fused(states, weights))
    found = trace(block, states, x, method="influence", weights=weights)
    assert found.contributions.sum(1).abs().max() < 1e-6 * found.contributions.abs().max()
    with torch.no_grad():
        block.head.bias[0] += 1
    noised = trace(block, states, x, targets=torch.zeros(5).long(), method="influence", weights=weights)
    head = noised.layers.index("head")
    assert (noised.residual_by_layer[head] - 1).abs().max() < 1e-6  # dy/db is 1 for the log-odds of class 0


def test_conservation(block, x):
    states, weights = reference.perturbed(block)
    found = trace(block, states, x, weights=weights)
    whole = trace(block, {"global": block.state_dict()}, x)
    close(found.by_layer.sum(2) + found.residual_by_layer, whole.by_layer[:, :, 0])
    block.load_state_dict(reference.fused(states, weights))
    fedavg = trace(block, states, x, weights=weights)
    assert fedavg.residual.abs().max() < 1e-9 * fedavg.contributions.abs().max()


def test_clients_permuted_and_doubled(block, x):
    states, _ = reference.perturbed(block)
    found = trace(block, states, x).contributions
    close(trace(block, {k: states[k] for k in ("c2", "c0", "c1")}, x).contributions, found[:, [2, 0, 1]])
    doubled = trace(block, {**states, "again": states["c1"]}, x).contributions
    close(doubled, found[:, [0, 1, 2, 1]])


def test_a_client_equal_to_the_reference_gets_zero(block, x):
    states, weights = reference.perturbed(block)
    incoming = states["c1"]
    neuron = trace(block.float(), states, x.float(), reference=incoming)
    assert neuron.contributions[:, 1].eq(0).all()
    assert neuron.contributions[:, [0, 2]].ne(0).all()
    states["c0"] = block.state_dict()
    found = trace(block, states, x.float(), method="influence", weights=weights).contributions
    assert found[:, 0].eq(0).all()
    assert found[:, 1:].ne(0).all()


def test_updates_differ_from_weights_by_what_clients_share(block, x):
    states, _ = reference.perturbed(block)
    weights_of = trace(block, states, x).scores
    updates_of = trace(block, states, x, reference=states["c0"]).scores
    close(updates_of, weights_of)


@pytest.mark.parametrize("scratch", [1, 1 << 16, 1 << 20])
def test_chunks_do_not_matter(block, x, scratch):
    states, weights = reference.perturbed(block)
    for method in ("neuron", "influence"):
        kept = trace(block, states, x, method=method, weights=weights)
        close(
            trace(block, states, x, method=method, weights=weights, scratch_bytes=scratch).by_layer,
            kept.by_layer,
        )
    alone = torch.cat([trace(block, states, x[n : n + 1]).contributions for n in range(len(x))])
    close(alone, trace(block, states, x).contributions)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scratch", [1, 1 << 30])
@pytest.mark.parametrize("method", ["neuron", "influence", "integrated"])
def test_a_gpu_gives_what_the_cpu_gives(block, x, method, scratch):
    """The model's device decides; states and inputs may lie elsewhere."""
    states, weights = reference.perturbed(block)
    options = {"method": method, "weights": weights, "reference": states["c0"], "steps": 4, "scratch_bytes": scratch}
    expected = trace(block, states, x, **options)
    found = trace(block.cuda(), states, x, **options)
    assert found.contributions.device.type == found.targets.device.type == "cpu"
    assert found.targets.equal(expected.targets)
    close(found.by_layer, expected.by_layer)
    close(found.residual, expected.residual)


class Precision(nn.Module):
    """Notes what its convolutions would compute with on a GPU."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 2), set()

    def forward(self, x):
        cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
        self.seen.add((cudnn.allow_tf32, cuda.matmul.allow_tf32))
        return self.layer(x)


@pytest.mark.parametrize("before", [(True, False), (True, True), (False, True)])
def test_nothing_is_computed_in_tf32_and_the_users_choice_comes_back(before):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    were = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32, matmul.allow_tf32 = before
        model = Precision()
        for method in ("neuron", "integrated"):
            state = Precision().state_dict()
            trace(model, {"a": state}, torch.ones(2, 3), method=method, weights={"a": 1}, reference=state)
        audit(model, {"a": state, "b": state}, torch.ones(2, 3), torch.tensor([0, 1]), weights={"a": 1, "b": 1})
        assert model.seen == {(False, False)}
        assert (cudnn.allow_tf32, matmul.allow_tf32) == before
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = were


class Wide(nn.Module):
    """Autograd keeps far more for its backward pass than goes into its layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.batches: list[int] = []

    def forward(self, x):
        self.batches.append(len(x))
        wide = self.first(x).repeat(1, 25_000).sin()  # 100,000 floats an input are kept
        return self.last(wide.view(len(x), -1, 4).mean(1))


def test_scratch_counts_what_autograd_keeps():
    torch.manual_seed(0)
    model, x = Wide(), torch.randn(64, 4)
    trace(model, {"a": Wide().state_dict()}, x)
    assert model.batches == [1, 64, 3]
    del model.batches[:]
    trace(model, {"a": Wide().state_dict()}, x, scratch_bytes=32 << 20)
    assert sum(model.batches[1::2]) == 64  # each pass is followed by one of some of its inputs
    assert max(model.batches) * 400_000 <= 32 << 20


def test_the_model_is_left_as_it_was(block, x):
    states, _ = reference.perturbed(block)
    expected = trace(block, states, x).contributions
    block.train()
    block.norm2.eval()
    block.conv.weight.requires_grad_(False)
    before = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        found = trace(block, states, x).contributions
    close(found, expected)
    assert block.training
    assert block.norm1.training
    assert not block.norm2.training
    assert not block.conv.weight.requires_grad
    assert block.stem.weight.requires_grad
    assert not block.norm1.running_mean.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def test_frozen_model(block, x):
    states, _ = reference.perturbed(block)
    expected = trace(block, states, x).contributions
    close(trace(block.requires_grad_(False), states, x).contributions, expected)


def test_layers(block, x):
    states, _ = reference.perturbed(block)
    everything = trace(block, states, x, layer_decay=1)
    paper = trace(block, states, x, layers="paper", layer_decay=1)
    assert paper.layers == ["stem", "conv", "conv#2", "head"]
    rows = [everything.layers.index(name) for name in paper.layers]
    close(paper.by_layer, everything.by_layer[rows])
    close(trace(block, states, x, layers=["head"]).by_layer, everything.by_layer[-1:])


def test_one_client_scores_one(block, x):
    states, _ = reference.perturbed(block, K=1)
    assert trace(block, states, x).scores.eq(1).all()


def test_result(block, x):
    states, _ = reference.perturbed(block)
    found = trace(block, states, x)
    ranking = found.ranking(2)
    assert [share for _, share, _ in ranking] == sorted(found.contributions[2].tolist(), reverse=True)
    assert ranking[0][0] == found.responsible[2]
    frame = found.to_frame()
    assert len(frame) == 15
    best = frame[(frame.input == 2) & (frame["rank"] == 1)].iloc[0]
    assert (best.client, best.contribution) == (ranking[0][0], ranking[0][1])
    assert "5 inputs, 3 clients, 6 layers" in repr(found)


def test_integrated_shares_add_up_to_the_change(block, x):
    incoming = copy.deepcopy(block.state_dict())
    states, weights = reference.perturbed(block, scale=0.2)
    block.load_state_dict(reference.fused(states, weights))
    found = trace(block, states, x, method="integrated", weights=weights, reference=incoming)
    before = copy.deepcopy(block).eval()
    before.load_state_dict(incoming)
    with torch.no_grad():
        y = [model(x).gather(1, found.targets[:, None])[:, 0] for model in (block.eval(), before)]
    close(found.change, y[0] - y[1])
    assert found.completeness_error.mean() < 0.01
    assert found.residual.abs().max() < 1e-9 * found.contributions.abs().max()
    coarse = trace(block, states, x, method="integrated", weights=weights, reference=incoming, steps=1)
    assert coarse.completeness_error.mean() > found.completeness_error.mean()


def test_integrated_is_exact_where_the_output_is_quadratic():
    """y = w2 (w1 x): the gradient is linear along the path, so one interval of the trapezoid rule is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    states, weights = reference.perturbed(model, scale=1)
    incoming = {name: w + torch.randn_like(w) for name, w in model.state_dict().items()}
    x = torch.randn(4, 3).double()
    found = trace(model, states, x, method="integrated", weights=weights, reference=incoming, steps=1)
    close(found.contributions.sum(1) + found.residual, found.change)
    assert found.residual.abs().max() > 1e-3  # the global model is not the mean of these clients


@pytest.mark.slow
def test_integrated_resnet18():
    """Of real shape, BatchNorm's statistics moving along: below 1 % at the default number of steps."""
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 32, 32)
    incoming = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    states, weights = reference.perturbed(model)
    model.load_state_dict(reference.fused(states, weights))
    found = trace(model, states, x, method="integrated", weights=weights, reference=incoming)
    assert found.change.abs().mean() > 0.05
    assert found.completeness_error.mean() < 0.01


def test_threads(block, x):
    """On one model, whose flags and hooks they share."""
    states, weights = reference.perturbed(block)
    expected = trace(block, states, x, method="influence", weights=weights).contributions
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: trace(block, states, x, method="influence", weights=weights), range(12))
    assert all(torch.equal(f.contributions, expected) for f in found)


def test_nothing_is_kept(block, x):
    """Hooks, graph and model do not keep each other alive: reference counts alone let them go."""
    states, _ = reference.perturbed(block)
    model = copy.deepcopy(block)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        trace(model, states, x)
        with pytest.raises(TraceFLError):
            trace(model, states, x * torch.nan)
        del model
        assert gone() is None
    finally:
        gc.enable()
