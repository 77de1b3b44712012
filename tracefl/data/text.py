"""Texts to tokens, by the model's own tokenizer or by one that is trained on the training texts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tracefl.config import Config, Model
from tracefl.data.plain import PlainEncoder, unknown_token
from tracefl.data.sources import Source
from tracefl.errors import require
from tracefl.models.text import architecture, check_memory, load_pretrained, text_spec, token_limit

VOCABULARY = 8000  # of a trained tokenizer, unless model.config.vocab_size says otherwise
PAD = "[PAD]"
Encode = Callable[[Any, np.ndarray], dict[str, Tensor]]  # (split, rows) -> tensors


def text_encoder(source: Source, config: Config, rows: np.ndarray) -> tuple[Encode, str, dict[str, Any]]:
    """The tokenizer of a run, and the model that its tokens are for.

    Args:
        source: The dataset.
        config: Its model and dataset.max_tokens are read.
        rows: Of the training split, int64: what a tokenizer is trained on.

    Returns:
        encode: A function (split, rows) to input_ids int32 [N, T], padded on the right, and lengths
            int32 [N].
        tokenizer: As the JSON of the tokenizers library.
        spec: What `models.build_model` needs.

    Raises:
        TraceFLError: The model or its tokenizer cannot be loaded, or max_tokens does not fit.
    """
    model, max_tokens, base = config.model, config.dataset.max_tokens, architecture(config.model)
    tokenizer, pad = _own(model) if model.own_tokenizer else _trained(model, base, source.texts(source.train, rows))
    if not model.own_tokenizer:
        _set_ends(base, tokenizer)
    size = tokenizer.get_vocab_size()
    spec = text_spec(base, max(size, base.vocab_size) if model.has_weights else size, pad, source.class_names)
    check_memory(spec)
    longest, name = token_limit(spec), f"model.path={model.path}" if model.path else f"model.name={model.name}"
    must = f"dataset.max_tokens must be at most {longest}, which is all that {name} can take"
    require(longest is None or max_tokens <= longest, f"{must}, got {max_tokens}: lower it.")
    special = tokenizer.num_special_tokens_to_add(False)
    must = f"dataset.max_tokens must be above {special}, the number of special tokens"
    require(max_tokens > special, f"{must}, got {max_tokens}: raise it.")
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    encode = partial(_encode, source, PlainEncoder(tokenizer), pad, spec["vocab_size"])
    return encode, tokenizer.to_str(), spec


def _encode(
    source: Source, encoder: PlainEncoder, pad: int, vocab_size: int, split: Any, rows: np.ndarray
) -> dict[str, Tensor]:
    """See `text_encoder`; an empty text is encoded as one pad token."""
    encoded = [tokens or [pad] for tokens in encoder(source.texts(split, rows))]
    most = max(map(max, encoded))
    beyond = f"the tokenizer gives token {most}, and the model knows tokens 0 to {vocab_size - 1}"
    require(most < vocab_size, f"{beyond}: give a tokenizer that fits the model.")
    ids = [torch.tensor(tokens, dtype=torch.int32) for tokens in encoded]
    lengths = torch.tensor([len(tokens) for tokens in ids], dtype=torch.int32)
    return {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad), "lengths": lengths}


def _own(model: Model) -> tuple[Tokenizer, int]:
    from transformers import AutoTokenizer

    own = load_pretrained(AutoTokenizer, model)
    there = hasattr(own, "backend_tokenizer") and len(own) > len(own.all_special_ids)
    source = f"model.path={model.path}" if model.path else f"model.name={model.name}"
    require(there, f"{source} has no tokenizer.json or vocabulary: save its tokenizer there, or name another.")
    # OpenAI's GPT and GPT-2 have none; an unknown word is no padding
    if own.pad_token_id is None or own.pad_token_id == unknown_token(own.backend_tokenizer):
        own.add_special_tokens({"pad_token": PAD})
    return Tokenizer.from_str(own.backend_tokenizer.to_str()), own.pad_token_id


def _trained(model: Model, base: Any, corpus: list[str]) -> tuple[Tokenizer, int]:
    """A byte-pair tokenizer for a GPT, otherwise a word-piece one; the pad token's id is 0.

    Letters become lower case unless the model's name says "cased".
    """
    train = _byte_pairs if "gpt" in base.model_type else _word_pieces
    normalizer = normalizers.BertNormalizer(lowercase="-cased" not in model.name)
    return train(corpus, model.config.get("vocab_size", VOCABULARY), normalizer), 0


def _set_ends(base: Any, tokenizer: Tokenizer) -> None:
    """Tell a model that looks for the ends of a text (BART, T5) what they are."""
    for key, token in (("bos_token_id", "[CLS]"), ("eos_token_id", "[SEP]")):
        index = tokenizer.token_to_id(token)
        if index is not None and getattr(base, key, None) is not None:
            setattr(base, key, index)


def _byte_pairs(corpus: list[str], vocab_size: int, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # with all bytes no text is unknown
    options: dict[str, Any] = {"special_tokens": [PAD], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return tokenizer


def _word_pieces(corpus: list[str], vocab_size: int, normalizer: normalizers.Normalizer) -> Tokenizer:
    """A word-piece tokenizer that puts a text between [CLS] and [SEP]."""
    special = [PAD, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for text in corpus for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))}
    # The trainer would number the letters inside words in the order of a hash map, which changes
    # from process to process; as special tokens they keep the order given here.
    inside = sorted({f"##{letter}" for word in words for letter in word[1:]})
    draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    draft.normalizer, draft.pre_tokenizer = normalizer, split
    options: dict[str, Any] = {"special_tokens": [*special, *inside], "show_progress": False}
    draft.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=vocab_size, **options))
    tokenizer = Tokenizer(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, split
    tokenizer.add_special_tokens(special)
    ends = [(token, special.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer
