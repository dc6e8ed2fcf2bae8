"""Ctrl-C while native code runs.

Python runs a signal handler between two bytecodes, so a long llama_decode would not notice Ctrl-C until it returns.
``Interrupt`` turns the signal into a flag that llama.cpp asks for between the nodes of its graph (on the CPU; a GPU
finishes its batch first).
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ..signals import STOPPING, terminate
from . import native


class Interrupt:
    """While entered, SIGINT and SIGTERM set ``requested`` instead of raising; a second signal raises at once. So does whatever
    else the program ends by when it is our command (``signals.STOPPING``).

    In any thread but the main one signals never arrive, and nothing is changed.

    Attributes:
        requested: a signal came.
        received: which one.
        callback: a ``ggml_abort_callback`` that returns ``requested``; keep this object alive while llama.cpp has it.
    """

    def __init__(self, *signals: int) -> None:
        self.requested = False
        self.received: int | None = None
        ours = (n for n in STOPPING if signal.getsignal(n) is terminate)
        self._signals = signals or tuple(dict.fromkeys((signal.SIGINT, signal.SIGTERM, *ours)))
        self._previous: dict[int, Any] = {}
        self.callback = native.llama_cpp().ggml_abort_callback(lambda _: self.requested)

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._raise(number)
        self.requested = True
        self.received = number

    @staticmethod
    def _raise(number: int | None) -> None:
        if number in STOPPING:
            terminate(number, None)
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt (SystemExit for one of STOPPING) when a signal came."""
        if self.requested:
            self._raise(self.received)
