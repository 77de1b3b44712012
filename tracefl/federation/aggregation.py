"""How updates become a model: Flower's strategies by name, correct for running statistics too.

Server optimizers (such as FedAdam) and differential privacy work on a model's parameters.
BatchNorm's running mean and variance are no parameters: a step of Adam or Gaussian noise can make a
variance negative, and a clipping norm would consist of little else. `ParametersOnly` hides them
from the strategy and averages them as they are.
"""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import Strategy

from tracefl.config import Config
from tracefl.errors import TraceFLError
from tracefl.federation.privacy import Aggregated, FixedClipping, Messages

BY_NAME = {name.lower(): getattr(strategy, name) for name in strategy.__all__}
SERVER_OPTIMIZERS = (strategy.FedAdam, strategy.FedYogi, strategy.FedAdagrad, strategy.FedAvgM)


def build_strategy(config: Config, buffers: frozenset[str] = frozenset()) -> Strategy:
    """Flower's strategy `config.strategy.name`, so that every node that it is shown takes part.

    Args:
        config: the strategy's name and options, clients_per_round, and differential privacy.
        buffers: names of the floating-point entries of the model's state that are no parameters.

    Raises:
        TraceFLError: the strategy does not take these options.
    """
    count, name, options = config.clients_per_round, config.strategy.name, config.strategy.options
    try:
        counts = {"fraction_evaluate": 0.0, "min_train_nodes": count, "min_available_nodes": count}
        inner: Strategy = BY_NAME[name](**counts, **options)
    except (TypeError, ValueError) as error:
        raise TraceFLError(f"strategy.options must be arguments of {name}, got {options} ({error})") from error
    if config.noise_multiplier != -1:
        inner = FixedClipping(inner, config.noise_multiplier, config.clipping_norm, count, seed=config.seed)
    return ParametersOnly(inner, buffers) if isinstance(inner, (FixedClipping, *SERVER_OPTIMIZERS)) else inner


class Wrapper(Strategy):
    """A strategy around another one; clients do not evaluate, the server does."""

    strategy: Strategy

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Messages:
        return []

    def aggregate_evaluate(self, server_round: int, replies: Messages) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        self.strategy.summary()


class ParametersOnly(Wrapper):
    """Shows the inner strategy only the parameters.

    The model's buffers are averaged, weighted by num-examples.
    """

    def __init__(self, inner: Strategy, buffers: frozenset[str]) -> None:
        self.strategy, self.buffers = inner, buffers

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Messages:
        messages = list(self.strategy.configure_train(server_round, self._parameters(arrays), config, grid))
        for message in messages:
            _replace_arrays(message, arrays)
        return messages

    def aggregate_train(self, server_round: int, replies: Messages) -> Aggregated:
        replies = list(replies)
        whole = [next(iter(reply.content.array_records.values())) for reply in replies]
        for reply, arrays in zip(replies, whole, strict=True):
            _replace_arrays(reply, self._parameters(arrays))
        released, metrics = self.strategy.aggregate_train(server_round, replies)
        if released is None:
            return None, metrics
        n_k = np.array([next(iter(reply.content.metric_records.values()))["num-examples"] for reply in replies], float)
        averaged = {}
        for name in self.buffers & whole[0].keys():
            mean = np.average([arrays[name].numpy() for arrays in whole], axis=0, weights=n_k)
            averaged[name] = Array(np.asarray(mean, np.float32))
        together = {**released, **averaged}
        return ArrayRecord({name: together[name] for name in whole[0]}), metrics

    def _parameters(self, arrays: ArrayRecord) -> ArrayRecord:
        """In order of name: FedAvgM pairs arrays by position.

        A recorded model has another order.
        """
        return ArrayRecord({name: arrays[name] for name in sorted(arrays) if name not in self.buffers})


def _replace_arrays(message: Message, arrays: ArrayRecord) -> None:
    message.content[next(iter(message.content.array_records))] = arrays
