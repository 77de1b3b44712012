"""What is kept of clients' states: it comes back as it should, and what is gone is said so in a sentence."""

import math

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from tests.federation.instant import NODES, START, state_of
from tests.federation.test_recorder import ArrayRecord, ConfigRecord, InstantGrid, new_run, run_rounds
from tests.rewriting import rewrite
from tracefl import audit_run, whatif
from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError
from tracefl.federation.recorder import Recorder
from tracefl.record import ClientInfo
from tracefl.report.lines import storage_lines
from tracefl.runs import Run
from tracefl.storage import PackedFile, Storing, disk_line
from tracefl.training import Evaluation

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38, 1.0, -1.0]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def model(seed: int, like: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of many types, or, with another model, what a step of training makes of it."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if like is not None:
        moved = {name: (value + 1e-3 * drawn(*value.shape)).to(value.dtype) for name, value in like.items()}
        return moved | {"special": like["special"].flip(0), "flags": ~like["flags"]}
    return {
        "w": drawn(40, 30), "special": torch.tensor(SPECIAL), "scalar": drawn(), "empty": drawn(0, 3),
        "double": drawn(50).double(), "half": drawn(50).half(), "brain": drawn(50).bfloat16(),
        "complex": torch.complex(drawn(20), drawn(20)), "batches": torch.arange(30), "flags": drawn(9) > 0,
    }  # fmt: skip


def recorded(folder, storing: Storing, rounds: int = 1) -> tuple[Run, list[dict[str, torch.Tensor]]]:
    """A run of one client, and what it sent."""
    released, sent = model(0), []
    run = Run.create(folder, initial=released, clients=[ClientInfo("a")], storing=storing, seed=0)
    for number in range(1, rounds + 1):
        sent.append(model(number, released))
        part = run.record_client(number, "a", sent[-1], 3, 1.0)
        released = model(100 + number, released)
        run.record_round(number, [part], released, None, {})
    return Run.open(folder), sent


@pytest.mark.parametrize("keep", ["all", "deltas", "last:2"])
def test_every_bit_of_every_type_comes_back(tmp_path, keep):
    run, sent = recorded(tmp_path, Storing(keep), 2)
    for number in (1, 2):
        found = run.client_states(number)["a"]
        assert list(found) == list(sent[number - 1])
        for name, value in sent[number - 1].items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert bits(found[name]) == bits(value), name


@pytest.mark.parametrize("keep", ["all", "deltas"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_rounded_state_is_the_rounded_one_in_its_own_type(tmp_path, keep, dtype):
    run, (sent,) = recorded(tmp_path, Storing(keep, dtype))
    found, narrow = run.round(1).client_state("a"), getattr(torch, dtype)
    for name, value in sent.items():
        wide = value.dtype in (torch.float32, torch.float64) and name != "special"  # 3.4e38 is too large
        expected = value.to(narrow).to(value.dtype) if wide else value
        assert found[name].dtype == value.dtype
        assert bits(found[name]) == bits(expected), name
    for name, value in run.global_state(1).items():
        assert bits(value) == bits(model(101, model(0))[name])


def test_deltas_are_smaller_and_need_the_model_they_are_to(tmp_path):
    whole, _ = recorded(tmp_path / "all", Storing())
    run, _ = recorded(tmp_path / "deltas", Storing("deltas"))
    assert run.disk()[1] < whole.disk()[1]
    (tmp_path / "deltas/rounds/0000/global.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(TraceFLError, match=r"0000/global.safetensors is not the file that was recorded"):
        Run.open(tmp_path / "deltas").client_states(1)


def test_a_client_that_sends_other_entries_or_types_is_stored_as_it_sends(tmp_path):
    run = Run.create(tmp_path, initial=START, clients=[ClientInfo("a")], storing=Storing("deltas"))
    sent = {"w": torch.ones(3, dtype=torch.float16), "a": torch.ones(4), "other": torch.ones(100)}
    part = run.record_client(1, "a", sent, 1, 1.0)
    assert all(bits(run.received(1, part)[name]) == bits(value) for name, value in sent.items())


def test_of_the_last_rounds_the_states_are_kept_and_of_all_the_rest(tmp_path):
    run = run_rounds(new_run(tmp_path / "all"), 4)
    few = Run.create(tmp_path / "few", initial=START, clients=run.clients, storing=Storing("last:2"), seed=5)
    run_rounds(few, 2)
    few = run_rounds(Run.open(tmp_path / "few"), 4)
    assert [record.number for record in few.kept_rounds] == [3, 4]
    few = Run.open(tmp_path / "few")
    for record, other in zip(few.rounds, run.rounds, strict=True):
        assert (record.clients, record.global_sha256) == (other.clients, other.global_sha256)
        assert few.predictions(record.number).tolist() == [1, 0]
        assert (record.folder / "clients").exists() == record.kept == (record.number > 2)
    assert few.disk() == {0: run.disk()[0]} | {n: few.disk()[n] for n in (1, 2)} | {n: run.disk()[n] for n in (3, 4)}
    gone = r"the clients' states of round 1 are gone, as storage.keep=last:2 asks: choose a later round"
    for ask in (lambda: few.client_states(1), lambda: few.round(1).client_state(few.round(1).clients[0].id)):
        with pytest.raises(TraceFLError, match=gone):
            ask()
    assert list(storage_lines(few)) == [
        "storage.keep=last:2: the clients' states of rounds 1 to 2 are gone; rounds 3 to 4 can be traced and audited"
    ]


def linear_run(folder, storing: Storing, rounds: int = 3) -> Run:
    """Four clients of a linear model."""
    generator = torch.Generator().manual_seed(0)
    released = {"weight": torch.randn(3, 5, generator=generator)}
    ids = [ClientInfo(str(k), {k % 3: 4}) for k in range(4)]
    run = Run.create(folder, initial=released, clients=ids, storing=storing, seed=0)
    for number in range(1, rounds + 1):
        sent = [released["weight"] + 0.1 * torch.randn(3, 5, generator=generator) for _ in ids]
        parts = [run.record_client(number, str(k), {"weight": w}, 4, 0.25) for k, w in enumerate(sent)]
        released = {"weight": torch.stack(sent).mean(0)}
        run.record_round(number, parts, released, Evaluation(1.0, 0.5, torch.tensor([0, 1])), {})
    return Run.open(folder)


def test_what_is_there_is_traced_audited_and_fused_again_and_what_is_gone_is_not(tmp_path):
    examples = Examples(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3)
    network = nn.Linear(5, 3, bias=False)
    runs = {keep: linear_run(tmp_path / keep, Storing(keep)) for keep in ("all", "last:2", "deltas")}
    asked = {"inputs": examples.inputs, "model": network, "targets": examples.labels}
    whole = runs["all"].trace(**asked)
    expected = whatif(runs["all"], ["1"], since=2, examples=examples, model=network).after
    for run in runs.values():
        assert torch.equal(run.trace(**asked).contributions, whole.contributions)
        after = whatif(run, ["1"], since=2, examples=examples, model=network).after
        assert (after.loss, after.accuracy) == (expected.loss, expected.accuracy)
    tables = {keep: audit_run(run, model=network, examples=examples) for keep, run in runs.items()}
    assert tables["last:2"].equals(tables["all"][tables["all"]["round"] > 1].reset_index(drop=True))
    assert tables["deltas"].equals(tables["all"])
    few, gone = runs["last:2"], r"of round 1 are gone, as storage.keep=last:2 asks"
    with pytest.raises(TraceFLError, match=gone):
        few.trace(round=1, **asked)
    with pytest.raises(TraceFLError, match=gone):
        whatif(few, ["1"], since=1, examples=examples, model=network)


def test_an_answer_of_rounded_states_says_so(tmp_path, caplog):
    run = linear_run(tmp_path, Storing(dtype="bfloat16"), 1)
    with caplog.at_level("WARNING", "tracefl"):
        run.trace(inputs=torch.ones(1, 5), model=nn.Linear(5, 3, bias=False), targets=[0])
    assert "round 1: the answer is of clients' states that are rounded to bfloat16" in caplog.text
    assert list(storage_lines(run)) == [
        "storage.dtype=bfloat16: answers and audits are of clients' states that are rounded to it"
    ]


def own(folder, **settings) -> Recorder:
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=12, min_available_nodes=12)
    return Recorder(strategy, folder, NODES, **settings)


def start(recorder: Recorder, rounds: int) -> None:
    recorder.start(InstantGrid(), ArrayRecord(START), rounds, train_config=ConfigRecord())


@pytest.mark.parametrize("settings", [{"keep": "deltas"}, {"keep": "last:1"}, {"dtype": "float16"}])
def test_training_is_the_same_and_a_run_goes_on_as_it_was_recorded(tmp_path, settings):
    start(own(tmp_path / "all"), 3)
    start(own(tmp_path / "other", **settings), 1)
    ((key, was),) = settings.items()
    other = {"keep": "all", "dtype": "bfloat16"}[key]
    told = rf"was recorded with storage.{key}={was}, got {other}: give storage.{key}={was} to go on"
    with pytest.raises(TraceFLError, match=told):
        start(own(tmp_path / "other", **{key: other}), 3)
    start(own(tmp_path / "other"), 2)
    start(own(tmp_path / "other", **settings), 3)
    whole, run = Run.open(tmp_path / "all"), Run.open(tmp_path / "other")
    assert [record.global_sha256 for record in run.rounds] == [record.global_sha256 for record in whole.rounds]
    sent = run.round(3).client_state("7")
    assert all(torch.allclose(sent[name], value, rtol=1e-2) for name, value in state_of(7, 3).items())
    start(own(tmp_path / "other", **{key: other}), 3)  # all is recorded: nothing is stored


@pytest.mark.parametrize("settings", [{"keep": "last:0"}, {"keep": "some"}, {"keep": 3}, {"dtype": "int8"}])
def test_other_settings_are_refused_by_name(tmp_path, settings):
    (name,) = settings
    with pytest.raises(TraceFLError, match=rf"storage.{name} must be "):
        own(tmp_path, **settings)


def test_a_run_that_the_caller_opened_is_gone_on_with_as_it_was_recorded_too(tmp_path):
    with pytest.raises(TraceFLError, match=r"was recorded with storage\.keep=all, got deltas"):
        start(own(new_run(tmp_path), keep="deltas"), 1)


def test_a_run_that_failed_in_its_first_round_keeps_its_storage(tmp_path):
    with pytest.raises(TraceFLError, match=r"round 1, client 3: .*out of data"):
        own(tmp_path, keep="deltas").start(InstantGrid({3: "raise"}), ArrayRecord(START), 1)
    start(own(tmp_path), 1)
    assert Run.open(tmp_path).storing == Storing("deltas")


@pytest.mark.parametrize(
    ("storage", "told"), [({"kept": 1}, "must hold keep and dtype"), ({"keep": "x"}, "must be all")]
)
def test_a_header_that_says_something_else_is_refused(tmp_path, storage, told):
    run, _ = recorded(tmp_path, Storing("deltas"))
    rewrite(run.path / "run.json", lambda header: header | {"storage": storage})
    with pytest.raises(TraceFLError, match=told):
        Run.open(tmp_path)


def test_default_storage_leaves_no_trace_in_a_run(tmp_path):
    recorded(tmp_path, Storing())
    text = (tmp_path / "run.json").read_text()
    assert "storage" not in text
    assert "kept" not in text
    assert '"schema": 4' in text
    assert not isinstance(Run.open(tmp_path).round(1).client_state("a"), PackedFile)


def test_the_line_on_disk_use(tmp_path):
    run, _ = recorded(tmp_path, Storing(), 2)
    files = {n: sum(f.stat().st_size for f in (tmp_path / f"rounds/{n:04d}").rglob("*.safetensors")) for n in range(3)}
    assert run.disk() == files
    assert disk_line({0: 999, 1: 1000, 2: 1_000_000}) == (
        "Disk: 1.0 MB; round 0: 999 bytes; round 1: 1.0 kB; round 2: 1.0 MB"
    )
    assert disk_line({0: 2_500_000_000_000}) == "Disk: 2500.0 GB; round 0: 2500.0 GB"
