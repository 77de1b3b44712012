"""Shapley values of a prediction: what each client adds, averaged over all orders of joining.

    φ_k = Σ_S |S|! (K - 1 - |S|)! / K!  (v(S + k) - v(S))     over sets S without k

of the game in `game`. They add up to v(all) - v(∅), what the fusion changed; a client that changes
nothing gets 0, clients that do the same get the same. Exactly, that takes 2^K models. Instead:

    2 K + 2 models    nobody, everyone, each client alone, all without it: a surrogate s is fitted
                      to them, and its Shapley values are sums of numbers
    more              the rest, v - s, is sampled: unbiased, with standard errors
    2^K               everything, up to MOST_CLIENTS clients
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tracefl.classifier import Batch, exact
from tracefl.errors import require
from tracefl.evidence import coalitions, sampling
from tracefl.evidence.game import Game
from tracefl.evidence.surrogate import Surrogate
from tracefl.provenance.result import Provenance
from tracefl.states import State


def explain(
    model: nn.Module, clients: Mapping[str, State], inputs: Batch, targets: Tensor | None, p: Tensor,
    reference: State, layers: str | Sequence[str], output: str, evaluations: int | None, scratch_bytes: int,
) -> Provenance:  # fmt: skip
    """`trace(..., method="shapley")`, whose arguments these are, with p_k for weights, float64 [K].

    A client of weight 0 changes no fusion: it gets 0, exactly, and is not read.
    """
    K = int((p > 0).sum())
    evaluations = checked(evaluations, K)
    playing = {who: source for (who, source), weight in zip(clients.items(), p.tolist(), strict=True) if weight > 0}
    game = Game(model, playing, p[p > 0], reference, inputs, targets, output, layers, scratch_bytes)
    with exact(game.work):
        of_model, nobody = game.of_model(), game.of_nobody()
        phi, error = values(game, nobody, evaluations)
    share, standard_error = torch.zeros(2, game.N, len(clients), dtype=torch.float64)
    share[:, p > 0], standard_error[:, p > 0] = phi, error
    return Provenance(
        "shapley", list(clients), torch.as_tensor(game.targets).cpu(), share[None],
        ["the whole model" if layers == "all" else "the chosen layers"],
        (of_model - nobody - phi.sum(1))[None], of_model - nobody, standard_error,
    )  # fmt: skip


def checked(evaluations: int | None, K: int) -> int:
    """The number of fused models to evaluate for K clients.

    Raises:
        TraceFLError: it is too small, or between numbers that make sense.
    """
    least, every = min(2 * K + 2, 2**K), 2**K
    if evaluations is None:
        return least
    further = min(every, least + sampling.FEWEST)
    expected = f"evaluations must be {least} or at least {further} for {K} clients with weight above 0"
    fits = isinstance(evaluations, int) and not isinstance(evaluations, bool)
    fits = fits and (evaluations == least or evaluations >= further)
    require(fits, f"{expected}, got {evaluations!r}")
    return evaluations


def values(game: Game, nobody: Tensor, evaluations: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Shapley values and their standard errors, both [N, K]; NaN where nothing was sampled."""
    K = len(game.ids)
    if evaluations >= 2**K and K <= coalitions.MOST_CLIENTS:
        phi = coalitions.shapley(game.play(coalitions.members(K), nobody))
        return phi, torch.zeros_like(phi)
    everyone, alone, without = game.ends()
    surrogate = Surrogate.fit(game.p, nobody, everyone, alone, without)
    phi, variance = surrogate.shapley(seed)
    draws = evaluations - 2 * K - 2
    if draws == 0:
        return phi, torch.full_like(phi, math.nan)
    random = np.random.default_rng(seed)
    strata = sampling.stratified(K, draws)
    drawn = [sampling.draw(stratum, K, random) for stratum in strata]
    played = game.play(torch.cat(drawn), nobody).split([stratum.n for stratum in strata])
    one = torch.eye(K, dtype=torch.bool)
    strata = [sampling.Stratum((1,), K), sampling.Stratum((K - 1,), K), *strata]
    drawn, found = [one, ~one, *drawn], [alone, without, *played]
    estimates = [
        sampling.estimate(stratum, sets, v - surrogate.values(sets))
        for stratum, sets, v in zip(strata, drawn, found, strict=True)
    ]
    phi = phi + torch.stack([mean for mean, _ in estimates]).sum(0)
    known = [variance for _, variance in estimates] + [variance]
    return phi, sampling.standard_error(known, [*(stratum.n for stratum in strata), sampling.FEWEST * K])
