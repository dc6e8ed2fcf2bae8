"""Changes single metadata entries of a GGUF file, to make the broken files that tests need."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFValueType as VT

from million_gguf.container import GGUFHeader


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def encoded(type_: VT, value: Any) -> bytes:
    """A value with its type, as GGUF stores it: u32, u64, f32, bool, string, or (item type, list) for an array."""
    head = struct.pack("<I", type_)
    if type_ == VT.ARRAY:
        item, values = value
        return head + struct.pack("<IQ", item, len(values)) + b"".join(encoded(item, v)[4:] for v in values)
    if type_ == VT.STRING:
        return head + _string(value)
    return head + struct.pack({VT.UINT32: "<I", VT.UINT64: "<Q", VT.FLOAT32: "<f", VT.BOOL: "<?"}[type_], value)


def edit(src: Path, dst: Path, changes: Mapping[str, bytes | None]) -> Path:
    """Copy ``src`` to ``dst`` with entries replaced or added (``encoded`` bytes) or left out (None)."""
    with GGUFHeader(src) as h:
        entries = [h.bytes(e.start, e.end) for e in h.kv.values() if e.key not in changes]
        entries += [_string(key) + raw for key, raw in changes.items() if raw is not None]
        header = b"GGUF" + struct.pack("<IQQ", h.version, len(h.tensors), len(entries))
        header += b"".join(entries) + h.bytes(*h.tensor_info_range)
        header += bytes(-len(header) % h.alignment)
        dst.write_bytes(header + h.bytes(h.data_offset, h.size))
    return dst


def strings(path: Path, key: str) -> list[str]:
    """An array of strings out of a file."""
    with GGUFHeader(path) as h:
        values: list[str] = h.get(key)
    return values


def string_array(values: list[str]) -> bytes:
    """An array of strings, as ``edit`` takes it."""
    return encoded(VT.ARRAY, (VT.STRING, values))
