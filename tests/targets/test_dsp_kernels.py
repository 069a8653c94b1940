"""The DSP extension's kernels in the emulator against the interpreter, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir import (
    Conv,
    DType,
    Graph,
    MatMul,
    Node,
    Port,
    Rescale,
    TensorType,
    Value,
)
from qcompile.ir.arith import AccOperand, ValOperand, fit_rescale
from qcompile.ir.proof import accumulator_bound, prove, prove_rescale
from qcompile.targets.c.emit import fuse
from qcompile.targets.c.kernel import Kernel
from qcompile.targets.mcu.dsp import Dense, Pixels
from qcompile.targets.mcu.dsp_rescale import HEADER, packed_fields, plain, skip
from qcompile.targets.mcu.dsp_weights import BYTES, NIBBLE_HEADER, NIBBLES
from tests.cortex_m import BATCHES, counted, notices, run
from tests.strategies import Draw, singles


@dataclass(frozen=True)
class Shape:
    """A convolution, or where `kernel` is empty a matrix product of `spatial` rows."""

    spatial: tuple[int, ...]
    channels: int
    outputs: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = (1, 1)
    pads: tuple[int, ...] = (0, 0, 0, 0)
    dilations: tuple[int, ...] = (1, 1)
    groups: int = 1
    batch: int = 1


def layer(
    shape: Shape,
    *,
    kind: DType = DType.I8,
    out: DType = DType.I8,
    weights: DType = DType.I8,
    other: DType | None = None,
    zero: int = 0,
    bits: int = 16,
    seed: int = 0,
) -> Graph:
    """One product with the Rescale that the compiler would choose for it; `other` is added to it."""
    rng = np.random.default_rng(seed)
    graph = Graph("layer", free_batch=False)

    def constant(data: object, dtype: DType) -> Value:
        array = np.array(data, dtype.numpy)
        return graph.constant(array, TensorType(dtype, array.shape), "constant")

    dims = (shape.batch, *shape.spatial, shape.channels)
    x = graph.add_input(Port("x", 1.0, 0), TensorType(kind, dims))
    size = (shape.outputs, *shape.kernel, shape.channels // shape.groups)
    codes = rng.integers(max(weights.lo, -127), weights.hi + 1, size)
    codes.flat[0] = weights.lo
    w = constant(codes, weights)
    reach = int(np.prod(size[1:])) * abs(kind.lo or kind.hi)
    b = constant(rng.integers(-8 * reach, 8 * reach + 1, shape.outputs), DType.I32)
    op = (
        Conv(shape.strides, shape.pads, shape.dilations, shape.groups, max(kind.lo, -7))
        if shape.kernel
        else MatMul()
    )
    acc = graph.add(op, x, w, b, name="product")
    assert acc.producer is not None
    bounds = tuple(int(n) for n in accumulator_bound(acc.producer))
    # a third of the codes is clamped
    scales = tuple(
        Fraction(int(s), 1 << 20) * out.hi * 4 / (reach * 10)
        for s in rng.integers(1 << 17, 1 << 20, shape.outputs)
    )
    operands, vals = [acc], []
    if other is not None:
        operands.append(graph.add_input(Port("other", 1.0, 0), TensorType(other, acc.type.shape)))
        share = Fraction(37 * (out.hi - out.lo), 50 * (other.hi - other.lo))
        vals.append(ValOperand(share, max(other.lo, -9), other.lo, other.hi))
    fit = fit_rescale([AccOperand(scales, bounds)], vals, bits=bits)
    rescale = Rescale(fit.accs, fit.vals, fit.f, zero, out.lo, out.hi, out)
    y = graph.add(rescale, *operands, name="rescale")
    assert y.producer is not None
    prove_rescale(y.producer)
    graph.add_output(Port("y", 1.0, 0), y)
    graph.verify()
    prove(graph)
    return graph


PADDED = Shape((6, 7), 8, 5, (3, 3), pads=(1, 0, 1, 2))
DEPTHWISE = Shape((5, 6), 8, 8, (3, 3), pads=(1, 1, 1, 1), groups=8)


@st.composite
def products(draw: Draw) -> Graph:
    """Any shape, with every kind of Rescale that is fused."""

    def one(*choices: object) -> object:
        return draw(st.sampled_from(choices))

    def pick(lo: int, hi: int) -> int:
        return draw(st.integers(lo, hi))  # type: ignore[return-value]

    rank = one(0, 1, 2, 2)
    channels = one(4, 8, 12, 20, 36, 1, 3)
    kernel = tuple(pick(1, 4) for _ in range(rank))
    dilations = tuple(one(1, 1, 2) for _ in range(rank))
    pads = tuple(pick(0, 2) for _ in range(2 * rank))
    spatial = tuple(pick((k - 1) * d + 1, 9) for k, d in zip(kernel, dilations, strict=True))
    groups = one(1, 1, channels) if rank else 1
    outputs = groups if groups > 1 else pick(4, 21)
    shape = Shape(
        spatial or (pick(1, 13),) * pick(0, 1),
        channels, outputs, kernel,
        tuple(one(1, 1, 2, 3) for _ in range(rank)), pads, dilations, groups, pick(1, 2),
    )  # type: ignore[arg-type]  # fmt: skip
    other = one(None, DType.I8, DType.I8, DType.U8)
    out = one(DType.I8, DType.I8, DType.I8, DType.I16, DType.U8, DType.I4)
    if other is not None:
        out = DType.I8
    return layer(
        shape,
        kind=one(DType.I8, DType.I8, DType.I8, DType.U8, DType.I16, DType.I4),
        out=out,
        weights=one(DType.I8, DType.I5, DType.I4, DType.I4, DType.I2),
        other=other,
        zero=pick(-8, 7) if one(0, 1) else 0,
        bits=one(16, 24),
        seed=pick(0, 1 << 32),
    )  # type: ignore[arg-type]


@BATCHES
@given(st.lists(products(), min_size=12, max_size=12))
def test_products_of_any_shape(graphs: Sequence[Graph]) -> None:
    run(graphs)


@settings(BATCHES, max_examples=1)
@given(st.lists(products(), min_size=12, max_size=12))
def test_with_gcc(graphs: Sequence[Graph]) -> None:
    run([*graphs, layer(PADDED, other=DType.I8), layer(DEPTHWISE)], compiler="gcc")


@settings(BATCHES, max_examples=2)
@given(
    st.tuples(*(singles(o) for o in ("conv", "matmul", "rescale", "conv", "rescale", "rescale")))
)
def test_random_operators(graphs: Sequence[Graph]) -> None:
    run(graphs)


FAULTS = {
    "block": ('"smlad r3, r8, r10, r3\\n"', '"smladx r3, r8, r10, r3\\n"', layer(PADDED)),
    "widening": ('"sxtab16", "20"', '"uxtab16", "20"', layer(PADDED)),
    "border": ('"pkhbt r1, r1, r1, lsl #16\\n"', '"uxth r1, r1\\n"', layer(PADDED)),
    "round": ('"smmlar r2, r2, r5, r6\\n"', '"smmla r2, r2, r5, r6\\n"', layer(PADDED)),
    "saturate": ('"ssat r4, #8, r4\\n"', '"ssat r4, #7, r4\\n"', layer(PADDED)),
    "skip": ('"mla r6, r6, r7, r8\\n"', '"mul r6, r6, r7\\n"', layer(PADDED, other=DType.I8)),
    "shift": ('"lsl r1, r1, r6\\n"', '"lsl r1, r1, r5\\n"', layer(PADDED, other=DType.I8)),
    "sums": ('"str r3, [r7, r8]\\n"', '"str r4, [r7, r8]\\n"', layer(PADDED, other=DType.U8)),
    "pairs": ('"pkhtb r4, r4, r3, asr #16\\n"', '"pkhtb r4, r4, r3\\n"',
              layer(replace(PADDED, channels=3), kind=DType.I16)),
    "dense": ('"smlad " sum ", " word ", r10, "', '"smlad " sum ", " word ", r9, "',
              layer(Shape((), 12, 9))),
    "bias": ("+ fields.bias_low", "", layer(Shape((), 12, 9))),
    "multiplier": ("| (1 << fields.multiplier_bits)", "", layer(Shape((), 300, 9), out=DType.I16, bits=24)),
    "depthwise": ('"smlatt r3, r5, r7, r3\\n"', '"smlabt r3, r5, r7, r3\\n"', layer(DEPTHWISE)),
    "store": ('"str r7, [r6], #4\\n"', '"strh r7, [r6], #4\\n"', layer(DEPTHWISE)),
}  # fmt: skip


I4 = DType.I4
NIBBLE_FAULTS = {
    "mask": ('"and r11, r10, #0x000f000f\\n"', '"and r11, r10, #0x00070007\\n"', layer(PADDED, weights=I4)),
    "offset": ('"smlad r3, r8, r10, r3\\n"', '"smlad r3, r7, r10, r3\\n"', layer(PADDED, weights=I4)),
    "shift": ('"lsr r10, r10, #4\\n"', '"lsr r10, r10, #5\\n"', layer(PADDED, weights=I4)),
    "sums": ('"adds r2, r2, r5\\n"', '"mov r2, r2\\n"', layer(PADDED, weights=I4, other=DType.U8)),
    "dense": ('("", ", lsr #4")', '("", ", lsr #5")', layer(Shape((), 12, 9), weights=I4)),
    "dense offset": ('"smlad r6, r8, r10, r6\\n"', '"nop\\n"', layer(Shape((), 12, 9), weights=I4)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(tmp_path: Path, name: str) -> None:
    notices(FAULTS[name], HEADER, tmp_path)


@pytest.mark.parametrize("name", NIBBLE_FAULTS)
def test_a_planted_fault_in_four_bits_is_noticed(tmp_path: Path, name: str) -> None:
    notices(NIBBLE_FAULTS[name], NIBBLE_HEADER, tmp_path)


def test_the_right_headers_pass_where_faults_are_planted() -> None:
    faults = (*FAULTS.values(), *NIBBLE_FAULTS.values())
    used = run([graph for _, _, graph in faults])
    assert set(used) == {"dsp", "dsp dense", "dsp depthwise", "dsp int4", "dsp dense int4"}


def test_four_bits_take_half_the_flash() -> None:
    """Eight weights of a channel in each word: bits 4, 8 .. hold depths 1, 4, 5, 2, 3, 6, 7, each 8 more."""
    (step,) = fuse(layer(Shape((), 20, 5), weights=DType.I4))
    assert NIBBLES.suits(step)
    assert not BYTES.suits(step)
    packed = NIBBLES.pack(step)
    assert packed.shape == (5, 3)
    weights = step.node.inputs[1].constant
    for channel, row in enumerate(packed.tolist()):
        for word, bits in enumerate(row):
            depths = [8 * word + d for d in (0, 1, 4, 5, 2, 3, 6, 7)]
            found = [bits >> 4 * i & 15 for i in range(8)]
            # zero where there is no activation: what is read there must not count
            assert found == [int(weights[channel, d]) + 8 if d < 20 else 0 for d in depths]


def the_rescale(graph: Graph) -> tuple[Node, Rescale]:
    """The one node that rescales."""
    (node,) = (n for n in graph.nodes if isinstance(n.op, Rescale))
    assert isinstance(node.op, Rescale)
    return node, node.op


@settings(deadline=None, derandomize=True, max_examples=60)
@given(products(), st.lists(st.integers(-(1 << 30), 1 << 30), min_size=20, max_size=20))
def test_constants_in_registers_mean_what_the_contract_says(graph: Graph, sums: list[int]) -> None:
    (step,) = fuse(graph)
    _, op = the_rescale(graph)
    bounds = accumulator_bound(step.node)
    for channel, bound in enumerate(int(b) for b in bounds):
        # the ends, steps of the result, and anything between
        accs = np.clip(np.array([*sums, -bound, bound, 0, 1, -1]), -bound, bound)
        wide = np.zeros((len(accs), len(bounds)), np.int32)
        wide[:, channel] = accs
        if (found := plain(step)) is not None:
            m = int(found.multipliers[channel])
            got = [
                min(max(found.zero_point + ((int(a) * m + (1 << 31)) >> 32), -128), 127)
                for a in accs
            ]
            assert got == op.run(wide)[:, channel].tolist()
        if (added := skip(step)) is not None:
            word, x = int(added.multipliers[channel]), 77
            high = [((int(a) << (word & 31)) * (word & ~31)) >> 32 for a in accs]
            t = [added.constant + x * added.factor + h for h in high]
            wrapped = [(n + (1 << 31)) % (1 << 32) - (1 << 31) for n in t]
            got = [min(max(n >> added.fraction, -128), 127) for n in wrapped]
            other = np.full(wide.shape, x, np.int8)
            assert got == op.run(wide, other)[:, channel].tolist()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(products())
def test_packed_constants_hold_the_biases(graph: Graph) -> None:
    (step,) = fuse(graph)
    fields = packed_fields(step)
    if fields is None:
        return
    stream = int.from_bytes(fields.constants.tobytes(), "little")
    weights, bias = step.node.inputs[1].constant, step.node.inputs[2].constant
    width = fields.bias_bits + fields.shift_bits + fields.multiplier_bits
    for c in range(len(weights)):
        entry = stream >> c * width & (1 << fields.bias_bits) - 1
        moved = int(bias[c]) - fields.offset * int(weights[c].astype(np.int64).sum())
        assert entry + fields.bias_low == moved
    assert len(fields.constants) == -(-len(weights) * width // 8) + 3


def test_costs_follow_the_work() -> None:
    def cost(kernel: Kernel, shape: Shape) -> int:
        (step,) = fuse(layer(shape))
        assert kernel.matches(step)
        return kernel.cost(step)

    one, many = Shape((), 64, 64), Shape((10,), 64, 64)
    assert cost(Dense(), one) < cost(Pixels(), one)
    assert cost(Pixels(), many) < cost(Dense(), many)


LARGE = Shape((8, 8), 16, 24, (3, 3), pads=(1, 1, 1, 1))
COSTS = {
    "conv": layer(LARGE),
    "conv int4": layer(LARGE, weights=I4),
    "conv and add": layer(LARGE, other=DType.I8),
    "dense": layer(Shape((), 128, 96)),
    "dense int4": layer(Shape((), 128, 96), weights=I4),
    "depthwise": layer(replace(LARGE, outputs=16, groups=16)),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_instructions(tmp_path: Path, name: str) -> None:
    layer = counted(COSTS[name], tmp_path)
    assert layer.kernel.startswith("dsp")
    assert abs(layer.predicted - layer.executed) <= 0.05 * layer.executed
