"""Activation functions spelled out operator by operator become one node each.

    exp(x - max(x)) / sum(exp(x - max(x)))        -> Softmax(x), also without the subtraction
    min(max(x, 0), 6), Relu then Clip, ...        -> Clip(x) or Relu(x)
    a region of element-wise operators with one
    computed input, one output, scalar constants  -> a call of a model-local function

The function's body is the region itself, so any runtime still runs the model, calibration sees only
the input and the output of the function, and 8-bit arithmetic needs one table for all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from qcompile.onnx.edit import Array, Dims, Editor, constant, dims, operand
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

from .curves import recognise

DOMAIN = "qcompile"
"""The domain of the model-local functions."""

ELEMENTWISE = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu
    Greater GreaterOrEqual HardSigmoid HardSwish LeakyRelu Less LessOrEqual Log Max Min Mish Mul Neg Not Or
    PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh
    ThresholdedRelu Where Xor""".split()
)


@dataclass(frozen=True)
class Outline:
    """Every maximal element-wise function of one tensor is one node: standard, or a `qcompile` function."""

    name: ClassVar[str] = "outline"

    def __call__(self, model: ir.Model, plan: QuantPlan, context: Context) -> bool:
        """Edit in place; say whether anything changed."""
        graph = model.graph
        editor = Editor(graph)
        softmaxes = [_softmax(node, editor) for node in list(graph)]
        common.RemoveUnusedNodesPass()(model)
        outlined = [(region, _meaning(region, model)) for region in _regions(graph)]
        # From the end, so that the input of a region is still the value that was found.
        for region, meaning in reversed(outlined):
            _replace(region, meaning, editor)
        common.RemoveUnusedNodesPass()(model)
        return any(softmaxes) or bool(outlined)


# --- softmax -------------------------------------------------------------------------------------


def _softmax(node: ir.Node, editor: Editor) -> bool:
    match node.op_type:
        case "Div":
            top, total = node.inputs
        case "Mul":
            pairs = [node.inputs, node.inputs[::-1]]
            found = next((p for p in pairs if _made_by(p[1], "Reciprocal") is not None), None)
            if found is None:
                return False
            top, inverse = found
            reciprocal = _made_by(inverse, "Reciprocal")
            assert reciprocal is not None
            total = reciprocal.inputs[0]
        case _:
            return False
    exp, summed = _made_by(top, "Exp"), _made_by(total, "ReduceSum")
    if exp is None or summed is None or summed.inputs[0] is not top:
        return False
    axis, x = _reduced_axis(summed), exp.inputs[0]
    if axis is None or x is None:
        return False
    sub = _made_by(x, "Sub")
    largest = None if sub is None else _made_by(sub.inputs[1], "ReduceMax")
    if sub is not None and largest is not None and largest.inputs[0] is sub.inputs[0]:
        if _reduced_axis(largest) == axis:
            x = sub.inputs[0]
    output = node.outputs[0]
    new = editor.before(node, "Softmax", [x], dims(output), hint=node.name or "Softmax", axis=axis)
    editor.replace(node, new)
    return True


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and not node.domain and node.op_type == op_type else None


def _reduced_axis(node: ir.Node) -> int | None:
    """The axis of a reduction over one axis that keeps its place."""
    axes, shape = constant(operand(node, 1)), dims(node.inputs[0])
    if (
        axes is None
        or axes.size != 1
        or shape is None
        or not node.attributes.get_int("keepdims", 1)
    ):
        return None
    return int(axes.reshape(-1)[0]) % len(shape)


# --- regions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Region:
    """Nodes in graph order that make one value (`nodes[-1].outputs[0]`) of one computed value, `x`."""

    x: ir.Value
    nodes: tuple[ir.Node, ...]


def _computed(node: ir.Node) -> list[ir.Value] | None:
    """The inputs of an element-wise node that are not scalar constants; None for any other node."""
    if node.domain or node.op_type not in ELEMENTWISE or len(node.outputs) != 1:
        return None
    found: list[ir.Value] = []
    shape = dims(node.outputs[0])
    for value in node.inputs:
        if value is None:
            continue
        array = constant(value)
        if array is None:
            if not _alike(dims(value), shape):
                return None
            found.append(value)
        elif array.size != 1 or shape is None or array.ndim > len(shape):
            return None
    return found


def _alike(a: Dims | None, b: Dims | None) -> bool:
    """Open sizes are the batch, whatever inference calls them."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(
        m == n if isinstance(m, int) else not isinstance(n, int) for m, n in zip(a, b, strict=True)
    )


def _regions(graph: ir.Graph) -> list[Region]:
    """Disjoint regions in graph order, each the largest that ends where it ends."""
    order = {node: i for i, node in enumerate(graph)}
    taken: set[ir.Node] = set()
    found: list[Region] = []
    for node in reversed(graph):
        if node in taken:
            continue
        region = _region(node, order)
        if region is None:
            continue
        taken.update(region.nodes)
        if len(region.nodes) > 1 or _reads_constants(node):
            found.append(region)
    return found[::-1]


def _region(last: ir.Node, order: dict[ir.Node, int]) -> Region | None:
    """Grow upwards from `last`, latest node first; remember the state whenever one value feeds it all."""
    nodes: set[ir.Node] = set()
    best: Region | None = None
    frontier: set[ir.Value] = {last.outputs[0]}
    while frontier:

        def position(value: ir.Value) -> int:
            producer = value.producer()
            return -1 if producer is None else order[producer]

        value = max(frontier, key=position)
        producer = value.producer()
        inputs = None if producer is None else _computed(producer)
        inside = not nodes or (
            not value.is_graph_output() and all(u.node in nodes for u in value.uses())
        )
        if producer is None or not inputs or not inside:
            break
        nodes.add(producer)
        frontier.discard(value)
        frontier.update(inputs)
        if len(frontier) == 1:
            (x,) = frontier
            if x.dtype == last.outputs[0].dtype == ir.DataType.FLOAT:
                best = Region(x, tuple(sorted(nodes, key=order.__getitem__)))
    return best


# --- replacement ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """All that a region does is to limit."""

    low: float
    high: float


def _meaning(region: Region, model: ir.Model) -> Limits | ir.Function:
    return _limits(region) or _function(region, model)


def _replace(region: Region, meaning: Limits | ir.Function, editor: Editor) -> None:
    last = region.nodes[-1]
    shape, hint = dims(last.outputs[0]), last.name or last.op_type
    big = float(np.finfo(np.float32).max)
    match meaning:
        case ir.Function():
            new = editor.before(last, meaning.name, [region.x], shape, hint=hint, domain=DOMAIN)
        case Limits(low=0.0, high=np.inf):
            new = editor.before(last, "Relu", [region.x], shape, hint=hint)
        case Limits(low=low, high=high):
            bounds = [
                editor.const(np.array(np.clip(v, -big, big), np.float32), f"{hint}_{n}")
                for v, n in ((low, "min"), (high, "max"))
            ]
            new = editor.before(last, "Clip", [region.x, *bounds], shape, hint=hint)
    editor.replace(last, new)


def _reads_constants(node: ir.Node) -> bool:
    return node.op_type != "Clip" and any(constant(v) is not None for v in node.inputs)


def _limits(region: Region) -> Limits | None:
    low, high = -np.inf, np.inf
    for node in region.nodes:
        numbers = [
            None if (c := constant(v)) is None else float(c.reshape(-1)[0]) for v in node.inputs
        ]
        if sum(n is None and v is not None for n, v in zip(numbers, node.inputs, strict=True)) != 1:
            return None
        given = [n for n in numbers if n is not None]
        match node.op_type:
            case "Relu":
                lo, hi = 0.0, np.inf
            case "Clip":
                bounds = [*numbers[1:], None, None]
                lo = -np.inf if bounds[0] is None else bounds[0]
                hi = np.inf if bounds[1] is None else bounds[1]
            case "Max" if given:
                lo, hi = max(given), np.inf
            case "Min" if given:
                lo, hi = -np.inf, min(given)
            case _:
                return None
        # Where the limits cross, ONNX takes the upper one.
        lo = min(lo, hi)
        low, high = min(max(low, lo), hi), min(max(high, lo), hi)
    return Limits(low, high)


def _function(region: Region, model: ir.Model) -> ir.Function:
    """The model-local function with this body, made if no function has it yet."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    inside: dict[ir.Value, ir.Value] = {region.x: x}
    constants: dict[bytes, ir.Value] = {}
    body: list[ir.Node] = []
    for i, node in enumerate(region.nodes):
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            array = constant(value)
            if value is None or array is None:
                inputs.append(None if value is None else inside[value])
                continue
            scalar = array.reshape(())
            key = scalar.dtype.str.encode() + scalar.tobytes()
            if key not in constants:
                made = ir.node(
                    "Constant",
                    [],
                    {"value": ir.tensor(scalar)},
                    outputs=[ir.Value(name=f"c{len(constants)}")],
                    name=f"constant_{len(constants)}",
                )
                body.append(made)
                constants[key] = made.outputs[0]
            inputs.append(constants[key])
        last = i == len(region.nodes) - 1
        output = ir.Value(name="y" if last else f"v{i}")
        inside[node.outputs[0]] = output
        body.append(
            ir.Node(
                "",
                node.op_type,
                inputs,
                node.attributes.values(),
                outputs=[output],
                name=f"{node.op_type}_{i}",
            )
        )
    digest = _digest(body)
    for function in model.functions.values():
        if function.domain == DOMAIN and function.metadata_props.get("digest") == digest:
            return function
    graph = ir.Graph(
        [x],
        [body[-1].outputs[0]],
        nodes=body,
        opset_imports={"": model.opset_imports[""]},
        name="body",
    )
    name = _unused(recognise(graph), {f.name for f in model.functions.values()})
    function = ir.Function(DOMAIN, name, graph=graph, attributes=[])
    function.metadata_props["digest"] = digest
    model.functions[function.identifier()] = function
    model.opset_imports.setdefault(DOMAIN, 1)
    return function


def _digest(body: Sequence[ir.Node]) -> str:
    """Equal for equal bodies: names inside a body are made by position."""
    text = hashlib.sha256()
    for node in body:
        text.update(repr((node.op_type, [v and v.name for v in node.inputs])).encode())
        for attribute in sorted(node.attributes.values(), key=lambda a: a.name):
            value = attribute.value
            plain: object = value
            if isinstance(value, ir.TensorProtocol):
                array: Array = value.numpy()
                plain = (array.dtype.str, array.tobytes())
            text.update(repr((attribute.name, plain)).encode())
    return text.hexdigest()


def _unused(known: str | None, names: set[str]) -> str:
    """`Silu`, `Silu2`, ...; functions without a name of their own are `Unary1`, `Unary2`, ..."""
    candidates = (
        f"{known or 'Unary'}{'' if known and n == 1 else n}" for n in range(1, len(names) + 2)
    )
    return next(c for c in candidates if c not in names)
