"""The page's data in the words and tables that a reader sees with scripts off."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tracefl.evidence.verdict import UNKNOWN
from tracefl.report.charts import Line, bar, line_chart

Content = Mapping[str, Any]
MOST_CELLS, MOST_ROWS = 2500, 200  # of a heat map
HEAD_LETTERS, NAME_LETTERS = 24, 60
STATIC_INPUTS, STATIC_CLIENTS, STATIC_LAYERS = 24, 10, 5
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
# column of rounds.csv, its title, and whether it is a share
ROUND_COLUMNS = [
    ("participants", "Clients", "whole"),
    ("failures", "Left out", "whole"),
    ("accuracy", "Accuracy", "share"),
    ("loss", "Loss", "number"),
    ("num_inputs", "Inputs traced", "whole"),
    ("localization_accuracy_influence", "Localized, influence", "share"),
    ("localization_accuracy", "Localized, neuron", "share"),
    ("feddebug_accuracy", "Localized, FedDebug", "share"),
    ("chance_accuracy", "Localized by chance", "share"),
    ("top_holder_accuracy_influence", "Top holder, influence", "share"),
    ("top_holder_accuracy", "Top holder, neuron", "share"),
    ("top_holder_chance", "Top holder by chance", "share"),
    ("server_share", "Server’s own share", "share"),
]
METHODS = {
    "influence": "influence (first-order effect of leaving the client out)",
    "neuron": "neuron (the paper’s)",
    "shapley": "Shapley values (the coalition truth)",
    "replay": "the whole run (what the prediction would lose without the client)",
}


def show(text: object, most: int = NAME_LETTERS) -> str:
    """A text of others as it may stand in a page: control characters replaced, cut if long.

    Example:
        >>> show("a\\x00b"), show("x" * 100, 4)
        ('a�b', 'xxx…')
    """
    seen = UNSEEN.sub("\ufffd", str(text))
    return seen if len(seen) <= most else f"{seen[: most - 1]}…"


def number(value: Any, sign: bool = False) -> str:
    """A number for people, with a true minus; a dash for none.

    Example:
        >>> number(-0.51234), number(12.0, sign=True), number(None)
        ('−0.512', '+12', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign and value else ''}.3g}".replace("-", "−")


def percent(value: Any) -> str:
    """A share in percent; a dash for none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def verdict_view(content: Content) -> dict[str, Any]:
    """The verdict in a sentence, the reasons, and a row per client, the accused ones first."""
    verdict, about = content["verdict"], content["run"]
    planted = [who for who, fault in zip(content["clients"]["client"], content["clients"]["fault"], strict=True) if fault]
    view: dict[str, Any] = {"planted": planted, "reasons": [], "rows": [], "removal": None, "state": "none"}
    if verdict is None:
        view["headline"] = "No verdict: the clients of this run were not audited."
        return view | {"own_app": about["own_app"]}
    judged, faulty = verdict["clients"], verdict["faulty"]
    if judged and all(of.get("why") == UNKNOWN for of in judged.values()):
        return view | {"state": "unknown", "headline": f"No verdict: the clients {UNKNOWN}."}
    who = ", ".join(f"\u2068{show(one)}\u2069" for one in faulty[:10]) + (" and others" if len(faulty) > 10 else "")
    view["state"] = "faulty" if faulty else "nobody"
    view["headline"] = f"None of the {len(judged)} clients stands apart."
    if faulty:
        are = ("client is", "client") if len(faulty) == 1 else ("clients are", "clients")
        view["headline"] = f"{len(faulty)} of {len(judged)} {'clients'} {are[0].split()[1]} faulty: {are[1]} {who}."
    view["reasons"] = [{"client": one, **judged[one]} for one in faulty if one in judged]
    view["rows"], view["removal"] = _evidence_rows(content), verdict.get("removal")
    return view


def _evidence_rows(content: Content) -> list[dict[str, Any]]:
    found, judged = content["evidence"] or {"client": []}, content["verdict"]["clients"]
    seen = {who: {name: found[name][n] for name in found} for n, who in enumerate(found["client"])}
    sizes = dict(zip(content["clients"]["client"], content["clients"]["examples"], strict=True))
    rows = []
    for who, of in judged.items():
        row = {"client": who, "accused": who in content["verdict"]["faulty"], "examples": sizes.get(who), **of}
        rows.append({"aim": None, "agreement": None, "length": None, "value": None, **seen.get(who, {}), **row})
    return sorted(rows, key=lambda row: (not row["accused"], math.inf if row["aim"] is None else row["aim"]))


def facts(content: Content) -> list[tuple[str, str, str]]:
    """Name, value and what stands beside it, for the head of the page."""
    rounds, about, found = content["rounds"], content["run"], list[tuple[str, str, str]]()
    if about["rounds"] and rounds.get("accuracy"):
        loss = number(rounds["loss"][-1]) if "loss" in rounds else "–"
        found.append(("Accuracy", percent(rounds["accuracy"][-1]), f"after round {about['rounds']}, loss {loss}"))
    for column, method in (("localization_accuracy_influence", "influence"), ("localization_accuracy", "neuron")):
        if values := [value for value in rounds.get(column, []) if value is not None]:
            chance = [value for value in rounds.get("chance_accuracy", []) if value is not None]
            by_chance = percent(sum(chance) / len(chance)) if chance else "–"
            found.append(("Localized", percent(sum(values) / len(values)), f"by {method}; by chance {by_chance}"))
            break
    clients = content["clients"]["client"]
    found.append(("Clients", f"{len(clients):,}".replace(",", "\u202f"), f"over {about['rounds']} rounds"))
    what = [show(about[name], 40) for name in ("model", "strategy") if about[name]]
    if about["dataset"]:
        found.append(("Data", show(about["dataset"], 30), ", ".join(what)))
    return found


def rounds_view(content: Content) -> dict[str, Any]:
    """The charts of the rounds, and their table."""
    rounds = content["rounds"]
    numbers = rounds["round"]

    def line(name: str, column: str, style: str) -> Line:
        values = rounds.get(column, [None] * len(numbers))
        return Line(name, [math.nan if value is None else float(value) for value in values], style)

    localized = [
        line("influence", "localization_accuracy_influence", "a"),
        line("neuron", "localization_accuracy", "b"),
        line("FedDebug", "feddebug_accuracy", "c"),
        line("by chance", "chance_accuracy", "chance"),
    ]
    right = "Named client is a faulty one" if content["run"]["faulty"] else "Named client holds the class"
    charts = [
        line_chart(numbers, [line("accuracy", "accuracy", "a")], "Accuracy of the global model", percent=True),
        line_chart(numbers, [line("loss", "loss", "a")], "Loss of the global model"),
        line_chart(numbers, localized, right, percent=True),
    ]
    titles = ["Accuracy of the global model", "Loss of the global model", right]
    told = [entry for entry in ROUND_COLUMNS if any(value is not None for value in rounds.get(entry[0], []))]
    told = [entry for entry in told if entry[0] not in ("failures", "server_share") or _matters(rounds[entry[0]])]
    rows = [[_written(rounds[column][n], kind) for column, _, kind in told] for n in range(len(numbers))]
    drawn = [(title, chart) for title, chart in zip(titles, charts, strict=True) if chart]
    return {"charts": drawn, "titles": [title for _, title, _ in told], "rows": list(zip(numbers, rows, strict=True))}


def _matters(values: Sequence[Any]) -> bool:
    return any(value is not None and value > 1e-3 for value in values)


def _written(value: Any, kind: str) -> str:
    if value is None:
        return "–"
    return percent(value) if kind == "share" else number(value) if kind == "number" else f"{value:.0f}"


def holdings(content: Content) -> dict[str, Any] | None:
    """Who trains on how many examples of which class: a heat map as a table."""
    if not content["label_counts"]:
        return None
    counts: dict[int, dict[int, int]] = {}
    of_class = dict.fromkeys(range(len(content["classes"])), 0)
    for who, label, count in content["label_counts"]:
        counts.setdefault(who, {})[label] = count
        of_class[label] += count
    clients = _largest({who: sum(held.values()) for who, held in counts.items()}, MOST_ROWS)
    labels = _largest(of_class, max(5, MOST_CELLS // max(len(clients), 1)))
    most = max(count for held in counts.values() for count in held.values())
    rows = [
        {
            "client": content["clients"]["client"][who],
            "fault": content["clients"]["fault"][who],
            "cells": [(held, math.ceil(8 * math.sqrt(held / most))) for held in (counts[who].get(n, 0) for n in labels)],
            "sum": sum(counts[who].values()),
        }
        for who in clients
    ]
    shown = {"clients": (len(clients), len(counts)), "classes": (len(labels), len(of_class))}
    return {"classes": [content["classes"][n] for n in labels], "rows": rows, "shown": shown}


def values_by_class(content: Content) -> dict[str, Any] | None:
    """Who makes the model good or bad at which class: a heat map as a table."""
    table = content["class_by_client"]
    if not table or not table["client"]:
        return None
    strength = [max((abs(value) for value in row[1:] if value is not None), default=0.0) for row in table["values"]]
    clients = _largest(dict(enumerate(strength)), MOST_ROWS)
    C = len(table["class"])
    by_class = {n: max((abs(row[n]) for row in table["values"] if row[n] is not None), default=0.0) for n in range(1, C)}
    columns = [0, *_largest(by_class, max(5, MOST_CELLS // len(clients)))]
    most = max(by_class.values(), default=0.0) or 1.0

    def step(value: float | None) -> str:
        size = 0 if value is None else min(4, math.ceil(4 * math.sqrt(abs(value) / most) - 0.5))
        return f"{'m' if (value or 0) < 0 else 'p'}{size}"

    def told(value: float | None) -> str:
        return "–" if value is None else f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0"

    rows = [
        {"client": table["client"][n], "cells": [(told(table["values"][n][c]), step(table["values"][n][c])) for c in columns]}
        for n in clients
    ]
    shown = {"clients": (len(clients), len(table["client"])), "classes": (len(columns) - 1, C - 1)}
    return {"classes": [table["class"][c] for c in columns[1:]], "rows": rows, "shown": shown}


def _largest(sizes: Mapping[int, float], most: int) -> list[int]:
    """At most so many keys, those with the largest sizes, in their order."""
    kept = sorted(sizes, key=lambda key: -sizes[key])[:most]
    return [key for key in sizes if key in set(kept)]


def whole_view(content: Content) -> list[tuple[str, str, Markup, str]] | None:
    """Of the whole run a row per client: its id, mean contribution, a bar, and how often first."""
    table = content["whole_run"]
    if not table:
        return None
    most = max(abs(value or 0) for value in table["contribution"])
    columns = zip(*(table[name] for name in ("client", "contribution", "first", "inputs")), strict=True)
    return [(who, number(c, True), bar(c or 0, most), f"{first} of {inputs}") for who, c, first, inputs in columns]


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
    inputs = [_static(content, answers) for answers in list(by_input.values())[:STATIC_INPUTS]]
    return {"round": last, "inputs": inputs, "more": max(0, len(by_input) - STATIC_INPUTS)}


def _static(content: Content, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A prediction by all methods, a row per client of the first."""
    first = min(answers, key=lambda one: list(METHODS).index(one["m"]) if one["m"] in METHODS else 9)
    ordered = sorted(answers, key=lambda one: one is not first)
    held = {who: count for who, label, count in content["label_counts"] if label == first["p"]}
    most = max((abs(value or 0) for value in first["v"]), default=0.0)
    rows = []
    for place, who in enumerate(first["c"][:STATIC_CLIENTS]):
        values = [_value(one, who) for one in ordered[1:]]
        rows.append({
            "client": content["clients"]["client"][who], "named": place in first["in"], "values": values,
            "first": _value(first, who), "bar": bar(first["v"][place] or 0, most),
            "held": held.get(who, 0) if content["label_counts"] else None,
        })  # fmt: skip
    names, most = content["layers"], max((abs(value or 0) for _, value in first.get("l", [])), default=0.0)
    layers = [(names[n], number(value, True), bar(value or 0, most)) for n, value in first.get("l", [])[:STATIC_LAYERS]]
    return {
        "one": first, "methods": [one["m"] for one in ordered], "rows": rows, "layers": layers,
        "more": first["k"] - len(rows), "answer": answer_line(content, first), "server": server_line(first),
        "input": content["inputs"].get(str(first["i"]), {}), "command": command_of(content, first),
    }  # fmt: skip


def _value(one: Mapping[str, Any], who: int) -> str:
    if who not in one["c"]:
        return "–"
    place = one["c"].index(who)
    error = f" ± {number(one['e'][place])}" if one.get("e") else ""
    return number(one["v"][place], True) + error


def answer_line(content: Content, one: Mapping[str, Any]) -> str:
    """Who is behind the prediction, in a sentence. page.js says the same."""
    name = f"Client \u2068{show(content['clients']['client'][one['c'][0]])}\u2069"
    if one["k"] == 1:
        return f"{name} alone took part."
    if not one["set"]:
        return f"{name} contributes most, but nobody can be told apart from the others."
    if one["set"] == 1:
        return f"{name} contributes most, ahead of all others."
    others = one["set"] - 1
    return f"{name} contributes most; {others} other{'s' if others > 1 else ''} cannot be told from it."


def server_line(one: Mapping[str, Any]) -> str:
    """What the server itself added, in a sentence; page.js says the same."""
    if one.get("s") is None:
        return ""
    noise = f", of which its noise {number(one['n'], True)}" if one.get("n") else ""
    return f"The server itself added {number(one['s'], True)}{noise}."


def command_of(content: Content, one: Mapping[str, Any]) -> str | None:
    """The command that gives a prediction's answer again; page.js says the same."""
    if one["m"] in content["again"]["methods"]:
        return f"{content['again']['trace']} --round {one['r']} --index {one['i']} --method {one['m']}"
    command: str | None = content["command"]
    return command
