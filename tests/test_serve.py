"""``million serve``, through the real ``openai`` client: streams, parallel requests, slots, and every way to end it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Result, environment
from test_cli import Terminal
from test_eval import need_tool

from million_gguf import tools

openai = pytest.importorskip("openai")

Run = Callable[..., Result]
N_SLOTS, N_CTX = 8, 1024
PROMPTS = [
    ("The history of the", 48),
    ("To install the package, you", 24),
    ("Once upon a time there was a small model that " * 8, 40),
    ("1 2 3 4 5 6 7 8 9 " * 20, 16),
    ("The KV cache", 64),
    ("In the beginning " * 30, 32),
    ("A", 56),
    ("def main():\n    print(" * 12, 20),
]


class Server:
    """``million serve`` as a program. Leaving the block kills what is left of it."""

    def __init__(self, model: Path, *options: object, log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "million_gguf", "serve", str(model), "--port", "0", "-t", "1", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment(**(env or {})),
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        line = self.process.stdout.readline()
        assert "http://" in line, (self.said, line, log.read_text())
        self.url = line.split()[1].removesuffix("/v1")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)

    def client(self, **options: Any) -> Any:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            parsed: dict[str, Any] = json.loads(answer.read())
            return parsed

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=2):
                return True
        except OSError:
            return False


def children(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of a program's children (Linux)."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def server(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need_tool("llama-server")
    folder = tmp_path_factory.mktemp("serve")
    with Server(demo_gguf, "--parallel", N_SLOTS, "-c", N_CTX, "--kv", "pq4", log=folder / "log") as running:
        yield running


def complete(client: Any, prompt: str, n: int, **extra: Any) -> str:
    # cache_prompt: a prompt that is computed in another batch shape may differ in the last bits
    done = client.completions.create(
        model="any", prompt=prompt, max_tokens=n, temperature=0.0, seed=1, extra_body={"cache_prompt": False, **extra}
    )
    text: str = done.choices[0].text
    return text


# ---- requests ----


@pytest.mark.native
def test_says_what_it_serves(server: Server) -> None:
    assert server.said == "million: serving Demo Model, pq4 cache, 8 x 1024 tokens\n"
    assert "no chat template" in server.log.read_text()


@pytest.mark.native
@pytest.mark.parametrize("options", [(), ("-c", 4096), ("-c", 0)])
def test_a_slot_is_as_long_as_is_said(demo_gguf: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    """The default is for models with longer contexts than this one's 2048."""
    need_tool("llama-server")
    with Server(demo_gguf, "--parallel", 1, *options, log=tmp_path / "log") as running:
        assert running.said.endswith(", 1 x 2048 tokens\n")
        assert [slot["n_ctx"] for slot in slots(running)] == [2048]
    assert ("training context" in (tmp_path / "log").read_text()) == (options == ("-c", 4096))


@pytest.mark.native
def test_streaming_chat(server: Server, demo_gguf: Path) -> None:
    client = server.client()
    assert [m.id for m in client.models.list().data] == [demo_gguf.stem]
    question: Any = {
        "model": "any",
        "messages": [{"role": "user", "content": "Tell me about the history of the world."}],
        "max_tokens": 40,
        "temperature": 0.0,
        "extra_body": {"cache_prompt": False},
    }
    whole = client.chat.completions.create(**question)
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **question)]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 3


@pytest.mark.native
def test_parallel_requests_equal_single_ones(server: Server) -> None:
    client = server.client()
    alone = [complete(client, prompt, n) for prompt, n in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    together = hammer(client, seconds=4)
    assert min(map(len, together)) >= 1
    for want, found in zip(alone, together, strict=True):
        assert set(found) == {want}


def hammer(client: Any, seconds: float) -> list[list[str]]:
    """Eight streams of different lengths, each for so long. Returns what each got."""
    end = time.monotonic() + seconds

    def one(prompt: str, n: int) -> list[str]:
        texts = [complete(client, prompt, n)]
        while time.monotonic() < end:
            texts.append(complete(client, prompt, n))
        return texts

    with ThreadPoolExecutor(N_SLOTS) as pool:
        return [f.result() for f in [pool.submit(one, *prompt) for prompt in PROMPTS]]


@pytest.mark.native
def test_a_long_prompt(server: Server) -> None:
    client = server.client()
    prompt = "The history of the world is long. " * 80
    done = client.completions.create(model="any", prompt=prompt, max_tokens=8, temperature=0.0)
    assert 512 < done.usage.prompt_tokens < N_CTX
    assert done.usage.completion_tokens == 8
    with pytest.raises(openai.BadRequestError, match="context size"):
        client.completions.create(model="any", prompt=prompt * 4, max_tokens=8)
    assert complete(client, *PROMPTS[0])


@pytest.mark.native
def test_a_cancelled_request_frees_its_slot(server: Server) -> None:
    client = server.client()
    want = complete(client, *PROMPTS[0])
    for _ in range(2 * N_SLOTS):  # more than there are slots
        stream = client.completions.create(
            model="any", prompt="The", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    end = time.monotonic() + 60
    while any(slot["is_processing"] for slot in slots(server)):
        assert time.monotonic() < end, "a slot still works for a client that has left"
        time.sleep(0.1)
    assert complete(client, *PROMPTS[0]) == want


def slots(server: Server) -> list[dict[str, Any]]:
    with urllib.request.urlopen(server.url + "/slots", timeout=30) as answer:
        parsed: list[dict[str, Any]] = json.loads(answer.read())
        return parsed


@pytest.mark.native
def test_pages_of_other_sites_may_not_use_it(server: Server) -> None:
    request = urllib.request.Request(server.url + "/v1/models", headers={"Origin": "https://example.org"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers.get("Access-Control-Allow-Origin") not in ("*", "https://example.org")


# ---- what outlives the server ----


@pytest.mark.native
def test_slots_outlive_a_kill(demo_gguf: Path, tmp_path: Path) -> None:
    """A slot is saved, the server is killed while it answers, and the next one goes on from the slot."""
    need_tool("llama-server")
    options = ("--parallel", 2, "-c", 512, "--kv", "pq4/pq2".replace("/", ","), "--slot-save-path", tmp_path / "slots")
    prompt = "The history of the world is a long history. " * 10
    question = {"prompt": prompt, "n_predict": 16, "temperature": 0.0, "id_slot": 0, "cache_prompt": True}
    with Server(demo_gguf, *options, log=tmp_path / "log") as first:
        before = first.post("/completion", question)
        saved = first.post("/slots/0?action=save", {"filename": "history.bin"})
        assert saved["n_saved"] > 100
        stream = first.client().completions.create(
            model="any", prompt="The", max_tokens=400, stream=True, extra_body={"ignore_eos": True, "id_slot": 0}
        )
        next(iter(stream))
        (child,) = children(first.process)
        first.process.kill()
        first.process.wait(30)
        stream.close()
        wait_until(lambda: not os.path.exists(f"/proc/{child}"), "llama-server outlives the command")
    with Server(demo_gguf, *options, log=tmp_path / "log") as second:
        restored = second.post("/slots/0?action=restore", {"filename": "history.bin"})
        assert restored["n_restored"] == saved["n_saved"]
        after = second.post("/completion", question)
        assert after["timings"]["cache_n"] > 100  # the prompt was not computed again
        assert after["content"] == before["content"]
        unsaved = second.post("/completion", {**question, "id_slot": 1})
        assert unsaved["timings"]["cache_n"] < after["timings"]["cache_n"]


def wait_until(true: Callable[[], bool], otherwise: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


@pytest.mark.native
def test_soak(demo_gguf: Path, tmp_path: Path) -> None:
    """The script that repeats the claims about eight streams and about a kill, for a second instead of minutes."""
    need_tool("llama-server")
    command = [sys.executable, str(ROOT / "benchmarks" / "serve_soak.py"), str(demo_gguf), "--seconds", "1", "-t", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "soak.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert min(result["requests"]) >= 1 and result["different"] == 0
    assert result["tokens_restored"] == result["tokens_saved"] > 100


# ---- start and end ----


@pytest.mark.native
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_both(demo_gguf: Path, tmp_path: Path, number: signal.Signals) -> None:
    need_tool("llama-server")
    with Server(demo_gguf, "-c", 256, "--parallel", 1, log=tmp_path / "log") as running:
        time.sleep(0.3)  # idle, which is when llama-server ends in good order
        running.process.send_signal(number)
        assert running.process.wait(30) == 0
        assert not running.is_up()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.native
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_does_not_listen_is_killed(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    """llama-server's signal handler may wait for a lock for ever when a request is under way."""
    program = tmp_path / "llama-server"
    program.write_text(DEAF.replace("{python}", sys.executable), encoding="utf-8")
    program.chmod(0o755)
    with Server(tiny, "-c", 256, log=tmp_path / "log", env={tools.TOOLS_DIR_VARIABLE: str(tmp_path)}) as running:
        (child,) = children(running.process)
        running.process.send_signal(number)
        assert running.process.wait(60) == 128 + number
        assert not os.path.exists(f"/proc/{child}")


DEAF = """#!{python}
import signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.native
def test_a_server_that_dies_is_told(demo_gguf: Path, tmp_path: Path) -> None:
    need_tool("llama-server")
    with Server(demo_gguf, "-c", 256, "--parallel", 1, log=tmp_path / "log") as running:
        (child,) = children(running.process)
        os.kill(child, signal.SIGKILL)
        assert running.process.wait(30) == 128 + signal.SIGKILL
    assert "llama-server was killed by signal 9" in (tmp_path / "log").read_text()


@pytest.mark.native
def test_ctrl_c_at_a_terminal(demo_gguf: Path) -> None:
    need_tool("llama-server")
    terminal = Terminal("serve", str(demo_gguf), "--port", "0", "-c", "256", "--parallel", "1", "-t", "1")
    terminal.wait_for("Ctrl-C stops")
    terminal.type("\x03")
    shown = terminal.rest()
    assert terminal.exit_code() == 0
    assert "Traceback" not in shown


@pytest.mark.native
def test_an_api_key(demo_gguf: Path, tmp_path: Path) -> None:
    need_tool("llama-server")
    keys = tmp_path / "keys"
    keys.write_text("from-a-file\n")
    for options, key in ((("--api-key", "secret"), "secret"), (("--api-key-file", keys), "from-a-file")):
        with Server(demo_gguf, "-c", 256, "--parallel", 1, *options, log=tmp_path / "log") as running:
            assert complete(running.client(api_key=key), "The", 4)
            with pytest.raises(openai.AuthenticationError):
                complete(running.client(api_key="wrong"), "The", 4)
            (child,) = children(running.process)
            assert key.encode() not in Path(f"/proc/{child}/cmdline").read_bytes()


@pytest.mark.native
def test_options_of_llama_server_go_through(demo_gguf: Path, tmp_path: Path) -> None:
    need_tool("llama-server")
    with Server(demo_gguf, "-c", 256, "--parallel", 1, "--", "--metrics", log=tmp_path / "log") as running:
        with urllib.request.urlopen(running.url + "/metrics", timeout=30) as answer:  # an error without the option
            assert b"llamacpp:" in answer.read()


def refused(done: Result, *words: str) -> None:
    assert done.code == 2, (done.code, done.out, done.err)
    error = done.err.splitlines()[-1]
    assert error.startswith("million: error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in error, done.err


@pytest.mark.native
def test_a_port_that_is_taken(program: Run, demo_gguf: Path) -> None:
    need_tool("llama-server")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(program("serve", demo_gguf, "--port", port), f"port {port} of 127.0.0.1", "another server", "--port")


@pytest.mark.native
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv", "pq9"), ("unknown KV cache type 'pq9'",)),
        (("--host", "no.such.host.invalid"), ("--host no.such.host.invalid",)),
        (("--api-key-file", "/no/such/file"), ("no such file",)),
        (("--", "--no-such-option"), ("llama-server ended with exit code 1", "no-such-option")),
        (("--", "--lora", "/no/such/file"), ("llama-server ended with exit code 1",)),
    ],
)
def test_refused(program: Run, demo_gguf: Path, options: Sequence[str], words: tuple[str, ...]) -> None:
    need_tool("llama-server")
    refused(program("serve", demo_gguf, "--port", "0", "-t", "1", "-c", "256", "--parallel", "1", *options), *words)


@pytest.mark.native
def test_a_model_without_codebooks(program: Run, plain_gguf: Path, tmp_path: Path) -> None:
    need_tool("llama-server")
    refused(program("serve", plain_gguf, "--kv", "pq4"), "found no codebooks", "million calibrate")
    with Server(plain_gguf, "-c", 256, "--parallel", 1, log=tmp_path / "log") as running:
        assert "f16 cache" in running.said
    assert "million calibrate" in (tmp_path / "log").read_text()


def test_a_type_without_codebooks(million: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import make_set

    from million_gguf import container

    path = tmp_path / "pq4-only.gguf"
    container.embed(tiny, path, make_set(tiny, names=("pq4",)))
    monkeypatch.setattr(tools, "find", lambda name: Path(name))
    refused(million("serve", path, "--kv", "pq4,pq2"), "found codebooks for pq4, need pq2", "--types pq2")


def test_a_missing_tool(million: Run, tiny_pq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_folders", lambda: [tmp_path])
    refused(million("serve", tiny_pq), "llama-server is missing")


@pytest.mark.native
def test_the_log_never_blocks_the_server(demo_gguf: Path, tmp_path: Path) -> None:
    """llama-server writes more than a pipe holds."""
    need_tool("llama-server")
    with Server(demo_gguf, "-c", 256, "--parallel", 2, "--", "-lv", "5", log=tmp_path / "log") as running:
        client = running.client(timeout=60.0)
        done = threading.Event()

        def ask() -> None:
            for _ in range(10):
                complete(client, "The", 32)
            done.set()

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(60)
        assert done.is_set()
