"""A rule holds exactly for what its words say."""

import math

import pytest

from tracefl.errors import TraceFLError
from tracefl.rules import FOLDER, HOST_PORT, SHARE, at_least, between, integer, matches, one_of, some_of

ONE_OR_ALL = at_least(1).or_value(-1, "all")
NO_ADDRESSES = ["", "a", ":1", "a:", "a:b", "a:0", "a:65536", "ray://a:1", "a b:1", "a:1\n", "::1:1", 6379, None]
NAME = matches("[a-z]+", "be in small letters")


@pytest.mark.parametrize(
    ("rule", "must", "good", "bad"),
    [
        (at_least(1), "be at least 1", [1, 1.5, 10**9], [0, 0.99, -1, math.inf, math.nan, True, "1", None]),
        (SHARE, "be a share from 0 to 1", [0, 0.5, 1], [-0.1, 1.1, True, "0.5", {}]),
        (integer(1), "be a whole number of at least 1", [1, 7], [0, 1.0, True, "1"]),
        (between(0, 1), "be at least 0 and below 1", [0, 0.999], [1, -0.1, math.nan]),
        (one_of((1, 3)), "be one of 1, 3", [1, 3], [2, None, "1"]),
        (some_of(("a", "b")), "name one or more of a, b", [["a"], ["b", "a"]], [[], ["c"], ["a", "c"], [["a"]]]),
        (NAME, "be in small letters", ["abc"], ["", "a1", "abc\n"]),
        (FOLDER, "be a folder that exists", ["."], ["no/such/folder", __file__]),
        (HOST_PORT, "be HOST:PORT, as 10.0.0.1:6379", ["10.0.0.1:6379", "a-b.c:1", "[::1]:65535"], NO_ADDRESSES),
        (ONE_OR_ALL, "be at least 1, or -1 for all", [-1, 1, 5], [0, -2]),
        (at_least(2).or_null(), "be at least 2, or null", [None, 2], [1]),
    ],
)
def test_a_rule_holds_for_what_it_says(rule, must, good, bad):
    assert rule.must == must
    assert [value for value in good if not rule.holds(value)] == []
    assert [value for value in bad if rule.holds(value)] == []


def test_a_broken_rule_names_key_rule_and_value():
    ONE_OR_ALL.check("threads", 3)
    with pytest.raises(TraceFLError) as error:
        ONE_OR_ALL.check("threads", 0)
    assert str(error.value) == "threads must be at least 1, or -1 for all, got 0."
