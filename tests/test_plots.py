"""The figures of ``million eval`` and ``million bench``: nothing covers anything, nothing leaves the picture."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from million_gguf import plots

# As they came from a small model: three types within a bit and a factor of 1.4 of each other.
ROWS = [
    ("f16", 16.0, None, None),
    ("q8_0", 8.5, 1.5e-5, 1.12e-4),
    ("q5_1", 6.0, 4.07e-4, 4.86e-3),
    ("q5_0", 5.5, 6.05e-4, 7.28e-3),
    ("q4_1", 5.0, 2.094e-3, 3.37e-2),
    ("q4_0", 4.5, 2.328e-3, 2.62e-2),
    ("iq4_nl", 4.5, 1.691e-3, 2.03e-2),
    ("pq4", 4.0, 9.64e-4, 1.34e-2),
    ("pq3", 3.0, 3.595e-3, 3.93e-2),
    ("pq4/pq2", 3.0, 9.35e-4, 1.2e-2),
    ("pq2", 2.0, 1.29e-2, 0.173),
]


def kl_rows() -> list[dict[str, Any]]:
    return [
        {
            "type": name,
            "type_k": name.split("/")[0],
            "type_v": name.split("/")[-1],
            "bits_per_element": bits,
            "kl_mean": mean,
            "kl_p999": high,
        }
        for name, bits, mean, high in ROWS
    ]


@pytest.mark.parametrize("headings", [("",), ("exact tail of 128", "every token coded")])
def test_labels_cover_nothing(headings: tuple[str, ...]) -> None:
    figure = plots.kl_figure("A model: distance of KV cache types from f16", {h: kl_rows() for h in headings}, "a text")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes:
        assert [t.get_text() for t in axes.texts] == [name for name, *_ in ROWS[1:]]
        boxes = [t.get_window_extent(renderer) for t in axes.texts]
        for a, b in combinations(boxes, 2):
            assert not a.overlaps(b)
        legend = axes.get_legend()
        for box in boxes:
            assert axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            assert legend is None or not legend.get_window_extent(renderer).overlaps(box)
        for _, bits, *kl in ROWS[1:]:
            for y in kl:
                assert not any(box.contains(*axes.transData.transform((bits, y))) for box in boxes)
    assert figure.axes[-1].get_legend() is not None


def test_every_axis_has_a_unit() -> None:
    figure = plots.kl_figure("t", {"": kl_rows()})
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "cache size (bits per element)",
        "KL divergence from f16 (nats per token)",
    )


def test_long_names_stay_in_the_picture(tmp_path: Path) -> None:
    speed = {"median": 100.0, "min": 90.0, "max": 101.0}
    rows = [{"type": t, "depth": d, "decode": speed, "prefill": None} for t in ("f16", "pq4") for d in (0, 4096)]
    title = "A model of which the name is longer than anybody would think: speed of KV cache types"
    machine = "Some CPU 9654 96-Core Processor, 192 threads" + "; NVIDIA H100 80GB HBM3" * 4
    figure, _ = plots._figure(title, machine, 1)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for text in (figure._suptitle, figure._supxlabel):  # type: ignore[attr-defined]
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    path = tmp_path / "speed.png"
    plots.speed_by_depth(path, title, [("decode", "decode", rows)], machine)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
