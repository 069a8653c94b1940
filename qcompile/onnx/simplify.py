"""Simplifying a model with the ONNX libraries: check, inline, convert, infer shapes, fold constants.

Their C++ code is not proof against hostile files (shape inference of several operators can be made to abort the
process), so the front door runs this module in a process of its own. Their Python errors are of every class there is:
whatever they stumble over, the file is at fault.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx.checker
import onnx.defs
import onnx.helper
import onnx.inliner
import onnx.numpy_helper
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from qcompile.errors import BadInput, QcompileError, Unsupported
from qcompile.onnx.edit import Array, Editor, constant, dims, operand, reshape_target, static
from qcompile.onnx.reader import MAX_ELEMENTS, MAX_NODES
from qcompile.onnx.unroll import unroll

OPSET = 21
"""Every graph after the front door is of this ONNX opset."""

IR_VERSION = 10
"""The newest file version that all supported onnxruntime releases read."""

MAX_FOLDED_ELEMENTS = 2**28
"""How many elements all folded constants of a model may have together."""

# Operators whose value on constants costs time and memory proportional to input plus output.
_FOLDABLE = frozenset(
    """Abs Add And BitShift Cast CastLike Ceil Clip Concat ConstantOfShape Cos DepthToSpace Div Equal Erf
    Exp Expand Flatten Floor Gather GatherElements GatherND Greater GreaterOrEqual Identity Less LessOrEqual
    Log Max Min Mod Mul Neg Not Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    Relu Reshape Round ScatterND Shape Sigmoid Sign Sin Size Slice SpaceToDepth Sqrt Squeeze Sub Sum Tanh
    Tile Transpose Trilu Unsqueeze Where Xor""".split()
)


_SHAPED_LIKE_THEIR_INPUT = frozenset({"GroupNormalization"})
"""Operators whose shape ONNX's inference does not know."""


def simplify(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with one opset, known shapes, no functions, and nothing left to fold."""
    outputs = [v.type.tensor_type for v in proto.graph.output if v.type.HasField("tensor_type")]
    for output in outputs:
        # The checker wants a shape, whatever it is; runtimes do not.
        output.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except Exception as e:
        raise BadInput(f"the model is not valid ONNX: {_one_line(e)}") from e
    # What the file says about inner shapes may be stale; inference says it again.
    del proto.graph.value_info[:]
    for output in outputs:
        output.ClearField("shape")
    proto = _convert(_infer(_inline(proto)))
    try:
        unroll(proto.graph)
        # Types change with the opset too: the mask of Dropout was once a float.
        del proto.graph.value_info[:]
        model = ir.from_proto(_infer(proto))
        model.ir_version = IR_VERSION
        _simplify(model)
    except QcompileError:
        raise
    except Exception as e:
        raise BadInput(f"the model cannot be simplified: {_one_line(e)}") from e
    _check_result(model.graph)
    return ir.to_proto(model)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _inline(proto: onnx.ModelProto) -> onnx.ModelProto:
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto, convert_version=True)
    except Exception as e:
        raise BadInput(f"the functions of the model cannot be expanded: {_one_line(e)}") from e


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=True
        )
    except Exception as e:
        raise BadInput(f"the shapes or types of the model do not fit: {_one_line(e)}") from e


def _convert(proto: onnx.ModelProto) -> onnx.ModelProto:
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), OPSET)
    known = onnx.defs.onnx_opset_version()
    if version == OPSET or (OPSET < version <= known and _relabelled(proto, version)):
        return proto
    try:
        return onnx.version_converter.convert_version(proto, OPSET)
    except Exception as e:
        raise Unsupported(
            f"the model is of opset {version} and cannot be converted to {OPSET}: {_one_line(e)};"
            f" export it with opset {OPSET}"
        ) from e


def _relabelled(proto: onnx.ModelProto, version: int) -> bool:
    """Is the model one of OPSET too, up to names of types? Then it says so, and Swish is spelled out."""

    def form(op_type: str, at: int) -> object:
        s = onnx.defs.get_schema(op_type, at)
        attributes = sorted(
            (a.name, str(a.type), a.required, str(a.default_value)) for a in s.attributes.values()
        )
        return attributes, [[(p.name, str(p.option)) for p in ps] for ps in (s.inputs, s.outputs)]

    for node in proto.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type in ("Swish", "SpaceToDepth"):
            continue
        try:
            if form(node.op_type, version) != form(node.op_type, OPSET):
                return False
        except onnx.defs.SchemaError:
            return False
    shapes = {
        v.name: v.type.tensor_type.shape.dim for v in (*proto.graph.input, *proto.graph.value_info)
    }
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        made = _spelled_out(node, shapes)
        if made is None:
            return False
        nodes += made
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = OPSET
    # inference has become better since: one version has one opinion
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    return True


def _spelled_out(
    node: onnx.NodeProto, shapes: Mapping[str, Sequence[onnx.TensorShapeProto.Dimension]]
) -> list[onnx.NodeProto] | None:
    """Swish (opset 24) and SpaceToDepth by columns (opset 28) in older operators; None where a size is unknown."""
    if node.op_type == "SpaceToDepth":
        return _space_to_depth(node, shapes)
    if node.op_type != "Swish":
        return [node]
    alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
    y = node.output[0]
    factor = onnx.helper.make_tensor(f"{y}.alpha", onnx.TensorProto.FLOAT, [], [alpha])
    return [
        onnx.helper.make_node("Constant", [], [f"{y}.alpha"], f"{node.name}.alpha", value=factor),
        onnx.helper.make_node(
            "Mul", [node.input[0], f"{y}.alpha"], [f"{y}.scaled"], f"{node.name}.scaled"
        ),
        onnx.helper.make_node("Sigmoid", [f"{y}.scaled"], [f"{y}.gate"], f"{node.name}.gate"),
        onnx.helper.make_node("Mul", [node.input[0], f"{y}.gate"], [y], node.name),
    ]


def _space_to_depth(
    node: onnx.NodeProto, shapes: Mapping[str, Sequence[onnx.TensorShapeProto.Dimension]]
) -> list[onnx.NodeProto] | None:
    """The channels of one block stand together with mode CRD, those of one place without."""
    mode = next((a for a in node.attribute if a.name == "mode"), None)
    if mode is None:
        return [node]
    node.attribute.remove(mode)
    if mode.s == b"DCR":
        return [node]
    dims_ = shapes.get(node.input[0], ())
    if len(dims_) != 4 or not dims_[1].dim_value:
        return None
    block = next(a.i for a in node.attribute if a.name == "blocksize")
    y, channels = node.output[0], dims_[1].dim_value
    order = np.arange(channels * block**2).reshape(-1, channels).T.reshape(-1)
    node.output[0] = f"{y}.blocks"
    indices = onnx.numpy_helper.from_array(order, f"{y}.order")
    return [
        node,
        onnx.helper.make_node("Constant", [], [f"{y}.order"], f"{y}.order", value=indices),
        onnx.helper.make_node("Gather", [f"{y}.blocks", f"{y}.order"], [y], f"{y}.moved", axis=1),
    ]


def _foldable() -> Callable[[ir.Node], bool]:
    """Says of node after node whether to fold it, until all that was folded is too much."""
    folded = 0

    def should_fold(node: ir.Node) -> bool:
        nonlocal folded
        if node.domain or node.op_type not in _FOLDABLE or len(node.outputs) != 1:
            return False
        shape = dims(node.outputs[0])
        size = None if shape is None else static(shape)
        if size is None or folded + math.prod(size) > MAX_FOLDED_ELEMENTS:
            return False
        folded += math.prod(size)
        return True

    return should_fold


def _fold(model: ir.Model, should_fold: Callable[[ir.Node], bool], *, infer: bool) -> None:
    with np.errstate(all="ignore"):
        optimizer.fold_constants(
            model,
            onnx_shape_inference=infer,
            output_size_limit=MAX_FOLDED_ELEMENTS,
            should_fold=should_fold,
        )
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
    )(model)


def _tidy(model: ir.Model) -> None:
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)


def fold_weights(model: ir.Model) -> None:
    """Fold what is made of weights that were away while the model was simplified; shapes are known and stay."""
    try:
        _fold(model, _foldable(), infer=False)
        _tidy(model)
        common.NameFixPass()(model)
    except Exception as e:
        raise BadInput(f"the model cannot be simplified: {_one_line(e)}") from e


def _simplify(model: ir.Model) -> None:
    should_fold = _foldable()
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    # Folding settles shapes, which lets more be folded; three rounds settle what exporters write.
    for _ in range(3):
        _fold(model, should_fold, infer=True)
        _reinfer(model)
        changed = _settle_reshapes(model.graph) | _settle_constants(model.graph)
        _tidy(model)
        if not changed:
            break
    common.NameFixPass()(model)


def _reinfer(model: ir.Model) -> None:
    """Infer the shapes again, without copying the weights around."""
    proto = ir.to_proto(model)
    small = [t for t in proto.graph.initializer if math.prod(t.dims) <= 64]
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) > 64:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    del proto.graph.value_info[:]
    graph = _infer(proto).graph
    types = {v.name: v.type for v in (*graph.value_info, *graph.output)}
    for node in model.graph:
        for value in node.outputs:
            if value.name in types:
                value.type = ir.serde.deserialize_type_proto_for_type(types[value.name])
                value.shape = ir.serde.deserialize_type_proto_for_shape(types[value.name])


def _settle_reshapes(graph: ir.Graph) -> bool:
    """Reshapes whose shape is computed from shapes get it as a constant."""
    editor, changed = Editor(graph), False
    for node in graph:
        if node.op_type != "Reshape" or constant(operand(node, 1)) is not None:
            continue
        source, target = node.inputs[0], node.outputs[0]
        assert source is not None
        shape = reshape_target(source, target)
        if shape is None:
            continue
        node.replace_input_with(1, editor.const(np.array(shape, np.int64), f"{node.name}_shape"))
        node.attributes.pop("allowzero", None)
        changed = True
    return changed


def _settle_constants(graph: ir.Graph) -> bool:
    """Parts and products of constants are constants: weights of several gates, states of zeros."""
    editor, changed, left = Editor(graph), False, MAX_FOLDED_ELEMENTS
    for node in graph:
        arrays = [a for v in node.inputs if (a := constant(v)) is not None]
        if node.domain or len(arrays) < len(node.inputs):
            continue
        made: list[Array] = []
        match node.op_type:
            case "Split":
                made = _parts(node, arrays[0])
            case "MatMul" if all(a.dtype == np.float32 and a.size for a in arrays):
                work = arrays[0].size * (arrays[1].size // arrays[0].shape[-1])
                if work <= left:
                    left -= work
                    made = [_product(*arrays)]
        for old, array in zip(node.outputs, made, strict=False):
            if old.uses() and not old.is_graph_output():
                old.replace_all_uses_with(editor.const(array, str(old.name)))
                changed = True
    return changed


def _parts(node: ir.Node, array: Array) -> list[Array]:
    axis = node.attributes.get_int("axis", 0)
    widths = [shape[axis] if (shape := dims(v)) else None for v in node.outputs]
    ends = np.cumsum([w for w in widths if isinstance(w, int)])
    return np.split(array, ends[:-1], axis) if len(ends) == len(widths) else []


def _product(a: Array, b: Array) -> Array:
    """In double precision, whose last bits, where machines differ, are rounded away."""
    with np.errstate(all="ignore"):
        return np.asarray(a.astype(np.float64) @ b.astype(np.float64), np.float32)


def _check_result(graph: ir.Graph) -> None:
    batch = {d for v in graph.inputs for d in (dims(v) or ())[:1] if not isinstance(d, int)}
    if len(graph) > MAX_NODES:
        raise BadInput(f"the model has {len(graph)} nodes; more than {MAX_NODES} are not read")
    for node in graph:
        if any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for a in node.attributes.values()
        ):
            raise Unsupported(
                f"node {node.name!r} ({node.op_type}) branches or loops at run time; only straight"
                " graphs are compiled"
            )
        _check_perm(node)
        if _trains(node):
            raise Unsupported(
                f"node {node.name!r} ({node.op_type}) is in training mode; export the model for"
                " inference, in PyTorch after model.eval()"
            )
        for value in node.outputs:
            if not value.name and not value.uses():
                continue
            shape = dims(value)
            if shape is not None and any(isinstance(d, int) and d < 1 for d in shape):
                raise BadInput(
                    f"node {node.name!r} ({node.op_type}) makes {value.name!r} empty ({value.shape});"
                    " no dimension can be less than 1"
                )
            if shape is None and node.op_type in _SHAPED_LIKE_THEIR_INPUT:
                shape = dims(operand(node, 0))
                value.shape = None if shape is None else ir.Shape(shape)
            # A Transpose may take the batch off the leading axis.
            rest = None if shape is None else static([d for d in shape[1:] if d not in batch])
            if rest is not None and math.prod(rest) > MAX_ELEMENTS:
                raise Unsupported(
                    f"node {node.name!r} ({node.op_type}) makes {value.name!r} of {math.prod(rest)} elements"
                    f" a sample; more than {MAX_ELEMENTS} are not compiled"
                )
            if rest is None or shape is None:
                raise Unsupported(
                    f"the shape of {value.name!r}, made by node {node.name!r} ({node.op_type}), is only"
                    f" known at run time ({value.shape}); fix the batch with --input-dim NAME=VALUE"
                    " or export the model with fixed shapes"
                )


def _check_perm(node: ir.Node) -> None:
    """ONNX's inference believes any axes of a Transpose."""
    perm, shape = node.attributes.get_ints("perm"), dims(operand(node, 0))
    if node.op_type != "Transpose" or perm is None or shape is None:
        return
    if sorted(perm) != list(range(len(shape))):
        raise BadInput(
            f"node {node.name!r} (Transpose): {list(perm)} is no order of the {len(shape)} axes of its operand"
        )


def _trains(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization":
        return bool(node.attributes.get_int("training_mode", 0))
    # Without a mode, or with a constant False, Dropout was an Identity and is gone.
    return node.op_type == "Dropout"


def main() -> None:
    """Simplify the model on standard input; the exit code and what is written tell the outcome."""
    # Libraries may print; only the answer goes where the parent reads.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        proto = onnx.load_model_from_string(sys.stdin.buffer.read())
        result, code = simplify(proto).SerializeToString(), 0
    except QcompileError as e:
        result, code = str(e).encode(), e.exit_code
    with answer:
        answer.write(result)
    sys.exit(code)
