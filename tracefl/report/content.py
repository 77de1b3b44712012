"""What a run's page holds, as plain JSON: gathered from the run's folder."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from yaml import YAMLError

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.evidence.verdict import FEWEST_CLIENTS
from tracefl.report.commands import run_command
from tracefl.report.predictions import short
from tracefl.results import (
    AUDIT,
    CLASS_BY_CLIENT,
    CONFIG,
    LAYERS,
    PROVENANCE,
    ROUNDS,
    VERDICT,
    WHOLE_RUN,
    content_of,
    of_this_run,
)
from tracefl.runs import Run

FORMAT = 1
MOST_VALUES = 20_000  # of clients for classes
Columns = dict[str, list[Any]]


class Gathered:
    """A run with its tables.

    Attributes:
        run: the recorded run.
        settings: config.yaml; empty for a run of an own Flower app.
        content: the page's data but the predictions and their inputs.
        answers: the rows of provenance.parquet and whole_run.parquet; None if nothing is traced.
        layers: layers.parquet, if it is there.
    """

    def __init__(self, folder: Path) -> None:
        self.run = Run.open(folder)
        self.settings = _settings(folder)
        self.layers, self.whole = of_this_run(self.run, LAYERS), _filled(of_this_run(self.run, WHOLE_RUN))
        self.answers = _filled(of_this_run(self.run, PROVENANCE))
        if self.answers is not None and self.whole is not None:
            self.answers = pd.concat([self.answers, self.whole], ignore_index=True)
        elif self.answers is None:
            self.answers = self.whole
        self.clients = _ids(self.run)
        self.class_names = _class_names(self.run, self.answers)
        self.layer_names = [] if self.layers is None or self.layers.empty else list(dict.fromkeys(self.layers["layer"]))
        self.content = self._content(folder)

    @property
    def backdoor(self) -> bool:
        """Whether the inputs were traced with a backdoor's trigger on them."""
        return bool(self.settings.get("faulty_clients_ids")) and _at(self.settings, "fault.kind") == "backdoor"

    def _content(self, folder: Path) -> dict[str, Any]:
        run = self.run
        return {
            "format": FORMAT,
            "run": _about(run, self.settings, folder),
            "command": run_command(self.settings) if self.settings else None,
            "folder": str(folder),
            "classes": self.class_names,
            "clients": _clients(run, self.clients),
            "label_counts": _counts(run, self.clients, len(self.class_names)),
            "rounds": _rounds(run, folder),
            "verdict": _verdict(folder),
            "evidence": _evidence(of_this_run(run, AUDIT)),
            "class_by_client": _class_by_client(folder),
            "layers": self.layer_names,
            "whole_run": _whole(self.whole),
        }


def _filled(table: pd.DataFrame | None) -> pd.DataFrame | None:
    return table if table is not None and len(table) else None


def _settings(folder: Path) -> dict[str, Any]:
    file, content = folder / CONFIG, content_of(folder, CONFIG)
    if content is None:
        return {}
    with as_sentence(f"{file} cannot be read", "run the same command again", OSError, YAMLError, ValueError):
        found: Any = OmegaConf.to_container(OmegaConf.create(content.decode()))
    require(isinstance(found, dict), f"{file} holds no settings: run the same command again")
    return found


def _at(settings: Mapping[str, Any], key: str) -> Any:
    group, _, name = key.rpartition(".")
    section = settings.get(group, {}) if group else settings
    return section.get(name) if isinstance(section, dict) else None


def _about(run: Run, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What was run, in words and numbers."""
    keys = {"dataset": "dataset.name", "model": "model.name", "strategy": "strategy.name", "fault": "fault.kind"}
    about = {name: _at(settings, key) for name, key in keys.items()}
    if not settings.get("faulty_clients_ids"):
        about["fault"] = None
    about |= {"name": folder.resolve().name, "seed": _header(run, "seed", None)}
    about |= {"own_app": not settings and "model" not in run}
    about |= {"versions": _header(run, "versions", {}), "rounds": len(run.rounds)}
    about |= {"kept": [record.number for record in run.kept_rounds], "storage": dict(run.storing.as_json())}
    return about | {"faulty": [str(who) for who in settings.get("faulty_clients_ids") or []]}


def _header(run: Run, key: str, missing: Any) -> Any:
    """An entry of run.json, which an own app's may lack."""
    return run[key] if key in run else missing  # noqa: SIM401 (a run has no get)


def _ids(run: Run) -> list[str]:
    """All clients that are known or took part."""
    took_part = [client.id for record in run.rounds for client in record.clients]
    return list(dict.fromkeys([*(client.id for client in run.clients), *took_part]))


def _class_names(run: Run, answers: pd.DataFrame | None) -> list[str]:
    """The run's; numbers where it has none."""
    names = [str(name) for name in _header(run, "class_names", [])]
    labels = [label for client in run.clients for label in (*client.label_counts, *client.trained_label_counts)]
    if answers is not None:
        labels += [int(answers[column].max()) for column in ("label", "predicted")]
    return names + [str(label) for label in range(len(names), max(labels, default=-1) + 1)]


def _clients(run: Run, ids: Sequence[str]) -> Columns:
    """Of every client its id, its fault by configuration, its examples and rounds."""
    known = {client.id: client for client in run.clients}
    rounds = dict.fromkeys(ids, 0)
    told = dict.fromkeys(ids, 0)
    for record in run.rounds:
        for client in record.clients:
            rounds[client.id] += 1
            told[client.id] = max(told[client.id], client.num_examples)
    sizes = {who: sum(known[who].label_counts.values()) if who in known else 0 for who in ids}
    return {
        "client": list(ids),
        "fault": [known[who].fault if who in known else None for who in ids],
        "examples": [sizes[who] or told[who] or None for who in ids],
        "rounds": [rounds[who] for who in ids],
    }


def _counts(run: Run, ids: Sequence[str], num_classes: int) -> list[list[int] | None]:
    """Of every client the examples of each class that it trains on; None where it is not known."""
    held = {client.id: client.trained_label_counts for client in run.clients}
    known = {who: counts for who, counts in held.items() if counts}
    return [[known[who].get(label, 0) for label in range(num_classes)] if who in known else None for who in ids]


def _rounds(run: Run, folder: Path) -> Columns:
    """rounds.csv; of a run without it the loss and accuracy that are recorded."""
    table = _read_csv(folder, ROUNDS)
    if table is None or "round" not in table or len(table) != len(run.rounds):
        names = ("loss", "accuracy")
        found = {"round": [record.number for record in run.rounds]}
        table = pd.DataFrame(found | {name: [getattr(record, name) for record in run.rounds] for name in names})
    if table["accuracy"].isna().all():
        table = table.join(_told(run))
    table["participants"] = [len(record.clients) for record in run.rounds]
    table["failures"] = [len(record.failures) for record in run.rounds]
    return columns(table.dropna(axis=1, how="all") if len(table) else table)


def _told(run: Run) -> pd.DataFrame:
    """What the clients of every round told of their training and tests: the numbers, by name."""
    rows = [
        {
            f"{kind}: {name}": value
            for kind, found in record.metrics.items()
            for name, value in (found or {}).items()
            if isinstance(value, int | float)
        }
        for record in run.rounds
    ]
    return pd.DataFrame(rows, index=range(len(rows))).astype(float)


def _read_csv(folder: Path, name: str) -> pd.DataFrame | None:
    """A table of ours; None if it is not there, or holds only a head."""
    if (content := content_of(folder, name)) is None:
        return None
    wrong = (OSError, ValueError, csv.Error)
    with as_sentence(f"{folder / name} cannot be read", "remove it, and run the same command again", *wrong):
        table = pd.read_csv(io.BytesIO(content), dtype={"client": str}, keep_default_na=False, na_values=[""])
    return table.fillna({"client": ""})  # an id like any other


def columns(table: pd.DataFrame) -> Columns:
    """Name -> values as JSON has them; numbers that are not finite are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) and value == int(value) else short(value)
        return value

    return {str(name): [plain(value) for value in table[name].tolist()] for name in table.columns}


def _verdict(folder: Path) -> dict[str, Any] | None:
    """verdict.json, if there is one."""
    file, content = folder / VERDICT, content_of(folder, VERDICT)
    if content is None:
        return None
    remedy = "remove it, and run the same command again"
    with as_sentence(f"{file} cannot be read", remedy, OSError, ValueError):
        found = json.loads(content)
    whole = isinstance(found, dict) and isinstance(found.get("faulty"), list) and isinstance(found.get("clients"), dict)
    if not whole:
        raise TraceFLError(f"{file} is no verdict: {remedy}")
    return found


def _evidence(audited: pd.DataFrame | None) -> Columns | None:
    """Per client: the means over the rounds with enough clients of what the verdict looks at."""
    if audited is None or audited.empty:
        return None
    enough = audited[audited.groupby("round")["client"].transform("count") >= FEWEST_CLIENTS]
    audited = enough if len(enough) else audited
    length = audited["norm"] / audited.groupby("round")["norm"].transform("median")
    names = ["aim", "agreement", "value"]
    means = audited.assign(length=length).groupby("client", sort=False)[[*names, "length"]].mean()
    return columns(means.reset_index().astype({"client": str}))


def _class_by_client(folder: Path) -> dict[str, Any] | None:
    """class_by_client.csv; of many clients those that change a class most."""
    file, content = folder / CLASS_BY_CLIENT, content_of(folder, CLASS_BY_CLIENT)
    if content is None:
        return None
    remedy = "remove it, and run the same command again"
    with as_sentence(f"{file} cannot be read", remedy, OSError, ValueError, IndexError, csv.Error):
        csv.field_size_limit(1 << 30)
        head, *rows = csv.reader(io.StringIO(content.decode(), newline=""))
        numbers = [[float(value) if value else math.nan for value in row[1:]] for row in rows]
    require(all(len(row) == len(head) for row in rows), f"{file} is no table: {remedy}")
    strength = [max((abs(value) for value in row if math.isfinite(value)), default=0.0) for row in numbers]
    kept = largest(dict(enumerate(strength)), max(20, MOST_VALUES // len(head)))
    values = [[short(value, 4) for value in numbers[n]] for n in kept]
    return {"client": [rows[n][0] for n in kept], "of": len(rows), "class": head[1:], "values": values}


def largest(sizes: Mapping[int, float], most: int) -> list[int]:
    """At most so many keys, those with the largest sizes, in their order.

    Example:
        >>> largest({0: 5, 1: 9, 2: 7}, 2)
        [1, 2]
    """
    kept = set(sorted(sizes, key=lambda key: -sizes[key])[:most])
    return [key for key in sizes if key in kept]


def _whole(answers: pd.DataFrame | None) -> Columns | None:
    """Of every client its mean contribution over the whole run, and how often it was first."""
    if answers is None:
        return None
    clients = answers.groupby("client", sort=False)
    table = clients.agg(contribution=("contribution", "mean"), first=("rank", lambda rank: int((rank == 1).sum())))
    table = table.sort_values("contribution", ascending=False).reset_index()
    return columns(table.assign(inputs=answers["input"].nunique()))
