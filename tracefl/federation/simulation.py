"""The federation on one machine: Flower's simulation on Ray, behind this one function."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from tracefl.config import Config
from tracefl.errors import TraceFLError
from tracefl.federation.client_app import app as client_app
from tracefl.federation.grid import GridView


def simulate(config: Config, serve: Callable[[Grid], None], client_app: ClientApp = client_app) -> None:
    """Start `num_clients` simulated nodes and let `serve` run its rounds on them.

    Ctrl-C ends it between two replies, with everything that Ray started.

    Args:
        config: number of clients, device, and the resources of a client and in all.
        serve: called with the grid; when it returns, the simulation ends.
        client_app: what every node runs.

    Raises:
        TraceFLError: `serve` raised it, or the resources are not enough for one client.
        KeyboardInterrupt: after Ctrl-C.
    """
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
        with warnings.catch_warnings(), _interrupt_sets(stop):
            warnings.simplefilter("ignore")
            run_simulation(app, client_app, config.num_clients, backend_config=_backend(config))
    except Exception as error:
        if stop.is_set():
            raise KeyboardInterrupt from None
        stop.set()  # otherwise the server's thread would wait for clients that never start
        if raised:
            raise raised[0] from None
        settings = [f"{k}={getattr(config, k)}" for k in ("total_cpus", "client_cpus", "total_gpus", "client_gpu")]
        raise TraceFLError(f"the simulation could not run ({error}): check {', '.join(settings)}.") from error


@contextmanager
def _interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `stop`: KeyboardInterrupt would leave Flower's threads waiting for each other."""
    with ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGINT, lambda *_: stop.set())
            undo.callback(signal.signal, signal.SIGINT, previous)
        yield


def _backend(config: Config) -> dict[str, Any]:
    on_gpu = config.device.startswith("cuda")
    init: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" not in os.environ:
        init |= {"num_cpus": config.total_cpus} if config.total_cpus else {}
        init |= {"num_gpus": config.total_gpus} if on_gpu and config.total_gpus is not None else {}
    # a killed actor is replaced, its client counts as failed
    resources = {"num_cpus": config.client_cpus, "num_gpus": config.client_gpu if on_gpu else 0.0, "max_restarts": -1}
    return {"init_args": init, "client_resources": resources}
