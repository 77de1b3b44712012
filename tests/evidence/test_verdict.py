"""The verdict on small federations that are trained here, and on tables of our own."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tracefl import TraceFLError, audit_run, judge
from tracefl.data.examples import Examples
from tracefl.evidence.verdict import COLUMNS, class_by_client, evenly, verdict_json
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import Evaluation

K, C = 6, 3


def blobs(count, seed):
    """Three classes of points in the plane, as far from each other as they are wide."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % C
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[labels] + 0.7 * torch.randn(count, 2, generator=random), labels


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, C))


def federation(folder, faults=None, rounds=3):
    """FedAvg of six clients; `faults` maps a client to what it does to its labels or its update."""
    model, test = network(), Examples(*blobs(90, 99))
    W = {n: w.clone() for n, w in model.state_dict().items()}
    run = Run.create(folder, initial=W, clients=[ClientInfo(str(k), {0: 1}) for k in range(K)], seed=0)
    for t in range(1, rounds + 1):
        states, parts = [], []
        for k in range(K):
            fault = (faults or {}).get(k, "")
            model.load_state_dict(W)
            x, y = blobs(60, k)
            y = {"flip": torch.zeros_like(y), "wrong": (y + 1 + torch.arange(len(y)) % 2) % C}.get(fault, y)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            for _ in range(0 if fault == "idle" else 8):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            state = {n: w.clone() for n, w in model.state_dict().items()}
            states.append({n: 3 * W[n] - 2 * w for n, w in state.items()} if fault == "against" else state)
            parts.append(run.record_client(t, str(k), states[-1], 60, 1 / K))
        W = {n: sum(s[n] for s in states) / K for n in W}
        model.load_state_dict(W)
        predictions = model(test.inputs).argmax(1)
        run.record_round(t, parts, W, Evaluation(1.0, 0.5, predictions), {})
    return run, model, test


@pytest.mark.parametrize(
    ("faults", "why"),
    [
        ({2: "flip"}, "teaches class 0 to inputs of other classes (aim "),
        ({0: "wrong", 5: "wrong"}, "teaches class"),
        ({4: "idle"}, "sends back what it received (length of its updates 0 of the median client's)"),
        ({3: "against"}, "moves the model against the others (median cosine with their updates -"),
        ({}, ""),
    ],
)
def test_the_faulty_clients_are_accused_and_nobody_else(tmp_path, faults, why):
    run, model, test = federation(tmp_path / "run", faults)
    table = audit_run(run, model=model, examples=test)
    assert list(table.columns) == [*COLUMNS, "value_0", "value_1", "value_2"]
    assert len(table) == 3 * K
    found = judge(table)
    assert found.faulty == [str(k) for k in sorted(faults)]
    for k in range(K):
        of = found.clients[str(k)]
        assert of.rounds == 3
        assert (why if k in faults else "does not stand apart (aim ") in of.why
    assert len(found.lines()) == 1 + len(faults)


def table(rounds=3, **columns):
    """Six clients, three rounds, nobody apart; columns are values by client."""
    plain = {
        "weight": 1 / K, "value": 0.0, "z": 0.0, "norm": 1.0, "cosine": 0.5, "agreement": 0.2, "aim": 0.8,
        "teaches": 1, "taught_classes": 3.0,
    }  # fmt: skip
    rows = [pd.DataFrame({"round": t, "client": list("abcdef"), **plain, **columns}) for t in range(1, rounds + 1)]
    return pd.concat(rows, ignore_index=True)


def accused(**columns):
    return judge(table(**columns), ["cat", "dog", "cow"]).faulty


def test_limits_of_the_verdict():
    assert accused() == []
    assert accused(norm=[0.05, 1, 1, 1, 1, 1]) == ["a"]
    assert accused(norm=[0.0] * 6) == []  # nobody trains: nobody stands apart
    against = [-0.1, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert accused(agreement=against) == []  # it aims as well as the others
    against = judge(table(agreement=against, aim=[0.5, 0.8, 0.8, 0.8, 0.8, 0.8])).clients["a"].why
    assert against == "moves the model against the others (median cosine with their updates -0.10)"
    low = [-0.1, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert accused(aim=low) == ["a"]
    assert accused(aim=low, rounds=2) == []  # the first rounds say too little
    assert accused(aim=low, z=[-3.0, 0, 0, 0, 0, 0]) == []  # the model would miss it
    assert accused(aim=low, taught_classes=1.0) == []  # too near to an honest client of one class
    assert accused(aim=[-0.4, *low[1:]], taught_classes=1.0) == ["a"]
    assert accused(aim=low, taught_classes=1.0, z=[5.0, 0, 0, 0, 0, 0]) == ["a"]
    assert accused(aim=[0.1, 0.4, 0.4, 0.4, 0.4, 0.4]) == []  # nobody's aim is good
    assert accused(aim=[np.nan] * 6) == []


def test_good_rounds_speak_for_a_client():
    rounds = table(aim=[-0.4, *[0.8] * 5], rounds=4)
    for good, faulty in ((2, ["a"]), (3, [])):
        rounds.loc[(rounds["client"] == "a") & (rounds["round"] == good), "aim"] = 0.9
        assert judge(rounds).faulty == faulty


def test_the_class_is_named():
    why = judge(table(aim=[-0.4, *[0.8] * 5], taught_classes=1.0), ["cat", "dog", "cow"]).clients["a"].why
    assert why == "teaches class dog to inputs of other classes (aim -0.40, the median client's 0.80)"


def test_z_adds_up_over_rounds_and_none_decides_alone():
    found = judge(table(z=[4.0, -np.inf, np.nan, 0, 0, 0]))
    of = {who: one.z for who, one in found.clients.items()}
    assert of["a"] == pytest.approx(12 / 3**0.5)
    assert of["b"] == pytest.approx(-15 / 3**0.5)
    assert json.loads(verdict_json(found))["clients"]["c"]["z"] == 0


def test_three_clients_cannot_be_judged():
    three = table(norm=[0.0, 1, 1, 1, 1, 1])
    found = judge(three[three["client"].isin(["a", "b", "c"])])
    assert found.faulty == []
    assert found.clients["a"].why == "cannot be judged: a round needs at least 4 clients to say what is usual"
    assert found.lines() == [f"Verdict: the clients {found.clients['a'].why}"]


def test_class_by_client():
    values = table(value=1.0).assign(value_0=[1.0] * 6 + [2.0] * 6 + [3.0] * 6, value_1=-1.0)
    found = class_by_client(values, ["cat", "dog"])
    assert list(found.columns) == ["all", "cat", "dog"]
    assert found.loc["a"].tolist() == [1.0, 2.0, -1.0]


def test_examples_are_drawn_evenly_from_the_classes():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    assert torch.bincount(labels[evenly(labels, 20)]).tolist() == [9, 3, 8]
    assert len(evenly(labels, 1000)) == 103


def test_a_run_without_rounds_and_a_damaged_one_are_said(tmp_path):
    run, model, test = federation(tmp_path / "run", rounds=1)
    file = tmp_path / "run" / "rounds" / "0001" / "clients" / "3.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(TraceFLError, match=r"round 1 cannot be audited: .*3\.safetensors"):
        audit_run(run, model=model, examples=test)
    empty = Run.create(tmp_path / "empty", initial=model.state_dict(), clients=[], seed=0)
    with pytest.raises(TraceFLError, match="has no complete round to audit: train one"):
        audit_run(empty, model=model, examples=test)
