"""A model as consecutive pieces with few weights each, so that those of one piece are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from qcompile.onnx import weights

PIECE_BYTES = 64 << 20
"""A piece ends with the node that has its weights reach this."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some nodes in order: the message without large weights, these weights, what goes in and what comes out."""

    proto: onnx.ModelProto
    large: Mapping[str, ir.TensorProtocol]
    inputs: Sequence[str]
    outputs: Sequence[str]


def pieces(model: ir.Model, names: Sequence[str]) -> list[Piece]:
    """The model in pieces that together give the named values, none of which it is fed."""
    proto, large = weights.light(model)
    nested = any(a.HasField("g") or a.graphs for node in proto.graph.node for a in node.attribute)
    # codes become as many float32 numbers in onnxruntime
    if nested or sum(4 * t.size for t in large.values()) < weights.WHOLE_BYTES:
        types = _types(proto.graph)
        shown = {v.name for v in proto.graph.output}
        proto.graph.output.extend(types[n] for n in names if n not in shown)
        return [Piece(proto, large, [v.name for v in proto.graph.input], list(names))]
    # what is cut has to say its type
    proto = onnx.shape_inference.infer_shapes(proto)
    made: list[Piece] = []
    wanted = set(names)
    for part in reversed(list(_parts(_groups(proto.graph), large))):
        gives = [n for node in part for n in node.output if n in wanted]
        if gives:
            made.insert(0, _piece(proto, large, part, gives))
            wanted |= set(made[0].inputs)
    constants = {t.name for t in proto.graph.initializer} & set(names)
    return [*made, *([_piece(proto, large, [], sorted(constants))] if constants else [])]


def _groups(graph: onnx.GraphProto) -> list[list[onnx.NodeProto]]:
    """Every node in order, together with what makes, of constants alone, operands that nobody before it reads."""
    known = {t.name for t in graph.initializer}
    waiting: dict[str, onnx.NodeProto] = {}
    groups: list[list[onnx.NodeProto]] = []

    def place(node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in waiting:
                place(waiting[name])
        for name in node.output:
            waiting.pop(name, None)
        groups[-1].append(node)

    for node in graph.node:
        if node.input and known.issuperset(node.input):
            known.update(node.output)
            waiting |= dict.fromkeys(node.output, node)
        else:
            groups.append([])
            place(node)
    groups.append([])
    while waiting:
        place(next(iter(waiting.values())))
    return groups


def _parts(
    groups: Sequence[Sequence[onnx.NodeProto]], large: Mapping[str, ir.TensorProtocol]
) -> Iterator[list[onnx.NodeProto]]:
    """The nodes in order, as many together as the weights allow."""
    part: list[onnx.NodeProto] = []
    seen: set[str] = set()
    for group in groups:
        part += group
        seen.update(n for node in group for n in node.input if n in large)
        if sum(4 * large[n].size for n in seen) >= PIECE_BYTES:
            yield part
            part, seen = [], set()
    if part:
        yield part


def _piece(
    whole: onnx.ModelProto,
    large: Mapping[str, ir.TensorProtocol],
    nodes: Sequence[onnx.NodeProto],
    gives: Sequence[str],
) -> Piece:
    types = _types(whole.graph)
    inside = {n for node in nodes for n in node.output}
    needs = {n for node in nodes for n in node.input if n} | set(gives)
    constants = [t for t in whole.graph.initializer if t.name in needs]
    fed = sorted(needs - inside - {t.name for t in constants})
    graph = helper.make_graph(
        nodes, whole.graph.name, [types[n] for n in fed], [types[n] for n in gives], constants
    )
    graph.value_info.extend(types[n] for n in sorted(inside - set(gives)) if n in types)
    proto = helper.make_model(
        graph,
        opset_imports=whole.opset_import,
        ir_version=whole.ir_version,
        functions=list(whole.functions),
    )
    held = {t.name: large[t.name] for t in constants if t.name in large}
    return Piece(proto, held, fed, list(gives))


def _types(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """Type and shape of every value, constants included."""
    types = {
        t.name: helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in graph.initializer
    }
    types |= {
        n: helper.make_tensor_value_info(n, TensorProto.FLOAT, None)
        for node in graph.node
        for n in node.output
        if n
    }
    return types | {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
