"""Which training example goes to which client, by the partitioners of flwr-datasets."""

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from flwr_datasets.partitioner import DirichletPartitioner, Partitioner, PathologicalPartitioner, ShardPartitioner

from tracefl.config import Config
from tracefl.data.examples import count_labels
from tracefl.errors import TraceFLError, as_sentence, require

ATTEMPTS = 10  # draws, each with another seed, before giving up


@dataclass(frozen=True)
class Partition:
    """Which training examples the clients hold, and which nobody does.

    Attributes:
        clients: Row numbers of the training split, one int64 array per client.
        left_out: By the reason, which is the setting `dist_type`, `min_examples_per_class` or
            `max_per_client_data_size` of data_dist: how many examples of each label.
    """

    clients: list[np.ndarray]
    left_out: dict[str, dict[int, int]]


def partition(labels: np.ndarray, config: Config) -> Partition:
    """Spread the training examples over the clients as `data_dist.dist_type` says.

    On every client, classes with fewer than `data_dist.min_examples_per_class` examples are dropped
    and the rest is cut at `data_dist.max_per_client_data_size`. If a client is left without data,
    another seed is tried.

    Args:
        labels: Of the training split, int64 [N].
        config: Its seed, num_clients, dirichlet_alpha and data_dist are read.

    Raises:
        TraceFLError: No seed gives every client data, or the distribution is impossible.
    """
    shards = int(config.data_dist.dist_type.rpartition("-")[2]) if "sharded" in config.data_dist.dist_type else 1
    needs = f"data_dist.dist_type={config.data_dist.dist_type} over num_clients={config.num_clients} clients needs"
    few = f"{needs} {config.num_clients * shards} training examples at least, got {len(labels)}"
    require(config.num_clients * shards <= len(labels), f"{few}: lower num_clients.")
    least, limit = config.data_dist.min_examples_per_class, config.data_dist.max_per_client_data_size
    for attempt in range(ATTEMPTS):
        drawn = _draw(labels, config, config.seed + attempt * 1000)
        common = [_common(rows, labels, least) for rows in drawn]
        clients = [rows if limit == -1 else rows[:limit] for rows in common]
        empty = [client for client, rows in enumerate(clients) if len(rows) == 0]
        if not empty:
            stages = {"dist_type": drawn, "min_examples_per_class": common, "max_per_client_data_size": clients}
            return Partition(clients, _left_out(labels, stages))
    who = f"{len(empty)} of num_clients={config.num_clients} clients (first: {empty[0]})"
    what = f"no class of at least {least} of the {len(labels)} training examples"
    remedy = "lower num_clients or data_dist.min_examples_per_class, or raise dirichlet_alpha"
    raise TraceFLError(f"data_dist.dist_type={config.data_dist.dist_type} leaves {who} with {what}: {remedy}.")


def _draw(labels: np.ndarray, config: Config, seed: int) -> list[np.ndarray]:
    partitioner = _partitioner(config, seed)
    partitioner.dataset = datasets.Dataset.from_dict({"row": np.arange(len(labels)), "label": labels})
    size = f"{len(labels)} examples of {len(np.unique(labels))} classes over num_clients={config.num_clients}"
    problem = f"data_dist.dist_type={config.data_dist.dist_type} cannot spread {size}"
    with as_sentence(problem, "change one of the two", ValueError):
        return [np.asarray(partitioner.load_partition(k)["row"], dtype=np.int64) for k in range(config.num_clients)]


def _partitioner(config: Config, seed: int) -> Partitioner:
    common: dict[str, Any] = {"num_partitions": config.num_clients, "partition_by": "label", "seed": seed}
    if config.data_dist.dist_type == "non_iid_dirichlet":
        alpha = config.dirichlet_alpha
        return DirichletPartitioner(**common, alpha=alpha, min_partition_size=0, self_balancing=True)
    kind, count = config.data_dist.dist_type.rsplit("-", 1)
    if kind == "PathologicalPartitioner":
        order = "first-deterministic"
        return PathologicalPartitioner(**common, num_classes_per_partition=int(count), class_assignment_mode=order)
    return ShardPartitioner(**common, num_shards_per_partition=int(count))


def _common(rows: np.ndarray, labels: np.ndarray, least: int) -> np.ndarray:
    """Those rows of a client whose class has at least `least` of them."""
    counts = np.bincount(labels[rows], minlength=1)
    return rows[counts[labels[rows]] >= least] if len(rows) else rows


def _left_out(labels: np.ndarray, stages: dict[str, list[np.ndarray]]) -> dict[str, dict[int, int]]:
    """What each stage leaves out of the rows of the one before; the first, of all rows."""
    before, found = np.arange(len(labels)), {}
    for reason, clients in stages.items():
        kept = np.concatenate(clients)
        found[reason] = count_labels(labels[np.setdiff1d(before, kept, assume_unique=True)])
        before = kept
    return found
