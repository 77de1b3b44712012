"""The answer: who is responsible, by how much, through which layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

    from tracefl.evidence.answers import AnswerSets


@dataclass(frozen=True, repr=False)
class Provenance:
    """Which client is responsible: every client's contribution to every explained prediction.

    A contribution is the client's share in the explained output y of one input: how much of y came
    in through this client's weights or, with a reference, its update (equation 6). N explained
    inputs, K clients, L calls of layers.

    Attributes:
        method: "neuron", "influence", "integrated" or "shapley".
        client_ids: K ids, in the order of the columns.
        targets: the explained class of every input, int64 [N].
        by_layer: contributions by layer, float64 [L, N, K], with layer decay and client weights.
        layers: L names in execution order, which sets the decay; "conv#2" is conv's second call,
            and a tensor that no rule covers counts under its module's name, or its own.
        residual_by_layer: [L, N] what the server added to the fusion; None without weights.
        change: [N] y of the model minus y of the reference; None unless method is "integrated" or
            "shapley".
        standard_error: [N, K] of the contributions, of "shapley"; NaN where it is not known, 0
            where they are exact.

    Example:
        >>> from tracefl import Provenance
        >>> import torch
        >>> by_layer = torch.tensor([[[3.0, 1.0]], [[-1.0, 0.5]]], dtype=torch.float64)
        >>> who, layers = ["ann", "bob"], ["conv", "head"]
        >>> found = Provenance("neuron", who, torch.tensor([7]), by_layer, layers)
        >>> found.contributions.tolist(), found.responsible
        ([[2.0, 1.5]], ['ann'])
        >>> [(who, share, round(score, 2)) for who, share, score in found.ranking(0)]
        [('ann', 2.0, 0.62), ('bob', 1.5, 0.38)]
    """

    method: str
    client_ids: list[str]  # [K]
    targets: Tensor  # [N] explained class
    by_layer: Tensor  # [L, N, K] float64, layer decay and client weights included
    layers: list[str]  # [L] in execution order; "name#2" is a module's second call
    residual_by_layer: Tensor | None = None  # [L, N] what the server added to the fusion; needs weights
    change: Tensor | None = None  # [N] y of the model minus y of the reference ("integrated", "shapley")
    standard_error: Tensor | None = None  # [N, K] of the contributions ("shapley")

    @classmethod
    def from_shares(
        cls, method: str, client_ids: list[str], targets: Tensor, shares: Mapping[str, Tensor],
        weights: Tensor | None, layer_decay: float, change: Tensor | None,
    ) -> "Provenance":  # fmt: skip
        """The answer that follows from unweighted shares.

        Args:
            method: "neuron", whose layers decay, or another.
            client_ids: K ids.
            targets: the explained classes [N].
            shares: layer -> [N, K], in execution order; a column more is that of the global model.
            weights: p_k, float64 [K]; None: shares are not weighted, and there is no residual.
            layer_decay: β (equation 6).
            change: the change of y over the round [N], where it is known.
        """
        by_layer, K = torch.stack(list(shares.values())).cpu(), len(client_ids)
        if method == "neuron":
            age = torch.arange(len(by_layer) - 1, -1, -1, dtype=torch.float64)  # L - 1 - l
            by_layer *= (layer_decay**age)[:, None, None]
        of_model, by_layer = by_layer[:, :, K:].sum(2), by_layer[:, :, :K]  # 0 without its column
        if weights is None:
            return cls(method, client_ids, targets.cpu(), by_layer, list(shares), None, change)
        by_layer = by_layer * weights
        return cls(method, client_ids, targets.cpu(), by_layer, list(shares), of_model - by_layer.sum(2), change)

    @property
    def contributions(self) -> Tensor:
        """[N, K] float64 (equation 6)."""
        return self.by_layer.sum(0)

    @property
    def scores(self) -> Tensor:
        """[N, K] softmax over the clients (equation 7)."""
        return self.contributions.softmax(1)

    @property
    def responsible(self) -> list[str]:
        """[N] id of the client with the largest contribution."""
        return [self.client_ids[k] for k in self.contributions.argmax(1).tolist()]

    @property
    def residual(self) -> Tensor | None:
        """[N] what the server itself added (clipping, noise, momentum); None without weights."""
        return None if self.residual_by_layer is None else self.residual_by_layer.sum(0)

    @property
    def completeness_error(self) -> Tensor | None:
        """[N] |shares + residual - change of y| as a fraction of the mean |change| over inputs."""
        if self.change is None or self.residual is None:
            return None
        missed = self.contributions.sum(1) + self.residual - self.change
        return missed.abs() / self.change.abs().mean().clamp_min(torch.finfo(torch.float64).tiny)

    def ranking(self, i: int) -> list[tuple[str, float, float]]:
        """The clients by their contribution to one prediction; ties keep the order.

        Args:
            i: the number of the input, from 0.

        Returns:
            K times (client id, contribution, score), largest first.
        """
        contributions, scores = self.contributions[i], self.scores[i]
        order = contributions.argsort(descending=True, stable=True).tolist()
        return [(self.client_ids[k], contributions[k].item(), scores[k].item()) for k in order]

    def sets(self, confidence: float = 0.9) -> "AnswerSets":
        """The answers as sets: who cannot be told from the first, nobody where nothing can be told.

        Args:
            confidence: as of `tracefl.answer_sets`, which also takes other groups than the classes.

        Returns:
            The sets, see `AnswerSets`.

        Raises:
            TraceFLError: the confidence is not between 0 and 1.
        """
        from tracefl.evidence.answers import answer_sets  # a later room

        return answer_sets(self, confidence=confidence)

    def to_frame(self) -> "pd.DataFrame":
        """The answer as a table.

        Returns:
            A row per input and client: input, target, client, contribution, score, rank (from 1);
            of "shapley" also the contribution's standard_error.
        """
        import pandas as pd  # a second of import that tracing itself does not need

        N, K = self.contributions.shape
        ranks = (-self.contributions).argsort(dim=1, stable=True).argsort(dim=1) + 1
        error = {} if self.standard_error is None else {"standard_error": self.standard_error.flatten().tolist()}
        return pd.DataFrame(
            {
                "input": [n for n in range(N) for _ in range(K)],
                "target": self.targets.repeat_interleave(K).tolist(),
                "client": self.client_ids * N,
                "contribution": self.contributions.flatten().tolist(),
                "score": self.scores.flatten().tolist(),
                "rank": ranks.flatten().tolist(),
                **error,
            }
        )

    def __repr__(self) -> str:
        shown = min(len(self.targets), 5)
        lines = [
            f"Provenance(method={self.method!r}, {len(self.targets)} inputs, {len(self.client_ids)} clients, "
            f"{len(self.layers)} layers)"
        ]
        for i in range(shown):
            best = "  ".join(f"{who} {share:+.4g} ({score:.2f})" for who, share, score in self.ranking(i)[:3])
            lines.append(f"  input {i}, class {self.targets[i].item()}: {best}")
        if shown < len(self.targets):
            lines.append(f"  ... {len(self.targets) - shown} more")
        return "\n".join(lines)
