"""The CUDA kernels compile for 8.0 and 9.0 and keep to their budgets of registers, shared memory and spills; the plan of the
attention kernels is tested too. Needs nvcc, and no device.

A budget is what the launch counts on: so many blocks of so many threads on one multiprocessor, which has 65536 registers.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_build import ARCHITECTURES, CudaBuild

pytestmark = [pytest.mark.build, pytest.mark.slow]


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about a kernel. ``name`` is mangled; ``smem`` is static shared memory, in bytes."""

    name: str
    architecture: str
    registers: int
    spills: int
    stack: int
    smem: int


@dataclass(frozen=True)
class Budget:
    """Of the kernels whose mangled name matches: ``blocks`` of ``threads`` fit a multiprocessor, and at most ``spills``
    bytes are stored to and loaded from the stack."""

    pattern: str
    threads: int
    blocks: int
    spills: int = 0

    @property
    def registers(self) -> int:
        """Largest number per thread; they are given out by 8."""
        return min(255, 65536 // (self.threads * self.blocks) // 8 * 8)


# The first that matches counts; every kernel must match one.
BUDGETS = (
    Budget(
        "pq_encode_few_kernel", threads=128, blocks=4
    ),  # one token: all strips of a layer at once on 132 multiprocessors
    Budget("pq_encode_tile_kernel", threads=256, blocks=2, spills=96),
    # two blocks keep four warps of each scheduler busy; what does not fit are constants of a tile, read again once per tile
    Budget("pq_decode_kernelILi[0-9]ELi[24]E", threads=256, blocks=2, spills=256),
    Budget("pq_decode_kernelILi[0-9]ELi8E", threads=256, blocks=1),  # y of head size 256 takes half the registers
    Budget("pq_decode_plain_kernel", threads=256, blocks=4),
    Budget("pq_prefill_rows_kernel", threads=512, blocks=2),  # so that a block leaves room for one of the encoder
    Budget("pq_prefill_(begin|end)_kernel", threads=256, blocks=2),
    Budget("fill_random", threads=256, blocks=4),  # of the benchmark
    Budget("read_weights", threads=128, blocks=16),  # of the benchmark: all that a multiprocessor takes
    Budget("rope_(rows|turns)", threads=64, blocks=8),  # of the tests
    # what is spilled is read again once per tile of 32 cells, among some 700 instructions
    Budget("attn_128_kernelILi[0-9]ELi[0-9]ELi1E", threads=512, blocks=1, spills=96),
    Budget("attn_128_kernelILi[0-9]ELi[0-9]ELi4E", threads=512, blocks=1, spills=384),
    Budget("attn_128_kernelILi[0-9]ELi[0-9]ELi8E", threads=384, blocks=1, spills=320),
    # any mixture of types, and tables of K and V one after the other: for what has no kernel of its own
    Budget("attn_kernelILin1", threads=256, blocks=1, spills=1024),
    Budget("attn_kernel", threads=256, blocks=1, spills=160),
    Budget("combine", threads=256, blocks=2),
)
MAX_STATIC_SMEM = 48 * 1024
MIN_REGISTERS = 12  # no kernel here gets by with fewer


def parse(log: str) -> list[Kernel]:
    """Kernels in the output of ``ptxas -v``."""
    kernels = []
    for m in re.finditer(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        log,
        re.DOTALL,
    ):
        smem = re.search(r"(\d+) bytes smem", m["rest"])
        kernels.append(
            Kernel(
                m["name"],
                m["architecture"],
                int(m["registers"]),
                int(m["stores"]) + int(m["loads"]),
                int(m["stack"]),
                int(smem[1]) if smem else 0,
            )
        )
    return kernels


def faults(kernel: Kernel) -> list[str]:
    """What about a kernel exceeds its budget."""
    budget = next((b for b in BUDGETS if re.search(b.pattern, kernel.name)), None)
    if budget is None:
        return ["has no budget: add one"]
    found = []
    if kernel.spills > budget.spills or (kernel.stack and not budget.spills):
        found.append(f"spills {kernel.spills} bytes, stack {kernel.stack}: need at most {budget.spills}")
    if kernel.registers > budget.registers:
        found.append(f"{kernel.registers} registers, need at most {budget.registers}")
    if kernel.registers < MIN_REGISTERS:
        found.append(f"{kernel.registers} registers: it does nothing, or gives up at once on this architecture")
    if kernel.smem > MAX_STATIC_SMEM:
        found.append(f"{kernel.smem} bytes of static shared memory, need at most {MAX_STATIC_SMEM}")
    return found


@dataclass(frozen=True)
class Build:
    log: str
    program: Path


@pytest.fixture(scope="module")
def build(cuda_build: CudaBuild | None) -> Build:
    """The test programs with all kernels, for both architectures, and what ptxas said."""
    if cuda_build is None:
        pytest.skip(f"{CudaBuild.missing()} is not there: compiling the CUDA kernels needs the CUDA toolkit and CMake")
    log = cuda_build.finish(timeout=3600)
    return Build(log, cuda_build.folder / "pq-cuda-test")


def test_parse_and_budgets() -> None:
    log = """
ptxas info    : Compiling entry function '_Z20pq_encode_few_kernelv' for 'sm_90'
ptxas info    : Function properties for _Z20pq_encode_few_kernelv
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 181 registers, used 1 barriers, 50000 bytes smem
ptxas info    : Compiling entry function '_Z5otherv' for 'sm_80'
ptxas info    : Function properties for _Z5otherv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 400 bytes cmem[0]
"""
    few, other = parse(log)
    assert few == Kernel("_Z20pq_encode_few_kernelv", "90", 181, 40, 8, 50000)
    assert len(faults(few)) == 3
    assert other == Kernel("_Z5otherv", "80", 10, 0, 0, 0)
    assert faults(other) == ["has no budget: add one"]
    (empty,) = faults(Kernel("_Z7combinev", "80", 4, 0, 0, 0))
    assert "does nothing" in empty


def test_kernels_keep_their_budgets(build: Build) -> None:
    kernels = [k for k in parse(build.log) if "pq_" in k.name]
    for architecture in ARCHITECTURES:
        here = [k for k in kernels if k.architecture == architecture]
        for family in (
            "pq_encode_few",
            "pq_encode_tile",
            "pq_decode_kernel",
            "pq_decode_plain",
            "pq_prefill_begin",
            "pq_prefill_rows",
            "pq_prefill_end",
            "attn_128",
            "attn_kernel",
        ):
            assert any(family in k.name for k in here), f"no {family} kernel for sm_{architecture}"
    bad = [f"{k.name} for sm_{k.architecture}: {fault}" for k in kernels for fault in faults(k)]
    assert not bad, "\n".join(bad)


def test_plan(build: Build) -> None:
    done = subprocess.run([str(build.program), "plan"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
