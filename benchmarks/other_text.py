"""Text that prose does not resemble: C code, tables of random numbers, and JSON logs, in turns.

A codebook that fits its calibration text alone is found out here. The same seed and the same code give the same text.

    python benchmarks/other_text.py -o other.txt llama.cpp/ggml/src/{ggml.c,ggml-quants.c}
    million eval model.gguf --text other.txt
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# Characters of one kind before the next: some 2000 tokens, so that a context of 2048 holds one kind or two.
BLOCK = 4096

SERVICES = ("auth", "billing", "cache-7", "edge", "ingest", "mailer", "scheduler")
EVENTS = ("conn.open", "conn.close", "retry", "flush", "gc.pause", "quota", "checksum.mismatch", "lease.renew")


def code(files: list[Path]) -> Iterator[str]:
    """Lines of the files, one after the other."""
    for path in files:
        yield from path.read_text(encoding="utf-8").splitlines(keepends=True)


def tables(rng: random.Random) -> Iterator[str]:
    """Lines of tables: integers, decimals, hexadecimal and scientific notation, each table with its own columns."""
    while True:
        columns = [rng.choice(("d", "f", "x", "e")) for _ in range(rng.randint(3, 8))]
        separator = rng.choice((" ", "\t", ",", " | "))
        for _ in range(rng.randint(8, 40)):
            cells = []
            for kind in columns:
                if kind in "dx":
                    cells.append(format(rng.randrange(1 << rng.randint(4, 32)), kind))
                else:
                    cells.append(format(rng.gauss(0.0, 10.0 ** rng.randint(-4, 4)), ".4" + kind))
            yield separator.join(cells) + "\n"
        yield "\n"


def logs(rng: random.Random) -> Iterator[str]:
    """Lines of a log, each a JSON object."""
    t = 1.7e9
    while True:
        t += rng.expovariate(2.0)
        entry: dict[str, object] = {
            "ts": round(t, 3),
            "level": rng.choices(("info", "debug", "warn", "error"), (70, 20, 8, 2))[0],
            "svc": rng.choice(SERVICES),
            "event": rng.choice(EVENTS),
            "trace": f"{rng.getrandbits(64):016x}",
            "ms": round(rng.lognormvariate(2.0, 1.5), 2),
        }
        if rng.random() < 0.4:
            entry["peer"] = {
                "ip": ".".join(str(rng.randrange(256)) for _ in range(4)),
                "port": rng.randrange(1024, 65536),
            }
        if rng.random() < 0.2:
            entry["tags"] = [f"k{rng.randrange(100)}" for _ in range(rng.randint(1, 4))]
        yield json.dumps(entry, separators=(",", ":")) + "\n"


def text(files: list[Path], n_characters: int, seed: int) -> str:
    """Blocks of whole lines of the three kinds, in turns; it ends early when the code does."""
    sources = [code(files), tables(random.Random(seed)), logs(random.Random(seed + 1))]
    parts: list[str] = []
    n = 0
    while n < n_characters:
        for source in sources:
            n_block = 0
            while n_block < BLOCK:
                line = next(source, None)
                if line is None:
                    return "".join(parts)
                parts.append(line)
                n_block += len(line)
            parts.append("\n")
            n += n_block + 1
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("code", type=Path, nargs="+", metavar="FILE.c", help="C code to cut pieces out of")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.txt")
    parser.add_argument("--characters", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        args.output.write_text(text(args.code, args.characters, args.seed), encoding="utf-8")
    except OSError as e:
        print(f"other_text: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
