"""Change a sealed JSON file and seal it again, as a forger would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracefl.sealed import KEY, sealed


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """`change` edits the entries in place, or returns others."""
    entries = json.loads(file.read_text())
    seal = entries.pop(KEY, None)
    entries = change(entries) or entries
    text = json.dumps(entries, indent=1)
    file.write_bytes(sealed(text) if seal else text.encode())
