"""`tracefl whatif`: a recorded model and its predictions without some of the clients."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from tracefl.commands.show import Answer, printable, share, table
from tracefl.commands.tracing import open_run
from tracefl.evidence.whatif import removal_lines
from tracefl.evidence.whatif import whatif as without_clients
from tracefl.report.progress import bar


def whatif(folder: Path, without: list[str], round: int | None, since: int | None, memory: float) -> Answer:
    """What a model predicts with and without some clients.

    Args:
        folder: the run's.
        without: ids of the clients; "c3", as the log writes it, stands for "3" if no client is
            called so.
        round: as of `tracefl.whatif`, like `since` and `memory`.

    Raises:
        TraceFLError: as of `tracefl.whatif`.
    """
    run = open_run(folder)
    known = {client.id for client in run.clients}
    ids = [who[1:] if who not in known and who[:1] == "c" and who[1:] in known else who for who in without]
    with bar("fusing the rounds without them"):
        found = without_clients(run, list(dict.fromkeys(ids)), round=round, since=since, memory=memory)
    by_class = [{str(key): value for key, value in row.items()} for row in found.to_frame().to_dict("records")]
    return {"run": str(folder), **found.as_json(), "memory": memory, "lines": list(removal_lines(found)),
            "by_class": by_class}  # fmt: skip


def tables(found: Answer) -> Iterator[Table | str]:
    """The answer of `whatif` for people."""
    yield from (printable(line) for line in found["lines"])
    columns = ["class", "examples", "accuracy", "without", "become\nright", "become\nwrong"]
    rows = [
        [
            *(of["name"], of["examples"], share(of["accuracy_before"]), share(of["accuracy_after"])),
            *(of["righted"], of["wronged"]),
        ]
        for of in found["by_class"]
    ]
    counts = [sum(of[name] for of in found["by_class"]) for name in ("examples", "righted", "wronged")]
    total = ["all", counts[0], share(found["accuracy_before"]), share(found["accuracy_after"]), *counts[1:]]
    yield "By class, in %"
    yield table(columns, [*rows, total], words=("class",))
