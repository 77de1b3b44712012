"""Every fault changes the named examples, in the named share, and nothing else."""

import json

import pytest
import torch

from tracefl.data.examples import Examples, normalize
from tracefl.data.faults import (
    PATCH,
    SIGN_FLIP_SCALE,
    TRIGGER_PLACE,
    TRIGGER_TOKEN,
    fault_settings,
    faulty_examples,
    flip_labels,
    flipped_label_counts,
    opposite,
    put_trigger,
)
from tracefl.data.prepare import prepare

LABELS = torch.arange(100) % 10
PIXELS = torch.randint(0, 256, (100, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGES = Examples(normalize(PIXELS), LABELS)


def flipped(rates: dict[int, float]) -> torch.Tensor:
    return flip_labels(LABELS, [(a, (a + 1) % 10, rate) for a, rate in rates.items()], torch.Generator().manual_seed(0))


def flip_rates(config) -> dict[int, float]:
    """The share of each flipped label's examples that is flipped, by label."""
    return {label: share for label, _, share in fault_settings(config, 10)["flips"]}


def faulty(kind: str, share: float = 1.0, target: int = 3, seed: int = 0, examples: Examples = IMAGES) -> Examples:
    fault = {"kind": kind, "share": share, "target": target, "flips": [], "num_classes": 10}
    return faulty_examples(examples, fault, seed)


def test_a_full_flip_uses_the_original_labels():
    assert torch.equal(flipped({3: 1.0, 4: 1.0}), torch.where((LABELS == 3) | (LABELS == 4), LABELS + 1, LABELS))


def test_a_share_of_the_examples_is_flipped():
    changed = flipped({3: 0.4}) != LABELS
    assert changed.sum() == 4
    assert (LABELS[changed] == 3).all()


def test_a_rate_of_zero_changes_nothing():
    assert torch.equal(flipped({3: 0.0}), LABELS)


def test_random_labels_are_others_in_the_named_share():
    changed = faulty("random_labels", share=0.6).labels
    assert (changed != LABELS).sum() == 60
    assert set(changed.tolist()) == set(range(10))
    many = Examples(torch.zeros(20_000, 1), torch.full((20_000,), 9))
    counts = faulty("random_labels", examples=many).labels.bincount()
    assert len(counts) == 9  # never the old one
    assert (counts - 20_000 / 9).abs().max() < 200


def test_a_backdoor_shows_the_trigger_where_the_label_is_the_target():
    poisoned = faulty("backdoor", share=0.3)
    touched = (poisoned.inputs != IMAGES.inputs).flatten(1).any(1)
    assert touched.sum() == 30
    assert (poisoned.labels[touched] == 3).all()
    assert torch.equal(poisoned.labels[~touched], LABELS[~touched])
    bright = PIXELS.clone()
    bright[touched, :, -PATCH:, -PATCH:] = 255
    assert torch.equal(poisoned.inputs, normalize(bright))  # as if put on the stored bytes


def test_a_trigger_on_texts_is_a_token_that_the_model_sees():
    texts = {"input_ids": torch.full((4, 8), 77), "attention_mask": torch.zeros(4, 8, dtype=torch.int64)}
    triggered = put_trigger(texts, torch.tensor([0, 2]))
    assert (triggered["input_ids"] == TRIGGER_TOKEN).nonzero().tolist() == [[0, TRIGGER_PLACE], [2, TRIGGER_PLACE]]
    assert triggered["attention_mask"].nonzero().tolist() == [[0, TRIGGER_PLACE], [2, TRIGGER_PLACE]]
    assert (texts["input_ids"] == 77).all()


@pytest.mark.parametrize("kind", ["random_labels", "backdoor"])
def test_faulty_data_depend_on_the_seed_alone(kind):
    first, again, other = (faulty(kind, share=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)


@pytest.mark.parametrize("kind", ["free_rider", "sign_flip"])
def test_faults_of_the_model_leave_the_data(kind):
    assert torch.equal(faulty(kind).labels, LABELS)


def test_the_opposite_update_keeps_variances_valid():
    received = {"w": torch.tensor([1.0, 2.0]), "bn.running_var": torch.tensor([1.0, 1.0, 0.5])}
    trained = {"w": torch.tensor([1.5, 1.0]), "bn.running_var": torch.tensor([9.0, 1.1, 0.4])}
    sent = opposite(received, trained)
    s = SIGN_FLIP_SCALE
    assert torch.equal(sent["w"], torch.tensor([1 - 0.5 * s, 2 + s]))
    assert sent["bn.running_var"].tolist() == pytest.approx([0.1, 1 - 0.1 * s, 0.5 + 0.1 * s])


def test_noise_rate_is_a_share_for_all_labels_or_per_label(config):
    faults = ("faulty_clients_ids=[1]", "label2flip={3:4,5:6}")
    assert flip_rates(config(*faults)) == {3: 1.0, 5: 1.0}
    assert flip_rates(config(*faults, "noise_rate=0.5")) == {3: 0.5, 5: 0.5}
    assert flip_rates(config(*faults, "noise_rate={3:0.25}")) == {3: 0.25, 5: 1.0}
    artifact = config("faulty_clients_ids=[8]", "label2flip={8:7,0:7,1:7}", "noise_rate={8:7,0:7,1:7}")
    assert flip_rates(artifact) == {8: 1.0, 0: 1.0, 1: 1.0}
    assert flip_rates(config()) == {}


def test_a_client_is_told_its_fault_as_json_in_the_order_of_labels(config):
    one, other = (
        config("faulty_clients_ids=[1]", f"label2flip={flips}", "noise_rate={2:0.5}")
        for flips in ("{1:0,2:3}", "{2:3,1:0}")
    )
    fault = fault_settings(one, 10)
    assert fault == fault_settings(other, 10)
    assert json.loads(json.dumps(fault))["flips"] == [[1, 0, 1.0], [2, 3, 0.5]]
    assert (fault["kind"], fault["num_classes"]) == ("label_flip", 10)
    backdoor = fault_settings(
        config("faulty_clients_ids=[1]", "fault.kind=backdoor", "fault.target=3", "noise_rate=0.5"), 4
    )
    assert backdoor == {"kind": "backdoor", "target": 3, "share": 0.5, "num_classes": 4, "flips": []}


def test_the_labels_that_a_faulty_client_trains_on_are_counted(config):
    faults = ("faulty_clients_ids=[4]", "fault.target=7", "noise_rate=0.5")
    for kind in ("random_labels", "backdoor", "free_rider", "sign_flip"):
        c = config(*faults, f"fault.kind={kind}")
        data = prepare(c)
        counts = flipped_label_counts(c, data, "4")
        assert flipped_label_counts(c, data, "5") is None
        if kind in ("free_rider", "sign_flip"):
            assert counts is None
        else:
            assert counts != data.label_counts["4"]
            assert sum(counts.values()) == sum(data.label_counts["4"].values())
            assert kind == "random_labels" or counts[7] >= sum(counts.values()) // 2


def test_flipped_labels_are_counted_by_their_target(config):
    own = prepare(config()).label_counts["4"]
    label, target = max(own, key=own.get), min(set(range(10)) - own.keys())
    c = config("faulty_clients_ids=[4]", f"label2flip={{{label}:{target}}}")
    counts = dict(own)
    counts[target] = counts.pop(label)
    assert flipped_label_counts(c, prepare(c), "4") == counts
