"""The metrics of a run as tidy rows, one number each: (round, method, metric, value, chance).

    method         metrics
    global model   loss, accuracy
    neuron, ...    those of `localize`; with faulty clients those of `name_faulty`, and seconds
                   coverage, set_size and named_nobody of the answers as sets
    influence      also server_share and noise_share
    shapley        those of the sets; then also of each method, held against it: shapley_spearman
                   and shapley_first
    FedDebug       found, seconds

`wide` gives them the column names of rounds.csv.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from tracefl.evaluation.localization import against, localize, name_faulty
from tracefl.evidence.answers import CONFIDENCE, AnswerSets, members
from tracefl.judged import NAN, Judged
from tracefl.record import Round
from tracefl.runs import Run

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
    "coverage": ("coverage{suffix}", "coverage_chance{suffix}"),  # of random sets of the same size
    "set_size": ("set_size{suffix}", None),
    "named_nobody": ("named_nobody{suffix}", None),
    "shapley_spearman": ("shapley_spearman{suffix}", None),
    "shapley_first": ("shapley_first{suffix}", "shapley_first_chance"),
    "found": ("feddebug_accuracy", "feddebug_chance"),
    "seconds": ("seconds_{method}", None),
}
SUFFIX = {"influence": "_influence", "shapley": "_shapley"}  # the paper's method has the plain names


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
    rows, played = [], "shapley" in set(answers["method"])
    for record in run.rounds:
        of_round = answers[answers["round"] == record.number]
        shapley = of_round[of_round["method"] == "shapley"]
        if played:
            judged_sets = _judge_sets(record, shapley, faulty)
            rows += [Metric(record.number, "shapley", name, *judged) for name, judged in judged_sets.items()]
        for method in methods:
            part = of_round[of_round["method"] == method]
            found = _judge(record, part, faulty)
            found |= _judge_sets(record, part, faulty)
            if method == "influence":
                found |= _server_shares(part)
            if played:
                found |= _against_shapley(part, shapley)
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
    return value.format(suffix=suffix, method=method.lower()), chance and chance.format(suffix=suffix)


def _judge(record: Round, part: pd.DataFrame, faulty: set[str]) -> dict[str, Judged]:
    clients = [client.id for client in record.clients]
    contributions, counts, ranks = (
        part[name].to_numpy(dtype).reshape(-1, len(clients))
        for name, dtype in (("contribution", np.float64), ("label_examples", np.int64), ("rank", np.int64))
    )
    culprits = _culprits(record, counts, faulty)
    found = localize(contributions, counts, culprits, np.array([client.num_examples for client in record.clients]))
    return found | name_faulty(ranks, clients, faulty) if faulty else found


def _culprits(record: Round, label_counts: np.ndarray, faulty: set[str]) -> np.ndarray:
    """Whether naming a participant counts as correct, bool [N, K]."""
    is_faulty = [client.id in faulty for client in record.clients]
    return np.tile(is_faulty, (len(label_counts), 1)) if faulty else label_counts > 0


def _judge_sets(record: Round, part: pd.DataFrame, faulty: set[str]) -> dict[str, Judged]:
    """How often the answers as sets hold a culprit, how large they are, and how many are empty."""
    clients = [client.id for client in record.clients]
    contributions, counts = (
        part[name].to_numpy(dtype).reshape(-1, len(clients))
        for name, dtype in (("contribution", np.float64), ("label_examples", np.int64))
    )
    error = part["standard_error"].to_numpy(np.float64).reshape(-1, len(clients)) if "standard_error" in part else None
    error = None if error is None or np.isnan(error).any() else error
    named = members(contributions, part["predicted"].tolist()[:: len(clients)], error)
    answers, truth = (
        [[who for who, there in zip(clients, row, strict=True) if there] for row in rows]
        for rows in (named, _culprits(record, counts, faulty))
    )
    sets = AnswerSets(answers, clients, CONFIDENCE)
    return {
        "coverage": sets.coverage(truth),
        "set_size": Judged(sets.size),
        "named_nobody": Judged(sets.nobody),
    }


def _against_shapley(part: pd.DataFrame, shapley: pd.DataFrame) -> dict[str, Judged]:
    """How near a method comes to the Shapley values, over the inputs that have some."""
    part = part[part["input"].isin(shapley["input"])]
    K = max(shapley["client"].nunique(), 1)
    both = (of["contribution"].to_numpy(np.float64).reshape(-1, K) for of in (part, shapley))
    return {f"shapley_{name}": judged for name, judged in against(*both).items()}


def _server_shares(part: pd.DataFrame) -> dict[str, Judged]:
    """What the server itself contributed (clipping, noise, momentum), and the noise by itself.

    Mean over inputs of |server| and |noise| as shares of sum_k |contribution_k| + |server|.
    """
    inputs = part.assign(size=part["contribution"].abs()).groupby("input")
    gross = inputs["size"].sum() + inputs["server"].first().abs()
    return {f"{name}_share": Judged(float((inputs[name].first().abs() / gross).mean())) for name in ("server", "noise")}
