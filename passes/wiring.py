"""Which channels of a network are tied together, and where a scale or a shift of them goes in and out.

Channels that an Add, a pool, a Concat or a move of values ties together share one scale: they are connected components
over (tensor, channel). What makes a component's values multiplies its weights by the scale, what reads them divides.
A component is left alone where it touches an input, an output, a function that is not positively homogeneous, or
weights that several nodes share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import Unsupported
from qcompile.onnx.edit import constant, dims, operand, sole_use
from qcompile.onnx.weights import kept

from .layers import Clamp, sole_consumer
from .linear import floats, is_linear
from .views import Cut, Framed, Permuted, Reshaped, move

Doubles = NDArray[np.float64]
Indices = NDArray[np.intp]
Mask = NDArray[np.bool_]

_UNBOUNDED = 3e38
_UNCLAMPED = Clamp()

_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "PRelu", "Abs", "Neg", "Identity"})
"""f(s x) = s f(x) for s > 0."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A Conv, Gemm or MatMul whose weights are its own, where a scale goes in or out.

    `x` is None where the operand has no channels that the weights could undo. `bias` is None where there is none;
    `shiftable` says that it is there and nobody else's.
    """

    node: ir.Node
    x: str | None
    weight: ir.Value
    bias: ir.Value | None
    out: str
    groups: int
    shiftable: bool

    def matrix(self) -> NDArray[np.float32]:
        """Weights as [groups, outputs, inputs, taps]."""
        w = floats(self.weight)
        assert w is not None
        if self.node.op_type == "MatMul":
            w = w.T
        return w.reshape(self.groups, w.shape[0] // self.groups, w.shape[1], -1)

    @property
    def depthwise(self) -> bool:
        """Does every output channel read one input channel?"""
        return int(self.matrix().shape[2]) == 1

    def put(self, matrix: NDArray[np.float32]) -> None:
        """Replace the weights, given as by `matrix`."""
        old = floats(self.weight)
        assert old is not None
        transposed = self.node.op_type == "MatMul"
        put_array(
            self.weight, matrix.reshape(old.T.shape).T if transposed else matrix.reshape(old.shape)
        )


@dataclass(frozen=True, slots=True)
class Flow:
    """Channel ys[k] of `y` holds what channel xs[k] of `x` held: moved, pooled or clamped."""

    x: str
    y: str
    xs: Indices
    ys: Indices
    clamp: Clamp = _UNCLAMPED

    @property
    def unclamped(self) -> bool:
        """Does the channel pass whole?"""
        return self.clamp == _UNCLAMPED

    @property
    def scalable(self) -> bool:
        """Does the clamp do the same at every scale?"""
        return self.clamp.lo in (None, 0.0) and self.clamp.hi in (None, 0.0)


@dataclass(frozen=True, slots=True)
class Sum:
    """y = a + sign * b, channel by channel; `spare` is the operand made for this sum alone by weights with a bias."""

    a: str
    b: str
    y: str
    sign: int
    spare: str | None


class Wiring:
    """Where the channels of a canonical float model come from and go to.

    `axis`, `rank` and `size` know every tensor that weights make, directly or through other operators; channels
    marked in `fixed` keep their scale, those in `still` get no shift.
    """

    def __init__(self, model: ir.Model) -> None:
        self.axis: dict[str, int] = {}
        self.rank: dict[str, int] = {}
        self.size: dict[str, int] = {}
        self.linears: list[Linear] = []
        self.flows: list[Flow] = []
        self.sums: list[Sum] = []
        self.fixed: dict[str, Mask] = {}
        self.still: dict[str, Mask] = {}
        self._model = model
        self._made: dict[str, int] = {}
        absorbed: set[ir.Node] = set()
        for node in model.graph:
            if node not in absorbed:
                absorbed |= self._node(node)
        for value in model.graph.outputs:
            self.fix(str(value.name))

    def fix(self, name: str) -> None:
        """The tensor keeps its values."""
        if name in self.axis:
            self.fixed[name][:] = True
            self.still[name][:] = True

    def classes(self, flows: Iterable[Flow], sums: Iterable[Sum]) -> tuple[dict[str, Indices], int]:
        """The component of every channel of every tensor, and how many components there are."""
        graph: nx.Graph[tuple[str, int]] = nx.Graph()
        graph.add_nodes_from((name, c) for name, n in self.size.items() for c in range(n))
        for f in flows:
            pairs = zip(f.xs.tolist(), f.ys.tolist(), strict=True)
            graph.add_edges_from(((f.x, i), (f.y, j)) for i, j in pairs)
        for s in sums:
            for operand_ in (s.a, s.b):
                graph.add_edges_from(((operand_, c), (s.y, c)) for c in range(self.size[s.y]))
        number = {unit: k for k, part in enumerate(nx.connected_components(graph)) for unit in part}
        found = {
            name: np.array([number[name, c] for c in range(n)], np.intp)
            for name, n in self.size.items()
        }
        return found, nx.number_connected_components(graph)

    def groups(self) -> list[set[str]]:
        """Tensors that cannot be rewritten one without the other."""
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from(self.axis)
        graph.add_edges_from((f.x, f.y) for f in self.flows)
        graph.add_edges_from((x, s.y) for s in self.sums for x in (s.a, s.b))
        return list(nx.connected_components(graph))

    # --- one node after the other -------------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> set[ir.Node]:
        """Enter a node; return the nodes behind it that are part of it."""
        x, y = operand(node, 0), node.outputs[0]
        if len(node.outputs) == 1 and x is not None:
            match node.domain, node.op_type:
                case "", "Conv" | "Gemm" | "MatMul" if (found := self._linear(node)) is not None:
                    return found
                case "", "Add" | "Sub" if self._sum(node):
                    return set()
                case "", "Identity":
                    self._follow(x, y)
                    return set()
                case "", "Relu" | "Clip" if (clamp := _clamp(node)) is not None:
                    self._follow(x, y, clamp=clamp)
                    return set()
                case _ if _homogeneous(self._model, node):
                    self._follow(x, y, still=True)
                    return set()
                case "", "MaxPool" | "AveragePool" | "GlobalAveragePool" if self._is(x, 1):
                    counted = node.attributes.get_int("count_include_pad", 0)
                    self._follow(x, y, still=bool(counted))
                    return set()
                case "", "Concat" if self._concat(node):
                    return set()
                case "", "Reshape" | "Transpose" | "Slice" | "Pad" if self._move(node, x, y):
                    return set()
        for value in node.inputs:
            if value is not None:
                self.fix(str(value.name))
        return set()

    def _is(self, value: ir.Value, axis: int) -> bool:
        return self.axis.get(str(value.name)) == axis

    def _track(self, value: ir.Value, axis: int, size: int) -> str:
        name = str(value.name)
        self.axis[name], self.rank[name], self.size[name] = axis, len(dims(value) or ()), size
        self.fixed[name], self.still[name] = np.zeros(size, bool), np.zeros(size, bool)
        return name

    def _follow(
        self,
        x: ir.Value,
        y: ir.Value,
        xs: Indices | None = None,
        ys: Indices | None = None,
        *,
        axis: int | None = None,
        size: int | None = None,
        clamp: Clamp = _UNCLAMPED,
        still: bool = False,
    ) -> None:
        """`y` holds channels of `x`, by default all of them on the same axis."""
        name = str(x.name)
        if name not in self.axis:
            return
        every = np.arange(self.size[name])
        xs, ys = every if xs is None else xs, every if ys is None else ys
        made = self._track(
            y, self.axis[name] if axis is None else axis, self.size[name] if size is None else size
        )
        self.flows.append(Flow(name, made, xs, ys, clamp))
        if still:
            self.still[name][:] = True
            self.still[made][:] = True

    def _linear(self, node: ir.Node) -> set[ir.Node] | None:
        x, weight, bias, out = node.inputs[0], operand(node, 1), operand(node, 2), node.outputs[0]
        if not is_linear(node) or x is None or weight is None or not sole_use(weight):
            return None
        w = floats(weight)
        assert w is not None
        absorbed: set[ir.Node] = set()
        outputs, axis = w.shape[0], 1
        if node.op_type == "MatMul":
            outputs, axis = w.shape[1], len(dims(out) or ()) - 1
            user = sole_consumer(out)
            if user is not None and not user.domain and user.op_type == "Add":
                other = user.inputs[1] if user.inputs[0] is out else user.inputs[0]
                row = floats(other)
                if row is not None and row.size == outputs and row.shape[-1:] == (outputs,):
                    absorbed, bias, out = {user}, other, user.outputs[0]
        groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        name, made = str(x.name), self._track(out, axis, outputs)
        # a bias of zeros may have many readers: no scale changes it
        mine = bias is not None and sole_use(bias)
        numbers = floats(bias)
        if numbers is not None and numbers.any() and not mine:
            self.fix(made)
        reads = self.axis.get(name) == axis and self.size[name] == w.shape[1 - (axis > 1)] * groups
        if not reads:
            self.fix(name)
        elif not mine or any(node.attributes.get_ints("pads") or ()):
            # a border of zeros would be a border of shifts
            self.still[name][:] = True
        if not mine:
            self.still[made][:] = True
        self._made[made] = len(self.linears)
        self.linears.append(Linear(node, name if reads else None, weight, bias, made, groups, mine))
        return absorbed

    def _sum(self, node: ir.Node) -> bool:
        a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
        if a is None or b is None:
            return False
        left, right = str(a.name), str(b.name)
        both = left in self.axis and right in self.axis
        if not both or any(t[left] != t[right] for t in (self.axis, self.rank, self.size)):
            return False
        made = self._track(y, self.axis[left], self.size[left])
        # the operand made last is the one that stays in its accumulator (layers.py)
        alone = [
            n
            for v, n in ((a, left), (b, right))
            if n in self._made and sole_use(v) and not self.still[n].any()
        ]
        spare = max(alone, key=lambda n: self._made[n], default=None)
        if spare is None:
            for n in (left, right, made):
                self.still[n][:] = True
        self.sums.append(Sum(left, right, made, -1 if node.op_type == "Sub" else 1, spare))
        return True

    def _concat(self, node: ir.Node) -> bool:
        xs = [v for v in node.inputs if v is not None]
        y, along = node.outputs[0], node.attributes.get_int("axis", 0)
        known = [v for v in xs if str(v.name) in self.axis]
        axes = {self.axis[str(v.name)] for v in known}
        if len(axes) != 1 or len(xs) != len(node.inputs):
            return False
        axis = axes.pop()
        sizes = [d[axis] for v in xs if (d := dims(v)) is not None and len(d) > axis]
        if len(sizes) != len(xs) or not all(isinstance(n, int) for n in sizes):
            return False
        widths = [int(n) for n in sizes if isinstance(n, int)]
        if along != axis and (len(known) != len(xs) or len(set(widths)) != 1):
            return False
        made = self._track(y, axis, sum(widths) if along == axis else widths[0])
        start = 0
        for value, width in zip(xs, widths, strict=True):
            every, name = np.arange(width), str(value.name)
            if name in self.axis:
                self.flows.append(Flow(name, made, every, every + start))
            else:
                self.fixed[made][start : start + width] = True
                self.still[made][start : start + width] = True
            start += width if along == axis else 0
        return True

    def _move(self, node: ir.Node, x: ir.Value, y: ir.Value) -> bool:
        name = str(x.name)
        if name not in self.axis:
            return False
        axis, size = self.axis[name], self.size[name]
        try:
            found = move(node)
        except Unsupported:
            return False
        every = np.arange(size)
        match found:
            case Permuted(perm):
                self._follow(x, y, axis=perm.index(axis))
            case Cut(starts, ends, steps):
                cut = every[starts[axis - 1] : ends[axis - 1] : steps[axis - 1]]
                self._follow(x, y, cut, np.arange(len(cut)), size=len(cut))
            case Framed(begins, ends, value) if value == 0:
                before, after = begins[axis - 1], ends[axis - 1]
                self._follow(x, y, every, every + before, size=before + size + after, still=True)
            case Reshaped(_, rest):
                held = _reshaped(x, axis, size, rest)
                if held is None:
                    return False
                self._follow(
                    x, y, held[1], np.arange(len(held[1])), axis=held[0], size=len(held[1])
                )
            case _:
                return False
        return True


def _reshaped(
    x: ir.Value, axis: int, size: int, rest: tuple[int, ...]
) -> tuple[int, Indices] | None:
    """The axis of the reshaped rows whose every index holds one channel of `x`, and which."""
    shape = [1, *(d if isinstance(d, int) else 0 for d in (dims(x) or ())[1:])]
    if math.prod(shape) != math.prod(rest) or not math.prod(rest):
        return None
    row = np.arange(size).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    held = np.broadcast_to(row, shape).reshape(rest)
    fits: list[tuple[int, Indices]] = []
    for i, n in enumerate(rest):
        lines = np.moveaxis(held, i, 0).reshape(n, -1)
        if (lines == lines[:, :1]).all():
            fits.append((i + 1, lines[:, 0].copy()))
    return min(fits, key=lambda f: len(f[1]) != size, default=None)


def _clamp(node: ir.Node) -> Clamp | None:
    if node.op_type == "Relu":
        return Clamp(0.0, None)
    bounds: list[float | None] = []
    for i in (1, 2):
        value = floats(operand(node, i))
        if operand(node, i) is not None and (value is None or value.size != 1):
            return None
        b = None if value is None else float(value.reshape(-1)[0])
        bounds.append(None if b is None or abs(b) > _UNBOUNDED else b)
    return Clamp(bounds[0], bounds[1])


def _homogeneous(model: ir.Model, node: ir.Node) -> bool:
    """Is a node, or are all nodes of the function it calls, positively homogeneous in the first operand?"""
    if node.domain:
        function = model.functions.get(node.op_identifier())
        inner = [] if function is None else [n for n in function if n.op_type != "Constant"]
        return bool(inner) and all(_homogeneous(model, n) for n in inner)
    return node.op_type in _HOMOGENEOUS and all(_constant(v) for v in node.inputs[1:])


def _constant(value: ir.Value | None) -> bool:
    if value is None or constant(value) is not None:
        return True
    made = value.producer()
    return made is not None and made.op_type == "Constant"


def put_array(value: ir.Value, array: NDArray[np.float32]) -> None:
    """Give an initializer another value under its old name."""
    value.const_value = kept(array, str(value.name))
