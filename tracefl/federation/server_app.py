"""The server: find out which node is which client, then let the recorded strategy run its rounds."""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from tracefl.config import Config
from tracefl.data.examples import Examples
from tracefl.data.faults import fault_settings
from tracefl.data.prepare import PreparedData
from tracefl.errors import TraceFLError
from tracefl.federation.grid import PULL_INTERVAL_S
from tracefl.federation.strategies import build_strategy
from tracefl.federation.strategy import Recorder
from tracefl.models import build_model, load_exchanged_state, model_spec
from tracefl.runs import Run
from tracefl.settings import client_threads
from tracefl.training import Evaluation, evaluate

IDENTIFY_TIMEOUT_S = 300.0


def serve(
    grid: Grid,
    config: Config,
    data: PreparedData,
    run: Run,
    *,
    on_client: Callable[[int, str, Mapping[str, Any]], None],
    on_round: Callable[[Run], None],
) -> None:
    """Run what is left of the run's rounds on the nodes of `grid`.

    Raises:
        TraceFLError: a client failed; the message names the round and the client.
    """
    spec = model_spec(config, data)
    buffers = dict(build_model(spec).named_buffers())
    recorder = Recorder(
        build_strategy(config, frozenset(buffers)),
        run,
        identify_nodes(grid, config.num_clients),
        clients_per_round=config.clients_per_round,
        seed=config.seed,
        evaluate=partial(_evaluate_state, config, spec, data.server()),
        accept_failures=config.accept_failures,
        on_client=on_client,
        on_round=on_round,
    )
    recorder.start(
        grid,
        ArrayRecord(dict(run.global_state(len(run.rounds)))),
        config.num_rounds,
        timeout=config.round_timeout,
        train_config=ConfigRecord({"task": json.dumps(client_task(config, data))}),
    )


def client_task(config: Config, data: PreparedData) -> dict[str, Any]:
    """All that a client must know, as plain JSON."""
    return {
        "seed": config.seed,
        "data": str(data.folder.resolve()),
        "model": model_spec(config, data),
        "epochs": config.client.epochs,
        "lr": config.client.lr,
        "batch_size": config.batch_size,
        "device": config.device,
        "threads": client_threads(config),
        "faulty_clients_ids": config.faulty_clients_ids,
        "fault": fault_settings(config, data.num_classes),
    }


def identify_nodes(grid: Grid, num_clients: int) -> dict[int, str]:
    """Client id of every node: asked once, before any training, and held by the server from then on."""
    deadline = time.monotonic() + IDENTIFY_TIMEOUT_S
    while len(nodes := list(grid.get_node_ids())) < num_clients and time.monotonic() < deadline:
        time.sleep(PULL_INTERVAL_S)
    queries = [Message(RecordDict(), message_type=MessageType.QUERY, dst_node_id=node) for node in nodes]
    found: dict[int, str] = {}
    for reply in grid.send_and_receive(queries, timeout=IDENTIFY_TIMEOUT_S):
        if reply.has_error():
            raise TraceFLError(f"round 0: a node could not say which client it is: {reply.error.reason}")
        partition = reply.content.config_records["config"]["partition-id"]
        found[reply.metadata.src_node_id] = str(partition)
    if sorted(found.values(), key=int) != [str(index) for index in range(num_clients)]:
        raise TraceFLError(
            f"num_clients={num_clients} clients are wanted, but the {len(nodes)} connected nodes hold partitions "
            f"{sorted(found.values(), key=int)}: start one node per client."
        )
    return found


def _evaluate_state(
    config: Config, spec: dict[str, Any], examples: Examples, state: Mapping[str, Tensor]
) -> Evaluation:
    model = build_model(spec)
    load_exchanged_state(model, state)
    return evaluate(model.to(config.device), examples)
