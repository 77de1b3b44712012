"""A finished run, its tables and its prepared data are damaged at random; then everything that a user does is done.

What comes out must be the same numbers as before, or a sentence. Never another number, never a traceback.
"""

import os
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.damage.mutations import FORGED, KINDS, files_of
from tests.damage.tiny import ALWAYS_NEW, command, contents, finished, numbers, the_run, use_tiny_models
from tracefl.errors import TraceFLError, first_line

SEED = int(os.environ.get("TRACEFL_MUTATIONS_SEED", "0"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, what it holds, and what a user reads of it."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        patch.chdir(tmp_path_factory.mktemp("whole"))
        storage = finished(Path("logs"))
        found = numbers(the_run(storage))
        assert not [name for name, value in found.items() if isinstance(value, TraceFLError)]
        return storage.resolve(), contents(storage), found


def damaged(storage: Path, whole: Path, index: int) -> str:
    """A copy of the storage with one thing changed; what was done to what."""
    shutil.rmtree(storage, ignore_errors=True)
    shutil.copytree(whole, storage)
    rng = Random(1000 * SEED + index)
    name = list(KINDS)[index % len(KINDS)]
    file = rng.choice([each for each in files_of(storage) if each.name not in ALWAYS_NEW])
    KINDS[name](storage, file, rng)
    return f"{index}: {name} of {file.relative_to(storage)}"


def outcome(storage: Path, before: dict[str, str], known: dict[str, object], forged: bool) -> str:
    """What comes of everything that a user does, in one word; an AssertionError if a number is wrong."""
    (run,) = storage.glob("tiny-*") if len(list(storage.glob("tiny-*"))) else (None,)
    read = numbers(run) if run else {}
    refused = [name for name, value in read.items() if isinstance(value, TraceFLError)]
    for name, value in read.items():
        assert forged or isinstance(value, TraceFLError) or value == known[name], f"{name} is another: {value}"
    try:
        command(storage)()
    except TraceFLError:
        return "sentence"
    after = contents(storage)
    again = numbers(the_run(storage))
    still = [name for name, value in again.items() if isinstance(value, TraceFLError)]
    for name, value in again.items():
        assert forged or name in still or value == known[name], f"{name} is another after the command: {value}"
    gone = [name for name in before if name.startswith("tiny-") and "/rounds/" not in name and name not in after]
    assert forged or not gone, f"the command leaves out {gone}"
    tables = {name for name in after if "/rounds/" not in name and name.startswith("tiny-")}
    other = [name for name in sorted(tables & before.keys()) if after[name] != before[name]]
    assert forged or not other, f"the command ends with other bytes in {other}"
    if after == before:
        return "the same" if not refused else "computed again"
    return "the same tables; what is damaged is refused when it is read" if still else "the same tables"


def run_mutations(tmp_path: Path, whole, indices) -> Counter[str]:
    storage, before, known = whole
    counts, wrong = Counter[str](), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        patch.chdir(tmp_path)
        for index in indices:
            what = damaged(Path("logs"), storage, index)
            try:
                counts[outcome(Path("logs"), before, known, list(KINDS)[index % len(KINDS)] in FORGED)] += 1
            except AssertionError as error:
                wrong.append(f"{what}: SILENT: {first_line(error)[:200]}")
            except BaseException as error:
                wrong.append(f"{what}: TRACEBACK: {type(error).__name__}: {first_line(error)[:200]}")
                if isinstance(error, KeyboardInterrupt):
                    raise
    assert not wrong, "\n".join([f"{len(wrong)} of {sum(counts.values()) + len(wrong)}:", *wrong])
    return counts


@pytest.mark.slow
def test_damage_is_noticed(tmp_path, whole):
    counts = run_mutations(tmp_path, whole, range(0, len(KINDS), 2))
    assert sum(counts.values()) == len(KINDS) // 2
    assert len(counts) >= 3


@pytest.mark.slow
def test_of_a_thousand_mutations_none_gives_a_wrong_number_or_a_traceback(tmp_path, whole):
    counts = run_mutations(tmp_path, whole, range(1000))
    print(f"\n1,000 mutations: {dict(counts.most_common())}")
    assert sum(counts.values()) == 1000
