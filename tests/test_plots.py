"""The figures of ``million eval``, ``million bench`` and the README: nothing covers anything, nothing leaves the picture."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment

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


@pytest.mark.parametrize(
    ("most", "labels"),
    [(512, None), (5000, ["0", "1K", "2K", "3K", "4K"]), (40000, ["0", "8K", "16K", "24K", "32K"])],
)
def test_depths_are_powers_of_two(most: int, labels: list[str] | None) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots._set_depth_ticks(axes, most)
    if labels is not None:
        assert [label.get_text() for label in axes.get_xticklabels()] == labels


# ---- the README's ----


def readme_plots(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_plots.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment())


def test_readme_pictures_are_there_and_small() -> None:
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {Path(p).name for p in shown} >= {"kl-by-bits.png", "speed-by-depth.png"}
    for path in shown:
        assert 0 < (ROOT / path).stat().st_size < 200_000


def test_readme_pictures_are_made_by_one_command(tmp_path: Path) -> None:
    done = readme_plots("-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kl-by-bits.png", "speed-by-depth.png"]


def test_readme_pictures_of_what_the_commands_print(tmp_path: Path) -> None:
    """Of ``million eval --json`` and ``million bench --json``."""
    kl, speed = tmp_path / "kl.json", tmp_path / "speed.json"
    kl.write_text(json.dumps({"kv_tail": 128, "results": kl_rows()}))
    tokens = {"median": 100.0, "min": 90.0, "max": 101.0}
    rows = [{"type": t, "depth": d, "decode": tokens} for t in ("f16", "pq4") for d in (0, 4096)]
    speed.write_text(json.dumps({"machine": "a machine", "results": rows}))
    options = ("--kl", kl, "--speed", f"{speed}=A model", "-o", tmp_path)
    done = readme_plots(*options)
    assert done.returncode == 0, done.stderr
    kl.write_text("{}")
    done = readme_plots(*options)
    assert done.returncode == 1
    assert done.stderr.startswith("readme_plots: error: ") and "Traceback" not in done.stderr
