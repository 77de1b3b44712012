"""Four Flower apps in the shape that people write them, with the recorder's lines: plain, advanced, ViT head, HF text.

Each is (new_model, inputs_of, server_main, client_app). Data are drawn per partition: client k knows
little but class k.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from tracefl.flower import Recorder, identify

CLASSES = 3


def labels_of(partition: int, count: int = 24) -> torch.Tensor:
    labels = torch.full((count,), partition % CLASSES)
    labels[:4] = torch.arange(4) % CLASSES
    return labels


def images_of(partition: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, brighter in the rows of its class."""
    labels = labels_of(partition)
    images = 0.1 * torch.randn(len(labels), 3, size, size, generator=torch.Generator().manual_seed(partition))
    for image, label in zip(images, labels, strict=True):
        image[:, label::CLASSES] += 1.0
    return images, labels


def last_images(partition: int) -> torch.Tensor:
    """Two of the class that the partition knows."""
    return images_of(partition)[0][-2:]


def tokens_of(partition: int, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    labels = labels_of(partition)
    noise = torch.randint(10, 20, (len(labels), length), generator=torch.Generator().manual_seed(partition))
    return torch.cat([labels[:, None] + 1, noise], 1), labels


def fit(model: nn.Module, forward: Callable, data, lr: float, parameters=None, steps: int = 10) -> float:
    optimizer = torch.optim.SGD(parameters or model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(model, data[0]), data[1])
        loss.backward()
        optimizer.step()
    return float(loss)


def score(model: nn.Module, forward: Callable, partitions=range(CLASSES), data_of=images_of) -> MetricRecord:
    model.eval()
    with torch.no_grad():
        parts = [(forward(model, x), y) for x, y in map(data_of, partitions)]
    logits, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    loss = nn.functional.cross_entropy(logits, labels).item()
    return MetricRecord({"accuracy": (logits.argmax(1) == labels).double().mean().item(), "loss": loss})


def client_app(new_model, forward, data_of, load, exchanged, trained=None) -> ClientApp:
    """Train and evaluate, as every example has it; what is exchanged differs."""
    app = ClientApp()
    app.query("identify")(identify)

    def received(message: Message) -> nn.Module:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = new_model()
        load(model, message.content["arrays"].to_torch_state_dict())
        return model

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, data = received(message), data_of(int(context.node_config["partition-id"]))
        lr = float(message.content["config"]["lr"])
        loss = fit(model, forward, data, lr, trained and list(trained(model)))
        metrics = MetricRecord({"train_loss": loss, "num-examples": len(data[1])})
        content = {"arrays": ArrayRecord(exchanged(model)), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        found = score(received(message), forward, [partition], data_of)
        found["num-examples"] = 24
        return Message(RecordDict({"metrics": found}), reply_to=message)

    return app


def plain(folder: Path):
    """As quickstart-pytorch: FedAvg, half of the nodes a round, clients evaluate, the server too. BatchNorm counts."""

    def new_model() -> nn.Module:
        layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, CLASSES)
        return nn.Sequential(*layers)

    def forward(model, x):
        return model(x)

    def main(grid, rounds: int):
        torch.manual_seed(1)
        model = new_model()

        def global_evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            model.load_state_dict(arrays.to_torch_state_dict())
            return score(model, forward)

        strategy = FedAvg(fraction_train=0.5)
        recorder = Recorder(strategy, folder, grid)
        return recorder.start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            train_config=ConfigRecord({"lr": 0.05}),
            num_rounds=rounds,
            evaluate_fn=global_evaluate,
        )

    load = nn.Module.load_state_dict
    return new_model, last_images, main, client_app(new_model, forward, images_of, load, nn.Module.state_dict)


class CustomFedAvg(FedAvg):
    """As in advanced-pytorch: the rate falls, and a loop of its own saves the best model."""

    def configure_train(self, server_round, arrays, config, grid):
        if server_round % 2 == 0:
            config["lr"] *= 0.5
        return super().configure_train(server_round, arrays, config, grid)

    def start(self, grid, initial_arrays, num_rounds=3, timeout=3600, train_config=None, evaluate_fn=None):
        self.best, self.folder.mkdir(exist_ok=True) if hasattr(self, "folder") else None
        arrays, found = initial_arrays, {}
        for number in range(1, num_rounds + 1):
            messages = self.configure_train(number, arrays, train_config, grid)
            replies = grid.send_and_receive(messages=messages, timeout=timeout)
            released, found[number] = self.aggregate_train(number, replies)
            arrays = released if released is not None else arrays
            result = evaluate_fn(number, arrays)
            if result["accuracy"] >= self.best:
                self.best = result["accuracy"]
                torch.save(arrays.to_torch_state_dict(), self.folder / "best.pt")
        return found


def advanced(folder: Path):
    new_model, inputs_of, _, app = plain(folder)

    def main(grid, rounds: int):
        torch.manual_seed(2)
        model = new_model()

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            model.load_state_dict(arrays.to_torch_state_dict())
            return score(model, lambda m, x: m(x))

        strategy = CustomFedAvg(fraction_train=1.0, min_available_nodes=4)
        strategy.best, strategy.folder = 0.0, folder.parent / "checkpoints"
        recorder = Recorder(strategy, folder, grid)
        arrays, config = ArrayRecord(model.state_dict()), ConfigRecord({"lr": 0.05})
        return recorder.start(grid, arrays, rounds, train_config=config, evaluate_fn=evaluate_fn)

    return new_model, inputs_of, main, app


def vit(folder: Path):
    """As flowertune-vit: only the head travels, under names of its own; the rest is frozen and everywhere the same."""

    def new_model() -> nn.Module:
        from torchvision.models import VisionTransformer

        model = VisionTransformer(8, 4, 1, 2, 16, 32, num_classes=CLASSES)
        backbone = torch.Generator().manual_seed(5)  # stands for pretrained weights
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith("heads.")
            parameter.data = torch.randn(parameter.shape, generator=backbone) * 0.3
        return model

    def load(model, state):
        model.heads.load_state_dict(state)

    def main(grid, rounds: int):
        model = new_model()

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            load(model, arrays.to_torch_state_dict())
            return score(model, lambda m, x: m(x))

        recorder = Recorder(FedAvg(fraction_evaluate=0.0), folder, grid)
        arrays, config = ArrayRecord(model.heads.state_dict()), ConfigRecord({"lr": 0.1})
        return recorder.start(grid, arrays, num_rounds=rounds, train_config=config, evaluate_fn=evaluate_fn)

    app = client_app(
        new_model, lambda m, x: m(x), images_of, load, lambda m: m.heads.state_dict(), lambda m: m.heads.parameters()
    )
    return new_model, last_images, main, app


def text(folder: Path):
    """As quickstart-huggingface: a transformer for sequences, no data on the server, clients evaluate."""

    def new_model() -> nn.Module:
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        config = DistilBertConfig(
            vocab_size=24, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=8, num_labels=CLASSES
        )
        return DistilBertForSequenceClassification(config)

    def main(grid, rounds: int):
        torch.manual_seed(3)
        arrays, config = ArrayRecord(new_model().state_dict()), ConfigRecord({"lr": 0.1})
        return Recorder(FedAvg(), folder, grid).start(grid, arrays, train_config=config, num_rounds=rounds)

    forward = lambda model, x: model(input_ids=x).logits  # noqa: E731
    app = client_app(new_model, forward, tokens_of, nn.Module.load_state_dict, nn.Module.state_dict)
    return new_model, lambda partition: {"input_ids": tokens_of(partition)[0][-2:]}, main, app
