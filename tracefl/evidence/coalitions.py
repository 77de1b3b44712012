"""The coalition game: a ground truth per prediction, without retraining.

The value of a set S of a round's participants is the log-odds of the explained class under the
model fused from S,

    v_n(S) = log-odds of class c_n under  W_S = Σ_{k in S} p_k W_k / Σ_{k in S} p_k,
    W_∅ the incoming global model.

A set is a bit mask: bit k stands for client k. N explained inputs, K clients. From the table
v [2^K, N] follow, exactly,

    leave-one-out    v(all) - v(all \\ k)
    Shapley          Σ_S |S|! (K - 1 - |S|)! / K!  (v(S + k) - v(S))     over sets S without k
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, exact, full_precision
from tracefl.errors import require
from tracefl.evidence.game import Game
from tracefl.judged import spearman
from tracefl.states import State

MOST_CLIENTS = 14  # 16,384 fusions
SCRATCH_BYTES = 1 << 30


def values(
    model: nn.Module,
    clients: Mapping[str, State],
    weights: Mapping[str, float],
    incoming: State,
    inputs: Batch,
    targets: Tensor,
) -> Tensor:
    """Play the game: fuse every set of clients and evaluate it on the inputs.

    Args:
        model: gives the architecture; it is copied, and its weights do not matter.
        clients: client id -> state dict of the client's model, K of them.
        weights: client id -> p_k; they need not add up to 1.
        incoming: state dict of the global model that the round started from, v(∅).
        inputs: Tensor [N, ...], or the model's keyword arguments.
        targets: the explained class of each input, int64 [N].

    Returns:
        v, float64 [2^K, N]: row `mask` is the value of the set of clients whose bits are set in
        `mask`.

    Raises:
        TraceFLError: no clients, or more than 14 (16,384 fusions).

    Example:
        >>> def state(bias):
        ...     return {"weight": torch.zeros(2, 1), "bias": torch.tensor([bias, 0.0])}
        >>> clients, weights = {"a": state(1.0), "b": state(3.0)}, {"a": 1, "b": 1}
        >>> x, targets = torch.zeros(1, 1), torch.tensor([0])
        >>> v = values(nn.Linear(1, 2), clients, weights, state(0.5), x, targets)
        >>> v[:, 0].tolist()  # of no client, a, b, and both
        [0.5, 1.0, 3.0, 2.0]
    """
    K = len(clients)
    limits = f"must be 1 to {MOST_CLIENTS}, got {K} (2^{K} coalitions)"
    require(1 <= K <= MOST_CLIENTS, f"the number of clients {limits}: choose fewer")
    model, inputs = full_precision(model, inputs)
    p = torch.tensor([float(weights[who]) for who in clients], dtype=torch.float64)
    game = Game(model, clients, p, incoming, inputs, targets, "log_odds", "all", SCRATCH_BYTES)
    with exact(game.work):
        game.of_model()
        return game.play(members(K), game.of_nobody())


def members(K: int) -> Tensor:
    """bool [2^K, K]: which clients are in which set."""
    return (torch.arange(1 << K)[:, None] >> torch.arange(K) & 1).bool()


def leave_one_out(v: Tensor) -> Tensor:
    """What a prediction loses when the round is fused without client k.

    Args:
        v: value of every set, [2^K, N].

    Returns:
        [N, K]

    Example:
        >>> leave_one_out(torch.tensor([[0.0], [1.0], [2.0], [5.0]])).tolist()
        [[3.0, 4.0]]
    """
    everyone = len(v) - 1
    return torch.stack([v[everyone] - v[everyone ^ (1 << k)] for k in range(everyone.bit_length())], 1)


def shapley(v: Tensor) -> Tensor:
    """Exact Shapley values (Shapley, 1953).

    Args:
        v: value of every set, [2^K, N].

    Returns:
        float64 [N, K]; a row adds up to v(all) - v(∅).

    Example:
        >>> shapley(torch.tensor([[0.0], [1.0], [2.0], [5.0]])).tolist()
        [[2.0, 3.0]]
    """
    K = (len(v) - 1).bit_length()
    size, sets = members(K).sum(1), torch.arange(1 << K)
    weight = torch.tensor([1 / (K * math.comb(K - 1, s)) for s in range(K)], dtype=torch.float64)
    without = [sets[(sets >> k & 1) == 0] for k in range(K)]
    gained = [weight[size[some], None] * (v[some | 1 << k] - v[some]) for k, some in enumerate(without)]
    return torch.stack([gain.sum(0) for gain in gained], 1)


def client_lds(v: Tensor, scores: Tensor, p: Tensor | None = None) -> Tensor:
    """How well scores predict the values of sets: a linear datamodeling score of clients.

    Without weights the prediction is additive, the sum of the members' scores. With weights it is
    their weighted mean, as fusing S moves the model: Σ_{k in S} p_k a_k / Σ_{k in S} p_k, where
    a_k is the score without its p_k. To first order that is the right one.

    Args:
        v: value of every set, [2^K, N].
        scores: score of each client for each input, [N, K]; with p_k in them, as `trace` gives
            them.
        p: weights of the clients [K], above 0; None: the prediction is the sum.

    Returns:
        [N] Spearman correlation of v with the prediction, over all sets but ∅.

    Raises:
        TraceFLError: a weight is not above 0.

    Example:
        >>> v = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
        >>> client_lds(v, torch.tensor([[0.1, 0.2]])).tolist()
        [1.0]
        >>> client_lds(v, torch.tensor([[0.1, 0.2]]), p=torch.tensor([0.5, 0.5])).tolist()
        [0.5]
    """
    sets = members(scores.shape[1])[1:].double()
    predicted = sets @ scores.double().T
    if p is not None:
        require(p.min() > 0, f"weights must be above 0 to predict by weighted means, got {p.min().item()}")
        predicted /= (sets @ p.double())[:, None]
    return torch.from_numpy(spearman(predicted.T.numpy(), v[1:].T.numpy()))
