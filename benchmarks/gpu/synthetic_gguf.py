#!/usr/bin/env python3
"""Makes a GGUF of a real model's geometry with random Q4_0 weights and codebooks inside: for measuring speed, not text.

    python benchmarks/gpu/synthetic_gguf.py --geometry llama-2-7b -o /tmp/7b.gguf

Speed depends on shapes and types only, so no checkpoint has to be fetched. Weights are scaled so that activations, keys
and values have the size they have in a trained model. Codebooks are of trained shape: a transform per head, and
centroids that k-means found on normally distributed points. Every layer shares one codebook in content, not in
memory: the cache reads as many different bytes as with a real one. Needs numpy, gguf and million_gguf (the source tree's
will do), 4 GB of disk, and under a minute.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from million_gguf import container
from million_gguf.pq_ref import Codebook
from million_gguf.spec import PQ_TYPES, PQSpec

_Q4_0_ELEMS = 32
_Q4_0_BLOCK = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
_Q4_0_STD = 4.18  # of q - 8 with q uniform in 0..15, but 8 for 0
_POOL_BLOCKS = 1 << 22  # 75 MB of random blocks, which all tensors are cut from
_CHUNK_BLOCKS = 1 << 20


@dataclass(frozen=True)
class Geometry:
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    D: int
    n_ff: int
    n_vocab: int
    rope_freq_base: float
    gain: float = 1.0  # of the weights of Q, K and the attention's output: with 1 logits hardly depend on attention


GEOMETRIES = {
    "llama-2-7b": Geometry(32, 4096, 32, 32, 128, 11008, 32000, 10000.0),
    "llama-3.1-8b": Geometry(32, 4096, 32, 8, 128, 14336, 128256, 500000.0),
    # its cache and codebooks with hardly any weights: for measuring what codebooks add to loading
    "llama-3.1-8b-cache": Geometry(32, 256, 32, 8, 128, 256, 512, 500000.0),
    "tiny": Geometry(2, 256, 8, 2, 64, 512, 512, 10000.0),  # for testing this program
    # attention that tells positions, and logits that tell attention: for testing a backend with it
    "peaky": Geometry(4, 256, 8, 2, 128, 256, 512, 10000.0, gain=3.0),
}


def tensors(g: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, rows first, in the order of the file. Two dimensions: Q4_0; one: f32."""
    kv = g.n_head_kv * g.D
    yield "token_embd.weight", (g.n_vocab, g.n_embd)
    yield "output_norm.weight", (g.n_embd,)
    yield "output.weight", (g.n_vocab, g.n_embd)
    for i in range(g.n_layer):
        for name, shape in (
            ("attn_norm", (g.n_embd,)),
            ("attn_q", (g.n_head * g.D, g.n_embd)),
            ("attn_k", (kv, g.n_embd)),
            ("attn_v", (kv, g.n_embd)),
            ("attn_output", (g.n_embd, g.n_head * g.D)),
            ("ffn_norm", (g.n_embd,)),
            ("ffn_gate", (g.n_ff, g.n_embd)),
            ("ffn_up", (g.n_ff, g.n_embd)),
            ("ffn_down", (g.n_embd, g.n_ff)),
        ):
            yield f"blk.{i}.{name}.weight", shape


def q4_0_chunks(
    pool: npt.NDArray[Any], shape: tuple[int, ...], std: float, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.uint8]]:
    """The blocks of a tensor, as bytes, whose weights have standard deviation ``std``."""
    left = shape[0] * shape[1] // _Q4_0_ELEMS
    while left > 0:
        n = min(left, _CHUNK_BLOCKS)
        at = int(rng.integers(0, len(pool) - n + 1))
        blocks = pool[at : at + n].copy()
        blocks["d"] = std / _Q4_0_STD
        yield blocks.view(np.uint8)
        left -= n


def normal_centroids(dims: int, ksub: int, rng: np.random.Generator) -> npt.NDArray[np.float16]:
    """Centroids f16 ``[ksub, dims]`` of normally distributed points, by a few rounds of Lloyd's algorithm."""
    points = rng.standard_normal((16384, dims), np.float32)
    centroids = points[:ksub].copy()
    for _ in range(8):
        d2 = (centroids**2).sum(1) - 2 * points @ centroids.T
        nearest = d2.argmin(1)
        counts = np.bincount(nearest, minlength=ksub)
        for e in range(dims):
            sums = np.bincount(nearest, weights=points[:, e], minlength=ksub)
            centroids[:, e] = np.where(counts > 0, sums / np.maximum(counts, 1), centroids[:, e])
    return centroids.astype(np.float16)


def make_codebook(spec: PQSpec, g: Geometry, side: str, rng: np.random.Generator) -> Codebook:
    """One codebook: rotations for transforms, and the same centroids, turned by signs, for every code of as many elements."""
    by_element = np.empty((g.n_head_kv, g.D, spec.ksub), np.float16)
    for elements in spec.elements_of_codes(g.D):
        by_element[:, elements] = normal_centroids(elements.shape[1], spec.ksub, rng).T
    by_element *= rng.choice(np.array([-1, 1], np.float16), (g.n_head_kv, g.D, 1))
    centroids = by_element.reshape(g.n_head_kv, spec.n_subspaces(g.D), spec.dsub, spec.ksub).swapaxes(2, 3)
    T = np.linalg.qr(rng.standard_normal((g.n_head_kv, g.D, g.D)))[0]
    mu = rng.normal(0, 0.1, (g.n_head_kv, g.D))
    aniso = rng.uniform(0.0, 1.0, mu.shape).astype(np.float32) if side == "k" else None
    return Codebook(spec, mu.astype(np.float32), T.astype(np.float16), np.ascontiguousarray(centroids), aniso)


def add_shape(w: GGUFWriter, g: Geometry) -> None:
    w.add_embedding_length(g.n_embd)
    w.add_block_count(g.n_layer)
    w.add_feed_forward_length(g.n_ff)
    w.add_head_count(g.n_head)
    w.add_head_count_kv(g.n_head_kv)
    w.add_key_length(g.D)
    w.add_value_length(g.D)
    w.add_rope_dimension_count(g.D)
    w.add_rope_freq_base(g.rope_freq_base)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(g.n_vocab)


def add_tokenizer(w: GGUFWriter, g: Geometry) -> None:
    # a vocabulary that loads: three control tokens, the 256 bytes, and numbered words
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    words = [f"\u2581w{i}" for i in range(g.n_vocab - len(special))]
    w.add_tokenizer_model("llama")
    w.add_token_list(special + words)
    w.add_token_scores([0.0] * len(special) + [-float(i) for i in range(len(words))])
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)


def add_codebooks(w: GGUFWriter, g: Geometry, types: list[str], digest: str, rng: np.random.Generator) -> None:
    """The ``million.*`` keys of docs/format.md."""
    w.add_uint32("million.version", container.FORMAT_VERSION)
    w.add_array("million.types", types)
    w.add_uint32("million.block_count", g.n_layer)
    w.add_string("million.model_digest", digest)
    w.add_float32("million.rope_freq_base", g.rope_freq_base)
    w.add_uint64("million.calibration.tokens", 0)
    w.add_string("million.calibration.text_digest", "0" * 64)
    w.add_uint64("million.calibration.seed", 0)
    w.add_string("million.calibration.tool", "synthetic_gguf.py")
    for name in types:
        for side in "kv":
            blob = container.codebook_to_blob(make_codebook(PQ_TYPES[name], g, side, rng))
            w.add_array(f"million.{name}.{side}", [base64.b64encode(blob).decode()] * g.n_layer)
            w.add_array(f"million.{name}.{side}.error", [0.01] * g.n_layer)


def norms_digest(norms: dict[str, npt.NDArray[np.float32]], g: Geometry) -> str:
    """``million.model_digest`` of a model with these norms."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "norms.gguf")
        w = GGUFWriter(path, "llama")
        add_shape(w, g)
        for name, values in norms.items():
            w.add_tensor(name, values)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        return container.model_digest(path)


def make(path: Path, g: Geometry, types: list[str], n_ctx: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    norms = {
        name: rng.uniform(0.9, 1.1, shape).astype(np.float32)
        for name, shape in tensors(g)
        if len(shape) == 1
    }  # fmt: skip
    w = GGUFWriter(path, "llama")
    w.add_file_type(2)  # mostly Q4_0
    w.add_context_length(n_ctx)
    add_shape(w, g)
    add_tokenizer(w, g)
    if types:
        add_codebooks(w, g, types, norms_digest(norms, g), rng)
    for name, shape in tensors(g):
        if len(shape) == 1:
            w.add_tensor_info(name, shape, np.dtype(np.float32), norms[name].nbytes)
        else:
            row_bytes = shape[1] // _Q4_0_ELEMS * _Q4_0_BLOCK.itemsize
            w.add_tensor_info(
                name, (shape[0], row_bytes), np.dtype(np.uint8), shape[0] * row_bytes, GGMLQuantizationType.Q4_0
            )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    assert w.fout is not None
    out = w.fout[0]

    def pad() -> None:
        out.write(bytes(-out.tell() % w.data_alignment))

    pool = np.frombuffer(rng.bytes(_POOL_BLOCKS * _Q4_0_BLOCK.itemsize), _Q4_0_BLOCK).copy()
    # No weight of -8, so that their mean is 0. Otherwise activations get a mean that grows from layer to layer, and keys lie far outside of the codebook.
    pool["qs"] |= (pool["qs"] & 0x0F == 0) * np.uint8(0x08)
    pool["qs"] |= (pool["qs"] & 0xF0 == 0) * np.uint8(0x80)
    pad()
    for name, shape in tensors(g):
        if len(shape) == 1:
            out.write(norms[name].tobytes())
        else:
            std = 1.0 if name == "token_embd.weight" else shape[1] ** -0.5
            if name.endswith(("attn_q.weight", "attn_k.weight", "attn_output.weight")):
                std *= g.gain
            for chunk in q4_0_chunks(pool, shape, std, rng):
                chunk.tofile(out)
        pad()
    w.close()


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--geometry", choices=GEOMETRIES, required=True)
    p.add_argument("--types", default="pq4,pq3,pq2", help="cache types to make codebooks for (default: %(default)s)")
    p.add_argument("--ctx", type=int, default=1 << 20, help="context length in the metadata (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("-o", "--output", type=Path, required=True)
    a = p.parse_args()
    types = [t for t in a.types.split(",") if t]
    if unknown := [t for t in types if t not in PQ_TYPES]:
        p.error(f"--types has {', '.join(unknown)}, need some of {', '.join(PQ_TYPES)}")
    start = time.monotonic()
    make(a.output, GEOMETRIES[a.geometry], types, a.ctx, a.seed)
    print(f"{a.output}: {a.output.stat().st_size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
