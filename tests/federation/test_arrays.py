"""What models are sent: half precision, tied, several records, in part, whole numbers."""

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from tests.federation.own import INITIAL, OwnGrid, arrays, new_app
from tests.federation.recording import THREE, mean_of, record, shares
from tracefl import Run
from tracefl.errors import TraceFLError


def test_replies_in_half_precision_are_kept_as_they_came(tmp_path):
    def half(content, client):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord({name: value.half() for name, value in state.items()})
        return content

    record(tmp_path, OwnGrid(THREE, new_app(half)))
    run = Run.open(tmp_path)
    assert run.round(2).client_state("a")["w"].dtype == torch.float16
    assert run.global_state(2)["w"].dtype == torch.float32
    torch.testing.assert_close(mean_of(run, 2).float(), run.global_state(2)["w"], rtol=1e-2, atol=1e-2)


def test_tied_weights_are_kept_under_both_names(tmp_path):
    shared = torch.ones(4)
    initial = {"head": shared, "embedding": shared, "part": shared[:2]}
    run = Run.create(tmp_path / "plain", initial=initial, clients=[], seed=0)
    assert {name: value.tolist() for name, value in run.global_state(0).items()} == {
        name: value.tolist() for name, value in initial.items()
    }
    record(tmp_path / "app", rounds=1, initial=ArrayRecord(initial))
    assert list(Run.open(tmp_path / "app").global_state(1)) == list(initial)


class Scaffold(FedAvg):
    """Takes the model from replies that hold more."""

    def aggregate_train(self, server_round, replies):
        states = [reply.content[self.arrayrecord_key].to_torch_state_dict() for reply in replies]
        return ArrayRecord({n: sum(s[n] for s in states) / len(states) for n in states[0]}), None


def test_among_several_array_records_the_models_is_named(tmp_path):
    def more(content, client):
        model = content.pop("arrays")
        content["controls"], content["model"] = ArrayRecord({"c": torch.ones(2)}), model
        content["timing"] = MetricRecord({"seconds": 1.0})
        return content

    grid = OwnGrid(THREE, new_app(more))
    with pytest.raises(TraceFLError, match="holds the ArrayRecords controls, model: name the model's by arrayrecord_"):
        record(tmp_path, grid, rounds=1, strategy=Scaffold(fraction_evaluate=0.0))

    class Named(Scaffold):
        def aggregate_train(self, server_round, replies):
            states = [reply.content["model"].to_torch_state_dict() for reply in replies]
            return ArrayRecord({n: sum(s[n] for s in states) / len(states) for n in states[0]}), None

    record(tmp_path, grid, rounds=1, strategy=Named(fraction_evaluate=0.0), arrayrecord_key="model")
    run = Run.open(tmp_path)
    assert list(run.round(1).client_state("a")) == list(INITIAL)
    assert shares(run) == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-3)


def test_partial_states_leave_the_rest_as_it_was(tmp_path):
    def head(content, client):
        content["arrays"] = ArrayRecord({"b": content["arrays"]["b"]})
        return content

    record(tmp_path, OwnGrid(THREE, new_app(head)))
    run = Run.open(tmp_path)
    assert list(run.round(1).client_state("b")) == ["b"]
    assert torch.equal(run.global_state(2)["w"], INITIAL["w"])
    torch.testing.assert_close(mean_of(run, 2, "b"), run.global_state(2)["b"])


def test_whole_numbers_are_rounded_not_cut_off(tmp_path):
    """Flower averages them as floats: 7 * 0.1 + 7 * 0.2 + 7 * 0.7 is a little less than 7."""

    def count(content, client):
        state = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord({**state, "count": torch.tensor(7), "on": torch.tensor(True)})
        content["metrics"]["num-examples"] = {"a": 1, "b": 2, "c": 7}[client]
        return content

    initial = arrays({**INITIAL, "count": torch.tensor(0), "on": torch.tensor(True)})
    record(tmp_path, OwnGrid(THREE, new_app(count)), rounds=2, initial=initial)
    released = Run.open(tmp_path).global_state(2)
    assert (released["count"].item(), released["count"].dtype) == (7, torch.int64)
    assert released["on"].item() is True
