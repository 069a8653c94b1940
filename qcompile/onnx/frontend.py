"""The front door: a file or bytes become a checked, shaped, simplified float graph of one opset."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping

import onnx
import onnx_ir as ir

from qcompile.errors import BadInput, QcompileError, Unsupported
from qcompile.onnx import weights
from qcompile.onnx.edit import keep_outputs
from qcompile.onnx.numbers import as_float32
from qcompile.onnx.reader import MAX_ELEMENTS, read, refuse_foreign_operators

MAX_SECONDS = 1200
"""How long the ONNX libraries may work on one model."""

_FIRST_WITH_CONSTANTS = 4
"""The first file version in which an initializer need not be an input."""


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def load(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    input_dims: Mapping[str, int] | None = None,
    warn: Callable[[str], None] = _warn,
    isolated: bool = True,
) -> ir.Model:
    """Return the float graph of an ONNX file (or of what `read` gave): opset 21, shapes known, nothing left to fold.

    The file is not trusted: it is bounded in size, checked, and reads no file outside its folder. The ONNX
    libraries, which some files crash, see it in another process first; not so if `isolated` is False.
    """
    proto = source if isinstance(source, onnx.ModelProto) else read(source)
    refuse_foreign_operators(proto)
    if proto.graph.sparse_initializer:
        raise Unsupported("the model has sparse initializers; store its weights densely")
    _drop_default_inputs(proto)
    as_float32(proto)
    _check_inputs(proto.graph)
    _set_dims(proto.graph, input_dims or {}, warn)
    outputs = [v.name for v in proto.graph.output]
    small, large = weights.detach(proto)
    if isolated:
        model = ir.from_proto(_simplify_elsewhere(small))
    else:
        from qcompile.onnx.simplify import simplify

        model = ir.from_proto(simplify(small))
    if weights.attach(model, large):
        from qcompile.onnx.simplify import fold_weights

        fold_weights(model)
    keep_outputs(model.graph, outputs)
    return model


def open_batch(proto: onnx.ModelProto) -> str | None:
    """The name of the leading dimension that inputs leave open, in a model that `load` has seen."""
    constants = {t.name for t in proto.graph.initializer}
    shapes = [v.type.tensor_type.shape.dim for v in proto.graph.input if v.name not in constants]
    return next(
        (s[0].dim_param for s in shapes if s and not s[0].dim_value and s[0].dim_param), None
    )


def _simplify_elsewhere(proto: onnx.ModelProto) -> onnx.ModelProto:
    program = f"import sys; sys.path[:] = {sys.path!r}; from qcompile.onnx import simplify; simplify.main()"
    try:
        child = subprocess.run(
            [sys.executable, "-c", program],
            input=proto.SerializeToString(),
            capture_output=True,
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired as e:
        raise BadInput(f"the model is not simplified after {MAX_SECONDS} seconds") from e
    match child.returncode:
        case 0:
            return onnx.load_model_from_string(child.stdout)
        case BadInput.exit_code:
            raise BadInput(child.stdout.decode())
        case Unsupported.exit_code:
            raise Unsupported(child.stdout.decode())
        case 1:
            last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise QcompileError(f"simplifying the model failed: {''.join(last)}")
        case code:
            raise BadInput(
                f"the model crashes the ONNX libraries (code {code}): it is damaged, or made to do so"
            )


def _drop_default_inputs(proto: onnx.ModelProto) -> None:
    """An initializer that is also an input is a constant: nobody feeds it."""
    graph = proto.graph
    constants = {t.name for t in graph.initializer}
    fed = [v for v in graph.input if v.name not in constants]
    del graph.input[:]
    graph.input.extend(fed)
    # Files before version 4 must list every initializer as an input; before 3 they name no opset and mean the first.
    if proto.ir_version < 3 and not proto.opset_import:
        proto.opset_import.append(onnx.helper.make_opsetid("", 1))
    proto.ir_version = max(proto.ir_version, _FIRST_WITH_CONSTANTS)


def _check_inputs(graph: onnx.GraphProto) -> None:
    if not graph.input:
        raise BadInput("the model has no inputs")
    if not graph.output:
        raise BadInput("the model has no outputs")
    returned = Counter(v.name for v in graph.output)
    if twice := [name for name, count in returned.items() if count > 1]:
        raise BadInput(f"the model returns {twice[0]!r} twice; name every output once")
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
        if (elements := math.prod(d.dim_value or 1 for d in shape)) > MAX_ELEMENTS:
            raise BadInput(
                f"input {name!r} has {elements} elements; more than {MAX_ELEMENTS} are not compiled"
            )
    if len(free) > 1:
        raise BadInput(
            f"the inputs have different symbolic batch dimensions ({', '.join(map(repr, sorted(free)))});"
            " set all but one with --input-dim NAME=VALUE"
        )
