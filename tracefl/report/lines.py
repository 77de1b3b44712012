"""The log lines that people grep for, word for word as the published artifact prints them.

After each of its accuracies comes a line with what chance gives: the artifact's own line stays as it is.
"""

import math
from collections.abc import Iterator

import pandas as pd


def provenance_lines(rounds: pd.DataFrame, provenance: pd.DataFrame, faulty: set[str]) -> Iterator[str]:
    """Lines of the first method in `provenance`, round by round, and the averages at the end."""
    for row in rounds.to_dict("records"):
        part = provenance[provenance["round"] == row["round"]]
        first = part[part["method"] == part["method"].iloc[0]] if len(part) else part
        for _, answer in first.groupby("input", sort=False):
            yield from _input_lines(answer, faulty)
        yield from _round_lines(row)
    yield from _closing_lines(rounds)


def _input_lines(answer: pd.DataFrame, faulty: set[str]) -> Iterator[str]:
    ranked = answer.sort_values("rank")
    named = ranked.iloc[0]
    correct = named["client"] in faulty if faulty else named["label_examples"] > 0
    scores = {f"c{client}": round(score, 2) for client, score in zip(ranked["client"], ranked["score"], strict=True)}
    yield f"*********** Input Label: {named['label']}, Responsible Client(s): c{named['client']}  *************"
    yield f"Traced Client: c{named['client']} || Tracing = {'Correct' if correct else 'Wrong'}"
    yield f"TraceFL Clients Contributions Rank:     {scores}"


def _round_lines(row: dict) -> Iterator[str]:
    number, inputs = int(row["round"]), int(row["num_inputs"])
    model = f"GM_(loss, acc) ({row['loss']:.2f},{row['accuracy']:.2f})"
    if inputs == 0:
        yield f"[Round {number}] TraceFL found no input to trace || Total Inputs Used In Prov: 0 || {model}"
        return
    yield (
        f"[Round {number}] TraceFL Localization Accuracy = {_percent(row['localization_accuracy'])} || "
        f"Total Inputs Used In Prov: {inputs} || {model}"
    )
    yield f"[Round {number}] {_chance(row)}"


def _closing_lines(rounds: pd.DataFrame) -> Iterator[str]:
    mean = rounds.mean(numeric_only=True)
    traced = int((rounds["num_inputs"] > 0).sum())
    yield f"Total Rounds: {len(rounds)}"
    yield f"TraceFL Average Localization Accuracy: {_percent(mean['localization_accuracy'])}"
    yield f"Average over the {traced} of {len(rounds)} rounds with inputs to trace: {_chance(mean)}"


def _chance(row: dict | pd.Series) -> str:
    text = (
        f"Chance = {_percent(row['chance_accuracy'])} || "
        f"Largest Client = {_percent(row['largest_client_accuracy'])} || "
        f"Top Holder = {_percent(row['top_holder_accuracy'])} (chance {_percent(row['top_holder_chance'])}) || "
        f"Spearman = {row['spearman']:.2f} (chance 0)"
    )
    if "localization_accuracy_influence" in row:
        text += (
            f" || Influence: Localization = {_percent(row['localization_accuracy_influence'])}, "
            f"Top Holder = {_percent(row['top_holder_accuracy_influence'])}, Spearman = {row['spearman_influence']:.2f}"
        )
    return text


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else str(round(100 * share, 1))
