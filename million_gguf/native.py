"""The C++ CPU kernels from Python: ctypes over ``libmillion-pq``, NumPy arrays in and out.

The structs mirror ``cuda/pq/pq-params.h``. Native code trusts its caller, so every wrapper checks shapes, dtypes, strides
and indices first and raises ``MismatchError``; a library that is missing or refuses raises ``NativeError``.

The library is looked for at ``$MILLION_PQ_LIB``, else where ``paths.library`` finds it, else in ``million_gguf/lib/``.
"""

from __future__ import annotations

import ctypes as C
import functools
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import container, paths, pq_ref
from .errors import MismatchError, NativeError
from .pq_ref import Codebook, Coded, Side, Tail

_LIB_ENV = "MILLION_PQ_LIB"
_PQ_TYPE_COUNT = 3  # "no codes" in pq_attn_side.type
_TO_FLOAT = {np.dtype(np.float16): "million_pq_f16_to_float", np.dtype(np.float32): "million_pq_f32_to_float"}
_ALIGN = 64  # parts of a head block lie at multiples of this (pq-layout.h)
SIMD_NAMES = ("scalar", "avx2", "avx512")


# ---- structs: field for field as in pq-params.h ----


class _EncodeParams(C.Structure):
    _fields_ = [
        ("type", C.c_int),
        ("D", C.c_int32),
        ("n_head_kv", C.c_int32),
        ("n_rows", C.c_int64),
        ("codebook", C.c_void_p),
        ("has_transform", C.c_int32),
        ("x", C.c_void_p),
        ("x_f16", C.c_int32),
        ("x_row_stride", C.c_size_t),
        ("x_head_stride", C.c_size_t),
        ("codes", C.c_void_p),
        ("codes_row_stride", C.c_size_t),
        ("row_idx", C.c_void_p),
        ("tail", C.c_void_p),
        ("tail_row_stride", C.c_size_t),
        ("tail_idx", C.c_void_p),
    ]


class _DecodeParams(C.Structure):
    _fields_ = [
        ("type", C.c_int),
        ("D", C.c_int32),
        ("n_head_kv", C.c_int32),
        ("n_rows", C.c_int64),
        ("codebook", C.c_void_p),
        ("has_transform", C.c_int32),
        ("codes", C.c_void_p),
        ("codes_row_stride", C.c_size_t),
        ("x", C.c_void_p),
        ("x_row_stride", C.c_size_t),
        ("x_head_stride", C.c_size_t),
    ]


class _AttnSide(C.Structure):
    _fields_ = [
        ("type", C.c_int),
        ("D", C.c_int32),
        ("codebook", C.c_void_p),
        ("has_transform", C.c_int32),
        ("data", C.c_void_p),
        ("row_stride", C.c_size_t),
        ("head_stride", C.c_size_t),
        ("stream_stride", C.c_size_t),
        ("to_float", C.c_void_p),
        ("tables", C.c_void_p),
    ]


class _AttnTail(C.Structure):
    _fields_ = [
        ("n", C.c_int64),
        ("k", C.c_void_p),
        ("k_row_stride", C.c_size_t),
        ("k_head_stride", C.c_size_t),
        ("k_stream_stride", C.c_size_t),
        ("v", C.c_void_p),
        ("v_row_stride", C.c_size_t),
        ("v_head_stride", C.c_size_t),
        ("v_stream_stride", C.c_size_t),
        ("mask", C.c_void_p),
        ("mask_token_stride", C.c_size_t),
        ("mask_stream_stride", C.c_size_t),
    ]


class _AttnParams(C.Structure):
    _fields_ = [
        ("n_head", C.c_int32),
        ("n_head_kv", C.c_int32),
        ("n_stream", C.c_int32),
        ("n_q", C.c_int64),
        ("n_kv", C.c_int64),
        ("k", _AttnSide),
        ("v", _AttnSide),
        ("q", C.c_void_p),
        ("q_token_stride", C.c_size_t),
        ("q_head_stride", C.c_size_t),
        ("q_stream_stride", C.c_size_t),
        ("mask", C.c_void_p),
        ("mask_token_stride", C.c_size_t),
        ("mask_head_stride", C.c_size_t),
        ("mask_stream_stride", C.c_size_t),
        ("n_head_mask", C.c_int32),
        ("n_stream_mask", C.c_int32),
        ("tail", _AttnTail),
        ("sinks", C.c_void_p),
        ("scale", C.c_float),
        ("max_bias", C.c_float),
        ("logit_softcap", C.c_float),
        ("dst", C.c_void_p),
        ("dst_head_stride", C.c_size_t),
        ("dst_token_stride", C.c_size_t),
        ("dst_stream_stride", C.c_size_t),
    ]


# ---- library ----


def library_path() -> Path:
    """Where the library is expected to be."""
    chosen = os.environ.get(_LIB_ENV)
    if chosen:
        return Path(chosen)
    try:
        return paths.library("million-pq")
    except NativeError:
        # paths wants all of the package's libraries; this one also works alone, built from cuda/ in seconds.
        return Path(__file__).parent / "lib" / paths.library_file_name("million-pq")


@functools.cache
def load() -> C.CDLL:
    """The library, loaded once. Raises NativeError when it is missing or is not the one that this file mirrors."""
    path = library_path()
    if not path.is_file():
        raise NativeError(f"found no file {path}, need the native library: build it, or set {_LIB_ENV} to where it is")
    try:
        lib = C.CDLL(str(path))
        for name, res, args in (
            ("million_pq_codebook_build", C.c_int,
             [C.c_int, C.c_void_p, C.c_size_t, C.c_int, C.c_int, C.c_void_p, C.c_size_t, C.c_char_p, C.c_size_t]),
            ("million_pq_codebook_bytes", C.c_size_t, [C.c_int] * 4),
            ("million_pq_encode", None, [C.POINTER(_EncodeParams), C.c_int]),
            ("million_pq_decode", None, [C.POINTER(_DecodeParams), C.c_int]),
            ("million_pq_attn", None, [C.POINTER(_AttnParams), C.c_int]),
            ("million_pq_attn_params_bytes", C.c_size_t, []),
            ("million_pq_kmeans_assign_many", C.c_int,
             [C.c_void_p, C.c_int64, C.c_int64, C.c_int32, C.c_void_p, C.c_int32] + [C.c_void_p] * 5 + [C.c_int]),
            ("pq_cpu_simd_set", C.c_int, [C.c_char_p]),
            ("pq_cpu_simd_name", C.c_char_p, []),
            ("million_pq_f16_to_float", None, [C.c_void_p, C.c_void_p, C.c_int64]),
            ("million_pq_f32_to_float", None, [C.c_void_p, C.c_void_p, C.c_int64]),
        ):  # fmt: skip
            f = getattr(lib, name)
            f.restype, f.argtypes = res, args
    except (OSError, AttributeError) as e:
        raise NativeError(f"{path}: cannot load the native library ({e}): build it again") from e
    if (found := lib.million_pq_attn_params_bytes()) != C.sizeof(_AttnParams):
        raise NativeError(
            f"{path}: found parameters of {found} bytes, needs {C.sizeof(_AttnParams)}: the library is of another version, "
            "build it again"
        )
    return lib


def unavailable() -> str | None:
    """None when the library can be used, else why not."""
    try:
        load()
    except NativeError as e:
        return str(e)
    return None


def simd_name() -> str:
    """Instruction set in use: ``scalar``, ``avx2`` or ``avx512``."""
    name: bytes = load().pq_cpu_simd_name()
    return name.decode()


def simd_set(name: str) -> bool:
    """Forces an instruction set for the whole process, or ``auto``. False when this processor or build lacks it."""
    return bool(load().pq_cpu_simd_set(name.encode()) == 0)


def thread_count(n_threads: int) -> int:
    """``n_threads``, or the number of cores that this process may use when it is 0."""
    return (
        n_threads
        if n_threads > 0
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def _aligned(n: int) -> npt.NDArray[np.uint8]:
    raw = np.zeros(n + _ALIGN, dtype=np.uint8)
    skip = -raw.ctypes.data % _ALIGN
    return raw[skip : skip + n]


# Run-time blocks are built once per codebook and go with it.
_built: weakref.WeakKeyDictionary[Codebook, npt.NDArray[np.uint8]] = weakref.WeakKeyDictionary()


def build(cb: Codebook) -> npt.NDArray[np.uint8]:
    """Run-time head blocks of a codebook (``pq-layout.h``), u8 ``[n_head_kv * head_bytes]``, aligned to 64 bytes.

    Raises MismatchError when the codebook holds values that no reader takes, NativeError when the library refuses it.
    """
    if cb not in _built:
        _built[cb] = build_blob(container.codebook_to_blob(cb), cb)
    return _built[cb]


def build_blob(blob: bytes, like: Codebook) -> npt.NDArray[np.uint8]:
    """As ``build``, from blob bytes that are to hold a codebook shaped as ``like``; the native parser checks them."""
    lib = load()
    n = lib.million_pq_codebook_bytes(like.spec.index, like.D, like.n_head_kv, int(like.T is not None))
    dst = _aligned(n)
    err = C.create_string_buffer(512)
    src = np.frombuffer(blob, dtype=np.uint8)
    rc = lib.million_pq_codebook_build(
        like.spec.index, src.ctypes.data, len(blob), like.D, like.n_head_kv, dst.ctypes.data, n, err, len(err)
    )
    if rc != 0:
        raise NativeError(err.value.decode("utf-8", "replace") or f"million_pq_codebook_build failed with {rc}")
    return dst


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise MismatchError(what)


def _row_strides(a: npt.NDArray[Any], name: str) -> None:
    _need(a.strides[-1] == a.itemsize or a.shape[-1] == 1, f"{name}: the last axis is not contiguous")
    _need(all(s >= 0 for s in a.strides), f"{name}: has a negative stride")


# ---- kernels ----


def encode(
    cb: Codebook,
    x: npt.NDArray[np.floating],
    *,
    row_idx: npt.NDArray[np.int64] | None = None,
    out: npt.NDArray[np.uint8] | None = None,
    tail: npt.NDArray[np.float16] | None = None,
    tail_idx: npt.NDArray[np.int64] | None = None,
    n_threads: int = 0,
) -> npt.NDArray[np.uint8]:
    """Rows -> codes, as ``pq_ref.encode`` defines.

    Args:
        x: f32 or f16 ``[n_rows, n_head_kv, D]``; rows and heads may be strided.
        row_idx: i64 ``[n_rows]``, the cell of each row in ``out``; None: 0, 1, 2, ... Cells must be distinct.
        out: u8 ``[n_cells, n_head_kv, head_bytes]``, written in place; None: a new array of n_rows cells.
        tail: f16 ``[n_slots, n_head_kv, D]``, the exact tail, written in place: the rows that ``tail_idx`` names.
        tail_idx: i64 ``[n_rows]``, the slot of each row in ``tail``; negative: not kept. Slots must be distinct.
        n_threads: 0: all cores.

    Returns:
        ``out``.

    Raises:
        MismatchError: arguments that do not fit each other. NativeError: no library.
    """
    _need(
        x.ndim == 3 and x.shape[1:] == (cb.n_head_kv, cb.D) and x.dtype in (np.float32, np.float16),
        f"x is {x.dtype} {list(x.shape)}, need float32 or float16 [n_rows, {cb.n_head_kv}, {cb.D}]",
    )
    _row_strides(x, "x")
    n_rows = x.shape[0]
    if out is None:
        _need(row_idx is None, "found row_idx without out, need the cells that it points into")
        out = np.zeros((n_rows, cb.n_head_kv, cb.head_bytes), dtype=np.uint8)
    _need(
        out.dtype == np.uint8
        and out.ndim == 3
        and out.shape[1:] == (cb.n_head_kv, cb.head_bytes)
        and out.flags.writeable,
        f"out is {out.dtype} {list(out.shape)}, need writeable uint8 [n_cells, {cb.n_head_kv}, {cb.head_bytes}]",
    )
    _row_strides(out, "out")
    _need(cb.n_head_kv == 1 or out.strides[1] == cb.head_bytes, "out: the heads of a cell are not contiguous")
    if row_idx is None:
        _need(n_rows <= out.shape[0], f"out has {out.shape[0]} cells, need {n_rows}")
    else:
        _need(
            row_idx.dtype == np.int64 and row_idx.shape == (n_rows,) and row_idx.flags.c_contiguous,
            f"row_idx is {row_idx.dtype} {list(row_idx.shape)}, need contiguous int64 [{n_rows}]",
        )
        _need(
            n_rows == 0 or (row_idx.min() >= 0 and row_idx.max() < out.shape[0]),
            f"row_idx points outside of the {out.shape[0]} cells of out",
        )
        _need(len(np.unique(row_idx)) == n_rows, "row_idx names a cell twice")
    _need((tail is None) == (tail_idx is None), "found one of tail and tail_idx, need both or neither")
    if tail is not None and tail_idx is not None:
        _need(
            tail.dtype == np.float16
            and tail.ndim == 3
            and tail.shape[1:] == (cb.n_head_kv, cb.D)
            and tail.flags.writeable,
            f"tail is {tail.dtype} {list(tail.shape)}, need writeable float16 [n_slots, {cb.n_head_kv}, {cb.D}]",
        )
        _row_strides(tail, "tail")
        _need(cb.n_head_kv == 1 or tail.strides[1] == 2 * cb.D, "tail: the heads of a slot are not contiguous")
        _need(
            tail_idx.dtype == np.int64 and tail_idx.shape == (n_rows,) and tail_idx.flags.c_contiguous,
            f"tail_idx is {tail_idx.dtype} {list(tail_idx.shape)}, need contiguous int64 [{n_rows}]",
        )
        kept = tail_idx[tail_idx >= 0]
        _need(
            kept.size == 0 or kept.max() < tail.shape[0],
            f"tail_idx points outside of the {tail.shape[0]} slots of tail",
        )
        _need(len(np.unique(kept)) == kept.size, "tail_idx names a slot twice")
    if n_rows == 0:
        return out
    block = build(cb)
    p = _EncodeParams(
        type=cb.spec.index, D=cb.D, n_head_kv=cb.n_head_kv, n_rows=n_rows,
        codebook=block.ctypes.data, has_transform=int(cb.T is not None),
        x=x.ctypes.data, x_f16=int(x.dtype == np.float16), x_row_stride=x.strides[0], x_head_stride=x.strides[1],
        codes=out.ctypes.data, codes_row_stride=out.strides[0],
        row_idx=None if row_idx is None else row_idx.ctypes.data,
        tail=None if tail is None else tail.ctypes.data, tail_row_stride=0 if tail is None else tail.strides[0],
        tail_idx=None if tail_idx is None else tail_idx.ctypes.data,
    )  # fmt: skip
    load().million_pq_encode(C.byref(p), thread_count(n_threads))
    return out


def decode(cb: Codebook, codes: npt.NDArray[np.uint8], *, n_threads: int = 0) -> npt.NDArray[np.float32]:
    """Codes -> rows, as ``pq_ref.decode`` defines.

    u8 ``[n_rows, n_head_kv, head_bytes]`` -> f32 ``[n_rows, n_head_kv, D]``.

    Raises MismatchError for a wrong shape, dtype or stride; NativeError without a library.
    """
    _need(
        codes.dtype == np.uint8 and codes.ndim == 3 and codes.shape[1:] == (cb.n_head_kv, cb.head_bytes),
        f"codes are {codes.dtype} {list(codes.shape)}, need uint8 [n_rows, {cb.n_head_kv}, {cb.head_bytes}]",
    )
    _row_strides(codes, "codes")
    _need(cb.n_head_kv == 1 or codes.strides[1] == cb.head_bytes, "codes: the heads of a row are not contiguous")
    x = np.zeros((codes.shape[0], cb.n_head_kv, cb.D), dtype=np.float32)
    if codes.shape[0] == 0:
        return x
    block = build(cb)
    p = _DecodeParams(
        type=cb.spec.index, D=cb.D, n_head_kv=cb.n_head_kv, n_rows=codes.shape[0],
        codebook=block.ctypes.data, has_transform=int(cb.T is not None),
        codes=codes.ctypes.data, codes_row_stride=codes.strides[0],
        x=x.ctypes.data, x_row_stride=x.strides[0], x_head_stride=x.strides[1],
    )  # fmt: skip
    load().million_pq_decode(C.byref(p), thread_count(n_threads))
    return x


def attention(
    q: npt.NDArray[np.float32],
    k: Side,
    v: Side,
    *,
    scale: float,
    mask: npt.NDArray[np.float16] | None = None,
    tail: Tail | None = None,
    sinks: npt.NDArray[np.float32] | None = None,
    max_bias: float = 0.0,
    logit_softcap: float = 0.0,
    n_threads: int = 0,
) -> npt.NDArray[np.float32]:
    """Attention over a PQ cache; arguments, shapes and meaning are those of ``pq_ref.attention``.

    q and sinks are f32, mask is f16, a side without codes is f16 or f32. At least one side holds codes.

    Returns:
        f32 ``[n_stream, n_q, n_head, D_v]``.

    Raises:
        MismatchError: arguments that do not fit each other. NativeError: no library.
    """
    _need(q.dtype == np.float32 and q.ndim == 4, f"q is {q.dtype} with {q.ndim} dimensions, need float32 with 4")
    _row_strides(q, "q")
    n_stream, n_head, n_q, D_k = q.shape
    _, n_kv, n_head_kv, _ = pq_ref._check_side(k, "k", n_stream, D=D_k)
    D_v = pq_ref._check_side(v, "v", n_stream, n_kv=n_kv, n_head_kv=n_head_kv)[3]
    _need(isinstance(k, Coded) or isinstance(v, Coded), "found codes in neither K nor V, need them in one at least")
    _need(n_head_kv > 0 and n_head % n_head_kv == 0, f"n_head {n_head} is not a multiple of n_head_kv {n_head_kv}")
    _need(n_kv > 0, "found an empty cache, need at least one cell")
    for name, side in (("k", k), ("v", v)):
        a = side.codes if isinstance(side, Coded) else side
        _need(isinstance(side, Coded) or a.dtype in _TO_FLOAT, f"{name} rows are {a.dtype}, need float16 or float32")
        if not isinstance(side, Coded):
            _need(0 < a.shape[3] <= 256, f"{name}: found head size {a.shape[3]}, need 1 to 256")
        _row_strides(a, name)
    if mask is not None:
        _need(
            mask.dtype == np.float16
            and mask.ndim == 4
            and mask.shape[2:] == (n_q, n_kv)
            and mask.shape[0] * mask.shape[1] > 0,
            f"mask is {mask.dtype} {list(mask.shape)}, need float16 [*, *, {n_q}, {n_kv}]",
        )
        _row_strides(mask, "mask")
    if tail is not None:
        pq_ref.check_tail(tail, n_stream, n_q, n_head_kv, D_k, D_v)
        for name, a in (("k", tail.k), ("v", tail.v), ("mask", tail.mask)):
            _row_strides(a, f"tail {name}")
    if sinks is not None:
        _need(
            sinks.dtype == np.float32 and sinks.shape == (n_head,) and sinks.flags.c_contiguous,
            f"sinks is {sinks.dtype} {list(sinks.shape)}, need contiguous float32 [{n_head}]",
        )
    out = np.zeros((n_stream, n_q, n_head, D_v), dtype=np.float32)
    if out.size == 0:
        return out
    lib = load()

    def native_side(side: Side) -> _AttnSide:
        a = side.codes if isinstance(side, Coded) else side
        cb = side.codebook if isinstance(side, Coded) else None
        return _AttnSide(
            type=_PQ_TYPE_COUNT if cb is None else cb.spec.index,
            D=a.shape[3] if cb is None else cb.D,
            codebook=None if cb is None else build(cb).ctypes.data,
            has_transform=int(cb is not None and cb.T is not None),
            data=a.ctypes.data, row_stride=a.strides[1], head_stride=a.strides[2], stream_stride=a.strides[0],
            to_float=C.cast(getattr(lib, _TO_FLOAT[a.dtype]), C.c_void_p) if cb is None else None,
        )  # fmt: skip

    p = _AttnParams(
        n_head=n_head, n_head_kv=n_head_kv, n_stream=n_stream, n_q=n_q, n_kv=n_kv, k=native_side(k), v=native_side(v),
        q=q.ctypes.data, q_token_stride=q.strides[2], q_head_stride=q.strides[1], q_stream_stride=q.strides[0],
        sinks=None if sinks is None else sinks.ctypes.data,
        scale=scale, max_bias=max_bias, logit_softcap=logit_softcap,
        dst=out.ctypes.data,
        dst_head_stride=out.strides[2], dst_token_stride=out.strides[1], dst_stream_stride=out.strides[0],
    )  # fmt: skip
    if mask is not None:
        p.mask = mask.ctypes.data
        p.mask_stream_stride, p.mask_head_stride, p.mask_token_stride = mask.strides[:3]
        p.n_stream_mask, p.n_head_mask = mask.shape[:2]
    if tail is not None:
        p.tail = _AttnTail(
            n=tail.mask.shape[2],
            k=tail.k.ctypes.data, k_row_stride=tail.k.strides[1], k_head_stride=tail.k.strides[2], k_stream_stride=tail.k.strides[0],
            v=tail.v.ctypes.data, v_row_stride=tail.v.strides[1], v_head_stride=tail.v.strides[2], v_stream_stride=tail.v.strides[0],
            mask=tail.mask.ctypes.data, mask_token_stride=tail.mask.strides[1], mask_stream_stride=tail.mask.strides[0],
        )  # fmt: skip
    lib.million_pq_attn(C.byref(p), thread_count(n_threads))
    return out


def kmeans_assign(
    x: npt.NDArray[np.float32],
    centroids: npt.NDArray[np.float32],
    *,
    codes: npt.NDArray[np.uint8] | None = None,
    dists: npt.NDArray[np.float32] | None = None,
    n_threads: int = 0,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """One assignment pass of Lloyd's algorithm for many problems at once; ties go to the lowest centroid.

    Args:
        x: f32 ``[n_problems, n, dsub]``, contiguous; dsub is 2 or 4.
        centroids: f32 ``[n_problems, ksub, dsub]``, contiguous; ksub is at most 256.
        codes: u8 ``[n_problems, n]``, contiguous, filled with the index of the nearest centroid; None: not wanted.
        dists: f32 ``[n_problems, n]``, contiguous, filled with the squared distance to it; None: not wanted.

    Returns:
        of the points of each centroid, sums f64 ``[n_problems, ksub, dsub]``, counts i64 ``[n_problems, ksub]``, and the sums
        of their squared distances, costs f64 ``[n_problems, ksub]``.

    Raises:
        MismatchError: arguments that do not fit each other. NativeError: no library.
    """
    _need(
        x.ndim == 3 and x.dtype == np.float32 and x.flags.c_contiguous and x.shape[2] in (2, 4),
        f"x is {x.dtype} {list(x.shape)}, need contiguous float32 [n_problems, n, 2 or 4]",
    )
    P, n, dsub = x.shape
    _need(
        centroids.ndim == 3 and centroids.dtype == np.float32 and centroids.flags.c_contiguous
        and centroids.shape[::2] == (P, dsub) and 0 < centroids.shape[1] <= 256,
        f"centroids are {centroids.dtype} {list(centroids.shape)}, need contiguous float32 [{P}, 1..256, {dsub}]",
    )  # fmt: skip
    for name, out, dtype in (("codes", codes, np.uint8), ("dists", dists, np.float32)):
        _need(
            out is None
            or (out.dtype == dtype and out.shape == (P, n) and out.flags.c_contiguous and out.flags.writeable),
            f"{name} must be contiguous writeable {np.dtype(dtype)} [{P}, {n}]",
        )
    ksub = centroids.shape[1]
    sums = np.zeros((P, ksub, dsub), dtype=np.float64)
    counts = np.zeros((P, ksub), dtype=np.int64)
    costs = np.zeros((P, ksub), dtype=np.float64)
    if P > 0 and n > 0:
        load().million_pq_kmeans_assign_many(
            x.ctypes.data, P, n, dsub, centroids.ctypes.data, ksub, None if codes is None else codes.ctypes.data,
            None if dists is None else dists.ctypes.data, sums.ctypes.data, counts.ctypes.data, costs.ctypes.data,
            thread_count(n_threads),
        )  # fmt: skip
    return sums, counts, costs
