"""Random integer graphs: every operator alone with any legal attributes, and small whole graphs.

Every graph is proved: no accumulator and no rescale leaves 32 bits for any codes of the inputs' types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from qcompile.ir import Array, DType, Graph, Port, TensorType, Value, ops
from qcompile.ir.arith import Acc, Val
from qcompile.ir.proof import code_range, prove, prove_rescale

Draw = Callable[[st.SearchStrategy], object]

BYTES = (DType.I8, DType.I8, DType.I8, DType.U8, DType.I4, DType.I2, DType.I7)
NARROW = (*BYTES, DType.I16, DType.I16)
ANY = (*NARROW, DType.I32)
WEIGHTS = (DType.I8, DType.I8, DType.I4, DType.I2)
LIMIT = 1 << 31


def feeds(graph: Graph, seed: int, count: int = 4) -> list[dict[str, Array]]:
    """Input codes: uniform, then the extremes at random, then all lowest, then all highest."""
    rng = np.random.default_rng(seed)

    def codes(kind: TensorType, at: int) -> Array:
        lo, hi = kind.dtype.lo, kind.dtype.hi
        match at % 4:
            case 0:
                x = rng.integers(lo, hi + 1, kind.shape)
            case 1:
                x = rng.choice([lo, lo + 1, -1 if lo else 1, 0, 1, hi - 1, hi], kind.shape)
            case 2:
                x = np.full(kind.shape, lo)
            case _:
                x = np.full(kind.shape, hi)
        return x.astype(kind.dtype.numpy)

    return [{p.name: codes(v.type, at) for p, v in graph.inputs} for at in range(count)]


class Maker:
    """Adds drawn operators to a graph; operands are values at hand that fit, else new inputs or constants."""

    def __init__(self, draw: Draw, name: str = "g") -> None:
        self.draw = draw
        self.graph = Graph(name, free_batch=False)
        self.values: list[Value] = []
        self.rng = np.random.default_rng(self.int(0, 1 << 32))

    # ------------------------------------------------------------------------------ small draws

    def int(self, lo: int, hi: int) -> int:
        """A number in [lo, hi]."""
        return self.draw(st.integers(lo, hi))  # type: ignore[return-value]

    def ints(self, n: int, lo: int, hi: int) -> tuple[int, ...]:
        """That many numbers in [lo, hi]."""
        return tuple(self.int(lo, hi) for _ in range(n))

    def one(self, choices: Sequence) -> object:
        """One of the choices."""
        return self.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        """Heads or tails."""
        return self.draw(st.booleans())  # type: ignore[return-value]

    def edge(self, lo: int, hi: int) -> int:
        """A number in [lo, hi], often at its ends."""
        return self.one([lo, hi, self.int(lo, hi), self.int(lo, hi)])

    # --------------------------------------------------------------------------------- operands

    def input(self, dtype: DType, shape: tuple[int, ...]) -> Value:
        """A new graph input."""
        name = f"input {len(self.graph.inputs)}"
        zero = self.edge(dtype.lo, dtype.hi)
        return self.graph.add_input(Port(name, 0.1, zero), TensorType(dtype, shape))

    def const(self, dtype: DType, shape: tuple[int, ...], lo: int, hi: int) -> Value:
        """A constant with elements in [lo, hi]."""
        wild = self.flag()
        data = self.rng.choice([lo, hi], shape) if wild else self.rng.integers(lo, hi + 1, shape)
        return self.graph.constant(data.astype(dtype.numpy), TensorType(dtype, shape), "constant")

    def operand(self, dtypes: Sequence[DType], shape: tuple[int, ...]) -> Value:
        """A value of one of the types and of exactly this shape: one at hand, an input, or a constant."""
        fit = [v for v in self.values if v.type.dtype in dtypes and v.type.shape == shape]
        if fit and self.int(0, 3):
            return self.one(fit)
        dtype = self.one(dtypes)
        if self.int(0, 5) == 0:
            return self.const(dtype, shape, dtype.lo, dtype.hi)
        return self.input(dtype, shape)

    def tensor(self, dtypes: Sequence[DType], ranks: tuple[int, int], most: int = 6) -> Value:
        """A value that is no constant: of one of the types, with a rank in the range."""
        fit = [
            v
            for v in self.values
            if v.type.dtype in dtypes and ranks[0] <= len(v.type.shape) <= ranks[1]
        ]
        if fit and self.int(0, 4):
            return self.one(fit)
        rank = self.int(*ranks)
        return self.input(self.one(dtypes), (self.int(1, 2), *self.ints(rank - 1, 1, most)))

    def image(self, dtypes: Sequence[DType], channels: int = 9) -> Value:
        """A value with one or two spatial axes."""
        fit = [v for v in self.values if v.type.dtype in dtypes and len(v.type.shape) in (3, 4)]
        if fit and self.int(0, 4):
            return self.one(fit)
        spatial = self.ints(self.int(1, 2), 1, 8)
        return self.input(
            self.one(dtypes), (self.one([1, 1, 2, 3]), *spatial, self.int(1, channels))
        )

    def broadcastable(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`, mostly itself."""
        if self.flag():
            return shape
        kept = tuple(1 if self.int(0, 2) == 0 else n for n in shape)
        return kept[self.int(0, len(kept) - 1) :]

    def add(self, op: ops.Op, *operands: Value) -> Value:
        """Append and remember."""
        kind = type(op).__name__
        v = self.graph.add(op, *operands, name=f"{kind} {len(self.graph.nodes)}")
        self.values.append(v)
        return v

    # -------------------------------------------------------------------------------- operators

    def window(
        self, spatial: tuple[int, ...], dilate: bool, most: int = 4
    ) -> tuple[tuple[int, ...], ...]:
        """Kernel, strides, pads, dilations that fit."""
        rank = len(spatial)
        kernel = [self.one([1, 2, 3, 3, self.int(1, most)]) for _ in spatial]
        dilations = [self.int(1, 3) if dilate and self.int(0, 2) == 0 else 1 for _ in spatial]
        pads = [self.one([0, 0, 1, self.int(0, 3)]) for _ in range(2 * rank)]
        for i, n in enumerate(spatial):
            while (kernel[i] - 1) * dilations[i] + 1 > n + pads[i] + pads[rank + i]:
                if dilations[i] > 1:
                    dilations[i] -= 1
                else:
                    kernel[i] -= 1
        return tuple(kernel), self.ints(rank, 1, 3), tuple(pads), tuple(dilations)

    def bias(self, x: DType, w: Array, extra: int) -> Value:
        """As large as the products leave room."""
        most = max(abs(x.lo), abs(x.hi), abs(extra))
        room = LIMIT - 1 - np.abs(w.astype(np.int64)).reshape(len(w), -1).sum(axis=1) * most
        share = self.one([0.0, 0.001, 1.0])
        data = np.trunc(self.rng.choice([-1, 1], len(w)) * room * share).astype(np.int32)
        return self.graph.constant(data, TensorType(DType.I32, data.shape), "bias")

    def conv(self) -> Value:
        """Dense, grouped or depthwise."""
        x = self.image(NARROW, channels=self.one([4, 9, 20]))
        *spatial, channels = x.type.shape[1:]
        kernel, strides, pads, dilations = self.window(
            tuple(spatial), dilate=True, most=self.one([3, 5, 8])
        )
        groups = self.one(
            [1, channels, self.one([g for g in range(1, channels + 1) if channels % g == 0])]
        )
        outputs = groups * self.one([1, 1, 2, 3, self.int(1, max(1, 18 // groups))])
        dtype = self.one(WEIGHTS)
        w = self.const(dtype, (outputs, *kernel, channels // groups), dtype.lo, dtype.hi)
        fill = self.edge(x.type.dtype.lo, x.type.dtype.hi)
        b = self.bias(x.type.dtype, w.constant, fill)
        return self.add(ops.Conv(strides, pads, dilations, groups, fill), x, w, b)

    def matmul(self, shape: tuple[int, ...] | None = None) -> Value:
        """On any rank; of a wanted result shape where one is given."""
        dtype = self.one(WEIGHTS)
        if shape is None:
            x, outputs = self.tensor(NARROW, (2, 4), most=self.one([6, 40])), self.int(1, 20)
        else:
            x, outputs = self.operand(NARROW, (*shape[:-1], self.int(1, 5))), shape[-1]
        w = self.const(dtype, (outputs, x.type.shape[-1]), dtype.lo, dtype.hi)
        return self.add(ops.MatMul(), x, w, self.bias(x.type.dtype, w.constant, 0))

    def mul(self) -> Value:
        """Broadcast either way, one operand of up to 16 bits."""
        x = self.tensor(self.one([BYTES, NARROW]), (1, 5), most=5)
        y = self.operand(BYTES, self.broadcastable(x.type.shape))
        if self.flag():
            x, y = y, x
        zeros = (self.edge(v.type.dtype.lo, v.type.dtype.hi) for v in (x, y))
        return self.add(ops.Mul(*zeros), x, y)

    def sumpool(self) -> Value:
        """With and without a border."""
        x = self.image(NARROW)
        kernel, strides, pads, _ = self.window(x.type.shape[1:-1], dilate=False, most=8)
        zero = self.edge(x.type.dtype.lo, x.type.dtype.hi)
        return self.add(ops.SumPool(kernel, strides, pads, zero), x)

    def maxpool(self) -> Value:
        """No window lies wholly in the border."""
        x = self.image(ANY)
        kernel, strides, pads, dilations = self.window(x.type.shape[1:-1], dilate=True)
        rank = len(kernel)
        dilations = tuple(1 if any(pads) else d for d in dilations)
        pads = tuple(min(p, kernel[i % rank] - 1) for i, p in enumerate(pads))
        if any(
            (k - 1) * d + 1 > n + pads[i] + pads[rank + i]
            for i, (k, d, n) in enumerate(zip(kernel, dilations, x.type.shape[1:], strict=False))
        ):
            kernel, pads = (1,) * rank, (0,) * 2 * rank
        return self.add(ops.MaxPool(kernel, strides, pads, dilations), x)

    def accumulator(self) -> Value:
        """One at hand that is known to stay above the lowest int32, or a new one."""
        fit = [v for v in self.values if v.type.dtype is DType.I32 and _reach(v) < LIMIT]
        if fit and self.int(0, 2) == 0:
            return self.one(fit)
        return self.one([self.conv, self.matmul, self.mul, self.sumpool, self.batch_matmul])()

    def rescale(self) -> Value:
        """Of up to two accumulators and up to three values."""
        accs: list[Value] = []
        if self.int(0, 3):
            accs.append(self.accumulator())
            if len(accs[0].type.shape) > 1 and self.int(0, 3) == 0:
                accs.append(self.matmul(accs[0].type.shape))
            shape = accs[0].type.shape
        else:
            shape = self.tensor(NARROW, (2, 4)).type.shape
        count = self.int(0 if accs else 1, 2)
        vals = [
            self.operand(NARROW, self.broadcastable(shape) if i or accs else shape)
            for i in range(count)
        ]
        return self.rescaled(accs, vals, shape)

    def rescaled(self, accs: list[Value], vals: list[Value], shape: tuple[int, ...]) -> Value:
        """With drawn constants whose sum provably fits."""
        spatial = len(shape) > 2 and self.int(0, 3) == 0
        entries = math.prod(shape[1:-1]) if spatial else shape[-1]

        def row(lo: int, hi: int) -> tuple[int, ...]:
            if self.flag():
                return (self.edge(lo, hi),)
            return tuple(self.rng.integers(lo, hi + 1, entries).tolist())

        f = row(1, 30)
        budget = LIMIT - 8 - (1 << (max(f) - 1))
        acc_terms = []
        for v in accs:
            bound = max(1, _reach(v))
            room = max(0, 31 - bound.bit_length())
            m = row(1 << 30, LIMIT - 1 if len(accs) == 1 else (1 << 30) + (1 << 28))
            shift = row(max(0, room - self.int(0, 6)), room)
            acc_terms.append(Acc(m, shift))
            budget -= ((bound << max(shift)) * max(m) >> 32) + 2
        val_terms = []
        for v in vals:
            kind = v.type.dtype
            zero = self.edge(kind.lo, kind.hi)
            reach = max(abs(kind.lo - zero), abs(kind.hi - zero), 1)
            most = min(budget // len(vals) // reach, 1 << self.int(1, 30))
            val_terms.append(Val(row(-most, most), zero))
        out = self.one(ANY)
        lo = self.one([out.lo, out.lo, self.int(out.lo, out.hi)])
        hi = self.one([out.hi, out.hi, self.int(lo, out.hi)])
        zero = self.edge(max(out.lo, -(1 << 30)), min(out.hi, 1 << 30))
        op = ops.Rescale(tuple(acc_terms), tuple(val_terms), f, zero, lo, hi, out, spatial)
        v = self.add(op, *accs, *vals)
        assert v.producer is not None
        prove_rescale(v.producer)
        return v

    def lut(self) -> Value:
        """To any type."""
        x = self.tensor(BYTES, (2, 4))
        out = self.one(ANY)
        return self.add(ops.Lut(), x, self.const(out, (1 << x.type.dtype.bits,), out.lo, out.hi))

    def softmax(self) -> Value:
        """Steep and flat tables."""
        x = self.tensor(BYTES, (2, 4), most=12)
        fraction = self.int(1, 30 - (x.type.shape[-1] - 1).bit_length())
        steps = np.exp(-np.arange(1 << x.type.dtype.bits) * self.one([0.0, 0.01, 0.1, 2.0]))
        data = np.rint(steps * 2.0**fraction).astype(np.int32)
        table = self.graph.constant(data, TensorType(DType.I32, data.shape), "exponentials")
        return self.add(ops.Softmax(fraction, self.one([DType.I8, DType.I16])), x, table)

    def concat(self) -> Value:
        """Along any axis but the first."""
        x = self.tensor(ANY, (2, 5))
        axis = self.int(1, len(x.type.shape) - 1)
        parts = [x]
        for _ in range(self.int(0, 2)):
            shape = list(x.type.shape)
            shape[axis] = self.one([shape[axis], self.int(1, 5)])
            parts.append(self.operand((x.type.dtype,), tuple(shape)))
        if self.flag():
            parts.reverse()
        return self.add(ops.Concat(axis), *parts)

    def slice(self) -> Value:
        """With steps."""
        x = self.tensor(ANY, (2, 5))
        starts = tuple(self.int(0, n - 1) for n in x.type.shape[1:])
        ends = tuple(
            self.one([n, self.int(a + 1, n)]) for a, n in zip(starts, x.type.shape[1:], strict=True)
        )
        return self.add(ops.Slice(starts, ends, self.ints(len(starts), 1, 3)), x)

    def pad(self) -> Value:
        """Any axis but the first."""
        x = self.tensor(ANY, (2, 5))
        pads = tuple(self.one([0, 0, 1, 3]) for _ in range(2 * len(x.type.shape) - 2))
        return self.add(ops.Pad(pads, self.edge(x.type.dtype.lo, x.type.dtype.hi)), x)

    def reshape(self) -> Value:
        """To any split of the elements."""
        x = self.tensor(ANY, (1, 5))
        left, shape = x.type.size, []
        while len(shape) < 4 and left > 1:
            n = self.one([d for d in range(1, left + 1) if left % d == 0])
            shape.append(n)
            left //= n
        return self.add(ops.Reshape((-1 if self.flag() else left, *shape)), x)

    def transpose(self) -> Value:
        """Any permutation of the axes after the first."""
        x = self.tensor(ANY, (2, 5))
        axes = self.draw(st.permutations(range(1, len(x.type.shape))))
        return self.add(ops.Transpose((0, *axes)), x)

    def take(self) -> Value:
        """A few indices or many, in runs, backwards, repeated."""
        x = self.tensor(ANY, (2, 5))
        axis = self.int(1, len(x.type.shape) - 1)
        n = x.type.shape[axis]
        loose = self.ints(self.int(1, 9), 0, n - 1)
        repeated = tuple(i // 2 for i in range(2 * n))
        first = self.int(0, n - 1)
        runs = (*range(first, n), *range(first + 1), *range(n))
        return self.add(ops.Take(axis, self.one([loose, repeated, runs, runs[::-1]])), x)

    def extreme(self) -> Value:
        """The larger or the smaller."""
        x = self.tensor(ANY, (1, 5))
        y = self.operand((x.type.dtype,), x.type.shape)
        return self.add(ops.Extreme(self.flag()), *self.one([(x, y), (y, x)]))

    def argextreme(self) -> Value:
        """Along any axis but the first."""
        x = self.tensor(ANY, (2, 5))
        axis = self.int(1, len(x.type.shape) - 1)
        return self.add(ops.ArgExtreme(axis, self.flag(), self.flag()), x)

    def batch_matmul(self) -> Value:
        """Of two activations; zero points anywhere."""
        x = self.tensor(BYTES, (3, 4))
        *lead, _, depth = x.type.shape
        y = self.operand(BYTES, (*lead, depth, self.one([1, self.int(1, 20)])))
        zeros = (self.edge(v.type.dtype.lo, v.type.dtype.hi) for v in (x, y))
        return self.add(ops.BatchMatMul(*zeros), x, y)

    def normalize(self) -> Value:
        """Any epsilon."""
        x = self.tensor(NARROW, (2, 4), most=self.one([6, 40]))
        epsilon = self.edge(1, 1 << self.int(0, 60))
        return self.add(ops.Normalize(self.int(0, 15), epsilon, self.one([DType.I8, DType.I16])), x)


def _reach(value: Value) -> int:
    lo, hi = code_range(value)
    return max(-lo, hi)


OPERATORS = (
    "conv", "matmul", "rescale", "mul", "lut", "maxpool", "sumpool", "softmax", "concat", "slice", "pad",
    "reshape", "transpose", "take", "extreme", "argextreme", "batch_matmul", "normalize",
)  # fmt: skip
"""The methods of Maker that add one operator each: the closed set."""

WITHOUT_UNITS = ("mul", "take", "extreme", "argextreme", "batch_matmul", "normalize")
"""What the FPGA has no units for."""

HAVE_UNITS = tuple(o for o in OPERATORS if o not in (*WITHOUT_UNITS, "slice"))
"""What it has units for, whatever the attributes are."""


@st.composite
def singles(draw: Draw, operator: str) -> Graph:
    """One operator with drawn attributes; a Rescale comes with the node that makes its accumulator."""
    maker = Maker(draw, operator)
    v = getattr(maker, operator)()
    maker.graph.add_output(Port("output", 0.25, 0), v)
    maker.graph.verify()
    prove(maker.graph)
    return maker.graph


@st.composite
def graphs(draw: Draw, most: int = 8, operators: Sequence[str] = OPERATORS) -> Graph:
    """A few operators on each other's results; any values are outputs, also twice, also inputs and constants."""
    maker = Maker(draw)
    for _ in range(maker.int(1, most)):
        getattr(maker, maker.one((*operators, "rescale", "conv", "rescale", "reshape")))()
    made = [*(v for _, v in maker.graph.inputs), *maker.values, *maker.values]
    chosen = [maker.values[-1], *(maker.one(made) for _ in range(maker.int(0, 2)))]
    if maker.int(0, 6) == 0:
        chosen.append(maker.const(DType.I8, (1, 3), -128, 127))
    for i, v in enumerate(chosen):
        maker.graph.add_output(Port(f"output {i}", 0.5, 0), v)
    maker.graph.verify()
    prove(maker.graph)
    return maker.graph
