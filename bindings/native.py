"""The C functions that our libllama adds to llama.h, with their ctypes signatures (cuda/overlay/llama/llama-million.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from . import _load, native_log

CAPTURE_K, CAPTURE_V, CAPTURE_Q = 0, 1, 2  # enum million_capture_kind


class CacheInfo(ctypes.Structure):
    """``struct million_cache_info``: types and bytes of a context's KV cache. Types are -1 for a context without one."""

    type_k: int
    type_v: int
    bytes_k: int
    bytes_v: int
    bytes_f16: int
    bytes_tail: int
    bytes_codebooks: int
    n_tail: int
    n_slots: int
    _fields_ = [
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("bytes_k", ctypes.c_uint64),
        ("bytes_v", ctypes.c_uint64),
        ("bytes_f16", ctypes.c_uint64),
        ("bytes_tail", ctypes.c_uint64),
        ("bytes_codebooks", ctypes.c_uint64),
        ("n_tail", ctypes.c_uint32),
        ("n_slots", ctypes.c_uint32),
    ]


_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "million_capture_init": ([ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32], ctypes.c_void_p),
    "million_capture_n_layer": ([ctypes.c_void_p], ctypes.c_int32),
    "million_capture_n_head": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int32),
    "million_capture_head_dim": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int32),
    "million_capture_n_seen": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int64),
    "million_capture_n_rows": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int64),
    "million_capture_rows": (
        [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_int64],
        ctypes.c_int64,
    ),
    "million_capture_weights": (
        [ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_float), ctypes.c_int64],
        ctypes.c_int64,
    ),
    "million_capture_matches": (
        [ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_float), ctypes.c_int64],
        ctypes.c_int64,
    ),
    "million_capture_free": ([ctypes.c_void_p], None),
    "million_model_check": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_char_p),
    "million_get_cache_info": ([ctypes.c_void_p, ctypes.POINTER(CacheInfo)], None),
    "million_set_kv_tail": ([ctypes.c_int32], ctypes.c_int32),
}


@cache
def llama_cpp() -> Any:
    """The low-level module ``llama_cpp.llama_cpp`` on our libraries. Raises NativeError when they cannot be loaded."""
    package = _load.load()
    native_log.install(package)
    low_level = package.llama_cpp
    for name, (argtypes, restype) in _SIGNATURES.items():
        function = getattr(low_level._lib, name)
        function.argtypes = argtypes
        function.restype = restype
    return low_level


def lib() -> Any:
    """Our libllama as a ctypes library, with the signatures of its ``million_*`` functions set."""
    return llama_cpp()._lib


def model_check(model: Any, type_k: int, type_v: int) -> str | None:
    """Why ``model`` (a ``llama_model *``) cannot have a cache of these ggml types; None when it can."""
    reason = lib().million_model_check(model, type_k, type_v)
    return None if reason is None else reason.decode("utf-8", "replace")


def model_metadata(model: Any, key: str) -> str | None:
    """One scalar of the model's GGUF metadata as text; None when it is absent. Arrays are not to be had this way."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp().llama_model_meta_val_str(model, key.encode("utf-8"), buffer, size)
        if n < 0:
            return None
        if n < size:
            return buffer.value.decode("utf-8", "replace")
        size = n + 1


def cache_info(ctx: Any) -> CacheInfo:
    """Types and bytes of the cache of ``ctx`` (a ``llama_context *``)."""
    info = CacheInfo()
    lib().million_get_cache_info(ctx, ctypes.byref(info))
    return info


@contextmanager
def kv_tail(n_tokens: int | None) -> Iterator[None]:
    """Contexts that this thread makes inside have an exact tail of ``n_tokens`` per sequence; None: the default."""
    before = lib().million_set_kv_tail(-1 if n_tokens is None else n_tokens)
    try:
        yield
    finally:
        lib().million_set_kv_tail(before)
