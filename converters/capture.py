"""Runs a model over calibration text in our own runtime and keeps a sample of the rows that its KV cache would store.

The native side watches the graph: the source of every cache write gives K (after rope) and V, the input of every
attention gives Q. So the rows are right for every architecture that llama.cpp runs, with no convention of ours to drift.
Memory is bounded by reservoir sampling (Vitter's algorithm R) per layer and kind.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bindings import native, native_log
from ..bindings.interrupt import Interrupt
from ..container import ModelShape
from ..errors import InputError, MismatchError, NativeError
from ..progress import stage

K, V, Q = native.CAPTURE_K, native.CAPTURE_V, native.CAPTURE_Q

_QUERY_SHARE = 4  # a query for so many rows: they only count in second moments
_MAX_QUERIES = 8192  # however many rows: each is weighed, which repeats its attention
MIN_TOKENS = 1024  # four rows for each of 256 centroids; with fewer, centroids only memorize their rows
_BATCH = 512  # tokens per decode: llama.cpp's default, and short enough for progress to move
_DEFAULT_MEMORY_SHARE = 0.4  # of the memory that is free beside the model: training needs copies of its own
_FALLBACK_MEMORY_BYTES = 2 << 30  # where the system does not tell


class Capture:
    """Rows kept per layer and kind (K, V or Q). Owned by ``capture``, and gone when its block ends."""

    def __init__(self, n_rows_max: int, query_step: int, seed: int, n_threads: int) -> None:
        self._lib = native.lib()
        self._handle = self._lib.million_capture_init(n_rows_max, query_step, seed & 0xFFFF_FFFF_FFFF_FFFF, n_threads)
        if not self._handle:
            raise NativeError(f"not enough memory to keep {n_rows_max} rows per layer: lower the memory budget")

    def attach(self, context_params: Any) -> None:
        """Make a context of these params report to this capture. The callback is native: no Python runs per node."""
        callback_type = type(context_params.cb_eval)
        context_params.cb_eval = ctypes.cast(self._lib.million_capture_eval, callback_type)
        context_params.cb_eval_user_data = self._handle

    @property
    def n_layer(self) -> int:
        """Highest layer seen, plus 1."""
        return int(self._lib.million_capture_n_layer(self._handle))

    def shape(self, layer: int, kind: int) -> tuple[int, int] | None:
        """(heads, head size) of the rows of one layer; None when the layer writes none."""
        n_head = int(self._lib.million_capture_n_head(self._handle, layer, kind))
        return (n_head, int(self._lib.million_capture_head_dim(self._handle, layer, kind))) if n_head else None

    def n_seen(self, layer: int, kind: int) -> int:
        """Rows that went by, of which ``rows`` returns a uniform sample."""
        return int(self._lib.million_capture_n_seen(self._handle, layer, kind))

    def rows(self, layer: int, kind: int) -> npt.NDArray[np.float32]:
        """The rows kept: f32 ``[n, n_head, D]``, a copy. Raises NativeError when the layer has none."""
        shape = self.shape(layer, kind)
        if shape is None:
            raise NativeError(f"blk.{layer}: no rows were captured")
        n = int(self._lib.million_capture_n_rows(self._handle, layer, kind))
        out = np.empty((n, *shape), dtype=np.float32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        written = int(self._lib.million_capture_rows(self._handle, layer, kind, pointer, n))
        if written != n:
            raise NativeError(f"blk.{layer}: {written} of {n} captured rows could be read")
        return out

    def weights(self, layer: int) -> npt.NDArray[np.float32]:
        """Weights of the queries that ``rows`` returns: f32 ``[n, n_head, 2]``, what errors of their scores do to their outputs.

        Of keys that an exact tail of 128 does not hold, and of all keys (million_capture_weights has the formula).
        Raises NativeError when the layer has no queries.
        """
        shape = self.shape(layer, Q)
        if shape is None:
            raise NativeError(f"blk.{layer}: no queries were captured")
        n = int(self._lib.million_capture_n_rows(self._handle, layer, Q))
        out = np.empty((n, shape[0], 2), dtype=np.float32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        written = int(self._lib.million_capture_weights(self._handle, layer, pointer, n))
        if written != n:
            raise NativeError(f"blk.{layer}: {written} of {n} weights of queries could be read")
        return out

    def matches(self, layer: int) -> npt.NDArray[np.float32] | None:
        """Which queries look for which keys: f32 ``[n_head_kv, D + 1, 2 D + 1]``; None when the layer's queries have no weights.

        By head the sum of ``w [k; 1] [q; k; 1]^T`` over the queries that were weighed and the keys that an exact tail does not hold,
        with ``w = p^2 |v - o|^2`` as in ``weights``. Raises NativeError when the layer has no K rows.
        """
        shape = self.shape(layer, K)
        if shape is None:
            raise NativeError(f"blk.{layer}: no rows were captured")
        n_head_kv, D = shape
        out = np.empty((n_head_kv, D + 1, 2 * D + 1), dtype=np.float32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        written = int(self._lib.million_capture_matches(self._handle, layer, pointer, out.size))
        if written not in (0, out.size):
            raise NativeError(f"blk.{layer}: {written} of {out.size} sums of keys and queries could be read")
        return out if written else None

    def close(self) -> None:
        """Free the rows. A second call does nothing."""
        if self._handle:
            self._lib.million_capture_free(self._handle)
            self._handle = None


@dataclass(frozen=True)
class Captured:
    """Result of ``capture``: the rows, and how many tokens they came from."""

    rows: Capture
    n_tokens: int


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def default_threads() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def default_memory_bytes(model_bytes: int) -> int:
    """Budget for captured rows, when the user gives none."""
    available = available_memory_bytes()
    if available is None:
        return _FALLBACK_MEMORY_BYTES
    return max(_FALLBACK_MEMORY_BYTES // 4, int((available - model_bytes) * _DEFAULT_MEMORY_SHARE))


def rows_within(memory_bytes: int, shape: ModelShape, n_tokens: int) -> int:
    """Rows to keep per layer and kind so that all layers together stay within ``memory_bytes``.

    Never fewer than MIN_TOKENS, which training needs whatever the budget.
    """
    elements = sum(
        n_kv * (d_k + d_v) + n_q * d_k // _QUERY_SHARE
        for n_q, n_kv, d_k, d_v in zip(shape.n_head, shape.n_head_kv, shape.D_k, shape.D_v, strict=True)
        if n_kv
    )
    row_bytes = max(1, 2 * elements)  # rows are kept in f16, as the cache would keep them
    return int(min(n_tokens, max(MIN_TOKENS, memory_bytes // row_bytes)))


def query_step(n_rows: int, n_tokens: int) -> int:
    """The query of one token in so many is kept, where ``n_rows`` rows of ``n_tokens`` are."""
    return max(-(-_QUERY_SHARE * n_tokens // n_rows), -(-n_tokens // _MAX_QUERIES))


def chunks(tokens: Sequence[int], n_tokens: int, n_ctx: int, bos: int | None) -> list[list[int]]:
    """Cut ``tokens`` into contexts of at most ``n_ctx``, at most ``n_tokens`` in all, each opened by ``bos`` if it is given.

    When there is more text than is wanted, the contexts are spread evenly over it, so that a text whose parts differ
    (prose, then code, then chat) is sampled from all of them.
    """
    opener = [] if bos is None else [bos]
    sizes: list[int] = []
    unused = len(tokens)
    while unused > 0 and n_tokens > len(opener):
        sizes.append(min(n_ctx - len(opener), n_tokens - len(opener), unused))
        unused -= sizes[-1]
        n_tokens -= sizes[-1] + len(opener)
    result, start = [], 0
    for i, size in enumerate(sizes):
        skipped = unused * i // max(1, len(sizes) - 1)
        result.append([*opener, *tokens[start + skipped : start + skipped + size]])
        start += size
    return result


@contextmanager
def capture(
    model_path: str | os.PathLike[str],
    text: str,
    shape: ModelShape,
    *,
    n_tokens: int,
    n_ctx: int = 2048,
    seed: int = 0,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    memory_bytes: int | None = None,
    progress: bool = True,
) -> Iterator[Captured]:
    """Run the model over at most ``n_tokens`` tokens of ``text`` and yield the rows that were kept.

    Args:
        shape: the model's geometry, by which the reservoir is sized.
        n_ctx: tokens per context, clipped to what the model was trained on.
        memory_bytes: for all rows together; the default is a share of the memory that is free.
        n_gpu_layers: as llama.cpp's -ngl; -1 for all.

    Raises:
        InputError: the text has fewer than MIN_TOKENS tokens.
        MismatchError: the model keeps no KV rows.
        NativeError: llama.cpp could not load or run the model.
    """
    low = native.llama_cpp()
    path = os.fspath(model_path)
    with ExitStack() as stack:
        low.llama_backend_init()
        model_params = low.llama_model_default_params()
        model_params.n_gpu_layers = 0x7FFFFFFF if n_gpu_layers < 0 else n_gpu_layers
        with native_log.collect(echo=False) as log:
            model = low.llama_model_load_from_file(path.encode("utf-8"), model_params)
        if not model:
            raise NativeError(f"cannot load {path}: {log.reason('llama.cpp gave no reason')}")
        stack.callback(_quietly, low.llama_model_free, model)
        if low.llama_model_is_recurrent(model) or low.llama_model_has_encoder(model):
            raise MismatchError(f"{path}: {_layer_kind(low, model)}, so there is nothing to calibrate: run it as it is")

        n_ctx = min(n_ctx, low.llama_model_n_ctx_train(model) or n_ctx)
        tokens, bos = _tokenize(low, model, text)
        if len(tokens) < MIN_TOKENS:
            raise InputError(f"the calibration text has {len(tokens)} tokens, need {MIN_TOKENS}: give a longer text")
        contexts = chunks(tokens, n_tokens, n_ctx, bos)
        n_run = sum(map(len, contexts))

        if memory_bytes is None:
            memory_bytes = default_memory_bytes(os.path.getsize(path))
        n_threads = n_threads or default_threads()
        n_rows = rows_within(memory_bytes, shape, n_run)
        kept = Capture(n_rows, query_step(n_rows, n_run), seed, n_threads)
        stack.callback(kept.close)

        interrupt = Interrupt()
        context_params = low.llama_context_default_params()
        context_params.n_ctx = n_ctx
        context_params.n_batch = context_params.n_ubatch = min(_BATCH, n_ctx)
        context_params.type_k = context_params.type_v = low.GGML_TYPE_F16
        context_params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context_params.no_perf = True
        context_params.n_threads = context_params.n_threads_batch = n_threads
        context_params.abort_callback = interrupt.callback
        kept.attach(context_params)
        with native_log.collect(echo=False) as log:
            ctx = low.llama_init_from_model(model, context_params)
        if not ctx:
            raise NativeError(f"cannot run {path}: {log.reason('llama.cpp gave no reason')}")
        stack.callback(_quietly, low.llama_free, ctx)

        with stage("capture", n_run, enabled=progress) as bar, interrupt:
            for context in contexts:
                _run(low, ctx, context, interrupt, bar.advance)
        if kept.n_layer == 0:
            raise MismatchError(
                f"{path}: the model wrote no KV rows, so there is nothing to calibrate: run it as it is"
            )
        yield Captured(kept, n_run)


def _run(low: Any, ctx: Any, context: list[int], interrupt: Interrupt, advance: Any) -> None:
    """Decode one context from an empty cache. Only the last token of a batch asks for logits."""
    low.llama_memory_clear(low.llama_get_memory(ctx), False)
    for start in range(0, len(context), _BATCH):
        part = context[start : start + _BATCH]
        tokens = (low.llama_token * len(part))(*part)  # the batch only points to it
        batch = low.llama_batch_get_one(tokens, len(part))
        with native_log.collect(echo=False) as log:
            status = low.llama_decode(ctx, batch)
        interrupt.check()
        if status != 0:
            raise NativeError(f"llama.cpp could not run the model: {log.reason(f'llama_decode returned {status}')}")
        advance(len(part))


def _quietly(function: Any, *args: Any) -> None:
    """Call a native function that logs what nobody asked for."""
    with native_log.collect(echo=False):
        function(*args)


def _tokenize(low: Any, model: Any, text: str) -> tuple[list[int], int | None]:
    """Tokens of ``text`` without special ones, and the token that opens a context, if the model wants one."""
    vocab = low.llama_model_get_vocab(model)
    raw = text.encode("utf-8")
    size = len(raw) + 16  # no tokenizer makes more tokens than bytes, but for a prefix space or two
    buffer = (low.llama_token * size)()
    n = low.llama_tokenize(vocab, raw, len(raw), buffer, size, False, False)
    if n < 0:
        raise NativeError(f"the model's tokenizer failed on the calibration text ({n})")
    bos = low.llama_vocab_bos(vocab) if low.llama_vocab_get_add_bos(vocab) else -1
    return buffer[:n], None if bos < 0 else bos


def _layer_kind(low: Any, model: Any) -> str:
    if low.llama_model_is_recurrent(model):
        return "its layers are recurrent and keep a state of fixed size instead of KV rows"
    return "it is an encoder-decoder model, whose cross attention the PQ cache does not serve"
