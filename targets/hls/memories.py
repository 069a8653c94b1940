"""Where the memories of a unit's Verilog go: block RAM, LUTs that are RAM, or plain logic, as yosys chooses.

The choice is that of yosys' memory_libmap: the cheapest of all shapes by the costs in its libraries for xc7
(brams_xc4v, lutrams_xc5v) and ECP5 (brams, lutrams), where a bit in plain logic costs 1, a bit of a ROM 1/64 (xc7) or
1/16 (ECP5) and every 2-to-1 multiplexer 1/2. Of xc7, RAMB18E1 holds 1 x 16384, 2 x 8192, 4 x 4096, 9 x 2048, 18 x
1024 or 36 x 512 bits and RAMB36E1 twice that; DP16KD of ECP5 has the shapes of a RAMB18E1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from . import units
from .multipliers import Family
from .requantize import AccTerm, Requantize, Row, ValTerm
from .units import Op, Stream


@dataclass(frozen=True, slots=True)
class Memory:
    """`depth` words of `width` bits; one that is never `written` is a ROM, of which `columns` bits are worth storing.

    One that is read in the cycle of its address is no block RAM: it is not `clocked`.
    """

    width: int
    depth: int
    written: bool
    clocked: bool = True
    columns: int | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """18-kbit block RAMs, the LUTs of distributed RAM or of a ROM's logic, and bits that are multiplexed behind."""

    kind: Literal["block", "distributed", "logic"]
    bram18: int = 0
    lut: int = 0
    muxes: int = 0


@dataclass(frozen=True, slots=True)
class _Shapes:
    """One kind of RAM: words of widths[i] bits and 2**(address - i) of them, at a cost; `size` in 18-kbit blocks."""

    cost: int
    address: int
    widths: tuple[int, ...]
    size: int = 1


@dataclass(frozen=True, slots=True)
class _Lutram:
    """Distributed RAM of `width` bits and 2**address words; of its cost, `scaled` goes by the bits in use."""

    cost: int
    scaled: int
    address: int
    width: int
    luts: int


@dataclass(frozen=True, slots=True)
class _Library:
    blocks: tuple[_Shapes, ...]
    lutrams: tuple[_Lutram, ...]
    rom_bit: float
    lut_inputs: int
    old_word: int = 0
    """What a block RAM costs more that must give a word's old value while it is written."""


_HALF = (1, 2, 4, 9, 18, 36)
_LIBRARIES = {
    "xc7": _Library(
        (_Shapes(129, 14, _HALF), _Shapes(257, 15, (*_HALF, 72), 2)),
        (_Lutram(8, 7, 5, 6, 4), _Lutram(8, 7, 6, 3, 4)),
        1 / 64,
        6,
    ),
    "ecp5": _Library((_Shapes(128, 14, _HALF),), (_Lutram(4, 0, 4, 4, 6),), 1 / 16, 4, 8),
}


@lru_cache(maxsize=1 << 16)
def placed(m: Memory, family: Family) -> Placed:
    """Where yosys puts a memory; a word or none is no memory."""
    library = _LIBRARIES[family]
    if m.depth < 2:
        return Placed("logic")
    rom = library.rom_bit if not m.written else 1.0
    columns = m.width if m.columns is None else m.columns
    inside = (m.depth - 1).bit_length()
    plain = columns << max(0, inside - library.lut_inputs)
    best, chosen = m.width * m.depth * rom, Placed("logic", lut=0 if m.written else plain)
    for shape in library.lutrams if m.written else ():
        rows = -(-m.depth // (1 << shape.address))
        count = -(-m.width // shape.width) * rows
        cost = (shape.cost - shape.scaled) * count + shape.scaled * rows * m.width / shape.width
        cost += _switches(m, rows)
        if cost < best:
            best = cost
            chosen = Placed("distributed", lut=shape.luts * count, muxes=(rows - 1) * m.width)
    for kind in library.blocks if m.clocked else ():
        for i, width in enumerate(kind.widths):
            rows = -(-m.depth // (1 << (kind.address - i)))
            # bytes of 9 bits have a write enable of their own
            byte = min(9, width) if m.written else 1
            count = -(-rows * (-(-m.width // byte) * byte) // width)
            cost = kind.cost * count + _switches(m, rows) + library.old_word * m.written
            if cost < best:
                best = cost
                chosen = Placed("block", bram18=kind.size * count, muxes=(rows - 1) * m.width)
    return chosen


def _switches(m: Memory, rows: int) -> float:
    """What choosing one of `rows` pieces costs, on the way out and, where it is written, on the way in."""
    return (rows - 1) * m.width / 2 + (rows / 2 if m.written and rows > 1 else 0)


SHALLOW = 16
"""Words of the deepest FIFO whose memory is read in the cycle of its address: no block RAM."""


def of_fifo(s: Stream) -> Memory:
    """The memory of a FIFO."""
    return Memory(s.word_bits, s.depth, written=True, clocked=s.depth > SHALLOW)


def of(op: Op) -> Iterator[Memory]:
    """The memories of a unit; several of the same are several."""
    x, y = op.inputs[0], op.output
    match op:
        case units.MatrixVector():
            groups, steps = op.weights.shape[0] // op.pe, op.weights.shape[1] // op.simd
            yield Memory(op.pe * op.simd * op.weight_bits, groups * steps, written=False)
            yield Memory(op.pe * op.acc_bits, groups, written=False)
            yield Memory(x.word_bits, steps, written=True)
        case units.Depthwise():
            groups = y.channels // y.lanes
            yield Memory(y.lanes * op.weight_bits, groups * x.taps, written=False)
            yield Memory(y.lanes * op.acc_bits, groups, written=False)
        case units.GlobalSum():
            yield Memory(y.lanes * op.acc_bits, x.channels // x.lanes, written=True, clocked=False)
        case units.Window():
            span = (op.kernel[0] - 1) * op.dilations[0] + 1
            yield Memory(x.word_bits, (span + op.strides[0]) * x.width * x.folds, written=True)
        case units.Table():
            for _ in range(y.lanes):
                yield Memory(y.bits, 1 << x.bits, written=False)
        case units.Softmax():
            yield Memory(32, 1 << x.bits, written=False)
            yield Memory(x.bits, y.channels, written=True)
            yield Memory(32, y.channels, written=True)
    if isinstance(op, units.Sum | units.Elementwise) and op.requantize is not None:
        yield from _parameters(op.requantize, y)


def _parameters(r: Requantize, y: Stream) -> Iterator[Memory]:
    """The rows of a Requantize that differ from word to word."""
    words = y.pixels if r.spatial else y.channels // y.lanes
    rows = [(r.offset, r.t_bits), (r.shift, max(1, max(r.shift).bit_length()))]
    rows += [(a.shift, max(1, max(a.shift).bit_length())) for a in r.accs]
    terms: list[AccTerm | ValTerm] = [*r.accs, *r.vals]
    for term in terms:
        if term.copies:
            wide = max(1, *(max(c.position).bit_length() for c in term.copies))
            rows += [x for c in term.copies for x in ((c.position, wide), (c.sign, 2))]
        else:
            bits = term.m_bits + 1 if isinstance(term, AccTerm) else term.n_bits
            rows.append((term.multiplier, bits))
    for row, bits in rows:
        if len(row) > 1 and words > 1:
            yield Memory(y.lanes * bits, words, written=False, columns=_columns(row, bits, y, r))


def _columns(row: Row, bits: int, y: Stream, r: Requantize) -> int:
    """Columns of a row's memory that are neither constant nor another one's."""
    if r.spatial:
        return y.lanes * _distinct(row, bits, 1)
    return _distinct(row, bits, y.lanes)


@lru_cache(maxsize=1 << 12)
def _distinct(row: Row, bits: int, lanes: int) -> int:
    """The different columns, constants apart, of entries that stand in so many lanes."""
    words = np.array([row[i : i + lanes] for i in range(0, len(row), lanes)], object)
    half = (1 << 32) - 1
    # a field may have more than 64 bits
    parts = [((words >> at) & half).astype(np.int64) for at in range(0, bits, 32)]
    spread = [p[..., None] >> np.arange(min(32, bits - 32 * i)) & 1 for i, p in enumerate(parts)]
    columns = np.concatenate([x.reshape(len(words), -1) for x in spread], axis=1)
    varied = columns[:, (columns != columns[0]).any(axis=0)]
    return len({column.tobytes() for column in varied.T.astype(np.uint8)})
