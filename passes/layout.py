"""Which axis of a float tensor stands where in the integer graph.

Windows want channels last, everything else takes tensors as they stand. A Transpose of the float model is only
remembered; a Flatten too, so that the weights behind it are permuted instead of the tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from qcompile.errors import Unsupported
from qcompile.integerized import Origin
from qcompile.ir import Graph, Reshape, Transpose, Value


@dataclass(frozen=True, slots=True)
class Carried:
    """A float tensor inside the integer graph: axis i of `value` is float axis axes[i].

    With `flat`, the float tensor is [N, K]: the axes of `value` in float order, all but the batch joined.
    """

    value: Value
    axes: tuple[int, ...]
    flat: bool = False

    @property
    def rank(self) -> int:
        """The rank of the float tensor."""
        return 2 if self.flat else len(self.axes)


def channels_last(rank: int) -> tuple[int, ...]:
    """Batch, spatial axes, channels; what has no spatial axes stays."""
    return (0, *range(2, rank), 1) if rank > 2 else tuple(range(rank))


@dataclass(slots=True)
class Layout:
    """Every float tensor that the graph computes, and the other axis orders made of it so far."""

    graph: Graph
    origins: dict[str, Origin] = field(default_factory=dict)
    _carried: dict[str, Carried] = field(default_factory=dict)
    _moved: dict[tuple[Value, tuple[int, ...]], Value] = field(default_factory=dict)
    _joined: dict[Value, Value] = field(default_factory=dict)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._carried

    def __getitem__(self, tensor: str) -> Carried:
        return self._carried[tensor]

    def hold(self, tensor: str, carried: Carried) -> None:
        """Remember a tensor; the first name a value gets is the one it is measured under."""
        self._carried[tensor] = carried
        if not carried.flat:
            self.origins.setdefault(carried.value.name, Origin(tensor, carried.axes))

    def plain(self, tensor: str) -> Carried:
        """The tensor with its Flatten carried out."""
        held = self._carried[tensor]
        if not held.flat:
            return held
        value = self._in_order(held, tuple(range(len(held.axes))), f"{tensor}:plain")
        return Carried(self._join(value, tensor), (0, 1))

    def want(self, tensor: str, axes: tuple[int, ...]) -> Value:
        """The tensor with its axes in the wanted order, moved where they have to be."""
        return self._in_order(self.plain(tensor), axes, tensor)

    def rows(self, tensor: str) -> tuple[Value, tuple[int, ...] | None]:
        """A tensor for a product over its last axis, and the float index of each position of that axis if flattened."""
        held = self._carried[tensor]
        if not held.flat:
            return self.want(tensor, tuple(range(held.rank))), None
        sizes = [held.value.type.shape[held.axes.index(a)] for a in range(1, len(held.axes))]
        index = np.arange(math.prod(sizes)).reshape(sizes)
        order = index.transpose([a - 1 for a in held.axes[1:]]).ravel()
        return self._join(held.value, tensor), tuple(int(i) for i in order)

    def reshape(
        self, tensor: str, rows: int | None, rest: tuple[int, ...], name: str, layer: str
    ) -> Carried:
        """The tensor in rows of another shape; a Flatten of moved axes is put off."""
        held = self._carried[tensor]
        size = math.prod(rest)
        count = held.value.type.size // size
        if count * size != held.value.type.size or rows not in (None, count):
            raise Unsupported(
                f"node {layer}: a Reshape that mixes samples of the batch has no integer form; keep the batch axis"
            )
        shape = count, *rest
        if _sizes(held) == shape:
            return held
        order = [a for a, n in zip(held.axes, held.value.type.shape, strict=True) if n != 1]
        moved = order != sorted(order)
        if moved and not held.flat and (count, len(rest)) == (_sizes(held)[0], 1):
            return Carried(held.value, held.axes, flat=True)
        value = self.want(tensor, tuple(range(held.rank))) if moved or held.flat else held.value
        axes = tuple(range(len(shape)))
        if value.type.shape == shape:
            return Carried(value, axes)
        made = self.graph.add(Reshape((-1, *rest)), value, name=name, layer=layer)
        return Carried(made, axes)

    def _join(self, value: Value, name: str) -> Value:
        """All axes but the batch as one."""
        if value not in self._joined:
            size = math.prod(value.type.shape[1:])
            self._joined[value] = self.graph.add(Reshape((-1, size)), value, name=name)
        return self._joined[value]

    def _in_order(self, held: Carried, axes: tuple[int, ...], name: str) -> Value:
        if held.axes == axes:
            return held.value
        perm = tuple(held.axes.index(a) for a in axes)
        assert perm[0] == 0, "what moves the batch axis is refused before"
        key = held.value, perm
        if key not in self._moved:
            moving = [p for p in perm if held.value.type.shape[p] != 1]
            shape = tuple(held.value.type.shape[p] for p in perm)
            op = Reshape((-1, *shape[1:])) if moving == sorted(moving) else Transpose(perm)
            self._moved[key] = self.graph.add(op, held.value, name=name)
        return self._moved[key]


def _sizes(held: Carried) -> tuple[int, ...]:
    """The shape of the float tensor."""
    shape = held.value.type.shape
    if held.flat:
        return shape[0], math.prod(shape[1:])
    return tuple(shape[held.axes.index(a)] for a in range(len(shape)))
