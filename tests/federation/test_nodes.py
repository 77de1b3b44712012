"""Nodes of somebody else's app come, go and return: which client is whose, and who is waited for."""

import pytest
import torch

from tests.federation.own import INITIAL, OwnGrid, new_app, trained
from tests.federation.recording import THREE, plain, record, shares, trace_round
from tracefl import Run
from tracefl.errors import TraceFLError
from tracefl.federation.recorder import Recorder


def test_a_lost_nodes_answer_is_its_clients_failure(tmp_path):
    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=1)
    grid.on_message = lambda message: message.metadata.message_type == "train" and grid.lost.add(12)
    with pytest.raises(TraceFLError, match=r"round 2, client b: its node is lost: .*Rounds 1 to 1 are kept"):
        record(tmp_path, grid)
    grid.lost.clear()
    record(tmp_path, grid, accept_failures=True)
    last = Run.open(tmp_path).round(2)
    assert [client.id for client in last.clients] == ["a", "c"]
    assert "its node is lost" in last.failures["b"]


def test_a_node_that_returns_under_another_number_is_the_same_client(tmp_path):
    def move(number, model):
        if number == 1:
            moving.nodes[99] = moving.nodes.pop(12)

    record(tmp_path / "again", OwnGrid(THREE), rounds=1)
    record(tmp_path / "again", OwnGrid({11: "a", 99: "b", 13: "c"}), rounds=2)
    moving = OwnGrid(THREE)
    record(tmp_path / "moving", moving, rounds=2, start={"evaluate_fn": move})
    for folder in (tmp_path / "again", tmp_path / "moving"):
        run = Run.open(folder)
        assert [[client.id for client in run.round(t).clients] for t in (1, 2)] == [["a", "b", "c"]] * 2
        assert torch.equal(run.round(2).client_state("b")["w"], trained(run.global_state(1), "b")["w"])
    assert moving.trained_nodes()[3:] == [11, 99, 13]


def test_a_node_that_becomes_another_client_under_its_number_is_that_client(tmp_path):
    def swap(number, model):
        if number == 1:
            grid.nodes[11], grid.nodes[12] = grid.nodes[12], grid.nodes[11]

    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=2, start={"evaluate_fn": swap})
    run = Run.open(tmp_path)
    for client in "abc":
        expected = trained(dict(run.global_state(1)), client)
        assert torch.equal(run.round(2).client_state(client)["w"], expected["w"])


def test_a_silent_node_takes_no_part_and_is_named(tmp_path, caplog):
    grid = OwnGrid(THREE | {14: "d"}, silent=[14])
    with pytest.raises(TraceFLError, match=r"node 14 did not say within 0.3 s .*accept_failures=true"):
        record(tmp_path, grid, rounds=1)
    record(tmp_path, grid, rounds=1, accept_failures=True)
    assert "node 14 did not say" in caplog.text
    assert [client.id for client in Run.open(tmp_path).round(1).clients] == ["a", "b", "c"]


def test_two_nodes_of_one_client_are_both_named(tmp_path):
    with pytest.raises(TraceFLError, match="node 14 says that it is client 'b', as node 12 does"):
        record(tmp_path, OwnGrid(THREE | {14: "b"}), rounds=1)
    record(tmp_path, OwnGrid(THREE | {14: "b"}), rounds=1, accept_failures=True)
    assert [client.id for client in Run.open(tmp_path).round(1).clients] == ["a", "c"]


def test_a_second_node_of_a_client_that_is_there_changes_nothing(tmp_path, caplog):
    def double(number, model):
        if number == 1:
            grid.nodes[14] = {"partition-id": "b"}

    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=2, start={"evaluate_fn": double})
    assert "node 14 says that it is client 'b', as node 12 does: it takes no part" in caplog.text
    assert sorted(grid.trained_nodes()[3:]) == [11, 12, 13]


def test_clients_that_are_expected_are_waited_for_and_missing_ones_named(tmp_path):
    with pytest.raises(TraceFLError, match=r"connected clients are a \(node 11\), .*; clients d are missing"):
        record(tmp_path, rounds=1, clients=["a", "b", "c", "d"])
    assert not (tmp_path / "run.json").exists()


def test_a_surplus_node_takes_no_part_and_is_named(tmp_path, caplog):
    grid = OwnGrid(THREE | {14: "hospital/berlin"})
    record(tmp_path, grid, rounds=1, clients=["a", "b", "c"])
    assert 14 not in grid.trained_nodes()
    assert "node 14 says that it is client 'hospital/berlin', which is none of a, b, c" in caplog.text


def test_a_client_may_join_later(tmp_path, caplog):
    def join(number, model):
        if number == 1:
            grid.nodes[14] = {"partition-id": "d"}

    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=2, start={"evaluate_fn": join})
    assert "round 2: client 'd' has joined" in caplog.text
    run = Run.open(tmp_path)
    assert [client.id for client in run.clients] == ["a", "b", "c", "d"]
    assert len(run.round(2).clients) == 4
    record(tmp_path, OwnGrid(THREE | {14: "d"}), rounds=3)


@pytest.mark.parametrize(
    "name", ["../../../x", "hospital/berlin", "..", ".", "CON", "a b\n", "ünïcode", "x" * 4000, "7"]
)
def test_any_string_is_an_id_and_none_leads_out_of_the_run(tmp_path, name):
    folder = tmp_path / "deep" / "er" / "run"
    record(folder, OwnGrid({1: {"site": name}, 2: {"site": "b"}}, new_app(key="site")), rounds=1, node_key="site")
    written = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert all(folder in file.parents for file in written)
    assert len(list((folder / "rounds/0001/clients").iterdir())) == 2
    run = Run.open(folder)
    state = run.client_states(1)[name]
    assert torch.equal(state["w"], trained(INITIAL, name)["w"])
    assert trace_round(run).client_ids == [client.id for client in run.round(1).clients]


def test_ids_that_differ_only_by_case_have_files_of_their_own(tmp_path):
    record(tmp_path, OwnGrid({1: "Berlin", 2: "berlin"}), rounds=1)
    names = [file.name.lower() for file in (tmp_path / "rounds/0001/clients").iterdir()]
    assert len(set(names)) == 2


def test_a_node_without_the_key_is_told_which_it_has(tmp_path):
    grid = OwnGrid({1: {"site": "a", "data-path": "/x"}, 2: {"site": "b"}})
    with pytest.raises(TraceFLError, match=r"no 'partition-id', it has data-path, site: name the key by node_key"):
        record(tmp_path, grid, rounds=1)


def test_a_client_app_that_cannot_identify_itself_is_told_how(tmp_path):
    app = new_app()
    del app._registered_funcs["query.identify"]
    with pytest.raises(TraceFLError, match=r'register app\.query\("identify"\)\(identify\) in its client app'):
        record(tmp_path, OwnGrid(THREE, app), rounds=1)


def test_too_few_nodes_for_the_strategy_end_in_a_sentence(tmp_path):
    strategy = plain(min_train_nodes=4, min_available_nodes=4)
    with pytest.raises(TraceFLError, match=r"connected clients are a \(node 11\).*at least 4 are needed"):
        record(tmp_path, strategy=strategy, rounds=1)

    def leave(number, model):
        if number == 1:
            del grid.nodes[11], grid.nodes[12]

    grid = OwnGrid(THREE)
    with pytest.raises(TraceFLError, match=r"round 2: the strategy waits for more than 1 nodes"):
        record(tmp_path, grid, start={"evaluate_fn": leave})
    assert len(Run.open(tmp_path).rounds) == 1


def test_a_client_whose_node_has_gone_is_named_and_not_waited_for(tmp_path, caplog):
    def leave(number, model):
        if number == 1:
            del grid.nodes[12]

    grid = OwnGrid(THREE)
    record(tmp_path, grid, start={"evaluate_fn": leave})
    assert "round 2: no node is there for client b" in caplog.text
    assert list(shares(Run.open(tmp_path), 2)) == ["a", "c"]


def test_a_node_that_is_lost_before_it_trains_is_its_clients_failure(tmp_path):
    grid = OwnGrid(THREE)
    record(tmp_path, grid, rounds=1)
    grid.on_message = lambda message: grid.lost.add(12) if len(grid.asked) > 12 else None
    with pytest.raises(TraceFLError, match="round 2, client b: node 12 is lost"):
        record(tmp_path, grid)


def test_drawn_clients_are_waited_for_and_a_missing_one_fails(tmp_path):
    """As the pipeline does: the recorder draws, the strategy takes every node that it is shown."""
    strategy = lambda: plain(min_train_nodes=2, min_available_nodes=2)  # noqa: E731
    record(tmp_path, rounds=1, strategy=strategy(), clients_per_round=2, seed=3)
    one = Recorder(strategy(), tmp_path, OwnGrid({11: "a", 12: "b"}), clients_per_round=2, seed=3, node_timeout=0.2)
    number = next(t for t in range(2, 30) if "c" in one.participants(t))
    del one
    with pytest.raises(TraceFLError, match=f"round {number}, client c: none of the connected nodes says"):
        record(tmp_path, OwnGrid({11: "a", 12: "b"}), rounds=number, strategy=strategy(), clients_per_round=2, seed=3)
    more = {"clients_per_round": 2, "seed": 3, "accept_failures": True}
    record(tmp_path, OwnGrid({11: "a", 12: "b"}), rounds=number, strategy=strategy(), **more)
    last = Run.open(tmp_path).round(number)
    assert list(last.failures) == ["c"]
    assert len(last.clients) == 1
