"""The DSP extension's elementwise and pooling kernels in the emulator against the interpreter, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir import (
    DType,
    Graph,
    MaxPool,
    Mul,
    Port,
    Rescale,
    SumPool,
    TensorType,
    Value,
)
from qcompile.ir.arith import AccOperand, ValOperand, fit_rescale
from qcompile.ir.proof import accumulator_bound, prove, prove_rescale
from qcompile.targets.c.kernel import Step
from qcompile.targets.mcu.dsp import KERNELS
from qcompile.targets.mcu.dsp_elementwise import ELEMENTWISE_HEADER, Bytes
from qcompile.targets.mcu.dsp_pool import POOL_HEADER
from tests.cortex_m import BATCHES, counted, notices, run
from tests.strategies import Draw


def elements(
    operator: str,
    shape: tuple[int, ...],
    *,
    kinds: Sequence[DType] = (DType.I8, DType.I8),
    zeros: Sequence[int] = (3, -5),
    broadcast: tuple[int, ...] | None = None,
    out: DType = DType.I8,
    zero: int = 0,
    share: int = 37,
) -> Graph:
    """A Rescale of one or two values, or a Mul, with the constants that the compiler would choose."""
    graph = Graph(operator, free_batch=False)
    shapes = (shape, shape if broadcast is None else broadcast)
    count = 1 if operator == "one" else 2
    values = [
        graph.add_input(Port(f"x{i}", 1.0, 0), TensorType(kinds[i], shapes[i]))
        for i in range(count)
    ]
    zeros = [min(max(z, k.lo), k.hi) for z, k in zip(zeros, kinds, strict=True)]
    reach = [max(k.hi - z, z - k.lo) for z, k in zip(zeros, kinds, strict=True)]
    accs, vals = [], []
    if operator == "mul":
        acc = graph.add(Mul(zeros[0], zeros[1]), *values, name="product")
        assert acc.producer is not None
        bounds = tuple(int(n) for n in accumulator_bound(acc.producer))
        values, scale = [acc], Fraction(share * out.hi, 20 * reach[0] * reach[1])
        accs = [AccOperand((scale,), bounds)]
    else:
        vals = [
            ValOperand(Fraction((share + 7 * i) * out.hi, 30 * reach[i]), zeros[i], kinds[i].lo, kinds[i].hi)
            for i in range(count)
        ]  # fmt: skip
    fit = fit_rescale(accs, vals, bits=16)
    y = graph.add(Rescale(fit.accs, fit.vals, fit.f, zero, out.lo, out.hi, out), *values, name="r")
    assert y.producer is not None
    prove_rescale(y.producer)
    graph.add_output(Port("y", 1.0, 0), y)
    graph.verify()
    prove(graph)
    return graph


@st.composite
def elementwise(draw: Draw) -> Graph:
    """Any shapes that broadcast, any narrow types; sometimes a result that is written over an operand."""

    def one(*choices: object) -> object:
        return draw(st.sampled_from(choices))

    shape = tuple(one(1, 2, 3, 4, 5, 7, 8, 13) for _ in range(one(1, 2, 3, 4)))  # type: ignore[call-overload]
    other = one(shape, shape, shape[-1:], (1,) * len(shape), (1, *shape[1:]), (*shape[:-1], 1))
    kinds = (DType.I8, DType.I8, DType.U8, DType.I4)
    graph = elements(
        one("one", "two", "mul"), shape,
        kinds=(one(*kinds), one(*kinds)), zeros=(draw(st.integers(-128, 255)), draw(st.integers(-128, 255))),
        broadcast=other, out=one(*kinds), zero=one(0, 0, -128, 7), share=one(3, 37, 90),
    )  # type: ignore[arg-type]  # fmt: skip
    if one(0, 1):
        # the result of one more step in front may be written over
        front = elements("one", shape, kinds=(DType.I8, DType.I8))
        graph = followed(front, graph)
    return graph


def followed(first: Graph, graph: Graph) -> Graph:
    """`graph` with its first input made by `first` where the types agree, else `graph`."""
    made, (_, x) = first.outputs[0][1], graph.inputs[0]
    if made.type != x.type:
        return graph
    whole = Graph("both", free_batch=False)
    copies: dict[Value, Value] = {}
    for port, v in (*first.inputs, *graph.inputs[1:]):
        copies[v] = whole.add_input(replace(port, name=f"in{len(copies)}"), v.type)
    for source in (first, graph):
        for node in source.nodes:
            operands = [copies[v] for v in node.inputs]
            copies[node.output] = whole.add(node.op, *operands, name=f"n{len(copies)}")
        if source is first:
            copies[x] = copies[made]
    whole.add_output(Port("y", 1.0, 0), copies[graph.outputs[0][1]])
    whole.verify()
    prove(whole)
    return whole


def pooled(
    operator: str,
    spatial: tuple[int, ...],
    channels: int,
    kernel: tuple[int, ...],
    *,
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    dilations: tuple[int, ...] = (1, 1),
    kind: DType = DType.I8,
    out: DType = DType.I8,
    zero: int = 3,
    offset: int = 0,
) -> Graph:
    """A MaxPool, or a SumPool with the Rescale that makes a mean of its sums."""
    graph, rank = Graph(operator, free_batch=False), len(spatial)
    x = graph.add_input(Port("x", 1.0, 0), TensorType(kind, (2, *spatial, channels)))
    if operator == "max":
        op = MaxPool(kernel, strides[:rank], pads[: 2 * rank], dilations[:rank])
        y = graph.add(op, x, name="max")
    else:
        sums = SumPool(kernel, strides[:rank], pads[: 2 * rank], min(max(zero, kind.lo), kind.hi))
        acc = graph.add(sums, x, name="sums")
        assert acc.producer is not None
        bounds = tuple(int(n) for n in accumulator_bound(acc.producer))
        scale = Fraction(4 * (out.hi - out.lo), 3 * int(np.prod(kernel)) * (kind.hi - kind.lo))
        fit = fit_rescale([AccOperand((scale,), bounds)], [], bits=16)
        y = graph.add(Rescale(fit.accs, (), fit.f, offset, out.lo, out.hi, out), acc, name="r")
        assert y.producer is not None
        prove_rescale(y.producer)
    graph.add_output(Port("y", 1.0, 0), y)
    graph.verify()
    prove(graph)
    return graph


@st.composite
def pools(draw: Draw) -> Graph:
    """Any window over one or two axes, borders with and without; sometimes written over what was read."""

    def one(*choices: object) -> object:
        return draw(st.sampled_from(choices))

    operator, rank = one("max", "sum"), one(1, 2, 2)
    kernel = tuple(one(1, 2, 2, 3, 3, 5) for _ in range(rank))
    spatial = tuple(draw(st.integers(k, 9)) for k in kernel)  # type: ignore[type-var]
    if one(0, 1, 2) == 0:
        kernel = spatial
    edges = one(0, 1)
    pads = tuple(draw(st.integers(0, (k - 1) * edges)) for k in (*kernel, *kernel))  # type: ignore[operator]
    dilations = (1, 1)
    if operator == "max" and not any(pads):
        room = zip(spatial, kernel, strict=True)
        dilations = tuple(2 if 2 * (k - 1) < n else 1 for n, k in room)
    kinds = (DType.I8, DType.I8, DType.U8, DType.I4)
    return pooled(
        operator, spatial, one(4, 6, 8, 9, 13, 16, 20), kernel,
        strides=(one(1, 2, 3), one(1, 2, 3)), pads=pads, dilations=dilations, kind=one(*kinds),
        out=one(DType.I8, DType.I8, DType.U8, DType.I16), zero=draw(st.integers(-128, 255)),
        offset=one(0, -128, 7),
    )  # type: ignore[arg-type]  # fmt: skip


@settings(BATCHES, max_examples=2)
@given(st.lists(pools(), min_size=14, max_size=14))
def test_pools(graphs: Sequence[Graph]) -> None:
    sums = [
        pooled("sum", (13, 5), 12, (13, 5), out=DType.I16, zero=-128, offset=-32768),
        pooled("sum", (7, 6), 17, (3, 2), pads=(1, 0, 1, 1), strides=(2, 1), kind=DType.U8),
    ]
    # what is pooled was made by a step: the result may be written over it
    fronts = [elements("one", graph.inputs[0][1].type.shape) for graph in graphs]
    both = [followed(front, graph) for front, graph in zip(fronts, graphs, strict=True)]
    assert {"dsp max pool", "dsp sum pool"} <= set(run([*graphs, *both, *sums]))


class Eager(Bytes):
    """Taken wherever it can be."""

    def cost(self, step: Step) -> int:
        """Nothing."""
        return 0


@BATCHES
@given(st.lists(elementwise(), min_size=14, max_size=14))
def test_elementwise_operators(graphs: Sequence[Graph]) -> None:
    used = run(graphs, kernels=(*KERNELS, Eager()))
    assert "dsp elementwise" in used


ROW = (1, 2, 7)
ELEMENT_FAULTS = {
    "value": ('"mla %[t2], %[t2], %[n], %[c]\\n"', '"mla %[t2], %[t2], %[n], %[t0]\\n"', elements("one", ROW)),
    "values": ('"mla %[t1], %[t3], %[m], %[t1]\\n"', '"mla %[t1], %[t2], %[m], %[t1]\\n"', elements("two", ROW)),
    "rest": ('"mla %[t0], %[t1], %[m], %[t0]\\n"', '"mla %[t0], %[t1], %[n], %[t0]\\n"', elements("two", ROW)),
    "round": ('"smmlar r5, r5, r10, r11\\n"', '"smmla r5, r5, r10, r11\\n"', elements("mul", ROW, share=90)),
    "product": ('"smultt r4, r4, r6\\n"', '"smulbt r4, r4, r6\\n"', elements("mul", ROW)),
    "last": ('widen " r4, r8, r4\\n" widen_other', 'widen " r4, r9, r4\\n" widen_other', elements("mul", (3,))),
}  # fmt: skip
BORDER = (1, 0, 1, 1)
POOL_FAULTS = {
    "largest": ('DSP_MAX3("ssub8")', 'DSP_MAX3("usub8")', pooled("max", (5, 5), 6, (3, 3))),
    "select": ('"sel r4, " pixel ", r4\\n"', '"mov r4, " pixel "\\n"', pooled("max", (4, 4), 8, (2, 2))),
    "lowest": ('"0x80808080"', '"0"', pooled("max", (4, 4), 8, (2, 2), pads=BORDER)),
    "tap": ('DSP_SUM_TAP(widen, ", r8")', 'DSP_SUM_TAP(widen, ", r7")', pooled("sum", (4, 4), 8, (4, 4))),
    "gap": ('"add r6, r6, r4\\n"', '"add r6, r6, r7\\n"', pooled("sum", (5, 5), 8, (3, 3), pads=BORDER)),
    "start": ('"ldr r0, [sp, #64]\\n"', '"mov r0, #0\\n"', pooled("sum", (5, 5), 8, (3, 3), pads=BORDER)),
    "scale": ('"lsl " sum ", " sum ", r12\\n"', '""', pooled("sum", (5, 5), 12, (5, 5), out=DType.I16)),
    "copy": ('"strb r3, [r0], #1\\n"', '"strb r2, [r0], #1\\n"', pooled("max", (4, 4), 6, (2, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENT_FAULTS)
def test_a_planted_fault_is_noticed(tmp_path: Path, name: str) -> None:
    notices(ELEMENT_FAULTS[name], ELEMENTWISE_HEADER, tmp_path, (*KERNELS, Eager()))


@pytest.mark.parametrize("name", POOL_FAULTS)
def test_a_planted_fault_in_pooling_is_noticed(tmp_path: Path, name: str) -> None:
    notices(POOL_FAULTS[name], POOL_HEADER, tmp_path)


def test_the_right_headers_pass_where_faults_are_planted() -> None:
    faults = (*ELEMENT_FAULTS.values(), *POOL_FAULTS.values())
    used = run([graph for _, _, graph in faults], kernels=(*KERNELS, Eager()))
    assert set(used) == {"dsp elementwise", "dsp max pool", "dsp sum pool"}


@settings(BATCHES, max_examples=1)
@given(st.lists(elementwise(), min_size=6, max_size=6), st.lists(pools(), min_size=6, max_size=6))
def test_with_gcc(elements: Sequence[Graph], pools: Sequence[Graph]) -> None:
    run([*elements, *pools], compiler="gcc", kernels=(*KERNELS, Eager()))


COSTS = {
    "two values": elements("two", (1, 8, 8, 16)),
    "product": elements("mul", (1, 8, 8, 16), broadcast=(1, 1, 1, 16)),
    "max pool": pooled("max", (12, 12), 16, (3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
    "sum pool": pooled("sum", (7, 7), 64, (7, 7)),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_instructions(tmp_path: Path, name: str) -> None:
    layer = counted(COSTS[name], tmp_path)
    assert layer.kernel.startswith("dsp")
    assert abs(layer.predicted - layer.executed) <= 0.05 * layer.executed
