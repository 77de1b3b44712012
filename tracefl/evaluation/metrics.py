"""The metrics of a run as tidy rows, one number each: (round, method, metric, value, chance).

    method         metrics
    global model   loss, accuracy
    neuron, ...    those of `localize`; with faulty clients those of `name_faulty`, and seconds
    influence      also server_share and noise_share
    FedDebug       found, seconds

`wide` gives them the column names of rounds.csv.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from tracefl.evaluation.localization import NAN, Judged, localize, name_faulty
from tracefl.runs import Round, Run

MODEL = "global model"
# Column in rounds.csv of a metric's value and of its chance level.
# Any other metric is called as it is and has no column for chance.
COLUMNS = {
    "localization": ("localization_accuracy{suffix}", "chance_accuracy"),
    "largest_client": ("largest_client_accuracy", None),
    "top_holder": ("top_holder_accuracy{suffix}", "top_holder_chance"),
    "spearman": ("spearman{suffix}", None),
    "faulty_precision": ("faulty_precision{suffix}", "faulty_precision_chance"),
    "faulty_recall": ("faulty_recall{suffix}", "faulty_recall_chance"),
    "found": ("feddebug_accuracy", "feddebug_chance"),
    "seconds": ("seconds_{method}", None),
}
SUFFIX = {"influence": "_influence"}  # the paper's method has the plain names


class Metric(NamedTuple):
    round: int
    method: str
    metric: str
    value: float
    chance: float = NAN


def judge_models(run: Run) -> list[Metric]:
    """Loss and accuracy of the model that each round released."""
    names = ("loss", "accuracy")
    return [Metric(record.number, MODEL, name, getattr(record, name)) for record in run.rounds for name in names]


def judge_answers(run: Run, answers: pd.DataFrame, methods: list[str], faulty: set[str]) -> list[Metric]:
    """Every metric of every round and method.

    Args:
        run: the run that was traced.
        answers: what `tracing.trace_round` gave, of all rounds.
        methods: the methods that were traced.
        faulty: ids of the faulty clients; empty if there are none.
    """
    rows = []
    for record in run.rounds:
        for method in methods:
            part = answers[(answers["round"] == record.number) & (answers["method"] == method)]
            found = _judge(record, part, faulty)
            if method == "influence":
                found |= _server_shares(part)
            rows += [Metric(record.number, method, name, *judged) for name, judged in found.items()]
    return rows


def judge_times(run: Run, timings: pd.DataFrame, methods: list[str]) -> list[Metric]:
    """Mean seconds per localization over all rounds (timings.csv), repeated for each round."""
    seconds = timings.set_index("method")["seconds_per_localization"].to_dict()
    timed = [method for method in methods if method in seconds]
    return [Metric(record.number, method, "seconds", seconds[method]) for record in run.rounds for method in timed]


def means(metrics: pd.DataFrame) -> dict[tuple[str, str], Judged]:
    """(method, metric) -> mean over the rounds that have the number; NaN if none has it."""
    mean = metrics.groupby(["method", "metric"], as_index=False)[["value", "chance"]].mean()
    return {(method, metric): Judged(*judged) for method, metric, *judged in mean.itertuples(index=False)}


def wide(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per round with the columns of rounds.csv.

    A chance level has one column; it is that of the last method.
    """
    rounds: dict[int, dict[str, float]] = {}
    for row in map(Metric._make, metrics.itertuples(index=False)):
        cells = rounds.setdefault(row.round, {"round": row.round})
        value, chance = _columns(row.method, row.metric)
        cells[value] = int(row.value) if row.metric == "num_inputs" else row.value
        if chance:
            cells[chance] = row.chance
    return pd.DataFrame(rounds.values())


def _columns(method: str, metric: str) -> tuple[str, str | None]:
    suffix = SUFFIX.get(method, "")
    if metric.startswith("rank_of_c"):
        return metric + suffix, "faulty_rank_chance"
    value, chance = COLUMNS.get(metric, (metric, None))
    return value.format(suffix=suffix, method=method.lower()), chance


def _judge(record: Round, part: pd.DataFrame, faulty: set[str]) -> dict[str, Judged]:
    clients = [client.id for client in record.clients]
    contributions, counts, ranks = (
        part[name].to_numpy(dtype).reshape(-1, len(clients))
        for name, dtype in (("contribution", np.float64), ("label_examples", np.int64), ("rank", np.int64))
    )
    culprits = np.tile([client in faulty for client in clients], (len(counts), 1)) if faulty else counts > 0
    found = localize(contributions, counts, culprits, np.array([client.num_examples for client in record.clients]))
    return found | name_faulty(ranks, clients, faulty) if faulty else found


def _server_shares(part: pd.DataFrame) -> dict[str, Judged]:
    """What the server itself contributed (clipping, noise, momentum), and the noise by itself.

    Mean over inputs of |server| and |noise| as shares of sum_k |contribution_k| + |server|.
    """
    inputs = part.assign(size=part["contribution"].abs()).groupby("input")
    gross = inputs["size"].sum() + inputs["server"].first().abs()
    return {f"{name}_share": Judged(float((inputs[name].first().abs() / gross).mean())) for name in ("server", "noise")}
