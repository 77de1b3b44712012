"""The one exception type of this package."""


class TraceFLError(Exception):
    """What a user can mend: the message quotes the offending value and names the remedy."""
