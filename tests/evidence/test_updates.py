"""Updates beside each other, and what a client's own model has learnt, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from tests.evidence.test_audit import federation
from tracefl import TraceFLError, audit
from tracefl.evidence.updates import lessons


def flat(model, state, start):
    return np.concatenate([(state[n] - start[n]).flatten().numpy() for n, _ in model.named_parameters()])


def incoming(model):
    return {n: w * 0.9 if w.is_floating_point() else w for n, w in model.state_dict().items()}


@pytest.mark.parametrize("scratch_bytes", [1 << 30, 4000])
def test_norms_cosines_and_agreement(scratch_bytes):
    model, states, weights, x, labels = federation()
    start = incoming(model)
    found = audit(model, states, x, labels, weights=weights, reference=start, scratch_bytes=scratch_bytes)
    moved = np.stack([flat(model, state, start) for state in states.values()])
    norms = np.linalg.norm(moved, axis=1)
    p = np.array(list(weights.values())) / sum(weights.values())
    cosines = moved @ moved.T / np.outer(norms, norms)
    assert found.norms.tolist() == pytest.approx(norms.tolist())
    mean = p @ moved
    assert found.cosines.tolist() == pytest.approx((moved @ mean / norms / np.linalg.norm(mean)).tolist())
    medians = [np.median(np.delete(row, k)) for k, row in enumerate(cosines)]
    assert found.agreement.tolist() == pytest.approx(medians)


def test_an_update_of_norm_zero_has_no_direction():
    model, states, weights, x, labels = federation()
    start = incoming(model)
    second = list(states)[1]
    states[second] = start
    found = audit(model, states, x, labels, weights=weights, reference=start, aims=True)
    assert found.norms[1] == 0
    assert math.isnan(found.agreement[1])
    assert math.isnan(found.cosines[1])
    assert math.isnan(found.aim[1])
    assert bool(torch.isfinite(found.agreement[[0, 2, 3, 4]]).all())


def test_aim_and_lessons_are_those_of_the_clients_own_models():
    model, states, weights, x, labels = federation()
    start = incoming(model)
    found = audit(model, states, x, labels, weights=weights, reference=start, aims=True)

    def centred(state):
        logits = torch.func.functional_call(model, state, (x,)).detach()
        return logits - logits.mean(1, keepdim=True)

    for k, state in enumerate(states.values()):
        change = centred(state) - centred(start)
        by_class = torch.stack([change[labels == c].mean(0) for c in range(3)])
        u = by_class.mean(0)
        auc = [
            mannwhitneyu(change[labels == c, c], change[labels != c, c]).statistic
            / ((labels == c).sum() * (labels != c).sum()).item()
            for c in range(3)
        ]
        up = u.clamp(min=0).numpy()
        assert found.taught[:, k].tolist() == pytest.approx(u.tolist())
        assert found.aim[k].item() == pytest.approx((up * (2 * np.array(auc) - 1)).sum() / up.sum())


def test_a_class_without_examples_plays_no_part():
    received, own = torch.zeros(4, 3).double(), torch.tensor([[2.0, -1, -1], [1, -1, 0], [-1, 1, 0], [-2, 2, 0]])
    found = lessons([received, own.double()], [2, 2, 0])
    assert found["aim"].tolist() == [1.0]
    assert found["taught"].shape == (3, 1)


def test_clients_that_send_parts_are_judged_by_their_own_models():
    model, states, weights, x, labels = federation()
    start = dict(model.state_dict())
    whole = {who: {**start, "4.weight": s["4.weight"], "4.bias": s["4.bias"]} for who, s in states.items()}
    parts = {who: {n: s[n] for n in ("4.weight", "4.bias")} for who, s in whole.items()}
    given = {"weights": weights, "reference": start, "aims": True}
    assert audit(model, parts, x, labels, **given).aim.tolist() == pytest.approx(
        audit(model, whole, x, labels, **given).aim.tolist()
    )


def test_aims_need_the_model_that_the_clients_received():
    model, states, weights, x, labels = federation()
    with pytest.raises(TraceFLError, match="aims=True needs the model that the clients received: pass reference"):
        audit(model, states, x, labels, weights=weights, aims=True)
