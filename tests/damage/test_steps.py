"""A process dies, or the disk is full, at every step that it takes in the file system; then the command is run again.

It must end with the bytes of a run that nothing has happened to, and leave nothing else behind.
"""

import shutil
from pathlib import Path

import pytest

from tests.damage.steps import GROWS, Killed, Steps
from tests.damage.tiny import TIMED, command, contents, the_run, use_tiny_models
from tracefl.errors import TraceFLError
from tracefl.results import read_result, read_timings

SMALL = ("num_clients=2", "clients_per_round=2", "provenance.max_mispredictions=1")
# What is there before, and what is done
STAGES: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "preparing": (None, (*SMALL, "do_training=false", "do_provenance=false")),
    "recording": ((*SMALL, "do_training=false", "do_provenance=false"), (*SMALL, "do_provenance=false")),
    "rounded": (
        (*SMALL, "do_training=false", "do_provenance=false"),
        (*SMALL, "do_provenance=false", "storage.keep=last:1", "storage.dtype=float16"),
    ),
    "tracing": ((*SMALL, "do_provenance=false"), (*SMALL, "convert_cache_to_csv=true")),
}


def everything(storage: Path) -> tuple[dict[str, str], set[str]]:
    """The content of all files, and the names of files and folders."""
    return contents(storage), {str(each.relative_to(storage)) for each in storage.rglob("*")}


class Stage:
    """One stage, what it starts from, and what it ends with where nothing happens."""

    def __init__(self, name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
        before, self.words = STAGES[name]
        self.start, self.storage = folder / "start", Path("logs")
        patch.chdir(folder)
        if before is not None:
            command(self.storage, *before)()
            self.storage.rename(self.start)
        self.reset()
        self.steps = Steps()
        with pytest.MonkeyPatch.context() as counting:
            self.steps.patch(counting)
            command(self.storage, *self.words)()
        self.end = everything(self.storage)

    def reset(self) -> None:
        shutil.rmtree(self.storage, ignore_errors=True)
        if self.start.exists():
            shutil.copytree(self.start, self.storage)

    def happens(self, at: int, full: bool) -> str:
        """What goes wrong if it happens at step `at`; empty if nothing does."""
        self.reset()
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(at, full)
            steps.patch(patch)
            try:
                command(self.storage, *self.words)()
                said = "" if not steps.dead else "it ended as if nothing had happened"
            except (Killed, TraceFLError):
                said = ""
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
        if said:
            return said
        command(self.storage, *self.words)()
        after, names = everything(self.storage)
        if names != self.end[1]:
            return f"other files: {sorted(names ^ self.end[1])}"
        return ", ".join(f"{name} differs" for name in after if after[name] != self.end[0][name])


@pytest.fixture
def stage(request, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        yield Stage(request.param, tmp_path, patch)


def tried(stage: Stage, every: int) -> list[str]:
    """What went wrong at which steps."""
    kinds, wrong = stage.steps.taken, []
    for index in range(0, len(kinds), every):
        for full in (False, True):
            if (not full or kinds[index] in GROWS) and (problem := stage.happens(index + 1, full)):
                what = "full disk" if full else "kill"
                wrong.append(f"{what} at step {index + 1} of {len(kinds)} ({kinds[index]}): {problem}")
    return wrong


@pytest.mark.parametrize("stage", ["preparing", "recording"], indirect=True)
def test_some_steps(stage):
    assert not tried(stage, len(stage.steps.taken) // 2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES), indirect=True)
def test_every_step(stage):
    wrong = tried(stage, 8 if "storage.keep=last:1" in stage.words else 1)
    print(f"\n{len(stage.steps.taken)} steps: {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)


def test_timings_are_there_whenever_the_answers_are(tmp_path, monkeypatch):
    """A process dies between the answers and their timings: they are measured again, not lost."""
    use_tiny_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    run = command(Path("logs"), *SMALL)
    run()
    folder = the_run(Path("logs"))
    assert set(read_timings(folder)["method"]) == {"neuron", "influence"}
    for name in TIMED:
        (folder / name).unlink()
        run()
        assert set(read_timings(folder)["method"]) == {"neuron", "influence"}
        assert b"influence" in read_result(folder, "timings.csv")
