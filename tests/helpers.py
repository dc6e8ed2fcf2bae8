"""Builders that the tests share: random codebooks, small GGUF models, error measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from million_gguf import container
from million_gguf.pq_ref import Codebook
from million_gguf.spec import PQ_TYPES

try:
    # The matrices here are small: a BLAS that spreads them over busy cores takes twenty times as long.
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, "blas")
except ImportError:
    pass  # it comes with scikit-learn; without it the tests are only slower

HEAD_SIZES = (64, 80, 96, 128, 192, 256)


def make_codebook(
    name: str, D: int, n_head_kv: int, seed: int = 0, with_transform: bool = False, with_aniso: bool = False
) -> Codebook:
    """Random codebook whose centroids cover standard normal rows; the transform is a rotation with uneven scales.

    Its anisotropy has both signs, and zeros. Without it the rest is the same.
    """
    rng = np.random.default_rng(seed)
    spec = PQ_TYPES[name]
    T = None
    if with_transform:
        rotation = np.linalg.qr(rng.standard_normal((n_head_kv, D, D)))[0]
        T = (rotation * rng.uniform(0.5, 2.0, (n_head_kv, 1, D))).astype(np.float16)
    shape = (n_head_kv, spec.n_subspaces(D), spec.ksub, spec.dsub)
    return Codebook(
        spec,
        mu=rng.standard_normal((n_head_kv, D)).astype(np.float32),
        T=T,
        centroids=rng.standard_normal(shape).astype(np.float16),
        aniso=_aniso(rng, (n_head_kv, D)) if with_aniso else None,
    )


def _aniso(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    aniso = rng.standard_normal(shape) * (rng.random(shape) < 0.8)
    return (aniso / np.abs(aniso).max(axis=1, keepdims=True)).astype(np.float32)


def worked_by_hand() -> list[tuple[Codebook, list[int]]]:
    """Codebooks of one head of 8, and the codes of a row of ones. ``aniso`` is 1, so d = y, and |d|^2 = 8.

    Centroid 0 is 0.75 in every element: each has an error of 0.25, the cost is 8/16 + 3 (8/4)^2 / 8 = 2, and y moves to
    1 + 0.75 (8/4) / 8 = 1.1875. Other centroids are far off, but for number 1 of some subspaces.
    """
    s = PQ_TYPES["pq4"]
    cases = []
    for subspaces, value, codes in (
        # 1.5 is nearer to 1.1875 than 0.75 is. Cost: 2/4 + 6/16 + 3 (6/4 - 2/2)^2 / 8 = 0.96875
        ([0], 1.5, [1, 0, 0, 0]),
        # the same in all subspaces. Cost: 8/4 + 3 (8/2)^2 / 8 = 8, and 0 stays
        ([0, 1, 2, 3], 1.5, [0, 0, 0, 0]),
        # an error of -0.25 instead of 0.25 everywhere costs the same, and 0 stays
        ([0, 1, 2, 3], 1.25, [0, 0, 0, 0]),
        ([1, 3], 1.25, [0, 1, 0, 1]),
    ):
        centroids = np.full((1, 4, s.ksub, 2), 9.0, dtype=np.float16)
        centroids[:, :, 0] = 0.75
        centroids[:, subspaces, 1] = value
        cases.append((Codebook(s, np.zeros((1, 8), np.float32), None, centroids, np.ones((1, 8), np.float32)), codes))
    return cases


def rows_for(cb: Codebook, n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Rows f32 ``[n, n_head_kv, D]`` around the codebook's mean."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, cb.n_head_kv, cb.D)) + cb.mu).astype(np.float32)


def nmse(found: npt.ArrayLike, want: npt.ArrayLike) -> float:
    """Sum of squared differences over sum of squares of ``want``, ggml's measure; 0 when both are all zero."""
    a, b = np.asarray(found, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    error, power = float(((a - b) ** 2).sum()), float((b**2).sum())
    return error if power == 0.0 else error / power


def write_model(
    path: Path,
    *,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int | Sequence[int] = 2,
    D: int = 8,
    rope_freq_base: float | None = 10000.0,
    seed: int = 0,
    alignment: int = 32,
    extra: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file with the metadata and norms of a small llama, and a few quantized tensors; no real model."""
    rng = np.random.default_rng(seed)
    w = GGUFWriter(path, "llama")
    if alignment != 32:
        w.add_custom_alignment(alignment)
    w.add_block_count(n_layer)
    w.add_embedding_length(n_head * D)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head_kv)  # type: ignore[arg-type]
    if rope_freq_base is not None:
        w.add_rope_freq_base(rope_freq_base)
    w.add_token_list(["<s>", "a", "é", ""])
    w.add_token_scores([0.0, 1.0, 2.0, 3.0])
    for key, value in (extra or {}).items():
        w.add_key_value(key, *value)
    w.add_tensor("token_embd.weight", rng.standard_normal((5, n_head * D)).astype(np.float16))
    for i in range(n_layer):
        w.add_tensor(f"blk.{i}.attn_norm.weight", rng.standard_normal(n_head * D).astype(np.float32))
        raw = rng.integers(0, 256, (3, 34), dtype=np.uint8)
        w.add_tensor(f"blk.{i}.attn_q.weight", raw, raw_dtype=GGMLQuantizationType.Q8_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def make_set(
    model: Path,
    names: Sequence[str] = ("pq4", "pq3", "pq2"),
    seed: int = 0,
    with_transform: bool = False,
    with_aniso: bool = False,
) -> container.CodebookSet:
    """Random codebooks that fit ``model``, those of K with an anisotropy if wanted; None for its layers without KV heads."""
    shape = container.model_shape(model)

    def side(name: str, D: Sequence[int], salt: int) -> list[Codebook | None]:
        return [
            make_codebook(name, D[i], n, seed + 2 * i + salt, with_transform, with_aniso and salt == 0) if n else None
            for i, n in enumerate(shape.n_head_kv)
        ]

    types = {}
    for name in names:
        errors = [0.25 if n else 0.0 for n in shape.n_head_kv]
        types[name] = container.TypeCodebooks(side(name, shape.D_k, 0), side(name, shape.D_v, 1), errors, list(errors))
    return container.CodebookSet(
        block_count=shape.block_count,
        model_digest=container.model_digest(model),
        rope_freq_base=shape.rope_freq_base,
        calibration=container.Calibration(tokens=4096, text_digest="ab" * 32, seed=7, tool="million-gguf test"),
        types=types,
    )
