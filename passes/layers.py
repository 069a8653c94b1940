"""How float operators group into integer layers: the one place that decides what is fused with what.

A layer ends where values are rounded. Everything that is summed before one rounding is a term of one `Rescaled`
layer: a product with weights, a pooled sum, a product of two activations, or a value that is already quantized
(a residual skip). The later of two convolutions that meet in an Add is such a term and never rounded by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import Unsupported

from . import exact
from .decompose import REFUSED
from .linear import is_linear
from .views import Move, move, pooling
from .window import Window

TABLES = frozenset(
    """Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish LeakyRelu
    Log Mish Neg Reciprocal Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh
    ThresholdedRelu""".split()
)
"""Operators of one tensor and no other operand: a table of every code holds them exactly."""

MOVES = frozenset(
    {
        "MaxPool", "Reshape", "Transpose", "Slice", "Pad", "Gather",
        # what is left of these when they change nothing between an input and an output
        "Identity", "Flatten", "Squeeze", "Unsqueeze",
    }
)  # fmt: skip
"""Operators whose results are among the values of their first operand, or a constant beside them."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """Bounds in real numbers; None where there is none."""

    lo: float | None = None
    hi: float | None = None

    def then(self, other: Clamp) -> Clamp:
        """This clamp, then the other."""
        lo, hi = other.of(self.lo), other.of(self.hi)
        return Clamp(other.lo if lo is None else lo, other.hi if hi is None else hi)

    def of(self, x: float | None) -> float | None:
        """A number clamped; where the bounds cross, ONNX takes the upper one."""
        if x is None:
            return None
        x = x if self.lo is None else max(x, self.lo)
        return x if self.hi is None else min(x, self.hi)


@dataclass(frozen=True, slots=True)
class Linear:
    """A Conv, Gemm or MatMul by constant weights, with its bias."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def channel_axis(self) -> int:
        """The axis of `weight` that counts output channels."""
        return 1 if self.node.op_type == "MatMul" else 0


@dataclass(frozen=True, slots=True)
class Pooled:
    """An average over windows, or over all spatial axes where `window` is None, as a sum and a factor."""

    node: ir.Node
    x: ir.Value
    window: Window | None


@dataclass(frozen=True, slots=True)
class Product:
    """The product of two tensors, element by element or of two stacks of matrices (MatMul).

    Of elements, the second may be a constant.
    """

    node: ir.Node
    x: ir.Value
    y: ir.Value


@dataclass(frozen=True, slots=True)
class Operand:
    """A quantized value (or a constant) that is added, or subtracted where `sign` is -1."""

    value: ir.Value
    sign: int = 1


Term = Linear | Pooled | Product | Operand


@dataclass(frozen=True, slots=True)
class Rescaled:
    """Terms summed, rounded once and clamped into `out`."""

    name: str
    terms: tuple[Term, ...]
    clamp: Clamp
    out: ir.Value


@dataclass(frozen=True, slots=True)
class Table:
    """A unary function, element by element."""

    name: str
    node: ir.Node
    x: ir.Value
    out: ir.Value


@dataclass(frozen=True, slots=True)
class SoftmaxLayer:
    """Softmax along one float axis."""

    name: str
    x: ir.Value
    axis: int
    out: ir.Value


@dataclass(frozen=True, slots=True)
class View:
    """An operator that only moves or picks values: the result shares the operand's quantizer."""

    name: str
    node: ir.Node
    x: ir.Value
    move: Move
    out: ir.Value


@dataclass(frozen=True, slots=True)
class Join:
    """Values of several operands in one quantizer: a Concat along a float axis, or the Max or Min of two (no axis)."""

    name: str
    node: ir.Node
    xs: tuple[ir.Value, ...]
    axis: int | None
    out: ir.Value


@dataclass(frozen=True, slots=True)
class Normalized:
    """Each row of the last axis with mean 0 and variance 1; its scale is fixed by the length of a row."""

    name: str
    node: ir.Node
    x: ir.Value
    out: ir.Value

    @property
    def epsilon(self) -> float:
        """What is added to the variance."""
        return self.node.attributes.get_float("epsilon", 1e-5)


@dataclass(frozen=True, slots=True)
class Index:
    """Where the largest (or smallest) value along a float axis stands: integers, which nothing rounds."""

    name: str
    node: ir.Node
    x: ir.Value
    axis: int
    out: ir.Value


Layer = Rescaled | Table | SoftmaxLayer | View | Join | Normalized | Index


def initializer(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The array of a constant value, None for anything else."""
    if value is None or value.const_value is None or value.producer() is not None:
        return None
    return value.const_value.numpy()


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value which is no graph output; None where there are more readers or fewer."""
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    return uses[0].node


def partition(model: ir.Model, *, fuse_residual: bool = True) -> list[Layer]:
    """Group every node into layers, in execution order; Unsupported names an operator that has no integer form."""
    return list(_Partition(model, fuse_residual).layers())


class _Partition:
    def __init__(self, model: ir.Model, fuse_residual: bool) -> None:
        self.model = model
        self.nodes = list(model.graph)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.fuse_residual = fuse_residual
        self.pending: dict[ir.Value, Linear] = {}
        self.absorbed: set[ir.Node] = set()

    def layers(self) -> Iterator[Layer]:
        for node in self.nodes:
            if node not in self.absorbed:
                yield from self.layer(node)

    def layer(self, node: ir.Node) -> Iterator[Layer]:
        if REFUSED in node.metadata_props:
            raise Unsupported(node.metadata_props[REFUSED])
        name, out = node.name or node.outputs[0].name or node.op_type, node.outputs[0]
        match node.domain, node.op_type:
            case "", "MatMul" if not any(initializer(v) is not None for v in node.inputs):
                pair = Product(node, _operand(node, 0), _operand(node, 1))
                yield self.rescaled(name, (pair,), out)
            case "", "Conv" | "Gemm" | "MatMul":
                linear, out = self.linear(node)
                if self.fuse_residual and self.joins_later(out):
                    self.pending[out] = linear
                    return
                yield self.rescaled(name, (linear,), out)
            case "", "Add" | "Sub":
                _of_one_rank(node)
                yield self.rescaled(name, self.operands(node), out)
            case "", "Mul":
                _of_one_rank(node)
                a, b = _operand(node, 0), _operand(node, 1)
                if initializer(a) is not None:
                    a, b = b, a
                yield self.rescaled(name, (Product(node, a, b),), out)
            case "", "AveragePool":
                pooled = Pooled(node, _operand(node, 0), pooling(node))
                yield self.rescaled(name, (pooled,), out)
            case "", "GlobalAveragePool":
                yield self.rescaled(name, (Pooled(node, _operand(node, 0), None),), out)
            case "", "Relu" | "Clip":
                first = Operand(_operand(node, 0))
                yield self.rescaled(name, (first,), out, _clamp(node))
            case "", "Softmax":
                yield SoftmaxLayer(name, _operand(node, 0), _axis(node), out)
            case ("", op) if op in MOVES:
                if len(node.outputs) > 1 and node.outputs[1].uses():
                    raise Unsupported(
                        f"node {name}: the indices of a {node.op_type} have no integer form here; drop that output"
                    )
                yield View(name, node, _operand(node, 0), move(node), out)
            case "", "Max" | "Min":
                yield Join(name, node, (_operand(node, 0), _operand(node, 1)), None, out)
            case "", "LayerNormalization":
                yield Normalized(name, node, _operand(node, 0), out)
            case "", "ArgMax" | "ArgMin":
                yield Index(name, node, _operand(node, 0), _axis(node), out)
            case "", "Concat":
                xs = tuple(_operand(node, i) for i in range(len(node.inputs)))
                yield Join(name, node, xs, _axis(node), out)
            case ("", op) if op in TABLES:
                yield Table(name, node, _operand(node, 0), out)
            case "qcompile", _:
                exact.meaning(self.model, node)
                yield Table(name, node, _operand(node, 0), out)
            case "", "ReduceMean":
                raise Unsupported(
                    f"node {name}: ReduceMean has an integer form only over all spatial axes together, "
                    "of a channels-first tensor; reduce over those, or cut the model before it"
                )
            case domain, op:
                shown = f"{domain}.{op}" if domain else op
                raise Unsupported(
                    f"node {name}: the operator {shown} has no integer form here; cut the model before it, "
                    "replace it by supported operators, or see `qcompile targets` for what is supported"
                )

    def linear(self, node: ir.Node) -> tuple[Linear, ir.Value]:
        """The product of a node with its bias, and the value it makes."""
        x, weight, out = _operand(node, 0), _operand(node, 1), node.outputs[0]
        if not is_linear(node):
            raise Unsupported(f"node {node.name}: {_why_not_linear(node)}")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        user = sole_consumer(out)
        if (
            node.op_type == "MatMul"
            and user is not None
            and (user.domain, user.op_type) == ("", "Add")
        ):
            other = user.inputs[1] if user.inputs[0] is out else user.inputs[0]
            constant = initializer(other)
            width = out.shape[-1] if out.shape is not None else None
            if (
                constant is not None
                and constant.size in (1, width)
                and constant.shape[-1:] == (constant.size,)
                and user.outputs[0].shape == out.shape
            ):
                self.absorbed.add(user)
                bias, out = other, user.outputs[0]
        return Linear(node, x, weight, bias), out

    def joins_later(self, value: ir.Value) -> bool:
        """Is this the last product that an Add waits for? Then its accumulator goes into the sum unrounded."""
        user = sole_consumer(value)
        if user is None or user.domain or user.op_type not in ("Add", "Sub"):
            return False
        a, b = user.inputs[0], user.inputs[1]
        if a is None or b is None or (user.op_type == "Sub" and b is value):
            return False
        if value.shape != user.outputs[0].shape:
            return False
        other = b if a is value else a
        maker, mine = other.producer(), value.producer()
        return (
            maker is None
            or mine is None
            or self.order[maker] < self.order[mine]
            or not self.is_product(maker)
        )

    def is_product(self, node: ir.Node) -> bool:
        return (
            not node.domain
            and node.op_type in ("Conv", "Gemm", "MatMul")
            and initializer(node.inputs[1]) is not None
        )

    def operands(self, node: ir.Node) -> tuple[Term, ...]:
        sign = -1 if node.op_type == "Sub" else 1
        terms: list[Term] = []
        for i, factor in ((0, 1), (1, sign)):
            value = _operand(node, i)
            linear = self.pending.pop(value, None)
            terms.append(linear if linear is not None else Operand(value, factor))
        return tuple(sorted(terms, key=lambda t: isinstance(t, Operand)))

    def rescaled(
        self, name: str, terms: tuple[Term, ...], out: ir.Value, clamp: Clamp | None = None
    ) -> Rescaled:
        """Close a layer, taking in the clamps that follow."""
        bounds = clamp or Clamp()
        while (
            (user := sole_consumer(out)) is not None
            and not user.domain
            and user.op_type in ("Relu", "Clip")
        ):
            bounds = bounds.then(_clamp(user))
            self.absorbed.add(user)
            out = user.outputs[0]
        return Rescaled(name, terms, bounds, out)


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Unsupported(f"node {node.name}: {node.op_type} without its operand {index}")
    return value


def _of_one_rank(node: ir.Node) -> None:
    """Batch meets batch, channel channel: only then does an axis order serve both operands."""
    rank = 0 if node.outputs[0].shape is None else len(node.outputs[0].shape)
    for value in (_operand(node, 0), _operand(node, 1)):
        have = rank if value.shape is None else len(value.shape)
        if have > rank or (have < rank and initializer(value) is None):
            raise Unsupported(
                f"node {node.name}: operands of different rank: {value.name} has {have} axes, the result {rank}; "
                "put an Unsqueeze or a Reshape before it"
            )


def _why_not_linear(node: ir.Node) -> str:
    weight = initializer(node.inputs[1])
    if weight is None:
        return (
            f"a {node.op_type} whose weights are computed at run time has no integer form here; "
            "fold the weights into constants"
        )
    match node.op_type:
        case "Conv":
            return "only a Conv over one or two axes has an integer form, with a constant bias"
        case "Gemm":
            return (
                "only a Gemm whose first operand stands as it is and whose addend is one row of constants "
                "has an integer form; transpose the operand, or add the rows in an Add"
            )
        case _:
            return f"only a MatMul by a constant matrix has an integer form, not by {list(weight.shape)}"


def _axis(node: ir.Node) -> int:
    """The axis of a Softmax or Concat, counted from the front."""
    shape = node.outputs[0].shape
    axis = node.attributes.get_int("axis", -1) % (1 if shape is None else max(1, len(shape)))
    if axis == 0:
        raise Unsupported(
            f"node {node.name}: {node.op_type} along the batch axis, which an integer graph cannot do"
        )
    return axis


def _clamp(node: ir.Node) -> Clamp:
    if node.op_type == "Relu":
        return Clamp(0.0, None)
    bounds: list[float | None] = []
    for index in (1, 2):
        value = node.inputs[index] if index < len(node.inputs) else None
        array = initializer(value)
        if value is not None and array is None:
            raise Unsupported(
                f"node {node.name}: Clip with a bound computed at run time; make it a constant"
            )
        bounds.append(None if array is None else float(np.asarray(array, np.float64).reshape(())))
    return Clamp(bounds[0], bounds[1])


def refused(model: ir.Model) -> list[tuple[str, str, str]]:
    """Every node that has no integer form: its name, its operator and the sentence why."""
    work = _Partition(model, True)
    found = []
    for node in work.nodes:
        if node in work.absorbed:
            continue
        try:
            list(work.layer(node))
        except Unsupported as e:
            found.append((str(node.name), node.op_type, str(e)))
    return found


def operators(layer: Layer) -> list[str]:
    """The float operators a layer stands for."""
    match layer:
        case Rescaled(terms=terms, clamp=clamp):
            names = [t.node.op_type for t in terms if not isinstance(t, Operand)]
            if len(terms) > 1:
                names.append(
                    "Sub" if any(isinstance(t, Operand) and t.sign < 0 for t in terms) else "Add"
                )
            if clamp != Clamp():
                names.append("Relu" if clamp == Clamp(0.0) else "Clip")
            return names
        case SoftmaxLayer():
            return ["Softmax"]
        case (
            Table(node=node)
            | View(node=node)
            | Join(node=node)
            | Normalized(node=node)
            | Index(node=node)
        ):
            return [node.op_type]
