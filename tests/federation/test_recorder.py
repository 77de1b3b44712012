"""The recorder on a grid of instant clients: who takes part, what is written, what is refused."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg

from tests.federation.instant import NODES, START, InstantGrid, state_of
from tracefl.errors import TraceFLError
from tracefl.federation.recorder import Recorder
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import Evaluation


def recorder(run: Run, **changes) -> Recorder:
    settings = {"clients_per_round": 4, "seed": 5, "evaluate": lambda _: Evaluation(0.5, 0.9, torch.tensor([1, 0]))}
    settings |= changes
    count = settings["clients_per_round"]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=count, min_available_nodes=count)
    return Recorder(strategy, run, NODES, **settings)


def new_run(folder) -> Run:
    return Run.create(folder, initial=START, clients=[ClientInfo(str(k), {0: 10 + k}) for k in range(12)], seed=5)


def run_rounds(run: Run, count: int, grid=None, timeout: float = 5.0, **changes) -> Run:
    arrays = ArrayRecord(dict(run.global_state(len(run.rounds))))
    recorder(run, **changes).start(grid or InstantGrid(), arrays, count, timeout=timeout, train_config=ConfigRecord())
    return run


def files(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.safetensors")}


def test_a_round_holds_every_update_as_received_and_their_weighted_mean(tmp_path):
    run = run_rounds(new_run(tmp_path), 2)
    assert [record.number for record in run.rounds] == [1, 2]
    for number in (1, 2):
        view, mean = run.round(number), torch.zeros(3)
        assert len(view.clients) == 4
        assert sum(client.weight for client in view.clients) == pytest.approx(1)
        for client in view.clients:
            assert client.num_examples == 10 + int(client.id)
            received = run.round(number).client_state(client.id)
            for name, value in state_of(int(client.id), number).items():
                assert torch.equal(received[name], value)
            mean += client.weight * received["w"]
        torch.testing.assert_close(run.global_state(number)["w"], mean)
    assert run.rounds[0].loss == 0.5
    assert run.predictions(2).tolist() == [1, 0]


def test_the_order_of_replies_does_not_matter(tmp_path):
    run_rounds(new_run(tmp_path / "a"), 3, InstantGrid(seed=1))
    run_rounds(new_run(tmp_path / "b"), 3, InstantGrid(seed=2))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_resumed_run_ends_with_the_same_bytes(tmp_path):
    run_rounds(new_run(tmp_path / "a"), 3)
    run_rounds(new_run(tmp_path / "b"), 1)
    resumed = Run.open(tmp_path / "b")
    run_rounds(resumed, 3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert Run.open(tmp_path / "a").rounds == Run.open(tmp_path / "b").rounds


def test_participants_are_drawn_by_seed_and_round(tmp_path):
    one = recorder(new_run(tmp_path))
    draws = [one.participants(number) for number in range(1, 40)]
    assert draws[0] == recorder(one.run).participants(1)
    assert all(len(set(draw)) == 4 and draw == sorted(draw, key=int) for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 30
    assert set().union(*draws) == set(NODES.values())
    assert recorder(one.run, seed=6).participants(1) != draws[0]


def test_another_is_drawn_for_a_client_that_is_excluded_and_nobody_else_moves(tmp_path):
    run = new_run(tmp_path)
    usual, without = recorder(run), recorder(run, excluded={"3", "10"})
    refilled = set()
    for number in range(1, 60):
        before, after = usual.participants(number), without.participants(number)
        assert len(set(after)) == 4
        assert after == sorted(after, key=int)
        assert set(before) - {"3", "10"} <= set(after)
        assert not {"3", "10"} & set(after)
        refilled |= set(after) - set(before)
    assert refilled == set(NODES.values()) - {"3", "10"}
    everyone = recorder(run, excluded={"3", "10"}, clients_per_round=10)
    assert everyone.participants(1) == sorted(set(NODES.values()) - {"3", "10"}, key=int)


def test_only_participants_are_asked(tmp_path):
    grid = InstantGrid()
    run = run_rounds(new_run(tmp_path), 2, grid)
    asked = [sent for sent in grid.sent if sent]
    assert [sorted(sent, key=int) for sent in asked] == [[c.id for c in run.round(t).clients] for t in (1, 2)]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "ValueError: out of data"),
        ("silent", "no reply in time"),
        ("nan", "'w' has non-finite values"),
        ("shape", r"'w' must be \(\(3,\), 'torch.float32'\), got \(\(4,\), 'torch.float32'\)"),
        ("dtype", "torch.float64"),
        ("missing", "its model lacks 'w', unlike those of most clients"),
        ("extra", "extra entry 'v'"),
        ("empty", "its model has no entry"),
        ("no examples", "num-examples must be a whole number of at least 1 .*, got 0"),
    ],
)
def test_a_broken_client_stops_the_run_by_name_and_nothing_recorded_is_lost(tmp_path, fault, words):
    run = run_rounds(new_run(tmp_path), 1)
    victim = int(recorder(run).participants(2)[1])
    with pytest.raises(TraceFLError, match=rf"round 2, client {victim}: .*{words}.*Rounds 1 to 1 are kept"):
        run_rounds(run, 3, InstantGrid({victim: fault}), timeout=0.05)
    assert len(Run.open(tmp_path).rounds) == 1
    healthy = run_rounds(Run.open(tmp_path), 3)
    assert len(healthy.rounds) == 3


def test_going_on_without_a_client_is_advised_only_where_another_has_succeeded(tmp_path):
    everyone = InstantGrid(dict.fromkeys(range(12), "raise"))
    run = new_run(tmp_path)
    with pytest.raises(TraceFLError) as error:
        run_rounds(run, 1, everyone)
    assert "accept_failures" not in str(error.value)
    victim = int(recorder(run).participants(1)[0])
    with pytest.raises(TraceFLError, match=r"client .* no reply in time .*accept_failures=true goes on without"):
        run_rounds(run, 1, InstantGrid({victim: "silent"}), timeout=0.05)  # the others have replied
    run_rounds(run, 1)
    with pytest.raises(TraceFLError, match=r"round 2, client .*accept_failures=true goes on without"):
        run_rounds(run, 2, everyone)


@pytest.mark.parametrize("fault", ["raise", "silent", "nan", "missing"])
def test_with_accept_failures_the_round_goes_on_without_it(tmp_path, fault):
    run = new_run(tmp_path)
    victim = recorder(run).participants(1)[2]
    run_rounds(run, 1, InstantGrid({int(victim): fault}), timeout=0.05, accept_failures=True)
    record = Run.open(tmp_path).rounds[0]
    assert list(record.failures) == [victim]
    assert victim not in [client.id for client in record.clients]
    assert sum(client.weight for client in record.clients) == pytest.approx(1)


def test_clients_may_send_part_of_the_model(tmp_path):
    """As in FedBN, or with adapters; what nobody sends stays as it was."""
    run = run_rounds(new_run(tmp_path), 2, InstantGrid(dict.fromkeys(range(12), "local normalisation")))
    for number in (1, 2):
        record, mean = run.round(number), torch.zeros(3)
        for client in record.clients:
            received = record.client_state(client.id)
            assert sorted(received) == ["a", "w"]
            mean += client.weight * received["w"]
        released = run.global_state(number)
        torch.testing.assert_close(released["w"], mean)
        assert torch.equal(released["bn.running_var"], START["bn.running_var"])


def test_one_client_that_sends_more_than_most_does_not_evict_them(tmp_path):
    run = new_run(tmp_path)
    chosen = recorder(run).participants(1)
    faults = {int(client): "local normalisation" for client in chosen[:3]}
    run_rounds(run, 1, InstantGrid(faults), accept_failures=True)
    assert [client.id for client in run.rounds[0].clients] == chosen[:3]
    assert run.rounds[0].failures == {chosen[3]: "its model has 'bn.running_var', unlike those of most clients"}


def test_a_round_in_which_everyone_fails_stops_the_run(tmp_path):
    grid = InstantGrid(dict.fromkeys(range(12), "raise"))
    with pytest.raises(TraceFLError, match="round 1: every client failed; the first said: client"):
        run_rounds(new_run(tmp_path), 1, grid, accept_failures=True)


def test_observers_hear_of_every_client_and_round(tmp_path):
    heard, rounds = [], []
    run = run_rounds(
        new_run(tmp_path),
        2,
        on_client=lambda number, client, metrics: heard.append((number, client, metrics["num-examples"])),
        on_round=lambda run: rounds.append(len(run.rounds)),
    )
    assert sorted(heard) == sorted((t, c.id, c.num_examples) for t in (1, 2) for c in run.round(t).clients)
    assert rounds == [1, 2]


def test_a_run_without_its_models_description_says_so(tmp_path):
    run = new_run(tmp_path)
    with pytest.raises(TraceFLError, match=r"has no entry 'model': give it to Run\.create"):
        run.model(0)
