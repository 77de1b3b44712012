"""Four apps in the shape that people write, in Flower's simulation: recorded, interrupted, gone on with and traced."""

import pytest
import torch
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from tests.federation import apps
from tracefl import Run, trace

NODES = 4


def simulate(main, app, rounds: int) -> list:
    server, results = ServerApp(), []

    @server.main()
    def serve(grid, context) -> None:
        results.append(main(grid, rounds))

    backend = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2, "log_to_driver": False}}
    run_simulation(server, app, NODES, backend_config=backend)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "advanced", "vit", "text"])
def test_an_app_is_recorded_goes_on_and_names_the_client_of_each_class(tmp_path, kind):
    new_model, inputs_of, main, app = getattr(apps, kind)(tmp_path / "run")
    (first,) = simulate(main, app, 1)
    (whole,) = simulate(main, app, 4)
    (again,) = simulate(main, app, 4)
    run = Run.open(tmp_path / "run")
    assert [record.number for record in run.rounds] == [1, 2, 3, 4]
    assert {client.id for client in run.clients} == {"0", "1", "2", "3"}
    assert all(len(record.clients) == (2 if kind == "plain" else 4) for record in run.rounds)
    assert all(record.weights_from == "strategy" for record in run.rounds)
    if kind == "advanced":
        assert list(whole) == list(again) == [1, 2, 3, 4]
        assert whole[1] == first[1]
        best = max(run.rounds, key=lambda r: (r.metrics["server"]["accuracy"], r.number))
        saved = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
        assert all(torch.equal(saved[name], value) for name, value in run.global_state(best.number).items())
    else:
        released = run.global_state(4)
        assert all(torch.equal(v, released[n]) for n, v in again.arrays.to_torch_state_dict().items())
        assert list(again.train_metrics_clientapp) == [1, 2, 3, 4]
        assert again.train_metrics_clientapp[1] == first.train_metrics_clientapp[1]
    if kind in ("plain", "text"):
        assert list(again.evaluate_metrics_clientapp) == [1, 2, 3, 4]
    if kind in ("advanced", "vit"):  # where every client takes part in every round
        assert run.metrics(4)["server"]["accuracy"] > 0.6

    # In the first round, before all know every class; which nodes of `plain` take part is left to chance
    prefix = "heads." if kind == "vit" else ""
    model, states = new_model().eval(), run.client_states(1)
    model.load_state_dict({prefix + n: v for n, v in run.global_state(1).items()}, strict=not prefix)
    if prefix:
        states = {client: {prefix + n: v for n, v in state.items()} for client, state in states.items()}
    weights = {client.id: client.weight for client in run.round(1).clients}
    for client in weights:
        known = int(client) % apps.CLASSES
        answer = trace(model, states, inputs_of(int(client)), targets=[known] * 2, weights=weights, method="influence")
        top = {int(answer.client_ids[k]) % apps.CLASSES for k in answer.contributions.argmax(1)}
        assert top == {known}
