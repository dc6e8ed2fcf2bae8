"""The scripts in examples/ run as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from test_eval import need_tool
from test_serve import Server


def run(name: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.native
def test_python_api(demo_gguf: Path) -> None:
    said = run("python_api.py", demo_gguf, "The history of the")
    assert "KV cache, K pq4 and V pq4: 1024 KiB for 2048 tokens" in said
    assert "in f16: 4096 KiB" in said
    assert len(said.splitlines()[0]) > 1


@pytest.mark.native
def test_openai_client(demo_gguf: Path, tmp_path: Path) -> None:
    need_tool("llama-server")
    with Server(demo_gguf, "-c", 512, "--parallel", 1, log=tmp_path / "log") as server:
        assert len(run("openai_client.py", "Hello", "--url", f"{server.url}/v1").strip()) > 1
