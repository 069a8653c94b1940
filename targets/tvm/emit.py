"""The integer graph as a Python package that builds it in TVM: network.py, constants.npz, and the files they need."""

from __future__ import annotations

import io
import keyword
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from qcompile.errors import Unsupported
from qcompile.ir import Array, Graph, Node, TensorType, Value, ops
from qcompile.ir.proof import prove, prove_rescale
from qcompile.ir.text import digest
from qcompile.target import Layer, Lowered

from ..c.text import Names

PACKAGE = Path(__file__).parent / "package"
"""What every emitted package holds, whatever the network is."""

_METHODS: Mapping[type[ops.Op], str] = {
    ops.Conv: "conv",
    ops.MatMul: "matmul",
    ops.Rescale: "rescale",
    ops.Mul: "mul",
    ops.Lut: "lut",
    ops.MaxPool: "max_pool",
    ops.SumPool: "sum_pool",
    ops.Softmax: "softmax",
    ops.Concat: "concat",
    ops.Slice: "slice",
    ops.Pad: "pad",
    ops.Reshape: "reshape",
    ops.Transpose: "transpose",
    ops.Take: "take",
    ops.Extreme: "extreme",
    ops.ArgExtreme: "arg_extreme",
    ops.BatchMatMul: "batch_matmul",
    ops.Normalize: "normalize",
}
"""What operators.py calls each operator."""

_MOST_SPATIAL = 3
_WIDTH = 100
_INDENT = " " * 4


def package_name(name: str) -> str:
    """What the emitted package is called: nothing that Python's own library has."""
    return f"{name}_tvm"


def lower(graph: Graph, *, name: str, target: Mapping[str, object]) -> Lowered:
    """Emit the package NAME_tvm; `target` is how TVM calls the chip. Raises Unsupported naming the node."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is None:
        raise ValueError(f"{name!r} is no C identifier")
    _prove(graph)
    network = _Network(graph)
    folder = package_name(name)
    files = {path.name: path.read_bytes() for path in sorted(PACKAGE.glob("*.py"))}
    files["network.py"] = network.text(name, target).encode()
    files["constants.npz"] = network.archive()
    return Lowered(
        files={f"{folder}/{path}": data for path, data in files.items()},
        arena_bytes=0,
        weight_bytes=sum(v.type.bytes for v in graph.constants()),
        stored={node.output.name: i for i, node in enumerate(graph.nodes)},
        fused=[],
        layers=_layers(graph, network.names),
    )


def _layers(graph: Graph, names: Mapping[Value, str]) -> list[Layer]:
    """The layers of the model, each with its integer operators in order."""
    nodes: dict[str, list[Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(node.name, []).append(node)
    return [
        Layer(
            name=name,
            kernel=" and ".join(type(n.op).__name__ for n in held),
            function=names[held[-1].output],
            macs=sum(map(_macs, held)),
            scratch_bytes=0,
            cost=0,
        )
        for name, held in nodes.items()
    ]


def _macs(node: Node) -> int:
    """Multiply-accumulates of a convolution, a dense layer or a product of activations; none of anything else."""
    if isinstance(node.op, ops.BatchMatMul):
        return node.output.type.size * node.inputs[0].type.shape[-1]
    if not isinstance(node.op, ops.Conv | ops.MatMul):
        return 0
    return node.output.type.size * math.prod(node.inputs[1].type.shape[1:])


def _prove(graph: Graph) -> None:
    """TVM may compute an int32 that overflows in either of two ways, so that none may."""
    try:
        prove(graph)
        for node in graph.nodes:
            if isinstance(node.op, ops.Rescale):
                prove_rescale(node)
    except OverflowError as e:
        raise Unsupported(f"tvm takes proved graphs only: {e}") from None


class _Network:
    """One lowering: what network.py says, and the constants it names."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._constants: dict[str, Array] = {}
        self._known: dict[str, str] = {}
        self._constant_names = Names(["constant"])
        taken = Names([*keyword.kwlist, *keyword.softkwlist, "q", "graph"])
        self.names = {v: taken.fresh("x", v.name) for _, v in graph.inputs}
        for node in graph.nodes:
            stem = node.output.name
            word = stem if re.match(r"[A-Za-z]", stem) and stem.isascii() else f"y_{stem}"
            self.names[node.output] = taken.fresh(word)
        self._lines = [self._line(node) for node in graph.nodes]
        self._returned = [self._operand(v) for _, v in graph.outputs]

    def text(self, name: str, target: Mapping[str, object]) -> str:
        """The file network.py."""
        parameters = ", ".join(f"{self.names[v]}: Expr" for _, v in self._graph.inputs)
        results = "".join(f"{_INDENT * 2}{value},\n" for value in self._returned)
        ports = {
            kind: "".join(
                f"{_INDENT * 2}Port({p.name!a}, {str(v.type.dtype.numpy)!r}, {v.type.shape!r}),\n"
                for p, v in border
            )
            for kind, border in (("inputs", self._graph.inputs), ("outputs", self._graph.outputs))
        }
        return (
            f'"""The integer graph of {name}, an operator a line; operators.py says what each computes."""\n\n'
            "from tvm.relax import Expr\n\n"
            "from .operators import Operators\n"
            "from .program import Network, Port\n\n\n"
            f"def graph(q: Operators, {parameters}) -> tuple[Expr, ...]:\n"
            f'{_INDENT}"""The outputs, each operator appended in order."""\n'
            + "".join(self._lines)
            + f"{_INDENT}return (\n{results}{_INDENT})\n\n\n"
            "NETWORK = Network(\n"
            f"{_INDENT}name={name!r},\n"
            f"{_INDENT}target={dict(target)!r},\n"
            f"{_INDENT}inputs=(\n{ports['inputs']}{_INDENT}),\n"
            f"{_INDENT}outputs=(\n{ports['outputs']}{_INDENT}),\n"
            f"{_INDENT}graph=graph,\n"
            ")\n"
        )

    def archive(self) -> bytes:
        """The file constants.npz; the same bytes for the same graph."""
        buffer = io.BytesIO()
        np.savez(buffer, **self._constants)  # type: ignore[arg-type]
        return buffer.getvalue()

    # ------------------------------------------------------------------------------- operands

    def _named(self, data: Array, *name: str) -> str:
        """The name of a constant as a Python string; equal constants are one."""
        key = digest(data)
        if key not in self._known:
            self._known[key] = self._constant_names.fresh("c", *name)
            self._constants[self._known[key]] = data
        return repr(self._known[key])

    def _operand(self, value: Value) -> str:
        if value.const is not None:
            return f"q.constant({self._named(value.const, value.name)})"
        return self.names[value]

    def _constant(self, value: Value) -> str:
        return self._named(value.constant, value.name)

    # ------------------------------------------------------------------------------ operators

    def _line(self, node: Node) -> str:
        if isinstance(node.op, ops.Conv | ops.MaxPool | ops.SumPool):
            spatial = len(node.inputs[0].type.shape) - 2
            if spatial > _MOST_SPATIAL:
                raise Unsupported(
                    f"{node.name}: a window over {spatial} axes is more than TVM's {_MOST_SPATIAL}"
                )
        arguments = self._arguments(node)
        call = f"{_INDENT}{self.names[node.output]} = q.{_METHODS[type(node.op)]}("
        line = f"{call}{', '.join(arguments)})\n"
        if len(line) <= _WIDTH:
            return line
        inner = "".join(f"{_INDENT * 2}{argument},\n" for argument in arguments)
        return f"{call}\n{inner}{_INDENT})\n"

    def _arguments(self, node: Node) -> list[str]:
        """Operands first, then attributes by name."""
        op, (first, *others) = node.op, node.inputs
        x = self._operand(first)
        match op:
            case ops.Conv() | ops.MatMul():
                return [x, *map(self._constant, others), *_attributes(op)]
            case ops.Lut():
                return [x, *map(self._constant, others), f"lowest={first.type.dtype.lo}"]
            case ops.Softmax(out=out):
                table = self._constant(others[0])
                return [x, table, f"bits={out.bits}", _dtype(node.output.type)]
            case ops.Rescale():
                return self._rescale(node, op)
            case ops.Take(axis=axis, indices=indices):
                places = self._named(np.array(indices, np.int32), node.output.name, "indices")
                return [x, places, f"axis={axis}"]
            case ops.Normalize(out=out):
                own = (f for f in _attributes(op) if not f.startswith("out="))
                return [x, *own, f"bits={out.bits}", _dtype(node.output.type)]
            case ops.Reshape():
                return [x, f"shape={node.output.type.shape}"]
            case _:
                return [x, *map(self._operand, others), *_attributes(op)]

    def _rescale(self, node: Node, op: ops.Rescale) -> list[str]:
        shape, name = op.parameter_shape(node.output.type.shape), node.output.name
        operands = [self._operand(v) for v in node.inputs]

        def number(entries: tuple[int, ...], role: str) -> str:
            """An integer, or the name of a row shaped to the operands."""
            if len(entries) == 1:
                return str(entries[0])
            return self._named(np.array(entries, np.int32).reshape(shape), name, role)

        accs = [
            f"({x}, {number(a.pre_shift, 'shift')}, {number(a.multiplier, 'multiplier')})"
            for x, a in zip(operands, op.accs, strict=False)
        ]
        vals = [
            f"({x}, {v.zero_point}, {number(v.multiplier, 'multiplier')})"
            for x, v in zip(operands[len(accs) :], op.vals, strict=True)
        ]
        return [
            f"[{', '.join(accs)}]",
            f"[{', '.join(vals)}]",
            f"f={number(op.f, 'f')}",
            f"zero_point={op.zero_point}",
            f"low={op.lo}",
            f"high={op.hi}",
            _dtype(node.output.type),
        ]


def _attributes(op: ops.Op) -> list[str]:
    return [f"{f.name}={getattr(op, f.name)!r}" for f in fields(op)]


def _dtype(kind: TensorType) -> str:
    return f"dtype={str(kind.dtype.numpy)!r}"
