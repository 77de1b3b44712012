"""Partitions: every distribution, the drop of small classes, the cap, and no row twice."""

import numpy as np
import pytest

from tracefl.config import DIST_TYPES
from tracefl.data.partition import MIN_EXAMPLES_PER_CLASS, partition
from tracefl.errors import TraceFLError

LABELS = np.random.default_rng(0).integers(0, 10, 4000)


def classes(rows: np.ndarray) -> set[int]:
    return set(LABELS[rows].tolist())


@pytest.mark.parametrize("dist_type", DIST_TYPES)
def test_no_row_goes_to_two_clients_and_no_class_is_small(config, dist_type):
    c = config(f"data_dist.dist_type={dist_type}", "data_dist.max_per_client_data_size=-1", "seed=1")
    clients = partition(LABELS, c)
    assert len(clients) == 10
    rows = np.concatenate(clients)
    assert len(np.unique(rows)) == len(rows) <= len(LABELS)
    for client in clients:
        assert np.bincount(LABELS[client])[list(classes(client))].min() >= MIN_EXAMPLES_PER_CLASS


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pathological_clients_hold_that_many_classes(config, count):
    clients = partition(LABELS, config(f"data_dist.dist_type=PathologicalPartitioner-{count}"))
    assert {len(classes(client)) for client in clients} == {count}
    assert set().union(*(classes(client) for client in clients)) == set(range(10))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sharded_clients_hold_few_classes(config, count):
    c = config(f"data_dist.dist_type=sharded-non-iid-{count}", "dirichlet_alpha=-1")
    assert max(len(classes(client)) for client in partition(LABELS, c)) <= 2 * count


def test_smaller_alpha_means_fewer_classes_per_client(config):
    def mean_classes(alpha: float) -> float:
        clients = partition(LABELS, config(f"dirichlet_alpha={alpha}"))
        return float(np.mean([len(classes(client)) for client in clients]))

    assert mean_classes(0.1) < mean_classes(1.0) < mean_classes(100.0) == 10


def test_the_cap_holds_and_minus_one_lifts_it(config):
    capped = partition(LABELS, config("data_dist.max_per_client_data_size=50"))
    free = partition(LABELS, config("data_dist.max_per_client_data_size=-1"))
    assert max(map(len, capped)) == 50
    assert all(set(few) <= set(many) for few, many in zip(capped, free, strict=True))


def test_the_seed_decides(config):
    first, second, other = (partition(LABELS, config(f"seed={seed}")) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_too_many_clients_for_the_data_is_said_so(config):
    with pytest.raises(TraceFLError, match=r"num_clients=60.*lower num_clients"):
        partition(LABELS[:300], config("num_clients=60", "clients_per_round=5"))
