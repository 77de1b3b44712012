"""Every image model has the right head; the exchanged state round-trips and holds no counters."""

import pytest
import torch

from tracefl.config import IMAGE_MODELS
from tracefl.errors import TraceFLError
from tracefl.models import build_model, exchanged_state, load_exchanged_state


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_logits_for_the_right_number_of_classes(name):
    with torch.device("meta"):
        model = build_model(name, 7).eval()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_the_exchanged_state_round_trips():
    source, target = build_model("resnet18", 4), build_model("resnet18", 4)
    load_exchanged_state(target, exchanged_state(source))
    source.eval(), target.eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(source(x), target(x))


def test_counters_are_not_exchanged_but_statistics_are():
    state = exchanged_state(build_model("resnet18", 4))
    assert not any(name.endswith("num_batches_tracked") for name in state)
    assert "bn1.running_var" in state
    assert all(value.is_floating_point() for value in state.values())


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_state_of_another_model_is_refused(change):
    state = exchanged_state(build_model("resnet18", 4))
    if change == "missing":
        del state["fc.bias"]
    else:
        state["fc.scale"] = torch.ones(1)
    with pytest.raises(TraceFLError, match="1 keys differ, the first is 'fc"):
        load_exchanged_state(build_model("resnet18", 4), state)


def test_missing_pretrained_weights_name_the_override(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline, raising=False)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(TraceFLError, match=r"model\.pretrained=false"):
        build_model("resnet18", 4, pretrained=True)


def test_pretrained_weights_keep_the_body_and_change_the_head(monkeypatch):
    imagenet = build_model("densenet121", 1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: imagenet)
    model = build_model("densenet121", 6, pretrained=True)
    assert model.classifier.out_features == 6
    assert torch.equal(model.state_dict()["features.conv0.weight"], imagenet["features.conv0.weight"])
