"""Classifiers with the right head from a plain description, and their exchangeable state."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.error import URLError

from torch import Tensor, nn

from tracefl.architectures import build_text_model, pretrained_text_model
from tracefl.errors import TraceFLError

if TYPE_CHECKING:  # a client builds models without any of these
    from tracefl.config import Config
    from tracefl.data.prepare import PreparedData


def model_spec(config: "Config", data: "PreparedData") -> dict[str, Any]:
    """What `build_model` needs to know, as plain JSON: an image model's name, or a text model's whole config."""
    return data.text_model or {"name": config.model.name, "num_classes": data.num_classes}


def build_model(spec: Mapping[str, Any]) -> nn.Module:
    """A classifier with random weights whose output is, or has as `.logits`, [N, num_classes].

    An image model takes float [N, 3, 32, 32]; a text model takes input_ids and attention_mask, int64 [N, T].
    """
    if "model_type" in spec:
        return build_text_model(dict(spec))
    import torchvision  # seconds, which a client of a text model need not spend

    return torchvision.models.get_model(spec["name"], weights=None, num_classes=spec["num_classes"])


def initial_model(config: "Config", data: "PreparedData") -> nn.Module:
    """The model that a run starts from: with published weights if the configuration asks for them.

    Raises:
        TraceFLError: the pretrained weights cannot be had.
    """
    spec = model_spec(config, data)
    if not config.model.has_weights:
        return build_model(spec)
    return pretrained_text_model(config.model, spec) if data.text_model else _pretrained_image_model(**spec)


def _pretrained_image_model(name: str, num_classes: int) -> nn.Module:
    import torchvision

    try:
        model = torchvision.models.get_model(name, weights="DEFAULT")
    except (URLError, OSError, RuntimeError) as error:
        raise TraceFLError(
            f"model.pretrained=true: the ImageNet weights of {name} cannot be downloaded ({error}); check the "
            "connection or set model.pretrained=false."
        ) from error
    head = "classifier" if name.startswith("densenet") else "fc"
    setattr(model, head, nn.Linear(getattr(model, head).in_features, num_classes))
    return model


def exchanged_state(model: nn.Module) -> dict[str, Tensor]:
    """What client and server exchange: every floating-point entry of the state, detached, on the CPU.

    Integer buffers (BatchNorm's `num_batches_tracked`) stay at home: averaging counters means nothing. A tensor that
    stands under several names (tied weights) goes under its first.
    """
    entries = model.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(entries.items())}
    return {
        name: value.detach().cpu()
        for name, value in entries.items()
        if value.is_floating_point() and first[id(value)] == name
    }


def load_exchanged_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `exchanged_state` gave; keys must agree exactly."""
    expected = exchanged_state(model).keys()
    if expected != state.keys():
        odd = sorted(expected ^ state.keys())
        raise TraceFLError(f"a state does not fit the model: {len(odd)} keys differ, the first is '{odd[0]}'.")
    model.load_state_dict(dict(state), strict=False)
