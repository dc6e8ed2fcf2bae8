"""The definition of the product-quantized KV cache, in NumPy and float64.

The C++ and CUDA kernels are tested against this file. It is written to be read: no function here is fast.

Method: MILLION (DAC'25, arXiv 2504.03661), product quantization after Jegou et al. (PAMI 2011), with a linear map per
layer and KV head (``docs/format.md``, section *Codes*)::

    y  = (f16(x) - mu) T                             encode: code = nearest centroid to y[m*dsub:(m+1)*dsub]
    x^ = y^ T^-1 + mu                                decode: y^ is the concatenation of the chosen centroids
    q.x^ = (T^-1 q).y^ + q.mu                        what the kernels use; ``lut_scores`` computes it so

A code that two subspaces share (pq3) is nearest by the sum of both distances: of centroids with one index, side by side.

Codes of K may be anisotropic instead of nearest (after Guo et al., "Accelerating Large-Scale Inference with Anisotropic Vector
Quantization", ICML 2020): the queries that look for a key lie along some direction d, and an error along d changes their scores
more than another does. Here d = aniso * y, element by element, and ``encode_y`` has the rest.

Rows are rounded to f16 before anything else, to nearest even: the codes are those of the row that an f16 cache would hold, and
may as well be made later, from the exact tail. T^-1 is the inverse of the stored T, rounded to f16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .errors import MismatchError
from .spec import PQSpec

# An error e of a strip (a run of so many elements of y; the last of a head may be shorter) costs |e|^2 + ANISO_WEIGHT (e.d)^2 / |d|^2.
ANISO_STRIP = 32
ANISO_WEIGHT = 3.0

# Elements of the largest temporary array: 2**24 float64 are 128 MiB.
_CHUNK_ELEMS = 1 << 24


@dataclass(frozen=True, eq=False)
class Codebook:
    """Codebook of one layer and side (K or V), with the values that the file stores.

    Attributes:
        spec: the cache type.
        mu: f32 ``[n_head_kv, D]``.
        T: f16 ``[n_head_kv, D, D]``, or None for the identity. ``y = (x - mu) @ T[head]``.
        centroids: f16 ``[n_head_kv, M, ksub, dsub]``.
        aniso: f32 ``[n_head_kv, D]``, or None: codes are nearest, as with zeros. K only. The direction in which errors of y cost
            more than others is ``aniso * y``, so only the ratios between the elements of a head count.

    Raises MismatchError when shapes or dtypes disagree with each other or with ``spec``. Whether values are finite and
    ``T`` is invertible is checked where codebooks enter: ``container.blob_to_codebook`` and ``codebook.train_side``.
    """

    spec: PQSpec
    mu: npt.NDArray[np.float32]
    T: npt.NDArray[np.float16] | None
    centroids: npt.NDArray[np.float16]
    aniso: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.mu.ndim != 2 or self.mu.shape[0] < 1:
            raise MismatchError(f"mu has shape {self.mu.shape}, need [n_head_kv, D] with at least one head")
        M = self.spec.n_subspaces(self.D)
        want = {
            "mu": ((self.n_head_kv, self.D), np.float32),
            "T": ((self.n_head_kv, self.D, self.D), np.float16),
            "centroids": ((self.n_head_kv, M, self.spec.ksub, self.spec.dsub), np.float16),
            "aniso": ((self.n_head_kv, self.D), np.float32),
        }
        for name, (shape, dtype) in want.items():
            a = getattr(self, name)
            if a is None and name in ("T", "aniso"):
                continue
            if a.shape != shape or a.dtype != dtype:
                raise MismatchError(
                    f"{self.spec.name} {name} is {a.dtype} {list(a.shape)}, need {np.dtype(dtype)} {list(shape)}"
                )

    @property
    def D(self) -> int:
        """Head size."""
        return int(self.mu.shape[1])

    @property
    def n_head_kv(self) -> int:
        """KV heads of the layer."""
        return int(self.mu.shape[0])

    @property
    def M(self) -> int:
        """Subspaces per head."""
        return self.spec.n_subspaces(self.D)

    @property
    def head_bytes(self) -> int:
        """Codes of one head of one token, a byte each."""
        return self.spec.head_bytes(self.D)

    @cached_property
    def T_inv(self) -> npt.NDArray[np.float64] | None:
        """f64 ``[n_head_kv, D, D]``: the inverse of the stored (f16) T, rounded to f16; None for the identity.

        Holds infinities where the inverse does not fit f16; who reads a codebook refuses it then.
        """
        return None if self.T is None else to_f16(np.linalg.inv(self.T.astype(np.float64))).astype(np.float64)

    def equals(self, other: Codebook) -> bool:
        """True when both hold the same bits."""

        def same(a: npt.NDArray[np.floating] | None, b: npt.NDArray[np.floating] | None) -> bool:
            return a is b if a is None or b is None else a.tobytes() == b.tobytes()

        return (
            self.spec == other.spec
            and self.mu.shape == other.mu.shape
            and same(self.mu, other.mu)
            and same(self.T, other.T)
            and same(self.centroids, other.centroids)
            and same(self.aniso, other.aniso)
        )


# ---- codes ----


def to_f16(x: npt.ArrayLike) -> npt.NDArray[np.float16]:
    """Any floats -> f16 of the same shape, to nearest even; infinity beyond its range."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16)


def transform(cb: Codebook, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """``y = (x - mu) T``: ``[n, n_head_kv, D]`` -> f64 ``[n, n_head_kv, D]``."""
    y = np.asarray(x, dtype=np.float64) - cb.mu.astype(np.float64)
    return y if cb.T is None else _per_head(y, cb.T.astype(np.float64))


def _per_head(x: npt.NDArray[np.float64], A: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Row vectors ``[n, n_head_kv, D]`` times the matrix of their head ``[n_head_kv, D, D]`` -> ``[n, n_head_kv, D]``."""
    out: npt.NDArray[np.float64] = np.matmul(x.transpose(1, 0, 2), A).transpose(1, 0, 2)
    return out


def distances(cb: Codebook, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Squared distance to every centroid: y f64 ``[n, n_head_kv, D]`` -> f64 ``[n, n_head_kv, M, ksub]``."""
    n = y.shape[0]
    y = y.reshape(n, cb.n_head_kv, cb.M, cb.spec.dsub)
    c = cb.centroids.astype(np.float64)
    d = np.zeros((n, cb.n_head_kv, cb.M, cb.spec.ksub))
    for i in range(cb.spec.dsub):
        d += (y[..., i, None] - c[..., i]) ** 2
    return d


def code_distances(cb: Codebook, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What each code would cost, summed over its subspaces: y f64 ``[n, n_head_kv, D]`` -> f64 ``[n, n_head_kv, head_bytes, ksub]``."""
    d = distances(cb, y)
    out = np.zeros((*d.shape[:2], cb.head_bytes, cb.spec.ksub))
    for m, code in enumerate(cb.spec.code_of_subspace(cb.D)):
        out[:, :, code] += d[:, :, m]
    return out


def encode(cb: Codebook, x: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Rows as the cache would store them -> codes (``encode_y``): ``[n, n_head_kv, D]`` -> u8 ``[n, n_head_kv, head_bytes]``.

    ``x`` is rounded to f16 first. Raises MismatchError when its shape is not that of the codebook.
    """
    x = to_f16(_check_rows(cb, x))
    out = np.empty((x.shape[0], cb.n_head_kv, cb.head_bytes), dtype=np.uint8)
    step = max(1, _CHUNK_ELEMS // (cb.n_head_kv * cb.M * cb.spec.ksub))
    for i in range(0, x.shape[0], step):
        out[i : i + step] = encode_y(cb, transform(cb, x[i : i + step]))
    return out


def encode_y(cb: Codebook, y: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """y f64 ``[n, n_head_kv, D]`` -> codes u8 ``[n, n_head_kv, head_bytes]``.

    The codes that cost least (``strip_costs``) cannot be found one by one, as those of a strip share their error along d. So a
    strip has the nearest codes first, and then those nearest to where that error moves y (``moved``), if it costs less with them.
    """
    codes = nearest(cb, y)
    if cb.aniso is None:
        return codes
    with np.errstate(over="ignore", invalid="ignore"):  # rows with infinities, whose nearest codes stay
        others = nearest(cb, moved(cb, y, codes))
        cheaper = strip_costs(cb, y, others) < strip_costs(cb, y, codes)
    return np.where(cheaper[..., strip_of_code(cb)], others, codes)


def nearest(cb: Codebook, y: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Codes of the least distance, ties to the lowest: y f64 ``[n, n_head_kv, D]`` -> u8 ``[n, n_head_kv, head_bytes]``."""
    # np.argmin returns the first of equal minima, which is the rule for ties.
    return code_distances(cb, y).argmin(axis=-1).astype(np.uint8)


def moved(cb: Codebook, y: npt.NDArray[np.float64], codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """y f64 ``[n, n_head_kv, D]``, moved against what the error of its codes has along d: of the same shape.

    Each strip becomes ``y + w / (1 + w) (e.d) / |d|^2 d``, with w = ANISO_WEIGHT; one whose ``|d|^2`` is 0 or not finite stays.
    """
    if cb.aniso is None:
        return y
    e, d = y - decode_y(cb, codes), cb.aniso * y
    norm = _strip_sums(d * d)
    usable = np.isfinite(norm) & (norm > 0.0)
    step = ANISO_WEIGHT / (1.0 + ANISO_WEIGHT) * _strip_sums(e * d) / np.where(usable, norm, 1.0)
    strip = np.arange(cb.D) // ANISO_STRIP  # of each element
    return np.where(usable[..., strip], y + step[..., strip] * d, y)


def strip_costs(cb: Codebook, y: npt.NDArray[np.float64], codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """What codes of y cost, f64 ``[n, n_head_kv, n_strips]``: ``|e|^2 + ANISO_WEIGHT (e.d)^2 / |d|^2`` of each strip.

    e = y - y^ is the error and d = aniso * y; without aniso, and where d = 0, the cost is ``|e|^2``.
    """
    e = y - decode_y(cb, codes)
    if cb.aniso is None:
        return _strip_sums(e * e)
    d = cb.aniso * y
    norm = _strip_sums(d * d)
    return _strip_sums(e * e) + ANISO_WEIGHT * _strip_sums(e * d) ** 2 / np.where(norm > 0.0, norm, 1.0)


def strip_of_code(cb: Codebook) -> npt.NDArray[np.intp]:
    """Which strip of a head each code belongs to, ``[head_bytes]``. All elements of a code are in one."""
    out = np.empty(cb.head_bytes, dtype=np.intp)
    out[np.repeat(cb.spec.code_of_subspace(cb.D), cb.spec.dsub)] = np.arange(cb.D) // ANISO_STRIP
    return out


def _strip_sums(a: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums over the strips of a head: ``[n, n_head_kv, D]`` -> ``[n, n_head_kv, n_strips]``."""
    out: npt.NDArray[np.float64] = np.add.reduceat(a, np.arange(0, a.shape[-1], ANISO_STRIP), axis=-1)
    return out


def decode_y(cb: Codebook, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Chosen centroids, concatenated: u8 ``[n, n_head_kv, head_bytes]`` -> y^ f64 ``[n, n_head_kv, D]``."""
    idx = _check_codes(cb, codes)[..., cb.spec.code_of_subspace(cb.D)]
    h = np.arange(cb.n_head_kv)[None, :, None]
    m = np.arange(cb.M)[None, None, :]
    return cb.centroids[h, m, idx].astype(np.float64).reshape(codes.shape[0], cb.n_head_kv, cb.D)


def decode(cb: Codebook, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Codes -> rows: u8 ``[n, n_head_kv, head_bytes]`` -> x^ f64 ``[n, n_head_kv, D]``.

    Raises MismatchError when the shape of ``codes`` is not that of the codebook.
    """
    y = decode_y(cb, codes)
    if cb.T_inv is not None:
        y = _per_head(y, cb.T_inv)
    return y + cb.mu.astype(np.float64)


# ---- attention ----


@dataclass(frozen=True, eq=False)
class Coded:
    """One side of a cache that holds codes: ``codes`` u8 ``[n_stream, n_kv, n_head_kv, head_bytes]``."""

    codes: npt.NDArray[np.uint8]
    codebook: Codebook


# A side without codes is a plain array [n_stream, n_kv, n_head_kv, D] of any float type.
Side = Coded | npt.NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Tail:
    """The exact tail: recent tokens, which attention reads as they were instead of from their codes.

    Attributes:
        k, v: f16 ``[n_stream, n_tail, n_head_kv, D]``.
        mask: f16 ``[n_stream, n_q, n_tail]``, as the mask of the cache; -inf excludes a slot, which may then hold anything.
    """

    k: npt.NDArray[np.float16]
    v: npt.NDArray[np.float16]
    mask: npt.NDArray[np.float16]


def alibi_slopes(n_head: int, max_bias: float) -> npt.NDArray[np.float64]:
    """ALiBi slope of every query head, f64 ``[n_head]``; 1 everywhere when ``max_bias`` is 0.

    As ggml computes them (``ggml_compute_forward_flash_attn_ext_f16_one_chunk``): a geometric series over the largest
    power of two not above n_head, then the odd terms of a finer series for the heads that are left.
    """
    if max_bias <= 0.0:
        return np.ones(n_head)
    n_head_log2 = 1 << int(np.floor(np.log2(n_head)))
    m0 = 2.0 ** (-max_bias / n_head_log2)
    m1 = 2.0 ** (-(max_bias / 2.0) / n_head_log2)
    h = np.arange(n_head)
    slopes: npt.NDArray[np.float64] = np.where(h < n_head_log2, m0 ** (h + 1.0), m1 ** (2.0 * (h - n_head_log2) + 1.0))
    return slopes


def attention(
    q: npt.ArrayLike,
    k: Side,
    v: Side,
    *,
    scale: float,
    mask: npt.ArrayLike | None = None,
    tail: Tail | None = None,
    sinks: npt.ArrayLike | None = None,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
) -> npt.NDArray[np.float64]:
    """Attention over a cache whose sides hold codes or plain rows, each on its own; the meaning of ``million_pq_attn``.

    Args:
        q: ``[n_stream, n_head, n_q, D_k]``. Query head h reads KV head ``h // (n_head // n_head_kv)``.
        k, v: ``Coded``, or an array ``[n_stream, n_kv, n_head_kv, D]``.
        scale: the score is ``scale * q.k``.
        mask: ``[n_stream_mask, n_head_mask, n_q, n_kv]``, broadcast over streams and heads by index modulo. -inf
            excludes a cell; any other value, times the head's ALiBi slope, is added to the score.
        tail: more cells; one softmax runs over the cache and the tail. A token in the tail is excluded by ``mask``.
        sinks: ``[n_head]``, a score that takes part in the softmax and has no value.
        max_bias: ALiBi, see ``alibi_slopes``; 0 turns it off.
        logit_softcap: score = cap * tanh(score / cap), before the mask; 0 turns it off.

    Returns:
        f64 ``[n_stream, n_q, n_head, D_v]``. A query whose cells are all excluded gives zeros.

    Raises:
        MismatchError: shapes that do not fit each other.
    """
    q = np.asarray(q, dtype=np.float64)
    n_stream, n_head, n_q, D_k = _shape4(q, "q")
    _, n_kv, n_head_kv, _ = _check_side(k, "k", n_stream, D=D_k)
    D_v = _check_side(v, "v", n_stream, n_kv=n_kv, n_head_kv=n_head_kv)[3]
    if n_head % n_head_kv != 0:
        raise MismatchError(f"n_head {n_head} is not a multiple of n_head_kv {n_head_kv}")
    mask4 = None if mask is None else np.asarray(mask)
    if mask4 is not None and _shape4(mask4, "mask")[2:] != (n_q, n_kv):
        raise MismatchError(f"mask is {list(mask4.shape)}, need [*, *, {n_q}, {n_kv}]")
    if tail is not None:
        check_tail(tail, n_stream, n_q, n_head_kv, D_k, D_v)
    sink = None if sinks is None else np.asarray(sinks, dtype=np.float64)
    if sink is not None and sink.shape != (n_head,):
        raise MismatchError(f"sinks is {list(sink.shape)}, need [{n_head}]")
    slopes = alibi_slopes(n_head, max_bias)

    out = np.zeros((n_stream, n_q, n_head, D_v))
    step = max(1, _CHUNK_ELEMS // max(1, n_kv))
    for s in range(n_stream):
        k_rows, v_rows = _rows(k, s), _rows(v, s)
        if tail is not None:
            k_rows, v_rows = np.concatenate([k_rows, tail.k[s]]), np.concatenate([v_rows, tail.v[s]])
        for h in range(n_head):
            h_kv = h // (n_head // n_head_kv)
            for i in range(0, n_q, step):
                score = scale * (q[s, h, i : i + step] @ k_rows[:, h_kv].T)
                if logit_softcap != 0.0:
                    score = logit_softcap * np.tanh(score / logit_softcap)
                bias = np.zeros((score.shape[0], n_kv))
                if mask4 is not None:
                    bias = mask4[s % mask4.shape[0], h % mask4.shape[1], i : i + step].astype(np.float64)
                if tail is not None:
                    bias = np.concatenate([bias, tail.mask[s, i : i + step]], axis=1)
                if mask4 is not None or tail is not None:
                    # Not by addition alone: an excluded cell may hold anything, NaN included (a cache is not cleared).
                    score = np.where(np.isneginf(bias), -np.inf, score + slopes[h] * bias)
                top = score.max(axis=1, initial=-np.inf if sink is None else sink[h], keepdims=True)
                top = np.where(np.isneginf(top), 0.0, top)  # all excluded: every weight becomes 0, not NaN
                weight = np.exp(score - top)
                total = weight.sum(axis=1, keepdims=True)
                if sink is not None:
                    total += np.exp(sink[h] - top)
                value = np.where((weight > 0.0).any(axis=0)[:, None], v_rows[:, h_kv], 0.0)
                out[s, i : i + step, h] = (weight @ value) / np.where(total == 0.0, 1.0, total)
    return out


def lut_scores(q: npt.ArrayLike, k: Coded) -> npt.NDArray[np.float64]:
    """``q.k`` the way the kernels compute it, for checking: from a lookup table per query, never decoding a row.

    ``q.x^ = sum_m LUT[m][code of m] + q.mu`` with ``LUT[m][c] = (T^-1 q)[m*dsub:(m+1)*dsub] . centroids[m][c]``
    (MILLION, section 3.3, with this project's transform).

    Args:
        q: ``[n_stream, n_head, n_q, D]``.

    Returns:
        f64 ``[n_stream, n_head, n_q, n_kv]``, without scale or mask.
    """
    q = np.asarray(q, dtype=np.float64)
    cb = k.codebook
    n_stream, n_head, n_q, D = _shape4(q, "q")
    _, n_kv, n_head_kv, _ = _check_side(k, "k", n_stream, D=D)
    out = np.zeros((n_stream, n_head, n_q, n_kv))
    centroids = cb.centroids.astype(np.float64)
    for s in range(n_stream):
        idx = k.codes[s][..., cb.spec.code_of_subspace(cb.D)]
        for h in range(n_head):
            h_kv = h // (n_head // n_head_kv)
            for i in range(n_q):
                q_mapped = q[s, h, i] if cb.T_inv is None else cb.T_inv[h_kv] @ q[s, h, i]
                lut = np.einsum("mcd,md->mc", centroids[h_kv], q_mapped.reshape(cb.M, cb.spec.dsub))
                out[s, h, i] = lut[np.arange(cb.M), idx[:, h_kv]].sum(axis=-1) + q[s, h, i] @ cb.mu[h_kv].astype(
                    np.float64
                )
    return out


# ---- checks ----


def _check_rows(cb: Codebook, x: npt.ArrayLike) -> npt.NDArray[np.floating]:
    x = np.asarray(x)
    if x.ndim != 3 or x.shape[1:] != (cb.n_head_kv, cb.D):
        raise MismatchError(f"rows are {list(x.shape)}, need [n, {cb.n_head_kv}, {cb.D}]")
    return x


def _check_codes(cb: Codebook, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if codes.dtype != np.uint8 or codes.ndim != 3 or codes.shape[1:] != (cb.n_head_kv, cb.head_bytes):
        raise MismatchError(
            f"codes are {codes.dtype} {list(codes.shape)}, need uint8 [n, {cb.n_head_kv}, {cb.head_bytes}]"
        )
    return codes


def _shape4(a: npt.NDArray[np.generic], name: str) -> tuple[int, int, int, int]:
    if a.ndim != 4:
        raise MismatchError(f"{name} has {a.ndim} dimensions, need 4")
    n0, n1, n2, n3 = a.shape
    return n0, n1, n2, n3


def _check_side(
    side: Side, name: str, n_stream: int, *, D: int | None = None, n_kv: int | None = None, n_head_kv: int | None = None
) -> tuple[int, int, int, int]:
    """Shape ``(n_stream, n_kv, n_head_kv, D)`` of a side, with every given number required to match."""
    if isinstance(side, Coded):
        cb = side.codebook
        found = _shape4(side.codes, name)
        if side.codes.dtype != np.uint8 or found[2:] != (cb.n_head_kv, cb.head_bytes):
            raise MismatchError(
                f"{name}: codes are {side.codes.dtype} {list(found)}, "
                f"need uint8 [*, *, {cb.n_head_kv}, {cb.head_bytes}]"
            )
        found = (*found[:3], cb.D)
    else:
        found = _shape4(side, name)
    for what, have, want in zip(
        ("n_stream", "n_kv", "n_head_kv", "D"), found, (n_stream, n_kv, n_head_kv, D), strict=True
    ):
        if want is not None and have != want:
            raise MismatchError(f"{name}: found {what} {have}, need {want}")
    return found


def check_tail(tail: Tail, n_stream: int, n_q: int, n_head_kv: int, D_k: int, D_v: int) -> None:
    """Raises MismatchError when a tail does not fit the cache and the queries."""
    n_tail = tail.mask.shape[-1] if tail.mask.ndim else 0
    for name, a, want in (
        ("k", tail.k, (n_stream, n_tail, n_head_kv, D_k)),
        ("v", tail.v, (n_stream, n_tail, n_head_kv, D_v)),
        ("mask", tail.mask, (n_stream, n_q, n_tail)),
    ):
        if a.shape != want or a.dtype != np.float16:
            raise MismatchError(f"tail {name} is {a.dtype} {list(a.shape)}, need float16 {list(want)}")


def _rows(side: Side, stream: int) -> npt.NDArray[np.float64]:
    """Rows of one stream, f64 ``[n_kv, n_head_kv, D]``."""
    if isinstance(side, Coded):
        return decode(side.codebook, side.codes[stream])
    return np.asarray(side[stream], dtype=np.float64)
