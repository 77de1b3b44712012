"""Hugging Face's text classifiers, with random or with published weights.

Importing transformers takes seconds: it waits until a text model is wanted.
"""

import difflib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracefl.config import Model
from tracefl.errors import TraceFLError, as_sentence, first_line, require
from tracefl.models.folder import INDEX, check_folder, check_index, check_sizes

# Models that can be built without a download: name -> (model type, entries of its config that
# differ from the type's defaults).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "google-bert/bert-base-cased": ("bert", {"vocab_size": 28996}),
    "openai-community/openai-gpt": ("openai-gpt", {}),
    "openai-community/gpt2": ("gpt2", {}),
    "gpt2": ("gpt2", {}),
    "distilbert/distilbert-base-uncased": ("distilbert", {}),
    "microsoft/MiniLM-L12-H384-uncased": ("bert", {"hidden_size": 384, "intermediate_size": 1536}),
    "Intel/dynamic_tinybert": ("bert", {"num_hidden_layers": 6}),
    "squeezebert/squeezebert-uncased": ("squeezebert", {}),
}
# Entries of a config that limit the tokens of a text, where a model has them.
TOKEN_LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
SET_FROM_DATA = ("model_type", "id2label", "label2id")


def architecture(model: Model) -> Any:
    """The Hugging Face config of a model, with the entries of `model.config`.

    It is downloaded only for a name that ARCHITECTURES lacks, or for published weights.

    Raises:
        TraceFLError: There is no such model, it classifies no text, or an entry does not fit it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    if model.has_weights or model.name not in ARCHITECTURES:
        config = load_pretrained(AutoConfig, model)
    else:
        model_type, entries = ARCHITECTURES[model.name]
        config = AutoConfig.for_model(model_type, **entries)
    check_sizes(config.to_dict(), f"the config of {model.path or model.name}")
    check_sizes(model.config, "model.config")
    kind, classifies = config.model_type, type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    require(classifies, f"model.name={model.name} is a {kind}, which classifies no texts: name another.")
    known = {*config.to_dict(), *config.attribute_map} - {*SET_FROM_DATA}
    for key, value in model.config.items():
        entry, near = f"model.config.{key}={value}", difflib.get_close_matches(key, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out."
        require(key in known, f"{entry} is no entry of the config of {model.name}, a {kind}: {remedy}")
        try:
            setattr(config, key, value)
        except (StrictDataclassError, TypeError, ValueError) as error:
            reason = first_line(error.__cause__ or error)
            raise TraceFLError(f"{entry} does not fit a {kind}: {reason}.") from error
    return config


def text_spec(config: Any, vocab_size: int, pad_token_id: int, class_names: list[str]) -> dict[str, Any]:
    """What `build_text_model` needs, as plain JSON: the config with this tokenizer and classes."""
    config.vocab_size, config.pad_token_id = vocab_size, pad_token_id
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.use_cache = False  # nothing is generated
    return {**config.to_dict(), "dtype": "float32"}


def token_limit(spec: dict[str, Any]) -> int | None:
    """How many tokens of a text a model can take at most; None if it does not say.

    RoBERTa's kind count positions from the one after that of padding, and so take fewer tokens than
    they have position embeddings.

    Args:
        spec: What `text_spec` returned.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**spec).get_text_config()
    stated = [getattr(config, name, None) for name in TOKEN_LIMITS]
    limits = [limit for limit in stated if isinstance(limit, int) and limit > 0]
    with suppress(TraceFLError), torch.device("meta"):  # if it cannot be built, that is said later
        net = build_text_model(spec)
        for name, module in net.named_modules():
            padding = getattr(module, "padding_idx", None)
            if "position" in name and padding is not None:
                limits.append(len(module.weight) - padding - 1)
    return min(limits, default=None)


def check_memory(spec: dict[str, Any]) -> None:
    """Refuse a model whose weights alone are larger than this machine's memory, before it is built.

    Args:
        spec: What `text_spec` returned.
    """
    with torch.device("meta"):
        count = sum(weight.numel() for weight in build_text_model(spec).parameters())
    needs, has = 4 * count / 2**30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    sizes = f"the sizes of the {spec['model_type']} make {count:.3g} weights, {needs:.3g} GiB"
    require(needs <= has, f"{sizes}, and this machine has {has:.3g} GiB of memory: choose a smaller model.")


def build_text_model(spec: dict[str, Any]) -> nn.Module:
    """A classifier with random weights; needs no file and no network.

    Raises:
        TraceFLError: The sizes in `model.config` do not go together.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    problem = f"model.config does not make a {spec['model_type']}"
    broken = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
    with as_sentence(problem, "change its entries", *broken):
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**spec))


def pretrained_text_model(model: Model, spec: dict[str, Any]) -> nn.Module:
    """The classifier with its published weights or those in `model.path`, and a new head if needed.

    Args:
        model: The configuration's section.
        spec: What `text_spec` returned for the prepared data.

    Raises:
        TraceFLError: The weights cannot be loaded, or do not fit `model.config`.
    """
    from transformers import AutoModelForSequenceClassification

    config = architecture(model)
    config.pad_token_id, config.use_cache = spec["pad_token_id"], False
    config.id2label = {int(index): name for index, name in spec["id2label"].items()}
    options = {"dtype": torch.float32, "use_safetensors": True, "ignore_mismatched_sizes": True}
    loader = AutoModelForSequenceClassification
    net, found = load_pretrained(loader, model, config=config, output_loading_info=True, **options)
    names = [entry if isinstance(entry, str) else entry[0] for entry in found["mismatched_keys"]]
    problem = f"model.config={model.config} does not fit the weights of {model.path or model.name}"
    for name in names:
        fits = not name.startswith(f"{net.base_model_prefix}.")  # the head may differ
        require(fits, f"{problem}, first in {name}: leave it out, or set model.pretrained=false.")
    if net.config.vocab_size < spec["vocab_size"]:  # a pad token was added
        net.resize_token_embeddings(spec["vocab_size"], mean_resizing=False)
    return net


def load_pretrained(loader: Any, model: Model, **options: Any) -> Any:
    """Call `loader.from_pretrained` on `model.path` or the hub, without running the model's code.

    Raises:
        TraceFLError: It cannot be loaded; the message names the remedy.
    """
    from transformers.utils import logging

    from tracefl.hub import use_cache_if_offline

    logging.set_verbosity_error()  # transformers warns about the new head, which is wanted
    logging.disable_progress_bar()
    if model.path:
        problem = f"model.path={model.path} cannot be read"
        remedy = "give a folder with config.json, model.safetensors and a tokenizer, as save_pretrained leaves it"
    else:
        use_cache_if_offline()
        problem = f"model.name={model.name} cannot be loaded from the hub"
        setting = "model.pretrained=false" if model.pretrained else "model.tokenizer=trained"
        without = f"set {setting}, " if model.name in ARCHITECTURES else ""
        remedy = f"check name and connection, {without}or give a local copy with model.path=FOLDER"
    try:
        if model.path:
            check_folder(Path(model.path))
        elif "Model" in loader.__name__:
            _check_hub_index(model.name)
        return loader.from_pretrained(model.path or model.name, trust_remote_code=False, **options)
    except TraceFLError:
        raise
    except BaseException as error:  # what readers of others' files raise, Rust's panics too
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TraceFLError(f"{problem} ({first_line(error)}): {remedy}.") from error


def _check_hub_index(name: str) -> None:
    """Look at the list of shards that a model of the hub has, before they are fetched."""
    from transformers.utils.hub import cached_file

    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    if file := cached_file(name, INDEX, **options):
        check_index(json.loads(Path(file).read_text()), Path(file))
