"""``million serve``: llama.cpp's OpenAI-compatible server with a PQ cache, started and watched."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from .. import container, tools
from ..bindings.cache_types import AUTO, CacheType, parse
from ..container import GGUFHeader
from ..errors import InputError, MismatchError, NativeError
from ..progress import note
from ..spec import PQ_TYPES
from .options import MODEL_HELP, add_ctx, add_runtime, at_least, chosen_ctx
from .output import context

TOOL = "llama-server"
_DEFAULT_SLOTS = 4
_DEFAULT_PROMPT_CACHE_MIB = 1024  # llama-server's own 8 GiB is more than many machines have to give
_POLL_S = 0.1
_GRACE_S = 10.0  # from a signal to the end
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BASE_TEMPLATE = "chatml"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="OpenAI-compatible HTTP server with a product-quantized KV cache",
        description="Run llama.cpp's server with a product-quantized KV cache: chat and completions in OpenAI's format under "
        "/v1, parallel slots, prompt cache, slot save and restore. It listens on this machine only unless --host says "
        "otherwise. Ctrl-C stops it. Options of llama-server itself go after '--'.",
        usage="million serve [options] MODEL.gguf [-- LLAMA-SERVER OPTIONS]",
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help=MODEL_HELP)
    parser.add_argument(
        "--kv",
        default=AUTO,
        metavar="TYPE",
        help="KV cache type: pq4, pq3, pq2, f16, q8_0, ...; K,V for a pair; auto (the default) is pq4 if the file has "
        "codebooks, else f16",
    )
    parser.add_argument(
        "--kv-tail",
        type=at_least(0),
        metavar="N",
        help="most recent tokens that a PQ cache also keeps exact (default: 128; 0: none)",
    )
    add_ctx(parser, "context of each slot")
    parser.add_argument(
        "--parallel",
        type=at_least(1),
        default=_DEFAULT_SLOTS,
        metavar="N",
        help="slots: requests answered at once; the others wait (default: %(default)s)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help=f"chat template to use instead of the file's (default for a file without one: {_BASE_TEMPLATE})",
    )
    add_runtime(parser)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)"
    )
    network.add_argument(
        "--port", type=_port, default=8080, metavar="N", help="port (default: %(default)s; 0: one that is free)"
    )
    network.add_argument(
        "--api-key", metavar="KEY", help="key that clients must send (better: the environment variable LLAMA_API_KEY)"
    )
    network.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with such keys, one per line")
    storage = parser.add_argument_group("saved prompts")
    storage.add_argument(
        "--slot-save-path", type=Path, metavar="DIR", help="allow clients to save slots in this folder and restore them"
    )
    storage.add_argument(
        "--prompt-cache",
        type=at_least(0),
        default=_DEFAULT_PROMPT_CACHE_MIB,
        metavar="MIB",
        help="memory for prompts of earlier requests; 0 for none (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the server logs")
    parser.set_defaults(run=run)


def _port(text: str) -> int:
    value = at_least(0)(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port, need 0 to 65535")
    return int(value)


def run(args: argparse.Namespace) -> int:
    program = tools.find(TOOL)
    with GGUFHeader(args.model) as header:
        k, v = _cache_types(args.kv, header)
        name = str(header.get("general.name") or args.model.stem)
        template = args.chat_template
        if template is None and "tokenizer.chat_template" not in header.kv:
            template = _BASE_TEMPLATE
            note(f"million: the model has no chat template (a base model): chat requests are written as {template}")
        n_ctx = chosen_ctx(args.ctx, header)
        # llama-server gives a slot no more than the model was trained for
        n_ctx_of_slot = min(n_ctx, chosen_ctx(0, header))
    if args.api_key_file is not None and not args.api_key_file.is_file():
        raise InputError(f"no such file: {args.api_key_file}")
    if args.slot_save_path is not None:
        args.slot_save_path.mkdir(parents=True, exist_ok=True)
    port = _free_port(args.host, args.port)
    has_key = args.api_key is not None or args.api_key_file is not None or "LLAMA_API_KEY" in os.environ
    if args.host not in _LOOPBACK and not has_key:
        note(f"million: anybody who reaches {args.host} can use this server: give a key with --api-key-file")

    argv = [
        str(program), "-m", str(args.model), "-ctk", k.name, "-ctv", v.name, "-fa", "on", "-ngl", str(args.n_gpu_layers),
        "-c", str(n_ctx * args.parallel), "-np", str(args.parallel), "--no-kv-unified",
        "--host", args.host, "--port", str(port), "-cram", str(args.prompt_cache),
        "--alias", args.model.stem.replace(",", "_"),
    ]  # fmt: skip
    if args.threads is not None:
        argv += ["-t", str(args.threads)]
    if template is not None:
        argv += ["--chat-template", template]
    if args.api_key_file is not None:
        argv += ["--api-key-file", str(args.api_key_file)]
    if args.slot_save_path is not None:
        argv += ["--slot-save-path", str(args.slot_save_path)]
    if not has_key:
        # else any page that a browser on this machine has open could use the server
        argv += ["--cors-origins", "localhost"]
    argv += args.rest  # last: they win
    env = tools.environment(args.kv_tail, clean=False)
    if args.api_key is not None:
        env["LLAMA_API_KEY"] = args.api_key  # not on the command line, which every user of the machine can read
    types = k.name if k == v else f"{k.name}/{v.name}"
    what = f"{name}, {types} cache, {args.parallel} x {context(n_ctx_of_slot)} tokens"
    return _supervise(argv, env, args.host, port, what, verbose=args.verbose)


# ---- before the start ----


def _cache_types(kv: str, header: GGUFHeader) -> tuple[CacheType, CacheType]:
    """The types that ``--kv`` asks for. Raises MismatchError when the file has no codebooks for them, or wrong ones."""
    auto = kv.strip().lower() == AUTO
    if auto and not container.has_codebooks(header):
        note("million: KV cache f16 (the file has no codebooks; 'million calibrate' adds them)")
        return parse("f16")
    wanted = () if auto else parse(kv)
    if not auto and not any(t.is_pq for t in wanted):
        return parse(kv)
    if not container.has_codebooks(header):
        raise MismatchError(
            f"{header.path}: found no codebooks, need them for a {kv} cache: add them with 'million calibrate', or use "
            "another --kv"
        )
    books = container.read(header)
    container.check_fits(books, header)
    if auto:
        best = next(name for name in PQ_TYPES if name in books.types)  # most accurate first
        return parse(best)
    for t in wanted:
        if t.is_pq and t.name not in books.types:
            raise MismatchError(
                f"{header.path}: found codebooks for {', '.join(books.types)}, need {t.name}: calibrate again with "
                f"--types {t.name}"
            )
    return parse(kv)


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises InputError when the server could not listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except OSError as e:
        raise InputError(f"--host {host}: {e.strerror or e}") from None
    with socket.socket(family, kind) as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as e:
            if isinstance(e, PermissionError):
                why = "is not ours to use: choose one above 1023 with --port"
            else:
                why = f"cannot be used ({e.strerror}): is another server running? Choose another with --port"
            raise InputError(f"port {port} of {host} {why}") from None
        return int(probe.getsockname()[1])


# ---- while it runs ----


def _supervise(argv: list[str], env: dict[str, str], host: str, port: int, what: str, *, verbose: bool) -> int:
    """Run the server until it ends, handing signals on. Returns its exit code."""
    server = tools.start(argv, env=env, own_session=True)
    output, log = (tools.Log(stream, _shower(verbose)) for stream in (server.stdout, server.stderr))
    try:
        with _handed_on(server) as received:
            url = _url(host, port)
            if _wait_until_ready(server, url, received):
                print(f"million: serving {what}", flush=True)
                print(f"million: {url}/v1 (Ctrl-C stops)", flush=True)
            while server.poll() is None and not received:  # not wait(): a signal may not interrupt it
                time.sleep(_POLL_S)
            if received:
                # llama-server takes locks in its signal handler: stopped in the middle of a request, it may hang
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(_GRACE_S)
    finally:
        hung = server.poll() is None
        if hung:
            server.kill()
        server.wait()
        output.close()
        log.close()
    if received:
        return 128 + received[0] if hung else _exit_code(server)
    if server.returncode == 0:
        return 0
    reason = log.reason() or output.reason()
    if server.returncode < 0:
        note(f"million: {TOOL} was killed by signal {-server.returncode}{': ' + reason if reason else ''}")
        return _exit_code(server)
    raise NativeError(f"{TOOL} ended with exit code {server.returncode}{': ' + reason if reason else ''}")


def _exit_code(server: subprocess.Popen[bytes]) -> int:
    """As a shell reports it."""
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _shower(verbose: bool) -> Any:
    """What is done with a line of the log: all are shown, or warnings and errors."""
    lock = threading.Lock()

    def show(line: str) -> None:
        if verbose or tools.is_warning(line):
            with lock:
                print(line, file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def _handed_on(server: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand SIGINT, SIGTERM and SIGHUP on to the server while the block runs. Yields those that came."""
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if server.poll() is None:
            # llama-server ends in good order at the first SIGINT or SIGTERM, and at once at the second
            server.send_signal(signal.SIGTERM if number != signal.SIGINT else number)

    numbers = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
    previous = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, received: list[int]) -> bool:
    """True when the server answers; False when it has ended, or a signal has come."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
    while server.poll() is None and not received:
        try:
            with opener.open(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            pass  # not listening yet, or still loading
        time.sleep(_POLL_S)
    return False
