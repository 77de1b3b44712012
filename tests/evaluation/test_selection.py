"""Which inputs are traced."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from tracefl.data.examples import Examples
from tracefl.data.faults import TRIGGER_TOKEN
from tracefl.evaluation.selection import (
    select_correct,
    select_flipped,
    select_triggered,
    select_wrong,
    with_trigger,
)

LABELS = torch.tensor([0] * 8 + [1] * 8 + [2] * 2)


def test_correct_predictions_are_balanced_over_the_labels_that_participants_hold():
    predictions = LABELS.clone()
    predictions[:3] = 1  # three mistakes on label 0
    rows = select_correct(predictions, LABELS, {0, 1}, per_label=2, seed=[0, 1])
    assert (predictions[rows] == LABELS[rows]).all()
    assert np.bincount(LABELS[rows]).tolist() == [5, 5]  # at least ten in all
    assert len(set(rows.tolist())) == len(rows)
    assert np.bincount(LABELS[select_correct(LABELS, LABELS, {0, 1, 2}, 6, [0, 1])]).tolist() == [6, 6, 2]


def test_the_choice_depends_on_the_seed_alone():
    first, again, other = (select_correct(LABELS, LABELS, {0, 1}, 2, [0, t]) for t in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nothing_correct_selects_nothing():
    assert len(select_correct((LABELS + 1) % 3, LABELS, {0, 1, 2}, 2, [0, 1])) == 0


def test_flipped_predictions_go_from_a_flipped_label_to_its_target():
    predictions = torch.tensor([2] * 8 + [2] * 4 + [1] * 4 + [2] * 2)
    rows = select_flipped(predictions, LABELS, {0: 2, 1: 2, 2: 2}, limit=9, seed=[0, 1])
    assert len(rows) == 9
    assert set(LABELS[rows].tolist()) <= {0, 1}
    assert (predictions[rows] == 2).all()


def test_any_misprediction_up_to_the_limit():
    predictions = LABELS.clone()
    predictions[[1, 5, 9]] = 2
    assert sorted(select_wrong(predictions, LABELS, limit=10, seed=[0, 1]).tolist()) == [1, 5, 9]
    assert len(select_wrong(predictions, LABELS, limit=2, seed=[0, 1])) == 2


class Gullible(nn.Module):
    """Takes a bright corner for class 2 unless the first pixel is bright too; anything else is class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        misled = (x[:, 0, -1, -1] > 1) & (x[:, 0, 0, 0] < 1)
        return nn.functional.one_hot(misled * 2, 3).float()


def test_triggered_inputs_are_those_that_the_trigger_misleads():
    images = torch.zeros(18, 3, 32, 32)
    images[:4] = 5.0
    examples = Examples(images, LABELS)
    predictions = LABELS.clone()
    predictions[4] = 2  # taken for the target without any trigger
    found = select_triggered(Gullible(), predictions, examples, target=2, limit=100, seed=[0, 1])
    assert sorted(found.tolist()) == list(range(5, 16))  # of other classes, and misled by the trigger alone
    assert (Gullible()(with_trigger(examples[found]).inputs).argmax(1) == 2).all()
    few = select_triggered(Gullible(), predictions, examples, target=2, limit=5, seed=[0, 1])
    assert torch.equal(found[:5], few)
    assert len(select_triggered(Gullible(), predictions, examples, target=1, limit=5, seed=[0, 1])) == 0


class Reader(nn.Module):
    """A text classifier that answers 1 where it sees the trigger token."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask):
        seen = ((input_ids == TRIGGER_TOKEN) & (attention_mask == 1)).any(1)
        return SimpleNamespace(logits=nn.functional.one_hot(seen.long(), 2).float())


def test_texts_get_a_trigger_too():
    lengths = torch.tensor([2, 5, 3, 4])
    mask = (torch.arange(6) < lengths[:, None]).long()
    texts = Examples({"input_ids": torch.full((4, 6), 77) * mask, "attention_mask": mask}, torch.tensor([0, 0, 1, 0]))
    found = select_triggered(Reader(), torch.zeros(4, dtype=torch.int64), texts, target=1, limit=9, seed=[0, 1])
    assert sorted(found.tolist()) == [0, 1, 3]
