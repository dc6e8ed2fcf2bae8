"""Tables and prose on stdout, and the numbers in them."""

from __future__ import annotations

import math
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 80  # of prose: what every terminal has
_PIPE_WIDTH = 120  # columns when the output is not a terminal
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def print_table(made: Table) -> None:
    """Print a table, as wide as the terminal lets it be. No line ends in spaces, as rich's do: files and diffs show them."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    with console.capture() as capture:
        console.print(made)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()), flush=True)


def print_prose(text: str, indent: str = "", hanging: str | None = None) -> None:
    """Print a paragraph, broken between words; ``hanging`` is put before all lines but the first."""
    print(textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent if hanging is None else hanging))


def table(title: str | None, columns: tuple[str, ...], n_left: int = 1) -> Table:
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
