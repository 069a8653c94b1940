"""What qdq.onnx says of the integer graph: which tensor is which value, and how many codes apart the two may be.

It stands in `metadata_props` under `qcompile.links`, as JSON of `Links`. The bound of a layer holds where the layer
reads the same codes on both sides (`qcompile.foreign.bound`); end to end there is none, because roundings that went the
other way add up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.integerized import Integerized
from qcompile.ir import Array, Lut, Normalize, Port, Rescale, Softmax, Value
from qcompile.plan import QuantPlan

KEY = "qcompile.links"
_MOST_STEPS = 1 << 24


@dataclass(frozen=True, slots=True)
class Grid:
    """How a tensor reads as codes: axis i of the codes is its axis axes[i], real = scale * (code - zero_point)."""

    tensor: str
    axes: tuple[int, ...]
    scale: float
    zero_point: int
    lo: int
    hi: int

    def codes(self, real: NDArray[np.floating]) -> NDArray[np.int64]:
        """The nearest codes, saturated, in the order of the integer graph; ValueError where there are none."""
        moved = real.transpose(self.axes).astype(np.float64)
        if not np.isfinite(moved).all():
            raise ValueError(f"{self.tensor} is not finite")
        near = np.clip(np.rint(moved / self.scale) + self.zero_point, self.lo, self.hi)
        codes: NDArray[np.int64] = near.astype(np.int64)
        return codes

    def real(self, codes: Array) -> NDArray[np.float32]:
        """The numbers of codes, in the order of the model."""
        real = (codes.astype(np.float64) - self.zero_point) * self.scale
        return np.ascontiguousarray(real.transpose(np.argsort(self.axes)), np.float32)


@dataclass(frozen=True, slots=True)
class Link:
    """A value of the integer graph that the model computes too, at most `slack` codes apart given the same operands."""

    value: str
    slack: int
    grid: Grid


@dataclass(frozen=True, slots=True)
class Links:
    """The model's inputs and outputs in the order of the graph's ports, and its layers in order of execution."""

    inputs: tuple[Grid, ...]
    outputs: tuple[Grid, ...]
    layers: tuple[Link, ...]


def write(
    model: onnx.ModelProto, done: Integerized, plan: QuantPlan, *, channels_last: bool
) -> None:
    """Note in a model that `qcompile.onnx.qdq` made what it is to an integer graph made by the same plan."""
    computed = {name for node in model.graph.node for name in node.output}
    layers = []
    for node in done.graph.nodes:
        origin = done.origins.get(node.output.name)
        q = None if origin is None else plan.of(origin.tensor)
        if origin is None or q is None or origin.tensor not in computed:
            continue
        grid = Grid(
            origin.tensor, origin.axes, q.scale[0], q.zero_point[0], q.format.lo, q.format.hi
        )
        layers.append(Link(node.output.name, _slack(done, node.output), grid))

    def border(port: Port, value: Value, *, given: bool) -> Grid:
        rank, kind = len(value.type.shape), value.type.dtype
        last = channels_last and rank > 2
        axes = (0, *range(2, rank), 1) if last else tuple(range(rank))
        q = None if given else plan.of(port.name)
        lo, hi = (kind.lo, kind.hi) if q is None else (q.format.lo, q.format.hi)
        return Grid(port.name, axes, port.scale, port.zero_point, lo, hi)

    links = Links(
        tuple(border(port, v, given=True) for port, v in done.graph.inputs),
        tuple(border(port, v, given=False) for port, v in done.graph.outputs),
        tuple(layers),
    )
    kept = [p for p in model.metadata_props if p.key != KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    model.metadata_props.add(key=KEY, value=msgspec.json.encode(asdict(links)).decode())


def read(model: onnx.ModelProto) -> Links:
    """What a model says of itself; BadInput where it says nothing, or what cannot be."""
    found = [p.value for p in model.metadata_props if p.key == KEY]
    if len(found) != 1:
        raise BadInput("it does not say what it is to an integer graph")
    try:
        links = msgspec.json.decode(found[0], type=Links)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as e:
        raise BadInput(f"what it says of the integer graph cannot be read: {e}") from e
    for grid in (*links.inputs, *links.outputs, *(link.grid for link in links.layers)):
        steps = (grid.zero_point, grid.lo, grid.hi)
        if (
            sorted(grid.axes) != [*range(len(grid.axes))]
            or not 0 < grid.scale < np.inf
            or max(map(abs, steps)) > 1 << 31
        ):
            raise BadInput(f"what it says of tensor {grid.tensor!r} cannot be")
    if any(not 0 <= link.slack <= _MOST_STEPS for link in links.layers):
        raise BadInput("a layer's bound is out of range")
    return links


def _slack(done: Integerized, value: Value) -> int:
    """How far a value can be off, its operands that are rounded in the model being the same on both sides."""
    from qcompile.foreign.bound import bound

    node = value.producer
    match None if node is None else node.op:
        case None:
            return 0
        case Rescale():
            assert node is not None
            return bound(done, node).codes
        case Lut() | Softmax() | Normalize():
            # rounded once, from a function that is known to far less than half a step
            return 1
        case _:
            assert node is not None
            moved = (v for v in node.inputs if v.const is None and v.name not in done.origins)
            return max((_slack(done, v) for v in moved), default=0)
