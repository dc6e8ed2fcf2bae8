"""Self-checks of the definition: it must agree with plain dense attention and with itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import HEAD_SIZES, make_codebook, rows_for, worked_by_hand

from million_gguf import pq_ref
from million_gguf.errors import MismatchError
from million_gguf.pq_ref import Codebook, Coded, Tail
from million_gguf.spec import PQ_TYPES

TYPES = list(PQ_TYPES)


# ---- encode and decode ----


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_centroids_encode_to_themselves(name: str, D: int) -> None:
    """With the identity, code c decodes to a row that encodes to c, or to an equal centroid below it."""
    cb = make_codebook(name, D, 2)
    cb = Codebook(cb.spec, np.zeros_like(cb.mu), None, cb.centroids)
    shape = (cb.spec.ksub, 2, cb.head_bytes)
    codes = np.broadcast_to(np.arange(cb.spec.ksub, dtype=np.uint8)[:, None, None], shape)
    x = pq_ref.decode(cb, codes)
    again = pq_ref.encode(cb, x)
    assert np.array_equal(pq_ref.decode(cb, again), x)
    assert (again <= codes).all()
    assert (again == codes).mean() > 0.99


def test_two_subspaces_of_pq3_are_decoded_by_one_code() -> None:
    """Worked by hand from pq-layout.h: bytes 2u, 2u + 1 are codes of subspaces 4u, 4u + 1, and D / 4 + u that of 4u + 2 and 4u + 3."""
    s = PQ_TYPES["pq3"]
    m, c = np.meshgrid(np.arange(8), np.arange(256), indexing="ij")
    centroids = np.stack([m, c], axis=-1)[None].astype(np.float16)  # a centroid says which it is
    cb = Codebook(s, np.zeros((1, 16), np.float32), None, centroids)
    y = pq_ref.decode(cb, np.array([[[10, 20, 30, 40, 50, 60]]], np.uint8)).reshape(8, 2)
    assert y[:, 0].tolist() == list(range(8))
    assert y[:, 1].tolist() == [10, 20, 50, 50, 30, 40, 60, 60]


def test_decode_encode_with_transform_is_stable() -> None:
    cb = make_codebook("pq4", 64, 2, with_transform=True)
    codes = pq_ref.encode(cb, rows_for(cb, 50))
    assert np.array_equal(pq_ref.encode(cb, pq_ref.decode(cb, codes)), codes)


@pytest.mark.parametrize("name", TYPES)
def test_ties_go_to_the_lowest_code(name: str) -> None:
    s = PQ_TYPES[name]
    D = 16
    centroids = np.full((1, s.n_subspaces(D), s.ksub, s.dsub), 9.0, dtype=np.float16)
    centroids[:, :, [5, 40], :] = 1.0  # two equal centroids
    centroids[:, :, 7, :] = -1.0  # as far from 0 as those two
    cb = Codebook(s, np.zeros((1, D), np.float32), None, centroids)
    assert (pq_ref.encode(cb, np.ones((1, 1, D))) == 5).all()
    assert (pq_ref.encode(cb, np.zeros((1, 1, D))) == 5).all()
    assert (pq_ref.encode(cb, np.full((1, 1, D), -1.0)) == 7).all()


def test_a_shared_code_is_a_compromise() -> None:
    """Code 3 is best for one subspace and 4 for the other; 6, which is best for neither, has the least sum, and 9 the same."""
    s = PQ_TYPES["pq3"]
    centroids = np.full((1, 4, s.ksub, 2), 9.0, dtype=np.float16)
    for m, distance in ((2, {3: 0.0, 4: 4.0, 6: 1.0, 9: 2.0}), (3, {3: 4.0, 4: 0.0, 6: 2.0, 9: 1.0})):
        for code, value in distance.items():
            centroids[0, m, code] = [np.sqrt(value), 0.0]
    centroids[0, 2, 9], centroids[0, 3, 6] = [1.0, 1.0], [1.0, 1.0]  # 2 without rounding
    cb = Codebook(s, np.zeros((1, 8), np.float32), None, centroids)
    x = np.zeros((1, 1, 8), np.float32)
    assert pq_ref.distances(cb, x)[0, 0, 2:].argmin(axis=-1).tolist() == [3, 4]
    assert pq_ref.encode(cb, x)[0, 0, 2] == 6
    centroids[0, 2:, 6] = 9.0
    assert pq_ref.encode(cb, x)[0, 0, 2] == 9


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("with_transform", [False, True])
def test_encode_is_the_nearest_of_all(name: str, with_transform: bool) -> None:
    """Against a search that is spelled out, one vector and code at a time."""
    cb = make_codebook(name, 16, 2, with_transform=with_transform)
    subspaces = {
        "pq4": [[0], [1], [2], [3], [4], [5], [6], [7]],
        "pq3": [[0], [1], [4], [5], [2, 3], [6, 7]],
        "pq2": [[0], [1], [2], [3]],
    }[name]
    x = rows_for(cb, 5)
    found = pq_ref.encode(cb, x)
    x = pq_ref.to_f16(x)
    assert found.shape == (5, 2, len(subspaces)) and found.dtype == np.uint8
    for n in range(5):
        for h in range(2):
            y = x[n, h].astype(np.float64) - cb.mu[h]
            if cb.T is not None:
                y = y @ cb.T[h].astype(np.float64)
            y = y.reshape(cb.M, cb.spec.dsub)
            for code, members in enumerate(subspaces):
                d = [
                    sum(float(((y[m] - cb.centroids[h, m, c].astype(np.float64)) ** 2).sum()) for m in members)
                    for c in range(256)
                ]
                assert found[n, h, code] == d.index(min(d))


def test_decode_undoes_the_transform() -> None:
    """A codebook that holds a row exactly gives it back, through T and mu."""
    cb = make_codebook("pq4", 32, 1, with_transform=True)
    codes = np.arange(cb.M, dtype=np.uint8).reshape(1, 1, cb.M)
    y = pq_ref.transform(cb, pq_ref.decode(cb, codes))
    # 32 products, each with an inverse that is off by up to 2**-11 of itself
    assert np.allclose(y[0, 0].reshape(cb.M, 2), cb.centroids[0, np.arange(cb.M), np.arange(cb.M)], atol=5e-3)


def test_the_inverse_is_that_of_the_stored_transform_in_f16() -> None:
    cb = make_codebook("pq4", 32, 2, with_transform=True)
    assert cb.T is not None
    assert cb.T_inv is not None
    exact = np.linalg.inv(cb.T.astype(np.float64))
    assert np.array_equal(cb.T_inv, cb.T_inv.astype(np.float16))
    assert (np.abs(cb.T_inv - exact) <= 2.0**-11 * np.abs(exact) + 2.0**-25).all()


def test_an_inverse_beyond_f16_is_infinite() -> None:
    cb = make_codebook("pq4", 16, 1)
    small = Codebook(cb.spec, cb.mu, (1e-5 * np.eye(16)).astype(np.float16)[None], cb.centroids)
    assert small.T_inv is not None
    assert np.isinf(np.diagonal(small.T_inv[0])).all()


@pytest.mark.parametrize("name", TYPES)
def test_rows_are_rounded_to_f16_before_they_are_coded(name: str) -> None:
    """0.4 of a step above 1 is 1 in f16, and lies on the other side of the border between two centroids."""
    s, step = PQ_TYPES[name], 2.0**-10
    centroids = np.full((1, s.n_subspaces(16), s.ksub, s.dsub), 9.0, dtype=np.float16)
    centroids[:, :, 0], centroids[:, :, 1] = 0.0, 1.0
    cb = Codebook(s, np.full((1, 16), 0.5 + 0.25 * step, np.float32), None, centroids)
    x = np.full((1, 1, 16), 1 + 0.4 * step)
    assert pq_ref.distances(cb, pq_ref.transform(cb, x)).argmin() == 1
    assert (pq_ref.encode(cb, x) == 0).all()
    assert (pq_ref.encode(cb, np.full((1, 1, 16), 1e9)) == 0).all()  # infinite in f16: as far from any centroid


def test_long_input_is_chunked_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    cb = make_codebook("pq3", 16, 2)
    x = rows_for(cb, 100)
    whole = pq_ref.encode(cb, x)
    monkeypatch.setattr(pq_ref, "_CHUNK_ELEMS", 7 * cb.n_head_kv * cb.M * cb.spec.ksub)
    assert np.array_equal(pq_ref.encode(cb, x), whole)


# ---- anisotropic codes ----


@pytest.mark.parametrize("name", TYPES)
def test_an_anisotropy_of_zeros_is_none(name: str) -> None:
    cb = make_codebook(name, 80, 2, with_transform=True)
    x = rows_for(cb, 20)
    zeros = dataclasses.replace(cb, aniso=np.zeros((2, 80), np.float32))
    assert np.array_equal(pq_ref.encode(zeros, x), pq_ref.encode(cb, x))
    assert not zeros.equals(cb) and not cb.equals(zeros)
    assert zeros.equals(dataclasses.replace(zeros))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("D", [8, 24, 64, 80])
def test_anisotropic_codes_never_cost_more_than_the_nearest(name: str, D: int) -> None:
    cb = make_codebook(name, D, 2, with_transform=True, with_aniso=True)
    y = pq_ref.transform(cb, pq_ref.to_f16(rows_for(cb, 200)))
    plain, codes = pq_ref.nearest(cb, y), pq_ref.encode_y(cb, y)
    before, after = pq_ref.strip_costs(cb, y, plain), pq_ref.strip_costs(cb, y, codes)
    assert (after <= before).all()
    taken = np.zeros(before.shape, dtype=bool)
    np.logical_or.at(taken, (..., pq_ref.strip_of_code(cb)), codes != plain)
    assert np.array_equal(taken, after < before), "a strip changes only where it costs less"
    assert taken.mean() > 0.1
    assert after.sum() < 0.99 * before.sum()


@pytest.mark.parametrize("case", range(len(worked_by_hand())))
def test_codes_that_were_worked_by_hand(case: int) -> None:
    cb, codes = worked_by_hand()[case]
    assert pq_ref.encode(cb, np.ones((1, 1, 8)))[0, 0].tolist() == codes
    # Only ratios count: neither the sign nor the scale of all of aniso does.
    assert cb.aniso is not None
    scaled = dataclasses.replace(cb, aniso=np.float32(-0.5) * cb.aniso)
    assert pq_ref.encode(scaled, np.ones((1, 1, 8)))[0, 0].tolist() == codes


def test_the_cost_of_a_strip_was_worked_by_hand() -> None:
    cb, codes = worked_by_hand()[0]
    y = np.ones((1, 1, 8))
    assert pq_ref.strip_costs(cb, y, np.zeros((1, 1, 4), np.uint8)).tolist() == [[[2.0]]]
    assert pq_ref.strip_costs(cb, y, np.array([[codes]], np.uint8)).tolist() == [[[0.96875]]]
    assert pq_ref.moved(cb, y, np.zeros((1, 1, 4), np.uint8)).tolist() == [[[1.1875] * 8]]
    assert pq_ref.strip_costs(dataclasses.replace(cb, aniso=None), y, np.zeros((1, 1, 4), np.uint8)).item() == 0.5


@pytest.mark.parametrize("name", TYPES)
def test_strips_are_coded_on_their_own(name: str) -> None:
    """A head of 80 is one of 32, one of 32 and one of 16, side by side."""
    cb = make_codebook(name, 80, 2, with_aniso=True)
    x = rows_for(cb, 200)
    assert cb.aniso is not None
    found = pq_ref.decode_y(cb, pq_ref.encode(cb, x))
    dsub = cb.spec.dsub
    for start, end in ((0, 32), (32, 64), (64, 80)):
        part = Codebook(
            cb.spec,
            cb.mu[:, start:end],
            None,
            cb.centroids[:, start // dsub : end // dsub],
            cb.aniso[:, start:end],
        )
        assert np.array_equal(pq_ref.decode_y(part, pq_ref.encode(part, x[:, :, start:end])), found[:, :, start:end])


def test_a_strip_without_a_direction_has_nearest_codes() -> None:
    """Zeros or infinities in one strip, and in no other: where all of d is 0, and where f16 ended."""
    cb = make_codebook("pq4", 64, 1, with_aniso=True)
    assert cb.aniso is not None
    plain = dataclasses.replace(cb, mu=np.zeros_like(cb.mu), aniso=None)
    x = np.random.default_rng(0).standard_normal((50, 1, 64))
    half = dataclasses.replace(plain, aniso=np.where(np.arange(64) < 32, 0, cb.aniso))
    codes, nearest = pq_ref.encode(half, x), pq_ref.encode(plain, x)
    assert np.array_equal(codes[..., :16], nearest[..., :16])
    assert not np.array_equal(codes[..., 16:], nearest[..., 16:])
    x[:, :, 3] = 1e9
    codes, nearest = pq_ref.encode(dataclasses.replace(plain, aniso=cb.aniso), x), pq_ref.encode(plain, x)
    assert np.array_equal(codes[..., :16], nearest[..., :16])
    assert not np.array_equal(codes[..., 16:], nearest[..., 16:])


# ---- attention ----


def dense(q, k, v, scale, mask, slopes, softcap, sinks):  # type: ignore[no-untyped-def]
    """Attention as in a textbook, one query and head at a time."""
    n_stream, n_head, n_q, _ = q.shape
    out = np.zeros((n_stream, n_q, n_head, v.shape[3]))
    for s in range(n_stream):
        for h in range(n_head):
            h_kv = h // (n_head // k.shape[2])
            for i in range(n_q):
                score = scale * (k[s, :, h_kv] @ q[s, h, i])
                if softcap:
                    score = softcap * np.tanh(score / softcap)
                if mask is not None:
                    score = score + slopes[h] * mask[s % mask.shape[0], h % mask.shape[1], i].astype(np.float64)
                extra = [] if sinks is None else [sinks[h]]
                e = np.exp(np.concatenate([score, extra]))
                if e.sum() > 0:
                    out[s, i, h] = e[: len(score)] @ v[s, :, h_kv] / e.sum()
    return out


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("with_transform", [False, True])
@pytest.mark.parametrize("case", ["plain", "mask", "alibi", "softcap", "sinks", "all"])
def test_attention_equals_dense_attention_on_decoded_rows(name: str, with_transform: bool, case: str) -> None:
    rng = np.random.default_rng(3)
    n_stream, n_head, n_head_kv, n_q, n_kv, D = 2, 6, 2, 3, 31, 16
    kb = make_codebook(name, D, n_head_kv, seed=1, with_transform=with_transform)
    vb = make_codebook(name, D, n_head_kv, seed=2, with_transform=with_transform)
    kc = pq_ref.encode(kb, rows_for(kb, n_stream * n_kv)).reshape(n_stream, n_kv, n_head_kv, -1)
    vc = pq_ref.encode(vb, rows_for(vb, n_stream * n_kv, 1)).reshape(n_stream, n_kv, n_head_kv, -1)
    q = rng.standard_normal((n_stream, n_head, n_q, D))
    mask = None
    if case in ("mask", "alibi", "all"):
        mask = np.where(
            rng.random((n_stream, 1, n_q, n_kv)) < 0.4, -np.inf, -rng.integers(0, 9, (n_stream, 1, n_q, n_kv))
        )
        mask = mask.astype(np.float16)
        mask[0, 0, 1] = -np.inf  # a query that sees nothing
    max_bias = 8.0 if case in ("alibi", "all") else 0.0
    softcap = 5.0 if case in ("softcap", "all") else 0.0
    sinks = rng.standard_normal(n_head) if case in ("sinks", "all") else None
    found = pq_ref.attention(
        q, Coded(kc, kb), Coded(vc, vb), scale=0.2, mask=mask, sinks=sinks, max_bias=max_bias, logit_softcap=softcap
    )
    k = np.stack([pq_ref.decode(kb, kc[s]) for s in range(n_stream)])
    v = np.stack([pq_ref.decode(vb, vc[s]) for s in range(n_stream)])
    want = dense(q, k, v, 0.2, mask, pq_ref.alibi_slopes(n_head, max_bias), softcap, sinks)
    assert np.allclose(found, want, rtol=1e-10, atol=1e-12)
    # Plain rows on either side must not change the meaning.
    mixed = pq_ref.attention(
        q, k, Coded(vc, vb), scale=0.2, mask=mask, sinks=sinks, max_bias=max_bias, logit_softcap=softcap
    )
    assert np.allclose(mixed, want, rtol=1e-10, atol=1e-12)


def make_tail(n_stream: int, n_q: int, n_tail: int, n_head_kv: int, D_k: int, D_v: int) -> Tail:
    rng = np.random.default_rng(8)
    mask = np.where(rng.random((n_stream, n_q, n_tail)) < 0.4, -np.inf, -rng.integers(0, 9, (n_stream, n_q, n_tail)))
    k, v = (rng.standard_normal((n_stream, n_tail, n_head_kv, D)).astype(np.float16) for D in (D_k, D_v))
    return Tail(k, v, mask.astype(np.float16))


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_transform", [False, True])
def test_a_tail_is_more_cells(with_transform: bool, with_mask: bool) -> None:
    rng = np.random.default_rng(4)
    n_stream, n_head, n_head_kv, n_q, n_kv, n_tail, D = 2, 6, 2, 3, 31, 7, 16
    cb = make_codebook("pq4", D, n_head_kv, seed=1, with_transform=with_transform)
    codes = pq_ref.encode(cb, rows_for(cb, n_stream * n_kv)).reshape(n_stream, n_kv, n_head_kv, -1)
    tail = make_tail(n_stream, n_q, n_tail, n_head_kv, D, D)
    q = rng.standard_normal((n_stream, n_head, n_q, D))
    mask = np.zeros((n_stream, 1, n_q, n_kv), np.float16)
    if with_mask:
        mask[rng.random(mask.shape) < 0.4] = -np.inf
        mask[0, 0, 1] = -np.inf  # a query that sees the tail alone
    sinks = rng.standard_normal(n_head)
    found = pq_ref.attention(
        q, Coded(codes, cb), Coded(codes, cb), scale=0.2, mask=mask if with_mask else None, tail=tail, sinks=sinks, max_bias=8.0
    )  # fmt: skip
    rows = np.stack([pq_ref.decode(cb, codes[s]) for s in range(n_stream)])
    k, v = np.concatenate([rows, tail.k], axis=1), np.concatenate([rows, tail.v], axis=1)
    both = np.concatenate([mask, tail.mask[:, None]], axis=3)
    want = dense(q, k, v, 0.2, both, pq_ref.alibi_slopes(n_head, 8.0), 0.0, sinks)
    assert np.allclose(found, want, rtol=1e-10, atol=1e-12)


def test_unused_slots_may_hold_anything() -> None:
    tail = make_tail(1, 2, 5, 1, 8, 8)
    q, k = np.ones((1, 1, 2, 8)), np.ones((1, 3, 1, 8))
    tail.mask[:, :, 3] = -np.inf
    want = pq_ref.attention(q, k, k, scale=1.0, tail=tail)
    tail.k[:, 3], tail.v[:, 3] = np.nan, np.inf
    assert np.array_equal(pq_ref.attention(q, k, k, scale=1.0, tail=tail), want)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("with_transform", [False, True])
def test_lut_scores_equal_dense_scores(name: str, with_transform: bool) -> None:
    cb = make_codebook(name, 64, 2, with_transform=with_transform)
    codes = pq_ref.encode(cb, rows_for(cb, 17))[None]
    q = np.random.default_rng(5).standard_normal((1, 4, 2, 64))
    want = np.einsum("hqd,nhd->hqn", q[0], np.repeat(pq_ref.decode(cb, codes[0]), 2, axis=1))
    assert np.allclose(pq_ref.lut_scores(q, Coded(codes, cb))[0], want, rtol=1e-9, atol=1e-9)


def test_alibi_slopes_of_a_power_of_two_are_those_of_the_paper() -> None:
    """Press et al. 2022: 8 heads have slopes 1/2, 1/4, ... 1/256; more heads take odd steps of the finer series."""
    assert np.allclose(pq_ref.alibi_slopes(8, 8.0), 0.5 ** np.arange(1, 9))
    assert np.allclose(pq_ref.alibi_slopes(12, 8.0)[8:], 0.5 ** np.array([0.5, 1.5, 2.5, 3.5]))
    assert (pq_ref.alibi_slopes(5, 0.0) == 1.0).all()


def test_excluded_cells_may_hold_anything() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s) for s in ((1, 2, 1, 8), (1, 4, 2, 8), (1, 4, 2, 8)))
    mask = np.zeros((1, 1, 1, 4), np.float16)
    mask[..., 2] = -np.inf
    want = pq_ref.attention(q, np.delete(k, 2, 1), np.delete(v, 2, 1), scale=1.0)
    k[:, 2], v[:, 2] = np.nan, np.inf
    assert np.allclose(pq_ref.attention(q, k, v, scale=1.0, mask=mask), want)


def test_no_visible_cell_gives_zeros_even_with_a_sink() -> None:
    q, k = np.ones((1, 1, 2, 8)), np.ones((1, 3, 1, 8))
    mask = np.full((1, 1, 2, 3), -np.inf, np.float16)
    for sinks in (None, np.array([1.5])):
        assert (pq_ref.attention(q, k, k, scale=1.0, mask=mask, sinks=sinks) == 0.0).all()


def test_wrong_shapes_are_refused() -> None:
    cb = make_codebook("pq4", 16, 2)
    codes = np.zeros((1, 5, 2, 8), np.uint8)
    q = np.zeros((1, 4, 1, 16))
    side = Coded(codes, cb)
    tail = make_tail(1, 1, 3, 2, 16, 16)
    bad = [
        lambda: pq_ref.encode(cb, np.zeros((3, 2, 15))),
        lambda: pq_ref.encode(cb, np.zeros((3, 16))),
        lambda: pq_ref.decode(cb, np.zeros((3, 2, 9), np.uint8)),
        lambda: pq_ref.decode(cb, np.zeros((3, 2, 8), np.int8)),
        lambda: pq_ref.attention(q[..., :8], side, side, scale=1.0),
        lambda: pq_ref.attention(q[:, :3], side, side, scale=1.0),
        lambda: pq_ref.attention(q, side, Coded(codes[:, :4], cb), scale=1.0),
        lambda: pq_ref.attention(np.zeros((2, 4, 1, 16)), side, side, scale=1.0),
        lambda: pq_ref.attention(q, side, side, scale=1.0, mask=np.zeros((1, 1, 1, 6))),
        lambda: pq_ref.attention(q, side, side, scale=1.0, sinks=np.zeros(3)),
        lambda: pq_ref.attention(q, side, side, scale=1.0, tail=Tail(tail.k[:, :2], tail.v, tail.mask)),
        lambda: pq_ref.attention(q, side, side, scale=1.0, tail=Tail(tail.k, tail.v[..., :8], tail.mask)),
        lambda: pq_ref.attention(q, side, side, scale=1.0, tail=Tail(tail.k, tail.v, tail.mask[:, :, :2])),
        lambda: pq_ref.attention(q, side, side, scale=1.0, tail=Tail(tail.k, tail.v, tail.mask[0])),
        lambda: pq_ref.attention(q, side, side, scale=1.0, tail=Tail(tail.k.astype(np.float32), tail.v, tail.mask)),
        lambda: Codebook(cb.spec, cb.mu, None, cb.centroids[:, :3]),
        lambda: Codebook(cb.spec, cb.mu.astype(np.float64), None, cb.centroids),
        lambda: Codebook(cb.spec, cb.mu, np.zeros((1, 16, 16), np.float16), cb.centroids),
        lambda: Codebook(cb.spec, cb.mu[0], None, cb.centroids),
        lambda: Codebook(cb.spec, cb.mu, None, cb.centroids, np.ones((2, 8), np.float32)),
        lambda: Codebook(cb.spec, cb.mu, None, cb.centroids, np.ones((2, 16))),
    ]
    for i, f in enumerate(bad):
        with pytest.raises(MismatchError):
            f()
            pytest.fail(f"case {i} was accepted")
