"""Tidy metrics by hand."""

import pandas as pd

from tracefl.evaluation.metrics import Metric

NAN = float("nan")


def tidy(number: int, **methods: dict[str, float | tuple[float, float]]) -> list[Metric]:
    """Rows of one round: `neuron={"localization": (value, chance), "seconds": value}`; `model` is the global model."""
    return [
        Metric(number, "global model" if method == "model" else method, name, *(v if isinstance(v, tuple) else (v,)))
        for method, values in methods.items()
        for name, v in values.items()
    ]


def table(*rounds: list[Metric]) -> pd.DataFrame:
    return pd.DataFrame([row for rows in rounds for row in rows], columns=Metric._fields)
