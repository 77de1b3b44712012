"""Every setting, given what it cannot be: one sentence that names it, without anything heavy being imported."""

import copy
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from tracefl.checks import load
from tracefl.config import leaves
from tracefl.errors import TraceFLError

from .conftest import composed

INF, NAN, HUGE = float("inf"), float("nan"), 2**70
NO_NUMBER = [INF, -INF, NAN, HUGE, -HUGE, "größe", [1, 2], {1: 2}, {}]
NO_TEXT = ["\0", "x" * 5000, [1, 2], [], {1: 2}]
IMPOSSIBLE = {  # by a setting's type, without its "or null"
    "int": [-(2**40), 1.5, True, *NO_NUMBER],
    "float": [True, *NO_NUMBER],
    "bool": [-1, 2, HUGE, 0.5, NAN, INF, "", "maybe", [True], {1: 2}],
    "str": NO_TEXT,
    "list[str]": ["", 0, "text", ["\0"], {1: 2}, {}],
    "list[int]": ["", 0, "text", [-1], [HUGE], [NAN], [0.5], ["a"], [True], [[1]], {1: 2}, {}],
    "Any": [HUGE, NAN, INF, "größe", [1, 2], [], {"\0": "\0"}, {1: HUGE}, {HUGE: 1}, False],
}
BELOW = {  # what is just too small or large, or no such thing, where a type alone does not say it
    **{key: [-1] for key in ("seed", "client_gpu")},
    **{key: [0, -0.5, 0.0, 1e308] for key in ("dirichlet_alpha", "client.lr", "client_cpus", "round_timeout")},
    **{key: [-0.5, 1e308] for key in ("noise_multiplier", "clipping_norm")},
    **{key: [0, -7, 10**6] for key in ("total_cpus", "total_gpus", "parallel_processes")},
    **{key: ["", "  "] for key in ("exp_key", "storage.dir")},
    **{key: ["", "../..", "/dev/null", "a/..", "./a", "~/a", "x" * 300] for key in ("dataset.name", "model.name")},
    **{key: ["..", "/dev/null", "x" * 300, "~/a", "no/such", "größe"] for key in ("dataset.path", "model.path")},
    **{key: ["", " "] for key in ("dataset.train_split", "dataset.test_split")},
    **{key: [{"a": 1}, {1: "a"}, {1: NAN}, -1, {True: 1}] for key in ("label2flip", "noise_rate")},
    "noise_rate": [-0.1, 1.1, {"a": 1}, NAN],
    "dataset.test_share": [0, 1, -0.5],
    "dataset.num_classes": [1, 10**6],
    "neuron_activation_threshold": [1, -0.1],
    "device": ["", "gpu", "cuda:-1", "cuda:99999", "größe"],
    "exp_key": ["", "..", ".", ".hidden", "a/b", "../a", "x" * 300, "ä" * 150, " "],
    "storage.dir": ["", " ", "~", "~/logs", "\0"],
    "storage.keep": ["", "last:0", "last:-1", "last:" + "9" * 30],
    "storage.dtype": ["", "float64"],
    "ray.address": ["a", "a:0", "a:99999", ":1", "größe:1", "a b:1"],
    "faulty_clients_ids": [[0], [10], [-1]],  # 0 without labels to flip
    "exclude_clients": [[10], [*range(10)]],
    "batch_size": [1, 0],
}
KEYS = [key for key, _ in leaves()]
WORD = ("strategy.name", "data_dist.dist_type", "fault.kind", "provenance.scope", "model.arch", "model.tokenizer")


def impossible(key: str) -> list:
    """What a setting is given: what its type is not, and what it is not beside that."""
    kind = dict(leaves())[key].type
    name = kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)
    of_kind = IMPOSSIBLE[name.removesuffix(" | None").removeprefix("typing.")]
    of_kind = [value for value in of_kind if value != "" or "None" not in name]  # which stands for null
    return [*of_kind, *BELOW.get(key, []), *(["größe"] if key in WORD else [])]


def refused(base, key: str, values: list) -> None:
    for value in values:
        given = copy.deepcopy(base)
        OmegaConf.update(given, key, value, merge=False, force_add=True)
        if key == "clipping_norm":
            given.noise_multiplier = 1.0
        if key == "noise_rate":
            given.faulty_clients_ids, given.label2flip = [0], {1: 0}
        print(f"{key}={value!r}"[:100])
        with pytest.raises(TraceFLError) as error:
            load(given)
        said = str(error.value)
        assert key in said, said
        assert said.endswith("."), said
        assert len(said) < 700, said


@pytest.fixture(scope="module")
def base():
    return composed(())


@pytest.fixture(autouse=True)
def empty_surroundings(monkeypatch, tmp_path):
    """No cluster, and no data in the folder above, which `..` names."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("key", KEYS)
def test_no_setting_takes_what_it_cannot_be(base, key):
    values = impossible(key)
    refused(base, key, [values[KEYS.index(key) % len(values)], values[-1]])


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_no_setting_takes_anything_that_it_cannot_be(base, key):
    refused(base, key, impossible(key))


def test_a_wrong_value_is_answered_without_what_is_heavy():
    code = (
        "import sys\nfrom tracefl.main import main\n"
        "for word in sys.argv[1:]:\n"
        "    try: main([word])\n"
        "    except SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'transformers', 'flwr', 'datasets', 'ray', 'pandas', 'PIL'} & sys.modules.keys()))"
    )
    words = ["batch_size=1", "clipping_norm=inf", "storage.dir=/dev/null", "exp_key=..", "seed=-1", "device=cuda:99999"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=240)
    assert done.stdout == "1\n" * len(words) + "[]\n", done.stderr
    assert done.stderr.count("error: ") == done.stderr.count("\n") == len(words)
