"""What a client's update looks like beside the others', and what its own model has learnt.

A client may do harm that the round's mean hides, and a client that holds few classes does some
without any fault. Whether it trains towards the labels shows in its own model: with d_x the change
of the centred logits of input x, from the model that the client received to the one that it sent,
and u_c the mean over classes of the mean d_xc of each class's inputs,

    aim = Σ_c u_c^+ (2 AUC_c - 1) / Σ_c u_c^+,

where AUC_c is the probability that d_xc of an input of class c is above that of another input. It
is 1 for a client that raises every class on that class's inputs only, and 0 where labels play no
part. What is lowered does not count: that is how a client forgets classes that it does not hold.
"""

from collections.abc import Iterable, Sequence

import torch
from scipy.stats import rankdata
from torch import Tensor

from tracefl.provenance.clients import States


def products(states: States, start: States, names: Sequence[str], read_at_once: int) -> Tensor:
    """Scalar products of the updates of K clients, float64 [K, K].

    Args:
        states: of the clients.
        start: one state, that of the model which they received.
        names: the tensors that count.
        read_at_once: bytes of clients' tensors to hold.
    """
    K = len(states.states)
    dots = torch.zeros(K, K, dtype=torch.float64)
    for name in names:
        origin = start.tensors([name], 0, 1)[0]
        block = max(1, read_at_once // max(1, 4 * origin.nbytes))  # two blocks, and what is made of them

        def updates(first: int, name: str = name, origin: Tensor = origin, block: int = block) -> Tensor:
            some = torch.stack(states.tensors([name], first, min(K, first + block)))
            return (some - origin).view(len(some), -1).double()

        for i in range(0, K, block):
            left = updates(i)
            for j in range(i, K, block):
                right = left if i == j else updates(j)
                dots[i : i + block, j : j + block] += (left @ right.T).cpu()
    return dots.triu() + dots.triu(1).T


def compare(dots: Tensor, p: Tensor) -> dict[str, Tensor]:
    """How long the updates of K clients are, and how they lie to each other.

    Args:
        dots: their scalar `products`, float64 [K, K].
        p: weights of the clients, float64 [K].

    Returns:
        `norms` [K]; `cosines` [K] with the mean update; `agreement` [K], the median of the cosines
        with the other clients' updates. NaN for an update of norm 0, and with no other client.
    """
    norms = dots.diagonal().sqrt()
    cosines = dots / (norms[:, None] * norms)
    with_others = torch.where(torch.eye(len(p), dtype=torch.bool), torch.nan, cosines)
    with_mean = dots @ p / (norms * (p @ dots @ p).sqrt())
    return {"norms": norms, "cosines": with_mean, "agreement": with_others.nanquantile(0.5, dim=1)}


def lessons(logits: Iterable[Tensor], counts: list[int]) -> dict[str, Tensor]:
    """What each client's training teaches, and whether it teaches it to the right inputs.

    Args:
        logits: centred logits [N, C] of inputs that are sorted by class, float64: first those of
            the model that the clients received, then those of each of the K clients' own.
        counts: inputs of each class, C numbers.

    Returns:
        `taught` [C, K], u_c; and `aim` [K], NaN where nothing is raised.

    Example:
        One input of each of two classes; ann raises either's own class, eve class 0 on both:

        >>> received = torch.zeros(2, 2, dtype=torch.float64)
        >>> ann = torch.tensor([[1.0, -1.0], [-0.5, 0.5]])
        >>> eve = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
        >>> found = lessons([received, ann.double(), eve.double()], [1, 1])
        >>> found["aim"].tolist(), found["taught"][0].tolist()
        ([1.0, -1.0], [0.25, 1.5])
    """
    every = iter(logits)
    received = next(every)
    N, C = received.shape
    there = [c for c in range(C) if 0 < counts[c] < N]
    aim, taught = [], []
    for own in every:
        change = own - received
        ranks = torch.from_numpy(rankdata(change, axis=0)).split(counts)
        u = torch.stack([part.mean(0) for part in change.split(counts) if len(part)]).mean(0)
        right = torch.zeros(C, dtype=torch.float64)  # 2 AUC - 1
        for c in there:
            n = counts[c]
            right[c] = 2 * (ranks[c][:, c].sum() - n * (n + 1) / 2) / (n * (N - n)) - 1
        raised = u.clamp(min=0)[there]
        aim.append((raised @ right[there]) / raised.sum())  # 0 / 0 where nothing is raised
        taught.append(u)
    return {"aim": torch.stack(aim), "taught": torch.stack(taught, 1)}
