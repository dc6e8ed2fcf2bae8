"""``Llama``: ``llama_cpp.Llama`` with one more argument, ``kv_cache``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import InputError, MillionError, MismatchError, NativeError
from . import native, native_log
from .cache_types import AUTO, BY_NUMBER, CACHE_TYPES, CacheType, parse

_low = native.llama_cpp()  # first: it decides which library llama_cpp binds to

import llama_cpp  # noqa: E402

_said: set[tuple[str, str]] = set()  # (model, choice) pairs that "auto" has told the user about


class Llama(llama_cpp.Llama):  # type: ignore[misc]
    """A llama.cpp model whose KV cache may be product-quantized.

    Every argument and method of ``llama_cpp.Llama`` works as it does there, ``from_pretrained`` included.

    Args:
        model_path: a GGUF file. For "pq4", "pq3" and "pq2" it must have codebooks (``million calibrate`` adds them).
        kv_cache: the cache's element type: "pq4", "pq3", "pq2", or any of llama.cpp's ("f16", "q8_0", "q4_0", ...);
            a pair for K and V apart, as ``("pq4", "pq2")``; or "auto", which takes a PQ type when the file has
            codebooks and f16 when it has none, and says which on stderr. None leaves ``type_k`` and ``type_v`` alone.
        kv_tail: tokens per sequence that a PQ cache also keeps exact, in f16; attention reads these instead of their codes. 0 turns
            the tail off; None takes the environment variable ``MILLION_KV_TAIL``, or 128.

    Raises:
        InputError: the type is unknown, the arguments contradict each other, or there is no such file.
        MismatchError: the model cannot have a cache of this type.
        NativeError: llama.cpp could not load the model or make the context; the message has its reason.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv_cache: str | Sequence[str] | None = None,
        kv_tail: int | None = None,
        **kwargs: Any,
    ) -> None:
        path = os.fspath(model_path)
        self._kv_cache = kv_cache if kv_cache is None or isinstance(kv_cache, str) else tuple(kv_cache)
        self._kv_auto = isinstance(kv_cache, str) and kv_cache.strip().lower() == AUTO
        self._kv_tail = kv_tail
        self._loading_path = path
        if kv_tail is not None and (not isinstance(kv_tail, int) or not 0 <= kv_tail <= 1 << 20):
            raise InputError(f"kv_tail is {kv_tail!r}: give a number of tokens from 0 (no tail) to {1 << 20}")
        types = None if kv_cache is None or self._kv_auto else parse(kv_cache)
        if kv_cache is not None and (kwargs.get("type_k") is not None or kwargs.get("type_v") is not None):
            raise InputError("both kv_cache and type_k/type_v are given: give kv_cache alone")
        if types is not None:
            kwargs["type_k"], kwargs["type_v"] = (t.ggml_type for t in types)
            if _needs_flash_attn(*types):
                if kwargs.get("flash_attn") is False:
                    raise InputError(
                        f"a {types[0].name}/{types[1].name} cache needs flash attention: leave flash_attn out or set it"
                    )
                kwargs["flash_attn"] = True
        if not os.path.exists(path):
            raise InputError(f"no such file: {path}")
        if not os.path.isfile(path):
            raise InputError(f"{path} is not a file: give a GGUF file")
        verbose = kwargs.get("verbose", True)
        try:
            with native.kv_tail(kv_tail), _native_errors(f"cannot load {path}", echo=verbose) as log:
                super().__init__(path, **kwargs)
                if self.lora_path and not self._lora_adapter:  # llama_cpp looks for None, and gets a null pointer
                    raise NativeError(f"cannot load the LoRA adapter {self.lora_path}: {log.reason('no reason given')}")
        except BaseException:
            self.close()
            raise

    # llama_cpp.Llama.__init__ assigns _model between loading the model and making the context from context_params:
    # the one moment at which the file's metadata is known and the cache's types can still be chosen.
    @property
    def _model(self) -> Any:
        try:
            return self.__dict__["_loaded_model"]
        except KeyError:
            raise AttributeError("the model is not loaded") from None

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_loaded_model"] = model
        if self.model_params.vocab_only:
            return
        if self._kv_auto:
            self._choose_types()
            return
        params = self.context_params
        reason = native.model_check(model.model, params.type_k, params.type_v)
        if reason is not None:
            raise MismatchError(f"{self._loading_path}: {reason}")

    def _choose_types(self) -> None:
        """Set context_params for ``kv_cache="auto"``. Codebooks that do not fit are an error, never a reason for f16."""
        model, path = self._model.model, self._loading_path
        chosen, why = CACHE_TYPES["f16"], "the file has no codebooks; 'million calibrate' adds them"
        if native.model_metadata(model, "million.version") is not None:
            reasons = {}
            for candidate in (t for t in CACHE_TYPES.values() if t.is_pq):  # most accurate first
                reason = native.model_check(model, candidate.ggml_type, candidate.ggml_type)
                if reason is None:
                    chosen, why = candidate, "the file has codebooks"
                    break
                reasons[candidate.name] = reason
            else:
                raise MismatchError(f"{path}: {next(iter(reasons.values()))}")
            if reasons:
                why = "; ".join(reasons.values())
        self.context_params.type_k = self.context_params.type_v = chosen.ggml_type
        if _needs_flash_attn(chosen, chosen):
            self.context_params.flash_attn_type = _low.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if (path, chosen.name) not in _said:
            _said.add((path, chosen.name))
            print(f"million: KV cache {chosen.name} ({why})", file=sys.stderr, flush=True)

    @property
    def kv_cache_types(self) -> tuple[str, str]:
        """Names of the cache's element types, (K, V)."""
        params = self.context_params
        return _type_name(params.type_k), _type_name(params.type_v)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the cache's tensors, for the whole context and without the exact tail; 0 when the model keeps none."""
        info = native.cache_info(self.ctx)
        return info.bytes_k + info.bytes_v

    @property
    def kv_cache_bytes_f16(self) -> int:
        """Bytes that the same cache would take in f16."""
        return native.cache_info(self.ctx).bytes_f16

    @property
    def kv_tail_bytes(self) -> int:
        """Bytes of the exact tail, room for one micro-batch per stream included; 0 without one."""
        return native.cache_info(self.ctx).bytes_tail

    @property
    def kv_tail(self) -> int:
        """Tokens per sequence that the cache also keeps exact; 0 without a tail."""
        return native.cache_info(self.ctx).n_tail

    def eval(self, tokens: Sequence[int]) -> None:
        """As ``llama_cpp.Llama.eval``. Raises NativeError, with llama.cpp's reason, when the decode fails."""
        for start in range(0, max(1, len(tokens)), self.n_batch):  # Ctrl-C is noticed between batches
            with _native_errors("llama.cpp could not decode", echo=self.verbose):
                super().eval(tokens[start : start + self.n_batch])

    def load_state(self, state: Any) -> None:
        """As ``llama_cpp.Llama.load_state``. Raises NativeError when the state is not of such a context."""
        with _native_errors("the saved state does not fit this context", echo=self.verbose):
            super().load_state(state)

    def close(self) -> None:
        """Free the model and its context. A second call does nothing."""
        if "_stack" in self.__dict__:  # absent when __init__ refused its arguments
            with native_log.collect(echo=self.verbose):
                super().close()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        if self._kv_cache is not None:
            state["kv_cache"] = self._kv_cache
            del state["type_k"], state["type_v"]
        if self._kv_tail is not None:
            state["kv_tail"] = self._kv_tail
        return state


def _needs_flash_attn(k: CacheType, v: CacheType) -> bool:
    return k.is_pq or v.is_quantized


def _type_name(number: int) -> str:
    return BY_NUMBER[number].name if number in BY_NUMBER else f"type {number}"


@contextmanager
def _native_errors(what: str, *, echo: bool) -> Iterator[native_log.Collected]:
    """Turn llama_cpp's bare ValueError and RuntimeError into NativeError, if llama.cpp gave a reason."""
    with native_log.collect(echo=echo) as log:
        try:
            yield log
        except MillionError:
            raise
        except (ValueError, RuntimeError) as e:
            reason = log.reason()
            if reason or isinstance(e, RuntimeError) or str(e).startswith("Failed to"):
                raise NativeError(f"{what}: {reason or e}") from e
            raise
