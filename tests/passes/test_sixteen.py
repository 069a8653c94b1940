"""16-bit and mixed activations: rescales within their bound, accumulators proved, programs equal to the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.helper import make_node

import qcompile
from qcompile import border
from qcompile.errors import Unsupported
from qcompile.formats import Int
from qcompile.integerized import Integerized
from qcompile.ir import Conv, DType, Graph, MatMul, Port, Rescale, TensorType
from qcompile.ir.arith import AccOperand, NoRoom, ValOperand, value_error
from qcompile.ir.proof import prove, prove_rescale
from qcompile.onnx import frontend
from qcompile.onnx.integer import export
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold import Fold
from qcompile.passes.integerize import integerize
from qcompile.passes.outline import Outline
from qcompile.passes.place import Place
from qcompile.passes.ranges import Method
from qcompile.passes.sums import settle
from qcompile.passes.widen import Widen
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan
from tests.native import ZIG, check
from tests.oracle import build, execute

Array = NDArray[Any]
CASES = settings(deadline=None, derandomize=True, max_examples=200)


# --- one rescale ------------------------------------------------------------------------------------------------


def codes_of(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


@st.composite
def values(draw: st.DrawFn, result: int) -> ValOperand:
    """8 or 16 bits whose range is between a 64th and 4 times the result's."""
    bits = draw(st.sampled_from([8, 16]))
    lo, hi = codes_of(bits)
    share = draw(st.fractions(Fraction(1, 64), 4, max_denominator=10**6))
    zero = draw(st.sampled_from([lo, 0, hi]) | st.integers(lo, hi))
    return ValOperand(share * Fraction(1 << result, 1 << bits), zero, lo, hi)


@CASES
@given(st.data())
def test_values_are_rescaled_within_the_stated_bound(data: st.DataObject) -> None:
    """8 to 16, 16 to 8, 16 to 16 bits and sums of any two: against exact fractions, for codes at their ends too."""
    result = data.draw(st.sampled_from([8, 16]))
    vals = data.draw(st.lists(values(result), min_size=1, max_size=2))
    fit = settle([], vals, Int(result)).fit
    lo, hi = codes_of(32)
    graph = Graph("one", free_batch=False)
    kinds = [DType.of(8) if v.hi < 128 else DType.I16 for v in vals]
    inputs = [
        graph.add_input(Port(f"x{i}", 1.0, 0), TensorType(kind, (1, 64)))
        for i, kind in enumerate(kinds)
    ]
    y = graph.add(Rescale((), fit.vals, fit.f, 0, lo, hi, DType.I32), *inputs, name="y")
    assert y.producer is not None
    assert prove_rescale(y.producer) < 1 << 31
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    rows = [
        np.where(rng.integers(3, size=64) == 0, rng.choice([v.lo, v.zero_point, v.hi], 64),
                 rng.integers(v.lo, v.hi + 1, 64))
        for v in vals
    ]  # fmt: skip
    feeds = [r.astype(k.numpy).reshape(1, 64) for r, k in zip(rows, kinds, strict=True)]
    got = y.producer.op.run(*feeds)[0]
    stated = Fraction(1, 2) + len(vals) * value_error(result)
    for at in range(64):
        real = sum(
            ((int(r[at]) - v.zero_point) * v.scale for r, v in zip(rows, vals, strict=True)),
            Fraction(0),
        )
        assert abs(int(got[at]) - real) <= stated


@CASES
@given(st.data())
def test_a_product_and_a_skip_are_summed_within_the_stated_bound(data: st.DataObject) -> None:
    """An int32 accumulator and a value of 8 or 16 bits, straight or through int16, on every side of the range."""
    result = data.draw(st.sampled_from([8, 16]))
    skip = data.draw(values(result))
    bound = data.draw(st.integers(1 << 12, (1 << 31) - 1))
    # the accumulator's worst case is up to 64 times the result's range
    scale = data.draw(st.fractions(Fraction(1, 8), 64, max_denominator=999)) * (1 << result) / bound
    fmt = Int(result)
    try:
        found = settle([AccOperand((scale,), (bound,))], [skip], fmt)
    except NoRoom:
        # only a sum far beyond the result's range may have no constants at all
        assert bound * scale + skip.reach * skip.scale > 4 * fmt.levels
        return
    stated = Fraction(1, 2) + value_error(result) + bound * scale / 2**16
    for way in found.narrowed:
        stated += way.operand.scale  # half a step of int16, and its own rounding
    for acc in (-bound, -(bound // 3), 0, 7, bound // 2, bound):
        for code in (skip.lo, skip.zero_point, skip.hi):
            terms = {"accs": [acc] if found.fit.accs else [], "vals": [code]}
            for way in found.narrowed:
                terms["vals"].append(run(way.fit, [acc], [], *codes_of(16)))
            got = run(found.fit, terms["accs"], terms["vals"], *codes_of(result))
            real = acc * scale + (code - skip.zero_point) * skip.scale
            low, high = codes_of(result)
            assert abs(got - min(max(real, low), high)) <= stated


def run(fit: Any, accs: Sequence[int], vals: Sequence[int], lo: int, hi: int) -> int:
    """The contract in Python integers, which do not wrap; that nothing would is asserted."""
    total = 0
    for a, x in zip(fit.accs, accs, strict=True):
        assert abs(x << a.pre_shift[0]) < 1 << 31
        total += ((x << a.pre_shift[0]) * a.multiplier[0]) >> 32
    for v, x in zip(fit.vals, vals, strict=True):
        total += (x - v.zero_point) * v.multiplier[0]
    assert abs(total) + (1 << (fit.f[0] - 1)) < 1 << 31
    return min(max((total + (1 << (fit.f[0] - 1))) >> fit.f[0], lo), hi)


def test_a_sum_of_two_16_bit_tensors_keeps_its_bits() -> None:
    """What the residual stream needs: operands of the result's own range, wherever their zero points are."""
    for zero in (-32768, 0, 12345, 32767):
        pair = [ValOperand(Fraction(s, 1000), zero, -32768, 32767) for s in (997, 1003)]
        assert settle([], pair, Int(16)).fit.multiplier_error < Fraction(1, 1 << 12)


# --- networks ---------------------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """A float model, its plan after all passes, what they logged, and the integer graph."""

    original: bytes
    model: ir.Model
    plan: QuantPlan
    lines: list[str]
    done: Integerized

    def outputs(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        graph = self.done.graph
        return border.decode(graph, graph.run(border.encode(graph, feeds)))


def compiled(
    data: bytes, place: Place, feeds: Mapping[str, Array], method: Method = "minmax"
) -> Compiled:
    model, plan, lines = frontend.load(data, isolated=False), QuantPlan(), list[str]()
    context = Context(log=lines.append, samples=[dict(feeds)])
    for p in (Fold(), Outline(), Canonicalize(), place, Calibrate(method=method), Widen()):
        p(model, plan, context)
    return Compiled(data, model, plan, lines, integerize(model, plan))


def on_lattice(*shape: int, seed: int = 0) -> Array:
    """Weights that 8 bits hold exactly: the only rounding left in the network is that of its activations."""
    codes = np.random.default_rng(seed).integers(-127, 128, shape)
    codes.reshape(shape[0], -1)[:, 0] = 127
    return (codes / 128).astype(np.float32)


NODES = [
    make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1], name="stem"),
    make_node("Relu", ["c"], ["r"]),
    make_node("Conv", ["r", "v", "e"], ["d"], pads=[1, 1, 1, 1], name="branch"),
    make_node("Add", ["d", "r"], ["m"], name="sum"),
    make_node("Relu", ["m"], ["n"]),
    make_node("MaxPool", ["n"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
    make_node("Conv", ["p", "z"], ["k"], group=4, pads=[1, 1, 1, 1], name="depthwise"),
    make_node("Concat", ["p", "k"], ["q"], axis=1),
    make_node("Pad", ["q", "widths"], ["o"]),
    make_node("AveragePool", ["o"], ["a"], kernel_shape=[3, 3], strides=[1, 1]),
    make_node("Conv", ["a", "u"], ["t"], name="mix"),
    make_node("Sigmoid", ["t"], ["s"]),
    make_node("Add", ["s", "t"], ["i"], name="plain sum"),
    make_node("GlobalAveragePool", ["i"], ["g"]),
    make_node("Flatten", ["g"], ["f"]),
    make_node("Gemm", ["f", "h", "j"], ["y"], transB=1, name="last"),
]
WEIGHTS = {
    "w": on_lattice(4, 3, 3, 3), "b": np.float32([0.5, -1, 0, 2]), "v": on_lattice(4, 4, 3, 3, seed=1),
    "e": np.float32([0.1, 0.2, -0.3, 0]), "z": on_lattice(4, 1, 3, 3, seed=2), "u": on_lattice(5, 8, 1, 1, seed=3) / 16,
    "widths": np.array([0, 0, 0, 1, 0, 0, 1, 0]), "h": on_lattice(3, 5, seed=4), "j": np.float32([1, 0, -1]),
}  # fmt: skip
MODEL = build(NODES, {"x": ["N", 3, 8, 8]}, WEIGHTS)
FEEDS = {"x": np.random.default_rng(5).integers(-128, 128, (24, 3, 8, 8)).astype(np.float32) / 64}


def types(case: Compiled) -> dict[str, DType]:
    """By float tensor, what holds it."""
    values = {v.name: v.type.dtype for v in case.done.graph.values()}
    return {o.tensor: values[name] for name, o in case.done.origins.items()}


def sqnr(case: Compiled, feeds: Mapping[str, Array]) -> float:
    """Of the first output against onnxruntime's float, in dB."""
    (want,) = execute(case.original, dict(feeds))[:1]
    got = next(iter(case.outputs(feeds).values())).astype(np.float64)
    return float(10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()))


def test_sixteen_bit_activations_are_sixteen_bits_good() -> None:
    """Without the table; weights and inputs are exact, so that nothing but activations is rounded."""
    head = [*NODES[:11], make_node("GlobalAveragePool", ["t"], ["g"]), *NODES[14:]]
    model = build(head, {"x": ["N", 3, 8, 8]}, WEIGHTS)
    wide = compiled(model, Place(activations=Int(16)), FEEDS)
    assert not any("widen" in line for line in wide.lines)
    assert {t for n, t in types(wide).items() if n != "x"} == {DType.I16}
    assert sqnr(wide, FEEDS) > 75
    assert sqnr(compiled(model, Place(pool=Int(8)), FEEDS), FEEDS) < 50


def test_what_a_table_reads_stays_at_eight_bits() -> None:
    case = compiled(MODEL, Place(activations=Int(16)), FEEDS)
    held = types(case)
    assert held["t"] is DType.I8
    assert {n for n, kind in held.items() if kind is DType.I8} == {"x", "t"}
    assert {held[n] for n in ("r", "n", "p", "k", "q", "o", "a", "i", "g", "y")} == {DType.I16}
    asked = Place(activations=Int(16), overrides={"t": Int(16)})
    with pytest.raises(Unsupported, match=r"a table takes at most 8 bits, and t is int16"):
        compiled(MODEL, asked, FEEDS)


PLACES = {
    "all 16": Place(activations=Int(16)),
    "all 16, input 16, output 8": Place(activations=Int(16), input=Int(16), output=Int(8)),
    "sums 16": Place(sums=Int(16)),
    "mixed by hand": Place(activations=Int(16), overrides={"r": Int(8), "q": Int(8), "i": Int(4)}),
    "sums and pools over 4 bits": Place(activations=Int(4), sums=Int(16)),
    "int32 outputs": Place(activations=Int(16), output=Int(24), weights=Int(4)),
}


@pytest.fixture(scope="module")
def networks() -> dict[str, Compiled]:
    return {name: compiled(MODEL, place, FEEDS) for name, place in PLACES.items()}


def test_mixed_networks_equal_onnxruntime(networks: dict[str, Compiled]) -> None:
    for case in networks.values():
        graph = case.done.graph
        codes = border.encode(graph, FEEDS)
        session = onnxruntime.InferenceSession(
            export(graph).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        want = graph.run(codes)
        for name, got in zip(want, session.run(list(want), codes), strict=True):
            np.testing.assert_array_equal(got, want[name])


def test_mixed_networks_equal_their_c(networks: dict[str, Compiled]) -> None:
    """Outputs and every stored value, with sanitizers: codes of the whole type, and all at either end."""
    graphs = [case.done.graph for case in networks.values()]
    with tempfile.TemporaryDirectory() as folder:
        check(graphs, Path(folder))


def test_mixed_networks_equal_their_c_on_arm(networks: dict[str, Compiled]) -> None:
    from qcompile.targets.arm.kernels import DOTPROD as KERNELS

    graphs = [networks[n].done.graph for n in ("all 16", "mixed by hand")]
    with tempfile.TemporaryDirectory() as folder:
        check(
            graphs, Path(folder),
            compiler=(*ZIG, "-target", "aarch64-linux-musl", "-mcpu=generic+dotprod", "-O2",
                      "-fno-stack-protector"),
            link=("-nostdlib", "-static"), kernels=KERNELS, host="host_linux_aarch64.c",
            emulator=("qemu-aarch64", "-cpu", "max"),
        )  # fmt: skip


# --- sums over many 16-bit codes --------------------------------------------------------------------------------


def deep(depth: int) -> tuple[bytes, dict[str, Array]]:
    """x -> Relu -> Gemm over `depth` products of the largest weights."""
    w = np.full((2, depth), 127 / 128, np.float32)
    w[1, ::2] *= -1
    nodes = [
        make_node("Relu", ["x"], ["r"]),
        make_node("Gemm", ["r", "w", "b"], ["y"], transB=1, name="deep"),
    ]
    model = build(nodes, {"x": ["N", depth]}, {"w": w, "b": np.zeros(2, np.float32)})
    x = np.random.default_rng(0).normal(size=(64, depth)).astype(np.float32)
    return model, {"x": x}


@pytest.mark.parametrize(
    ("depth", "bits"),
    [(225, 16), (226, 15), (451, 15), (452, 14), (903, 14), (904, 13), (3613, 11)],
)
def test_a_tensor_has_as_many_bits_as_its_products_leave_room_for(depth: int, bits: int) -> None:
    """127 * 2**(bits - 1) * depth, and the zero point in the bias as much again, below 7/8 of 2**31."""
    model, feeds = deep(depth)
    case = compiled(model, Place(activations=Int(16)), feeds)
    q = case.plan.of("r")
    assert q is not None
    assert q.format == case.plan.slots["r"].format == Int(bits)
    # behind a Relu, and covering what was seen
    assert q.zero_point == (q.format.lo,)
    assert q.scale[0] * (q.format.levels - 1) >= 0.999 * feeds["x"].max()
    logged = [line for line in case.lines if "narrowed" in line]
    assert len(logged) == (bits < 16)
    assert all("r narrowed from int16 to" in line and "deep" in line for line in logged)
    (proof,) = prove(case.done.graph)
    assert proof.bound < 7 * 2**28
    # a narrower tensor still covers its range: the result is near float's
    assert sqnr(case, feeds) > 45


def test_an_input_of_sixteen_bits_keeps_them_and_its_weights_give_way() -> None:
    model, feeds = deep(1000)
    nodes = [make_node("Gemm", ["x", "w", "b"], ["y"], transB=1, name="deep")]
    w = np.full((2, 1000), 127 / 128, np.float32)
    w[1, 20:] = 0
    model = build(nodes, {"x": ["N", 1000]}, {"w": w, "b": np.zeros(2, np.float32)})
    case = compiled(model, Place(input=Int(16)), feeds)
    q, wq = case.plan.of("x"), case.plan.of("w")
    assert q is not None
    assert wq is not None
    assert q.format == Int(16)
    assert wq.scale[0] > 1.5 / 128
    assert wq.scale[1] == 1 / 128
    assert any("weight scales of deep enlarged" in line for line in case.lines)
    assert prove(case.done.graph)[0].bound < 1 << 31
    assert sqnr(case, feeds) > 35


def test_a_sum_over_a_large_image_narrows_what_it_averages() -> None:
    nodes = [make_node("Relu", ["x"], ["r"]), make_node("GlobalAveragePool", ["r"], ["y"])]
    model = build(nodes, {"x": ["N", 1, 256, 256]})
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 1, 256, 256)).astype(np.float32)}
    case = compiled(model, Place(activations=Int(16)), feeds)
    assert case.plan.slots["r"].format == Int(15)
    assert prove(case.done.graph)[0].bound < 1 << 31
    assert sqnr(case, feeds) > 60


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 1 << 32))
def test_every_accumulator_of_sixteen_bit_codes_is_proved(seed: int) -> None:
    """Whatever weights and biases: a graph comes out, and no int32 can wrap on the most extreme codes."""
    rng = np.random.default_rng(seed)
    depth = int(rng.integers(8, 2500))
    w = rng.normal(size=(3, depth)) * 10.0 ** rng.integers(-6, 3, (3, 1))
    b = rng.normal(size=3) * 10.0 ** rng.integers(-4, 5)
    nodes = [
        make_node("Relu", ["x"], ["r"]),
        make_node("Gemm", ["r", "w", "b"], ["y"], transB=1),
    ]
    model = build(
        nodes, {"x": ["N", depth]}, {"w": w.astype(np.float32), "b": b.astype(np.float32)}
    )
    feeds = {"x": rng.normal(size=(8, depth)).astype(np.float32)}
    case = compiled(model, Place(activations=Int(16), input=Int(16)), feeds)
    graph = case.done.graph
    for node in graph.nodes:
        if isinstance(node.op, Conv | MatMul):
            _, weights, bias = node.inputs
            lo, hi = case.plan.slots["r"].format.lo, case.plan.slots["r"].format.hi
            ends = np.where(weights.constant > 0, hi, lo).astype(object)
            for codes in (ends, hi + lo - ends):
                sums = (codes * weights.constant.astype(object)).sum(axis=1) + bias.constant
                assert max(abs(s) for s in sums) < 1 << 31


@pytest.mark.zoo
@pytest.mark.slow
def test_a_residual_stream_of_sixteen_bits_gains_a_decibel(zoo: Path) -> None:
    """resnet20, whose stream of 8 bits is what costs it most."""
    pixels = []
    for part in ("calib", "eval"):
        with np.load(zoo / "data-cifar10" / f"{part}.npz") as data:
            pixels.append(data["x"][:256].astype(np.float32) / 255)
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    model = (zoo / "resnet20-cifar10" / "model.onnx").read_bytes()
    name = onnx.load_from_string(model).graph.input[0].name
    seen, unseen = ({name: ((x - mean) / deviation).transpose(0, 3, 1, 2)} for x in pixels)
    plain, wide = (compiled(model, p, seen, "mse") for p in (Place(), Place(sums=Int(16))))
    assert not any("scale of" in line or "narrowed" in line for line in wide.lines)
    assert sqnr(wide, unseen) > sqnr(plain, unseen) + 1


# --- a whole compilation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["x86", "arm"])
def test_activations_int16_compile_and_verify(models: Path, tmp_path: Path, target: str) -> None:
    folder = models / "digits-resnet"
    artifact = qcompile.compile(
        folder / "model.onnx", target, folder / "calib.toml", output=tmp_path / "wide",
        activations="int16", input_dtype="int16",
    )  # fmt: skip
    with np.load(folder / "eval.npz") as data:
        feeds = {"image": data["image"][:16]}
    verification = artifact.verify([feeds], trace=2)
    assert (verification.samples, verification.mismatches) == (16, 0), verification.first
    assert verification.intermediates >= 9
    plain = qcompile.compile(
        folder / "model.onnx", target, folder / "calib.toml", output=tmp_path / "plain"
    )
    kinds = [{row["bits"] for row in a.report["layers"]} for a in (artifact, plain)]  # type: ignore[attr-defined]
    assert 16 in kinds[0]
    assert 8 not in kinds[0]
    assert 8 in kinds[1]
