"""Shapley values of a game r from some of its coalitions: unbiased, with standard errors.

With z_k(S) = K / |S| for a member of S and -K / (K - |S|) for another client,

    φ_k = (r(all) - r(∅)) / K + 1/K Σ_{t=1}^{K-1} D_kt,     D_kt = mean of z_k(S) r(S) over |S| = t,

the mean with k less the mean without: every coalition serves every client. Sizes are cut into
strata. Of a stratum n coalitions are drawn, and D is estimated by the covariance of z_k and r over
them, which is unbiased since z_k has mean 0 in every size. Σ_k z_k = 0, so the estimates always add
up to r(all) - r(∅). Marginal contributions of fused models shrink as 1 / t, so the small sizes get
the most draws, and the large ones share a stratum while draws are few.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

FEWEST = 4  # draws of a stratum


@dataclass(frozen=True)
class Stratum:
    """n draws of coalitions of some sizes; of one size without, of several with replacement."""

    sizes: tuple[int, ...]
    n: int


def stratified(K: int, draws: int) -> list[Stratum]:
    """Strata of sizes 2 to K - 2 for that many draws, at least FEWEST; sizes 1 and K - 1 are known.

    Example:
        >>> stratified(7, 20)
        [Stratum(sizes=(2,), n=8), Stratum(sizes=(3, 4, 5), n=12)]
        >>> stratified(7, 4)
        [Stratum(sizes=(2, 3, 4, 5), n=4)]
    """
    sizes = range(2, K - 1)
    share = np.cumsum([_spread(K, t) for t in sizes]) / sum(_spread(K, t) for t in sizes)
    several = max(1, draws // (2 * FEWEST))
    bands = np.arange(len(sizes)) if len(sizes) <= several else np.ceil(share * several - 1e-9)
    strata = [tuple(t for t, own in zip(sizes, bands, strict=True) if own == band) for band in np.unique(bands)]
    most = [math.comb(K, some[0]) if len(some) == 1 else draws for some in strata]
    n, weight = [min(FEWEST, limit) for limit in most], [sum(_spread(K, t) for t in some) for some in strata]
    for _ in range(draws - sum(n)):
        gain = [w * w / (m * (m + 1)) if m < limit else -1.0 for w, m, limit in zip(weight, n, most, strict=True)]
        if max(gain) < 0:
            break
        n[gain.index(max(gain))] += 1
    return [Stratum(some, m) for some, m in zip(strata, n, strict=True)]


def _spread(K: int, t: int) -> float:
    """How much z_k(S) r(S) is expected to vary over |S| = t, up to a factor."""
    return K / math.sqrt(t * (K - t)) / t


def draw(stratum: Stratum, K: int, random: np.random.Generator) -> Tensor:
    """Coalitions of a stratum, bool [n, K]."""
    if len(stratum.sizes) > 1:
        chance = _chances(stratum, K)
        chosen = [random.choice(K, random.choice(stratum.sizes, p=chance), replace=False) for _ in range(stratum.n)]
    elif math.comb(K, stratum.sizes[0]) <= 4 * stratum.n:
        every = list(itertools.combinations(range(K), stratum.sizes[0]))
        chosen = [every[i] for i in random.choice(len(every), stratum.n, replace=False)]
    else:
        different = dict[tuple[int, ...], None]()
        while len(different) < stratum.n:
            different[tuple(sorted(random.choice(K, stratum.sizes[0], replace=False).tolist()))] = None
        chosen = list(different)
    sets = torch.zeros(stratum.n, K, dtype=torch.bool)
    for row, some in zip(sets, chosen, strict=True):
        row[list(some)] = True
    return sets


def estimate(stratum: Stratum, sets: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """1/K Σ_t D_kt over the stratum's sizes, and the variance of that estimate, both [N, K].

    Args:
        stratum: what was drawn.
        sets: the coalitions, bool [n, K].
        r: their values, [n, N].
    """
    (n, K), size = sets.shape, sets.sum(1, keepdim=True).double()
    z = torch.where(sets, K / size, -K / (K - size)) / K
    every = math.comb(K, stratum.sizes[0]) if len(stratum.sizes) == 1 else math.inf
    if len(stratum.sizes) > 1:
        chances = dict(zip(stratum.sizes, _chances(stratum, K).tolist(), strict=True))
        z /= torch.tensor([chances[t] for t in sets.sum(1).tolist()], dtype=z.dtype)[:, None]
    products = (r - r.mean(0)).T[:, None] * z.T  # [N, K, n]
    mean = products.sum(2) / (n - 1) * (1 - 1 / every)
    return mean, products.var(2) * n / (n - 1) ** 2 * (1 - n / every)


def standard_error(variances: Sequence[Tensor], n: Sequence[int]) -> Tensor:
    """Of a sum of estimates, made so wide that 1.96 of it hold the truth in 95 of 100 cases.

    The variance of a few draws is itself uncertain; Student's t for the effective degrees of
    freedom (Welch and Satterthwaite) makes up for that.

    Args:
        variances: of each estimate [N, K].
        n: draws of each.
    """
    total = torch.stack(list(variances)).sum(0)
    squares = sum(variance**2 / (m - 1) for variance, m in zip(variances, n, strict=True))
    freedom = (total**2 / squares).nan_to_num(1.0).clamp_min(1.0)  # none where nothing varies
    return total.sqrt() * torch.from_numpy(stats.t.ppf(0.975, freedom.numpy()) / stats.norm.ppf(0.975))


def _chances(stratum: Stratum, K: int) -> np.ndarray:
    spread = np.array([_spread(K, t) for t in stratum.sizes])
    return spread / spread.sum()
