"""What a Flower app of your own imports to have its rounds recorded and traced.

    client    app.query("identify")(identify): the node tells the server which client it is
    server    Recorder(strategy, "runs/mine", grid).start(grid, arrays, num_rounds=3, ...)
    later     tracefl.Run.open and tracefl.trace

examples/own_flower_app.py is such an app, docs/own_app.md says what happens in which case. Names
are imported when they are asked for: a client needs none of what the server does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracefl.data.examples import Examples
    from tracefl.federation.identity import identify
    from tracefl.federation.recorder import Recorder
    from tracefl.federation.server_app import identify_nodes
    from tracefl.record import ClientInfo
    from tracefl.runs import Run
    from tracefl.training import Evaluation, evaluate

__all__ = ["ClientInfo", "Evaluation", "Examples", "Recorder", "Run", "evaluate", "identify", "identify_nodes"]
_HOMES = {
    "Examples": "data.examples",
    "identify": "federation.identity",
    "Recorder": "federation.recorder",
    "identify_nodes": "federation.server_app",
    "ClientInfo": "record",
    "Run": "runs",
    "Evaluation": "training",
    "evaluate": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"tracefl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tracefl.flower' has no attribute '{name}'")
