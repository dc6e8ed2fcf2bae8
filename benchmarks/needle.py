"""Copying from far back: does a coded cache still find what a window or an average would lose?

Each context is ordinary text with passages of other text ("needles") put in at even depths. A probe appends a needle once
more. Its beginning tells a model with induction heads, even a small one, that the passage comes again; counted is whether
each of its last tokens is the model's first choice after those before it, and whether that choice is the first type's too.
f16 is measured in the same run: what counts is the ratio to it. "alone" is f16 with the needle and without its context: what
the model would guess, which is what a window comes to.

    python benchmarks/needle.py with-pq.gguf --text heldout.txt --types f16,pq4,pq3,pq2,q4_0,alone

The tokens that are counted are decoded one by one. The last 256 tokens of a context hold no needle: one in the exact tail
would measure the tail.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from million_gguf import Llama  # first: it decides which library llama_cpp binds to
from million_gguf.errors import InputError, MillionError

import llama_cpp  # isort: skip

# Tokens at the beginning of a needle that only prepare, and tokens that are counted. A small model needs a long beginning
# before it trusts that the passage comes again.
N_GIVEN, N_ASKED = 96, 32
ALONE = "alone"
N_CLEAR = 256  # tokens at the end of a context without needles


def contexts(tokens: list[int], n_ctx: int, n_contexts: int, n_needles: int, seed: int) -> list[dict[str, Any]]:
    """Contexts of ``n_ctx`` tokens less the room of a probe, each with its needles: ``{"tokens", "needles"}``.

    Raises InputError when the text is too short.
    """
    n_needle = N_GIVEN + N_ASKED
    n_filler = n_ctx - n_needle * (n_needles + 1)
    need = n_contexts * (n_filler + n_needles * n_needle)  # no two needles overlap
    if n_filler < N_CLEAR + n_needles or len(tokens) < need:
        raise InputError(
            f"found {len(tokens)} tokens for {n_contexts} contexts of {n_ctx} with {n_needles} needles, need {need} "
            f"and at least {N_CLEAR} tokens of text per context: change these, or give a longer text"
        )
    rng = np.random.default_rng(seed)
    # Needles come from all over the second part of the text, the rest from the first, so that none is near its source.
    n_total, n_first = n_contexts * n_needles, n_contexts * n_filler
    starts = rng.permutation(n_total) * ((len(tokens) - n_first) // n_total) + n_first
    out = []
    for c in range(n_contexts):
        filler = tokens[c * n_filler : (c + 1) * n_filler]
        needles = [tokens[s : s + n_needle] for s in starts[c * n_needles : (c + 1) * n_needles]]
        step = (n_filler - N_CLEAR) // n_needles
        parts: list[int] = []
        for i, needle in enumerate(needles):
            parts += filler[i * step : (i + 1) * step] + needle
        out.append({"tokens": parts + filler[n_needles * step :], "needles": needles})
    return out


def choices(model: Path, name: str, tasks: list[dict[str, Any]], args: argparse.Namespace) -> npt.NDArray[np.int64]:
    """The model's first choices for the counted tokens, ``[n_probes, N_ASKED]``, with cache type ``name``, or ALONE."""
    alone = name == ALONE
    llm = Llama(
        model, kv_cache="f16" if alone else name, n_ctx=args.ctx, n_batch=512, n_threads=args.threads, verbose=False
    )
    out = []
    try:
        for task in tasks:
            llm.reset()
            if not alone:
                llm.eval(task["tokens"])
            n_context = llm.n_tokens
            for needle in task["needles"]:
                llm.n_tokens = n_context  # eval drops what the cache holds beyond
                llm.eval(needle[:N_GIVEN])
                found = []
                for token in needle[N_GIVEN:]:
                    logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
                    found.append(int(np.ctypeslib.as_array(logits, (llm.n_vocab(),)).argmax()))
                    llm.eval([token])
                out.append(found)
    finally:
        llm.close()
    return np.array(out)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="with codebooks")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="that the model never saw")
    parser.add_argument(
        "--types", default="f16,pq4,pq3,pq2,q4_0,alone", help="the first is the reference (%(default)s)"
    )
    parser.add_argument("--ctx", type=int, default=2048, help="tokens of a context (default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--needles", type=int, default=6, help="per context (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        text = args.text.read_bytes()
        vocabulary = Llama(args.model, vocab_only=True, verbose=False)
        tokens = vocabulary.tokenize(text, add_bos=False)
        vocabulary.close()
        tasks = contexts(tokens, args.ctx, args.contexts, args.needles, args.seed)
        right = np.array([needle[N_GIVEN:] for task in tasks for needle in task["needles"]])
        names = args.types.split(",")
        reference = None
        for name in names:
            found = choices(args.model, name, tasks, args)
            reference = found if reference is None else reference
            share, as_first = float((found == right).mean()), float((found == reference).mean())
            ratio = share / max(float((reference == right).mean()), 1e-9)
            if args.json:
                facts = {"right": share, "right_of_first": ratio, "same_choice": as_first, "tokens": right.size}
                print(json.dumps({"type": name, "ctx": args.ctx, **facts}), flush=True)
            else:
                print(
                    f"{name:6s} right {share:.3f} ({ratio:.3f} of {names[0]}), same choice as {names[0]} {as_first:.3f}",
                    flush=True,
                )
    except (MillionError, OSError) as e:
        print(f"needle: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
