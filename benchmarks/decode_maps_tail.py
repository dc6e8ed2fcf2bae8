"""What trained maps and the exact tail cost in decoding: the speed with them against that with neither.

Three contexts in one process, filled to the same depth: codebooks with identity maps and no tail, trained maps and no tail, trained
maps and a tail. They decode blocks of tokens in turns, every round in another order; the first token of a block is not counted, because
it finds the caches full of another context's data.

    million convert ref-33m -o maps.gguf --text calibration.txt --tokens 4096      # enough for a measurement of speed
    python benchmarks/decode_maps_tail.py maps.gguf identity.gguf --make-identity  # takes the maps out of the first file's codebooks
    python benchmarks/decode_maps_tail.py maps.gguf identity.gguf --rounds 40

Printed is the speed relative to identity maps without a tail, of two medians over all rounds, with the error of that ratio from
resampled rounds: a machine that slows down does so for a whole round, so rounds are resampled and not single blocks. stdout has JSON,
stderr a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from million_gguf import Llama, container
from million_gguf.errors import InputError, MillionError
from million_gguf.progress import note, stage, stderr_console

N_RESAMPLED = 2000
LIMIT = 1 / 1.05  # of the speed with identity maps and no tail: not more than 5 % slower
TOKEN = 100  # any: what is decoded does not change how long it takes


def has_maps(path: Path, kv_cache: str) -> bool:
    """Whether the codebooks of one cache type have maps. Raises InputError when the file has none, or only some have."""
    types = container.read(path).types
    if kv_cache not in types:
        raise InputError(
            f"{path} has no codebooks for {kv_cache}, only for {', '.join(types)}: calibrate it for {kv_cache}"
        )
    found = {cb.T is not None for cb in (*types[kv_cache].k, *types[kv_cache].v) if cb is not None}
    if len(found) != 1:
        raise InputError(f"{path} has maps in some of its {kv_cache} codebooks only, need all or none")
    return found.pop()


def make_identity(maps: Path, identity: Path) -> None:
    """Write a copy of ``maps`` whose codebooks have no maps and no anisotropy: of use for nothing but measurements of speed."""
    codebooks = container.read(maps)

    def plain(side: list[Any]) -> list[Any]:
        return [cb and dataclasses.replace(cb, T=None, aniso=None) for cb in side]

    types = {n: dataclasses.replace(t, k=plain(t.k), v=plain(t.v)) for n, t in codebooks.types.items()}
    container.embed(maps, identity, dataclasses.replace(codebooks, types=types))


def block_ms(llm: Llama, depth: int, n_block: int) -> float:
    """Milliseconds per token of a block after ``depth`` tokens, which are all that is left of the context before and after."""
    llm.n_tokens = depth  # eval drops what the cache holds beyond
    llm.eval([TOKEN])
    start = time.perf_counter()
    for _ in range(n_block):
        llm.eval([TOKEN])
    return (time.perf_counter() - start) / n_block * 1e3


def ratio(base: list[float], other: list[float], rng: np.random.Generator) -> tuple[float, float]:
    """Speed of ``other`` relative to ``base``, and its standard error over resampled rounds."""
    a, b = np.array(base), np.array(other)
    picks = rng.integers(0, len(a), (N_RESAMPLED, len(a)))
    resampled = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    return statistics.median(base) / statistics.median(other), float(resampled.std())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("maps", type=Path, metavar="MAPS.gguf", help="calibrated")
    parser.add_argument("identity", type=Path, metavar="IDENTITY.gguf", help="the same model, codebooks without maps")
    parser.add_argument("--make-identity", action="store_true", help="write IDENTITY.gguf, and measure nothing")
    parser.add_argument("--kv", default="pq4", help="cache type (default: %(default)s)")
    parser.add_argument("--tail", type=int, default=128, help="tokens of the exact tail (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--block", type=int, default=16, help="tokens of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("-t", "--threads", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    contexts: dict[str, Llama] = {}
    try:
        if args.make_identity:
            make_identity(args.maps, args.identity)
            return 0
        for path, want in ((args.maps, True), (args.identity, False)):
            if has_maps(path, args.kv) != want:
                raise InputError(
                    f"the codebooks of {path} have {'no ' if want else ''}maps: see --help for how to make both files"
                )
        wanted = {
            "identity, no tail": (args.identity, 0),
            "maps, no tail": (args.maps, 0),
            "maps, tail": (args.maps, args.tail),
        }
        with stage("Fill", len(wanted) * args.depth) as bar:
            for name, (path, n_tail) in wanted.items():
                llm = contexts[name] = Llama(
                    path, kv_cache=args.kv, kv_tail=n_tail, n_ctx=args.depth + args.block + 1, n_batch=512,
                    n_threads=args.threads, n_threads_batch=args.threads, verbose=False,
                )  # fmt: skip
                for i in range(0, args.depth, 512):
                    n = min(512, args.depth - i)
                    llm.eval([TOKEN] * n)
                    bar.advance(n)
        rng = np.random.default_rng(args.seed)
        times: dict[str, list[float]] = {name: [] for name in contexts}
        with stage("Decode", args.rounds) as bar:
            for i in range(args.rounds + 1):
                for name in rng.permutation(list(contexts)):
                    ms = block_ms(contexts[name], args.depth, args.block)
                    if i > 0:  # the first round wakes everything up
                        times[name].append(ms)
                bar.set(i)
    except (MillionError, OSError) as e:
        print(f"decode_maps_tail: error: {e}", file=sys.stderr)
        return 1
    finally:
        for llm in contexts.values():
            llm.close()

    table = Table("context", "ms per token", "fastest", "relative speed")
    facts: dict[str, Any] = {
        "kv": args.kv,
        "depth": args.depth,
        "tail": args.tail,
        "threads": args.threads,
        "rounds": args.rounds,
    }
    base = next(iter(times.values()))
    for name, ms in times.items():
        relative, error = ratio(base, ms, rng)
        facts[name] = {
            "ms": statistics.median(ms),
            "fastest_ms": min(ms),
            "relative": relative,
            "relative_error": error,
        }
        table.add_row(name, f"{statistics.median(ms):.2f}", f"{min(ms):.2f}", f"{relative:.3f} ± {error:.3f}")
    stderr_console().print(table)
    note(f"limit of the last: {LIMIT:.3f}")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
