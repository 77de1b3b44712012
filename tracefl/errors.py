"""The one exception type of this package, and how its messages quote the errors of others."""


class TraceFLError(Exception):
    """An error that the user can correct: the message quotes the value and says what to do."""


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
