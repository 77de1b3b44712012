"""States of clients in the forms that people have them: files, adapters, lazy, sparse, in part."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.common import ndarrays_to_parameters
from safetensors.torch import save_file
from torch import nn

from tests.provenance import reference
from tests.provenance.small import close
from tracefl.errors import TraceFLError
from tracefl.provenance import trace


def test_complex_state_for_a_real_model():
    model = nn.Linear(2, 2)
    state = {name: t.to(torch.cfloat) for name, t in model.state_dict().items()}
    with pytest.raises(TraceFLError, match=r"client 'a': tensor '\w+' must hold numbers as the model's, torch.float32"):
        trace(model, {"a": state}, torch.randn(1, 2))


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
