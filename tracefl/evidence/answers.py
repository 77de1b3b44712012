"""Answers as sets: every client that cannot be told from the first, and nobody where nothing can.

Of input i, client f contributes most. Client k is in the answer if it falls behind by no more than
chance explains,

    c_if - c_ik <= q σ_fk,

σ_fk the standard deviation of that difference. Two things say what it is:

    the standard error    of Shapley values from drawn coalitions. A row of them adds up to a number
                          that is known, so that the errors of two of K clients correlate by
                          -1 / (K - 1):  σ_fk² = (e_f² + e_k²) K / (K - 1)
    other inputs          of the same class: the deviations of c_if - c_ik from the class's mean,
                          squared, over the inputs of this class or of all classes, whichever
                          gives more. Few inputs have few to share, hence the second

q makes up for the choice of the first among K (Gupta's subset selection, 1965): if nothing
distinguishes K clients, the answer still holds any given one of them with the wanted confidence,

    P( max_j (Z_j - Z_k) <= q √2 S ) = confidence,    Z normal,  S² = χ²_ν / ν

ν the degrees of freedom of the spread. A set that would hold everybody says nothing: nobody.
"""

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize, stats
from torch import Tensor

from tracefl.errors import as_sentence, require
from tracefl.judged import NAN, Judged
from tracefl.provenance.result import Provenance

CONFIDENCE = 0.9
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(80)  # of the normal density
_QUANTILES = (np.arange(1000) + 0.5) / 1000


@dataclass(frozen=True)
class AnswerSets:
    """For every prediction the clients that may be behind it.

    Attributes:
        sets: [N] client ids, the largest contribution first; empty where nothing can be told.
        client_ids: all K of them.
        confidence: with which a set holds the client that it is about.
    """

    sets: list[list[str]]
    client_ids: list[str]
    confidence: float

    @property
    def size(self) -> float:
        """Mean number of clients in an answer that names somebody; NaN if none does."""
        sizes = [len(named) for named in self.sets if named]
        return sum(sizes) / len(sizes) if sizes else NAN

    @property
    def nobody(self) -> float:
        """Share of the predictions whose answer names nobody; NaN without predictions."""
        return sum(not named for named in self.sets) / len(self.sets) if self.sets else NAN

    def coverage(self, truth: Sequence[Any]) -> Judged:
        """How often an answer that names somebody holds one of those who are responsible.

        Args:
            truth: of each prediction the responsible client, or a collection of several.

        Returns:
            The share as `value` and, as `chance`, what random sets of the same sizes reach; NaN if
            every answer names nobody.

        Raises:
            TraceFLError: not one entry per prediction, or no client of these.

        Example:
            >>> from tracefl import AnswerSets
            >>> found = AnswerSets([["ann", "bob"], [], ["cid"]], ["ann", "bob", "cid", "dan"], 0.9)
            >>> found.size, round(found.nobody, 2), found.coverage(["bob", "cid", ["ann", "bob"]])
            (1.5, 0.33, Judged(value=0.5, chance=0.5))
        """
        must = f"truth must be {len(self.sets)} clients, one per input"
        require(isinstance(truth, Collection) and not isinstance(truth, str), f"{must}, got {truth!r}")
        require(len(truth) == len(self.sets), f"{must}, got {len(truth)}")
        hits, chances = list[float](), list[float]()
        K = len(self.client_ids)
        for named, one in zip(self.sets, truth, strict=True):
            culprits = {one} if isinstance(one, str) or not isinstance(one, Collection) else set(one)
            unknown = sorted(map(str, culprits - set(self.client_ids)))
            known = f"truth must name clients of {', '.join(self.client_ids[:10])}"
            require(not unknown, f"{known}, got {unknown[0] if unknown else ''}")
            if named:
                hits.append(bool(culprits & set(named)))
                chances.append(1 - math.comb(K - len(culprits), len(named)) / math.comb(K, len(named)))
        return Judged(float(np.mean(hits)), float(np.mean(chances))) if hits else Judged(NAN)


def answer_sets(
    found: Provenance, *, confidence: float = CONFIDENCE, by: Sequence[Hashable] | Tensor | None = None
) -> AnswerSets:
    """The answers as sets: who cannot be told from the client with the largest contribution.

    Args:
        found: contributions of K clients to N predictions.
        confidence: how sure an answer is to hold the client that is first in truth (where
            `found` has standard errors), or first for another input of the class.
        by: groups of inputs whose answers are alike but for chance, [N]. Default: the standard
            error, where `found` has one; else the explained classes.

    Returns:
        Sets of client ids; an empty one where all clients contribute the same, where the set would
        hold everybody, and where every group has a single input, so that no spread is known.

    Raises:
        TraceFLError: confidence is not between 0 and 1, or `by` does not have N entries.

    Example:
        >>> from tracefl import Provenance, answer_sets
        >>> import torch
        >>> contributions = [[5.0, 4.6, 0.1, 0.0], [5.3, 5.6, 0.0, 0.2], [4.8, 5.1, 0.2, 0.1]]
        >>> by_layer = torch.tensor([contributions], dtype=torch.float64)
        >>> ids, targets = ["ann", "bob", "cid", "dan"], torch.tensor([7, 7, 7])
        >>> found = Provenance("influence", ids, targets, by_layer, ["all"])
        >>> answer_sets(found).sets
        [['ann', 'bob'], ['bob', 'ann'], ['bob', 'ann']]
    """
    fine = isinstance(confidence, int | float) and 0 < confidence < 1
    require(fine, f"confidence must be above 0 and below 1, such as 0.9, got {confidence!r}")
    require(isinstance(found, Provenance), f"found must be what trace returns, got a {type(found).__name__}")
    c, error = found.contributions, found.standard_error
    known = by is None and error is not None and not bool(error.isnan().any())
    must = f"by must be {len(c)} groups, one per input"
    with as_sentence(must, "give the name or number of each input's group", TypeError):
        groups = found.targets.tolist() if by is None else by.tolist() if isinstance(by, Tensor) else list(by)
        dict.fromkeys(groups)
    require(len(groups) == len(c), f"{must}, got {len(groups)}")
    named = members(c.numpy(), groups, error.numpy() if known and error is not None else None, confidence)
    order = c.argsort(dim=1, descending=True, stable=True).tolist()
    sets = [[found.client_ids[k] for k in ranked if row[k]] for ranked, row in zip(order, named, strict=True)]
    return AnswerSets(sets, found.client_ids, float(confidence))


def members(
    contributions: np.ndarray, groups: Collection[Hashable], error: np.ndarray | None, confidence: float = CONFIDENCE
) -> np.ndarray:
    """Who is in which answer, bool [N, K].

    Args:
        contributions: float [N, K].
        groups: [N], of inputs whose spread tells what chance does; not used with `error`.
        error: standard errors of the contributions, [N, K], or None.
        confidence: between 0 and 1.
    """
    N, K = contributions.shape
    if K <= 1 or N == 0:
        return np.ones((N, K), dtype=bool)
    first, rows = contributions.argmax(1), np.arange(N)
    behind = contributions[rows, first][:, None] - contributions
    if error is not None:
        drawn = np.maximum((error > 0).sum(1, keepdims=True), 2)  # who was drawn; without any, σ is 0
        variance, freedom = (error[rows, first][:, None] ** 2 + error**2) * drawn / (drawn - 1), math.inf
    else:
        variance, freedom = _spread(contributions, first, groups)
        if freedom == 0:
            return np.zeros((N, K), dtype=bool)
    named = behind <= critical(confidence, K, freedom) * np.sqrt(variance)
    named[rows, first] = True
    return named & ~named.all(1, keepdims=True)


def _spread(contributions: np.ndarray, first: np.ndarray, groups: Collection[Hashable]) -> tuple[np.ndarray, float]:
    """σ_fk² for each input, [N, K], and the degrees of freedom of that of all groups."""
    number = {group: g for g, group in enumerate(dict.fromkeys(groups))}
    group = np.array([number[name] for name in groups])
    inputs = np.bincount(group)
    sums = np.zeros((len(inputs), contributions.shape[1]))
    np.add.at(sums, group, contributions)
    deviations = contributions - (sums / inputs[:, None])[group]
    freedom = len(group) - len(inputs)
    variance = np.zeros_like(contributions)
    for g, f in {(g, f) for g, f in zip(group.tolist(), first.tolist(), strict=True)}:
        squares = (deviations[:, f : f + 1] - deviations) ** 2
        of_group = squares[group == g].sum(0) / max(inputs[g] - 1, 1)
        variance[(group == g) & (first == f)] = np.maximum(squares.sum(0) / max(freedom, 1), of_group)
    return variance, freedom


@lru_cache
def critical(confidence: float, K: int, freedom: float) -> float:
    """q: how many standard deviations of a difference the first of K alike clients leads by chance.

    Example:
        >>> round(critical(0.9, 2, math.inf), 3), round(critical(0.9, 10, math.inf), 3)  # 2: normal
        (1.282, 2.109)
    """
    S = np.ones(1) if math.isinf(freedom) else np.sqrt(stats.chi2.ppf(_QUANTILES, freedom) / freedom)

    def missing(q: float) -> float:
        below = stats.norm.cdf(_NODES + q * math.sqrt(2) * S[:, None]) ** (K - 1)
        return float((below @ _WEIGHTS).mean() / _WEIGHTS.sum() - confidence)

    if missing(0.0) >= 0:
        return 0.0
    upper = 4.0
    while missing(upper) < 0 and upper < 1e6:
        upper *= 4
    return float(optimize.brentq(missing, 0.0, upper, xtol=1e-6)) if missing(upper) >= 0 else upper
