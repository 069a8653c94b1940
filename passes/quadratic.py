"""The loss of a layer as a quadratic form in its weights: moments of the data, and what rounding costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from qcompile.ir.arith import signed_digits

Array = NDArray[np.float64]

MOST_INPUTS = 8192
"""With more inputs in a group than this, the square moments (about four arrays of float64) take more than 2 GiB."""

_CHUNK = 1 << 22
"""Elements of a float64 copy of the data that is held at once."""


class Moments:
    """Mean and centred second moments of a layer's inputs (and of inputs times outputs), streamed in float64.

    G groups, K inputs and O outputs per group. Sums are taken about the first batch's mean, so that nothing cancels
    where values are large and vary little, and a constant input has moments of exactly zero.
    """

    def __init__(self) -> None:
        self.count = 0
        self._x = _Sums()
        self._y: _Sums | None = None
        self._square = np.zeros((0, 0, 0))
        self._cross = np.zeros((0, 0, 0))

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32] | None) -> None:
        """Positions x [G, positions, K] and y [G, positions, O] are counted; y comes with every batch or with none.

        ValueError where shapes differ from those of earlier batches or a value is not finite.
        """
        if x.ndim != 3 or (y is not None and (y.ndim != 3 or y.shape[:2] != x.shape[:2])):
            raise ValueError(
                f"moments need [groups, positions, channels], not {x.shape}"
                + ("" if y is None else f" and {y.shape}")
            )
        if x.shape[1] == 0:
            return
        if self.count == 0:
            groups, _, inputs = x.shape
            self._x.center(x)
            self._square = np.zeros((groups, inputs, inputs))
            if y is not None:
                self._y = _Sums()
                self._y.center(y)
                self._cross = np.zeros((groups, inputs, y.shape[2]))
        if (y is None) != (self._y is None):
            raise ValueError("outputs come with every batch or with none")
        for part in _parts(x):
            dx = self._x.add(x[:, part])
            for square, d in zip(self._square, dx, strict=True):
                square += d.T @ d
            if y is not None and self._y is not None:
                self._cross += dx.transpose(0, 2, 1) @ self._y.add(y[:, part])
        self.count += x.shape[1]

    @property
    def mean_x(self) -> Array:
        """[G, K]."""
        return self._x.mean(self.count)

    @property
    def mean_y(self) -> Array:
        """[G, O]; ValueError where no outputs were added."""
        return self._outputs().mean(self.count)

    @property
    def hessian(self) -> Array:
        """E[(x - mean)(x - mean)^T], [G, K, K], symmetric."""
        d = self._x.drift(self.count)
        h = self._square / self.count - d[:, :, None] * d[:, None, :]
        return 0.5 * (h + h.transpose(0, 2, 1))

    @property
    def cross(self) -> Array:
        """E[(x - mean)(y - mean)^T], [G, K, O]; ValueError where no outputs were added."""
        dy = self._outputs().drift(self.count)
        return self._cross / self.count - self._x.drift(self.count)[:, :, None] * dy[:, None, :]

    def regressed(self, weights: Array, damp: float) -> Array:
        """The weights [G, O, K] that best make y from x, drawn toward `weights` by `damp` mean diagonals (ridge).

        Together with `Problem.damped(damp)` this is the exact quadratic form of reconstruction error plus ridge.
        """
        h = self.hessian
        ridge = _ridge(h, damp)[:, None, None]
        right = self.cross + ridge * weights.transpose(0, 2, 1)
        solved = np.linalg.solve(h + ridge * np.eye(h.shape[1]), right)
        return np.ascontiguousarray(solved.transpose(0, 2, 1), np.float64)

    def _outputs(self) -> _Sums:
        if self._y is None:
            raise ValueError("no outputs were added to these moments")
        return self._y


class _Sums:
    """Sums of one operand about a center that lies among its values."""

    def __init__(self) -> None:
        self._center = np.zeros((0, 0))
        self._sum = np.zeros((0, 0))

    def center(self, first: NDArray[np.float32]) -> None:
        self._center = first.mean(1, dtype=np.float64)
        self._sum = np.zeros_like(self._center)

    def add(self, values: NDArray[np.float32]) -> Array:
        """The values relative to the center, now counted."""
        if (values.shape[0], values.shape[2]) != self._center.shape:
            raise ValueError(f"a batch of {values.shape} follows others of {self._center.shape}")
        d = values.astype(np.float64)
        d -= self._center[:, None]
        total = d.sum(1)
        if not np.isfinite(total).all():
            raise ValueError("the data of a layer are not finite")
        self._sum += total
        return d

    def drift(self, count: int) -> Array:
        if count == 0:
            raise ValueError("no positions were added to these moments")
        return self._sum / count

    def mean(self, count: int) -> Array:
        return self.drift(count) + self._center


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes [G, O, K] (whole numbers in float64), their scale [G, O] and what they cost [G, O]."""

    codes: Array
    scale: Array
    loss: Array

    def or_better(self, other: Rounded) -> Rounded:
        """Row by row the one that costs less; on a tie this one."""
        k = other.loss < self.loss
        return Rounded(
            np.where(k[..., None], other.codes, self.codes),
            np.where(k, other.scale, self.scale),
            np.where(k, other.loss, self.loss),
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """Round target [G, O, K] to scale * codes, lo <= codes <= hi, at cost d H d^T with d = scale * codes - target.

    `hessian` [G, K, K] is symmetric and positive semidefinite. Rows (g, o) are independent of each other. Codes have at
    most `digits` nonzero signed digits where that is given.
    """

    hessian: Array
    target: Array
    lo: int
    hi: int
    digits: int | None = None

    def __post_init__(self) -> None:
        h, t = self.hessian.shape, self.target.shape
        if len(h) != 3 or len(t) != 3 or h != (t[0], t[2], t[2]):
            raise ValueError(f"a Hessian of {h} does not belong to weights of {t}")
        if not self.lo <= 0 <= self.hi or self.lo == self.hi:
            raise ValueError(f"codes from {self.lo} to {self.hi} are no range around zero")

    @property
    def diagonal(self) -> Array:
        """[G, K]; zero where an input is dead."""
        diagonal: Array = np.maximum(np.einsum("gkk->gk", self.hessian), 0.0)
        return diagonal

    @property
    def order(self) -> NDArray[np.intp]:
        """Columns [K] by decreasing diagonal, averaged over groups; equal ones keep their order."""
        return np.argsort(-self.diagonal.mean(0), kind="stable")

    def loss(self, codes: Array, scale: Array) -> Array:
        """[G, O]."""
        d = codes * scale[..., None] - self.target
        loss: Array = np.maximum(np.einsum("gok,gok->go", d @ self.hessian, d), 0.0)
        return loss

    def damped(self, fraction: float) -> Problem:
        """`fraction` of the mean diagonal added to the diagonal; the identity where a group's Hessian is zero."""
        k = self.hessian.shape[1]
        ridge = _ridge(self.hessian, fraction)[:, None, None]
        return replace(self, hessian=self.hessian + ridge * np.eye(k))

    def nearest(self, scale: Array) -> Array:
        """The codes [G, O, K] next to target / scale [G, O], halves to even."""
        return self.to_codes(self.target / scale[..., None])

    def to_codes(self, values: Array) -> Array:
        """The code nearest to each value."""
        return to_codes(values, self.lo, self.hi, self.digits)

    def rounded(self, codes: Array, scale: Array) -> Rounded:
        """The codes with what they cost."""
        return Rounded(codes, scale, self.loss(codes, scale))


def to_codes(values: Array, lo: int, hi: int, digits: int | None = None) -> Array:
    """The nearest of the codes lo..hi, halves to even; with `digits`, of those with so few signed ones, halves down."""
    if digits is None:
        return np.clip(np.rint(values), lo, hi)
    levels = _levels(lo, hi, digits)
    return levels[np.searchsorted(0.5 * (levels[1:] + levels[:-1]), values)]


@cache
def _levels(lo: int, hi: int, digits: int) -> Array:
    return np.array([c for c in range(lo, hi + 1) if len(signed_digits(c)) <= digits], np.float64)


def _ridge(hessian: Array, fraction: float) -> Array:
    """[G]: a fraction of the mean diagonal, one where that is zero."""
    if not fraction > 0.0:
        raise ValueError(f"damping is a fraction above zero, not {fraction}")
    ridge = fraction * np.einsum("gkk->g", hessian) / hessian.shape[1]
    return np.where(ridge > 0.0, ridge, 1.0)


def _parts(x: NDArray[np.float32]) -> Iterator[slice]:
    """Positions in runs whose float64 copy is of bounded size."""
    groups, positions, inputs = x.shape
    length = max(1, _CHUNK // max(1, groups * inputs))
    return (slice(p, p + length) for p in range(0, positions, length))
