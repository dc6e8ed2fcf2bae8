"""On a CUDA device: the kernels by themselves, the ops against the CPU's, and a model against the CPU's. ``make test-gpu`` builds
what is needed and runs these tests; elsewhere they are skipped.

``MILLION_CUDA_TESTS_DIR`` names the folder of the kernels' test programs, ``MILLION_TOOLS_DIR`` that of llama.cpp's tools,
built with CUDA.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from million_gguf.spec import PQ_TYPES

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "converters" / "data" / "calibration.txt"
DEVICE = "CUDA0"
FALLBACK = "leaves an op to the CPU"  # what the backend logs when it does not take an op with PQ operands


def _why_no_device() -> str | None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "there is no CUDA device"
    return None


_REASON = _why_no_device()
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]


def run(command: list[object], timeout: float = 1200, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        errors="replace",
        env={**os.environ, **env},
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


def program(variable: str, name: str, target: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set: 'make test-gpu' builds {name} and sets it")
    path = Path(folder, name)
    assert path.is_file(), f"{path} is missing: build the target {target}"
    return path


def kernel_test(name: str) -> Path:
    return program("MILLION_CUDA_TESTS_DIR", name, name)


def tool(name: str) -> Path:
    return program("MILLION_TOOLS_DIR", name, "million-upstream-tests")


# ---- kernels by themselves ----


@pytest.mark.parametrize("name", ["pq-cuda-codec-test", "pq-cuda-test"])
def test_kernels(name: str) -> None:
    run([kernel_test(name)])


@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
@pytest.mark.parametrize("name", ["pq-cuda-codec-test", "pq-cuda-test"])
def test_compute_sanitizer(name: str, check: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not there: it comes with the CUDA toolkit")
    run([sanitizer, "--tool", check, "--error-exitcode", "1", kernel_test(name), "quick"], timeout=3600)


# ---- ops: the same cases on CUDA and on the CPU ----


@pytest.mark.parametrize("op", ["SET_ROWS", "CPY", "FLASH_ATTN_EXT"])
def test_backend_ops(op: str) -> None:
    done = run([tool("test-backend-ops"), "test", "-b", DEVICE, "-o", op, "-p", "pq"])
    line = next(line for line in done.stdout.splitlines() if "tests passed" in line)
    passed, total = (int(n) for n in line.split()[0].split("/"))
    assert passed == total > 0
    left = [line for line in done.stdout.splitlines() if "not supported" in line]
    assert not left, "\n".join(left[:20])
    assert FALLBACK not in done.stderr


# ---- a model, end to end ----


def perplexity(backend: str, model: Path, logits: Path, cache: str) -> str:
    """``llama-perplexity``: writes logits, or compares with them where they are written. All tokens are read as codes: a
    prompt attends to its own micro-batch exactly where there is a tail, and what is left of the error then is noise."""
    where = ["-ngl", "0", "-dev", "none"] if backend == "CPU" else ["-ngl", "99"]
    compare = ["--kl-divergence"] if logits.is_file() else []
    done = run(
        [
            *[tool("llama-perplexity"), "-m", model, "-f", TEXT, "-c", "512", "--chunks", "32", "-ub", "128", "-fa", "on"],
            *["--kl-divergence-base", logits, *compare, "-ctk", cache, "-ctv", cache, *where],
        ],
        MILLION_KV_TAIL="0",
    )
    assert FALLBACK not in done.stderr + done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def mean_kl(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], float]:
    """Mean KL divergence of a backend and a cache type from the CPU and f16. The base is always the CPU's: where logits are f16, as the products of an f16
    model are on CUDA, those that the tool keeps in 16 bits are rounded to one side. CUDA's f16 measured against itself is then -0.000026 and not 0, on the
    bundled model, which is 3 % of pq4's error; against the CPU's it is 0.000008."""
    folder = tmp_path_factory.mktemp("logits")
    base = folder / "f16.kld"
    perplexity("CPU", demo_gguf, base, "f16")

    def measure(backend: str, cache: str) -> float:
        text = perplexity(backend, demo_gguf, base, cache)
        found = re.search(r"Mean\s+KLD:\s+([-\d.e]+)", text)
        assert found, text[-2000:]
        return float(found[1])

    return measure


@pytest.mark.native
@pytest.mark.parametrize("cache", PQ_TYPES)
def test_cache_error_is_that_of_the_cpu(mean_kl: Callable[[str, str], float], cache: str) -> None:
    assert mean_kl("CUDA", cache) == pytest.approx(mean_kl("CPU", cache), rel=0.02)


@pytest.mark.native
@pytest.mark.parametrize("rope", ["", "--rope-scaling yarn --rope-scale 4 --yarn-orig-ctx 64"])
def test_a_step_in_one_launch_is_that_of_many(tmp_path: Path, rope: str) -> None:
    """Rope, writes of K and V and attention of a layer in one kernel, and its result as the next product takes it, against
    kernels of their own. The logits are kept in 16 bits, which alone makes a divergence of 1e-5; positions off by a hundredth
    make 0.7, a plain cache makes 1.2."""
    model, logits = tmp_path / "model.gguf", tmp_path / "logits"
    maker = ROOT / "benchmarks" / "gpu" / "synthetic_gguf.py"
    run([sys.executable, maker, "--geometry", "peaky", "--types", "pq4", "-o", model])
    for tokens in (1, 4):
        command = [
            *[tool("llama-perplexity"), "-m", model, "-f", TEXT, "-c", "256", "--chunks", "2", "-fa", "on", "-ngl", "99"],
            *["-b", tokens, "-ub", tokens, "-ctk", "pq4", "-ctv", "pq4", *rope.split(), "--kl-divergence-base", logits],
        ]
        run(command, GGML_CUDA_DISABLE_FUSION="1", MILLION_KV_TAIL="32")  # most of the context is read as codes
        done = run([*command, "--kl-divergence"], MILLION_KV_TAIL="32")
        largest = re.search(r"Maximum KLD:\s+([-\d.e]+)", done.stdout + done.stderr)
        assert largest, done.stdout[-2000:]
        assert float(largest[1]) < 1e-4


@pytest.mark.native
def test_a_long_prompt_beside_the_encoder_is_that_of_many_launches(tmp_path: Path) -> None:
    """Prefill in the space of codes, which begins where a context is long enough, with rows that are encoded beside the lookups, against rows that are encoded
    before. Both attend to the same codes and the same tail; a divergence of 1e-5 is that of logits in 16 bits."""
    model, logits = tmp_path / "model.gguf", tmp_path / "logits"
    maker = ROOT / "benchmarks" / "gpu" / "synthetic_gguf.py"
    run([sys.executable, maker, "--geometry", "peaky", "--types", "pq4", "-o", model])
    command = [
        *[tool("llama-perplexity"), "-m", model, "-f", TEXT, "-c", "40960", "--chunks", "1", "-fa", "on", "-ngl", "99"],
        *["-b", "512", "-ub", "512", "-ctk", "pq4", "-ctv", "pq4", "--kl-divergence-base", logits],
    ]
    run(command, GGML_CUDA_DISABLE_FUSION="1")
    done = run([*command, "--kl-divergence"])
    largest = re.search(r"Maximum KLD:\s+([-\d.e]+)", done.stdout + done.stderr)
    assert largest, done.stdout[-2000:]
    assert float(largest[1]) < 1e-4
