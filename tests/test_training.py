"""Training is a pure function of its arguments; evaluation agrees with the definition."""

import pytest
import torch
from torch import nn

from tracefl.data.examples import Examples
from tracefl.training import batches, evaluate, train


def blobs(count: int = 60) -> Examples:
    labels = torch.arange(count) % 3
    inputs = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + labels[:, None, None, None]
    return Examples(inputs, labels)


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(3)
    )


def trained(seed: int) -> dict[str, torch.Tensor]:
    net = model()
    net(blobs().inputs[:2])
    train(net, blobs(), epochs=2, lr=0.01, batch_size=8, seed=seed)
    return net.state_dict()


def test_training_depends_on_its_arguments_alone():
    first = trained(seed=5)
    torch.rand(17)
    second, other = trained(seed=5), trained(seed=6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_a_proximal_term_holds_the_model_near_its_start():
    def moved(proximal_mu: float) -> float:
        net = model()
        net(blobs().inputs[:2])
        start = [p.detach().clone() for p in net.parameters()]
        train(net, blobs(), epochs=2, lr=0.01, batch_size=8, seed=0, proximal_mu=proximal_mu)
        return sum((p - w).square().sum().item() for p, w in zip(net.parameters(), start, strict=True))

    assert moved(100.0) < 0.3 * moved(0.0)


def test_training_learns():
    net = model()
    before = evaluate(net, blobs())
    loss = train(net, blobs(), epochs=20, lr=0.02, batch_size=16, seed=0)
    after = evaluate(net, blobs())
    assert after.accuracy > 0.9 > before.accuracy
    assert 0 < loss < before.loss


def test_evaluation_is_cross_entropy_and_share_of_hits():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    examples = blobs(300)
    found = evaluate(net, examples)
    logits = net(examples.inputs)
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, examples.labels).item(), abs=1e-5)
    assert torch.equal(found.predictions, logits.argmax(1))
    assert found.accuracy == pytest.approx((logits.argmax(1) == examples.labels).double().mean().item())
    assert len(found.predictions) == 300


@pytest.mark.parametrize("count", [1, 2, 8, 9, 10, 17, 33])
def test_batches_hold_every_row_once_and_never_one_alone(count):
    parts = batches(count, 8, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert all(len(part) > 1 for part in parts) or count == 1
    assert max(len(part) for part in parts) <= 9
