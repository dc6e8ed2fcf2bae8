"""What llama.cpp logs, kept so that an exception can carry the reason of a failure.

llama.cpp reports a failure as NULL or a negative number and says why in its log. ``install`` puts a handler of ours in the
place of llama_cpp's; ``collect`` gathers the lines logged while a block runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ..signals import deferred

_WARN, _ERROR, _CONT = 3, 4, 5  # enum ggml_log_level in ggml.h
_MAX_LINES = 200  # a failing load logs a handful of errors; a flood of warnings must not grow without bound

# Lines that only repeat that something failed; the line before them says why.
_EMPTY_PHRASES = (
    "failed to load model",
    "failed to initialize the context",
    "failed to create context",
    "failed to initialize llama_context",
    "failed to decode",
)

_collectors: list[Collected] = []
_installed: Any = None  # the ctypes callback: the library holds only a bare pointer to it


class Collected:
    """Lines logged during one ``collect`` block, with their levels."""

    def __init__(self, echo: bool) -> None:
        self.echo = echo
        self._lines: list[tuple[int, str]] = []
        self._level = 0

    def add(self, level: int, text: str) -> None:
        if level == _CONT:
            if self._lines and self._level >= _WARN:
                self._lines[-1] = (self._level, self._lines[-1][1] + text)
            return
        self._level = level
        if level in (_WARN, _ERROR) and len(self._lines) < _MAX_LINES:
            self._lines.append((level, text))

    def reason(self, default: str = "") -> str:
        """The errors as one line of text, or the warnings when there was no error, or ``default``."""
        for wanted in (_ERROR, _WARN):
            lines = [text.strip() for level, text in self._lines if level == wanted]
            telling = [t for t in lines if t and not any(p in t and t.endswith(p) for p in _EMPTY_PHRASES)]
            unique = list(dict.fromkeys(" ".join(t.split()) for t in (telling or lines) if t))
            if unique:
                return "; ".join(unique[-4:])
        return default


@contextlib.contextmanager
def collect(*, echo: bool = True) -> Iterator[Collected]:
    """Gather what llama.cpp logs while the block runs. Without ``echo`` it does not reach stderr.

    Ctrl-C is held back meanwhile: raised inside the log handler it would be lost.
    """
    collected = Collected(echo)
    with deferred():
        _collectors.append(collected)
        try:
            yield collected
        finally:
            _collectors.remove(collected)


def install(llama_cpp: ModuleType) -> None:
    """Handle llama.cpp's log from now on. A second call changes nothing.

    As with llama_cpp's own handler, ``Llama(verbose=True)`` shows everything and ``verbose=False`` errors only; that
    handler, though, numbers the levels as older versions of ggml.h did.
    """
    global _installed
    if _installed is not None:
        return
    logger = logging.getLogger("llama-cpp-python")  # its level is where llama_cpp keeps ``verbose``
    shown = False  # whether the last line was: what level it has, its continuation has too

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def on_log(level: int, text: bytes | None, user_data: Any) -> None:
        nonlocal shown
        message = (text or b"").decode("utf-8", "replace")
        if level != _CONT:
            shown = logger.level == logging.DEBUG or level == _ERROR
        echo = shown
        for collected in list(_collectors):
            collected.add(level, message)
            echo = echo and collected.echo
        if echo:
            print(message, end="", flush=True, file=sys.stderr)

    _installed = on_log
    llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
