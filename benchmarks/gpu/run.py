#!/usr/bin/env python3
"""Speed of the KV cache types on one GPU: decode and prefill by depth, batched decode, device memory.

    python benchmarks/gpu/run.py --bin build/cmake/bin --model /tmp/7b.gguf --depths 0,32768 --prefill-depths 0,32768 -o 7b.json
    python benchmarks/gpu/run.py --show 7b.json --plot 7b.png

Runs llama.cpp's own llama-bench, llama-batched-bench and llama-completion, one cache type after the other in one session, so
that a ratio compares neighbours in time. Two processes of the same kind may differ by more than the repetitions within one:
``--rounds`` measures every speed as often, in turns, and the table has medians over rounds. Every measurement is written to the JSON as soon
as it is there. Only the standard library is needed, and matplotlib for ``--plot``. Models of real geometries: ``synthetic_gguf.py``
beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]
_BASE, _OTHER = "f16", "q4_0"  # what the ratios are against


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def cache_args(cache: str) -> list[str]:
    """``pq4`` or, K before V, ``pq4/pq2``."""
    k, _, v = cache.partition("/")
    return ["-ctk", k, "-ctv", v or k]


def run(command: list[str], folder: Path) -> tuple[str, str]:
    """Output and errors of a program that finds its libraries beside itself."""
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    env = dict(os.environ, LD_LIBRARY_PATH=":".join(p for p in paths if p))
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout, done.stderr


def machine() -> Json:
    info: Json = {"platform": platform.platform(), "cpu_count": os.cpu_count()}
    if smi := shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
        done = subprocess.run([smi, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        info["gpus"] = [
            dict(zip(query.split(","), line.split(", "), strict=True)) for line in done.stdout.strip().splitlines()
        ]
    return info


def bench(
    folder: Path, model: Path, cache: str, n_prompt: int, n_gen: int, depth: int, repetitions: int, extra: list[str]
) -> Json:
    out, err = run(
        [
            *[str(folder / "llama-bench"), "-m", str(model), "-ngl", "99", "-fa", "1", "-o", "json"],
            *["-p", str(n_prompt), "-n", str(n_gen), "-d", str(depth), "-r", str(repetitions)],
            *cache_args(cache),
            *extra,
        ],
        folder,
    )
    (r,) = json.loads(out)
    return {
        "kind": "prefill" if n_prompt else "decode",
        "cache": cache,
        "depth": depth,
        "tokens": n_prompt or n_gen,
        "tokens_per_s": statistics.median(r["samples_ts"]),
        "tokens_per_s_samples": r["samples_ts"],
        "warnings": warnings(err),
        "build": r["build_commit"],
    }


def batched(folder: Path, model: Path, cache: str, depth: int, n_seq: int, n_gen: int, extra: list[str]) -> Json:
    out, err = run(
        [
            *[str(folder / "llama-batched-bench"), "-m", str(model), "-ngl", "99", "-fa", "on"],
            *["-npp", str(depth), "-ntg", str(n_gen), "-npl", str(n_seq), "-c", str(n_seq * (depth + n_gen))],
            *["--output-format", "jsonl"],
            *cache_args(cache),
            *extra,
        ],
        folder,
    )
    (r,) = (json.loads(line) for line in out.splitlines() if line.startswith("{"))
    return {
        "kind": "batched" if n_seq > 1 else "decode",
        "cache": cache,
        "depth": depth,
        "sequences": n_seq,
        "tokens_per_s": r["speed_tg"],
        "prefill_tokens_per_s": r["speed_pp"],
        "warnings": warnings(err),
    }


def memory(folder: Path, model: Path, cache: str, n_ctx: int, extra: list[str]) -> Json:
    """What a context takes, from llama.cpp's log. Nothing is decoded but one short prompt."""
    _, err = run(
        [
            *[str(folder / "llama-completion"), "-m", str(model), "-ngl", "99", "-fa", "on", "-c", str(n_ctx)],
            *["-p", "a", "-n", "1", "-no-cnv", "--no-warmup", "-v"],
            *cache_args(cache),
            *extra,
        ],
        folder,
    )
    sizes: dict[str, float] = {}
    for m in re.finditer(r":\s+(.+?) buffer size\s*=\s*([\d.]+) MiB", err):
        name = " ".join(m[1].split())
        sizes[name] = max(sizes.get(name, 0.0), float(m[2]))  # a first pass only measures, and says 0
    return {"kind": "memory", "cache": cache, "n_ctx": n_ctx, "mib": sizes, "warnings": warnings(err)}


def warnings(err: str) -> list[str]:
    """Lines in which the CUDA backend says that it left an op to the CPU: such a measurement is not of the GPU."""
    return [line for line in err.splitlines() if "leaves an op to the CPU" in line]


def measure(a: argparse.Namespace) -> None:
    result: Json = {
        "machine": machine(),
        "command": " ".join(sys.argv),
        "model": {"name": a.model.name, "bytes": a.model.stat().st_size},
        "rows": [],
    }
    caches = [c for c in a.types.split(",") if c]
    extra = a.extra.split()
    jobs: list[tuple[str, Any]] = []
    for depth in numbers(a.depths):
        jobs += [
            (f"decode {c} depth {depth}", lambda c=c, d=depth: bench(a.bin, a.model, c, 0, a.gen, d, a.repeat, extra))
            for c in caches
        ]
    for depth in numbers(a.prefill_depths):
        jobs += [
            (
                f"prefill {c} depth {depth}",
                lambda c=c, d=depth: bench(a.bin, a.model, c, a.prompt, 0, d, a.repeat, extra),
            )
            for c in caches
        ]
    for depth in numbers(a.batched_depths):
        jobs += [
            (
                f"{a.sequences} sequences {c} depth {depth}",
                lambda c=c, d=depth: batched(a.bin, a.model, c, d, a.sequences, a.gen, extra),
            )
            for c in caches
        ]
    jobs *= a.rounds
    for n_ctx in numbers(a.memory_ctx):
        jobs += [
            (f"memory {c} context {n_ctx}", lambda c=c, n=n_ctx: memory(a.bin, a.model, c, n, extra)) for c in caches
        ]
    for name, job in jobs:
        start = time.monotonic()
        try:
            row = job()
        except (RuntimeError, ValueError, KeyError) as e:
            row = {"kind": "failed", "what": name, "error": str(e)}
        row["wall_s"] = round(time.monotonic() - start, 1)
        result["rows"].append(row)
        a.output.write_text(json.dumps(result, indent=1) + "\n")
        speed = f"{row['tokens_per_s']:.1f} tokens/s" if "tokens_per_s" in row else row.get("error", "done")[-300:]
        print(f"{name}: {speed} ({row['wall_s']} s)", *row.get("warnings", []), sep="\n  ", flush=True)


def speeds(result: Json) -> dict[tuple[str, int, str], float]:
    """Tokens per second by kind, depth and cache: medians over rounds."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for r in result["rows"]:
        if "tokens_per_s" in r:
            found.setdefault((r["kind"], r["depth"], r["cache"]), []).append(r["tokens_per_s"])
    return {key: statistics.median(values) for key, values in found.items()}


def table(result: Json) -> str:
    """Markdown: one row per kind, depth and cache, with ratios to f16 and q4_0 of the same depth."""
    speed = speeds(result)
    lines = ["| measure | depth | cache | tokens/s | ms/token | to f16 | to q4_0 |", "|---|--:|---|--:|--:|--:|--:|"]

    def ratio(kind: str, depth: int, base: str, value: float) -> str:
        other = speed.get((kind, depth, base))
        return f"{value / other:.2f}x" if other else ""

    for (kind, depth, cache), value in speed.items():
        lines.append(
            f"| {kind} | {depth} | {cache} | {value:.1f} | {1000 / value:.3f} | "
            f"{ratio(kind, depth, _BASE, value)} | {ratio(kind, depth, _OTHER, value)} |"
        )
    for r in result["rows"]:
        if r["kind"] == "memory":
            lines.append(
                f"\n{r['cache']}, context {r['n_ctx']}: " + ", ".join(f"{k} {v} MiB" for k, v in r["mib"].items())
            )
        elif r["kind"] == "failed":
            lines.append(f"\nfailed: {r['what']}")
        lines += [f"\nnot on the GPU: {w}" for w in r.get("warnings", [])]
    return "\n".join(lines)


def plot(result: Json, path: Path) -> None:
    from matplotlib.figure import Figure

    kinds = [k for k in ("decode", "prefill") if any(r["kind"] == k for r in result["rows"])]
    figure = Figure(figsize=(6.0 * len(kinds), 4.4), layout="constrained")
    gpus = result["machine"].get("gpus") or [{"name": "unknown GPU"}]
    figure.suptitle(f"{result['model']['name']} on {gpus[0]['name']}", fontsize=11)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        speed = {(cache, depth): s for (k, depth, cache), s in speeds(result).items() if k == kind}
        for cache in dict.fromkeys(cache for cache, _ in speed):
            points = sorted((depth, 1000 / s) for (c, depth), s in speed.items() if c == cache)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=cache)
        axes.set_xlabel("depth (tokens in the cache)")
        axes.set_ylabel("ms per token")
        axes.set_ylim(bottom=0)
        axes.set_title(kind, fontsize=10)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--show", type=Path, help="print the table of a result, and measure nothing")
    p.add_argument("--plot", type=Path, help="with --show: write a plot, too")
    p.add_argument("--bin", type=Path, help="folder of llama-bench and the other tools")
    p.add_argument("--model", type=Path)
    p.add_argument("--types", default="f16,q8_0,q4_0,pq4,pq3,pq2", help="cache types; K/V for a mixture (%(default)s)")
    p.add_argument("--depths", default="0,4096,32768", help="of decode (%(default)s)")
    p.add_argument("--prefill-depths", default="", help="of prefill")
    p.add_argument(
        "--batched-depths",
        default="",
        help="of decode with several sequences; with --sequences 1, decode without the copy of the cache that llama-bench keeps in memory",
    )
    p.add_argument("--memory-ctx", default="", help="contexts to report the memory of")
    p.add_argument("--prompt", type=int, default=2048, help="tokens of a prefill (%(default)s)")
    p.add_argument("--gen", type=int, default=64, help="tokens of a decode (%(default)s)")
    p.add_argument("--sequences", type=int, default=8, help="of --batched-depths (%(default)s)")
    p.add_argument("--repeat", type=int, default=3, help="repetitions; the median counts (%(default)s)")
    p.add_argument("--rounds", type=int, default=1, help="processes for each measurement, in turns (%(default)s)")
    p.add_argument("--extra", default="", help="more arguments for every program, in one string")
    p.add_argument("-o", "--output", type=Path, default=Path("result.json"))
    a = p.parse_args()
    if a.show:
        result = json.loads(a.show.read_text())
        print(table(result))
        if a.plot:
            plot(result, a.plot)
        return
    if not a.bin or not a.model:
        p.error("give --bin and --model, or --show")
    a.bin = a.bin.resolve()
    measure(a)
    print("\n" + table(json.loads(a.output.read_text())))


if __name__ == "__main__":
    main()
