"""Wall seconds per localization, measured the same way for every method."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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

    def rows(self) -> list[dict[str, Any]]:
        """For each method its name, localizations and seconds; plain JSON."""
        sums = dict[str, dict[str, Any]]()
        for method, localizations, seconds in self._measured:
            row = sums.setdefault(method, {"method": method, "localizations": 0, "seconds": 0.0})
            row["localizations"] += localizations
            row["seconds"] += seconds
        return list(sums.values())
