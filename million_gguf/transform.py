"""The linear map of a codebook (``design``: K and V each have one per layer and KV head), fitted before any centroid.

An error ``e`` in a cached row does not cost ``|e|^2``. In a K row it moves the scores of the queries that meet it, by
``q.e``; in a V row it moves what leaves the attention block, by ``e W_o``. Both costs are quadratic, ``e C e^T``, with

* K: C = E[q^T q], the second moment of the queries of the KV head's group; where a head looks beyond the exact tail, those
  queries that do so weigh more,
* V: C = sum over the group's query heads of ``W_o W_o^T``, the part of the output projection that the head feeds.

With A = C^(1/2), errors of ``x A`` cost the same in every direction. There the rows are turned into their principal axes
U (the KLT), so that the parts of ``y = (x - mu) A U`` do not correlate and k-means per code loses nothing between codes.
What is left to choose is which axes share a code (``coding_order``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError, MismatchError
from .spec import PQSpec

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# Share of the mean cost that is added to every direction of a metric. Directions that no calibration query looked into
# may still meet one later, and the inverse must fit f16. Between 1e-5 and 1e-3 it makes no difference that shows.
_RIDGE = 1e-4

# How much more far keys, which are read as codes, count than those that an exact tail holds when there is one. Text of another
# kind gains up to here (docs/calibration.md); with far keys alone, pq4 without a tail loses 16 %.
_FAR = 16.0

# Share of the sums, taken without their signs, below which a second moment is what rounding left: the sums are f32, and where the mean
# of the keys is large they cancel.
_ROUNDING = 1e-6

# The stored map is refused above 1e6 (container.py); this leaves a factor of ten for the rounding to f16.
_MAX_CONDITION = 1e5

_CODE_BITS = 8
_MAX_SWEEPS = 100  # sweeps over all pairs of codes; measured variances need 5 to 10


@dataclass(frozen=True)
class Basis:
    """Principal axes of one layer and side, in the order of falling variance.

    Attributes:
        axes: f64 ``[n_head_kv, D, D]``; ``x @ axes[h]`` are the rows of head h along their axes.
        variance: f64 ``[n_head_kv, D]``, of the training rows along each axis, falling; the unit is that of ``axes``.
    """

    axes: F64
    variance: F64

    @property
    def spread(self) -> F64:
        """Arithmetic over geometric mean of the variances, ``[n_head_kv]``: what coding all axes alike would lose.

        1 when all axes are alike. Axes below 1e-9 of the largest count as that: they are noise of the arithmetic."""
        v = np.maximum(self.variance, 1e-9 * self.variance[:, :1])
        mean = v.mean(axis=1)
        return np.where(mean > 0.0, mean / np.exp(np.log(np.where(v > 0.0, v, 1.0)).mean(axis=1)), 1.0)

    def transform(self, spec: PQSpec) -> npt.NDArray[np.float16]:
        """T f16 ``[n_head_kv, D, D]`` for a cache type. Raises MismatchError when it does not take the head size."""
        order = coding_order(self.variance, spec)
        T: npt.NDArray[np.float16] = np.take_along_axis(self.axes, order[:, None, :], axis=2).astype(np.float16)
        return T


def query_metric(
    queries: npt.NDArray[np.floating], n_head_kv: int, weights: npt.NDArray[np.floating] | None = None
) -> F64:
    """Cost of errors in K: f64 ``[n_head_kv, D, D]`` from queries ``[n, n_head, D]``, as attention meets them (after rope).

    Args:
        weights: ``[n, n_head, 2]``, what errors of a query's scores cost beside an exact tail, and without one; None: all
            the same.

    Raises MismatchError when the heads do not divide into groups or there are not as many weights, InputError when there
    are no queries or they are not finite.
    """
    n, n_head, D = queries.shape
    if n < 1 or n_head % n_head_kv:
        raise MismatchError(f"queries are [{n}, {n_head}, {D}], need at least one and a multiple of {n_head_kv} heads")
    if weights is not None and weights.shape != (n, n_head, 2):
        raise MismatchError(f"weights are {list(weights.shape)}, need [{n}, {n_head}, 2]")
    group = n_head // n_head_kv
    metric = np.empty((n_head_kv, D, D))
    for h in range(n_head_kv):
        heads = slice(h * group, (h + 1) * group)
        q = queries[:, heads].reshape(-1, D).astype(np.float64)
        metric[h] = q.T @ q / q.shape[0]
        if weights is None:
            continue
        w = weights[:, heads, 0].reshape(-1).astype(np.float64)
        far, all_keys = w.sum(), weights[:, heads, 1].sum(dtype=np.float64)
        if far > 0.0:
            # Near keys cost nothing beside a tail, but do without one. So far ones count in heads that look at them.
            share = _FAR * far / (_FAR * far + all_keys)
            of_far = (q * w[:, None]).T @ q / far
            metric[h] = (1.0 - share) * metric[h] + share * np.trace(metric[h]) / np.trace(of_far) * of_far
    if not np.isfinite(metric).all():
        raise InputError(
            "found queries with NaN or infinity, need finite ones: check that the model runs well without PQ"
        )
    return metric


def anisotropy(
    matches: npt.NDArray[np.floating],
    T: npt.NDArray[np.floating],
    T_inv: F64,
    mu: npt.NDArray[np.floating],
) -> npt.NDArray[np.float32]:
    """Where the queries that look for a key lie: f32 ``[n_head_kv, D]``, for ``pq_ref.Codebook.aniso``.

    A query q meets y as ``q' = T^-1 q``. This is the regression of q' on the y that it looks for, axis by axis: ``sum w y q'`` over
    ``sum w y^2``. Not over the variance of all keys: those that are looked for lie further out, along some axes more than along others.

    Args:
        matches: ``[n_head_kv, D + 1, 2 D + 1]``, sums of ``w [k; 1] [q; k; 1]^T``.
        T, T_inv: ``[n_head_kv, D, D]``; mu: ``[n_head_kv, D]``. Of the codebook.

    Returns:
        The largest element of a head is 1 or -1, as only ratios count; 0 where y does not vary, and in a head that no query looks
        at. Raises MismatchError when shapes do not fit, InputError when the sums are not finite.
    """
    n_head_kv, D = mu.shape
    for name, a, want in (
        ("matches", matches, (n_head_kv, D + 1, 2 * D + 1)),
        ("T", T, (n_head_kv, D, D)),
        ("T_inv", T_inv, (n_head_kv, D, D)),
    ):
        if a.shape != want:
            raise MismatchError(f"{name} is {list(a.shape)}, need {list(want)}")
    if not np.isfinite(matches).all():
        raise InputError(
            "found queries or keys with NaN or infinity, need finite ones: check that the model runs well without PQ"
        )
    sums = matches.astype(np.float64)
    T = T.astype(np.float64)
    to_y = np.concatenate([T, -mu.astype(np.float64)[:, None, :] @ T], axis=1)  # y = [k; 1] to_y
    along = np.einsum("hid,hij,hdj->hd", to_y, sums[:, :, :D], T_inv, optimize=True)
    square = np.einsum("hid,hij,hjd->hd", to_y, sums[:, :, D:], to_y, optimize=True)
    size = np.sqrt(np.maximum(np.diagonal(sums[:, :, D:], axis1=1, axis2=2), 0.0))
    varies = square > _ROUNDING * np.einsum("hid,hi->hd", np.abs(to_y), size) ** 2
    out = np.where(varies, along / np.where(varies, square, 1.0), 0.0)
    largest = np.abs(out).max(axis=1, keepdims=True)
    return (out / np.where(largest > 0.0, largest, 1.0)).astype(np.float32)


def output_metric(weight: npt.NDArray[np.floating], n_head_kv: int, D: int) -> F64:
    """Cost of errors in V: f64 ``[n_head_kv, D, D]`` from the output projection ``[n_embd, n_head * D]``.

    Raises MismatchError when its columns do not divide into groups of heads.
    """
    n_embd, width = weight.shape
    if width % (n_head_kv * D):
        raise MismatchError(f"the output projection has {width} columns, need a multiple of {n_head_kv} x {D}")
    group = width // (n_head_kv * D)
    metric = np.zeros((n_head_kv, D, D))
    for h in range(n_head_kv):
        for g in range(group):
            w = weight[:, (h * group + g) * D :][:, :D].astype(np.float64)
            metric[h] += w.T @ w
    if not np.isfinite(metric).all():
        raise InputError(
            "found an output projection with NaN or infinity, need finite weights: convert the model again"
        )
    return metric


def fit(rows: npt.NDArray[np.floating], metric: F64 | None) -> Basis:
    """Principal axes of the rows in a metric.

    Args:
        rows: f32 or f16 ``[n, n_head_kv, D]``, as the cache would store them.
        metric: ``[n_head_kv, D, D]``, symmetric and positive semidefinite; None: all errors cost the same.

    Raises:
        MismatchError: shapes that do not fit each other. InputError: rows with NaN or infinity.
    """
    n, n_head_kv, D = rows.shape
    if metric is not None and metric.shape != (n_head_kv, D, D):
        raise MismatchError(f"the metric is {list(metric.shape)}, need [{n_head_kv}, {D}, {D}]")
    axes, variance = np.empty((n_head_kv, D, D)), np.empty((n_head_kv, D))
    for h in range(n_head_kv):
        x = rows[:, h].astype(np.float64)
        x -= x.mean(axis=0)
        covariance = x.T @ x / n
        if not np.isfinite(covariance).all():
            raise InputError(
                "found rows with NaN or infinity, need finite ones: check that the model runs well without PQ"
            )
        axes[h], variance[h] = _principal_axes(covariance, np.eye(D) if metric is None else metric[h])
    return Basis(axes, variance)


def _principal_axes(covariance: F64, metric: F64) -> tuple[F64, F64]:
    """Axes ``[D, D]`` of one head, and the variances along them, falling."""
    D = covariance.shape[0]
    if np.trace(metric) <= 0.0:
        metric = np.eye(D)
    # The ridge is added where every channel of the rows has a deviation of 1. So it weighs alike whatever the scale of a
    # channel, and a channel that is large where the queries are small (an outlier channel) is coded as if it were neither.
    channel = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    if channel.max() <= 0.0:
        channel = np.ones(D)
    ridge, floor = _RIDGE, _RIDGE
    while True:
        deviation = np.maximum(channel, floor * channel.max())
        cost, directions = np.linalg.eigh(metric * np.outer(deviation, deviation))
        root = np.sqrt(np.maximum(cost, 0.0) + ridge * np.maximum(cost, 0.0).mean())
        A = (directions * root) @ directions.T
        variance, U = np.linalg.eigh(A @ (covariance / np.outer(deviation, deviation)) @ A)
        U = U[:, ::-1]
        axes = (A @ U) / deviation[:, None]
        inverse = (U.T @ ((directions / root) @ directions.T)) * deviation
        if np.abs(axes).sum(axis=1).max() * np.abs(inverse).sum(axis=1).max() <= _MAX_CONDITION:
            break
        ridge, floor = 4.0 * ridge, min(1.0, 4.0 * floor)
    # Stored in f16 both ways: with equal largest values neither runs out of f16's range before the other.
    scale = np.sqrt(np.abs(inverse).max() / np.abs(axes).max())
    return axes * scale, np.maximum(variance[::-1], 0.0) * scale**2


# ---- which axes share a code ----


def coding_order(variance: F64, spec: PQSpec) -> I64:
    """Which axis becomes which element of y, so that the error that ``coded_error`` predicts is small.

    With codes of the same bits for as many axes each, that puts large and small axes together, until all codes carry the same
    product of variances (the eigenvalue allocation of Ge et al., "Optimized Product Quantization", PAMI 2014, section 4.2).
    But where the variances fall steeply no product is the same, and small axes are better left out beside a large one; and
    where codes stand for two axes or four (pq3), it has to be chosen which axes get the more bits.

    So the axes are dealt out, largest first, to and fro over the codes (of two axes, then of four), and swapped between two codes for
    as long as a swap helps. All swaps of disjoint pairs of codes are judged at once, and the pairs take turns as in a
    round-robin tournament. On measured variances simulated annealing finds no order that is better by 0.1 %.

    Args:
        variance: ``[n_head_kv, D]``, along each axis.

    Returns:
        ``[n_head_kv, D]``: element i of y is axis ``order[h, i]``. Raises MismatchError when the type does not take D.
    """
    n_head_kv, D = variance.shape
    by_dims = spec.elements_of_codes(D)
    width = max(elements.shape[1] for elements in by_dims)
    # [codes, width]; a code of fewer axes is filled up with element D, an axis that has no variance and stays where it is.
    elements = np.concatenate([np.pad(e, ((0, 0), (0, width - e.shape[1])), constant_values=D) for e in by_dims])
    dealt = np.concatenate([e[:: 1 - j % 2 * 2, j] for e in by_dims for j in range(e.shape[1])])
    order = np.full((n_head_kv, D + 1), D)
    order[:, dealt] = np.argsort(-variance, axis=1, kind="stable")
    v = np.take_along_axis(np.pad(variance, ((0, 0), (0, 1))), order, axis=1)  # of the elements

    rounds = _round_robin(len(elements))
    mine, theirs = np.divmod(np.arange(width * width), width)  # what each swap exchanges
    changed = np.zeros((n_head_kv, len(elements)), dtype=np.int64)  # the turn in which a code's axes last changed
    for turn in range(_MAX_SWEEPS * len(rounds)):
        if changed.max() < turn - len(rounds):
            break  # every pair has met as it is now
        first, second = rounds[turn % len(rounds)]
        h, pair = np.nonzero(np.maximum(changed[:, first], changed[:, second]) >= turn - len(rounds))
        a, b = first[pair], second[pair]
        v_a, v_b = v[h[:, None], elements[a]], v[h[:, None], elements[b]]  # [pairs, width]
        possible = (elements[a][:, mine] < D) & (elements[b][:, theirs] < D)
        p, swap = np.nonzero(possible)
        new_a, new_b, each = v_a[p], v_b[p], np.arange(len(p))
        new_a[each, mine[swap]], new_b[each, theirs[swap]] = v_b[p, theirs[swap]], v_a[p, mine[swap]]
        error = np.full(possible.shape, np.inf)
        error[possible] = coded_error(new_a) + coded_error(new_b)
        best = error.argmin(axis=1)
        # A thousandth of what any measurement would show; it keeps rounding from swapping equals to and fro.
        helps = error.min(axis=1) < (1.0 - 1e-6) * (coded_error(v_a) + coded_error(v_b))
        h, a, b, best = h[helps], a[helps], b[helps], best[helps]
        from_a, from_b = elements[a, mine[best]], elements[b, theirs[best]]
        for x in (order, v):
            x[h, from_a], x[h, from_b] = x[h, from_b], x[h, from_a]
        changed[h, a] = changed[h, b] = turn
    return order[:, :D]


def coded_error(variance: F64) -> F64:
    """Least squared error of Gaussian axes ``[..., dims]`` that share a code of ``_CODE_BITS`` bits: ``[...]``.

    Reverse water-filling (Cover & Thomas, "Elements of Information Theory", section 10.3.3): axes that vary more than some level
    are coded down to it, the others not at all. On measured rows k-means ends above it by a factor of 1.1 to 2.5, larger for pairs
    than for fours; orders that were made with such factors came out no better.
    """
    v = -np.sort(-variance, axis=-1)
    n_coded = np.arange(1, v.shape[-1] + 1)
    product = np.cumsum(np.log(np.maximum(v, np.finfo(np.float64).tiny)), axis=-1)
    level = np.exp((product - 2.0 * _CODE_BITS * np.log(2.0)) / n_coded)
    left_out = np.cumsum(v[..., ::-1], axis=-1)[..., ::-1] - v
    # The levels below the smallest axis that they code are those of 1, 2, ... axes, up to as many as are to be coded.
    n = (level < v).sum(axis=-1, keepdims=True)
    error = np.take_along_axis(n_coded * level + left_out, np.maximum(n - 1, 0), axis=-1)
    return np.where(n > 0, error, 0.0)[..., 0]


def _round_robin(n: int) -> list[tuple[I64, I64]]:
    """Rounds of disjoint pairs in which each of n meets each other once (the circle method)."""
    circle = np.arange(n + n % 2)
    rounds = []
    for _ in range(len(circle) - 1):
        first, second = circle[: len(circle) // 2], circle[: len(circle) // 2 - 1 : -1]
        both = (first < n) & (second < n)  # with n odd, one sits out
        rounds.append((first[both], second[both]))
        circle = np.concatenate([circle[:1], np.roll(circle[1:], 1)])
    return rounds
