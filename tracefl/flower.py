"""What a Flower app of your own imports to have its rounds recorded and traced.

    client    app.query()(identify): the node tells the server which client it is
    server    identify_nodes, Run.create, and Recorder around any strategy of Flower
    later     tracefl.Run.open and tracefl.trace

examples/own_flower_app.py is such an app.
"""

from tracefl.data.examples import Examples
from tracefl.federation.client_app import identify
from tracefl.federation.recorder import Recorder
from tracefl.federation.server_app import identify_nodes
from tracefl.runs import ClientInfo, Run
from tracefl.training import Evaluation, evaluate

__all__ = ["ClientInfo", "Evaluation", "Examples", "Recorder", "Run", "evaluate", "identify", "identify_nodes"]
