"""Label flips hit the named labels, in the named share, and nothing else."""

import torch

from tracefl.data.faults import flip_labels

LABELS = torch.arange(100) % 10


def flipped(rates: dict[int, float]) -> torch.Tensor:
    label2flip = {label: (label + 1) % 10 for label in rates}
    return flip_labels(LABELS, label2flip, rates, seed=0)


def test_a_full_flip_uses_the_original_labels():
    assert torch.equal(flipped({3: 1.0, 4: 1.0}), torch.where((LABELS == 3) | (LABELS == 4), LABELS + 1, LABELS))


def test_a_share_of_the_examples_is_flipped():
    changed = flipped({3: 0.4}) != LABELS
    assert changed.sum() == 4
    assert (LABELS[changed] == 3).all()


def test_a_rate_of_zero_changes_nothing():
    assert torch.equal(flipped({3: 0.0}), LABELS)
