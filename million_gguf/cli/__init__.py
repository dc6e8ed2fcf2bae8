"""The ``million`` command: one module per subcommand, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import MillionError
from ..signals import STOPPING, terminate

EXIT_OK = 0
EXIT_FAULT = 2  # a fault of the input, as argparse's own errors
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
DEBUG_VARIABLE = "MILLION_DEBUG"

_COMMANDS = ("convert", "calibrate", "inspect", "chat", "eval", "bench", "serve", "demo")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="million",
        description="Product-quantized KV cache for llama.cpp: a context takes a quarter of the memory of f16.",
        epilog="'million COMMAND --help' explains a command. MILLION_DEBUG=1 shows tracebacks.",
    )
    # The short form is also what makes argparse's column of names wide enough for "calibrate" to stand on one line.
    parser.add_argument("-V", "--version", action="version", version=f"million-gguf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        import_module(f".{name}", __name__).add_parser(commands)
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line. What follows "--" is the server's affair; argparse would take it for our own arguments."""
    rest: list[str] = []
    if argv[:1] == ["serve"] and "--" in argv:
        at = argv.index("--")
        argv, rest = argv[:at], argv[at + 1 :]
    args = build_parser().parse_args(argv)
    args.rest = rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a fault of the input, 130 for Ctrl-C."""
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    # An interrupted run removes its temporary files, however it was asked to stop.
    in_main_thread = threading.current_thread() is threading.main_thread()
    # One that is ignored was meant to be, as nohup does with SIGHUP.
    handled = [n for n in STOPPING if in_main_thread and signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, terminate) for number in handled}
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except MillionError as e:
        if debug:
            traceback.print_exc()
        return fail(str(e))
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as in 'million inspect m.gguf | head'
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # so that the interpreter's last flush finds a reader
        return EXIT_OK
    except OSError as e:
        if debug:
            traceback.print_exc()
        return fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except MemoryError:
        if debug:
            traceback.print_exc()
        return fail("out of memory: use a smaller context or model, or a lower --memory")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def fail(message: str) -> int:
    """Say what is wrong, on one line of stderr, and return the exit code for it."""
    print(f"million: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return EXIT_FAULT
