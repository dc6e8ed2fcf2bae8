"""Transforms: they measure errors in the metric that they are given, share codes among axes that fit, and always fit f16."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import GGUFValueType as VT
from gguf_edit import edit, encoded
from helpers import make_codebook, make_set, rows_for, write_model
from million_gguf.converters import gguf as converter

from million_gguf import codebook, container, pq_ref, transform
from million_gguf.errors import FormatError, InputError, MismatchError
from million_gguf.spec import PQ_TYPES


def correlated(n: int, n_head_kv: int, D: int, decay: float = 0.8, seed: int = 0) -> np.ndarray:
    """Rows f32 ``[n, n_head_kv, D]`` with variances 1, decay^2, decay^4, ... along random axes, and a mean."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((n_head_kv, D, D)))[0]
    x = rng.standard_normal((n, n_head_kv, D)) * decay ** np.arange(D)
    return (np.einsum("nhd,hde->nhe", x, axes) + rng.standard_normal((n_head_kv, D))).astype(np.float32)


def test_the_query_metric_is_the_squared_score_error() -> None:
    rng = np.random.default_rng(0)
    queries = correlated(500, 6, 16)  # two KV heads, three queries each
    metric = transform.query_metric(queries, 2)
    e = rng.standard_normal((2, 16))
    for h in range(2):
        scores = queries[:, 3 * h : 3 * h + 3].astype(np.float64) @ e[h]
        assert e[h] @ metric[h] @ e[h] == pytest.approx(np.square(scores).mean())


def test_the_query_metric_favours_queries_that_look_beyond_the_tail() -> None:
    """By as much as their head does: a head that looks there is measured by them, and one that doesn't by all queries."""
    queries = correlated(500, 2, 16)
    weights = np.zeros((500, 2, 2))
    weights[::10, :, 0] = [1.0, 0.0]
    weights[..., 1] = weights[..., 0] + [0.01, 1.0]
    plain, metric = transform.query_metric(queries, 2), transform.query_metric(queries, 2, weights)
    looking = transform.query_metric(queries[::10], 2)
    looking *= (np.trace(plain, axis1=1, axis2=2) / np.trace(looking, axis1=1, axis2=2))[:, None, None]
    assert np.linalg.norm(metric[0] - looking[0]) < 0.3 * np.linalg.norm(plain[0] - looking[0])
    assert np.allclose(metric[1], plain[1])


def test_the_output_metric_is_the_squared_error_of_the_attention_block() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((20, 6 * 8)).astype(np.float32)  # [n_embd, n_head * D]
    metric = transform.output_metric(weight, 2, 8)
    e = rng.standard_normal((2, 8))
    for h in range(2):
        # the same error in the value of a KV head reaches the output through each of its query heads
        out = [weight.astype(np.float64)[:, (3 * h + g) * 8 :][:, :8] @ e[h] for g in range(3)]
        assert e[h] @ metric[h] @ e[h] == pytest.approx(sum(np.square(o).sum() for o in out))


def test_an_error_in_y_costs_what_the_metric_says() -> None:
    metric = transform.query_metric(correlated(400, 2, 16, seed=1), 2)
    T = transform.fit(correlated(400, 2, 16), metric).transform(PQ_TYPES["pq4"]).astype(np.float64)
    e = np.random.default_rng(2).standard_normal((100, 16))
    for h in range(2):
        ratio = np.square(e @ T[h]).sum(axis=1) / np.einsum("ni,ij,nj->n", e, metric[h], e)
        assert ratio.max() / ratio.min() < 1.05  # the ridge and f16 are what is left


def test_the_axes_do_not_correlate() -> None:
    rows = correlated(2000, 2, 16)
    basis = transform.fit(rows, transform.query_metric(correlated(400, 4, 16, seed=1), 2))
    for h in range(2):
        y = (rows[:, h] - rows[:, h].mean(axis=0)) @ basis.axes[h]
        covariance = y.T @ y / len(y)
        assert np.allclose(np.diag(covariance), basis.variance[h], rtol=1e-3)
        deviation = np.sqrt(np.diag(covariance))
        assert np.abs(covariance / np.outer(deviation, deviation) - np.eye(16)).max() < 1e-3
        assert (np.diff(basis.variance[h]) <= 0).all()


def matched(keys: np.ndarray, queries: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As of ``Capture.matches``: keys, queries ``[n, n_head_kv, D]``, weights ``[n, n_head_kv]``, one query for each key."""
    k1 = np.concatenate([keys, np.ones((*keys.shape[:2], 1))], axis=2)
    sums: np.ndarray = np.einsum("nhi,nhj,nh->hij", k1, np.concatenate([queries, k1], axis=2), weights, optimize=True)
    return sums.astype(np.float32)


@pytest.mark.parametrize("name", PQ_TYPES)
def test_the_anisotropy_is_where_the_queries_lie_that_look_for_a_key(name: str) -> None:
    """Queries whose images are b * y and noise: the ratios of b come back, whatever the mean of the keys and which are looked for."""
    rng = np.random.default_rng(0)
    n, n_head_kv, D = 20000, 2, 16
    keys = correlated(n, n_head_kv, D).astype(np.float64)
    mu = keys.mean(axis=0).astype(np.float32)
    T = transform.fit(keys, None).transform(PQ_TYPES[name])
    T_inv = np.linalg.inv(T.astype(np.float64))
    y = np.einsum("nhi,hij->nhj", keys - mu, T.astype(np.float64))
    b = rng.uniform(-1.0, 1.0, (n_head_kv, D))
    images = b * y + 0.5 * rng.standard_normal(y.shape) * y.std(axis=0)
    queries = np.einsum("hij,nhj->nhi", T.astype(np.float64), images)  # q' = T^-1 q
    # Far out along two axes, and for one of them on one side: of the keys looked for neither variance nor mean are those of all.
    far = y[:, :, :2] / y[:, :, :2].std(axis=0)
    weights = rng.random((n, n_head_kv)) * (1.0 + np.maximum(far[:, :, 0], 0.0) ** 2 + far[:, :, 1] ** 2)
    found = transform.anisotropy(matched(keys, queries, weights), T, T_inv, mu)
    assert found.dtype == np.float32
    want = b / np.abs(b).max(axis=1, keepdims=True)
    assert np.abs(found - want).max() < 0.05
    assert np.abs(found).max(axis=1).tolist() == [1.0, 1.0]


def test_heads_and_axes_without_anisotropy() -> None:
    rng = np.random.default_rng(0)
    keys, T = rng.standard_normal((500, 2, 8)), np.broadcast_to(np.eye(8), (2, 8, 8))
    keys[:, :, 5] = 3.3  # whose sums cancel but for their rounding
    mu = keys.mean(axis=0).astype(np.float32)
    weights = np.ones((500, 2)) * [0.0, 1.0]  # no query looks at the first head
    found = transform.anisotropy(matched(keys, keys, weights), T, T, mu)
    assert (found[0] == 0.0).all()
    assert found[1] == pytest.approx(np.where(np.arange(8) == 5, 0.0, 1.0), abs=1e-4)
    assert found[1, 5] == 0.0


def test_spread_is_arithmetic_over_geometric_mean() -> None:
    variance = np.array([[8.0, 4.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    basis = transform.Basis(np.broadcast_to(np.eye(4), (3, 4, 4)), variance)
    assert basis.spread == pytest.approx([3.75 / 64**0.25, 1.0, 1.0])


def test_the_coded_error_is_that_of_reverse_water_filling() -> None:
    """Against the level of the water, found by halving: bits are spent on what sticks out of it, the rest is lost."""
    rng = np.random.default_rng(0)
    for dims, scale in ((1, 1.0), (2, 1.0), (2, 8.0), (4, 1.0), (4, 5.0)):
        variance = rng.lognormal(0.0, scale, (20, dims))
        for v, found in zip(variance, transform.coded_error(variance), strict=True):
            low, high = 0.0, v.max()
            for _ in range(100):
                level = (low + high) / 2
                bits = 0.5 * np.log2(np.maximum(v / level, 1.0)).sum()
                low, high = (level, high) if bits > 8.0 else (low, level)
            assert found == pytest.approx(np.minimum(v, level).sum(), rel=1e-9)
    assert transform.coded_error(np.zeros((2, 4))).tolist() == [0.0, 0.0]
    assert transform.coded_error(np.array([3.0, 0.0])) == pytest.approx(3.0 * 2.0**-16)


def modelled(order: np.ndarray, variance: np.ndarray, name: str) -> float:
    codes = PQ_TYPES[name].elements_of_codes(len(order))
    return float(sum(transform.coded_error(variance[order][elements]).sum() for elements in codes))


@pytest.mark.parametrize("name", PQ_TYPES)
def test_axes_share_codes_as_in_the_best_of_all_orders(name: str) -> None:
    """One block of eight axes, where all orders can be tried (those that differ by more than the order in a code)."""
    code = np.repeat(PQ_TYPES[name].code_of_subspace(8), PQ_TYPES[name].dsub)
    distinct = [
        p for p in itertools.permutations(range(8)) if all(p[i] < p[i + 1] for i in range(7) if code[i] == code[i + 1])
    ]
    rng = np.random.default_rng(0)
    for scale in (0.3, 1.0, 3.0):
        variance = -np.sort(-rng.lognormal(0.0, scale, (3, 8)), axis=1)
        for v, order in zip(variance, transform.coding_order(variance, PQ_TYPES[name]), strict=True):
            best = min(modelled(np.array(p), v, name) for p in distinct)
            assert modelled(order, v, name) <= 1.001 * best


@pytest.mark.parametrize("name", PQ_TYPES)
def test_no_swap_of_two_axes_would_help(name: str) -> None:
    variance = -np.sort(-np.random.default_rng(0).lognormal(0.0, 2.5, (1, 40)), axis=1)
    order = transform.coding_order(variance, PQ_TYPES[name])[0]
    least = modelled(order, variance[0], name)
    for i, j in itertools.combinations(range(40), 2):
        swapped = order.copy()
        swapped[[i, j]] = order[[j, i]]
        assert modelled(swapped, variance[0], name) > (1 - 1e-6) * least


@pytest.mark.parametrize("name", ["pq4", "pq2"])
def test_codes_of_a_flat_spectrum_carry_the_same_load(name: str) -> None:
    """Where every axis is worth bits, products of variances are even: those of pairs as even as can be."""
    variance = -np.sort(-np.random.default_rng(0).lognormal(0, 0.7, (2, 64)), axis=1)
    order = transform.coding_order(variance, PQ_TYPES[name])
    assert (np.sort(order, axis=1) == np.arange(64)).all()
    for v, o in zip(variance, order, strict=True):
        dims = {"pq4": 2, "pq2": 4}[name]
        loads = np.log(v[o]).reshape(-1, dims).sum(axis=1)
        assert loads.std() < (0.35 if dims == 2 else 0.05) * np.log(v).reshape(-1, dims).sum(axis=1).std()
        if dims == 2:
            assert {tuple(sorted(pair)) for pair in o.reshape(-1, 2)} == {(i, 63 - i) for i in range(32)}


def test_pq3_gives_the_more_bits_to_the_larger_axes() -> None:
    variance = np.where(np.arange(64) < 32, 16.0, 1.0)[None] * np.linspace(1.001, 1.0, 64)
    pairs, fours = PQ_TYPES["pq3"].elements_of_codes(64)
    order = transform.coding_order(variance, PQ_TYPES["pq3"])[0]
    assert (order[pairs] < 32).all() and (order[fours] >= 32).all()


@pytest.mark.parametrize("D", [8, 24, 256])
@pytest.mark.parametrize("name", PQ_TYPES)
def test_an_order_has_every_axis_once_whatever_the_variances(name: str, D: int) -> None:
    rng = np.random.default_rng(0)
    variance = np.stack([np.zeros(D), np.ones(D), np.arange(D) == 0, 0.5 ** np.arange(D), rng.lognormal(0, 9, D)])
    order = transform.coding_order(variance, PQ_TYPES[name])
    assert (np.sort(order, axis=1) == np.arange(D)).all()
    assert (transform.coding_order(variance[3:], PQ_TYPES[name]) == order[3:]).all(), (
        "heads do not depend on each other"
    )
    with pytest.raises(MismatchError, match="head size 12"):
        transform.coding_order(np.ones((1, 12)), PQ_TYPES[name])


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9])
def test_everyone_meets_everyone_once(n: int) -> None:
    met = []
    for first, second in transform._round_robin(n):
        assert len(set(first) | set(second)) == 2 * len(first)
        met += [tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert sorted(met) == list(itertools.combinations(range(n), 2))


@pytest.mark.parametrize("name", PQ_TYPES)
def test_less_error_at_the_same_bits(name: str) -> None:
    """What it is for: on correlated rows whose directions differ in cost, the cost falls to less than half."""
    spec = PQ_TYPES[name]
    rows, held_back = np.split(correlated(3000, 1, 16), [2500])
    metric = transform.query_metric(correlated(400, 1, 16, seed=1), 1)
    costs = []
    for T in (None, transform.fit(rows, None).transform(spec), transform.fit(rows, metric).transform(spec)):
        cb, _ = codebook.train_side(rows, spec, 0, T=T, device="cpu")
        error = pq_ref.decode(cb, pq_ref.encode(cb, held_back))[:, 0] - held_back[:, 0]
        costs.append(np.einsum("ni,ij,nj->", error, metric[0], error))
    plain, axes_only, in_the_metric = costs
    assert in_the_metric < axes_only < plain
    assert in_the_metric < 0.5 * plain


def test_outlier_channels_change_nothing() -> None:
    """Scaling channels up, and what they meet down, is undone by the metric: the error stays what it was."""
    spec = PQ_TYPES["pq4"]
    rows, queries = correlated(2000, 1, 16), correlated(400, 1, 16, seed=1)
    scale = np.ones(16, np.float32)
    scale[[3, 8]] = 30.0
    errors = []
    for s in (np.float32(1.0), scale):
        basis = transform.fit(rows * s, transform.query_metric(queries / s, 1))
        cb, _ = codebook.train_side(rows * s, spec, 0, T=basis.transform(spec), device="cpu")
        errors.append(codebook.head_errors(cb, rows * s)[0])
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("name", PQ_TYPES)
def test_awkward_rows_and_metrics_give_a_map_that_every_reader_takes(name: str) -> None:
    rng = np.random.default_rng(0)
    D = 64
    normal = rng.standard_normal((400, 1, D)).astype(np.float32)
    one_query = transform.query_metric(np.repeat(normal[:1], 3, axis=0), 1)
    channels = np.diag(10.0 ** np.linspace(-8, 8, D))[None]
    for rows, metric in (
        (np.full((400, 1, D), 3.25, np.float32), None),
        (normal, one_query),  # rank 1
        (normal, np.zeros((1, D, D))),
        (normal, channels),
        (normal * 10.0 ** np.linspace(-4, 4, D, dtype=np.float32), np.diag(10.0 ** np.linspace(8, -8, D))[None]),
        (normal * 3e4, None),
        (normal * 1e-4, one_query * 1e12),
    ):
        T = transform.fit(rows, metric).transform(PQ_TYPES[name])
        cb = dataclasses.replace(make_codebook(name, D, 1), T=T)
        container.codebook_to_blob(cb)  # refuses what a reader would refuse
        assert np.abs(np.linalg.inv(T[0].astype(np.float64))).max() < 6e4


def test_refuses_what_does_not_fit() -> None:
    rows = correlated(50, 2, 8)
    nan = rows.copy()
    nan[3, 1, 2] = np.nan
    T, mu = np.zeros((2, 8, 8)), np.zeros((2, 8))
    for error, message, call in [
        (MismatchError, "the metric is", lambda: transform.fit(rows, np.zeros((1, 8, 8)))),
        (InputError, "rows with NaN", lambda: transform.fit(nan, None)),
        (InputError, "queries with NaN", lambda: transform.query_metric(nan, 2)),
        (MismatchError, "a multiple of 3 heads", lambda: transform.query_metric(rows, 3)),
        (MismatchError, "weights are", lambda: transform.query_metric(rows, 2, np.ones((len(rows), 2)))),
        (MismatchError, "need at least one", lambda: transform.query_metric(rows[:0], 2)),
        (MismatchError, "20 columns", lambda: transform.output_metric(np.zeros((4, 20)), 2, 8)),
        (MismatchError, "matches is", lambda: transform.anisotropy(np.zeros((2, 9, 16)), T, T, mu)),
        (MismatchError, "T_inv is", lambda: transform.anisotropy(np.zeros((2, 9, 17)), T, T[:1], mu)),
        (InputError, "keys with NaN", lambda: transform.anisotropy(np.full((2, 9, 17), np.inf), T, T, mu)),
        (InputError, "projection with NaN", lambda: transform.output_metric(np.full((4, 16), np.nan), 2, 8)),
    ]:
        with pytest.raises(error, match=message):
            call()


# ---- where the output projection comes from ----


@pytest.mark.parametrize("quantized", [False, True])
def test_the_output_projection_of_a_file(tmp_path: Path, quantized: bool) -> None:
    from gguf import GGUFReader, GGUFWriter, quants

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 32)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    kind = GGMLQuantizationType.Q8_0 if quantized else GGMLQuantizationType.F16
    writer.add_tensor("blk.0.attn_output.weight", quants.quantize(weight, kind), raw_dtype=kind)
    writer.add_tensor("blk.1.attn_output.weight", weight[:, :24].copy())  # of another width than the heads
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with container.GGUFHeader(tmp_path / "m.gguf") as header:
        shape = container.model_shape(header)
        found = converter._output_metric(header, shape, 0)
        assert converter._output_metric(header, shape, 1) is None
    assert found is not None
    assert np.allclose(found, transform.output_metric(weight, 2, 8), rtol=0.05, atol=0.5)
    stored = quants.dequantize(GGUFReader(tmp_path / "m.gguf").tensors[0].data, kind)
    assert np.allclose(found, transform.output_metric(stored, 2, 8))


def test_a_model_without_output_projection_has_no_metric(tiny: Path) -> None:
    with container.GGUFHeader(tiny) as header:
        assert converter._output_metric(header, container.model_shape(header), 0) is None


# ---- figures per head ----


@pytest.mark.parametrize("name", PQ_TYPES)
def test_head_errors_are_those_of_the_definition(name: str) -> None:
    cb = make_codebook(name, 16, 2, with_transform=True)
    rows = rows_for(cb, 200)
    y = pq_ref.transform(cb, rows)
    want = np.square(y - pq_ref.decode_y(cb, pq_ref.encode(cb, rows))).sum((0, 2)) / np.square(y).sum((0, 2))
    assert codebook.head_errors(cb, rows) == pytest.approx(want, rel=2e-3)  # rows are rounded to f16 for codes
    assert (codebook.head_errors(cb, np.repeat(cb.mu[None], 3, axis=0)) == 0).all()


def test_figures_travel_in_the_file(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", n_head_kv=[2, 0])
    books = make_set(model)
    figures = {"spread": [[3.0, 4.5], []], "measured": [[0.25, 0.5], []]}
    t = dataclasses.replace(books.types["pq4"], k_heads=figures)
    container.embed(model, tmp_path / "pq.gguf", dataclasses.replace(books, types={**books.types, "pq4": t}))
    back = container.read(tmp_path / "pq.gguf")
    assert back.types["pq4"].k_heads == figures
    assert back.types["pq4"].v_heads == {} and back.types["pq3"].k_heads == {}


def test_figures_that_fit_no_head_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf")
    books = make_set(model)
    for figures, message in (
        ({"spread": [[1.0, 1.0], [1.0]]}, r"found figures of \[2, 1\] heads"),
        ({"spread": [[1.0, 1.0], [1.0, float("nan")]]}, "negative or infinite"),
        ({"unheard": [[1.0, 1.0], [1.0, 1.0]]}, "unheard"),
    ):
        t = dataclasses.replace(books.types["pq4"], v_heads=figures)
        with pytest.raises(MismatchError, match=message):
            dataclasses.replace(books, types={**books.types, "pq4": t})


def test_a_file_with_too_few_figures_is_broken(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf")
    books = make_set(model)
    t = dataclasses.replace(books.types["pq4"], k_heads={"spread": [[1.0, 1.0], [1.0, 1.0]]})
    container.embed(model, tmp_path / "pq.gguf", dataclasses.replace(books, types={**books.types, "pq4": t}))
    key = "million.pq4.k.head.spread"
    broken = edit(tmp_path / "pq.gguf", tmp_path / "broken.gguf", {key: encoded(VT.ARRAY, (VT.FLOAT32, [1.0] * 3))})
    with pytest.raises(FormatError, match=rf"{key}: found 3 entries, need 4"):
        container.read(broken)


def test_inspect_names_the_worst_heads(million: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", n_head_kv=[2, 0])
    books = make_set(model, ["pq4"])
    figures = {"spread": [[3.0, 5.0], []], "trained": [[0.125, 0.25], []], "measured": [[0.125, 0.75], []]}
    t = dataclasses.replace(books.types["pq4"], k_heads=figures, v_heads={**figures, "measured": [[0.5, 0.25], []]})
    container.embed(model, tmp_path / "pq.gguf", dataclasses.replace(books, types={"pq4": t}))
    done = million("inspect", tmp_path / "pq.gguf")
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert ["0", "4.0", "0.188", "0.438", "4.0", "0.188", "0.375"] in rows
    assert ["1", *["-"] * 6] in rows
    worst = " ".join(done.out.split()).partition("pq4, largest measured: ")[2]
    assert worst.startswith("blk.0 K head 1 (0.750), blk.0 V head 0 (0.500), blk.0 V head 1 (0.250)")
    facts = json.loads(million("inspect", "--json", tmp_path / "pq.gguf").out)
    assert facts["codebooks"]["types"]["pq4"]["k_heads"] == figures


def test_inspect_says_whether_k_has_an_anisotropy(million: Any, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf")
    for with_aniso in (False, True):
        container.embed(model, tmp_path / "pq.gguf", make_set(model, ["pq4"], with_aniso=with_aniso))
        facts = json.loads(million("inspect", "--json", tmp_path / "pq.gguf").out)
        assert facts["codebooks"]["types"]["pq4"]["anisotropy"] is with_aniso
        table = [line.split() for line in million("inspect", tmp_path / "pq.gguf").out.splitlines()]
        assert ["pq4", "4", "0.03", "25.0%", "no", "yes" if with_aniso else "no", "0.2500", "0.2500"] in table


@pytest.mark.native
def test_calibration_trains_transforms_and_measures_them(demo_gguf: Path) -> None:
    books = container.read(demo_gguf)
    for t in books.types.values():
        for cb, heads in zip((*t.k, *t.v), ([t.k_heads] * len(t.k) + [t.v_heads] * len(t.v)), strict=True):
            assert cb is not None and cb.T is not None
            assert set(heads) == set(container.HEAD_FIGURES)
        for cb in t.k:
            assert cb is not None and cb.aniso is not None
            assert (np.abs(cb.aniso).max(axis=1) == 1.0).all(), "every head of a real model looks beyond the tail"
        assert all(cb is not None and cb.aniso is None for cb in t.v)
        for heads in (t.k_heads, t.v_heads):
            trained, measured = (np.concatenate(heads[f]) for f in ("trained", "measured"))
            assert (np.concatenate(heads["spread"]) > 1.0).all()
            assert (trained > 0).all() and (measured < 1).all()
            assert measured.mean() > trained.mean()
