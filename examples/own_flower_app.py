"""A Flower app of your own, recorded and traced: your model, data, training and strategy."""

import sys

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from tracefl import Run
from tracefl.flower import Examples, Recorder, evaluate, identify

FOLDER, CLIENTS, ROUNDS = sys.argv[1] if len(sys.argv) > 1 else "logs/own-app", 4, 3
client_app, server_app = ClientApp(), ServerApp()
client_app.query("identify")(identify)  # so that the server learns which node is which client


def new_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, CLIENTS))


def blob(label: int) -> Examples:
    """Client k holds points around the k-th corner, and no other class."""
    corner = torch.tensor([label % 2, label // 2]) * 4.0 - 2.0
    points = corner + torch.randn(50, 2, generator=torch.Generator().manual_seed(label))
    return Examples(points, torch.full((50,), label))


@client_app.train()
def train(message: Message, context) -> Message:
    model, data = new_model(), blob(int(context.node_config["partition-id"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.inputs), data.labels).backward()
        optimizer.step()
    reply = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(data)})}
    return Message(RecordDict(reply), reply_to=message)


@server_app.main()
def serve(grid, context) -> None:
    torch.manual_seed(0)  # a run that goes on must start from the same model
    model, test = new_model(), [blob(label) for label in range(CLIENTS)]
    test = Examples(torch.cat([part.inputs for part in test]), torch.cat([part.labels for part in test]))

    def score(state):
        model.load_state_dict(state)
        return evaluate(model, test)

    arrays = ArrayRecord(model.state_dict())
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    recorder = Recorder(strategy, FOLDER, grid, evaluate=score)  # evaluate where the server has data
    recorder.start(grid, arrays, num_rounds=ROUNDS)  # as strategy.start before


if __name__ == "__main__":
    run_simulation(server_app, client_app, CLIENTS, backend_config={"client_resources": {"num_cpus": 1}})
    run = Run.open(FOLDER)
    print(run.trace(inputs=torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), model=new_model()))
