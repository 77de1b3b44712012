"""The run in words and tables: the verdict, the rounds, who holds what, class by client."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tracefl.evidence.verdict import AGAINST, FEWEST_ROUNDS, LOW_AIM, SILENT, UNKNOWN
from tracefl.report.charts import Line, bar, line_chart
from tracefl.report.content import largest
from tracefl.report.words import fixed, number, percent, show

Content = Mapping[str, Any]
MOST_CELLS, MOST_ROWS = 2500, 200  # of a heat map
HEAD_LETTERS = 24  # of a class above a heat map
MOST_METRICS = 8  # that clients told of a round
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


def verdict_view(content: Content) -> dict[str, Any]:
    """The verdict in a sentence, the reasons, and a row per client, the accused ones first."""
    verdict, about = content["verdict"], content["run"]
    planted = [
        who for who, fault in zip(content["clients"]["client"], content["clients"]["fault"], strict=True) if fault
    ]
    view: dict[str, Any] = {"planted": planted, "reasons": [], "rows": [], "more": 0, "removal": None, "state": "none"}
    view["too_few"] = ""
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
    if not faulty and max(of["rounds"] for of in judged.values()) < FEWEST_ROUNDS:
        view["too_few"] = f"Wrong labels show only from {FEWEST_ROUNDS} rounds of a client on; here none has so many."
    view["reasons"] = [{"client": one, **judged[one]} for one in faulty if one in judged]
    rows = _evidence_rows(content)
    view["more"], view["rows"], view["removal"] = len(rows) - MOST_ROWS, rows[:MOST_ROWS], verdict.get("removal")
    return view


RULE = (
    f"Faulty is a client whose updates have hardly any length (below {fixed(SILENT)}), that moves against the others "
    f"(agreement below {fixed(AGAINST)}, aim well below the median client’s), or whose aim stays low over at least "
    f"{FEWEST_ROUNDS} rounds (below {fixed(LOW_AIM)}, and far below the median client’s)."
)


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
        kind, C = _accuracy_kind(rounds), len(content["classes"])
        by_chance = f"; by chance {percent(1 / C)}" if C and kind == "share" else ""
        told = f"in round {about['rounds']}{by_chance}"
        found.append(("Accuracy", _written(rounds["accuracy"][-1], kind), told))
    for column, method in (("localization_accuracy_influence", "influence"), ("localization_accuracy", "neuron")):
        if values := [value for value in rounds.get(column, []) if value is not None]:
            chance = [value for value in rounds.get("chance_accuracy", []) if value is not None]
            by_chance = percent(sum(chance) / len(chance)) if chance else "–"
            found.append((_right(about), percent(sum(values) / len(values)), f"by {method}; by chance {by_chance}"))
            break
    K, part = len(content["clients"]["client"]), sum(rounds > 0 for rounds in content["clients"]["rounds"])
    over = f"over {about['rounds']} round{'s' if about['rounds'] != 1 else ''}"
    found.append(("Clients", _grouped(K), over if part == K else f"{_grouped(part)} of them took part, {over}"))
    what = [show(about[name], 40) for name in ("model", "strategy") if about[name]]
    if about["dataset"]:
        found.append(("Data", show(about["dataset"], 30), ", ".join(what)))
    return found


def _right(about: Mapping[str, Any]) -> str:
    """What the localization accuracy is the share of."""
    return "Named client is a faulty one" if about["faulty"] else "Named client holds the class"


def _grouped(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")


def rounds_view(content: Content) -> dict[str, Any]:
    """The charts of the rounds, and their table."""
    rounds = content["rounds"]
    numbers, kinds = rounds["round"], {"accuracy": _accuracy_kind(rounds)}

    def line(name: str, column: str, style: str) -> Line:
        values = rounds.get(column, [None] * len(numbers))
        return Line(name, [math.nan if value is None else float(value) for value in values], style)

    localized = [
        line("influence", "localization_accuracy_influence", "a"),
        line("neuron", "localization_accuracy", "b"),
        line("FedDebug", "feddebug_accuracy", "c"),
        line("by chance", "chance_accuracy", "chance"),
    ]
    accuracy = [line("accuracy", "accuracy", "a")]
    if kinds["accuracy"] == "share" and (C := len(content["classes"])) and any(map(math.isfinite, accuracy[0].y)):
        accuracy.append(Line("by chance", [1 / C] * len(numbers), "chance"))
    right = _right(content["run"])
    titles = ["Accuracy of the global model", "Loss of the global model", right]
    charts = [
        line_chart(numbers, accuracy, titles[0], percent=kinds["accuracy"] == "share"),
        line_chart(numbers, [line("loss", "loss", "a")], titles[1]),
        line_chart(numbers, localized, right, percent=True),
    ]
    usual = [(column, title, kinds.get(column, kind)) for column, title, kind in ROUND_COLUMNS]
    told = [entry for entry in usual if any(value is not None for value in rounds.get(entry[0], []))]
    told += [(name, show(name), "number") for name in [name for name in rounds if ": " in name][:MOST_METRICS]]
    told = [entry for entry in told if entry[0] not in ("failures", "server_share") or _matters(rounds[entry[0]])]
    rows = [[_written(rounds[column][n], kind) for column, _, kind in told] for n in range(len(numbers))]
    drawn = [(title, chart) for title, chart in zip(titles, charts, strict=True) if chart and len(numbers) > 1]
    told_rows = list(zip(numbers, rows, strict=True))
    titles = [title for _, title, _ in told]
    return {"charts": drawn, "titles": titles, "rows": told_rows[-MOST_ROWS:], "more": len(rows) - MOST_ROWS}


def _accuracy_kind(rounds: Mapping[str, Any]) -> str:
    """How accuracies are written: an app's own may be in percent, or something else."""
    return "share" if all(value is None or 0 <= value <= 1 for value in rounds.get("accuracy", [])) else "number"


def _matters(values: Sequence[Any]) -> bool:
    return any(value is not None and value > 1e-3 for value in values)


def _written(value: Any, kind: str) -> str:
    if value is None:
        return "–"
    return percent(value) if kind == "share" else number(value) if kind == "number" else f"{value:.0f}"


def holdings(content: Content) -> dict[str, Any] | None:
    """Who trains on how many examples of which class: a heat map as a table."""
    counts = {who: held for who, held in enumerate(content["label_counts"]) if held is not None}
    if not counts:
        return None
    clients = largest({who: sum(held) for who, held in counts.items()}, MOST_ROWS)
    of_class = {n: sum(held[n] for held in counts.values()) for n in range(len(content["classes"]))}
    labels = largest(of_class, max(5, MOST_CELLS // len(clients)))
    most = max(max(held, default=0) for held in counts.values()) or 1
    rows = [
        {
            "client": content["clients"]["client"][who],
            "fault": content["clients"]["fault"][who],
            "cells": [(counts[who][n], math.ceil(8 * math.sqrt(counts[who][n] / most))) for n in labels],
            "sum": sum(counts[who]),
        }
        for who in clients
    ]
    shown = {"clients": (len(clients), len(counts)), "classes": (len(labels), len(of_class))}
    return _heat([content["classes"][n] for n in labels], rows, shown)


def values_by_class(content: Content) -> dict[str, Any] | None:
    """Who makes the model good or bad at which class: a heat map as a table."""
    table = content["class_by_client"]
    if not table or not table["client"]:
        return None
    strength = [max((abs(value) for value in row[1:] if value is not None), default=0.0) for row in table["values"]]
    clients = largest(dict(enumerate(strength)), MOST_ROWS)
    C = len(table["class"])
    by_class = {
        n: max((abs(row[n]) for row in table["values"] if row[n] is not None), default=0.0) for n in range(1, C)
    }
    columns = [0, *largest(by_class, max(5, MOST_CELLS // len(clients)))]
    most = max(by_class.values(), default=0.0) or 1.0

    def step(value: float | None) -> str:
        size = 0 if value is None else min(4, math.ceil(4 * math.sqrt(abs(value) / most) - 0.5))
        return f"{'m' if (value or 0) < 0 else 'p'}{size}"

    digits = min(max(2, 1 - math.floor(math.log10(most))), 4)

    def told(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:+.{digits}f}".replace("-", "−") if round(value, digits) else "0"

    rows = [
        {
            "client": table["client"][n],
            "cells": [(told(table["values"][n][c]), step(table["values"][n][c])) for c in columns],
        }
        for n in clients
    ]
    shown = {"clients": (len(clients), table["of"]), "classes": (len(columns) - 1, C - 1)}
    return _heat([table["class"][c] for c in columns[1:]], rows, shown)


def _heat(classes: list[str], rows: list[dict[str, Any]], shown: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """A heat map; the names of its columns stand upright where they are long."""
    return {"classes": classes, "rows": rows, "shown": shown, "upright": max(map(len, classes), default=0) > 4}


def whole_view(content: Content) -> list[tuple[str, str, Markup, str]] | None:
    """Of the whole run a row per client: its id, mean contribution, a bar, and how often first."""
    table = content["whole_run"]
    if not table:
        return None
    most = max(abs(value or 0) for value in table["contribution"])
    columns = zip(*(table[name] for name in ("client", "contribution", "first", "inputs")), strict=True)
    return [(who, number(c, True), bar(c or 0, most), f"{first} of {inputs}") for who, c, first, inputs in columns][
        :MOST_ROWS
    ]
