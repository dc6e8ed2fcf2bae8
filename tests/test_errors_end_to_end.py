"""Malformed inputs through the command line: exit code 2, one clear line, no traceback, nothing left behind, no crash."""

from __future__ import annotations

import base64
import errno
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Result, environment
from gguf import GGUFValueType as VT
from gguf_edit import edit, encoded, string_array, strings

from million_gguf import container
from million_gguf.errors import MillionError

Run = Callable[..., Result]
HEADER_BYTES = 32  # of a blob, docs/format.md


def refused(done: Result, *words: str) -> None:
    """A fault of the input, told in one line, the last one."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert done.err.count("million: error: ") == 1, done.err
    assert done.err.splitlines()[-1].startswith("million: error: "), done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err


# ---- files that are no model ----


def _empty(path: Path, good: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path, good: Path) -> None:
    path.write_text("I am not a model.\n" * 50)


def _zeros(path: Path, good: Path) -> None:
    path.write_bytes(bytes(1 << 16))


def _magic_alone(path: Path, good: Path) -> None:
    path.write_bytes(b"GGUF")


def _old_version(path: Path, good: Path) -> None:
    raw = bytearray(good.read_bytes())
    raw[4:8] = struct.pack("<I", 1)
    path.write_bytes(raw)


def _big_endian(path: Path, good: Path) -> None:
    raw = bytearray(good.read_bytes())
    raw[4:8] = struct.pack(">I", 3)
    path.write_bytes(raw)


def _wild_counts(path: Path, good: Path) -> None:
    raw = bytearray(good.read_bytes())
    raw[8:24] = b"\xff" * 16
    path.write_bytes(raw)


def _cut_in_header(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:200])


def _cut_in_data(path: Path, good: Path) -> None:
    path.write_bytes(good.read_bytes()[:-64])


def _directory(path: Path, good: Path) -> None:
    path.mkdir()


def _missing(path: Path, good: Path) -> None:
    pass


def _dangling(path: Path, good: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


NOT_A_MODEL = [
    _empty, _text, _zeros, _magic_alone, _old_version, _big_endian, _wild_counts, _cut_in_header, _cut_in_data,
    _directory, _missing, _dangling,
]  # fmt: skip


@pytest.mark.parametrize("command", ["inspect", "calibrate"])
@pytest.mark.parametrize("make", NOT_A_MODEL, ids=lambda f: f.__name__[1:])
def test_not_a_model(million: Run, tmp_path: Path, tiny_pq: Path, make: Any, command: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    bad = folder / "bad.gguf"
    make(bad, tiny_pq)
    before = sorted(folder.iterdir())
    output = () if command == "inspect" else ("-o", folder / "out.gguf")
    refused(million(command, bad, *output), "bad.gguf")
    assert sorted(folder.iterdir()) == before


@pytest.mark.native
@pytest.mark.parametrize("make", NOT_A_MODEL, ids=lambda f: f.__name__[1:])
def test_chat_with_what_is_not_a_model(program: Run, tmp_path: Path, tiny_pq: Path, make: Any) -> None:
    """In a process of its own: native code reads this file."""
    bad = tmp_path / "bad.gguf"
    make(bad, tiny_pq)
    refused(program("chat", bad, "-p", "hello"), "bad.gguf")


# ---- codebooks that are wrong ----


def _blob(change: Callable[[bytearray], Any]) -> Callable[[Path], dict[str, bytes | None]]:
    """Change the first K blob of pq4; the checksum is left as it was."""

    def changes(path: Path) -> dict[str, bytes | None]:
        blobs = strings(path, "million.pq4.k")
        raw = bytearray(base64.b64decode(blobs[0]))
        raw = change(raw) or raw
        blobs[0] = base64.b64encode(raw).decode()
        return {"million.pq4.k": string_array(blobs)}

    return changes


def _field(offset: int, fmt: str, value: int) -> Callable[[Path], dict[str, bytes | None]]:
    return _blob(lambda raw: struct.pack_into(fmt, raw, offset, value))


def _payload(fmt: str, value: float, offset: int = 0) -> Callable[[Path], dict[str, bytes | None]]:
    """Change the payload and make the checksum right again."""

    def change(raw: bytearray) -> None:
        struct.pack_into(fmt, raw, HEADER_BYTES + offset, value)
        struct.pack_into("<I", raw, 24, zlib.crc32(raw[HEADER_BYTES:]))

    return _blob(change)


def _last_centroid_nan(path: Path) -> dict[str, bytes | None]:
    blobs = strings(path, "million.pq4.k")
    raw = base64.b64decode(blobs[0])
    return _payload("<e", float("nan"), len(raw) - HEADER_BYTES - 2)(path)


def _list(key: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], dict[str, bytes | None]]:
    return lambda path: {key: string_array(change(strings(path, key)))}


def _set(key: str, type_: VT, value: Any) -> Callable[[Path], dict[str, bytes | None]]:
    return lambda path: {key: encoded(type_, value)}


def _drop(key: str) -> Callable[[Path], dict[str, bytes | None]]:
    return lambda path: {key: None}


BAD_CODEBOOKS: dict[str, Callable[[Path], dict[str, bytes | None]]] = {
    "format version of the future": _set("million.version", VT.UINT32, 3),
    "format version of the past": _set("million.version", VT.UINT32, 1),
    "format version as text": _set("million.version", VT.STRING, "2"),
    "no version": _drop("million.version"),
    "no types": _drop("million.types"),
    "empty types": _set("million.types", VT.ARRAY, (VT.STRING, [])),
    "unknown type": _set("million.types", VT.ARRAY, (VT.STRING, ["pq4", "pq9"])),
    "a type named twice": _set("million.types", VT.ARRAY, (VT.STRING, ["pq4", "pq4"])),
    "a type without codebooks": _drop("million.pq4.v"),
    "wrong layer count": _set("million.block_count", VT.UINT32, 7),
    "overlong array": _list("million.pq4.k", lambda b: b + b),
    "array too short": _list("million.pq4.k", lambda b: b[:-1]),
    "array of numbers": _set("million.pq4.k", VT.ARRAY, (VT.UINT32, [1, 2])),
    "another model's digest": _set("million.model_digest", VT.STRING, "0123456789abcdef"),
    "digest that is none": _set("million.model_digest", VT.STRING, "xyz"),
    "another rope base": _set("million.rope_freq_base", VT.FLOAT32, 12345.0),
    "not base64": _list("million.pq4.k", lambda b: ["*" + b[0][1:], *b[1:]]),
    "base64 without padding": _list("million.pq4.k", lambda b: [b[0][:-1], *b[1:]]),
    "base64 with line breaks": _list("million.pq4.k", lambda b: [b[0][:8] + "\n" + b[0][8:], *b[1:]]),
    "empty blob of a layer with KV heads": _list("million.pq4.k", lambda b: ["", *b[1:]]),
    "truncated blob": _blob(lambda raw: raw[:-6]),
    "blob of a header alone": _blob(lambda raw: raw[:HEADER_BYTES]),
    "blob of four bytes": _blob(lambda raw: raw[:4]),
    "blob that goes on": _blob(lambda raw: raw + bytes(12)),
    "wrong magic": _field(0, "<4s", b"FAIS"),  # type: ignore[arg-type]
    "wrong blob version": _field(4, "<I", 9),
    "blob version of the past": _field(4, "<I", 1),
    "wrong D": _field(8, "<H", 16),
    "D of zero": _field(8, "<H", 0),
    "D of 65535": _field(8, "<H", 65535),
    "wrong n_head_kv": _field(10, "<H", 3),
    "wrong M": _field(12, "<H", 1),
    "wrong dsub": _field(14, "<H", 4),
    "wrong bytes of codes": _field(16, "<H", 6),
    "unknown flag": _field(18, "<H", 2),
    "wrong transform flag": _blob(lambda raw: raw.__setitem__(18, raw[18] ^ 1)),
    "wrong payload length": _field(20, "<I", 0xFFFFFFF0),
    "wrong checksum": _field(24, "<I", 1),
    "reserved field in use": _field(28, "<I", 1),
    "payload damaged": _blob(lambda raw: raw.__setitem__(HEADER_BYTES + 5, raw[HEADER_BYTES + 5] ^ 1)),
    "NaN mean": _payload("<f", float("nan")),
    "infinite mean": _payload("<f", float("inf")),
    "NaN centroid": _last_centroid_nan,
    "another type's codebooks": lambda path: {"million.pq4.k": string_array(strings(path, "million.pq3.k"))},
}
# Notes of how a file was made: the package checks them, the runtime does not need them.
BAD_NOTES: dict[str, Callable[[Path], dict[str, bytes | None]]] = {
    "no provenance": _drop("million.calibration.tokens"),
    "errors of the wrong length": _set("million.pq4.k.error", VT.ARRAY, (VT.FLOAT32, [0.0])),
    "negative errors": lambda path: _negative_errors(path),
}


def _negative_errors(path: Path) -> dict[str, bytes | None]:
    n = len(strings(path, "million.pq4.k"))
    return {"million.pq4.k.error": encoded(VT.ARRAY, (VT.FLOAT32, [-1.0] * n))}


# libllama keeps a layer without a codebook in f16, which loses nothing; the container wants K and V of a layer alike
LAYER_STAYS_F16 = {"empty blob of a layer with KV heads"}


def test_there_are_enough_cases() -> None:
    assert len(NOT_A_MODEL) + len(BAD_CODEBOOKS) + len(BAD_NOTES) >= 25


@pytest.mark.parametrize("case", [*BAD_CODEBOOKS, *BAD_NOTES])
def test_inspect_refuses_bad_codebooks(million: Run, tmp_path: Path, tiny_pq: Path, case: str) -> None:
    bad = edit(tiny_pq, tmp_path / "bad.gguf", {**BAD_CODEBOOKS, **BAD_NOTES}[case](tiny_pq))
    refused(million("inspect", bad), "bad.gguf")


NATIVE_CASES = """
import sys
from million_gguf import Llama, MillionError
for path in sys.argv[1:]:
    for kv_cache in ("pq4", "auto"):
        try:
            Llama(path, kv_cache=kv_cache, n_ctx=256, verbose=False).close()
        except MillionError as e:
            print("refused", path, kv_cache, " ".join(str(e).split()), flush=True)
        else:
            print("taken", path, kv_cache, flush=True)
    llm = Llama(path, kv_cache="f16", n_ctx=256, verbose=False)  # the model itself is sound, and still runs
    print("runs", path, len(llm("x", max_tokens=1)["choices"]), flush=True)
    llm.close()
"""


@pytest.mark.native
def test_native_code_refuses_bad_codebooks(tmp_path: Path, demo_gguf: Path) -> None:
    """All of them in one process, which has to live through it. The same file still runs with an f16 cache."""
    names = {f"{i}.gguf": case for i, case in enumerate(BAD_CODEBOOKS)}
    for name, case in names.items():
        edit(demo_gguf, tmp_path / name, BAD_CODEBOOKS[case](demo_gguf))
    command = [sys.executable, "-c", NATIVE_CASES, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    for name, case in names.items():
        for kv_cache in ("pq4", "auto"):
            line = next(x for x in lines if x.split()[1:3] == [name, kv_cache])
            if kv_cache == "auto" and case in NO_PQ4_AT_ALL:
                continue  # auto may take another type, or f16, and says so
            if case in LAYER_STAYS_F16:
                assert line.startswith("taken"), (case, line)
                continue
            assert line.startswith("refused"), (case, line)
            assert len(line) > 60, (case, line)  # with a reason
        assert f"runs {name} 1" in lines, case


# Files that have no codebooks for pq4, as far as a reader can tell: "auto" has something else to take.
NO_PQ4_AT_ALL = {"no version"}


@pytest.mark.parametrize("command", ["inspect"])
def test_a_million_file_without_model(million: Run, tmp_path: Path, tiny_pq: Path, command: str) -> None:
    refused(million(command, edit(tiny_pq, tmp_path / "bad.gguf", {"llama.block_count": None})), "block_count")
    refused(
        million(command, edit(tiny_pq, tmp_path / "bad.gguf", {"general.architecture": None})), "general.architecture"
    )


# ---- outputs that cannot be written ----


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that must be empty again when the test ends."""
    path = tmp_path / "out"
    path.mkdir()
    yield path
    assert list(path.iterdir()) == []


def test_output_in_a_folder_that_is_not_there(million: Run, tiny: Path, folder: Path) -> None:
    refused(million("calibrate", tiny, "-o", folder / "no" / "out.gguf"), "no folder")


def test_output_that_is_a_folder(million: Run, tiny: Path, tmp_path: Path, folder: Path) -> None:
    refused(million("calibrate", tiny, "-o", folder), "is a folder")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission(million: Run, tiny: Path, folder: Path) -> None:
    folder.chmod(0o555)
    try:
        refused(million("calibrate", tiny, "-o", folder / "out.gguf"), "ermission")
    finally:
        folder.chmod(0o755)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read anything")
@pytest.mark.parametrize("command", ["inspect", "calibrate"])
def test_input_without_permission(million: Run, tiny: Path, folder: Path, command: str) -> None:
    tiny.chmod(0)
    output = () if command == "inspect" else ("-o", folder / "out.gguf")
    refused(million(command, tiny, *output), "ermission")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_output_that_the_system_refuses(
    million: Run, tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As a read-only disk, or a folder without permission, answers; for root too."""

    def touch(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "touch", touch)
    refused(million("calibrate", tiny, "-o", folder / "out.gguf"), os.strerror(code))


class NoRows:
    """In the place of a capture: rows for the tiny model, without running it."""

    def __init__(self, shape: container.ModelShape) -> None:
        self._shape = shape
        self.n_layer = shape.block_count

    def shape(self, layer: int, kind: int) -> tuple[int, int]:
        return self._shape.n_head_kv[layer], (self._shape.D_v if kind == 1 else self._shape.D_k)[layer]

    def rows(self, layer: int, kind: int) -> np.ndarray[Any, Any]:
        rng = np.random.default_rng(layer * 2 + kind)
        return rng.standard_normal((1024, *self.shape(layer, kind))).astype(np.float32)

    def weights(self, layer: int) -> np.ndarray[Any, Any]:
        return np.ones((1024, self._shape.n_head[layer], 2), dtype=np.float32)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``calibrate`` work on the tiny model: rows are made up, everything else is real."""
    from contextlib import contextmanager

    capture = pytest.importorskip("million_gguf.converters.capture", exc_type=MillionError)

    @contextmanager
    def fake(path: Any, text: str, shape: container.ModelShape, **options: Any) -> Iterator[Any]:
        yield capture.Captured(NoRows(shape), 1024)

    monkeypatch.setattr(capture, "capture", fake)
    monkeypatch.setattr(capture, "Capture", NoRows)


@pytest.mark.native
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full_at_the_end(
    million: Run, tiny: Path, folder: Path, no_model: None, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    refused(million("calibrate", tiny, "-o", folder / "out.gguf", "--types", "pq2", "--tokens", 1024), "No space left")


@pytest.mark.native
def test_disk_full_while_writing(million: Run, tiny: Path, tmp_path: Path, no_model: None) -> None:
    """A real full disk: a file system of 16 KiB, whose free space the checks are lied to about."""
    small = tmp_path / "small"
    small.mkdir()
    if os.name != "posix" or shutil.which("mount") is None:
        pytest.skip("there is no mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    try:
        free = container.shutil.disk_usage
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: free("/"))
            refused(
                million("calibrate", tiny, "-o", small / "out.gguf", "--types", "pq4", "--tokens", 1024),
                "No space left",
            )
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.native
def test_too_little_space(
    million: Run, tiny: Path, folder: Path, no_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10))
    refused(million("calibrate", tiny, "-o", folder / "out.gguf"), "GB free")


@pytest.mark.native
def test_the_fixture_for_these_tests_works(million: Run, tiny: Path, tmp_path: Path, no_model: None) -> None:
    """Without a fault in the way the same call writes a sound file: the tests above fail for the reason they name."""
    out = tmp_path / "out.gguf"
    done = million("calibrate", tiny, "-o", out, "--types", "pq2,pq4")
    assert done.code == 0, done.err
    assert set(container.read(out).types) == {"pq2", "pq4"}


# ---- inputs of the other commands ----


def test_a_text_that_cannot_be_used(million: Run, tiny: Path, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 5000)
    refused(million("calibrate", tiny, "-o", folder / "o.gguf", "--text", tmp_path / "latin.txt"), "UTF-8")
    refused(million("calibrate", tiny, "-o", folder / "o.gguf", "--text", tmp_path / "none.txt"), "none.txt")
    refused(million("calibrate", tiny, "-o", folder / "o.gguf", "--types", "pq5"), "pq4")
    refused(million("calibrate", tiny, "-o", folder / "o.gguf", "--tokens", "100"), "too few")


@pytest.mark.native
def test_a_text_that_is_too_short(million: Run, plain_gguf: Path, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "short.txt").write_text("Hello.")
    refused(
        million("calibrate", plain_gguf, "-o", folder / "out.gguf", "--text", tmp_path / "short.txt"), "longer text"
    )


def test_convert_what_is_no_checkpoint(million: Run, tiny: Path, tmp_path: Path, folder: Path) -> None:
    refused(million("convert", tmp_path / "none", "-o", folder / "o.gguf"), "no such folder")
    refused(million("convert", tiny, "-o", folder / "o.gguf"), "million calibrate")
    refused(million("convert", folder, "-o", folder / "o.gguf"), "config.json")


def test_demo_of_what_is_no_checkpoint(million: Run, tmp_path: Path) -> None:
    done = million("demo", "--model", tmp_path / "none")
    assert done.code == 2
    assert "no such folder" in done.err
