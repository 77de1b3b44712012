"""Model folders that were made to do harm: each is one sentence, nothing of it is run, nothing outside is read."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.data.test_text import ONE, own_tokenizer, save_model, write_column
from tracefl.config import Model
from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError
from tracefl.models import initial_model
from tracefl.models.folder import check_index
from tracefl.models.text import architecture, load_pretrained


class Payload:
    """A pickle that leaves a file where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="session")
def a_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    save_model(folder, "bert", own_tokenizer("bpe"), max_position_embeddings=40)
    return folder


@pytest.fixture
def mine(a_model, tmp_path) -> Path:
    """A folder of the test's own, with the same files."""
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    for file in a_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edited(name: str, **entries) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))

    return change


def sharded(*names: str) -> Callable[[Path], object]:
    """The weights are in shards of these names, the first of which holds what is a pickle."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        place = folder / names[0]
        if place.parent.is_dir():
            place.write_bytes(pickle.dumps(Payload(folder / "harmed")))
        weights = {f"weight.{k}": name for k, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    return change


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def linked(name: str, target: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder.parent / "outside").write_text("{}")
        (folder / name).symlink_to(target)

    return change


def piped(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


LIE = b'{"w":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'
HOSTILE = {
    # lists of shards
    "a shard above the folder": (sharded("../model.safetensors"), "no safetensors file in the folder"),
    "a shard by its whole path": (sharded("/tmp/model.safetensors"), "no safetensors file in the folder"),
    "a pickle as a shard": (sharded("pytorch_model.bin"), "names 'pytorch_model.bin', which is no safetensors"),
    "one shard of two is a pickle": (sharded("a.safetensors", "model.pkl"), "names 'model.pkl'"),
    "a pickle that is called safetensors": (sharded("a.safetensors"), "cannot be read"),
    "a shard of another system": (sharded("..\\a.safetensors"), "no safetensors file in the folder"),
    "a list of shards without shards": (written("model.safetensors.index.json", b"{}"), "has no weight_map"),
    "a list of shards that is none": (written("model.safetensors.index.json", b"[1]"), "has no weight_map"),
    "a list of shards that is no JSON": (written("model.safetensors.index.json", b"{"), "is no JSON"),
    # configurations
    "code of its own": (edited("config.json", auto_map={"AutoConfig": "evil.Config"}), "has the entry auto_map"),
    "a tokenizer's code": (edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}), "auto_map"),
    "a kernel of the hub": (edited("config.json", attn_implementation="evil/kernel"), "attn_implementation"),
    "weights elsewhere": (edited("config.json", transformers_weights="../a.safetensors"), "transformers_weights"),
    "another model beneath": (written("adapter_config.json", b"{}"), "adapter_config.json names another model"),
    "deep nesting": (written("tokenizer_config.json", b"[" * 100_000), "is no JSON that can be read"),
    "a million layers": (edited("config.json", num_hidden_layers=10**6), "num_hidden_layers must be at most 1000"),
    "a huge width": (edited("config.json", hidden_size=10**7, intermediate_size=10**7), "choose a smaller model"),
    "a huge vocabulary": (edited("config.json", vocab_size=2**70), "vocab_size must be at most"),
    "a width of text": (edited("config.json", hidden_size="wide"), "hidden_size|cannot be read"),
    "a negative width": (edited("config.json", hidden_size=-8), "model.config does not make|cannot be read"),
    "an unknown type": (edited("config.json", model_type="evil"), "cannot be read"),
    # weights
    "no header": (written("model.safetensors", b"abc"), "cannot be read"),
    "half a header": (written("model.safetensors", header(LIE, 10**6)), "cannot be read"),
    "a huge header": (written("model.safetensors", header(LIE, 2**62)), "cannot be read"),
    "tensors that are not there": (written("model.safetensors", header(LIE)), "cannot be read"),
    "a pickle": (written("model.safetensors", pickle.dumps(Payload(Path("harmed")))), "cannot be read"),
    # tokenizers
    "a tokenizer that is no JSON": (written("tokenizer.json", b"{"), "cannot be read"),
    "a tokenizer of bytes": (written("tokenizer.json", b"\x80\x04\x95" * 50), "cannot be read"),
    "a tokenizer without a model": (written("tokenizer.json", b'{"version": "1.0"}'), "cannot be read"),
    "a tokenizer's broken pattern": (
        edited("tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed",
                                                "invert": False}), "cannot be read"),
    "a tokenizer's class of no library": (
        lambda folder: [edited("tokenizer_config.json", tokenizer_class="os.system")(folder),
                        (folder / "tokenizer.json").unlink()], "cannot be read|tokenizer"),
    # files that are none
    "a link outside": (linked("model.safetensors", "../outside"), "outside of the folder"),
    "a link to a device": (linked("model.safetensors", "/dev/zero"), "outside of the folder"),
    "a link to nothing": (linked("tokenizer.json", "nothing.json"), "is no file"),
    "a pipe": (piped, "is no file"),
}  # fmt: skip


QUICK = (  # the others are slow only because they are many
    "a shard above the folder", "a pickle as a shard", "code of its own", "a huge width", "a huge header",
    "a tokenizer that is no JSON", "a link outside", "a pipe",
)  # fmt: skip
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in HOSTILE]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_folder_is_one_sentence(config, mine, tmp_path, monkeypatch, kind):
    change, words = HOSTILE[kind]
    change(mine)
    monkeypatch.chdir(tmp_path)
    write_column(tmp_path / "talk", ["words here", "some words"] * 10)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *_, **__: tensor)
    settings = config(f"model.path={mine}", f"dataset.path={tmp_path}/talk", "dataset.max_tokens=20", *ONE)
    with pytest.raises(TraceFLError, match=words) as error:
        initial_model(settings, prepare(settings))
    assert len(str(error.value)) < 700
    assert not list(tmp_path.rglob("harmed"))


def test_a_tokenizer_that_leaves_its_model_is_refused(config, mine, tmp_path):
    content = json.loads((mine / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: index * 1000 for word, index in content["model"]["vocab"].items()}
    (mine / "tokenizer.json").write_text(json.dumps(content))
    write_column(tmp_path / "talk", ["words here", "some words"] * 10)
    with pytest.raises(TraceFLError, match=r"the model knows tokens 0 to|tokenizer"):
        prepare(config(f"model.path={mine}", f"dataset.path={tmp_path}/talk", "dataset.max_tokens=20", *ONE))


def test_the_hubs_own_cache_is_a_folder_of_links(mine):
    blobs = mine.parents[1] / "blobs"
    blobs.mkdir()
    snapshot = mine.parent / "snapshot"  # <cache>/blobs, <cache>/snapshots/<commit>
    snapshot.mkdir()
    for number, file in enumerate(sorted(mine.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(number))
    assert architecture(Model("mine", path=str(snapshot), config={})).model_type == "bert"


def test_the_hubs_shards_are_looked_at_before_they_are_fetched(tmp_path, monkeypatch):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "pytorch_model.bin"}}))
    monkeypatch.setattr("tracefl.hub.reachable", lambda _: True)
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: str(index))

    class AutoModel:
        from_pretrained = staticmethod(lambda *_, **__: pytest.fail("it was fetched"))

    with pytest.raises(TraceFLError, match=r"names 'pytorch_model\.bin', which is no safetensors file"):
        load_pretrained(AutoModel, Model("owner/name", pretrained=True, config={}))


def test_shards_beside_the_list_are_taken(tmp_path):
    check_index({"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}, tmp_path / "index.json")
