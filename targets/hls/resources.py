"""What a pipeline takes of a part before synthesis: DSP blocks and block RAMs by rule, LUTs by a fitted model.

A unit's LUTs are a sum over its parts - adder bits, multiplexer bits, multiplications without a DSP block, the LUTs of
memories - each times a coefficient that depends on the kind of unit. `benchmarks/fpga_resources.py --fit` fits them to
yosys runs of single units and writes luts.json, with the errors on units that took no part in the fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qcompile import target

from . import memories, units
from .devices import Device
from .multipliers import Family, dsps
from .pipeline import Pipeline
from .requantize import AccTerm, Requantize, Row, ValTerm
from .token import Timing, work
from .units import Op, Stream

Parts = Mapping[str, float]
"""How much of each part of the LUT model there is, by the part's name."""


@dataclass(frozen=True, slots=True)
class Cost:
    """DSP blocks, 18-kbit block RAMs, LUTs."""

    dsp: int = 0
    bram18: int = 0
    lut: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.dsp + other.dsp, self.bram18 + other.bram18, self.lut + other.lut)


@dataclass(frozen=True, slots=True)
class LutModel:
    """LUTs of each part; the median and the largest relative error on units that it was not fitted to.

    `network` is the largest relative error on whole networks. `tool` made the runs.
    """

    tool: str
    coefficients: Parts
    fitted: int
    held_out: int
    median: float
    largest: float
    network: float

    @property
    def error(self) -> float:
        """The relative error that is stated of a design: the larger of a unit's median and a network's largest."""
        return max(self.median, self.network)

    def lut(self, parts: Parts) -> float:
        """LUTs of something made of these parts."""
        return sum(self.coefficients.get(name, 0.0) * x for name, x in parts.items())


@cache
def lut_model(family: Family) -> LutModel:
    """The fitted model of a family."""
    text = (Path(__file__).parent / "luts.json").read_text()
    return LutModel(**json.loads(text)[family])


def cost(op: Op, family: Family) -> Cost:
    """What one unit takes."""
    blocks = sum(memories.placed(m, family).bram18 for m in memories.of(op))
    return Cost(dsps(op, family), blocks, lut_model(family).lut(unit_parts(op, family)))


def fifo_cost(s: Stream, family: Family) -> Cost:
    """What a FIFO takes."""
    placed = memories.placed(memories.of_fifo(s), family)
    return Cost(0, placed.bram18, lut_model(family).lut(fifo_parts(s, family)))


def total(pipeline: Pipeline, family: Family) -> Cost:
    """What all units and FIFOs take."""
    made = sum((cost(op, family) for op in pipeline.ops), Cost())
    return sum((fifo_cost(s, family) for s in pipeline.fifos.values()), made)


def estimate(pipeline: Pipeline, device: Device) -> tuple[target.Unit, ...]:
    """Every unit and what it takes."""
    made = []
    for op in pipeline.ops:
        taken, (pe, simd) = cost(op, device.family), op.fold or (op.output.lanes, 1)
        kind = type(op).__name__
        made.append(
            target.Unit(
                op.name, op.layer, kind, pe, simd, work(op), taken.dsp, taken.bram18, round(taken.lut)
            )
        )  # fmt: skip
    return tuple(made)


def describe(pipeline: Pipeline, device: Device, clock_mhz: float, timing: Timing) -> target.Design:
    """The design that a pipeline is on a part, of which the token model said `timing`."""
    taken, model = total(pipeline, device.family), lut_model(device.family)
    fifos = tuple(
        target.Fifo(name, s.word_bits, s.depth, timing.peaks[name])
        for name, s in pipeline.fifos.items()
    )
    return target.Design(
        part=device.name,
        clock_mhz=clock_mhz,
        latency=timing.latency,
        interval=timing.interval,
        units=estimate(pipeline, device),
        fifos=fifos,
        dsp=taken.dsp,
        bram18=taken.bram18,
        lut=round(taken.lut),
        lut_error=model.error,
        available=device.available,
    )


# ------------------------------------------------------------------------------ parts of the LUT model


def _bits(n: int) -> int:
    """Bits of a counter with n values."""
    return max(n - 1, 1).bit_length()


def _memory(found: Iterator[memories.Memory], family: Family) -> dict[str, float]:
    """LUTs of memories that are no block RAM, and of choosing between the pieces of those that are many."""
    parts = {"memory.rom": 0.0, "memory.ram": 0.0, "memory.muxes": 0.0, "memory.bits": 0.0}
    for m in found:
        placed = memories.placed(m, family)
        parts["memory.muxes"] += placed.muxes
        if placed.kind == "logic" and m.written and m.depth > 1:
            parts["memory.bits"] += m.width * m.depth
        elif placed.kind == "logic":
            parts["memory.rom"] += placed.lut
        else:
            parts["memory.ram"] += placed.lut
    return parts


def fifo_parts(s: Stream, family: Family) -> Parts:
    """A FIFO: its pointers, and the word that goes around a deep one's memory."""
    return {
        "fifo": 1,
        "fifo.pointer": _bits(s.depth),
        "fifo.word": s.word_bits if s.depth > memories.SHALLOW else 0,
    } | _memory(iter([memories.of_fifo(s)]), family)


def unit_parts(op: Op, family: Family) -> Parts:
    """A unit's parts."""
    x, y = op.inputs[0], op.output
    kind = type(op).__name__.lower()
    parts: dict[str, float] = {kind: 1} | _memory(memories.of(op), family)
    match op:
        case units.MatrixVector():
            (o, k), signed = op.weights.shape, x.bits + int(not x.signed)
            soft = dsps(replace(op, requantize=None), family) == 0
            groups, steps = o // op.pe, k // op.simd
            parts["product.soft"] = op.pe * op.simd * signed * op.weight_bits if soft else 0
            added, compressed = _tree(op.simd, signed + op.weight_bits, op.acc_bits)
            parts["matvec.added"] = op.pe * added
            parts["matvec.compressed"] = op.pe * compressed
            parts["matvec.sum"] = op.pe * op.acc_bits
            parts["matvec.kept"] = x.word_bits
            parts["matvec.counter"] = _bits(groups) + _bits(steps) + _bits(groups * steps)
        case units.Depthwise():
            signed = x.bits + int(not x.signed)
            soft = dsps(replace(op, requantize=None), family) == 0
            parts["product.soft"] = y.lanes * signed * op.weight_bits if soft else 0
            parts["depthwise.sum"] = y.lanes * op.acc_bits
            folds = y.channels // y.lanes
            parts["depthwise.counter"] = _bits(folds) + _bits(x.taps) + _bits(folds * x.taps)
        case units.SumPool() | units.GlobalSum():
            parts["pool.sum"] = y.lanes * op.acc_bits
            parts["pool.word"] = x.word_bits if op.zero_point else 0
            parts["pool.counter"] = _bits(x.words)
        case units.MaxPool():
            parts["maxpool.word"] = x.word_bits
            parts["maxpool.counter"] = _bits(x.taps)
        case units.Window():
            span = (op.kernel[0] - 1) * op.dilations[0] + 1
            address = _bits((span + op.strides[0]) * x.width * x.folds)
            parts["window.address"] = address
            parts["window.word"] = x.word_bits if op.fill and any(op.pads) else 0
            parts["window.pads"] = address if any(op.pads) else 0
            parts["window.rows"] = address * -(-y.height // 64)
            sizes = (x.folds, op.kernel[0], op.kernel[1], y.height, y.width)
            parts["window.counter"] = sum(_bits(n) for n in sizes if n > 1)
        case units.Concat():
            parts["concat.word"] = y.word_bits * (len(op.inputs) - 1)
        case units.ChannelPad():
            parts["channelpad.word"] = y.word_bits
        case units.Fork():
            parts["fork.readers"] = len(op.outputs)
        case units.Width():
            wide = y.lanes > x.lanes
            parts = {"widen": 1} if wide else {"narrow": 1, "narrow.word": x.word_bits}
        case units.Softmax():
            parts["softmax.counter"] = _bits(y.channels)
    if isinstance(op, units.Sum | units.Elementwise) and op.requantize is not None:
        parts |= _requantize(op, op.requantize, family)
    return parts


def _requantize(op: Op, r: Requantize, family: Family) -> dict[str, float]:
    y, lanes = op.output, op.output.lanes
    core = dsps(replace(op, requantize=None), family) if isinstance(op, units.Sum) else 0
    taken = dsps(op, family) - core
    terms: list[AccTerm | ValTerm] = [*r.accs, *r.vals]
    words = y.pixels if r.spatial else y.channels // lanes
    multiplied = [t for t in terms if not t.copies]
    # with a block for every product there is nothing to add; more blocks than products are pieces that are added
    products = lanes * sum(
        len(t.multiplier) > 1 or t.multiplier[0].bit_count() > 1 for t in multiplied
    )
    widest = max((t.product_bits for t in multiplied), default=0)
    shifters = sum(_spread(a.shift) * min(a.product_bits, r.t_bits) for a in r.accs)
    copied = [(c, t.product_bits) for t in terms for c in t.copies]
    # a constant's zero low bits are not added
    fixed = len(r.offset) == 1
    return {
        "requantize": 1,
        "requantize.index": _bits(words) if r.entries > 1 else 0,
        "requantize.pieces": max(0, taken - products) * widest,
        "requantize.soft": max(0, products - taken) * widest * 8,
        "requantize.copies": lanes * sum(bits for c, bits in copied if c.sign != (1,)),
        "requantize.places": lanes * sum(_spread(c.position) * bits for c, bits in copied),
        "requantize.sum": lanes * r.t_bits * (len(terms) - 1 if fixed else len(terms)),
        "requantize.offset": lanes * (r.t_bits - _zeros(r.offset[0])) if fixed else 0,
        "requantize.shift": lanes * (shifters + _spread(r.shift) * (r.t_bits - min(r.shift))),
        "requantize.clamp": lanes * (y.bits + max(0, r.t_bits - min(r.shift) - y.bits) / 2),
        "requantize.late": sum(s.word_bits for s in op.inputs[1:]) if len(terms) > 1 else 0,
    }


def _tree(simd: int, bits: int, acc_bits: int) -> tuple[int, int]:
    """Bits of carry chains, and of the compressors before them, that add products in two stages as qc_matvec does."""
    radix = 1 << ((simd - 1).bit_length() + 1) // 2
    sums = [(n, bits) for n in [radix] * (simd // radix) + [simd % radix]]
    sums.append((-(-simd // radix), acc_bits))
    grown = [(n, min(acc_bits, b + (n - 1).bit_length())) for n, b in sums if n > 1]
    return sum(b for _, b in grown), sum((n - 2) * b for n, b in grown)


def _zeros(n: int) -> int:
    """How many low bits are zeros."""
    return (n & -n).bit_length() - 1 if n else 0


def _spread(shift: Row) -> int:
    """Stages of a shifter between the smallest and the largest shift."""
    return (max(shift) - min(shift)).bit_length()
