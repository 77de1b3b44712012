"""The command line as a user meets it; whole processes only for what a process is: its status and its streams."""

import errno
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tracefl.checks import check_examples, load
from tracefl.config import Config
from tracefl.errors import TraceFLError
from tracefl.main import main
from tracefl.stopping import WORD

from .conftest import composed

SWEEP = "--multirun device=cpu client_resources.gpus=1 exp_key=artifact_exp model.name=resnet18 dataset.name=mnist"
ALL_TO_ZERO = "label2flip={1:0,2:0,3:0,4:0,5:0,6:0,7:0,8:0,9:0,10:0,11:0,12:0,13:0}"
COMMANDS = [  # METHOD's command lines, verbatim
    "dirichlet_alpha=0.1",
    f"{SWEEP} num_clients=10 num_rounds=2 clients_per_round=4 dirichlet_alpha=0.3",
    "--multirun device=cpu num_clients=10 num_rounds=3 clients_per_round=10 dirichlet_alpha=0.7 "
    f'faulty_clients_ids=["0"] {ALL_TO_ZERO}',
    "dirichlet_alpha=0.3 noise_multiplier=0.001 clipping_norm=15",
    "--multirun dirichlet_alpha=0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    "data_dist.dist_type=PathologicalPartitioner-3 label2flip={8:7,0:7,1:7} noise_rate={8:7,0:7,1:7} "
    'faulty_clients_ids=["8"]',
    "data_dist.dist_type=sharded-non-iid-2 dirichlet_alpha=-1 data_dist.max_per_client_data_size=-1",
    "dataset.name=dbpedia_14 model.name=distilbert/distilbert-base-uncased device=cuda",
]


def in_bash(line: str) -> list[str]:
    """The words that bash makes of a command line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def in_quotes(line: str) -> list[str]:
    """The words of a command line each of which the user has quoted."""
    return line.split()


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """`run("num_rounds=3", ...)` in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tracefl"])
    root = logging.getLogger()  # --info configures it
    monkeypatch.setattr(root, "handlers", [*root.handlers])
    monkeypatch.setattr(root, "level", root.level)

    def command(*typed: str) -> tuple[int, str, str]:
        status = 0
        try:
            main(typed)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else print(end.code, file=sys.stderr) or 1
        return (status, *capfd.readouterr())

    return command


@pytest.mark.parametrize("shell", [in_bash, in_quotes])
@pytest.mark.parametrize("line", COMMANDS)
def test_a_documented_command_line_resolves(run, tmp_path, line, shell):
    status, out, err = run(*shell(line), "dry_run=true")
    assert (status, err) == (0, "")
    assert out.count("dry run, nothing is trained; the run would be logs/") == (10 if "0.1,0.2" in line else 1)
    assert {path.name for path in tmp_path.rglob("*")} <= {"logs", "multirun.yaml"}
    if ALL_TO_ZERO in line:
        assert "\nfaulty_clients_ids:\n- 0\n" in out
        assert "\nlabel2flip:\n" + "".join(f"  {label}: 0\n" for label in range(1, 14)) + "noise_rate: 1.0\n" in out
    if "noise_rate" in line:
        assert "\nlabel2flip:\n  8: 7\n  0: 7\n  1: 7\nnoise_rate: 1.0\n" in out


def test_a_dry_run_shows_what_was_found(run, tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "train.csv").write_text("")
    _, out, _ = run("dry_run=true", "dataset.path=pets", "data_dist.num_clients=12")
    assert "  lr: 0.001\n" in out
    assert "  name: pets\n" in out
    assert "\nnum_clients: 12\n" in out


def test_a_sweep_with_an_alias_and_flags_anywhere(run):
    status, out, _ = run("strategy.num_rounds=2,3", "--multirun", "dry_run=true")
    assert status == 0
    assert [f"\nnum_rounds: {count}\n" in out for count in (1, 2, 3, 5)] == [False, True, True, False]


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--help"], ["--info", "config"]])
def test_flags_that_show_something_stand_anywhere(run, flag):
    status, out, _ = run("num_rounds=3", *flag, "seed=7")
    assert status == 0
    assert "num_rounds: 3\n" in out
    assert "seed: 7\n" in out
    assert "dry run" not in out


def test_a_key_without_effect_is_noted_in_one_line(run):
    status, out, err = run("data_dist.dname=x", "dry_run=true")
    assert (status, err) == (0, "note: data_dist.dname has no effect: nothing reads it\n")
    assert "dname" not in out


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("num_clients=0", "num_clients must be at least 1, got 0."),
        ("numclients=3", "numclients is no setting of TraceFL: did you mean num_clients?"),
        ("strategy.num_round=3", "did you mean strategy.num_rounds?"),
        ("num_clients=many", "num_clients must be a whole number, got many."),
        ("num_clients=2.5", "num_clients must be a whole number, got 2.5."),
        ("num_clients=null", "num_clients must be a whole number, got null."),
        ("client.lr=fast", "client.lr must be a number, got fast."),
        ("plotting=perhaps", "plotting must be true or false, got perhaps."),
        ("exp_key=[1]", "exp_key must be text, got [1]: quote it, as \"exp_key='[1]'\"."),
        ("faulty_clients_ids=3", "faulty_clients_ids must be a list, got 3."),
        ("faulty_clients_ids=[a]", "faulty_clients_ids must be a list, got ['a']."),
        ("strategy=fedprox", "strategy=fedprox sets a group of settings: set one, such as strategy.name."),
        ("label2flip={8", "label2flip={8 cannot be read: "),
        ("label2flip={8:7, 0:7}", "label2flip={8:7, cannot be read: "),
        ("label2flip=8:7 label2flip=8:6", "label2flip must give one value for 8, got 8:7, 8:6: quote it"),
        ("num_rounds=2 strategy.num_rounds=3", "num_rounds=2 and strategy.num_rounds=3 set the same, differently"),
        ("num_rounds", "num_rounds cannot be read: "),
        ("+scale=tiny", "Could not find 'scale/tiny'"),
        ("scale=small", "use +scale=small"),
        ("dataset.name=owner/never-there", "dataset.path=FOLDER."),
        ("dataset.path=.", "dataset.path must hold data in the hub's layout"),
        ("device=cuda", "got cuda: set device=cpu."),
        ("do_training=false", "do_training=false needs a recorded run, but logs/"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, monkeypatch, typed, words):
    monkeypatch.setattr("tracefl.hub.reachable", lambda url: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # set by tracefl.hub, restored afterwards
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(*typed.split(" "))
    assert status == 1
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert out == ""
    if typed != "do_training=false":  # which prepares the data
        assert not list(tmp_path.rglob("*.*")), "something was left behind"


def test_a_fault_that_does_not_fit_the_data_is_refused_before_training(run):
    status, _, err = run("faulty_clients_ids=[0]", "label2flip={1:10}")
    assert status == 1
    assert "label2flip must lead to a label of digits, 0 to 9, got 10" in err


def test_a_path_with_anything_in_its_name(run, tmp_path):
    folder = tmp_path / "x=y" / "[1] ü, (b) {c} $d # it's::a*?"
    folder.mkdir(parents=True)
    status, _, err = run(f"dataset.path={folder}", "dry_run=true")
    assert status == 1
    assert err.startswith("error: dataset.path must hold data in the hub's layout")
    assert f", got {folder}: " in err
    (folder / "train.csv").write_text("text,label\n" + "a,0\nb,1\n" * 20)
    (folder / "test.csv").write_text("text,label\na,0\nb,1\n")
    text = ("model.name=gpt2", "dataset.input_columns=[text]")
    alone = (*text, "do_training=false", "do_provenance=false", "num_clients=1", "clients_per_round=1")
    status, out, err = run(f"dataset.path={folder}", *alone)
    assert (status, "is prepared" in out, "error" in err) == (0, True, False)
    assert run("--multirun", f"storage.dir={tmp_path}/ä,{tmp_path}/b=c", "dry_run=true")[1].count("dry run") == 2


def test_a_failed_job_of_a_sweep_lets_the_others_run(run):
    status, out, err = run("--multirun", "num_clients=3,20", "dry_run=true")
    assert status == 1
    assert "error: clients_per_round must be at most num_clients=3, got 10" in err
    assert "\nnum_clients: 20\n" in out


def test_data_can_be_prepared_alone(run, tmp_path):
    status, out, _ = run("do_training=false", "do_provenance=false")
    assert status == 0
    assert "of classes of which their client has fewer than data_dist.min_examples_per_class=10" in out
    assert run("do_training=false", "do_provenance=false")[1] == out  # from the cache
    assert "is prepared; do_training=false and do_provenance=false leave it at that" in out
    assert len(list(tmp_path.glob("logs/data/digits-*/clients/*.safetensors"))) == 10


def test_the_experiment_gets_what_was_checked(run, monkeypatch):
    given: list[Config] = []
    monkeypatch.setattr("tracefl.pipeline.run_experiment", lambda config, resolved: given.append(config))
    assert run("num_rounds=4", "client_resources.gpus=0.5")[0] == 0
    assert (given[0].num_rounds, given[0].client_gpu, given[0].client.lr) == (4, 0.5, 0.0003)


def test_an_interrupt_says_how_to_go_on(run, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tracefl.pipeline.prepare", interrupted)
    status, _, err = run("num_rounds=2")
    assert status == 130
    assert err == "interrupted: complete rounds are kept, the same command goes on from there\n"


def process(*typed: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracefl.main", *typed]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def test_a_process_that_runs_dry_ends_with_0(tmp_path):
    done = process("--multirun", "dirichlet_alpha=0.1,1", "dry_run=true", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout.count("dry run")) == (0, "", 2)


def test_a_process_that_is_given_a_wrong_value_ends_with_1(tmp_path):
    done = process("num_clients=0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: num_clients must be at least 1, got 0.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_a_process_that_is_interrupted_ends_with_130(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(  # interrupts itself where it would start to prepare data
        "import sys, signal, os\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tracefl.data.prepare':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())])
    done = subprocess.run(
        [sys.executable, "-m", "tracefl.main"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=240,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr == f"{WORD}\n"


def test_a_wrong_value_is_answered_without_torch():
    code = (
        "import sys\nfrom tracefl.main import main\n"
        "try: main(['num_clients=0'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'flwr', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "[]\n"


TINY = [
    "client.epochs=1", "data_dist.max_per_client_data_size=30", "data_dist.max_server_data_size=80", "num_clients=4",
    "clients_per_round=3", "num_rounds=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS[:4])
def test_the_main_ones_run_on_small_data(line, tmp_path, request):
    data = []
    if "dataset.name=mnist" in line:
        data = [f"dataset.path={request.getfixturevalue('real_data') / 'mnist'}"]
    kept = [w for w in line.split() if w.split("=")[0] not in {"num_clients", "clients_per_round", "num_rounds"}]
    done = process(*kept, *TINY, *data, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "INFO - Total Rounds: 2" in done.stdout
    assert "INFO - TraceFL Average Localization Accuracy: " in done.stdout


OS_ERRORS = {  # what the operating system says, what is named, and what to do about it
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), "storage.dir=logs", "make room there"),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "storage.dir=logs", "make room there"),
    "a read-only disk": (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y", "that can be written to"),
    "no permission": (OSError(errno.EACCES, "Permission denied", b"/x/y"), "/x/y", "give this user the right"),
    "a folder for a file": (
        OSError(errno.EISDIR, "Is a directory", Path("/x/y")),
        "/x/y",
        "remove what lies",
    ),
    "a file for a folder": (OSError(errno.ENOTDIR, "Not a directory", "/x/y"), "/x/y", "remove what lies"),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "/x/y"), "/x/y", "shorten the name"),
    "open files": (OSError(errno.EMFILE, "Too many open files", "/x/y"), "/x/y", "ulimit -n"),
    "a dying disk": (OSError(errno.EIO, "Input/output error", "/x/y"), "/x/y", "see that the disk is well"),
    "one without a number": (OSError("something odd"), "storage.dir=logs", "see that it is there"),
}


@pytest.mark.parametrize("kind", OS_ERRORS)
def test_what_the_operating_system_refuses_is_one_sentence(run, monkeypatch, kind):
    error, named, remedy = OS_ERRORS[kind]

    def refused(*_: object) -> None:
        raise error

    monkeypatch.setattr("tracefl.pipeline.run_experiment", refused)
    status, _, err = run("num_rounds=2")
    assert status == 1
    assert err.startswith(f"error: {named} cannot be used (")
    assert remedy in err
    assert err.count("\n") == 1


def test_a_bug_stays_a_traceback(run, monkeypatch):
    def wrong(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tracefl.pipeline.run_experiment", wrong)
    with pytest.raises(ZeroDivisionError):
        run("num_rounds=2")


def test_a_client_with_one_example_is_refused_before_training(run):
    limits = ("data_dist.min_examples_per_class=1", "data_dist.max_per_client_data_size=2")
    label_counts = {"0": {1: 2}, "1": {3: 1}}
    config = load(composed((*limits, "num_clients=2", "clients_per_round=2")))
    with pytest.raises(TraceFLError, match=r"client 1 holds 1 example, on which BatchNorm in resnet18 cannot train"):
        check_examples(config, label_counts)
    config.exclude_clients = [1]
    check_examples(config, label_counts)


def test_more_clients_than_examples_are_refused_before_training(run):
    status, _, err = run("num_clients=3000", "client_cpus=1")
    assert status == 1
    assert "over num_clients=3000 clients needs 3000 training examples at least, got 1437: lower num_clients" in err


def test_torch_loads_no_code(tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(os.mkdir))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "weights.pt", weights_only=False)
