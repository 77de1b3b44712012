"""The recorder's arguments that matter in a round, and who is drawn for it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracefl.errors import require
from tracefl.federation.nodes import KnownNodes, Nodes, by_number
from tracefl.runs import Run
from tracefl.states import State
from tracefl.training import Evaluation


@dataclass(frozen=True)
class Options:
    """Arguments of `Recorder` that matter in a round."""

    evaluate: Callable[[State], Evaluation] | None
    accept_failures: bool
    clients_per_round: int | None
    seed: int
    excluded: Collection[str]
    arrayrecord_key: str | None
    node_timeout: float
    on_client: Callable[[int, str, Mapping[str, Any]], None]
    on_round: Callable[[Run], None]
    joining: bool  # whether a client that comes later is one of the run's


def draw(nodes: Nodes | KnownNodes, run: Run, number: int, options: Options) -> list[str]:
    """The clients drawn for round `number`, in the order of their ids."""
    known = nodes.clients.values() if isinstance(nodes, KnownNodes) else [client.id for client in run.clients]
    ids, count = sorted(known, key=by_number), options.clients_per_round or 0
    able = len([client for client in ids if client not in options.excluded])
    require(1 <= count <= able, f"clients_per_round must be 1 to {able}, the clients that can be drawn, got {count}")
    rng = np.random.default_rng([options.seed, number])
    drawn = [index for index in rng.choice(len(ids), count, replace=False) if ids[index] not in options.excluded]
    if count > len(drawn):
        others = [k for k, who in enumerate(ids) if k not in drawn and who not in options.excluded]
        drawn += rng.choice(others, count - len(drawn), replace=False).tolist()
    return [ids[index] for index in sorted(drawn)]
