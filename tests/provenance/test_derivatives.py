"""Where training's gradient is not the derivative: tables, own functions, hooks, complex numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.provenance import reference
from tests.provenance.small import Reversed
from tracefl.classifier import log_odds
from tracefl.errors import TraceFLError
from tracefl.provenance import trace


def along(model, x, way, target, step=1e-5):
    """The change of a class's logit along a way of the weights, by a central finite difference."""
    theta = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def y(e):
        moved = {name: t + e * way[name] if name in way else t for name, t in theta.items()}
        logits = functional_call(model, moved, (x,))
        return logits[0, target]

    with torch.no_grad():
        return ((y(step) - y(-step)) / (2 * step)).item()


def random_way(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def assert_true_derivative(model, x):
    model = model.double().eval()
    way, theta = random_way(model), copy.deepcopy(model.state_dict())
    moved = {name: t + way.get(name, 0) for name, t in theta.items()}
    found = trace(model, {"a": moved}, x, targets=[1] * len(x), reference=theta, layer_decay=1.0)
    expected = [along(model, x[n : n + 1], way, 1) for n in range(len(x))]
    assert found.contributions[:, 0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


class Looks(nn.Module):
    """Looks tokens up in a table of its own, as `look` says, and classifies their mean."""

    def __init__(self, look, **options):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)
        self.look, self.options = look, options

    def forward(self, tokens):
        z = self.look(tokens, self.table, **self.options)
        return self.head((z.mean(1) if z.ndim == 3 else z).tanh())


TOKENS = torch.tensor([[0, 1, 1, 5], [2, 0, 0, 0], [3, 4, 3, 3]])


@pytest.mark.parametrize(
    ("look", "options"),
    [
        (F.embedding, {}),
        (F.embedding, {"padding_idx": 0}),
        (F.embedding, {"scale_grad_by_freq": True}),
        (F.embedding, {"padding_idx": 1, "scale_grad_by_freq": True}),
        (F.embedding, {"sparse": True}),
        (F.embedding, {"sparse": True, "padding_idx": 0}),
        (F.embedding_bag, {"mode": "mean"}),
        (F.embedding_bag, {"mode": "sum", "sparse": True}),
        (F.embedding_bag, {"mode": "mean", "padding_idx": 0}),
        (F.embedding_bag, {"mode": "sum", "scale_grad_by_freq": True}),
        (F.embedding_bag, {"mode": "mean", "scale_grad_by_freq": True, "padding_idx": 1}),
        (F.embedding_bag, {"mode": "max"}),
    ],
)
def test_gradients_that_training_falsifies(look, options):
    torch.manual_seed(0)
    assert_true_derivative(Looks(look, **options), TOKENS)


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_table_with_a_rule_that_is_used_elsewhere_too(options):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4, **options)
            nn.init.normal_(self.embed.weight)

        def forward(self, tokens):
            h = self.embed(tokens) + F.embedding(tokens.flip(1), self.embed.weight, **options)
            return (h @ self.embed.weight.T).tanh().mean(1)

    torch.manual_seed(0)
    assert_true_derivative(Tied(), TOKENS)


def test_bag_with_its_own_module_padded():
    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(6, 4, sparse=True, padding_idx=0), nn.Linear(4, 3)

        def forward(self, text, offsets=None):
            return self.head(self.bag(text, offsets))

    torch.manual_seed(0)
    model = Texts()
    assert_true_derivative(model, TOKENS)
    states, _ = reference.perturbed(model)
    flat = {"text": TOKENS.flatten(), "offsets": torch.tensor([0, 4, 8])}
    with pytest.raises(TraceFLError, match=r"with offsets lack: pad them to \[N, T\], give the EmbeddingBag a padding"):
        trace(model, states, flat)
    padded = trace(model, states, {"text": TOKENS, "offsets": None})
    assert torch.equal(padded.contributions, trace(model, states, TOKENS).contributions)


def test_table_that_renormalises_itself():
    torch.manual_seed(0)
    model = Looks(F.embedding, max_norm=0.1)
    states, _ = reference.perturbed(model)
    with pytest.raises(TraceFLError, match=r"the model changes its own tensor 'table' while it runs \(by max_norm"):
        trace(model, states, TOKENS)


class Fourier(nn.Module):
    """A layer of complex weights in frequency space, and a complex linear layer."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(1, 3)
        self.spectral = nn.Parameter(torch.randn(3, 3, 5, dtype=torch.cfloat))
        self.mix = nn.Linear(3, 4, dtype=torch.cfloat)
        self.register_buffer("phase", torch.randn(5, dtype=torch.cfloat))

    def forward(self, x):
        h = self.lift(x[:, :, None]).mT
        modes = torch.einsum("nim,iom->nom", torch.fft.rfft(h).to(self.spectral.dtype), self.spectral) * self.phase
        h = torch.fft.irfft(modes, n=8).mean(2).tanh()
        return self.mix(h.to(self.mix.weight.dtype)).abs()


@pytest.mark.parametrize("method", ["neuron", "influence", "integrated", "shapley"])
def test_complex_parameters(method):
    torch.manual_seed(0)
    model, x = Fourier().eval(), torch.randn(2, 8)
    for module, names in ((model, ["spectral"]), (model.mix, ["weight", "bias"])):
        for name in names:
            setattr(module, name, nn.Parameter(getattr(module, name).detach().to(torch.cdouble)))
    model.phase = model.phase.to(torch.cdouble)
    model.lift.double()
    x = x.double()
    theta = copy.deepcopy(model.state_dict())
    ways = [{name: torch.randn_like(t) for name, t in theta.items()} for _ in range(2)]
    ways[1] = {name: -t for name, t in ways[0].items()}
    states = {who: {n: t + 0.1 * way[n] for n, t in theta.items()} for who, way in zip("ab", ways, strict=True)}
    if method in ("integrated", "shapley"):
        start = {name: t - 0.1 * torch.randn_like(t) for name, t in theta.items()}
        found = trace(model, states, x, method=method, weights={"a": 1, "b": 1}, reference=start)
        with torch.no_grad():
            change = model(x) - functional_call(model, start, (x,))
            if method == "shapley":  # whose y are log-odds
                y = [log_odds(z, found.targets) for z in (model(x), functional_call(model, start, (x,)))]
                assert torch.allclose(found.contributions.sum(1) + found.residual, y[0] - y[1])
                assert torch.allclose(found.contributions.sum(1), y[0] - y[1], rtol=1e-6)  # the model is the mean
                return
            change = change.gather(1, found.targets[:, None])[:, 0]
        assert torch.allclose(found.contributions.sum(1) + found.residual, change, rtol=0.02)
        return
    if method == "neuron":
        ways = [{n: w if n != "phase" else 0 * w for n, w in way.items()} for way in ways]  # buffers are not traced
        found = trace(model, states, x, reference=theta, targets=[1, 1], layer_decay=1.0)
        expected = [[0.1 * along(model, x[n : n + 1], way, 1) for way in ways] for n in range(2)]
    else:
        found = trace(model, states, x, method=method, weights={"a": 1, "b": 1}, targets=[1, 1], output="logit")
        expected = [[0.05 * along(model, x[n : n + 1], way, 1) for way in ways] for n in range(2)]
    assert found.contributions.tolist() == [pytest.approx(row, rel=1e-6) for row in expected]


class StraightThrough(torch.autograd.Function):
    """Rounds to coarse steps, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Signs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Swish(torch.autograd.Function):
    """An honest one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class Own(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.b(self.function.apply(self.a(x)) + self.bias)


def test_functions_of_the_models_own():
    torch.manual_seed(0)
    model, x = Own(Swish), torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict())
    assert_true_derivative(copy.deepcopy(model), x.double())
    states, _ = reference.perturbed(model)
    trace(model, states, x)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    for function in (Reversed, StraightThrough, Signs):
        model.function = function
        said = rf"the model's own function {function.__name__} gives a gradient that is not its derivative \(.*\): make"
        with pytest.raises(TraceFLError, match=said):
            trace(model, states, x)
        assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


class Scaled(nn.Linear):
    """Its weight is a function of another tensor, and its forward the usual one."""

    def __init__(self):
        super().__init__(4, 5)
        self.raw = nn.Parameter(self.weight.detach().clone())
        del self.weight

    @property
    def weight(self):
        return self.raw - self.raw.mean()


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.head, self.shift = nn.Linear(4, 5), nn.Linear(5, 3), nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        h = functional_call(self.net, {"weight": 2 * self.net.weight + self.shift}, (x,))
        return self.head((h + self.net(x)).tanh())


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("make", [lambda: nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(5, 3)), Swapped])
def test_layers_that_run_with_other_tensors_than_their_own(make):
    torch.manual_seed(0)
    assert_true_derivative(make(), torch.randn(3, 4).double())


@pytest.mark.parametrize("functional", [False, True])
def test_statistics_of_normalisation_without_a_rule(functional):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.randn(3))
            self.register_buffer("var", torch.rand(3) + 0.5)

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.var).relu()

    torch.manual_seed(0)
    norm = Functional() if functional else NormAct(3)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.Flatten(), nn.Linear(27, 3)).double().eval()
    x, (states, weights) = torch.randn(2, 1, 5, 5).double(), reference.perturbed(model)
    theta = model.state_dict()
    found = trace(model, states, x, method="influence", weights=weights, targets=[1, 1], output="logit")
    for k, (who, state) in enumerate(states.items()):
        way = {n: state[n] - w for n, w in theta.items() if w.is_floating_point()}
        expected = [weights[who] / 6 * along(model, x[n : n + 1], way, 1) for n in range(2)]
        assert found.contributions[:, k].tolist() == pytest.approx(expected, rel=1e-6)


def test_a_hook_of_all_modules_that_changes_outputs():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(2, 3).double()
    states, _ = reference.perturbed(model)
    double = lambda module, args, z: 2 * z if isinstance(module, nn.Linear) else None  # noqa: E731
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert_true_derivative(model, x)
        found = trace(model, states, x).contributions
    finally:
        handle.remove()
    assert not torch.allclose(found, trace(model, states, x).contributions)


@pytest.mark.parametrize("where", ["tensor", "module", "full", "within"])
def test_hooks_that_change_gradients(where):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 3)
    states, _ = reference.perturbed(model)
    expected = trace(model, states, x).contributions
    model.raw = nn.Parameter(torch.zeros(2))
    if where == "within":
        model[1].register_forward_hook(lambda module, args, z: z.register_hook(lambda g: 0 * g) and None)
    elif where == "tensor":
        model[0].weight.register_hook(lambda g: 0 * g)
    elif where == "module":
        model[1].register_full_backward_pre_hook(lambda module, g: (0 * g[0],))
    else:
        model[1].register_full_backward_hook(lambda module, g_in, g_out: (0 * g_in[0],))
    states = {who: {**s, "raw": torch.zeros(2)} for who, s in states.items()}
    found = trace(model, states, x)
    assert torch.equal(found.contributions, expected)
    loss = model(x).sum()
    loss.backward()  # hooks are there again
    assert not model[0].weight.grad.any()
