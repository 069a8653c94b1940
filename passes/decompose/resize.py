"""Resize: nearest picks entries, everything else is a product with constant weights, one axis after the other.

The coordinates are those of the ONNX operator specification, `Resize`, version 19.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .expression import Expression

MOST_WEIGHTS = 1 << 22


def resize(e: Expression) -> ir.Value:
    """Resize -> Gather, or MatMul by the weights of every output, along each axis that changes."""
    x, a = e.input(0), e.node.attributes
    mode, how = (
        a.get_string("mode", "nearest"),
        a.get_string("coordinate_transformation_mode", "half_pixel"),
    )
    rank = len(e.shape(x))
    axes = [i % rank for i in a.get_ints("axes") or range(rank)]
    scales = _scales(e, x, axes)
    region = e.constant(1, "a region") if how == "tf_crop_and_resize" else None
    for i, axis in enumerate(axes):
        scale, after = scales[i]
        size = e.shape(x)[axis]
        if after is None:
            continue
        if size == after and scale == 1 and how != "tf_crop_and_resize":
            continue
        n = e.size(x, axis)
        span = None
        if region is not None:
            flat = region.reshape(-1)
            span = float(flat[i]), float(flat[len(axes) + i])
            if n == after and span == (0.0, 1.0):
                continue
        places = _places(e, how, n, after, scale, span)
        outside = (places < 0) | (places > n - 1) if how == "tf_crop_and_resize" else None
        if mode == "nearest" and (outside is None or not outside.any()):
            x = e.take(x, axis, _nearest(e, places, n).tolist())
            continue
        weights = _weights(e, mode, places, n, scale)
        if weights.size > MOST_WEIGHTS:
            raise e.refuse(f"of {n} to {after} entries by {mode} interpolation is too large here")
        shift = np.zeros(after)
        if outside is not None:
            weights[outside] = 0.0
            shift[outside] = a.get_float("extrapolation_value", 0.0)
        order = [*(k for k in range(rank) if k != axis), axis]
        y = e.matmul(e.transpose(x, order), weights.T)
        y = e.plus(y, shift) if shift.any() else y
        x = e.transpose(y, [order.index(k) for k in range(rank)])
    return x


def _scales(e: Expression, x: ir.Value, axes: list[int]) -> list[tuple[float, int | None]]:
    """The factor along each axis, and how many entries it has then (None where it stays an open batch)."""
    given, sizes = e.constant(2, "scales"), e.integers(3, "sizes")
    shape = e.shape(x)
    if sizes:
        policy = e.node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
        if policy == "stretch":
            return [
                (1.0, None) if not isinstance(shape[i], int) else (n / e.size(x, i), n)
                for i, n in zip(axes, sizes, strict=True)
            ]
        factors = [n / e.size(x, i) for i, n in zip(axes, sizes, strict=True)]
        factor = min(factors) if policy == "not_larger" else max(factors)
        return [(factor, math.floor(factor * e.size(x, i) + 0.5)) for i in axes]
    if given is None or not given.size:
        raise e.refuse("without scales or sizes")
    found: list[tuple[float, int | None]] = []
    for i, s in zip(axes, given.reshape(-1).tolist(), strict=True):
        if s == 1 and not isinstance(shape[i], int):
            found.append((1.0, None))
        else:
            found.append((float(np.float32(s)), math.floor(e.size(x, i) * float(np.float32(s)))))
    return found


def _places(
    e: Expression, how: str, n: int, after: int, scale: float, span: tuple[float, float] | None
) -> NDArray[np.float64]:
    """Where each output lies among the inputs."""
    i = np.arange(after, dtype=np.float64)
    match how:
        case "half_pixel":
            return (i + 0.5) / scale - 0.5
        case "half_pixel_symmetric":
            exact = scale * n
            offset = n / 2 * (1 - after / exact)
            return offset + (i + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if after > 1 else np.zeros(1)
        case "align_corners":
            exact = scale * n
            return i * (n - 1) / (exact - 1) if exact != 1 else np.zeros(after)
        case "asymmetric":
            return i / scale
        case "tf_crop_and_resize":
            assert span is not None
            begin, end = span
            if after > 1:
                return begin * (n - 1) + i * (end - begin) * (n - 1) / (after - 1)
            return np.array([0.5 * (begin + end) * (n - 1)])
        case _:
            raise e.refuse(f"with coordinate_transformation_mode {how} has no integer form here")


def _nearest(e: Expression, places: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    """The entry that is picked."""
    down = np.floor(places)
    half = places - down == 0.5
    match e.node.attributes.get_string("nearest_mode", "round_prefer_floor"):
        case "round_prefer_floor":
            found = np.where(half, down, np.floor(places + 0.5))
        case "round_prefer_ceil":
            found = np.floor(places + 0.5)
        case "floor":
            found = down
        case "ceil":
            found = np.ceil(places)
        case mode:
            raise e.refuse(f"with nearest_mode {mode} has no integer form here")
    return found.clip(0, n - 1).astype(np.int64)


def _weights(
    e: Expression, mode: str, places: NDArray[np.float64], n: int, scale: float
) -> NDArray[np.float64]:
    """[outputs, inputs]: what every input counts for every output."""
    a = e.node.attributes
    stretch = max(1.0, 1 / scale) if a.get_int("antialias", 0) else 1.0
    if mode == "nearest":
        picked = np.zeros((len(places), n))
        picked[np.arange(len(places)), _nearest(e, places, n)] = 1
        return picked
    if mode not in ("linear", "cubic"):
        raise e.refuse(f"in mode {mode} has no integer form here")
    sharp, reach = a.get_float("cubic_coeff_a", -0.75), 1 if mode == "linear" else 2

    def near(d: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.maximum(1 - np.abs(d), 0) if mode == "linear" else _cubic(d, sharp)

    inside = a.get_int("exclude_outside", 0)
    margin = math.ceil(reach * stretch) + 1
    far = np.arange(-margin, n + margin)
    spread = np.zeros((len(places), len(far)))
    for row, place in enumerate(places):
        if stretch == 1 and mode == "linear":
            # values beyond the ends are those at the ends
            place = min(max(place, 0), n - 1)
        row_weights = near((far - place) / stretch)
        if inside or stretch > 1:
            row_weights = (
                np.where((far >= 0) & (far < n), row_weights, 0.0) if inside else row_weights
            )
            row_weights = row_weights / row_weights.sum()
        spread[row] = row_weights
    found = np.zeros((len(places), n))
    for column, at in enumerate(far.clip(0, n - 1).tolist()):
        found[:, at] += spread[:, column]
    return found


def _cubic(d: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    """The cubic convolution kernel (Keys 1981)."""
    d = np.abs(d)
    close = ((a + 2) * d - (a + 3)) * d**2 + 1
    away = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, close, np.where(d < 2, away, 0.0))
