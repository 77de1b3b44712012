"""Fusing without clients: weighted means by hand, every form of state, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from safetensors.torch import save_file

from tests.evidence.small import federation, fused
from tracefl import TraceFLError, fuse
from tracefl.states import StateFile

W = {"a": 2, "b": 1, "c": 1}


def clients(**changes):
    states = {
        who: {"w": torch.tensor([x, 1.0]), "n": torch.tensor(int(x))} for who, x in (("a", 1.0), ("b", 4.0), ("c", 8.0))
    }
    return {who: {**state, **changes.get(who, {})} for who, state in states.items()}


def test_weights_are_those_of_the_clients_that_are_kept():
    assert fuse(clients(), W)["w"].tolist() == [3.5, 1.0]
    assert fuse(clients(), W, without=["c"])["w"].tolist() == [2.0, 1.0]
    assert fuse(clients(), W, without=("a",))["w"].tolist() == [6.0, 1.0]
    assert fuse(clients(), W, without={"a", "b"})["w"].tolist() == [8.0, 1.0]
    assert fuse(clients(), {**W, "c": 0})["w"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("members", [["c0", "c1", "c2", "c3"], ["c1", "c3"], ["c2"]])
def test_it_is_the_fusion_by_definition(members):
    model, states, weights, *_ = federation()
    found = fuse(states, weights, without=[who for who in states if who not in members])
    for name, value in fused(states, weights, members).items():
        assert found[name].dtype == value.dtype
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value)
    model.load_state_dict(found)


def test_nobody_left_is_the_reference_or_refused():
    reference = {"w": torch.zeros(2), "n": torch.tensor(7), "head": torch.ones(1)}
    for weights, without in ((W, ["a", "b", "c"]), ({**W, "a": 0, "b": 0}, ["c"])):
        found = fuse(clients(), weights, without=without, reference=reference)
        assert {name: value.tolist() for name, value in found.items()} == {"w": [0, 0], "n": 7, "head": [1]}
        assert found["w"].data_ptr() != reference["w"].data_ptr()
    with pytest.raises(TraceFLError, match=r"without=\['a', 'b', 'c'\] leaves no client that has a weight: leave out"):
        fuse(clients(), W, without=list("abc"))


def test_the_reference_gives_what_nobody_sends_and_its_order():
    reference = {"head": torch.full((1,), 9.0), "n": torch.tensor(0), "w": torch.zeros(2)}
    found = fuse(clients(), W, without=["c"], reference=reference)
    assert list(found) == ["head", "n", "w"]
    assert (found["head"].item(), found["w"].tolist()) == (9.0, [2.0, 1.0])


def test_whole_numbers_are_those_of_the_largest_weight():
    assert fuse(clients(), W)["n"] == 1
    assert fuse(clients(), W, without=["a"])["n"] == 4  # of equals the first
    assert fuse(clients(), {"a": 1, "b": 2, "c": 3})["n"] == 8
    flags = {who: {"mask": torch.tensor([who == "b"])} for who in "ab"}
    assert fuse(flags, {"a": 1, "b": 2})["mask"].tolist() == [True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_sums_are_in_double_precision_and_the_answer_in_the_entries_type(dtype):
    torch.manual_seed(0)
    states = {str(k): {"w": torch.randn(50, dtype=torch.float64).to(dtype)} for k in range(300)}
    weights = {who: 1.0 + int(who) for who in states}
    wide = torch.complex128 if dtype.is_complex else torch.float64
    p = torch.tensor(list(weights.values()), dtype=torch.float64) / sum(weights.values())
    exact = (p.to(wide)[:, None] * torch.stack([state["w"].to(wide) for state in states.values()])).sum(0)
    found = fuse(states, weights)["w"]
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype)) or (found.to(wide) - exact).abs().max() < 1e-7


def test_half_and_single_precision_together_are_single():
    found = fuse({"a": {"w": torch.ones(1).half()}, "b": {"w": torch.zeros(1)}}, {"a": 1, "b": 1})["w"]
    assert (found.dtype, found.item()) == (torch.float32, 0.5)


def test_every_form_of_state(tmp_path):
    states = {who: {"w": state["w"]} for who, state in clients().items()}
    for who, state in states.items():
        save_file(state, tmp_path / f"{who}.safetensors")
    forms = [
        {who: tmp_path / f"{who}.safetensors" for who in states},
        {who: str(tmp_path / f"{who}.safetensors") for who in states},
        {who: StateFile(tmp_path / f"{who}.safetensors") for who in states},
        {who: {"w": state["w"].numpy()} for who, state in states.items()},
        {who: ArrayRecord(state) for who, state in states.items()},
        {who: RecordDict({"arrays": ArrayRecord(state)}) for who, state in states.items()},
    ]
    for form in forms:
        assert fuse(form, W, without=["c"])["w"].tolist() == [2.0, 1.0]


def test_lists_of_arrays_are_named_by_the_reference_or_by_position():
    lists = {who: [state["w"].numpy(), np.float32(k)] for k, (who, state) in enumerate(clients().items())}
    reference = {"w": torch.zeros(2), "b": torch.zeros(())}
    for form in (lists, {who: ArrayRecord(list(map(np.asarray, arrays))) for who, arrays in lists.items()}):
        found = fuse(form, W, without=["c"])
        assert {name: value.tolist() for name, value in found.items()} == {"0": [2, 1], "1": pytest.approx(1 / 3)}
        named = fuse(form, W, without=["c"], reference=reference)
        assert {name: value.tolist() for name, value in named.items()} == {"w": [2, 1], "b": pytest.approx(1 / 3)}


class Counted(dict):
    """Counts how often a tensor is read."""

    def __init__(self, state):
        super().__init__(state)
        self.reads = 0

    def __getitem__(self, name):
        self.reads += 1
        return super().__getitem__(name)


def test_a_tensor_is_read_once_and_of_those_left_out_or_without_weight_none(monkeypatch):
    states = {who: Counted(state) for who, state in clients().items()} | {"d": Counted({"w": torch.ones(2)})}
    monkeypatch.setattr("tracefl.evidence.fusion.as_state", lambda state, *_: state)
    fuse(states, {**W, "d": 0}, without=["b"])
    assert {who: state.reads for who, state in states.items()} == {"a": 2, "b": 0, "c": 2, "d": 0}


def test_a_client_that_is_left_out_may_be_broken():
    nan = torch.tensor([float("nan"), 1.0])
    for broken in ({"w": nan}, {"w": torch.zeros(5)}, {"more": torch.zeros(1)}):
        assert fuse(clients(b=broken), W, without=["b"])["w"].tolist() == pytest.approx([10 / 3, 1.0])


def test_sparse_tensors_and_those_that_want_gradients():
    wanting = {"w": torch.tensor([1.0, 0.0], requires_grad=True)}
    found = fuse({"a": wanting, "b": {"w": torch.tensor([0.0, 3.0]).to_sparse()}}, {"a": 1, "b": 1})["w"]
    assert (found.tolist(), found.requires_grad) == ([0.5, 1.5], False)
    alone = fuse({"a": wanting}, {"a": 1})["w"]
    alone.add_(1)
    assert wanting["w"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("states", "arguments", "sentence"),
    [
        ({}, {}, "clients must be a dict of states by client id, got an empty one"),
        ([1], {}, "clients must be a dict of states by client id, got a list"),
        (clients(), {"weights": {"a": 1}}, "weights must have every client, got none for 'b'"),
        (clients(), {"weights": dict.fromkeys("abc", 0)}, "weights must be above 0 for at least one client"),
        (clients(), {"without": "c"}, r"without must be a list of client ids, got 'c': pass \['c'\]"),
        (clients(), {"without": 3}, r"without must be a list of client ids, got 3: pass \[3\]"),
        (clients(), {"without": ["c", "d"]}, "without must name clients, got 'd': choose from 'a', 'b', 'c'"),
        (clients(), {"without": [2]}, "without must name clients, got 2"),
        (
            clients(b={"w": torch.zeros(3)}),
            {},
            r"client 'b': tensor 'w' must be \(2,\) .*, as 'a' sends it, got \(3,\)",
        ),
        (clients(b={"w": torch.tensor([1, 2])}), {}, "client 'b': tensor 'w' must be .*float32, .* got .*int64"),
        (clients(b={"n": torch.tensor(1.0)}), {}, "client 'b': tensor 'n' must be .*int64, .* got .*float32"),
        (
            clients(b={"w": torch.tensor([1, float("inf")])}),
            {},
            "client 'b': tensor 'w' has values that are not finite",
        ),
        (clients(b={"more": torch.zeros(1)}), {}, "client 'a': tensor 'more' is missing, though 'b' sends it"),
        (clients(a={"more": torch.zeros(1)}), {}, "client 'b': tensor 'more' is missing, though 'a' sends it"),
        (clients(b={"w": "words"}), {}, "client 'b': entry 'w' must be a Tensor of numbers, got a str"),
        (clients(b={"w": torch.zeros(2, device="meta")}), {}, "client 'b': entry 'w' must be .* got no data"),
        (clients(), {"reference": {"w": torch.zeros(2)}}, "client 'a': tensor 'n' is not in the reference"),
        ({"a": torch.nn.Linear(1, 1)}, {"weights": {"a": 1}}, "client 'a' must be a state dict, .* got a Linear"),
        ({"a": "nowhere.safetensors"}, {"weights": {"a": 1}}, "nowhere.safetensors cannot be read"),
    ],
)
def test_what_is_refused(states, arguments, sentence):
    with pytest.raises(TraceFLError, match=sentence):
        fuse(states, **{"weights": W, **arguments})
