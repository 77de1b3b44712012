"""torchvision's image classifiers, with random or with ImageNet's weights.

Importing torchvision takes seconds: it waits until an image model is wanted.
"""

from torch import nn

from tracefl.errors import as_sentence


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

    problem = f"model.pretrained=true needs the ImageNet weights of {name}, which cannot be downloaded"
    with as_sentence(problem, "check the connection or set model.pretrained=false", OSError, RuntimeError):
        model = torchvision.models.get_model(name, weights="DEFAULT")
    head = "classifier" if name.startswith("densenet") else "fc"
    setattr(model, head, nn.Linear(getattr(model, head).in_features, num_classes))
    return model
