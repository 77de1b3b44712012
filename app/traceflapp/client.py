"""The client, with torch and Flower.

A process is started for each message, so torch waits until one is to train.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tracefl.federation.identity import ACTION, identify

app = ClientApp()
app.query(ACTION)(identify)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a round on this node's own examples."""
    from tracefl.federation.client_app import train_round

    return train_round(message, context)
