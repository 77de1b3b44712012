"""The closing tables: every accuracy beside its chance."""

import pandas as pd

from tests.report.metrics import NAN, table, tidy
from tracefl.report.tables import print_faulty, print_summary, print_whole_run

METRICS = table(
    tidy(
        1,
        neuron={
            "localization": (1.0, 0.2), "faulty_precision": (0.4, 0.2), "faulty_recall": (0.6, 0.3),
            "rank_of_c1": (2.0, 5.5), "rank_of_c3": (NAN, 5.5), "seconds": 0.0123,
        },
        influence={
            "localization": (0.5, 0.2), "faulty_precision": (0.45, 0.2), "faulty_recall": (0.65, 0.3),
            "rank_of_c1": (1.0, 5.5), "rank_of_c3": (NAN, 5.5),
        },
        FedDebug={"found": (0.35, 0.2), "seconds": 0.5},
    ),
    tidy(
        2,
        neuron=dict.fromkeys(("localization", "faulty_precision", "faulty_recall", "rank_of_c1"), NAN)
        | {"seconds": 0.0123},
        influence={"localization": NAN, "rank_of_c1": NAN},
        FedDebug={"found": (0.45, 0.2), "seconds": 0.5},
    ),
)  # fmt: skip


def cells(out: str, first: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.strip("│ ").startswith(f"{first} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_every_method_stands_beside_its_chance_and_time(capsys):
    print_faulty(METRICS, ["neuron", "influence"], {"1", "3"})
    out = capsys.readouterr().out
    assert cells(out, "neuron") == ["neuron", "1", "100.0 (20.0)", "40.0 (20.0)", "60.0 (30.0)", "2.0 (5.5)", "0.0123"]
    assert cells(out, "influence")[2:] == ["50.0 (20.0)", "45.0 (20.0)", "65.0 (30.0)", "1.0 (5.5)", "-"]
    assert cells(out, "FedDebug") == ["FedDebug", "2", *["40.0 (20.0)"] * 3, "-", "0.5"]


def test_one_faulty_client_needs_no_precision(capsys):
    print_faulty(METRICS, ["neuron"], {"1"})
    out = capsys.readouterr().out
    assert cells(out, "neuron") == ["neuron", "1", "100.0 (20.0)", "2.0 (5.5)", "0.0123"]


def test_the_summary_has_a_line_per_round_and_their_mean(capsys):
    metrics = table(
        tidy(
            1,
            model={"accuracy": 0.5},
            neuron={"num_inputs": 12, "localization": (1.0, 0.25), "top_holder": (0.4, 0.2)},
            influence={"num_inputs": 12, "localization": (0.75, 0.25), "top_holder": (0.6, 0.2)},
        ),
        tidy(
            2,
            model={"accuracy": 0.7},
            neuron={"num_inputs": 0, "localization": NAN, "top_holder": NAN},
            influence={"num_inputs": 0, "localization": NAN, "top_holder": NAN},
        ),
    )
    print_summary(metrics, ["neuron", "influence"])
    out = capsys.readouterr().out
    assert cells(out, "1") == ["1", "50.0", "12", "100.0", "75.0", "25.0", "40.0", "60.0", "20.0"]
    assert cells(out, "2") == ["2", "70.0", "0", *["-"] * 6]
    assert cells(out, "mean") == ["mean", "60.0", "6", "100.0", "75.0", "25.0", "40.0", "60.0", "20.0"]


def test_without_traced_inputs_the_summary_is_the_models(capsys):
    print_summary(table(tidy(1, model={"loss": 2.0, "accuracy": 0.5})), ["neuron"])
    assert cells(capsys.readouterr().out, "1") == ["1", "50.0"]


def test_the_whole_run_has_a_line_per_client_the_most_responsible_first(capsys):
    shares = {"0": (1.0, -1.0), "7": (3.0, 2.0)}
    rows = [
        {"client": who, "input": n, "contribution": share, "rank": 1 if who == "7" else 2}
        for who, of in shares.items()
        for n, share in enumerate(of)
    ]
    print_whole_run(pd.DataFrame(rows))
    shown = capsys.readouterr().out
    assert "2 predictions" in shown
    assert shown.index("+2.5") < shown.index("+0")
    assert "2 of 2" in shown
    assert "0 of 2" in shown
