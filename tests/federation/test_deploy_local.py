"""The same app by Flower's own commands: built, simulated, deployed with TLS and node keys, and on a Ray cluster."""

import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from omegaconf import OmegaConf

from tests.federation import local
from tracefl import Run
from tracefl.data.prepare import prepare
from tracefl.errors import TraceFLError
from tracefl.federation.client_app import own_examples
from tracefl.federation.cluster import spread_over
from tracefl.federation.deployed import settings
from tracefl.federation.server_app import client_task
from tracefl.federation.simulation import check_cluster
from tracefl.pipeline import run_experiment
from tracefl.settings import run_folder

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
RUNS = "server/tracefl-*/run.json"
SMALL = [
    "num_clients=3", "clients_per_round=3", "client.epochs=1", "data_dist.max_per_client_data_size=12",
    "data_dist.max_server_data_size=20", "dirichlet_alpha=100", "batch_size=6", "do_provenance=false",
]  # fmt: skip
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}", "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE",
}  # fmt: skip


def free_port() -> int:
    """Below those that the system gives to clients, so that it stays free."""
    for port in range(20000 + os.getpid() % 1000 * 10, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


def until(holds: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@contextmanager
def started(words: list, log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """A process, which is ended at the end together with all that it started."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in words],
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        with_it = [psutil.Process(process.pid)] if process.poll() is None else []
        _, left = psutil.wait_procs([*with_it, *family], timeout=20)
        for one in left:
            one.kill()
        process.wait(timeout=10)


def models(folder: Path) -> list[str]:
    """The SHA-256 of every released model of a run."""
    files = sorted(folder.glob("rounds/*/global.safetensors"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def expected(config, *typed: str) -> list[str]:
    """The models of the same settings, run in this process."""
    c = config(*SMALL, *typed)
    run_experiment(c, OmegaConf.to_yaml(OmegaConf.structured(c)), local.simulate)
    return models(run_folder(c))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "storage.dir must be an absolute path under flwr run, .*, got logs"),
        ("storage.dir=/x model.path='a b", "cannot be read .*: close its quotes"),
        ("storage.dir=/x clients=3", "clients is no setting"),
        ("storage.dir=/x num_rounds=0", "num_rounds must be at least 1, got 0"),
        ("storage.dir=/x --multirun seed=1,2", "key=value words, got --multirun"),
        ("storage.dir=/x ray.address=a:1", "ray.address=a:1 has no effect"),
        ("storage.dir=/x dry_run=true", "dry_run=true has no effect"),
    ],
)
def test_wrong_settings_of_a_flower_run_are_named(text, words):
    with pytest.raises(TraceFLError, match=words):
        settings(text)


def test_settings_of_a_flower_run_are_those_of_the_command_line(config):
    typed = ["storage.dir=/a b", "strategy.num_rounds=2", "faulty_clients_ids=[1]", "label2flip={1:2}"]
    assert settings(shlex.join(typed)) == config(*typed)


def test_the_app_builds(tmp_path):
    app = tmp_path / "app"
    subprocess.run(["cp", "-r", ROOT / "app", app], check=True)
    done = subprocess.run(
        [BIN / "flwr", "build", "--app", app], cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.fab"))


def test_nobody_answers_at_the_address_of_a_cluster():
    with pytest.raises(TraceFLError, match=r"no Ray cluster answers at ray\.address=127\.0\.0\.1:1 .*ray start --head"):
        check_cluster("127.0.0.1:1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TraceFLError, match="no Ray cluster answers"):
            check_cluster(f"127.0.0.1:{silent.getsockname()[1]}", seconds=0.5)


ALONE = """
import json, sys
from importlib.machinery import PathFinder
BLOCKED = {"filelock", "flwr_datasets", "datasets", "hydra", "omegaconf", "matplotlib", "medmnist", "pandas", "ray",
           "safetensors", "sklearn", "scipy", "transformers", "huggingface_hub"}
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, *more):
        return None if name.split(".")[0] in BLOCKED else super().find_spec(name, *more)
sys.meta_path[:] = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity._task_id = TaskIdentity._run_id = TaskIdentity._node_id = 1  # otherwise Flower builds no messages
from tracefl.federation.client_app import train_round
from tracefl.models import build_model, exchanged_state
task, file = json.loads(sys.argv[1]), sys.argv[2]
config = ConfigRecord({"server-round": 1, "task": json.dumps(task)})
content = RecordDict({"arrays": ArrayRecord(exchanged_state(build_model(task["model"]))), "config": config})
node = {"partition-id": int(sys.argv[3])} | ({"data-path": file} if file else {})
context = Context(run_id=0, node_id=1, node_config=node, state=RecordDict(), run_config={})
try:
    reply = train_round(Message(content, message_type="train", dst_node_id=1), context)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(reply.content["metrics"]["num-examples"], BLOCKED & {name.split(".")[0] for name in sys.modules})
"""


@pytest.mark.slow
def test_a_client_trains_with_torch_and_flower_and_the_library_of_its_model_on_its_own_file(config, tmp_path):
    data = prepare(c := config(*SMALL))
    (data.folder / "clients").rename(tmp_path / "nodes")
    task = json.dumps(client_task(c, data))

    def alone(file: str, partition: int) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", ALONE, task, file, str(partition)]
        return subprocess.run(words, env={**os.environ, **ENVIRONMENT}, cwd=ROOT, capture_output=True, text=True)

    done = alone(f"{tmp_path}/nodes/1.safetensors", 1)
    assert done.stdout == "12 set()\n", done.stderr


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (None, "client 1: the node's configuration has no data-path"),
        ("nodes/0.safetensors", r"client 1: data-path=.* must be its file of the prepared data, got another"),
        ("no/file", r"client 1: data-path=.* cannot be read \(.*No such file"),
        ("short", r"client 1: data-path=.* cannot be read \(it is no safetensors file"),
    ],
)
def test_a_node_with_a_wrong_file_says_so(config, tmp_path, path, words):
    data = prepare(c := config(*SMALL))
    (data.folder / "clients").rename(tmp_path / "nodes")
    (tmp_path / "short").write_bytes(b"abc")
    node = {"partition-id": 1} | ({"data-path": str(tmp_path / path)} if path else {})
    with pytest.raises(TraceFLError, match=words):
        own_examples(client_task(c, data), SimpleNamespace(node_config=node))


@pytest.mark.slow
def test_flwr_run_gives_the_same_models(config, tmp_path):
    port, home = free_port(), tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    typed = shlex.join([*SMALL, "num_rounds=2", f"storage.dir={tmp_path}/flower"])
    link = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", port]
    link += ["--disable-runtime-dependency-installation"]
    with started(link, tmp_path / "link.log", FLWR_HOME=str(home)):
        until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 60, "the SuperLink")
        size = "num-supernodes=3 client-resources-num-cpus=1"
        words = ["flwr", "run", "app", "here", "--stream", "--federation-config", size, "-c", f"settings='{typed}'"]
        with started(words, tmp_path / "run.log", FLWR_HOME=str(home)) as run:
            run.wait(timeout=150)
    (folder,) = (tmp_path / "flower").glob("tracefl-*")
    assert models(folder) == expected(config, "num_rounds=2")


@pytest.mark.skipif(not (which("openssl") and which("ssh-keygen")), reason="makes certificates and keys")
@pytest.mark.slow
def test_a_deployment_goes_on_after_its_server_was_killed_and_turns_strangers_away(config, tmp_path):
    out, port = tmp_path / "out", free_port()
    environment = {"OUT": str(out), "PORT": str(port), "NODE_PORT": str(port + 1), "FLWR_HOME": str(tmp_path)}
    log = tmp_path / "deploy.log"
    with started(["scripts/deploy_local.sh", *SMALL], log, **environment) as deployment:
        until(lambda: "ready" in log.read_text() or deployment.poll(), 60, "the deployment")
        assert deployment.poll() is None, log.read_text()
        (data,) = (out / "server" / "data").iterdir()
        assert {file.name for file in data.iterdir()} - {".lock"} == {
            "data.json",
            "server.safetensors",
        }  # the clients' went away
        with started([out / "run.sh", "num_rounds=3"], tmp_path / "first.log"):
            until(lambda: any(len(Run.open(file.parent).rounds) == 2 for file in out.glob(RUNS)), 160, "two rounds")
            family = psutil.Process(deployment.pid).children(recursive=True)
            living = [process for process in family if process.status() != psutil.STATUS_ZOMBIE]
            (server,) = [p for p in living if any("flwr-serverapp" in word for word in p.cmdline())]
            server.kill()
        stranger = ["--auth-supernode-private-key", out / "stranger", "--port", port + 9]
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", out / "stranger"], check=True)
        tls = ["--root-certificates", "ca.crt", "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt"]
        tls = [out / "tls" / word if word[0] != "-" else word for word in [*tls, "--ssl-keyfile", "server.key"]]
        words = ["flower-supernode", "--superlink", f"127.0.0.1:{port}", *tls, *stranger]
        turned = tmp_path / "stranger.log"
        with started(words, turned, FLWR_HOME=str(tmp_path / "stranger")) as node:
            assert node.wait(timeout=40) == 1, turned.read_text()
        assert "could not establish a connection" in turned.read_text()
        with started([out / "run.sh", "num_rounds=3"], tmp_path / "second.log") as second:
            second.wait(timeout=160)
    (folder,) = out.glob("server/tracefl-*")
    assert "training rounds 3 to 3" in (tmp_path / "second.log").read_text()
    run = Run.open(folder)
    assert models(folder) == expected(config, "num_rounds=3")
    assert run.trace([0, 1]).contributions.shape == (2, 3)


@pytest.mark.slow
def test_an_existing_ray_cluster_gives_the_same_models(config, tmp_path):
    port, session = free_port(), tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets must be short
    words = ["ray", "start", "--head", "--block", "--port", port, "--ray-client-server-port", port + 1, "--num-cpus", 2]
    words += ["--include-dashboard=false", "--disable-usage-stats", "--min-worker-port", 0, "--max-worker-port", 0]
    try:
        with started([*words, "--temp-dir", session], tmp_path / "ray.log") as cluster:

            def answers() -> bool:
                assert cluster.poll() is None, (tmp_path / "ray.log").read_text()
                with suppress(TraceFLError):
                    check_cluster(f"127.0.0.1:{port}", seconds=1)
                    return True
                return False

            until(answers, 60, "the cluster")
            typed = [word for word in SMALL if word != "do_provenance=false"] + ["num_rounds=2"]
            typed += [f"storage.dir={tmp_path}/ray", f"ray.address=127.0.0.1:{port}"]
            with started([sys.executable, "-m", "tracefl.main", *typed], tmp_path / "main.log") as main:
                assert main.wait(timeout=120) == 0, (tmp_path / "main.log").read_text()
            assert list(Path(session).glob("session_*/logs/worker-*")), "nothing ran on the cluster"
            with spread_over(config(f"ray.address=127.0.0.1:{port}")) as spread:
                parts = spread(lambda names: (os.getpid(), list(names)), ["0", "1", "2"])
            assert [names for _, names in parts] == [["0", "1"], ["2"]]  # two cores: two workers
            assert os.getpid() not in {process for process, _ in parts}
            again = tmp_path / "here"  # the same run, traced and audited in one process
            (folder,) = (tmp_path / "ray").glob("tracefl-*")
            shutil.copytree(tmp_path / "ray", again)
            for table in ("audit.parquet", "provenance.parquet"):
                (again / folder.name / table).unlink()
            typed[-2:] = [f"storage.dir={again}"]
            with started([sys.executable, "-m", "tracefl.main", *typed], tmp_path / "again.log") as main:
                assert main.wait(timeout=120) == 0, (tmp_path / "again.log").read_text()
    finally:
        shutil.rmtree(session, ignore_errors=True)
    assert models(folder) == expected(config, "num_rounds=2")
    for table in ("audit.parquet", "provenance.parquet"):
        found, expect = (pd.read_parquet(place / folder.name / table) for place in (tmp_path / "ray", again))
        pd.testing.assert_frame_equal(found, expect, rtol=1e-4, atol=1e-6)
