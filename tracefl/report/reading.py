"""The data of a page, read back from report.html."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tracefl.errors import as_sentence, require

FORMAT = 1
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Report:
    """What a page holds. Numbers have the digits that the page has: five.

    Attributes:
        content: all of it, as the page's JSON.
        verdict: of verdict.json; None where there is none.
        rounds: a row per round.
        clients: a row per client: client, fault, examples, rounds.
        label_counts: examples that clients train on, clients by classes; missing where not known.
        class_by_client: clients by "all" and classes; None without a verdict. Of more than
            20,000 numbers the clients that change a class most.
        predictions: a row per (round, method, input, client): label, predicted, rank, contribution,
            named (whether it is in the answer set), and standard_error where it is known.
        layers: a row per (round, method, input, layer) of the first client: contribution.
        inputs: input -> {"picture": PNG in base64} or {"text": ...}.
    """

    content: dict[str, Any]
    verdict: dict[str, Any] | None
    rounds: pd.DataFrame
    clients: pd.DataFrame
    label_counts: pd.DataFrame
    class_by_client: pd.DataFrame | None
    predictions: pd.DataFrame
    layers: pd.DataFrame
    inputs: dict[int, dict[str, str]]


def read(path: str | Path) -> Report:
    """The data of a run's page.

    Args:
        path: a report.html that `write_page` made, or the folder that holds it.

    Returns:
        Verdict, rounds, clients, predictions and layers as tables; see `Report`.

    Raises:
        TraceFLError: there is no such file, or it is no page of ours.
    """
    file = Path(path)
    file = file / "report.html" if file.is_dir() else file
    with as_sentence(f"{file} cannot be read", "give a run's report.html", OSError, UnicodeDecodeError):
        found = DATA.search(file.read_text("utf-8"))
    require(found, f"{file} is no page of a run: give a report.html that tracefl wrote")
    with as_sentence(f"the data of {file} are damaged", "write the page again", ValueError, KeyError, TypeError):
        content = json.loads(found.group(1) if found else "")
        known = content["format"] == FORMAT
        require(known, f"{file} has format {content['format']!r}, known is {FORMAT}: write the page again")
        return _report(content)


def _report(content: dict[str, Any]) -> Report:
    clients, classes = pd.DataFrame(content["clients"]), content["classes"]
    held = [counts or [None] * len(classes) for counts in content["label_counts"]]
    counts = pd.DataFrame(held, index=pd.Index(clients["client"]), columns=classes).convert_dtypes()
    values, table = content["class_by_client"], None
    if values:
        table = pd.DataFrame(values["values"], index=pd.Index(values["client"], name="client"), columns=values["class"])
    names, layers = content["layers"], list[tuple[Any, ...]]()
    for one in content["predictions"]:
        layers += [(one["r"], one["m"], one["i"], names[n], value) for n, value in one.get("l", [])]
    return Report(
        content=content,
        verdict=content["verdict"],
        rounds=pd.DataFrame(content["rounds"]),
        clients=clients,
        label_counts=counts,
        class_by_client=table,
        predictions=_predictions(content),
        layers=pd.DataFrame(layers, columns=["round", "method", "input", "layer", "contribution"]),
        inputs={int(row): told for row, told in content["inputs"].items()},
    )


def _predictions(content: dict[str, Any]) -> pd.DataFrame:
    ids, rows = content["clients"]["client"], list[dict[str, Any]]()
    for one in content["predictions"]:
        whose = {"round": one["r"], "method": one["m"], "input": one["i"], "label": one["y"], "predicted": one["p"]}
        for place, who in enumerate(one["c"]):
            row = {"client": ids[who], "rank": place + 1, "contribution": one["v"][place], "named": place in one["in"]}
            error = {"standard_error": one["e"][place]} if "e" in one else {}
            rows.append(whose | row | error)
    columns = [*("round", "method", "input", "label", "predicted", "client", "rank", "contribution", "named")]
    return pd.DataFrame(rows, columns=None if rows else columns)
