"""The command line: help, exit codes, messages, output."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result, environment

from million_gguf import __version__
from million_gguf.cli import build_parser

Run = Callable[..., Result]
COMMANDS = ("convert", "calibrate", "inspect", "chat", "eval", "bench", "serve", "demo")


def test_version(million: Run) -> None:
    done = million("--version")
    assert (done.code, done.out.strip()) == (0, f"million-gguf {__version__}")


def test_help_names_every_command(million: Run) -> None:
    done = million("--help")
    assert done.code == 0
    assert all(command in done.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(million: Run, command: str) -> None:
    done = million(command, "--help")
    assert done.code == 0
    assert f"million {command}" in done.out
    assert "%%" not in done.out  # argparse formats the help of options, and not descriptions
    line = next(line for line in million("--help").out.splitlines() if line.split()[:1] == [command])
    assert len(line.split()) > 1  # its explanation stands beside it


def test_every_option_is_explained() -> None:
    import argparse

    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in subparsers.choices.items():
        for action in parser._actions:
            if action.option_strings or action.dest == "model":
                assert action.help, f"million {name} {action.option_strings}"


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("frobnicate",),
        ("inspect",),
        ("calibrate", "m.gguf"),
        ("calibrate", "m.gguf", "-o", "out.gguf", "--tokens", "0"),
        ("calibrate", "m.gguf", "-o", "out.gguf", "--tokens", "many"),
        ("calibrate", "m.gguf", "-o", "out.gguf", "--memory", "-1"),
        ("calibrate", "m.gguf", "-o", "out.gguf", "-ngl", "-2"),
        ("convert", "model", "-o", "out.gguf", "--outtype", "q9"),
        ("chat", "m.gguf", "-n", "0"),
        ("chat", "m.gguf", "-t", "0"),
        ("eval", "m.gguf"),
        ("bench", "m.gguf", "-d", "1,x"),
        ("serve", "m.gguf", "--port", "70000"),
        ("serve", "m.gguf", "--parallel", "0"),
        ("eval", "m.gguf", "--text", "t.txt", "--json", "--csv"),
        ("eval", "m.gguf", "--text", "t.txt", "--max-disk", "0"),
    ],
)
def test_wrong_usage_is_exit_code_2(million: Run, args: tuple[str, ...]) -> None:
    done = million(*args)
    assert done.code == 2
    assert "usage:" in done.err


def test_importing_the_package_loads_no_native_code() -> None:
    code = "import sys, million_gguf, million_gguf.cli; assert 'llama_cpp' not in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_the_module_runs_as_a_program(program: Run) -> None:
    assert program("--version").out.strip() == f"million-gguf {__version__}"


def test_debug_shows_a_traceback(million: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = million("inspect", tmp_path / "none.gguf")
    monkeypatch.setenv("MILLION_DEBUG", "1")
    loud = million("inspect", tmp_path / "none.gguf")
    assert (quiet.code, loud.code) == (2, 2)
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err


# ---- inspect ----


def test_inspect_shows_types_and_provenance(million: Run, tiny_pq: Path) -> None:
    done = million("inspect", tiny_pq)
    assert done.code == 0, done.err
    for text in ("pq4", "pq3", "pq2", "4096 tokens", "seed 7", "million-gguf test", "ab" * 32, "0.2500", "25.0%"):
        assert text in done.out


def test_inspect_json(million: Run, tiny_pq: Path) -> None:
    done = million("inspect", "--json", tiny_pq)
    facts = json.loads(done.out)
    assert facts["layers"] == 2
    # 2 layers, 2 KV heads, K and V of 8 elements
    assert facts["f16_bytes_per_token"] == 2 * 2 * (8 + 8) * 2
    assert {t: v["bytes_per_token"] for t, v in facts["codebooks"]["types"].items()} == {
        "pq4": 32,
        "pq3": 24,
        "pq2": 16,
    }
    assert facts["codebooks"]["types"]["pq4"]["k_error"] == [0.25, 0.25]
    assert facts["codebooks"]["calibration"]["seed"] == 7


def test_inspect_of_a_file_without_codebooks(million: Run, tiny: Path) -> None:
    done = million("inspect", tiny)
    assert done.code == 0
    assert "million calibrate" in done.out
    assert json.loads(million("inspect", "--json", tiny).out)["codebooks"] is None


def test_a_reader_that_leaves_is_no_error(tiny_pq: Path) -> None:
    shell = f'"{sys.executable}" -m million_gguf inspect --json "{tiny_pq}" | head -c 1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment())
    assert done.returncode == 0
    assert done.stderr == ""


# ---- chat ----


def test_an_empty_prompt_is_refused(program: Run, tiny: Path) -> None:
    done = program("chat", tiny, input="")
    assert done.code == 2
    assert "prompt is empty" in done.err


@pytest.mark.native
def test_inspect_fits_80_columns(program: Run, demo_gguf: Path) -> None:
    terminal = Terminal("inspect", str(demo_gguf))
    shown = terminal.rest()
    assert terminal.exit_code() == 0
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    for heading in ("KiB per token", "K measured", "V measured", "pq2, largest measured: blk."):
        assert heading in shown  # on one line
    piped = program("inspect", demo_gguf).out
    assert [line for line in piped.splitlines() if line != line.rstrip()] == []


@pytest.mark.native
def test_one_shot(program: Run, demo_gguf: Path) -> None:
    done = program("chat", demo_gguf, "-p", "The history of the", "-n", 12, "--temp", 0, "--stats", "-c", 512)
    assert done.code == 0, done.err
    assert done.out.strip()
    assert "KV cache pq4" in done.err  # auto
    assert "4.00x smaller" in done.err
    assert "tokens/s" in done.err
    assert done.err.count("\n") == 3  # nothing of what llama.cpp logs
    assert max(map(len, done.err.splitlines())) <= 80


@pytest.mark.native
def test_the_prompt_comes_from_a_pipe(program: Run, demo_gguf: Path) -> None:
    options = ("-n", 12, "--temp", 0, "-c", 512, "--kv", "pq4")
    piped = program("chat", demo_gguf, *options, input="The history of the\n")
    given = program("chat", demo_gguf, *options, "-p", "The history of the")
    assert piped.code == 0, piped.err
    assert piped.out == given.out


@pytest.mark.native
def test_a_prompt_longer_than_the_context(program: Run, demo_gguf: Path) -> None:
    done = program("chat", demo_gguf, "-c", 256, "-p", " ".join(map(str, range(2000))))
    assert done.code == 2
    assert "does not fit the context" in done.err
    assert "Traceback" not in done.err


@pytest.mark.native
def test_kv_types_are_checked(program: Run, demo_gguf: Path) -> None:
    done = program("chat", demo_gguf, "-p", "x", "--kv", "pq5")
    assert done.code == 2
    assert "pq4" in done.err and "q8_0" in done.err


@pytest.mark.native
def test_interactive(demo_gguf: Path) -> None:
    """At a terminal: Ctrl-C stops an answer and not the program, /reset and Ctrl-D do what they say."""
    terminal = Terminal("chat", str(demo_gguf), "--temp", "0", "-n", "1000", "--stats")
    terminal.wait_for("context 2048")  # no longer than the model's, unless that is asked for
    terminal.wait_for("base model")
    terminal.wait_for("> ")
    terminal.type("The history of the\n")
    terminal.wait_for("of the\r\n")
    terminal.wait_for(" ", seconds=60)  # the answer has begun
    terminal.type("\x03")
    terminal.wait_for("tokens/s]")
    terminal.wait_for("> ")
    time.sleep(0.5)  # a signal between readline's prompt and its wait for a key is not seen before the next key
    terminal.type("\x03")
    terminal.wait_for("/exit")
    terminal.type("/reset\n")
    terminal.wait_for("a new conversation")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


@pytest.mark.native
@pytest.mark.parametrize("when", ["loading", "answering"])
def test_ctrl_c_in_one_shot_is_exit_code_130(demo_gguf: Path, when: str) -> None:
    terminal = Terminal("chat", str(demo_gguf), "--temp", "0", "-n", "1000", "-c", "2048", "-p", "The history of the")
    terminal.wait_for("KV cache")
    if when == "answering":
        terminal.wait_for("\n")
        terminal.wait_for(" ")
    terminal.type("\x03")
    assert terminal.exit_code() == 130


class Terminal:
    """``million`` on a pseudo terminal, read as it writes."""

    def __init__(self, *args: str) -> None:
        self._master, slave = pty.openpty()
        self._seen = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "million_gguf", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(TERM="dumb"),
            preexec_fn=_own_terminal,
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Read until ``text`` has come; what came up to it is not looked at again."""
        end = time.monotonic() + seconds
        while text not in self._seen:
            assert time.monotonic() < end, f"no {text!r} in {self._seen!r}"
            assert self._read(0.2), f"ended before {text!r}: {self._seen!r}"
        self._seen = self._seen.split(text, 1)[1]

    def rest(self, seconds: float = 120) -> str:
        """What comes until the program ends."""
        end = time.monotonic() + seconds
        while self._read(0.2):
            assert time.monotonic() < end, f"no end after {self._seen!r}"
        return self._seen

    def _read(self, seconds: float) -> bool:
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self._seen += os.read(self._master, 4096).decode("utf-8", "replace")
            except OSError:  # how Linux reports that the other end is closed
                return False
        return True

    def exit_code(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        if self._process.poll() is None:
            self._process.kill()
            raise AssertionError(f"still running: {self._seen!r}")
        os.close(self._master)
        return self._process.returncode


def _own_terminal() -> None:
    """In the child: a session of its own, with standard input as its terminal, so that typed Ctrl-C is a signal."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
