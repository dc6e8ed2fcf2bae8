"""The element types that a KV cache can have: names, ggml numbers and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..spec import PQ_TYPES


@dataclass(frozen=True)
class CacheType:
    """One ggml type. A block of ``block_elems`` elements takes ``block_bytes`` bytes."""

    name: str
    ggml_type: int
    block_elems: int
    block_bytes: int

    @property
    def is_pq(self) -> bool:
        return self.name in PQ_TYPES

    @property
    def is_quantized(self) -> bool:
        return self.name not in ("f32", "f16", "bf16")

    @property
    def bits(self) -> float:
        """Bits per element."""
        return 8 * self.block_bytes / self.block_elems


CACHE_TYPES: dict[str, CacheType] = {
    t.name: t
    for t in (
        *(CacheType(s.name, s.ggml_type, s.block_elems, s.block_bytes) for s in PQ_TYPES.values()),
        CacheType("f32", 0, 1, 4),
        CacheType("f16", 1, 1, 2),
        CacheType("bf16", 30, 1, 2),
        CacheType("q8_0", 8, 32, 34),
        CacheType("q5_1", 7, 32, 24),
        CacheType("q5_0", 6, 32, 22),
        CacheType("q4_1", 3, 32, 20),
        CacheType("q4_0", 2, 32, 18),
        CacheType("iq4_nl", 20, 32, 18),
    )
}
BY_NUMBER: dict[int, CacheType] = {t.ggml_type: t for t in CACHE_TYPES.values()}
AUTO = "auto"


def parse(kv_cache: str | Sequence[str]) -> tuple[CacheType, CacheType]:
    """The types of K and V that "pq4", "pq4,pq2" or ("pq4", "pq2") ask for. Raises InputError, listing what is known."""
    names = kv_cache.split(",") if isinstance(kv_cache, str) else kv_cache
    if isinstance(names, (bytes, int)) or not all(isinstance(n, str) for n in names) or len(names) not in (1, 2):
        raise InputError(f"kv_cache is {kv_cache!r}: give one type, or a pair of types for K and V; {_known()}")
    types = []
    for name in names:
        found = CACHE_TYPES.get(name.strip().lower())
        if found is None:
            raise InputError(f"unknown KV cache type {name.strip()!r}: {_known()}")
        types.append(found)
    return types[0], types[-1]


def _known() -> str:
    return f"known types are {', '.join(CACHE_TYPES)} and {AUTO}"
