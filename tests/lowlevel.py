"""A context with several sequences, and comparisons of its logits, for tests."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
from million_gguf.bindings import cache_types


class LowLevel:
    """A context with several sequences, through llama_cpp's low-level functions."""

    def __init__(self, path: Path, name: str, n_ctx: int, n_seq: int, unified: bool, kv_tail: int | None = None) -> None:
        from million_gguf.bindings import native

        self.low = low = native.llama_cpp()
        type_k, type_v = cache_types.parse(name)
        self.model = low.llama_model_load_from_file(str(path).encode(), low.llama_model_default_params())
        params = low.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_ctx, n_ctx, n_seq
        params.kv_unified = unified
        params.type_k, params.type_v = type_k.ggml_type, type_v.ggml_type
        params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.n_threads = params.n_threads_batch = 2
        with native.kv_tail(kv_tail):
            self.ctx = low.llama_init_from_model(self.model, params)
        assert self.ctx
        self.memory = low.llama_get_memory(self.ctx)
        self.n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(self.model))

    def decode(self, entries: list[tuple[int, int, int]]) -> npt.NDArray[np.float32]:
        """Decode (token, position, sequence) triples in one batch; logits of all of them, f32 ``[n, n_vocab]``."""
        batch = self.low.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, True
            batch.seq_id[i][0] = sequence
        status = self.low.llama_decode(self.ctx, batch)
        self.low.llama_batch_free(batch)
        assert status == 0
        rows = [self.low.llama_get_logits_ith(self.ctx, i) for i in range(len(entries))]
        return np.stack([np.ctypeslib.as_array(r, shape=(self.n_vocab,)).copy() for r in rows])

    def close(self) -> None:
        self.low.llama_free(self.ctx)
        self.low.llama_model_free(self.model)


def tokens_of(path: Path, text: str) -> list[int]:
    """The tokens of a text, in the vocabulary of a model."""
    from million_gguf import Llama

    with closing(Llama(path, n_ctx=32, vocab_only=True, verbose=False)) as llm:
        tokens: list[int] = llm.tokenize(text.encode())
    return tokens


def close_to(found: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> None:
    """Equal up to the order of summation, which the shape of a batch may change: at times that moves a value over the
    border between two codes. The largest error seen was 1.3e-5, with pq2 and with q4_0; another sequence's cache gives 1.
    """
    error = float(((found - want) ** 2).sum() / (want**2).sum())
    assert error < 2e-4, error
    assert (found.argmax(-1) == want.argmax(-1)).mean() > 0.9
