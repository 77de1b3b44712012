"""The whole run against closed forms: small recorded runs whose replay can be done by hand."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from tests.evidence.small import log_odds_of
from tracefl import Run, TraceFLError, trace_run
from tracefl.data.examples import Examples
from tracefl.evidence import reaction
from tracefl.record import ClientInfo
from tracefl.training import Evaluation, train

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
TRAINING = {"epochs": 1, "lr": 0.1, "batch_size": 4}
JUDGED = Evaluation(0.5, 1.0, torch.tensor([0]))


def binary():
    """One logit z = w x + b for class 1: log-odds of class 1 are linear in the state."""
    return nn.Linear(3, 1).double()


def y(state):
    return X @ state["weight"][0] + state["bias"]


def drawn(random, model):
    return {n: torch.randn(w.shape, generator=random).to(w.dtype) for n, w in model.state_dict().items()}


def recorded(folder, rounds, model, train=None, server=None, labels=None):
    """A run of these rounds, {client: weight} each; clients send `train(W, k)` or anything."""
    random = torch.Generator().manual_seed(0)
    W = drawn(random, model)
    ids = sorted({k for p in rounds for k in p})
    run = Run.create(folder, initial=W, clients=[ClientInfo(k, (labels or {}).get(k, {})) for k in ids])
    for t, p in enumerate(rounds, 1):
        sent = {k: train(W, k) if train else drawn(random, model) for k in p}
        parts = [run.record_client(t, k, sent[k], 4, w) for k, w in p.items()]
        used = {k: w for k, w in p.items() if w > 0}
        W = {n: sum(w * sent[k][n] for k, w in used.items()) / sum(used.values()) for n in W}
        W = server(W, t) if server else W
        run.record_round(t, parts, W, JUDGED, {})
    return run


def explained(run, **given):
    return trace_run(run, X, targets=[1] * len(X), model=binary(), **given)


ROUNDS = [{"a": 0.2, "b": 0.8}, {"b": 0.5, "c": 0.5}, {"a": 0.3, "c": 0.3, "d": 0.4}]


def linear(W, k):
    """A step of its own towards its own point: F_k(W) = c W + (1 - c) W_k, as of a quadratic loss."""
    own = drawn(torch.Generator().manual_seed(ord(k)), binary())
    return {n: 0.6 * w + 0.4 * own[n] for n, w in W.items()}


def test_replay_is_retraining_where_clients_training_is_linear(tmp_path):
    run = recorded(tmp_path, ROUNDS, binary(), train=linear)
    found = explained(run, memory=0.6)
    assert found.client_ids == ["a", "b", "c", "d"]
    assert (found.method, found.layers) == ("replay", ["the whole run, memory 0.6"])
    for k, who in enumerate(found.client_ids):
        W = dict(run.global_state(0))
        for p in ROUNDS:
            rest = {j: w for j, w in p.items() if j != who}
            sent = {j: linear(W, j) for j in rest}
            W = {n: sum(w * sent[j][n] for j, w in rest.items()) / sum(rest.values()) for n in W}
        expected = y(run.global_state(3)) - y(W)
        assert found.contributions[:, k].tolist() == pytest.approx(expected.tolist(), abs=1e-9)


def test_what_the_server_adds_stays_as_it_was(tmp_path):
    """As of FedAvgM: what is released is not the mean. Without k, the same is added to another mean."""
    plain = recorded(tmp_path / "plain", ROUNDS, binary())
    moved = recorded(tmp_path / "moved", ROUNDS, binary(), server=lambda W, t: {n: w + t for n, w in W.items()})
    one, other = explained(plain, memory=0.7), explained(moved, memory=0.7)
    assert one.contributions.tolist() == [pytest.approx(row, abs=1e-9) for row in other.contributions.tolist()]
    by_round = explained(moved, method="sum")
    added = torch.stack([t * (X.sum(1) + 1) for t in (1, 2, 3)])
    assert by_round.residual_by_layer.tolist() == [pytest.approx(row, abs=1e-9) for row in added.tolist()]


def test_no_memory_is_the_last_round(tmp_path):
    run = recorded(tmp_path, ROUNDS, binary())
    last = explained(run, method="sum").by_layer[-1]
    assert explained(run, memory=0).contributions.tolist() == [pytest.approx(row, abs=1e-9) for row in last.tolist()]
    assert last[:, 1].tolist() == [0] * 5  # b took no part
    assert explained(run, memory=0, round=1).client_ids == ["a", "b"]


def test_the_sum_over_rounds_is_of_fusions_without_the_client_and_knows_its_gap(tmp_path):
    run = recorded(tmp_path, ROUNDS, binary())
    found = explained(run, method="sum")
    b = run.round(2).client_state("b")
    c = run.round(2).client_state("c")
    assert found.layers == ["round 1", "round 2", "round 3"]
    assert found.by_layer[1, :, 1].tolist() == pytest.approx((y(run.global_state(2)) - y(c)).tolist(), abs=1e-9)
    assert found.by_layer[1, :, 2].tolist() == pytest.approx((y(run.global_state(2)) - y(b)).tolist(), abs=1e-9)
    assert found.change.tolist() == pytest.approx((y(run.global_state(3)) - y(run.global_state(0))).tolist(), abs=1e-9)
    gap = (found.contributions.sum(1) + found.residual - found.change).abs() / found.change.abs().mean()
    assert found.completeness_error.tolist() == pytest.approx(gap.tolist(), abs=1e-9)
    assert found.completeness_error.max() > 0.01


@pytest.mark.parametrize("method", ["replay", "sum"])
def test_clients_in_blocks_are_the_same(tmp_path, method):
    run = recorded(tmp_path, ROUNDS, binary())
    whole, parts = explained(run, method=method), explained(run, method=method, scratch_bytes=1)
    assert torch.equal(whole.contributions, parts.contributions)


def test_without_its_only_client_there_is_no_round(tmp_path):
    run = recorded(
        tmp_path, [{"a": 0.5, "b": 0.5}, {"a": 1.0}], binary(), server=lambda W, t: {n: w + t for n, w in W.items()}
    )
    found = explained(run, memory=0.5)
    first, b = run.global_state(1), run.round(1).client_state("b")
    without_a = {n: b[n] + 1 for n in b}  # and what the server added to round 1
    assert found.contributions[:, 0].tolist() == pytest.approx(
        (y(run.global_state(2)) - y(without_a)).tolist(), abs=1e-9
    )
    assert explained(run, method="sum").by_layer[1, :, 0].tolist() == pytest.approx(
        (y(run.global_state(2)) - y(first)).tolist(), abs=1e-9
    )


def test_a_client_whose_update_was_not_used_has_no_share_and_is_not_read(tmp_path):
    run = recorded(tmp_path, [{"a": 0.5, "b": 0.5, "z": 0}], binary())
    (run.path / "rounds" / "0001" / "clients" / "z.safetensors").unlink()
    for method in ("replay", "sum"):
        assert explained(run, method=method).contributions[:, 2].tolist() == [0] * 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()


def with_variance(folder, sent):
    """Three rounds of which leaving out a would leave a negative variance, were it not for its floor."""
    model = network()
    state = {n: w for n, w in model.state_dict().items() if n in sent or sent == "all"}
    run = Run.create(folder, initial=state, clients=[ClientInfo(k, {}) for k in "ab"])
    for t in (1, 2, 3):
        of = {
            k: {n: v * (9 if k == "a" else 0.01) if n == "1.running_var" else v + t for n, v in state.items()}
            for k in "ab"
        }
        parts = [run.record_client(t, k, of[k], 3, 0.5) for k in "ab"]
        run.record_round(
            t,
            parts,
            {
                n: (of["a"][n] + of["b"][n]) // 2 if n.endswith("tracked") else (of["a"][n] + of["b"][n]) / 2
                for n in state
            },
            JUDGED,
            {},
        )
    return run, model


def test_running_variances_stay_positive_and_counters_are_no_tensors_to_replay(tmp_path):
    run, model = with_variance(tmp_path, "all")
    kept = {n: w.clone() for n, w in model.state_dict().items()}
    targets = torch.arange(5) % 3
    found = trace_run(run, X, targets=targets, model=model, memory=1)
    W = dict(run.global_state(3))
    least = {**W, "1.running_var": run.round(3).client_state("b")["1.running_var"]}  # they differ in it alone
    expected = log_odds_of(model, W, X, targets) - log_odds_of(model, least, X, targets)
    assert expected.abs().max() > 0.01
    assert found.contributions[:, 0].tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert all(torch.equal(w, kept[n]) for n, w in model.state_dict().items())


def test_what_no_client_sends_is_the_models_own(tmp_path):
    run, model = with_variance(tmp_path, ["3.weight", "3.bias"])
    found = trace_run(run, X, model=model, memory=1)
    assert found.contributions.tolist() == [[0, 0]] * 5  # both sent the same of these


def test_a_proxy_does_not_train_on_what_is_explained(tmp_path):
    run = recorded(tmp_path, ROUNDS, binary())
    others, labels = 2 * X, torch.arange(5) % 2
    alone = explained(run, examples=(others, labels), training=TRAINING)
    beside = explained(run, examples=(torch.cat([others, X]), torch.cat([labels, labels])), training=TRAINING)
    assert torch.equal(alone.contributions, beside.contributions)


def test_where_every_example_of_the_run_is_explained_memory_answers(tmp_path, monkeypatch):
    run = recorded(tmp_path, ROUNDS, binary())
    monkeypatch.setattr(reaction, "_training_of", lambda run: TRAINING)
    monkeypatch.setattr(reaction, "_examples_of", lambda run: Examples(X, torch.arange(5) % 2))
    assert explained(run).layers == ["the whole run, memory 0.5"]
    monkeypatch.setattr(reaction, "_examples_of", lambda run: Examples(2 * X, torch.arange(5) % 2))
    assert explained(run).layers == ["the whole run, 0.7 by proxy, 0.3 by memory 0.3"]


def test_a_proxy_answers_a_difference_by_training_from_both_models(tmp_path):
    """Without later rounds there is nothing to answer; with them a client's share is not that of full memory."""
    random = torch.Generator().manual_seed(3)
    examples = Examples(torch.randn(30, 3, generator=random).double(), torch.arange(30) % 2)
    given = {"memory": "proxy", "examples": examples, "training": {"epochs": 2, "lr": 0.1, "batch_size": 8}}
    one = recorded(tmp_path / "one", ROUNDS[:1], binary())
    assert explained(one, **given).contributions.tolist() == explained(one, memory=0).contributions.tolist()
    run = recorded(tmp_path / "run", ROUNDS, binary())
    model, before = binary(), torch.get_rng_state()
    found = trace_run(run, X, targets=[1] * len(X), model=model, **given)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are used up
    again = explained(run, **given, scratch_bytes=1)
    assert torch.equal(found.contributions, again.contributions)
    assert found.layers == ["the whole run, memory by proxy"]
    mixed = explained(run, **{**given, "memory": None})
    assert mixed.layers == ["the whole run, 0.7 by proxy, 0.3 by memory 0.3"]
    assert (mixed.contributions - found.contributions).abs()[:, 1].min() > 1e-6
    assert (found.contributions - explained(run, memory=1).contributions).abs()[:, 1].min() > 1e-6


@pytest.mark.parametrize(("given", "of_b"), [({}, 0.5 / 0.8), ({"proxies": 1}, None)])
def test_a_proxy_stands_for_every_client_by_its_labels_and_weight(tmp_path, given, of_b):
    """One example of each class, b holds one and c the other: what they are trained on is known."""
    x, training = torch.tensor([[1.0, 0, 2], [0, -1, 1]]).double(), {"epochs": 4, "lr": 0.5, "batch_size": 4}
    rounds, labels = [{"a": 0.2, "b": 0.8}, {"a": 0.2, "b": 0.5, "c": 0.3}], {"b": {0: 4}, "c": {1: 4}}
    run = recorded(tmp_path, rounds, binary(), labels=labels)
    W = dict(run.global_state(1))
    d = {n: run.round(1).client_state("b")[n] - w for n, w in W.items()}

    def answer(label):
        """What a client's training on four times this example makes of d."""
        ends = []
        for start in ({n: w + d[n] for n, w in W.items()}, W):
            model = binary()
            model.load_state_dict(start)
            train(model, Examples(x[[label] * 4], torch.tensor([label] * 4)), seed=0, **training)
            ends.append(model.state_dict())
        return {n: ends[0][n] - ends[1][n] for n in W}

    sent = {k: run.round(2).client_state(k) for k in "abc"}
    without = {n: (0.5 * sent["b"][n] + 0.3 * sent["c"][n]) / 0.8 for n in W}
    of_class = [answer(0), answer(1)]
    of_example = {"examples": (x, torch.tensor([0, 1])), "training": training}
    for memory, share in (("proxy", 1.0), ("mixed", 0.7)):
        found = explained(run, memory=memory, **of_example, **given).contributions[:, 0]
        expected = []
        for b in (0, 1) if of_b is None else (of_b,):
            R = {n: b * of_class[0][n] + (1 - b) * of_class[1][n] for n in W}
            moved = {n: without[n] + share * R[n] + (1 - share) * 0.3 * d[n] for n in W}
            expected.append(y(run.global_state(2)) - y(moved))
        assert min((found - of_one).abs().max() for of_one in expected) < 1e-6
        assert (expected[0] - expected[-1]).abs().max() > 1e-3 or len(expected) == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"round": 4}, "round 4 is not recorded"),
        ({"round": 0}, "round 0 is not recorded"),
        ({"round": 1.5}, "round must be a whole number from 1 to 3, got 1.5"),
        ({"method": "shapley"}, "method must be one of replay, sum, got 'shapley'"),
        ({"memory": 1.5}, "memory must be a number from 0 to 1, 'proxy' or 'mixed', got 1.5"),
        ({"memory": float("nan")}, "memory must be a number from 0 to 1, 'proxy' or 'mixed', got nan"),
        ({"memory": True}, "memory must be a number from 0 to 1, 'proxy' or 'mixed', got True"),
        ({"scratch_bytes": 0}, "scratch_bytes must be a number of at least 1, got 0"),
        ({"proxies": 0}, "proxies must be a whole number of at least 1, got 0"),
        ({"memory": "proxy"}, "memory='proxy' needs labelled examples and how clients train"),
        (
            {"memory": "proxy", "examples": (X, torch.ones(5).long()), "training": {"lr": 1}},
            "training must be a dict of epochs, lr, batch_size, got lr",
        ),
        ({"training": TRAINING}, "pass examples= and training="),
        ({"examples": X}, "pass examples= and training="),
        ({"examples": X, "training": TRAINING}, "examples must be (inputs, labels), got a Tensor"),
        ({"examples": (2 * X, [0, 1, 2, 0, 0]), "training": TRAINING}, "labels of examples must be 0 to 1, got 2"),
        ({"examples": (2 * X, [0, 1]), "training": TRAINING}, "labels of examples must be 5 integers"),
        ({"examples": Examples(2 * X, torch.zeros(3)), "training": TRAINING}, "a label for each input, got 3 labels"),
        ({"examples": (X, [0, 1, 0, 1, 0]), "training": TRAINING}, "others than the inputs that are explained"),
        ({"examples": (2 * X, [0] * 5), "training": {**TRAINING, "epochs": 0}}, "epochs must be a whole number"),
        ({"examples": (2 * X, [0] * 5), "training": {**TRAINING, "lr": "1"}}, "lr must be a number above 0, got '1'"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_one_sentence(tmp_path, given, sentence):
    with pytest.raises(TraceFLError, match=re.escape(sentence)):
        explained(recorded(tmp_path, ROUNDS, binary()), **given)


def test_a_run_without_rounds_or_model_is_refused(tmp_path):
    empty = Run.create(tmp_path / "empty", initial=binary().state_dict(), clients=[])
    with pytest.raises(TraceFLError, match="has no complete round"):
        explained(empty)
    with pytest.raises(TraceFLError, match=r"cannot be built .*pass model="):
        trace_run(recorded(tmp_path / "run", ROUNDS, binary()), X)
    with pytest.raises(TraceFLError, match="run must be a recorded run, got a str"):
        explained("folder")


def test_a_damaged_file_is_named_with_round_and_client(tmp_path):
    run = recorded(tmp_path, ROUNDS, binary())
    file = run.path / "rounds" / "0002" / "clients" / "c.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(TraceFLError, match=r"0002.*c\.safetensors is not the file that was recorded"):
        explained(run)
