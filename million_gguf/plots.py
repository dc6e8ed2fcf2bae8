"""The plots of ``million eval`` and ``million bench``, as PNG. Needs matplotlib, which only they do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .spec import PQ_TYPES

_DPI = 150
_SIZE_INCHES = (7.0, 4.6)
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


def kl_by_bits(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Mean and 99.9% KL divergence against bits per element.

    Args:
        rows: of ``million eval``: "type", "type_k", "bits_per_element", "kl_mean", "kl_p999"; f16 is left out.
    """
    figure, axes = _figure(title)
    shown = [row for row in rows if row["kl_mean"] is not None and row["kl_mean"] > 0]
    for label, pq, colour in (("PQ", True, _PQ_COLOUR), ("llama.cpp's types", False, _OTHER_COLOUR)):
        group = sorted((r for r in shown if _has_pq(r) == pq), key=lambda r: r["bits_per_element"])
        for key, what, style in (
            ("kl_mean", "mean", {"marker": "o", "markersize": 6}),
            ("kl_p999", "99.9% of tokens", {"marker": "^", "markersize": 5, "markerfacecolor": "white"}),
        ):
            if group:
                bits, kl = [r["bits_per_element"] for r in group], [r[key] for r in group]
                axes.plot(bits, kl, linestyle="none", color=colour, label=f"{label}, {what}", **style)
        for row in group:
            axes.annotate(
                row["type"],
                (row["bits_per_element"], row["kl_mean"]),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.set_yscale("log")
    axes.set_xlim(0, 1.12 * max((row["bits_per_element"] for row in shown), default=1))  # room for the last label
    axes.set_xlabel("cache size (bits per element)")
    axes.set_ylabel("KL divergence from f16 (nats per token)")
    _save(figure, axes, path)


def speed_by_depth(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Decode and prefill speed against depth, medians with the range of all repetitions.

    Args:
        rows: of ``million bench``: "type", "depth", and for "decode" and "prefill" None or a mapping with
            "median", "min" and "max" in tokens per second.
    """
    kinds = [kind for kind in ("decode", "prefill") if any(row[kind] is not None for row in rows)]
    figure, all_axes = _figure(title, n=len(kinds))
    for axes, kind in zip(all_axes, kinds, strict=True):
        for i, name in enumerate(dict.fromkeys(row["type"] for row in rows)):
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
                color=_CYCLE[i % len(_CYCLE)],
                label=name,
            )
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("depth (tokens in the cache)")
        axes.set_ylabel("speed (tokens/s)")
        axes.set_ylim(bottom=0)
    _save(figure, all_axes, path)


def _has_pq(row: Mapping[str, Any]) -> bool:
    return row["type_k"] in PQ_TYPES or row["type_v"] in PQ_TYPES


def _figure(title: str, n: int | None = None) -> tuple[Any, Any]:
    """A figure and its axes; a list of ``n`` axes side by side when n is given. No window system is touched."""
    from matplotlib.figure import Figure

    width, height = _SIZE_INCHES
    figure = Figure(figsize=(width * (1.5 if n == 2 else 1.0), height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    if n is None:
        return figure, figure.subplots()
    return figure, list(figure.subplots(1, n, squeeze=False)[0])


def _save(figure: Any, axes: Any, path: Path) -> None:
    for each in axes if isinstance(axes, list) else [axes]:
        each.grid(True, which="major", alpha=0.3)
        each.legend(fontsize=8)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, dpi=_DPI, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
