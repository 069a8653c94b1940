"""Real numbers become codes by a quantizer: weights, biases, clamps; and the integer types that hold them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qcompile.formats import Int
from qcompile.ir import DType
from qcompile.onnx.weights import by_rows
from qcompile.plan import Quantizer, QuantPlan

from .layers import Clamp, Linear, initializer


def storage(fmt: Int) -> DType:
    """The type that holds codes of a signed format."""
    return DType.of(fmt.bits) if fmt.bits <= 8 else DType.I16 if fmt.bits <= 16 else DType.I32


def quantize(x: NDArray[np.float64], q: Quantizer) -> NDArray[np.int64]:
    """Codes of real numbers: round half to even, saturate; per channel of q.axis."""
    scale, zero = np.array(q.scale, np.float64), np.array(q.zero_point, np.float64)
    if q.axis is not None:
        row = [-1 if i == q.axis else 1 for i in range(x.ndim)]
        scale, zero = scale.reshape(row), zero.reshape(row)
    return np.clip(np.rint(x / scale) + zero, q.format.lo, q.format.hi).astype(np.int64)


def clamp_codes(clamp: Clamp, q: Quantizer) -> tuple[int, int]:
    """The codes a clamp in real numbers leaves."""

    def code(real: float | None, otherwise: int) -> int:
        if real is None or not np.isfinite(real):
            return otherwise
        steps = np.rint(np.float64(real) / q.scale[0]) + q.zero_point[0]
        return int(np.clip(steps, q.format.lo, q.format.hi))

    lo, hi = code(clamp.lo, q.format.lo), code(clamp.hi, q.format.hi)
    return min(lo, hi), hi


def real_bias(term: Linear, plan: QuantPlan) -> NDArray[np.float64]:
    """The bias of a product, one number or one per channel: as the plan decided, else the float model's, else 0."""
    decided = plan.biases.get(str(term.node.outputs[0].name))
    if decided is not None:
        return decided
    bias = np.zeros(1) if term.bias is None else np.asarray(initializer(term.bias), np.float64)
    return bias.ravel()


def weight_codes(term: Linear, wq: Quantizer, plan: QuantPlan) -> NDArray[np.int64]:
    """The integer weights of a product in the shape of its float weights: as decided, else rounded to nearest.

    TypeError for decided codes of another shape or beyond the format.
    """
    array = initializer(term.weight)
    assert array is not None
    decided = plan.codes.get(str(term.weight.name))
    if decided is None:

        def quantized(part: NDArray[np.generic], rows: slice) -> NDArray[np.int64]:
            own = wq
            if wq.axis == 0 and len(part) < len(wq.scale):
                own = replace(wq, scale=wq.scale[rows], zero_point=wq.zero_point[rows])
            return quantize(part.astype(np.float64), own)

        return by_rows(array, np.dtype(np.int64), quantized)
    if decided.shape != array.shape:
        raise TypeError(
            f"the plan's codes of {term.weight.name} have shape {list(decided.shape)}, its weights {list(array.shape)}"
        )
    if decided.size and (decided.min() < wq.format.lo or decided.max() > wq.format.hi):
        raise TypeError(f"the plan's codes of {term.weight.name} do not all lie in {wq.format}")
    return decided.astype(np.int64)


def product_codes(
    term: Linear, q: Quantizer, wq: Quantizer, plan: QuantPlan
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Weights, output channels first, and bias with the zero point of the operand folded in.

    TypeError for weights that are not symmetric, OverflowError for a bias beyond 32 bits.
    """
    name, weight = term.weight.name, initializer(term.weight)
    assert weight is not None
    channels = weight.shape[term.channel_axis]
    if any(wq.zero_point):
        raise TypeError(f"the weights {name} have a zero point; only symmetric weights are integer")
    if (wq.axis, len(wq.scale)) not in ((None, 1), (term.channel_axis, channels)):
        raise TypeError(
            f"the weights {name} have {len(wq.scale)} scales along axis {wq.axis}, not one "
            f"or {channels} along axis {term.channel_axis}"
        )
    codes = np.moveaxis(weight_codes(term, wq, plan), term.channel_axis, 0)
    real = np.broadcast_to(real_bias(term, plan), (channels,))
    # the product of two float32 numbers is exact in float64, so one correctly rounded division is all there is
    b = np.rint(real / (np.float64(q.scale[0]) * np.array(wq.scale, np.float64)))
    folded = b - q.zero_point[0] * codes.reshape(channels, -1).sum(axis=1)
    if not np.abs(folded).max(initial=0) < 2**31:
        raise OverflowError(f"the bias of {name} does not fit 32 bits")
    return codes, folded.astype(np.int64)
