"""Every strategy by name on instant clients: p_k as it took them, statistics that stay valid, moments that resume."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from tests.federation.instant import NODES, START, InstantGrid, state_of
from tests.federation.test_recorder import files
from tracefl.config import STRATEGIES
from tracefl.errors import TraceFLError
from tracefl.federation.aggregation import build_strategy
from tracefl.federation.recorder import Recorder
from tracefl.record import ClientInfo
from tracefl.runs import Run
from tracefl.training import Evaluation

BUFFERS = frozenset({"bn.running_var"})
OPTIONS = {"fedavgm": ["strategy.options={server_momentum: 0.5}"], "fedprox": ["strategy.options={proximal_mu: 0.1}"]}


def run_rounds(config, folder, name, *overrides, upto=(3,)) -> Run:
    c = config("num_clients=12", "clients_per_round=4", f"strategy.name={name}", *OPTIONS.get(name, []), *overrides)
    run = Run.create(folder, initial=START, clients=[ClientInfo(str(k), {0: 10 + k}) for k in range(12)], seed=0)
    for count in upto:
        run = Run.open(folder)
        strategy = build_strategy(c, BUFFERS)
        evaluate = lambda _: Evaluation(0.5, 0.9, torch.tensor([1]))  # noqa: E731
        recorder = Recorder(strategy, run, NODES, clients_per_round=4, seed=0, evaluate=evaluate)
        arrays = ArrayRecord(dict(run.global_state(len(run.rounds))))
        recorder.start(InstantGrid(), arrays, count, timeout=5.0, train_config=ConfigRecord())
    return run


# Flower's bulyan goes through the model number by number
SLOW = {"bulyan": [pytest.mark.slow]}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, [])) for name in STRATEGIES])
def test_every_strategy_runs_is_recorded_and_resumes_to_the_same_bytes(config, tmp_path, name):
    whole = run_rounds(config, tmp_path / "a", name, upto=(2,))
    run_rounds(config, tmp_path / "b", name, upto=(1, 2))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for number in (1, 2):
        assert sum(client.weight for client in whole.round(number).clients) == pytest.approx(1)
        released = whole.global_state(number)
        assert all(released[key].dtype == torch.float32 for key in START)
        assert (released["bn.running_var"] > 0).all()


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "fedavgm"])
def test_strategies_that_look_at_sizes_weigh_by_examples(config, tmp_path, name):
    for client in run_rounds(config, tmp_path, name, upto=(1,)).round(1).clients:
        total = sum(c.num_examples for c in Run.open(tmp_path).round(1).clients)
        assert client.weight == client.num_examples / total


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", pytest.param("bulyan", marks=pytest.mark.slow)])
def test_strategies_blind_to_sizes_weigh_every_update_the_same(config, tmp_path, name):
    assert [c.weight for c in run_rounds(config, tmp_path, name, upto=(1,)).round(1).clients] == [0.25] * 4


def test_krum_weighs_the_one_update_that_it_chose(config, tmp_path):
    run = run_rounds(config, tmp_path, "krum", upto=(1,))
    (chosen,) = [client for client in run.round(1).clients if client.weight]
    assert chosen.weight == 1
    assert torch.equal(run.global_state(1)["w"], run.round(1).client_state(chosen.id)["w"])


def test_statistics_are_averaged_whatever_the_server_optimizer_does(config, tmp_path):
    run = run_rounds(config, tmp_path, "fedadam", upto=(1,))
    clients = run.round(1).clients
    mean = sum(c.weight * state_of(int(c.id), 1)["bn.running_var"] for c in clients)
    torch.testing.assert_close(run.global_state(1)["bn.running_var"], mean)


def test_an_option_of_the_wrong_kind_is_refused(config):
    c = config("strategy.name=fedadam")
    c.strategy.options = {"eta": 0.1, "zeta": 1}
    with pytest.raises(TraceFLError, match="zeta"):
        build_strategy(c)


def test_fedadam_matches_its_formula(config, tmp_path):
    run = run_rounds(config, tmp_path, "fedadam", upto=(1,))
    mean = sum(c.weight * state_of(int(c.id), 1)["w"].double().numpy() for c in run.round(1).clients)
    m, v = 0.1 * mean, 0.01 * mean**2  # the incoming model is zero
    step = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2) * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(run.global_state(1)["w"].numpy(), step, rtol=1e-5)
