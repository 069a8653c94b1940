"""MaxPool and SumPool for Helium: all channels of a pixel side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ir import Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned, ends, loops
from ..c.nest import Nest
from ..c.text import affine, at, c_type, render
from ..c.window import Axis, Window, pixels, window_of
from .mve_lanes import Row, Vectors, narrow

HERE = Path(__file__).parent
_MOST_TAPS = 256
"""So many bytes add up in 16 bits."""
_FEW_TAPS = 9
"""So many are written out."""
_MOST_LARGEST = 25


@dataclass(frozen=True)
class Largest:
    """MaxPool of bytes and int16: a tap in the border becomes its neighbour inside, which is under the window too."""

    name: str = "mve largest"
    includes: Sequence[str | Path] = ("<arm_mve.h>",)

    def matches(self, step: Step) -> bool:
        """No dilation, few taps."""
        if not isinstance(step.node.op, ops.MaxPool):
            return False
        window = window_of(step.node)
        near = window.y.dilation == window.x.dilation == 1
        return near and window.taps <= _MOST_LARGEST and step.output.type.dtype.bytes <= 2

    def cost(self, step: Step) -> int:
        """Executed instructions, fitted to counts."""
        window = window_of(step.node)
        lanes = 16 // step.output.type.dtype.bytes
        whole, left = divmod(window.channels, lanes)
        each = 2 + whole * 2 * window.taps + (left > 0) * (3 * window.taps + 1)
        if window.y.inside or window.x.inside:
            each += 5 * whole
        return 40 + window.batch * window.y.out * window.x.out * each

    def scratch(self, step: Step) -> Scratch:
        """None."""
        return Scratch()

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None: pixels are read again."""
        return ()

    def raster(self, step: Step) -> int | None:
        """One: some channels are stored before the next are read, but those lie behind, elements keeping their size."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        node = layer.step.node
        window = window_of(node)
        nest = pixels(layer.step, window)
        kind = node.output.type.dtype
        lanes = 16 // kind.bytes
        sign = "" if kind.signed else "u"
        return render(
            "mve_largest.c.j2",
            HERE,
            nest=nest,
            window=window,
            rows=_positions(window.y),
            columns=_positions(window.x),
            taps=[(r, k) for r in range(window.y.kernel) for k in range(window.x.kernel)],
            x=layer[node.inputs[0]],
            to=nest.at["y"],
            type=c_type(kind),
            kind=f"{sign or 's'}{8 * kind.bytes}",
            vector=f"{sign}int{8 * kind.bytes}x{lanes}_t",
            load="vldrbq" if kind.bytes == 1 else "vldrhq",
            store="vstrbq" if kind.bytes == 1 else "vstrhq",
            tail="vctp8q" if kind.bytes == 1 else "vctp16q",
            lanes=lanes,
            whole=window.channels // lanes * lanes,
            at=at,
            loops=loops,
            ends=ends,
        )


def _positions(axis: Axis) -> list[tuple[int, str]]:
    """Where the taps lie, those in the border moved to its edge."""
    found = []
    for k in range(axis.kernel):
        position = affine([(axis.o, axis.stride)], k - axis.pad)
        last = (axis.out - 1) * axis.stride + k - axis.pad
        if k < axis.pad or last >= axis.size:
            position = f"clamp({position}, 0, {axis.size - 1})"
        found.append((k, position))
    return found


@dataclass(frozen=True)
class Sums:
    """SumPool of bytes, with its Rescale: few taps without a border are added in registers, else sums are stored."""

    name: str = "mve sums"
    includes: Sequence[str | Path] = (HERE / "mve_pool.h",)

    def matches(self, step: Step) -> bool:
        """No window wholly in the border; sums of few enough elements for 16 bits."""
        if not isinstance(step.node.op, ops.SumPool):
            return False
        window = window_of(step.node)
        if any(_leaves(axis) for axis in (window.y, window.x)):
            return False
        return step.node.inputs[0].type.dtype.bytes == 1 and window.taps <= _MOST_TAPS

    def cost(self, step: Step) -> int:
        """Executed instructions, fitted to counts."""
        window = window_of(step.node)
        outputs = window.batch * window.y.out * window.x.out
        row, _ = self._row(Layer(step, {v: "x" for v in step.reads}, lambda role, _: role))
        turns = -(-window.channels // row.lanes)
        if _in_registers(step):
            return 20 + outputs * (7 + turns * (row.instructions + 3))
        rows, columns = (1, window.taps) if _one_row(window) else (window.y.kernel, window.x.kernel)
        blocks, left = window.channels // 32, -(-(window.channels % 32) // 8)
        each = blocks * (17 + rows * (12 + 9 * columns)) + left * (14 + rows * (9 + 4 * columns))
        return 20 + outputs * (45 + each + turns * (row.instructions + 1))

    def scratch(self, step: Step) -> Scratch:
        """One pixel's sums."""
        if _in_registers(step):
            return Scratch()
        return Scratch((("acc", "int32_t", -(-step.output.type.shape[-1] // 8) * 8),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """One where all channels are summed first, or results are no larger than what was read."""
        small = step.output.type.dtype.bytes == 1
        return 1 if small or not _in_registers(step) else None

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        step, node = layer.step, layer.step.node
        assert isinstance(node.op, ops.SumPool)
        row, nest = self._row(layer)
        if _in_registers(step):
            return "\n".join((loops(nest), row.text(), ends(nest)))
        window, x = window_of(node), node.inputs[0]
        y, rows = _reach(window.y)
        column, columns = _reach(window.x)
        if _one_row(window):
            rows, columns = "1", str(window.taps)
        first = at(layer[x], window.source(y, column))
        pitch = window.x.size * window.channels
        return render(
            "mve_sums.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            nest=nest,
            axes=(window.y, window.x),
            kind=("s8" if x.type.dtype.signed else "u8") + ("_of" if nest.loops else ""),
            extent=f"{first}, {rows}, {columns}, {pitch}, {window.channels}",
            less=_times(rows, columns, node.op.zero_point),
            row=row.text(),
            loops=loops,
            ends=ends,
        )

    def _row(self, layer: Layer) -> tuple[Row, Nest]:
        """From sums, or taps, of one pixel to its results."""
        step, node = layer.step, layer.step.node
        assert isinstance(node.op, ops.SumPool)
        window = window_of(node)
        nest = pixels(step, window)
        few = _in_registers(step)
        row = Row(layer, nest.at, "c", step.output.type.shape[-1], wide=not few)
        if few:
            made = self._added(row, window, node.inputs[0], node.op.zero_point)
        else:
            made = (row.elements("acc", "int32_t", "c"),)
        if step.rescale is not None:
            terms = {v: row.widened(row.operand(v)) for v in step.terms}
            made = row.rescaled(step.rescale, {**terms, node.output: made})
        row.store(made)
        return row, nest

    def _added(self, row: Row, window: Window, x: Value, zero: int) -> Vectors:
        """The taps of a window, side by side in 16 bits."""
        line = window.x.size * window.channels
        pixel = [
            ("n" if window.batch > 1 else "0", window.y.size * line),
            (window.y.o, window.y.stride * line),
            (window.x.o, window.x.stride * window.channels),
            ("c", 1),
        ]
        total = ""
        for r in range(window.y.kernel):
            for k in range(window.x.kernel):
                index = affine(pixel, r * line + k * window.channels)
                tap = row.elements(row.layer[x], c_type(x.type.dtype), index)
                total = row.sum(total, tap) if total else tap
        return row.widened(row.difference(total, window.taps * zero))


def _in_registers(step: Step) -> bool:
    """Is no tap in the border, and few of them to be written out, with results of few bits?"""
    window = window_of(step.node)
    border = window.y.inside or window.x.inside
    return not border and window.taps <= _FEW_TAPS and narrow(step)


def _reach(axis: Axis) -> tuple[str, str]:
    """The first position inside the operand under a window, and how many there are."""
    if axis.inside:
        return f"first_{axis.letter}", f"end_{axis.letter} - first_{axis.letter}"
    return axis.start, str(axis.kernel)


def _leaves(axis: Axis) -> bool:
    """Does a window lie wholly in the border?"""
    return axis.pad >= axis.kernel or (axis.out - 1) * axis.stride - axis.pad >= axis.size


def _one_row(window: Window) -> bool:
    """Do all taps lie side by side?"""
    whole = window.x.kernel == window.x.size and not window.x.inside
    return whole and not window.y.inside


def _times(rows: str, columns: str, zero: int) -> str:
    """Product of extents and a zero point."""
    if zero == 0 or (rows.isdigit() and columns.isdigit()):
        return str(int(rows) * int(columns) * zero) if zero else "0"
    return f"({rows}) * ({columns}) * {zero}"
