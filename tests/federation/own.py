"""An app of one's own on a grid in this process: nodes that come, go and lie, and a client that takes one step."""

import hashlib

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_res_message

from tracefl.federation.identity import identify

# In another order than that of their names, which safetensors sorts by.
INITIAL = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(3), "a": torch.ones(3)}


def arrays(state=None) -> ArrayRecord:
    return ArrayRecord({name: value.clone() for name, value in (INITIAL if state is None else state).items()})


def step_of(client: str, name: str, shape) -> torch.Tensor:
    """What a client adds to an entry, different for every client and entry."""
    seed = int(hashlib.sha256(f"{client} {name}".encode()).hexdigest()[:8], 16)
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def examples_of(client: str) -> int:
    return 10 + len(client) + sum(map(ord, client)) % 7


def trained(received, client: str) -> dict[str, torch.Tensor]:
    return {name: (value + step_of(client, name, value.shape)).to(value.dtype) for name, value in received.items()}


def new_app(change=lambda content, client: content, key="partition-id") -> ClientApp:
    """Trains by one step and evaluates; `change` may spoil what is sent."""
    app = ClientApp()
    app.query("identify")(identify)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = str(context.node_config[key])
        state = trained(message.content["arrays"].to_torch_state_dict(), client)
        metrics = MetricRecord({"num-examples": examples_of(client), "train_loss": 1.0 / examples_of(client)})
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
        return Message(change(content, client), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        found = float(sum(array.numpy().sum() for array in message.content["arrays"].values()))
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "sum": found})}), reply_to=message)

    return app


class OwnGrid:
    """Nodes by id -> their configuration; a lost one is answered for by the SuperLink, a silent one by nobody."""

    def __init__(
        self, nodes, app: ClientApp | None = None, lost=(), silent=(), on_message=lambda message: None
    ) -> None:
        self.nodes = {n: {"partition-id": c} if isinstance(c, str | int) else c for n, c in nodes.items()}
        self.app, self.lost, self.silent, self.on_message = app or new_app(), set(lost), set(silent), on_message
        self.mailbox: dict[str, Message] = {}
        self.asked: list[tuple[str, int]] = []  # message type, node

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self.nodes:
                ids.append(None)  # as the SuperLink does
                continue
            ids.append(str(len(self.asked)))
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.asked.append((message.metadata.message_type, message.metadata.dst_node_id))
            self.mailbox[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids):
        found = [self.answer(self.mailbox.pop(sent)) for sent in list(message_ids) if sent in self.mailbox]
        return [reply for reply in found if reply is not None]

    def answer(self, message):
        self.on_message(message)
        node = message.metadata.dst_node_id
        if node in self.lost:
            return create_message_error_unavailable_res_message(message.metadata, "node_unavail")
        if node in self.silent:
            return None
        context = Context(run_id=1, node_id=1, node_config=self.nodes[node], state=RecordDict(), run_config={})
        try:
            return self.app(message, context)
        except Exception as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=message)

    def trained_nodes(self) -> list[int]:
        return [node for kind, node in self.asked if kind == "train"]
