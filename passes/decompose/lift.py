"""The batch axis of a model that has none: every tensor becomes one row of an axis in front.

An integer graph never mixes the rows of axis 0. Where the float graph does (a Transpose or a reduction of axis 0,
time in front of the batch) and all its sizes are known, the whole tensor is one sample: inputs and outputs have a
batch axis then that they did not have before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.errors import Unsupported
from qcompile.onnx.edit import Dims, Editor, constant, dims, operand, set_inputs, static

from ..fold import pad_widths

_ROWS = frozenset(
    """Conv MaxPool AveragePool GlobalAveragePool BatchNormalization ReduceMean Gemm""".split()
)
"""Operators whose axes have fixed meanings."""

_ALONG = {
    "ArgMax": 0,
    "ArgMin": 0,
    "Concat": 0,
    "Gather": 0,
    "LayerNormalization": -1,
    "Softmax": -1,
}
"""Operators with an attribute `axis`, and what it is where it is left out."""


def mixes(graph: ir.Graph) -> bool:
    """Does a node mix what stands side by side on axis 0, or do inputs not have the same there?"""
    if len({_lead(d) for v in graph.inputs if (d := dims(v))}) > 1:
        return True
    return any(len(dims(v) or (0,) * 2) < 2 for v in graph.inputs) or any(map(_mixes, graph))


def _mixes(node: ir.Node) -> bool:
    shape = dims(node.outputs[0])
    if node.domain or shape is None:
        return False
    a = node.attributes
    # a constant may stand in front of what is computed
    before = dims(next((v for v in node.inputs if v is not None and constant(v) is None), None))
    if len(shape) < 2 or before is None or len(before) < 2:
        return True
    match node.op_type:
        case "Transpose":
            return next(iter(a.get_ints("perm") or range(len(shape))[::-1])) != 0
        case op if op in _ALONG:
            return _axis(node, len(shape)) == 0
        case "Slice":
            return _lead(before) != _lead(shape)
        case "Pad":
            widths = pad_widths(node)
            return widths is not None and bool(widths[0] or widths[len(widths) // 2])
        case "Reshape" | "MatMul" | "Flatten" | "Squeeze" | "Unsqueeze":
            return False
        case op if op in _ROWS:
            return False
        case _:
            computed = [dims(v) for v in node.inputs if v is not None and constant(v) is None]
            constants = [c for v in node.inputs if (c := constant(v)) is not None]
            return any(d is not None and _lead(d) != _lead(shape) for d in computed) or any(
                c.ndim == len(shape) and c.shape[0] != 1 for c in constants
            )


def _axis(node: ir.Node, rank: int) -> int:
    """The axis of one of _ALONG, counted from the front."""
    return node.attributes.get_int("axis", _ALONG[node.op_type]) % max(rank, 1)


def _lead(shape: Dims) -> int | None:
    """The leading size; an open one is the batch, whatever inference calls it."""
    return shape[0] if shape and isinstance(shape[0], int) else None


def lift(model: ir.Model) -> None:
    """Every tensor has an axis of one row in front; all sizes must be known.

    Inputs and outputs get it too, but for those that begin with an axis of one sample where all inputs do.
    """
    graph = model.graph
    editor = Editor(graph)
    nodes = list(graph)
    computed = [v for node in nodes for v in node.outputs if v.name]
    shapes = {v: _sizes(v) for v in (*graph.inputs, *computed)}
    wanted = [shapes[v] if v in shapes else _sizes(v) for v in graph.outputs]
    batched = all(shapes[v][:1] == (1,) and len(shapes[v]) > 1 for v in graph.inputs)
    for value in graph.inputs:
        if batched:
            _enter(value, shapes, editor)
        else:
            value.shape = ir.Shape((1, *shapes[value]))
    for node in nodes:
        _lift(node, shapes, editor)
    # a node that was lifted may have handed its output on
    for value, shape in dict(zip(graph.outputs, wanted, strict=True)).items():
        if batched and shape[:1] == (1,):
            _leave(value, shape, editor)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    shape = dims(value)
    found = None if shape is None else static(shape)
    if found is None:
        raise Unsupported(f"the shape of {value.name} is only known at run time; state --input-dim")
    return found


def _reshaped(
    x: ir.Value, shape: tuple[int, ...], hint: str, editor: Editor
) -> tuple[ir.Node, ir.Value]:
    target = editor.const(np.array(shape, np.int64), f"{hint}_shape")
    y = ir.Value(name=f"{hint}_value", shape=ir.Shape(shape), type=x.type)
    return ir.Node("", "Reshape", [x, target], outputs=[y], name=hint), y


def _enter(value: ir.Value, shapes: dict[ir.Value, tuple[int, ...]], editor: Editor) -> None:
    """What reads an input of one sample reads it as a row."""
    uses = list(value.uses())
    made, row = _reshaped(value, (1, *shapes[value]), f"{value.name}_row", editor)
    for node, index in uses:
        node.replace_input_with(index, row)
    shapes[row] = shapes[value]
    editor.graph.insert_before(editor.graph[0], made)


def _leave(value: ir.Value, shape: tuple[int, ...], editor: Editor) -> None:
    """The output as it was, under its name."""
    for index, output in enumerate(editor.graph.outputs):
        if output.name == value.name:
            made, plain = _reshaped(output, shape, f"{value.name}_plain", editor)
            editor.graph.append(made)
            editor.graph.outputs[index] = plain
            plain.name, output.name = output.name, f"{output.name}_row"


def _lift(node: ir.Node, shapes: dict[ir.Value, tuple[int, ...]], editor: Editor) -> None:
    x, y = (node.inputs[0] if node.inputs else None), node.outputs[0]
    shape = shapes[y]
    if node.op_type in _ROWS and not node.domain and x is not None:
        before, flat = _reshaped(x, shapes[x], f"{node.name}_rows", editor)
        editor.graph.insert_before(node, before)
        node.replace_input_with(0, flat)
        after, row = _reshaped(y, (1, *shape), f"{node.name}_row", editor)
        name = y.name
        y.replace_all_uses_with(row, replace_graph_outputs=True)
        after.replace_input_with(0, y)
        editor.graph.insert_after(node, after)
        row.name, y.name = name, f"{name}_rows"
        shapes[row] = shape
        return
    rank = len(shape)
    a = node.attributes
    match node.op_type:
        case "Transpose":
            perm = tuple(a.get_ints("perm") or range(rank)[::-1])
            a["perm"] = ir.AttrInt64s("perm", (0, *(p + 1 for p in perm)))
        case op if op in _ALONG and not node.domain:
            a["axis"] = ir.AttrInt64("axis", _axis(node, rank) + 1)
            if op == "Concat":
                _lift_constants(node, editor)
        case "Reshape":
            target = editor.const(np.array((1, *shape), np.int64), f"{node.name}_shape")
            set_inputs(node, {1: target})
            a.pop("allowzero", None)
        case "Slice":
            _lift_slice(node, rank, editor)
        case "Pad":
            widths = pad_widths(node)
            if widths is not None:
                n = len(widths) // 2
                wide = (0, *widths[:n], 0, *widths[n:])
                node.resize_inputs(min(len(node.inputs), 3))
                set_inputs(node, {1: editor.const(np.array(wide, np.int64), f"{node.name}_pads")})
        case _:
            pass
    for value in node.outputs:
        if value in shapes:
            value.shape = ir.Shape((1, *shapes[value]))


def _lift_constants(node: ir.Node, editor: Editor) -> None:
    for i, value in enumerate(node.inputs):
        array = constant(value)
        if array is not None:
            node.replace_input_with(i, editor.const(array[None], f"{node.name}_constant"))


def _lift_slice(node: ir.Node, rank: int, editor: Editor) -> None:
    starts, axes = constant(operand(node, 1)), constant(operand(node, 3))
    if starts is None:
        return
    old: Iterator[int] = iter(
        range(starts.size) if axes is None else (int(i) % rank for i in axes.reshape(-1))
    )
    moved = np.array([i + 1 for i in old], np.int64)
    set_inputs(node, {3: editor.const(moved, f"{node.name}_axes")})
