#!/usr/bin/env python3
"""Draws the pictures of the README from files in benchmarks/results/.

    python benchmarks/readme_plots.py

``docs/images/kl-by-bits.png``: what a cache type costs in quality, of the files of ``--kl``: ``million eval --json``, or CSV
with the columns type, kv_tail, kl_mean and kl_p999 (and text, of which the held-out one counts). ``docs/images/speed-by-depth.png``: decode speed, one panel per
``--speed``: ``benchmarks/gpu/run.py``'s JSON, or several with commas between them, or ``million bench --json``. Needs matplotlib, gguf and million_gguf (the source
tree's will do).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from million_gguf import plots
from million_gguf.errors import InputError, MillionError
from million_gguf.spec import PQ_TYPES

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
# What the README shows now.
_KL = [
    _RESULTS / f"{name}-cpu-ref33m" / "kl.csv" for name in ("2026-11-26b", "2026-11-26d", "2026-11-27")
]  # later ones count
_KL_TEXT = "heldout"
_KL_TITLE = "ref-33m, held-out text: what a KV cache type costs"
_H200 = _RESULTS / "2026-11-28-h200"
_SPEED = [
    ([_H200 / "7b.json", _H200 / "7b-128k.json"], "Llama-2-7B (32 KV heads)"),
    ([_H200 / "8b-0.json", _H200 / "8b-32k.json", _H200 / "8b-128k.json"], "Llama-3.1-8B (8 KV heads)"),
]
_SPEED_TITLE = "Decode speed by depth, models of random weights in Q4_0"
_TYPES = ("f16", "q8_0", "q4_0", "pq4", "pq3", "pq2")  # one colour each, whatever the order in a file

Row = dict[str, Any]


def bits_per_element(name: str) -> float:
    """Of a cache type, or the mean of the two of a pair ``K/V``."""

    def bits(one: str) -> float:
        if one in PQ_TYPES:
            return float(PQ_TYPES[one].bits_per_element)
        n_elements, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[one.upper()]]
        return 8 * n_bytes / n_elements

    k, _, v = name.partition("/")
    return (bits(k) + bits(v or k)) / 2


def read_kl(path: Path) -> list[Row]:
    """Rows for ``plots.kl_by_bits`` with "kv_tail": None for a type that has no tail, whatever the setting."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            found = [
                {**row, "kv_tail": int(row["kv_tail"]) if row["kv_tail"] else None}
                for row in csv.DictReader(file)
                if row.get("text", _KL_TEXT) == _KL_TEXT
            ]
    else:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = [
            {**row, "kv_tail": facts["kv_tail"] if {row["type_k"], row["type_v"]} & PQ_TYPES.keys() else None}
            for row in facts["results"]
            if row["kl_mean"] is not None  # f16
        ]
    return [
        {
            "type": row["type"],
            "type_k": row["type"].split("/")[0],
            "type_v": row["type"].split("/")[-1],
            "bits_per_element": bits_per_element(row["type"]),
            "kl_mean": float(row["kl_mean"]),
            "kl_p999": float(row["kl_p999"]),
            "kv_tail": row["kv_tail"],
        }
        for row in found
    ]


def draw_kl(files: list[Path], title: str, path: Path) -> None:
    """One panel per length of the tail, the longest first; types without tail are in each."""
    rows = list({(r["type"], r["kv_tail"]): r for file in files for r in read_kl(file)}.values())
    tails = sorted({r["kv_tail"] for r in rows if r["kv_tail"] is not None}, reverse=True)
    panels = {
        f"the most recent {n} tokens exact" if n else "every token coded": [
            r for r in rows if r["kv_tail"] in (n, None)
        ]
        for n in tails
    }
    plots.kl_by_bits(path, title, panels, "further left is smaller, further down is closer to f16")


def read_speed(path: Path) -> tuple[list[Row], str]:
    """(rows for ``plots.speed_by_depth``, the machine)."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    if "results" in facts:  # million bench
        return [r for r in facts["results"] if r["decode"] is not None], facts["machine"]
    samples: dict[tuple[str, int], list[float]] = {}
    for r in facts["rows"]:
        if r["kind"] == "decode":  # one row for each round; llama-batched-bench has one number
            samples.setdefault((r["cache"], r["depth"]), []).extend(r.get("tokens_per_s_samples", [r["tokens_per_s"]]))
    rows = [
        {
            "type": cache,
            "depth": depth,
            "decode": {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)},
        }
        for (cache, depth), speeds in samples.items()
    ]
    gpus = facts["machine"].get("gpus")
    return rows, ", ".join(gpu["name"] for gpu in gpus) if gpus else facts["machine"]["platform"]


def draw_speed(files: list[tuple[list[Path], str]], title: str, path: Path) -> None:
    """One panel per heading. A type that was measured at one depth only says nothing about depth, and is left out."""
    panels, machines = [], []
    for parts, heading in files:
        rows: list[Row] = []
        for part in parts:
            more, machine = read_speed(part)
            rows += more
            machines.append(machine)
        n_depths = {name: len({r["depth"] for r in rows if r["type"] == name}) for name in {r["type"] for r in rows}}
        lost = sorted(name for name, n in n_depths.items() if n == 1)
        if lost:
            print(f"{heading}: {', '.join(lost)} measured at one depth only, left out")
        order = {name: i for i, name in enumerate(_TYPES)}
        kept = sorted((r for r in rows if r["type"] not in lost), key=lambda r: (order.get(r["type"], 99), r["depth"]))
        panels.append((heading, "decode", kept))
    subtitle = f"{'; '.join(dict.fromkeys(machines))}; median and range of the repetitions"
    plots.speed_by_depth(path, title, panels, subtitle)


def with_heading(text: str) -> tuple[list[Path], str]:
    """``FILE[,FILE...]=HEADING``; without a heading it is the first file's name."""
    names, _, heading = text.partition("=")
    paths = [Path(name) for name in names.split(",")]
    return paths, heading or paths[0].stem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl", type=Path, nargs="+", metavar="FILE", default=_KL)
    parser.add_argument("--kl-title", default=_KL_TITLE, metavar="TEXT")
    parser.add_argument("--speed", type=with_heading, nargs="+", metavar="FILES[=HEADING]", default=_SPEED)
    parser.add_argument("--speed-title", default=_SPEED_TITLE, metavar="TEXT")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", default=_ROOT / "docs" / "images")
    args = parser.parse_args()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        kl, speed = args.output / "kl-by-bits.png", args.output / "speed-by-depth.png"
        plots.check(kl)
        draw_kl(args.kl, args.kl_title, kl)
        draw_speed(args.speed, args.speed_title, speed)
    except (KeyError, ValueError) as e:
        error: Exception = InputError(f"a file of results lacks what is drawn, or has another form: {e!r}")
    except (MillionError, OSError) as e:
        error = e
    else:
        print(f"{kl}\n{speed}")
        return 0
    print(f"readme_plots: error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
