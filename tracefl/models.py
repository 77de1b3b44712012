"""Image classifiers of torchvision with the right head, and their exchangeable state."""

from collections.abc import Mapping
from urllib.error import URLError

import torchvision
from torch import Tensor, nn

from tracefl.errors import TraceFLError


def build_model(name: str, num_classes: int, *, pretrained: bool = False) -> nn.Module:
    """A classifier for float [N, 3, 32, 32] whose output is logits [N, num_classes].

    Raises:
        TraceFLError: the pretrained weights cannot be had.
    """
    if not pretrained:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
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

    Integer buffers (BatchNorm's `num_batches_tracked`) stay at home: averaging counters means nothing.
    """
    return {name: value.detach().cpu() for name, value in model.state_dict().items() if value.is_floating_point()}


def load_exchanged_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `exchanged_state` gave; keys must agree exactly."""
    expected = exchanged_state(model).keys()
    if expected != state.keys():
        odd = sorted(expected ^ state.keys())
        raise TraceFLError(f"a state does not fit the model: {len(odd)} keys differ, the first is '{odd[0]}'.")
    model.load_state_dict(dict(state), strict=False)
