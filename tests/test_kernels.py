"""The C++ kernels against the definition in ``pq_ref`` (float64), on every instruction set that the processor has.

Codes are equal except where two centroids are equally near within f32 rounding; attention and decode stay within an
NMSE of 1e-6 against float64 with the same f16 centroids.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from helpers import HEAD_SIZES, make_codebook, nmse, rows_for, worked_by_hand

from million_gguf import container, native, pq_ref
from million_gguf.errors import MismatchError, NativeError
from million_gguf.pq_ref import Coded, Tail
from million_gguf.spec import PQ_TYPES

if (why := native.unavailable()) is not None:
    if os.environ.get("MILLION_REQUIRE_NATIVE") == "1":
        raise NativeError(f"MILLION_REQUIRE_NATIVE is set: {why}")
    pytest.skip(why, allow_module_level=True)

TYPES = list(PQ_TYPES)
NMSE_LIMIT = 1e-6


@pytest.fixture(params=native.SIMD_NAMES)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one instruction set for the duration of a test."""
    if not native.simd_set(request.param):
        pytest.skip(f"this processor or build has no {request.param}")
    assert native.simd_name() == request.param
    yield request.param
    native.simd_set("auto")


def test_unknown_simd_is_refused() -> None:
    before = native.simd_name()
    assert not native.simd_set("mmx")
    assert native.simd_name() == before


# ---- encode ----


def check_codes(cb: pq_ref.Codebook, x: np.ndarray, codes: np.ndarray) -> None:
    """Every code names a centroid that is nearest within f32 rounding, and nearly all are those of the definition."""
    x = pq_ref.to_f16(x)
    want = pq_ref.encode(cb, x)
    differ = codes != want
    assert differ.mean() < 1e-3
    y = pq_ref.transform(cb, x)
    d = pq_ref.code_distances(cb, y)
    n, h, c = np.nonzero(differ)
    excess = d[n, h, c, codes[n, h, c]] - d[n, h, c, want[n, h, c]]
    # y itself is a sum of D products in f32: its error grows with the row, not with the distance.
    size = (y**2).sum(-1) + (x.astype(np.float64) ** 2).sum(-1)
    assert (excess <= 1e-5 * size[n, h]).all()


# Squared distances in f32 are off by up to some 1e-7 (of 1 and more); two that differ by less than this are a tie.
TIE = 2e-6


def check_anisotropic_codes(cb: pq_ref.Codebook, x: np.ndarray, codes: np.ndarray) -> None:
    """Strip by strip: nearest codes where the others cost no less, or else the others, where they cost no more.

    A tie in the search of the nearest codes leads to other codes after it. So strips in which the reference has one are left out.
    """
    y = pq_ref.transform(cb, pq_ref.to_f16(x))
    first = pq_ref.nearest(cb, y)
    moved = pq_ref.moved(cb, y, first)
    second = pq_ref.nearest(cb, moved)

    def within_strips(ok: np.ndarray) -> np.ndarray:
        """Whether all codes of a strip are: ``[n, n_head_kv, head_bytes]`` -> ``[n, n_head_kv, n_strips]``."""
        out = np.ones((*ok.shape[:2], -(-cb.D // pq_ref.ANISO_STRIP)), dtype=bool)
        np.logical_and.at(out, (..., pq_ref.strip_of_code(cb)), ok)
        return out

    def are_nearest(y: np.ndarray) -> np.ndarray:
        d = pq_ref.code_distances(cb, y)
        least, found = d.min(axis=-1), np.take_along_axis(d, codes[..., None].astype(np.intp), axis=-1)[..., 0]
        return within_strips(found - least <= TIE * (1.0 + least))

    def are_clear(y: np.ndarray) -> np.ndarray:
        d = np.partition(pq_ref.code_distances(cb, y), 1, axis=-1)
        return within_strips(d[..., 1] - d[..., 0] > TIE * (1.0 + d[..., 0]))

    cost = {name: pq_ref.strip_costs(cb, y, c) for name, c in (("first", first), ("second", second), ("found", codes))}
    slack = 1e-5 * (1.0 + cost["first"])
    stayed = are_nearest(y) & ((cost["first"] <= cost["second"] + slack) | ~are_clear(moved))
    went = are_nearest(moved) & (cost["found"] <= cost["first"] + slack)
    clear = are_clear(y)
    assert (stayed | went | ~clear).all()
    assert clear.mean() >= 0.99
    assert (codes != pq_ref.encode(cb, x)).mean() < 1e-3


@functools.cache
def encode_case(
    name: str, D: int, with_transform: bool, dtype: str, with_aniso: bool = False
) -> tuple[pq_ref.Codebook, np.ndarray]:
    cb = make_codebook(name, D, 3, seed=D, with_transform=with_transform, with_aniso=with_aniso)
    return cb, rows_for(cb, 37, seed=1).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("with_transform", [False, True])
@pytest.mark.parametrize("D", HEAD_SIZES)
@pytest.mark.parametrize("name", TYPES)
def test_encode(simd: str, name: str, D: int, with_transform: bool, dtype: str) -> None:
    cb, x = encode_case(name, D, with_transform, dtype)
    check_codes(cb, x, native.encode(cb, x))


@pytest.mark.parametrize("with_transform", [False, True])
@pytest.mark.parametrize("D", [8, 24, 80, 128, 256])  # less than a strip, one that is short, many
@pytest.mark.parametrize("name", TYPES)
def test_anisotropic_encode(simd: str, name: str, D: int, with_transform: bool) -> None:
    cb, x = encode_case(name, D, with_transform, "float32", with_aniso=True)
    codes = native.encode(cb, x)
    check_anisotropic_codes(cb, x, codes)
    assert (codes != native.encode(replace(cb, aniso=None), x)).mean() > 0.02
    assert np.array_equal(
        native.encode(replace(cb, aniso=np.zeros_like(cb.aniso)), x), native.encode(replace(cb, aniso=None), x)
    )


@pytest.mark.parametrize("with_transform", [False, True])
@pytest.mark.parametrize("D", [8, 32, 80])
@pytest.mark.parametrize("name", TYPES)
def test_anisotropic_codes_without_rounding(simd: str, name: str, D: int, with_transform: bool) -> None:
    """Values of few bits, of which every sum and square is exact in f32: many ties, and no code may differ.

    y is 1 or -1 everywhere, so that ``|d|^2`` is a power of two. Centroids are on a grid of 1/4, and a subspace has but few, over and
    over.
    """
    rng = np.random.default_rng(D)
    spec = PQ_TYPES[name]
    T = None
    if with_transform:  # y is x in another order, and with other signs
        T = np.stack([np.eye(D)[rng.permutation(D)] * rng.choice([-1, 1], D) for _ in range(2)]).astype(np.float16)
    values = [-1.5, -1.25, -0.75, -0.5, 0.5, 0.75, 1.25, 1.5]
    cb = pq_ref.Codebook(
        spec,
        rng.integers(-4, 5, (2, D)).astype(np.float32) / 2,
        T,
        rng.choice(values, (2, spec.n_subspaces(D), 12, spec.dsub)).astype(np.float16)[
            :, :, rng.integers(0, 12, spec.ksub)
        ],
        (rng.choice([-1.0, 1.0], (2, D)) * [[0.5], [1.0]]).astype(np.float32),
    )
    x = (rng.choice([-1.0, 1.0], (300, 2, D)) + cb.mu).astype(np.float32)
    want = pq_ref.encode(cb, x)
    assert (want != pq_ref.encode(replace(cb, aniso=None), x)).mean() > 0.02
    assert np.array_equal(native.encode(cb, x), want)


@pytest.mark.parametrize("case", range(len(worked_by_hand())))
def test_codes_that_were_worked_by_hand(simd: str, case: int) -> None:
    cb, codes = worked_by_hand()[case]
    assert native.encode(cb, np.ones((3, 1, 8), np.float32)).tolist() == [[codes]] * 3


@pytest.mark.parametrize("with_aniso", [False, True])
@pytest.mark.parametrize("with_transform", [False, True])
@pytest.mark.parametrize("D", [8, 24, 80, 256])
@pytest.mark.parametrize("name", TYPES)
def test_codes_are_the_same_on_every_instruction_set(name: str, D: int, with_transform: bool, with_aniso: bool) -> None:
    cb = make_codebook(name, D, 2, with_transform=with_transform, with_aniso=with_aniso)
    x = rows_for(cb, 101)
    codes = {}
    for simd_name in native.SIMD_NAMES:
        if native.simd_set(simd_name):
            codes[simd_name] = native.encode(cb, x)
    native.simd_set("auto")
    assert "scalar" in codes
    for found in codes.values():
        assert np.array_equal(found, codes["scalar"])
    assert np.array_equal(native.encode(cb, x, n_threads=1), native.encode(cb, x, n_threads=3))


@pytest.mark.parametrize("name", TYPES)
def test_ties_go_to_the_lowest_code(simd: str, name: str) -> None:
    s = PQ_TYPES[name]
    centroids = np.full((1, s.n_subspaces(16), s.ksub, s.dsub), 9.0, dtype=np.float16)
    for low, high in ((5, 40), (0, s.ksub - 1), (15, 16), (7, 8), (30, 31)):
        c = centroids.copy()
        c[:, :, [low, high]] = 1.0
        cb = pq_ref.Codebook(s, np.zeros((1, 16), np.float32), None, c)
        codes = native.encode(cb, np.ones((3, 1, 16), np.float32))
        assert (codes == low).all()


@pytest.mark.parametrize("with_aniso", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_rows_are_rounded_to_f16_before_they_are_coded(simd: str, name: str, with_aniso: bool) -> None:
    """The codes of f32 rows are those of the same rows in f16, also where f16 ends and between its values."""
    cb = make_codebook(name, 64, 2, with_transform=True, with_aniso=with_aniso)
    x = rows_for(cb, 200)
    x[0, 0, :16] = [65504, 65519.99, 65520, -65520, 1e9, -np.inf, np.inf, -0.0, 1e-45, 2**-25, 2**-25 + 2**-40, 3 * 2**-25, 2**-14, 1 + 2**-11, 1 + 3 * 2**-11, 2049]  # fmt: skip
    assert np.array_equal(native.encode(cb, x), native.encode(cb, pq_ref.to_f16(x)))
    s, step = PQ_TYPES[name], 2.0**-10
    centroids = np.full((1, s.n_subspaces(16), s.ksub, s.dsub), 9.0, dtype=np.float16)
    centroids[:, :, 0], centroids[:, :, 1] = 0.0, 1.0
    cb = pq_ref.Codebook(s, np.full((1, 16), 0.5 + 0.25 * step, np.float32), None, centroids)
    found = native.encode(cb, np.full((1, 1, 16), 1 + 0.4 * step, np.float32))  # as in test_pq_ref
    assert (found == 0).all()


@pytest.mark.parametrize("name", TYPES)
def test_where_f16_ends_codes_are_nearest(simd: str, name: str) -> None:
    """An infinity leaves its strip no direction; the other strips keep theirs."""
    cb = make_codebook(name, 80, 2, with_aniso=True)
    assert cb.aniso is not None
    cb = replace(cb, aniso=np.where(cb.aniso == 0.0, np.float32(0.5), cb.aniso))
    x = rows_for(cb, 100)
    x[:, :, 40] = 1e9
    codes, plain = native.encode(cb, x), native.encode(replace(cb, aniso=None), x)
    strip = pq_ref.strip_of_code(cb)
    assert np.array_equal(codes[..., strip == 1], plain[..., strip == 1])
    for i in (0, 2):
        assert (codes[..., strip == i] != plain[..., strip == i]).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", TYPES)
def test_encode_writes_the_tail(simd: str, name: str, dtype: str) -> None:
    """Rows with a slot go there in f16; other slots, and what lies between slots, stay. The codes are the same without a tail."""
    cb = make_codebook(name, 24, 2, with_transform=True)
    x = rows_for(cb, 40).astype(dtype)
    arena = np.full((30, 2 * 24 + 3), 7, np.float16)
    tail = np.lib.stride_tricks.as_strided(arena, (30, 2, 24), (arena.shape[1] * 2, 48, 2))
    tail_idx = np.full(40, -1)
    tail_idx[[3, 4, 39, 0]] = [29, 0, 5, 17]
    tail_idx[7] = -(2**40)
    codes = native.encode(cb, x, tail=tail, tail_idx=tail_idx)
    want = np.full_like(arena, 7)
    want[[29, 0, 5, 17], :48] = pq_ref.to_f16(x[[3, 4, 39, 0]]).reshape(4, 48)
    assert arena.tobytes() == want.tobytes()
    assert np.array_equal(codes, native.encode(cb, x))


@pytest.mark.parametrize("name", TYPES)
def test_encode_writes_its_cells_and_no_other(simd: str, name: str) -> None:
    """Permuted cells, strided rows, and bytes around them that must stay."""
    cb = make_codebook(name, 24, 2, with_transform=True)
    wide = np.zeros((5, 2, 40), np.float32)
    wide[:, :, :24] = rows_for(cb, 5)
    x = wide[:, :, :24]
    arena = np.full((9, 2 * cb.head_bytes + 5), 0xA5, np.uint8)
    cells = np.lib.stride_tricks.as_strided(arena, (9, 2, cb.head_bytes), (arena.shape[1], cb.head_bytes, 1))
    row_idx = np.array([7, 0, 3, 8, 2])
    native.encode(cb, x, row_idx=row_idx, out=cells)
    want = np.full_like(arena, 0xA5)
    want[row_idx, : 2 * cb.head_bytes] = native.encode(cb, np.ascontiguousarray(x)).reshape(5, -1)
    assert np.array_equal(arena, want)
    check_codes(cb, x, cells[row_idx])


# ---- decode ----


@pytest.mark.parametrize("with_transform", [False, True])
@pytest.mark.parametrize("D", HEAD_SIZES)
@pytest.mark.parametrize("name", TYPES)
def test_decode(simd: str, name: str, D: int, with_transform: bool) -> None:
    cb, x = encode_case(name, D, with_transform, "float32")
    codes = pq_ref.encode(cb, x)
    found = native.decode(cb, codes)
    assert nmse(found, pq_ref.decode(cb, codes)) < NMSE_LIMIT
    assert np.array_equal(found, native.decode(cb, codes, n_threads=1))


# ---- attention ----


@dataclass(frozen=True)
class Case:
    """One attention problem; ``k`` and ``v`` are a PQ type, ``float16`` or ``float32``."""

    k: str = "pq4"
    v: str = "pq4"
    D_k: int = 64
    D_v: int = 64
    n_head_kv: int = 2
    gqa: int = 1
    n_q: int = 1
    n_kv: int = 97
    n_stream: int = 1
    transform: bool = False
    mask: str = (
        ""  # "", "causal", "holes", "all" (nothing visible), "some" (some queries see nothing), "heads", "streams"
    )
    sinks: bool = False
    max_bias: float = 0.0
    softcap: float = 0.0
    sharp: bool = False  # scores so far apart that one cell takes all
    n_tail: int = 0
    tail_mask: str = "holes"  # "holes", "all" (nothing visible), "open" (everything visible)


@functools.cache
def build(case: Case) -> tuple[tuple[Any, Any, Any], dict[str, Any], np.ndarray]:
    """(q, k, v), keyword arguments, and the reference."""
    rng = np.random.default_rng(11)
    n_head = case.n_head_kv * case.gqa

    def side(kind: str, D: int, seed: int) -> Any:
        shape = (case.n_stream, case.n_kv, case.n_head_kv)
        if kind not in PQ_TYPES:
            return rng.standard_normal((*shape, D)).astype(kind)
        cb = make_codebook(kind, D, case.n_head_kv, seed, case.transform)
        # Random codes and not encoded rows: every code occurs, and the cells stand in no order.
        return Coded(rng.integers(0, cb.spec.ksub, (*shape, cb.head_bytes), dtype=np.uint8), cb)

    k, v = side(case.k, case.D_k, 1), side(case.v, case.D_v, 2)
    q = rng.standard_normal((case.n_stream, n_head, case.n_q, case.D_k)).astype(np.float32) * (
        20.0 if case.sharp else 1.0
    )
    q = q.astype(np.float32)
    mask = None
    if case.mask:
        shape = (
            case.n_stream if case.mask == "streams" else 1,
            n_head if case.mask == "heads" else 1,
            case.n_q,
            case.n_kv,
        )
        mask = -rng.integers(0, 40, shape).astype(np.float16) / np.float16(4)
        if case.mask == "causal":
            mask[..., np.arange(case.n_kv) > np.arange(case.n_q)[:, None] + case.n_kv - case.n_q] = -np.inf
        elif case.mask == "all":
            mask[:] = -np.inf
        else:
            mask[rng.random(shape) < 0.5] = -np.inf
        if case.mask == "some":
            mask[:, :, ::2] = -np.inf
    kwargs: dict[str, Any] = {
        "scale": float(np.float32(case.D_k**-0.5)),
        "mask": mask,
        "sinks": rng.standard_normal(n_head).astype(np.float32) if case.sinks else None,
        "max_bias": case.max_bias,
        "logit_softcap": case.softcap,
        "tail": build_tail(case) if case.n_tail else None,
    }
    return (q, k, v), kwargs, pq_ref.attention(q, k, v, **kwargs)


def build_tail(case: Case) -> Tail:
    """Slots that no query sees hold NaN and infinity."""
    rng = np.random.default_rng(12)
    shape = (case.n_stream, case.n_q, case.n_tail)
    mask = -rng.integers(0, 40, shape).astype(np.float16) / np.float16(4)
    if case.tail_mask == "all":
        mask[:] = -np.inf
    elif case.tail_mask == "holes":
        mask[rng.random(shape) < 0.4] = -np.inf
        mask[:, :, 2::5] = -np.inf
    k, v = (
        rng.standard_normal((case.n_stream, case.n_tail, case.n_head_kv, D)).astype(np.float16)
        for D in (case.D_k, case.D_v)
    )
    unused = np.isneginf(mask).all(axis=1)
    k[unused], v[unused] = np.nan, np.inf
    return Tail(k, v, mask)


def check(case: Case) -> None:
    args, kwargs, want = build(case)
    found = native.attention(*args, **kwargs)
    assert np.isfinite(found).all()
    # Scores of hundreds carry an f32 rounding of 1e-5 into the exponent.
    assert nmse(found, want) < NMSE_LIMIT
    assert np.array_equal(found, native.attention(*args, **kwargs, n_threads=1)), "depends on the number of threads"


@pytest.mark.parametrize("n_q", [1, 3, 65])
@pytest.mark.parametrize("n_kv", [1, 31, 97, 257])
@pytest.mark.parametrize("gqa", [1, 8])
@pytest.mark.parametrize("name", TYPES)
def test_attention_shapes(simd: str, name: str, gqa: int, n_kv: int, n_q: int) -> None:
    check(Case(k=name, v=name, gqa=gqa, n_kv=n_kv, n_q=n_q))


@pytest.mark.parametrize("gqa", [1, 8])
@pytest.mark.parametrize("with_transform", [False, True])
@pytest.mark.parametrize("D", HEAD_SIZES)
@pytest.mark.parametrize("name", TYPES)
def test_attention_head_sizes(simd: str, name: str, D: int, with_transform: bool, gqa: int) -> None:
    check(Case(k=name, v=name, D_k=D, D_v=D, gqa=gqa, n_q=3, transform=with_transform, mask="holes"))


@pytest.mark.parametrize("n_q", [1, 3, 65])
@pytest.mark.parametrize("n_tail", [1, 7, 128, 129])
@pytest.mark.parametrize("n_kv", [1, 31, 97, 257])
@pytest.mark.parametrize("gqa", [1, 8])
def test_tail_shapes(simd: str, gqa: int, n_kv: int, n_tail: int, n_q: int) -> None:
    name = TYPES[(n_kv + n_tail) % 3]
    check(Case(k=name, v=name, gqa=gqa, n_kv=n_kv, n_q=n_q, n_tail=n_tail, transform=n_tail % 2 == 1, mask="holes"))


@pytest.mark.parametrize("n_q", [1, 65])
@pytest.mark.parametrize("gqa", [1, 8])
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_tail_head_sizes(simd: str, D: int, gqa: int, n_q: int) -> None:
    check(Case(D_k=D, D_v=D, gqa=gqa, n_q=n_q, n_tail=33, transform=True, mask="holes"))


FEATURES = {
    "causal": Case(n_q=65, n_kv=97, mask="causal"),
    "holes": Case(n_q=3, mask="holes"),
    "nothing visible": Case(n_q=3, mask="all"),
    "nothing visible but a sink": Case(n_q=3, mask="all", sinks=True),
    "some queries see nothing": Case(n_q=65, mask="some"),
    "mask per head": Case(n_q=3, gqa=8, mask="heads"),
    "mask per stream": Case(n_q=3, n_stream=3, mask="streams"),
    "one mask for all streams": Case(n_q=3, n_stream=3, gqa=8, mask="holes"),
    "streams": Case(n_stream=4, n_kv=31, n_q=3),
    "sinks": Case(sinks=True, gqa=8),
    "sinks on one cell": Case(sinks=True, n_kv=1, n_q=3),
    "alibi": Case(max_bias=8.0, gqa=8, n_q=3, mask="causal"),
    "alibi, 12 heads": Case(max_bias=8.0, n_head_kv=3, gqa=4, n_q=3, mask="causal"),
    "softcap": Case(softcap=5.0, gqa=8, n_q=3),
    "sharp": Case(sharp=True, softcap=30.0, n_q=3),
    "long": Case(n_kv=5000, gqa=8),
    "long and masked": Case(n_kv=5000, gqa=8, n_q=3, mask="holes", sinks=True),
    "everything": Case(
        n_stream=2, gqa=8, n_q=65, n_kv=257, mask="some", sinks=True, max_bias=8.0, softcap=20.0, transform=True
    ),
    "GQA 3": Case(n_head_kv=2, gqa=3, n_q=3),
    "GQA 16": Case(n_head_kv=1, gqa=16, n_q=3),
    "unequal head sizes": Case(D_k=192, D_v=128, n_q=3, gqa=8, transform=True),
    "smallest head": Case(D_k=8, D_v=8, n_q=3),
    "plain K f16": Case(k="float16", n_q=3, gqa=8, mask="holes"),
    "plain V f16": Case(v="float16", n_q=3, gqa=8, mask="holes", transform=True),
    "plain K f32": Case(k="float32", n_q=65),
    "plain V f32": Case(v="float32", n_q=65, transform=True),
    "plain V of 20 elements": Case(v="float16", D_v=20, n_q=3),
    "pq4 K, pq2 V": Case(v="pq2", n_q=3, gqa=8, transform=True),
    "pq2 K, pq3 V": Case(k="pq2", v="pq3", n_q=3, gqa=8, transform=True),
    "tail": Case(n_q=3, gqa=8, n_tail=40, transform=True),
    "tail, split cache": Case(n_q=3, gqa=8, n_kv=5000, n_tail=40, transform=True),
    "tail, split cache, many queries": Case(n_q=65, n_kv=3000, n_tail=129, transform=True, mask="causal"),
    "tail alone": Case(n_q=3, gqa=8, n_kv=5000, n_tail=40, mask="all", transform=True),
    "tail alone, many queries": Case(n_q=65, n_tail=129, mask="all", transform=True),
    "tail hidden": Case(n_q=3, gqa=8, n_tail=40, tail_mask="all", transform=True),
    "nothing visible, tail included": Case(n_q=3, n_tail=9, tail_mask="all", mask="all", sinks=True),
    "tail and sinks": Case(n_q=65, n_tail=9, mask="some", sinks=True, tail_mask="open"),
    "tail and softcap": Case(n_q=3, gqa=8, n_tail=9, softcap=5.0, transform=True),
    "tail and alibi": Case(n_q=3, n_head_kv=3, gqa=4, n_tail=9, max_bias=8.0, mask="causal"),
    "tail of three streams": Case(n_q=3, n_stream=3, gqa=8, n_tail=9, mask="streams", transform=True),
    "tail and mask per head": Case(n_q=3, gqa=8, n_tail=9, mask="heads"),
    "tail beside plain K": Case(k="float16", n_q=3, gqa=8, n_tail=9, mask="holes", transform=True),
    "tail beside plain V": Case(v="float32", n_q=65, n_tail=9, mask="holes", transform=True),
    "tail beside plain V of 20 elements": Case(v="float16", D_v=20, n_q=3, n_tail=9),
    "tail, unequal head sizes": Case(D_k=192, D_v=128, n_q=65, n_tail=129, transform=True),
    "tail with everything": Case(
        n_stream=2,
        gqa=8,
        n_q=65,
        n_kv=257,
        mask="some",
        sinks=True,
        max_bias=8.0,
        softcap=20.0,
        transform=True,
        n_tail=129,
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", TYPES)
def test_attention_features(simd: str, feature: str, name: str) -> None:
    case = FEATURES[feature]
    check(replace(case, k=name if case.k == "pq4" else case.k, v=name if case.v == "pq4" else case.v))


@pytest.mark.parametrize("name", TYPES)
def test_attention_does_not_depend_on_the_order_of_cells(simd: str, name: str) -> None:
    (q, k, v), kwargs, want = build(Case(k=name, v=name, gqa=8, n_q=3, n_kv=257, mask="holes"))
    p = np.random.default_rng(0).permutation(257)
    k, v = Coded(k.codes[:, p], k.codebook), Coded(v.codes[:, p], v.codebook)
    kwargs = {**kwargs, "mask": np.ascontiguousarray(kwargs["mask"][..., p])}
    assert nmse(native.attention(q, k, v, **kwargs), want) < NMSE_LIMIT


@pytest.mark.parametrize("name", TYPES)
def test_attention_reads_strided_arrays(simd: str, name: str) -> None:
    """Views into larger buffers, q in ggml's token-major order, as a cache hands them out."""
    (q, k, v), kwargs, want = build(Case(k=name, v=name, gqa=8, n_q=3, n_kv=97, n_stream=2, mask="holes"))
    q = np.ascontiguousarray(q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    sides = []
    for side in (k, v):
        big = np.full((2, 128, side.codes.shape[2] + 1, side.codes.shape[3]), 0xFF, np.uint8)
        big[:, :97, :-1] = side.codes
        sides.append(Coded(big[:, :97, :-1], side.codebook))
    mask = np.full((1, 1, 8, 128), np.nan, np.float16)
    mask[:, :, :3, :97] = kwargs["mask"]
    found = native.attention(q, *sides, **{**kwargs, "mask": mask[:, :, :3, :97]})
    assert nmse(found, want) < NMSE_LIMIT


@pytest.mark.parametrize("n_q", [3, 65])
@pytest.mark.parametrize("plain", ["k", "v"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_excluded_cells_may_hold_anything(simd: str, dtype: str, plain: str, n_q: int) -> None:
    """A plain K or V row that no query sees, beside codes."""
    case = Case(k="pq4" if plain == "v" else dtype, v="pq4" if plain == "k" else dtype, gqa=8, n_q=n_q, mask="holes")
    (q, k, v), kwargs, _ = build(case)
    k, v = (side if isinstance(side, Coded) else side.copy() for side in (k, v))
    mask = kwargs["mask"].copy()
    mask[..., [0, 40, 96]] = -np.inf
    want = pq_ref.attention(q, k, v, **{**kwargs, "mask": mask})
    for side in (k, v):
        if not isinstance(side, Coded):
            side[:, [0, 40, 96]] = np.nan
    assert nmse(native.attention(q, k, v, **{**kwargs, "mask": mask}), want) < NMSE_LIMIT


# ---- k-means ----


@pytest.mark.parametrize(("dsub", "ksub"), [(2, 256), (2, 64), (4, 256), (2, 16)])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_kmeans_assign(simd: str, dsub: int, ksub: int, n: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, n, dsub)).astype(np.float32)
    c = rng.standard_normal((3, ksub, dsub)).astype(np.float32)
    c[:, ksub // 2] = c[:, 3]  # a tie
    codes = np.empty((3, n), np.uint8)
    dists = np.empty((3, n), np.float32)
    sums, counts, costs = native.kmeans_assign(x, c, codes=codes, dists=dists)
    d = ((x[:, :, None].astype(np.float64) - c[:, None]) ** 2).sum(-1)
    want = d.argmin(-1)
    p, i = np.nonzero(codes != want)
    assert (d[p, i, codes[p, i]] - d[p, i, want[p, i]] < 1e-6).all()
    assert not (codes == ksub // 2).any()
    one_hot = np.eye(ksub)[codes]
    assert np.array_equal(counts, one_hot.sum(1))
    assert np.allclose(sums, np.einsum("pnk,pnd->pkd", one_hot, x), rtol=1e-12, atol=1e-12)
    assert np.allclose(dists, d.min(-1), rtol=1e-5, atol=1e-9)
    assert np.allclose(costs, np.einsum("pnk,pn->pk", one_hot, d.min(-1)), rtol=1e-5, atol=1e-9)
    again = native.kmeans_assign(x, c, n_threads=1)
    assert all(np.array_equal(a, b) for a, b in zip((sums, counts, costs), again, strict=True))


# ---- codebooks in native code ----


def damaged(blob: bytes, at: int, value: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ value]) + blob[at + 1 :]


def header_and_crc(blob: bytes, at: int, fmt: str, value: Any) -> bytes:
    """Changes a field anywhere, and makes the CRC right again."""
    b = bytearray(blob)
    struct.pack_into(fmt, b, at, value)
    struct.pack_into("<I", b, 24, zlib.crc32(bytes(b[32:])))
    return bytes(b)


def test_the_native_parser_reads_an_anisotropy() -> None:
    """With and without a transform; and refuses one that is cut off, not finite, or of another flag."""
    for with_transform in (False, True):
        cb = make_codebook("pq4", 16, 2, with_transform=with_transform, with_aniso=True)
        blob = container.codebook_to_blob(cb)
        assert cb.aniso is not None
        blocks = native.build_blob(blob, cb).reshape(2, -1)  # mu, then aniso, each at a multiple of 64 bytes
        for h in range(2):
            assert blocks[h, :64].view(np.float32).tobytes() == cb.mu[h].tobytes()
            assert blocks[h, 64:128].view(np.float32).tobytes() == cb.aniso[h].tobytes()
        at = 32 + 64 + with_transform * 512
        for bad, message in (
            (blob[:-1], "payload"),
            (blob[: at + 8], "payload"),
            (header_and_crc(blob, 18, "<H", int(with_transform)), "payload"),
            (header_and_crc(blob, 18, "<H", 4 + with_transform), "flags"),
            (header_and_crc(blob, at + 60, "<f", float("nan")), "anisotropy"),
            (header_and_crc(blob, at, "<f", float("-inf")), "anisotropy"),
        ):
            with pytest.raises(container.FormatError):
                container.blob_to_codebook(bad, cb.spec)
            with pytest.raises(NativeError, match=message):
                native.build_blob(bad, cb)


@pytest.mark.parametrize("with_aniso", [False, True])
def test_the_native_parser_refuses_what_python_refuses(with_aniso: bool) -> None:
    """Every header byte, a payload byte, and both ends: refused by both parsers."""
    cb = make_codebook("pq3", 16, 2, with_transform=True, with_aniso=with_aniso)
    blob = container.codebook_to_blob(cb)
    native.build_blob(blob, cb)
    for bad in [b"", blob[:31], blob[:32], blob[:-1], blob + b"\0"] + [damaged(blob, i, 1) for i in range(33)]:
        with pytest.raises((container.FormatError, MismatchError)):
            container.blob_to_codebook(bad, cb.spec)
        with pytest.raises(NativeError, match=r"\w{3}"):
            native.build_blob(bad, cb)


def test_the_inverse_is_that_of_the_definition() -> None:
    """The head block holds T as the file does, and the inverse that ``pq_ref`` says, in f16."""
    cb = make_codebook("pq4", 64, 2, with_transform=True)
    assert cb.T is not None
    assert cb.T_inv is not None
    blocks = native.build(cb).reshape(2, -1)
    n = 64 * 64 * 2
    for h in range(2):
        assert not blocks[h, 256:512].any(), "no anisotropy"
        T, T_inv = blocks[h, 512 : 512 + n].view(np.float16), blocks[h, 512 + n : 512 + 2 * n].view(np.float16)
        assert T.tobytes() == cb.T[h].tobytes()
        # Both invert in double, by different methods: a value may fall on the other side of the middle of two halves.
        ulps = np.abs(T_inv.view(np.int16).astype(int) - cb.T_inv[h].astype(np.float16).ravel().view(np.int16))
        assert ulps.max() <= 1
        assert (ulps != 0).sum() <= 1


def test_an_inverse_beyond_f16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cb = make_codebook("pq4", 16, 1)
    small = pq_ref.Codebook(cb.spec, cb.mu, (1e-5 * np.eye(16)).astype(np.float16)[None], cb.centroids)
    with pytest.raises(MismatchError):
        container.codebook_to_blob(small)
    monkeypatch.setattr(container, "_check_values", lambda *_: None)
    with pytest.raises(NativeError, match="found 9986.* in the inverse of its transform, needs 65504 or less"):
        native.build_blob(container.codebook_to_blob(small), small)


def test_missing_library_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("MILLION_PQ_LIB", str(tmp_path / "none.so"))
    with pytest.raises(NativeError, match="none.so, need the native library.*MILLION_PQ_LIB"):
        native.load.__wrapped__()
    (tmp_path / "none.so").write_bytes(b"not a library")
    with pytest.raises(NativeError, match="cannot load the native library"):
        native.load.__wrapped__()


def test_bad_arguments_never_reach_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    cb = make_codebook("pq4", 16, 2)
    x = rows_for(cb, 5)
    codes = native.encode(cb, x)
    side = Coded(codes[None], cb)
    q = np.zeros((1, 4, 2, 16), np.float32)
    f16 = np.zeros((1, 5, 2, 16), np.float16)
    mask = np.zeros((1, 1, 2, 5), np.float16)
    c = np.zeros((2, 16, 2), np.float32)
    i64 = np.arange(5)
    slots = np.zeros((5, 2, 16), np.float16)
    tail = Tail(f16, f16, np.zeros((1, 2, 5), np.float16))

    def forbidden() -> None:
        raise AssertionError("native code was reached")

    monkeypatch.setattr(native, "load", forbidden)
    bad = [
        lambda: native.encode(cb, x.astype(np.float64)),
        lambda: native.encode(cb, x[:, :1]),
        lambda: native.encode(cb, x[:, :, :8]),
        lambda: native.encode(cb, x[:, :, ::-1]),
        lambda: native.encode(cb, x, row_idx=i64),
        lambda: native.encode(cb, x, out=codes[:4].copy()),
        lambda: native.encode(cb, x, out=codes.astype(np.int8)),
        lambda: native.encode(cb, x, row_idx=i64 + 1, out=codes),
        lambda: native.encode(cb, x, row_idx=i64 - 1, out=codes),
        lambda: native.encode(cb, x, row_idx=i64 * 0, out=codes),
        lambda: native.encode(cb, x, row_idx=i64.astype(np.int32), out=codes),
        lambda: native.encode(cb, x, tail=slots),
        lambda: native.encode(cb, x, tail_idx=i64),
        lambda: native.encode(cb, x, tail=slots.astype(np.float32), tail_idx=i64),
        lambda: native.encode(cb, x, tail=slots[:, :, :8], tail_idx=i64),
        lambda: native.encode(cb, x, tail=np.zeros((5, 2, 32), np.float16)[:, :, :16], tail_idx=i64),
        lambda: native.encode(cb, x, tail=slots, tail_idx=i64 + 1),
        lambda: native.encode(cb, x, tail=slots, tail_idx=i64 * 0),
        lambda: native.encode(cb, x, tail=slots, tail_idx=i64[:4]),
        lambda: native.encode(cb, x, tail=slots, tail_idx=i64.astype(np.int32)),
        lambda: native.decode(cb, codes[:, :, :4]),
        lambda: native.decode(cb, codes[:, :1]),
        lambda: native.decode(cb, codes[0]),
        lambda: native.decode(cb, codes.astype(np.int16)),
        lambda: native.attention(q.astype(np.float64), side, side, scale=1.0),
        lambda: native.attention(q[0], side, side, scale=1.0),
        lambda: native.attention(q[..., :8], side, side, scale=1.0),
        lambda: native.attention(q[:, :3], side, side, scale=1.0),
        lambda: native.attention(q, f16, f16, scale=1.0),
        lambda: native.attention(q, side, f16[:, :4], scale=1.0),
        lambda: native.attention(q, side, f16.astype(np.float64), scale=1.0),
        lambda: native.attention(q, side, np.zeros((1, 5, 2, 512), np.float16), scale=1.0),
        lambda: native.attention(q, Coded(codes[None, :0], cb), Coded(codes[None, :0], cb), scale=1.0),
        lambda: native.attention(q, side, side, scale=1.0, mask=mask[..., :4]),
        lambda: native.attention(q, side, side, scale=1.0, mask=mask[:0]),
        lambda: native.attention(q, side, side, scale=1.0, mask=mask.astype(np.float32)),
        lambda: native.attention(q, side, side, scale=1.0, tail=replace(tail, k=f16[:, :4])),
        lambda: native.attention(q, side, side, scale=1.0, tail=replace(tail, v=f16.astype(np.float32))),
        lambda: native.attention(q, side, side, scale=1.0, tail=replace(tail, mask=tail.mask[:, :1])),
        lambda: native.attention(q, side, side, scale=1.0, tail=replace(tail, k=f16[..., ::-1])),
        lambda: native.attention(q, side, side, scale=1.0, sinks=np.zeros(3, np.float32)),
        lambda: native.attention(q, side, side, scale=1.0, sinks=np.zeros(4)),
        lambda: native.kmeans_assign(np.zeros((2, 5, 3), np.float32), c),
        lambda: native.kmeans_assign(np.zeros((2, 5, 2)), c),
        lambda: native.kmeans_assign(np.zeros((3, 5, 2), np.float32), c),
        lambda: native.kmeans_assign(np.zeros((2, 5, 2), np.float32), np.zeros((2, 300, 2), np.float32)),
        lambda: native.kmeans_assign(np.zeros((2, 10, 2), np.float32)[:, ::2], c),
        lambda: native.kmeans_assign(np.zeros((2, 5, 2), np.float32), c, codes=np.zeros((2, 4), np.uint8)),
        lambda: native.kmeans_assign(np.zeros((2, 5, 2), np.float32), c, dists=np.zeros((2, 5))),
    ]
    for i, f in enumerate(bad):
        try:
            f()
        except MismatchError:
            continue
        pytest.fail(f"case {i} was accepted")
