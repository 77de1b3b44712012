"""Whole models, with layers="all", against autograd through a functional forward pass of one input at a time."""

from __future__ import annotations

import pytest
import torch
import torchvision
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.provenance import reference
from tracefl.provenance import trace

torch.set_num_threads(2)
TEXT = {"vocab_size": 50, "num_labels": 4, "pad_token_id": 0}
SMALL = {"num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 20}


def bert(**changes):
    config = transformers.BertConfig(hidden_size=16, num_attention_heads=2, **SMALL, **TEXT, **changes)
    return transformers.BertForSequenceClassification(config)


def minilm():
    """MiniLM-L12-H384 in small: twelve layers and heads, the inner layer four times as wide."""
    sizes = {"hidden_size": 24, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 96}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, max_position_embeddings=20, **TEXT)
    )


def tinybert():
    """TinyBERT in small: four layers, twelve heads, an inner layer of 1200 to 312."""
    sizes = {"hidden_size": 36, "num_attention_heads": 12, "num_hidden_layers": 4, "intermediate_size": 138}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, max_position_embeddings=20, **TEXT)
    )


def distilbert():
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 20}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes, **TEXT))


def squeezebert():
    config = transformers.SqueezeBertConfig(hidden_size=16, embedding_size=16, num_attention_heads=4, **SMALL, **TEXT)
    return transformers.SqueezeBertForSequenceClassification(config)


def openai_gpt():
    config = transformers.OpenAIGPTConfig(n_positions=20, n_embd=16, n_layer=2, n_head=2, **TEXT)
    return transformers.OpenAIGPTForSequenceClassification(config)


def gpt2():
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(n_positions=20, n_embd=16, n_layer=2, n_head=2, **ends, **TEXT)
    return transformers.GPT2ForSequenceClassification(config)


def vit():
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=4
    )
    nn.init.normal_(model.heads.head.weight)  # it starts at zero, where no gradient passes
    return model


def resnet18():
    return with_statistics(torchvision.models.resnet18(num_classes=4))


def bottlenecks():
    """ResNet-50 in small: all of its layer types, a block of each width."""
    layers = torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]
    return with_statistics(torchvision.models.ResNet(*layers, num_classes=4, width_per_group=16))


def dense_blocks():
    """DenseNet-121 in small."""
    return with_statistics(torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=4))


def resnet50():
    return with_statistics(torchvision.models.resnet50(num_classes=4))


def densenet121():
    return with_statistics(torchvision.models.densenet121(num_classes=4))


def with_statistics(model):
    """Running statistics as those of a trained model: unlike 0 and 1."""
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model


def text():
    tokens = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 8:], mask[2, 5:] = 0, 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def images(size=32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


MODELS = {
    "bert": (bert, text),
    "minilm": (minilm, text),
    "tinybert": (tinybert, text),
    "distilbert": (distilbert, text),
    "squeezebert": (squeezebert, text),
    "openai_gpt": (openai_gpt, text),
    "gpt2": (gpt2, text),
    "vit": (vit, lambda: images(16)),
    "resnet18": (resnet18, images),
    "bottlenecks": (bottlenecks, images),
    "dense_blocks": (dense_blocks, images),
}
LARGE = {"resnet50": (resnet50, images), "densenet121": (densenet121, images)}


def doubled(x):
    return {k: v.double() if v.is_floating_point() else v for k, v in x.items()} if isinstance(x, dict) else x.double()


class Kinks(TorchFunctionMode):
    """On which side of its kink every ReLU is while a batch of 3 passes."""

    def __init__(self):
        super().__init__()
        self.sides = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.functional.relu, torch.relu, torch.relu_):
            self.sides.append((args[0] > 0).flatten(1))
        return func(*args, **(kwargs or {}))

    def differ(self, other):
        """[N] how many of each input's differ."""
        pairs = zip(self.sides, other.sides, strict=True)
        return sum(((a != b).sum(1) for a, b in pairs if len(a) == 3), torch.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "inputs"), LARGE.values(), ids=LARGE)
def test_every_entry_of_a_large_state(make, inputs):
    test_every_entry_of_the_state(make, inputs)


@pytest.mark.parametrize(("make", "inputs"), MODELS.values(), ids=MODELS)
def test_every_entry_of_the_state(make, inputs):
    torch.manual_seed(0)
    model, x = make(), inputs()
    states, weights = reference.perturbed(model)
    with Kinks() as rounded:
        single = trace(model, states, x, method="influence", weights=weights)
    model, x = model.double(), doubled(x)
    states = {who: doubled(state) for who, state in states.items()}
    with Kinks() as exact:
        found = trace(model, states, x, method="influence", weights=weights, targets=single.targets)
    rows = [reference.row(x, n) for n in range(3)]
    slow = torch.stack([
        reference.influence(model, states, weights, row, target)
        for row, target in zip(rows, found.targets, strict=True)
    ])  # fmt: skip
    assert found.by_layer.abs().amax((1, 2)).gt(0).all()  # every layer has a share
    size = found.by_layer.abs().sum(0).max()  # what cancels within a share
    assert (found.contributions - slow).abs().max() <= 1e-9 * size
    alone = trace(model, states, rows[1], method="influence", weights=weights, targets=found.targets[1:2])
    assert (alone.contributions[0] - found.contributions[1]).abs().max() <= 1e-9 * size
    # float32 rounds a pre-activation of about 0 to the other side, now and then: a ReLU flips and the gradient jumps,
    # by 1e-4 to 1e-2 of the size for a single flip. That is the derivative of a kink, not an error of the engine
    flipped = rounded.differ(exact) > 0
    off = (single.contributions - found.contributions).abs().amax(1)
    assert (~flipped).any()
    assert off[~flipped].max() <= 1e-5 * size
    assert off.max() <= 0.05 * size


@pytest.mark.parametrize("name", ["bert", "distilbert", "squeezebert", "openai_gpt", "gpt2", "resnet18"])
def test_the_batch_goes_through_at_once(name):
    make, inputs = MODELS[name]
    model, sizes = make(), []
    hook = lambda module, args, kwargs: sizes.append(len(args[0] if args else kwargs["input_ids"]))  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    trace(model, {"a": model.state_dict()}, inputs())
    assert sizes == [1, 3, 2]  # one alone, all, and two of them in other company


def test_padding_is_masked():
    """A client equal to the global model gets no share however the text is padded, and padding changes nothing."""
    torch.manual_seed(0)
    model, x = bert(), text()
    states, weights = reference.perturbed(model)
    short = {name: v[2:, :5] for name, v in x.items()}
    padded = trace(model, states, x, method="influence", weights=weights)
    cut = trace(model, states, short, method="influence", weights=weights)
    assert (padded.contributions[2] - cut.contributions[0]).abs().max() < 1e-4 * cut.contributions.abs().max()


def test_layer_by_layer_as_the_paper_has_it():
    torch.manual_seed(0)
    model, x = resnet18().double(), images().double()
    states, _ = reference.perturbed(model)
    found = trace(model, states, x, layer_decay=1)
    slow = [reference.neuron(model, states, x[n : n + 1], found.targets[n]) for n in range(3)]
    slow = torch.stack(slow, 1)
    assert ((found.by_layer - slow).abs() <= 1e-9 * slow.abs().amax((1, 2), keepdim=True)).all()


def test_paper_layers_of_a_text_model():
    found = trace(gpt2(), {"a": gpt2().state_dict()}, text(), layers="paper")
    assert not any("wte" in name or "wpe" in name for name in found.layers)
    assert len(found.layers) == 2 * 6 + 2
