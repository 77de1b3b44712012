"""Which training example goes to which client, by the partitioners of flwr-datasets."""

import datasets
import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)

from tracefl.config import DataDist
from tracefl.errors import TraceFLError

MIN_EXAMPLES_PER_CLASS = 10
ATTEMPTS = 10


def partition(labels: np.ndarray, dist: DataDist, seed: int) -> list[np.ndarray]:
    """Rows of the training split for each client, as one int64 array per client.

    On every client, classes with fewer than ten examples are dropped and the rest is cut at
    `max_per_client_data_size`. A draw that leaves a client without data is drawn again with another seed.

    Raises:
        TraceFLError: no draw gives every client data.
    """
    empty: list[int] = []
    for attempt in range(ATTEMPTS):
        clients = [
            _trim(rows, labels, dist.max_per_client_data_size) for rows in _draw(labels, dist, seed + attempt * 1000)
        ]
        empty = [client for client, rows in enumerate(clients) if len(rows) == 0]
        if not empty:
            return clients
    raise TraceFLError(
        f"data_dist.dist_type={dist.dist_type} leaves {len(empty)} of num_clients={dist.num_clients} clients (first: "
        f"{empty[0]}) with no class of at least {MIN_EXAMPLES_PER_CLASS} of the {len(labels)} training examples: lower "
        "num_clients or raise dirichlet_alpha."
    )


def _draw(labels: np.ndarray, dist: DataDist, seed: int) -> list[np.ndarray]:
    partitioner = _partitioner(dist, seed)
    partitioner.dataset = datasets.Dataset.from_dict({"row": np.arange(len(labels)), "label": labels})
    try:
        return [np.asarray(partitioner.load_partition(k)["row"], dtype=np.int64) for k in range(dist.num_clients)]
    except ValueError as error:
        raise TraceFLError(
            f"data_dist.dist_type={dist.dist_type} cannot spread {len(labels)} training examples of "
            f"{len(np.unique(labels))} classes over num_clients={dist.num_clients} ({error}): change one of the two."
        ) from error


def _partitioner(dist: DataDist, seed: int) -> Partitioner:
    if dist.dist_type == "non_iid_dirichlet":
        return DirichletPartitioner(
            num_partitions=dist.num_clients,
            partition_by="label",
            alpha=dist.dirichlet_alpha,
            min_partition_size=0,
            self_balancing=True,
            seed=seed,
        )
    kind, count = dist.dist_type.rsplit("-", 1)
    if kind == "PathologicalPartitioner":
        return PathologicalPartitioner(
            num_partitions=dist.num_clients,
            partition_by="label",
            num_classes_per_partition=int(count),
            class_assignment_mode="first-deterministic",
            seed=seed,
        )
    return ShardPartitioner(
        num_partitions=dist.num_clients, partition_by="label", num_shards_per_partition=int(count), seed=seed
    )


def _trim(rows: np.ndarray, labels: np.ndarray, limit: int) -> np.ndarray:
    counts = np.bincount(labels[rows], minlength=1)
    kept = rows[counts[labels[rows]] >= MIN_EXAMPLES_PER_CLASS] if len(rows) else rows
    return kept if limit == -1 else kept[:limit]
