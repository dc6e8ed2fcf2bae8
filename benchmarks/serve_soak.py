#!/usr/bin/env python3
"""Eight clients at once on ``million serve``, for minutes: is every answer the one that a single client gets?

    python benchmarks/serve_soak.py with-pq.gguf --seconds 120 --json soak.json

1. Each of eight prompts of different lengths is answered alone, greedy, with the same seed.
2. Eight streams ask them again and again, all at once, and compare. The server's memory is noted when every stream has had its
   first answer, and from then on twelve times.
3. A slot is saved, the server is killed with SIGKILL in the middle of another request, a new one is started, the slot is
   restored, and the prompt goes on from it without being computed again.

Needs the openai package, and Linux for the memory. The exit code is 1 when something differs.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from million_gguf.cli.memory import machine

Json = dict[str, Any]
N_CTX = 1024  # per slot
# (prompt, tokens to answer with): short and long in both, so that requests start and end at all times
REQUESTS = [
    ("The history of the", 96),
    ("To install the package, you", 24),
    ("A small model says little, and says it often. " * 16, 64),
    ("1 2 3 4 5 6 7 8 9 " * 20, 16),
    ("The cache of a language model", 160),
    ("In the beginning there was " * 60, 48),
    ("A", 128),
    ("def main():\n    print(" * 12, 32),
]
_SLOT = "soak.bin"
_N_SAMPLES = 12  # of the memory


@contextmanager
def serving(model: Path, slots: Path, options: list[str]) -> Any:
    """``million serve`` for as long as the block runs: (process, URL)."""
    command = [
        *[sys.executable, "-m", "million_gguf", "serve", str(model), "--port", "0", "-c", str(N_CTX)],
        *["--parallel", str(len(REQUESTS)), "--slot-save-path", str(slots), *options],
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        print(process.stdout.readline().rstrip(), flush=True)
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit("serve_soak: error: the server did not start; its message is above")
        yield process, line.split()[1].removesuffix("/v1")
    finally:
        process.kill()
        process.wait()


def post(url: str, body: Json) -> Json:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        parsed: Json = json.loads(answer.read())
        return parsed


def rss_bytes(process: subprocess.Popen[str]) -> int:
    """Resident memory of llama-server, the child of ``million serve``."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (line,) = (x for x in Path(f"/proc/{child}/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def ask(client: openai.OpenAI, prompt: str, n: int) -> str:
    # cache_prompt: a prompt of which a part is in the cache already is computed in batches of another shape, and may
    # differ in the last bits
    stream = client.completions.create(
        model="any", prompt=prompt, max_tokens=n, temperature=0.0, seed=1, stream=True,
        extra_body={"cache_prompt": False},
    )  # fmt: skip
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def soak(client: openai.OpenAI, process: subprocess.Popen[str], seconds: float) -> Json:
    """Parts 1 and 2."""
    alone = [ask(client, *request) for request in REQUESTS]

    def stream(want: str, request: tuple[str, int], seconds: float) -> tuple[int, int]:
        """(answers, those that differ) of one client; one answer at least."""
        end = time.monotonic() + seconds
        n_answers = n_different = 0
        while not n_answers or time.monotonic() < end:
            n_different += ask(client, *request) != want
            n_answers += 1
        return n_answers, n_different

    def streams(seconds: float) -> list[tuple[int, int]]:
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            answers = pool.map(stream, alone, REQUESTS, [seconds] * len(REQUESTS))
            for _ in range(_N_SAMPLES if seconds else 0):
                time.sleep(seconds / _N_SAMPLES)
                memory.append(rss_bytes(process))
            return list(answers)

    memory: list[int] = []
    first = streams(0)
    memory.append(rss_bytes(process))
    counts = [(a + c, b + d) for (a, b), (c, d) in zip(first, streams(seconds), strict=True)]
    return {
        "streams": len(REQUESTS),
        "seconds": seconds,
        "requests": [n for n, _ in counts],
        "different": sum(n for _, n in counts),
        "rss_mib": [round(n / (1 << 20), 1) for n in memory],
    }


def kill_and_restore(model: Path, folder: Path, options: list[str]) -> Json:
    """Part 3."""
    question = {
        "prompt": REQUESTS[5][0], "n_predict": 32, "temperature": 0.0, "seed": 1, "id_slot": 0, "cache_prompt": True,
    }  # fmt: skip
    with serving(model, folder, options) as (process, url):
        before = post(f"{url}/completion", question)
        saved = post(f"{url}/slots/0?action=save", {"filename": _SLOT})
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="any", prompt="The", max_tokens=N_CTX - 64, stream=True, extra_body={"ignore_eos": True, "id_slot": 0}
        )
        next(iter(stream))
        process.send_signal(signal.SIGKILL)
        process.wait()
    with serving(model, folder, options) as (_, url):
        restored = post(f"{url}/slots/0?action=restore", {"filename": _SLOT})
        after = post(f"{url}/completion", question)
    return {
        "tokens_saved": saved["n_saved"],
        "tokens_restored": restored["n_restored"],
        "prompt_tokens_not_computed_again": after["timings"]["cache_n"],
        "same_answer": after["content"] == before["content"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="with codebooks")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S", help="of part 2 (default: %(default)g)")
    parser.add_argument("--kv", default="pq4", metavar="TYPE", help="KV cache type (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    args = parser.parse_args()
    options = ["--kv", args.kv, *(["-t", str(args.threads)] if args.threads else [])]
    with tempfile.TemporaryDirectory(prefix="million-soak-") as name:
        with serving(args.model, Path(name), options) as (process, url):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600.0)
            result: Json = {
                "machine": machine(args.threads),
                "command": " ".join(["benchmarks/serve_soak.py", *sys.argv[1:]]),
                **soak(client, process, args.seconds),
            }
        result |= kill_and_restore(args.model, Path(name), options)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    mib = result["rss_mib"]
    print(
        f"{sum(result['requests'])} requests by {result['streams']} streams in {args.seconds:g} s, "
        f"{result['different']} differ from a single run; memory {mib[0]} MiB at first, {mib[len(mib) // 2]} half-way, {mib[-1]} at the end\n"
        f"killed in a request: {result['tokens_restored']} of {result['tokens_saved']} saved tokens restored, "
        f"{result['prompt_tokens_not_computed_again']} of the prompt not computed again, "
        f"{'the same' if result['same_answer'] else 'ANOTHER'} answer"
    )
    good = not result["different"] and result["same_answer"] and result["tokens_restored"] == result["tokens_saved"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
