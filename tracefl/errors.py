"""The one exception type of this package, and how its messages quote the errors of others."""

from collections.abc import Iterator
from contextlib import contextmanager


class TraceFLError(Exception):
    """An error that the user can correct: the message quotes the value and says what to do."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.splitlines()))  # a quoted name may hold line breaks


def require(holds: object, sentence: str) -> None:
    """Raise TraceFLError with this sentence unless `holds` is true."""
    if not holds:
        raise TraceFLError(sentence)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop, to quote in a message.

    Example:
        >>> first_line(OSError("no such host.\\nmore"))
        'no such host'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def as_sentence(problem: str, remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these errors of a block into a TraceFLError, "PROBLEM (what the error says): REMEDY."

    Example:
        >>> with as_sentence("x cannot be read", "name another", OSError):
        ...     raise OSError("no such host")
        Traceback (most recent call last):
        tracefl.errors.TraceFLError: x cannot be read (no such host): name another.
    """
    try:
        yield
    except errors as error:
        raise TraceFLError(f"{problem} ({first_line(error)}): {remedy}.") from error
