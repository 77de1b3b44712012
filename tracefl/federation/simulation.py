"""The federation on one machine: Flower's simulation on Ray, behind this one function."""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from tracefl.config import Config
from tracefl.errors import TraceFLError
from tracefl.federation.client_app import app as client_app


def simulate(config: Config, serve: Callable[[Grid], None]) -> None:
    """Start `num_clients` simulated nodes and let `serve` drive them.

    Raises:
        TraceFLError: what `serve` raised, or the resources do not suffice for one client.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what matters reaches the user through our own sentences
    app = ServerApp()
    raised: list[BaseException] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            serve(grid)
        except BaseException as error:
            raised.append(error)
            raise

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(app, client_app, config.data_dist.num_clients, backend_config=_backend(config))
    except Exception as error:
        if raised:
            raise raised[0] from None
        raise TraceFLError(
            f"the simulation could not run ({error}): check total_cpus={config.total_cpus}, client_cpus="
            f"{config.client_resources.cpus}, total_gpus={config.total_gpus} and client_gpu={config.client_resources.gpus}."
        ) from error


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
            "num_cpus": config.client_resources.cpus,
            "num_gpus": config.client_resources.gpus if on_gpu else 0.0,
            "max_restarts": -1,  # a killed actor is replaced; the client that it ran counts as failed
        },
    }
