"""``million convert``: HF checkpoint to GGUF with codebooks."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..converters.hf import OUTTYPES, convert
from .calibrate import report
from .options import add_calibration, calibration_arguments


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        help="make a GGUF file with codebooks out of an HF checkpoint",
        description="Convert an HF checkpoint with llama.cpp's own converter, then calibrate the result. "
        "Needs torch and transformers: pip install million-gguf[convert].",
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--outtype", choices=OUTTYPES, default="f16", help="type of the weights (default: %(default)s)")
    parser.add_argument(
        "--converter-args",
        type=shlex.split,
        default=[],
        metavar="ARGS",
        help="more options for llama.cpp's converter, as one string: --converter-args='--no-lazy --fuse-qkv'",
    )
    parser.add_argument("--verbose", action="store_true", help="show all that the converter says")
    add_calibration(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report(
        convert(
            args.model,
            args.output,
            args.outtype,
            converter_args=args.converter_args,
            verbose=args.verbose,
            **calibration_arguments(args),
        )
    )
    return 0
