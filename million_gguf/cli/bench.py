"""``million bench``: how fast a model is with each cache type, and how long a context fits."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .. import __version__, paths, plots, tools
from ..bindings.cache_types import CacheType
from ..container import GGUFHeader
from ..errors import InputError, NativeError
from ..progress import Stage, note, stage
from .memory import CacheCost, Memory, Model, gpus, machine, open_model, ram
from .options import DEFAULT_KV_TAIL, MODEL_HELP, add_compared_types, add_runtime, at_least, compared_types
from .output import context, print_prose, print_table, significant, size, table

TOOL = "llama-bench"
_DEFAULT_DEPTHS = (0, 4096)
_CHECK_TOKENS, _CHECK_STEPS = 160, 8  # past the exact tail, so that codes are read too
_WORK_BYTES = 1 << 30  # for activations and the graph, beside weights and cache
_MASK_BYTES = 2  # of the attention mask (f16), per token of context and token computed at once
_WARN_SPREAD = 0.1  # of the median, to both sides: more, and the machine was not idle


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="speed of cache types by depth, and the context that fits this machine",
        description="Measure decode and prefill speed with chosen cache types and depths (tokens already in the cache), and "
        "say how long a context fits this machine's memory with each. Every type's output is checked to be finite before it "
        "is timed. Times are those of llama-bench: medians, and half the range of all repetitions.",
    )
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL.gguf", help=MODEL_HELP)
    parser.add_argument(
        "--synthetic",
        metavar="NAME",
        help="instead of a model: llama-3.1-8b or llama-2-7b in Q4_0 with random weights, made for the run (4 GB in the "
        "temporary folder; from a checkout only)",
    )
    add_compared_types(parser)
    parser.add_argument(
        "-d",
        "--depths",
        type=_numbers,
        metavar="LIST",
        help="tokens in the cache when the clock starts (default: 0,4096, or half of what the model was trained for if that is less)",
    )
    parser.add_argument(
        "-n", "--decode", type=at_least(0), default=32, metavar="N", help="tokens to decode; 0 for none (default: 32)"
    )
    parser.add_argument(
        "-p",
        "--prefill",
        type=at_least(0),
        default=512,
        metavar="N",
        help="tokens of a prompt; 0 for none (default: 512)",
    )
    parser.add_argument(
        "-r",
        "--repetitions",
        type=at_least(1),
        default=5,
        metavar="N",
        help="of each measurement (default: %(default)s)",
    )
    parser.add_argument(
        "-ub",
        "--ubatch",
        type=at_least(1),
        default=512,
        metavar="N",
        help="tokens computed at once (default: %(default)s)",
    )
    add_runtime(parser)
    output = parser.add_argument_group("output")
    form = output.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of tables")
    form.add_argument("--csv", action="store_true", help="print CSV instead of tables")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw speed against depth")
    parser.set_defaults(run=run)


def _numbers(text: str) -> list[int]:
    return sorted({at_least(0)(part) for part in text.split(",")})


def run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.synthetic is None):
        raise InputError("give a model or --synthetic, one of the two")
    if args.plot is not None:
        plots.check(args.plot)
    with _model(args.model, args.synthetic) as model:
        facts = benchmark(
            model,
            types=args.types,
            depths=args.depths,
            n_decode=args.decode,
            n_prefill=args.prefill,
            n_repetitions=args.repetitions,
            kv_tail=args.kv_tail,
            n_ubatch=args.ubatch,
            n_threads=args.threads,
            n_gpu_layers=args.n_gpu_layers,
        )
    if args.synthetic is not None:
        facts["model"], facts["file"] = f"{args.synthetic} (random weights)", None
    if args.plot is not None:
        title = f"{facts['model']}: speed of KV cache types"
        subtitle = f"{facts['machine']}; median and range of {args.repetitions} repetitions"
        kinds = [kind for kind, n in (("decode", args.decode), ("prefill", args.prefill)) if n]
        plots.speed_by_depth(args.plot, title, [(kind, kind, facts["results"]) for kind in kinds], subtitle)
    if args.json:
        print(json.dumps(facts, indent=2))
    elif args.csv:
        _print_csv(facts["results"])
    else:
        _print_tables(facts)
    if args.plot is not None:
        note(f"plot: {args.plot}")
    return 0


@contextmanager
def _model(path: Path | None, synthetic: str | None) -> Iterator[Path]:
    """The model, or a synthetic one for as long as the block runs."""
    if synthetic is None:
        assert path is not None
        yield path
        return
    program = paths.synthetic_model_program()
    with tempfile.TemporaryDirectory(prefix="million-bench-") as folder:
        made = Path(folder) / f"{synthetic}.gguf"
        note(f"million: making {synthetic} with random weights in {folder}")
        argv = [sys.executable, str(program), "--geometry", synthetic, "-o", str(made)]
        try:
            tools.run(argv, env=tools.environment())
        except NativeError as e:
            raise InputError(f"--synthetic {synthetic}: {e}") from None
        yield made


def benchmark(
    model: Path,
    *,
    types: Sequence[str] | None = None,
    depths: Sequence[int] | None = None,
    n_decode: int = 32,
    n_prefill: int = 512,
    n_repetitions: int = 5,
    kv_tail: int = DEFAULT_KV_TAIL,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
) -> dict[str, Any]:
    """What ``million bench --json`` prints.

    Args:
        types: cache types such as "pq4" or "pq4/pq2"; f16 is always among them, to compare with.
        depths: tokens in the cache when a measurement starts; None for 0 and 4096, or half of what the model was
            trained for.
        n_decode, n_prefill: tokens of a measurement; 0 leaves it out.

    Raises:
        InputError: a file, type or option cannot be used.
        MismatchError: the model cannot have a cache of one of the types.
        NativeError: llama-bench is missing or failed, or a type's output is not finite.
    """
    if not n_decode and not n_prefill:
        raise InputError("--decode and --prefill are both 0: there is nothing to measure")
    program = tools.find(TOOL)
    with GGUFHeader(model) as header:
        pairs = compared_types(types, header)
    with open_model(model) as opened:
        costs = {name: opened.cache_cost(k, v, kv_tail) for name, (k, v) in pairs.items()}
        depths = sorted(set(depths)) if depths is not None else _default_depths(opened.n_ctx_train)
        facts: dict[str, Any] = {
            "model": opened.name,
            "file": str(model),
            "weight_bytes": opened.weight_bytes,
            "n_ctx_train": opened.n_ctx_train,
            "machine": machine(n_threads),
            "tool": f"million-gguf {__version__}",
            "n_decode": n_decode,
            "n_prefill": n_prefill,
            "n_repetitions": n_repetitions,
            "kv_tail": kv_tail,
            "n_ubatch": n_ubatch,
            "n_threads": n_threads,
            "n_gpu_layers": n_gpu_layers,
            "fits": _fits(opened, costs, n_ubatch, n_gpu_layers),
        }
    with stage("check", len(pairs)) as bar:
        for k, v in pairs.values():
            check_finite(model, k, v, kv_tail=kv_tail, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
            bar.advance()
    common = [
        str(program), "-m", str(model), "-o", "jsonl", "-fa", "on", "-ngl", str(n_gpu_layers), "-ub", str(n_ubatch),
        "-n", str(n_decode), "-p", str(n_prefill), "-r", str(n_repetitions), "-d", ",".join(map(str, depths)),
        *(() if n_threads is None else ("-t", str(n_threads))),
    ]  # fmt: skip
    n_measurements = len(depths) * (bool(n_decode) + bool(n_prefill))
    measured: dict[str, list[dict[str, Any]]] = {}
    for name, (k, v) in pairs.items():
        argv = [*common, "-ctk", k.name, "-ctv", v.name]
        with stage(name, n_measurements) as bar:
            printed, _ = tools.run(argv, env=tools.environment(kv_tail), on_output=_Counter(bar))
        measured[name] = parse_results(printed, n_measurements)
        if not sys.stderr.isatty():
            note(f"million: {name}: {n_measurements} measurements")
    facts["results"] = [
        {
            "type": name,
            "type_k": k.name,
            "type_v": v.name,
            "depth": depth,
            "cache_bytes_per_token": costs[name].bytes_per_token,
            "cache_bytes": costs[name].bytes(depth + max(n_decode, n_prefill)),
            "decode": _speed(measured[name], depth, "n_gen"),
            "prefill": _speed(measured[name], depth, "n_prompt"),
        }
        for depth in depths
        for name, (k, v) in pairs.items()
    ]
    return facts


def _default_depths(n_ctx_train: int) -> list[int]:
    most = n_ctx_train // 2
    return sorted({min(depth, most) for depth in _DEFAULT_DEPTHS})


# ---- before the clock starts ----


def check_finite(
    model: Path, k: CacheType, v: CacheType, *, kv_tail: int, n_threads: int | None, n_gpu_layers: int
) -> None:
    """Raises NativeError unless all logits of a short run with this cache are finite."""
    import numpy as np

    from ..bindings.llama import Llama

    options = {} if n_threads is None else {"n_threads": n_threads, "n_threads_batch": n_threads}
    llm = Llama(
        model,
        kv_cache=(k.name, v.name),
        kv_tail=kv_tail,
        n_ctx=512,
        n_ubatch=128,
        n_gpu_layers=n_gpu_layers,
        flash_attn=True,
        verbose=False,
        **options,
    )
    with closing(llm):
        rng = np.random.default_rng(0)  # as llama-bench: any tokens take the same time
        tokens = rng.integers(0, llm.n_vocab(), _CHECK_TOKENS).tolist()
        for step in range(1 + _CHECK_STEPS):
            llm.eval(tokens)
            logits = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),))
            if not np.isfinite(logits).all():
                raise NativeError(
                    f"{model}: with a {k.name}/{v.name} cache, {np.count_nonzero(~np.isfinite(logits))} of {logits.size} "
                    f"logits are not finite after {_CHECK_TOKENS + step} tokens: not worth timing"
                )
            tokens = [int(logits.argmax())]


# ---- llama-bench ----


class _Counter:
    """Moves a bar by the results that have been printed, a line each."""

    def __init__(self, bar: Stage) -> None:
        self._bar = bar

    def __call__(self, piece: str) -> None:
        self._bar.advance(piece.count("\n"))


def parse_results(printed: str, n_results: int) -> list[dict[str, Any]]:
    """The objects that ``llama-bench -o jsonl`` prints. Raises NativeError when some are missing."""
    try:
        results = [json.loads(line) for line in printed.splitlines() if line.strip()]
    except ValueError:
        raise NativeError(f"{TOOL} printed something else than JSON: {printed.strip()[:200]}") from None
    if len(results) != n_results:
        raise NativeError(f"{TOOL} printed {len(results)} results, need {n_results}")
    return results


def _speed(results: Sequence[Mapping[str, Any]], depth: int, kind: str) -> dict[str, Any] | None:
    """Tokens per second at one depth, of the results whose ``kind`` ("n_gen" or "n_prompt") is not 0."""
    for result in results:
        if result["n_depth"] == depth and result[kind]:
            samples = [result[kind] * 1e9 / ns for ns in result["samples_ns"]]
            return {
                "median": round(statistics.median(samples), 3),
                "min": round(min(samples), 3),
                "max": round(max(samples), 3),
                "samples": [round(s, 3) for s in samples],
            }
    return None


# ---- what fits ----


def _fits(model: Model, costs: Mapping[str, CacheCost], n_ubatch: int, n_gpu_layers: int) -> list[dict[str, Any]]:
    """Per memory, the longest context of each type beside the weights; 0 when these do not fit."""
    memories = [(m, 0) for m in (ram(),) if m is not None]
    if n_gpu_layers:
        # CUDA's prefill decodes the rows of one layer at a time
        memories += [(m, model.f16_layer_bytes) for m in gpus()]
    return [
        {
            "memory": memory.name,
            "bytes_free": memory.bytes_free,
            "context": {
                name: fitting_context(
                    memory,
                    model.weight_bytes,
                    cost,
                    work_per_token=_MASK_BYTES * n_ubatch + (0 if name == "f16" else decoded_bytes),
                )
                for name, cost in costs.items()
            },
        }
        for memory, decoded_bytes in memories
    ]


def fitting_context(memory: Memory, weight_bytes: int, cost: CacheCost, work_per_token: float = 0.0) -> int:
    """The longest context that fits beside weights and work space; 0 for none.

    Args:
        work_per_token: bytes of work space that one more token of context takes.
    """
    return cost.context(memory.bytes_free - weight_bytes - _WORK_BYTES, work_per_token)


def fits_line(fits: Mapping[str, Any]) -> str:
    """ "RAM, 22.5 GiB free: 32K with f16, 118K with pq4" """
    contexts = ", ".join(
        f"{context(n)} with {name}" if n else f"none with {name}" for name, n in fits["context"].items()
    )
    return f"{fits['memory']}, {size(fits['bytes_free'])} free: {contexts}"


# ---- output ----


def _print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    plain = ("type", "type_k", "type_v", "depth", "cache_bytes_per_token", "cache_bytes")
    measured = [(kind, what) for kind in ("decode", "prefill") for what in ("median", "min", "max")]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*plain, *(f"{kind}_{what}_tokens_per_s" for kind, what in measured)])
    for row in rows:
        writer.writerow([*(row[c] for c in plain), *(None if row[k] is None else row[k][w] for k, w in measured)])


def _print_tables(facts: dict[str, Any]) -> None:
    where = f", {facts['file']}" if facts["file"] is not None else ""
    kinds = [(kind, facts[f"n_{kind}"]) for kind in ("decode", "prefill") if facts[f"n_{kind}"]]
    print(f"model  {facts['model']}{where} ({size(facts['weight_bytes'])} of weights)")
    print(f"run    {facts['machine']}")
    measured = ", ".join(f"{kind} {n}" for kind, n in kinds)
    print(
        f"       tokens: {measured}, exact tail {facts['kv_tail']}; repetitions: {facts['n_repetitions']}\n", flush=True
    )
    made = table(
        "Tokens per second: median ± half the range",
        ("depth", "cache", "memory", *(cell for kind, _ in kinds for cell in (kind, "±", "of f16"))),
        n_left=2,
    )
    rows = facts["results"]
    noisy = False
    for i, row in enumerate(rows):
        base = next(r for r in rows if r["depth"] == row["depth"] and r["type"] == "f16")
        cells = []
        for kind, _ in kinds:
            speed = row[kind]
            spread = (speed["max"] - speed["min"]) / 2 / speed["median"]
            noisy = noisy or spread > _WARN_SPREAD
            cells += [
                significant(speed["median"], 4),
                f"{spread:.0%}" if facts["n_repetitions"] > 1 else "-",
                f"{speed['median'] / base[kind]['median']:.2f}x",
            ]
        first = i == 0 or rows[i - 1]["depth"] != row["depth"]
        last = i + 1 == len(rows) or rows[i + 1]["depth"] != row["depth"]
        made.add_row(
            str(row["depth"]) if first else "", row["type"], size(row["cache_bytes"]), *cells, end_section=last
        )
    print_table(made)
    if noisy:
        print_prose("The spread is large: was the machine busy? Use -r for more repetitions, -t for fewer threads.")
    if facts["fits"]:
        trained = f" (the model was trained for {context(facts['n_ctx_train'])})" if facts["n_ctx_train"] else ""
        print(f"Context that fits beside the weights{trained}:")
        for fits in facts["fits"]:
            print_prose(fits_line(fits), indent="  ", hanging="    ")
