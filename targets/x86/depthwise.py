"""Depthwise Conv: the bytes of four taps woven into the lanes of their channels, so that one product adds all four.

Four registers of channels, at four places of the image, take eight shuffles to weave; then a product does one lane's
four taps. Neighbouring outputs share what is woven, and packing the results to bytes undoes the order that weaving
gave the channels. Where channels are few, a register holds those of several pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import Array, Node, Rescale, Value, ops

from ..c.kernel import Layer, Scratch, Step, constant
from ..c.text import affine, at, c_int, render
from ..c.window import Window, window_of
from .epilogue import Epilogue, fits
from .isa import HERE, Isa
from .sweep import Sweep, sweep_of
from .tunable import chosen

_FOUR = 4
_FLIP = 128
_MOST_TAPS = 256
_CACHED = 16384
"""Bytes of weights that stay in the first cache beside the image."""

Place = tuple[int, int]
"""A row and a column of pixels, from the first that a tile reads."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What the registers hold at once: `rows` x `columns` outputs of one register of channels.

    Where `joined`, that register holds the channels of several pixels. `groups` are places that are woven together,
    `products` are (group, output, taps at the places of the group, -1 where the output has none there).
    """

    rows: int
    columns: int
    joined: bool
    groups: tuple[tuple[Place, ...], ...]
    products: tuple[tuple[int, int, tuple[int, ...]], ...]

    @property
    def weights(self) -> tuple[tuple[int, ...], ...]:
        """The taps of every different operand of a product."""
        return tuple(dict.fromkeys(taps for _, _, taps in self.products))

    def __str__(self) -> str:
        upright = any(len({row for row, _ in group}) > 1 for group in self.groups)
        how = [f"{self.rows}x{self.columns}", *["joined"] * self.joined, *["upright"] * upright]
        return " ".join(how)


@dataclass(frozen=True)
class Depthwise:
    """int8 weights by 8-bit activations, one channel a group, and the Rescale that reads the sums.

    A SumPool is one whose weights are 1. Layers whose signatures are in `tuned` have those tiles.
    """

    isa: Isa
    threads: int = 1
    tuned: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """See Kernel."""
        return f"depthwise-{self.isa.name}"

    @property
    def includes(self) -> Sequence[str | Path]:
        """The headers of the instruction set."""
        return self.isa.headers

    def matches(self, step: Step) -> bool:
        """Bytes, one output a channel, a Rescale of the sums alone to at most 16 bits."""
        node = step.node
        if step.rescale is None or step.terms or not fits(step):
            return False
        x, out = node.inputs[0].type, step.output.type
        match node.op:
            case ops.Conv(groups=groups):
                w = node.inputs[1].type
                known = all(v.const is not None for v in node.inputs[1:])
                fit = known and groups == x.shape[-1] == w.shape[0] and len(w.shape) <= 4
                taps = math.prod(w.shape[1:])
            case ops.SumPool(kernel=kernel):
                fit, taps = len(kernel) <= 2, math.prod(kernel)
            case _:
                return False
        return fit and x.dtype.bytes == 1 and out.dtype.bytes <= 2 and taps <= _MOST_TAPS

    def shares(self, step: Step) -> bool:
        """See Shared."""
        return self._sweep(step).shared

    def cost(self, step: Step) -> int:
        """Cycles by the model."""
        return int(ranked(self.isa, window_of(step.node))[0][1])

    def scratch(self, step: Step) -> Scratch:
        """The rows of the image that a tile needs."""
        return self._sweep(step).scratch

    def reuses(self, step: Step) -> tuple[Value, ...]:
        """None: the result may trail its operand, as `raster` says."""
        return ()

    def raster(self, step: Step) -> int | None:
        """The rows of a tile: all they need is copied first."""
        return self._sweep(step).rows * window_of(step.node).x.out

    def packed(self, step: Step) -> tuple[Value, ...]:
        """Weights and bias."""
        return step.node.inputs[1:]

    def body(self, layer: Layer) -> str:
        """See the template."""
        node = layer.step.node
        x, sweep = node.inputs[0], self._sweep(layer.step)
        tile = self._tile(layer.step)
        flip = _FLIP if x.type.dtype.signed else 0
        weights, bias, border = _filter(node)
        woven = Woven(layer, self.isa, order=tuple(self._order(sweep).tolist()))
        packed = self._pack(tile, weights, woven.order)
        if (packed == packed[0]).all():
            packed = packed[:1]
        sums = _bias(weights, bias, flip).tolist()
        rows = [row for group in tile.groups for row, _ in group]
        return render(
            "depthwise.c.j2",
            HERE,
            scratch=layer.scratch.declarations,
            x=layer[x],
            sweep=sweep,
            tile=tile,
            used=sorted(set(rows)),
            border=border + flip,
            flip=flip,
            offsets=[[(row, sweep.column(q)) for row, q in group] for group in tile.groups],
            weights=layer.constant("weights", packed.ravel()),
            block_size=_FOUR * len(tile.weights) if len(packed) > 1 else 0,
            bias=[woven.parameter("bias", sums, v) for v in range(_FOUR)],
            type="int16_t" if self.isa.words else "int8_t",
            # Products are no assembly there: compilers would load all weights before the loop, and spill them.
            hidden=self.isa.words and not tile.joined,
            lanes=self.isa.lanes,
            results=self._results(woven, sweep),
            affine=affine,
            at=at,
        )

    def signature(self, step: Step) -> str:
        """See Tunable."""
        window, out = window_of(step.node), step.output.type.dtype
        axes = (
            f"{a.size} by {a.kernel} every {a.stride} dilated {a.dilation} to {a.out}"
            for a in (window.y, window.x)
        )
        return (
            f"{self.name} {type(step.node.op).__name__} {step.node.inputs[0].type.dtype} to {out}:"
            f" {window.batch} of {window.channels}, {', '.join(axes)}, threads {self.threads}"
        )

    def tiles(self, step: Step) -> list[str]:
        """See Tunable."""
        return list(dict.fromkeys(str(tile) for tile, _ in ranked(self.isa, window_of(step.node))))

    def _tile(self, step: Step) -> Tile:
        return chosen(self, step, ranked(self.isa, window_of(step.node)), self.tuned)

    def _sweep(self, step: Step) -> Sweep:
        node, tile = step.node, self._tile(step)
        return sweep_of(
            node, _FOUR * self.isa.lanes, tile.rows, tile.columns, tile.joined, self.threads
        )

    def _order(self, sweep: Sweep) -> NDArray[np.intp]:
        """The channel of every lane of the parameters: whole registers, in the order of woven bytes."""
        channels = sweep.window.channels
        places = np.arange(sweep.period).reshape(-1, self.isa.lanes // _FOUR, _FOUR, _FOUR)
        woven = places.transpose(0, 2, 1, 3).ravel()
        return woven % channels if sweep.joined else np.minimum(woven, channels - 1)

    def _pack(self, tile: Tile, weights: Array, order: Sequence[int]) -> NDArray[np.signedinteger]:
        """[register of channels][operand of a product][lane][tap]; zeros where an output has no tap."""
        taps = weights.reshape(len(weights), -1).astype(np.int8)
        none = np.zeros((len(taps), 1), np.int8)
        chosen = np.concatenate((taps, none), axis=1)[:, np.array(tile.weights)]
        blocks = chosen[list(order)].reshape(-1, _FOUR * self.isa.lanes, *chosen.shape[1:])
        packed = blocks.transpose(0, 2, 1, 3)
        if not self.isa.words:
            return packed
        # Of every register of lanes the taps 0 and 2, then 1 and 3.
        pairs = packed.reshape(*packed.shape[:2], _FOUR, self.isa.lanes, 2, 2)
        return pairs.transpose(0, 1, 2, 5, 3, 4).astype(np.int16)

    def _results(self, woven: Woven, sweep: Sweep) -> str:
        outputs = range(sweep.rows * sweep.columns)
        sums = [[f"s{output}_{v}" for v in range(_FOUR)] for output in outputs]
        offsets = [
            (output // sweep.columns * sweep.window.x.out + output % sweep.columns)
            * sweep.window.channels
            for output in outputs
        ]
        return woven.render(sums, offsets, "c", sweep.block)


@dataclass(frozen=True)
class Woven(Epilogue):
    """Results whose lanes are in woven order; the first `left` are stored."""

    order: tuple[int, ...] = ()

    def parameter(self, role: str, entries: Sequence[int], vector: int) -> str:
        """A parameter of one of the vectors from channel `c` on."""
        return self._row(role, entries, affine([("c", 1)], vector * self.isa.lanes))

    def _row(self, role: str, entries: Sequence[int], index: str, kind: str = "i4") -> str:
        if len(set(entries)) == 1:
            return f"splat({c_int(entries[0])})"
        lanes = np.array(entries, np.int64)[list(self.order)].astype(kind)
        return f"load({at(self.layer.constant(role, lanes), index)})"

    def _stores(self, row: Sequence[str], offset: int, counts: Sequence[int]) -> list[str]:
        step = self.layer.step
        assert step.rescale is not None
        assert isinstance(step.rescale.op, Rescale)
        op, out = step.rescale.op, step.output.type.dtype
        kind = f"{'i' if out.signed else 'u'}{out.bytes * 8}"
        place = at("y", affine([("at", 1)], offset))
        bounds = f"{op.zero_point}, {op.lo}, {op.hi}"
        return [f"store_woven_{kind}({place}, left, {', '.join(row)}, {bounds});"]


def _filter(node: Node) -> tuple[Array, Array, int]:
    """Weights, bias and the code that stands in the border."""
    if isinstance(node.op, ops.Conv):
        return constant(node, 1), constant(node, 2), node.op.pad_value
    assert isinstance(node.op, ops.SumPool)
    channels, taps = node.output.type.shape[-1], math.prod(node.op.kernel)
    bias = np.full(channels, -taps * node.op.zero_point, np.int32)
    return np.ones((channels, taps), np.int8), bias, node.op.zero_point


def _bias(weights: Array, bias: Array, flip: int) -> NDArray[np.int32]:
    """Of flipped activations, 128 sums of the weights are taken off; the sum wraps as the products' does."""
    sums = weights.reshape(len(weights), -1).astype(np.int64).sum(axis=1)
    rows: NDArray[np.int64] = bias.astype(np.int64) - flip * sums
    return rows.astype(np.uint32).astype(np.int32)


@lru_cache(maxsize=4096)
def ranked(isa: Isa, window: Window) -> tuple[tuple[Tile, float], ...]:
    """All tiles and the cycles of the layer with each by the model, the fastest first."""
    found = [(tile, _cycles(isa, window, tile)) for tile in _tiles(isa, window)]
    return tuple(sorted(found, key=lambda f: f[1]))


def _tiles(isa: Isa, window: Window) -> Iterator[Tile]:
    most = max(1, (isa.sums - _FOUR) // _FOUR)
    for rows in range(1, min(most, window.y.out) + 1):
        for columns in range(1, min(most // rows, window.x.out) + 1):
            if rows * columns > 1 and rows * columns * window.taps > _MOST_TAPS:
                continue
            for joined in (False, True) if columns == 1 else (False,):
                for upright in (False, True):
                    tile = _tile(window, rows, columns, joined, upright)
                    if not joined or _weights(isa, window, tile) <= _CACHED:
                        yield tile


def _weights(isa: Isa, window: Window, tile: Tile) -> int:
    """Bytes of the weights of a tile whose registers hold several pixels."""
    return math.lcm(window.channels, _FOUR * isa.lanes) * _FOUR * len(tile.weights)


def _tile(window: Window, rows: int, columns: int, joined: bool, upright: bool) -> Tile:
    """Groups of at most four neighbours in a row (in a column where `upright`) that together meet all taps."""
    y, x = window.y, window.x
    outputs: list[dict[Place, int]] = []
    for row in range(rows):
        for column in range(columns):
            outputs.append(
                {
                    (row * y.stride + ky * y.dilation, column * x.stride + kx * x.dilation): ky
                    * x.kernel
                    + kx
                    for ky in range(y.kernel)
                    for kx in range(x.kernel)
                }
            )
    lines: dict[int, list[list[Place]]] = {}
    for taps in outputs:
        for line in sorted({place[upright] for place in taps}):
            lines.setdefault(line, []).append([p for p in taps if p[upright] == line])
    groups = [group for line in sorted(lines) for group in _groups(lines[line])]
    products: list[tuple[int, int, tuple[int, ...]]] = []
    left = [dict(taps) for taps in outputs]
    for output, taps in enumerate(left):
        for g in sorted(range(len(groups)), key=lambda g: -sum(p in taps for p in groups[g])):
            found = tuple(taps.pop(p, -1) for p in groups[g])
            if max(found) >= 0:
                products.append((g, output, (*found, *[-1] * (_FOUR - len(found)))))
    products.sort()
    return Tile(rows, columns, joined, tuple(groups), tuple(products))


def _groups(needs: Sequence[Sequence[Place]]) -> list[tuple[Place, ...]]:
    """Places of a line in groups of four: neighbouring outputs share one where their taps fit into it."""
    shared: list[set[Place]] = []
    for need in needs:
        for first in range(0, len(need), _FOUR):
            part = set(need[first : first + _FOUR])
            if shared and len(shared[-1] | part) <= _FOUR:
                shared[-1] |= part
            elif not any(part <= group for group in shared):
                shared.append(part)
    every = sorted({place for need in needs for place in need})
    if -(-len(every) // _FOUR) < len(shared):
        return [tuple(every[i : i + _FOUR]) for i in range(0, len(every), _FOUR)]
    return [tuple(sorted(group)) for group in shared]


def _cycles(isa: Isa, window: Window, tile: Tile) -> float:
    """What a layer takes: weaving, products and results of its tiles, and the copies of the image."""
    outputs = tile.rows * tile.columns
    weaving = len(tile.groups) * (8 + _FOUR) * isa.load_cost
    products = len(tile.products) * _FOUR * max(isa.dot_cost, isa.load_cost)
    one = weaving + products + outputs * _FOUR * isa.epilogue_cost + 4
    sweep = Sweep(window, _FOUR * isa.lanes, tile.rows, tile.columns, tile.joined, window.x.pad)
    tiles = sweep.registers * one + 12 * -(-window.y.out // tile.rows)
    return window.batch * (tiles + sweep.copies * isa.load_cost)
