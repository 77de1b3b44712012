"""The server: find out which node is which client, then run the rounds of the recorded strategy."""

import json
import time
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from torch import nn

from tracefl.config import Config
from tracefl.data.examples import Examples
from tracefl.data.faults import fault_settings
from tracefl.data.prepared import PreparedData
from tracefl.errors import TraceFLError, require
from tracefl.federation import grid as grid_module
from tracefl.federation.aggregation import build_strategy
from tracefl.federation.nodes import Nodes, by_number
from tracefl.federation.recorder import Recorder
from tracefl.models import load_exchanged_state, model_spec
from tracefl.runs import Run
from tracefl.settings import client_threads
from tracefl.states import State
from tracefl.training import Evaluation, evaluate

IDENTIFY_TIMEOUT_S = 300.0


def serve(
    grid: Grid, config: Config, data: PreparedData, run: Run, model: nn.Module, examples: Examples, **observers: Any
) -> None:
    """Run what is left of the run's rounds on the nodes of `grid`.

    Args:
        grid: Flower's.
        config: the experiment's settings.
        data: the prepared data; clients read their own part.
        run: the run that rounds are added to.
        model: of the run's architecture, on the device to evaluate on; its weights are overwritten.
        examples: the server's.
        **observers: `on_client` and `on_round` of `Recorder`.

    Raises:
        TraceFLError: a client failed; the message names the round and the client.
    """

    def evaluate_state(state: State) -> Evaluation:
        load_exchanged_state(model, state)
        return evaluate(model, examples)

    recorder = Recorder(
        build_strategy(config, frozenset(name for name, _ in model.named_buffers())),
        run,
        grid,
        clients_per_round=config.clients_per_round,
        seed=config.seed,
        evaluate=evaluate_state,
        accept_failures=config.accept_failures,
        excluded=frozenset(map(str, config.exclude_clients)),
        **observers,
    )
    arrays = ArrayRecord(dict(run.global_state(0)))
    task = ConfigRecord({"task": json.dumps(client_task(config, data))})
    recorder.start(grid, arrays, config.num_rounds, timeout=config.round_timeout, train_config=task)


def client_task(config: Config, data: PreparedData) -> dict[str, Any]:
    """The settings that a client needs, as plain JSON."""
    return {
        "seed": config.seed,
        **where_data_are(data),
        "model": model_spec(config, data),
        "training": {"epochs": config.client.epochs, "lr": config.client.lr, "batch_size": config.batch_size},
        "device": config.device,
        "threads": client_threads(config),
        "faulty_clients_ids": config.faulty_clients_ids,
        "fault": fault_settings(config, data.num_classes),
    }


def where_data_are(data: PreparedData) -> dict[str, Any]:
    """The folder of the prepared data; or, where the clients' files are not in it, their SHA-256.

    Then every node has its own file, which must be the one that the run is recorded with.
    """
    if (data.folder / "clients").is_dir():
        return {"data": str(data.folder.resolve())}
    return {
        "data": None,
        "sha256": {client: data.sha256[f"clients/{client}.safetensors"] for client in data.label_counts},
    }


def identify_nodes(grid: Grid, num_clients: int) -> dict[int, str]:
    """Ask every node once, before any training, which client it is.

    Args:
        grid: Flower's.
        num_clients: how many nodes must be there; they are waited for, at most 5 minutes.

    Returns:
        Flower's node id -> client id, the node's partition-id: "0" to str(num_clients - 1).

    Raises:
        TraceFLError: a node failed to answer (`identify` answers for it), or the partitions are
            not 0 to num_clients - 1.
    """
    nodes = Nodes(grid, timeout=IDENTIFY_TIMEOUT_S)
    deadline = time.monotonic() + IDENTIFY_TIMEOUT_S
    while len(list(grid.get_node_ids())) < num_clients and time.monotonic() < deadline:
        time.sleep(grid_module.PULL_INTERVAL_S)
    found = nodes.refresh()
    if problems := nodes.wrong():
        raise TraceFLError(f"round 0: {problems[0]}")
    held, last = sorted(found.values(), key=by_number), num_clients - 1
    wanted = f"must hold partitions 0 to {last} (num_clients={num_clients}), got {held} from {len(found)} nodes"
    complete = held == [str(partition) for partition in range(num_clients)]
    require(complete, f"the connected nodes {wanted}: start one node per client")
    return found
