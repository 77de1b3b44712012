"""torchvision's image classifiers, with random or with ImageNet's weights.

Importing torchvision takes seconds: it waits until an image model is wanted.
"""

from urllib.error import URLError

from torch import nn

from tracefl.errors import TraceFLError


def build_image_model(name: str, num_classes: int) -> nn.Module:
    """A classifier with random weights: float [N, 3, H, W] to logits [N, num_classes]."""
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def pretrained_image_model(name: str, num_classes: int) -> nn.Module:
    """The classifier with ImageNet's weights and a new head of random ones.

    Raises:
        TraceFLError: The weights are not in torch's cache and cannot be downloaded.
    """
    import torchvision

    try:
        model = torchvision.models.get_model(name, weights="DEFAULT")
    except (URLError, OSError, RuntimeError) as error:
        raise TraceFLError(
            f"model.pretrained=true needs the ImageNet weights of {name}, which cannot be downloaded ({error}): "
            "check the connection or set model.pretrained=false."
        ) from error
    head = "classifier" if name.startswith("densenet") else "fc"
    setattr(model, head, nn.Linear(getattr(model, head).in_features, num_classes))
    return model
