"""Sliding windows over channels-last tensors: extents, index expressions and the checks a border needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompile.errors import Unsupported
from qcompile.ir import Node, Value, ops

from .kernel import Step, strides
from .nest import Nest, merged, named, row_major
from .text import affine


@dataclass(frozen=True, slots=True)
class Tap:
    """One kernel position of an axis: variable and expression of its input position, index, border checks."""

    name: str
    position: str
    index: str
    inside: list[str]


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis: input, output and kernel extents, stride, first pad, dilation; `letter` names its variables."""

    size: int
    out: int
    kernel: int
    stride: int
    pad: int
    dilation: int
    letter: str

    @property
    def o(self) -> str:
        """Output position."""
        return f"o{self.letter}" if self.out > 1 else "0"

    @property
    def k(self) -> str:
        """Kernel position."""
        return f"k{self.letter}" if self.kernel > 1 else "0"

    @property
    def start(self) -> str:
        """Input position of the window's first tap."""
        return affine([(self.o, self.stride)], -self.pad)

    @property
    def position(self) -> str:
        """Input position of tap `k`."""
        return affine([(self.o, self.stride), (self.k, self.dilation)], -self.pad)

    @property
    def i(self) -> str:
        """The variable that holds `position`."""
        return f"i{self.letter}" if self.position != "0" else "0"

    @property
    def inside(self) -> list[str]:
        """The conditions on `i` under which a tap is not in the border; none where it never is."""
        return self._within(self.i, 0, self.kernel - 1)

    @property
    def fits(self) -> bool:
        """Can all taps lie beside the border at once?"""
        return (self.kernel - 1) * self.dilation < self.size

    def run(self, first: str) -> list[str]:
        """The conditions on the variable `first`, the first tap's position, under which no tap is in the border."""
        reach = (self.kernel - 1) * self.dilation
        low = [f"{first} >= 0"] if self.pad else []
        high = (self.out - 1) * self.stride - self.pad + reach >= self.size
        return [*low, *([f"{first} < {self.size - reach}"] if high else [])]

    def unrolled(self) -> list[Tap]:
        """Every tap with a variable of its own."""
        taps = []
        for k in range(self.kernel):
            position = affine([(self.o, self.stride)], k * self.dilation - self.pad)
            name = f"i{self.letter}{k}" if position != "0" else "0"
            taps.append(Tap(name, position, str(k), self._within(name, k, k)))
        return taps

    def looped(self) -> list[Tap]:
        """One tap for the body of a loop over `k`."""
        return [Tap(self.i, self.position, self.k, self.inside)]

    def ahead(self, written: int, read: int) -> int | None:
        """How far writing `written` bytes an output position runs ahead of reading, at most; None if nothing is read.

        `read` are the bytes of an input position. What counts is each window's first tap outside the border.
        """
        most: int | None = None
        for o in range(self.out):
            start = o * self.stride - self.pad
            skipped = -(min(start, 0) // self.dilation)
            first = start + skipped * self.dilation
            if skipped < self.kernel and first < self.size:
                lead = o * written - first * read
                most = lead if most is None else max(most, lead)
        return most

    def _within(self, name: str, first: int, last: int) -> list[str]:
        low = first * self.dilation - self.pad < 0
        high = (self.out - 1) * self.stride + last * self.dilation - self.pad >= self.size
        return [*([f"{name} >= 0"] if low else []), *([f"{name} < {self.size}"] if high else [])]


@dataclass(frozen=True, slots=True)
class Window:
    """A window over [rows of the batch, height, width, channels]; over one axis alone (`flat`), the height is 1."""

    batch: int
    channels: int
    y: Axis
    x: Axis
    flat: bool

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.y.kernel * self.x.kernel

    @property
    def variables(self) -> tuple[str, ...]:
        """Loop variables over the result's axes before the channels."""
        return ("n", "ox") if self.flat else ("n", "oy", "ox")

    def distance(self, written: int, read: int) -> int:
        """The least number of bytes by which the operand must begin after the result, to be read before overwritten.

        Both are walked through in raster order, `written` and `read` bytes a pixel; each pixel is read for before it
        is written. This is exact for one pixel at a time; more at a time only read earlier.
        """
        row = written * self.x.out, read * self.x.size
        down, across = self.y.ahead(*row), self.x.ahead(written, read)
        if down is None or across is None:
            return 0
        image = row[0] * self.y.out - row[1] * self.y.size
        return max(0, max(0, (self.batch - 1) * image) + down + across)

    def source(self, y: str, x: str, *more: tuple[str, int]) -> str:
        """Index of the first channel at an input position."""
        line = self.x.size * self.channels
        n = "n" if self.batch > 1 else "0"
        return affine([(n, self.y.size * line), (y, line), (x, self.channels), *more])


def _window(
    node: Node,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> Window:
    """The window of a node over its first operand; Unsupported for three or more spatial axes."""
    x, out = node.inputs[0].type.shape, node.output.type.shape
    rank = len(kernel)
    if rank > 2:
        raise Unsupported(
            f"{node.name}: {type(node.op).__name__} over {rank} spatial axes has no C kernel;"
            " one and two axes have"
        )
    axes = [
        Axis(x[1 + i], out[1 + i], kernel[i], strides[i], pads[i], dilations[i], letter)
        for i, letter in enumerate("yx"[2 - rank :])
    ]
    row = Axis(1, 1, 1, 1, 0, 1, "y")
    return Window(x[0], x[-1], axes[0] if rank == 2 else row, axes[-1], rank == 1)


def window_of(node: Node) -> Window:
    """The window of a Conv or a pooling."""
    match node.op:
        case ops.Conv(strides=strides, pads=pads, dilations=dilations):
            return _window(node, node.inputs[1].type.shape[1:-1], strides, pads, dilations)
        case ops.MaxPool(kernel=kernel, strides=strides, pads=pads, dilations=dilations):
            return _window(node, kernel, strides, pads, dilations)
        case ops.SumPool(kernel=kernel, strides=strides, pads=pads):
            return _window(node, kernel, strides, pads, (1,) * len(kernel))
        case _:
            raise TypeError(f"{node.name} has no window")


def pixels(step: Step, geometry: Window | None) -> Nest:
    """Loops over the result's pixels; indices are those of channel `c`, and of the pixel's row for `x` of a MatMul."""
    shape, operands = step.output.type.shape, strides(step)
    if geometry is not None:
        lead = named(shape[:-1], geometry.variables, {k: s[:-1] for k, s in operands.items()})
    else:
        operands["x"] = (*row_major(step.node.inputs[0].type.shape)[:-1], 0)
        lead = merged(shape[:-1], {k: s[:-1] for k, s in operands.items()})
    indices = {k: affine([(index, 1), ("c", operands[k][-1])]) for k, index in lead.at.items()}
    return Nest(lead.loops, indices)


def trails(step: Step) -> Mapping[Value, int]:
    """Operands that a kernel in raster order may overlap with its result, and how far behind it they must begin."""
    node, out = step.node, step.output.type
    width = out.dtype.bytes
    match node.op:
        case ops.Conv() | ops.MaxPool() | ops.SumPool():
            x, geometry = node.inputs[0], window_of(node)
            read = geometry.channels * x.type.dtype.bytes
            return {x: geometry.distance(out.shape[-1] * width, read)}
        case ops.MatMul():
            x = node.inputs[0]
            more = out.shape[-1] * width - x.type.shape[-1] * x.type.dtype.bytes
            return {x: max(0, (out.size // out.shape[-1] - 1) * more)}
        case ops.Rescale() | ops.Mul() | ops.Lut() | ops.Extreme():
            same = (v for v in step.reads if v.type.shape == out.shape)
            return {v: max(0, (out.size - 1) * (width - v.type.dtype.bytes)) for v in same}
        case _:
            return {}
