"""Codebooks in a GGUF file: the ``million.*`` metadata of ``docs/format.md``, written, read and checked.

Nothing in a file is trusted: every size is checked before it is used, and every fault is a ``FormatError`` (the file is
broken) or a ``MismatchError`` (the file is sound but its codebooks belong to something else).

The header is parsed here and not with gguf-py, for reasons that each broke something: ``embed`` copies metadata and
tensor infos byte by byte, and gguf-py flattens nested arrays and cannot write back empty strings and arrays; it refuses
tensor types newer than itself; it walks a 128K-token vocabulary element by element; and it does not notice a
string that runs past the end of the file. The tests hold this parser against gguf-py on the same files.
"""

from __future__ import annotations

import base64
import binascii
import errno
import math
import mmap
import os
import secrets
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

from .errors import FormatError, InputError, MismatchError
from .pq_ref import Codebook
from .spec import PQ_TYPES, PQSpec

FORMAT_VERSION = 2
PREFIX = "million."

_BLOB_MAGIC = b"MPQB"
_BLOB_VERSION = 2
_BLOB_HEADER = struct.Struct(
    "<4sI6HIII"
)  # magic, version, D, n_head_kv, M, dsub, bytes of codes per head, flags, payload bytes, crc32, 0
_BLOB_TRANSFORM, _BLOB_ANISO = 1, 2  # flags: a transform is stored; an anisotropy is (K only)
# What is recorded per layer and KV head beside each codebook, for people: no program needs it to run the model.
# Errors are squared error over squared deviation in y, where an error costs what it costs the model (transform.py).
HEAD_FIGURES = {
    "spread": "arithmetic over geometric mean of the variances along the axes of the transform",
    "trained": "error on rows that the codebook was trained on",
    "measured": "error on rows that were held back",
}

_RECALIBRATE = "calibrate again with 'million calibrate'"

# T is accepted up to this condition number (infinity norm, cheap beside the inverse). The kernels apply T and T^-1 in
# f32, whose 24 bits are spent beyond it.
_MAX_CONDITION = 1e6

_COPY_BYTES = 16 << 20
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_DEPTH = 8  # nested arrays; GGUF files in use have none

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


# ---------------------------------------------------------------------------------------------------------
# GGUF header
# ---------------------------------------------------------------------------------------------------------

_SCALARS: dict[int, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
_INT_TYPES = frozenset(
    {
        GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.UINT16, GGUFValueType.INT16,
        GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.INT64,
    }
)  # fmt: skip
_U32, _U64 = _SCALARS[GGUFValueType.UINT32], _SCALARS[GGUFValueType.UINT64]


@dataclass(frozen=True)
class KeyValue:
    """Where one metadata entry lies: bytes ``[start, end)`` hold key, type and value; the value begins at ``value``."""

    key: str
    type: int
    start: int
    value: int
    end: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: ``dims`` in ggml's order (fastest first), ``offset`` from the start of the file, ``n_bytes`` None
    when the type is newer than this package's gguf-py."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int | None


class GGUFHeader:
    """Header of a GGUF file (version 2 or 3, little endian). A context manager: it maps the file while it is open.

    Attributes:
        path: the file.
        version: GGUF version.
        kv: entries by key, in file order.
        tensors: by name, in file order.
        tensor_info_range: bytes ``[start, end)`` of all tensor infos.
        alignment: ``general.alignment``, 32 when absent.
        data_offset: where tensor data begins.
        size: bytes of the file.

    Raises:
        InputError: the file cannot be opened.
        FormatError: it is not a GGUF file, or is malformed or truncated.
    """

    def __init__(self, path: os.PathLike[str] | str):
        self.path = Path(path)
        with _io_errors(self.path, "read"), open(self.path, "rb") as f:
            self.size = os.fstat(f.fileno()).st_size
            if self.size < 24:
                raise FormatError(
                    f"{self.path}: found {self.size} bytes, need a GGUF header of at least 24: not a GGUF file"
                )
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFHeader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file."""
        self._map.close()

    def bytes(self, start: int, end: int) -> bytes:
        """Bytes ``[start, end)`` of the file."""
        return self._map[start:end]

    # ---- values ----

    def get(self, key: str, default: Any = None) -> Any:
        """Value of ``key``: int, float, bool, str, or a (nested) list of these; ``default`` when absent.

        Raises FormatError when a string is not UTF-8."""
        e = self.kv.get(key)
        return default if e is None else self._value(e.type, e.value, e.key)[0]

    def require(self, key: str) -> Any:
        """As ``get``; raises FormatError when the key is absent."""
        if key not in self.kv:
            raise FormatError(f"{self.path}: found no key {key}, need it: the file is not a complete model")
        return self.get(key)

    def array_type(self, key: str) -> tuple[int, int]:
        """Element type and length of array ``key``."""
        at = self.kv[key].value
        return self._unpack(_U32, at, key), self._unpack(_U64, at + 4, key)

    # ---- parsing ----

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}: the file is damaged, truncated, or not a GGUF file")

    def _unpack(self, s: struct.Struct, at: int, what: str) -> Any:
        if at + s.size > self.size:
            raise self._fail(f"{what} at byte {at} needs {s.size} bytes, the file has {self.size}")
        return s.unpack_from(self._map, at)[0]

    def _string_end(self, at: int, what: str) -> int:
        n = self._unpack(_U64, at, what)
        if n > self.size - at - 8:
            raise self._fail(f"{what} at byte {at} is a string of {n} bytes, the file has {self.size}")
        return int(at + 8 + n)

    def _string(self, at: int, what: str) -> tuple[str, int]:
        end = self._string_end(at, what)
        try:
            return self._map[at + 8 : end].decode("utf-8"), end
        except UnicodeDecodeError:
            raise self._fail(f"{what} at byte {at} is a string that is not UTF-8, need UTF-8") from None

    def _skip(self, type_: int, at: int, what: str, depth: int = 0) -> int:
        """Byte after a value, reading no more of it than its lengths."""
        if type_ in _SCALARS:
            self._unpack(_SCALARS[type_], at, what)
            return at + _SCALARS[type_].size
        if type_ == GGUFValueType.STRING:
            return self._string_end(at, what)
        if type_ == GGUFValueType.ARRAY and depth < _MAX_DEPTH:
            item, n = self._unpack(_U32, at, what), self._unpack(_U64, at + 4, what)
            at += 12
            # Even an empty string takes 8 bytes and an empty array 12: this bounds the loop below by the file's size.
            smallest = _SCALARS[item].size if item in _SCALARS else 8
            if n > (self.size - at) // smallest:
                raise self._fail(f"{what} is an array of {n} elements at byte {at}, the file has {self.size} bytes")
            if item in _SCALARS:
                return int(at + n * smallest)
            for _ in range(n):
                at = self._skip(item, at, what, depth + 1)
            return at
        raise self._fail(f"{what} at byte {at} has unknown value type {type_}")

    def _value(self, type_: int, at: int, what: str) -> tuple[Any, int]:
        if type_ in _SCALARS:
            s = _SCALARS[type_]
            return self._unpack(s, at, what), at + s.size
        if type_ == GGUFValueType.STRING:
            return self._string(at, what)
        item, n = self._unpack(_U32, at, what), self._unpack(_U64, at + 4, what)
        at += 12
        values = []
        for _ in range(n):
            value, at = self._value(item, at, what)
            values.append(value)
        return values, at

    def _parse(self) -> None:
        if self._map[:4] != b"GGUF":
            raise FormatError(f"{self.path}: found magic {self._map[:4]!r}, need b'GGUF': not a GGUF file")
        self.version = self._unpack(_U32, 4, "version")
        if self.version not in (2, 3):
            hint = "big-endian files are not supported" if self.version & 0xFFFF == 0 else "convert the model again"
            raise FormatError(f"{self.path}: found GGUF version {self.version}, need 2 or 3: {hint}")
        n_tensors, n_kv = self._unpack(_U64, 8, "tensor count"), self._unpack(_U64, 16, "key count")
        at = 24
        # The smallest entry takes 13 bytes, the smallest tensor info 24: a wild count fails here, not in a long loop.
        if n_kv > (self.size - at) // 13 or n_tensors > (self.size - at) // 24:
            raise self._fail(f"{n_kv} keys and {n_tensors} tensors in {self.size} bytes")

        self.kv: dict[str, KeyValue] = {}
        for i in range(n_kv):
            key, value_at = self._string(at, f"key {i}")
            type_ = self._unpack(_U32, value_at, key)
            end = self._skip(type_, value_at + 4, key)
            if key in self.kv:
                raise self._fail(f"key {key} is there twice")
            self.kv[key] = KeyValue(key, type_, at, value_at + 4, end)
            at = end

        self.alignment = 32
        if "general.alignment" in self.kv:
            if self.kv["general.alignment"].type != GGUFValueType.UINT32:
                raise self._fail("general.alignment is not u32")
            self.alignment = self.get("general.alignment")
            if self.alignment == 0 or self.alignment & (self.alignment - 1):
                raise self._fail(f"general.alignment is {self.alignment}, need a power of two")

        start = at
        raw: list[tuple[str, tuple[int, ...], int, int]] = []
        for i in range(n_tensors):
            name, at = self._string(at, f"tensor {i}")
            n_dims = self._unpack(_U32, at, name)
            if n_dims > _MAX_DIMS:
                raise self._fail(f"tensor {name} has {n_dims} dimensions, need at most {_MAX_DIMS}")
            dims = tuple(self._unpack(_U64, at + 4 + 8 * j, name) for j in range(n_dims))
            at += 4 + 8 * n_dims
            raw.append((name, dims, self._unpack(_U32, at, name), self._unpack(_U64, at + 4, name)))
            at += 12
        self.tensor_info_range = (start, at)
        self.data_offset = _align(at, self.alignment)

        self.tensors: dict[str, TensorInfo] = {}
        for name, dims, type_, offset in raw:
            n_bytes = _tensor_bytes(dims, type_)
            if offset % self.alignment or self.data_offset + offset + (n_bytes or 0) > self.size:
                raise self._fail(
                    f"tensor {name} lies at {offset} with {n_bytes} bytes, outside of {self.size} or not aligned"
                )
            if name in self.tensors:
                raise self._fail(f"tensor {name} is there twice")
            self.tensors[name] = TensorInfo(name, dims, type_, self.data_offset + offset, n_bytes)


Model: TypeAlias = "GGUFHeader | GGUFReader | os.PathLike[str] | str"
"""What the functions below take as a model: an open header, a gguf-py reader, or a path."""


@contextmanager
def _header(model: Model) -> Iterator[GGUFHeader]:
    if isinstance(model, GGUFHeader):
        yield model
        return
    path = model.data.filename if isinstance(model, GGUFReader) else model
    if path is None:
        raise InputError("found a gguf reader without a file, need one: give the path instead")
    with GGUFHeader(path) as h:
        yield h


def _align(n: int, alignment: int) -> int:
    return (n + alignment - 1) // alignment * alignment


def _tensor_bytes(dims: tuple[int, ...], type_: int) -> int | None:
    try:
        block_elems, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_)]
    except (ValueError, KeyError):
        return None
    return math.prod(dims) // block_elems * block_bytes


@contextmanager
def _io_errors(path: Path, what: str) -> Iterator[None]:
    """Turns the operating system's refusals into InputError, with what to do."""
    try:
        yield
    except OSError as e:
        advice = {
            errno.ENOSPC: "free some space, or choose another folder",
            errno.EDQUOT: "free some space, or choose another folder",
            errno.EACCES: "check the permissions, or choose another folder",
            errno.EPERM: "check the permissions, or choose another folder",
            errno.EROFS: "choose another folder",
            errno.ENOENT: "check the path",
            errno.EISDIR: "name a file",
        }.get(e.errno or 0, "check the path and the disk")
        raise InputError(f"{path}: cannot {what}: {e.strerror or e}: {advice}") from e


# ---------------------------------------------------------------------------------------------------------
# Blob: one layer and side
# ---------------------------------------------------------------------------------------------------------


def payload_bytes(spec: PQSpec, D: int, n_head_kv: int, has_transform: bool, has_aniso: bool = False) -> int:
    """Bytes of a blob's payload: per head mu f32 [D], T f16 [D][D] and aniso f32 [D] when there are, centroids f16 [M][ksub][dsub]."""
    return n_head_kv * (4 * D + (2 * D * D if has_transform else 0) + (4 * D if has_aniso else 0) + 2 * D * spec.ksub)


def codebook_to_blob(cb: Codebook) -> bytes:
    """Codebook -> blob bytes (``docs/format.md``, *Blob*). Raises MismatchError when it holds values that no reader
    takes (see ``blob_to_codebook``), so that a bad file is never written."""
    try:
        _check_values(cb, "codebook")
    except FormatError as e:
        raise MismatchError(str(e)) from None
    parts = []
    for h in range(cb.n_head_kv):
        parts.append(cb.mu[h].astype("<f4").tobytes())
        if cb.T is not None:
            parts.append(cb.T[h].astype("<f2").tobytes())
        if cb.aniso is not None:
            parts.append(cb.aniso[h].astype("<f4").tobytes())
        parts.append(cb.centroids[h].astype("<f2").tobytes())
    payload = b"".join(parts)
    flags = (0 if cb.T is None else _BLOB_TRANSFORM) | (0 if cb.aniso is None else _BLOB_ANISO)
    s = cb.spec
    head = _BLOB_HEADER.pack(
        _BLOB_MAGIC,
        _BLOB_VERSION,
        cb.D,
        cb.n_head_kv,
        cb.M,
        s.dsub,
        cb.head_bytes,
        flags,
        len(payload),
        zlib.crc32(payload),
        0,
    )
    return head + payload


def blob_to_codebook(blob: bytes, spec: PQSpec, where: str = "codebook") -> Codebook:
    """Blob bytes -> codebook of type ``spec``. ``where`` names the blob in messages, e.g. ``blk.3 K pq4``.

    Raises FormatError unless sizes, checksum and flags are right, all values finite and every T invertible;
    MismatchError when the blob is sound but of another type or of a head size that the kernels don't take.
    """
    if len(blob) < _BLOB_HEADER.size:
        raise FormatError(f"{where}: found {len(blob)} bytes, need a header of {_BLOB_HEADER.size}: {_RECALIBRATE}")
    magic, version, D, n_head_kv, M, dsub, head_bytes, flags, n, crc, zero = _BLOB_HEADER.unpack_from(blob)
    if magic != _BLOB_MAGIC:
        raise FormatError(f"{where}: found magic {magic!r}, need {_BLOB_MAGIC!r}: {_RECALIBRATE}")
    if version != _BLOB_VERSION:
        raise _other_version(f"{where}: found blob version", version, _BLOB_VERSION)
    if flags & ~(_BLOB_TRANSFORM | _BLOB_ANISO) or zero != 0:
        raise FormatError(
            f"{where}: found flags {flags:#x} and reserved {zero}, need flags 0 to 3 and 0: {_RECALIBRATE}"
        )
    if n_head_kv == 0:
        raise FormatError(f"{where}: found 0 KV heads, need at least 1: {_RECALIBRATE}")
    try:
        spec.check_head_size(D)
    except MismatchError as e:
        raise MismatchError(f"{where}: {e}") from None
    if (dsub, head_bytes) != (spec.dsub, spec.head_bytes(D)):
        raise MismatchError(
            f"{where}: found dsub {dsub} and {head_bytes} bytes of codes per head, {spec.name} of head size {D} needs "
            f"{spec.dsub} and {spec.head_bytes(D)}: {_RECALIBRATE}"
        )
    if spec.n_subspaces(D) != M:
        raise FormatError(f"{where}: found M {M} for head size {D}, need {spec.n_subspaces(D)}: {_RECALIBRATE}")
    has_transform, has_aniso = bool(flags & _BLOB_TRANSFORM), bool(flags & _BLOB_ANISO)
    want = payload_bytes(spec, D, n_head_kv, has_transform, has_aniso)
    have = len(blob) - _BLOB_HEADER.size
    if n != want or have != want:
        raise FormatError(f"{where}: found {have} payload bytes and {n} announced, need {want}: {_RECALIBRATE}")
    payload = memoryview(blob)[_BLOB_HEADER.size :]
    if zlib.crc32(payload) != crc:
        raise FormatError(
            f"{where}: found CRC-32 {zlib.crc32(payload):08x}, need {crc:08x}: the file is damaged, {_RECALIBRATE}"
        )

    rows = np.frombuffer(payload, dtype=np.uint8).reshape(n_head_kv, want // n_head_kv)
    end_mu = 4 * D
    end_T = end_mu + (2 * D * D if has_transform else 0)
    end_aniso = end_T + (4 * D if has_aniso else 0)

    def part(start: int, end: int, dtype: str, native: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]:
        raw = np.ascontiguousarray(rows[:, start:end]).view(dtype)
        values: npt.NDArray[Any] = raw.astype(native).reshape(n_head_kv, *shape)
        return values

    cb = Codebook(
        spec,
        mu=part(0, end_mu, "<f4", np.float32, D),
        T=part(end_mu, end_T, "<f2", np.float16, D, D) if has_transform else None,
        centroids=part(end_aniso, rows.shape[1], "<f2", np.float16, M, spec.ksub, spec.dsub),
        aniso=part(end_T, end_aniso, "<f4", np.float32, D) if has_aniso else None,
    )
    _check_values(cb, where)
    return cb


def _other_version(found: str, version: int, need: int) -> FormatError:
    advice = _RECALIBRATE if version < need else f"update million-gguf or {_RECALIBRATE}"
    return FormatError(f"{found} {version}, need {need}: {advice}")


def _check_values(cb: Codebook, where: str) -> None:
    for name, a in (("mu", cb.mu), ("T", cb.T), ("aniso", cb.aniso), ("centroids", cb.centroids)):
        if a is not None and not np.isfinite(a).all():
            raise FormatError(f"{where}: found {name} with NaN or infinity, need finite values: {_RECALIBRATE}")
    if cb.T is not None:
        try:
            assert cb.T_inv is not None
            norms = [np.abs(a).sum(axis=-1).max(axis=-1) for a in (cb.T.astype(np.float64), cb.T_inv)]
            condition = float(np.max(norms[0] * norms[1]))
        except np.linalg.LinAlgError:
            condition = math.inf
        if not condition < _MAX_CONDITION:  # also false for NaN
            raise FormatError(
                f"{where}: found a transform of condition number {condition:.3g}, need an invertible one "
                f"(below {_MAX_CONDITION:.0g}): {_RECALIBRATE}"
            )


# ---------------------------------------------------------------------------------------------------------
# Codebook set: everything under million.*
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """How codebooks were made.

    Attributes:
        tokens: tokens that they were trained on.
        text_digest: sha256 (hex) of the calibration text.
        seed: of the sampling and of the k-means.
        tool: name and version of the program.
    """

    tokens: int
    text_digest: str
    seed: int
    tool: str


@dataclass(frozen=True)
class TypeCodebooks:
    """Codebooks of one cache type: one entry per layer, None for a layer without KV cache.

    ``k_error`` and ``v_error`` are, per layer, the sum of squared errors over the sum of squared deviations from the
    mean, measured on the calibration rows; 0 for an empty layer.

    ``k_heads`` and ``v_heads`` hold figures per layer and KV head (``HEAD_FIGURES``) by name; empty when the file was
    calibrated by a program that did not record them.
    """

    k: list[Codebook | None]
    v: list[Codebook | None]
    k_error: list[float]
    v_error: list[float]
    k_heads: dict[str, list[list[float]]] = field(default_factory=dict)
    v_heads: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class CodebookSet:
    """All codebooks of a file.

    Attributes:
        block_count: layers of the model.
        model_digest: of the model that they were made for, see ``model_digest``.
        rope_freq_base: of that model; 0 when it has none.
        calibration: how they were made.
        types: codebooks by cache type (``pq4``, ``pq3``, ``pq2``); at least one.
    """

    block_count: int
    model_digest: str
    rope_freq_base: float
    calibration: Calibration
    types: dict[str, TypeCodebooks] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises MismatchError when the parts disagree with each other."""
        if not self.types:
            raise MismatchError("found codebooks for no cache type, need at least one of " + ", ".join(PQ_TYPES))
        for name, t in self.types.items():
            if name not in PQ_TYPES:
                raise MismatchError(f"found cache type {name!r}, need one of {', '.join(PQ_TYPES)}")
            for what, values in (("K", t.k), ("V", t.v), ("K error", t.k_error), ("V error", t.v_error)):
                if len(values) != self.block_count:
                    raise MismatchError(f"{name} {what}: found {len(values)} layers, the model has {self.block_count}")
            for what, errors in (("K", t.k_error), ("V", t.v_error)):
                for i, e in enumerate(errors):
                    if not (math.isfinite(e) and e >= 0.0):
                        raise MismatchError(f"blk.{i} {what} {name}: found error {e}, need a finite number >= 0")
            _check_head_figures(f"{name} K", t.k, t.k_heads)
            _check_head_figures(f"{name} V", t.v, t.v_heads)
            for i, (k, v) in enumerate(zip(t.k, t.v, strict=True)):
                if (k is None) != (v is None):
                    raise MismatchError(
                        f"blk.{i} {name}: found a codebook for only one of K and V, need both or neither"
                    )
                for what, cb in (("K", k), ("V", v)):
                    if cb is not None and cb.spec.name != name:
                        raise MismatchError(f"blk.{i} {what}: found a codebook of {cb.spec.name} among those of {name}")
                if v is not None and v.aniso is not None:
                    raise MismatchError(f"blk.{i} V {name}: found an anisotropy, need none: only codes of K have one")
            if all(k is None for k in t.k):
                raise MismatchError(f"{name}: found no layer with a codebook, need at least one")


def _check_head_figures(what: str, codebooks: list[Codebook | None], heads: dict[str, list[list[float]]]) -> None:
    want = [0 if cb is None else cb.n_head_kv for cb in codebooks]
    for figure, values in heads.items():
        if figure not in HEAD_FIGURES or [len(x) for x in values] != want:
            raise MismatchError(f"{what} {figure}: found figures of {[len(x) for x in values]} heads, need {want}")
        if not all(math.isfinite(x) and x >= 0.0 for layer in values for x in layer):
            raise MismatchError(f"{what} {figure}: found a negative or infinite figure, need finite ones >= 0")


def _kv_bytes(cs: CodebookSet) -> list[bytes]:
    """The million.* entries of a set, each as the bytes of one GGUF key-value pair."""

    def string(s: str) -> bytes:
        raw = s.encode("utf-8")
        return _U64.pack(len(raw)) + raw

    def scalar(key: str, type_: GGUFValueType, value: Any) -> bytes:
        return string(PREFIX + key) + _U32.pack(type_) + _SCALARS[type_].pack(value)

    def text(key: str, value: str) -> bytes:
        return string(PREFIX + key) + _U32.pack(GGUFValueType.STRING) + string(value)

    def array(key: str, type_: GGUFValueType, items: list[bytes]) -> bytes:
        head = _U32.pack(GGUFValueType.ARRAY) + _U32.pack(type_) + _U64.pack(len(items))
        return string(PREFIX + key) + head + b"".join(items)

    def blobs(codebooks: list[Codebook | None]) -> list[bytes]:
        return [
            string("" if cb is None else base64.b64encode(codebook_to_blob(cb)).decode("ascii")) for cb in codebooks
        ]

    def floats(values: list[float]) -> list[bytes]:
        return [struct.pack("<f", x) for x in values]

    cal = cs.calibration
    out = [
        scalar("version", GGUFValueType.UINT32, FORMAT_VERSION),
        array("types", GGUFValueType.STRING, [string(t) for t in cs.types]),
        scalar("block_count", GGUFValueType.UINT32, cs.block_count),
        text("model_digest", cs.model_digest),
        scalar("rope_freq_base", GGUFValueType.FLOAT32, cs.rope_freq_base),
        scalar("calibration.tokens", GGUFValueType.UINT64, cal.tokens),
        text("calibration.text_digest", cal.text_digest),
        scalar("calibration.seed", GGUFValueType.UINT64, cal.seed),
        text("calibration.tool", cal.tool),
    ]
    for name, t in cs.types.items():
        out.append(array(f"{name}.k", GGUFValueType.STRING, blobs(t.k)))
        out.append(array(f"{name}.v", GGUFValueType.STRING, blobs(t.v)))
        out.append(array(f"{name}.k.error", GGUFValueType.FLOAT32, floats(t.k_error)))
        out.append(array(f"{name}.v.error", GGUFValueType.FLOAT32, floats(t.v_error)))
        for side, heads in (("k", t.k_heads), ("v", t.v_heads)):
            for figure, values in heads.items():
                flat = [x for layer in values for x in layer]
                out.append(array(f"{name}.{side}.head.{figure}", GGUFValueType.FLOAT32, floats(flat)))
    return out


def has_codebooks(model: Model) -> bool:
    """True when the file has any ``million.*`` key. Raises as ``GGUFHeader``."""
    with _header(model) as h:
        return any(key.startswith(PREFIX) for key in h.kv)


def read(model: Model) -> CodebookSet:
    """Reads and checks all codebooks of a GGUF file, against its own model too (``check_fits``).

    Raises:
        InputError: the file cannot be opened.
        FormatError: not a GGUF file; no codebooks; or a key, length, checksum or value that is wrong.
        MismatchError: the codebooks were made for another model.
    """
    with _header(model) as h:
        cs = _read(h)
        check_fits(cs, h)
        return cs


def _read(h: GGUFHeader) -> CodebookSet:
    def fail(what: str) -> FormatError:
        return FormatError(f"{h.path}: {what}: {_RECALIBRATE}")

    def get(key: str, type_: GGUFValueType) -> Any:
        full = PREFIX + key
        if full not in h.kv:
            raise fail(f"found no key {full}, need it")
        if h.kv[full].type != type_:
            raise fail(f"{full}: found value type {h.kv[full].type}, need {type_.name} ({int(type_)})")
        return h.get(full)

    def get_array(key: str, type_: GGUFValueType, n: int | None) -> list[Any]:
        full = PREFIX + key
        if full in h.kv and h.kv[full].type == GGUFValueType.ARRAY:
            # Before any element is read: an overlong array must not cost memory.
            item, length = h.array_type(full)
            if item != type_:
                raise fail(f"{full}: found array of value type {item}, need {type_.name} ({int(type_)})")
            if length > len(PQ_TYPES) if n is None else length != n:
                raise fail(f"{full}: found {length} entries, need {'1 to 3' if n is None else n}")
        values: list[Any] = get(key, GGUFValueType.ARRAY)
        return values

    if not any(key.startswith(PREFIX) for key in h.kv):
        raise FormatError(f"{h.path}: found no codebooks, need the million.* metadata: run 'million calibrate' on it")
    version = get("version", GGUFValueType.UINT32)
    if version != FORMAT_VERSION:
        raise _other_version(f"{h.path}: found million.version", version, FORMAT_VERSION)
    names = get_array("types", GGUFValueType.STRING, None)
    if not names or len(set(names)) != len(names) or any(n not in PQ_TYPES for n in names):
        raise fail(f"million.types: found {names}, need distinct names out of {', '.join(PQ_TYPES)}")
    for name in PQ_TYPES:
        if name not in names and any(key.startswith(f"{PREFIX}{name}.") for key in h.kv):
            raise fail(f"found million.{name}.* keys, need {name} in million.types")
    block_count = get("block_count", GGUFValueType.UINT32)
    model_blocks = model_shape(h).block_count
    if block_count != model_blocks:
        raise MismatchError(
            f"{h.path}: found codebooks for {block_count} layers, the model has {model_blocks}: {_RECALIBRATE}"
        )
    digest = get("model_digest", GGUFValueType.STRING)
    if len(digest) != 16 or any(c not in "0123456789abcdef" for c in digest):
        raise fail(f"million.model_digest: found {digest[:40]!r}, need 16 hexadecimal digits")
    rope = get("rope_freq_base", GGUFValueType.FLOAT32)
    if not (math.isfinite(rope) and rope >= 0.0):
        raise fail(f"million.rope_freq_base: found {rope}, need a finite number >= 0")

    def codebooks(name: str, side: str) -> list[Codebook | None]:
        out: list[Codebook | None] = []
        for i, text in enumerate(get_array(f"{name}.{side}", GGUFValueType.STRING, block_count)):
            where = f"{h.path}: blk.{i} {side.upper()} {name}"
            if text == "":
                out.append(None)
                continue
            try:
                blob = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as e:
                raise FormatError(
                    f"{where}: found invalid base64 ({e}), need RFC 4648 with padding: {_RECALIBRATE}"
                ) from None
            out.append(blob_to_codebook(blob, PQ_TYPES[name], where))
        return out

    def head_figures(name: str, side: str, layers: list[Codebook | None]) -> dict[str, list[list[float]]]:
        sizes = [0 if cb is None else cb.n_head_kv for cb in layers]
        out: dict[str, list[list[float]]] = {}
        for figure in HEAD_FIGURES:
            key = f"{name}.{side}.head.{figure}"
            if PREFIX + key in h.kv:
                values = iter(get_array(key, GGUFValueType.FLOAT32, sum(sizes)))
                out[figure] = [list(islice(values, n)) for n in sizes]
        return out

    types = {}
    for name in names:
        k, v = codebooks(name, "k"), codebooks(name, "v")
        types[name] = TypeCodebooks(
            k=k,
            v=v,
            k_error=get_array(f"{name}.k.error", GGUFValueType.FLOAT32, block_count),
            v_error=get_array(f"{name}.v.error", GGUFValueType.FLOAT32, block_count),
            k_heads=head_figures(name, "k", k),
            v_heads=head_figures(name, "v", v),
        )
    calibration = Calibration(
        tokens=get("calibration.tokens", GGUFValueType.UINT64),
        text_digest=get("calibration.text_digest", GGUFValueType.STRING),
        seed=get("calibration.seed", GGUFValueType.UINT64),
        tool=get("calibration.tool", GGUFValueType.STRING),
    )
    try:
        return CodebookSet(block_count, digest, rope, calibration, types)
    except MismatchError as e:
        raise fail(str(e)) from None


# ---------------------------------------------------------------------------------------------------------
# The model that codebooks belong to
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """What a KV cache of the model looks like; one entry per layer.

    Attributes:
        arch: ``general.architecture``.
        n_head: query heads.
        n_head_kv: KV heads; 0 for a layer without attention.
        D_k, D_v: head sizes.
        rope_freq_base: 0 when the file does not say.
    """

    arch: str
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    D_k: tuple[int, ...]
    D_v: tuple[int, ...]
    rope_freq_base: float

    @property
    def block_count(self) -> int:
        """Layers."""
        return len(self.n_head)


def model_shape(model: Model) -> ModelShape:
    """Reads the cache's geometry from a model's metadata, with llama.cpp's defaults (``llama_model::load_hparams``).

    Sliding-window layers take ``attention.{key,value}_length_swa`` where the file names these layers in an array
    ``attention.sliding_window_pattern``.

    Raises FormatError when keys are missing, of a wrong type, or out of range.
    """
    with _header(model) as h:
        arch = h.require("general.architecture")
        if not isinstance(arch, str):
            raise FormatError(f"{h.path}: general.architecture is not a string")

        def integer(key: str, default: int | None = None) -> int:
            full = f"{arch}.{key}"
            if full not in h.kv and default is not None:
                return default
            value = h.require(full)
            if h.kv[full].type not in _INT_TYPES or not 0 <= value < 1 << 31:
                raise FormatError(f"{h.path}: {full}: found {value!r:.60}, need an integer from 0 to 2**31-1")
            return int(value)

        n_layer = integer("block_count")
        if not 1 <= n_layer <= 65536:
            raise FormatError(f"{h.path}: {arch}.block_count: found {n_layer}, need 1 to 65536")

        def per_layer(key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
            full = f"{arch}.{key}"
            if full in h.kv and h.kv[full].type == GGUFValueType.ARRAY:
                item, n = h.array_type(full)
                if item not in _INT_TYPES or n != n_layer:
                    raise FormatError(f"{h.path}: {full}: found {n} values of type {item}, need {n_layer} integers")
                values = tuple(h.get(full))
                if any(not 0 <= v < 1 << 31 for v in values):
                    raise FormatError(f"{h.path}: {full}: found {values[:8]}, need integers from 0 to 2**31-1")
                return values
            if full not in h.kv and default is not None:
                return default
            return (integer(key),) * n_layer

        n_head = per_layer("attention.head_count")
        n_head_kv = per_layer("attention.head_count_kv", n_head)
        if f"{arch}.attention.key_length" in h.kv and f"{arch}.attention.value_length" in h.kv:
            D_default = 0  # not needed
        elif n_head[0] > 0:  # llama.cpp divides by the first layer's heads
            D_default = integer("embedding_length") // n_head[0]
        else:
            raise FormatError(f"{h.path}: found no head size, need {arch}.attention.key_length and value_length")
        D_k, D_v = integer("attention.key_length", D_default), integer("attention.value_length", D_default)
        swa_k, swa_v = integer("attention.key_length_swa", D_k), integer("attention.value_length_swa", D_v)
        pattern = h.get(f"{arch}.attention.sliding_window_pattern")
        is_swa = (
            [bool(x) for x in pattern] if isinstance(pattern, list) and len(pattern) == n_layer else [False] * n_layer
        )
        rope = h.get(f"{arch}.rope.freq_base", 0.0)
        if isinstance(rope, (str, list)):
            raise FormatError(f"{h.path}: {arch}.rope.freq_base: found {rope!r:.60}, need a number")
        return ModelShape(
            arch=arch,
            n_head=n_head,
            n_head_kv=n_head_kv,
            D_k=tuple(swa_k if s else D_k for s in is_swa),
            D_v=tuple(swa_v if s else D_v for s in is_swa),
            rope_freq_base=float(rope),
        )


def model_digest(model: Model) -> str:
    """Names a model by its attention norms, which every weight quantization of it keeps in f32.

    64-bit FNV-1a over the bytes of ``blk.<i>.attn_norm.weight`` (f32), i ascending, as 16 lower-case hexadecimal
    digits; tensors that are absent or not f32 are skipped. Raises FormatError as ``model_shape`` does.
    """
    with _header(model) as h:
        digest = 0xCBF29CE484222325
        for i in range(model_shape(h).block_count):
            t = h.tensors.get(f"blk.{i}.attn_norm.weight")
            if t is None or t.type != GGMLQuantizationType.F32 or t.n_bytes is None:
                continue
            for byte in h.bytes(t.offset, t.offset + t.n_bytes):
                digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
        return f"{digest:016x}"


def check_fits(codebooks: CodebookSet, model: Model) -> None:
    """Raises MismatchError unless the codebooks were made for this model: digest, rope base, and every layer's shape.

    A layer without codebook is accepted: its cache is not coded (sliding-window layers may stay f16).
    """
    with _header(model) as h:
        shape = model_shape(h)
        if codebooks.block_count != shape.block_count:
            raise MismatchError(
                f"{h.path}: found codebooks for {codebooks.block_count} layers, "
                f"the model has {shape.block_count}: {_RECALIBRATE}"
            )
        digest = model_digest(h)
        if codebooks.model_digest != digest:
            raise MismatchError(
                f"{h.path}: found codebooks made for model {codebooks.model_digest}, this is {digest}: {_RECALIBRATE}"
            )
        # Both are f32 in the file; one may have passed through a Python float.
        if np.float32(codebooks.rope_freq_base) != np.float32(shape.rope_freq_base):
            raise MismatchError(
                f"{h.path}: found codebooks made at rope base {codebooks.rope_freq_base:g}, "
                f"the model has {shape.rope_freq_base:g}: {_RECALIBRATE}"
            )
        for name, t in codebooks.types.items():
            for side, layers, D in (("K", t.k, shape.D_k), ("V", t.v, shape.D_v)):
                for i, cb in enumerate(layers):
                    if cb is not None and (cb.D, cb.n_head_kv) != (D[i], shape.n_head_kv[i]):
                        raise MismatchError(
                            f"{h.path}: blk.{i} {side} {name} codebook is for head size {cb.D} and {cb.n_head_kv} KV heads, "
                            f"the model has {D[i]} and {shape.n_head_kv[i]}: {_RECALIBRATE}"
                        )


# ---------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------


def embed(
    src_path: os.PathLike[str] | str,
    dst_path: os.PathLike[str] | str,
    codebooks: CodebookSet,
    progress: Progress | None = None,
) -> None:
    """Writes a copy of a GGUF file that carries ``codebooks``; older ``million.*`` keys are dropped.

    All other metadata, the tensor infos and the tensor data are copied byte by byte, in order. The copy is written to a
    temporary file in the destination's folder and renamed when it is complete: ``dst_path`` is never half a file, and
    on any error the temporary file is removed.

    Args:
        progress: called with (bytes done, bytes in all).

    Raises:
        InputError: source and destination are the same file; the source is one part of a split model; a file cannot be
            read or written; the disk is full.
        FormatError: the source is not a sound GGUF file.
        MismatchError: the codebooks do not fit the model.
    """
    src, dst = Path(src_path), Path(os.path.realpath(dst_path))
    if os.path.realpath(src) == str(dst) or (dst.exists() and src.exists() and os.path.samefile(src, dst)):
        raise InputError(f"{src}: found the same file as source and destination, need two: choose another output name")
    with GGUFHeader(src) as h:
        n_split = h.get("split.count", 0)
        if isinstance(n_split, int) and n_split > 1:
            raise InputError(
                f"{src}: found one part of {n_split} of a split model, need a single file: "
                f"merge it first with 'llama-gguf-split --merge {src} merged.gguf'"
            )
        check_fits(codebooks, h)
        kept = [e for e in h.kv.values() if not e.key.startswith(PREFIX)]
        added = _kv_bytes(codebooks)
        header = bytearray(b"GGUF" + struct.pack("<IQQ", h.version, len(h.tensors), len(kept) + len(added)))
        for e in kept:
            header += h.bytes(e.start, e.end)
        for raw in added:
            header += raw
        header += h.bytes(*h.tensor_info_range)
        header += bytes(_align(len(header), h.alignment) - len(header))

        n_data = max(0, h.size - h.data_offset)
        total = len(header) + n_data
        with _io_errors(dst, "write"):
            free = shutil.disk_usage(dst.parent).free
            if free < total:
                raise InputError(
                    f"{dst}: found {free} bytes free, need {total}: free some space, or choose another folder"
                )
        with _replacing(dst) as out:
            out.write(header)
            done = len(header)
            with open(src, "rb") as f:
                f.seek(h.data_offset)
                while chunk := f.read(_COPY_BYTES):
                    out.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
            if done != total:
                raise InputError(f"{src}: found {done} bytes while copying, need {total}: the file changed, try again")


@contextmanager
def _replacing(dst: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``dst`` when the block ends well, and is removed when it does not."""
    tmp = dst.parent / f".{dst.name}.{secrets.token_hex(6)}.tmp"
    with _io_errors(dst, "write"):
        # 0o666 lets the umask decide, as for any file a user writes; tempfile would make it private.
        fd = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            with open(fd, "wb") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            os.replace(tmp, dst)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
    if hasattr(os, "O_DIRECTORY"):  # make the rename itself durable; not possible on Windows
        folder = os.open(dst.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError:
            pass  # some network file systems refuse; the data itself is synced
        finally:
            os.close(folder)


def codebook_bytes(codebooks: Mapping[str, TypeCodebooks]) -> int:
    """Bytes that these codebooks take in a file, base64 included."""
    n = 0
    for t in codebooks.values():
        for cb in (*t.k, *t.v):
            if cb is not None:
                n_payload = payload_bytes(cb.spec, cb.D, cb.n_head_kv, cb.T is not None, cb.aniso is not None)
                n += (_BLOB_HEADER.size + n_payload + 2) // 3 * 4
    return n
