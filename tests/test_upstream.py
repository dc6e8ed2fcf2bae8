"""llama.cpp's own tests and tools, in our build: the ops and types that we touch, and -ctk/-ctv with PQ types.

``make test`` builds them and names their folder in MILLION_TOOLS_DIR; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

PQ = ("pq4", "pq3", "pq2")


def tool(name: str) -> str:
    folder = os.environ.get("MILLION_TOOLS_DIR")
    if not folder:
        pytest.skip("MILLION_TOOLS_DIR is not set: 'make test' builds the tools and sets it")
    path = Path(folder) / name
    assert path.is_file(), f"{path} is missing: build the target million-upstream-tests"
    return str(path)


def run(name: str, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([tool(name), *map(str, args)], capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode >= 0, f"{name} died of signal {-done.returncode}"
    return done


@pytest.mark.native
def test_backend_ops_with_pq_operands() -> None:
    done = run("test-backend-ops", "test", "-b", "CPU", "-o", "SET_ROWS,CPY,FLASH_ATTN_EXT", "-p", "pq")
    passed, total = (
        int(n) for n in next(line for line in done.stdout.splitlines() if "tests passed" in line).split()[0].split("/")
    )
    assert passed == total >= 800


@pytest.mark.native
def test_backend_ops_that_share_our_dispatch() -> None:
    run("test-backend-ops", "test", "-b", "CPU", "-o", "SET_ROWS", "-p", "type_dst=q8_0")


@pytest.mark.native
def test_quantize_fns() -> None:
    run("test-quantize-fns")


@pytest.mark.native
@pytest.mark.parametrize("cache", ["f16", "pq4"])
def test_state_restore_fragmented(demo_gguf: Path, cache: str) -> None:
    run("test-state-restore-fragmented", "-m", demo_gguf, "-ctk", cache, "-ctv", cache, "-t", "2", "-c", "512")


@pytest.mark.native
def test_save_load_state(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes its state file there
    # f16 only: llama_io_read_device counts the blocks of a quantized cache as elements, so upstream's own program
    # crashes in its device copies with every quantized type (q4_0 too). State in host memory, with PQ types, is tested
    # in test_bindings.py.
    run("test-save-load-state", "-m", demo_gguf, "-t", "2", "-c", "512")


@pytest.mark.native
@pytest.mark.parametrize("cache", PQ)
def test_bench_takes_pq_types(demo_gguf: Path, cache: str) -> None:
    done = run(
        "llama-bench", "-m", demo_gguf, "-ctk", cache, "-ctv", cache, "-fa", "1",
        "-t", "2", "-p", "64", "-n", "8", "-r", "1", "-o", "json",
    )  # fmt: skip
    results = json.loads(done.stdout)
    assert [r["type_k"] for r in results] == [cache, cache]
    assert all(r["avg_ts"] > 0 for r in results)


@pytest.mark.native
def test_bench_refuses_pq_without_flash_attention(demo_gguf: Path) -> None:
    done = run(
        "llama-bench", "-m", demo_gguf, "-ctk", "pq4", "-fa", "0", "-p", "8", "-n", "0", "-r", "1", check=False,
    )  # fmt: skip
    assert done.returncode > 0
