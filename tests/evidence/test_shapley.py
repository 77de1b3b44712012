"""trace(method="shapley"): values by definition, the laws of Shapley values, honest errors, few reads."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.evidence.small import federation, log_odds_of, nonlinear, value
from tracefl import TraceFLError, trace
from tracefl.evidence import coalitions
from tracefl.evidence.shapley import values

torch.set_num_threads(2)


def shapley(model, states, weights, incoming, x, targets, **changed):
    given = {"targets": targets, "weights": weights, "reference": incoming, "method": "shapley"}
    return trace(model, states, x, **{**given, **changed})


def by_definition(model, states, weights, incoming, x, targets):
    """Mean gain over all orders of joining."""
    ids, gains, known = list(states), torch.zeros(len(x), len(states), dtype=torch.float64), {}
    orders = list(itertools.permutations(range(len(ids))))
    for order in orders:
        before = frozenset()
        for k in order:
            after = before | {ids[k]}
            for members in (before, after):
                if members not in known:
                    listed = [who for who in ids if who in members]
                    known[members] = value(model, states, weights, incoming, x, targets, listed)
            gains[:, k] += known[after] - known[before]
            before = after
    return gains / len(orders)


@pytest.mark.parametrize("K", [1, 2, 3, 4, 5])
def test_exact_is_the_mean_over_all_orders(K):
    round_ = federation(K)
    found = shapley(*round_, evaluations=2**K)
    assert torch.allclose(found.contributions, by_definition(*round_), atol=1e-4)
    assert found.standard_error.eq(0).all()
    assert found.contributions.abs().min() > 1e-3


@pytest.mark.parametrize("K", [1, 2, 3])
def test_few_clients_are_exact_by_default(K):
    round_ = federation(K)
    assert torch.equal(shapley(*round_).contributions, shapley(*round_, evaluations=2**K).contributions)


@pytest.mark.parametrize("evaluations", [None, 20, 30, 64])
def test_shares_and_residual_add_up_to_the_change(evaluations):
    model, states, weights, incoming, x, targets = federation(6)
    found = shapley(model, states, weights, incoming, x, targets, evaluations=evaluations)
    everyone = value(model, states, weights, incoming, x, targets, list(states))
    nobody = log_odds_of(model, incoming, x, targets)
    of_model = log_odds_of(model, model.state_dict(), x, targets)
    assert torch.allclose(found.contributions.sum(1), everyone - nobody, atol=1e-4)
    assert torch.allclose(found.residual, of_model - everyone, atol=1e-4)
    assert torch.allclose(found.change, of_model - nobody, atol=1e-4)
    assert (found.residual.abs() > 1e-3).any()
    assert found.completeness_error.max() < 1e-9
    assert found.by_layer.shape == (1, 3, 6)
    assert found.layers == ["the whole model"]


def test_the_default_is_near_and_does_not_claim_to_know_its_error():
    round_ = federation(8, N=6, spread=0.5)
    exact = shapley(*round_, evaluations=256).contributions
    found = shapley(*round_)
    assert found.standard_error.isnan().all()
    assert (found.contributions - exact).abs().mean() < 0.1 * exact.abs().mean()
    assert (found.contributions - exact).abs().max() > 1e-6  # it is no table of all coalitions


@pytest.mark.parametrize("evaluations", [None, 24, 128])
def test_clients_that_do_the_same_get_the_same(evaluations):
    model, states, weights, incoming, x, targets = federation(7)
    states["c3"], weights["c3"] = states["c1"], weights["c1"]
    found = shapley(model, states, weights, incoming, x, targets, evaluations=evaluations)
    twins, error = found.contributions[:, [1, 3]], found.standard_error[:, [1, 3]]
    if evaluations == 24:  # which coalitions are drawn tells them apart, within the error
        assert ((twins[:, 0] - twins[:, 1]).abs() < 4 * error.sum(1)).all()
    else:
        assert torch.allclose(twins[:, 0], twins[:, 1], atol=1e-5)
    assert (found.contributions[:, 0] - twins[:, 0]).abs().min() > 1e-3


@pytest.mark.parametrize("evaluations", [None, 20, 32])
def test_a_client_of_weight_zero_gets_exactly_zero_and_changes_nothing(evaluations):
    model, states, weights, incoming, x, targets = federation(5)
    alone = shapley(model, states, weights, incoming, x, targets, evaluations=evaluations)
    broken = {name: torch.full_like(w, torch.nan) for name, w in incoming.items() if w.is_floating_point()}
    states, weights = {"idle": broken, **states}, {"idle": 0, **weights}
    found = shapley(model, states, weights, incoming, x, targets, evaluations=evaluations)
    assert found.client_ids == ["idle", "c0", "c1", "c2", "c3", "c4"]
    assert found.contributions[:, 0].eq(0).all()
    assert found.standard_error[:, 0].eq(0).all()
    assert torch.equal(found.contributions[:, 1:], alone.contributions)


def test_clients_permuted():
    model, states, weights, incoming, x, targets = federation(6)
    found = shapley(model, states, weights, incoming, x, targets).contributions
    order = ["c4", "c0", "c5", "c2", "c1", "c3"]
    again = shapley(model, {who: states[who] for who in order}, weights, incoming, x, targets).contributions
    assert torch.allclose(again, found[:, [4, 0, 5, 2, 1, 3]], atol=1e-5)


def test_inputs_alone_and_together_and_in_little_memory():
    model, states, weights, incoming, x, targets = federation(6, N=7)
    found = shapley(model, states, weights, incoming, x, targets, evaluations=30)
    apart = [
        shapley(model, states, weights, incoming, x[n : n + 1], targets[n : n + 1], evaluations=30) for n in range(7)
    ]
    assert torch.allclose(found.contributions, torch.cat([one.contributions for one in apart]), atol=1e-4)
    tight = shapley(model, states, weights, incoming, x, targets, evaluations=30, scratch_bytes=1)
    assert torch.allclose(found.contributions, tight.contributions, atol=1e-4)


def test_the_same_call_gives_the_same_numbers():
    round_ = federation(7)
    first, second = (shapley(*round_, evaluations=40) for _ in range(2))
    assert torch.equal(first.contributions, second.contributions)
    assert torch.equal(first.standard_error, second.standard_error)


def test_files_are_read_at_most_twice_and_give_the_same(tmp_path, monkeypatch):
    from tracefl import states as module

    model, states, weights, incoming, x, targets = federation(9)
    files = {}
    for who, state in {**states, "incoming": incoming}.items():
        files[who] = tmp_path / f"{who}.safetensors"
        save_file(state, files[who])
    read, found = {}, module.StateFile.__getitem__

    def counting(self, name):
        read[self._file.stem, name] = read.get((self._file.stem, name), 0) + 1
        return found(self, name)

    monkeypatch.setattr(module.StateFile, "__getitem__", counting)
    reference = files.pop("incoming")
    from_files = shapley(model, files, weights, reference, x, targets)
    assert {count for (who, _), count in read.items() if who != "incoming"} == {2}
    assert {who for who, _ in read} == {*states, "incoming"}
    in_memory = shapley(model, states, weights, incoming, x, targets)
    assert torch.allclose(from_files.contributions, in_memory.contributions, atol=1e-4)
    sampled = [
        shapley(model, c, weights, r, x, targets, evaluations=40) for c, r in ((files, reference), (states, incoming))
    ]
    assert torch.allclose(sampled[0].contributions, sampled[1].contributions, atol=1e-4)


def test_the_model_and_the_states_stay_as_they_were():
    model, states, weights, incoming, x, targets = federation(5)
    model.train()
    before = [{name: w.clone() for name, w in s.items()} for s in (model.state_dict(), incoming, *states.values())]
    shapley(model, states, weights, incoming, x, targets, evaluations=16)
    after = [model.state_dict(), incoming, *states.values()]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_clients_do_not_send_stays_as_in_the_model():
    model, states, weights, incoming, x, targets = federation(5)
    head = {who: {name: w for name, w in s.items() if name.startswith("3.")} for who, s in states.items()}
    full = {who: {**model.state_dict(), **s} for who, s in head.items()}
    held = {**model.state_dict(), **{name: w for name, w in incoming.items() if name.startswith("3.")}}
    found = shapley(model, head, weights, incoming, x, targets, evaluations=32)
    assert torch.allclose(found.contributions, by_definition(model, full, weights, held, x, targets), atol=1e-4)
    chosen = shapley(model, states, weights, incoming, x, targets, evaluations=32, layers=["3"])
    assert torch.equal(chosen.contributions, found.contributions)
    assert chosen.layers == ["the chosen layers"]


def test_logits_can_be_explained_and_predictions_are_the_default():
    model, states, weights, incoming, x, _ = federation(3)
    found = shapley(model, states, weights, incoming, x, None, output="logit")
    predicted = model(x).argmax(1)
    assert torch.equal(found.targets, predicted)
    moved = model(x).gather(1, predicted[:, None])[:, 0].detach().double()
    model.load_state_dict(incoming)
    moved -= model(x).gather(1, predicted[:, None])[:, 0].detach().double()
    assert torch.allclose(found.change, moved, atol=1e-5)


def test_half_precision_and_double_precision():
    model, states, weights, incoming, x, targets = federation(5)
    found = shapley(model.half(), states, weights, incoming, x.half(), targets)
    assert found.contributions.dtype == torch.float64
    double = shapley(model.double(), states, weights, incoming, x.half().double(), targets)
    assert torch.allclose(found.contributions, double.contributions, atol=1e-3)


def test_thirty_clients():
    round_ = federation(30, spread=0.5)
    near, more = shapley(*round_), shapley(*round_, evaluations=400)
    assert near.contributions.shape == (3, 30)
    off = (near.contributions - more.contributions).abs()
    assert off.mean() < 0.2 * more.contributions.abs().mean()
    assert more.standard_error.isfinite().all()
    assert more.standard_error.min() > 0
    assert more.completeness_error.max() < 1e-9


def test_two_hundred_clients():
    found = shapley(*federation(200))
    assert found.contributions.isfinite().all()
    assert found.completeness_error.max() < 1e-9


def test_the_frame_has_the_standard_error():
    found = shapley(*federation(4))
    assert found.to_frame()["standard_error"].isna().all()
    assert shapley(*federation(4), evaluations=16).to_frame()["standard_error"].tolist() == [0.0] * 12


@pytest.mark.parametrize("evaluations", [0, 9, 11, -1, 13, True, 10.0, "10"])
def test_evaluations_that_make_no_sense(evaluations):
    expected = r"evaluations must be 10 or at least 14 for 4 clients with weight above 0, got "
    with pytest.raises(TraceFLError, match=expected):
        shapley(*federation(4), evaluations=evaluations)


def test_weights_and_reference_are_needed():
    model, states, weights, incoming, x, targets = federation(4)
    with pytest.raises(TraceFLError, match="method='shapley' needs weights"):
        shapley(model, states, None, incoming, x, targets)
    with pytest.raises(TraceFLError, match="method='shapley' needs reference"):
        shapley(model, states, weights, None, x, targets)


def test_states_that_do_not_fit_are_named():
    model, states, weights, incoming, x, targets = federation(4)
    for wrong, expected in (
        ({"0.weight": torch.zeros(1)}, "client 'c2': tensor '0.weight' must be a Tensor of the model's shape"),
        ({"0.bias": torch.full((6,), torch.nan)}, "client 'c2': tensor '0.bias' has values that are not finite"),
        ({"other": torch.zeros(1)}, "client 'c2': tensor 'other' is not in the model"),
    ):
        with pytest.raises(TraceFLError, match=expected.replace("(", r"\(")):
            shapley(model, {**states, "c2": {**states["c2"], **wrong}}, weights, incoming, x, targets)
    with pytest.raises(TraceFLError, match=r"reference: tensor '0.bias' has values that are not finite"):
        shapley(model, states, weights, {**incoming, "0.bias": torch.full((6,), torch.nan)}, x, targets)
    counts = {who: {"1.num_batches_tracked": torch.tensor(3)} for who in states}
    with pytest.raises(TraceFLError, match="no client sends a floating-point tensor"):
        shapley(model, counts, weights, incoming, x, targets)


class OneByOne(nn.Module):
    """Takes no batch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x):
        return self.inner(x.view(1, 5))


def test_a_model_that_takes_no_batch():
    torch.manual_seed(0)
    model, x = OneByOne(), torch.randn(4, 5)
    states = {f"c{k}": {name: torch.randn_like(w) for name, w in model.state_dict().items()} for k in range(4)}
    incoming = {name: torch.randn_like(w) for name, w in model.state_dict().items()}
    given = {"weights": dict.fromkeys(states, 1), "reference": incoming, "method": "shapley"}
    found = trace(model, states, x, targets=[0, 1, 2, 0], **given)
    plain = nn.Linear(5, 3)
    renamed = [{name[6:]: w for name, w in s.items()} for s in (model.state_dict(), incoming, *states.values())]
    plain.load_state_dict(renamed[0])
    given["reference"] = renamed[1]
    batched = trace(plain, dict(zip(states, renamed[2:], strict=True)), x, targets=[0, 1, 2, 0], **given)
    assert torch.allclose(found.contributions, batched.contributions, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("evaluations", [30, 60, 120])
def test_sampling_is_unbiased_and_its_intervals_hold(evaluations):
    """Over 300 seeds: the mean is the truth within its own error, and 95 % intervals hold 90 to 99 %."""
    held, biases = [], []
    for game_seed in range(3):
        game = nonlinear(8, 4, game_seed)
        truth = coalitions.shapley(game.v)
        found = [values(game, game.v[0], evaluations, seed) for seed in range(100)]
        phi, error = (torch.stack(some) for some in zip(*found, strict=True))
        held.append(((phi - truth).abs() <= 1.96 * error).double().mean())
        biases.append((phi.mean(0) - truth) / (phi.std(0) / 10))  # standard normal if unbiased
        default, _ = values(game, game.v[0], 18)
        assert (default - truth).abs().mean() > 3 * (phi.mean(0) - truth).abs().mean()
    assert 0.90 <= torch.stack(held).mean() <= 0.99
    biases = torch.stack(biases)
    assert biases.abs().max() < 4.5
    assert biases.square().mean() < 1.7


def test_as_many_models_are_evaluated_as_asked_for():
    for evaluations in (18, 22, 50, 255, 256):
        game = nonlinear(8, 2)
        values(game, game.v[0], evaluations)
        assert game.played == evaluations - (1 if evaluations < 256 else 0)  # v(∅) is handed in
