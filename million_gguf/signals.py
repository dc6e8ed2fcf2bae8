"""Signals while native code runs.

A Python signal handler that raises is lost when it runs inside a ctypes callback (a log line, say): ctypes prints the
exception and drops it. ``deferred`` holds such handlers back until the native call is over.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

# What ends a program without a word: a request to, and the end of its terminal (not on Windows).
STOPPING: tuple[int, ...] = (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """A handler for STOPPING that unwinds the stack, so that temporary files are removed."""
    raise SystemExit(128 + number)


_RAISING = (signal.default_int_handler, terminate)  # handlers of others are left alone: they may do anything


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold Ctrl-C and STOPPING back while the block runs, if they would raise; they do so when it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    held: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, *STOPPING):
            handler = signal.getsignal(number)
            if handler in _RAISING:
                held[number] = handler
                signal.signal(number, lambda n, frame: came.append(n))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            held[came[0]](came[0], None)
