"""A recorded run without some of its clients: by hand, by definition, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tracefl import Run, TraceFLError, fuse, whatif
from tracefl.data.examples import Examples
from tracefl.evidence.whatif import WhatIf, removal_lines
from tracefl.evidence.without import state_without
from tracefl.record import ClientInfo
from tracefl.training import Evaluation, evaluate

EVALUATION = Evaluation(0.5, 0.5, torch.tensor([0, 1]))


def recorded(folder, initial, rounds, **header):
    """A run of rounds (client id -> (state, weight), what the server adds to the mean)."""
    ids = dict.fromkeys(who for clients, _ in rounds for who in clients)
    run = Run.create(folder, initial=initial, clients=[ClientInfo(who, {0: 1}) for who in ids], seed=0, **header)
    for number, (clients, added) in enumerate(rounds, 1):
        total = sum(weight for _, weight in clients.values())
        parts = [run.record_client(number, who, w, 1, p / total) for who, (w, p) in clients.items()]
        mean = fuse({who: w for who, (w, _) in clients.items()}, {who: p for who, (_, p) in clients.items()})
        released = {**run.global_state(number - 1), **{name: w + added for name, w in mean.items()}}
        run.record_round(number, parts, released, EVALUATION, {})
    return Run.open(folder)


def scalar(value):
    return {"w": torch.tensor([float(value)])}


def by_hand(folder, added=0.0):
    """W: 0 -> 2 -> 5 -> 3 -> 4, and what is added."""
    rounds = [
        ({"a": (scalar(1), 1), "b": (scalar(3), 1)}, added),
        ({"a": (scalar(4), 3), "c": (scalar(8), 1)}, added),
        ({"b": (scalar(3), 1)}, added),
        ({"a": (scalar(4), 1), "b": (scalar(8), 1), "c": (scalar(0), 1), "d": (scalar(99), 0)}, added),
    ]
    return recorded(folder, scalar(0), rounds)


def w(run, *without, **rounds):
    return state_without(run, list(without), **rounds)["w"].item()


def test_one_round_is_the_fusion_without_and_what_the_server_added(tmp_path):
    for added in (0.0, 0.25):
        run = by_hand(tmp_path / str(added), added)
        assert w(run, "a", round=1) == 3 + added
        assert w(run, "b", round=1) == 1 + added
        assert w(run, "c", round=2) == 4 + added
        assert w(run, "b") == 2 + added  # the last round
        assert w(run, "a", "b") == 0 + added
        assert w(run, "d") == w(run, "c", round=3) - 3 + 4 == 4 + added  # weight 0, no part


def test_a_round_with_nobody_left_keeps_what_came_in(tmp_path):
    run = by_hand(tmp_path / "plain")
    assert w(run, "b", round=3) == 5
    assert w(run, "a", "b", round=1) == 0
    assert w(run, "b", round=3, since=1) == pytest.approx(5 - 1)  # d_1 = 1 - 2
    private = by_hand(tmp_path / "noise", 0.25)
    assert w(private, "b", round=3) == 5.25
    assert w(private, "b", round=3, since=1) == pytest.approx(5.25 - 1)
    assert w(private, "a", "b", "c", since=1) == 0
    assert w(private, "b", round=3, since=1, memory=0.5) == pytest.approx(5.25 - 0.5)  # nobody trained in round 3


def test_replay_carries_the_change_on(tmp_path):
    run = by_hand(tmp_path)
    change = {1: 3 - 2, 2: 8 - 5, 3: 0, 4: 4 - 4}  # without a
    for since in (1, 2, 3, 4):
        assert w(run, "a", since=since) == pytest.approx(4 + sum(change[t] for t in range(since, 5)))
        carried = sum(change[t] * 0.5 ** (4 - t) for t in range(since, 5))
        assert w(run, "a", since=since, memory=0.5) == pytest.approx(4 + carried)
        assert w(run, "a", since=since, memory=0) == w(run, "a")
    assert w(run, "c", since=1) == pytest.approx(4 - 1 + 2)
    assert w(run, "c", since=2, round=3) == pytest.approx(3 - 1)


def test_replay_is_exact_where_training_only_moves_the_model(tmp_path):
    """Clients that add a step of their own, equal weights but client 2: then retraining is what replay says."""
    torch.manual_seed(0)
    steps = torch.randn(5, 4, 3)

    def train(members):
        W, rounds = torch.zeros(3), []
        for step in steps:
            sent = {str(k): ({"w": W + step[k]}, 1.0) for k in members}
            rounds.append((sent, 0.0))
            W = torch.stack([state["w"] for state, _ in sent.values()]).mean(0)
        return W, rounds

    run = recorded(tmp_path, {"w": torch.zeros(3)}, train(range(4))[1])
    without, _ = train([0, 1, 3])
    torch.testing.assert_close(state_without(run, ["2"], since=1)["w"], without)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval()


def sent_by(model, seed, variance):
    torch.manual_seed(seed)
    state = {n: v + 0.3 * torch.randn(v.shape) for n, v in model.state_dict().items() if v.is_floating_point()}
    return state | {"1.running_var": torch.full((4,), variance) + torch.rand(4)}


def of_networks(folder, rounds=3, **header):
    model = network()
    initial = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
    sent = [
        {str(k): (sent_by(model, 10 * t + k, 50.0 if k == 2 else 1.0), k + 1) for k in range(3)} for t in range(rounds)
    ]
    return recorded(folder, initial, [(clients, 0.0) for clients in sent], **header), model


def test_running_variances_stay_positive_over_many_rounds(tmp_path):
    run, model = of_networks(tmp_path, rounds=5)
    kept = [run.round(5).client_state(who)["1.running_var"] for who in "01"]
    once, replayed = state_without(run, ["2"]), state_without(run, ["2"], since=1)
    torch.testing.assert_close(once["1.running_var"], (kept[0] + 2 * kept[1]) / 3)
    assert (replayed["1.running_var"] >= 0.099 * torch.minimum(*kept)).all()
    model.load_state_dict(replayed, strict=False)
    assert torch.isfinite(model(torch.randn(5, 3))).all()


def test_a_variance_stays_positive_after_a_round_with_nobody_left_and_is_not_raised_without_need(tmp_path):
    def of(value):
        return {"running_var": torch.tensor([float(value)])}

    rounds = [({"a": (of(50), 1)}, 0), ({"b": (of(1.5), 1)}, 0), ({"b": (of(1), 1)}, 0)]
    run = recorded(tmp_path, of(1), rounds)
    for number, expected in ((1, 1), (2, 0.15), (3, 0.1)):
        assert state_without(run, ["a"], since=1, round=number)["running_var"].item() == pytest.approx(expected)
    assert state_without(run, ["a"], since=1, memory=0)["running_var"].item() == 1
    high = recorded(tmp_path / "high", of(1), [({"a": (of(70), 1), "b": (of(50), 1)}, 0), ({"b": (of(1), 1)}, 0)])
    assert state_without(high, ["a"], since=1, memory=0)["running_var"].item() == 1


def test_a_client_of_enormous_weights_leaves_no_rounding_behind(tmp_path):
    clients = {"a": ({"w": torch.tensor([1e12, 1.0])}, 1), "b": (scalar(0) | {"w": torch.tensor([0.3, 3.0])}, 2)}
    run = recorded(tmp_path, {"w": torch.zeros(2)}, [(clients, 0.0)] * 2)
    for since in (None, 2):
        assert state_without(run, ["a"], since=since)["w"].tolist() == pytest.approx([0.3, 3.0])
    noisy = recorded(tmp_path / "noise", {"w": torch.zeros(2)}, [({"a": (scalar(1), 1), "b": (scalar(2), 1)}, 0.001)])
    assert w(noisy, "a") == pytest.approx(2.001)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16])
def test_other_kinds_of_numbers(tmp_path, dtype):
    def of(value):
        return {"w": torch.tensor([value], dtype=dtype)}

    i = 1j if dtype.is_complex else 0
    run = recorded(tmp_path, of(4 + i), [({"a": (of(1 + 2 * i), 1), "b": (of(3), 1)}, 0), ({"a": (of(5), 1)}, 0)])
    for without, expected in (("a", 3), ("b", 1 + 2 * i)):
        found = state_without(run, [without], round=1)["w"]
        assert (found.item(), found.dtype) == (expected, dtype)
    assert state_without(run, ["a"])["w"].item() == 2 + i  # nobody is left: what came in


def test_a_round_of_a_network_is_what_fuse_says(tmp_path):
    run, _ = of_networks(tmp_path)
    weights = {client.id: client.weight for client in run.round(2).clients}
    found, expected = state_without(run, ["0"], round=2), fuse(run.client_states(2), weights, without=["0"])
    assert list(found) == list(run.global_state(2))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert found[name].dtype == value.dtype


def test_what_nobody_sends_and_whole_numbers_stay(tmp_path):
    states = {who: {"w": torch.tensor([x]), "n": torch.tensor([int(x)])} for who, x in (("a", 1.0), ("b", 3.0))}
    initial = {"w": torch.zeros(1), "n": torch.tensor([0]), "head": torch.tensor([7.0])}
    run = recorded(tmp_path, initial, [({who: (state, 1) for who, state in states.items()}, 0)] * 2)
    found = state_without(run, ["b"], since=1)
    assert {name: value.item() for name, value in found.items()} == {"w": 0.0, "n": 1, "head": 7.0}


def test_each_state_is_read_once(tmp_path, monkeypatch):
    run, reads = by_hand(tmp_path), []
    from tracefl.states import StateFile

    read = StateFile.__getitem__
    monkeypatch.setattr(StateFile, "__getitem__", lambda self, name: reads.append(self._file) or read(self, name))
    state_without(run, ["a"], since=1)
    clients = [file for file in reads if file.parent.name == "clients"]
    assert len(clients) == len(set(clients)) == 2 + 2 + 3  # not of round 3, in which a took no part, nor d


@pytest.fixture
def examples():
    torch.manual_seed(1)
    return Examples(torch.randn(30, 3), torch.randint(0, 3, (30,)))


def test_before_and_after_are_those_of_the_two_models(tmp_path, examples):
    run, model = of_networks(tmp_path, class_names=["x", "y", "z"])
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    found = whatif(tmp_path, ["2", "2"], round=2, examples=examples, model=model.train())
    assert model.training
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    assert (found.without, found.round, found.since, found.rounds) == (["2"], 2, 2, [2])
    right = []
    for seen, state in ((found.before, run.global_state(2)), (found.after, state_without(run, ["2"], round=2))):
        model.load_state_dict(dict(state), strict=False)
        expected = evaluate(model, examples)
        assert torch.equal(seen.predictions, expected.predictions)
        assert (seen.loss, seen.accuracy) == (expected.loss, expected.accuracy)
        right.append(expected.predictions == examples.labels)
    was, now = right
    assert found.righted.tolist() == [i for i in range(30) if now[i] and not was[i]]
    assert found.wronged.tolist() == [i for i in range(30) if was[i] and not now[i]]
    assert len(found.righted) + len(found.wronged) > 0
    assert found.mispredictions == 30 - was.sum()
    table = found.to_frame()
    assert list(table["name"]) == ["x", "y", "z"]
    for c in range(3):
        of_class = examples.labels == c
        row = table.iloc[c]
        assert row["examples"] == of_class.sum()
        assert row["accuracy_before"] == found.by_class_before[c] == was[of_class].double().mean()
        assert row["accuracy_after"] == found.by_class_after[c] == now[of_class].double().mean()
        assert (row["righted"], row["wronged"]) == ((now & ~was & of_class).sum(), (was & ~now & of_class).sum())


def test_ids_may_be_numbers_and_names_come_from_the_classes(tmp_path, examples):
    run, model = of_networks(tmp_path)
    some = Examples(examples.inputs, examples.labels.clamp(max=1))
    found = whatif(run, (2, 0), since=1, examples=some, model=model)
    assert (found.without, found.round, found.since, found.rounds) == (["0", "2"], 3, 1, [1, 2, 3])
    assert found.class_names == ["0", "1", "2"]
    assert math.isnan(found.by_class_before[2])
    text = repr(found)
    assert text.startswith("Without c0, c2 in rounds 1 to 3: accuracy ")
    assert "\n  loss " in text
    assert "nan" not in text


def test_the_line_says_what_is_gained_and_what_it_costs():
    labels = torch.tensor([0, 0, 1, 1])
    before = Evaluation(1.0, 0.25, torch.tensor([1, 1, 0, 1]))
    after = Evaluation(0.5, 0.5, torch.tensor([0, 0, 0, 0]))
    found = WhatIf(["3"], 4, 4, [4], ["0", "1"], labels, before, after)
    line = "accuracy 0.25 -> 0.50; 2 of 3 mispredictions become right, 1 right ones wrong"
    assert list(removal_lines(found)) == [f"Without c3 in round 4: {line}"]
    replayed = WhatIf(["1", "3"], 4, 2, [3], ["0", "1"], labels, before, after)
    assert list(removal_lines(replayed)) == [f"Without c1, c3 in rounds 2 to 4: {line}"]
    absent = WhatIf(["3"], 4, 4, [], ["0", "1"], labels, before, before)
    assert list(removal_lines(absent)) == ["Without c3 in round 4: nothing changes, c3 takes no part there"]


def test_what_verdict_json_holds_of_it():
    labels, before, after = torch.tensor([0, 1, 1]), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1])
    models = Evaluation(math.inf, 1 / 3, before), Evaluation(0.5, 2 / 3, after)
    told = WhatIf(["a"], 5, 2, [2, 4], ["no", "yes"], labels, *models).as_json()
    assert told == {
        "without": ["a"], "since": 2, "round": 5, "rounds": [2, 4], "accuracy_before": 1 / 3, "accuracy_after": 2 / 3,
        "loss_before": None, "loss_after": 0.5, "examples": 3, "mispredictions": 2, "righted": 2, "wronged": 1,
    }  # fmt: skip


def test_a_client_that_took_no_part_changes_nothing_and_it_is_said(tmp_path):
    run, model = of_networks(tmp_path / "n")
    absent = Run.create(
        tmp_path / "m", initial=dict(run.global_state(0)), clients=[ClientInfo(who, {0: 1}) for who in "901"], seed=0
    )
    parts = [absent.record_client(1, who, run.round(1).client_state(who), 1, 1 / 2) for who in "01"]
    absent.record_round(1, parts, dict(run.global_state(1)), EVALUATION, {})
    found = whatif(absent, ["9"], examples=Examples(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), model=model)
    assert found.rounds == []
    assert repr(found).startswith("Without c9 in round 1: nothing changes, c9 takes no part there")
    assert torch.equal(found.before.predictions, found.after.predictions)


@pytest.mark.parametrize(
    ("without", "arguments", "sentence"),
    [
        ("2", {}, r"without must be a list of client ids, got '2': pass \['2'\]"),
        (2, {}, "without must be a list of client ids, got 2"),
        (["c2"], {}, "without must name clients, got 'c2': choose from '0', '1', '2'"),
        ([3], {}, "without must name clients, got '3'"),
        ([True], {}, "without must name clients, got True"),
        ([], {}, "without must name the clients to leave out, got none"),
        ([2], {"round": 4}, "round 4 is not recorded in .*: it has rounds 1 to 3"),
        ([2], {"round": 0}, "round 0 is not recorded"),
        ([2], {"round": 1.5}, "round must be the number of a round, got 1.5: give one from 1 to 3"),
        ([2], {"since": "1"}, "since must be the number of a round, got '1'"),
        ([2], {"since": 0}, "since must be a round from 1 to round=3, got 0"),
        ([2], {"memory": 1.5}, "memory must be a number from 0 to 1, got 1.5"),
        ([2], {"memory": "1"}, "memory must be a number from 0 to 1, got '1'"),
        ([2], {"since": 3, "round": 2}, "since must be a round from 1 to round=2, got 3"),
        ([2], {"model": nn.Linear(3, 3)}, "model lacks .*'0.bias'|model has .*'bias'"),
        ([2], {"model": nn.Sequential(*network()[:3], nn.Linear(4, 2))}, r"model's '3\.\w+' is .* the run's"),
        ([2], {"examples": (torch.zeros(1, 3), torch.tensor([0]))}, "examples must be Examples.* got a tuple"),
        ([2], {"examples": Examples(torch.zeros(0, 3), torch.tensor([]).long())}, "examples must be at least one"),
        ([2], {"examples": Examples(torch.zeros(1, 3), torch.tensor([3]))}, "labels must be 0 to 2, got 3"),
        ([2], {"examples": Examples(torch.zeros(1, 3), torch.tensor([0.5]))}, "labels must be 1 integers"),
        ([2], {"model": None}, "has no entry 'model'"),
        ([2], {"examples": None}, "has no entry 'data_folder'"),
    ],
)
def test_what_is_refused(tmp_path, examples, without, arguments, sentence):
    run, model = of_networks(tmp_path)
    with pytest.raises(TraceFLError, match=sentence):
        whatif(run, without, **{"model": model, "examples": examples, **arguments})


def test_a_run_without_rounds_and_one_that_is_not_there(tmp_path):
    empty = Run.create(tmp_path / "run", initial=scalar(0), clients=[ClientInfo("a", {0: 1})], seed=0)
    with pytest.raises(TraceFLError, match="has no complete round: train it first"):
        whatif(empty, ["a"])
    with pytest.raises(TraceFLError, match="holds no recorded run"):
        whatif(tmp_path / "nowhere", ["a"])
    with pytest.raises(TraceFLError, match="run must be a Run or the folder of one, got a dict"):
        whatif({}, ["a"])
    run, model = of_networks(tmp_path / "moved", data_folder="gone", model={"name": "resnet18", "num_classes": 3})
    with pytest.raises(TraceFLError, match=r"the server's examples of .* cannot be read"):
        whatif(run, [2], model=model)
