"""Models that do what few models do, with layers="all", against the slow reference."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.provenance import reference
from tracefl.errors import TraceFLError
from tracefl.provenance import trace

torch.set_num_threads(2)


class Odd(nn.Module):
    """Bare parameters, attention with the batch second, tied weights, a functional use, positions shared."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.position = nn.Embedding(6, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.activation = nn.PReLU()
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)
        self.decoder = nn.Linear(8, 9, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens) + self.position(torch.arange(6))
        h = torch.cat([self.first.expand(len(h), -1, -1), h * self.scale + self.shift], 1)
        h = self.activation(self.encoder(h.transpose(0, 1)).transpose(0, 1))
        h = self.norm(h.mT).mT
        return self.decoder(h[:, 0]) + h[:, 1] @ self.embed.weight.T


def test_tensors_without_a_rule():
    torch.manual_seed(0)
    model, x = Odd().double(), torch.randint(0, 9, (4, 6))
    states, weights = reference.perturbed(model)
    for state in states.values():
        state["decoder.weight"] = state["embed.weight"]
    found = trace(model, states, x, method="influence", weights=weights)
    slow = []
    for n in range(4):
        entries = [name for name in model.state_dict() if name != "decoder.weight"]
        G = by_tied_autograd(model, x[n : n + 1], found.targets[n], entries)
        W = model.state_dict()
        slow.append([sum(((s[name] - W[name]) * G[name]).sum() for name in entries) for s in states.values()])
    slow = torch.tensor(slow, dtype=torch.float64) * torch.tensor([1, 2, 3]) / 6
    assert (found.contributions - slow).abs().max() <= 1e-9 * slow.abs().max()
    one_name = {who: {k: v for k, v in s.items() if k != "embed.weight"} for who, s in states.items()}
    again = trace(model, one_name, x, method="influence", weights=weights)
    assert torch.equal(again.contributions, found.contributions)


def by_tied_autograd(model, x, target, names):
    """dy/dW of a model with tied weights, W being set once under its first name."""
    model = model.eval()
    W = {name: model.state_dict()[name].detach().clone().requires_grad_() for name in names}
    logits = torch.func.functional_call(model, W, (x,))[0]
    others = torch.cat([logits[:target], logits[target + 1 :]])
    return dict(zip(names, torch.autograd.grad(logits[target] - others.logsumexp(0), list(W.values())), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
    x = torch.randn(2, 3, 5, 5)
    states, _ = reference.perturbed(model)
    half = {who: {k: v.to(dtype) for k, v in s.items()} for who, s in states.items()}
    rounded = {who: {k: v.float() for k, v in s.items()} for who, s in half.items()}
    model, x = model.to(dtype), x.to(dtype)
    found = trace(model, half, x)
    assert next(model.parameters()).dtype == dtype
    expected = trace(model.float(), rounded, x.float())
    assert torch.equal(found.contributions, expected.contributions)


def test_layer_that_overwrites_another_layers_input():
    """h += f(norm(h)): the input of norm is gone when its gradient arrives."""

    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.overwrite = True

        def forward(self, x):
            h = self.a(x) * 1.0
            if self.overwrite:
                h += self.b(h).tanh()
            else:
                h = h + self.b(h).tanh()
            return self.head(h)

    torch.manual_seed(0)
    model, x = Overwrites().double(), torch.randn(3, 4).double()
    states, weights = reference.perturbed(model)
    found = trace(model, states, x, method="influence", weights=weights)
    model.overwrite = False
    slow = [reference.influence(model, states, weights, x[n : n + 1], found.targets[n]) for n in range(3)]
    assert (found.contributions - torch.stack(slow)).abs().max() < 1e-9


class Tokens(nn.Module):
    """Positions go through a normalisation, become tokens behind an empty one, and all pass a linear layer."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 1), norm, nn.Linear(6, 4)

    def forward(self, x):
        h = self.norm(self.conv(x)).flatten(2).permute(0, 2, 1)
        h = torch.cat([h.new_zeros(len(h), 1, 6), h], 1)
        return (self.head(h) ** 2).mean(1)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.InstanceNorm2d(6, affine=True)])
def test_normalisation_of_one_input_before_tokens(norm):
    """PyTorch 2.15 on the CPU gets the gradient wrong here; the finite difference does not ask it."""
    torch.manual_seed(0)
    model = Tokens(norm).double().eval()
    nn.init.normal_(norm.weight)
    x, theta = torch.randn(1, 3, 2, 2).double(), copy.deepcopy(model.state_dict())
    way = {n: torch.randn_like(t) if t.is_floating_point() and "running" not in n else 0 * t for n, t in theta.items()}
    steps = [functional_call(model, {n: t + e * way[n] for n, t in theta.items()}, (x,))[0, 1] for e in (1e-5, -1e-5)]
    found = trace(model, {"a": {n: t + way[n] for n, t in theta.items()}}, x,
                  targets=torch.tensor([1]), reference=theta, layer_decay=1.0)  # fmt: skip
    assert found.contributions.item() == pytest.approx(((steps[0] - steps[1]) / 2e-5).item(), rel=1e-6)


@pytest.mark.parametrize("keep", [lambda w: w * 2.0, torch.sin])
def test_a_model_that_keeps_what_it_computed(keep):
    class Cached(nn.Linear):
        kept = None

        def forward(self, x):
            if self.kept is None:
                self.kept = keep(self.weight)
            return x @ self.kept.T + self.bias

    model = nn.Sequential(Cached(3, 3), nn.Linear(3, 2))
    with pytest.raises(TraceFLError, match="uses a tensor again that an earlier forward pass computed"):
        trace(model, {"a": model.state_dict()}, torch.randn(2, 3))


class TwoLayers(nn.Module):
    def __init__(self, way=lambda first, x: first(x).tanh()):
        super().__init__()
        self.first, self.way, self.head = nn.Linear(4, 4), way, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.way(self.first, x))


def one_by_one(model, state, x):
    parts = [trace(model, {"a": state}, x[n : n + 1]).contributions for n in range(len(x))]
    return torch.cat(parts)


class Ahead(nn.Module):
    """Mixes the inputs behind the last layer, where only the output shows it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x):
        z = self.first(x)
        return z.tanh() * z.mean(0)


def test_a_model_that_mixes_what_its_last_layer_gives():
    torch.manual_seed(0)
    model, x = Ahead().double(), torch.randn(5, 4).double()
    state = reference.perturbed(model)[0]["c0"]
    assert torch.equal(trace(model, {"a": state}, x).contributions, one_by_one(model, state, x))


@pytest.mark.parametrize(
    "way", [lambda first, x: first(x.roll(1, 0)).roll(-1, 0), lambda first, x: first(x - x.mean(0)).tanh()]
)
def test_a_model_that_mixes_the_inputs_of_a_batch_gets_them_one_by_one(way):
    torch.manual_seed(0)
    model, x = TwoLayers(way).double(), torch.randn(5, 4).double()
    state = reference.perturbed(model)[0]["c0"]
    assert torch.equal(trace(model, {"a": state}, x).contributions, one_by_one(model, state, x))


def test_autocast():
    """Around trace it counts for nothing; inside the model its rounding stays."""

    def half(first, x):
        with torch.autocast("cpu", torch.bfloat16):
            return first(x).tanh().float()

    torch.manual_seed(0)
    model, x = TwoLayers(), torch.randn(3, 4)
    states = reference.perturbed(model)[0]
    expected = trace(model, states, x).contributions
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trace(model, states, x).contributions, expected)
    model.way = half
    found = trace(model, states, x).contributions
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_layers_under_no_grad_get_no_share():
    @torch.no_grad()
    def frozen(first, x):
        return first(x)

    model = TwoLayers(frozen)
    found = trace(model, {"a": model.state_dict()}, torch.randn(2, 4), layer_decay=1.0)
    assert found.layers == ["head"]


def test_a_compiled_model_is_traced_as_it_was_written():
    torch.manual_seed(0)
    model, x = TwoLayers(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager")
    expected = trace(model, {"a": model.state_dict()}, x)
    for _ in range(2):  # before and after it was compiled
        found = trace(compiled, {"a": compiled.state_dict()}, x)
        assert found.layers == ["_orig_mod.first", "_orig_mod.head"]
        assert torch.equal(found.contributions, expected.contributions)
        compiled(x)


def test_checkpointing():
    """What runs again in the backward pass saves what it saved before: a weight of 4 x 4, not 4 inputs of length 4."""

    def way(first, x, **options):
        return checkpoint(first, checkpoint(lambda h: first(h.tanh()), first(x), **options), **options).tanh()

    torch.manual_seed(0)
    models = [TwoLayers(partial(way, use_reentrant=False)), TwoLayers(lambda f, x: f(f(f(x).tanh())).tanh())]
    models[1].load_state_dict(models[0].state_dict())
    x, states = torch.randn(4, 4), reference.perturbed(models[0])[0]
    found, expected = (trace(model, states, x) for model in models)
    assert found.layers == ["first", "first#2", "first#3", "head"]
    assert torch.equal(found.contributions, expected.contributions)
    with pytest.raises(TraceFLError, match="set use_reentrant=False"):
        trace(TwoLayers(partial(way, use_reentrant=True)), states, x)


def test_a_tensor_that_the_model_does_not_register_takes_no_gradient_away():
    torch.manual_seed(0)
    scale = torch.full((), 2.0, requires_grad=True)
    model, x = TwoLayers(lambda first, x: first(x) * scale + first(x * scale)), torch.randn(3, 4)
    states = reference.perturbed(model)[0]
    found = trace(model, states, x).contributions
    scale.requires_grad_(False)
    assert torch.equal(found, trace(model, states, x).contributions)
    assert scale.grad is None


def changed_by_hook(layer):
    layer.register_forward_hook(lambda module, args, out: out * 2)


def changed_on_the_instance(layer):
    layer.forward = MethodType(lambda self, x: type(self).forward(self, x) * 2, layer)


def changed_weight_of_a_convolution(layer):
    class Standardised(type(layer)):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean((1, 2), keepdim=True), bias)

    layer.__class__ = Standardised


@pytest.mark.parametrize("change", [changed_by_hook, changed_on_the_instance, changed_weight_of_a_convolution])
def test_a_layer_that_the_user_has_changed(change):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).double(),
        torch.randn(2, 2, 4),
    )
    change(model[0])
    states, weights = reference.perturbed(model)
    found = trace(model, states, x.double(), method="influence", weights=weights)
    slow = [reference.influence(model, states, weights, x[n : n + 1].double(), found.targets[n]) for n in range(2)]
    assert (found.contributions - torch.stack(slow)).abs().max() < 1e-9


def test_a_view_that_is_changed_in_place():
    """Hugging Face's Conv1D returns a view; autograd rewrites its history when it is changed in place."""
    torch.manual_seed(0)
    layers = [transformers.pytorch_utils.Conv1D(4, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)]
    model, x = nn.Sequential(*layers).double(), torch.randn(3, 2, 4).double()
    states, weights = reference.perturbed(model)
    found = trace(model, states, x, method="influence", weights=weights)
    slow = [reference.influence(model, states, weights, x[n : n + 1], found.targets[n]) for n in range(3)]
    assert (found.contributions - torch.stack(slow)).abs().max() <= 1e-9 * found.by_layer.abs().max()
    assert found.by_layer.abs().amax((1, 2)).gt(0).all()


def test_a_layer_used_also_without_its_rule_has_a_place_of_its_own_before_it():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head((self.first(x) + nn.functional.linear(x, self.first.weight)).tanh())

    torch.manual_seed(0)
    model, x = Both().double(), torch.randn(3, 4).double()
    states, weights = reference.perturbed(model)
    found = trace(model, states, x, method="influence", weights=weights)
    assert found.layers == ["first.weight", "first", "head"]
    slow = [reference.influence(model, states, weights, x[n : n + 1], found.targets[n]) for n in range(3)]
    assert (found.contributions - torch.stack(slow)).abs().max() < 1e-9


def test_a_model_that_keeps_what_a_layer_gave():
    class Keeps(TwoLayers):
        kept = None

        def forward(self, x):
            if self.kept is None:
                self.kept = self.first(torch.ones(4))
            return self.head((x + self.kept).tanh())

    model = Keeps()
    with pytest.raises(TraceFLError, match="uses a tensor again that an earlier forward pass computed"):
        trace(model, {"a": model.state_dict()}, torch.randn(3, 4))
