"""A number beside its chance level, and the rank correlation: what answers are judged by."""

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray
NAN = float("nan")


class Judged(NamedTuple):
    """A metric's value, and the value that a uniformly random participant (or ranking) gets."""

    value: float
    chance: float = NAN


def spearman(a: Array, b: Array) -> Array:
    """Rank correlation of the rows of `a` and `b`.

    Args:
        a: numbers, [N, M].
        b: numbers, [N, M].

    Returns:
        float [N]; equal numbers share their mean rank; NaN for a row of equal numbers.

    Example:
        >>> a, b = np.array([[1, 2, 3], [1, 2, 3]]), np.array([[5, 7, 9], [2, 1, 0]])
        >>> spearman(a, b).round(6).tolist()
        [1.0, -1.0]
    """
    ranks = [rankdata(values, axis=1) for values in (a, b)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = 1 / max(x.shape[1] - 1, 1)
    with np.errstate(invalid="ignore"):
        xy, xx, yy = (scale * product.sum(axis=1) for product in (x * y, x * x, y * y))
        return xy / np.sqrt(yy) / np.sqrt(xx)  # in this order as scipy's spearmanr, to the last bit
