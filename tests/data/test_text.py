"""Texts reach clients and server as the tokens that the model reads: joined, cut, padded, the same each time."""

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError
from tracefl.models import build_model, initial_model, model_spec

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
            r"dataset\.max_tokens must be at most 512 for .*bert-base-cased, got 513: lower it",
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
def test_real_texts(config, real_data, name, classes):
    limits = ("data_dist.max_per_client_data_size=50", "data_dist.max_server_data_size=50", "dirichlet_alpha=1")
    data = prepare(config(f"dataset.path={real_data / name}", f"model.name={BERT}", "dataset.max_tokens=32", *limits))
    assert len(data.class_names) == classes
    assert len(data.server()) == 50
    assert data.server().inputs["input_ids"].shape[1] <= 32
