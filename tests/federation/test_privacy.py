"""Differential privacy: the released model is the clipped mean and the noise that can be drawn again."""

import math

import pytest
import torch

from tests.federation.instant import START, state_of
from tests.federation.test_aggregation import run_rounds
from tests.federation.test_recorder import files
from tracefl.federation.noise import gaussian_noise, noise_std
from tracefl.federation.privacy import epsilon

PRIVATE = ("noise_multiplier=0.5", "clipping_norm=3")


def clipped_mean(run) -> torch.Tensor:
    """Two-line reference: the incoming model is zero, every client weighs the same."""
    states = [state_of(int(client.id), 1) for client in run.round(1).clients]
    norms = [torch.cat([state["w"], state["a"].flatten()]).double().norm().item() for state in states]
    clipped = [state["w"].double() * min(1.0, 3 / norm) for state, norm in zip(states, norms, strict=True)]
    return sum(clipped) / len(clipped)


def test_the_release_is_the_clipped_mean_plus_the_noise_of_seed_and_round(config, tmp_path):
    run = run_rounds(config, tmp_path, "fedavg", *PRIVATE, upto=(1,))
    noise = gaussian_noise("w", START["w"], noise_std(0.5, 3, 4), seed=0, server_round=1)
    torch.testing.assert_close(run.global_state(1)["w"], (clipped_mean(run) + noise).float())
    assert noise.abs().sum() > 0
    assert [client.weight for client in run.round(1).clients] == [0.25] * 4
    assert all(client.num_examples == 10 + int(client.id) for client in run.round(1).clients)


def test_updates_are_recorded_as_received_and_statistics_stay_out_of_norm_and_noise(config, tmp_path):
    run = run_rounds(config, tmp_path, "fedavg", *PRIVATE, upto=(1,))
    clients = run.round(1).clients
    for client in clients:
        for name, value in state_of(int(client.id), 1).items():
            assert torch.equal(run.round(1).client_state(client.id)[name], value)
    mean = sum(state_of(int(client.id), 1)["bn.running_var"] for client in clients) / len(clients)
    torch.testing.assert_close(run.global_state(1)["bn.running_var"], mean)


def test_a_private_run_repeats_and_resumes_to_the_byte(config, tmp_path):
    run_rounds(config, tmp_path / "a", "fedavg", *PRIVATE)
    run_rounds(config, tmp_path / "b", "fedavg", *PRIVATE, upto=(1, 3))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_client_that_changes_nothing_is_averaged_in(config, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.federation.instant.state_of", lambda *_: START)
    run = run_rounds(config, tmp_path, "fedavg", "noise_multiplier=0", "clipping_norm=1", upto=(1,))
    assert torch.equal(run.global_state(1)["w"], START["w"])


def test_noise_has_its_standard_deviation_and_differs_by_round_and_tensor():
    like = torch.zeros(200_000)
    draws = [gaussian_noise(name, like, 0.3, 0, t) for t, name in ((1, "a"), (1, "b"), (2, "a"))]
    for draw in draws:
        assert draw.std().item() == pytest.approx(0.3, rel=0.01)
        assert abs(draw.mean().item()) < 0.004
    assert abs(torch.corrcoef(torch.stack(draws)) - torch.eye(3)).max() < 0.02


def test_epsilon_grows_with_rounds_and_falls_with_noise():
    assert epsilon(1.0, 1, 10, 10) < epsilon(1.0, 5, 10, 10) < epsilon(0.5, 5, 10, 10)
    assert math.isinf(epsilon(0.0, 1, 10, 10))
    # the Gaussian mechanism with z = 1 at delta 1e-5, known to lie between its tight value 4.38 and the classical bound
    assert 4.3 < epsilon(1.0, 1, 10, 10) < math.sqrt(2 * math.log(1.25 / 1e-5)) + 0.5
