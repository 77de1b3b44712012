"""JSON files that end with the SHA-256 of all that stands before it, so that a change is noticed.

Whoever changes such a file on purpose can write another hash: it tells damage, not forgery.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tracefl.errors import TraceFLError, first_line, require
from tracefl.files import read_file

KEY = "content_sha256"
_END = re.compile(rb',\n "' + KEY.encode() + rb'": "([0-9a-f]{64})"\n\}\Z')


def sealed(text: str) -> bytes:
    """The content of a sealed file.

    Args:
        text: an object with at least one entry, as `json.dumps(value, indent=1)` writes it.

    Example:
        >>> written = sealed('{\\n "a": 1\\n}')
        >>> list(json.loads(written)), _END.search(written) is not None
        (['a', 'content_sha256'], True)
    """
    before = text.removesuffix("\n}").encode()
    return before + f',\n "{KEY}": "{hashlib.sha256(before).hexdigest()}"\n}}'.encode()


def read_sealed(file: Path, remedy: str) -> tuple[bytes, dict[str, Any]]:
    """A JSON file as it is, and its entries; `KEY` among them if it is sealed.

    Args:
        file: its path.
        remedy: what the user can do if it is damaged.

    Raises:
        TraceFLError: it cannot be read, holds no JSON object, or was changed since it was sealed.
    """
    content = read_file(file, remedy)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TraceFLError(f"{file} is no JSON ({first_line(error)}): {remedy}") from None
    require(isinstance(found, dict), f"{file} must hold a JSON object, got a {type(found).__name__}: {remedy}")
    end = _END.search(content)
    told = end and hashlib.sha256(content[: end.start()]).hexdigest() == seal_of(content)
    require(told or KEY not in found, f"{file} is not as it was written (its {KEY} is another): {remedy}")
    return content, found


def seal_of(content: bytes) -> str | None:
    """The hash that a sealed file ends with, not compared; None where there is none.

    Example:
        >>> seal_of(sealed('{\\n "a": 1\\n}'))[:8], seal_of(b"{}")
        ('a62d71e0', None)
    """
    end = _END.search(content)
    return end[1].decode() if end else None
