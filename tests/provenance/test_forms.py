"""Models and states in the forms that people have them in: the right value, or one sentence."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.common import ndarrays_to_parameters
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import prune

from tests.provenance import reference
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


def test_complex_state_for_a_real_model():
    model = nn.Linear(2, 2)
    state = {name: t.to(torch.cfloat) for name, t in model.state_dict().items()}
    with pytest.raises(TraceFLError, match=r"client 'a': tensor '\w+' must hold numbers as the model's, torch.float32"):
        trace(model, {"a": state}, torch.randn(1, 2))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


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


def test_what_no_client_sends_does_not_move_in_the_reference_either():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(3, 4)
    states, weights = reference.perturbed(model, scale=0.3)
    heads = {who: {n: w for n, w in s.items() if n.startswith("2.")} for who, s in states.items()}
    found = trace(model, heads, x, method="integrated", weights=weights, reference=states["c1"])
    same = {**model.state_dict(), **{n: w for n, w in states["c1"].items() if n.startswith("2.")}}
    again = trace(model, heads, x, method="integrated", weights=weights, reference=same)
    assert torch.equal(found.change, again.change)
    assert found.completeness_error.max() < 0.02


def test_a_tensor_under_two_names():
    model = adapted()
    state = {**model.state_dict(), "query.lora_A.weight": torch.zeros(2, 4)}
    with pytest.raises(TraceFLError, match=r"'query\.lora_A\.default\.weight' is there twice, as 'query"):
        trace(model, {"a": state}, torch.randn(1, 4))


def test_a_reference_that_is_not_finite():
    model = nn.Linear(3, 2)
    start = {n: w * torch.nan for n, w in model.state_dict().items()}
    with pytest.raises(TraceFLError, match="reference: tensor 'weight' has values that are not finite"):
        trace(model, {"a": model.state_dict()}, torch.randn(1, 3), reference=start)


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


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter in PEFT's layout."""

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(4, 6)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


class Saved(nn.Module):
    """A head of which PEFT keeps a copy to train."""

    def __init__(self):
        super().__init__()
        self.original_module = nn.Linear(6, 3)
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(6, 3)})

    def forward(self, x):
        return self.modules_to_save["default"](x)


def adapted():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("query", Adapted())
    model.add_module("act", nn.Tanh())
    model.add_module("classifier", Saved())
    return model.double()


def peft_names(state):
    """As get_peft_model_state_dict saves them: adapters and the saved head only."""
    names = {name.replace("modules_to_save.", "").replace(".default", ""): w for name, w in state.items()
             if "lora" in name or "modules_to_save" in name}  # fmt: skip
    assert sorted(names) == ["classifier.bias", "classifier.weight", "query.lora_A.weight", "query.lora_B.weight"]
    return names


@pytest.mark.parametrize("method", ["neuron", "influence", "integrated", "shapley"])
@pytest.mark.parametrize("form", ["peft", "model's", "file"])
def test_adapters_only(form, method, tmp_path):
    model, x = adapted(), torch.randn(4, 4).double()
    full, weights = reference.perturbed(model)
    entries = model.state_dict()
    trained = {name for name in entries if "lora" in name or "modules_to_save" in name}
    full = {who: {n: w if n in trained else entries[n] for n, w in s.items()} for who, s in full.items()}
    start = {n: w + 0.1 * torch.randn_like(w) if n in trained else w for n, w in entries.items()}
    part = {n: w for n, w in start.items() if n in trained}
    states = {who: {n: w for n, w in s.items() if n in trained} for who, s in full.items()}
    if form != "model's":
        states, part = {who: peft_names(s) for who, s in states.items()}, peft_names(part)
    if form == "file":
        for who, state in states.items():
            save_file(state, tmp_path / f"{who}.safetensors")
        states = {who: tmp_path / f"{who}.safetensors" for who in states}
    options = {"method": method, "weights": weights, "layer_decay": 1.0}
    reference_of = (lambda state: None) if method == "influence" else (lambda state: state)
    found = trace(model, states, x, **options, reference=reference_of(part))
    whole = trace(model, full, x, **options, reference=reference_of(start))  # what is not trained has update 0
    assert torch.allclose(found.contributions, whole.contributions, rtol=1e-9, atol=1e-12)
    assert torch.allclose(found.residual, whole.residual, rtol=1e-9, atol=1e-12)
    assert not any("base_layer" in layer for layer in found.layers)
    if method == "integrated":
        assert torch.allclose(found.change, whole.change)


def test_what_no_client_sends_has_no_share():
    """FedBN: normalisation stays at home."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)).eval()
    x = torch.randn(2, 1, 5, 5)
    states, weights = reference.perturbed(model)
    local = {who: {n: w for n, w in s.items() if not n.startswith("1.")} for who, s in states.items()}
    found = trace(model, local, x, method="influence", weights=weights)
    layers = trace(model, states, x, method="influence", weights=weights)
    kept = [i for i, layer in enumerate(layers.layers) if layer != "1"]
    assert found.layers == ["0", "4"]
    assert torch.allclose(found.by_layer, layers.by_layer[kept], rtol=1e-5, atol=1e-7)
    local["c1"]["1.weight"] = states["c1"]["1.weight"]
    with pytest.raises(TraceFLError, match=r"client 'c0': tensor '1\.weight' is missing, though another sends it"):
        trace(model, local, x)
    heads = {who: {n: w for n, w in s.items() if n == "4.bias"} for who, s in states.items()}
    found = trace(model, heads, x, targets=[0, 2])
    assert found.layers == ["4"]
    expected = torch.stack([states[who]["4.bias"][[0, 2]] for who in states], 1).double()
    assert torch.equal(found.contributions, expected)
    counts = {who: {"1.num_batches_tracked": torch.tensor(3)} for who in states}
    with pytest.raises(TraceFLError, match="hold no floating-point tensor that a client sends"):
        trace(model, counts, x)


def as_forms(state, file):
    arrays = [w.numpy() for w in state.values()]
    save_file(state, file)
    return {
        "ArrayRecord": ArrayRecord(dict(state)),
        "ArrayRecord of a list": ArrayRecord(arrays),
        "RecordDict": RecordDict({"arrays": ArrayRecord(dict(state))}),
        "list": arrays,
        "tuple of tensors": tuple(state.values()),
        "Parameters": ndarrays_to_parameters(arrays),
        "dict of arrays": {name: w.numpy() for name, w in state.items()},
        "path": file,
    }


def test_forms_of_a_state(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3))
    x, (states, weights) = torch.randn(2, 1, 5, 5), reference.perturbed(model)
    forms = {who: as_forms(state, tmp_path / f"{who}.safetensors") for who, state in states.items()}
    start = as_forms(model.state_dict(), tmp_path / "start.safetensors")
    expected = trace(model, states, x, weights=weights, reference=model.state_dict())
    for form in start:
        clients = {who: forms[who][form] for who in states}
        found = trace(model, clients, x, weights=weights, reference=start[form])
        assert torch.equal(found.contributions, expected.contributions), form


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ([np.zeros((2, 3))], r"client 'a' must have an array for each of the model's 2 entries, .* got 1: pass dict\("),
        (
            ArrayRecord([np.zeros((2, 3))]),
            "must have an array for each of the model's 2 entries, in their order, got 1",
        ),
        (
            [np.zeros((2, 4)), np.zeros(2)],
            r"client 'a': tensor 'weight' must be a Tensor of the model's shape \(2, 3\)",
        ),
        (RecordDict(), "client 'a' must hold one ArrayRecord, got 0"),
        (nn.Linear(3, 2), r"client 'a' must be a state dict, .* got a Linear: pass its state_dict\(\)"),
        (7, "client 'a' must be a state dict, .* got a int: pass one of these"),
        (
            {"weight": torch.zeros(2, 3, dtype=torch.int8), "bias": torch.zeros(2)},
            "tensor 'weight' must hold numbers as",
        ),
        ({"weight": torch.zeros(2, 3, device="meta"), "bias": torch.zeros(2)}, "tensor 'weight' .* got no data"),
    ],
)
def test_states_that_cannot_be(state, sentence):
    with pytest.raises(TraceFLError, match=sentence):
        trace(nn.Linear(3, 2), {"a": state}, torch.randn(1, 3))


def test_a_sparse_tensor_counts_in_full():
    model, x = nn.Linear(3, 2, bias=False), torch.tensor([[1.0, 2.0, 3.0]])
    weight = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert trace(model, {"a": {"weight": weight.to_sparse()}}, x, targets=[0]).contributions.item() == 8


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.drop = nn.Dropout()

    def forward(self, x):
        h = self.body(x)
        return (self.head(h), self.aux(h)) if self.training else self.head(self.drop(h))


@pytest.mark.parametrize("layers", [["aux"], ["head", "aux"], ["drop", "body"], "aux"])
def test_layers_that_are_not_used(layers):
    torch.manual_seed(0)
    model, x = Auxiliary(), torch.randn(2, 4)
    states, _ = reference.perturbed(model)
    with pytest.raises(
        TraceFLError,
        match=r"'(aux|drop)' has no tensor that clients send and the output depends on in eval mode .*; leave it out",
    ):
        trace(model, states, x, layers=layers)
    assert trace(model, states, x, layers=["head", "body"]).layers == ["body", "head"]


@pytest.mark.parametrize("cut", [torch.no_grad, torch.inference_mode, torch.Tensor.detach])
def test_an_output_without_gradient(cut):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            if cut is torch.Tensor.detach:
                return self.head(x).detach()
            with cut():
                return self.head(x)

    model = Cut()
    states, _ = reference.perturbed(model)
    with pytest.raises(
        TraceFLError, match="layers='all' have no tensor that clients send and the output depends on in eval mode"
    ):
        trace(model, states, torch.randn(2, 3))


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("targets", ["a", "b"], r"targets must be 2 integers, one per input \("),
        ("targets", [None, 1], r"targets must be 2 integers, one per input \("),
        ("targets", [1j, 0], r"targets must be 2 integers, one per input, got \(2,\) torch\.complex64"),
        ("targets", [True, False], r"targets must be 2 integers, one per input, got \(2,\) torch\.bool"),
        ("layers", None, 'layers must be "all", "paper" or names of modules such as .*, got None'),
        ("layer_decay", "0.9", "layer_decay must be above 0 and at most 1"),
        ("steps", 2.5, r"steps must be a whole number of at least 1, got 2\.5"),
        ("scratch_bytes", None, "scratch_bytes must be a number of at least 1, got None"),
        ("weights", [1, 2], "weights must be a dict of numbers by client id, got a list"),
        ("weights", {"c0": None, "c1": 1, "c2": 1}, "weights must be finite numbers and 0 or more, got None for 'c0'"),
        ("weights", {"c0": "x", "c1": 1, "c2": 1}, "weights must be finite numbers and 0 or more, got 'x' for 'c0'"),
        ("model", {"weight": torch.zeros(2, 3)}, "model must be a torch.nn.Module, got a dict"),
    ],
)
def test_arguments_of_the_wrong_type(argument, value, sentence):
    model = nn.Linear(3, 2)
    states, _ = reference.perturbed(model)
    arguments = {"model": model, "clients": states, "inputs": torch.randn(2, 3), argument: value}
    with pytest.raises(TraceFLError, match=sentence):
        trace(**arguments)


def test_a_shared_layer_may_be_named_by_either_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model, x = Twice(), torch.randn(2, 3)
    states, _ = reference.perturbed(model)
    found = [trace(model, states, x, layers=[name]).contributions for name in ("a", "b")]
    assert torch.equal(*found)


def test_scripted_and_quantised_models():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 4)
    states, _ = reference.perturbed(model)
    for scripted in (torch.jit.script(model), torch.jit.trace(model, x)):
        with pytest.raises(
            TraceFLError, match="the model is TorchScript, which hides its layers: pass the Python model"
        ):
            trace(scripted, states, x)
    inside = nn.Sequential(torch.jit.script(model[0]), model[1], model[2])
    with pytest.raises(TraceFLError, match="module '0' is TorchScript"):
        trace(inside, states, x)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(
        TraceFLError, match="module '0' is a quantised Linear, which has no gradient: pass the model as"
    ):
        trace(quantised, states, x)
    model[0].weight = nn.Parameter((100 * model[0].weight).to(torch.int8), requires_grad=False)
    with pytest.raises(
        TraceFLError, match=r"tensor '0\.weight' of the model holds whole numbers, which have no gradient"
    ):
        trace(model, states, x)
