"""Flower's strategies by name, and what is needed to make them right for models with running statistics.

Server optimizers (FedAdam and its like) and differential privacy work on a model's parameters. BatchNorm's running
mean and variance are no parameters: a step of Adam or Gaussian noise can make a variance negative, and in a clipping
norm they would drown the weights. `ParametersOnly` keeps them apart: they are averaged as they are.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from tracefl.config import Config
from tracefl.errors import TraceFLError
from tracefl.federation.privacy import FixedClipping

BY_NAME: dict[str, type[strategy.FedAvg]] = {
    cls.__name__.lower(): cls
    for cls in (
        *(strategy.FedAvg, strategy.FedProx, strategy.FedAdam, strategy.FedYogi, strategy.FedAdagrad),
        *(strategy.FedAvgM, strategy.FedMedian, strategy.FedTrimmedAvg, strategy.Krum, strategy.MultiKrum),
        strategy.Bulyan,
    )
}
SERVER_OPTIMIZERS = (strategy.FedAdam, strategy.FedYogi, strategy.FedAdagrad, strategy.FedAvgM)


def build_strategy(config: Config, buffers: frozenset[str] = frozenset()) -> Strategy:
    """Flower's strategy of this name; every node that it is shown takes part.

    Args:
        buffers: names of the floating-point entries of the model's state that are no parameters.
    """
    count, settings = config.clients_per_round, config.strategy
    try:
        inner: Strategy = BY_NAME[settings.name](
            fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count, **settings.options
        )
    except (TypeError, ValueError) as error:
        raise TraceFLError(f"strategy.options={settings.options} do not suit {settings.name}: {error}.") from error
    if config.noise_multiplier != -1:
        private = FixedClipping(inner, config.noise_multiplier, config.clipping_norm, count, seed=config.seed)
        return ParametersOnly(private, buffers)
    return ParametersOnly(inner, buffers) if isinstance(inner, SERVER_OPTIMIZERS) else inner


class Wrapper(Strategy):
    """A strategy around another one. No evaluation on clients: the server evaluates what it releases."""

    strategy: Strategy

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        self.strategy.summary()


class ParametersOnly(Wrapper):
    """Shows the inner strategy the parameters alone; the model's buffers are averaged, weighted by num-examples."""

    def __init__(self, inner: Strategy, buffers: frozenset[str]) -> None:
        self.strategy, self.buffers = inner, buffers

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(self.strategy.configure_train(server_round, self._parameters(arrays), config, grid))
        for message in messages:
            _replace_arrays(message, arrays)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        whole = [_arrays(reply) for reply in replies]
        for reply, arrays in zip(replies, whole, strict=True):
            _replace_arrays(reply, self._parameters(arrays))
        released, metrics = self.strategy.aggregate_train(server_round, replies)
        if released is None:
            return None, metrics
        n_k = np.array([next(iter(reply.content.metric_records.values()))["num-examples"] for reply in replies], float)
        averaged = {
            name: np.average([arrays[name].numpy() for arrays in whole], axis=0, weights=n_k)
            for name in whole[0]
            if name in self.buffers
        }
        return ArrayRecord(
            {name: _array(averaged[name]) if name in averaged else released[name] for name in whole[0]}
        ), metrics

    def _parameters(self, arrays: ArrayRecord) -> ArrayRecord:
        """In order of name: FedAvgM pairs arrays by their place, and a recorded model comes in another order."""
        return ArrayRecord({name: arrays[name] for name in sorted(arrays) if name not in self.buffers})


def innermost(wrapped: Strategy) -> Strategy:
    """The strategy that aggregates, inside of its wrappers."""
    while (inner := getattr(wrapped, "strategy", None)) is not None:
        wrapped = inner
    return wrapped


def optimizer_state(wrapped: Strategy) -> dict[str, Tensor]:
    """What a server optimizer carries from round to round (moments), as tensors by name; empty for the others."""
    inner = innermost(wrapped)
    state = {
        f"{moment}/{name}": value
        for moment in ("m_t", "v_t")
        for name, value in (getattr(inner, moment, None) or {}).items()
    }
    momentum = getattr(inner, "momentum_vector", None) or []
    state |= {f"momentum_vector/{index}": value for index, value in enumerate(momentum)}
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def load_optimizer_state(wrapped: Strategy, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave."""
    inner, moments = innermost(wrapped), dict[str, dict[str, np.ndarray]]()
    for name, value in state.items():
        moment, key = name.split("/", 1)
        moments.setdefault(moment, {})[key] = value.numpy()
    for moment, values in moments.items():
        kept = [values[str(index)] for index in range(len(values))] if moment == "momentum_vector" else values
        setattr(inner, moment, kept)


def _arrays(message: Message) -> ArrayRecord:
    return next(iter(message.content.array_records.values()))


def _replace_arrays(message: Message, arrays: ArrayRecord) -> None:
    message.content[next(iter(message.content.array_records))] = arrays


def _array(value: np.ndarray) -> Array:
    return Array(np.asarray(value, dtype=np.float32))
