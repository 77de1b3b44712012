"""The federation on one machine: Flower's simulation on Ray, behind this one function."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from operator import attrgetter
from typing import Any, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import grpc
import ray
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tracefl.config import Config
from tracefl.errors import TraceFLError
from tracefl.federation.client_app import app as client_app
from tracefl.federation.grid import GridView

ANSWER_S = 15.0  # a cluster's head answers within


def simulate(config: Config, serve: Callable[[Grid], None], client_app: ClientApp = client_app) -> None:
    """Start `num_clients` simulated nodes and let `serve` run its rounds on them.

    Ctrl-C ends it between two replies, with everything that Ray started.

    Args:
        config: number of clients, device, and the resources of a client and in all.
        serve: called with the grid; when it returns, the simulation ends.
        client_app: what every node runs.

    Raises:
        TraceFLError: `serve` raised it, the resources are not enough for one client, or no Ray
            answers at `ray.address`.
        KeyboardInterrupt: after Ctrl-C.
    """
    if config.ray.address:
        check_cluster(config.ray.address)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # our own errors say what matters
    app, raised, stop = ServerApp(), list[Exception](), threading.Event()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            serve(cast(Grid, GridView(grid, stop=stop)))
        except Exception as error:
            raised.append(error)
            raise

    try:
        with warnings.catch_warnings(), _interrupt_sets(stop, _backend(config)["init_args"]):
            warnings.simplefilter("ignore")
            run_simulation(app, client_app, config.num_clients, backend_config=_backend(config))
    except Exception as error:
        if stop.is_set():
            raise KeyboardInterrupt from None
        stop.set()  # otherwise the server's thread would wait for clients that never start
        if raised:
            raise raised[0] from None
        keys = ("ray.address", "total_cpus", "client_cpus", "total_gpus", "client_gpu")
        settings = [f"{key}={attrgetter(key)(config)}" for key in keys]
        raise TraceFLError(f"the simulation could not run ({error}): check {', '.join(settings)}.") from error


def check_cluster(address: str, seconds: float = ANSWER_S) -> None:
    """See that the head of a Ray cluster answers: Ray itself would try for minutes, or for ever.

    Args:
        address: its HOST:PORT.
        seconds: how long it is waited for.

    Raises:
        TraceFLError: nobody answers there, or somebody else.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            health_pb2_grpc.HealthStub(channel).Check(request, timeout=seconds)
        except grpc.RpcError as error:
            reason = error.details() if isinstance(error, grpc.Call) else error
            remedy = "start one there with ray start --head --port=PORT, or leave ray.address out"
            raise TraceFLError(f"no Ray cluster answers at ray.address={address} ({reason}): {remedy}.") from None


@contextmanager
def _interrupt_sets(stop: threading.Event, init_args: dict[str, Any]) -> Iterator[None]:
    """Ctrl-C sets `stop`: KeyboardInterrupt would leave Flower's threads waiting for each other.

    So does SIGTERM where it interrupts too (`tracefl.stopping`). Ray, which is started here, puts
    a handler of its own in its place.
    """
    with ExitStack() as undo:
        undo.callback(ray.shutdown)
        in_main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
        for number, handler in handlers.items():
            undo.callback(signal.signal, number, handler)
        paths = filter(None, [*sys.path, os.environ.get("PYTHONPATH")])
        ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}, **init_args)
        for number, handler in handlers.items():
            signal.signal(number, partial(_stop_softly, stop, handler) if callable(handler) else handler)
        yield


def _stop_softly(stop: threading.Event, handler: Callable[..., Any], *signal_and_frame: Any) -> None:
    stop.set()
    with suppress(KeyboardInterrupt):
        handler(*signal_and_frame)


def _backend(config: Config) -> dict[str, Any]:
    on_gpu = config.device.startswith("cuda")
    init: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if config.ray.address:
        init["address"] = config.ray.address
    elif "RAY_ADDRESS" not in os.environ:
        init |= {"num_cpus": config.total_cpus} if config.total_cpus else {}
        init |= {"num_gpus": config.total_gpus} if on_gpu and config.total_gpus is not None else {}
    resources = {"num_cpus": config.client_cpus, "num_gpus": config.client_gpu if on_gpu else 0.0}
    # a worker that dies is replaced, its task done again; else the next client's task would fail
    resources |= {"max_restarts": -1, "max_task_retries": 1}
    return {"init_args": init, "client_resources": resources}
