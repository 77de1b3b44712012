"""Wall seconds per localization, measured the same way for every method."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd


class Stopwatch:
    """Adds up, for each method, how many localizations were made and how long they took."""

    def __init__(self) -> None:
        self._measured: list[tuple[str, int, float]] = []

    @contextmanager
    def measure(self, method: str, localizations: int) -> Iterator[None]:
        """The clock runs inside the block; an error leaves the sums as they were."""
        started = time.perf_counter()
        yield
        self._measured.append((method, localizations, time.perf_counter() - started))

    def table(self) -> pd.DataFrame:
        """One row per method: localizations, seconds, seconds_per_localization."""
        rows = pd.DataFrame(self._measured, columns=["method", "localizations", "seconds"])
        table = rows.groupby("method", sort=False, as_index=False).sum()
        return table.assign(seconds_per_localization=table["seconds"] / table["localizations"])
