"""What codebooks add to the time that llama.cpp needs to load a model, and to make a context that uses them.

    python benchmarks/gpu/synthetic_gguf.py --geometry llama-3.1-8b-cache --types "" -o plain.gguf
    python benchmarks/gpu/synthetic_gguf.py --geometry llama-3.1-8b-cache -o with-pq.gguf
    python benchmarks/load_time.py plain.gguf with-pq.gguf --types pq4,pq3,pq2
    python benchmarks/load_time.py plain.gguf with-pq.gguf --library FOLDER         # llama.cpp built without our patches

The files take turns, once per round, from the page cache. Printed are the least and the median of the rounds, and the least
CPU time, which other work on the machine hardly moves: of opening a file with gguf-py, of loading it, and of making a
context (with an f16 cache for both, with the PQ types for the second).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from million_gguf import paths
from million_gguf.spec import PQ_TYPES

N_CTX = 512  # small: the cache itself should cost nothing here
F16 = 1  # GGML_TYPE_F16
FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED


def bind(library: Path | None) -> Any:
    """``llama_cpp``'s low-level module on our libraries, or on those of another build of the same version."""
    if library is None:
        from million_gguf.bindings import native

        return native.llama_cpp()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library.resolve())
    sys.path.insert(0, str(paths.vendor_dir("llama_cpp").parent))
    import llama_cpp.llama_cpp as low

    return low


def quiet(low: Any) -> Any:
    """Drop llama.cpp's log. The callback must be kept alive."""
    callback = low.llama_log_callback(lambda level, text, data: None)
    low.llama_log_set(callback, None)
    return callback


@contextmanager
def timed(times: list[tuple[float, float]]) -> Iterator[None]:
    """Append the seconds and the CPU seconds that the block takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    times.append((time.perf_counter() - wall, time.process_time() - cpu))


def one_round(low: Any, path: Path, types: dict[str, int], times: dict[str, list[tuple[float, float]]]) -> None:
    with timed(times["GGUFReader"]):
        GGUFReader(path)
    with timed(times["load"]):
        model = low.llama_model_load_from_file(str(path).encode(), low.llama_model_default_params())
    if not model:
        raise SystemExit(f"load_time: error: llama.cpp could not load {path}")
    for name, number in types.items():
        params = low.llama_context_default_params()
        params.n_ctx = N_CTX
        params.type_k = params.type_v = number
        params.flash_attn_type = FLASH_ATTENTION
        with timed(times[f"context {name}"]):
            context = low.llama_init_from_model(model, params)
        if not context:
            raise SystemExit(f"load_time: error: llama.cpp could not make a {name} context for {path}")
        low.llama_free(context)
    low.llama_model_free(model)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("plain", type=Path, metavar="PLAIN.gguf")
    parser.add_argument("coded", type=Path, metavar="WITH-PQ.gguf", help="the same model with codebooks")
    parser.add_argument("--types", default="", help="cache types to make contexts with, of the second file")
    parser.add_argument("--library", type=Path, metavar="FOLDER", help="of another libllama (default: ours)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args()
    low = bind(args.library)
    log = quiet(low)
    low.llama_backend_init()
    wanted = {"f16": F16} | {n: PQ_TYPES[n].ggml_type for n in args.types.split(",") if n}
    times: dict[Path, dict[str, list[tuple[float, float]]]] = {p: defaultdict(list) for p in (args.plain, args.coded)}
    for _ in range(args.rounds):
        one_round(low, args.plain, {"f16": F16}, times[args.plain])
        one_round(low, args.coded, wanted, times[args.coded])
    for path, figures in times.items():
        for name, pairs in figures.items():
            wall, cpu = zip(*pairs, strict=True)
            print(
                f"{path.name:20s} {name:12s} least {min(wall):.3f} s, median {statistics.median(wall):.3f} s, "
                f"CPU {min(cpu):.3f} s"
            )
    least = [[min(column) for column in zip(*times[p]["load"], strict=True)] for p in (args.plain, args.coded)]
    print(f"{'growth of the load':33s} least {least[1][0] - least[0][0]:.3f} s, CPU {least[1][1] - least[0][1]:.3f} s")
    del log
    return 0


if __name__ == "__main__":
    sys.exit(main())
