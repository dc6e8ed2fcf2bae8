"""The C functions that our libllama adds to llama.h, with their ctypes signatures (cuda/overlay/src/llama-million.h)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

from . import _load, native_log

CAPTURE_K, CAPTURE_V, CAPTURE_Q = 0, 1, 2  # enum million_capture_kind

_int32_p = ctypes.POINTER(ctypes.c_int32)
_uint64_p = ctypes.POINTER(ctypes.c_uint64)
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "million_capture_init": ([ctypes.c_uint32, ctypes.c_uint64], ctypes.c_void_p),
    "million_capture_n_layer": ([ctypes.c_void_p], ctypes.c_int32),
    "million_capture_n_head": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int32),
    "million_capture_head_dim": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int32),
    "million_capture_n_seen": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int64),
    "million_capture_n_rows": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int], ctypes.c_int64),
    "million_capture_rows": (
        [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_int64],
        ctypes.c_int64,
    ),
    "million_capture_free": ([ctypes.c_void_p], None),
    "million_model_check": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_char_p),
    "million_cache_bytes": ([ctypes.c_void_p, _int32_p, _int32_p, _uint64_p, _uint64_p], ctypes.c_uint64),
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


@dataclass(frozen=True)
class CacheBytes:
    """ggml types and bytes of a context's KV cache. All zero for a context without one."""

    type_k: int
    type_v: int
    bytes_k: int
    bytes_v: int
    bytes_total: int


def cache_bytes(ctx: Any) -> CacheBytes:
    """Types and bytes of the cache of ``ctx`` (a ``llama_context *``)."""
    type_k, type_v = ctypes.c_int32(), ctypes.c_int32()
    bytes_k, bytes_v = ctypes.c_uint64(), ctypes.c_uint64()
    total = lib().million_cache_bytes(
        ctx, ctypes.byref(type_k), ctypes.byref(type_v), ctypes.byref(bytes_k), ctypes.byref(bytes_v)
    )
    return CacheBytes(type_k.value, type_v.value, bytes_k.value, bytes_v.value, total)
