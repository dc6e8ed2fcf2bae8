"""The GGUF container: what is written comes back, and everything that is wrong is refused by name."""

from __future__ import annotations

import base64
import errno
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as VT
from helpers import make_codebook, make_set, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from million_gguf import container
from million_gguf.container import GGUFHeader, blob_to_codebook, codebook_to_blob
from million_gguf.errors import FormatError, InputError, MismatchError
from million_gguf.pq_ref import Codebook
from million_gguf.spec import PQ_TYPES

TYPES = list(PQ_TYPES)


def assert_same_sets(a: container.CodebookSet, b: container.CodebookSet) -> None:
    assert (a.block_count, a.model_digest, a.calibration) == (b.block_count, b.model_digest, b.calibration)
    assert a.rope_freq_base == b.rope_freq_base
    assert list(a.types) == list(b.types)
    for name, t in a.types.items():
        u = b.types[name]
        assert (t.k_error, t.v_error) == (u.k_error, u.v_error)
        for x, y in zip([*t.k, *t.v], [*u.k, *u.v], strict=True):
            assert (x is None) == (y is None)
            assert x is None or y is None or x.equals(y)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture(scope="module")
def embedded(model: Path) -> Path:
    dst = model.with_name("embedded.gguf")
    container.embed(model, dst, make_set(model))
    return dst


# ---- blob ----


@given(
    name=st.sampled_from(TYPES), blocks=st.integers(1, 4), n_head_kv=st.integers(1, 3),
    with_transform=st.booleans(), with_aniso=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_blob_round_trip(
    name: str, blocks: int, n_head_kv: int, with_transform: bool, with_aniso: bool, seed: int
) -> None:
    cb = make_codebook(name, 8 * blocks, n_head_kv, seed, with_transform, with_aniso)
    blob = codebook_to_blob(cb)
    assert blob_to_codebook(blob, cb.spec).equals(cb)
    assert codebook_to_blob(blob_to_codebook(blob, cb.spec)) == blob


def test_blob_bytes_are_those_of_the_format() -> None:
    """Every field at the offset that docs/format.md states."""
    cb = make_codebook("pq3", 16, 2, with_transform=True)
    blob = codebook_to_blob(cb)
    assert blob[:4] == b"MPQB"
    assert struct.unpack_from("<IHHHHHH", blob, 4) == (2, 16, 2, 8, 2, 6, 1)
    per_head = 16 * 4 + 16 * 16 * 2 + 8 * 256 * 2 * 2
    assert struct.unpack_from("<III", blob, 20) == (2 * per_head, zlib.crc32(blob[32:]), 0)
    assert len(blob) == 32 + 2 * per_head
    head1 = blob[32 + per_head :]
    assert cb.T is not None
    assert np.array_equal(np.frombuffer(head1, "<f4", 16), cb.mu[1])
    assert np.array_equal(np.frombuffer(head1, "<f2", 256, 64).reshape(16, 16), cb.T[1])
    assert np.array_equal(np.frombuffer(head1, "<f2", -1, 64 + 512), cb.centroids[1].ravel())


def test_an_anisotropy_lies_before_the_centroids() -> None:
    for with_transform in (False, True):
        cb = make_codebook("pq4", 16, 2, with_transform=with_transform, with_aniso=True)
        blob = codebook_to_blob(cb)
        assert struct.unpack_from("<IH", blob, 4)[0] == 2, "the version stays"
        assert struct.unpack_from("<H", blob, 18) == (2 + with_transform,)
        per_head = 16 * 4 + with_transform * 16 * 16 * 2 + 16 * 4 + 16 * 256 * 2
        assert len(blob) == 32 + 2 * per_head
        assert cb.aniso is not None
        head1 = blob[32 + per_head :]
        at = 64 + with_transform * 512
        assert np.array_equal(np.frombuffer(head1, "<f4", 16, at), cb.aniso[1])
        assert np.array_equal(np.frombuffer(head1, "<f2", -1, at + 64), cb.centroids[1].ravel())


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_damaged_blob_never_gets_through(data: st.DataObject) -> None:
    """Any single changed byte is refused: header fields are checked one by one, the payload by its CRC."""
    cb = make_codebook("pq4", 8, 1, with_transform=data.draw(st.booleans()), with_aniso=data.draw(st.booleans()))
    blob = bytearray(codebook_to_blob(cb))
    at = data.draw(st.one_of(st.integers(0, 31), st.integers(0, len(blob) - 1)))
    blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((FormatError, MismatchError)):
        blob_to_codebook(bytes(blob), cb.spec)


@given(noise=st.binary(max_size=200))
@settings(max_examples=80, deadline=None)
def test_noise_is_refused(noise: bytes) -> None:
    for raw in (noise, b"MPQB" + noise, struct.pack("<4sI", b"MPQB", 2) + noise):
        with pytest.raises((FormatError, MismatchError)):
            blob_to_codebook(raw, PQ_TYPES["pq4"])


def good_blob(**kwargs: Any) -> bytes:
    return codebook_to_blob(make_codebook("pq4", 8, 2, **kwargs))


def header(blob: bytes, at: int, fmt: str, value: Any) -> bytes:
    b = bytearray(blob)
    struct.pack_into(fmt, b, at, value)
    return bytes(b)


def payload(blob: bytes, at: int, fmt: str, value: Any) -> bytes:
    """Changes payload bytes and makes the CRC right again."""
    b = bytearray(header(blob, 32 + at, fmt, value))
    struct.pack_into("<I", b, 24, zlib.crc32(bytes(b[32:])))
    return bytes(b)


def singular() -> bytes:
    blob = good_blob(with_transform=True)
    b = bytearray(blob)
    b[32 + 32 : 32 + 32 + 128] = bytes(128)  # T of head 0 becomes zero
    return payload(bytes(b), 0, "<f", 0.0)


# Offsets in the payload of a head of pq4, D 8: mu at 0; without transform, centroids at 32.
BLOBS: dict[str, tuple[Callable[[], bytes], type[Exception], str]] = {
    "empty": (lambda: b"", FormatError, "need a header of 32"),
    "half a header": (lambda: good_blob()[:31], FormatError, "found 31 bytes"),
    "header only": (lambda: good_blob()[:32], FormatError, "payload bytes"),
    "truncated": (lambda: good_blob()[:-1], FormatError, "payload bytes"),
    "too long": (lambda: good_blob() + b"\0", FormatError, "payload bytes"),
    "magic": (lambda: b"MPQX" + good_blob()[4:], FormatError, "magic"),
    "old version": (lambda: header(good_blob(), 4, "<I", 1), FormatError, "blob version 1, need 2: calibrate again"),
    "new version": (lambda: header(good_blob(), 4, "<I", 3), FormatError, "blob version 3, need 2: update"),
    "D of 12": (lambda: header(good_blob(), 8, "<H", 12), MismatchError, "head size 12"),
    "D of 0": (lambda: header(good_blob(), 8, "<H", 0), MismatchError, "head size 0"),
    "D of 512": (lambda: header(good_blob(), 8, "<H", 512), MismatchError, "head size 512"),
    "no heads": (lambda: header(good_blob(), 10, "<H", 0), FormatError, "0 KV heads"),
    "more heads": (lambda: header(good_blob(), 10, "<H", 65535), FormatError, "payload bytes"),
    "M": (lambda: header(good_blob(), 12, "<H", 5), FormatError, "M 5"),
    "dsub": (lambda: header(good_blob(), 14, "<H", 4), MismatchError, "dsub 4"),
    "bytes of codes": (
        lambda: header(good_blob(), 16, "<H", 3),
        MismatchError,
        "dsub 2 and 3 bytes of codes per head, pq4",
    ),
    "unknown flag": (lambda: header(good_blob(), 18, "<H", 4), FormatError, "flags 0x4"),
    "unknown flag beside others": (
        lambda: header(good_blob(with_transform=True, with_aniso=True), 18, "<H", 0x8003),
        FormatError,
        "flags 0x8003",
    ),
    "transform flag without one": (lambda: header(good_blob(), 18, "<H", 1), FormatError, "payload bytes"),
    "anisotropy flag without one": (lambda: header(good_blob(), 18, "<H", 2), FormatError, "payload bytes"),
    "anisotropy without its flag": (
        lambda: header(good_blob(with_aniso=True), 18, "<H", 0),
        FormatError,
        "payload bytes",
    ),
    "truncated, with anisotropy": (lambda: good_blob(with_aniso=True)[:-1], FormatError, "payload bytes"),
    "cut where the anisotropy is": (lambda: good_blob(with_aniso=True)[:70], FormatError, "found 38 payload bytes"),
    "announced length": (lambda: header(good_blob(), 20, "<I", 0xFFFFFFFF), FormatError, "payload bytes"),
    "crc": (lambda: header(good_blob(), 24, "<I", 1), FormatError, "CRC-32"),
    "reserved": (lambda: header(good_blob(), 28, "<I", 1), FormatError, "reserved"),
    "damaged payload": (lambda: header(good_blob(), 40, "<I", 123), FormatError, "CRC-32"),
    "NaN in mu": (lambda: payload(good_blob(), 0, "<f", float("nan")), FormatError, "mu with NaN"),
    "infinite mu": (lambda: payload(good_blob(), 4, "<f", float("inf")), FormatError, "mu with NaN"),
    "NaN centroid": (lambda: payload(good_blob(), 32, "<e", float("nan")), FormatError, "centroids with NaN"),
    "infinite centroid": (lambda: payload(good_blob(), 34, "<e", float("-inf")), FormatError, "centroids with NaN"),
    "NaN in T": (lambda: payload(good_blob(with_transform=True), 32, "<e", float("nan")), FormatError, "T with NaN"),
    "NaN in the anisotropy": (
        lambda: payload(good_blob(with_aniso=True), 32, "<f", float("nan")),
        FormatError,
        "aniso with NaN",
    ),
    "infinite anisotropy": (
        lambda: payload(good_blob(with_transform=True, with_aniso=True), 32 + 128 + 28, "<f", float("inf")),
        FormatError,
        "aniso with NaN",
    ),
    "singular T": (singular, FormatError, "condition number"),
}


@pytest.mark.parametrize("case", BLOBS)
def test_malformed_blob(case: str) -> None:
    make, error, message = BLOBS[case]
    with pytest.raises(error, match=message) as e:
        blob_to_codebook(make(), PQ_TYPES["pq4"], "blk.3 K pq4")
    assert "need" in str(e.value)
    assert "blk.3 K pq4" in str(e.value) or error is MismatchError


def test_a_bad_codebook_is_not_written() -> None:
    cb = make_codebook("pq4", 8, 1)
    centroids = cb.centroids.copy()
    centroids[0, 0, 0, 0] = np.inf
    with pytest.raises(MismatchError, match="finite"):
        codebook_to_blob(Codebook(cb.spec, cb.mu, None, centroids))
    with pytest.raises(MismatchError, match="aniso with NaN"):
        codebook_to_blob(Codebook(cb.spec, cb.mu, None, cb.centroids, np.full((1, 8), np.nan, np.float32)))


# ---- file ----


@pytest.mark.parametrize("names", [("pq4",), ("pq2", "pq4"), ("pq4", "pq3", "pq2")])
@pytest.mark.parametrize("with_aniso", [False, True])
@pytest.mark.parametrize("with_transform", [False, True])
def test_round_trip(
    tmp_path: Path, model: Path, names: tuple[str, ...], with_transform: bool, with_aniso: bool
) -> None:
    cs = make_set(model, names, with_transform=with_transform, with_aniso=with_aniso)
    container.embed(model, tmp_path / "out.gguf", cs)
    blobs = [b64(cb) for t in cs.types.values() for cb in (*t.k, *t.v) if cb is not None]
    assert container.codebook_bytes(cs.types) == sum(map(len, blobs))
    assert_same_sets(container.read(tmp_path / "out.gguf"), cs)
    assert container.has_codebooks(tmp_path / "out.gguf")
    assert not container.has_codebooks(model)


@given(
    n_layer=st.integers(1, 3),
    heads=st.lists(st.sampled_from([0, 1, 2]), min_size=3, max_size=3).filter(lambda h: h[0] > 0),
    blocks=st.integers(1, 2), names=st.sets(st.sampled_from(TYPES), min_size=1), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_round_trip_of_any_model(
    tmp_path_factory: pytest.TempPathFactory, n_layer: int, heads: list[int], blocks: int, names: set[str], seed: int
) -> None:
    """Layers without KV heads included."""
    folder = tmp_path_factory.mktemp("any")
    src = write_model(folder / "m.gguf", n_layer=n_layer, n_head_kv=heads[:n_layer], D=8 * blocks, seed=seed)
    cs = make_set(src, sorted(names), seed)
    container.embed(src, folder / "o.gguf", cs)
    assert_same_sets(container.read(folder / "o.gguf"), cs)


def raw_fields(path: Path) -> dict[str, bytes]:
    """Each metadata entry as its bytes in the file, found with gguf-py."""
    r = gguf.GGUFReader(path)
    return {
        f.name: b"".join(p.tobytes() for p in f.parts)
        for f in r.fields.values()
        if not f.name.startswith("GGUF.") and not f.name.startswith("million.")
    }


def nested_array_entry() -> bytes:
    """An array of two arrays, one of them empty: gguf-py's writer cannot make the empty one."""
    key = b"test.nested"
    inner = [struct.pack("<IQ2h", VT.INT16, 2, -1, 5), struct.pack("<IQ", VT.STRING, 0)]
    return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", VT.ARRAY, VT.ARRAY, 2) + b"".join(inner)


def insert_entries(path: Path, entries: list[bytes]) -> None:
    """Puts raw metadata entries before all others, keeping tensor data aligned."""
    with GGUFHeader(path) as h:
        first = 24
        head = bytearray(h.bytes(0, first)) + b"".join(entries) + h.bytes(first, h.tensor_info_range[1])
        struct.pack_into("<Q", head, 16, len(h.kv) + len(entries))
        head += bytes(-len(head) % h.alignment)
        body = h.bytes(h.data_offset, h.size)
    path.write_bytes(bytes(head) + body)


EXTRA = {
    "test.u8": (200, VT.UINT8), "test.i8": (-3, VT.INT8), "test.u16": (65535, VT.UINT16), "test.i16": (-9, VT.INT16),
    "test.u64": (2**63, VT.UINT64), "test.i64": (-(2**40), VT.INT64), "test.f64": (0.1, VT.FLOAT64),
    "test.bool": (True, VT.BOOL), "test.empty": ("", VT.STRING), "test.floats": ([0.5, 1.5], VT.ARRAY),
    "test.bools": ([True, False], VT.ARRAY),
}  # fmt: skip


@pytest.mark.parametrize("alignment", [32, 64, 256])
def test_embed_copies_everything_else_byte_by_byte(tmp_path: Path, alignment: int) -> None:
    src = write_model(tmp_path / "src.gguf", extra=EXTRA, alignment=alignment)
    insert_entries(src, [nested_array_entry()])
    dst = tmp_path / "dst.gguf"
    container.embed(src, dst, make_set(src))
    assert raw_fields(dst) == raw_fields(src)
    a, b = gguf.GGUFReader(src), gguf.GGUFReader(dst)
    assert (a.alignment, b.alignment) == (alignment, alignment)
    assert b.data_offset % alignment == 0
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    for s, t in zip(a.tensors, b.tensors, strict=True):
        assert (s.tensor_type, s.shape.tolist(), s.data.tobytes()) == (
            t.tensor_type,
            t.shape.tolist(),
            t.data.tobytes(),
        )
        assert s.data_offset - a.data_offset == t.data_offset - b.data_offset
    assert src.read_bytes()[a.data_offset :] == dst.read_bytes()[b.data_offset :]


def test_embed_keeps_tensor_types_that_gguf_py_does_not_know(tmp_path: Path, model: Path) -> None:
    src = tmp_path / "future.gguf"
    with GGUFHeader(model) as h:
        start, end = h.tensor_info_range
        t = h.tensors["blk.1.attn_q.weight"]
        raw = bytearray(h.bytes(0, h.size))
    at = raw.index(b"blk.1.attn_q.weight", start, end) + len("blk.1.attn_q.weight") + 4 + 16
    assert struct.unpack_from("<I", raw, at)[0] == t.type
    struct.pack_into("<I", raw, at, 999)
    src.write_bytes(raw)
    container.embed(src, tmp_path / "out.gguf", make_set(src))
    with GGUFHeader(tmp_path / "out.gguf") as h:
        assert h.tensors["blk.1.attn_q.weight"].type == 999
        assert h.bytes(h.data_offset, h.size) == bytes(raw[-(h.size - h.data_offset) :])


def test_embed_again_replaces_the_old_codebooks(tmp_path: Path, model: Path, embedded: Path) -> None:
    cs = make_set(model, ("pq3",), seed=50)
    container.embed(embedded, tmp_path / "again.gguf", cs)
    container.embed(model, tmp_path / "once.gguf", cs)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "once.gguf").read_bytes()
    assert_same_sets(container.read(tmp_path / "again.gguf"), cs)


def test_gguf_py_sees_what_format_md_states(model: Path, embedded: Path) -> None:
    r = gguf.GGUFReader(embedded)
    want = {
        "version": VT.UINT32, "block_count": VT.UINT32, "model_digest": VT.STRING, "rope_freq_base": VT.FLOAT32,
        "calibration.tokens": VT.UINT64, "calibration.text_digest": VT.STRING, "calibration.seed": VT.UINT64,
        "calibration.tool": VT.STRING,
    }  # fmt: skip
    for key, type_ in want.items():
        assert r.fields[f"million.{key}"].types == [type_]
    assert r.fields["million.types"].contents() == TYPES
    for name in TYPES:
        for side in "kv":
            assert r.fields[f"million.{name}.{side}"].types == [VT.ARRAY, VT.STRING]
            assert r.fields[f"million.{name}.{side}.error"].types == [VT.ARRAY, VT.FLOAT32]
            blob = base64.b64decode(r.fields[f"million.{name}.{side}"].contents(1))
            cb = getattr(container.read(embedded).types[name], side)[1]
            assert cb.equals(blob_to_codebook(blob, PQ_TYPES[name]))


def test_our_parser_agrees_with_gguf_py(embedded: Path) -> None:
    r = gguf.GGUFReader(embedded)
    with GGUFHeader(embedded) as h:
        assert list(h.kv) == [k for k in r.fields if not k.startswith("GGUF.")]
        for key, f in r.fields.items():
            if not key.startswith("GGUF."):
                assert h.get(key) == f.contents()
                assert h.kv[key].start == f.offset
        assert h.data_offset == r.data_offset
        for t in r.tensors:
            mine = h.tensors[t.name]
            assert (mine.dims, mine.type, mine.offset, mine.n_bytes) == (
                tuple(t.shape.tolist()), t.tensor_type, t.data_offset, t.n_bytes,
            )  # fmt: skip


def test_a_gguf_reader_is_taken_as_a_model(model: Path) -> None:
    r = gguf.GGUFReader(model)
    assert container.model_shape(r) == container.model_shape(model)
    assert container.model_digest(r) == container.model_digest(model)


def test_progress_reaches_the_end(tmp_path: Path, model: Path) -> None:
    seen: list[tuple[int, int]] = []
    container.embed(model, tmp_path / "o.gguf", make_set(model), progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1] == (tmp_path / "o.gguf").stat().st_size


# ---- digest and shape ----


def test_model_digest_is_fnv1a_over_the_norms(model: Path) -> None:
    r = gguf.GGUFReader(model)
    tensors = {t.name: t.data for t in r.tensors}
    h = 0xCBF29CE484222325
    for b in b"".join(tensors[f"blk.{i}.attn_norm.weight"].tobytes() for i in range(2)):
        h = ((h ^ b) * 0x100000001B3) % 2**64
    assert container.model_digest(model) == f"{h:016x}"
    assert container.model_digest(model) == container.model_digest(model).lower()


def test_model_digest_ignores_other_tensors(tmp_path: Path, model: Path, embedded: Path) -> None:
    other = write_model(tmp_path / "other.gguf", seed=1)
    assert container.model_digest(model) == container.model_digest(embedded)
    assert container.model_digest(model) != container.model_digest(other)


def test_model_without_norms_has_the_digest_of_nothing(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_block_count(1)
    w.add_head_count(1)
    w.add_embedding_length(8)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    assert container.model_digest(tmp_path / "m.gguf") == "cbf29ce484222325"


def test_model_shape_defaults_and_arrays(tmp_path: Path) -> None:
    s = container.model_shape(write_model(tmp_path / "a.gguf", n_layer=3, n_head=4, n_head_kv=2, D=16))
    assert (s.D_k, s.D_v, s.n_head_kv, s.n_head) == ((16,) * 3, (16,) * 3, (2,) * 3, (4,) * 3)
    assert s.rope_freq_base == 10000.0
    extra = {"llama.attention.key_length": (24, VT.UINT32), "llama.attention.value_length": (8, VT.UINT32)}
    s = container.model_shape(write_model(tmp_path / "b.gguf", n_head_kv=[0, 2], extra=extra, rope_freq_base=None))
    assert (s.D_k, s.D_v, s.n_head_kv, s.rope_freq_base) == ((24, 24), (8, 8), (0, 2), 0.0)
    extra |= {
        "llama.attention.key_length_swa": (16, VT.UINT32),
        "llama.attention.sliding_window_pattern": ([True, False], VT.ARRAY),
    }
    s = container.model_shape(write_model(tmp_path / "c.gguf", extra=extra))
    assert (s.D_k, s.D_v) == ((16, 24), (8, 8))


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.attention.head_count_kv": ([1, 2, 3], VT.ARRAY)},
        {"llama.attention.head_count_kv": ("two", VT.STRING)},
        {"llama.attention.key_length": (-4, VT.INT32)},
        {"llama.attention.key_length": (1.5, VT.FLOAT32)},
        {"llama.block_count": (0, VT.UINT32)},
        {"llama.block_count": (2**31, VT.UINT32)},
        {"llama.rope.freq_base": ("ten", VT.STRING)},
        {"general.architecture": (3, VT.UINT32)},
        {"general.architecture": ("gpt2", VT.STRING)},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_model_shape_refuses(tmp_path: Path, extra: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        container.model_shape(write_model(tmp_path / "m.gguf", extra=extra))


# ---- malformed files ----


def entry(key: str, type_: VT, value: bytes) -> bytes:
    k = key.encode()
    return struct.pack("<Q", len(k)) + k + struct.pack("<I", type_) + value


def gstr(s: str | bytes) -> bytes:
    raw = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(raw)) + raw


def strings(items: list[Any]) -> bytes:
    return struct.pack("<IQ", VT.STRING, len(items)) + b"".join(gstr(s) for s in items)


def floats(items: list[float]) -> bytes:
    return struct.pack(f"<IQ{len(items)}f", VT.FLOAT32, len(items), *items)


def b64(cb: Codebook) -> str:
    return base64.b64encode(codebook_to_blob(cb)).decode()


def edit(path: Path, changes: dict[str, bytes | None]) -> None:
    """Rewrites million.* entries as raw bytes; None removes one, and a new key is added."""
    with GGUFHeader(path) as h:
        entries = {e.key: h.bytes(e.start, e.end) for e in h.kv.values()}
        for key, raw in changes.items():
            if raw is None:
                del entries[key]
            else:
                entries[key] = raw
        head = bytearray(b"GGUF" + struct.pack("<IQQ", h.version, len(h.tensors), len(entries)))
        head += b"".join(entries.values()) + h.bytes(*h.tensor_info_range)
        head += bytes(-len(head) % h.alignment)
        body = h.bytes(h.data_offset, h.size)
    path.write_bytes(bytes(head) + body)


def change(key: str, type_: VT, value: bytes) -> dict[str, bytes | None]:
    return {f"million.{key}": entry(f"million.{key}", type_, value)}


K8 = ("pq4", 8, 2)  # what the small model needs
CASES: dict[str, tuple[Callable[[], dict[str, bytes | None]], type[Exception], str]] = {
    "version 1": (
        lambda: change("version", VT.UINT32, struct.pack("<I", 1)), FormatError, "million.version 1, need 2: calibrate again"),
    "version 3": (
        lambda: change("version", VT.UINT32, struct.pack("<I", 3)), FormatError, "million.version 3, need 2: update"),
    "version of wrong type": (lambda: change("version", VT.UINT64, struct.pack("<Q", 2)), FormatError, "value type"),
    "version is a string": (lambda: change("version", VT.STRING, gstr("2")), FormatError, "value type"),
    "no types": (lambda: change("types", VT.ARRAY, strings([])), FormatError, "need distinct names"),
    "unknown type": (lambda: change("types", VT.ARRAY, strings(["pq9"])), FormatError, "need distinct names"),
    "a type twice": (lambda: change("types", VT.ARRAY, strings(["pq4", "pq4"])), FormatError, "need distinct names"),
    "a type left out": (lambda: change("types", VT.ARRAY, strings(["pq4", "pq3"])), FormatError, "need pq2 in million.types"),
    "overlong types": (lambda: change("types", VT.ARRAY, strings(["pq4"] * 1000)), FormatError, "found 1000 entries"),
    "types of numbers": (lambda: change("types", VT.ARRAY, floats([1.0])), FormatError, "array of value type"),
    "types is a string": (lambda: change("types", VT.STRING, gstr("pq4")), FormatError, "value type"),
    "layer count": (lambda: change("block_count", VT.UINT32, struct.pack("<I", 3)), MismatchError, "3 layers, the model has 2"),
    "layer count as u64": (lambda: change("block_count", VT.UINT64, struct.pack("<Q", 2)), FormatError, "value type"),
    "other model": (lambda: change("model_digest", VT.STRING, gstr("0" * 16)), MismatchError, "made for model 0{16}"),
    "digest is not hex": (lambda: change("model_digest", VT.STRING, gstr("z" * 16)), FormatError, "hexadecimal"),
    "digest too long": (lambda: change("model_digest", VT.STRING, gstr("0" * 17)), FormatError, "hexadecimal"),
    "digest is not UTF-8": (lambda: change("model_digest", VT.STRING, gstr(b"\xff" * 16)), FormatError, "not UTF-8, need"),
    "other rope base": (lambda: change("rope_freq_base", VT.FLOAT32, struct.pack("<f", 5e5)), MismatchError, "rope base 500000"),
    "rope base NaN": (lambda: change("rope_freq_base", VT.FLOAT32, struct.pack("<f", float("nan"))), FormatError, "finite"),
    "overlong k": (lambda: change("pq4.k", VT.ARRAY, strings([""] * 3)), FormatError, "found 3 entries, need 2"),
    "short v": (lambda: change("pq4.v", VT.ARRAY, strings([""])), FormatError, "found 1 entries, need 2"),
    "k of numbers": (lambda: change("pq4.k", VT.ARRAY, floats([0, 0])), FormatError, "array of value type"),
    "k is a string": (lambda: change("pq4.k", VT.STRING, gstr("")), FormatError, "value type"),
    "k is not base64": (lambda: change("pq4.k", VT.ARRAY, strings(["!!!!", "!!!!"])), FormatError, "invalid base64"),
    "k has line breaks": (
        lambda: change("pq4.k", VT.ARRAY, strings([b64(make_codebook(*K8))[:76] + "\n"] * 2)), FormatError, "invalid base64"),
    "k without padding": (
        lambda: change("pq4.k", VT.ARRAY, strings([b64(make_codebook(*K8)).rstrip("=") + "A"] * 2)), FormatError, "."),
    "k is not ASCII": (lambda: change("pq4.k", VT.ARRAY, strings(["é", "é"])), FormatError, "invalid base64"),
    "k is noise": (lambda: change("pq4.k", VT.ARRAY, strings(["QUJD", "QUJD"])), FormatError, "blk.0 K pq4: found 3 bytes"),
    "no codebook at all": (
        lambda: change("pq4.k", VT.ARRAY, strings(["", ""])) | change("pq4.v", VT.ARRAY, strings(["", ""])),
        FormatError, "no layer with a codebook"),
    "K without V": (
        lambda: change("pq4.k", VT.ARRAY, strings([b64(make_codebook(*K8)), ""])), FormatError, "only one of K and V"),
    "wrong head size": (
        lambda: change("pq4.k", VT.ARRAY, strings([b64(make_codebook("pq4", 16, 2))] * 2)),
        MismatchError, "blk.0 K pq4 codebook is for head size 16 and 2 KV heads, the model has 8 and 2"),
    "wrong head count": (
        lambda: change("pq4.v", VT.ARRAY, strings([b64(make_codebook("pq4", 8, 3))] * 2)), MismatchError, "3 KV heads"),
    "another type's blob": (
        lambda: change("pq4.k", VT.ARRAY, strings([b64(make_codebook("pq3", 8, 2))] * 2)), MismatchError, "3 bytes of codes"),
    "anisotropy in V": (
        lambda: change("pq4.v", VT.ARRAY, strings([b64(make_codebook(*K8)), b64(make_codebook(*K8, with_aniso=True))])),
        FormatError, "blk.1 V pq4: found an anisotropy, need none.*calibrate again"),
    "error is NaN": (
        lambda: change("pq4.k.error", VT.ARRAY, floats([float("nan"), 0])), FormatError, "found error nan"),
    "error is negative": (lambda: change("pq4.v.error", VT.ARRAY, floats([-1.0, 0])), FormatError, "found error -1"),
    "overlong error": (lambda: change("pq4.v.error", VT.ARRAY, floats([0.0] * 9)), FormatError, "found 9 entries, need 2"),
    "tokens as u32": (lambda: change("calibration.tokens", VT.UINT32, struct.pack("<I", 1)), FormatError, "value type"),
}  # fmt: skip

KEYS = [
    "version", "types", "block_count", "model_digest", "rope_freq_base", "calibration.tokens", "calibration.text_digest",
    "calibration.seed", "calibration.tool", "pq4.k", "pq3.v", "pq2.k.error", "pq2.v.error",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_malformed_metadata(case: str, tmp_path: Path, embedded: Path) -> None:
    make, error, message = CASES[case]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(embedded.read_bytes())
    edit(bad, make())
    with pytest.raises(error, match=message) as e:
        container.read(bad)
    assert type(e.value) is error
    assert "bad.gguf" in str(e.value)
    assert any(word in str(e.value) for word in ("need", "the model has", "this is")), "says what was needed"


@pytest.mark.parametrize("key", KEYS)
def test_missing_key(key: str, tmp_path: Path, embedded: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(embedded.read_bytes())
    edit(bad, {f"million.{key}": None})
    with pytest.raises(FormatError, match=f"found no key million.{key}, need it"):
        container.read(bad)


def test_the_editor_itself_keeps_a_file_sound(tmp_path: Path, embedded: Path) -> None:
    """Otherwise the tests above could pass for the wrong reason."""
    same = tmp_path / "same.gguf"
    same.write_bytes(embedded.read_bytes())
    edit(same, change("calibration.tool", VT.STRING, gstr("million-gguf test")))
    assert_same_sets(container.read(same), container.read(embedded))


def test_no_codebooks(model: Path) -> None:
    with pytest.raises(FormatError, match="found no codebooks.*run 'million calibrate'"):
        container.read(model)


def test_not_a_gguf(tmp_path: Path) -> None:
    for raw, message in [
        (b"", "found 0 bytes"), (b"GGUF", "found 4 bytes"), (b"PK\3\4" + bytes(100), "found magic"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(9), "GGUF version 1, need 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(9), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(60), "string of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("k", VT.ARRAY, struct.pack("<IQ", VT.UINT8, 2**62)), "array of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("k", VT.ARRAY, struct.pack("<IQ", VT.ARRAY, 1) * 50), "unknown value type"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("k", 99, bytes(60)), "unknown value type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry("k", VT.UINT8, b"1") * 2, "there twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("general.alignment", VT.UINT32, struct.pack("<I", 3)), "power of two"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("general.alignment", VT.UINT8, b"\x20"), "not u32"),
    ]:  # fmt: skip
        path = tmp_path / "x.gguf"
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=message):
            container.read(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        container.read(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="cannot read"):
        container.read(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path, model: Path) -> None:
    """Cut in the header or the data, at any byte: FormatError, nothing else."""
    with GGUFHeader(model) as h:
        end = max(t.offset + (t.n_bytes or 0) for t in h.tensors.values())  # only padding follows
    whole = model.read_bytes()
    path = tmp_path / "cut.gguf"
    for n in [*range(0, end, 7), end - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(FormatError):
            container.model_digest(path)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_damage_is_an_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Changed header bytes may give another sound file, but never an exception of another kind."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damage.gguf"
    if not (folder / "damage-src.gguf").exists():
        write_model(folder / "damage-src.gguf")
        container.embed(
            folder / "damage-src.gguf", folder / "damage-ok.gguf", make_set(folder / "damage-src.gguf", ("pq3",))
        )
    raw = bytearray((folder / "damage-ok.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 1200))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        container.read(path)
    except (FormatError, MismatchError):
        pass


# ---- writing: what can go wrong ----


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_refuses_to_overwrite_its_source(tmp_path: Path) -> None:
    src = write_model(tmp_path / "m.gguf")
    before = src.read_bytes()
    (tmp_path / "link.gguf").symlink_to(src)
    os.link(src, tmp_path / "hard.gguf")
    for dst in (src, tmp_path / "." / "m.gguf", tmp_path / "link.gguf", tmp_path / "hard.gguf"):
        with pytest.raises(InputError, match="same file"):
            container.embed(src, dst, make_set(src))
    assert src.read_bytes() == before


def test_refuses_a_split_model(tmp_path: Path) -> None:
    src = write_model(tmp_path / "m-00001-of-00002.gguf", extra={"split.count": (2, VT.UINT16)})
    with pytest.raises(InputError, match="llama-gguf-split --merge"):
        container.embed(src, tmp_path / "o.gguf", make_set(src))
    one = write_model(tmp_path / "one.gguf", extra={"split.count": (1, VT.UINT16)})
    container.embed(one, tmp_path / "o.gguf", make_set(one))


def test_refuses_codebooks_of_another_model(tmp_path: Path, model: Path) -> None:
    other = write_model(tmp_path / "other.gguf", seed=5)
    with pytest.raises(MismatchError, match="made for model"):
        container.embed(model, tmp_path / "o.gguf", make_set(other))
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), SystemExit(1)])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, model: Path, error: BaseException
) -> None:
    dst = tmp_path / "o.gguf"
    dst.write_bytes(b"old")

    def stop(done: int, total: int) -> None:
        assert len(leftovers(tmp_path)) == 1, "the copy is under way"
        raise error

    with pytest.raises(type(error)):
        container.embed(model, dst, make_set(model), progress=stop)
    assert dst.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["o.gguf"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failing_disk_is_an_input_error(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=f"o.gguf: cannot write: {os.strerror(code)}"):
        container.embed(model, tmp_path / "o.gguf", make_set(model))
    assert list(tmp_path.iterdir()) == []


def test_an_anisotropy_in_v_is_not_written(model: Path) -> None:
    cs = make_set(model, ("pq4",), with_aniso=True)
    t = cs.types["pq4"]
    assert all(cb is not None and cb.aniso is not None for cb in t.k)
    with pytest.raises(MismatchError, match="blk.0 V pq4: found an anisotropy, need none"):
        replace(cs, types={"pq4": replace(t, v=t.k)})


def test_too_little_space_is_known_before_writing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container.shutil, "disk_usage", lambda _: type("U", (), {"free": 100})())
    with pytest.raises(InputError, match="found 100 bytes free, need"):
        container.embed(model, tmp_path / "o.gguf", make_set(model))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        container.embed(model, tmp_path / "none" / "o.gguf", make_set(model))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path, model: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot write: Permission denied"):
            container.embed(model, tmp_path / "o.gguf", make_set(model))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_output_has_ordinary_permissions(tmp_path: Path, model: Path) -> None:
    container.embed(model, tmp_path / "o.gguf", make_set(model))
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "o.gguf").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


# ---- size ----


def test_llama_3_1_8b_geometry_opens_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """32 layers, 8 KV heads, D 128, all three types: stock gguf-py must open the file in under 2 s (design.md, 5)."""
    src = write_model(tmp_path / "m.gguf", n_layer=32, n_head=32, n_head_kv=8, D=128)
    shape = container.model_shape(src)
    types = {}
    for name in TYPES:
        cb = make_codebook(name, 128, 8)  # one codebook for all layers: only its size matters
        types[name] = container.TypeCodebooks([cb] * 32, [cb] * 32, [0.1] * 32, [0.1] * 32)
    cs = container.CodebookSet(
        32, container.model_digest(src), shape.rope_freq_base, container.Calibration(1, "0" * 64, 0, "test"), types
    )
    dst = tmp_path / "o.gguf"
    t0 = time.perf_counter()
    container.embed(src, dst, cs)
    t1 = time.perf_counter()
    gguf.GGUFReader(dst)
    t2 = time.perf_counter()
    read_back = container.read(dst)
    t3 = time.perf_counter()
    with capsys.disabled():
        megabytes = container.codebook_bytes(types) / 1e6
        print(
            f"\n  {megabytes:.1f} MB of codebooks: embed {t1 - t0:.2f} s, GGUFReader {t2 - t1:.3f} s, "
            f"container.read {t3 - t2:.2f} s"
        )
    assert t2 - t1 < 2.0
    assert (
        container.codebook_bytes(types)
        < dst.stat().st_size - src.stat().st_size
        < container.codebook_bytes(types) + 4096
    )
    assert read_back.types["pq2"].v[31] is not None
