"""Texts as the tokens of what they say: a text that contains "[PAD]" or "</s>" has no such token.

Tokenizers look for the names of their special tokens in a text, and put the tokens there. Here only
a tokenizer's own ends of a text, such as [CLS] and [SEP], are special.
"""

import json
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Encoding, Tokenizer

NEVER = -1e6  # score of a piece that a unigram tokenizer is not to choose


class PlainEncoder:
    """Texts to token ids.

    Where a tokenizer has the name of a special token as a word that it cannot write in parts, the
    word becomes the unknown token, or is left out if there is none.

    Args:
        tokenizer: Of any kind; it is set to take no special tokens from a text.

    Example:
        >>> from tokenizers import models, pre_tokenizers
        >>> vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> _ = words.add_special_tokens(["[PAD]", "[UNK]"])
        >>> words.encode("a [PAD]").ids, PlainEncoder(words)(["a [PAD]"])
        ([2, 0], [[2, 1]])
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.unknown = unknown_token(tokenizer)
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special = special - {self.unknown}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, with the tokenizer's ends; half a surrogate pair becomes U+FFFD."""
        texts = [_valid(text) for text in texts]
        encodings = self.tokenizer.encode_batch_fast(texts)
        named = [row for row, encoding in enumerate(encodings) if self._has_special(encoding)]
        if named:  # the encodings of other texts stay as they are
            again = self._in_parts.encode_batch_fast([texts[row] for row in named])
            for row, encoding in zip(named, again, strict=True):
                encodings[row] = encoding
        return [self._without_special(encoding) for encoding in encodings]

    def _has_special(self, encoding: Encoding) -> bool:
        """Whether a special token is there that is none of the tokenizer's ends."""
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return any(i in self.special for i, is_end in pairs if not is_end)

    def _without_special(self, encoding: Encoding) -> list[int]:
        if not self._has_special(encoding):
            return encoding.ids
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        ids = [i if is_end or i not in self.special else self.unknown for i, is_end in pairs]
        return [i for i in ids if i is not None]

    @cached_property
    def _in_parts(self) -> Tokenizer:
        """The same, but one that chooses pieces by score writes a special token's name in others.

        It is not for all texts: a lowest score changes how it chooses unknown tokens.
        """
        written = json.loads(self.tokenizer.to_str())
        if written["model"]["type"] == "Unigram":
            vocabulary = written["model"]["vocab"]
            for index in self.special & {*range(len(vocabulary))}:
                vocabulary[index][1] = NEVER
        tokenizer = Tokenizer.from_str(json.dumps(written))
        tokenizer.encode_special_tokens = True
        return tokenizer


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """The id of what stands for a text's parts that a tokenizer does not know, if it has one."""
    model = json.loads(tokenizer.to_str())["model"]
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else tokenizer.token_to_id(name)


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
