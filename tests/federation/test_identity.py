"""The client half: what a node answers, and that it needs Flower alone."""

import subprocess
import sys

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from tracefl.federation.identity import identify


def answer(node_config, content) -> str:
    context = Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={})
    reply = identify(Message(RecordDict(content), message_type="query.identify", dst_node_id=1), context)
    return reply.content["config"]["client"]


def test_a_node_answers_with_the_key_that_it_is_asked_for():
    node = {"partition-id": 3, "site": "hospital/berlin"}
    assert answer(node, {}) == "3"
    assert answer(node, {"config": ConfigRecord({"key": "site"})}) == "hospital/berlin"
    with pytest.raises(KeyError, match="has no 'name', it has partition-id, site"):
        answer(node, {"config": ConfigRecord({"key": "name"})})


def test_the_client_half_imports_torch_and_flower_alone():
    """Of the third parties that `tracefl` depends on."""
    words = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        refused = ("hydra", "omegaconf", "filelock", "safetensors", "pandas", "scipy", "sklearn", "matplotlib",
                   "medmnist", "torchvision", "transformers", "flwr_datasets", "ray", "tracefl.runs")
        if name.split(".")[0] in refused or name in refused:
            raise ImportError(f"{name} is not for a client")
sys.meta_path.insert(0, Refuse())
from flwr.clientapp import ClientApp
before = set(sys.modules)
from tracefl.flower import identify
ClientApp().query("identify")(identify)
print(sorted(name for name in set(sys.modules) - before if name.startswith("tracefl")))
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = ["tracefl", "tracefl.errors", "tracefl.federation", "tracefl.federation.identity", "tracefl.flower"]
    assert done.stdout.strip() == str(names)
