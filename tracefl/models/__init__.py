"""Classifiers with the right head from a plain description (spec), and the state that is exchanged.

vision.py holds torchvision's image models, text.py Hugging Face's text models. A client process
builds its model from the spec alone, and imports only the library of that kind of model.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tracefl.classifier import logits_of
from tracefl.data.examples import longest_text
from tracefl.errors import as_sentence, require
from tracefl.models.text import build_text_model, pretrained_text_model
from tracefl.models.vision import build_image_model, pretrained_image_model

if TYPE_CHECKING:
    from tracefl.config import Config
    from tracefl.data.prepared import PreparedData


def model_spec(config: "Config", data: "PreparedData") -> dict[str, Any]:
    """What `build_model` needs to know, as plain JSON.

    Returns:
        An image model's `name` and `num_classes`, or a text model's whole Hugging Face config.
    """
    return data.text_model or {"name": config.model.name, "num_classes": data.num_classes}


def build_model(spec: Mapping[str, Any]) -> nn.Module:
    """A classifier with random weights, from what `model_spec` returns.

    Returns:
        A module whose output is the logits [N, num_classes], or has them as `.logits`. An image
        model takes float [N, 3, 32, 32]; a text model input_ids and attention_mask, int64 [N, T].

    Example:
        >>> build_model({"name": "resnet18", "num_classes": 4}).fc.out_features
        4
    """
    return build_text_model(dict(spec)) if "model_type" in spec else build_image_model(**spec)


class NothingDrawn(TorchFunctionMode):
    """While it is entered, models are built without drawing weights: their state is loaded next."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


def initial_model(config: "Config", data: "PreparedData") -> nn.Module:
    """The model that a run starts from: with published weights if the configuration asks for them.

    Random weights are drawn from torch's global generator; seed it first.

    Raises:
        TraceFLError: The published weights cannot be loaded, or a text model cannot take the
            longest of the texts.
    """
    spec = model_spec(config, data)
    if not data.text_model:
        return pretrained_image_model(**spec) if config.model.has_weights else build_model(spec)
    model = pretrained_text_model(config.model, spec) if config.model.has_weights else build_model(spec)
    _try_longest(model, config, data)
    return model


def _try_longest(model: nn.Module, config: "Config", data: "PreparedData") -> None:
    """Not every model says how long a text may be; otherwise clients would fail on it."""
    length, inputs = longest_text(data.files)
    named = f"model.path={config.model.path}" if config.model.path else f"model.name={config.model.name}"
    problem = f"{named} cannot take the longest text, of {length} tokens"
    remedy = "lower dataset.max_tokens if that is too many, or choose another model"
    broken = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    with as_sentence(problem, remedy, *broken), torch.no_grad():
        logits_of(model.eval(), inputs)


def exchanged_state(model: nn.Module) -> dict[str, Tensor]:
    """What client and server exchange: the floating-point entries of the state, on the CPU.

    Integer buffers (BatchNorm's `num_batches_tracked`) are left out: a mean of counters has no
    meaning. A tensor with several names (tied weights) is sent under its first.

    Returns:
        Tensors by name. They share memory with the model where that is on the CPU.

    Example:
        >>> list(exchanged_state(nn.BatchNorm1d(2)))
        ['weight', 'bias', 'running_mean', 'running_var']
    """
    entries = model.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(entries.items())}
    sent = [name for name, value in entries.items() if value.is_floating_point() and first[id(value)] == name]
    return {name: entries[name].detach().cpu() for name in sent}


def load_exchanged_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy into the model what `exchanged_state` returned for another of its kind.

    Raises:
        TraceFLError: The names or shapes are not exactly those that the model exchanges.
    """
    odd = sorted(exchanged_state(model).keys() ^ state.keys())
    require(not odd, f"a state does not fit the model: {len(odd)} keys differ, the first is {odd[:1]}.")
    with as_sentence("a state does not fit the model", "give one of the same architecture", RuntimeError):
        model.load_state_dict(dict(state), strict=False)
