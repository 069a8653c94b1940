"""Time in front of the batch: a Transpose that takes the samples off axis 0 moves behind the operators that keep axes
apart, until another one brings the samples back and both are gone.

Recurrent operators want the steps first, so exporters write Transpose, LSTM, Squeeze, Transpose. Moved on, no node
mixes the samples of axis 0, and the batch may stay open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompile.onnx.edit import Dims, constant, dims

from .expression import Expression

_TURNING = frozenset({"GRU", "LSTM", "RNN", "Split"})

Turn = tuple[ir.Value, tuple[int, ...]]
"""A tensor with the samples on axis 0, and the permutation that takes them off."""


def open_elsewhere(value: ir.Value | None) -> bool:
    """Is an axis behind the leading one open?"""
    return any(not isinstance(d, int) for d in (dims(value) or ())[1:])


def reads(node: ir.Node) -> bool:
    """Does a node have the samples in front, or put them there itself?"""
    return node.op_type in _TURNING or not any(map(open_elsewhere, node.inputs))


def moved(e: Expression) -> ir.Value | None:
    """What stands for a node that reads turned tensors: its like on the samples in front, then the Transpose."""
    rule = None if e.node.domain or len(e.node.outputs) != 1 else _RULES.get(e.node.op_type)
    first = next((v for v in e.node.inputs if v is not None and constant(v) is None), None)
    turn = None if rule is None else _turn(first)
    return None if rule is None or turn is None else rule(e, *turn)


def _turn(value: ir.Value | None) -> Turn | None:
    node = None if value is None else value.producer()
    shape = dims(value)
    if node is None or node.domain or node.op_type != "Transpose" or shape is None:
        return None
    perm = tuple(node.attributes.get_ints("perm") or range(len(shape))[::-1])
    source = node.inputs[0]
    return None if source is None or perm[:1] == (0,) else (source, perm)


def _transpose(e: Expression, x: ir.Value, perm: Sequence[int]) -> ir.Value | None:
    then = e.node.attributes.get_ints("perm") or range(len(perm))[::-1]
    return e.transpose(x, [perm[p] for p in then])


def _slice(e: Expression, x: ir.Value, perm: Sequence[int]) -> ir.Value | None:
    if any(constant(v) is None for v in e.node.inputs[1:] if v is not None):
        return None
    starts, ends, axes, steps = (e.integers(i, "bounds") for i in range(1, 5))
    assert starts is not None
    assert ends is not None
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = perm[i if axes is None else axes[i] % len(perm)]
        step = 1 if steps is None else steps[i]
        if step < 1 or not axis:
            return None
        kept = range(e.size(x, axis))[start:end:step]
        x = e.slice(x, axis, kept.start, kept.stop, step)
    return e.transpose(x, perm)


def _concat(e: Expression, x: ir.Value, perm: Sequence[int]) -> ir.Value | None:
    turns = [_turn(v) for v in e.node.inputs]
    axis = perm[e.node.attributes.get_int("axis", 0) % len(perm)]
    sources = [t[0] for t in turns if t is not None and t[1] == perm]
    if len(sources) < len(turns) or not axis:
        return None
    return e.transpose(e.concat(sources, axis), perm)


def _same(e: Expression, x: ir.Value, perm: Sequence[int]) -> ir.Value | None:
    """An operator that works element by element, or along the last axis by a constant."""
    if e.node.op_type == "MatMul" and constant(e.input(1)) is None:
        return None
    operands: list[ir.Value | None] = []
    for value in e.node.inputs:
        turn, array = _turn(value), constant(value)
        if turn is not None and turn[1] == perm:
            operands.append(turn[0])
        elif value is None or (
            array is not None
            and (array.size == 1 or perm[-1] == len(perm) - 1)
            and (array.ndim < 2 or (array.ndim == 2 and e.node.op_type == "MatMul"))
        ):
            operands.append(value)
        else:
            return None
    shape = e.shape(e.node.outputs[0])
    if len(shape) != len(perm):
        return None
    plain = {k: a.value for k, a in e.node.attributes.items()}
    before = [shape[perm.index(axis)] for axis in range(len(perm))]
    return e.transpose(e.op(e.node.op_type, *operands, shape=before, **plain), perm)


def _gather(e: Expression, x: ir.Value, perm: Sequence[int]) -> ir.Value | None:
    """One entry, or some in a row, of an axis that does not count samples."""
    indices = constant(e.input(1))
    axis = perm[e.node.attributes.get_int("axis", 0) % len(perm)]
    if indices is None or indices.ndim > 1 or not indices.size or not axis:
        return None
    size = e.size(x, axis)
    rows = [int(i) for i in indices.reshape(-1)]
    if not all(-size <= i < size for i in rows):
        return None
    y = e.take(x, axis, [i % size for i in rows])
    if indices.ndim:
        return e.transpose(y, perm)
    shape = e.shape(y)
    y = e.reshape(y, (*shape[:axis], *shape[axis + 1 :]))
    return e.transpose(y, [p - (p > axis) for p in perm if p != axis])


def _reshape(e: Expression, x: ir.Value, perm: Sequence[int]) -> ir.Value | None:
    """Axes are split, and merged where they are neighbours before the Transpose too."""
    before, after = e.shape(e.input(0)), e.shape(e.node.outputs[0])
    groups = _groups(before, after)
    if groups is None:
        return None
    wide = [axis for axis, n in enumerate(e.shape(x)) if n != 1]
    placed: dict[int, list[int]] = {}
    for old, new in groups:
        at = [wide.index(perm[i]) for i in old]
        samples = 0 in (perm[i] for i in old)
        if at != list(range(at[0], at[0] + len(at))) or (samples and len(old + new) != 2):
            return None
        placed[perm[old[0]]] = new
    ones = [axis for axis, n in enumerate(after) if n == 1]
    if 0 not in placed:
        if not ones:
            return None
        placed[0] = [ones.pop(0)]
    order = [axis for key in sorted(placed) for axis in placed[key]] + ones
    y = e.reshape(x, [after[axis] for axis in order])
    return e.transpose(y, [order.index(axis) for axis in range(len(after))])


def _groups(before: Dims, after: Dims) -> list[tuple[list[int], list[int]]] | None:
    """Which axes hold the same entries before and after a Reshape; axes of one entry are left out."""
    old = [axis for axis, n in enumerate(before) if n != 1]
    new = [axis for axis, n in enumerate(after) if n != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while old and new:
        a, b = [old.pop(0)], [new.pop(0)]
        while before[a[-1]] != after[b[-1]] or len(a + b) > 2:
            sizes = [before[i] for i in a], [after[i] for i in b]
            volumes = [math.prod(n for n in side if isinstance(n, int)) for side in sizes]
            if not all(isinstance(n, int) for n in sizes[0] + sizes[1]):
                return None
            if volumes[0] == volumes[1]:
                break
            side, rest = (a, old) if volumes[0] < volumes[1] else (b, new)
            if not rest:
                return None
            side.append(rest.pop(0))
        groups.append((a, b))
    return None if old or new else groups


_RULES: Mapping[str, Callable[[Expression, ir.Value, Sequence[int]], ir.Value | None]] = {
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Transpose": _transpose,
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(
        """Add Clip Div Elu HardSigmoid HardSwish LeakyRelu MatMul Mul Neg Relu Selu Sigmoid Softplus Sub
        Tanh""".split(),
        _same,
    ),
}
