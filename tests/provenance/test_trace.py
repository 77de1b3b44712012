"""trace on small networks: closed forms, the slow references, and the laws that contributions obey."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from tests.provenance import reference
from tracefl.errors import TraceFLError
from tracefl.evidence.audit import audit
from tracefl.provenance import trace

torch.set_num_threads(2)


class Block(nn.Module):
    """Modules in another order than they run, one used twice, one never, in-place activations, a residual."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(3, 3)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.stem = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.norm1(self.stem(x)))
        h = self.relu(self.norm2(self.conv(h)) + h)
        h = self.relu(self.conv(h))
        return self.head(h.mean((2, 3)))


@pytest.fixture
def block():
    torch.manual_seed(0)
    model = Block().double()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model


@pytest.fixture
def x():
    return torch.randn(5, 2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30)


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


class Mapped(Mapping):
    """A lazy state: what it gives out is not kept by anybody for long."""

    given: ClassVar[list[weakref.ref]] = []
    most = 0

    def __init__(self, state):
        self.state = state

    def __getitem__(self, name):
        tensor = self.state[name].clone()
        Mapped.given.append(weakref.ref(tensor))
        Mapped.most = max(Mapped.most, sum(ref() is not None for ref in Mapped.given))
        return tensor

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


def test_lazy_states_are_let_go(block, x):
    states, _ = reference.perturbed(block)
    many = {f"{who}-{i}": Mapped(state) for who, state in states.items() for i in range(10)}
    trace(block, many, x)
    assert len(Mapped.given) >= len(many)
    assert Mapped.most <= 2


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


def bad(states, **changes):
    return {**states, "c1": {**states["c1"], **changes}}


def without(states, name):
    return {**states, "c1": {k: v for k, v in states["c1"].items() if k != name}}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: {}, {}, "clients must be a dict of states by client id, got an empty one"),
        (lambda s: without(s, "head.bias"), {}, "'c1': tensor 'head.bias' is missing, though another sends it"),
        (lambda s: bad(s, more=torch.zeros(1)), {}, "'c1': tensor 'more' is not in"),
        (
            lambda s: bad(s, **{"head.bias": torch.zeros(5)}),
            {},
            r"'c1': tensor 'head.bias' must be a Tensor of the model's shape \(4,\), got \(5,\)",
        ),
        (
            lambda s: bad(s, **{"conv.weight": s["c1"]["conv.weight"] * torch.nan}),
            {},
            "'c1': tensor 'conv.weight' has values that are not finite",
        ),
        (None, {"targets": torch.tensor([0, 1, 2, 3, 4])}, "targets must be 0 to 3, got 4"),
        (None, {"targets": torch.tensor([0, 1, -1, 3, 3])}, "targets must be 0 to 3, got -1"),
        (None, {"targets": torch.tensor([0])}, r"targets must be 5 integers, one per input, got \(1,\)"),
        (None, {"targets": torch.zeros(5)}, r"targets must be 5 integers, .* torch.float32"),
        (
            None,
            {"weights": {"c0": 1, "c1": -1, "c2": 1}},
            "weights must be finite numbers and 0 or more, got -1 for 'c1'",
        ),
        (None, {"weights": {"c0": 0, "c1": 0, "c2": 0}}, "weights must be above 0 for at least one client"),
        (None, {"weights": {"c0": 1, "c1": 1}}, "weights must have every client, got none for 'c2'"),
        (None, {"method": "influence"}, "needs weights"),
        (None, {"method": "integrated", "weights": {"c0": 1, "c1": 1, "c2": 1}}, "needs reference"),
        (None, {"method": "shap"}, "method must be one of neuron, influence, integrated, shapley, got 'shap'"),
        (None, {"output": "loss"}, "output must be one of logit, log_odds, got 'loss'"),
        (None, {"layer_decay": 0}, "layer_decay must be above 0 and at most 1 .*, got 0"),
        (None, {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        (None, {"scratch_bytes": -1}, "scratch_bytes must be a number of at least 1, got -1"),
        (lambda s: list(s.values()), {}, "clients must be a dict of states by client id, got a list"),
        (
            lambda s: bad(s, **{"head.bias": np.array(list("abcd"))}),
            {},
            "'c1': tensor 'head.bias' must be a Tensor .*, got a ndarray",
        ),
        (None, {"layers": ["heads"]}, "layers must be .*: the model has no 'heads'"),
        (None, {"reference": {}}, "reference: tensor 'head.weight' is missing"),
    ],
)
def test_errors(block, x, change, options, message):
    states, _ = reference.perturbed(block)
    with pytest.raises(TraceFLError, match=message):
        trace(block, change(states) if change else states, x, **options)


def test_inputs_that_are_no_tensors(block, x):
    with pytest.raises(TraceFLError, match=r"inputs must be a Tensor .* got a ndarray"):
        trace(block, reference.perturbed(block)[0], x.numpy())


def test_inputs_that_want_a_gradient_and_targets_as_a_list(block, x):
    states, _ = reference.perturbed(block)
    expected = trace(block, states, x, targets=torch.tensor([0, 1, 2, 3, 0])).contributions
    assert torch.equal(trace(block, states, x.requires_grad_(), targets=[0, 1, 2, 3, 0]).contributions, expected)
    assert x.grad is None


def test_states_may_hold_floating_point_entries_alone(block, x):
    states, weights = reference.perturbed(block)
    floats = {who: {k: v for k, v in s.items() if v.is_floating_point()} for who, s in states.items()}
    found = trace(block, floats, x, method="influence", weights=weights)
    close(found.contributions, trace(block, states, x, method="influence", weights=weights).contributions)


class Stateful(nn.Sequential):
    """Its state begins with an entry that is no tensor."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_states_may_hold_entries_that_are_no_tensors(block, x):
    model = Stateful(block)
    assert next(iter(model.state_dict())) == "_extra_state"
    found = trace(model, {"a": model.state_dict()}, x)
    close(found.by_layer, trace(block, {"a": block.state_dict()}, x).by_layer)


def test_inputs_and_outputs_that_are_none(block, x):
    states, _ = reference.perturbed(block)
    with pytest.raises(TraceFLError, match="at least 1"):
        trace(block, states, x[:0])
    stem = {who: {"weight": s["stem.weight"], "bias": s["stem.bias"]} for who, s in states.items()}
    with pytest.raises(TraceFLError, match="output must be logits"):
        trace(block.stem, stem, x)
    with pytest.raises(TraceFLError, match="output for input 3 is not finite"):
        trace(block, states, torch.cat([x[:3], x[3:4] * torch.nan]))


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


def test_clients_and_reference_may_be_files(block, x, tmp_path):
    states, weights = reference.perturbed(block)
    files = {who: tmp_path / f"{who}.safetensors" for who in states}
    for who, file in files.items():
        save_file(states[who], file)
    for options in ({}, {"weights": weights, "reference": states["c2"]}, {"weights": weights, "method": "influence"}):
        expected = trace(block, states, x, **options)
        if "reference" in options:
            options = options | {"reference": str(files["c2"])}
        for clients in (files, {who: str(file) for who, file in files.items()}, files | {"c1": states["c1"]}):
            assert torch.equal(trace(block, clients, x, **options).by_layer, expected.by_layer)


def test_files_that_hold_no_state(block, x, tmp_path):
    states, _ = reference.perturbed(block)
    file = tmp_path / "eve.safetensors"
    with pytest.raises(TraceFLError, match=r"client 'eve': .*eve\.safetensors cannot be read \(No such file"):
        trace(block, {"eve": file}, x)
    with pytest.raises(TraceFLError, match=r"is no file: correct the path"):
        trace(block, {"eve": tmp_path}, x)
    for content in (b"", b"PK\x03\x04 a pickle of PyTorch's", (8).to_bytes(8, "little") + b"no json!"):
        file.write_bytes(content)
        with pytest.raises(
            TraceFLError, match=r"client 'eve': .*eve\.safetensors is no safetensors file: write it with safetensors"
        ):
            trace(block, {"eve": file}, x)
    with pytest.raises(TraceFLError, match=r"client 'eve' must be a state dict, .* or the path .*, got a NoneType"):
        trace(block, {"eve": None}, x)
    save_file(states["c0"], file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TraceFLError, match=r"client 'eve': .*eve\.safetensors ends too early: restore it"):
        trace(block, {"eve": file}, x)
    save_file({name: w for name, w in states["c0"].items() if name != "conv.weight"}, file)
    with pytest.raises(TraceFLError, match=r"client 'eve': tensor 'conv\.weight' is missing, though another sends it"):
        trace(block, {"eve": file, "c1": states["c1"]}, x)


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
