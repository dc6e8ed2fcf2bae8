"""A second reader of ``docs/format.md``: written from that page alone, with gguf-py and NumPy, and none of our readers.

What it decodes must be what the native code decodes; so must the codes that it makes.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from helpers import make_set, rows_for, write_model

from million_gguf import container, native, pq_ref

# ---- the reader: nothing below this line, up to the next one, may use million_gguf ----

TYPES = {"pq4": 2, "pq3": 2, "pq2": 4}  # dsub
HEADER = struct.Struct("<4sIHHHHHHIII")


@dataclass
class Head:
    """One KV head of a blob."""

    mu: npt.NDArray[np.float64]  # [D]
    T: npt.NDArray[np.float64]  # [D][D]
    T_inv: npt.NDArray[np.float64]  # [D][D]
    aniso: npt.NDArray[np.float64]  # [D]
    centroids: npt.NDArray[np.float64]  # [M][256][dsub]


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def read_blob(text: str, name: str) -> list[Head]:
    """The heads of a base64 string; none for an empty one."""
    if not text:
        return []
    blob = base64.b64decode(text, validate=True)
    magic, version, D, n_head_kv, M, dsub, n_codes, flags, n_payload, crc, zero = HEADER.unpack(blob[:32])
    payload = blob[32:]
    assert (magic, version, zero) == (b"MPQB", 2, 0)
    assert (dsub, n_codes) == (TYPES[name], {"pq4": D // 2, "pq3": 3 * D // 8, "pq2": D // 4}[name])
    assert (M * dsub, len(payload), zlib.crc32(payload)) == (D, n_payload, crc)
    assert flags in (0, 1, 2, 3)
    heads, at = [], 0

    def take(dtype: str, *shape: int) -> npt.NDArray[np.float64]:
        nonlocal at
        n = int(np.prod(shape))
        found = np.frombuffer(payload, dtype, n, at).reshape(shape)
        at += found.nbytes
        return found.astype(np.float64)

    for _ in range(n_head_kv):
        mu = take("<f4", D)
        T = take("<f2", D, D) if flags & 1 else np.eye(D)
        aniso = take("<f4", D) if flags & 2 else np.zeros(D)
        centroids = take("<f2", M, 256, dsub)
        heads.append(Head(mu, T, np.linalg.inv(T).astype(np.float16).astype(np.float64), aniso, centroids))
    optional = (2 * D * D if flags & 1 else 0) + (4 * D if flags & 2 else 0)
    assert at == n_payload == n_head_kv * (4 * D + optional + 512 * D)
    return heads


def code_of(name: str, M: int, m: int) -> int:
    """Which byte is the code of subspace m of M."""
    if name != "pq3":
        return m
    return 2 * (m // 4) + m % 4 if m % 4 < 2 else M // 2 + m // 4


def decode(head: Head, name: str, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    M = len(head.centroids)
    y = np.concatenate([centroids[codes[code_of(name, M, m)]] for m, centroids in enumerate(head.centroids)])
    return y @ head.T_inv + head.mu


def nearest(head: Head, name: str, y: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    M, _, dsub = head.centroids.shape
    total = np.zeros((code_of(name, M, M - 1) + 1, 256))
    for m, centroids in enumerate(head.centroids):
        total[code_of(name, M, m)] += ((centroids - y[m * dsub : (m + 1) * dsub]) ** 2).sum(axis=1)
    return total.argmin(axis=1)  # the lowest of equals


def encode(head: Head, name: str, x: npt.NDArray[np.float32]) -> list[int]:
    y = (x.astype(np.float16).astype(np.float64) - head.mu) @ head.T
    M, _, dsub = head.centroids.shape
    codes = nearest(head, name, y)
    for start in range(0, len(y), 32):
        strip = slice(start, start + 32)
        d = head.aniso[strip] * y[strip]
        if not d.any():
            continue

        def error(codes: npt.NDArray[np.intp], strip: slice = strip) -> npt.NDArray[np.float64]:
            chosen = [centroids[codes[code_of(name, M, m)]] for m, centroids in enumerate(head.centroids)]
            return (y - np.concatenate(chosen))[strip]

        def cost(e: npt.NDArray[np.float64], d: npt.NDArray[np.float64] = d) -> float:
            return float(e @ e + 3 * (e @ d) ** 2 / (d @ d))

        e = error(codes)
        moved = y.copy()
        moved[strip] += 0.75 * (e @ d / (d @ d)) * d
        others = nearest(head, name, moved)
        if cost(error(others)) < cost(e):
            mine = [code_of(name, M, m) for m in range(start // dsub, min(start + 32, len(y)) // dsub)]
            codes[mine] = others[mine]
    return codes.tolist()


def fnv_1a(data: bytes) -> str:
    digest = 0xCBF29CE484222325
    for byte in data:
        digest = (digest ^ byte) * 0x100000001B3 % (1 << 64)
    return f"{digest:016x}"


# ---- the comparison ----


@pytest.fixture(
    params=[
        (8, False, False), (64, True, False), (80, True, True), (128, False, False), (24, False, True), (128, True, True)
    ],
    ids=lambda p: f"D{p[0]}-T{int(p[1])}-A{int(p[2])}",
)  # fmt: skip
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with codebooks of every type, those of K with or without an anisotropy, and one layer without KV cache."""
    D, with_transform, with_aniso = request.param
    model = write_model(tmp_path / "model.gguf", n_layer=3, n_head=4, n_head_kv=(2, 0, 1), D=D)
    path = tmp_path / "pq.gguf"
    container.embed(model, path, make_set(model, with_transform=with_transform, with_aniso=with_aniso))
    return path


def test_metadata(file: Path) -> None:
    reader = GGUFReader(file)
    assert value(reader, "million.version") == 2
    assert value(reader, "million.types") == ["pq4", "pq3", "pq2"]
    assert value(reader, "million.block_count") == value(reader, "llama.block_count") == 3
    assert value(reader, "million.rope_freq_base") == value(reader, "llama.rope.freq_base")
    assert value(reader, "million.calibration.tokens") == 4096
    assert value(reader, "million.calibration.seed") == 7
    assert value(reader, "million.calibration.text_digest") == "ab" * 32
    assert value(reader, "million.calibration.tool") == "million-gguf test"
    for name in TYPES:
        for side in "kv":
            assert value(reader, f"million.{name}.{side}.error") == [0.25, 0.0, 0.25]
    norms = {t.name: t.data for t in reader.tensors if t.name.endswith(".attn_norm.weight")}
    data = b"".join(norms[f"blk.{i}.attn_norm.weight"].astype("<f4").tobytes() for i in range(3))
    assert value(reader, "million.model_digest") == fnv_1a(data)


@pytest.mark.parametrize("name", TYPES)
def test_codes_are_those_of_the_definition(file: Path, name: str) -> None:
    blob = value(GGUFReader(file), f"million.{name}.k")[0]
    heads, codebook = read_blob(blob, name), container.read(file).types[name].k[0]
    assert codebook is not None
    assert (codebook.aniso is not None) == any(head.aniso.any() for head in heads)
    x = rows_for(codebook, 20)
    codes = pq_ref.encode(codebook, x)
    for row in range(len(x)):
        for h, head in enumerate(heads):
            assert encode(head, name, x[row, h]) == codes[row, h].tolist()


@pytest.mark.native
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("side", ["k", "v"])
def test_codes_mean_the_same(file: Path, name: str, side: str) -> None:
    reason = native.unavailable()
    if reason:
        pytest.skip(reason)
    reader = GGUFReader(file)
    ours = container.read(file).types[name]
    blobs = value(reader, f"million.{name}.{side}")
    assert len(blobs) == 3 and blobs[1] == ""
    for layer in (0, 2):
        heads = read_blob(blobs[layer], name)
        codebook = getattr(ours, side)[layer]
        M = len(heads[0].centroids)
        n_codes = code_of(name, M, M - 1) + 1
        assert (len(heads), n_codes) == (codebook.n_head_kv, codebook.head_bytes)

        rng = np.random.default_rng(layer)
        random = rng.integers(0, 256, (5, len(heads), n_codes), dtype=np.uint8)  # any bytes are codes
        decoded = native.decode(codebook, random)
        for row in range(len(random)):
            for h, head in enumerate(heads):
                want = decode(head, name, random[row, h])
                # the native code adds D products in f32
                scale = np.abs(head.T_inv).sum(axis=0).max() * np.abs(head.centroids).max() + np.abs(head.mu).max()
                np.testing.assert_allclose(decoded[row, h], want, rtol=0, atol=2e-6 * scale)

        x = rows_for(codebook, 20, seed=layer)
        encoded = native.encode(codebook, x)
        equal = total = 0
        for row in range(len(x)):
            for h, head in enumerate(heads):
                wanted = encode(head, name, x[row, h])
                equal += sum(a == b for a, b in zip(wanted, encoded[row, h], strict=True))
                total += n_codes
        assert equal >= 0.999 * total, (equal, total)  # f32 may choose the other of two that are equally near
