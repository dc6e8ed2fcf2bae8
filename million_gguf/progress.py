"""Progress on stderr: a bar with an estimate of the time left, or nothing when stderr is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# Short enough that a line does not fill 80 columns: in a full one the terminal's echo of Ctrl-C begins a new line, and rich
# draws the bar a second time.
_BAR_WIDTH = 24


def stderr_console() -> Console:
    """A rich console on stderr. The stream is looked up at each call, so that redirection is honoured."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


class Stage:
    """One step of a longer job. ``advance(n)`` and ``set(n)`` are safe to call whether or not a bar is shown."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task

    def advance(self, n: float = 1) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n)

    def set(self, done: float, total: float | None = None) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)


@contextlib.contextmanager
def stage(description: str, total: float | None = None, *, enabled: bool = True) -> Iterator[Stage]:
    """Show a bar named ``description`` for ``total`` units of work while the block runs."""
    if not enabled or not sys.stderr.isatty():
        yield Stage(None, None)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=_BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr_console()) as progress:
        yield Stage(progress, progress.add_task(description, total=total))


def note(text: str, *, enabled: bool = True) -> None:
    """One line for the person at the terminal; part of no output that a program would read."""
    if enabled:
        print(text, file=sys.stderr, flush=True)
