"""The coalition game: a ground truth per prediction, without retraining.

The value of a set S of a round's participants is the log-odds of the explained class under the model fused from S,

    v_n(S) = log-odds of class c_n under  W_S = Σ_{k in S} p_k W_k / Σ_{k in S} p_k,      W_∅ the incoming global model.

All 2^K sets are visited in Gray code order, so that one client is added or taken away at a time. A set is a bit mask:
bit k stands for client k. From the table v [2^K, N] come, exactly,

    leave-one-out    v(all) - v(all \\ k)
    Shapley          Σ_S |S|! (K - 1 - |S|)! / K!  (v(S + k) - v(S))     over sets S without k
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tracefl.classifier import log_odds, logits_of
from tracefl.errors import TraceFLError

MOST_CLIENTS = 14  # 16,384 fusions


def values(
    model: nn.Module,
    clients: Mapping[str, Mapping[str, Tensor]],
    weights: Mapping[str, float],
    incoming: Mapping[str, Tensor],
    inputs: Tensor | Mapping[str, Tensor],
    targets: Tensor,
) -> Tensor:
    """v [2^K, N] float64. `model` gives the architecture alone; it is copied."""
    K = len(clients)
    if not 1 <= K <= MOST_CLIENTS:
        raise TraceFLError(f"{K} clients make 2^{K} coalitions: play the game with 1 to {MOST_CLIENTS}")
    model = copy.deepcopy(model).eval()
    state = {name: w for name, w in model.state_dict().items() if w.is_floating_point()}
    p = {who: float(weights[who]) for who in clients}
    v = torch.empty(1 << K, len(targets), dtype=torch.float64)
    with torch.no_grad():
        for mask, fused in fusions(list(clients.values()), list(p.values()), state, incoming):
            for name, tensor in state.items():
                tensor.copy_(fused(name))
            v[mask] = log_odds(logits_of(model, inputs).double(), targets)
    return v


def fusions(
    clients: Sequence[Mapping[str, Tensor]],
    p: Sequence[float],
    names: Mapping[str, Tensor],
    incoming: Mapping[str, Tensor],
) -> Iterator[tuple[int, Callable[[str], Tensor]]]:
    """(mask, name -> tensor of W_mask) for every set. Sums are float64, in which 2^K of them drift by 1e-12."""
    running = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in names.items()}
    mask = 0
    yield mask, incoming.__getitem__
    for step in range(1, 1 << len(clients)):
        changed = (step & -step).bit_length() - 1  # the bit in which consecutive Gray codes differ
        mask ^= 1 << changed
        sign = 1 if mask >> changed & 1 else -1
        for name, total in running.items():
            total.add_(clients[changed][name], alpha=sign * p[changed])
        size = math.fsum(p[k] for k in range(len(clients)) if mask >> k & 1)
        if size == 0:  # members without weight fuse to nothing new
            yield mask, incoming.__getitem__
        else:
            yield mask, lambda name, size=size: running[name] / size  # type: ignore[misc]


def members(K: int) -> Tensor:
    """[2^K, K]: which clients are in which set."""
    return (torch.arange(1 << K)[:, None] >> torch.arange(K) & 1).bool()


def leave_one_out(v: Tensor) -> Tensor:
    """[N, K]: what the prediction loses when the round is fused without client k."""
    everyone = len(v) - 1
    return torch.stack([v[everyone] - v[everyone ^ (1 << k)] for k in range(everyone.bit_length())], 1)


def shapley(v: Tensor) -> Tensor:
    """[N, K] exact Shapley values; a row adds up to v(all) - v(∅)."""
    K = (len(v) - 1).bit_length()
    size = members(K).sum(1)
    weight = torch.tensor([1 / (K * math.comb(K - 1, s)) for s in range(K)], dtype=torch.float64)
    found = []
    for k in range(K):
        without = torch.arange(1 << K)[(torch.arange(1 << K) >> k & 1) == 0]
        found.append((weight[size[without], None] * (v[without | 1 << k] - v[without])).sum(0))
    return torch.stack(found, 1)


def client_lds(v: Tensor, scores: Tensor) -> Tensor:
    """[N] Spearman correlation, over all sets but the empty one, of Σ of the members' scores [N, K] with v."""
    sums = members(scores.shape[1]).double() @ scores.double().T
    return spearman(sums[1:].T, v[1:].T)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the rows of a and b [N, M]; ties share their mean rank; NaN where a row is constant."""
    ranks = [ranked(x.double()) for x in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    norms = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return (centred[0] * centred[1]).sum(1) / norms


def ranked(x: Tensor) -> Tensor:
    rows = []
    for row in x:
        _, inverse, counts = row.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        rows.append((last - (counts - 1) / 2)[inverse])
    return torch.stack(rows)
