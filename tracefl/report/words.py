"""How a page writes texts of others and numbers; page.js does the same."""

import math
import re
from typing import Any

from tracefl.evidence.answers import CONFIDENCE

NAME_LETTERS = 60
# Of a contribution, by method.
MEANING = {
    "neuron": "a share of the logit, as in the paper",
    "influence": "what the log-odds of the class would lose without the client, to first order",
    "integrated": "a share of the change of the logit in this round",
    "shapley": "what the client adds to the log-odds of the class, mean over all orders of joining",
    "replay": "what the log-odds of the class would lose had the client never taken part, by a replay of the rounds",
}
LOG_ODDS = ("influence", "shapley", "replay")  # below 0 a client speaks against the class
NO_DIFFERENCE = "All contributions are 0: the clients sent the same, or one of them has all the weight"
# What says who cannot be told from the first.
SURE = {
    kind: f"with confidence {CONFIDENCE:g}, by {what}"
    for kind, what in {"errors": "standard errors", "spread": "the other predictions traced in the round"}.items()
}
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def show(text: object, most: int = NAME_LETTERS) -> str:
    """A text of others as it may stand in a page: control characters replaced, cut if long.

    Example:
        >>> show("a\\x00b"), show("x" * 100, 4), show(" ")
        ('a�b', 'xxx…', '(blank)')
    """
    seen = UNSEEN.sub("\ufffd", str(text)) if str(text).strip() else "(blank)"
    return seen if len(seen) <= most else f"{seen[: most - 1]}…"


def number(value: Any, sign: bool = False) -> str:
    """A number for people, with a true minus; a dash for none.

    Example:
        >>> number(-0.5), number(12.0, sign=True), number(-2e-7), number(None)
        ('−0.500', '+12.0', '−2.00e-07', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign and value else ''}#.3g}".rstrip(".").replace("-", "−", 1 if value < 0 else 0)


def fixed(value: Any, sign: bool = False) -> str:
    """A number with two decimals, as it stands among others in a column; a dash for none.

    Example:
        >>> fixed(-0.004), fixed(1.5, sign=True)
        ('0.00', '+1.50')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.2f}".replace("-0.00", "0.00").replace("-", "−")


def percent(value: Any) -> str:
    """A share in percent; a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}\u00a0%"
