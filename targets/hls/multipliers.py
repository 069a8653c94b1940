"""DSP blocks that a unit's Verilog takes, as yosys maps multiplications: DSP48E1 of xc7, MULT18X18D of ECP5.

`synth_xilinx` and `synth_ecp5` give every product a block whose operands have two bits or more (and, on xc7, whose
result has nine or more); narrower ones become LUTs. No product here is wider than a block: the library's qc_multiply
cuts wide operands itself, by the rules that `_pieces` repeats. A multiplier that is the same for all words is a
constant: a zero or a power of two is wires, any other loses its zero low bits and repeated signs before the rule is
applied. So do results lose high bits that a constant shift leaves unused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import units
from .requantize import Requantize, Row, entry, signed_bits
from .units import Op, Stream

Family = Literal["xc7", "ecp5"]


@dataclass(frozen=True, slots=True)
class _Block:
    """Signed bits of the two operands of a block, and of the narrowest product that gets one."""

    wide: int
    narrow: int
    product: int


_BLOCKS = {"xc7": _Block(25, 18, 9), "ecp5": _Block(18, 18, 1)}


def dsps(op: Op, family: Family) -> int:
    """DSP blocks of one unit."""
    block = _BLOCKS[family]
    x = op.inputs[0]
    made = 0
    match op:
        case units.MatrixVector():
            made = op.pe * op.simd * _product(block, _bits(x), op.weight_bits, op.acc_bits)
        case units.Depthwise():
            made = op.output.lanes * _product(block, _bits(x), op.weight_bits, op.acc_bits)
        case units.Softmax():
            made = sum(_cut(block, a, b, a + b, None) for a, b in SOFTMAX_PRODUCTS)
    if isinstance(op, units.Sum) and op.requantize is not None:
        made += _requantize(block, op, op.requantize, [op.acc_bits], op.inputs[1:])
    elif isinstance(op, units.Elementwise):
        split = len(op.requantize.accs)
        accs = [_bits(s) for s in op.inputs[:split]]
        made += _requantize(block, op, op.requantize, accs, op.inputs[split:])
    return made


SOFTMAX_PRODUCTS = ((34, 34), (33, 34))
"""Signed bits of what a softmax multiplies: a step of Newton's iteration, and an exponential by the inverted sum."""


NARROW = 6
"""Bits of a highest piece of an operand that qc_multiply gives no block."""


def _bits(s: Stream) -> int:
    """Bits of an element as a signed number."""
    return s.bits + int(not s.signed)


def _requantize(
    block: _Block, op: Op, r: Requantize, accs: list[int], values: tuple[Stream, ...]
) -> int:
    terms: list[tuple[int, bool, int, Row, Row]] = []
    for a, bits in zip(r.accs, accs, strict=True):
        if not a.copies:
            terms.append((bits, False, a.m_bits + 1, a.multiplier, a.shift))
    for v, s in zip(r.vals, values, strict=True):
        if not v.copies:
            terms.append((_bits(s), not s.signed, v.n_bits, v.multiplier, (0,)))
    y = op.output
    words = y.pixels if r.spatial else y.channels // y.lanes
    made = 0
    for bits, positive, m_bits, multiplier, shift in terms:
        for lane in range(y.lanes):
            at = 0 if r.spatial else lane
            # a memory of one word is a constant, which differs from lane to lane
            m = entry(multiplier, at) if len(multiplier) == 1 or words == 1 else None
            fixed = len(shift) == 1 or words == 1
            used = r.t_bits + entry(shift, at) if fixed else bits + m_bits
            made += _cut(block, bits, m_bits, used, m, positive)
    return made


def _pieces(width: int, most: int) -> list[int]:
    """Bits of the pieces of an operand, lowest first: all but the last are unsigned numbers of one bit less."""
    count = 1 if width <= most else -(-(width - 1) // (most - 1))
    return [most] * (count - 1) + [width - (count - 1) * (most - 1)]


def _cut(
    block: _Block, a: int, b: int, used: int, constant: int | None, positive: bool = False
) -> int:
    """Blocks of qc_multiply, of whose product the low `used` bits matter.

    b may be a constant; a may be known to be positive.
    """
    ways = ((block.wide, block.narrow), (block.narrow, block.wide))
    most_a, most_b = min(ways, key=lambda m: len(_pieces(a, m[0])) * len(_pieces(b, m[1])))
    high, low = _pieces(a, most_a), _pieces(b, most_b)
    made = 0
    for i, wa in enumerate(high):
        for j, wb in enumerate(low):
            if (i > 0 and wa <= NARROW) or (j > 0 and wb <= NARROW):
                continue
            rest = used - i * (most_a - 1) - j * (most_b - 1)
            # neither has a sign then: a bit is a choice, no multiplication
            if positive and wa == 2 and j < len(low) - 1:
                continue
            if constant is None:
                made += _product(block, wa, wb, rest)
                continue
            part = constant >> (j * (most_b - 1))
            if j < len(low) - 1:
                part &= (1 << (most_b - 1)) - 1
            if part.bit_count() > 1:
                zeros = (part & -part).bit_length() - 1
                part >>= zeros
                made += _product(block, wa, signed_bits(part, part), rest - zeros)
    return made


def _product(block: _Block, a: int, b: int, used: int) -> int:
    """One block or none."""
    return int(min(a, b) > 1 and min(a + b, used) >= block.product)
