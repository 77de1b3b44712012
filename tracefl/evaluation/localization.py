"""Localization metrics, each with its chance level.

The paper calls an answer correct if the named client holds training examples of the label (with
faulty clients: if it is a faulty one). Under mild skew most participants hold most labels, so a
random name is often "correct": the paper's accuracy says little without the score of a uniformly
random participant, which is given beside it here.

N traced inputs, K participants of the round.
"""

from collections.abc import Sequence

import numpy as np

from tracefl.judged import NAN, Array, Judged, spearman


def localize(contributions: Array, label_counts: Array, culprits: Array, sizes: Array) -> dict[str, Judged]:
    """Judge, for each input, the client with the largest contribution: the named client.

    An input to which all clients contribute the same names nobody and is not judged.

    Args:
        contributions: contribution of each participant to each prediction, float [N, K].
        label_counts: training examples of the explained label on each participant, int [N, K].
        culprits: whether naming the participant counts as correct, bool [N, K].
        sizes: number of training examples of each participant, int [K].

    Returns:
        Means over the judged inputs, shares in [0, 1]; NaN if there is none. By name:

        - num_inputs: N, judged or not
        - localization: the named client is a culprit (the paper's accuracy)
        - largest_client: the same if the participant with the most examples is always named
        - top_holder: the named client holds the most examples of the label
        - spearman: rank correlation of contributions with label counts, where there is one

    Example:
        >>> label_counts = np.array([[30, 0, 10], [0, 20, 5]])
        >>> contributions = np.array([[0.9, 0.1, 0.4], [0.2, 0.1, 0.5]])
        >>> found = localize(contributions, label_counts, label_counts > 0, np.array([30, 20, 15]))
        >>> found["localization"].value, round(found["localization"].chance, 3)
        (1.0, 0.667)
        >>> found["top_holder"].value, round(found["top_holder"].chance, 3)
        (0.5, 0.333)
    """
    N, K = contributions.shape
    decided = (contributions.max(axis=1, initial=-np.inf) > contributions.min(axis=1, initial=np.inf)) | (K == 1)
    contributions, label_counts, culprits = contributions[decided], label_counts[decided], culprits[decided]
    if len(contributions) == 0:
        names = ("localization", "largest_client", "top_holder", "spearman")
        return {"num_inputs": Judged(N)} | dict.fromkeys(names, Judged(NAN))
    inputs, named = np.arange(len(contributions)), contributions.argmax(axis=1)
    most = label_counts.max(axis=1, keepdims=True)
    top, chance = (label_counts == most) & (most > 0), float(culprits.mean())
    correlation = spearman(contributions, label_counts)
    correlation = correlation[~np.isnan(correlation)]
    return {
        "num_inputs": Judged(N),
        "localization": Judged(float(culprits[inputs, named].mean()), chance),
        "largest_client": Judged(float(culprits[:, sizes == sizes.max()].mean()), chance),
        "top_holder": Judged(float(top[inputs, named].mean()), float(top.mean())),
        "spearman": Judged(float(correlation.mean()) if len(correlation) else NAN, 0.0),
    }


def against(contributions: Array, truth: Array) -> dict[str, Judged]:
    """Judge contributions by true ones. An input of which either are all the same is not judged.

    Args:
        contributions: of each participant to each prediction, float [N, K].
        truth: the same in truth, float [N, K].

    Returns:
        Means over the judged inputs; NaN if there is none. By name:

        - spearman: rank correlation of both
        - first: the client with the largest contribution has the largest one in truth

    Example:
        >>> found = against(np.array([[3, 2, 1], [1, 1, 1]]), np.array([[9, 1, 5], [1, 2, 3]]))
        >>> round(found["spearman"].value, 3), found["first"].value, round(found["first"].chance, 3)
        (0.5, 1.0, 0.333)
    """
    decided = (contributions != contributions[:, :1]).any(axis=1) & (truth != truth[:, :1]).any(axis=1)
    contributions, truth = contributions[decided], truth[decided]
    if len(truth) == 0:
        return dict.fromkeys(("spearman", "first"), Judged(NAN))
    most, named = truth == truth.max(axis=1, keepdims=True), contributions.argmax(axis=1)
    return {
        "spearman": Judged(float(spearman(contributions, truth).mean()), 0.0),
        "first": Judged(float(most[np.arange(len(most)), named].mean()), float(most.mean())),
    }


def name_faulty(ranks: Array, clients: Sequence[str], faulty: set[str]) -> dict[str, Judged]:
    """Judge how well a ranking names all faulty clients.

    Of F faulty clients in the federation, M are among the K participants. The F ranked first (at
    most K) are named: whoever looks for faulty clients knows how many there are, but not how many
    take part.

    Args:
        ranks: rank of each participant by its contribution, from 1, int [N, K].
        clients: ids of the participants, [K].
        faulty: ids of the F faulty clients.

    Returns:
        Means over the N inputs; NaN if N or M is 0. By name:

        - faulty_precision: faulty ones among the named / named;   chance M / K
        - faulty_recall: faulty ones among the named / M;          chance min(F, K) / K
        - rank_of_c3: rank of the faulty client 3;                 chance (K + 1) / 2

    Example:
        >>> found = name_faulty(np.array([[2, 1, 3, 4]]), ["0", "1", "2", "3"], faulty={"1"})
        >>> found["faulty_precision"], found["rank_of_c1"]
        (Judged(value=1.0, chance=0.25), Judged(value=1.0, chance=2.5))
    """
    rank_names = {f"rank_of_c{client}": client for client in sorted(faulty, key=int)}
    present = np.array([client in faulty for client in clients])
    K, M, named = len(clients), int(present.sum()), min(len(faulty), len(clients))
    if len(ranks) == 0 or M == 0:
        return dict.fromkeys(("faulty_precision", "faulty_recall", *rank_names), Judged(NAN))
    hits = float((ranks[:, present] <= named).sum(axis=1).mean())
    mean_rank = dict(zip(clients, ranks.mean(axis=0).tolist(), strict=True))
    return {"faulty_precision": Judged(hits / named, M / K), "faulty_recall": Judged(hits / M, named / K)} | {
        name: Judged(mean_rank.get(client, NAN), (K + 1) / 2) for name, client in rank_names.items()
    }
