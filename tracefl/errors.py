"""The one exception type of this package."""


class TraceFLError(Exception):
    """What a user can mend: the message quotes the offending value and names the remedy."""


def require(holds: object, sentence: str) -> None:
    """Raise TraceFLError with this sentence unless `holds` is true."""
    if not holds:
        raise TraceFLError(sentence)
