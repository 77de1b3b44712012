"""Which training example goes to which client, by the partitioners of flwr-datasets."""

import datasets
import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)

from tracefl.config import Config
from tracefl.errors import TraceFLError

MIN_EXAMPLES_PER_CLASS = 10
ATTEMPTS = 10  # draws, each with another seed, before giving up


def partition(labels: np.ndarray, config: Config) -> list[np.ndarray]:
    """Spread the training examples over the clients as `data_dist.dist_type` says.

    On every client, classes with fewer than ten examples are dropped and the rest is cut at
    `data_dist.max_per_client_data_size`. If a client is left without data, another seed is tried.

    Args:
        labels: Of the training split, int64 [N].
        config: Its seed, num_clients, dirichlet_alpha and data_dist are read.

    Returns:
        Row numbers of the training split, one int64 array per client.

    Raises:
        TraceFLError: No seed gives every client data, or the distribution is impossible.
    """
    empty: list[int] = []
    limit = config.data_dist.max_per_client_data_size
    for attempt in range(ATTEMPTS):
        drawn = _draw(labels, config, config.seed + attempt * 1000)
        clients = [_trim(rows, labels, limit) for rows in drawn]
        empty = [client for client, rows in enumerate(clients) if len(rows) == 0]
        if not empty:
            return clients
    raise TraceFLError(
        f"data_dist.dist_type={config.data_dist.dist_type} leaves {len(empty)} of num_clients={config.num_clients} "
        f"clients (first: {empty[0]}) without a class of at least {MIN_EXAMPLES_PER_CLASS} of the {len(labels)} "
        "training examples: lower num_clients or raise dirichlet_alpha."
    )


def _draw(labels: np.ndarray, config: Config, seed: int) -> list[np.ndarray]:
    partitioner = _partitioner(config, seed)
    partitioner.dataset = datasets.Dataset.from_dict({"row": np.arange(len(labels)), "label": labels})
    try:
        return [np.asarray(partitioner.load_partition(k)["row"], dtype=np.int64) for k in range(config.num_clients)]
    except ValueError as error:
        raise TraceFLError(
            f"data_dist.dist_type={config.data_dist.dist_type} cannot spread {len(labels)} training examples of "
            f"{len(np.unique(labels))} classes over num_clients={config.num_clients} ({error}): change one of the two."
        ) from error


def _partitioner(config: Config, seed: int) -> Partitioner:
    clients, dist_type = config.num_clients, config.data_dist.dist_type
    if dist_type == "non_iid_dirichlet":
        return DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=config.dirichlet_alpha,
            min_partition_size=0,
            self_balancing=True,
            seed=seed,
        )
    kind, count = dist_type.rsplit("-", 1)
    if kind == "PathologicalPartitioner":
        return PathologicalPartitioner(
            num_partitions=clients,
            partition_by="label",
            num_classes_per_partition=int(count),
            class_assignment_mode="first-deterministic",
            seed=seed,
        )
    return ShardPartitioner(
        num_partitions=clients, partition_by="label", num_shards_per_partition=int(count), seed=seed
    )


def _trim(rows: np.ndarray, labels: np.ndarray, limit: int) -> np.ndarray:
    counts = np.bincount(labels[rows], minlength=1)
    kept = rows[counts[labels[rows]] >= MIN_EXAMPLES_PER_CLASS] if len(rows) else rows
    return kept if limit == -1 else kept[:limit]
