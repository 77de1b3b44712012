"""Run.trace of a run whose model and data are an own Flower app's: what it asks for, and that it answers as trace does.

tests/test_pipeline.py asks a run of the main job.
"""

import copy

import pytest
import torch
from torch import nn

from tests.evaluation.conftest import OneChannel
from tracefl import Run, TraceFLError, trace


def fresh():
    return nn.Sequential(OneChannel(), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("method", ["neuron", "influence", "integrated", "shapley"])
def test_an_own_app_gives_its_model_and_inputs(recorded, method):
    run, _, examples = recorded
    model, given = fresh(), {"method": method}
    before = copy.deepcopy(model.state_dict())
    found = run.trace(inputs=examples.inputs[:3], model=model, method=method, targets=[0, 0, 1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(dict(run.global_state(1)))
    if method != "neuron":
        given["weights"] = {"0": 30, "1": 10}
    if method in ("integrated", "shapley"):
        given["reference"] = run.global_state(0)
    expected = trace(model, run.client_states(1), examples.inputs[:3], targets=[0, 0, 1], **given)
    assert torch.allclose(found.contributions, expected.contributions)
    assert found.contributions.abs().max() > 0
    assert found.targets.tolist() == [0, 0, 1]


def test_what_is_given_goes_on_to_trace(recorded):
    run, _, examples = recorded
    given = {"inputs": examples.inputs[:1], "model": fresh()}
    found = run.trace(**given, method="neuron", weights={"0": 1, "1": 3}, layer_decay=1)
    assert found.contributions.tolist() == [[0.5, 0.0]]
    assert found.residual is not None
    assert run.trace(**given, round=1).targets.tolist() == [0]  # what it predicts
    assert run.trace(**given, method="shapley", evaluations=4).standard_error.eq(0).all()


def empty(run):
    return Run.create(run.path / "empty", initial={"w": torch.zeros(1)}, clients=[], seed=0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "index and inputs: pass one of them"),
        ({"index": 0, "inputs": torch.zeros(1, 1, 2, 2)}, "index and inputs: pass one of them"),
        ({"index": 0}, "recorded by an own Flower app, which alone knows .* pass model="),
        ({"index": 0, "model": fresh()}, "its server's data are not in it: pass inputs="),
        ({"inputs": torch.zeros(1, 1, 2, 2), "round": 0}, "round must be a whole number from 1 to 1, got 0"),
        ({"inputs": torch.zeros(1, 1, 2, 2), "round": 2}, "round must be a whole number from 1 to 1, got 2"),
        ({"inputs": torch.zeros(1, 1, 2, 2), "round": "1"}, "round must be a whole number from 1 to 1, got '1'"),
        ({"inputs": torch.zeros(1, 1, 2, 2), "round": True}, "round must be a whole number from 1 to 1, got True"),
        ({"inputs": torch.zeros(1, 4), "model": "resnet18"}, "model must be a torch.nn.Module, got a str"),
        ({"inputs": torch.zeros(1, 4), "model": nn.Linear(4, 2)}, "round 1, which has '2.weight' besides"),
        (
            {"inputs": torch.zeros(1, 1, 2, 2), "model": nn.Sequential(OneChannel(), nn.Flatten(), nn.Linear(4, 3))},
            "model does not fit the global model of round 1 .*pass the one that was trained",
        ),
    ],
)
def test_what_cannot_be_traced_is_said(recorded, given, sentence):
    with pytest.raises(TraceFLError, match=sentence):
        recorded[0].trace(**given)


def test_a_run_without_rounds_is_said(recorded):
    with pytest.raises(TraceFLError, match="has no complete round to trace"):
        empty(recorded[0]).trace(0)
