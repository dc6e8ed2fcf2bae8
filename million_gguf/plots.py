"""The plots of ``million eval`` and ``million bench``, as PNG. Needs matplotlib, which only they do."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .spec import PQ_TYPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_SIZE_INCHES = (7.0, 4.6)
_TITLE_SIZE, _LABEL_SIZE = 11, 8  # points
_CHARS_PER_INCH = 12.5  # of a title
_MARKER_PX = 6.0
_MIN_DEPTH_FOR_TICKS = 4096  # below, matplotlib's own ticks are short enough
_LABEL_PLACES = (  # offset in points from the marker, horizontal and vertical alignment; best first
    (6, 4, "left", "bottom"),
    (7, 0, "left", "center"),
    (6, -4, "left", "top"),
    (-6, 4, "right", "bottom"),
    (-7, 0, "right", "center"),
    (-6, -4, "right", "top"),
    (0, -7, "center", "top"),
    (0, 7, "center", "bottom"),
)
_PQ_COLOUR, _OTHER_COLOUR = "#1f5fb4", "#c4622d"
_CYCLE = ("#1f5fb4", "#c4622d", "#3a8a3a", "#8450a8", "#7a5230", "#d0538f", "#5f6a75", "#a89a1e")


def check(path: Path) -> None:
    """Raises InputError when a plot could not be written there: better before a long run than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install 'million-gguf[plot]', or leave --plot out") from None
    if path.suffix.lower() != ".png":
        raise InputError(f"--plot is {path}, need a file name that ends in .png")
    if not path.parent.is_dir():
        raise InputError(f"--plot is {path}, and there is no folder {path.parent}: make it first")


def kl_by_bits(path: Path, title: str, panels: Mapping[str, Sequence[Mapping[str, Any]]], subtitle: str = "") -> None:
    """Mean and 99.9% KL divergence against bits per element, to ``path``.

    Args:
        panels: by heading ("" for none), rows of ``million eval``: "type", "type_k", "type_v", "bits_per_element",
            "kl_mean", "kl_p999"; f16 is left out.
        subtitle: a line below the title, smaller.
    """
    _save(kl_figure(title, panels, subtitle), path)


def kl_figure(title: str, panels: Mapping[str, Sequence[Mapping[str, Any]]], subtitle: str = "") -> Figure:
    """The figure of ``kl_by_bits``."""
    figure, all_axes = _figure(title, subtitle, len(panels), sharey=True)
    for axes, (heading, rows) in zip(all_axes, panels.items(), strict=True):
        shown = [row for row in rows if row["kl_mean"] is not None and row["kl_mean"] > 0]
        for label, pq, colour in (("PQ", True, _PQ_COLOUR), ("llama.cpp's types", False, _OTHER_COLOUR)):
            group = sorted((r for r in shown if _has_pq(r) == pq), key=lambda r: r["bits_per_element"])
            if not group:
                continue
            bits = [r["bits_per_element"] for r in group]
            mean, high = [r["kl_mean"] for r in group], [r["kl_p999"] for r in group]
            axes.vlines(bits, mean, high, color=colour, linewidth=0.8, alpha=0.35)  # which two belong together
            style: dict[str, Any] = {"linestyle": "none", "color": colour}
            axes.plot(bits, mean, label=f"{label}: mean", marker="o", markersize=6, **style)
            axes.plot(
                bits,
                high,
                label=f"{label}: 99.9% of tokens are below",
                marker="^",
                markersize=5,
                markerfacecolor="white",
                **style,
            )
        axes.set_yscale("log")
        axes.set_xlim(0, 1.12 * max((row["bits_per_element"] for row in shown), default=1))  # room for the last label
        axes.set_xlabel("cache size (bits per element)")
        axes.set_title(heading, fontsize=10)
    all_axes[0].set_ylabel("KL divergence from f16 (nats per token)")
    _finish(figure, all_axes[-1:])
    for axes, rows in zip(all_axes, panels.values(), strict=True):
        _place_labels(
            figure,
            axes,
            [(r["type"], r["bits_per_element"], r["kl_mean"], r["kl_p999"]) for r in rows if r["kl_mean"]],
        )
    return figure


def _place_labels(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float, float]]) -> None:
    """Write (text, x, y, y of another marker) beside its point, where it covers neither a marker nor another text."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # the canvas is Agg's
    taken = []
    for _, x, *ys in points:
        for y in ys:
            px, py = axes.transData.transform((x, y))
            taken.append(Bbox.from_bounds(px - _MARKER_PX, py - _MARKER_PX, 2 * _MARKER_PX, 2 * _MARKER_PX))
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer))
    for text, x, y, _ in points:
        for dx, dy, ha, va in _LABEL_PLACES:
            label = axes.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=_LABEL_SIZE
            )
            box = label.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken) and axes.bbox.contains(*box.min):
                break
            label.remove()
        else:  # crowded everywhere: better there than not at all
            label = axes.annotate(
                text, (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=_LABEL_SIZE
            )
            box = label.get_window_extent(renderer)
        taken.append(box)


def speed_by_depth(
    path: Path, title: str, panels: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]], subtitle: str = ""
) -> None:
    """Speed against depth, medians with the range of all repetitions, to ``path``.

    Args:
        panels: (heading, kind, rows): rows of ``million bench``, of which "type", "depth" and the kind, "decode" or
            "prefill", are used; this is None or a mapping with "median", "min" and "max" in tokens per second.
        subtitle: a line below the title, smaller.
    """
    figure, all_axes = _figure(title, subtitle, len(panels))
    names = list(dict.fromkeys(row["type"] for _, _, rows in panels for row in rows))
    for axes, (heading, kind, rows) in zip(all_axes, panels, strict=True):
        for name in names:
            points = [(r["depth"], r[kind]) for r in rows if r["type"] == name and r[kind] is not None]
            if not points:
                continue
            median = [p["median"] for _, p in points]
            spread = (
                [m - p["min"] for m, (_, p) in zip(median, points, strict=True)],
                [p["max"] - m for m, (_, p) in zip(median, points, strict=True)],
            )
            axes.errorbar(
                [depth for depth, _ in points],
                median,
                yerr=spread,
                marker="o",
                markersize=4,
                linewidth=1.5,
                capsize=3,
                color=_CYCLE[names.index(name) % len(_CYCLE)],  # a type has one colour in all panels
                label=name,
            )
        axes.set_title(heading, fontsize=10)
        _set_depth_ticks(axes, max((row["depth"] for row in rows), default=0))
        axes.set_xlabel("depth (tokens in the cache)")
        axes.set_ylabel("speed (tokens/s)")
        axes.set_ylim(bottom=0)
    _finish(figure, all_axes)
    _save(figure, path)


def _set_depth_ticks(axes: Axes, most: int) -> None:
    """Ticks at powers of two, as people write depths: "32K"."""
    if most < _MIN_DEPTH_FOR_TICKS:
        return
    step = 1 << (most - 1).bit_length() - 3
    ticks = range(0, most + 1, step)
    axes.set_xticks(ticks, [f"{tick / 1024:g}K" if tick else "0" for tick in ticks])


def _has_pq(row: Mapping[str, Any]) -> bool:
    return row["type_k"] in PQ_TYPES or row["type_v"] in PQ_TYPES


def _figure(title: str, subtitle: str, n: int, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its ``n`` axes, side by side. No window system is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _SIZE_INCHES
    figure = Figure(figsize=(width * (1.0 if n == 1 else 0.75 * n), height), layout="constrained")
    FigureCanvasAgg(figure)  # measures text
    all_axes = list(figure.subplots(1, n, squeeze=False, **options)[0])
    # A long name of a model or a machine goes on in the next line instead of beyond the picture.
    figure_chars = int(figure.get_figwidth() * _CHARS_PER_INCH)
    lines = textwrap.wrap(title, figure_chars)
    figure.suptitle("\n".join(lines), fontsize=_TITLE_SIZE)
    if subtitle:
        figure.supxlabel("\n".join(textwrap.wrap(subtitle, figure_chars)), fontsize=_LABEL_SIZE, color="#555555")
    return figure, all_axes


def _finish(figure: Figure, with_legend: Sequence[Axes]) -> None:
    """Grid, legends and layout: from here on, places in the figure are what they will be in the file."""
    for axes in figure.axes:
        axes.grid(True, which="major", alpha=0.3)
    for axes in with_legend:
        axes.legend(fontsize=_LABEL_SIZE)
    figure.draw_without_rendering()


def _save(figure: Figure, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, dpi=_DPI, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
