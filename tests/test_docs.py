"""README and docs/: every Python block runs, every command line composes, and what they name is there."""

import doctest
import importlib
import inspect
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import tracefl
import tracefl.flower
from tests.data.tables import write
from tests.federation import local
from tests.federation.own import INITIAL, OwnGrid, arrays
from tracefl.pipeline import run_experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = "logs/tracefl-a91c9d33"  # the default run, as the pages call it
# A block, and what it prints where that follows.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", re.M | re.S)


def text_of(page: Path) -> str:
    """A page with the files that it includes."""
    return re.sub(r'^--8<-- "(.+)"$', lambda match: (ROOT / match[1]).read_text(), page.read_text(), flags=re.M)


def with_blocks(needs_run: bool) -> list[Path]:
    pages = [(page, [code for code, _ in BLOCK.findall(text_of(page))]) for page in PAGES]
    return [page for page, blocks in pages if blocks and any(RUN in code for code in blocks) == needs_run]


class Linear(nn.Module):
    """The model of tests.federation.own: entries w, b and a."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in INITIAL.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def forward(self, x):
        return x @ self.w * self.a + self.b


def names_of_an_app() -> dict[str, object]:
    """What a page that records an own Flower app takes as the app's: two clients on a grid in this process."""
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    return {
        "client_app": ClientApp(), "strategy": strategy, "grid": OwnGrid({11: "a", 12: "b"}), "arrays": arrays(),
        "new_model": Linear, "new_inputs": torch.rand(3, 2),
    }  # fmt: skip


@pytest.fixture
def inside_flower(monkeypatch):
    """As in a run of Flower, with the client's messages answered at once."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1, raising=False)
    monkeypatch.setattr("tracefl.federation.grid.PULL_INTERVAL_S", 0)
    monkeypatch.setattr(logging.getLogger("tracefl"), "handlers", [])  # warnings are none of what a block prints


def run_blocks(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, with the names that those before left. /data/ is a folder of the test."""
    names = {"__name__": page.stem} | names_of_an_app()
    for match in BLOCK.finditer(text_of(page)):
        capsys.readouterr()
        code = match[1].replace('"/data/', f'"{folder}/data/')
        exec(compile(code, f"{page.name}, in the block {code.splitlines()[0]!r}", "exec"), names)
        if match[2]:
            assert capsys.readouterr().out.split() == match[2].split()


@pytest.mark.parametrize("page", with_blocks(False), ids=lambda page: page.stem)
def test_its_blocks_run(page, tmp_path, monkeypatch, capsys, inside_flower):
    monkeypatch.chdir(tmp_path)
    run_blocks(page, tmp_path, capsys)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder with the run that the pages ask: four clients, two rounds."""
    folder = tmp_path_factory.mktemp("recorded")
    few = "num_clients=4 clients_per_round=4 num_rounds=2 client.epochs=1 do_provenance=false dirichlet_alpha=1"
    few += " data_dist.max_per_client_data_size=30 data_dist.max_server_data_size=40"
    from tests.conftest import composed
    from tracefl.checks import load

    config = load(composed(tuple(few.split())))
    config.storage.dir = f"{folder}/logs"
    run_experiment(config, "{}\n", local.simulate)
    (made,) = folder.glob("logs/tracefl-*")
    made.rename(folder / RUN)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks(True), ids=lambda page: page.stem)
def test_its_blocks_run_on_a_recorded_run(page, recorded, tmp_path, monkeypatch, capsys, inside_flower):
    monkeypatch.chdir(recorded)
    run_blocks(page, tmp_path, capsys)


def commands_of(page: Path) -> list[str]:
    """Command lines of TraceFL in blocks and in the text; those with ... stand for any."""
    text = page.read_text()
    fenced = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.M | re.S)
    lines = "\n".join(fenced).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]*tracefl\.main[^`\n]*)`", text)
    return [line for line in lines if "tracefl.main" in line and "..." not in line]


COMMANDS = sorted({line.strip() for page in PAGES for line in commands_of(page)})


def test_command_lines_are_found():
    assert len(COMMANDS) > 25
    assert any(line.startswith("python -m tracefl.main dataset.path=data/dbpedia_14 ") for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_composes(line, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)
    words = words[words.index("tracefl.main") + 1 :]
    sweep = {"--multirun", "-m"} & set(words)
    settings = [word.split(",")[0] if sweep and "{" not in word else word for word in words if "=" in word]
    for word in settings:
        if word.startswith("dataset.path="):
            folder = tmp_path / word.partition("=")[2]
            folder.parent.mkdir(exist_ok=True)
            write(folder, {"text": ["a b c"], "label": [0]})
    config(*settings)


def of_the_command(page: Path) -> list[str]:
    """Lines that call the console script, in blocks and in the text."""
    text = page.read_text()
    fenced = re.findall(r"^ *```(?:bash|console)\n(.*?)^ *```$", text, re.M | re.S)
    lines = "\n".join(fenced).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", text)
    found = [match[1] for line in lines if (match := re.fullmatch(r"(?:\$ |uv run )?(tracefl [a-z].*)", line.strip()))]
    return [line for line in found if "..." not in line]


@pytest.mark.parametrize("line", sorted({line for page in PAGES for line in of_the_command(page)}))
def test_a_line_of_the_command_is_one(line, config):
    from tracefl.cli import app

    _, name, *words = shlex.split(line, comments=True)
    context = typer.main.get_command(app).commands[name].make_context(name, words)
    if name == "run":
        config(*[word for word in context.args if "=" in word])


def test_what_the_pages_name_is_there():
    for page in PAGES:
        for name in re.findall(r"\b((?:scripts|benchmarks|examples|tests)/[\w/]+\.\w+)", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"
        for name, test in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", page.read_text()):
            assert f"def {test}(" in (ROOT / name).read_text(), f"{page.name} names {name}::{test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_path_that_others_lack(page):
    text = page.read_text()
    assert not re.search(r"\.\./shared|/work/|/tmp/|/root/|/home/", text)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        there = target.startswith("http") or (page.parent / target).exists()
        assert there, f"{page.name} links to {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    assert {f"::: tracefl.{name}" for name in tracefl.__all__ if name != "__version__"} <= set(page.splitlines())
    for home in (tracefl.flower, tracefl.provenance):
        listed = {line.split(".")[-1] for line in page.splitlines() if line.startswith(f"::: {home.__name__}.")}
        assert listed <= set(home.__all__)


def on_the_api_page() -> list[Any]:
    """What the API page lists, the methods of `Run` that it lists, and those of an answer."""
    page = (ROOT / "docs" / "api.md").read_text()
    names = re.findall(r"^::: (.+)\.(\w+)$", page, re.M)
    methods = [getattr(tracefl.Run, name) for name in re.findall(r"^        - (\w+)$", page, re.M)]
    methods += [tracefl.Provenance.ranking, tracefl.Provenance.sets, tracefl.AnswerSets.coverage]
    return [getattr(importlib.import_module(module), name) for module, name in names] + methods


def name_of(entry: Any) -> str:
    return getattr(entry, "__qualname__", "")


@pytest.mark.parametrize("function", [*filter(inspect.isroutine, on_the_api_page())], ids=name_of)
def test_every_argument_is_described(function):
    described = re.findall(r"^    \**(\w+): ", inspect.getdoc(function).partition("Args:\n")[2], re.M)
    assert set(inspect.signature(function).parameters) - {"self"} <= set(described)


@pytest.mark.parametrize("entry", on_the_api_page(), ids=name_of)
def test_its_example_imports_what_it_uses(entry):
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(entry) or "", {}, name_of(entry), None, None)
    assert not doctest.DocTestRunner().run(example).failed


def test_the_citation_is_of_this_version():
    assert f"\nversion: {tracefl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
