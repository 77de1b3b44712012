"""What `trace` is given besides states, and what it refuses in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.provenance import reference
from tracefl.errors import TraceFLError
from tracefl.provenance import trace


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


def test_inputs_and_outputs_that_are_none(block, x):
    states, _ = reference.perturbed(block)
    with pytest.raises(TraceFLError, match="at least 1"):
        trace(block, states, x[:0])
    stem = {who: {"weight": s["stem.weight"], "bias": s["stem.bias"]} for who, s in states.items()}
    with pytest.raises(TraceFLError, match="output must be logits"):
        trace(block.stem, stem, x)
    with pytest.raises(TraceFLError, match="output for input 3 is not finite"):
        trace(block, states, torch.cat([x[:3], x[3:4] * torch.nan]))
