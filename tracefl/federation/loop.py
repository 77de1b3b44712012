"""What is known of a strategy's loop and of its round; the parts of `Rounds` share it."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, QFedAvg, Strategy
from torch import Tensor

from tracefl.federation.grid import GridView
from tracefl.federation.memory import OURS, fingerprints, innermost, parts
from tracefl.federation.nodes import KnownNodes, Nodes
from tracefl.federation.replies import Update
from tracefl.record import Participant
from tracefl.runs import Run
from tracefl.states import State
from tracefl.training import Evaluation

EQUAL_WEIGHTS = (FedMedian, FedTrimmedAvg, Bulyan)  # every update that they use counts the same


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


class Loop:
    """One loop of a strategy over its rounds.

    Args:
        strategy: Flower's, or the app's own.
        run: rounds are added to it.
        nodes: which node is which client.
        options: as of the recorder.
        wanted: how many rounds the loop has.
        order: names of the model's entries, which early runs do not hold.
        reads_all: whether the loop looks at the model of every recorded round.

    Attributes:
        index: the round that the loop is in, from 1; 0 before.
    """

    _own: dict[str, Callable[..., Any]]  # the strategy's methods that are watched
    _view: GridView  # the grid that the strategy is shown
    _chosen: list[str]  # the clients of this round, in their order
    _expected: dict[str, Tensor]  # the model that they are sent

    def __init__(
        self,
        strategy: Strategy,
        run: Run,
        nodes: Nodes | KnownNodes,
        options: Options,
        *,
        wanted: int,
        order: list[str],
        reads_all: bool,
    ) -> None:
        self.strategy, self.run, self.nodes, self.options = strategy, run, nodes, options
        self.wanted, self.order, self.reads_all, self.index = wanted, order, reads_all, 0
        self._first_values: dict[str, bytes] | None = None
        self._away: list[str] = []  # clients without a node
        self._sampling_since: float | None = None
        self._client_of: dict[int, str] = {}  # node that is asked in this round -> client
        self._held: dict[str, int] = {}  # client -> how many examples it holds, where that is known
        self._unknown: set[str] = set()  # clients of which it was said that it is not
        self._forget_round()

    def _forget_round(self) -> None:
        """Nothing is known of this round yet."""
        self._updates: dict[str, tuple[str, Update, Participant]] = {}  # client -> message id, ...
        self._unwritten: list[tuple[str, str, Update, Future[Participant]]] = []
        self._failures: dict[str, str] = {}  # client -> why
        self._used: dict[int, float] = {}  # id() of a content -> its weight
        self._not_finite: dict[str, str] = {}  # client -> which values

    def _note_changes(self) -> None:
        """Record which values the strategy keeps, but cannot give: those that have changed."""
        if self._first_values is not None:
            now = fingerprints(self.strategy)
            changed = {name for name in now if now[name] != self._first_values.get(name)}
            self.run.note_unsaved(sorted({*self.run.unsaved, *changed}))

    def _flowers(self) -> bool:
        """Whether Flower's own code averages, by the weight that it is seen to use for metrics."""
        kinds = [next(k for k in type(p).__mro__ if "aggregate_train" in vars(k)) for p in parts(self.strategy)]
        plain = isinstance(innermost(self.strategy), FedAvg) and not isinstance(innermost(self.strategy), QFedAvg)
        return plain and all(kind.__module__.startswith(OURS) for kind in kinds)

    def _weight_key(self) -> str | None:
        return getattr(innermost(self.strategy), "weighted_by_key", None)
