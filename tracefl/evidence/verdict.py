"""The verdict: which clients of a recorded run are faulty, by what they did over all its rounds.

Nobody says who might be faulty or how many; the answer may be nobody. Every round is audited over
the server's labelled examples, and over the rounds a client is accused that

- sends back what it received: its updates are shorter than a tenth of the median client's,
- moves the model against the others: the median cosine of its update with theirs is negative, and
  its aim (`updates`) is below the median client's,
- teaches classes to the wrong inputs: its aim is low in three rounds of four, far below the median
  client's, and leaving it out would not cost more than leaving out others.

All three compare with the median client: they hold while more than half of the clients are honest.
A client that teaches a single class is accused of the third only where its aim is clearly negative,
or the loss would fall much without it: with nothing to tell its inputs from, an honest one may come
close to 0.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from tracefl.data.examples import Examples
from tracefl.errors import TraceFLError, require
from tracefl.evidence.audit import audit
from tracefl.models import load_exchanged_state
from tracefl.provenance.spread import Spread, here
from tracefl.runs import Run

MOST_EXAMPLES = 1000  # of the server's, drawn evenly from the classes
FEWEST_CLIENTS = 4  # in a round, to say what is usual
UNKNOWN = f"cannot be judged: a round needs at least {FEWEST_CLIENTS} clients to say what is usual"
SILENT = 0.1  # length of an update over that of the median client
AGAINST, AGAINST_APART = -0.05, 0.2  # median cosine with the others' updates; of an aim so far below the median's
LOW_AIM, LOW_AIM_OF_ONE_CLASS = 0.3, -0.25
ONE_CLASS = 1.5  # effective number of classes that are taught
APART = 0.4  # below the median client's aim
LOW_QUARTILE, FEWEST_ROUNDS = 0.4, 3  # upper quartile of a client's aims, over so many rounds at least
USEFUL, HARMFUL = -0.9, 2.0  # mean z of a client that the model would miss, and of one that it would not
MOST_Z = 5.0  # of one round, so that none decides alone

# One row per (round, client); `value_0`, `value_1`, ... by class follow: see `Audit`. `teaches` is
# the class that the client's training raises most, `taught_classes` how many it raises in effect.
COLUMNS = [
    *("round", "client", "weight", "value", "z", "norm", "cosine", "agreement", "aim", "teaches", "taught_classes")
]


@dataclass(frozen=True)
class Judgement:
    """What the rounds say of one client.

    Attributes:
        z: its robust z (`Audit.z`) of every round, at most 5, added up over √rounds.
        rounds: how many it took part in.
        why: the evidence for or against it, in one line.
    """

    z: float
    rounds: int
    why: str


@dataclass(frozen=True)
class Verdict:
    """Which clients are faulty: `faulty` holds their ids, `clients` a judgement of every one.

    Example:
        >>> from tracefl import Verdict
        >>> from tracefl.evidence.verdict import Judgement
        >>> found = Verdict(["3"], {"3": Judgement(5.4, 2, "sends back what it received")})
        >>> print(*found.lines(), sep="\\n")
        Verdict: 1 of 1 clients is faulty: c3
        c3 sends back what it received; z = 5.4 over 2 rounds
        >>> found.as_json()["faulty"]
        ['3']
    """

    faulty: list[str]
    clients: dict[str, Judgement]

    def lines(self) -> list[str]:
        """The verdict for people to read: one line, and one for each faulty client."""
        if all(found.why == UNKNOWN for found in self.clients.values()):
            return [f"Verdict: the clients {UNKNOWN}"]
        if not self.faulty:
            return [f"Verdict: none of the {len(self.clients)} clients stands apart"]
        names = ", ".join(f"c{who}" for who in self.faulty)
        are = "is" if len(self.faulty) == 1 else "are"
        lines = [f"Verdict: {len(self.faulty)} of {len(self.clients)} clients {are} faulty: {names}"]
        for who in self.faulty:
            found = self.clients[who]
            lines.append(f"c{who} {found.why}; z = {found.z:.1f} over {found.rounds} rounds")
        return lines

    def as_json(self) -> dict[str, object]:
        """The content of verdict.json, strict JSON: a z that is not known is null."""
        clients = {who: asdict(found) for who, found in self.clients.items()}
        for entry in clients.values():
            entry["z"] = round(entry["z"], 4) if np.isfinite(entry["z"]) else None
        return {"faulty": self.faulty, "clients": clients}


def audit_run(
    run: Run,
    *,
    model: nn.Module | None = None,
    examples: Examples | None = None,
    spread: Spread = here,
    on_round: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """Audit every round of a recorded run whose clients' states are there (storage.keep).

    Args:
        run: the recorded run.
        model: of the run's architecture, on the device to compute on; its weights are overwritten.
            Default: what the run knows of it.
        examples: labelled examples of the server, of which 1,000 at most are used; default: those
            of the run.
        spread: does parts of the work elsewhere; default: all here.
        on_round: called when a round is audited.

    Returns:
        A row per (round, client), from which `judge` makes the verdict: round, client, weight;
        value, z, norm, cosine, agreement, aim as of `Audit`; teaches, the class that the client's
        training raises most, and taught_classes, how many it raises in effect; value_0, value_1,
        ...: the values by class.

    Raises:
        TraceFLError: there is no round, or one cannot be audited, for example because a file is
            damaged.
    """
    require(run.rounds, f"{run.path} has no complete round to audit: train one")
    model = run.model(0) if model is None else model
    examples = run.server_examples() if examples is None else examples
    examples = examples[evenly(examples.labels, MOST_EXAMPLES)].to(next(model.parameters()).device)
    tables = []
    for record in run.kept_rounds:
        tables.append(_audit_round(run, record.number, model, examples, spread))
        on_round()
    return pd.concat(tables, ignore_index=True)


def judge(table: pd.DataFrame, class_names: Sequence[str] | None = None) -> Verdict:
    """The verdict that follows from the audits of a run's rounds.

    Args:
        table: of `audit_run`.
        class_names: how to call the classes; default: by their numbers.

    Returns:
        The faulty clients' ids, and a judgement of every client; see `Verdict`.

    Example:
        Client 3 of four sends back what it received:

        >>> import pandas as pd
        >>> from tracefl import judge
        >>> row = {"round": 1, "weight": 0.25, "value": 0.1, "z": 0.0, "norm": 1.0, "cosine": 0.5}
        >>> row |= {"agreement": 0.3, "aim": 0.9, "teaches": 0, "taught_classes": 3.0}
        >>> rows = [{**row, "client": who} for who in "012"] + [{**row, "client": "3", "norm": 0.0}]
        >>> judge(pd.DataFrame(rows)).faulty
        ['3']
    """
    took_part = table.groupby("client", sort=False)["round"].count()
    seen = _over_the_rounds(table)
    middle = seen["aim"].median()
    clients, faulty, enough = {}, [], len(seen) >= FEWEST_CLIENTS
    for who, of in seen.to_dict("index").items() if enough else ():
        name = str(of["teaches"]) if class_names is None else class_names[of["teaches"]]
        reasons = list(_reasons(of, middle, name))
        if reasons:
            faulty.append(str(who))
        usual = f"does not stand apart (aim {of['aim']:.2f}, agreement {of['agreement']:.2f})"
        clients[str(who)] = Judgement(float(of["z"]), int(of["rounds"]), ", and ".join(reasons) or usual)
    for who, rounds in took_part.items():
        clients.setdefault(str(who), Judgement(float("nan"), int(rounds), UNKNOWN))
    return Verdict(faulty, clients)


def _over_the_rounds(table: pd.DataFrame) -> pd.DataFrame:
    """One row per client, of the rounds that have enough clients to say what is usual."""
    rounds = table.groupby("round")
    table = table.assign(length=table["norm"] / rounds["norm"].transform("median"), z=table["z"].clip(-MOST_Z, MOST_Z))
    clients = table[rounds["client"].transform("count") >= FEWEST_CLIENTS].groupby("client", sort=False)
    z = clients["z"]
    return pd.DataFrame(
        {
            "length": clients["length"].median(),
            **{name: clients[name].mean() for name in ("agreement", "aim", "taught_classes")},
            "best_aim": clients["aim"].quantile(0.75),
            "teaches": clients["teaches"].agg(lambda classes: int(classes.mode()[0])),
            "z": z.sum() / np.sqrt(z.count().clip(lower=1)),
            "mean_z": z.mean(),
            "rounds": clients["round"].count(),
        }
    )


def _reasons(of: Mapping[Hashable, Any], middle: float, taught: str) -> Iterator[str]:
    """What speaks against a client, of whom `of` is a row of `_over_the_rounds`; may be nothing."""
    below = middle - of["aim"]
    if of["length"] < SILENT:
        share = f"length of its updates {of['length']:.2g} of the median client's"
        yield f"sends back what it received ({share})"
    alone = of["taught_classes"] < ONE_CLASS
    low = LOW_AIM_OF_ONE_CLASS if alone and of["mean_z"] <= HARMFUL else LOW_AIM
    always = of["best_aim"] < LOW_QUARTILE and of["rounds"] >= FEWEST_ROUNDS
    if always and of["aim"] < low and below > APART and of["mean_z"] > USEFUL:
        what = f"class {taught} to inputs of other classes" if alone else "classes to the wrong inputs"
        yield f"teaches {what} (aim {of['aim']:.2f}, the median client's {middle:.2f})"
    if of["agreement"] < AGAINST and below > AGAINST_APART:
        cosine = f"median cosine with their updates {of['agreement']:.2f}"
        yield f"moves the model against the others ({cosine})"


def verdict_json(verdict: Verdict, removal: dict[str, Any] | None = None) -> bytes:
    """The bytes of verdict.json.

    Args:
        verdict: of the run.
        removal: what leaving out the faulty clients would give (`WhatIf.as_json`), if it was tried.
    """
    content = verdict.as_json() if removal is None else {**verdict.as_json(), "removal": removal}
    return json.dumps(content, indent=1, allow_nan=False).encode()


def class_by_client(table: pd.DataFrame, class_names: Sequence[str]) -> pd.DataFrame:
    """Who makes the model good or bad at which class.

    Args:
        table: of `audit_run`.
        class_names: C names.

    Returns:
        A row per client: `all`, and a column per class, hold the mean of its values over the rounds
        it took part in: by how much leaving it out would raise the loss; negative: it does harm.
    """
    values = {"value": "all", **{f"value_{c}": name for c, name in enumerate(class_names)}}
    return table.groupby("client", sort=False)[list(values)].mean().set_axis(list(values.values()), axis=1)


def evenly(labels: Tensor, most: int) -> Tensor:
    """Rows of at most `most` examples: the first ones of every class, as many of each as there are.

    Example:
        >>> evenly(torch.tensor([0, 0, 0, 1, 0]), 3).tolist()
        [0, 1, 3]
    """
    if len(labels) <= most:
        return torch.arange(len(labels))
    place = torch.zeros(len(labels), dtype=torch.int64)  # of an example among those of its class
    for c in labels.unique():
        own = (labels == c).nonzero()[:, 0]
        place[own] = torch.arange(len(own))
    return torch.argsort(place, stable=True)[:most].sort().values


def _audit_round(run: Run, number: int, model: nn.Module, examples: Examples, spread: Spread) -> pd.DataFrame:
    weights: Mapping[str, float] = {client.id: client.weight for client in run.round(number).clients}
    try:
        load_exchanged_state(model, dict(run.global_state(number)))
        states, reference = run.client_states(number), run.global_state(number - 1)
        given: dict[str, Any] = {"weights": weights, "reference": reference, "aims": True, "spread": spread}
        found = audit(model, states, examples.inputs, examples.labels, **given)
    except TraceFLError as error:
        raise TraceFLError(f"round {number} cannot be audited: {error}") from error
    taught = torch.as_tensor(found.taught).clamp(min=0)
    columns = {
        **{"round": number, "client": found.client_ids, "weight": list(weights.values())},
        **{name: np.asarray(getattr(found, name)) for name in ("z", "agreement", "aim")},
        **{"value": np.asarray(found.values), "norm": np.asarray(found.norms), "cosine": np.asarray(found.cosines)},
        "teaches": np.asarray(taught.argmax(0)),
        "taught_classes": np.asarray(torch.exp(torch.special.entr(taught / taught.sum(0)).sum(0))),
    }
    by_class = {f"value_{c}": values.numpy() for c, values in enumerate(found.by_class)}
    return pd.DataFrame(columns)[COLUMNS].assign(**by_class)
