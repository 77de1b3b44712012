"""How files of a run are written: whole, flushed to disk, and by one process at a time."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.states import State, as_file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for writing.

    Raises:
        TraceFLError: another process, or another part of this one, holds it; it is not waited for.
    """
    with as_sentence(f"{folder} cannot be made for a run", "choose another folder", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    lock, busy = _lock(folder), f"{folder} is being written by another process"
    remedy = "wait for it, or choose another folder (exp_key)"
    require(not lock.is_locked, f"{folder} is being written by another process or recorder: {remedy}")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        raise TraceFLError(f"{busy}: {remedy}") from None
    except OSError as error:
        raise TraceFLError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from error
    with held:
        yield


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The same for a moment, unless this process holds the folder already."""
    if _lock(folder).is_locked:
        yield
    else:
        with locked(folder):
            yield


def _lock(folder: Path) -> FileLock:
    """The lock of a folder: one object in this process, held by all its threads."""
    return FileLock(folder.resolve() / ".lock", is_singleton=True, thread_local=False)


def file_stem(client: str) -> str:
    """A name for a client's file: the id where it is plain, else quoted and told apart by its hash.

    No id leads out of the folder, and none is another's on a disk that ignores upper case.

    Example:
        >>> file_stem("7"), file_stem("../b")
        ('7', '..%2Fb-95cd9069')
    """
    if re.fullmatch(r"[a-z0-9_-]{1,64}", client):
        return client
    return f"{quote(client, safe='')[:100]}-{hashlib.sha256(client.encode()).hexdigest()[:8]}"


def write_state(file: Path, state: State, metadata: dict[str, str] | None = None) -> str:
    """Write a state dict as safetensors, atomically; return the file's SHA-256.

    Each tensor is hashed and written from where it is.

    Raises:
        TraceFLError: a tensor is of a type that the format does not know.
    """
    parts, digest = as_file(state, metadata), hashlib.sha256()
    for part in parts:
        digest.update(part)
    write_atomically(file, *parts)
    return digest.hexdigest()


def write_atomically(file: Path, *content: bytes | memoryview) -> None:
    """Write so that the file has its old content or the new one, also after a power cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp")
    with partial.open("wb") as handle:
        for part in content:
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, file)
