"""Integer coordinate descent on a layer's quadratic loss: plain, with a search for scales, and as QuantEase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from .quadratic import Array, Problem, Rounded

SWEEPS = 50
_BLOCK = 128
_TIE = 1e-9
"""A code moves where that saves more than this many H_kk scale^2; without it, ties would be moved to and fro."""
_DENSE = 0.25
_POWER = 32


def descend(
    problem: Problem, scale: Array, start: Array | None = None, sweeps: int = SWEEPS
) -> Rounded:
    """Codes at the given scale [G, O] that cost no more than `start` (nearest), by cyclic coordinate descent.

    Columns come in order of decreasing diagonal, each code moves to the integer that is best while all others stay, and
    a row is done when a whole sweep moved nothing: then no single code can be improved. A dead input keeps its codes.
    """
    codes = problem.nearest(scale) if start is None else start
    return _Columns.of(problem).descend(scale, codes, sweeps)


def search(
    problem: Problem,
    scale: Array,
    fractions: Sequence[float],
    refits: int = 1,
    sweeps: int = SWEEPS,
    start: Callable[[Array], Array] | None = None,
) -> Rounded:
    """The best codes and scales per row among `fractions` of `scale` [G, O], each descended from `start` of it.

    `start` makes codes of a scale: nearest, unless GPTQ or another is given.

    `refits` times the scale becomes the least-squares one for the codes found, q H t / q H q, and they are descended
    again. What a refit or a fraction does not improve is not taken.
    """
    columns = _Columns.of(problem)
    begin = problem.nearest if start is None else start
    best: Rounded | None = None
    for fraction in fractions:
        first = scale * fraction
        found = columns.descend(first, begin(first), sweeps)
        for _ in range(refits):
            refitted = _refit(problem, found)
            found = found.or_better(columns.descend(refitted, found.codes, sweeps))
        best = found if best is None else best.or_better(found)
    if best is None:
        raise ValueError("a search for scales needs a fraction to try")
    return best


def quantease(
    problem: Problem, scale: Array, iterations: int = 25, sweeps: int = SWEEPS
) -> Rounded:
    """Codes at the given scale [G, O] by QuantEase (Behdin et al. 2023, arXiv 2309.01885, algorithm 1 with relaxation).

    From the real target on, a sweep sets every column to its best integer, but each third one to its best real value.
    Integer sweeps from integers never cost more; those after a relaxed one may, so the best integers seen, nearest
    among them, are kept per row and descended from for up to `sweeps`.
    """
    return _Columns.of(problem).quantease(scale, iterations, sweeps)


def quantease_clipped(
    problem: Problem,
    scale: Array,
    outliers: float = 0.01,
    iterations: int = 25,
    sweeps: int = SWEEPS,
) -> Rounded:
    """QuantEase at `scale` [G, O] or at one that clips a fraction of outliers, per row whichever costs less.

    The outlier-aware form (algorithm 2) keeps a sparse real matrix S beside the codes, at most s entries, and takes
    by turns a sweep over the codes and a step of iterative hard thresholding, S <- top_s(S - R H / L) with
    R = scale * codes + S - target and L the largest eigenvalue of H; the codes' range is that of the weights outside
    of S. In a graph of integer products with one scale per channel S has no place, except as a second, sparse product;
    what remains is its choice: s = outliers * K weights of every row are found so, the range shrinks to the largest
    target outside of them, and QuantEase makes the other weights pay for the clipped ones.
    """
    columns = _Columns.of(problem)
    whole = columns.quantease(scale, iterations, sweeps)
    count = round(outliers * problem.target.shape[2])
    if count == 0:
        return whole
    narrow = columns.clipped(scale, count, iterations)
    return whole.or_better(columns.quantease(narrow, iterations, sweeps))


class _Sweep(Enum):
    """What a column is set to: its best integer, that only where it costs less, or its best real value."""

    INTEGER = auto()
    IMPROVE = auto()
    RELAX = auto()


@dataclass(slots=True)
class _State:
    """Values in units of codes and their gradients over the diagonal, both [G, K, O] in the order of the columns."""

    values: Array
    gradient: Array


@dataclass(frozen=True, eq=False)
class _Columns:
    """A problem with its columns in the order of descent, each divided by its diagonal, and laid out [G, K, O].

    With e = codes - target / scale, a column's gradient over its diagonal is (e H)_k / H_kk: it
    knows no scale, and the best value of column k is its present one minus that.
    """

    order: NDArray[np.intp]
    diagonal: Array
    rows: Array
    target: Array
    codes: Callable[[Array], Array]

    @staticmethod
    def of(problem: Problem) -> _Columns:
        order = problem.order
        diagonal = problem.diagonal[:, order]
        with np.errstate(divide="ignore"):
            inverse = np.where(diagonal > 0.0, 1.0 / diagonal, 0.0)
        rows = problem.hessian[:, order][:, :, order]
        rows *= inverse[:, :, None]
        target = np.ascontiguousarray(problem.target[:, :, order].transpose(0, 2, 1))
        return _Columns(order, diagonal, rows, target, problem.to_codes)

    def inward(self, weights: Array) -> Array:
        """[G, O, K] in the problem's order -> [G, K, O] in that of descent."""
        return np.ascontiguousarray(weights[:, :, self.order].transpose(0, 2, 1))

    def outward(self, weights: Array) -> Array:
        """The inverse of inward."""
        result = np.empty((weights.shape[0], weights.shape[2], weights.shape[1]))
        result[:, :, self.order] = weights.transpose(0, 2, 1)
        return result

    def state(self, values: Array, scale: Array) -> _State:
        return _State(values, self.rows @ (values - self.target / scale[:, None]))

    def cost(self, state: _State, scale: Array) -> Array:
        error = state.values - self.target / scale[:, None]
        weighted = self.diagonal[:, :, None] * state.gradient
        total: Array = np.maximum(np.einsum("gko,gko->go", error, weighted), 0.0)
        return total * scale**2

    def sweep(self, rows: Array, state: _State, mode: _Sweep) -> NDArray[np.bool_]:
        """Every column set in turn; which rows [G, O] moved. The gradient is brought up to date block by block."""
        values, gradient = state.values, state.gradient
        groups, inputs, outputs = values.shape
        moved = np.zeros((groups, outputs), np.bool_)
        for first in range(0, inputs, _BLOCK):
            last = min(first + _BLOCK, inputs)
            near = rows[:, first:last, first:last]
            steps = np.zeros((groups, last - first, outputs))
            for j in range(last - first):
                k = first + j
                slope = gradient[:, k] + (near[:, j : j + 1, :j] @ steps[:, :j])[:, 0]
                best = values[:, k] - slope
                if mode is not _Sweep.RELAX:
                    best = self.codes(best)
                step = best - values[:, k]
                if mode is _Sweep.IMPROVE:
                    # the loss changes by this times H_kk scale^2
                    worth = step * (2.0 * slope + step) < -_TIE
                    step = np.where(worth, step, 0.0)
                    best = values[:, k] + step
                steps[:, j] = step
                values[:, k] = best
            moved |= steps.any(1)
            ahead = rows[:, :, first:last]
            columns, those = steps.any((0, 2)), steps.any((0, 1))
            if columns.mean() * those.mean() > _DENSE:
                gradient += ahead @ steps
            elif columns.any():
                # late sweeps move few codes
                few = steps[:, columns][:, :, those]
                gradient[:, :, those] += ahead[:, :, columns] @ few
        return moved

    def descend(self, scale: Array, codes: Array, sweeps: int) -> Rounded:
        """`codes` [G, O, K]; see the function of this name."""
        if not np.array_equal(self.codes(codes), codes):
            lo, hi = self.codes(np.array([-np.inf, np.inf]))
            raise ValueError(
                f"descent starts from codes outside of {lo:.0f}..{hi:.0f}, or of more digits than codes have"
            )
        whole = self.state(self.inward(codes), scale)
        begun = Rounded(codes, scale, self.cost(whole, scale))
        groups, outputs = np.arange(codes.shape[0]), np.arange(codes.shape[1])
        rows, state = self.rows, _State(whole.values.copy(), whole.gradient.copy())
        for _ in range(sweeps):
            moved = self.sweep(rows, state, _Sweep.IMPROVE)
            busy = np.ix_(groups, np.arange(len(self.order)), outputs)
            whole.values[busy], whole.gradient[busy] = state.values, state.gradient
            if not moved.any():
                break
            # rows are independent: one that did not move in a whole sweep never will
            g, o = moved.any(1), moved.any(0)
            if not g.all():
                groups, rows = groups[g], rows[g]
            if not (g.all() and o.all()):
                outputs = outputs[o]
                state = _State(state.values[g][:, :, o], state.gradient[g][:, :, o])
        return begun.or_better(Rounded(self.outward(whole.values), scale, self.cost(whole, scale)))

    def quantease(self, scale: Array, iterations: int, sweeps: int) -> Rounded:
        """See the function of this name."""
        real = self.target / scale[:, None]
        start = self.codes(real)
        best, least = start, self.cost(self.state(start, scale), scale)
        state = _State(real, np.zeros_like(real))
        for i in range(iterations):
            relaxed = i % 3 == 1
            self.sweep(self.rows, state, _Sweep.RELAX if relaxed else _Sweep.INTEGER)
            if not relaxed:
                cost = self.cost(state, scale)
                better = (cost < least)[:, None]
                best, least = np.where(better, state.values, best), np.minimum(cost, least)
        return self.descend(scale, self.outward(best), sweeps)

    def clipped(self, scale: Array, count: int, iterations: int) -> Array:
        """The scale [G, O] for the range of each row's weights without its `count` outliers."""
        step = 1.0 / self.curvature()[:, None, None]
        sparse = _largest(self.target, count)
        dense = self.target - sparse
        for _ in range(iterations):
            narrow = self.narrowed(scale, sparse)[:, None]
            state = _State(dense / narrow, self.rows @ ((dense + sparse - self.target) / narrow))
            self.sweep(self.rows, state, _Sweep.INTEGER)
            dense = state.values * narrow
            slope = state.gradient * self.diagonal[:, :, None] * narrow
            sparse = _largest(sparse - step * slope, count)
        return self.narrowed(scale, sparse)

    def narrowed(self, scale: Array, sparse: Array) -> Array:
        """`scale` times what is left of a row's range without the weights where `sparse` is not zero."""
        size = np.abs(self.target)
        whole, rest = size.max(1), np.where(sparse != 0.0, 0.0, size).max(1)
        return np.where(rest > 0.0, scale * rest / np.where(whole > 0.0, whole, 1.0), scale)

    def curvature(self) -> Array:
        """The largest eigenvalue of each H [G] by the power method, from below; one where H is zero."""
        v = self.diagonal[:, :, None]
        norm = np.zeros(len(v))
        for _ in range(_POWER):
            v = v / np.where(norm > 0.0, norm, 1.0)[:, None, None]
            v = self.diagonal[:, :, None] * (self.rows @ v)
            norm = np.linalg.norm(v[:, :, 0], axis=1)
        return np.where(norm > 0.0, norm, 1.0)


def _largest(weights: Array, count: int) -> Array:
    """The `count` largest magnitudes along K of [G, K, O], all others zero; among equals the first."""
    keep = np.argsort(-np.abs(weights), axis=1, kind="stable")[:, :count]
    result = np.zeros_like(weights)
    np.put_along_axis(result, keep, np.take_along_axis(weights, keep, 1), 1)
    return result


def _refit(problem: Problem, found: Rounded) -> Array:
    """The scale [G, O] that costs least with these codes; as it was where that is not a positive number."""
    weighted = found.codes @ problem.hessian
    top = np.einsum("gok,gok->go", weighted, problem.target)
    bottom = np.einsum("gok,gok->go", weighted, found.codes)
    sound = (top > 0.0) & (bottom > 0.0)
    return np.where(sound, top / np.where(sound, bottom, 1.0), found.scale)
