"""Tables on stdout, and the numbers in them."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 120  # columns when the output is not a terminal
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def stdout_console() -> Console:
    """A rich console on stdout; as wide as the terminal, if it is one."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def table(title: str, columns: tuple[str, ...], n_left: int = 1) -> Table:
    """A table without borders that fits 80 columns; the first ``n_left`` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, title=title, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for i, heading in enumerate(columns):
        made.add_column(heading, justify="left" if i < n_left else "right", overflow="fold")
    return made


def size(n_bytes: float) -> str:
    """Bytes with a binary unit: "640 B", "1.5 GiB"."""
    step = 0
    while abs(n_bytes) >= 1024 and step < len(_BINARY) - 1:
        n_bytes /= 1024
        step += 1
    return f"{n_bytes:.0f} B" if step == 0 else f"{n_bytes:.1f} {_BINARY[step]}"


def context(n_tokens: int) -> str:
    """A context length as people write it: "118K", "1.5M"; small ones in full."""
    if n_tokens >= 1 << 20:
        return f"{n_tokens / (1 << 20):.1f}M"
    return f"{n_tokens // 1024}K" if n_tokens >= 10 * 1024 else str(n_tokens)


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
