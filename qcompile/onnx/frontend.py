"""The front door: a file or bytes become a checked, shaped, simplified float graph of one opset."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.helper
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer

from qcompile.errors import BadInput, QcompileError, Unsupported
from qcompile.onnx.edit import Editor, constant, dims, operand, reshape_target, static
from qcompile.onnx.reader import MAX_NODES, read

OPSET = 21
"""Every graph after the front door is of this ONNX opset."""

IR_VERSION = 10
"""The newest file version that all supported onnxruntime releases read."""

MAX_FOLDED_ELEMENTS = 2**27
"""How many elements all folded constants of a model may have together."""

# Operators whose value on constants costs time and memory proportional to input plus output.
_FOLDABLE = frozenset(
    """Abs Add And BitShift Cast CastLike Ceil Clip Concat ConstantOfShape Cos DepthToSpace Div Equal Erf
    Exp Expand Flatten Floor Gather GatherElements GatherND Greater GreaterOrEqual Identity Less LessOrEqual
    Log Max Min Mod Mul Neg Not Or Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    Relu Reshape Round ScatterND Shape Sigmoid Sign Sin Size Slice SpaceToDepth Sqrt Squeeze Sub Sum Tanh
    Tile Transpose Trilu Unsqueeze Where Xor""".split()
)


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def load(
    source: str | os.PathLike[str] | bytes,
    *,
    input_dims: Mapping[str, int] | None = None,
    warn: Callable[[str], None] = _warn,
) -> ir.Model:
    """Return the float graph of an ONNX file: opset 21, shapes known but for the batch, nothing left to fold.

    The file is not trusted: it is bounded in size, checked, and reads no file outside its folder.
    """
    proto = read(source)
    if proto.graph.sparse_initializer:
        raise Unsupported("the model has sparse initializers; store its weights densely")
    _drop_default_inputs(proto.graph)
    _check_inputs(proto.graph)
    _set_dims(proto.graph, input_dims or {}, warn)
    proto = _convert(_infer(_inline(proto)))
    model = ir.from_proto(_infer(proto))
    model.ir_version = IR_VERSION
    try:
        _simplify(model)
    except QcompileError:
        raise
    except Exception as e:
        # Third-party passes meet a hostile graph here: whatever they stumble over, the graph is at fault.
        raise BadInput(f"the model cannot be simplified: {e}") from e
    _check_result(model.graph)
    return model


def _drop_default_inputs(graph: onnx.GraphProto) -> None:
    """An initializer that is also an input is a constant: nobody feeds it."""
    constants = {t.name for t in graph.initializer}
    fed = [v for v in graph.input if v.name not in constants]
    del graph.input[:]
    graph.input.extend(fed)


def _check_inputs(graph: onnx.GraphProto) -> None:
    if not graph.input:
        raise BadInput("the model has no inputs")
    if not graph.output:
        raise BadInput("the model has no outputs")
    for value in graph.input:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise Unsupported(
                f"input {value.name!r} is a {(kind or 'value').removesuffix('_type')}; only float32"
                " tensors can be fed"
            )
        if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            code = value.type.tensor_type.elem_type
            names = {v: k.lower() for k, v in onnx.TensorProto.DataType.items()}
            kind = names.get(code, f"the unknown type {code}")
            raise Unsupported(
                f"input {value.name!r} is a tensor of {kind}; only float32 inputs are compiled,"
                " so cut the model after the part that takes other types"
            )
        if not value.type.tensor_type.HasField("shape"):
            raise BadInput(
                f"input {value.name!r} has no shape; export the model with the shapes of its inputs"
            )


def _set_dims(
    graph: onnx.GraphProto, input_dims: Mapping[str, int], warn: Callable[[str], None]
) -> None:
    """Give symbolic dimensions their numbers; only the leading one may stay free, under one name."""
    shapes = {v.name: v.type.tensor_type.shape.dim for v in graph.input}
    batches = sorted({s[0].dim_param for s in shapes.values() if s and s[0].dim_param}) or ["N"]
    for name, shape in shapes.items():
        for axis, dim in enumerate(shape):
            # A dimension without a name gets one, so that `input_dims` can set it.
            if not dim.dim_param and not dim.HasField("dim_value"):
                dim.dim_param = f"{name}_{axis}" if axis else batches[0]
    known = sorted({d.dim_param for shape in shapes.values() for d in shape if d.dim_param})
    for name, size in input_dims.items():
        if size < 1:
            raise BadInput(f"--input-dim {name}={size}: a dimension is at least 1")
        if name not in known:
            names = ", ".join(map(repr, known)) or "none"
            warn(f"--input-dim {name}={size} is ignored; the symbolic dimensions are: {names}")
    free: set[str] = set()
    for name, shape in shapes.items():
        for axis, dim in enumerate(shape):
            if dim.dim_param in input_dims:
                dim.dim_value = input_dims[dim.dim_param]
            if dim.dim_param and axis:
                raise BadInput(
                    f"axis {axis} of input {name!r} has no fixed size ({dim.dim_param!r}); set it"
                    f" with --input-dim {dim.dim_param}=VALUE"
                )
            if dim.dim_param:
                free.add(dim.dim_param)
            elif dim.dim_value < 1:
                raise BadInput(f"axis {axis} of input {name!r} has size {dim.dim_value}")
    if len(free) > 1:
        raise BadInput(
            f"the inputs have different symbolic batch dimensions ({', '.join(map(repr, sorted(free)))});"
            " set all but one with --input-dim NAME=VALUE"
        )
    # What the file says about other shapes may be stale now; inference says it again.
    del graph.value_info[:]
    for output in graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")


def _inline(proto: onnx.ModelProto) -> onnx.ModelProto:
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto, convert_version=True)
    except (RuntimeError, ValueError) as e:
        raise BadInput(f"the functions of the model cannot be expanded: {e}") from e


def _infer(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(
            proto, check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as e:
        sentence = " ".join(str(e).split())
        raise BadInput(f"the shapes or types of the model do not fit together: {sentence}") from e


def _convert(proto: onnx.ModelProto) -> onnx.ModelProto:
    version = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), OPSET)
    if version == OPSET:
        return proto
    try:
        converted = onnx.version_converter.convert_version(proto, OPSET)
    except (onnx.version_converter.ConvertError, RuntimeError, ValueError) as e:
        sentence = " ".join(str(e).split())
        raise Unsupported(
            f"the model is of opset {version} and cannot be converted to opset {OPSET}: {sentence};"
            f" export it with opset {OPSET}"
        ) from e
    return converted


def _simplify(model: ir.Model) -> None:
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

    constants = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
    )
    tidy = ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    constants(model)
    # Folding settles shapes, which lets more be folded; three rounds settle what exporters write.
    for _ in range(3):
        with np.errstate(all="ignore"):
            optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
        constants(model)
        _reinfer(model)
        changed = _settle_reshapes(model.graph)
        tidy(model)
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


def _check_result(graph: ir.Graph) -> None:
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
        if _trains(node):
            raise Unsupported(
                f"node {node.name!r} ({node.op_type}) is in training mode; export the model for"
                " inference, in PyTorch after model.eval()"
            )
        for value in node.outputs:
            if not value.name and not value.uses():
                continue
            shape = dims(value)
            if shape is None or static(shape[1:]) is None:
                raise Unsupported(
                    f"the shape of {value.name!r}, made by node {node.name!r} ({node.op_type}), is only"
                    f" known at run time ({value.shape}); fix the batch with --input-dim NAME=VALUE"
                    " or export the model with fixed shapes"
                )


def _trains(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization":
        return bool(node.attributes.get_int("training_mode", 0))
    # Without a mode, or with a constant False, Dropout was an Identity and is gone.
    return node.op_type == "Dropout"
