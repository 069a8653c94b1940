"""Operators that are made of others are spelled out, so that all later passes know a few well.

    Split, Expand, Tile, Gather, DepthToSpace, ...      -> Slice, Gather by constants, Reshape, Transpose
    ConvTranspose, GlobalMaxPool, LpPool, LRN           -> Conv, MaxPool, functions of one tensor
    Reduce...                                           -> products with ones, MaxPool
    Resize                                              -> Gather or products with constant weights
    LayerNormalization, InstanceNormalization, ...      -> LayerNormalization of the last axis, constants
    LSTM, GRU, RNN                                      -> their equations, step by step
    MatMul, Gemm                                        -> by a constant matrix, or of two equal stacks
    Max, Min, Div, PRelu, Sum, Mean of several tensors  -> two at a time, constants folded

Where a node cannot be, it keeps a sentence that says why; whoever meets it later raises that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from qcompile.errors import Unsupported
from qcompile.onnx.edit import Editor, keep_outputs, static
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

from . import elements, moves, normal, products, recurrent, reductions, resize, turned, windows
from .expression import Expression
from .lift import lift, mixes

REFUSED = "qcompile.refused"
"""The key under which a node says why it has no integer form."""

Made = ir.Value | Sequence[ir.Value | None] | None
_ROUNDS = 8

_RULES: Mapping[str, Callable[[Expression], Made]] = {
    "Add": elements.aligned,
    "ArgMax": reductions.arg,
    "ArgMin": reductions.arg,
    "AveragePool": windows.average,
    "Cast": elements.cast,
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "DepthToSpace": moves.depth_to_space,
    "Div": elements.divide,
    "Expand": moves.expand,
    "Flatten": moves.reshaped,
    "GRU": recurrent.gru,
    "Gather": moves.gather,
    "Gemm": products.gemm,
    "GlobalAveragePool": windows.global_average,
    "GlobalMaxPool": windows.global_max,
    "GroupNormalization": normal.group_norm,
    "InstanceNormalization": normal.instance_norm,
    "LRN": windows.lrn,
    "LSTM": recurrent.lstm,
    "LayerNormalization": normal.layer_norm,
    "LogSoftmax": elements.log_softmax,
    "LpPool": windows.lp_pool,
    "MatMul": products.matmul,
    "Max": elements.extreme,
    "MaxPool": windows.max_pool,
    "Mean": reductions.mean,
    "MeanVarianceNormalization": normal.mean_variance,
    "Min": elements.extreme,
    "Mul": elements.aligned,
    "PRelu": elements.prelu,
    "Pad": moves.pad,
    "Pow": elements.power,
    "RNN": recurrent.rnn,
    "Resize": resize.resize,
    "Slice": moves.slices,
    "SpaceToDepth": moves.space_to_depth,
    "Split": moves.split,
    "Squeeze": moves.reshaped,
    "Sub": elements.aligned,
    "Sum": elements.add_all,
    "Tile": moves.tile,
    "Unsqueeze": moves.reshaped,
} | {
    f"Reduce{kind}": reductions.reduce
    for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Sum", "SumSquare")
}


@dataclass(frozen=True)
class Decompose:
    """Composite operators are gone, and no node mixes the samples of axis 0 (see `lift`)."""

    name: ClassVar[str] = "decompose"

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Edit in place; say whether anything changed."""
        graph = model.graph
        editor, outputs = Editor(graph), [str(v.name) for v in graph.outputs]
        changed = normal.spelled_out(graph, editor)
        if changed:
            common.RemoveUnusedNodesPass()(model)
        for _ in range(_ROUNDS):
            if not any([_decomposed(node, editor) for node in list(graph)]):
                break
            changed = True
            common.IdentityEliminationPass()(model)
            common.RemoveUnusedNodesPass()(model)
        keep_outputs(graph, outputs)
        if mixes(graph) and all(static(v.shape.dims) is not None for v in graph.inputs if v.shape):
            lift(model)
            changed = True
        return changed


def open_batch(model: ir.Model) -> str | None:
    """The name of an open batch size without which the model could not be compiled."""
    leads = [v.shape.dims[0] for v in model.graph.inputs if v.shape is not None and len(v.shape)]
    symbols = [d for d in leads if not isinstance(d, int)]
    nodes = list(model.graph)
    blocked = any(
        REFUSED in node.metadata_props or any(map(turned.open_elsewhere, node.outputs))
        for node in nodes
    ) or mixes(model.graph)
    return str(symbols[0].value) if symbols and blocked else None


def _decomposed(node: ir.Node, editor: Editor) -> bool:
    rule = None if node.domain else _RULES.get(node.op_type)
    if REFUSED in node.metadata_props:
        return False
    e = Expression(node, editor)
    try:
        made: Made = turned.moved(e)
        if made is None and rule is not None and turned.reads(node):
            made = rule(e)
    except Unsupported as error:
        node.metadata_props[REFUSED] = str(error)
        return False
    if made is None:
        return False
    operands = {v.producer() for v in node.inputs if v is not None}
    if isinstance(made, ir.Value) and made.producer() not in {None, *operands}:
        editor.replace(node, made)
    else:
        _stand_in(node, [made] if isinstance(made, ir.Value) else made, editor)
    return True


def _stand_in(node: ir.Node, values: Sequence[ir.Value | None], editor: Editor) -> None:
    """New values take the places of a node's outputs; one that is an operand passes through an Identity."""
    for old, new in zip(list(node.outputs), values, strict=False):
        if new is None:
            continue
        shape, name = new.shape, old.name
        copy = ir.Value(name=None, shape=shape, type=new.type)
        editor.graph.insert_before(
            node, ir.Node("", "Identity", [new], outputs=[copy], name=f"{node.name}_{name}")
        )
        old.replace_all_uses_with(copy, replace_graph_outputs=True)
        old.name = f"{name}_old"
        copy.name = name
    editor.graph.remove(node, safe=True)
