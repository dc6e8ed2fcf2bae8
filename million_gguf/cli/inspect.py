"""``million inspect``: what is in a GGUF file, as far as its KV cache is concerned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import container
from ..container import CodebookSet, GGUFHeader
from ..pq_ref import Codebook
from .output import print_prose, print_table, significant, size, table

_N_WORST = 5  # heads that are named


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show the codebooks of a GGUF file and how they were made",
        description="Show a model's KV cache geometry, its codebooks, their errors and how they were made. Every codebook "
        "is checked. A file without codebooks is no error.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="the file; with or without codebooks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = inspect(args.model)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_tables(facts)
    return 0


def inspect(path: Path) -> dict[str, Any]:
    """The facts that ``million inspect --json`` prints. Raises FormatError, MismatchError or InputError as ``container.read``."""
    with GGUFHeader(path) as header:
        shape = container.model_shape(header)
        facts: dict[str, Any] = {
            "file": str(path),
            "bytes": header.size,
            "architecture": shape.arch,
            "name": header.get("general.name"),
            "layers": shape.block_count,
            "context_length": header.get(f"{shape.arch}.context_length"),
            "n_head": list(shape.n_head),
            "n_head_kv": list(shape.n_head_kv),
            "head_size_k": list(shape.D_k),
            "head_size_v": list(shape.D_v),
            "rope_freq_base": shape.rope_freq_base,
            "chat_template": "tokenizer.chat_template" in header.kv,
            "f16_bytes_per_token": _bytes_per_token(shape, 16.0),
            "codebooks": None,
        }
        if container.has_codebooks(header):
            facts["codebooks"] = _codebooks(header, container.read(header), shape)
    return facts


def _bytes_per_token(shape: container.ModelShape, bits: float) -> float:
    elements = sum(n * (k + v) for n, k, v in zip(shape.n_head_kv, shape.D_k, shape.D_v, strict=True))
    return elements * bits / 8


def _codebooks(header: GGUFHeader, books: CodebookSet, shape: container.ModelShape) -> dict[str, Any]:
    return {
        "version": header.get("million.version"),
        "model_digest": books.model_digest,
        "bytes": container.codebook_bytes(books.types),
        "calibration": {
            "tokens": books.calibration.tokens,
            "text_digest": books.calibration.text_digest,
            "seed": books.calibration.seed,
            "tool": books.calibration.tool,
        },
        "types": {
            name: {
                "bits_per_element": _spec(t.k).bits_per_element,
                "bytes_per_token": _bytes_per_token(shape, _spec(t.k).bits_per_element),
                "transform": any(cb is not None and cb.T is not None for cb in (*t.k, *t.v)),
                "anisotropy": any(cb is not None and cb.aniso is not None for cb in t.k),
                "k_error": [None if cb is None else e for cb, e in zip(t.k, t.k_error, strict=True)],
                "v_error": [None if cb is None else e for cb, e in zip(t.v, t.v_error, strict=True)],
                "k_heads": t.k_heads,
                "v_heads": t.v_heads,
            }
            for name, t in books.types.items()
        },
    }


def _spec(codebooks: list[Codebook | None]) -> Any:
    return next(cb.spec for cb in codebooks if cb is not None)


def _span(values: list[int]) -> str:
    distinct = list(dict.fromkeys(values))
    return ", ".join(map(str, distinct[:4])) + (" ..." if len(distinct) > 4 else "")


def _print_tables(facts: dict[str, Any]) -> None:
    rows = [
        ("file", f"{facts['file']} ({size(facts['bytes'])})"),
        ("model", f"{facts['name'] or 'unnamed'} ({facts['architecture']})"),
        ("layers", facts["layers"]),
        ("heads", f"{_span(facts['n_head'])} ({_span(facts['n_head_kv'])} KV)"),
        ("head size", f"K {_span(facts['head_size_k'])}, V {_span(facts['head_size_v'])}"),
        ("context", facts["context_length"]),
        ("chat template", "yes" if facts["chat_template"] else "no (completes text)"),
        ("f16 cache", f"{size(facts['f16_bytes_per_token'])} per token"),
    ]
    books = facts["codebooks"]
    if books is not None:
        calibration = books["calibration"]
        rows += [
            ("codebooks", f"format {books['version']}, {size(books['bytes'])}, for model {books['model_digest']}"),
            ("calibrated", f"{calibration['tokens']} tokens, seed {calibration['seed']}, by {calibration['tool']}"),
            ("text sha256", calibration["text_digest"]),
        ]
    for key, value in rows:
        print(f"{key:<14} {value}")
    if books is None:
        print("\nNo codebooks: 'million calibrate' adds them.")
        return
    print(flush=True)

    made = table(
        "Cache types; errors are squared, over the variance",
        ("type", "bits", "KiB per token", "of f16", "transform", "anisotropy", "K error", "V error"),
    )
    for name, t in books["types"].items():
        made.add_row(
            name,
            f"{t['bits_per_element']:g}",
            f"{t['bytes_per_token'] / 1024:.2f}",
            f"{t['bytes_per_token'] / facts['f16_bytes_per_token']:.1%}",
            "yes" if t["transform"] else "no",
            "yes" if t["anisotropy"] else "no",
            _error(_mean(t["k_error"])),
            _error(_mean(t["v_error"])),
        )
    print_table(made)

    if any(t["k_heads"] for t in books["types"].values()):
        print_prose(
            "Per layer, means over its KV heads. Spread: of the variances along the axes of the transform, arithmetic over "
            "geometric mean. Trained, measured: squared error of the scores (K) and of the attention's output (V) over their "
            "variance, on rows that were trained on and on rows that were held back."
        )
        for name, t in books["types"].items():
            _print_heads(name, t)
        return
    made = table(
        "Error per layer: squared error over variance",
        ("layer", *(f"{name} {side}" for name in books["types"] for side in "KV")),
        n_left=0,
    )
    for i in range(facts["layers"]):
        made.add_row(str(i), *(_error(t[side][i]) for t in books["types"].values() for side in ("k_error", "v_error")))
    print_table(made)


def _print_heads(name: str, facts: dict[str, Any]) -> None:
    """Means over the heads of each layer, and the heads that stand out."""
    sides = [(side, facts[f"{side.lower()}_heads"]) for side in "KV" if facts[f"{side.lower()}_heads"]]
    made = table(f"\n{name}", ("layer", *(f"{side} {figure}" for side, heads in sides for figure in heads)), n_left=0)
    layers = range(len(next(iter(sides[0][1].values()))))
    for i in layers:
        means = [(figure, _mean(list(values[i]))) for _, heads in sides for figure, values in heads.items()]
        made.add_row(
            str(i),
            *("-" if m is None else f"{m:.1f}" if figure == "spread" else significant(m) for figure, m in means),
        )
    print_table(made)
    ranked = sorted(
        (
            (error, side, i, h)
            for side, heads in sides
            for i in layers
            for h, error in enumerate(heads.get("measured", [[]] * len(layers))[i])
        ),
        reverse=True,
    )
    if ranked:
        worst = ", ".join(f"blk.{i} {side} head {h} ({significant(e)})" for e, side, i, h in ranked[:_N_WORST])
        print_prose(f"{name}, largest measured: {worst}", hanging="  ")


def _mean(values: list[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
