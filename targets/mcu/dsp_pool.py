"""Pooling of bytes with the DSP extension: a few channels of a tap in each word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ir import DType, Rescale, TensorType, Value, ops
from qcompile.ir.proof import accumulator_bound, prove_rescale

from ..c.kernel import Layer, Scratch, Step, ends, loops
from ..c.nest import Nest
from ..c.text import at, c_int, c_type, render
from ..c.window import Window, pixels, window_of
from .dsp_rescale import HEADER, HERE, LIMIT, wrapped

POOL_HEADER = HERE / "dsp_pool.h"
"""The micro-kernels."""

_MOST_TAPS = 36
"""The list of taps lies on the stack."""


def _sign(kind: TensorType) -> str:
    return f"{'s' if kind.dtype.signed else 'u'}{kind.dtype.bytes * 8}"


def _border(geometry: Window) -> bool:
    return bool(geometry.y.inside or geometry.x.inside)


def _pixel(nest: Nest) -> str:
    """The index of the result's first channel."""
    return nest.at["y"].removesuffix("c").removesuffix(" + ") or "0"


@dataclass(frozen=True)
class Largest:
    """MaxPool: four channels at a time, through a list of addresses of taps."""

    name: str = "dsp max pool"
    includes: Sequence[str | Path] = (HEADER, POOL_HEADER)

    def matches(self, step: Step) -> bool:
        """Bytes, at least four channels, and a window of few taps."""
        if not isinstance(step.node.op, ops.MaxPool):
            return False
        x = step.output.type
        return x.dtype.bits <= 8 and x.shape[-1] >= 4 and window_of(step.node).taps <= _MOST_TAPS

    def cost(self, step: Step) -> int:
        """Instructions: three for a tap of four channels."""
        geometry, channels = window_of(step.node), step.output.type.shape[-1]
        once = self._at_once(geometry)
        taps = self._taps(geometry)
        group = 10 + taps // once * (3 + 3 * once)
        pixel = 18 + -(-channels // 4) * (group + 4) + channels % 4 * 4
        if _border(geometry):
            checks = len(geometry.y.inside) + len(geometry.x.inside)
            pixel += (2 + checks) * geometry.taps
        return 40 + step.output.type.size // channels * pixel

    def scratch(self, step: Step) -> Scratch:
        """The results of one pixel; a line of lowest codes."""
        kind, channels = c_type(step.output.type.dtype), step.output.type.shape[-1]
        line, border = ("line", kind, channels), ("border", kind, channels)
        return Scratch((line, border) if _border(window_of(step.node)) else (line,))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def raster(self, step: Step) -> int | None:
        """One: its results wait until all is read."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        x, geometry = step.node.inputs[0], window_of(step.node)
        nest = pixels(step, geometry)
        border = _border(geometry)
        return render(
            "dsp_max.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            window=geometry,
            nest=nest,
            border=border,
            type=c_type(x.type.dtype),
            x=layer[x],
            y=at("y", _pixel(nest)),
            taps=self._taps(geometry),
            offsets=self._offsets(geometry),
            shift="0" if border else geometry.source(geometry.y.start, geometry.x.start),
            lowest=-128 if x.type.dtype.signed else 0,
            channels=geometry.channels,
            function=f"dsp_max{self._at_once(geometry)}_{_sign(x.type)}",
            at=at,
            loops=loops,
            ends=ends,
        )

    def _at_once(self, geometry: Window) -> int:
        return 3 if geometry.taps % 3 == 0 else 4

    def _taps(self, geometry: Window) -> int:
        """With taps that are listed once more, to whole rounds."""
        once = self._at_once(geometry)
        return -(-geometry.taps // once) * once

    def _offsets(self, geometry: Window) -> list[int]:
        """Where the taps lie, as seen from the first."""
        y, x = geometry.y, geometry.x
        return [
            (y.dilation * ky * x.size + x.dilation * kx) * geometry.channels
            for ky in range(y.kernel)
            for kx in range(x.kernel)
        ]


@dataclass(frozen=True)
class Mean:
    """SumPool with its Rescale: eight channels at a time, summed in pairs of int16."""

    name: str = "dsp sum pool"
    includes: Sequence[str | Path] = (HEADER, POOL_HEADER)

    def matches(self, step: Step) -> bool:
        """Bytes, at least eight channels, sums that int16 holds, and one multiplier."""
        node = step.node
        if not isinstance(node.op, ops.SumPool):
            return False
        x = node.inputs[0].type
        if x.dtype.bits > 8 or x.shape[-1] < 8 or int(accumulator_bound(node).max()) >= 1 << 15:
            return False
        return _scaling(step) is not None

    def cost(self, step: Step) -> int:
        """Instructions: 28 for four taps of eight channels."""
        geometry, channels = window_of(step.node), step.output.type.shape[-1]
        rows, columns = self._taps(geometry)
        row = 8 + columns // 4 * 28 + columns % 4 * 10
        group = 72 + rows * row
        copied = channels * step.output.type.dtype.bytes
        pixel = 24 + -(-channels // 8) * group + copied + copied % 4 * 3
        return 20 + step.output.type.size // channels * pixel

    def scratch(self, step: Step) -> Scratch:
        """The results of one pixel."""
        out = step.output.type
        return Scratch((("line", c_type(out.dtype), out.shape[-1]),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def raster(self, step: Step) -> int | None:
        """One: its results wait until all is read."""
        return 1

    def packed(self, step: Step) -> tuple[Value, ...]:
        """None."""
        return ()

    def body(self, layer: Layer) -> str:
        """See the template."""
        step = layer.step
        op, scaling = step.node.op, _scaling(step)
        assert isinstance(op, ops.SumPool)
        assert scaling is not None
        x, geometry = step.node.inputs[0], window_of(step.node)
        nest = pixels(step, geometry)
        axes = (geometry.y, geometry.x)
        top, left = (f"first_{a.letter}" if a.inside else a.start for a in axes)
        rows, columns = (f"count_{a.letter}" if a.inside else str(a.kernel) for a in axes)
        gap = f"({geometry.x.size} - {columns}) * {geometry.channels}"
        if not _border(geometry):
            rows, columns = map(str, self._taps(geometry))
            gap = str((geometry.x.size - geometry.x.kernel) * geometry.channels)
        return render(
            "dsp_sum.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            window=geometry,
            nest=nest,
            first=at(layer[x], geometry.source(top, left)),
            rows=rows,
            columns=columns,
            gap=gap,
            start=_pair(op.zero_point, rows, columns),
            y=at("y", _pixel(nest)),
            channels=geometry.channels,
            bytes=step.output.type.dtype.bytes,
            scaling=", ".join(map(c_int, scaling)),
            function=f"dsp_sum_{_sign(x.type)}_{_sign(step.output.type)}",
            loops=loops,
            ends=ends,
        )

    def _taps(self, geometry: Window) -> tuple[int, int]:
        """Rows and columns; rows that follow each other are one."""
        rows, columns = geometry.y.kernel, geometry.x.kernel
        if columns == geometry.x.size and not _border(geometry):
            return 1, rows * columns
        return rows, columns


def _pair(zero: int, rows: str, columns: str) -> str:
    """C for a pair of -`zero` for each tap, modulo 2**16."""
    if zero == 0:
        return "0"
    if rows.isdigit() and columns.isdigit():
        return c_int(wrapped((-zero * int(rows) * int(columns) & 0xFFFF) * 0x10001))
    return f"(int32_t)((uint16_t)({rows} * {columns} * {-zero}) * 0x10001u)"


def _scaling(step: Step) -> tuple[int, int, int, int] | None:
    """Multiplier, addend, left shift and fraction, where they are the same for all channels."""
    if step.rescale is None or not isinstance(op := step.rescale.op, Rescale):
        return None
    if len(op.accs) != 1 or op.vals or op.out not in (DType.I8, DType.U8, DType.I16):
        return None
    rows = (op.accs[0].multiplier, op.accs[0].pre_shift, op.f)
    whole = (op.lo, op.hi) == (op.out.lo, op.out.hi)
    if not whole or any(len(set(row)) > 1 for row in rows):
        return None
    multiplier, shift, f = (row[0] for row in rows)
    if prove_rescale(step.rescale) + (abs(op.zero_point) << f) >= LIMIT:
        return None
    return multiplier, (1 << (f - 1)) + (op.zero_point << f), shift, f
