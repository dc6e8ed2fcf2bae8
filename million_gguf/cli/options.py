"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import container
from ..bindings.cache_types import CacheType, parse
from ..container import GGUFHeader
from ..converters.gguf import DEFAULT_CTX, DEFAULT_TOKENS, DEFAULT_TYPES
from ..progress import note

MODEL_HELP = "the model; PQ cache types need the codebooks that 'million calibrate' adds"
DEFAULT_KV_TAIL = 128  # tokens that a PQ cache keeps exact
_DEFAULT_CTX = 4096
_COMPARED_TYPES = ("f16", "q8_0", "q4_0")


def at_least(least: int) -> Any:
    """An argparse type: an integer that is no smaller."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small, need at least {least}")
        return value

    return integer


def positive_float(text: str) -> float:
    """An argparse type: a number above zero."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return value


def add_ctx(parser: argparse.ArgumentParser, what: str) -> None:
    """How long a context is; ``chosen_ctx`` turns it into a number."""
    parser.add_argument(
        "-c",
        "--ctx",
        type=at_least(0),
        metavar="N",
        help=f"{what} (default: {_DEFAULT_CTX}, or the model's if smaller; 0: the model's)",
    )


def chosen_ctx(asked: int | None, header: GGUFHeader) -> int:
    """Tokens of context for what ``add_ctx`` read: beyond what a model was trained for only when that was asked for."""
    trained = header.get(f"{header.get('general.architecture')}.context_length")
    if not isinstance(trained, int) or trained < 1:
        return asked or _DEFAULT_CTX
    return min(_DEFAULT_CTX, trained) if asked is None else asked or trained


def add_runtime(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Where the model runs."""
    parser.add_argument("-t", "--threads", type=at_least(1), metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "-ngl",
        "--n-gpu-layers",
        type=at_least(-1),
        default=0,
        metavar="N",
        help="layers to run on the GPU; -1 for all (default: 0)",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """How codebooks are made, and where the result goes."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--types",
        default=",".join(DEFAULT_TYPES),
        metavar="LIST",
        help="cache types to make codebooks for (default: %(default)s)",
    )
    group.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text like what the model will read (default: one that ships)"
    )
    group.add_argument(
        "--tokens",
        type=at_least(1),
        default=DEFAULT_TOKENS,
        metavar="N",
        help="tokens of it to use (default: %(default)s)",
    )
    group.add_argument(
        "--ctx", type=at_least(32), default=DEFAULT_CTX, metavar="N", help="tokens per context (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="same seed, same codebooks (default: 0)"
    )
    group.add_argument(
        "--memory", type=positive_float, metavar="GIB", help="memory for sampled rows (default: 40%% of what is free)"
    )
    add_runtime(group)
    parser.add_argument("-f", "--force", action="store_true", help="replace the output if it exists")


def calibration_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``add_calibration`` as arguments of ``million_gguf.calibrate``."""
    return {
        "types": args.types,
        "text": args.text,
        "n_tokens": args.tokens,
        "n_ctx": args.ctx,
        "seed": args.seed,
        "n_threads": args.threads,
        "n_gpu_layers": args.n_gpu_layers,
        "memory_bytes": None if args.memory is None else int(args.memory * (1 << 30)),
        "overwrite": args.force,
    }


def add_compared_types(parser: argparse.ArgumentParser) -> None:
    """Cache types to compare, and the tail of those that are PQ."""
    parser.add_argument(
        "--types",
        type=lambda text: text.split(","),
        metavar="LIST",
        help=f"cache types, K/V for a pair: f16,q4_0,pq4,pq4/pq2 (default: {','.join(_COMPARED_TYPES)} and the PQ types "
        "of the file)",
    )
    parser.add_argument(
        "--kv-tail",
        type=at_least(0),
        default=DEFAULT_KV_TAIL,
        metavar="N",
        help="most recent tokens that a PQ cache also keeps exact (default: %(default)s; 0: none)",
    )


def compared_types(names: Sequence[str] | None, header: GGUFHeader) -> dict[str, tuple[CacheType, CacheType]]:
    """The (K, V) types to compare, by the name that tables show; f16, which the others are compared with, comes first.

    Raises InputError for an unknown type, FormatError when the file's codebooks are malformed.
    """
    if names is None:
        names = list(_COMPARED_TYPES)
        if container.has_codebooks(header):
            names += container.read(header).types
        else:
            note(
                "million: the file has no codebooks, so there are no PQ types to compare: 'million calibrate' adds them"
            )
    pairs = {"f16": parse("f16")}
    for name in names:
        k, v = parse(name.split("/"))
        pairs[k.name if k == v else f"{k.name}/{v.name}"] = (k, v)
    return pairs
