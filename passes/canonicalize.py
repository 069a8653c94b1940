"""The last word on the float graph: few operators, each in one form, every attribute spelled out.

    Conv, Gemm, MatMul                          see `linear.py`
    BatchNormalization, x * c, x + c (axis 1)   -> Conv 1x1 with group = channels
    MaxPool, AveragePool                        auto_pad and ceil_mode become pads
    ReduceMean over all spatial axes            -> GlobalAveragePool, then Reshape where axes are dropped
    Sum of n                                    -> n - 1 times Add
    Flatten, Squeeze, Unsqueeze, Reshape        -> Reshape to a constant shape
    Clip                                        two finite limits, or Relu
    Softmax, Concat, Transpose, Pad, Slice      axes from 0, all operands constant and present

What is not listed, or not constant where it would have to be, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from qcompile.errors import BadInput
from qcompile.onnx.edit import (
    Dims,
    Editor,
    constant,
    dims,
    operand,
    reshape_target,
    set_attributes,
    set_inputs,
    sole_use,
    static,
)
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

from .fold import Affine, affine, fold_into_producer, pad_widths
from .linear import floats, normalise
from .window import window


@dataclass(frozen=True)
class Canonicalize:
    """Every operator of the float graph that has an integer form is in the one form that pass expects."""

    name: ClassVar[str] = "canonicalize"

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Edit in place; say whether anything changed."""
        graph = model.graph
        editor = Editor(graph)
        changed = False
        with np.errstate(all="ignore"):
            for node in list(graph):
                changed |= _canonical(node, editor)
        common.RemoveUnusedNodesPass()(model)
        changed |= common.NameFixPass()(model).modified
        _check_finite(graph)
        return changed


def _canonical(node: ir.Node, editor: Editor) -> bool:
    if node.domain:
        return False
    if affine(node) is not None:
        return fold_into_producer(node, editor) or _depthwise(node, editor)
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node, editor)


def _check_finite(graph: ir.Graph) -> None:
    for node in graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        for value in node.inputs[1:]:
            array = floats(value)
            if array is not None and not np.isfinite(array).all():
                raise BadInput(
                    f"the weights of node {node.name!r} ({node.op_type}) are not all finite numbers;"
                    " repair the model"
                )


def _depthwise(node: ir.Node, editor: Editor) -> bool:
    a = _chain(node)
    shape = None if a is None else dims(a.x)
    if a is None or a.axis != 1 or shape is None or len(shape) > 4 or not isinstance(shape[1], int):
        return False
    hint = node.name or node.op_type
    # A Conv needs a spatial axis.
    wide = (*shape, 1) if len(shape) == 2 else shape
    x = a.x if wide is shape else _reshape(node, a.x, wide, f"{hint}_spread", editor)
    if x is None:
        return False
    y = _scaling_conv(node, a, x, wide, editor)
    if wide is not shape:
        flat = _reshape(node, y, shape, f"{hint}_flat", editor)
        assert flat is not None
        y = flat
    editor.replace(node, y)
    return True


def _chain(node: ir.Node) -> Affine | None:
    """All affine nodes that end in `node` as one; None if they go on behind it."""
    a, output = affine(node), node.outputs[0]
    if a is None or a.axis not in (None, 1):
        return None
    if sole_use(output):
        following = affine(output.consumers()[0])
        if following is not None and following.axis in (None, 1):
            return None
    while sole_use(a.x):
        b = affine(a.x.producer())
        if b is None or b.axis not in (None, 1):
            break
        axis = 1 if 1 in (a.axis, b.axis) else None
        a = Affine(b.x, b.scale * a.scale, b.shift * a.scale + a.shift, axis)
    return a


def _scaling_conv(node: ir.Node, a: Affine, x: ir.Value, shape: Dims, editor: Editor) -> ir.Value:
    channels, spatial = len(a.scale), len(shape) - 2
    hint = node.name or node.op_type
    weight = a.scale.astype(np.float32).reshape(channels, 1, *(1,) * spatial)
    return editor.before(
        node,
        "Conv",
        [
            x,
            editor.const(weight, f"{hint}_weight"),
            editor.const(a.shift.astype(np.float32), f"{hint}_bias"),
        ],
        shape,
        hint=hint,
        dilations=(1,) * spatial,
        group=channels,
        kernel_shape=(1,) * spatial,
        pads=(0,) * 2 * spatial,
        strides=(1,) * spatial,
    )


def _reshape(node: ir.Node, x: ir.Value, shape: Dims, hint: str, editor: Editor) -> ir.Value | None:
    target = reshape_target(x, ir.Value(name=None, shape=ir.Shape(shape)))
    if target is None:
        return None
    sizes = editor.const(np.array(target, np.int64), f"{hint}_shape")
    return editor.before(node, "Reshape", [x, sizes], shape, hint=hint)


def _max_pool(node: ir.Node, editor: Editor) -> bool:
    if len(node.outputs) > 1:
        return False
    return _pool(node)


def _average_pool(node: ir.Node, editor: Editor) -> bool:
    a = node.attributes
    if a.get_int("count_include_pad", 0) and a.get_int("ceil_mode", 0):
        # Runtimes disagree on whether the elements that rounding up adds are counted.
        return False
    return _pool(node)


def _pool(node: ir.Node) -> bool:
    kernel = tuple(node.attributes.get_ints("kernel_shape") or ())
    w = window(node, kernel)
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if w is None or any(p >= k for p, k in zip(w.pads, kernel * 2, strict=True)):
        return False
    # ONNX and its runtimes count differently where rounding up adds a window outside the data.
    if before is None or after is None or w.outputs(static(before[2:]) or ()) != after[2:]:
        return False
    attributes: dict[str, Sequence[int] | int] = {
        "ceil_mode": 0,
        "dilations": w.dilations,
        "kernel_shape": kernel,
        "pads": w.pads,
        "strides": w.strides,
    }
    if node.op_type == "AveragePool":
        counted = node.attributes.get_int("count_include_pad", 0) and any(w.pads)
        attributes["count_include_pad"] = int(bool(counted))
    return set_attributes(node, **attributes)


def _reduce_mean(node: ir.Node, editor: Editor) -> bool:
    x, axes = node.inputs[0], constant(operand(node, 1))
    shape = dims(x)
    if x is None or shape is None or axes is None or len(shape) < 3:
        return False
    if sorted(int(i) % len(shape) for i in axes.reshape(-1)) != list(range(2, len(shape))):
        return False
    hint = node.name or "GlobalAveragePool"
    pooled = (*shape[:2], *(1,) * (len(shape) - 2))
    new: ir.Value | None = editor.before(node, "GlobalAveragePool", [x], pooled, hint=hint)
    assert new is not None
    if not node.attributes.get_int("keepdims", 1):
        new = _reshape(node, new, shape[:2], f"{hint}_flat", editor)
        assert new is not None
    editor.replace(node, new)
    return True


def _sum(node: ir.Node, editor: Editor) -> bool:
    terms = [v for v in node.inputs if v is not None]
    if len(terms) == 1:
        return editor.bypass(node)
    total = terms[0]
    for term in terms[1:]:
        a, b = dims(total), dims(term)
        shape = None if a is None or b is None else _broadcast(a, b)
        total = editor.before(node, "Add", [total, term], shape, hint=node.name or "Add")
    editor.replace(node, total)
    return True


def _broadcast(a: Dims, b: Dims) -> Dims:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(q if p == 1 else p for p, q in zip(a, b, strict=True))


def _to_reshape(node: ir.Node, editor: Editor) -> bool:
    x, output = node.inputs[0], node.outputs[0]
    if x is None:
        return False
    if dims(x) is not None and dims(x) == dims(output):
        return editor.bypass(node)
    target = reshape_target(x, output)
    if target is None:
        return False
    old = constant(operand(node, 1))
    if node.op_type == "Reshape" and old is not None and old.tolist() == target:
        return set_attributes(node)
    node.op_type = "Reshape"
    set_attributes(node)
    set_inputs(node, {1: editor.const(np.array(target, np.int64), f"{node.name}_shape")})
    return True


def _clip(node: ir.Node, editor: Editor) -> bool:
    low, high = (floats(operand(node, i)) for i in (1, 2))
    for i, limit in ((1, low), (2, high)):
        if operand(node, i) is not None and (limit is None or limit.size != 1):
            return False
    big = float(np.finfo(np.float32).max)
    lo = -big if low is None else max(float(low.reshape(-1)[0]), -big)
    hi = big if high is None else min(float(high.reshape(-1)[0]), big)
    if (lo, hi) == (-big, big):
        return editor.bypass(node)
    if (lo, hi) == (0.0, big):
        node.op_type = "Relu"
        node.resize_inputs(1)
        return True
    if low is not None and high is not None and (low == lo).all() and (high == hi).all():
        return False
    limits = {
        i: editor.const(np.array(v, np.float32), f"{node.name}_{n}")
        for i, v, n in ((1, lo, "min"), (2, hi, "max"))
    }
    set_inputs(node, limits)
    return True


def _softmax(node: ir.Node, editor: Editor) -> bool:
    shape = dims(node.outputs[0])
    if shape is None:
        return False
    return set_attributes(node, axis=node.attributes.get_int("axis", -1) % len(shape))


def _concat(node: ir.Node, editor: Editor) -> bool:
    shape = dims(node.outputs[0])
    if len(node.inputs) == 1:
        return editor.bypass(node)
    if shape is None:
        return False
    return set_attributes(node, axis=node.attributes.get_int("axis", 0) % len(shape))


def _transpose(node: ir.Node, editor: Editor) -> bool:
    shape = dims(node.outputs[0])
    if shape is None:
        return False
    order = tuple(range(len(shape)))
    perm = tuple(node.attributes.get_ints("perm") or order[::-1])
    return editor.bypass(node) if perm == order else set_attributes(node, perm=perm)


def _pad(node: ir.Node, editor: Editor) -> bool:
    widths = pad_widths(node)
    mode = node.attributes.get_string("mode", "constant")
    fill = operand(node, 2)
    if widths is None or mode != "constant" or (fill is not None and constant(fill) is None):
        return False
    if not any(widths):
        return editor.bypass(node)
    if len(node.inputs) == 3 and fill is not None:
        return set_attributes(node, mode="constant")
    if fill is None:
        fill = editor.const(np.array(0, np.float32), f"{node.name}_value")
    node.resize_inputs(3)
    pads = editor.const(np.array(widths, np.int64), f"{node.name}_pads")
    set_inputs(node, {1: pads, 2: fill})
    set_attributes(node, mode="constant")
    return True


def _slice(node: ir.Node, editor: Editor) -> bool:
    x = node.inputs[0]
    shape = dims(x)
    ranges = _ranges(node)
    if x is None or shape is None or ranges is None:
        return False
    rows: list[tuple[int, int, int, int]] = []
    for axis, start, end, step in ranges:
        size = shape[axis]
        if not isinstance(size, int):
            if (start, step) == (0, 1) and end >= 2**31 - 1:
                continue
            return False
        first, last, step = slice(start, end, step).indices(size)
        if (first, last, step) == (0, size, 1):
            continue
        # Counted from the front, "before element 0" has no number but this one.
        rows.append((axis, first, last if last >= 0 else -size - 1, step))
    if not rows:
        return editor.bypass(node)
    axes, starts, ends, steps = (np.array(c, np.int64) for c in zip(*sorted(rows), strict=True))
    wanted = (starts, ends, axes, steps)
    present = [constant(v) for v in node.inputs[1:]]
    if len(present) == 4 and all(
        p is not None and np.array_equal(p, w) for p, w in zip(present, wanted, strict=True)
    ):
        return False
    names = ("starts", "ends", "axes", "steps")
    set_inputs(
        node,
        {
            i + 1: editor.const(w, f"{node.name}_{n}")
            for i, (w, n) in enumerate(zip(wanted, names, strict=True))
        },
    )
    return True


def _ranges(node: ir.Node) -> list[tuple[int, int, int, int]] | None:
    """Axis, start, end and step of each sliced axis, if all are constants."""
    rank = len(dims(node.inputs[0]) or ())
    columns: list[list[int] | None] = []
    for i in range(1, 5):
        array = constant(operand(node, i))
        if array is None and operand(node, i) is not None:
            return None
        columns.append(None if array is None else [int(v) for v in array.reshape(-1).tolist()])
    starts, ends, axes, steps = columns
    if starts is None or ends is None or rank == 0:
        return None
    axes = list(range(len(starts))) if axes is None else [a % rank for a in axes]
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        return None
    return list(zip(axes, starts, ends, steps, strict=True))


_RULES: dict[str, Callable[[ir.Node, Editor], bool]] = {
    "Conv": normalise,
    "Gemm": normalise,
    "MatMul": normalise,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "ReduceMean": _reduce_mean,
    "Sum": _sum,
    "Flatten": _to_reshape,
    "Squeeze": _to_reshape,
    "Unsqueeze": _to_reshape,
    "Reshape": _to_reshape,
    "Clip": _clip,
    "Softmax": _softmax,
    "Concat": _concat,
    "Transpose": _transpose,
    "Pad": _pad,
    "Slice": _slice,
}
