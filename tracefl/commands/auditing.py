"""`tracefl audit`: the verdict on a recorded run, and what every client did."""

import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from rich.table import Table

from tracefl.commands.show import Answer, number, printable, table
from tracefl.commands.tracing import open_run
from tracefl.evidence.verdict import audit_run, judge
from tracefl.report.progress import bar
from tracefl.results import AUDIT, cached

MEANS = ("value", "aim", "agreement", "norm")  # over its rounds; see `verdict.COLUMNS`


def audit(folder: Path) -> Answer:
    """The verdict, and a judgement of every client.

    What the run's own audit has left is taken; else it is made, and left there if the folder can be
    written to.

    Raises:
        TraceFLError: there is no round, or one cannot be audited.
    """
    run = open_run(folder)

    def make() -> pd.DataFrame:
        with bar("auditing rounds", len(run.kept_rounds)) as done:
            return audit_run(run, on_round=done)

    audited = cached(run, AUDIT, [], make) if os.access(folder, os.W_OK) else make()
    names = [str(name) for name in run["class_names"]]
    verdict, columns = judge(audited, names), [*MEANS, *(f"value_{c}" for c in range(len(names)))]
    means = audited.groupby("client", sort=False)[columns].mean().to_dict("index")
    clients = [
        {"client": who, "faulty": who in verdict.faulty, "why": found.why, "z": found.z, "rounds": found.rounds}
        | {name: means[who][name] for name in MEANS}
        | {"by_class": {name: means[who][f"value_{c}"] for c, name in enumerate(names)}}
        for who, found in verdict.clients.items()
    ]
    rounds = [record.number for record in run.kept_rounds]
    lines = {"faulty": verdict.faulty, "verdict": verdict.lines()}
    return {"run": str(folder), "rounds": rounds, **lines, "clients": clients}


def tables(found: Answer) -> Iterator[Table | str]:
    """The answer of `audit` for people."""
    yield from (printable(line) for line in found["verdict"])
    columns = ["client", "judged", "loss\nwithout it", "z", "aim", "agreement", "norm", "rounds"]
    rows = [
        [
            *(client["client"], "faulty" if client["faulty"] else "-", number(client["value"], "+.3g")),
            *(number(client[name], ".2f") for name in ("z", "aim", "agreement", "norm")),
            client["rounds"],
        ]
        for client in sorted(found["clients"], key=lambda client: (not client["faulty"], client["value"]))
    ]
    yield "What every client did, mean over its rounds"
    yield table(columns, rows, words=("client", "judged"))
    yield "Loss without it: by how much the loss would rise if the client were left out; negative: it does harm."
