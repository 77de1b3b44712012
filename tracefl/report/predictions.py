"""The traced predictions of a run as the page's data: who contributed what, through which layers.

A prediction is {"r": round, "m": method, "i": input, "y": true class, "p": predicted class,
"c": clients by rank (numbers in the page's list of clients), "v": their contributions, "e": their
standard errors, "set": how many are not told apart and are named, "in": which of "c" they are,
"k": how many clients there are, "rest": the sum over those that are left out of "c", "s": what the
server added, "n": what its noise added, "l": [layer's number, contribution] of the first client,
"lk": through how many layers, "lrest": the sum over those left out}. What is not known is left out.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tracefl.errors import require
from tracefl.evidence.answers import members
from tracefl.report.words import show

WHOLE_ANSWERS = "provenance.parquet is not a table of whole answers: run the same command again"
WHOLE = "replay"  # the method of whole_run.parquet
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Depth:
    """How much of a prediction is told: of so many clients and layers, in so many colours."""

    clients: int
    layers: int
    colours: int
    letters: int


DEPTHS = (Depth(1000, 8, 256, 1200), Depth(10, 5, 16, 400), Depth(5, 2, 16, 200))


def predictions(
    answers: pd.DataFrame, layers: pd.DataFrame | None, clients: Sequence[str], names: Sequence[str], depth: Depth
) -> list[Prediction]:
    """All predictions, as the table has them.

    Args:
        answers: with the columns of `tracing.COLUMNS`.
        layers: with those of `tracing.LAYER_COLUMNS`, if they are recorded.
        clients: ids of all clients.
        names: of all layers.
        depth: how much is told of each.

    Raises:
        TraceFLError: the table is not one of whole answers.
    """
    through = _by_prediction(layers, {name: n for n, name in enumerate(names)})
    found = list[Prediction]()
    number = {client: n for n, client in enumerate(clients)}
    for _, part in answers.groupby(["round", "method"], sort=False):
        t, method = int(part["round"].iloc[0]), str(part["method"].iloc[0])
        for one in _answers(part, number, depth):
            one |= {"r": t, "m": method}
            found.append(one | _layers(through.get((one["r"], one["m"], one["i"]), []), depth.layers))
    return found


@dataclass(frozen=True)
class Answers:
    """The answers of a method to the N predictions of a round that it traced.

    Attributes:
        clients: ids of the K clients, in the table's order.
        first: of every prediction its first row.
        values: contributions, [N, K].
        errors: their standard errors, [N, K]; None if they are not known.
        named: who is in the answer, [N, K].
    """

    clients: list[str]
    first: pd.DataFrame
    values: np.ndarray
    errors: np.ndarray | None
    named: np.ndarray


def whole_answers(part: pd.DataFrame) -> Answers:
    """The answers in a table's rows of one round and method.

    Raises:
        TraceFLError: they are not whole.
    """
    ids = part["client"].drop_duplicates().tolist()
    K = len(ids)
    require(len(part) % K == 0 and part["client"].tolist() == ids * (len(part) // K), WHOLE_ANSWERS)
    values = part["contribution"].to_numpy(float).reshape(-1, K)
    errors = part["standard_error"].to_numpy(float).reshape(-1, K) if "standard_error" in part else None
    errors = None if errors is None or np.isnan(errors).any() else errors
    first = part.iloc[::K]
    known = np.isfinite(values).all()
    named = members(values, first["predicted"].tolist(), errors) if known else np.zeros(values.shape, dtype=bool)
    return Answers(ids, first, values, errors, named)


def _answers(part: pd.DataFrame, number: dict[str, int], depth: Depth) -> Iterator[Prediction]:
    """The predictions of a round that a method traced."""
    found = whole_answers(part)
    ids, values, errors, named, K = found.clients, found.values, found.errors, found.named, len(found.clients)
    require(set(ids) <= number.keys(), f"{WHOLE_ANSWERS} with check_prov_cache=false")
    for n, row in enumerate(found.first.to_dict("records")):
        order = np.argsort(-values[n], kind="stable")
        shown, rest = order[: depth.clients], order[depth.clients :]
        one: Prediction = {"i": int(row["input"]), "y": int(row["label"]), "p": int(row["predicted"]), "k": K}
        one |= {"c": [number[ids[k]] for k in shown], "v": [short(values[n, k]) for k in shown]}
        one |= {"set": int(named[n].sum()), "in": [place for place, k in enumerate(shown) if named[n, k]]}
        if errors is not None:
            one["e"] = [short(errors[n, k]) for k in shown]
        if len(rest):
            one["rest"] = short(values[n, rest].sum())
        yield one | {key: short(row[name]) for key, name in (("s", "server"), ("n", "noise")) if pd.notna(row[name])}


def _by_prediction(
    layers: pd.DataFrame | None, number: dict[str, int]
) -> dict[tuple[int, str, int], list[tuple[int, float]]]:
    if layers is None or layers.empty:
        return {}
    found: dict[tuple[int, str, int], list[tuple[int, float]]] = {}
    columns = [layers[name].tolist() for name in ("round", "method", "input", "layer", "contribution")]
    for t, method, row, layer, value in zip(*columns, strict=True):
        found.setdefault((t, method, row), []).append((number[layer], value))
    return found


def _layers(through: list[tuple[int, float]], most: int) -> Prediction:
    """The layers through which most comes, largest first."""
    if not through:
        return {}
    ordered = sorted(through, key=lambda layer: -abs(layer[1]))
    shown, rest = ordered[:most], ordered[most:]
    told: Prediction = {"l": [[number, short(value)] for number, value in shown], "lk": len(ordered)}
    return told | ({"lrest": short(sum(value for _, value in rest))} if rest else {})


def short(value: Any, digits: int = 5) -> float | None:
    """A number with five digits, or so many; None for what is not finite.

    Example:
        >>> short(0.123456789), short(float("nan"))
        (0.12346, None)
    """
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def rest_csv(left_out: Sequence[Prediction], clients: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Lines of a table of predictions: the client that contributes most to each."""
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\0").writerow
    write(["round", "method", "input", "true class", "predicted class", "client", "contribution"])
    for one in left_out:
        names = [cell(class_names[one["y"]]), cell(class_names[one["p"]]), cell(clients[one["c"][0]])]
        write([one["r"], one["m"], one["i"], *names, one["v"][0]])
    return file.getvalue().rstrip("\0").split("\0")


def cell(text: str) -> str:
    """A text for a table program, which would run one that starts as a formula does.

    Example:
        >>> cell("=1+1"), cell("cat")
        ("'=1+1", 'cat')
    """
    seen = show(text, 200)
    return f"'{seen}" if seen.lstrip().startswith(("=", "+", "-", "@")) or seen[:1] in ("\t", "\r") else seen
