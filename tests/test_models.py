"""Every named model is built from its description; the exchanged state round-trips and holds no counters."""

import subprocess
import sys

import pytest
import torch

from tracefl.config import IMAGE_MODELS, Model
from tracefl.data.examples import Examples
from tracefl.data.prepared import PreparedData
from tracefl.errors import TraceFLError
from tracefl.models import build_model, exchanged_state, initial_model, load_exchanged_state
from tracefl.models.text import ARCHITECTURES, architecture, text_spec
from tracefl.provenance import trace
from tracefl.training import evaluate, train

RESNET = {"name": "resnet18", "num_classes": 4}
# Entries that make each architecture small, by its own names.
SMALL = {
    "bert": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16},
    "distilbert": {"n_layers": 1, "dim": 16, "n_heads": 2, "hidden_dim": 16},
    "openai-gpt": {"n_layer": 1, "n_embd": 16, "n_head": 2},
    "gpt2": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
    "squeezebert": {"num_hidden_layers": 1, "hidden_size": 16, "embedding_size": 16, "num_attention_heads": 4,
                    "intermediate_size": 16},
}  # fmt: skip


def text_model(name: str, **entries) -> dict:
    """The description of a named text model, as small as `entries` make it."""
    config = architecture(Model(name, config=entries))
    return text_spec(config, vocab_size=50, pad_token_id=0, class_names=["a", "b", "c"])


def prepared(tmp_path, classes: int) -> PreparedData:
    return PreparedData(tmp_path, [str(k) for k in range(classes)], {}, "")


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_logits_for_the_right_number_of_classes(name):
    with torch.device("meta"):
        model = build_model({"name": name, "num_classes": 7}).eval()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_the_exchanged_state_round_trips():
    source, target = build_model(RESNET), build_model(RESNET)
    load_exchanged_state(target, exchanged_state(source))
    source.eval(), target.eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(source(x), target(x))


def test_counters_are_not_exchanged_but_statistics_are():
    state = exchanged_state(build_model(RESNET))
    assert not any(name.endswith("num_batches_tracked") for name in state)
    assert "bn1.running_var" in state
    assert all(value.is_floating_point() for value in state.values())


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_state_of_another_model_is_refused(change):
    state = exchanged_state(build_model(RESNET))
    if change == "missing":
        del state["fc.bias"]
    else:
        state["fc.scale"] = torch.ones(1)
    with pytest.raises(TraceFLError, match=r"1 keys differ, the first is \['fc"):
        load_exchanged_state(build_model(RESNET), state)


def test_missing_pretrained_weights_name_the_override(config, tmp_path, monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline, raising=False)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    with pytest.raises(TraceFLError, match=r"model\.pretrained=false"):
        initial_model(config("model.pretrained=true"), prepared(tmp_path, 4))


def test_pretrained_weights_keep_the_body_and_change_the_head(config, tmp_path, monkeypatch):
    imagenet = build_model({"name": "densenet121", "num_classes": 1000}).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: imagenet)
    model = initial_model(config("model.name=densenet121", "model.pretrained=true"), prepared(tmp_path, 6))
    assert model.classifier.out_features == 6
    assert torch.equal(model.state_dict()["features.conv0.weight"], imagenet["features.conv0.weight"])


def texts(count: int = 12) -> Examples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (count, 7), generator=generator)
    mask = (torch.arange(7) < torch.randint(3, 8, (count, 1), generator=generator)).long()
    return Examples({"input_ids": ids * mask, "attention_mask": mask}, torch.arange(count) % 3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_named_text_model_is_built_trained_and_traced(name):
    spec = text_model(name, **SMALL[ARCHITECTURES[name][0]])
    torch.manual_seed(0)
    model = build_model(spec)
    before = exchanged_state(model)
    assert all(value.is_floating_point() for value in before.values())
    before = {key: value.clone() for key, value in before.items()}
    train(model, texts(), epochs=1, lr=0.01, batch_size=4, seed=1)
    after = exchanged_state(model)
    assert not all(torch.equal(before[key], after[key]) for key in before)
    again = build_model(spec)
    load_exchanged_state(again, before)
    train(again, texts(), epochs=1, lr=0.01, batch_size=4, seed=1)
    assert all(torch.equal(value, exchanged_state(again)[key]) for key, value in after.items())
    assert len(evaluate(model, texts()).predictions) == 12
    answer = trace(model, {"0": before, "1": after}, texts().inputs, weights={"0": 0.0, "1": 1.0}, method="influence")
    assert answer.contributions.shape == (12, 2)


def test_named_architectures_have_the_published_sizes():
    sizes = {"google-bert/bert-base-cased": 108.3, "openai-community/openai-gpt": 116.5, "gpt2": 124.4,
             "distilbert/distilbert-base-uncased": 67.0, "microsoft/MiniLM-L12-H384-uncased": 33.4,
             "Intel/dynamic_tinybert": 67.0, "squeezebert/squeezebert-uncased": 51.1}  # fmt: skip
    for name, millions in sizes.items():
        config = architecture(Model(name, config={}))
        with torch.device("meta"):
            model = build_model({**config.to_dict(), "dtype": "float32"})
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.2), name


def test_tied_weights_are_exchanged_once():
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}  # fmt: skip
    first, second = (build_model({"model_type": "bart", **sizes}) for _ in range(2))
    state = exchanged_state(first)
    assert len({value.data_ptr() for value in state.values()}) == len(state) < len(first.state_dict())
    load_exchanged_state(second, state)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(TraceFLError, match=r"model\.config does not make a bert \(.*100.*attention heads"):
        build_model(text_model("google-bert/bert-base-cased", hidden_size=100))


@pytest.mark.slow
def test_a_client_imports_no_library_of_the_other_kind():
    code = (
        "import sys, tracefl.models, tracefl.training, tracefl.data.faults\n"
        "from tracefl.models import build_model\n"
        "print(sorted({'transformers', 'torchvision', 'datasets', 'hydra', 'omegaconf'} & sys.modules.keys()))\n"
        "build_model({'name': 'resnet18', 'num_classes': 2})\n"
        "print('torchvision' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "[]\nTrue False\n", done.stderr
