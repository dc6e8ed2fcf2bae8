"""Trains the codebooks of one layer and side (K or V) from rows that the cache would store.

Every code of every head is a small k-means problem of its own (n points, 2 or 4 dims, 256 centroids), and a model has thousands
of them: those with as many dims are solved together. Subspaces that share a code (pq3) are one problem, whose centroids are
then split among them. Each problem is

1. seeded by D^2 sampling (k-means++, Arthur & Vassilvitskii 2007) in a few batches that double in size instead of one
   centroid at a time, which is k-means|| (Bahmani et al. 2012) on a subsample;
2. refined by over-relaxed Lloyd rounds on a growing subsample and then on all points;
3. between rounds, relieved of its worst placed centroids: those that would be missed least move beside those whose
   clusters cost most (the utility of Patane & Russo's enhanced LBG, 2001). Empty clusters go first. This is what makes
   few rounds enough: without it batched seeds end 3 to 9 % above k-means++ with 30 rounds.

The result depends on rows, spec, seed and transform only, and not on the number of threads; the instruction set and the
device may change the last bits of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from . import native
from .errors import InputError, MismatchError
from .pq_ref import Codebook
from .spec import PQSpec

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

Progress = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""

_F16_MAX = float(np.finfo(np.float16).max)
_TEMP_ELEMS = 1 << 18  # elements of a temporary array on the CPU, one per thread: 1 MiB stays in the caches
_TEMP_ELEMS_CUDA = 1 << 28


@dataclass(frozen=True)
class _Round:
    """``size`` 0, 1, 2: small subsample, larger subsample, all points. ``move``: share of centroids that may move."""

    size: int
    move: float = 0.0


# Chosen by measuring against k-means++ with 30 rounds on Gaussian, skewed, heavy-tailed and ring-shaped data. Two plain
# rounds after each move let the neighbourhood settle before its costs are judged again. The moves on all points matter
# for heavy tails, whose far points a subsample does not hold.
_SCHEDULE = (
    *[_Round(0, 0.12), _Round(0), _Round(0)] * 4,
    *[_Round(1, 0.06), _Round(1), _Round(1)],
    *[_Round(2, 0.05), _Round(2), _Round(2)] * 2,
    _Round(2),
)

# A plain round steps this far from the old centroid to the mean, but for the last round. Lloyd's steps are too short
# (1 stops at the mean, 2 is where it turns unstable): 1.8 ends lower in 11.5 passes over all points than 1 does in 14.5.
_RELAX = 1.8


def train_side(
    rows: npt.NDArray[np.floating],
    spec: PQSpec,
    seed: int,
    *,
    T: npt.ArrayLike | None = None,
    stretch: float = 1.0,
    device: str = "auto",
    n_threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Codebook, float]:
    """Trains the codebook of one layer and side.

    Args:
        rows: f32 or f16 ``[n, n_head_kv, D]``, finite, with n >= ksub (far more is better: 32K).
        spec: the cache type.
        seed: of sampling; the same rows and seed give the same codebook.
        T: ``[n_head_kv, D, D]``, the transform per KV head, rounded to f16 before it is used; None: the identity.
            Training minimizes the error of ``y = (x - mu) T``, so T decides what an error costs.
        stretch: every second row is trained on at this many times its distance from the mean, for the sake of rows
            that lie further out than any of these. The error that is returned is that of the rows as they are.
        device: ``cpu``, ``cuda``, or ``auto``: cuda where torch finds one.
        n_threads: of the CPU; 0: all cores.
        progress: called with the fraction done.

    Returns:
        The codebook, with mu = mean of the rows, and its error on ``rows``: sum of squared errors over sum of squared
        deviations from the mean, in x (0 when all rows are equal).

    Raises:
        InputError: too few rows, or rows with NaN or infinity, or a device that is not there.
        MismatchError: shapes that do not fit, or a head size that the kernels don't take.
    """
    if rows.ndim != 3 or rows.shape[1] < 1:
        raise MismatchError(f"rows are {list(rows.shape)}, need [n, n_head_kv, D]")
    n, n_head_kv, D = rows.shape
    M = spec.n_subspaces(D)
    if n < spec.ksub:
        raise InputError(
            f"found {n} rows, need at least {spec.ksub} (ksub of {spec.name}): use a longer calibration text"
        )
    T16: npt.NDArray[np.float16] | None = None
    if T is not None:
        wide = np.asarray(T, dtype=np.float64)
        if wide.shape != (n_head_kv, D, D):
            raise MismatchError(f"T is {list(wide.shape)}, need [{n_head_kv}, {D}, {D}]")
        if not (np.isfinite(wide).all() and np.abs(wide).max() <= _F16_MAX):
            raise InputError(
                f"found a transform with values beyond f16 (at most {_F16_MAX:g}), need smaller ones: scale it"
            )
        T16 = wide.astype(np.float16)

    mu = np.empty((n_head_kv, D), dtype=np.float32)
    centroids = np.empty((n_head_kv, M, spec.ksub, spec.dsub), dtype=np.float16)
    points_on = _points_class(device)
    # One head is one piece of work: as many at once as there are cores, each with the cores that are left over.
    n_cores = native.thread_count(n_threads)
    n_workers = 1 if points_on is not _CpuPoints else min(n_head_kv, n_cores)
    threads_each = max(1, n_cores // n_workers)

    def train_head(h: int) -> tuple[float, float]:
        """Fills in head h. Returns its squared error and squared deviation."""
        y, mu[h], deviation = _centered(rows[:, h])
        T_inv: F64 | None = None
        if T16 is not None:
            y = y @ T16[h].astype(np.float32)
            T_inv = np.linalg.inv(T16[h].astype(np.float64))
        rng = np.random.default_rng([seed, h])
        by_element = np.empty((D, spec.ksub), dtype=np.float32)
        for elements in spec.elements_of_codes(D):
            x = _points_of(y, elements)
            if stretch != 1.0:
                x[:, 1::2] *= np.float32(stretch)
            c = _solve(x, spec.ksub, rng, points_on, threads_each)
            by_element[elements] = c.transpose(0, 2, 1)
        # Values beyond f16 can only come from rows that far out; clipping keeps the codebook finite and valid.
        by_element = np.clip(by_element, -_F16_MAX, _F16_MAX)
        centroids[h] = by_element.reshape(M, spec.dsub, spec.ksub).transpose(0, 2, 1)
        if T_inv is None:
            return _squared_error(y, spec, centroids[h], threads_each), deviation
        residual = _residual(y, spec, centroids[h], threads_each) @ T_inv.astype(np.float32)
        return float(np.square(residual, dtype=np.float64).sum()), deviation

    error = power = 0.0
    with ThreadPoolExecutor(n_workers) as pool:
        try:
            # In the order of the heads, so that the sums come out the same every time.
            for h, (e, d) in enumerate(pool.map(train_head, range(n_head_kv))):
                error, power = error + e, power + d
                if progress is not None:
                    progress((h + 1) / n_head_kv)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Codebook(spec, mu, T16, centroids), error / power if power > 0.0 else 0.0


def head_errors(cb: Codebook, rows: npt.NDArray[np.floating], *, n_threads: int = 0) -> F64:
    """Error of each head on rows that need not be those of the training: f64 ``[n_head_kv]``.

    Squared error over squared deviation from the codebook's mean, both in ``y = (x - mu) T``: where the transform comes
    from a metric, the share of what the rows do to the model that coding loses. 0 where the rows do not deviate. It is that
    of nearest codes: ``aniso`` is left out, which accepts more of this error for less of another.

    Args:
        rows: f32 or f16 ``[n, n_head_kv, D]``.
    """
    out = np.zeros(cb.n_head_kv)
    for h in range(cb.n_head_kv):
        y = rows[:, h].astype(np.float32) - cb.mu[h]
        if cb.T is not None:
            y = y @ cb.T[h].astype(np.float32)
        deviation = np.square(y, dtype=np.float64).sum()
        if deviation > 0.0:
            out[h] = _squared_error(y, cb.spec, cb.centroids[h], native.thread_count(n_threads)) / deviation
    return out


def _points_of(y: F32, elements: npt.NDArray[np.intp]) -> F32:
    """Rows ``[n, D]`` of one head -> points ``[codes, n, dims]``, contiguous, of the codes with these elements ``[codes, dims]``."""
    return np.ascontiguousarray(y[:, elements].transpose(1, 0, 2))


def _centroids_of(centroids: npt.NDArray[np.float16], elements: npt.NDArray[np.intp]) -> F32:
    """Centroids ``[M, ksub, dsub]`` of one head -> ``[codes, ksub, dims]``, contiguous, of the codes with these elements."""
    M, ksub, dsub = centroids.shape
    by_element = centroids.astype(np.float32).transpose(0, 2, 1).reshape(M * dsub, ksub)
    return np.ascontiguousarray(by_element[elements].transpose(0, 2, 1))


def _centered(rows: npt.NDArray[np.floating]) -> tuple[F32, F32, float]:
    """Rows ``[n, D]`` of one head -> (x - mu f32, mu f32 ``[D]``, sum of squared deviations)."""
    x = rows.astype(np.float32)
    mean = x.mean(axis=0, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise InputError("found rows with NaN or infinity, need finite ones: check that the model runs well without PQ")
    mu = mean.astype(np.float32)
    x -= mu
    return x, mu, float(np.square(x, dtype=np.float64).sum())


def _squared_error(y: F32, spec: PQSpec, centroids: npt.NDArray[np.float16], n_threads: int) -> float:
    """Sum of squared errors in y of one head: rows ``[n, D]``, centroids ``[M, ksub, dsub]``."""
    error = 0.0
    for elements in spec.elements_of_codes(y.shape[1]):
        points = _CpuPoints(_points_of(y, elements), n_threads)
        error += float(points.assign(y.shape[0], _centroids_of(centroids, elements))[2].sum())
    return error


def _residual(y: F32, spec: PQSpec, centroids: npt.NDArray[np.float16], n_threads: int) -> F32:
    """Rows ``[n, D]`` of one head minus what their codes stand for."""
    out = np.empty_like(y)
    for elements in spec.elements_of_codes(y.shape[1]):
        points = _CpuPoints(_points_of(y, elements), n_threads)
        out[:, elements] = points.residuals(_centroids_of(centroids, elements)).transpose(1, 0, 2)
    return out


# ---------------------------------------------------------------------------------------------------------
# k-means, P problems at once
# ---------------------------------------------------------------------------------------------------------


def kmeans(x: F32, ksub: int, seed: int, *, device: str = "auto", n_threads: int = 0) -> tuple[F32, F64]:
    """Solves P k-means problems of the same size.

    Args:
        x: f32 ``[P, n, dsub]``, contiguous; n >= ksub; dsub 2 or 4.
        ksub: centroids, a multiple of 16 up to 256.

    Returns:
        centroids f32 ``[P, ksub, dsub]``, and the sum of squared distances of each problem, f64 ``[P]``.
    """
    c = _solve(x, ksub, np.random.default_rng(seed), _points_class(device), n_threads)
    return c, _CpuPoints(x, n_threads).assign(x.shape[1], c)[2].sum(axis=1)


def _solve(
    x: F32, ksub: int, rng: np.random.Generator, points_on: Callable[[F32, int], _Points], n_threads: int
) -> F32:
    """Centroids f32 ``[P, ksub, dsub]`` of the problems x ``[P, n, dsub]``."""
    n = x.shape[1]
    sizes = (min(n, max(8192, 32 * ksub)), min(n, max(16384, 64 * ksub)), n)
    points = points_on(
        np.take(x, rng.permutation(n), axis=1), n_threads
    )  # a subsample is a prefix of the shuffled points
    c = _seed(points, ksub, sizes[1], rng)
    for i, r in enumerate(_SCHEDULE):
        m = sizes[r.size]
        sums, counts, costs = points.assign(m, c)
        if r.move > 0.0:
            c = _move(_means(sums, counts, c), counts, costs, r.move, rng)
        else:
            relax = 1.0 if i == len(_SCHEDULE) - 1 else _RELAX
            c = (c + relax * (_means(sums, counts, c) - c)).astype(np.float32)
    return c


def _seed(points: _Points, ksub: int, m: int, rng: np.random.Generator) -> F32:
    """Seeds f32 ``[P, ksub, dsub]`` out of the first m points: a few at random, then batches by D^2 sampling."""
    P, dsub = points.shape[0], points.shape[2]
    stages = [ksub // 16, ksub // 8, ksub // 4, ksub // 2, 3 * ksub // 4, ksub]
    c = points.take(np.broadcast_to(np.arange(stages[0]), (P, stages[0])))
    for size in stages[1:]:
        # The kernels take a multiple of 16 centroids; a repeated one changes no distance.
        pad = -c.shape[1] % 16
        d2 = points.d2(m, np.concatenate([c, np.repeat(c[:, :1], pad, axis=1)], axis=1))
        # Systematic sampling: evenly spaced ticks with one random offset, which spreads a batch better than
        # independent draws. A point that outweighs a tick's width is drawn twice; _move resolves that.
        cumulative = np.cumsum(d2, axis=1, dtype=np.float64)
        r = size - c.shape[1]
        ticks = (np.arange(r) + rng.random((P, 1))) / r * cumulative[:, -1:]
        index = np.stack([np.searchsorted(cumulative[p], ticks[p]) for p in range(P)])
        c = np.concatenate([c, points.take(np.minimum(index, m - 1))], axis=1)
    assert c.shape == (P, ksub, dsub)
    return np.ascontiguousarray(c)


def _means(sums: F64, counts: I64, c: F32) -> F32:
    """Means of the clusters; an empty one keeps its centroid."""
    full = counts[..., None] > 0
    return np.where(full, sums / np.maximum(counts, 1)[..., None], c).astype(np.float32)


def _move(c: F32, counts: I64, costs: F64, share: float, rng: np.random.Generator) -> F32:
    """Moves up to ``share`` of the centroids from where they are missed least to where clusters cost most.

    Args:
        c: ``[P, ksub, dsub]``, means of their clusters.
        counts: ``[P, ksub]`` points of each cluster.
        costs: ``[P, ksub]`` sum of squared distances of each cluster.
    """
    P, k, dsub = c.shape
    r = max(1, int(k * share))
    # What a removal adds: every point of the cluster goes to a neighbour. 0.35 of the squared distance between
    # centroids was fitted on the data sets named at _SCHEDULE. What a split saves: for a cell as wide as long, its
    # variance along one axis falls to a quarter: 3/4 of 1/dsub of its cost.
    loss = np.where(counts == 0, -1.0, 0.35 * counts * _nearest_centroid_d2(c))
    gain = 0.75 / dsub * costs
    low = np.argsort(loss, axis=1, kind="stable")[:, :r]
    high = np.argsort(-gain, axis=1, kind="stable")[:, :r]
    worth = np.take_along_axis(loss, low, 1) < np.take_along_axis(gain, high, 1)

    # The pair is put half a standard deviation to both sides of the old mean, along a random diagonal.
    variance = np.take_along_axis(costs, high, 1) / np.maximum(np.take_along_axis(counts, high, 1), 1) / dsub
    offset = 0.5 * np.sqrt(variance)[..., None] * np.where(rng.random((P, r, dsub)) < 0.5, -1.0, 1.0)
    out: F32 = c.copy()
    old = np.take_along_axis(c, high[..., None], 1)
    np.put_along_axis(out, high[..., None], np.where(worth[..., None], old - offset, old).astype(np.float32), 1)
    stay = np.take_along_axis(out, low[..., None], 1)
    np.put_along_axis(out, low[..., None], np.where(worth[..., None], old + offset, stay).astype(np.float32), 1)
    return out


def _nearest_centroid_d2(c: F32) -> F32:
    """Squared distance of every centroid to the nearest other one, f32 ``[P, ksub]``."""
    P, k, _ = c.shape
    out = np.empty((P, k), dtype=np.float32)
    step = max(1, _TEMP_ELEMS // (k * k))
    own = np.arange(k)
    for i in range(0, P, step):
        part = c[i : i + step]
        d2 = np.matmul(part, part.transpose(0, 2, 1))
        norm = np.einsum("pkd,pkd->pk", part, part)
        d2 *= -2.0
        d2 += norm[:, :, None]
        d2 += norm[:, None, :]
        d2[:, own, own] = np.inf
        np.maximum(d2.min(axis=-1), 0.0, out=out[i : i + step])
    return out


# ---------------------------------------------------------------------------------------------------------
# Passes over the points: CPU (native, or NumPy without the library) and CUDA
# ---------------------------------------------------------------------------------------------------------


class _Points(Protocol):
    """Points f32 ``[P, n, dsub]`` of P problems, and passes over the first m of each."""

    shape: tuple[int, int, int]

    def assign(self, m: int, c: F32) -> tuple[F64, I64, F64]:
        """Per centroid: sums ``[P, ksub, dsub]``, counts ``[P, ksub]`` and squared distances ``[P, ksub]`` of its points."""
        ...

    def d2(self, m: int, c: F32) -> F32:
        """Squared distance of each point to its nearest centroid, ``[P, m]``."""
        ...

    def take(self, index: npt.NDArray[np.integer]) -> F32:
        """Points ``[P, r, dsub]`` at ``index`` ``[P, r]``."""
        ...


def _points_class(device: str) -> Callable[[F32, int], _Points]:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"found device {device!r}, need auto, cpu or cuda")
    if device != "cpu":
        try:
            import torch

            found = torch.cuda.is_available()
        except ImportError:
            found = False
        if found:
            return lambda x, n_threads: _TorchPoints(x, "cuda", _TEMP_ELEMS_CUDA)
        if device == "cuda":
            raise InputError("found no CUDA device that torch can use, need one: use device 'cpu' or 'auto'")
    return _CpuPoints


class _CpuPoints:
    """Passes by the native kernels, or by NumPy where the library is missing."""

    def __init__(self, x: F32, n_threads: int):
        self.shape = x.shape
        self._x = x
        self._n_threads = n_threads
        self._native = native.unavailable() is None
        self._prefix = x  # the last prefix that was used: rounds of one size follow each other

    def _first(self, m: int) -> F32:
        if self._prefix.shape[1] != m:
            self._prefix = self._x if m == self._x.shape[1] else np.ascontiguousarray(self._x[:, :m])
        return self._prefix

    def _assign(
        self, x: F32, c: F32, codes: npt.NDArray[np.uint8] | None = None, dists: F32 | None = None
    ) -> tuple[F64, I64, F64]:
        c = np.ascontiguousarray(c)
        if self._native:
            return native.kmeans_assign(x, c, codes=codes, dists=dists, n_threads=self._n_threads)
        return _assign_numpy(x, c, codes, dists)

    def assign(self, m: int, c: F32) -> tuple[F64, I64, F64]:
        return self._assign(self._first(m), c)

    def d2(self, m: int, c: F32) -> F32:
        out = np.empty((c.shape[0], m), dtype=np.float32)
        self._assign(self._first(m), c, dists=out)
        return out

    def residuals(self, c: F32) -> F32:
        """Point minus nearest centroid, ``[P, n, dsub]``."""
        P, n, dsub = self._x.shape
        out = np.empty(self._x.shape, dtype=np.float32)
        step = max(1, _TEMP_ELEMS // max(1, n))  # as many problems at once as the cache holds
        for i in range(0, P, step):
            part = slice(i, min(P, i + step))
            codes = np.empty((part.stop - i, n), dtype=np.uint8)
            self._assign(self._x[part], c[part], codes)
            flat = codes + np.arange(part.stop - i)[:, None] * c.shape[1]
            out[part] = self._x[part] - np.take(c[part].reshape(-1, dsub), flat, axis=0)
        return out

    def take(self, index: npt.NDArray[np.integer]) -> F32:
        return np.take_along_axis(self._x, index[..., None], axis=1)


def _assign_numpy(
    x: F32, c: F32, codes: npt.NDArray[np.uint8] | None = None, dists: F32 | None = None
) -> tuple[F64, I64, F64]:
    """``native.kmeans_assign`` in NumPy, some hundred times slower; for machines without the library."""
    P, n, dsub = x.shape
    k = c.shape[1]
    sums, counts, costs = np.zeros((P, k, dsub)), np.zeros((P, k), dtype=np.int64), np.zeros((P, k))
    step = max(1, _TEMP_ELEMS // k)
    for p in range(P):
        for i in range(0, n, step):
            part = x[p, i : i + step]
            d2 = np.zeros((part.shape[0], k), dtype=np.float32)
            for j in range(dsub):
                d2 += np.square(part[:, None, j] - c[p, None, :, j])
            code = d2.argmin(axis=1)
            least = d2.min(axis=1)
            costs[p] += np.bincount(code, weights=least, minlength=k)
            counts[p] += np.bincount(code, minlength=k)
            for j in range(dsub):
                sums[p, :, j] += np.bincount(code, weights=part[:, j], minlength=k)
            if codes is not None:
                codes[p, i : i + step] = code
            if dists is not None:
                dists[p, i : i + step] = least
    return sums, counts, costs


class _TorchPoints:
    """Passes by torch, on CUDA (or, in tests, on its CPU device).

    Sums go through a product with a one-hot matrix and not through ``scatter_add``, whose atomics would make the result
    depend on timing.
    """

    def __init__(self, x: F32, device: str, temp_elems: int):
        import torch

        self.shape = x.shape
        self._torch = torch
        self._device = device
        self._temp_elems = temp_elems
        self._x = torch.from_numpy(x).to(device)

    def _in_parts(self, m: int, c: F32) -> Any:
        """Yields (problems, points, codes, squared distances), as many problems at once as the memory bound allows."""
        torch = self._torch
        k, dsub = c.shape[1], c.shape[2]
        centroids = torch.from_numpy(np.ascontiguousarray(c)).to(self._device)
        step = max(1, self._temp_elems // (m * k))
        for i in range(0, self.shape[0], step):
            part = slice(i, min(self.shape[0], i + step))
            x = self._x[part, :m]
            d2 = torch.zeros((x.shape[0], m, k), device=self._device)
            for j in range(dsub):
                d2 += (x[:, :, None, j] - centroids[part, None, :, j]).square_()
            nearest, code = d2.min(dim=2)
            del d2
            yield part, x, code, nearest

    def assign(self, m: int, c: F32) -> tuple[F64, I64, F64]:
        torch = self._torch
        P, k, dsub = c.shape
        sums, counts, costs = np.empty((P, k, dsub)), np.empty((P, k), dtype=np.int64), np.empty((P, k))
        for part, x, code, nearest in self._in_parts(m, c):
            one_hot = torch.nn.functional.one_hot(code, k).to(torch.float32)
            columns = torch.cat([x, torch.ones_like(nearest)[..., None], nearest[..., None]], dim=2)
            totals = torch.bmm(one_hot.transpose(1, 2), columns).double().cpu().numpy()
            del one_hot
            sums[part] = totals[..., :dsub]
            counts[part] = np.rint(totals[..., dsub]).astype(np.int64)
            costs[part] = totals[..., dsub + 1]
        return sums, counts, costs

    def d2(self, m: int, c: F32) -> F32:
        out = np.empty((c.shape[0], m), dtype=np.float32)
        for part, _, _, nearest in self._in_parts(m, c):
            out[part] = nearest.cpu().numpy()
        return out

    def take(self, index: npt.NDArray[np.integer]) -> F32:
        torch = self._torch
        i = torch.from_numpy(np.array(index, dtype=np.int64)).to(self._device)
        out: F32 = torch.gather(self._x, 1, i[..., None].expand(-1, -1, self.shape[2])).cpu().numpy()
        return out
