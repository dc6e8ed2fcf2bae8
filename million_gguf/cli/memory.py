"""What a model and its KV cache take, asked of the native library, and what this machine has."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..bindings import native, native_log
from ..bindings.cache_types import CacheType
from ..container import GGUFHeader, model_shape
from ..converters.capture import available_memory_bytes, default_threads
from ..errors import InputError, MismatchError, NativeError

_CTX_STEP = 256  # llama.cpp rounds a context up to this many cells
_GPU = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU in ggml-backend.h


@dataclass(frozen=True)
class CacheCost:
    """Memory of a KV cache.

    Attributes:
        bytes_per_token: of one more token of context.
        bytes_fixed: beside that: the exact tail, codebooks, sliding-window layers, whatever does not grow with the context.
        bits_per_element: of what grows.
    """

    bytes_per_token: float
    bytes_fixed: float
    bits_per_element: float

    def bytes(self, n_ctx: int) -> int:
        return int(self.bytes_fixed + self.bytes_per_token * n_ctx)

    def context(self, bytes_free: float, work_per_token: float = 0.0) -> int:
        """The longest context that fits, rounded down as llama.cpp rounds; 0 when none does.

        Args:
            work_per_token: bytes beside the cache that one more token of context takes.
        """
        if self.bytes_per_token <= 0:
            return 0
        n = int((bytes_free - self.bytes_fixed) / (self.bytes_per_token + work_per_token))
        return max(0, n // _CTX_STEP * _CTX_STEP)


class Model:
    """A model opened to ask it things; nothing is computed. Use ``open_model``."""

    def __init__(self, path: Path, pointer: Any) -> None:
        self._low = native.llama_cpp()
        self._pointer = pointer
        self.path = path

    @property
    def weight_bytes(self) -> int:
        return int(self._low.llama_model_size(self._pointer))

    @property
    def n_ctx_train(self) -> int:
        """The context that the model was trained with."""
        return int(self._low.llama_model_n_ctx_train(self._pointer))

    @cached_property
    def n_vocab(self) -> int:
        return int(self._low.llama_vocab_n_tokens(self._low.llama_model_get_vocab(self._pointer)))

    @cached_property
    def f16_layer_bytes(self) -> int:
        """Bytes per token of the K and V rows of the largest layer, in f16."""
        with GGUFHeader(self.path) as header:
            shape = model_shape(header)
        return max(2 * n * (k + v) for n, k, v in zip(shape.n_head_kv, shape.D_k, shape.D_v, strict=True))

    @property
    def name(self) -> str:
        return native.model_metadata(self._pointer, "general.name") or self.path.stem

    def count_tokens(self, text: bytes) -> int:
        """Tokens of a text, as llama-perplexity counts them."""
        vocab = self._low.llama_model_get_vocab(self._pointer)
        n = int(self._low.llama_tokenize(vocab, text, len(text), None, 0, True, False))
        return -n if n < 0 else n

    def check_types(self, k: CacheType, v: CacheType) -> None:
        """Raises MismatchError when the model cannot have such a cache."""
        reason = native.model_check(self._pointer, k.ggml_type, v.ggml_type)
        if reason is not None:
            raise MismatchError(f"{self.path}: {reason}")

    def cache_cost(self, k: CacheType, v: CacheType, kv_tail: int | None = None) -> CacheCost:
        """What a cache of these types takes, found by making two small ones.

        Raises MismatchError when the model cannot have it, NativeError when llama.cpp could not make it.
        """
        self.check_types(k, v)
        with GGUFHeader(self.path) as header:
            window = header.get(f"{header.get('general.architecture')}.attention.sliding_window", 0)
        n_ubatch = 128
        # Past the window only the other layers grow.
        beyond = int(window) + n_ubatch if isinstance(window, int) else 0
        small = max(_CTX_STEP, -(-beyond // _CTX_STEP) * _CTX_STEP)
        a, b = (self._cache_info(k, v, n, n_ubatch, kv_tail) for n in (small, small + _CTX_STEP))
        growth = b.bytes_k + b.bytes_v - a.bytes_k - a.bytes_v
        fixed = a.bytes_k + a.bytes_v - growth / _CTX_STEP * small + a.bytes_tail + a.bytes_codebooks
        growth_f16 = b.bytes_f16 - a.bytes_f16
        return CacheCost(growth / _CTX_STEP, fixed, 16 * growth / growth_f16 if growth_f16 else 0.0)

    def _cache_info(
        self, k: CacheType, v: CacheType, n_ctx: int, n_ubatch: int, kv_tail: int | None
    ) -> native.CacheInfo:
        params = self._low.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ubatch, n_ubatch
        params.type_k, params.type_v = k.ggml_type, v.ggml_type
        params.flash_attn_type = self._low.LLAMA_FLASH_ATTN_TYPE_ENABLED
        with native.kv_tail(kv_tail), native_log.collect(echo=False) as log:
            ctx = self._low.llama_init_from_model(self._pointer, params)
            if not ctx:
                raise NativeError(f"{self.path}: no {k.name}/{v.name} cache: {log.reason('no reason given')}")
            try:
                return native.cache_info(ctx)
            finally:
                self._low.llama_free(ctx)

    def close(self) -> None:
        with native_log.collect(echo=False):
            self._low.llama_model_free(self._pointer)


@contextmanager
def open_model(path: Path) -> Iterator[Model]:
    """Map a model for as long as the block runs. Raises InputError or NativeError when that fails."""
    if not path.exists():
        raise InputError(f"no such file: {path}")
    low = native.llama_cpp()
    params = low.llama_model_default_params()
    # No weight is read or copied: a cache is as large on every device.
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    with native_log.collect(echo=False) as log:
        low.llama_backend_init()
        pointer = low.llama_model_load_from_file(os.fsencode(path), params)
    if not pointer:
        raise NativeError(f"cannot load {path}: {log.reason('no reason given')}")
    model = Model(path, pointer)
    try:
        yield model
    finally:
        model.close()


# ---- the machine ----


@dataclass(frozen=True)
class Memory:
    """Memory that a model and its cache could have."""

    name: str  # "RAM", or the name of a GPU
    bytes_free: int


def ram() -> Memory | None:
    """Free RAM, or what the process's control group leaves of it. None where the system does not tell."""
    free = available_memory_bytes()
    if free is None:
        return None
    limit = _cgroup_free()
    return Memory("RAM", free if limit is None else min(free, limit))


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        # What the group holds of files is given back when it is needed.
        stat = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        used = int((root / "memory.current").read_text(encoding="ascii")) - int(stat.get("inactive_file", 0))
        return max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def machine(n_threads: int | None = None) -> str:
    """Processor, threads (None: all that there are) and GPUs in words, for the head of a result."""
    names = [_processor(), *(gpu.name for gpu in gpus())]
    n = default_threads() if n_threads is None else n_threads
    return f"{names[0]}, {n} thread{'' if n == 1 else 's'}" + "".join(f"; {name}" for name in names[1:])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or platform.machine()


def gpus() -> list[Memory]:
    """The GPUs that llama.cpp sees."""
    native.llama_cpp().llama_backend_init()
    lib = _ggml()
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        if lib.ggml_backend_dev_type(device) not in _GPU:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(Memory(lib.ggml_backend_dev_description(device).decode("utf-8", "replace"), free.value))
    return found


def _ggml() -> Any:
    from .. import paths

    lib = ctypes.CDLL(str(paths.library("ggml")))  # loaded by libllama already: this is the same one
    size_p = ctypes.POINTER(ctypes.c_size_t)
    for name, restype, argtypes in (
        ("ggml_backend_dev_count", ctypes.c_size_t, []),
        ("ggml_backend_dev_get", ctypes.c_void_p, [ctypes.c_size_t]),
        ("ggml_backend_dev_type", ctypes.c_int, [ctypes.c_void_p]),
        ("ggml_backend_dev_description", ctypes.c_char_p, [ctypes.c_void_p]),
        ("ggml_backend_dev_memory", None, [ctypes.c_void_p, size_p, size_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib
