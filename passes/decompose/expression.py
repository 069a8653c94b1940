"""Float operators written as expressions: each call puts one node, with its shape, in front of the node it replaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import Unsupported
from qcompile.onnx.edit import Array, Dims, Editor, constant, dims, operand, reshape_target
from qcompile.plan import TIED

Floats = NDArray[np.floating]


class Expression:
    """Makes what stands for one node; all axes count from the front, the leading one may be open."""

    def __init__(self, node: ir.Node, editor: Editor) -> None:
        self.node = node
        self.editor = editor
        self.hint = node.name or node.op_type

    def refuse(self, why: str) -> Unsupported:
        """The error that names the node."""
        return Unsupported(f"node {self.hint}: {self.node.op_type} {why}")

    # --- what the node says -------------------------------------------------------------------------------------

    def input(self, index: int) -> ir.Value:
        """An operand that must be there."""
        value = operand(self.node, index)
        if value is None:
            raise self.refuse(f"without its operand {index}")
        return value

    def constant(self, index: int, what: str) -> Array | None:
        """An operand's numbers, None where it is left out; refused where it is computed."""
        value = operand(self.node, index)
        if value is None:
            return None
        array = constant(value)
        if array is None:
            raise self.refuse(f"with {what} computed at run time; make it a constant")
        return array

    def integers(self, index: int, what: str) -> list[int] | None:
        """A constant operand as a list of integers."""
        array = self.constant(index, what)
        return None if array is None else [int(i) for i in array.reshape(-1).tolist()]

    def shape(self, value: ir.Value) -> Dims:
        """The dimensions of a value."""
        found = dims(value)
        if found is None:
            raise self.refuse(f"reads {value.name}, whose rank is unknown")
        return found

    def sizes(self, value: ir.Value) -> tuple[int, ...]:
        """The dimensions, which must all be numbers."""
        return tuple(self.size(value, axis) for axis in range(len(self.shape(value))))

    def size(self, value: ir.Value, axis: int) -> int:
        """One dimension, which must be a number."""
        shape = self.shape(value)
        if axis >= len(shape):
            raise self.refuse(f"reads {value.name}, which has only {len(shape)} axes")
        n = shape[axis]
        if not isinstance(n, int):
            raise self.refuse(
                f"works along the open batch axis of {value.name}; fix the batch with --input-dim {n}=1"
            )
        return n

    def axis(self, default: int, value: ir.Value) -> int:
        """The attribute `axis`, counted from the front."""
        rank = len(self.shape(value))
        return self.node.attributes.get_int("axis", default) % max(rank, 1)

    # --- what stands for it -------------------------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        shape: Sequence[int | ir.SymbolicDim],
        **attributes: float | str | Sequence[int],
    ) -> ir.Value:
        """A node with one output."""
        return self.editor.before(
            self.node,
            op_type,
            inputs,
            shape,
            hint=f"{self.hint}_{op_type}",
            domain="",
            **attributes,
        )

    def floats(self, array: Floats | Sequence[float] | float, what: str) -> ir.Value:
        """A float32 constant."""
        return self.editor.const(np.asarray(array, np.float32), f"{self.hint}_{what}")

    def whole(self, numbers: Sequence[int], what: str) -> ir.Value:
        """A constant list of integers."""
        return self.editor.const(np.array(numbers, np.int64), f"{self.hint}_{what}")

    def reshape(self, x: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
        """The same values in another shape."""
        if self.shape(x) == tuple(shape):
            return x
        target = reshape_target(x, ir.Value(name=None, shape=ir.Shape(shape)))
        if target is None:
            raise self.refuse("mixes the open batch with another axis; fix it with --input-dim")
        return self.op("Reshape", x, self.whole(target, "shape"), shape=shape)

    def transpose(self, x: ir.Value, perm: Sequence[int]) -> ir.Value:
        """Axis i of the result is axis perm[i]."""
        if list(perm) == sorted(perm):
            return x
        shape = self.shape(x)
        return self.op("Transpose", x, shape=[shape[p] for p in perm], perm=tuple(perm))

    def slice(self, x: ir.Value, axis: int, start: int, end: int, step: int = 1) -> ir.Value:
        """x[start:end:step] along an axis, bounds within it."""
        shape = list(self.shape(x))
        if (start, end, step) == (0, shape[axis], 1):
            return x
        shape[axis] = -(-(end - start) // step)
        rows = [
            self.whole([n], what)
            for n, what in ((start, "starts"), (end, "ends"), (axis, "axes"), (step, "steps"))
        ]
        return self.op("Slice", x, *rows, shape=shape)

    def take(self, x: ir.Value, axis: int, indices: Sequence[int]) -> ir.Value:
        """The entries at `indices`, all within the axis, in their order: a Slice where they are evenly spaced."""
        if evenly_spaced(indices):
            step = indices[1] - indices[0] if len(indices) > 1 else 1
            return self.slice(x, axis, indices[0], indices[-1] + 1, step)
        shape = list(self.shape(x))
        shape[axis] = len(indices)
        return self.op("Gather", x, self.whole(indices, "indices"), shape=shape, axis=axis)

    def concat(self, xs: Sequence[ir.Value], axis: int) -> ir.Value:
        """One after the other."""
        if len(xs) == 1:
            return xs[0]
        shape = list(self.shape(xs[0]))
        shape[axis] = sum(self.size(x, axis) for x in xs)
        return self.op("Concat", *xs, shape=shape, axis=axis)

    def pad(
        self, x: ir.Value, begins: Sequence[int], ends: Sequence[int], value: float = 0.0
    ) -> ir.Value:
        """A border of one value."""
        if not any((*begins, *ends)):
            return x
        shape = [
            n + b + e if isinstance(n, int) else n
            for n, b, e in zip(self.shape(x), begins, ends, strict=True)
        ]
        widths = self.whole([*begins, *ends], "pads")
        return self.op("Pad", x, widths, self.floats(value, "value"), shape=shape, mode="constant")

    def unary(
        self, op_type: str, x: ir.Value, **attributes: float | str | Sequence[int]
    ) -> ir.Value:
        """An operator of one tensor."""
        return self.op(op_type, x, shape=self.shape(x), **attributes)

    def binary(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """An operator of two tensors that broadcast."""
        return self.op(op_type, a, b, shape=broadcast(self.shape(a), self.shape(b)))

    def times(self, x: ir.Value, factor: Floats | float) -> ir.Value:
        """The product with a constant that broadcasts to x."""
        if (known := constant(x)) is not None:
            return self.floats(np.asarray(known, np.float32) * factor, "product")
        return self.op("Mul", x, self.floats(factor, "factor"), shape=self.shape(x))

    def plus(self, x: ir.Value, addend: Floats | float) -> ir.Value:
        """The sum with a constant that broadcasts to x."""
        if (known := constant(x)) is not None:
            return self.floats(np.asarray(known, np.float32) + addend, "sum")
        return self.op("Add", x, self.floats(addend, "addend"), shape=self.shape(x))

    def matmul(self, x: ir.Value, weight: Floats | ir.Value) -> ir.Value:
        """The last axis of x times a constant matrix [K, M]."""
        matrix = weight if isinstance(weight, ir.Value) else self.floats(weight, "weight")
        known, numbers = constant(x), constant(matrix)
        if known is not None and numbers is not None:
            return self.floats(
                np.asarray(known, np.float32) @ np.asarray(numbers, np.float32), "product"
            )
        return self.op("MatMul", x, matrix, shape=(*self.shape(x)[:-1], self.size(matrix, 1)))

    def tied(self, x: ir.Value, role: str) -> ir.Value:
        """The tensor, which is to share its scale with all others of this role."""
        x.metadata_props[TIED] = f"{self.hint} {role}"
        return x

    def spread(self, x: ir.Value, shape: Sequence[int | ir.SymbolicDim]) -> ir.Value:
        """The tensor broadcast to `shape`, entries of size 1 repeated."""
        have = self.shape(x)
        x = self.reshape(x, (1,) * (len(shape) - len(have)) + have)
        for axis, n in enumerate(shape):
            if self.shape(x)[axis] != n:
                if not isinstance(n, int):
                    raise self.refuse("spreads one row over an open batch")
                x = self.take(x, axis, [0] * n)
        return x


def evenly_spaced(indices: Sequence[int]) -> bool:
    """Does each index lie equally far, and forward, from the one before?"""
    steps = {b - a for a, b in pairwise(indices)}
    return len(steps) <= 1 and min(steps, default=1) > 0


def broadcast(a: Dims, b: Dims) -> Dims:
    """The shape of an element-wise result of two shapes that fit."""
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(q if p == 1 else p for p, q in zip(a, b, strict=True))


def volume(shape: Sequence[int | ir.SymbolicDim]) -> int:
    """The product of numbers."""
    return math.prod(n for n in shape if isinstance(n, int))
