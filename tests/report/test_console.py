"""The table that compares what looked for the faulty clients."""

import pandas as pd
from tracefl.report.console import print_faulty

ROUNDS = pd.DataFrame(
    {
        "round": [1, 2], "localization_accuracy": [1.0, None], "localization_accuracy_influence": [0.5, None],
        "chance_accuracy": [0.2, None], "faulty_precision": [0.4, None], "faulty_precision_influence": [0.45, None],
        "faulty_precision_chance": 0.2, "faulty_recall": [0.6, None], "faulty_recall_influence": [0.65, None],
        "faulty_recall_chance": 0.3, "rank_of_c1": [2.0, None], "rank_of_c3": [None, None],
        "rank_of_c1_influence": [1.0, None], "rank_of_c3_influence": [None, None], "faulty_rank_chance": 5.5,
        "feddebug_accuracy": [0.35, 0.45], "feddebug_chance": [0.2, 0.2], "seconds_neuron": 0.0123,
        "seconds_feddebug": 0.5,
    }
)  # fmt: skip


def cells(out: str, method: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith(f"│ {method} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_every_method_stands_beside_its_chance_and_time(capsys):
    print_faulty(ROUNDS, ["neuron", "influence"], {"1", "3"})
    out = capsys.readouterr().out
    assert cells(out, "neuron") == ["neuron", "1", "100.0 (20.0)", "40.0 (20.0)", "60.0 (30.0)", "2.0 (5.5)", "0.0123"]
    assert cells(out, "influence")[2:] == ["50.0 (20.0)", "45.0 (20.0)", "65.0 (30.0)", "1.0 (5.5)", "-"]
    assert cells(out, "FedDebug") == ["FedDebug", "2", *["40.0 (20.0)"] * 3, "-", "0.5"]


def test_one_faulty_client_needs_no_precision(capsys):
    print_faulty(ROUNDS, ["neuron"], {"1"})
    out = capsys.readouterr().out
    assert cells(out, "neuron") == ["neuron", "1", "100.0 (20.0)", "2.0 (5.5)", "0.0123"]
