"""An own app on a SuperLink with SuperNodes: its ServerApp and a node are killed, and the run goes on to its end."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tracefl import Run

BIN = Path(sys.executable).parent
APP = """
import time
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from tracefl.flower import identify

client = ClientApp()
server = ServerApp()
client.query("identify")(identify)

@client.train()
def train(message, context):
    site, state = str(context.node_config["site"]), message.content["arrays"].to_torch_state_dict()
    time.sleep(30 if site == "slow" else 2)
    content = {"arrays": ArrayRecord({n: v + len(site) for n, v in state.items()})}
    return Message(RecordDict({**content, "metrics": MetricRecord({"num-examples": 5})}), reply_to=message)

@server.main()
def main(grid, context):
    from flwr.serverapp.strategy import FedAvg
    from tracefl.flower import Recorder
    arrays = ArrayRecord({"w": torch.zeros(3), "b": torch.ones(2)})
    recorder = Recorder(FedAvg(fraction_evaluate=0.0), FOLDER, grid, node_key="site", accept_failures=True)
    recorder.start(grid, arrays, num_rounds=3, timeout=120)
"""
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "ownapp"
version = "0.1.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "ownapp.app:server"
clientapp = "ownapp.app:client"
[tool.flwr.app.config]
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Deployment:
    """A SuperLink and its nodes on loopback, each a process that ends with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(f'[superlink.lab]\naddress = "{self.address}"\ninsecure = true\n')
        package = folder / "app" / "ownapp"
        package.mkdir(parents=True)
        (folder / "app" / "pyproject.toml").write_text(PYPROJECT)
        (package / "__init__.py").touch()
        (package / "app.py").write_text(f"FOLDER = {str(folder / 'run')!r}\n{APP}")
        self.processes: list[subprocess.Popen] = []
        host, port = self.address.split(":")
        where = ["--host", host, "--port", port, "--disable-runtime-dependency-installation"]
        self.link = self.start("flower-superlink", "--insecure", *where)
        until(lambda: reachable(self.address), 120)

    def start(self, *command: str) -> subprocess.Popen:
        log = (self.folder / f"{len(self.processes)}.log").open("w")
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def node(self, site: str) -> subprocess.Popen:
        own = ["--port", str(free_port()), "--node-config", f"site='{site}'"]
        return self.start("flower-supernode", "--insecure", "--superlink", self.address, *own)

    def run(self) -> None:
        subprocess.run(
            ["flwr", "run", str(self.folder / "app"), "lab"], env=self.environment, check=True, timeout=120,
            capture_output=True,
        )  # fmt: skip

    def server_app(self) -> psutil.Process:
        """The process of the ServerApp that runs."""
        children = psutil.Process(self.link.pid).children(recursive=True)
        return next(child for child in reversed(children) if "flwr-serverapp" in " ".join(child.cmdline()))

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                    each.kill()
            process.wait()


def reachable(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0


def until(holds, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(1)


@pytest.mark.slow
def test_a_killed_server_and_a_killed_node_cost_no_recorded_round(tmp_path):
    deployed, folder = Deployment(tmp_path), tmp_path / "run"
    recorded = lambda: len(Run.open(folder).rounds) if (folder / "run.json").exists() else 0  # noqa: E731
    try:
        nodes = {site: deployed.node(site) for site in ("a", "hospital/berlin", "slow")}
        deployed.run()
        until(lambda: recorded() == 1, 400)
        deployed.server_app().send_signal(signal.SIGKILL)
        deployed.run()
        until(lambda: any((folder / "rounds" / "0002" / "clients").glob("a.*")), 400)
        nodes["slow"].kill()  # while it trains
        until(lambda: recorded() == 3, 600)
    finally:
        deployed.close()
    run = Run.open(folder)
    assert {client.id for client in run.clients} == {"a", "hospital/berlin", "slow"}
    assert {client.id for client in run.round(3).clients} == {"a", "hospital/berlin"}
    second = run.round(2)
    assert "slow" in second.failures or "slow" in {client.id for client in second.clients}
    for number in (1, 2, 3):
        record, before = run.round(number), run.global_state(number - 1)
        assert sum(client.weight for client in record.clients) == pytest.approx(1)
        for client in record.clients:
            assert (run.client_states(number)[client.id]["w"] == before["w"] + len(client.id)).all()
