"""The run store: what is written is what is read, damage is noticed, an interrupted round does not count."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from tracefl import Run, states
from tracefl.errors import TraceFLError
from tracefl.files import locked, write_state
from tracefl.record import ClientInfo
from tracefl.sealed import KEY
from tracefl.states import StateFile
from tracefl.training import Evaluation


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3, 2), value), "b": torch.full((2,), -value)}


def one_round(folder) -> Run:
    clients = [ClientInfo("0", {3: 12, 5: 10}), ClientInfo("7", {5: 20}), ClientInfo("4")]
    run = Run.create(folder, initial=state(0.0), clients=clients, seed=3, data_sha256="ab" * 32)
    participants = [
        run.record_client(1, "0", state(1.0), 22, 22 / 42),
        run.record_client(1, "7", state(2.0), 20, 20 / 42),
    ]
    evaluation = Evaluation(0.7, 2 / 3, torch.tensor([3, 5, 5]))
    run.record_round(1, participants, state(1.5), evaluation, {"4": "it raised: ValueError"})
    return run


def test_a_run_reads_as_it_was_written(tmp_path):
    written = one_round(tmp_path)
    run = Run.open(tmp_path)
    assert run.rounds == written.rounds
    assert run.clients == written.clients
    assert run["seed"] == 3
    assert [client.weight for client in run.round(1).clients] == [22 / 42, 20 / 42]
    assert run.rounds[0].failures == {"4": "it raised: ValueError"}
    for number, value in ((0, 0.0), (1, 1.5)):
        assert torch.equal(run.global_state(number)["w"], state(value)["w"])
    client = run.round(1).client_state("7")
    assert set(client) == {"w", "b"}
    assert torch.equal(client["b"], state(2.0)["b"])
    assert run.predictions(1).tolist() == [3, 5, 5]
    assert (run.rounds[0].loss, run.rounds[0].accuracy) == (0.7, 2 / 3)
    assert [client.file for client in run.rounds[0].clients] == ["clients/0.safetensors", "clients/7.safetensors"]
    assert list(run.client_states(1)) == ["0", "7"]


def test_a_state_looks_like_a_dictionary(tmp_path):
    client = one_round(tmp_path).round(1).client_state("0")
    assert len(client) == 2
    assert "w" in client
    assert "v" not in client
    with pytest.raises(KeyError, match="v"):
        client["v"]


def test_a_changed_file_is_noticed_when_it_is_read(tmp_path):
    one_round(tmp_path)
    write_state(tmp_path / "rounds/0001/clients/7.safetensors", state(9.0))
    run = Run.open(tmp_path)
    assert torch.equal(run.round(1).client_state("0")["w"], state(1.0)["w"])
    with pytest.raises(TraceFLError, match=r"7\.safetensors is not the file that was recorded"):
        run.round(1).client_state("7")["w"]
    with pytest.raises(TraceFLError, match=r"7\.safetensors is not the file that was recorded"):
        run.client_states(1)


def test_a_missing_file_is_named(tmp_path):
    one_round(tmp_path)
    (tmp_path / "rounds/0001/global.safetensors").unlink()
    with pytest.raises(TraceFLError, match=r"global\.safetensors cannot be read \(No such file"):
        Run.open(tmp_path).global_state(1)["w"]


def test_an_unfinished_round_is_no_part_of_the_run(tmp_path):
    run = one_round(tmp_path)
    run.record_client(2, "0", state(5.0), 22)
    assert len(Run.open(tmp_path).rounds) == 1
    with pytest.raises(TraceFLError, match="round 2 is not recorded"):
        Run.open(tmp_path).round(2)


def test_a_client_that_took_no_part_is_named(tmp_path):
    with pytest.raises(TraceFLError, match="client '5' took no part in round 1: its participants were 0, 7"):
        one_round(tmp_path).round(1).client_state("5")


def test_what_is_no_run_is_said_so(tmp_path):
    with pytest.raises(TraceFLError, match=r"no run\.json"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TraceFLError, match="no JSON"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(TraceFLError, match="must be 1, 2, 3 or 4, got 99"):
        Run.open(tmp_path)


def test_a_recording_is_never_written_over(tmp_path):
    one_round(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(TraceFLError, match=r"holds a recorded run, which is not written over: .*open_or_create"):
        Run.create(tmp_path, initial=state(0.0), clients=[], seed=1)
    assert (tmp_path / "run.json").read_bytes() == before
    (tmp_path / "run.json").unlink()
    with pytest.raises(TraceFLError, match=r"holds rounds but no run\.json: restore it"):
        Run.create(tmp_path, initial=state(0.0), clients=[], seed=1)


def test_opening_or_creating_goes_on_with_the_same_and_refuses_another(tmp_path):
    clients = [ClientInfo("0", {3: 12, 5: 10}), ClientInfo("7", {5: 20}), ClientInfo("4")]
    same = {"initial": state(0.0), "clients": clients, "seed": 3, "data_sha256": "ab" * 32}
    one_round(tmp_path / "a")
    assert len(Run.open_or_create(tmp_path / "a", **same).rounds) == 1
    assert len(Run.open_or_create(tmp_path / "b", **same).rounds) == 0
    for change, words in [
        ({"seed": 4}, "recorded with seed=3, got 4"),
        ({"initial": state(0.0) | {"w": torch.zeros(3, 2, dtype=torch.float64)}}, "another model .* 'w' differs"),
        ({"clients": [clients[0], clients[2]]}, "client '7' of the run is not given"),
        (
            {"clients": [ClientInfo("0", {3: 12}), *clients[1:]]},
            r"client '0' was recorded with label counts \{3: 12, 5: 10",
        ),
    ]:
        with pytest.raises(TraceFLError, match=words):
            Run.open_or_create(tmp_path / "a", **same | change)


def test_a_writer_that_has_missed_a_round_is_refused(tmp_path):
    one_round(tmp_path)
    first, second = Run.open(tmp_path), Run.open(tmp_path)
    evaluation = Evaluation(0.7, 2 / 3, torch.tensor([3, 5, 5]))
    first.record_round(2, [], state(2.0), evaluation, {})
    with pytest.raises(TraceFLError, match="was changed by another writer since it was opened"):
        second.record_round(2, [], state(3.0), evaluation, {})
    assert len(Run.open(tmp_path).rounds) == 2
    assert torch.equal(Run.open(tmp_path).global_state(2)["w"], state(2.0)["w"])


def test_states_keep_the_order_of_the_model(tmp_path):
    run = one_round(tmp_path)
    assert list(run.global_state(1)) == list(run.round(1).client_state("0")) == ["w", "b"]
    assert list(Run.open(tmp_path).round(1).client_state("7")) == ["w", "b"]


def test_a_run_of_the_first_schema_still_opens_and_goes_on(tmp_path):
    one_round(tmp_path)
    header = json.loads((tmp_path / "run.json").read_text())
    del header["entries"], header["initial_metrics"], header[KEY]
    for record in header["rounds"]:
        del record["metrics"], record["weights_from"]
    (tmp_path / "run.json").write_text(json.dumps(header | {"schema": 1}))
    run = Run.open(tmp_path)
    assert (run.round(1).loss, run.round(1).weights_from) == (0.7, "strategy")
    run.record_round(2, [], state(2.0), None, {})
    assert sorted(Run.open(tmp_path).global_state(2)) == ["b", "w"]


def test_numbers_that_json_does_not_know_come_back(tmp_path):
    run = one_round(tmp_path)
    run.record_round(2, [], state(2.0), Evaluation(float("inf"), float("nan"), torch.tensor([1])), {})
    last = Run.open(tmp_path).round(2)
    assert last.loss == float("inf")
    assert last.accuracy != last.accuracy
    with pytest.raises(TraceFLError, match="entry 'x' must be plain JSON"):
        Run.create(tmp_path / "b", initial=state(0.0), clients=[], x=torch.zeros(1))


def test_a_second_writer_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(TraceFLError, match="written by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_another_process_that_writes_keeps_every_writer_out(tmp_path):
    run = one_round(tmp_path)
    words = "import sys, filelock; held = filelock.FileLock(sys.argv[1]); held.acquire(); "
    words += "print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", words, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    for write in (
        lambda: run.record_client(2, "0", state(9.0), 22),
        lambda: run.record_round(2, [], state(9.0), None, {}),
        lambda: run.record_metrics(1, "server", {"loss": 1.0}),
        lambda: Run.create(tmp_path, initial=state(9.0), clients=[], seed=0),
    ):
        with pytest.raises(TraceFLError, match="is being written by another process"):
            write()
    other.communicate("")
    assert len(Run.open(tmp_path).rounds) == 1
    assert not (tmp_path / "rounds" / "0002").exists()
    Run.open(tmp_path).record_round(2, [], state(9.0), None, {})


def test_the_same_state_gives_the_same_bytes(tmp_path):
    a = write_state(tmp_path / "a", {"x": torch.ones(2), "y": torch.zeros(3)})
    b = write_state(tmp_path / "b", {"y": torch.zeros(3), "x": torch.ones(2)})
    assert a == b
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_lazy_states_read_what_safetensors_reads(tmp_path):
    state = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in states._DTYPES.values()}
    state |= {"scalar": torch.tensor(3), "none": torch.empty(0, 4)}
    lazy = StateFile(tmp_path / "a.safetensors", write_state(tmp_path / "a.safetensors", state))
    expected = load_file(tmp_path / "a.safetensors")
    assert set(lazy) == set(expected) == set(state)
    for name, tensor in expected.items():
        assert lazy[name].dtype == tensor.dtype
        assert torch.equal(lazy[name], tensor)
        assert torch.equal(lazy[name], state[name])
    with pytest.raises(KeyError):
        lazy["other"]


def test_a_file_is_as_the_library_writes_it(tmp_path):
    """Byte for byte, so that what others read stays the same; tied weights are written twice."""
    some = {f"{n}/{dtype}": torch.arange(n).to(dtype) for dtype in states._DTYPES.values() for n in (3, 0, 1)}
    odd = {'"\\\n\u2028é': torch.tensor(1.5), "t": torch.arange(6.0).reshape(2, 3).T, "p": nn.Parameter(torch.ones(2))}
    odd["conj"] = torch.tensor([1 + 2j]).conj()
    for given in ({}, some, odd, some | odd):
        plain = {name: value.detach().resolve_conj().contiguous() for name, value in given.items()}
        for metadata in (None, {"a": "é"}):
            sha256 = write_state(tmp_path / "state.safetensors", given, metadata)
            content = (tmp_path / "state.safetensors").read_bytes()
            assert content == save(plain, metadata)
            assert hashlib.sha256(content).hexdigest() == sha256
    tied = {"a": odd["t"], "b": odd["t"]}
    write_state(tmp_path / "tied.safetensors", tied)
    assert all(torch.equal(value, odd["t"]) for value in load_file(tmp_path / "tied.safetensors").values())


def test_a_type_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(TraceFLError, match=r"entry 'z' is of type torch.complex128, which safetensors does not know"):
        write_state(tmp_path / "state.safetensors", {"z": torch.ones(2, dtype=torch.complex128)})


def test_the_header_is_what_json_makes_of_it(tmp_path):
    run = one_round(tmp_path)
    for number in (2, 3):
        part = run.record_client(number, "0", state(1.0), 22, 1.0)
        run.record_round(number, [part], state(1.5), None, {"7": "a\nline"}, metrics={"x": [1, 2]})
    run.record_metrics(2, "server", {"loss": float("inf"), 'a"\n': 2})
    for folder in (tmp_path, Run.create(tmp_path / "new", initial=state(0.0), clients=[], note={"é": []}).path):
        text = (folder / "run.json").read_text()
        assert text == json.dumps(json.loads(text), indent=1)
    assert Run.open(tmp_path).rounds == run.rounds
