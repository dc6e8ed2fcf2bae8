"""Load a model with a PQ cache, stream an answer, and see what the cache takes.

    python examples/python_api.py model.gguf "Why is the sky blue?"

The model needs codebooks ('million calibrate' adds them); without, the cache is f16.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from million_gguf import Llama


def answer(llm: Llama, question: str) -> Iterator[str]:
    """Pieces of the answer as they come; a base model (without chat template) continues the text."""
    if "tokenizer.chat_template" in llm.metadata:
        for chunk in llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=256, stream=True):
            yield chunk["choices"][0]["delta"].get("content") or ""
    else:
        for chunk in llm.create_completion(question, max_tokens=64, stream=True):
            yield chunk["choices"][0]["text"]


def main(path: str, question: str) -> None:
    # "auto" is pq4 when the file has codebooks; ("pq4", "pq2") would choose K and V apart
    llm = Llama(path, n_ctx=2048, kv_cache="auto", verbose=False)

    started, n_pieces = time.perf_counter(), 0
    for piece in answer(llm, question):
        print(piece, end="", flush=True)
        n_pieces += bool(piece)
    seconds = time.perf_counter() - started

    k, v = llm.kv_cache_types
    print(f"\n\n{n_pieces} pieces in {seconds:.1f} s")
    print(f"KV cache, K {k} and V {v}: {llm.kv_cache_bytes / 1024:.0f} KiB for {llm.n_ctx()} tokens")
    print(f"in f16: {llm.kv_cache_bytes_f16 / 1024:.0f} KiB")
    llm.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python_api.py MODEL.gguf QUESTION")
    main(*sys.argv[1:])
