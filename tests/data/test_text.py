"""Texts reach clients and server as the tokens that the model reads: joined, cut, padded, the same each time."""

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tracefl.data.plain import PlainEncoder
from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError
from tracefl.models import build_model, initial_model, model_spec
from tracefl.models.text import ARCHITECTURES, token_limit

BERT, GPT = "google-bert/bert-base-cased", "openai-community/openai-gpt"
SMALL = {
    BERT: ["num_hidden_layers=1", "hidden_size=16", "num_attention_heads=2", "intermediate_size=16"],
    GPT: ["n_layer=1", "n_embd=16", "n_head=2"],
}
WORDS = {"cat": "a Cat purrs softly", "dog": "the Dog barks"}


def write_texts(folder, count: int = 60) -> None:
    """A local text set of two columns and a topic; title 3 is empty, question 5 is None."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        topics = [k % 2 for k in range(count)]
        titles = ["" if k == 3 else f"title {k}" for k in range(count)]
        questions = [None if k == 5 else list(WORDS.values())[k % 2] for k in range(count)]
        features = datasets.Features(
            {
                "id": datasets.Value("int32"),
                "topic": datasets.ClassLabel(names=list(WORDS)),
                "title": datasets.Value("string"),
                "question": datasets.Value("large_string"),
            }
        )
        columns = {"id": range(count), "topic": topics, "title": titles, "question": questions}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}-0.parquet"))


@pytest.fixture
def text_config(config, tmp_path):
    write_texts(tmp_path / "talk")

    def build(name: str, *overrides: str):
        sizes = [f"++model.config.{entry}" for entry in SMALL.get(name, [])]
        clients = ("num_clients=1", "clients_per_round=1")
        both = () if any("input_columns" in word for word in overrides) else ("dataset.input_columns=[title,question]",)
        return config(f"dataset.path={tmp_path}/talk", f"model.name={name}", *both, *clients, *sizes, *overrides)

    return build


def decoded(data, examples) -> list[str]:
    """The texts that the tokens stand for, in the tokenizer's own spelling of spaces."""
    tokenizer = Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    lengths = examples.inputs["attention_mask"].sum(1).tolist()
    return [
        " ".join(tokenizer.id_to_token(i) for i in row[:n])
        for row, n in zip(examples.inputs["input_ids"].tolist(), lengths, strict=True)
    ]


def test_columns_are_joined_and_a_bert_sees_its_ends(text_config):
    data = prepare(text_config(BERT))
    assert data.class_names == ["cat", "dog"]
    said = [text.replace(" ##", "") for text in decoded(data, data.client("0"))]
    assert "[CLS] title 2 a Cat purrs softly [SEP]" in said
    assert "[CLS] the Dog barks [SEP]" in said  # its title is empty
    assert "[CLS] title 5 [SEP]" in said  # its question is missing
    assert all("[UNK]" not in text for text in said)


def test_a_gpt_sees_bytes_and_no_ends(text_config):
    data = prepare(text_config(GPT, "dataset.input_columns=[question]"))
    said = {text.replace(" ", "").replace("Ġ", " ") for text in decoded(data, data.client("0"))}
    assert said == {" a cat purrs softly", " the dog barks", "[PAD]"}  # a missing text is one pad token


def test_tokens_are_cut_padded_on_the_right_and_stored_small(text_config):
    data = prepare(text_config(BERT, "dataset.max_tokens=6"))
    stored = load_file(data.folder / "clients" / "0.safetensors")
    assert stored["input_ids"].dtype == stored["lengths"].dtype == torch.int32
    assert stored["input_ids"].shape[1] == stored["lengths"].max() == 6
    examples = data.client("0")
    mask = examples.inputs["attention_mask"]
    assert (mask.diff(dim=1) <= 0).all()
    assert torch.equal(examples.inputs["input_ids"] == 0, mask == 0)
    shortest = examples[mask.sum(1).argsort()[:1]]
    assert shortest.inputs["input_ids"].shape == (1, mask.sum(1).min())


@pytest.mark.parametrize("name", [BERT, GPT])
def test_the_same_texts_give_the_same_bytes(text_config, name):
    first = prepare(text_config(name))
    again = prepare(text_config(name, "check_dataset_cache=false"))
    assert first.digest == again.digest
    assert first.text_model == again.text_model


def test_the_vocabulary_follows_the_tokenizer_and_its_wanted_size(text_config):
    data = prepare(text_config(BERT, "++model.config.vocab_size=70"))
    assert data.text_model["vocab_size"] == 70
    assert data.text_model["id2label"]["1"] == "dog"
    assert prepare(text_config(BERT)).text_model["vocab_size"] > 70


@pytest.mark.parametrize("name", [BERT, GPT])
def test_padding_changes_no_prediction(text_config, name):
    config = text_config(name)
    data = prepare(config)
    torch.manual_seed(0)
    model = build_model(model_spec(config, data)).eval()
    examples = data.client("0")
    with torch.no_grad():
        together = model(**examples.inputs).logits
        alone = torch.cat([model(**examples[torch.tensor([row])].inputs).logits for row in range(len(examples))])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("resnet18", [], r"model\.name=resnet18 is a model for images.*holds text"),
        (BERT, ["++model.config.layers=2"], r"model\.config\.layers=2 is no entry of the config of .*bert-base-cased"),
        (BERT, ["++model.config.hidden_sise=2"], r"did you mean hidden_size\?"),
        (BERT, ["++model.config.hidden_size=many"], r"model\.config\.hidden_size=many does not fit a bert: "),
        (
            BERT,
            ["dataset.max_tokens=513"],
            r"dataset\.max_tokens must be at most 512, .* model\.name=.*bert-base-cased can take, got 513: lower it",
        ),
        (
            BERT,
            ["dataset.max_tokens=2"],
            r"dataset\.max_tokens must be above 2, the number of special tokens, got 2: raise it",
        ),
        (BERT, ["dataset.input_columns=[id]"], r"dataset\.input_columns=id is neither an image nor a text"),
        ("nobody/never-there", [], r"model\.name=nobody/never-there.*model\.path=FOLDER"),
        (BERT, ["model.tokenizer=own"], r"set model\.tokenizer=trained, or give a local copy with model\.path=FOLDER"),
        (BERT, ["model.pretrained=true"], r"cannot be loaded from the hub.*set model\.pretrained=false"),
    ],
)
def test_an_impossible_text_model_is_refused_in_one_sentence(text_config, monkeypatch, name, overrides, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # restored afterwards
    monkeypatch.setattr("tracefl.hub.reachable", lambda url: False)
    with pytest.raises(TraceFLError, match=words) as error:
        prepare(text_config(name, *overrides))
    assert "\n" not in str(error.value)


def test_a_text_model_refuses_images(config):
    with pytest.raises(
        TraceFLError, match=r"a model for texts, but dataset\.name=digits holds images \(column image\)"
    ):
        prepare(config(f"model.name={BERT}"))


def test_a_local_folder_is_used_with_its_own_tokens_and_weights(text_config, tmp_path):
    source = prepare(text_config(BERT))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source.folder / "tokenizer.json"), unk_token="[UNK]", pad_token="[PAD]"
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    saved = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=5, **sizes))
    saved.save_pretrained(tmp_path / "mine")
    with pytest.raises(TraceFLError, match=r"model\.path=.*mine"):
        prepare(text_config("mine/bert", f"model.path={tmp_path}/mine"))
    tokenizer.save_pretrained(tmp_path / "mine")

    config = text_config("mine/bert", f"model.path={tmp_path}/mine")
    data = prepare(config)
    assert torch.equal(data.client("0").inputs["input_ids"], source.client("0").inputs["input_ids"])
    model = initial_model(config, data)
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[word], saved.state_dict()[word])
    assert model.classifier.out_features == 2  # a new head for other classes
    assert model.state_dict().keys() == build_model(model_spec(config, data)).state_dict().keys()

    other = text_config("mine/bert", f"model.path={tmp_path}/mine", "++model.config.intermediate_size=16")
    with pytest.raises(TraceFLError, match=r"does not fit the weights of .*mine"):
        initial_model(other, prepare(other))


def test_a_pad_token_is_added_where_a_model_has_none(text_config, tmp_path):
    source = prepare(text_config(GPT))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source.folder / "tokenizer.json"))
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "mine")
    model = build_model(source.text_model | {"pad_token_id": None})
    model.save_pretrained(tmp_path / "mine")
    config = text_config("mine/gpt", f"model.path={tmp_path}/mine")
    data = prepare(config)
    loaded = initial_model(config, data)
    assert loaded.config.pad_token_id == data.text_model["pad_token_id"]
    assert loaded.get_input_embeddings().num_embeddings == data.text_model["vocab_size"]


@pytest.mark.parametrize(("name", "classes"), [("dbpedia_14", 14), ("yahoo_answers_topics", 10)])
@pytest.mark.slow
@pytest.mark.slow
def test_real_texts(config, real_data, name, classes):
    limits = ("data_dist.max_per_client_data_size=50", "data_dist.max_server_data_size=50", "dirichlet_alpha=1")
    data = prepare(config(f"dataset.path={real_data / name}", f"model.name={BERT}", "dataset.max_tokens=32", *limits))
    assert len(data.class_names) == classes
    assert len(data.server()) == 50
    assert data.server().inputs["input_ids"].shape[1] <= 32


NAMES = ["<pad>", "[PAD]", "</s>", "[SEP]", "[CLS]", "<s>", "<|endoftext|>", "<unk>"]
ENDS = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def own_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary holds the names of its special tokens, 0 to 3, and letters."""
    letters = sorted({*"<>[]|/▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"})
    pieces = [*("<pad>", "<s>", "</s>", "<unk>"), *letters, "words"]
    ids = {piece: index for index, piece in enumerate(pieces)}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram([(piece, -5.0 * (ids[piece] > 3)) for piece in pieces], unk_id=3))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = ENDS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def save_model(folder, model_type: str, tokenizer: PreTrainedTokenizerFast, **entries) -> None:
    """A tiny model with its tokenizer, as people have one in a folder."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **{**sizes, **ids, **entries})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_column(folder, texts: list[str | None]) -> None:
    """A local set of one column of texts, the same in both splits."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    for split in ("train", "test"):
        columns = {"text": texts, "label": [k % 2 for k in range(len(texts))]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}-0.parquet"))


ONE = (
    *("num_clients=1", "clients_per_round=1", "data_dist.min_examples_per_class=1"),
    "dataset.input_columns=[text]",  # a few texts again and again are no evident text
)


def encoded(config, tmp_path, texts: list[str | None], *overrides: str):
    """The prepared data, and the token ids of each of the texts, as the server has them."""
    write_column(tmp_path / "talk", texts)
    data = prepare(config(f"dataset.path={tmp_path}/talk", *ONE, *overrides))
    server = data.server()
    lengths = server.inputs["attention_mask"].sum(1).tolist()
    rows = [row[:n] for row, n in zip(server.inputs["input_ids"].tolist(), lengths, strict=True)]
    shuffled = np.random.default_rng(0).permutation(len(texts)).tolist()
    return data, [rows[shuffled.index(k)] for k in range(len(texts))]


@pytest.mark.parametrize(
    ("model_type", "entries", "limit"),
    [
        ("roberta", {"max_position_embeddings": 40}, 39),  # padding_idx is 0
        ("xlm-roberta", {"max_position_embeddings": 40, "pad_token_id": 0}, 39),
        ("mpnet", {"max_position_embeddings": 40}, 38),  # always 1
        ("bert", {"max_position_embeddings": 40}, 40),
        ("gpt2", {"n_positions": 40}, 40),
    ],
)
def test_the_most_tokens_a_model_can_take_are_taken_and_one_more_is_refused(
    config, tmp_path, model_type, entries, limit
):
    save_model(tmp_path / "mine", model_type, own_tokenizer("bpe"), **entries)
    long = ["words " * 30, "some words"] * 10
    path = f"model.path={tmp_path}/mine"
    for too_many in (limit + 1, 128):
        with pytest.raises(
            TraceFLError, match=rf"max_tokens must be at most {limit}, .*mine can take, got {too_many}: lower it"
        ):
            encoded(config, tmp_path, long, path, f"dataset.max_tokens={too_many}")
    data, rows = encoded(config, tmp_path, long, path, f"dataset.max_tokens={limit}")
    assert max(map(len, rows)) == limit
    initial_model(config(f"dataset.path={tmp_path}/talk", *ONE, path, f"dataset.max_tokens={limit}"), data)


def test_padding_may_stand_anywhere_in_a_robertas_vocabulary(config, tmp_path):
    spec = {"model_type": "roberta", "vocab_size": 9, "max_position_embeddings": 20, "hidden_size": 8}
    spec |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    assert [token_limit(spec | {"pad_token_id": pad}) for pad in (0, 1, 4)] == [19, 18, 15]
    assert token_limit({"model_type": "t5"}) is None
    assert token_limit({"model_type": "xlnet", "n_layer": 1, "d_model": 8, "n_head": 2}) is None


def test_a_model_without_a_known_limit_is_tried_with_the_longest_text(config, tmp_path, monkeypatch):
    save_model(tmp_path / "mine", "roberta", own_tokenizer("bpe"), max_position_embeddings=40)
    monkeypatch.setattr("tracefl.data.text.token_limit", lambda spec: None)
    path = f"model.path={tmp_path}/mine"
    data, rows = encoded(config, tmp_path, ["words " * 30, "some words"] * 10, path, "dataset.max_tokens=45")
    assert max(map(len, rows)) == 45
    longest = r"model\.path=.*mine cannot take the longest text, of 45 tokens \(.*\): lower dataset\.max_tokens"
    with pytest.raises(TraceFLError, match=longest):
        initial_model(config(f"dataset.path={tmp_path}/talk", *ONE, path, "dataset.max_tokens=45"), data)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "words"])
def test_the_name_of_a_special_token_in_a_text_is_a_text(config, tmp_path, kind):
    save_model(tmp_path / "mine", "bert", own := own_tokenizer(kind))
    texts = ["words", *(f"{name} words{name}{name} {name}" for name in NAMES), "a b ñ"]
    _, rows = encoded(config, tmp_path, texts, f"model.path={tmp_path}/mine")
    for text, ids in zip(texts, rows, strict=True):
        assert (ids[0], ids[-1]) == (1, 2)
        assert not {0, 1, 2} & {*ids[1:-1]}
        if kind != "words" and "ñ" not in text and "<unk>" not in text:
            said = "".join(own.convert_ids_to_tokens(ids[1:-1]))
            assert said == "▁" + text.replace(" ", "▁")
    assert rows[0] == own("words").input_ids
    assert rows[-1] == own("a b ñ").input_ids


@pytest.mark.parametrize("name", [BERT, GPT])
def test_a_trained_tokenizer_takes_no_special_token_from_a_text(config, tmp_path, name):
    sizes = [f"model.config.{entry}" for entry in SMALL[name]]
    texts = ["words", *(f"{token} words{token}" for token in (*NAMES, "[MASK]", "[UNK]"))] * 2
    data, rows = encoded(config, tmp_path, texts, f"model.name={name}", *sizes)
    tokenizer = Tokenizer.from_file(str(data.folder / "tokenizer.json"))
    special = {tokenizer.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")}
    for text, ids in zip(texts, rows, strict=True):
        inside = ids[1:-1] if name == BERT else ids
        assert not special & {*inside}
        said = "".join(tokenizer.id_to_token(i) for i in inside).replace("##", "").replace("Ġ", " ")
        assert said.replace(" ", "") == text.lower().replace(" ", "") if name == GPT else text.replace(" ", "")


def test_a_padding_that_is_also_the_unknown_word_is_replaced(config, tmp_path):
    own = own_tokenizer("words")
    own.pad_token = own.unk_token
    save_model(tmp_path / "mine", "gpt2", own, n_positions=20)
    texts = ["words never-seen", "words"] * 4
    data, rows = encoded(config, tmp_path, texts, f"model.path={tmp_path}/mine", "dataset.max_tokens=20")
    assert rows[0] == [1, own.convert_tokens_to_ids("words"), 3, 2]
    assert data.text_model["pad_token_id"] == len(own)


@pytest.mark.parametrize("name", [BERT, GPT])
def test_odd_texts_are_encoded(config, tmp_path, name):
    sizes = [f"model.config.{entry}" for entry in SMALL[name]]
    odd = [" \t\n", None, "", "\0", "a\0b", "😀👩‍👩‍👧", "x" * 10_000, "word " * 5_000, "\u202e\ufeff"]
    data, rows = encoded(config, tmp_path, [*odd, "word"] * 2, f"model.name={name}", *sizes)
    assert all(1 <= len(ids) <= 128 for ids in rows)
    c = config(f"dataset.path={tmp_path}/talk", *ONE, f"model.name={name}", *sizes)
    logits = initial_model(c, data)(**data.server().inputs).logits
    assert torch.isfinite(logits).all()


def test_half_a_surrogate_pair_is_an_unknown_character():
    encode = PlainEncoder(own_tokenizer("bpe").backend_tokenizer)
    assert encode(["a\ud800b", "\ud83d\ude00"]) == encode(["a\ufffdb", "😀"])


BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5 = {"decoder_start_token_id": 0, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize("architecture", [("bart", BART), ("t5", T5)])
def test_a_model_that_looks_for_the_end_of_a_text_finds_that_of_a_trained_tokenizer(
    config, tmp_path, monkeypatch, architecture
):
    monkeypatch.setitem(ARCHITECTURES, "some/one", architecture)
    texts = ["words [UNK] [SEP] </s>", "more", "words", "much more words"] * 3
    data, rows = encoded(config, tmp_path, texts, "model.name=some/one")
    assert all(ids.count(data.text_model["eos_token_id"]) == 1 for ids in rows)
    model = initial_model(config(f"dataset.path={tmp_path}/talk", *ONE, "model.name=some/one"), data)
    assert model(**data.server().inputs).logits.shape == (12, 2)
