"""Operators that move, pick or gather values: what their attributes say, or a sentence why that has no integer form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.errors import Unsupported
from qcompile.onnx.edit import constant, operand

from .fold import pad_widths
from .window import Window, window


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest value under each window."""

    window: Window


@dataclass(frozen=True, slots=True)
class Cut:
    """x[starts:ends:steps], one entry for each float axis but the batch."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Framed:
    """`value` around the tensor: begins and ends for each float axis but the batch."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    value: float


@dataclass(frozen=True, slots=True)
class Permuted:
    """Axis i of the result is axis perm[i]; the batch stays first."""

    perm: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The same values in the same order, in rows of shape `rest`; None where any number of rows will do."""

    rows: int | None
    rest: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Picked:
    """The entries at `indices` along one float axis."""

    axis: int
    indices: tuple[int, ...]


Move = Largest | Cut | Framed | Permuted | Reshaped | Picked


def static_dims(value: ir.Value) -> tuple[int, ...]:
    """The static shape, one for a symbolic batch; Unsupported where another axis is unknown."""
    if value.shape is None:
        raise Unsupported(
            f"the shape of {value.name} is unknown; run shape inference or state --input-dim"
        )
    sizes = []
    for i, d in enumerate(value.shape.dims):
        if isinstance(d, int):
            sizes.append(d)
        elif i == 0:
            sizes.append(1)
        else:
            raise Unsupported(
                f"axis {i} of {value.name} is only known at run time; state --input-dim"
            )
    return tuple(sizes)


def move(node: ir.Node) -> Move:
    """What a MaxPool, Slice, Pad, Transpose or any kind of reshaping does; Unsupported names the node."""
    match node.op_type:
        case "MaxPool":
            return Largest(pooling(node))
        case "Slice":
            return _slice(node)
        case "Pad":
            return _pad(node)
        case "Transpose":
            return _transpose(node)
        case "Gather":
            return _gather(node)
        case _:
            return _reshape(node)


def _refuse(node: ir.Node, why: str) -> Unsupported:
    return Unsupported(f"node {node.name}: {node.op_type} {why}")


def _ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    x = operand(node, 0)
    if x is None:
        raise _refuse(node, "reads nothing")
    return x, node.outputs[0]


def pooling(node: ir.Node) -> Window:
    """The window of a MaxPool or AveragePool, rounding up and automatic pads resolved."""
    x, y = _ends(node)
    before, after = static_dims(x), static_dims(y)
    a = node.attributes
    found = window(node, tuple(a.get_ints("kernel_shape") or ()))
    if found is None or len(before) < 3 or found.outputs(before[2:]) != after[2:]:
        raise _refuse(
            node,
            "has a window that ONNX and its runtimes place differently; export it with ceil_mode=0",
        )
    if node.op_type == "AveragePool":
        if any(d != 1 for d in found.dilations):
            raise _refuse(node, "with dilations has no integer form here; write it as a Conv")
        plain = tuple(a.get_ints("pads") or (0,) * 2 * found.rank)
        stretched = a.get_int("ceil_mode", 0) and found.pads != plain
        if stretched and a.get_int("count_include_pad", 0) and "auto_pad" not in a:
            raise _refuse(
                node,
                "with count_include_pad and ceil_mode counts what runtimes disagree about; export it with ceil_mode=0",
            )
    return found


def counts(node: ir.Node, size: tuple[int, ...], found: Window) -> tuple[int, ...]:
    """How many elements each window of an AveragePool averages: one entry, or one for each position."""
    a = node.attributes
    if a.get_int("count_include_pad", 0) or not any(found.pads):
        return (math.prod(found.kernel),)
    total = np.ones((), np.int64)
    for i, (n, outputs) in enumerate(zip(size, found.outputs(size), strict=True)):
        begin = np.arange(outputs) * found.strides[i] - found.pads[i]
        inside = np.minimum(begin + found.kernel[i], n) - np.maximum(begin, 0)
        total = np.multiply.outer(total, inside)
    if total.min() < 1:
        raise _refuse(node, "has a window that lies wholly in its padding; lessen the padding")
    return tuple(int(c) for c in total.ravel())


def _slice(node: ir.Node) -> Cut:
    x, _ = _ends(node)
    shape = static_dims(x)
    rank = len(shape)
    rows = [constant(v) for v in node.inputs[1:]]
    if any(r is None and v is not None for r, v in zip(rows, node.inputs[1:], strict=True)):
        raise _refuse(node, "has bounds computed at run time; make them constants")
    given = [None if r is None else [int(i) for i in r.reshape(-1)] for r in (*rows, None, None)]
    starts, ends = given[0] or [], given[1] or []
    axes = given[2] if given[2] is not None else list(range(len(starts)))
    steps = given[3] if given[3] is not None else [1] * len(starts)
    cut = [(0, n, 1) for n in shape]
    for first, last, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise _refuse(
                node, "with a negative step has no integer form here; reverse the weights"
            )
        a = axis % rank
        if a == 0 and not _whole(x, first, last, step):
            raise _refuse(node, "picks along the batch axis, which an integer graph cannot do")
        cut[a] = slice(first, last, step).indices(shape[a])
    columns = tuple(zip(*cut[1:], strict=True)) or ((), (), ())
    return Cut(*columns)


def _whole(x: ir.Value, first: int, last: int, step: int) -> bool:
    """Does a slice of the batch axis leave it as it is?"""
    rows = x.shape[0] if x.shape is not None else None
    if isinstance(rows, int):
        return slice(first, last, step).indices(rows) == (0, rows, 1)
    return (first, step) == (0, 1) and last >= 2**31 - 1


def _pad(node: ir.Node) -> Framed:
    mode = node.attributes.get_string("mode", "constant")
    widths, fill = pad_widths(node), constant(operand(node, 2))
    if mode != "constant":
        raise _refuse(node, f"in mode {mode} has no integer form here; only constant padding has")
    if widths is None or (fill is None and operand(node, 2) is not None):
        raise _refuse(node, "has widths or a value computed at run time; make them constants")
    rank = len(widths) // 2
    if widths[0] or widths[rank]:
        raise _refuse(node, "pads the batch axis, which an integer graph cannot do")
    if min(widths) < 0:
        raise _refuse(node, "with negative widths has no integer form here; write it as a Slice")
    value = 0.0 if fill is None else float(fill.reshape(-1)[0])
    return Framed(widths[1:rank], widths[rank + 1 :], value)


def _gather(node: ir.Node) -> Picked:
    indices = constant(operand(node, 1))
    if indices is None or indices.ndim != 1:
        raise _refuse(node, "has an integer form only by one constant list of indices")
    axis = node.attributes.get_int("axis", 0)
    if axis == 0:
        raise _refuse(node, "picks along the batch axis, which an integer graph cannot do")
    return Picked(axis, tuple(int(i) for i in indices))


def _transpose(node: ir.Node) -> Permuted:
    x, _ = _ends(node)
    rank = len(static_dims(x))
    perm = tuple(node.attributes.get_ints("perm") or range(rank)[::-1])
    if perm[:1] != (0,):
        raise _refuse(
            node, f"by {list(perm)} moves the batch axis, which an integer graph cannot do"
        )
    return Permuted(perm)


def _reshape(node: ir.Node) -> Reshaped:
    _, y = _ends(node)
    shape = static_dims(y)
    if not shape:
        raise _refuse(node, "to a scalar leaves no batch axis, which an integer graph needs")
    rows = None if y.shape is None else y.shape[0]
    return Reshaped(rows if isinstance(rows, int) else None, shape[1:])
