"""FedDebug: the count of lonely neurons against enumerated subsets, activations by hand, and models really trained."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tracefl.data.examples import Examples
from tracefl.evaluation.feddebug import (
    CANDIDATES,
    IMAGES,
    active_neurons,
    debug_round,
    judge_votes,
    observe,
    random_images,
    suspects,
)
from tracefl.evaluation.stopwatch import Stopwatch
from tracefl.models import exchanged_state
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import Evaluation, train


def enumerated(active: np.ndarray, left: list[int]) -> list[int]:
    """The published procedure: all clients whose absence leaves a subset with the most neurons in common."""
    useful = active[:, ~active[left].all(axis=0)]
    agreement = {
        (set(left) - set(subset)).pop(): useful[list(subset)].all(axis=0).sum()
        for subset in combinations(left, len(left) - 1)
    }
    return [k for k, count in agreement.items() if count == max(agreement.values())]


@settings(max_examples=60, deadline=None)
@given(K=st.integers(2, 7), neurons=st.integers(1, 40), share=st.floats(0.3, 0.95), seed=st.integers(0, 999))
def test_counting_agrees_with_enumerating(K, neurons, share, seed):
    rng = np.random.default_rng(seed)
    active = rng.random((K, neurons)) < share
    left = list(range(K))
    for k in suspects(active.astype(np.uint8), K - 1, rng):
        assert k in enumerated(active, left)
        left.remove(k)


def test_the_order_of_equal_suspects_does_not_decide():
    same = np.ones((4, 9), dtype=np.uint8)
    named = {suspects(same, 1, np.random.default_rng(seed))[0] for seed in range(40)}
    assert named == {0, 1, 2, 3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 100, 10)

    def forward(self, x):
        return self.head(nn.functional.relu(self.norm(self.conv(x)), inplace=True).flatten(1))


def test_activations_by_hand_and_no_nan_from_a_layer_of_zeros():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]]))
        model[1].bias.zero_()
        model[3].weight.zero_()
        model[3].bias.zero_()
    active, predicted = active_neurons(model, torch.tensor([[[0.001, 1.0, 0.5]]]), 0.003)
    assert active.tolist() == [[False, True, True, False, False, False]]
    assert predicted.tolist() == [0]
    assert not active_neurons(model, torch.zeros(1, 1, 3), 0.0)[0].any()


def test_random_images_repeat():
    first, again = (random_images(4, torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.shape == (4, 3, 32, 32)
    assert torch.equal(first, again)


def test_picky_images_are_those_on_which_three_agree():
    torch.manual_seed(0)
    model = Net()
    states = [{name: value.clone() for name, value in exchanged_state(Net()).items()} for _ in range(7)]
    for state in states:  # sees the noise alone, not what all images share
        state["conv.weight"] -= state["conv.weight"].mean(dim=(2, 3), keepdim=True)
        state["conv.bias"].zero_()
        state["head.bias"].zero_()
    seed = [0, 1]
    first = observe(model, states, 0.003, picky=False, seed=seed)
    picked = observe(model, states, 0.003, picky=True, seed=seed)
    assert first.shape == picked.shape == (7, IMAGES, -(-(8 * 100 + 10) // 8))

    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    images = random_images(CANDIDATES, generator)
    votes = []
    for state in states:
        model.load_state_dict(state, strict=False)
        votes.append(active_neurons(model, images, 0.003)[1].tolist())
    agree = [max(map(column.count, column)) >= 3 for column in zip(*votes, strict=True)]
    assert 0 < sum(agree) < CANDIDATES
    expected = sorted(range(CANDIDATES), key=lambda image: not agree[image])[:IMAGES]
    model.load_state_dict(states[0], strict=False)
    bits = active_neurons(model, images[expected], 0.003)[0]
    assert np.array_equal(picked[0], np.packbits(bits.numpy(), axis=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """Five clients trained on digits from one start; client 2 has every label at 0."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images = nn.functional.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, size=32)
    everyone = Examples(images.expand(-1, 3, -1, -1), torch.tensor(digits.target))
    model = Net()
    start = exchanged_state(model)
    start = {name: value.clone() for name, value in start.items()}
    run = Run.create(tmp_path_factory.mktemp("run"), initial=start, clients=[], seed=0)
    sent = []
    for k in range(5):
        examples = everyone[torch.arange(k, 1500, 5)]
        if k == 2:
            examples = Examples(examples.inputs, torch.zeros_like(examples.labels))
        model.load_state_dict(start, strict=False)
        train(model, examples, epochs=3, lr=0.003, batch_size=32, seed=k)
        sent.append(run.record_client(1, str(k), exchanged_state(model), 300, 0.2))
    run.clients = [ClientInfo(str(k), {}) for k in range(5)]
    run.record_round(1, sent, start, Evaluation(0.1, 0.9, torch.zeros(3, dtype=torch.int64)), {})
    return run


FAULTY = ("fault.kind=random_labels", "neuron_activation_threshold=0.003")


def test_a_trained_faulty_client_is_found(trained, config):
    watch = Stopwatch()
    votes = debug_round(config(*FAULTY, "faulty_clients_ids=[2]"), trained, Net(), 1, watch)
    assert votes[["image", "vote"]].to_numpy().tolist() == [[image, 1] for image in range(IMAGES)]
    (row,) = judge_votes(trained, votes, {"2"})
    assert row.chance == 0.2
    assert row.value >= 0.8
    assert [(row["method"], row["localizations"]) for row in watch.rows()] == [("FedDebug", IMAGES)]


def test_several_faults_get_as_many_suspects(trained, config):
    votes = debug_round(config(*FAULTY, "faulty_clients_ids=[2,4,9]"), trained, Net(), 1, Stopwatch())
    assert votes.groupby("image")["client"].nunique().tolist() == [2] * IMAGES
    (row,) = judge_votes(trained, votes, {"2", "4", "9"})
    assert row.chance == 2 / 5
    found = votes["client"].isin({"2", "4"}).sum()  # of two on each of ten images
    assert row.value == found / 20


def test_a_round_without_a_faulty_participant_gets_no_votes(trained, config):
    votes = debug_round(config(*FAULTY, "faulty_clients_ids=[7]"), trained, Net(), 1, Stopwatch())
    assert votes.empty
    (row,) = judge_votes(trained, votes, {"7"})
    assert np.isnan([row.value, row.chance]).all()
