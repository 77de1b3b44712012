"""Wall seconds per localization, measured the same way for every method."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd


class Stopwatch:
    """Adds up, for each method, how many localizations were made and how long they took."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._localizations: dict[str, int] = defaultdict(int)

    @contextmanager
    def measure(self, method: str, localizations: int) -> Iterator[None]:
        """The clock runs inside the block; an error leaves the sums as they were."""
        started = time.perf_counter()
        yield
        self._seconds[method] += time.perf_counter() - started
        self._localizations[method] += localizations

    def table(self) -> pd.DataFrame:
        """One row per method: localizations, seconds, seconds_per_localization."""
        rows = [(name, self._localizations[name], seconds) for name, seconds in self._seconds.items()]
        table = pd.DataFrame(rows, columns=["method", "localizations", "seconds"])
        return table.assign(seconds_per_localization=table["seconds"] / table["localizations"])
