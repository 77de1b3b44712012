"""Every fused model against the fusion that it stands for, in memory and from files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.evidence.small import federation, log_odds_of, value
from tracefl.classifier import exact
from tracefl.evidence import coalitions, game
from tracefl.states import StateFile

torch.set_num_threads(2)


@pytest.fixture(params=["in memory", "in files", "in files, little memory", "tiny tiles"])
def played(request, tmp_path, monkeypatch):
    """(game, round) of five clients, the first of which outweighs the others a million times."""
    model, states, weights, incoming, x, targets = federation(5)
    weights = {**weights, "c0": 1e7}
    sources = {who: StateFile(tmp_path / who) for who in states} if "in files" in request.param else states
    for who, state in states.items():
        save_file(state, tmp_path / who)
    if request.param == "tiny tiles":
        monkeypatch.setattr(game, "TILE", 64)
        monkeypatch.setattr(game, "ROWS", 4)
    p = torch.tensor(list(weights.values()), dtype=torch.float64)
    scratch_bytes = 1 if "little" in request.param else 1 << 30
    round_ = model, states, weights, incoming, x, targets
    return game.Game(
        model, sources, p / p.sum(), incoming, x, targets, "log_odds", "all", scratch_bytes
    ), round_  # fmt: skip


def test_the_ends(played):
    playing, round_ = played
    ids = list(round_[1])
    with exact(playing.work):
        of_model, nobody = playing.of_model(), playing.of_nobody()
        everyone, alone, without = playing.ends()
    assert torch.allclose(of_model, log_odds_of(round_[0], round_[0].state_dict(), *round_[4:]), atol=1e-4)
    assert torch.allclose(nobody, value(*round_, []), atol=1e-4)
    assert torch.allclose(everyone, value(*round_, ids), atol=1e-4)
    for k, who in enumerate(ids):
        assert torch.allclose(alone[k], value(*round_, [who]), atol=1e-4)
        assert torch.allclose(without[k], value(*round_, [other for other in ids if other != who]), atol=1e-4)


def test_every_coalition_in_any_order(played):
    playing, round_ = played
    ids, sets = list(round_[1]), coalitions.members(5)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    with exact(playing.work):
        playing.of_model()
        v = playing.play(sets, playing.of_nobody())
    for row, chosen in zip(v, sets.tolist(), strict=True):
        members = [who for who, takes_part in zip(ids, chosen, strict=True) if takes_part]
        assert torch.allclose(row, value(*round_, members), atol=1e-4)


def test_running_variances_stay_positive_where_all_but_one_client_have_none(tmp_path):
    """Taking that one out of the sum leaves 0, not a negative number, whose root is no number."""
    model, states, weights, incoming, x, targets = federation(5)
    for who, state in states.items():
        state["1.running_var"].fill_(1e6 if who == "c3" else 0)
        save_file(state, tmp_path / who)
    p = torch.tensor(list(weights.values()), dtype=torch.float64)
    p /= p.sum()
    for sources in (states, {who: StateFile(tmp_path / who) for who in states}):
        playing = game.Game(model, sources, p, incoming, x, targets, "log_odds", "all", 1 << 30)
        with exact(playing.work):
            playing.of_model()
            without = playing.ends()[2][3]
        assert torch.allclose(
            without, value(model, states, weights, incoming, x, targets, ["c0", "c1", "c2", "c4"]), rtol=1e-3
        )
