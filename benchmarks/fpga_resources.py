"""LUTs of the FPGA target's units, from yosys: re-fits the model of targets/hls/luts.json and prints tables.

    python benchmarks/fpga_resources.py --fit [--families xc7,ecp5] [--points POINTS.json] [--jobs 2]
    python benchmarks/fpga_resources.py --minifloat

A point of the fit is one unit, or one FIFO, with drawn sizes and widths, synthesized alone. Three of four points of
each kind are fitted to, by least squares of the relative error with coefficients that are not negative; the fourth says
how far the model is off, and whole networks say it again. POINTS keeps the runs, from which later fits go on.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from scipy.optimize import nnls

from qcompile.ir import (
    Conv,
    DType,
    Graph,
    Lut,
    MaxPool,
    Port,
    Rescale,
    Softmax,
    SumPool,
    TensorType,
    Value,
    arith,
)
from qcompile.ir.proof import accumulator_bound, code_range
from qcompile.targets.hls import pipeline as pipelines
from qcompile.targets.hls import resources, units, verilog
from qcompile.targets.hls.legalise import Folding, legalise
from qcompile.targets.hls.multipliers import Family
from qcompile.targets.hls.pipeline import Pipeline

LUTS = Path(resources.__file__).parent / "luts.json"
SECONDS = 1800


# ------------------------------------------------------------------------------ synthesis


@dataclass(frozen=True)
class Taken:
    """What yosys made: LUTs with those that are memory or shift registers, flip-flops, DSP blocks, 18-kbit RAMs."""

    lut: int
    ff: int
    dsp: int
    bram18: int


# LUTs of a cell that takes some: those of a RAM32M are four, a carry chain of ECP5 is made of LUTs
CELLS = {
    "RAM32M": 4, "RAM64M": 4, "RAM64X1D": 2, "RAM32X1D": 2, "RAM128X1D": 4, "RAM64X1S": 1, "RAM32X1S": 1,
    "RAM128X1S": 2, "RAM256X1S": 4, "SRL16E": 1, "SRLC32E": 1,
    "LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 6,
} | {f"LUT{i}": 1 for i in range(1, 7)}  # fmt: skip
FLIP_FLOPS = ("FDRE", "FDSE", "FDCE", "FDPE", "TRELLIS_FF")
DSPS = ("DSP48E1", "MULT18X18D")
RAMS = {"RAMB18E1": 1, "RAMB36E1": 2, "DP16KD": 1}
# without the cells that yosys only knows by name, whose declarations take longer to read than a small unit to map
SYNTHESIS = {
    "xc7": (
        "read_verilog -lib -specify +/xilinx/cells_sim.v",
        "synth_xilinx -family xc7 -flatten -noiopad -noclkbuf -run prepare:check",
    ),
    "ecp5": (
        "read_verilog -lib -specify +/ecp5/cells_sim.v +/ecp5/cells_bb.v",
        "synth_ecp5 -run coarse:check",
    ),
}
DEFINES = {"xc7": "", "ecp5": "-DQC_WIDE=18"}


def synthesize(files: Mapping[str, bytes], top: str, family: Family, options: str = "") -> Taken:
    """Run yosys on Verilog files and the memories they name."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for path, data in files.items():
            if "/" not in path:
                (folder / path).write_bytes(data)
        sources = " ".join(sorted(p.name for p in folder.glob("*.v")))
        library, synthesis = SYNTHESIS[family]
        script = (
            f"{library}; read_verilog {DEFINES[family]} -defer {sources}; hierarchy -check -top {top};"
            f" {synthesis} {options} -top {top}; tee -o cells.txt stat"
        )
        done = subprocess.run(
            ["yosys", "-q", "-p", script],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        cells: dict[str, int] = {}
        for line in (folder / "cells.txt").read_text().splitlines():
            match line.split():
                case [kind, count] if count.isdigit() and kind.isupper():
                    cells[kind] = int(count)
    return Taken(
        sum(CELLS[c] * n for c, n in cells.items() if c in CELLS),
        sum(cells.get(c, 0) for c in FLIP_FLOPS),
        sum(cells.get(c, 0) for c in DSPS),
        sum(size * cells.get(c, 0) for c, size in RAMS.items()),
    )


def synthesize_pipeline(pipeline: Pipeline, family: Family) -> Taken:
    """What a whole pipeline takes."""
    none = {p.name: np.zeros((0, *p.shape), p.dtype.numpy) for p in pipeline.inputs}
    return synthesize(verilog.emit(pipeline, "design", none), "design", family)


def alone(op: units.Op) -> Pipeline:
    """A pipeline of one unit."""

    def port(s: units.Stream) -> pipelines.Port:
        return pipelines.Port(s.name, s, DType.I8, (s.words * s.lanes,), None, "")

    ends = tuple(map(port, op.inputs)), tuple(map(port, op.outputs))
    return Pipeline(op.name, *ends, (op,))


# ------------------------------------------------------------------------------ points


class Layer:
    """A graph of one layer or a few, with drawn weights."""

    def __init__(self, rng: random.Random, shape: tuple[int, ...], kind: DType = DType.I8) -> None:
        self.graph = Graph("layer")
        self.numbers = np.random.default_rng(rng.randrange(1 << 30))
        self.x = self.graph.add_input(Port("x", 0.1, 0), TensorType(kind, (1, *shape)))

    def constant(self, kind: DType, *shape: int) -> Value:
        """Codes over a whole type, or a fraction of one of 32 bits."""
        reach = (kind.lo, kind.hi) if kind.bits <= 16 else (-(1 << 12), 1 << 12)
        codes = self.numbers.integers(reach[0], reach[1] + 1, shape).astype(kind.numpy)
        return self.graph.constant(codes, TensorType(kind, shape), "constant")

    def conv(
        self, x: Value, outputs: int, kernel: int, stride: int, pad: int, bits: int, groups: int = 1
    ) -> Value:
        """A square convolution's accumulator."""
        shape = (outputs, kernel, kernel, x.type.shape[-1] // groups)
        operands = self.constant(DType.of(bits), *shape), self.constant(DType.I32, outputs)
        op = Conv((stride, stride), (pad,) * 4, (1, 1), groups, 3 if pad else 0)
        return self.graph.add(op, x, *operands, name="layer")

    def rescale(self, acc: Value, *values: Value, out: DType = DType.I8, bits: int = 16) -> Value:
        """To the type's whole range, with a multiplier of so many bits for each channel."""
        made = acc.producer
        assert made is not None
        bounds = [int(b) for b in accumulator_bound(made)]
        scale = [
            Fraction(out.hi * int(self.numbers.integers(50, 100)), 64 * (b + 1)) for b in bounds
        ]
        spans = [arith.ValOperand(Fraction(3, 4), 2, *code_range(v)) for v in values]
        operand = arith.AccOperand(tuple(scale), tuple(bounds))
        fit = arith.fit_rescale([operand], spans, bits=bits)
        op = Rescale(fit.accs, fit.vals, fit.f, 1, out.lo, out.hi, out)
        return self.graph.add(op, acc, *values, name="rescale")

    def pipeline(self, y: Value, folding: Folding | None = None) -> Pipeline:
        """The pipeline of the layers that make y."""
        self.graph.add_output(Port("y", 0.1, 0), y)
        return legalise(self.graph, folding)


def divisor(rng: random.Random, n: int, most: int) -> int:
    """Any divisor up to a limit, larger ones more often."""
    found = [d for d in range(1, min(n, most) + 1) if n % d == 0]
    return max(rng.choice(found), rng.choice(found))


WIDTHS = (
    (8, DType.I8),
    (8, DType.I8),
    (8, DType.U8),
    (4, DType.I8),
    (4, DType.I4),
    (3, DType.I4),
    (2, DType.I4),
)


def matrix(rng: random.Random) -> Pipeline:
    """A dense layer or a pointwise convolution; one of five joins a stream."""
    bits, kind = rng.choice(WIDTHS)
    k, o = rng.choice([8, 16, 24, 32, 48, 64, 144]), rng.choice([4, 8, 10, 16, 32, 64])
    most = rng.choice([1, 2, 4, 8, 8, 16])
    folding = {"layer": (divisor(rng, o, most), divisor(rng, k, most))}
    layer = Layer(rng, (4, 4, k), kind)
    if rng.random() < 0.2:
        layer = Layer(rng, (4, 4, k))
        folding = {"layer": (divisor(rng, k, 4), divisor(rng, k, 4))}
        return layer.pipeline(layer.rescale(layer.conv(layer.x, k, 1, 1, 0, 8), layer.x), folding)
    acc = layer.conv(layer.x, o, 1, 1, 0, bits)
    return layer.pipeline(
        layer.rescale(acc, out=kind, bits=rng.choice([3, 8, 16, 16, 16])), folding
    )


def depthwise(rng: random.Random) -> Pipeline:
    """A depthwise convolution."""
    bits, kind = rng.choice(WIDTHS)
    c = rng.choice([4, 8, 16, 64])
    layer = Layer(rng, (6, 6, c), kind)
    acc = layer.conv(layer.x, c, 3, rng.choice([1, 2]), 1, bits, groups=c)
    return layer.pipeline(layer.rescale(acc, out=kind), {"layer": (divisor(rng, c, 8), 1)})


def window(rng: random.Random) -> Pipeline:
    """Any window of a convolution."""
    c, n, k = (
        rng.choice([1, 3, 8, 16, 32]),
        rng.choice([5, 8, 12, 16, 32]),
        rng.choice([2, 3, 3, 5]),
    )
    layer = Layer(rng, (n, rng.choice([n, n + 3]), c), rng.choice([DType.I8, DType.I8, DType.I4]))
    grouped = rng.random() < 0.3
    acc = layer.conv(
        layer.x, c, k, rng.choice([1, 2]), rng.choice([0, 1, 1]), 4, c if grouped else 1
    )
    lanes = divisor(rng, c, 16)
    return layer.pipeline(layer.rescale(acc), {"layer": (lanes, 1 if grouped else lanes)})


def pool(rng: random.Random) -> Pipeline:
    """A pool of a window's sums, of a whole map's, or of the largest."""
    c, kind = rng.choice([4, 8, 16, 64]), rng.choice([DType.I8, DType.U8, DType.I4])
    layer, lanes = Layer(rng, (8, 8, c), kind), divisor(rng, c, 8)
    chosen = rng.randrange(3)
    if chosen == 0:
        y = layer.graph.add(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), layer.x, name="layer")
        return layer.pipeline(y, {"layer": (lanes, 1)})
    size, zero = (8, 8) if chosen == 1 else (2, 2), rng.choice([0, 3])
    y = layer.graph.add(SumPool(size, size, (0,) * 4, zero), layer.x, name="layer")
    return layer.pipeline(layer.rescale(y, out=kind), {"layer": (lanes, 1)})


def join(rng: random.Random) -> Pipeline:
    """An addition of two or three streams."""
    c, kind = rng.choice([4, 8, 16]), rng.choice([DType.I8, DType.U8, DType.I4])
    layer = Layer(rng, (4, 4, c), kind)
    others = [
        layer.graph.add_input(Port(f"x{i}", 0.1, 0), TensorType(kind, (1, 4, 4, c)))
        for i in range(rng.choice([1, 1, 2]))
    ]
    values = [layer.x, *others]
    spans = [
        arith.ValOperand(Fraction(rng.randrange(20, 60), 64), 2, *code_range(v)) for v in values
    ]
    fit = arith.fit_rescale([], spans, bits=16)
    op = Rescale(fit.accs, fit.vals, fit.f, 1, kind.lo, kind.hi, kind)
    y = layer.graph.add(op, *values, name="layer")
    return layer.pipeline(y, {"layer": (divisor(rng, c, 8), 1)})


def route(rng: random.Random) -> Pipeline:
    """A concatenation, a fork or a width converter."""
    bits, lanes, n = rng.choice([4, 8, 8, 16]), rng.choice([1, 2, 4]), rng.choice([2, 2, 3, 4])

    def stream(name: str, channels: int, lanes: int) -> units.Stream:
        return units.Stream(name, bits, True, 4, 4, channels, lanes)

    wide, narrow = stream("wide", 2 * n * lanes, n * lanes), stream("narrow", 2 * n * lanes, lanes)
    parts = tuple(stream(f"part{i}", 2 * lanes, lanes) for i in range(n))
    arms = tuple(stream(f"arm{i}", 2 * n * lanes, lanes) for i in range(n))
    padded = stream("padded", 2 * n * lanes + 2 * lanes, lanes)
    made: list[units.Op] = [
        units.Concat("unit", "layer", parts, (narrow,)),
        units.Fork("unit", "layer", (narrow,), arms),
        units.ChannelPad("unit", "layer", (narrow,), (padded,), lanes, lanes, 3),
        units.Width("unit", "layer", (narrow,), (wide,)),
        units.Width("unit", "layer", (wide,), (narrow,)),
    ]
    return alone(rng.choice(made))


def softmax(rng: random.Random) -> Pipeline:
    """A softmax."""
    layer = Layer(rng, (1, rng.choice([4, 10, 32])))
    codes = np.exp2(30 - np.arange(256) / 16).astype(np.int32) // 32
    exps = layer.graph.constant(codes, TensorType(DType.I32, (256,)), "exponentials")
    return layer.pipeline(layer.graph.add(Softmax(25, DType.I8), layer.x, exps, name="layer"))


def table(rng: random.Random) -> Pipeline:
    """A table."""
    kind = rng.choice([DType.I8, DType.I4, DType.U8])
    layer = Layer(rng, (4, 4, 8), kind)
    y = layer.graph.add(Lut(), layer.x, layer.constant(DType.I8, 1 << kind.bits), name="layer")
    return layer.pipeline(y, {"layer": (divisor(rng, 8, 4), 1)})


KINDS: Mapping[Callable[[random.Random], Pipeline], tuple[int, tuple[type[units.Op], ...]]] = {
    matrix: (20, (units.MatrixVector,)),
    depthwise: (7, (units.Depthwise,)),
    window: (11, (units.Window,)),
    pool: (9, (units.MaxPool, units.SumPool, units.GlobalSum)),
    join: (7, (units.Elementwise,)),
    route: (12, (units.Concat, units.ChannelPad, units.Fork, units.Width)),
    table: (3, (units.Table,)),
    softmax: (2, (units.Softmax,)),
}  # fmt: skip
FIFOS = (
    (8, 2), (32, 2), (128, 2), (8, 40), (64, 16), (32, 100), (16, 300), (128, 40), (64, 512), (8, 2000), (64, 1500),
    (4, 5),
)  # fmt: skip


Parts = Callable[[Family], resources.Parts]
Run = Callable[[Family], Taken]


@dataclass(frozen=True)
class Point:
    """Something to synthesize alone: its parts in the LUT model, and its run."""

    name: str
    parts: Parts
    run: Run


def points() -> Iterator[Point]:
    """Every point, in order; the fourth of each kind is held out."""
    for kind, (count, types) in KINDS.items():
        for i in range(count):
            rng = random.Random(f"{kind.__name__}{i}")
            op = rng.choice([op for op in kind(rng).ops if isinstance(op, types)])
            made = alone(op)
            yield Point(
                f"{kind.__name__}{i}",
                lambda f, op=op: resources.unit_parts(op, f),
                lambda f, made=made: synthesize_pipeline(made, f),
            )
    fifo = (verilog.RTL / "qc_fifo.v").read_bytes()
    for i, (bits, depth) in enumerate(FIFOS):
        s = units.Stream("fifo", bits, True, 1, 1, 1, 1, depth=depth)
        yield Point(
            f"fifo{i}",
            lambda f, s=s: resources.fifo_parts(s, f),
            lambda f, s=s: synthesize({"qc_fifo.v": fifo, "top.v": _top(s)}, "top", f),
        )


def _top(s: units.Stream) -> bytes:
    w = s.word_bits
    ports = f"input clk, rst, input [{w - 1}:0] d, input v, output r, output [{w - 1}:0] q, output m_v, input m_r"
    pins = ".clk(clk), .rst(rst), .s_d(d), .s_v(v), .s_r(r), .m_d(q), .m_v(m_v), .m_r(m_r)"
    return f"module top({ports}); qc_fifo #(.W({w}), .D({s.depth})) f({pins}); endmodule\n".encode()


def networks() -> Iterator[tuple[str, Pipeline]]:
    """Whole networks: a small CNN in two foldings, a residual one."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.targets.test_families import network
    from tests.targets.test_pipeline import residual

    folded = {"first.acc": (4, 9), "pool": (2, 1), "second.acc": (4, 8), "dense.acc": (5, 24)}
    yield "network", legalise(network())
    yield "network, folded", legalise(network(), folded)
    yield "residual, folded", legalise(residual(), {"conv": (2, 4)})


# ------------------------------------------------------------------------------ fit


LEAST = 30
"""LUTs under which an error counts as if there were so many."""


def measured(
    family: Family, keep: Path | None, jobs: int
) -> tuple[list[tuple[str, resources.Parts, Taken]], list[tuple[str, Pipeline, Taken]]]:
    """All points and networks with what yosys made of them; runs that `keep` has are not made again."""
    known: dict[str, Taken] = {}
    if keep is not None and keep.exists():
        known = {n: Taken(*t) for n, t in json.loads(keep.read_text()).get(family, {}).items()}
    chosen, nets = list(points()), list(networks())
    todo: dict[str, Run] = {p.name: p.run for p in chosen}
    todo |= {n: (lambda f, made=made: synthesize_pipeline(made, f)) for n, made in nets}
    todo = {n: run for n, run in todo.items() if n not in known}
    with ThreadPoolExecutor(jobs) as pool_:
        for name, taken in zip(
            todo, pool_.map(lambda run: run(family), todo.values()), strict=True
        ):
            known[name] = taken
            print(f"{family} {name}: {taken}", file=sys.stderr, flush=True)
            if keep is not None:
                every = json.loads(keep.read_text()) if keep.exists() else {}
                every[family] = {n: list(asdict(t).values()) for n, t in known.items()}
                keep.write_text(json.dumps(every))
    return (
        [(p.name, p.parts(family), known[p.name]) for p in chosen],
        [(n, made, known[n]) for n, made in nets],
    )


def fit(family: Family, keep: Path | None, jobs: int) -> resources.LutModel:
    """Synthesize, fit, print how far off it is."""
    runs, nets = measured(family, keep, jobs)
    names = sorted({n for _, parts, _ in runs for n in parts})
    held = [int("".join(c for c in name if c.isdigit())) % 4 == 3 for name, _, _ in runs]
    a = np.array([[parts.get(n, 0.0) for n in names] for _, parts, _ in runs])
    luts = np.array([float(taken.lut) for _, _, taken in runs])
    weight = 1 / np.maximum(luts, LEAST)
    train = ~np.array(held)
    found, _ = nnls(a[train] * weight[train, None], luts[train] * weight[train])
    errors = np.abs(a @ found - luts) * weight
    coefficients = {n: round(float(c), 3) for n, c in zip(names, found, strict=True) if c > 0.0005}
    for i in np.argsort(-errors)[:8]:
        print(f"  {runs[i][0]}: {a[i] @ found:.0f} for {luts[i]:.0f} LUTs{', held out' * held[i]}")
    tool = subprocess.run(
        ["yosys", "-V"], capture_output=True, text=True, check=True
    ).stdout.split()
    out = errors[~train]
    model = resources.LutModel(
        f"yosys {tool[1]}",
        coefficients,
        int(train.sum()),
        len(out),
        round(float(median(out)), 3),
        round(float(out.max()), 3),
        0.0,
    )
    worst = 0.0
    for name, made, taken in nets:
        parts = [resources.unit_parts(op, family) for op in made.ops]
        parts += [resources.fifo_parts(s, family) for s in made.fifos.values()]
        said = sum(map(model.lut, parts))
        worst = max(worst, abs(said / taken.lut - 1))
        print(f"  {family} {name}: {said:.0f} LUTs by the model, {taken.lut} by yosys")
    return resources.LutModel(**{**asdict(model), "network": ceil(worst * 1000) / 1000})


# ------------------------------------------------------------------------------ formats

TERMS = 256
"""Products that the accumulator of a table's MAC holds without overflow."""

INTEGERS = ((3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (3, 8), (4, 8), (6, 8))
MINIFLOATS = (
    (2, 0), (2, 1), (3, 0), (2, 2), (3, 1), (2, 3), (3, 2), (2, 4), (3, 3), (4, 2), (2, 5), (3, 4), (4, 3), (5, 2),
)  # fmt: skip


def integer_mac(w: int, a: int) -> tuple[str, int]:
    """Verilog of one multiply-accumulate of signed integers, and the accumulator's bits."""
    acc = w + a + (TERMS - 1).bit_length()
    text = f"""module mac (input clk, clear, input signed [{w - 1}:0] w, input signed [{a - 1}:0] a,
            output reg signed [{acc - 1}:0] acc);
  wire signed [{w + a - 1}:0] product = w * a;
  always @(posedge clk) acc <= clear ? product : acc + product;
endmodule
"""
    return text, acc


def minifloat_mac(exponent: int, mantissa: int) -> tuple[str, int]:
    """Verilog of one exact multiply-accumulate of minifloats, and the accumulator's bits.

    A code is a sign, `exponent` bits and `mantissa` bits; exponent 0 means subnormal numbers, every code is finite. The
    significands are multiplied, the exponents added, the product is shifted to its place in a fixed-point number that
    holds every product exactly, and added or subtracted.
    """
    bits, significand = 1 + exponent + mantissa, mantissa + 1
    most = 2 * ((1 << exponent) - 2)
    product = 2 * significand + most
    acc = product + 1 + (TERMS - 1).bit_length()

    def part(x: str) -> str:
        field = f"{x}[{bits - 2}:{mantissa}]"
        low = f", {x}[{mantissa - 1}:0]" if mantissa else ""
        return (
            f"  wire {x}_normal = |{field};\n"
            f"  wire [{significand - 1}:0] {x}_significand = {{{x}_normal{low}}};\n"
            f"  wire [{exponent - 1}:0] {x}_exponent = {x}_normal ? {field} - 1'b1 : 0;\n"
        )

    text = f"""module mac (input clk, clear, input [{bits - 1}:0] w, input [{bits - 1}:0] a,
            output reg signed [{acc - 1}:0] acc);
{part("w")}{part("a")}  wire [{2 * significand - 1}:0] whole = w_significand * a_significand;
  wire [{exponent}:0] up = w_exponent + a_exponent;
  wire [{product - 1}:0] product = whole << up;
  wire signed [{acc - 1}:0] wide = product, begun = clear ? 0 : acc;
  always @(posedge clk) acc <= w[{bits - 1}] ^ a[{bits - 1}] ? begun - wide : begun + wide;
endmodule
"""
    return text, acc


def formats(jobs: int) -> None:
    """Print the LUTs of one multiply-accumulate in every format, without DSP blocks."""
    macs = [(f"int{w} x int{a}", max(w, a), integer_mac(w, a)) for w, a in INTEGERS]
    macs += [(f"E{e}M{m}", 1 + e + m, minifloat_mac(e, m)) for e, m in MINIFLOATS]

    def lut(text: str) -> int:
        return synthesize({"mac.v": text.encode()}, "mac", "xc7", "-nodsp").lut

    with ThreadPoolExecutor(jobs) as pool_:
        luts = list(pool_.map(lut, (text for _, _, (text, _) in macs)))
    whole = {
        bits: n
        for (name, bits, _), n in zip(macs, luts, strict=True)
        if name == f"int{bits} x int{bits}"
    }
    print("| format | bits | accumulator | LUTs | to the integer of as many bits |")
    print("|---|---|---|---|---|")
    for (name, bits, (_, acc)), n in zip(macs, luts, strict=True):
        print(f"| {name} | {bits} | {acc} | {n} | {n / whole[bits]:.2f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fit", action="store_true", help="measure, fit and write luts.json")
    parser.add_argument("--minifloat", action="store_true", help="print the table of formats")
    parser.add_argument("--families", default="xc7,ecp5", help="which families to fit")
    parser.add_argument("--points", type=Path, help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    given = parser.parse_args(arguments)
    if given.minifloat:
        formats(given.jobs)
    if given.fit:
        models = json.loads(LUTS.read_text()) if LUTS.exists() else {}
        for family in given.families.split(","):
            model = fit(family, given.points, given.jobs)
            print(
                f"{family}: off by {model.median:.1%}, at most {model.largest:.1%}, on {model.held_out} units"
            )
            models[family] = asdict(model)
        LUTS.write_text(json.dumps(models, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
