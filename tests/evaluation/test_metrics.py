"""Rounds as tidy metrics, and the columns of rounds.csv that they become."""

import numpy as np
import pandas as pd
import pytest

from tracefl.evaluation.metrics import Metric, judge_answers, judge_models, judge_times, means, wide
from tracefl.evaluation.tracing import COLUMNS, trace_round


def judged(run, answers, methods, faulty):
    """(method, metric) -> (value, chance) of the last round."""
    metrics = pd.DataFrame(judge_answers(run, answers, methods, faulty), columns=Metric._fields)
    return means(metrics[metrics["round"] == len(run.rounds)])


def test_rounds_are_judged_beside_their_chance(recorded, config):
    run, model, examples = recorded
    table = trace_round(config(), run, model, examples, 1)
    found = judged(run, table, ["neuron", "influence"], set())
    for method in ("neuron", "influence"):
        assert found[method, "num_inputs"].value == 10
        assert found[method, "localization"] == (1.0, 0.5)
        assert found[method, "largest_client"].value == found[method, "top_holder"].chance == 0.5
    assert judged(run, table, ["neuron"], {"1"})["neuron", "localization"] == (0.5, 0.5)


def test_a_round_without_inputs_keeps_its_rows(recorded):
    found = judged(recorded[0], pd.DataFrame(columns=COLUMNS), ["neuron", "influence"], {"1"})
    assert found["neuron", "num_inputs"].value == 0
    assert np.isnan([found["neuron", "localization"], found["influence", "faulty_recall"]]).all()
    assert np.isnan(found["influence", "server_share"].value)


def test_faulty_clients_are_ranked_beside_their_chance(recorded, config):
    run, model, examples = recorded
    table = trace_round(config(), run, model, examples, 1)
    found = judged(run, table, ["neuron", "influence"], {"1", "7"})
    assert found["neuron", "rank_of_c1"] == found["influence", "rank_of_c1"] == (1.5, 1.5)
    assert np.isnan(found["neuron", "rank_of_c7"].value)  # took no part
    assert found["neuron", "faulty_precision"] == (0.5, 0.5)  # both are named, one is faulty
    assert found["neuron", "faulty_recall"] == (1.0, 1.0)
    absent = judged(run, table.iloc[:0], ["neuron"], {"7"})
    assert np.isnan([absent["neuron", name] for name in ("faulty_precision", "faulty_recall", "rank_of_c7")]).all()


def test_the_servers_share_is_a_part_of_all_shares(recorded):
    rows = [  # two inputs of a round: contributions 3 and -1, the server 1; 2 and 2, the server -4
        (1, "influence", row, client, 0, 0, value, 0.5, 1, 1, server, noise)
        for row, values, server, noise in ((5, (3.0, -1.0), 1.0, 0.5), (6, (2.0, 2.0), -4.0, 0.0))
        for client, value in zip("01", values, strict=True)
    ]
    found = judged(recorded[0], pd.DataFrame(rows, columns=COLUMNS), ["influence"], set())
    assert found["influence", "server_share"].value == pytest.approx((1 / 5 + 4 / 8) / 2)
    assert found["influence", "noise_share"].value == pytest.approx(0.5 / 5 / 2)


def rows_of(method, values, targets, **more):
    """A table of two clients: one row of values per input."""
    cells = [
        (1, method, i, who, target, target, value, 0.5, 1 + int(value < max(row)), held[int(who)], None, None)
        for i, (row, target, held) in enumerate(zip(values, targets, HELD, strict=True))
        for who, value in zip("01", row, strict=True)
    ]
    return pd.DataFrame(cells, columns=COLUMNS).assign(**more)


HELD = [(4, 0), (4, 0), (0, 2), (0, 2)]  # examples of the label on each client


def test_answers_as_sets_are_judged_beside_random_sets(recorded):
    values, targets = [(9.0, 1.0), (9.1, 1.0), (9.2, 1.0), (5.0, 5.0)], [0, 0, 1, 1]
    found = judged(recorded[0], rows_of("neuron", values, targets), ["neuron"], set())
    assert found["neuron", "named_nobody"].value == 0.5  # the second class contradicts itself
    assert found["neuron", "coverage"] == (1.0, 0.5)
    assert found["neuron", "set_size"].value == 1
    faulty = judged(recorded[0], rows_of("neuron", values, targets), ["neuron"], {"1"})
    assert faulty["neuron", "coverage"] == (0.0, 0.5)


def test_methods_are_held_against_shapley_values(recorded):
    neuron = rows_of("neuron", [(2.0, 1.0), (1.0, 2.0), (3.0, 1.0), (1.0, 0.0)], [0, 0, 1, 1])
    shapley = rows_of("shapley", [(5.0, 1.0), (6.0, 1.0), (1.0, 7.0), (1.0, 6.0)], [0, 0, 1, 1])
    shapley = shapley[shapley["input"] < 3].assign(standard_error=0.1)
    table = pd.concat([neuron, shapley])
    found = judged(recorded[0], table, ["neuron"], set())
    assert found["neuron", "shapley_spearman"] == (pytest.approx(-1 / 3), 0.0)  # the first three
    assert found["neuron", "shapley_first"] == (pytest.approx(1 / 3), 0.5)
    assert found["shapley", "coverage"] == (1.0, 0.5)
    assert ("shapley", "shapley_first") not in found
    row = wide(pd.DataFrame(judge_answers(recorded[0], table, ["neuron"], set()), columns=Metric._fields)).iloc[0]
    assert (row["shapley_first"], row["shapley_first_chance"], row["coverage_shapley"]) == (
        pytest.approx(1 / 3), 0.5, 1.0,
    )  # fmt: skip
    assert row["num_inputs"] == 4
    wide_errors = judged(recorded[0], table.assign(standard_error=99.0), ["neuron"], set())
    assert wide_errors["shapley", "named_nobody"].value == 1.0


def test_means_are_over_the_rounds_that_have_the_number():
    rows = [Metric(1, "neuron", "localization", 0.5, 0.2), Metric(2, "neuron", "localization", np.nan, 0.4)]
    found = means(pd.DataFrame(rows, columns=Metric._fields))
    assert found["neuron", "localization"] == pytest.approx((0.5, 0.3))


def test_rounds_csv_has_the_columns_that_the_readme_names(recorded, config):
    run, model, examples = recorded
    methods = ["neuron", "influence"]
    table = trace_round(config(), run, model, examples, 1)
    timings = pd.DataFrame({"method": ["FedDebug", "influence"], "seconds_per_localization": [0.5, 0.25]})
    metrics = [
        *judge_models(run),
        *judge_answers(run, table, methods, {"1", "7"}),
        Metric(1, "FedDebug", "found", 0.75, 0.5),
        *judge_times(run, timings, [*methods, "FedDebug"]),
    ]
    rounds = wide(pd.DataFrame(metrics, columns=Metric._fields))
    both = ["localization_accuracy", "top_holder_accuracy", "spearman", "faulty_precision", "faulty_recall"]
    both += ["rank_of_c1", "rank_of_c7", "coverage", "coverage_chance", "set_size", "named_nobody"]
    assert sorted(rounds) == sorted([
        "round", "loss", "accuracy", "num_inputs", *both, *(f"{name}_influence" for name in both),
        "chance_accuracy", "largest_client_accuracy", "top_holder_chance", "faulty_precision_chance",
        "faulty_recall_chance", "faulty_rank_chance", "server_share", "noise_share", "feddebug_accuracy",
        "feddebug_chance", "seconds_influence", "seconds_feddebug",
    ])  # fmt: skip
    row = rounds.iloc[0]
    assert (row["localization_accuracy"], row["chance_accuracy"], row["feddebug_chance"]) == (0.5, 0.5, 0.5)
    assert (row["rank_of_c1_influence"], row["faulty_rank_chance"], row["seconds_influence"]) == (1.5, 1.5, 0.25)
    assert rounds["num_inputs"].dtype == rounds["round"].dtype == np.int64
