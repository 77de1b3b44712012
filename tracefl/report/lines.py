"""The log lines that people grep for, word for word as the published artifact prints them.

After each of its accuracies comes a line with what chance gives: the artifact's own line stays as it is.
"""

import math
from collections.abc import Iterator

import pandas as pd

from tracefl.runs import Run

SHOWN_CLIENTS = 20


def provenance_lines(rounds: pd.DataFrame, provenance: pd.DataFrame, faulty: set[str]) -> Iterator[str]:
    """Lines of the first method in `provenance`, round by round, and the averages at the end."""
    for row in rounds.to_dict("records"):
        part = provenance[provenance["round"] == row["round"]]
        first = part[part["method"] == part["method"].iloc[0]] if len(part) else part
        for _, answer in first.groupby("input", sort=False):
            yield from _input_lines(answer, faulty)
        yield from _round_lines(row, faulty)
    yield from _closing_lines(rounds, faulty)


def _input_lines(answer: pd.DataFrame, faulty: set[str]) -> Iterator[str]:
    ranked = answer.sort_values("rank")
    named = ranked.iloc[0]
    correct = named["client"] in faulty if faulty else named["label_examples"] > 0
    scores = {f"c{client}": round(score, 2) for client, score in zip(ranked["client"], ranked["score"], strict=True)}
    yield f"*********** Input Label: {named['label']}, Responsible Client(s): c{named['client']}  *************"
    yield f"Traced Client: c{named['client']} || Tracing = {'Correct' if correct else 'Wrong'}"
    yield f"TraceFL Clients Contributions Rank:     {scores}"


def _round_lines(row: dict, faulty: set[str]) -> Iterator[str]:
    number, inputs = int(row["round"]), int(row["num_inputs"])
    model = f"GM_(loss, acc) ({row['loss']:.2f},{row['accuracy']:.2f})"
    if not math.isnan(row.get("feddebug_accuracy", float("nan"))):
        yield f"[Round {number}] {_feddebug(row)}"
    if inputs == 0:
        yield f"[Round {number}] TraceFL found no input to trace || Total Inputs Used In Prov: 0 || {model}"
        return
    yield (
        f"[Round {number}] TraceFL Localization Accuracy = {_percent(row['localization_accuracy' + _first(row)])} || "
        f"Total Inputs Used In Prov: {inputs} || {model}"
    )
    yield f"[Round {number}] {_chance(row)}"
    if ledger := _ledger(row):
        yield f"[Round {number}] {ledger}"
    if naming := _naming(row, faulty):
        yield f"[Round {number}] {naming}"


def _closing_lines(rounds: pd.DataFrame, faulty: set[str]) -> Iterator[str]:
    mean = rounds.mean(numeric_only=True)
    traced = int((rounds["num_inputs"] > 0).sum())
    yield f"Total Rounds: {len(rounds)}"
    yield f"TraceFL Average Localization Accuracy: {_percent(mean['localization_accuracy' + _first(mean)])}"
    yield f"Average over the {traced} of {len(rounds)} rounds with inputs to trace: {_chance(mean)}"
    if naming := _naming(mean.to_dict(), faulty):
        yield f"Average over the {traced} of {len(rounds)} rounds with inputs to trace: {naming}"
    if "feddebug_accuracy" in rounds:
        yield f"Average over {rounds['feddebug_accuracy'].notna().sum()} rounds: {_feddebug(mean)}"


def fusion_lines(run: Run, strategy: str) -> Iterator[str]:
    """Which p_k the contributions of the last round were weighed with."""
    if run.rounds:
        last = run.rounds[-1]
        shares = {f"c{client.id}": round(client.weight, 3) for client in last.clients[:SHOWN_CLIENTS]}
        more = f" and {len(last.clients) - SHOWN_CLIENTS} more" if len(last.clients) > SHOWN_CLIENTS else ""
        yield f"Weights p_k with which {strategy} took the updates of round {last.number}: {shares}{more}"


def _ledger(row: dict) -> str:
    """The server's own part in the influence, where it did more than average."""
    share = row.get("server_share", float("nan"))
    if not share > 1e-3:
        return ""
    noise = f", noise alone {_percent(row['noise_share'])}" if row["noise_share"] else ""
    return f"Server's own share of the influence = {_percent(share)}{noise} (plain averaging: 0)"


def _chance(row: dict | pd.Series) -> str:
    first = _first(row)
    text = (
        f"Chance = {_percent(row['chance_accuracy'])} || "
        f"Largest Client = {_percent(row['largest_client_accuracy'])} || "
        f"Top Holder = {_percent(row['top_holder_accuracy' + first])} (chance {_percent(row['top_holder_chance'])}) || "
        f"Spearman = {row['spearman' + first]:.2f} (chance 0)"
    )
    if not first and "localization_accuracy_influence" in row:
        text += (
            f" || Influence: Localization = {_percent(row['localization_accuracy_influence'])}, "
            f"Top Holder = {_percent(row['top_holder_accuracy_influence'])}, Spearman = {row['spearman_influence']:.2f}"
        )
    return text


def _first(row: dict | pd.Series) -> str:
    """Suffix of the metrics that the lines speak of: the paper's, or influence's where it is traced alone."""
    return "" if "localization_accuracy" in row else "_influence"


def _naming(row: dict, faulty: set[str]) -> str:
    """How well the rankings name all faulty clients; empty where nothing was traced for them."""
    texts = []
    for method, suffix in (("Faulty Clients", ""), ("Influence", "_influence")):
        if math.isnan(row.get(f"faulty_precision{suffix}", float("nan"))):
            continue
        means = {f"c{client}": row[f"rank_of_c{client}{suffix}"] for client in sorted(faulty, key=int)}
        ranks = {client: round(rank, 1) for client, rank in means.items() if not math.isnan(rank)}
        text = f"{method}: Rank = {ranks} (chance {row['faulty_rank_chance']:.1f})"
        for name in ("precision", "recall") if len(faulty) > 1 else ():
            share, chance = row[f"faulty_{name}{suffix}"], row[f"faulty_{name}_chance"]
            text += f", {name.capitalize()} = {_percent(share)} (chance {_percent(chance)})"
        texts.append(text)
    return " || ".join(texts)


def _feddebug(row: dict | pd.Series) -> str:
    return f"FedDebug: Localization = {_percent(row['feddebug_accuracy'])} (chance {_percent(row['feddebug_chance'])})"


def _percent(share: float) -> str:
    return "n/a" if math.isnan(share) else str(round(100 * share, 1))
