"""The predictions of the last traced round, for a page without scripts."""

from collections.abc import Mapping, Sequence
from typing import Any

from tracefl.report.charts import bar
from tracefl.report.words import LOG_ODDS, NO_DIFFERENCE, SURE, number, show

Content = Mapping[str, Any]
MOST_INPUTS, MOST_CLIENTS, MOST_LAYERS = 24, 10, 5
ORDER = ("influence", "neuron", "shapley", "replay")  # of the methods; page.js has the same


def static_predictions(content: Content) -> dict[str, Any] | None:
    """The predictions of the last round that was traced, for a page without scripts."""
    found = content["predictions"]
    if not found:
        return None
    last = max(one["r"] for one in found)
    by_input: dict[int, list[Mapping[str, Any]]] = {}
    for one in found:
        if one["r"] == last:
            by_input.setdefault(one["i"], []).append(one)
    inputs = [_static(content, answers) for answers in list(by_input.values())[:MOST_INPUTS]]
    texts = any("text" in told for told in content["inputs"].values())
    return {"round": last, "inputs": inputs, "more": max(0, len(by_input) - MOST_INPUTS), "texts": texts}


def _static(content: Content, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A prediction by all methods, a row per client of the first."""
    first = min(answers, key=lambda one: ORDER.index(one["m"]) if one["m"] in ORDER else len(ORDER))
    ordered = sorted(answers, key=lambda one: one is not first)
    most = max((abs(value or 0) for value in first["v"]), default=0.0)
    rows = []
    for place, who in enumerate(first["c"][:MOST_CLIENTS]):
        values = [_value(one, who) for one in ordered[1:]]
        rows.append({
            "client": content["clients"]["client"][who], "values": values,
            "answer": ("in the answer" if place else "first") if place in first["in"] else "–",
            "first": _value(first, who), "bar": bar(first["v"][place] or 0, most),
            "held": _held(content, who, first["p"]),
        })  # fmt: skip
    names, most = content["layers"], max((abs(value or 0) for _, value in first.get("l", [])), default=0.0)
    layers = [(names[n], number(value, True), bar(value or 0, most)) for n, value in first.get("l", [])[:MOST_LAYERS]]
    return {
        "one": first, "methods": [one["m"] for one in ordered], "rows": rows, "layers": layers,
        "more": first["k"] - len(rows), "answer": answer_line(content, first), "server": server_line(first),
        "input": content["inputs"].get(str(first["i"]), {}), "command": command_of(content, first),
    }  # fmt: skip


def _held(content: Content, who: int, label: int) -> str:
    counts = content["label_counts"][who]
    return "–" if counts is None else str(counts[label])


def _value(one: Mapping[str, Any], who: int) -> str:
    if who not in one["c"]:
        return "–"
    place = one["c"].index(who)
    error = f" ± {number(one['e'][place])}" if one.get("e") else ""
    return number(one["v"][place], True) + error


def answer_line(content: Content, one: Mapping[str, Any]) -> str:
    """Who is behind the prediction, in a sentence. page.js says the same."""
    name = f"\u2068{show(content['clients']['client'][one['c'][0]])}\u2069"
    if one["k"] == 1:
        return f"Client {name} alone took part."
    if not any(one["v"]):
        return f"{NO_DIFFERENCE}."
    against = one["m"] in LOG_ODDS and (one["v"][0] or 0) < 0
    first = f"No client adds to this prediction; client {name} takes least from it"
    first = first if against else f"Client {name} contributes most"
    others = one["set"] - 1
    told = f", and {others} other{'s' if others > 1 else ''} cannot be told from it"
    told = {-1: ", but nobody can be told apart from the others", 0: ", ahead of all others"}.get(others, told)
    return f"{first}{told} ({SURE['errors' if 'e' in one else 'spread']})."


def server_line(one: Mapping[str, Any]) -> str:
    """What the server itself added, in a sentence; page.js says the same."""
    if one.get("s") is None:
        return ""
    most = max((abs(value) for value in one["v"] if value is not None), default=0.0)
    if abs(one["s"]) <= 1e-4 * most and not one.get("n"):
        return "The server itself added next to nothing."
    noise = f", of which its noise {number(one['n'], True)}" if one.get("n") else ""
    more = ", more than any client" if abs(one["s"]) > most else ""
    return f"The server itself added {number(one['s'], True)}{more}{noise}."


def command_of(content: Content, one: Mapping[str, Any]) -> str | None:
    """The command that gives a prediction's answer again; page.js says the same."""
    if one["m"] in content["again"]["methods"]:
        return f"{content['again']['trace']} --round {one['r']} --index {one['i']} --method {one['m']}"
    command: str | None = content["command"]
    return command
