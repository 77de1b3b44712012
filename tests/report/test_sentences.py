"""What the page and the command say of an answer, in words and numbers."""

import pytest

from tracefl.commands.tracing import _set_line
from tracefl.report.static import answer_line, server_line
from tracefl.report.view import values_by_class
from tracefl.report.words import NO_DIFFERENCE


def answered(method="influence", **changes) -> str:
    content = {"clients": {"client": ["a", "b", "c"]}}
    return answer_line(content, {"m": method, "k": 3, "c": [1, 0, 2], "v": [2.0, 1.0, 0.5], "set": 2, **changes})


def test_an_answer_says_how_sure_it_is_and_from_what():
    others = "(with confidence 0.9, by the other predictions traced in the round)."
    assert answered() == f"Client \u2068b\u2069 contributes most, and 1 other cannot be told from it {others}"
    assert answered(set=1, e=[0.1] * 3).endswith(", ahead of all others (with confidence 0.9, by standard errors).")
    assert answered(set=0) == (
        f"Client \u2068b\u2069 contributes most, but nobody can be told apart from the others {others}"
    )
    against = answered(v=[-1.0, -2.0, -3.0])
    assert against.startswith(
        "No client adds to this prediction; client \u2068b\u2069 takes least from it, and 1 other"
    )
    assert answered("neuron", v=[-1.0, -2.0, -3.0]).startswith("Client \u2068b\u2069 contributes most")  # of a logit
    assert answered(v=[0.0] * 3) == f"{NO_DIFFERENCE}."
    assert answered(v=[0.0], k=1) == "Client \u2068b\u2069 alone took part."


def test_what_the_server_added_is_held_against_the_clients():
    assert server_line({"v": [-5.0, -8.0], "s": 51.0, "n": 50.0}) == (
        "The server itself added +51.0, more than any client, of which its noise +50.0."
    )
    assert server_line({"v": [-5.0, -8.0], "s": 2.0}) == "The server itself added +2.00."


def test_small_values_by_class_have_digits():
    def told(scale):
        table = {"client": ["0"], "of": 1, "class": ["all", "a", "b"], "values": [[-scale / 100, -scale, scale / 10]]}
        return [cell for cell, _ in values_by_class({"class_by_client": table})["rows"][0]["cells"]]

    assert told(1.0) == ["−0.01", "−1.00", "+0.10"]
    assert told(0.04) == ["0", "−0.040", "+0.004"]
    assert told(0.0) == ["0", "0", "0"]


@pytest.mark.parametrize(
    ("contributions", "said"),
    [([0.0], "c0 alone took part."), ([0.0, 0.0], f"{NO_DIFFERENCE}."), ([2.0, 1.0], "First is c0; c1 cannot be told")],
)
def test_an_answer_that_tells_nobody_apart_names_nobody(contributions, said):
    clients = [{"client": str(k), "contribution": value} for k, value in enumerate(contributions)]
    found = {"clients": clients, "method": "influence", "set": ["0", "1"], "set_from": "3 others"}
    assert _set_line(found).startswith(said)
