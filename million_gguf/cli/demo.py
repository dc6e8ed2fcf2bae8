"""``million demo``: the whole path on one checkpoint, and what the cache saves."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from pathlib import Path

from .. import paths
from .calibrate import report
from .options import add_calibration, calibration_arguments
from .output import print_prose

PROMPTS = ("The history of the", "To install the package, you")
_N_TOKENS = 64
_N_CTX = 2048


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="convert, calibrate and run a checkpoint; compare pq4 with f16",
        description="Convert an HF checkpoint, calibrate it, load it with a pq4 and with an f16 cache, and show what both "
        "write and how large their caches are.",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="HF checkpoint (default: the one in the repository)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT.gguf", help="keep the file (default: a temporary one)"
    )
    add_calibration(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    source = args.model if args.model is not None else paths.demo_model()
    with tempfile.TemporaryDirectory(prefix="million-demo-") as folder:
        output = args.output if args.output is not None else Path(folder) / "demo.gguf"
        from ..converters.hf import convert

        print(f"converting and calibrating {source}", flush=True)
        report(convert(source, output, **calibration_arguments(args)))
        texts, sizes = {}, {}
        for kv in ("pq4", "f16"):
            texts[kv], sizes[kv] = _generate(output, kv, args)
        for i, prompt in enumerate(PROMPTS):
            print(f"\nprompt: {prompt}")
            for kv in texts:
                print_prose(f"{kv}: {' '.join(texts[kv][i].split())}", hanging="     ")
        print(
            f"\nKV cache for {_N_CTX} tokens: pq4 {sizes['pq4']} bytes, f16 {sizes['f16']} bytes, "
            f"{sizes['f16'] / sizes['pq4']:.2f}x smaller"
        )
        if args.output is not None:
            print(f"try it: million chat {output} --kv pq4")
    return 0


def _generate(path: Path, kv_cache: str, args: argparse.Namespace) -> tuple[list[str], int]:
    """Greedy continuations of PROMPTS, and the bytes of the cache."""
    from ..bindings.llama import Llama

    options = {} if args.threads is None else {"n_threads": args.threads, "n_threads_batch": args.threads}
    llm = Llama(
        path, kv_cache=kv_cache, n_ctx=_N_CTX, n_gpu_layers=args.n_gpu_layers, flash_attn=True, verbose=False, **options
    )
    with closing(llm):
        texts = [
            llm.create_completion(prompt, max_tokens=_N_TOKENS, temperature=0.0, seed=0)["choices"][0]["text"]
            for prompt in PROMPTS
        ]
        return texts, llm.kv_cache_bytes
