"""p_k, the shares with which a strategy took its updates, found from the model that it released.

    W_g = W_in + sum_k p_k (W_k - W_in)

If that holds for p_k that are known, such as num-examples over their sum, these are they; else p_k
are those of least squares, if with them it holds. It holds for no p_k where the strategy does more
than average, such as adding noise.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracefl.states import State

log = logging.getLogger("tracefl")
EXACT, CLOSE = 1e-4, 1e-3  # |difference| / |W_g - W_in|, of single-precision models


@dataclass(frozen=True)
class Weights:
    """p_k in the order of the updates, and where they are from (`Round.weights_from`)."""

    shares: list[float]
    source: str


def find_weights(
    released: State, incoming: State, updates: Sequence[State], known: Mapping[str, Sequence[float]]
) -> Weights | None:
    """The p_k with which the mean of the updates is the released model; None if there are none.

    Args:
        released: W_g.
        incoming: W_in.
        updates: the W_k; entries that all hold are compared, at some of their values.
        known: name -> weights of the updates, of any sum, that may be the ones: the closest counts.

    Returns:
        Shares that add up to 1, exactly those of `known` where one holds.
    """
    W, W_in, change = _values(released, incoming, updates)
    return _fit(W - W_in[:, None], change, known)


def are_differences(
    released: State, incoming: State, updates: Sequence[State], known: Mapping[str, Sequence[float]]
) -> bool:
    """Whether clients have sent W_k - W_in in the place of W_k.

    Then W_g - W_in is a mean of what they have sent. Arguments are those of `find_weights`.

    Example:
        >>> import torch
        >>> sent, W_in = [{"w": torch.tensor([1.0, 3.0])}], {"w": torch.tensor([5.0, 6.0])}
        >>> released = {"w": torch.tensor([6.0, 9.0])}
        >>> are_differences(released, W_in, sent, {}), are_differences(sent[0], W_in, sent, {})
        (True, False)
    """
    W, _, change = _values(released, incoming, updates)
    return _fit(W, change, known) is not None


def _fit(A: np.ndarray, b: np.ndarray, known: Mapping[str, Sequence[float]]) -> Weights | None:
    """The p with A p = b that are known, or else those of least squares; None if there are none."""
    scale = float(np.linalg.norm(b))
    shares = {name: np.array(values, float) / sum(values) for name, values in known.items() if sum(values) > 0}
    if scale == 0 or not len(b):
        return None
    off = {name: float(np.linalg.norm(A @ p - b)) / scale for name, p in shares.items()}
    nearest = min(off, key=lambda name: off[name], default=None)
    if nearest is not None and off[nearest] <= EXACT:
        return Weights(shares[nearest].tolist(), "models")
    if len(b) <= A.shape[1]:  # it would hold for any b
        return None
    p, _, rank, _ = np.linalg.lstsq(A, b, rcond=1e-6)
    if rank < A.shape[1] or np.linalg.norm(A @ p - b) > CLOSE * scale or p.min() < -CLOSE:
        return None
    p = p.clip(0)
    return Weights((p / p.sum()).tolist(), "models")


def assumed(examples: Sequence[float], what: str) -> Weights:
    """The usual shares, where those that were used cannot be told; it is said what is assumed.

    Args:
        examples: of the updates; 0 where clients do not say.
        what: cannot be told, such as "round 1: what weights FedAvg gave the updates".
    """
    usual = list(examples) if sum(examples) else [1.0] * len(examples)
    told_by = "num-examples is" if sum(examples) else "equal weights are"
    log.warning("%s cannot be told from the model that it released: %s assumed", what, told_by)
    return Weights([n / sum(usual) for n in usual], "assumed")


def _values(released: State, incoming: State, updates: Sequence[State]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[values, K] W_k, [values] W_in and W_g - W_in, at evenly spread values of every entry."""
    names = [name for name, value in incoming.items() if value.is_floating_point() and _everywhere(name, updates)]
    total = sum(incoming[name].numel() for name in names)
    step = max(1, total // max(20 * len(updates), 20_000))
    chosen = {name: slice(None, None, step if incoming[name].numel() > step else 1) for name in names}

    def values(state: State) -> np.ndarray:
        parts = [state[name].reshape(-1)[part].double().numpy() for name, part in chosen.items()]
        return np.concatenate(parts) if parts else np.empty(0)

    W_in = values(incoming)
    return np.stack([values(update) for update in updates], axis=1), W_in, values(released) - W_in


def _everywhere(name: str, updates: Sequence[State]) -> bool:
    return all(name in update for update in updates)
