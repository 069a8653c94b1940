"""What can be seen without a run: weights and their scales, biases, operands of unlike scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.integerized import Integerized
from qcompile.ir import Conv, MatMul, Node
from qcompile.measure import Error, Measured, Values
from qcompile.plan import Kind, Quantizer, QuantPlan

Real = NDArray[np.float64]

BIAS_LIMIT = 2.0**31
LOOKED_AT = 1 << 22
"""Values of a constant that its error and distribution are taken from, about; extremes are over all."""
WIDER = 1.01
"""A weight scale this many times what the weights ask for was enlarged for something else."""


@dataclass(frozen=True, slots=True)
class Bias:
    """The biases of a layer at their accumulator's scale.

    `saturated` counts channels whose bias would not fit int32 at the scale that their weights ask for, `widened`
    those whose weight scale was enlarged, which costs precision; `channel` is enlarged most, `times` so much.
    """

    bits: int
    saturated: int
    widened: int
    channel: int
    times: float


@dataclass(frozen=True, slots=True)
class Weight:
    """A quantized constant: how well its codes hold it.

    `spread` is the largest channel's magnitude over the median channel's, `crest` the largest magnitude over the root
    mean square, in the channel where that is worst.
    """

    tensor: str
    layer: str
    quantizer: Quantizer
    values: Values
    error: Error
    spread: float
    crest: float
    bias: Bias | None


@dataclass(frozen=True, slots=True)
class Meeting:
    """An operand of an Add, Sub or Concat: its step over the step of the result it is rounded to.

    An operand that shares the result's quantizer has the step its own range would give it. `lost_percent` is the share
    of its values other than 0 that are less than half a step of the result.
    """

    node: str
    operation: str
    operand: str
    result: str
    ratio: float
    lost_percent: float | None


def weights(model: ir.Model, integerized: Integerized, plan: QuantPlan) -> list[Weight]:
    """Every constant with a slot, in order of execution."""
    found: dict[str, Weight] = {}
    for node in integerized.graph.nodes:
        for value in node.inputs:
            slot = plan.slots.get(value.name) if value.const is not None else None
            q = plan.quantizers.get(value.name)
            array = _constant(model, value.name)
            if slot is None or slot.kind is not Kind.WEIGHT or q is None or array is None:
                continue
            if value.name in found:
                continue
            # a layer's constants have their channels where the slot's axis would be, if it had one
            axis = q.axis if q.axis is not None else 1 if _is_matmul(model, value.name) else 0
            reach = _reach(array, axis)
            some, held, codes = _part(array, axis, q, plan.codes.get(value.name))
            values, error = Values(), Error()
            values.add(some, held)
            error.add(some, _dequantized(some, held, codes))
            rows = np.moveaxis(some, axis, 0).reshape(some.shape[axis], -1) if some.ndim else None
            alive = reach[reach > 0]
            spread = float(reach.max() / np.median(alive)) if alive.size else 1.0
            bias = None
            if isinstance(node.op, Conv | MatMul) and rows is not None:
                reader = next(iter(model.graph.initializers[value.name].uses())).node
                x = plan.of(str(reader.inputs[0].name)) if reader.inputs[0] is not None else None
                bias = _bias(node, x, q, reach) if x is not None else None
            found[value.name] = Weight(
                value.name, node.name, q, values, error, spread, _crest(rows), bias
            )
    return list(found.values())


def meetings(model: ir.Model, plan: QuantPlan, measured: Measured) -> list[Meeting]:
    """Every rounded operand of an Add, Sub or Concat whose result is rounded."""
    return list(_meetings(model, plan, measured))


def _meetings(model: ir.Model, plan: QuantPlan, measured: Measured) -> Iterator[Meeting]:
    for node in model.graph:
        if node.domain or node.op_type not in ("Add", "Sub", "Concat"):
            continue
        result = _rounded(node.outputs[0], plan)
        y = plan.of(result) if result is not None else None
        if result is None or y is None:
            continue
        for value in dict.fromkeys(v for v in node.inputs if v is not None):
            name = str(value.name)
            x, stages = plan.of(name), measured.tensors.get(name)
            if x is None or len(x.scale) != 1:
                continue
            step, lost = x.scale[0], None
            if stages is not None and stages.values.count:
                seen = stages.values
                if plan.owner(name) == plan.owner(result):
                    own = (max(seen.hi, 0.0) - min(seen.lo, 0.0)) / (x.format.levels - 1)
                    step = own if own > 0 else step
                kept = np.abs(np.concatenate(seen.kept).astype(np.float64))
                kept = kept[kept > 0]
                if kept.size:
                    lost = 100.0 * float((kept < 0.5 * y.scale[0]).mean())
            yield Meeting(str(node.name), node.op_type, name, result, step / y.scale[0], lost)


def _rounded(value: ir.Value, plan: QuantPlan) -> str | None:
    """The value itself or what its clamps make of it, whichever is rounded."""
    while plan.of(str(value.name)) is None:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in ("Relu", "Clip"):
            return None
        value = uses[0].node.outputs[0]
    return str(value.name)


def _constant(model: ir.Model, name: str) -> NDArray[np.generic] | None:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def _reach(array: NDArray[np.generic], axis: int) -> Real:
    """The largest magnitude in each channel."""
    if not array.ndim:
        return np.abs(array.astype(np.float64)).reshape(1)
    others = tuple(i for i in range(array.ndim) if i != axis)
    lo, hi = array.min(axis=others), array.max(axis=others)
    reach: Real = np.maximum(-lo.astype(np.float64), hi.astype(np.float64))
    return reach


def _part(
    array: NDArray[np.generic], axis: int, q: Quantizer, codes: NDArray[np.int8] | None
) -> tuple[Real, Quantizer, NDArray[np.int8] | None]:
    """The constant, its quantizer and its codes; of a large one, channels at equal distances."""
    every = -(-array.size // LOOKED_AT)
    if every <= 1 or not array.ndim:
        return array.astype(np.float64), q, codes
    some = (*(slice(None) for _ in range(axis)), slice(None, None, every))
    if q.axis is not None:
        q = replace(q, scale=q.scale[::every], zero_point=q.zero_point[::every])
    return array[some].astype(np.float64), q, None if codes is None else codes[some]


def _is_matmul(model: ir.Model, name: str) -> bool:
    return any(u.node.op_type == "MatMul" for u in model.graph.initializers[name].uses())


def _dequantized(array: Real, q: Quantizer, codes: NDArray[np.int8] | None) -> Real:
    row = [-1 if i == q.axis else 1 for i in range(array.ndim)] if q.axis is not None else []
    scale, zero = np.array(q.scale).reshape(row), np.array(q.zero_point).reshape(row)
    held = np.clip(np.rint(array / scale) + zero, q.format.lo, q.format.hi)
    real: Real = ((held if codes is None else codes.astype(np.float64)) - zero) * scale
    return real


def _crest(rows: Real | None) -> float:
    if rows is None:
        return 1.0
    power = np.sqrt(np.square(rows).mean(axis=1))
    alive = power > 0
    return float((np.abs(rows).max(axis=1)[alive] / power[alive]).max(initial=1.0))


def _bias(node: Node, xq: Quantizer, q: Quantizer, reach: Real) -> Bias:
    # what the operand's zero point put into it is nothing beside 2**31
    bias = node.inputs[2].constant.astype(np.float64)
    scale = np.broadcast_to(np.array(q.scale), bias.shape)
    real = np.abs(bias) * xq.scale[0] * scale
    wanted = reach if len(q.scale) > 1 else np.full_like(bias, reach.max())
    natural = wanted / q.format.hi
    alive = natural > 0
    times = np.where(alive, scale / np.where(alive, natural, 1.0), 1.0)
    steps = real[alive] / (xq.scale[0] * natural[alive])
    # one scale for all channels is enlarged for the channel with the largest bias
    most = int(times.argmax()) if len(q.scale) > 1 else int(real.argmax())
    largest = int(np.abs(bias).max(initial=0.0))
    return Bias(
        largest.bit_length() + 1,
        int((steps >= BIAS_LIMIT).sum()),
        int((times > WIDER).sum()),
        most,
        float(times[most]),
    )
