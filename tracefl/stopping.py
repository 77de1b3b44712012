"""Ctrl-C and SIGTERM: a word at once, an end within seconds, and the second time at once.

Python handles a signal between two steps of the main thread, which may be minutes away inside of a
library. The operating system tells a thread of this module at once (`signal.set_wakeup_fd`): it
says so, and ends the process if the main thread has not done it in time.
"""

import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENDS_WITHIN_S = 4.0
KEPT = "interrupted: complete rounds are kept, the same command goes on from there"
WORD = f"{KEPT} (this ends within 5 s; once more ends it at once)"


class Stoppable:
    """While entered, the first signal interrupts the main thread, the second ends the process.

    A signal that the process ignores, as SIGINT in the background of a script, stays ignored. In
    another thread than the main one, nothing changes.

    Attributes:
        received: The first signal, 0 while there is none.

    Raises:
        SystemExit: On leaving after a signal, with its number and 128: 130 or 143.
    """

    def __init__(self) -> None:
        self.received, self._interrupted = 0, False
        self._said = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            told, self._tells = socket.socketpair()
            self._tells.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(self._tells.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._interrupt)
            threading.Thread(target=self._watch, args=(told,), name="stopping", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.received:
            self._said.wait(1)
            sys.exit(128 + self.received)  # it goes on watching: other threads and libraries may take their time
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._tells.close()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        first, self._interrupted = not self._interrupted, True
        self.received = self.received or number
        if first:  # the second one is the watching thread's
            raise KeyboardInterrupt

    def _watch(self, told: socket.socket) -> None:
        with told:
            for number in filter(self._previous.__contains__, iter(lambda: (told.recv(1) or b"\0")[0], 0)):
                if self._said.is_set():
                    self._end()
                self.received = self.received or number
                os.write(2, f"{WORD}\n".encode())
                self._said.set()
                clock = threading.Timer(ENDS_WITHIN_S, self._end)
                clock.daemon = True
                clock.start()

    def _end(self) -> None:
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # progress bars hide the cursor
        for process in _descendants(os.getpid()):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        os._exit(128 + self.received)


def _descendants(process: int) -> list[int]:
    """What a process has started, and what that has; nothing where there is no /proc."""
    children = list[int]()
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            children += map(int, file.read_text().split())
    return [*children, *(below for child in children for below in _descendants(child))]
