"""The one exception type of this package, and how its messages quote the errors of others."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

# What to do about an error of the operating system, by its number.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there, or name a folder on another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to, or name another folder"),
    errno.EROFS: "name a folder that can be written to",
    errno.ENAMETOOLONG: "shorten the name",
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "remove what lies there, or name another place"),
    **dict.fromkeys((errno.ENOENT, errno.ELOOP), "put it there, or name another place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files, as with ulimit -n 4096"),
    errno.EIO: "see that the disk is well, or name a folder on another one",
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN), "end other programs, or lower the settings that take memory"),
}


class TraceFLError(Exception):
    """An error that the user can correct: the message quotes the value and says what to do."""

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.splitlines()))  # a quoted name may hold line breaks


def require(holds: object, sentence: str) -> None:
    """Raise TraceFLError with this sentence unless `holds` is true."""
    if not holds:
        raise TraceFLError(sentence)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop and number, to quote in a message.

    Example:
        >>> first_line(OSError("no such host.\\nmore"))
        'no such host'
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return re.sub(r"^\[Errno \d+\] ", "", line)


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


def os_sentence(error: OSError, place: str) -> str:
    """An error of the operating system as a sentence: where, what, and what to do.

    Args:
        error: It names its file or not, as a full disk does not.
        place: What is named then, such as "storage.dir=logs".

    Example:
        >>> os_sentence(OSError(errno.ENAMETOOLONG, "File name too long"), "storage.dir=logs")
        'storage.dir=logs cannot be used (File name too long): shorten the name.'
    """
    files = (name for name in (error.filename, error.filename2) if name is not None)
    named = next((os.fsdecode(name) if isinstance(name, str | bytes) else str(name) for name in files), place)
    remedy = REMEDIES.get(error.errno or 0, "see that it is there, and that this user may read and write it")
    return f"{named} cannot be used ({error.strerror or first_line(error)}): {remedy}."
