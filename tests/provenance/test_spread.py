"""Work over clients in parts gives what it gives in one piece."""

import cloudpickle
import pytest
import torch
from torch import nn

from tests.provenance import reference
from tracefl import audit, trace
from tracefl.errors import TraceFLError
from tracefl.provenance.spread import here, trace_spread


def in_parts(size):
    """Parts of `size` names; the work goes through bytes as it does on its way to another machine."""

    def spread(work, names):
        sent = cloudpickle.dumps(work)
        return [cloudpickle.loads(sent)(names[first : first + size]) for first in range(0, len(names), size)]

    return spread


@pytest.fixture
def small():
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).eval()
    states, weights = reference.perturbed(model, K=5)
    return model, states, weights, torch.randn(7, 1, 6, 6)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"method": "influence", "weighted": True}, {"decay": 0.5}])
def test_tracing_in_parts_gives_the_same_answer(small, size, options):
    model, states, weights, x = small
    given = {"method": options.get("method", "neuron"), "layer_decay": options.get("decay", 0.9)}
    given["weights"] = weights if options.get("weighted") else None
    expected, found = trace(model, states, x, **given), trace_spread(in_parts(size), model, states, x, **given)
    assert (found.method, found.client_ids, found.layers) == (expected.method, expected.client_ids, expected.layers)
    assert found.targets.equal(expected.targets)
    torch.testing.assert_close(found.by_layer, expected.by_layer, rtol=0, atol=1e-6 * expected.by_layer.abs().max())
    if expected.residual is None:
        assert found.residual is None
    else:
        torch.testing.assert_close(found.residual, expected.residual, rtol=0, atol=1e-6 * expected.by_layer.abs().max())


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_the_audit_in_parts_gives_the_same_values(small, size):
    model, states, weights, x = small
    start = {name: tensor - 0.01 for name, tensor in model.state_dict().items()}
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])  # none of class 2
    given = {"weights": weights, "reference": start, "aims": True}
    expected = audit(model, states, x, labels, **given)
    found = audit(model, states, x, labels, **given, spread=in_parts(size))
    for name in ("values", "by_class", "norms", "cosines", "agreement", "aim", "taught"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-9, equal_nan=True, msg=name
        )


def test_what_cannot_be_told_in_parts_is_refused(small):
    model, states, weights, x = small
    with pytest.raises(TraceFLError, match=r"method='shapley' is not traced in parts: choose neuron or influence"):
        trace_spread(here, model, states, x, method="shapley", weights=weights)
    fewer = {who: dict(state) for who, state in states.items()}
    last = list(fewer)[-1]
    for name in ("5.weight", "5.bias"):
        del fewer[last][name]
    with pytest.raises(TraceFLError, match="must send the same tensors"):
        trace_spread(in_parts(len(states) - 1), model, fewer, x)
