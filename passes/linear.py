"""One form for Conv, Gemm and MatMul with constant weights: explicit attributes, a bias, y = x W^T + b.

Conv(x, W[, b])          -> Conv(x, W, b) with pads, strides, dilations, group, kernel_shape
Gemm(x, W[, c])          -> Gemm(x, W', b') with transA = 0, transB = 1, alpha = beta = 1
MatMul(rank-2 x, W)      -> Gemm(x, W^T, 0)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.onnx.edit import Editor, constant, dims, operand, set_attributes, set_inputs

from .window import window

Floats = NDArray[np.float32]


def floats(value: ir.Value | None) -> Floats | None:
    """The array of a float32 initializer, None for everything else."""
    array = constant(value)
    return None if array is None or array.dtype != np.float32 else np.asarray(array, np.float32)


def normalise(node: ir.Node, editor: Editor) -> bool:
    """Bring one node to the form above; say whether that changed it."""
    if node.domain or (weight := floats(operand(node, 1))) is None:
        return False
    match node.op_type:
        case "Conv":
            return _conv(node, weight, editor)
        case "Gemm":
            return _gemm(node, weight, editor)
        case "MatMul":
            return _matmul(node, weight, editor)
    return False


def is_linear(node: ir.Node | None) -> bool:
    """Is this a Conv or Gemm in the form above, or a MatMul with a constant matrix?"""
    if node is None or node.domain or floats(operand(node, 1)) is None:
        return False
    match node.op_type:
        case "Conv":
            return floats(operand(node, 2)) is not None and "auto_pad" not in node.attributes
        case "Gemm":
            return _plain(node)
        case "MatMul":
            return len(dims(node.inputs[1]) or ()) == 2 and len(dims(node.inputs[0]) or ()) > 2
    return False


def _plain(node: ir.Node) -> bool:
    a, bias = node.attributes, floats(operand(node, 2))
    return (
        (a.get_int("transA", 0), a.get_int("transB", 0)) == (0, 1)
        and a.get_float("alpha", 1.0) == a.get_float("beta", 1.0) == 1.0
        and bias is not None
        and bias.shape == (dims(node.inputs[1]) or ())[:1]
    )


def _conv(node: ir.Node, weight: Floats, editor: Editor) -> bool:
    bias = operand(node, 2)
    if weight.ndim not in (3, 4) or (bias is not None and floats(bias) is None):
        return False
    w = window(node, weight.shape[2:])
    if w is None:
        return False
    changed = set_attributes(
        node,
        dilations=w.dilations,
        group=node.attributes.get_int("group", 1),
        kernel_shape=w.kernel,
        pads=w.pads,
        strides=w.strides,
    )
    if bias is None:
        zeros = np.zeros(weight.shape[0], np.float32)
        set_inputs(node, {2: editor.const(zeros, f"{node.name}_bias")})
    return changed or bias is None


def _gemm(node: ir.Node, weight: Floats, editor: Editor) -> bool:
    a, addend = node.attributes, operand(node, 2)
    if _plain(node):
        return set_attributes(node, alpha=1.0, beta=1.0, transA=0, transB=1)
    if a.get_int("transA", 0) or (addend is not None and floats(addend) is None):
        return False
    matrix = weight if a.get_int("transB", 0) else weight.T
    bias = _row(floats(addend), matrix.shape[0])
    if bias is None:
        return False
    _set(
        node,
        matrix * np.float32(a.get_float("alpha", 1.0)),
        bias * a.get_float("beta", 1.0),
        editor,
    )
    return set_attributes(node, alpha=1.0, beta=1.0, transA=0, transB=1)


def _row(addend: Floats | None, size: int) -> Floats | None:
    """The addend of a Gemm as one number per column; None if its rows differ."""
    if addend is None:
        return np.zeros(size, np.float32)
    if addend.size == 1 or (addend.size == size and addend.shape[-1] == size):
        return np.broadcast_to(addend.reshape(-1), (size,)).astype(np.float32)
    return None


def _matmul(node: ir.Node, weight: Floats, editor: Editor) -> bool:
    if weight.ndim != 2 or len(dims(node.inputs[0]) or ()) != 2:
        return False
    node.op_type = "Gemm"
    bias = editor.const(np.zeros(weight.shape[1], np.float32), f"{node.name}_bias")
    matrix = node.inputs[1]
    assert matrix is not None
    set_inputs(node, {1: editor.turned(matrix, f"{node.name}_weight"), 2: bias})
    return set_attributes(node, alpha=1.0, beta=1.0, transA=0, transB=1)


def _set(node: ir.Node, weight: Floats, bias: Floats, editor: Editor) -> None:
    set_inputs(
        node,
        {
            1: editor.const(weight.astype(np.float32), f"{node.name}_weight"),
            2: editor.const(bias.astype(np.float32), f"{node.name}_bias"),
        },
    )
