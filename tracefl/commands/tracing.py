"""`tracefl trace`: who is responsible for one prediction of a recorded run."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import pad

from tracefl.classifier import logits_of
from tracefl.commands.show import Answer, number, printable, table
from tracefl.data.examples import Inputs
from tracefl.errors import TraceFLError, require
from tracefl.evaluation.own import image_inputs, text_inputs
from tracefl.evaluation.recorded import server_inputs
from tracefl.evaluation.tracing import at_even_distances
from tracefl.provenance import Provenance
from tracefl.report.predictions import whole_answers
from tracefl.report.progress import bar
from tracefl.report.words import LOG_ODDS, MEANING, NO_DIFFERENCE
from tracefl.results import PROVENANCE, of_this_run
from tracefl.runs import Run

BESIDE = 19  # predictions of the same class that are traced too, to tell what chance does
SHOWN_CLIENTS, SHOWN_LABELS = 20, 3


@dataclass(frozen=True)
class Asked:
    """The input that is asked about: one of these is given."""

    index: int | None = None
    image: Path | None = None
    text: str | None = None
    file: Path | None = None  # of the text


def trace(
    folder: Path, asked: Asked, round: int | None, method: str, evaluations: int | None, target: str | None
) -> Answer:
    """The answer for one prediction.

    Args:
        folder: the run's.
        asked: the input.
        round: whose model it is; None: the last one's.
        method: as in `tracefl.trace`.
        evaluations: of "shapley", as there.
        target: the class to explain, its name or number; None: the predicted one.

    Raises:
        TraceFLError: as of `Run.trace`; the input cannot be read; there is no such class.
    """
    run = open_run(folder)
    round = len(run.rounds) if round is None else round
    run.round(round)
    names = [str(name) for name in run["class_names"]]
    inputs, of_input = _inputs(run, round, asked)
    model = run.model(round)
    with torch.no_grad():
        chances = logits_of(model, inputs)[0].softmax(0)
    predicted = int(chances.argmax())
    explained = predicted if target is None else class_number(target, names)
    found, named, named_by = _explained(run, round, model, inputs, explained, asked, method, evaluations)
    if evaluations is None and asked.index is not None and explained == predicted:
        named, named_by = _as_recorded(run, round, asked.index, found) or (named, named_by)
    label = None if asked.index is None else names[int(run.server_examples().labels[asked.index])]
    about = {"label": label, "predicted": names[predicted], "explained": names[explained]}
    how = {"probability": float(chances[explained]), "method": method, "evaluations": evaluations}
    return {
        **{"run": str(folder), "round": round, "input": of_input},
        **about,
        **how,
        "clients": _clients(run, found, names, names[explained]),
        "set": named,
        "set_from": named_by,
        "server": None if found.residual is None else float(found.residual[0]),
    }


def tables(found: Answer) -> Iterator[Table | str]:
    """The answer of `trace` for people."""
    of_input, explained, clients = found["input"], found["explained"], found["clients"]
    yield printable(f"{found['run']}, round {found['round']}: {_described(of_input)}")
    label = "" if found["label"] is None else f"true class {found['label']}, "
    chance = f"class {explained} has probability {found['probability']:.2f}"
    yield printable(f"{label}predicted {found['predicted']}; {chance}")
    columns = ["rank", "client", "contribution", "standard\nerror", f"examples\nof {explained}", "all its labels"]
    rows = [_row(client) for client in clients[:SHOWN_CLIENTS]]
    if all(client["standard_error"] is None for client in clients):
        columns, rows = _without(3, columns), [_without(3, row) for row in rows]
    if any(client["fault"] for client in clients):
        columns, rows = [*columns, "fault"], [[*row, c["fault"] or ""] for row, c in zip(rows, clients, strict=False)]
    title = f"Who is behind class {explained}, by {found['method']}"
    yield printable(title)
    yield table(columns, rows, words=("client", "all its labels", "fault"))
    if len(clients) > SHOWN_CLIENTS:
        yield f"... and {len(clients) - SHOWN_CLIENTS} more clients (--json has all)"
    yield f"A contribution is {MEANING[found['method']]}."
    yield printable(_set_line(found))
    if found["server"] is not None and found["method"] != "shapley":
        most = max(abs(client["contribution"]) for client in clients)
        more = ", more than any client" if abs(found["server"]) > most else ""
        yield f"What the server itself added: {found['server']:+.3g}{more}"


def open_run(folder: Path) -> Run:
    """A run with rounds, whose model is known.

    Raises:
        TraceFLError: it is one of an own Flower app, or has no complete round.
    """
    run = Run.open(folder)
    own = f"{run.path} was recorded by an own Flower app, which alone knows how its model is built"
    require("model" in run, f"{own}: ask in Python, by tracefl.Run.open and model=")
    require(run.rounds, f"{run.path} has no complete round: train it first")
    return run


def class_number(target: str, names: list[str]) -> int:
    """The number of a class that is given by name or, where no class is called so, by number.

    Raises:
        TraceFLError: there is none.

    Example:
        >>> class_number("dog", ["cat", "dog"]), class_number("0", ["cat", "dog"])
        (1, 0)
    """
    if target in names:
        return names.index(target)
    if target.isdecimal() and int(target) < len(names):
        return int(target)
    known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise TraceFLError(f"target must be a class of the run, {known}, or its number from 0, got {target!r}: name one")


def _inputs(run: Run, round: int, asked: Asked) -> tuple[Inputs, Answer]:
    """The one input, and what to say of it."""
    if asked.index is not None:
        return server_inputs(run, round, asked.index), {"index": asked.index}
    if asked.image is not None:
        return image_inputs(run, asked.image), {"image": str(asked.image)}
    text = asked.text if asked.file is None else _read(asked.file)
    inputs, left_out = text_inputs(run, text or "")
    return inputs, {"text": text, "tokens": inputs["input_ids"].shape[1], "tokens_left_out": left_out}


def _read(file: Path) -> str:
    """A text file without its last line breaks."""
    try:
        return file.read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise TraceFLError(f"{file} cannot be read ({reason}): give a text file in UTF-8") from error


def _explained(
    run: Run, round: int, model: nn.Module, inputs: Inputs, explained: int, asked: Asked, method: str,
    evaluations: int | None,
) -> tuple[Provenance, list[str] | None, str | None]:  # fmt: skip
    """The answer, its first input the one that is asked about; its set, and where that is from.

    Without standard errors a set takes other predictions of the class, which are traced beside it.
    """
    others = _others(run, round, explained, asked.index)
    K = sum(client.weight > 0 for client in run.round(round).clients)
    fewest = min(2 * K + 2, 2**K)
    drawn = method == "shapley" and evaluations not in (None, fewest)
    if not drawn and others:
        inputs = _together(inputs, server_inputs(run, round, others), run["model"].get("pad_token_id", 0))
    N = 1 if drawn else 1 + len(others)
    options: dict[str, Any] = {"targets": [explained] * N, "method": method}
    if method == "shapley":
        with bar("fusing coalitions", evaluations or fewest) as done:
            found = run.trace(inputs=inputs, round=round, model=_told(model, done), evaluations=evaluations, **options)
    else:
        with bar("tracing"):
            found = run.trace(inputs=inputs, round=round, model=model, **options)
    if found.standard_error is not None and not found.standard_error.isnan().any():
        return found, found.sets().sets[0], "standard errors"
    if N == 1:
        return found, None, None
    return found, found.sets().sets[0], f"{N - 1} other predictions of the class"


def _as_recorded(run: Run, round: int, index: int, found: Provenance) -> tuple[list[str], str] | None:
    """The set of an answer that the run has traced, and where it is from, as on its page."""
    table = of_this_run(run, PROVENANCE)
    if table is None:
        return None
    part = table[(table["round"] == round) & (table["method"] == found.method)]
    rows = part[part["input"] == index].set_index("client")["contribution"]
    if rows.empty or set(rows.index) != set(found.client_ids):
        return None
    fresh = found.contributions[0].numpy()
    if not np.allclose(rows[found.client_ids], fresh, rtol=0, atol=1e-3 * abs(fresh).max()):
        return None  # other inputs, as with a backdoor's trigger
    recorded = whole_answers(part)
    (n,) = np.flatnonzero(recorded.first["input"] == index)
    order = np.argsort(-recorded.values[n], kind="stable")
    named = [recorded.clients[k] for k in order if recorded.named[n, k]]
    others = f"{len(recorded.first) - 1} other predictions traced in the round"
    return named, others if recorded.errors is None else "standard errors"


def _told(model: nn.Module, done: Callable[[], None]) -> nn.Module:
    """A model that says when it has run: coalitions are played on copies of it."""
    model.register_forward_hook(lambda *_: done())
    return model


def _others(run: Run, round: int, explained: int, index: int | None) -> list[int]:
    """Some of the server's examples that are predicted as this class, but not the one itself."""
    rows = [row for row in (run.predictions(round) == explained).nonzero()[:, 0].tolist() if row != index]
    return [rows[i] for i in at_even_distances(len(rows), BESIDE).tolist()] if rows else []


def _together(one: Inputs, others: Inputs, pad_token: int) -> Inputs:
    """Inputs one after the other; texts are padded to the longest."""
    if isinstance(one, Tensor) and isinstance(others, Tensor):
        return torch.cat([one, others])
    assert isinstance(one, dict)
    assert isinstance(others, dict)
    longest = max(part["input_ids"].shape[1] for part in (one, others))
    fill = {"input_ids": pad_token, "attention_mask": 0}
    return {
        name: torch.cat([pad(part[name], (0, longest - part[name].shape[1]), value=value) for part in (one, others)])
        for name, value in fill.items()
    }


def _clients(run: Run, found: Provenance, names: list[str], explained: str) -> list[Answer]:
    """Every client of the round, the largest contribution first."""
    infos = {client.id: client for client in run.clients}
    errors = None if found.standard_error is None else found.standard_error[0].tolist()
    clients = []
    for rank, (who, contribution, score) in enumerate(found.ranking(0), 1):
        counts = {names[label]: n for label, n in infos[who].trained_label_counts.items()}
        error = None if errors is None else _known(errors[found.client_ids.index(who)])
        clients.append({
            "rank": rank, "client": who, "contribution": contribution, "standard_error": error, "score": score,
            "examples_of_class": counts.get(explained, 0), "label_counts": counts, "fault": infos[who].fault,
        })  # fmt: skip
    return clients


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _row(client: Answer) -> list[Any]:
    most = Counter[str](client["label_counts"]).most_common()
    labels = ", ".join(f"{name}: {n}" for name, n in most[:SHOWN_LABELS])
    more = f", {len(most) - SHOWN_LABELS} more" if len(most) > SHOWN_LABELS else ""
    share, error = number(client["contribution"], "+.4g"), number(client["standard_error"])
    return [client["rank"], client["client"], share, error, client["examples_of_class"], labels + more or "-"]


def _without(place: int, row: list[Any]) -> list[Any]:
    return row[:place] + row[place + 1 :]


def _described(of_input: Answer) -> str:
    if "index" in of_input:
        return f"example {of_input['index']} of the server"
    if "image" in of_input:
        return of_input["image"]
    cut = f", {of_input['tokens_left_out']} more are cut off as in training" if of_input["tokens_left_out"] else ""
    return f"a text of {of_input['tokens']} tokens{cut}"


def _set_line(found: Answer) -> str:
    """Who cannot be told from the first."""
    if len(found["clients"]) == 1:
        return f"c{found['clients'][0]['client']} alone took part."
    if not any(client["contribution"] for client in found["clients"]):
        return f"{NO_DIFFERENCE}."
    if found["set"] is None:
        known = "no other prediction of the class shows what chance does"
        return f"Who cannot be told from the first is not known, {known}: --method shapley --evaluations 100 says it."
    how = f"with confidence 0.9, by {found['set_from']}"
    if not found["set"]:
        return f"Nobody stands apart: all clients may be behind it ({how})."
    first, *rest = [f"c{who}" for who in found["set"]]
    told = f"{', '.join(rest)} cannot be told from it" if rest else "no other client comes near"
    if found["clients"][0]["contribution"] <= 0 and found["method"] in LOG_ODDS:
        return f"No client adds to the class; {first} takes least from it, {told} ({how})."
    return f"First is {first}; {told} ({how})."
