"""The log lines that people grep for, word for word as the published artifact prints them.

Each of the artifact's accuracies is followed by a line of our own with what chance gives.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import pandas as pd

from tracefl.config import Config
from tracefl.data.prepared import PreparedData
from tracefl.evaluation.metrics import MODEL, means
from tracefl.judged import Judged
from tracefl.runs import Run
from tracefl.storage import rounds_named

SHOWN_CLIENTS = 20
TITLES = {"neuron": "Neuron", "influence": "Influence", "shapley": "Shapley"}
SHOWN_CLASSES = 10
LEFT_OUT = {  # why examples are left out (`Partition.left_out`), in words before the setting
    "dist_type": "given to nobody by",
    "min_examples_per_class": "of classes of which their client has fewer than",
    "max_per_client_data_size": "above",
}
Found = Mapping[tuple[str, str], Judged]  # (method, metric) -> value and chance, see `means`


def data_lines(config: Config, data: PreparedData) -> Iterator[str]:
    """Which classes and how many training examples no client trains on; nothing if all are used."""
    used, unused = _by_label(data.label_counts), _by_label(data.left_out)
    lost = [f"{data.class_names[k]} ({n} examples)" for k, n in sorted(unused.items()) if not used[k]]
    if lost:
        more = [f"and {len(lost) - SHOWN_CLASSES} more"] if len(lost) > SHOWN_CLASSES else []
        named = ", ".join(lost[:SHOWN_CLASSES] + more)
        yield f"No client trains on {len(lost)} of the training split's {len(used | unused)} classes: {named}"
    if unused:
        counts = {reason: sum(by_label.values()) for reason, by_label in data.left_out.items()}
        why = [
            f"{count} {LEFT_OUT[reason]} data_dist.{reason}={getattr(config.data_dist, reason)}"
            for reason, count in counts.items()
            if count
        ]
        of = f"{unused.total()} of the {used.total() + unused.total()} training examples"
        yield f"No client trains on {of}: {', '.join(why)}"


def exclusion_lines(config: Config, data: PreparedData) -> Iterator[str]:
    """Who never trains, and the classes that nobody else has; nothing without exclude_clients."""
    if config.exclude_clients:
        out = [str(client) for client in config.exclude_clients]
        had = _by_label({who: data.label_counts[who] for who in out})
        kept = _by_label({who: counts for who, counts in data.label_counts.items() if who not in out})
        lost = [data.class_names[k] for k in sorted(had) if not kept[k]]
        more = [f"and {len(lost) - SHOWN_CLASSES} more"] if len(lost) > SHOWN_CLASSES else []
        alone = f"; nobody else has class {', '.join(lost[:SHOWN_CLASSES] + more)}" if lost else ""
        who = ", ".join(f"c{client}" for client in out)
        yield f"exclude_clients: {who} never train, with {had.total()} training examples{alone}"


def _by_label(parts: Mapping[str, Mapping[int, int]]) -> Counter[int]:
    """The counts of all parts together."""
    return sum((Counter(part) for part in parts.values()), start=Counter())


def storage_lines(run: Run) -> Iterator[str]:
    """Which rounds can be traced, and of what; nothing if all states are as they were sent."""
    if gone := [record.number for record in run.rounds if not record.kept]:
        kept = [record.number for record in run.kept_rounds]
        states = f"the clients' states of {rounds_named(gone[0], gone[-1])} are gone"
        yield f"storage.keep={run.storing.keep}: {states}; {rounds_named(kept[0], kept[-1])} can be traced and audited"
    if not run.storing.exact:
        yield f"storage.dtype={run.storing.dtype}: answers and audits are of clients' states that are rounded to it"


def provenance_lines(
    metrics: pd.DataFrame, answers: pd.DataFrame, faulty: set[str], gone: Collection[int] = ()
) -> Iterator[str]:
    """Lines of the first method in `answers`, round by round, and the averages at the end.

    Args:
        metrics: tidy rows (see `evaluation.metrics`) of every round.
        answers: what was traced, one row per (round, method, input, client).
        faulty: ids of the faulty clients.
        gone: rounds that cannot be traced.
    """
    for number, part in metrics[~metrics["round"].isin(gone)].groupby("round"):
        traced = answers[answers["round"] == number]
        first = traced[traced["method"] == traced["method"].iloc[0]] if len(traced) else traced
        for _, answer in first.groupby("input", sort=False):
            yield from _input_lines(answer, faulty)
        yield from (f"[Round {number}] {line}" for line in _round_lines(means(part), faulty))
    yield from _closing_lines(metrics, faulty)


def _input_lines(answer: pd.DataFrame, faulty: set[str]) -> Iterator[str]:
    ranked = answer.sort_values("rank")
    named = ranked.iloc[0]
    correct = named["client"] in faulty if faulty else named["label_examples"] > 0
    scores = {f"c{client}": round(score, 2) for client, score in zip(ranked["client"], ranked["score"], strict=True)}
    yield f"*********** Input Label: {named['label']}, Responsible Client(s): c{named['client']}  *************"
    yield f"Traced Client: c{named['client']} || Tracing = {'Correct' if correct else 'Wrong'}"
    yield f"TraceFL Clients Contributions Rank:     {scores}"


def _round_lines(found: Found, faulty: set[str]) -> Iterator[str]:
    method = _shown(found)
    inputs = int(found[method, "num_inputs"].value)
    model = f"GM_(loss, acc) ({found[MODEL, 'loss'].value:.2f},{found[MODEL, 'accuracy'].value:.2f})"
    if ("FedDebug", "found") in found and not math.isnan(found["FedDebug", "found"].value):
        yield _feddebug(found)
    if inputs == 0:
        yield f"TraceFL found no input to trace || Total Inputs Used In Prov: 0 || {model}"
        return
    accuracy = percent(found[method, "localization"].value)
    yield f"TraceFL Localization Accuracy = {accuracy} || Total Inputs Used In Prov: {inputs} || {model}"
    yield _beside_chance(found)
    yield from _sets(found)
    yield from _coalitions(found)
    yield from _server(found)
    yield from _faulty(found, faulty)


def _closing_lines(metrics: pd.DataFrame, faulty: set[str]) -> Iterator[str]:
    mean, count = means(metrics), metrics["round"].nunique()
    method = _shown(mean)
    inputs = metrics[(metrics["method"] == method) & (metrics["metric"] == "num_inputs")]["value"]
    over = f"Average over the {(inputs > 0).sum()} of {count} rounds with inputs to trace"
    yield f"Total Rounds: {count}"
    yield f"TraceFL Average Localization Accuracy: {percent(mean[method, 'localization'].value)}"
    yield f"{over}: {_beside_chance(mean)}"
    yield from (f"{over}: {line}" for line in (*_sets(mean), *_coalitions(mean)))
    yield from (f"{over}: {line}" for line in _faulty(mean, faulty))
    if ("FedDebug", "found") in mean:
        rounds = metrics[metrics["metric"] == "found"]["value"].count()
        yield f"Average over {rounds} rounds: {_feddebug(mean)}"


def fusion_lines(run: Run, strategy: str) -> Iterator[str]:
    """With which p_k the strategy took the updates of the last round."""
    last = run.rounds[-1]
    shares = {f"c{client.id}": round(client.weight, 3) for client in last.clients[:SHOWN_CLIENTS]}
    more = f" and {len(last.clients) - SHOWN_CLIENTS} more" if len(last.clients) > SHOWN_CLIENTS else ""
    yield f"Weights p_k with which {strategy} took the updates of round {last.number}: {shares}{more}"


def privacy_lines(config: Config, rounds: int) -> Iterator[str]:
    """The privacy that `rounds` rounds have spent, if the run is private."""
    if config.noise_multiplier != -1:
        from tracefl.federation.privacy import TARGET_DELTA, epsilon

        after = f"Differential privacy of the parameters after {rounds} rounds"
        spent = epsilon(config.noise_multiplier, rounds, config.clients_per_round, config.num_clients)
        what = f"epsilon = {spent:.4g} at delta = {TARGET_DELTA:g} (one client's updates against none)"
        yield f"{after}: {what}; BatchNorm's running statistics are released as they are"


def percent(share: float, missing: str = "n/a") -> str:
    """A share in percent with one decimal; `missing` for NaN."""
    return missing if math.isnan(share) else f"{100 * share:.1f}"


def _shown(found: Found) -> str:
    """The method of the artifact's lines: the paper's, or influence if only that is traced."""
    return "neuron" if ("neuron", "localization") in found else "influence"


def _beside_chance(found: Found) -> str:
    method = _shown(found)
    chance, (top, top_chance) = found[method, "localization"].chance, found[method, "top_holder"]
    parts = [
        f"Chance = {percent(chance)} || Largest Client = {percent(found[method, 'largest_client'].value)}",
        f"Top Holder = {percent(top)} (chance {percent(top_chance)})",
        f"Spearman = {found[method, 'spearman'].value:.2f} (chance 0)",
    ]
    if method == "neuron" and ("influence", "localization") in found:
        accuracy, top, rank = (found["influence", name].value for name in ("localization", "top_holder", "spearman"))
        shares = f"Localization = {percent(accuracy)}, Top Holder = {percent(top)}"
        parts.append(f"Influence: {shares}, Spearman = {rank:.2f}")
    return " || ".join(parts)


def _sets(found: Found) -> Iterator[str]:
    """How often answers as sets hold a client that counts as correct, and how large they are."""
    texts = []
    for method, title in TITLES.items():
        if (method, "coverage") in found:
            (share, chance), size, nobody = (found[method, name] for name in ("coverage", "set_size", "named_nobody"))
            named = f"Size = {_number(size.value)}, Nobody = {percent(nobody.value)}"
            texts.append(f"{title}: Coverage = {percent(share)} (chance {percent(chance)}), {named}")
    if texts:
        yield "Answers as Sets: " + " || ".join(texts)


def _coalitions(found: Found) -> Iterator[str]:
    """How near the methods come to the Shapley values, where coalitions were fused."""
    texts = []
    for method, title in TITLES.items():
        if (method, "shapley_first") in found:
            rank, (first, chance) = (found[method, f"shapley_{name}"] for name in ("spearman", "first"))
            same = f"the same first = {percent(first)} (chance {percent(chance)})"
            texts.append(f"{title}: Spearman = {_number(rank.value)} (chance 0), {same}")
    if texts:
        yield "Beside Shapley Values: " + " || ".join(texts)


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def _server(found: Found) -> Iterator[str]:
    """The server's own part in the influence, where it did more than average."""
    share, noise = (found.get(("influence", f"{name}_share"), Judged(0.0)).value for name in ("server", "noise"))
    if share > 1e-3:
        alone = f", noise alone {percent(noise)}" if noise else ""
        yield f"Server's own share of the influence = {percent(share)}{alone} (plain averaging: 0)"


def _faulty(found: Found, faulty: set[str]) -> Iterator[str]:
    """How well the rankings name all faulty clients; nothing where no input was traced for them."""
    texts = []
    for method, title in (("neuron", "Faulty Clients"), ("influence", "Influence")):
        if math.isnan(found.get((method, "faulty_precision"), Judged(math.nan)).value):
            continue
        of_client = {f"c{client}": found[method, f"rank_of_c{client}"] for client in sorted(faulty, key=int)}
        ranks = {client: round(rank.value, 1) for client, rank in of_client.items() if not math.isnan(rank.value)}
        text = f"{title}: Rank = {ranks} (chance {next(iter(of_client.values())).chance:.1f})"
        for name in ("precision", "recall") if len(faulty) > 1 else ():
            share, chance = found[method, f"faulty_{name}"]
            text += f", {name.capitalize()} = {percent(share)} (chance {percent(chance)})"
        texts.append(text)
    if texts:
        yield " || ".join(texts)


def _feddebug(found: Found) -> str:
    share, chance = found["FedDebug", "found"]
    return f"FedDebug: Localization = {percent(share)} (chance {percent(chance)})"
