"""Depthwise Conv on NEON: sixteen channels side by side, for a few neighbouring pixels at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Value, ops

from ..c.kernel import Layer, Scratch, Step, aligned, constant, ends, loops
from ..c.nest import Nest
from ..c.text import affine, at, minus, render
from ..c.window import Window, window_of
from .image import VECTOR, Image
from .products import HEADER, HERE, Part
from .rescale import Results, loads, results

_MOST_TAPS = 49
_MOST_PIXELS = 4
_INT16 = (1 << 15) - 1
_CODE = 128


@dataclass(frozen=True)
class Depthwise:
    """Conv with one channel in and out of every group, of signed bytes.

    `dots`: by dot products of the taps of a row, else by products that add up in 16 bits.
    """

    dots: bool
    includes: Sequence[str | Path] = (HEADER,)

    @property
    def name(self) -> str:
        """The family of instructions."""
        return f"{'dotprod' if self.dots else 'neon'} depthwise"

    def matches(self, step: Step) -> bool:
        """Signed bytes; see `rescale.results` for what their sums become."""
        op = step.node.op
        if not isinstance(op, ops.Conv) or results(step) is None:
            return False
        x, w, bias = step.node.inputs
        if op.groups != x.type.shape[-1] or w.type.shape[0] != op.groups or len(w.type.shape) > 4:
            return False
        if (
            w.const is None
            or bias.const is None
            or not x.type.dtype.signed
            or x.type.dtype.bits > 8
        ):
            return False
        window = window_of(step.node)
        along = window.x.kernel == 1 or window.x.dilation == 1
        return window.taps <= _MOST_TAPS and (along or not self.dots)

    def cost(self, step: Step) -> int:
        """Executed instructions."""
        return _Plan(step, self.dots).cost

    def scratch(self, step: Step) -> Scratch:
        """The rows under a tile."""
        return Scratch((("image", "int8_t", _Plan(step, self.dots).bytes),))

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """A fused Rescale's other operands; never the one that is copied."""
        return tuple(v for v in aligned(step, *step.terms) if v is not step.node.inputs[0])

    def raster(self, step: Step) -> int | None:
        """The rows of a tile: what their windows span is copied first."""
        return _Plan(step, self.dots).tile[0] * window_of(step.node).x.out

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        return _Code(layer, _Plan(layer.step, self.dots)).text()


class _Plan:
    """One step: tiles of `tile` rows by columns of pixels, whose columns are read in groups of four."""

    def __init__(self, step: Step, dots: bool) -> None:
        self.step, self.dots = step, dots
        self.window: Window = window_of(step.node)
        self.channels = self.window.channels
        self.image = Image.of(self.window)
        found = results(step)
        assert found is not None
        self.results: Results = found

    @cached_property
    def weights(self) -> Array:
        """[channel][tap]."""
        rows = constant(self.step.node, 1)
        return rows.reshape(len(rows), -1)

    @cached_property
    def tap_groups(self) -> list[list[int]]:
        """Taps whose products add up in int16 for any codes: few groups of them, found first fit."""
        reach = np.abs(self.weights.astype(np.int64)) * _CODE
        groups: list[list[int]] = []
        sums: list[NDArray[np.int64]] = []
        for tap in np.argsort(-reach.max(axis=0), kind="stable").tolist():
            for group, total in zip(groups, sums, strict=True):
                if int((total + reach[:, tap]).max()) <= _INT16:
                    group.append(tap)
                    total += reach[:, tap]
                    break
            else:
                groups.append([tap])
                sums.append(reach[:, tap].copy())
        return [sorted(group) for group in groups]

    @cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of pixels at once."""
        w = self.window
        if not self.dots:
            return 1, min(2, w.x.out)
        every = [
            (r, j)
            for r in range(1, _MOST_PIXELS + 1)
            for j in range(1, _MOST_PIXELS // r + 1)
            if r <= w.y.out and j <= w.x.out
        ]
        return min(every, key=lambda t: self._tiles_cost(*t))

    @property
    def reach(self) -> int:
        """Rows that a window spans."""
        return (self.window.y.kernel - 1) * self.window.y.dilation + 1

    @property
    def slots(self) -> int:
        """Rows that a tile spans."""
        return (self.tile[0] - 1) * self.window.y.stride + self.reach

    @property
    def bytes(self) -> int:
        """Of those rows; the last group of columns of the last one may lie behind it."""
        return self.slots * self.image.pitch + 4 * self.channels + VECTOR

    @property
    def cost(self) -> int:
        """Executed instructions, about."""
        return int(self._tiles_cost(*self.tile)) + self.image.cost

    def _tiles_cost(self, rows: int, columns: int) -> float:
        w = self.window
        pixels = w.y.out * w.x.out * w.batch
        tiles = -(-w.y.out // rows) * -(-w.x.out // columns) * w.batch
        blocks = -(-self.channels // 4) / 4
        ends = pixels * (4 + self.results.cost(4))
        if not self.dots:
            work = w.taps * (3 * columns + 0.5) + len(self.tap_groups) * 4 * columns
        else:
            read = {
                r * w.y.stride + k * w.y.dilation for r in range(rows) for k in range(w.y.kernel)
            }
            groups = -(-((columns - 1) * w.x.stride + w.x.kernel) // 4)
            uses = sum(len(self.uses(g, columns)) for g in range(groups))
            work = len(read) * groups * 12 + rows * w.y.kernel * uses * 6 + len(read)
        return blocks * (tiles * (work + 8) + ends) + tiles * 8

    def uses(self, group: int, columns: int) -> list[int]:
        """The pixels of a tile's row that have taps in a group of four columns."""
        x = self.window.x
        return [
            j
            for j in range(columns)
            if any(0 <= 4 * group + i - j * x.stride < x.kernel for i in range(4))
        ]

    @property
    def groups(self) -> int:
        """Groups of four columns that a tile reads of a row."""
        x = self.window.x
        return -(-((self.tile[1] - 1) * x.stride + x.kernel) // 4)

    @cached_property
    def placed(self) -> dict[tuple[int, int, int], int]:
        """Where the weights of (kernel row, group, pixel of a tile's row) begin in a block's."""
        columns = self.tile[1]
        keys = [
            (ky, g, j)
            for ky in range(self.window.y.kernel)
            for g in range(self.groups)
            for j in self.uses(g, columns)
        ]
        return {key: 64 * i for i, key in enumerate(keys)}

    @property
    def block_bytes(self) -> int:
        """Weights of sixteen channels."""
        return 64 * len(self.placed) if self.dots else 16 * self.window.taps

    def pack(self) -> NDArray[np.int8]:
        """[sixteen channels][as `placed`][channel][column], or [sixteen channels][tap as grouped][channel]."""
        filled = np.pad(self.weights.astype(np.int8), ((0, -self.channels % 16), (0, 0)))
        if not self.dots:
            order = [tap for group in self.tap_groups for tap in group]
            return np.ascontiguousarray(
                filled.reshape(-1, 16, self.window.taps)[:, :, order].transpose(0, 2, 1)
            )
        x = self.window.x
        taps = filled.reshape(len(filled), self.window.y.kernel, x.kernel)
        parts = np.zeros((len(self.placed), len(filled), 4), np.int8)
        for n, (ky, g, j) in enumerate(self.placed):
            for i in range(4):
                kx = 4 * g + i - j * x.stride
                if 0 <= kx < x.kernel:
                    parts[n, :, i] = taps[:, ky, kx]
        return np.ascontiguousarray(parts.reshape(len(self.placed), -1, 64).transpose(1, 0, 2))


@dataclass(frozen=True)
class _Use:
    """Weights by a group of columns for one pixel of a tile."""

    r: int
    j: int
    weights: int


@dataclass(frozen=True)
class _Columns:
    """Four columns of a row: addresses, and who uses them."""

    loads: list[str]
    uses: list[_Use]


@dataclass(frozen=True)
class _Tap:
    """A tap of every pixel of a tile."""

    weights: int
    loads: list[str]


@dataclass(frozen=True)
class _TileCode:
    """What the template writes for a block of channels of a tile."""

    height: int
    columns: int
    quads: int
    reads: list[_Columns]
    groups: list[list[_Tap]]
    start: list[str]
    finish: list[str]


class _Code:
    """The statements of one layer."""

    def __init__(self, layer: Layer, plan: _Plan) -> None:
        self.layer, self.plan = layer, plan
        self.constants = plan.results.constants(layer.constant)
        bias = constant(layer.step.node, 2).astype(np.int32)
        self.bias = layer.constant("bias", np.pad(bias, (0, -len(bias) % 4)))

    def text(self) -> str:
        """See the template."""
        plan, w = self.plan, self.plan.window
        op = self.layer.step.node.op
        assert isinstance(op, ops.Conv)
        rows, columns = plan.tile
        return render(
            "depthwise.c.j2",
            HERE,
            scratch=self.layer.scratch.declarations,
            image=plan.image,
            window=w,
            x=self.layer[self.layer.step.node.inputs[0]],
            pad_value=op.pad_value,
            reach=plan.reach,
            slots=plan.slots,
            images=Nest((("n", w.batch),) if w.batch > 1 else (), {}),
            parts=(Part.cut("oy", w.y.out, rows), Part.cut("ox", w.x.out, columns)),
            tile=self._tile,
            sources=self._sources,
            weights=self.layer.constant("weights", plan.pack()),
            blocks=plan.channels // 16,
            quads=-(-(plan.channels % 16) // 4),
            block_bytes=plan.block_bytes,
            affine=affine,
            at=at,
            minus=minus,
            loops=loops,
            ends=ends,
        )

    def _read(self, rows: int) -> list[int]:
        """Rows of the image under a tile."""
        y = self.plan.window.y
        return sorted({r * y.stride + k * y.dilation for r in range(rows) for k in range(y.kernel)})

    def _sources(self, rows: Part) -> Iterator[tuple[int, str]]:
        """Where each row under a row of tiles lies."""
        plan = self.plan
        for i in self._read(rows.size):
            row = affine([(rows.at, plan.window.y.stride)], i)
            row = f"({row})" if " + " in row else row
            yield i, f"image + {row} % {plan.slots} * {plan.image.pitch}"

    def _tile(self, rows: Part, columns: Part, first: str, quads: int) -> _TileCode:
        plan, w, found = self.plan, self.plan.window, self.plan.results
        biases = loads(at(self.bias, first), quads)
        pixels = [(r, j) for r in range(rows.size) for j in range(columns.size)]
        start = [f"int32x4_t sum{r}{j}_{q} = {biases[q]};" for r, j in pixels for q in range(quads)]
        finish, parameters = found.parameters(self.constants, first, quads)
        count = 16 if first == "c" else plan.channels % 16
        for r, j in pixels:
            index = affine(
                [
                    ("n" if w.batch > 1 else "0", w.y.out * w.x.out * plan.channels),
                    (rows.at, w.x.out * plan.channels),
                    (columns.at, plan.channels),
                    (first, 1),
                ],
                (r * w.x.out + j) * plan.channels,
            )
            values = [at(self.layer[v], index) for v in found.values]
            sums = [f"sum{r}{j}_{q}" for q in range(quads)]
            finish.append(found.store(sums, parameters, at("y", index), values, count))
        if plan.dots:
            reads = self._columns(rows.size, columns.size)
            return _TileCode(rows.size, columns.size, quads, reads, [], start, finish)
        return _TileCode(1, columns.size, quads, [], self._taps(columns.size), start, finish)

    def _columns(self, rows: int, columns: int) -> list[_Columns]:
        """What is read under a tile, for dot products."""
        plan, w = self.plan, self.plan.window
        wide = (columns - 1) * w.x.stride + w.x.kernel
        found = []
        for i in self._read(rows):
            for g in range(-(-wide // 4)):
                # No weights meet the columns beyond the last, so that may be read again.
                offsets = [min(4 * g + k, wide - 1) * plan.channels for k in range(4)]
                uses = [
                    _Use(r, j, plan.placed[ky, g, j])
                    for r in range(rows)
                    for ky in range(w.y.kernel)
                    if r * w.y.stride + ky * w.y.dilation == i
                    for j in plan.uses(g, columns)
                ]
                loaded = [f"vld1q_s8({affine([(f'row{i}', 1)], offset)})" for offset in offsets]
                found.append(_Columns(loaded, uses))
        return found

    def _taps(self, columns: int) -> list[list[_Tap]]:
        """The taps of a tile of one row, for products."""
        plan, x = self.plan, self.plan.window.x
        found, at_ = [], 0
        for group in plan.tap_groups:
            taps = []
            for tap in group:
                ky, kx = divmod(tap, x.kernel)
                row = f"row{ky * plan.window.y.dilation}"
                offsets = [(j * x.stride + kx * x.dilation) * plan.channels for j in range(columns)]
                taps.append(_Tap(at_, [affine([(row, 1)], offset) for offset in offsets]))
                at_ += 16
            found.append(taps)
        return found
