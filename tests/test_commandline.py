"""What users type reaches Hydra as what they mean."""

import subprocess

import pytest

from tracefl.commandline import hydra_words
from tracefl.config import ALIASES, WITHOUT_EFFECT
from tracefl.errors import TraceFLError


def words(*typed: str) -> list[str]:
    return hydra_words(typed)[0]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dirichlet_alpha=0.1,0.2 --multirun device=cpu", "dirichlet_alpha=0.1,0.2 device=cpu --multirun"),
        ("-m seed=1 num_rounds=2", "seed=1 num_rounds=2 -m"),
        ("--cfg job seed=1", "seed=1 --cfg job"),
        ("seed=1 --cfg job num_rounds=2 --resolve", "seed=1 num_rounds=2 --cfg job --resolve"),
        ("--cfg=job seed=1", "seed=1 --cfg=job"),
        ("--info seed=1", "seed=1 --info"),
        ("--info searchpath seed=1 --multirun", "seed=1 --info searchpath --multirun"),
        ("--help seed=1", "seed=1 --help"),
        ("--config-dir there +mine=x -p tracefl", "+mine=x --config-dir there -p tracefl"),
        ("~seed -m", "~seed -m"),
        ("typo --multirun", "typo --multirun"),
        ("scale=small", "scale=small"),
        ("hydra.verbose=true +scale=small -m", "hydra.verbose=true +scale=small -m"),
    ],
)
def test_flags_may_stand_anywhere(typed, expected):
    assert words(*typed.split()) == expected.split()


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_alias_sets_its_setting(alias, key, prefix):
    assert words(f"{prefix}{alias}=2") == [f"{key}=2"]
    assert words(f"{prefix}{alias}=2,3", "-m") == [f"{key}=2,3", "-m"]


def test_two_spellings_agree_or_are_refused():
    assert words("num_rounds=2", "strategy.num_rounds=2") == ["num_rounds=2"]
    assert words("num_rounds=2", "num_rounds=3") == ["num_rounds=3"]  # the last counts, as in Hydra
    for typed in (["num_rounds=2", "++strategy.num_rounds=3"], ["strategy.num_rounds=3", "seed=1", "num_rounds=2"]):
        with pytest.raises(TraceFLError) as error:
            words(*typed)
        assert "strategy.num_rounds=3" in str(error.value)
        assert "num_rounds=2" in str(error.value)
        assert "leave one out" in str(error.value)


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_key_without_effect_is_left_out_with_a_note(key, prefix):
    assert hydra_words([f"{prefix}{key}=x", "seed=1"]) == (["seed=1"], [f"{key} has no effect: nothing reads it"])


def bash(line: str) -> list[str]:
    """The words that bash makes of a line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("label2flip={8:7,0:7} seed=1", ["label2flip={8:7,0:7}", "seed=1"]),
        ("label2flip={8:7}", ["label2flip={8:7}"]),
        ("'label2flip={8:7,0:7}'", ["label2flip={8:7,0:7}"]),
        ("'label2flip={8:7, 0:7}'", ["label2flip={8:7, 0:7}"]),
        (
            "label2flip={8:7,0:7,1:7} noise_rate={8:7,0:7,1:7}",
            ["label2flip={8:7,0:7,1:7}", "noise_rate={8:7,0:7,1:7}"],
        ),
        ("noise_rate={8:0.5,0:0.25} seed=1", ["noise_rate={8:0.5,0:0.25}", "seed=1"]),
        ("'label2flip={1:0}' label2flip={8:7,0:7}", ["label2flip={8:7,0:7}"]),  # a later one counts
        ("label2flip={8:7,0:7} 'label2flip={1:0}'", ["label2flip={1:0}"]),
        ("+label2flip={8:7,0:7}", ["+label2flip={8:7,0:7}"]),
        ("model.config={hidden_size:64,n_layer:2}", ["model.config={hidden_size:64,n_layer:2}"]),
        ("noise_rate=0.5", ["noise_rate=0.5"]),
        ('faulty_clients_ids=["0"]', ["faulty_clients_ids=[0]"]),
        ("faulty_clients_ids=[0,3]", ["faulty_clients_ids=[0,3]"]),
        ("dataset.name=a:b", ["dataset.name=a:b"]),  # no mapping
        ("'label2flip={1:0},{2:0}' -m", ["label2flip={1:0},{2:0}", "-m"]),  # a sweep
    ],
)
def test_what_bash_does_to_braces_is_undone(line, expected):
    assert words(*bash(line)) == expected


def test_a_label_with_two_targets_is_refused():
    with pytest.raises(TraceFLError, match=r"label2flip must give one value for 8, got 8:7, 8:6: quote it"):
        words(*bash("label2flip={8:7,8:6}"))


def test_a_mapping_may_be_followed_or_preceded_by_its_entries(config):
    for typed in (["model.config={a:1}", "model.config.b=2"], ["model.config.b=2", "model.config=a:1"]):
        assert config("model.name=gpt2", *typed).model.config == {"a": 1, "b": 2}


def test_keys_that_the_schema_lacks_are_added():
    assert words("typo=1") == ["++typo=1"]
    assert words("model.config.hidden_size=8", "++strategy.options.eta=1", "strategy.options.tau=1") == [
        "++model.config.hidden_size=8", "++strategy.options.eta=1", "++strategy.options.tau=1",
    ]  # fmt: skip
