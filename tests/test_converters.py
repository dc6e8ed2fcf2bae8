"""Capture, calibration and conversion."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Result, environment
from gguf import GGUFValueType as VT
from gguf_edit import edit, encoded
from helpers import make_set, write_model
from million_gguf.converters import gguf as converters_gguf
from million_gguf.converters import hf
from million_gguf.converters.gguf import calibrate, check_model, codebook_file_bytes, load_text, parse_types

from million_gguf import container
from million_gguf.errors import InputError, MillionError, MismatchError, NativeError
from million_gguf.spec import PQ_TYPES

Run = Callable[..., Result]
TEXT = "The quick brown fox jumps over the lazy dog, and then it writes a line of code.\n" * 400


def left_over(folder: Path, *known: Path) -> list[str]:
    """Files in ``folder`` that a test did not put there, hidden ones included."""
    return sorted(p.name for p in folder.iterdir() if p not in known)


# ---- text ----


def test_the_text_of_the_package_is_read() -> None:
    text = load_text(None, 1000)
    assert len(text.text) > 1000
    assert len(text.digest) == 64


def test_a_text_may_be_given_itself_or_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert load_text(path, 10**6) == load_text(TEXT, 10**6)


def test_a_large_file_is_not_kept_whole_but_digested_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("é" * 100_000, encoding="utf-8")
    short = load_text(path, 100)
    assert 0 < len(short.text) < 10_000
    assert set(short.text) == {"é"}  # and no half of one
    assert short.digest == load_text(path, 10**6).digest


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.txt"):
        load_text(tmp_path / "none.txt", 100)
    with pytest.raises(InputError):
        load_text(tmp_path, 100)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InputError, match="UTF-8"):
        load_text(tmp_path / "latin.txt", 100)


def test_types() -> None:
    assert [s.name for s in parse_types("pq4,pq2,pq4")] == ["pq4", "pq2"]
    assert [s.name for s in parse_types(["pq3"])] == ["pq3"]
    for wrong in ("", "pq5", ",", []):
        with pytest.raises(InputError, match="pq4"):
            parse_types(wrong)


# ---- chunks and memory ----


@pytest.mark.native
@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(
    ("n_text", "n_tokens", "n_ctx"), [(5000, 1000, 256), (300, 1000, 256), (256, 256, 256), (257, 999, 256)]
)
def test_chunks(n_text: int, n_tokens: int, n_ctx: int, bos: int | None) -> None:
    from million_gguf.converters.capture import chunks

    tokens = list(range(100, 100 + n_text))
    contexts = chunks(tokens, n_tokens, n_ctx, bos)
    n_bos = 0 if bos is None else 1
    assert sum(map(len, contexts)) <= n_tokens
    assert all(n_bos < len(c) <= n_ctx for c in contexts)
    if bos is not None:
        assert all(c[0] == bos for c in contexts)
    used = [t for c in contexts for t in c[n_bos:]]
    assert used == sorted(set(used))  # in order, none twice
    if n_text > 2 * n_tokens:
        assert used[-1] == tokens[-1]  # spread over all of the text
    elif n_text <= n_tokens - n_bos * len(contexts):
        assert used == tokens  # nothing lost


@pytest.mark.native
def test_memory_bounds_the_rows(tiny: Path) -> None:
    from million_gguf.converters.capture import MIN_TOKENS, rows_within

    shape = container.model_shape(tiny)
    row_bytes = 2 * sum(
        n * (k + v) + q * k // 4 for n, k, v, q in zip(shape.n_head_kv, shape.D_k, shape.D_v, shape.n_head, strict=True)
    )
    assert rows_within(10_000 * row_bytes, shape, 10**6) == 10_000
    assert rows_within(10_000 * row_bytes, shape, 5000) == 5000
    assert rows_within(0, shape, 10**6) == MIN_TOKENS


@pytest.mark.native
def test_queries_are_a_quarter_of_the_rows_and_bounded() -> None:
    from million_gguf.converters.capture import query_step

    assert query_step(32768, 32768) == 4
    assert query_step(1023, 1023) == 4
    assert query_step(4096, 32768) == 32  # where memory is short
    for n_tokens in (32769, 131072, 10**6):
        assert 4096 < n_tokens / query_step(n_tokens, n_tokens) <= 8192


# ---- what is refused ----


def arch(path: Path, dst: Path, name: str, **values: Any) -> Path:
    """The tiny model under another architecture's name."""
    changes: dict[str, bytes | None] = {"general.architecture": encoded(VT.STRING, name)}
    with container.GGUFHeader(path) as h:
        for key, e in h.kv.items():
            if key.startswith("llama."):
                changes[key] = None
                changes[f"{name}.{key[6:]}"] = h.bytes(e.value - 4, e.end)
    for key, raw in values.items():
        changes[f"{name}.{key.replace('__', '.')}"] = raw
    return edit(path, dst, changes)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv6", "rwkv7", "arwkv7"])
def test_recurrent_models_are_refused_by_name(tiny: Path, tmp_path: Path, name: str) -> None:
    path = arch(tiny, tmp_path / "m.gguf", name)
    with pytest.raises(MismatchError, match=f"{name}.*recurrent.*run it as it is"):
        calibrate(path, tmp_path / "out.gguf")
    assert left_over(tmp_path, tiny, path) == []


def test_mla_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = arch(tiny, tmp_path / "m.gguf", "deepseek2", attention__kv_lora_rank=encoded(VT.UINT32, 512))
    with pytest.raises(MismatchError, match="deepseek2.*MLA.*q8_0"):
        calibrate(path, tmp_path / "out.gguf")


def test_encoders_are_refused(tiny: Path, tmp_path: Path) -> None:
    path = arch(tiny, tmp_path / "m.gguf", "bert", attention__causal=encoded(VT.BOOL, False))
    with pytest.raises(MismatchError, match="bert.*encoder"):
        calibrate(path, tmp_path / "out.gguf")


@pytest.mark.parametrize("D", [4, 12, 264])
def test_head_sizes_that_the_kernels_do_not_take(tmp_path: Path, D: int) -> None:
    path = write_model(tmp_path / "m.gguf", D=D)
    with pytest.raises(MismatchError, match=f"head size {D}"):
        calibrate(path, tmp_path / "out.gguf")


def test_layers_without_heads_are_no_obstacle(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", n_head_kv=[2, 0])
    with container.GGUFHeader(path) as h:
        assert check_model(h, parse_types("pq4")).n_head_kv == (2, 0)
    path = write_model(tmp_path / "none.gguf", n_head_kv=[0, 0])
    with pytest.raises(MismatchError, match="no layer has KV heads"):
        calibrate(path, tmp_path / "out.gguf")


def test_a_part_of_a_split_model_is_refused(tmp_path: Path, tiny: Path) -> None:
    path = edit(tiny, tmp_path / "m.gguf", {"split.count": encoded(VT.UINT32, 3)})
    with pytest.raises(InputError, match="llama-gguf-split --merge"):
        calibrate(path, tmp_path / "out.gguf")


def test_the_input_is_never_the_output(tiny: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny)
    before = tiny.read_bytes()
    for dst in (tiny, link):
        with pytest.raises(InputError, match="input itself"):
            calibrate(tiny, dst, overwrite=True)
    assert tiny.read_bytes() == before


def test_an_existing_output_is_kept(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("precious")
    with pytest.raises(InputError, match="--force"):
        calibrate(tiny, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "precious"


@pytest.mark.parametrize("options", [{"n_tokens": 0}, {"n_tokens": 100}, {"n_ctx": 1}, {"n_threads": -1}])
def test_options_out_of_range(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least"):
        calibrate(tiny, tmp_path / "out.gguf", **options)


def test_the_space_estimate_is_an_upper_bound(tiny: Path, tiny_pq: Path) -> None:
    added = tiny_pq.stat().st_size - tiny.stat().st_size
    estimate = codebook_file_bytes(container.model_shape(tiny), list(PQ_TYPES.values()), has_transform=False)
    assert added <= estimate


def test_too_little_space_is_known_before_the_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(converters_gguf.shutil, "disk_usage", lambda _: usage(10**12, 10**12, 1000))
    with pytest.raises(InputError, match="GB free"):
        calibrate(tiny, tmp_path / "out.gguf")


# ---- calibrate ----


@pytest.mark.native
def test_a_file_that_only_looks_like_a_model(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(NativeError, match="cannot load"):
        calibrate(tiny, tmp_path / "out.gguf", text=TEXT, progress=False)
    assert left_over(tmp_path, tiny) == []


@pytest.mark.native
def test_a_text_that_is_too_short(plain_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="longer text"):
        calibrate(plain_gguf, tmp_path / "out.gguf", text="Too short.", progress=False)
    assert left_over(tmp_path) == []


@pytest.fixture(scope="module")
def small(plain_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model calibrated for pq2 alone, on little text."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    calibrate(plain_gguf, path, "pq2", n_tokens=2048, n_ctx=512, seed=3, progress=False)
    return path


@pytest.mark.native
def test_what_calibrate_writes(plain_gguf: Path, small: Path) -> None:
    books = container.read(small)  # checks all of it against the model
    assert set(books.types) == {"pq2"}
    assert all(cb is not None for cb in books.types["pq2"].k)
    assert books.calibration.seed == 3
    assert 1800 < books.calibration.tokens <= 2048
    assert books.calibration.tool.startswith("million-gguf ")
    assert books.calibration.text_digest == load_text(None, 1).digest
    assert all(0 < e < 1 for e in (*books.types["pq2"].k_error, *books.types["pq2"].v_error))
    with container.GGUFHeader(plain_gguf) as a, container.GGUFHeader(small) as b:
        assert a.bytes(a.data_offset, a.size) == b.bytes(b.data_offset, b.size)
        assert {k for k in b.kv if not k.startswith("million.")} == set(a.kv)


@pytest.mark.native
def test_the_input_is_untouched(plain_gguf: Path, tmp_path: Path) -> None:
    before = (plain_gguf.read_bytes(), plain_gguf.stat().st_mtime_ns)
    calibrate(plain_gguf, tmp_path / "out.gguf", "pq2", n_tokens=1024, progress=False)
    assert (plain_gguf.read_bytes(), plain_gguf.stat().st_mtime_ns) == before
    assert left_over(tmp_path) == ["out.gguf"]


@pytest.mark.native
def test_the_same_seed_gives_the_same_file(plain_gguf: Path, small: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_tokens": 2048, "n_ctx": 512, "progress": False}
    calibrate(plain_gguf, tmp_path / "same.gguf", "pq2", seed=3, **options)
    calibrate(plain_gguf, tmp_path / "other.gguf", "pq2", seed=4, **options)
    assert (tmp_path / "same.gguf").read_bytes() == small.read_bytes()
    assert (tmp_path / "other.gguf").read_bytes() != small.read_bytes()


@pytest.mark.native
def test_a_calibrated_file_can_be_calibrated_again(small: Path, tmp_path: Path) -> None:
    broken = edit(small, tmp_path / "broken.gguf", {"million.version": encoded(VT.UINT32, 99)})
    calibrate(broken, tmp_path / "out.gguf", "pq4", n_tokens=1024, progress=False)
    assert set(container.read(tmp_path / "out.gguf").types) == {"pq4"}


@pytest.mark.native
def test_captured_rows_are_those_of_the_model(plain_gguf: Path) -> None:
    """Shapes, counts, the reservoir's bound, and V of the first layer recomputed with NumPy."""
    from million_gguf.converters.capture import K, Q, V, capture

    shape = container.model_shape(plain_gguf)
    text = load_text(None, 4096).text
    with capture(plain_gguf, text, shape, n_tokens=2048, n_ctx=512, progress=False, memory_bytes=0) as captured:
        rows = captured.rows
        assert rows.n_layer == shape.block_count
        for layer in range(rows.n_layer):
            assert rows.shape(layer, K) == (shape.n_head_kv[layer], shape.D_k[layer])
            assert rows.shape(layer, V) == (shape.n_head_kv[layer], shape.D_v[layer])
            assert rows.shape(layer, Q) == (shape.n_head[layer], shape.D_k[layer])
            for kind in (K, V):
                assert rows.n_seen(layer, kind) == captured.n_tokens
                assert rows.rows(layer, kind).shape[0] == 1024  # the least that is kept, with no memory allowed
            # of queries a quarter as many, evenly from all tokens
            assert rows.rows(layer, Q).shape[0] == rows.n_seen(layer, Q) == 256
        v = rows.rows(0, V)
        assert v.dtype == np.float32 and np.isfinite(v).all() and v.std() > 0
        assert rows.shape(rows.n_layer, K) is None
        with pytest.raises(NativeError, match="no rows"):
            rows.rows(rows.n_layer, K)


class Attended(NamedTuple):
    """One query and the keys it met, with what errors of its scores do to its output: ``p^2 |v - o|^2``, the last 128 keys last."""

    i: int  # of the captured queries
    h: int
    h_kv: int
    q: np.ndarray  # [D]
    keys: np.ndarray  # [n, D]
    cost: np.ndarray  # [n]
    n_far: int  # of the keys, those that an exact tail does not hold
    small: float  # where v and o are nearly the same, digits cancel: so much of a cost's sum may be wrong


@pytest.fixture(scope="module")
def attended(plain_gguf: Path) -> Iterator[tuple[Any, list[list[Attended]]]]:
    """Two contexts, captured with all their rows, and by layer what NumPy finds in those rows for each query and head."""
    from million_gguf.converters.capture import K, Q, V, capture

    n_ctx, n_context, n_near = 512, 2, 128
    shape = container.model_shape(plain_gguf)
    text = load_text(None, 4096).text
    with capture(plain_gguf, text, shape, n_tokens=n_context * n_ctx, n_ctx=n_ctx, progress=False) as captured:
        layers: list[list[Attended]] = []
        for layer in range(shape.block_count):
            k, v, q = (captured.rows.rows(layer, kind).astype(np.float64) for kind in (K, V, Q))
            group = q.shape[1] // k.shape[1]
            assert q.shape[:2] == (n_context * n_ctx // 4, shape.n_head[layer])  # a query of four is kept
            layers.append([])
            for i, h in np.ndindex(*q.shape[:2]):
                start, position = 4 * i // n_ctx * n_ctx, 4 * i % n_ctx
                keys = k[start : start + position + 1, h // group]
                values = v[start : start + position + 1, h // group]
                score = keys @ q[i, h] / np.sqrt(q.shape[2])
                p = np.exp(score - score.max())
                p /= p.sum()
                cost = p**2 * np.square(values - p @ values).sum(axis=1)
                small = 1e-4 * float(np.square(values).sum(axis=1).max())
                n_far = max(0, position + 1 - n_near)
                layers[-1].append(Attended(i, h, h // group, q[i, h], keys, cost, n_far, small))
        yield captured.rows, layers


@pytest.mark.native
def test_weights_of_queries_are_what_far_keys_do_to_outputs(attended: Any) -> None:
    """The sum of p^2 |v - o|^2 over all but the last 128 keys, and over all."""
    rows, layers = attended
    for layer, queries in enumerate(layers):
        weights = rows.weights(layer)
        assert weights.shape == (queries[-1].i + 1, queries[-1].h + 1, 2)
        for a in queries:
            want = [a.cost[: a.n_far].sum(), a.cost.sum()]
            assert weights[a.i, a.h] == pytest.approx(want, rel=0.05, abs=a.small)


@pytest.mark.native
def test_matches_are_the_keys_that_queries_look_for(attended: Any) -> None:
    """The sum of w [k; 1] [q; k; 1]^T over all but the last 128 keys of each query."""
    from million_gguf.converters.capture import K

    rows, layers = attended
    for layer, queries in enumerate(layers):
        n_head_kv, D = rows.shape(layer, K)
        want = np.zeros((n_head_kv, D + 1, 2 * D + 1))
        for a in queries:
            k1 = np.concatenate([a.keys[: a.n_far], np.ones((a.n_far, 1))], axis=1)
            wk1 = a.cost[: a.n_far] @ k1
            want[a.h_kv, :, :D] += np.outer(wk1, a.q)
            want[a.h_kv, :, D:] += (k1.T * a.cost[: a.n_far]) @ k1
        found = rows.matches(layer)
        assert found is not None and found.dtype == np.float32 and found.shape == want.shape
        for down in (slice(D), slice(D, D + 1)):
            for across in (slice(D), slice(D, 2 * D), slice(2 * D, 2 * D + 1)):
                error = np.linalg.norm((found - want)[:, down, across], axis=(1, 2))
                assert (error < 0.02 * np.linalg.norm(want[:, down, across], axis=(1, 2))).all()
    with pytest.raises(NativeError, match="no rows"):
        rows.matches(rows.n_layer)


class FakeCapture:
    """Rows as of a small model, where only queries like the first axes of a key look for it."""

    n_layer = 2

    def __init__(self, shape: container.ModelShape, with_matches: bool, with_queries: bool) -> None:
        self._shape, self._with_matches, self._with_queries = shape, with_matches, with_queries

    def shape(self, layer: int, kind: int) -> tuple[int, int] | None:
        if kind == 2 and not self._with_queries:
            return None
        return (self._shape.n_head if kind == 2 else self._shape.n_head_kv)[layer], self._shape.D_k[layer]

    def rows(self, layer: int, kind: int) -> np.ndarray:
        shape = self.shape(layer, kind)
        assert shape is not None
        x = np.random.default_rng([layer, kind]).standard_normal((600, *shape)) + 3.0
        return x.astype(np.float16).astype(np.float32)

    def weights(self, layer: int) -> np.ndarray:
        return np.ones((600, self._shape.n_head[layer], 2), np.float32)

    def matches(self, layer: int) -> np.ndarray | None:
        assert self._with_queries
        if not self._with_matches:
            return None
        k = self.rows(layer, 0).astype(np.float64)
        q = (k - k.mean(axis=0)) * (np.arange(k.shape[2]) < 3)
        k1 = np.concatenate([k, np.ones((*k.shape[:2], 1))], axis=2)
        sums: np.ndarray = np.einsum("nhi,nhj->hij", k1, np.concatenate([q, k1], axis=2))
        return sums.astype(np.float32)


@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("with_matches", [True, False])
def test_codebooks_of_k_get_an_anisotropy_where_queries_are_known(
    tiny: Path, with_matches: bool, with_queries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = container.model_shape(tiny)
    monkeypatch.setattr(converters_gguf, "_output_metric", lambda *_: np.stack([np.eye(8)] * 2))
    captured: Any = FakeCapture(shape, with_matches, with_queries)
    specs = parse_types("pq4,pq3")
    trained = converters_gguf._train(captured, shape, specs, 0, 1, tiny, False)
    for t in trained.values():
        assert all(cb is not None and cb.aniso is None for cb in t.v)
        for layer, cb in enumerate(t.k):
            assert cb is not None and cb.T is not None and cb.T_inv is not None
            if not (with_matches and with_queries):
                assert cb.aniso is None
                continue
            # Of each type by its own T: what is left of a key in the map of a query, axis by axis.
            assert cb.aniso is not None
            k = captured.rows(layer, 0)
            for h in range(cb.n_head_kv):
                T = cb.T[h].astype(np.float64)
                y = (k[:, h] - cb.mu[h]) @ T
                image = ((k[:, h] - k[:, h].mean(axis=0)) * (np.arange(8) < 3)) @ cb.T_inv[h].T
                slope = (y * image).sum(axis=0) / np.square(y).sum(axis=0)
                assert cb.aniso[h] == pytest.approx(slope / np.abs(slope).max(), abs=1e-3)
                assert np.abs(cb.aniso[h]).max() == 1.0


def test_the_space_estimate_knows_of_the_anisotropy(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", n_layer=40, D=8, n_head_kv=4)
    specs = list(PQ_TYPES.values())
    books = make_set(model, with_transform=True, with_aniso=True)
    estimate = codebook_file_bytes(container.model_shape(model), specs)
    assert container.codebook_bytes(books.types) <= estimate - (64 << 10)


# ---- convert ----


def checkpoint(folder: Path, **config: Any) -> Path:
    """A folder that looks like an HF checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config})
    )
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    return folder


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(InputError, match="no such folder"):
        hf.convert(tmp_path / "none", out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="million calibrate"):
        hf.convert(tmp_path / "file", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="config.json"):
        hf.convert(tmp_path / "empty", out)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="weights"):
        hf.convert(tmp_path / "empty", out)
    bad = checkpoint(tmp_path / "bad")
    (bad / "config.json").write_text("{not json")
    with pytest.raises(InputError, match="not JSON"):
        hf.convert(bad, out)


def test_models_without_kv_rows_are_refused_before_the_conversion(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="MLA"):
        hf.convert(checkpoint(tmp_path / "a", model_type="deepseek_v2", kv_lora_rank=512), tmp_path / "out.gguf")
    with pytest.raises(MismatchError, match="recurrent"):
        hf.convert(checkpoint(tmp_path / "b", model_type="mamba2"), tmp_path / "out.gguf")


def test_options_of_the_converter_that_cannot_be_passed_on(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m")
    for option in ("--outfile=x", "--split-max-size", "--vocab-only"):
        with pytest.raises(InputError, match=option.split("=")[0]):
            hf.convert(model, tmp_path / "out.gguf", converter_args=[option])
    with pytest.raises(InputError, match="outtype"):
        hf.convert(model, tmp_path / "out.gguf", outtype="q4_0")


def test_missing_modules_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(InputError, match=r"torch.*pip install million-gguf\[convert\]"):
        hf.convert(checkpoint(tmp_path / "m"), tmp_path / "out.gguf")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a program of the test's in the place of llama.cpp's converter."""
    folder = tmp_path / "vendor"
    folder.mkdir()
    monkeypatch.setattr(hf.paths, "vendor_dir", lambda name: folder)
    monkeypatch.setattr(hf, "_check_modules", lambda: None)

    def write(code: str) -> Path:
        (folder / "convert_hf_to_gguf.py").write_text(code)
        return folder

    return write


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys; print('ERROR:hf-to-gguf:Model X is not supported', file=sys.stderr); sys.exit(1)",
            "Model X is not supported",
        ),
        ("raise ValueError('no such tensor')", "ValueError: no such tensor"),
        ("import no_such_module_at_all", "no_such_module_at_all.*pip install million-gguf"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("raise OSError(28, 'No space left on device')", "no space left"),
        ("pass", "wrote no file"),
    ],
)
def test_the_converters_errors_in_short(script: Any, tmp_path: Path, code: str, message: str) -> None:
    vendor = script(code)
    model = checkpoint(tmp_path / "m")
    with pytest.raises(InputError, match=message) as e:
        hf.convert(model, tmp_path / "out.gguf", progress=False)
    assert len(str(e.value)) < 400
    assert left_over(tmp_path, vendor, model) == []


def test_verbose_shows_what_the_converter_says(script: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script("print('line one'); print('line two'); raise SystemExit(1)")
    with pytest.raises(InputError):
        hf.convert(checkpoint(tmp_path / "m"), tmp_path / "out.gguf", verbose=True, progress=False)
    assert "line one\nline two" in capfd.readouterr().err


def test_errors_of_the_calibration_name_the_checkpoint(script: Any, tmp_path: Path, tiny: Path) -> None:
    path = arch(tiny, tmp_path / "mla.gguf", "deepseek2", attention__kv_lora_rank=encoded(VT.UINT32, 512))
    vendor = script(f"import shutil, sys; shutil.copy({str(path)!r}, sys.argv[sys.argv.index('--outfile') + 1])")
    model = checkpoint(tmp_path / "m")
    with pytest.raises(MismatchError) as e:
        hf.convert(model, tmp_path / "out.gguf", progress=False)
    assert str(model) in str(e.value) and ".tmp" not in str(e.value)
    assert left_over(tmp_path, vendor, model, tiny, path) == []


@pytest.mark.native
@pytest.mark.slow
def test_convert_a_checkpoint(million: Run, demo_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo.gguf"
    done = million(
        "convert", demo_checkpoint, "-o", out, "--outtype", "bf16", "--types", "pq4", "--tokens", 1024,
        "--converter-args=--no-lazy --model-name Somebody",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "codebooks for" in done.out
    assert left_over(tmp_path) == ["demo.gguf"]
    with container.GGUFHeader(out) as h:
        assert h.get("general.name") == "Somebody"
    assert set(container.read(out).types) == {"pq4"}


@pytest.mark.native
@pytest.mark.slow
def test_gguf_py_reads_the_result(demo_gguf: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(demo_gguf)
    assert reader.fields["million.version"].contents() == container.FORMAT_VERSION


# ---- interruption: whatever stage it comes in, nothing is left ----

CHILD = """
import sys, time
from pathlib import Path
import million_gguf.cli, million_gguf.converters.hf as hf, million_gguf.converters.gguf as gguf
stage = sys.argv.pop(1)

def wait(*args, **kwargs):
    print(stage, flush=True)
    time.sleep(60)

if stage == "convert":
    folder = Path(sys.argv.pop(1))
    (folder / "convert_hf_to_gguf.py").write_text("import sys, time\\n"
        "open(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(b'half')\\nprint('begun', flush=True)\\ntime.sleep(60)")
    hf.paths.vendor_dir = lambda name: folder
    hf._check_modules = lambda: None
elif stage == "train":
    from million_gguf import codebook
    codebook.train_side = wait
elif stage == "write":
    from million_gguf import codebook, container
    train, embed = codebook.train_side, container.embed
    container.embed = lambda src, dst, books, progress: embed(src, dst, books, wait)
elif stage == "capture":
    from million_gguf.converters import capture
    run = capture._run
    def endless(*args):
        print(stage, flush=True)
        while True:
            run(*args)
    capture._run = endless
sys.exit(million_gguf.cli.main(sys.argv[1:]))
"""


def interrupt(number: int, stage: str, *args: object, until: Callable[[], bool] | None = None) -> subprocess.Popen[str]:
    """Run ``million`` with CHILD's patches and send it a signal in the middle of ``stage``."""
    import time

    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, stage, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup ignores, and ours with it
    )
    assert process.stdout is not None and process.stderr is not None
    if until is None:
        line = process.stdout.readline()
        assert line.strip() == stage, process.stderr.read()
        time.sleep(0.3)  # into the native call, where the stage has one
    else:
        end = time.monotonic() + 60
        while not until():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert "Traceback" not in err, err
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    vendor = tmp_path / "vendor"
    vendor.mkdir()
    model = checkpoint(tmp_path / "m")
    process = interrupt(
        number, "convert", vendor, "convert", model, "-o", tmp_path / "out.gguf",
        until=lambda: any(tmp_path.glob(".*.tmp/model.gguf")),
    )  # fmt: skip
    assert process.returncode == code
    assert left_over(tmp_path, vendor, model) == []


@pytest.mark.native
@pytest.mark.parametrize("stage", ["capture", "train", "write"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_calibration_leaves_nothing(
    plain_gguf: Path, tmp_path: Path, stage: str, number: int, code: int
) -> None:
    options = ("--types", "pq2", "--tokens", 1024, "--ctx", 512)
    process = interrupt(number, stage, "calibrate", plain_gguf, "-o", tmp_path / "out.gguf", *options)
    assert process.returncode == code
    assert left_over(tmp_path) == []


def test_every_error_is_one_of_ours() -> None:
    for kind in (InputError, MismatchError, NativeError):
        assert issubclass(kind, MillionError)
