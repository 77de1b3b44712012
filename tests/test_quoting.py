"""Texts on the command line are what the user typed, or a sentence gives the quoting, ready to copy."""

import re
import subprocess

import pytest
from hydra import compose, initialize_config_module

from tracefl.commandline import hydra_words
from tracefl.errors import TraceFLError
from tracefl.quoting import readable


def composed(*typed: str):
    words, _ = hydra_words(typed)
    with initialize_config_module("tracefl.conf", version_base="1.3"):
        return compose("base", overrides=words)


AS_TYPED = [
    *("a=b", "x=y/[1] ü", "a b", " a ", "dir ", "größe", "日本 😀", "a#b", "a;b", "a|b", "a&b", "a<b>", "a%b", "~/x"),
    *("it's", "a'b'", "'open", 'a"b', "a\"b'c", "$HOME", "a=$x", "a=`b`", "a!b=", "a:b", "C:\\x\\y", "a=\\", "ü\\'x"),
    *("{a}", "[a", "a]", "a(1)", "a=b,c", "5", "1e3", "1_000", "true", "nan", "a\nb", "a\tb", "=", "-x=y", "("),
    *("a=[1,2]", "*?", "@x"),
]


@pytest.mark.parametrize("value", AS_TYPED)
@pytest.mark.parametrize("prefix", ["", "++"])
def test_a_text_is_what_was_typed(value, prefix):
    assert composed(f"{prefix}dataset.path={value}").dataset.path == value


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("'a b'", "a b"),
        ('"a=b"', "a=b"),
        ("'[1]'", "[1]"),
        (r"'it\'s'", "it's"),
        (r"a\,b", "a,b"),
        ("null", None),
        ("", ""),
        ("${exp_key}/x", "tracefl/x"),
        ("a=${exp_key}", "a=tracefl"),
        (r"a=\${exp_key}", "a=${exp_key}"),
    ],
)
def test_hydras_own_ways_to_write_a_text_still_work(typed, value):
    assert composed(f"dataset.path={typed}").dataset.path == value


@pytest.mark.parametrize("value", ["[a]", "[a,'b c']", "{a:1}", "{}", "a,b", "'a','b c'", "choice(a,b)", "$a,b"])
def test_what_is_no_text_is_refused_with_a_quoting_to_copy(value):
    with pytest.raises(TraceFLError) as error:
        composed(f"exp_key={value}")
    said = str(error.value)
    assert f"exp_key={value}" in said or f"got {value}" in said
    copied = re.search(r"quote it, as (.*)\.$|as one text: (.*)\.$", said)
    word = next(filter(None, copied.groups()))
    shell = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, text=True, check=True)
    assert composed(shell.stdout).exp_key == value


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ("[größe,Text (de)]", ["größe", "Text (de)"]),
        ("['a,b',größe]", ["a,b", "größe"]),
        ("[a,b]", ["a", "b"]),
        ("[]", []),
        ("[x=1]", ["x=1"]),
    ],
)
def test_texts_of_a_list_are_what_was_typed(value, columns):
    assert composed(f"dataset.input_columns={value}").dataset.input_columns == columns


def test_a_text_for_a_list_is_left_to_be_refused(config):
    with pytest.raises(TraceFLError, match=r"dataset\.input_columns must be a list, got größe"):
        config("dataset.input_columns=größe")


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN"])
def test_a_sweep_over_texts_stays_one(flag):
    assert hydra_words(["dataset.path=/x/ü,/x/b", flag])[0][0] == "dataset.path='/x/ü',/x/b"
    assert hydra_words(["dataset.path=a,b", flag])[0][0] == "dataset.path=a,b"
    assert hydra_words(["dataset.path='x,ü',b=c", flag])[0][0] == "dataset.path='x,ü','b=c'"
    assert hydra_words(["dataset.input_columns=[ü,b],[c]", flag])[0][0] == "dataset.input_columns=['ü',b],[c]"


@pytest.mark.parametrize("word", ["num_rounds=1,2", "client.lr=choice(1,2)", "label2flip={1:0},{2:0}"])
def test_several_values_need_multirun(word):
    with pytest.raises(TraceFLError, match=r" gives several values: add --multirun for a run of each\.$"):
        hydra_words([word])
    assert hydra_words([word, "-m"])[0][0] == word


def test_other_settings_are_left_alone():
    assert readable("num_rounds", int, "a=b", False) == "a=b"
