"""The exact tail of a PQ cache, through libllama: what attention reads exactly, and that dropping it is always correct."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from lowlevel import LowLevel, tokens_of

from million_gguf.errors import InputError, NativeError

N_CTX = 512
ALL = 1 << 20  # a tail that holds every token
TEXT = Path(__file__).parent.parent / "converters" / "data" / "calibration.txt"
LAYOUT = Path(__file__).parent.parent / "cuda" / "pq" / "pq-layout.h"
TYPES = ["pq4", "pq3", "pq2"]

pytestmark = pytest.mark.native
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def tokens(demo_gguf: Path) -> list[int]:
    found = tokens_of(demo_gguf, TEXT.read_bytes()[:4000].decode("utf-8", "ignore"))
    assert len(found) >= N_CTX
    return found[:N_CTX]


def run_in_batches(run: LowLevel, tokens: list[int], sizes: list[int], sequence: int = 0) -> Logits:
    """Decode tokens 0, 1, ... in batches of these sizes; logits of all of them."""
    logits, start = [], 0
    for size in sizes:
        logits.append(run.decode([(tokens[i], i, sequence) for i in range(start, start + size)]))
        start += size
    return np.concatenate(logits)


def nmse(found: Logits, want: Logits) -> float:
    return float(((found - want) ** 2).sum() / (want**2).sum())


# An f16 cache rounds the same rows; what is left is the order of summation. Codes in place of rows give 5e-5 and more.
EXACT = 2e-6


@pytest.mark.parametrize("sizes", [[300], [100, 100, 37, 1, 1, 1], [1] * 20 + [60]], ids=["one", "mixed", "single"])
@pytest.mark.parametrize("name", [*TYPES, "pq2,f16", "f16,pq2"])
def test_a_tail_that_holds_everything_is_an_f16_cache(
    demo_gguf: Path, tokens: list[int], name: str, sizes: list[int]
) -> None:
    with closing(LowLevel(demo_gguf, "f16", N_CTX, 1, unified=True)) as run:
        want = run_in_batches(run, tokens, sizes)
    with closing(LowLevel(demo_gguf, name, N_CTX, 1, unified=True, kv_tail=ALL)) as run:
        exact = nmse(run_in_batches(run, tokens, sizes), want)
        assert exact < EXACT
    with closing(LowLevel(demo_gguf, name, N_CTX, 1, unified=True, kv_tail=0)) as run:
        # rows are told from codes (the demo model's V alone costs little: 5e-6 and more)
        assert nmse(run_in_batches(run, tokens, sizes), want) > 3 * exact


@pytest.mark.parametrize("name", TYPES)
def test_a_prompt_attends_to_its_own_micro_batch_exactly(demo_gguf: Path, tokens: list[int], name: str) -> None:
    with closing(LowLevel(demo_gguf, "f16", N_CTX, 1, unified=True)) as run:
        want = run_in_batches(run, tokens, [400])
    with closing(LowLevel(demo_gguf, name, N_CTX, 1, unified=True, kv_tail=1)) as run:
        assert nmse(run_in_batches(run, tokens, [400]), want) < EXACT


def test_exact_up_to_the_edge_of_the_tail(demo_gguf: Path, tokens: list[int]) -> None:
    """Single tokens: exact while all of the context is among the last 16, and no longer after."""
    n_tail, n = 16, 40
    with closing(LowLevel(demo_gguf, "f16", N_CTX, 1, unified=True)) as run:
        want = run_in_batches(run, tokens, [1] * n)
    with closing(LowLevel(demo_gguf, "pq2", N_CTX, 1, unified=True, kv_tail=n_tail)) as run:
        found = run_in_batches(run, tokens, [1] * n)
    errors = [nmse(found[i], want[i]) for i in range(n)]
    assert max(errors[:n_tail]) < EXACT
    assert np.median(errors[n_tail + 4 :]) > 10 * EXACT


def test_a_tail_lowers_the_error(demo_gguf: Path, tokens: list[int]) -> None:
    sizes = [32] * 12
    with closing(LowLevel(demo_gguf, "f16", N_CTX, 1, unified=True)) as run:
        want = run_in_batches(run, tokens, sizes)
    errors = []
    for n_tail in (0, 1, 32, 128, ALL):
        with closing(LowLevel(demo_gguf, "pq2", N_CTX, 1, unified=True, kv_tail=n_tail)) as run:
            errors.append(nmse(run_in_batches(run, tokens, sizes), want))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_keep_tails_of_their_own(demo_gguf: Path, tokens: list[int], unified: bool) -> None:
    """A long second sequence does not push the first one out of the tail."""
    n_tail = 48
    with closing(LowLevel(demo_gguf, "f16", N_CTX, 2, unified=unified)) as run:
        want = run_in_batches(run, tokens, [1] * 40)
    with closing(LowLevel(demo_gguf, "pq2", N_CTX, 2, unified=unified, kv_tail=n_tail)) as run:
        run_in_batches(run, tokens, [1] * 20)
        other = tokens[100:]
        run_in_batches(run, other, [64, 64, 1, 1, 1, 1], sequence=1)
        found = np.concatenate([run.decode([(tokens[i], i, 0)]) for i in range(20, 40)])
        assert nmse(found, want[20:]) < EXACT


@pytest.mark.parametrize("unified", [False, True])
def test_a_copied_sequence_is_correct(demo_gguf: Path, tokens: list[int], unified: bool) -> None:
    """Its tail may be dropped: then its codes are read, and the error is that of a cache with the new token alone in its tail."""
    results = {1: 0.0, 64: 0.0}
    for start in range(0, 48, 6):  # the error of one token says little
        prompt = tokens[start : start + 100]
        with closing(LowLevel(demo_gguf, "f16", N_CTX, 2, unified=unified)) as run:
            want = run_in_batches(run, prompt, [100])[-1]
        for n_tail in results:
            with closing(LowLevel(demo_gguf, "pq4", N_CTX, 2, unified=unified, kv_tail=n_tail)) as run:
                run_in_batches(run, prompt, [99])
                run.low.llama_memory_seq_cp(run.memory, 0, 1, -1, -1)
                run.low.llama_memory_seq_rm(run.memory, 0, -1, -1)
                results[n_tail] += nmse(run.decode([(prompt[99], 99, 1)])[0], want)
    assert 0.0 < results[64] <= 1.001 * results[1]


def test_rolled_back_tokens_leave_no_trace(demo_gguf: Path, tokens: list[int]) -> None:
    """Speculative decoding: write a draft, remove it, go on with other tokens in the same cells."""
    with closing(LowLevel(demo_gguf, "pq4", N_CTX, 1, unified=True, kv_tail=64)) as run:
        want = run_in_batches(run, tokens, [80, 1, 1, 1])[80:]
    with closing(LowLevel(demo_gguf, "pq4", N_CTX, 1, unified=True, kv_tail=64)) as run:
        run_in_batches(run, tokens, [80])
        for i in range(80, 83):
            run.decode([(tokens[i] if j == 0 else tokens[200 + j], i + j, 0) for j in range(8)])
            assert run.low.llama_memory_seq_rm(run.memory, 0, i, -1)
            found = run.decode([(tokens[i], i, 0)])[0]
            # eight tokens of the window were dropped with the draft's cells, no more than that
            assert nmse(found, want[i - 80]) < 1e-3


def test_removed_and_reused_cells(demo_gguf: Path, tokens: list[int]) -> None:
    """Cells of a removed sequence are given to another one, which must not see old rows."""
    with closing(LowLevel(demo_gguf, "f16", 128, 1, unified=True)) as run:
        want = run_in_batches(run, tokens[200:], [100])
    with closing(LowLevel(demo_gguf, "pq2", 128, 1, unified=True, kv_tail=ALL)) as run:
        run_in_batches(run, tokens, [100])
        assert run.low.llama_memory_seq_rm(run.memory, 0, -1, -1)
        assert nmse(run_in_batches(run, tokens[200:], [60, 40]), want) < EXACT


def test_after_a_shift_codes_are_read(demo_gguf: Path, tokens: list[int]) -> None:
    logits = {}
    for n_tail in (0, 64):
        with closing(LowLevel(demo_gguf, "pq4", N_CTX, 1, unified=True, kv_tail=n_tail)) as run:
            run_in_batches(run, tokens, [100])
            assert run.low.llama_memory_seq_rm(run.memory, 0, 4, 50)
            run.low.llama_memory_seq_add(run.memory, 0, 50, 100, -46)
            logits[n_tail] = run.decode([(tokens[100], 54, 0)])[0]
    with closing(LowLevel(demo_gguf, "f16", N_CTX, 1, unified=True)) as run:
        run_in_batches(run, tokens, [100])
        run.low.llama_memory_seq_rm(run.memory, 0, 4, 50)
        run.low.llama_memory_seq_add(run.memory, 0, 50, 100, -46)
        want = run.decode([(tokens[100], 54, 0)])[0]
    assert nmse(logits[64], want) <= 1.5 * nmse(logits[0], want)


def llama(path: Path, name: str, **options: Any) -> Any:
    from million_gguf import Llama

    return Llama(path, kv_cache=name, n_ctx=N_CTX, verbose=False, **options)


def last_logits(llm: Any) -> Logits:
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def test_a_state_goes_between_contexts_with_and_without_a_tail(demo_gguf: Path, tokens: list[int]) -> None:
    scores = {}
    with closing(llama(demo_gguf, "pq4", kv_tail=64)) as source:
        source.eval(tokens[:100])
        state = source.save_state()
        source.eval(tokens[100:101])
        scores["source"] = last_logits(source)
    for n_tail in (0, 16, 64, 128):
        with closing(llama(demo_gguf, "pq4", kv_tail=n_tail)) as llm:
            llm.load_state(state)
            llm.eval(tokens[100:101])
            scores[n_tail] = last_logits(llm)
    np.testing.assert_array_equal(scores[64], scores["source"])
    for n_tail in (0, 16, 128):
        assert nmse(scores[n_tail], scores["source"]) < 2e-2


def codes_fingerprint(path: Path, cache: str, order: int) -> bytes:
    """What a saved state has of the codes in it: 64-bit FNV-1a, begun with the order of codes in a row, over the headers of the blobs of K and V of every layer."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    sides = [fields[f"million.{cache}.{side}"].contents() for side in "kv"]
    h = 0xCBF29CE484222325 ^ order
    for layer in zip(*sides, strict=True):
        for blob in layer:
            for byte in blob[:44].encode():  # 32 bytes in base64
                h = (h ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return h.to_bytes(8, "little")


def test_a_state_with_codes_in_another_order_is_refused(demo_gguf: Path, tokens: list[int]) -> None:
    found = re.search(r"#define PQ_CODE_ORDER (\d+)u", LAYOUT.read_text())
    assert found
    order = int(found[1])
    with closing(llama(demo_gguf, "pq4", kv_tail=0)) as llm:
        llm.eval(tokens[:50])
        state = llm.save_state()
        saved = state.llama_state
        here = codes_fingerprint(demo_gguf, "pq4", order)
        assert saved.count(here) == 1
        state.llama_state = saved.replace(here, codes_fingerprint(demo_gguf, "pq4", order - 1))
        with pytest.raises(NativeError, match="state"):
            llm.load_state(state)
        state.llama_state = saved
        llm.load_state(state)


def test_bytes_of_the_tail_are_counted(demo_gguf: Path) -> None:
    from million_gguf import container

    shape = container.model_shape(demo_gguf)
    row = sum(n * (dk + dv) * 2 for n, dk, dv in zip(shape.n_head_kv, shape.D_k, shape.D_v, strict=True))
    with closing(llama(demo_gguf, "pq4", kv_tail=128, n_batch=64)) as llm:
        assert llm.kv_tail == 128
        assert llm.kv_tail_bytes == (128 + 64) * row
    with closing(llama(demo_gguf, "pq4", kv_tail=0)) as llm:
        assert (llm.kv_tail, llm.kv_tail_bytes) == (0, 0)
    with closing(llama(demo_gguf, "f16", kv_tail=128)) as llm:
        assert (llm.kv_tail, llm.kv_tail_bytes) == (0, 0)


@pytest.mark.parametrize("bad", [-1, 1.5, "128", (1 << 20) + 1])
def test_bad_sizes_are_refused(demo_gguf: Path, bad: Any) -> None:
    with pytest.raises(InputError, match="kv_tail"):
        llama(demo_gguf, "pq4", kv_tail=bad)


def test_the_environment_sets_the_default(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from million_gguf.errors import NativeError

    monkeypatch.setenv("MILLION_KV_TAIL", "32")
    with closing(llama(demo_gguf, "pq4")) as llm:
        assert llm.kv_tail == 32
    monkeypatch.setenv("MILLION_KV_TAIL", "many")
    with pytest.raises(NativeError, match="MILLION_KV_TAIL"):
        llama(demo_gguf, "pq4")
