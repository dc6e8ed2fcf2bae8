"""Training: as good as scikit-learn's k-means per subspace, deterministic, and sane on awkward data."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import make_codebook, rows_for

from million_gguf import codebook, container, native, pq_ref
from million_gguf.errors import InputError, MismatchError
from million_gguf.spec import KSUB, PQ_TYPES

NATIVE = native.unavailable() is None


def points(kind: str, P: int, n: int, dsub: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((P, n, dsub))
    if kind == "skewed":
        x *= np.array([5.0, 1.0, 0.5, 0.2])[:dsub]
    if kind == "heavy":
        x /= np.sqrt(rng.chisquare(5, (P, n, 1)) / 5)
    if kind == "ring":  # what rope makes of a K pair
        angle = rng.uniform(0, 2 * np.pi, (P, n, dsub // 2))
        x = 0.3 * rng.standard_normal((P, n, dsub)) + 3 * np.stack([np.cos(angle), np.sin(angle)], -1).reshape(
            P, n, dsub
        )
    return x.astype(np.float32)


@pytest.mark.skipif(not NATIVE, reason="minutes without the native library")
@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy", "ring"])
@pytest.mark.parametrize("dims", [2, 4])
def test_as_good_as_scikit_learn(dims: int, kind: str) -> None:
    """Within 1 % of the inertia of KMeans(n_init=1, max_iter=30), which seeds by greedy k-means++.

    The mean over codes is held to it; one code alone may differ by as much as two seeds of scikit-learn do.
    """
    sklearn_cluster = pytest.importorskip("sklearn.cluster")
    x = points(kind, 2, 8192, dims)
    _, found = codebook.kmeans(x, KSUB, seed=0, device="cpu")
    want = np.array([sklearn_cluster.KMeans(KSUB, n_init=1, max_iter=30, random_state=0).fit(p).inertia_ for p in x])
    assert (found / want).mean() < 1.01
    assert (found / want).max() < 1.025


@pytest.mark.parametrize("dims", [2, 4])
def test_moves_are_worth_their_place(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same schedule without moves must be clearly worse, else they could go."""
    x = points("heavy", 2, 4096, dims)
    _, found = codebook.kmeans(x, KSUB, seed=0, device="cpu")
    monkeypatch.setattr(codebook, "_SCHEDULE", tuple(codebook._Round(r.size) for r in codebook._SCHEDULE))
    _, without = codebook.kmeans(x, KSUB, seed=0, device="cpu")
    assert found.mean() < 0.99 * without.mean()


def test_centroids_are_means_of_their_points() -> None:
    """A fixed point of Lloyd's algorithm, nearly: one more round gains almost nothing."""
    x = points("normal", 2, 4096, 2)
    c, sse = codebook.kmeans(x, 64, seed=1, device="cpu")
    sums, counts, _ = codebook._assign_numpy(x, c)
    assert (counts > 0).all()
    again = codebook._assign_numpy(x, (sums / counts[..., None]).astype(np.float32))[2].sum(axis=1)
    assert (again <= sse * (1 + 1e-6)).all()
    assert (again > 0.99 * sse).all()


@pytest.mark.parametrize("name", PQ_TYPES)
def test_error_is_that_of_the_definition(name: str) -> None:
    """The reported error, for the identity and for a transform, against encode and decode of pq_ref."""
    cb0 = make_codebook(name, 16, 2, with_transform=True)
    rows = rows_for(cb0, 600)
    deviation = ((rows - rows.mean(axis=0, dtype=np.float64)) ** 2).sum()
    for T in (None, cb0.T):
        cb, error = codebook.train_side(rows, cb0.spec, 0, T=T, device="cpu")
        squared = ((pq_ref.decode(cb, pq_ref.encode(cb, rows)) - rows) ** 2).sum()
        assert error == pytest.approx(squared / deviation, rel=1e-3)
        assert 0 < error < 0.5
        assert np.allclose(cb.mu, rows.mean(axis=0), atol=1e-5)
        assert (cb.T is None) == (T is None)
        assert container.blob_to_codebook(container.codebook_to_blob(cb), cb.spec).equals(cb)


def test_subspaces_that_share_a_code_are_trained_together() -> None:
    """81 points in the four dims of a shared code, 9 in either subspace: all of them have a centroid of both."""
    rows = np.random.default_rng(0).integers(0, 3, (2000, 1, 8)).astype(np.float32)
    cb, error = codebook.train_side(rows, PQ_TYPES["pq3"], 0, device="cpu")
    assert error < 1e-6
    assert np.abs(pq_ref.decode(cb, pq_ref.encode(cb, rows)) - rows).max() < 2e-3
    shared = np.concatenate(cb.centroids[0, 2:].astype(np.float32), axis=1) + cb.mu[0, 4:]
    assert len({tuple(c) for c in np.rint(shared).tolist()}) == 81


def test_each_element_is_trained_where_its_code_is() -> None:
    """D of three blocks, every element with a mean of its own: centroids that went elsewhere would be far off."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((600, 2, 24)) * np.linspace(1, 5, 24)).astype(np.float32)
    for s in PQ_TYPES.values():
        cb, _ = codebook.train_side(rows, s, 0, device="cpu")
        spread = cb.centroids.astype(np.float32).std(axis=2).reshape(2, 24)
        assert (np.abs(spread / np.linspace(1, 5, 24) - 1) < 0.35).all(), spread


def test_more_bits_are_more_accurate() -> None:
    rows = rows_for(make_codebook("pq4", 32, 2), 2048)
    errors = [codebook.train_side(rows, PQ_TYPES[t], 0, device="cpu")[1] for t in ("pq4", "pq3", "pq2")]
    assert errors[0] < errors[1] < errors[2]


def test_the_transform_decides_what_an_error_costs() -> None:
    """Scaling one half of y up makes training spend its centroids there."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3000, 1, 8)).astype(np.float32)
    mix = np.eye(8)
    # every pq4 subspace holds one element of each half
    mix = mix[[0, 4, 1, 5, 2, 6, 3, 7]].T * np.tile([4.0, 1.0], 4)
    cb, _ = codebook.train_side(rows, PQ_TYPES["pq4"], 0, T=mix[None], device="cpu")
    squared = ((pq_ref.decode(cb, pq_ref.encode(cb, rows)) - rows) ** 2).sum(axis=(0, 1))
    assert squared[:4].max() < 0.5 * squared[4:].min()


def test_same_seed_same_codebook_for_any_number_of_threads() -> None:
    rows = rows_for(make_codebook("pq3", 16, 3), 1000)
    runs = [codebook.train_side(rows, PQ_TYPES["pq3"], 5, device="cpu", n_threads=t) for t in (1, 2, 5, 1)]
    for cb, error in runs[1:]:
        assert cb.equals(runs[0][0])
        assert error == runs[0][1]
    other, _ = codebook.train_side(rows, PQ_TYPES["pq3"], 6, device="cpu")
    assert not other.equals(runs[0][0])


def test_stretched_training_serves_rows_further_out() -> None:
    rng = np.random.default_rng(0)
    rows, far = (s * rng.standard_normal((4000, 1, 8)).astype(np.float32) for s in (1.0, 1.5))

    def error_of(cb: pq_ref.Codebook, x: np.ndarray) -> float:
        return float(((pq_ref.decode(cb, pq_ref.encode(cb, x)) - x) ** 2).sum())

    plain, _ = codebook.train_side(rows, PQ_TYPES["pq3"], 0, device="cpu")
    stretched, error = codebook.train_side(rows, PQ_TYPES["pq3"], 0, stretch=1.3, device="cpu")
    assert error_of(stretched, far) < 0.9 * error_of(plain, far)
    relative = error_of(stretched, rows) / float(((rows - rows.mean(0)) ** 2).sum())
    assert np.isclose(error, relative, rtol=1e-3), "the error is that of the rows as they are"


def test_a_head_is_trained_alike_whatever_comes_after_it() -> None:
    rows = rows_for(make_codebook("pq3", 16, 3), 500)
    three, _ = codebook.train_side(rows, PQ_TYPES["pq3"], 5, device="cpu")
    two, _ = codebook.train_side(rows[:, :2], PQ_TYPES["pq3"], 5, device="cpu")
    assert np.array_equal(three.centroids[:2], two.centroids)


@pytest.mark.parametrize("name", PQ_TYPES)
def test_awkward_rows_give_a_sound_codebook(name: str) -> None:
    s = PQ_TYPES[name]
    rng = np.random.default_rng(0)
    constant = np.full((300, 1, 16), 3.25, np.float32)
    few = rng.integers(0, 3, (300, 1, 16)).astype(np.float32)  # fewer distinct points than centroids
    huge = (rng.standard_normal((300, 1, 16)) * 1e5).astype(np.float32)  # beyond f16
    tiny = (rng.standard_normal((300, 1, 16)) * 1e-3).astype(np.float16)
    dead = rng.standard_normal((300, 2, 16)).astype(np.float32)
    dead[:, 1, ::2] = 0.0
    for rows, limit in ((constant, 0.0), (few, 1e-6), (huge, 1.0), (tiny, 0.2), (dead, 0.2)):
        cb, error = codebook.train_side(rows, s, 0, device="cpu")
        container.codebook_to_blob(cb)  # refuses what a reader would refuse
        assert 0.0 <= error <= limit


def test_exactly_ksub_rows_are_kept_exactly() -> None:
    rows = np.random.default_rng(0).standard_normal((256, 1, 8)).astype(np.float16)
    cb, error = codebook.train_side(rows, PQ_TYPES["pq3"], 0, device="cpu")
    assert error < 1e-4  # of the roundings to f16: 2e-5


def test_progress_ends_at_one() -> None:
    seen: list[float] = []
    rows = rows_for(make_codebook("pq3", 8, 3), 300)
    codebook.train_side(rows, PQ_TYPES["pq3"], 0, device="cpu", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_refuses_what_it_cannot_train() -> None:
    rows = np.zeros((300, 2, 16), np.float32)
    nan = rows.copy()
    nan[7, 1, 3] = np.nan
    T = np.broadcast_to(np.eye(16), (2, 16, 16))
    s = PQ_TYPES["pq4"]
    for error, message, call in [
        (InputError, "found 255 rows, need at least 256", lambda: codebook.train_side(rows[:255], s, 0)),
        (InputError, "NaN or infinity", lambda: codebook.train_side(nan, s, 0, device="cpu")),
        (InputError, "beyond f16", lambda: codebook.train_side(rows, s, 0, T=T * 1e6)),
        (InputError, "beyond f16", lambda: codebook.train_side(rows, s, 0, T=T * np.nan)),
        (InputError, "need auto, cpu or cuda", lambda: codebook.train_side(rows, s, 0, device="tpu")),
        (MismatchError, r"need \[n, n_head_kv, D\]", lambda: codebook.train_side(rows[0], s, 0)),
        (MismatchError, "head size 12", lambda: codebook.train_side(rows[:, :, :12], s, 0)),
        (MismatchError, "T is", lambda: codebook.train_side(rows, s, 0, T=T[:1])),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backend", ["native", "torch", "none"])
@pytest.mark.parametrize(("dsub", "ksub"), [(2, 64), (4, 256), (2, 16)])
def test_passes_agree_with_each_other(backend: str, dsub: int, ksub: int) -> None:
    """Each way to pass over the points against float64 NumPy, on a prefix and with the work cut into parts."""
    x = points("normal", 5, 700, dsub)
    c = np.ascontiguousarray(points("normal", 5, ksub, dsub, seed=1))
    m = 513
    if backend == "torch":
        pytest.importorskip("torch")
        p = codebook._TorchPoints(x, "cpu", temp_elems=2 * m * ksub)
    else:
        if backend == "native" and not NATIVE:
            pytest.skip(str(native.unavailable()))
        p = codebook._CpuPoints(x, 1)
        p._native = backend == "native"
    d = ((x[:, :m, None].astype(np.float64) - c[:, None]) ** 2).sum(-1)
    nearest, code = d.min(-1), d.argmin(-1)
    one_hot = np.eye(ksub)[code]
    want = (np.einsum("pnk,pnd->pkd", one_hot, x[:, :m]), one_hot.sum(1), np.einsum("pnk,pn->pk", one_hot, nearest))
    for found, expected in zip(p.assign(m, c), want, strict=True):
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
    _, counts, costs = p.assign(m, c)
    assert np.array_equal(counts, want[1])
    assert np.allclose(costs.sum(1), nearest.sum(1), rtol=1e-5)
    assert np.allclose(p.d2(m, c), nearest, rtol=1e-4, atol=1e-6)
    index = np.array([[3, 3, 699]] * 5)
    assert np.array_equal(p.take(index), x[:, [3, 3, 699]])


def test_works_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_for(make_codebook("pq3", 8, 2), 300)
    _, with_native = codebook.train_side(rows, PQ_TYPES["pq3"], 0, device="cpu")
    monkeypatch.setattr(native, "unavailable", lambda: "not here")
    _, without = codebook.train_side(rows, PQ_TYPES["pq3"], 0, device="cpu")
    assert without == pytest.approx(with_native, rel=0.02)
