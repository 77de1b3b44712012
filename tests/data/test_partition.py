"""Partitions: every distribution, the drop of small classes, the cap, and no row twice."""

import numpy as np
import pytest

from tracefl.config import DIST_TYPES
from tracefl.data.partition import partition
from tracefl.errors import TraceFLError

LABELS = np.random.default_rng(0).integers(0, 10, 4000)


def classes(rows: np.ndarray, labels: np.ndarray = LABELS) -> set[int]:
    return set(labels[rows].tolist())


@pytest.mark.parametrize("dist_type", DIST_TYPES)
def test_no_row_goes_to_two_clients_and_no_class_is_small(config, dist_type):
    c = config(f"data_dist.dist_type={dist_type}", "data_dist.max_per_client_data_size=-1", "seed=1")
    clients = partition(LABELS, c).clients
    assert len(clients) == 10
    rows = np.concatenate(clients)
    assert len(np.unique(rows)) == len(rows) <= len(LABELS)
    for client in clients:
        assert np.bincount(LABELS[client])[list(classes(client))].min() >= 10


@pytest.mark.parametrize("count", [1, 2, 3])
def test_pathological_clients_hold_that_many_classes(config, count):
    clients = partition(LABELS, config(f"data_dist.dist_type=PathologicalPartitioner-{count}")).clients
    assert {len(classes(client)) for client in clients} == {count}
    assert set().union(*(classes(client) for client in clients)) == set(range(10))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sharded_clients_hold_few_classes(config, count):
    c = config(f"data_dist.dist_type=sharded-non-iid-{count}", "dirichlet_alpha=-1")
    assert max(len(classes(client)) for client in partition(LABELS, c).clients) <= 2 * count


def test_smaller_alpha_means_fewer_classes_per_client(config):
    def mean_classes(alpha: float) -> float:
        clients = partition(LABELS, config(f"dirichlet_alpha={alpha}")).clients
        return float(np.mean([len(classes(client)) for client in clients]))

    assert mean_classes(0.1) < mean_classes(1.0) < mean_classes(100.0) == 10


def test_the_cap_holds_and_minus_one_lifts_it(config):
    capped = partition(LABELS, config("data_dist.max_per_client_data_size=50")).clients
    free = partition(LABELS, config("data_dist.max_per_client_data_size=-1")).clients
    assert max(map(len, capped)) == 50
    assert all(set(few) <= set(many) for few, many in zip(capped, free, strict=True))


def test_the_seed_decides(config):
    first, second, other = (partition(LABELS, config(f"seed={seed}")).clients for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_too_many_clients_for_the_data_is_said_so(config):
    with pytest.raises(TraceFLError, match=r"num_clients=60.*lower num_clients"):
        partition(LABELS[:300], config("num_clients=60", "clients_per_round=5"))


RARE = np.repeat([0, 1, 2, 3], [600, 400, 25, 3])  # on two clients: 2 is rare on one or both, 3 on both


def test_what_nobody_holds_is_counted_by_label_and_reason(config):
    two = ("num_clients=2", "clients_per_round=2", "dirichlet_alpha=1", "seed=2")
    for least, limit in ((10, 2048), (14, 100), (1, -1), (4, 50)):
        c = config(*two, f"data_dist.min_examples_per_class={least}", f"data_dist.max_per_client_data_size={limit}")
        found = partition(RARE, c)
        everyone = partition(RARE, config(*two, "data_dist.min_examples_per_class=1")).clients
        rare, cut = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), 0)
        for drawn, client in zip(everyone, found.clients, strict=True):
            held = [int((RARE[drawn] == label).sum()) for label in range(4)]
            for label, count in enumerate(held):
                if count < least:
                    rare[label] += count
                else:
                    cut[label] += count - int((RARE[client] == label).sum())
        assert found.left_out == {
            "dist_type": {},
            "min_examples_per_class": {label: n for label, n in rare.items() if n},
            "max_per_client_data_size": {label: n for label, n in cut.items() if n},
        }
        assert (3 in found.left_out["min_examples_per_class"]) == (least >= 4)


def test_what_the_distribution_gives_to_nobody_is_counted(config):
    c = config("data_dist.dist_type=PathologicalPartitioner-1", "num_clients=2", "clients_per_round=2")
    assert partition(RARE, c).left_out["dist_type"] == {2: 25, 3: 3}


def test_the_fewest_of_a_class_are_a_setting(config):
    c = ("num_clients=1", "clients_per_round=1")
    assert classes(partition(RARE, config(*c)).clients[0], RARE) == {0, 1, 2}
    three = partition(RARE, config(*c, "data_dist.min_examples_per_class=3"))
    assert classes(three.clients[0], RARE) == {0, 1, 2, 3}
    with pytest.raises(TraceFLError, match=r"no class of at least 601 of .*lower .*data_dist\.min_examples_per_class"):
        partition(RARE, config(*c, "data_dist.min_examples_per_class=601"))
