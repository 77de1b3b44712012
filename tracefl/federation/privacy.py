"""Central differential privacy: Flower's server-side fixed clipping, corrected.

    W_g = W_in + (1/n) sum_k min(1, C / |delta_k|) delta_k + N(0, (z C / n)^2),
    delta_k = W_k - W_in

over the parameters (`ParametersOnly` keeps running statistics out of the norm). It differs from
Flower's own class: every client weighs the same, since with other weights z C / n is not the noise
that the guarantee needs; n counts the updates that came, not those that were asked for; an update
of zero does not divide by zero; the noise is a function of (seed, round).
"""

from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, Strategy
from flwr.supercore.privacy_accounting import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, SamplingMethod
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from tracefl.federation.noise import gaussian_noise, noise_std

TARGET_DELTA = 1e-5
Messages = Iterable[Message]
Aggregated = tuple[ArrayRecord | None, MetricRecord | None]  # model, mean metrics


class FixedClipping(DifferentialPrivacyServerSideFixedClipping):
    """Flower's wrapper of this name with noise from `seed`.

    The inner strategy must be the mean of its replies.
    """

    def __init__(self, strategy: Strategy, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(strategy, *args, **kwargs)
        self.seed = seed

    def aggregate_train(self, server_round: int, replies: Messages) -> Aggregated:
        """Clip each update, let the inner strategy average them, add the noise."""
        replies, incoming = list(replies), self.current_arrays.to_torch_state_dict()
        for reply in replies:
            key, arrays = next(iter(reply.content.array_records.items()))
            delta = {name: value - incoming[name] for name, value in arrays.to_torch_state_dict().items()}
            norm = float(torch.stack([value.double().norm() for value in delta.values()]).norm())
            scale = self.clipping_norm / norm if norm > self.clipping_norm else 1.0
            clipped = {name: incoming[name] + scale * value for name, value in delta.items()}
            reply.content[key] = ArrayRecord(clipped)
            next(iter(reply.content.metric_records.values()))["num-examples"] = 1
        mean, metrics = self.strategy.aggregate_train(server_round, replies)
        if mean is None:
            return None, metrics
        std = noise_std(self.noise_multiplier, self.clipping_norm, len(replies))
        noisy = {
            name: value + gaussian_noise(name, value, std, self.seed, server_round)
            for name, value in mean.to_torch_state_dict().items()
        }
        return ArrayRecord(noisy), metrics


def epsilon(noise_multiplier: float, rounds: int, clients_per_round: int, num_clients: int) -> float:
    """Epsilon of `rounds` releases at delta 1e-5, by Renyi accounting (Mironov, 2017).

    Two runs are neighbours if one client's updates are replaced by zero in one of them; the number
    of participants is public. That changes the mean by at most C / n. Sampling is not counted in
    favour of privacy, because the participants follow from the seed. Running statistics are
    released as they are and not covered.

    Args:
        noise_multiplier: z.
        rounds: number of releases.
        clients_per_round: participants of a round, n.
        num_clients: clients of the federation.

    Returns:
        Epsilon; infinity without noise.

    Example:
        >>> round(epsilon(1.0, rounds=1, clients_per_round=10, num_clients=10), 2)
        4.73
    """
    if noise_multiplier == 0:
        return float("inf")
    accountant = RdpAccountant(
        PrivacyConfig(TARGET_DELTA, num_clients, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
    )
    accountant.compose(GaussianPrivacyEvent(noise_multiplier, clients_per_round, num_clients), rounds)
    return accountant.get_epsilon(TARGET_DELTA)
