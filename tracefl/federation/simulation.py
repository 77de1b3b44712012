"""The federation on one machine: Flower's simulation on Ray, behind this one function."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from tracefl.federation.grid import StoppableGrid


def simulate(config: Config, serve: Callable[[Grid], None], client_app: ClientApp = client_app) -> None:
    """Start `num_clients` simulated nodes and let `serve` drive them.

    Ctrl-C ends it between two replies, with everything that Ray started.

    Raises:
        TraceFLError: what `serve` raised, or the resources do not suffice for one client.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what matters reaches the user through our own sentences
    app, raised, stop = ServerApp(), list[Exception](), threading.Event()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            serve(cast(Grid, StoppableGrid(grid, stop)))
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
        stop.set()  # or the server's thread would wait for clients that will never be
        if raised:
            raise raised[0] from None
        raise TraceFLError(
            f"the simulation could not run ({error}): check total_cpus={config.total_cpus}, client_cpus="
            f"{config.client_cpus}, total_gpus={config.total_gpus} and "
            f"client_gpu={config.client_gpu}."
        ) from error


@contextmanager
def _interrupt_sets(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `stop`; Flower's own threads would wait for each other for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _backend(config: Config) -> dict[str, Any]:
    on_gpu = config.device.startswith("cuda")
    init: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if "RAY_ADDRESS" not in os.environ:
        init |= {"num_cpus": config.total_cpus} if config.total_cpus else {}
        init |= {"num_gpus": config.total_gpus} if on_gpu and config.total_gpus is not None else {}
    return {
        "init_args": init,
        "client_resources": {
            "num_cpus": config.client_cpus,
            "num_gpus": config.client_gpu if on_gpu else 0.0,
            "max_restarts": -1,  # a killed actor is replaced; the client that it ran counts as failed
        },
    }
