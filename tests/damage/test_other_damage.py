"""What a hand does to a run, beside what a disk does (`mutations`): files swapped, edited, taken from another run.

As after a random mutation, what comes out is the same numbers as before, or a sentence.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.damage.test_mutations import outcome
from tests.damage.tiny import command, contents, finished, numbers, the_run, use_tiny_models
from tracefl.sealed import KEY


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A finished run, and another one of another seed."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        patch.chdir(tmp_path_factory.mktemp("whole"))
        one, other = finished(Path("logs")), Path("other/logs")
        command(other, "seed=5")()
        yield one.resolve(), other.resolve(), contents(one), numbers(the_run(one))


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


def lines(run: Path, change) -> None:
    file = run / "run.json"
    file.write_text("\n".join(change(file.read_text().split("\n"))))


def doubled(text: list[str]) -> list[str]:
    """A key twice, of which JSON's readers take the last."""
    place = next(index for index, line in enumerate(text) if '"accuracy": ' in line)
    return [*text[: place + 1], '   "accuracy": 0.99,', *text[place + 1 :]]


def folder_for_folder(run: Path, other: Path) -> None:
    shutil.rmtree(run / "rounds/0001")
    (run / "rounds/0001").symlink_to(run / "rounds/0002")


def copied(*names: str):
    def change(run: Path, other: Path) -> None:
        for name in names:
            shutil.copy(other / name, run / name)

    return change


RESULTS = ("rounds.csv", "verdict.json", "provenance.parquet", "audit.parquet", "results.json")
DAMAGE = {
    "rounds swapped": lambda run, _: swap(run / "rounds/0001", run / "rounds/0002"),
    "clients swapped": lambda run, _: swap(
        run / "rounds/0002/clients/0.safetensors", run / "rounds/0002/clients/1.safetensors"),
    "a key twice": lambda run, _: lines(run, doubled),
    "NaN for a number": lambda run, _: lines(run, lambda text: [
        '   "loss": NaN,' if '"loss": ' in line else line for line in text]),
    "the hash taken away": lambda run, _: lines(run, lambda text: [
        line.rstrip(",") if KEY in following else line
        for line, following in zip(text, [*text[1:], ""], strict=True) if KEY not in line]),
    "other line ends": lambda run, _: lines(run, lambda text: [f"{line}\r" for line in text]),
    "keys in another order": lambda run, _: (run / "run.json").write_text(
        json.dumps(json.loads((run / "run.json").read_text()), indent=1, sort_keys=True)),
    "a round's folder is a link to another": folder_for_folder,
    "a loop of links": lambda run, _: (run / "rounds/loop").symlink_to(run),
    "old times": lambda run, _: [os.utime(file, (0, 0)) for file in run.rglob("*")],
    "results of another run": copied(*RESULTS),
    "a table of another run": copied("rounds.csv"),
    "a table of another run with its hash": copied("rounds.csv", "results.json"),
    "a client of another run": copied("rounds/0002/clients/1.safetensors"),
    "a model of another run": copied("rounds/0002/global.safetensors"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_what_a_hand_has_changed_is_noticed(tmp_path, monkeypatch, stores, name):
    one, other, before, known = stores
    use_tiny_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one, "logs")
    DAMAGE[name](the_run(Path("logs").resolve()), the_run(other))
    assert outcome(Path("logs"), before, known, forged=False)
