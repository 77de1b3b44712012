"""What run.json must hold: every lie is named by its entry, hashed anew or in a file of an earlier version."""

import json

import pytest
import torch

from tests.rewriting import rewrite
from tests.test_runs import one_round, state
from tracefl import Run
from tracefl.errors import TraceFLError
from tracefl.record import ClientInfo
from tracefl.sealed import KEY, sealed
from tracefl.training import Evaluation

FIRST = ("rounds", 0, "clients", 0)
LIES = [  # the entry, its lie, and what the sentence says
    (("seed",), "3", "seed must be a whole number"),
    (("seed",), 2**70, "seed must be a whole number"),
    (("initial_sha256",), "ab", "initial_sha256 must be a SHA-256, 64 hex digits, got 'ab'"),
    (("initial_sha256",), None, "initial_sha256 must be a SHA-256"),
    (("entries",), ["w", "w"], "entries must be a list of texts, each once"),
    (("data_sha256",), "AB" * 32, "data_sha256 must be a SHA-256"),
    (("data_folder",), "/etc", "data_folder must be a path from the run's folder"),
    (("class_names",), [1, 2], "class_names must be a list of texts"),
    (("class_names",), ["a", "b"], r"clients\[0\]: labels must be 0 to 1, as class_names says, got \['3'"),
    (("model",), "resnet", "model must be an object"),
    (("clients",), {}, "clients must be a list"),
    (("clients", 0), 7, r"clients\[0\] must be an object"),
    (("clients", 1, "id"), "0", "clients: client '0' is there twice"),
    (("clients", 1, "id"), 7, r"clients\[1\].id must be text"),
    (("clients", 1, "id"), "\ud800", r"clients\[1\].id must be text"),
    (("clients", 0, "label_counts", "3"), -1, r"clients\[0\].label_counts must hold whole numbers of at least 0"),
    (("clients", 0, "label_counts", "cat"), 1, r"clients\[0\].label_counts must hold whole numbers"),
    (("clients", 0, "label_counts", "3"), True, r"clients\[0\].label_counts must hold whole numbers"),
    (("clients", 0, "hidden"), 1, r"clients\[0\] has an unknown entry 'hidden'"),
    (("rounds", 0, "number"), 2, r"rounds\[0\].number must be 1, got 2"),
    (("rounds", 0, "number"), 1.0, r"rounds\[0\].number must be a whole number"),
    (("rounds", 0, "global_sha256"), "../x", r"rounds\[0\].global_sha256 must be a SHA-256"),
    (("rounds", 0, "loss"), "high", r"rounds\[0\].loss must be a number, or null, got 'high'"),
    (("rounds", 0, "accuracy"), 1.5, r"rounds\[0\].accuracy must be a share from 0 to 1"),
    (("rounds", 0, "accuracy"), None, r"rounds\[0\] must have loss, accuracy and predictions_sha256, or none"),
    (("rounds", 0, "failures"), {"4": 1}, r"rounds\[0\].failures must hold texts by client"),
    (("rounds", 0, "failures"), {"9": "gone"}, r"rounds\[0\]: client '9' is none of the run's"),
    (("rounds", 0, "failures"), {"7": "gone"}, r"rounds\[0\]: client '7' took part and failed"),
    (("rounds", 0, "metrics"), {"other": {}}, r"rounds\[0\].metrics must hold train, evaluate, server"),
    (("rounds", 0, "metrics"), {"train": {"x": "y"}}, r"rounds\[0\].metrics must hold"),
    (("rounds", 0, "weights_from"), "me", r"rounds\[0\].weights_from must be strategy, models, assumed"),
    (("rounds", 0, "kept"), False, r"rounds\[0\].kept must be true with storage.keep=all"),
    (("rounds", 0, "extra"), 1, r"rounds\[0\] has an unknown entry 'extra'"),
    ((*FIRST, "weight"), 0.9, "the clients' weights must add up to 1, or all be 0"),
    ((*FIRST, "weight"), -0.1, r"rounds\[0\].clients\[0\].weight must be a share"),
    ((*FIRST, "weight"), "nan", r"rounds\[0\].clients\[0\].weight must be a share"),
    ((*FIRST, "num_examples"), -1, r"num_examples must be a whole number of at least 0, got -1"),
    ((*FIRST, "id"), "7", r"rounds\[0\].clients\[0\].file must be clients/7.safetensors"),
    ((*FIRST, "id"), "x", "file must be clients/x.safetensors"),
    ((*FIRST, "file"), "../../../secret", "file must be clients/0.safetensors, got '../../../secret'"),
    ((*FIRST, "sha256"), "", "sha256 must be a SHA-256"),
    (("storage",), {"keep": "some"}, "storage.keep must be all"),
    (("storage",), {"kept": 1}, "storage must hold keep and dtype"),
    (("storage",), 7, "storage must hold keep and dtype"),
]


@pytest.fixture
def run(tmp_path):
    one_round(tmp_path)
    return tmp_path / "run.json"


@pytest.mark.parametrize("schema", [4, 3])
@pytest.mark.parametrize(("place", "lie", "told"), LIES)
def test_a_lie_is_named(run, place, lie, told, schema):
    def change(header):
        holder = header
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = lie
        header["schema"] = schema

    rewrite(run, change)
    if schema == 3:
        run.write_text(json.dumps({key: value for key, value in json.loads(run.read_text()).items() if key != KEY}))
    with pytest.raises(TraceFLError, match=told):
        Run.open(run.parent)


def test_any_change_of_the_header_is_noticed(run):
    content = run.read_bytes()
    for index in range(0, len(content), 7):
        run.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises(TraceFLError, match=r"run\.json|schema"):
            Run.open(run.parent)
    header = json.loads(content)
    run.write_text(json.dumps(header, indent=2))
    with pytest.raises(TraceFLError, match="is not as it was written"):
        Run.open(run.parent)
    del header[KEY]
    run.write_text(json.dumps(header, indent=1))
    with pytest.raises(TraceFLError, match="schema 4 and content_sha256 do not fit each other"):
        Run.open(run.parent)
    run.write_bytes(sealed(json.dumps(header, indent=1)))
    assert run.read_bytes() == content
    Run.open(run.parent)


@pytest.mark.parametrize("schema", [1, 2, 3])
def test_runs_of_earlier_versions_open_and_get_a_hash_when_they_go_on(run, schema):
    rewrite(run, lambda header: header | {"schema": schema})
    header = {key: value for key, value in json.loads(run.read_text()).items() if key != KEY}
    run.write_text(json.dumps(header, indent=1))
    opened = Run.open(run.parent)
    opened.record_round(2, [], state(2.0), None, {})
    assert (json.loads(run.read_text())["schema"], len(Run.open(run.parent).rounds)) == (4, 2)
    run.write_bytes(run.read_bytes().replace(b'"accuracy": 0.6', b'"accuracy": 0.7'))
    with pytest.raises(TraceFLError, match="is not as it was written"):
        Run.open(run.parent)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    run = one_round(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    part = run.record_client(2, "0", state(1.0), 22, 1.0)
    for changes, told in [
        ({"evaluation": Evaluation(0.5, 85.0, torch.tensor([1]))}, "round 2.accuracy must be a share from 0 to 1"),
        ({"clients": [part, part]}, "client '0' is there twice"),
        ({"failures": {"stranger": "gone"}}, "client 'stranger' is none of the run's"),
        ({"metrics": {"x": "high"}}, "round 2.metrics must hold"),
        ({"number": 4}, "the next is round 2, got 4"),
        ({"number": 1}, "the next is round 2, got 1"),
    ]:
        given = {"number": 2, "clients": [part], "released": state(1.0), "evaluation": None, "failures": {}} | changes
        with pytest.raises(TraceFLError, match=told):
            run.record_round(**given)
    with pytest.raises(TraceFLError, match="metrics must hold"):
        run.record_metrics(1, "server", {"x": None})
    with pytest.raises(TraceFLError, match="client '0' is there twice"):
        run.add_client(ClientInfo("0"))
    assert (tmp_path / "run.json").read_bytes() == before
    assert len(run.rounds) == 1
