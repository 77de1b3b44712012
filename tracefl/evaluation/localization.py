"""Localization metrics, each with its chance level.

The paper calls an answer correct if the named client holds training examples of the label (with faulty clients: if it
is a faulty one). Under mild skew most participants hold most labels, so a random name is often "correct": the paper's
accuracy says little without the score of a uniformly random participant, which stands beside it here.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

Array = np.ndarray


@dataclass(frozen=True)
class Localization:
    """Means over a round's traced inputs; NaN where no input was traced.

    accuracy              the named client is a culprit (the paper's rule)
    chance                the same for a uniformly random participant
    largest_client        the same for always naming the participant with the most examples (a tie: one of them)
    top_holder            the named client holds the most examples of the label
    top_holder_chance     the same for a uniformly random participant
    spearman              rank correlation of contributions with label counts; a random ranking gives 0
    """

    num_inputs: int
    accuracy: float
    chance: float
    largest_client: float
    top_holder: float
    top_holder_chance: float
    spearman: float


def localize(contributions: Array, label_counts: Array, culprits: Array, sizes: Array) -> Localization:
    """Judge the argmax of `contributions` [N, K]; where all shares are the same, nobody is named and nothing judged.

    Args:
        contributions: share of each of K participants in each of N predictions, float [N, K].
        label_counts: training examples of the explained label that each participant holds, int [N, K].
        culprits: whether naming the participant counts as correct, bool [N, K].
        sizes: all training examples of each participant, int [K].
    """
    traced, K = contributions.shape
    decided = (contributions.max(axis=1, initial=-np.inf) > contributions.min(axis=1, initial=np.inf)) | (K == 1)
    contributions, label_counts, culprits = contributions[decided], label_counts[decided], culprits[decided]
    if len(contributions) == 0:
        return Localization(traced, *[float("nan")] * 6)
    inputs = np.arange(len(contributions))
    named = contributions.argmax(axis=1)
    top = (label_counts == label_counts.max(axis=1, keepdims=True)) & (label_counts.max(axis=1, keepdims=True) > 0)
    return Localization(
        num_inputs=traced,
        accuracy=culprits[inputs, named].mean(),
        chance=culprits.mean(),
        largest_client=culprits[:, sizes == sizes.max()].mean(),
        top_holder=top[inputs, named].mean(),
        top_holder_chance=top.mean(),
        spearman=_mean_spearman(contributions, label_counts),
    )


@dataclass(frozen=True)
class FaultNaming:
    """How well a ranking names all faulty clients. Means over a round's traced inputs; NaN where there were none.

    Of F faulty clients in the federation, M among the K participants, the F ranked first (at most K) are named: whoever
    looks for them knows how many there are, not how many take part.

    precision     faulty ones among the named / named;                     chance M / K
    recall        faulty ones among the named / M;                         chance min(F, K) / K
    ranks         mean rank, from 1, of each faulty participant [M];       chance (K + 1) / 2
    """

    precision: float
    precision_chance: float
    recall: float
    recall_chance: float
    ranks: Array
    rank_chance: float


def name_faulty(ranks: Array, faulty: Array, count: int) -> FaultNaming:
    """Judge `ranks`, int [N, K] from 1, where `faulty`, bool [K], are M >= 1 of the `count` faulty clients."""
    K, M, named = len(faulty), faulty.sum(), min(count, len(faulty))
    if len(ranks) == 0:
        nan = float("nan")
        return FaultNaming(nan, nan, nan, nan, np.full(M, nan), nan)
    hits = (ranks[:, faulty] <= named).sum(axis=1).mean()
    return FaultNaming(
        precision=hits / named,
        precision_chance=M / K,
        recall=hits / M,
        recall_chance=named / K,
        ranks=ranks[:, faulty].mean(axis=0),
        rank_chance=(K + 1) / 2,
    )


def _mean_spearman(contributions: Array, label_counts: Array) -> float:
    """Mean over the inputs whose label counts differ between participants."""
    pairs = [
        (c, n)
        for c, n in zip(contributions, label_counts, strict=True)
        if len(np.unique(n)) > 1 and len(np.unique(c)) > 1
    ]
    return float(np.mean([spearmanr(c, n).statistic for c, n in pairs])) if pairs else float("nan")
