"""Every step that a process takes in the file system, counted; at one of them it dies, or the disk is full.

A step is a file opened for writing, a write, a flush, a rename, a folder made, a file or folder removed. A process that
is dead takes no further step; a write at which it dies writes half of its bytes. A disk that is full stays full.
"""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

GROWS = ("open", "write", "fsync", "replace", "mkdir")  # what a full disk refuses


class Killed(BaseException):
    """The process is dead. Nothing catches this."""


class Steps:
    """Counts the steps of `storage`'s files; from step `at` on, a process is dead or the disk is full.

    Args:
        at: the number of the step, from 1; 0: none.
        full: whether the disk is full, or else the process dead.
    """

    def __init__(self, at: int = 0, full: bool = False) -> None:
        self.at, self.full, self.taken, self.dead = at, full, list[str](), False

    def take(self, kind: str, half: Callable[[], object] = lambda: None) -> None:
        """Called before a step; `half` does half of it."""
        if not self.dead:
            self.taken.append(kind)
            self.dead = len(self.taken) == self.at
            if self.dead:
                half()
        if self.dead and not self.full:
            raise Killed
        if self.dead and kind in GROWS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        """Put the counting calls in the place of the real ones."""
        for name, kind in {"fsync": "fsync", "replace": "replace", "mkdir": "mkdir", "unlink": "unlink"}.items():
            patch.setattr(os, name, self._counted(kind, getattr(os, name)))
        for name in ("rmdir", "rename"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        real = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return real(file, mode, *args, **kwargs)
            self.take("open")
            return Writing(real(file, mode, *args, **kwargs), self)

        patch.setattr(io, "open", opened)
        if "pathlib" in sys.modules:
            patch.setattr("pathlib.io.open", opened)

    def _counted(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if not (kind == "mkdir" and os.path.exists(args[0])):  # which is no step
                self.take(kind)
            return real(*args, **kwargs)

        return step


class Writing:
    """A file that is being written."""

    def __init__(self, handle: Any, steps: Steps) -> None:
        self._handle, self._steps = handle, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def write(self, content: Any) -> int:
        """In two halves, so that a process may die between."""
        view = memoryview(content).cast("B") if not isinstance(content, str) else content

        def half() -> None:
            self._handle.write(view[: len(view) // 2])
            self._handle.flush()

        self._steps.take("write", half)
        return self._handle.write(view)
