"""How files of a run are written: whole, flushed to disk, and by one process at a time."""

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock, Timeout

from tracefl.errors import TraceFLError, as_sentence, require
from tracefl.states import State, as_file

LOCK = ".lock"
PARTIAL = ".tmp"  # `.NAME.tmp` is what is written of NAME by now


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder for writing. What a dead process was writing is removed.

    Raises:
        TraceFLError: another process, or another part of this one, holds it; it is not waited for.
    """
    with _held(folder):
        sweep(folder)
        yield


def holds(folder: Path) -> bool:
    """Whether this process holds a folder."""
    return lock_of(folder).is_locked


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    with as_sentence(f"{folder} cannot be made for a run", "choose another folder", OSError):
        make_folder(folder)
    lock, busy = lock_of(folder), f"{folder} is being written by another process"
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
    if holds(folder):
        yield
    else:
        with _held(folder):
            yield


@contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Hold a folder, once no other process does. What a dead process was writing is removed.

    Raises:
        TraceFLError: it cannot be made or written to.
    """
    with as_sentence(f"{folder} cannot be written to", "choose another folder", OSError):
        lock = lock_of(folder)
        while True:
            make_folder(folder)
            lock.acquire()
            if (folder / LOCK).exists():
                break
            lock.release()  # another process has removed the folder
    try:
        sweep(folder)
        yield
    finally:
        lock.release()


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder: one object in this process, held by all its threads."""
    return FileLock(folder.resolve() / LOCK, is_singleton=True, thread_local=False)


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
        TraceFLError: a tensor is of a type that the format does not know, or it cannot be written.
    """
    parts, digest = as_file(state, metadata), hashlib.sha256()
    for part in parts:
        digest.update(part)
    write_atomically(file, *parts)
    return digest.hexdigest()


def write_atomically(file: Path, *content: bytes | memoryview) -> None:
    """Write so that the file has its old content or the new one, also after a power cut.

    Raises:
        TraceFLError: the disk is full, a folder is in its place, ...; the old content is kept.
    """
    partial = file.with_name(f".{file.name}{PARTIAL}")
    remedy = "make room or correct the path, then run the same command again"
    with as_sentence(f"{file} cannot be written", remedy, OSError):
        make_folder(file.parent)
        try:
            with partial.open("wb") as handle:
                for part in content:
                    handle.write(part)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, file)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        flush_folder(file.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they are there after a power cut too."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in made:
        flush_folder(each.parent)


def flush_folder(folder: Path) -> None:
    """Write a folder's list of names to disk, on systems that let a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # the file system has no such thing
            raise
    finally:
        os.close(handle)


def read_file(file: Path, remedy: str) -> bytes:
    """The content of an ordinary file; of a link to one too.

    Args:
        file: its path.
        remedy: what the user can do if it cannot be read.

    Raises:
        TraceFLError: it is missing, a folder, a pipe or a device, or may not be read.
    """
    with as_sentence(f"{file} cannot be read", remedy, OSError, ValueError):
        require(file.is_file() or not file.exists(), f"{file} must be a file, and is something else: {remedy}")
        return file.read_bytes()


def sweep(folder: Path) -> None:
    """Remove what a process that died while it wrote here has left; the caller holds the folder."""
    for left in [*folder.rglob(f".*{PARTIAL}")]:
        with suppress(OSError):
            left.unlink()
