"""llama.cpp's own programs, built from the patched tree: where they are, and how they are run as children.

They are looked for in ``$MILLION_TOOLS_DIR``, then in the package's ``bin/``, then beside the libraries.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from . import paths
from .errors import NativeError

TOOLS_DIR_VARIABLE = "MILLION_TOOLS_DIR"
KV_TAIL_VARIABLE = "MILLION_KV_TAIL"  # libllama reads it when a context is made: tokens kept exact, 0 for none
_LOG_LINES = 400  # of a child's log that are kept for its error message
_GRACE_S = 10.0  # a child that was asked to stop has this long
_LOG_PREFIX = re.compile(r"^(?:\d+\.\d+\.\d+\.\d+ )?([EW]) (.*)$")  # "0.00.015.926 E llama_x: text"
_EMPTY_PHRASES = re.compile(
    r"failed to create context|unable to load model|exiting due to|failed to fit params|fitting params"
)


def find(name: str) -> Path:
    """Path of a program such as "llama-bench". Raises NativeError when it is not installed."""
    file_name = f"{name}.exe" if sys.platform == "win32" else name
    tried = list(_folders())
    for folder in tried:
        if (folder / file_name).is_file():
            return folder / file_name
    raise NativeError(
        f"{name} is missing (looked in {', '.join(map(str, tried))}): install the package again, or build it with "
        f"'make tools' and set {TOOLS_DIR_VARIABLE} to its folder"
    )


def _folders() -> Iterator[Path]:
    chosen = os.environ.get(TOOLS_DIR_VARIABLE)
    if chosen:
        yield Path(os.path.abspath(chosen))
    yield from paths.bin_dirs()
    with contextlib.suppress(NativeError):
        yield paths.lib_dir()


def environment(kv_tail: int | None = None, *, clean: bool = True) -> dict[str, str]:
    """The environment of a child.

    Args:
        kv_tail: tokens that a PQ cache keeps exact; None leaves what the user has set, or the default.
        clean: without the variables that change llama.cpp's options behind the command line's back (LLAMA_ARG_*):
            a measurement is what its command says.
    """
    env = {k: v for k, v in os.environ.items() if not (clean and k.startswith(("LLAMA_ARG_", "LLAMA_LOG_")))}
    if kv_tail is not None:
        env[KV_TAIL_VARIABLE] = str(kv_tail)
    return env


def start(
    argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str], own_session: bool = False
) -> subprocess.Popen[bytes]:
    """Start a child with its output and its log in pipes. On Linux it ends when this process does, however that ends.

    Args:
        own_session: Ctrl-C at the terminal reaches this process alone.

    Raises NativeError when the program cannot be started.
    """
    try:
        return subprocess.Popen(
            [os.fspath(a) for a in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env),
            start_new_session=own_session,
            preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
        )
    except OSError as e:
        raise NativeError(f"cannot start {os.fspath(argv[0])}: {e.strerror}") from e


def _die_with_parent() -> Callable[[], None]:
    libc = ctypes.CDLL(None)  # loaded here: after the fork it may be too late to
    parent = os.getpid()
    pr_set_pdeathsig = 1  # <sys/prctl.h>

    def in_child() -> None:
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL)  # nobody is left to see to it that another signal works
        if os.getppid() != parent:  # it died between the fork and the line above
            os._exit(1)

    return in_child


def stop(process: subprocess.Popen[bytes], number: int = signal.SIGTERM, grace_s: float = _GRACE_S) -> None:
    """Ask a child to stop and wait; kill it when it does not. Does nothing when it has ended."""
    if process.poll() is None:
        process.send_signal(number)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def is_warning(line: str) -> bool:
    """Whether a line of a tool's log is a warning or an error."""
    return _LOG_PREFIX.match(line) is not None


class Log:
    """The last lines of a child's log, read by a thread of its own so that the child never waits for us."""

    def __init__(self, stream: object, on_line: Callable[[str], None] | None = None) -> None:
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._on_line = on_line
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: object) -> None:
        with contextlib.suppress(ValueError, OSError):  # the stream was closed under us: the run is over
            for raw in stream:  # type: ignore[attr-defined]
                line = raw.decode("utf-8", "replace").rstrip("\n")
                self._lines.append(line)
                if self._on_line is not None:
                    self._on_line(line)

    def close(self) -> None:
        """Wait for the last lines."""
        self._thread.join(timeout=5)

    def text(self) -> str:
        return "\n".join(self._lines)

    def reason(self) -> str:
        """What went wrong, as llama.cpp logged it: its errors, or its warnings, or its last lines."""
        marked = [m.groups() for m in map(_LOG_PREFIX.match, list(self._lines)) if m is not None]
        for level in ("E", "W"):
            lines = [text.strip() for found, text in marked if found == level]
            telling = [t for t in lines if not _EMPTY_PHRASES.search(t)] or lines
            if telling:
                return "; ".join(dict.fromkeys(telling[-4:]))
        return " ".join(line.strip() for line in list(self._lines)[-3:])


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str],
    on_output: Callable[[str], None] | None = None,
    on_log: Callable[[str], None] | None = None,
) -> tuple[str, str]:
    """Run a tool to its end. Returns (output, log).

    Args:
        on_output: called with each piece of the output as it comes, from the calling thread.
        on_log: called with each line of the log, from another thread.

    Raises:
        NativeError: it could not be started, or ended with an error; the message has the reason that it logged.
        KeyboardInterrupt: as it came; the child has been stopped.
    """
    process = start(argv, env=env)
    log = Log(process.stderr, on_log)
    pieces: list[str] = []
    try:
        assert process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            # A wait that a signal interrupts, also where read() would restart.
            select.select([process.stdout], [], []) if sys.platform != "win32" else None
            raw = os.read(process.stdout.fileno(), 1 << 16)
            piece = decoder.decode(raw, final=not raw)
            if piece:
                pieces.append(piece)
                if on_output is not None:
                    on_output(piece)
            if not raw:
                break
        code = process.wait()
    finally:
        stop(process)
        log.close()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    check_exit(Path(os.fspath(argv[0])).name, code, log)
    return "".join(pieces), log.text()


def check_exit(name: str, code: int, log: Log) -> None:
    """Raises NativeError, with the reason from the log, when a child ended with an error."""
    if code == 0:
        return
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if code < 0:
        how = f"was killed by signal {-code}"
        if code == -signal.SIGKILL:
            how += " (the system does so when memory runs out: use a smaller context or batch)"
    else:
        how = f"failed with exit code {code}"
    reason = log.reason()
    raise NativeError(f"{name} {how}{': ' + reason if reason else ''}")
