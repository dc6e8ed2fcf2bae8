"""``million calibrate``: add codebooks to a GGUF file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..converters.gguf import Calibrated, calibrate
from .options import add_calibration, calibration_arguments


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="add codebooks to a GGUF file",
        description="Run a GGUF model over a text, train PQ codebooks for its KV cache, and write a copy of the file that "
        "carries them. The input is left as it is, and the copy works in any llama.cpp.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="the model; any weight type")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.gguf", help="the file to write")
    add_calibration(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report(calibrate(args.model, args.output, **calibration_arguments(args)))
    return 0


def report(done: Calibrated) -> None:
    """Say what was written, on stdout."""
    print(f"{done.path}: codebooks for {done.n_layer} layers from {done.n_tokens} tokens")
    for name, (k, v) in done.errors.items():
        print(f"  {name}: squared error over variance K {k:.4f}, V {v:.4f}", flush=True)
