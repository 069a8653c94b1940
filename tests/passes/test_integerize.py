"""Every operator against onnxruntime's float operator: half a step, what the multipliers state, and no more.

Inputs and weights lie exactly on their lattices, so that the one rounding of the result is all that may differ.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.helper import make_node

from qcompile import border
from qcompile.errors import QcompileError, Unsupported
from qcompile.formats import Int
from qcompile.integerized import Integerized
from qcompile.ir import Conv, DType, Graph, Node, Pad, Rescale, arith, text
from qcompile.passes.place import Place
from qcompile.plan import Kind
from tests.oracle import Case, Inputs, Weights, build, integer, judge, mutate, prepare

CASES = settings(deadline=None, derandomize=True, max_examples=12)
Draw = st.DataObject


@dataclass(frozen=True)
class Op:
    """A drawn model: nodes from x (and z) to y."""

    nodes: list[onnx.NodeProto]
    inputs: Inputs
    weights: Weights

    @property
    def model(self) -> bytes:
        return build(self.nodes, self.inputs, self.weights)


def num(data: Draw, lo: int, hi: int) -> int:
    return data.draw(st.integers(lo, hi))


def nums(data: Draw, count: int, lo: int, hi: int) -> list[int]:
    return [num(data, lo, hi) for _ in range(count)]


def one(data: Draw, *choices: Any) -> Any:
    return data.draw(st.sampled_from(choices))


def grid(data: Draw, *shape: int, bits: int = 8) -> NDArray[np.float32]:
    """Weights on a power-of-two lattice, each output channel (first axis) on its own."""
    rng = np.random.default_rng(num(data, 0, 1 << 32))
    top = (1 << (bits - 1)) - 1
    codes = rng.integers(-top, top + 1, shape)
    step = 2.0 ** rng.integers(-9, -4, shape[:1] + (1,) * (len(shape) - 1))
    return (codes * step).astype(np.float32)


def reals(data: Draw, *shape: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(num(data, 0, 1 << 32))
    return rng.normal(size=shape).astype(np.float32)


def image(data: Draw, rank: int, least: int = 1) -> list[int | str]:
    return ["N", num(data, 1, 5), *nums(data, rank, least, 8)]


# --- models of one operator -------------------------------------------------------------------------------------


def window(data: Draw, size: list[int], *, dilate: bool = True) -> dict[str, Any]:
    """Kernel, strides, dilations and pads or auto_pad, so that at least one window fits."""
    rank = len(size)
    kernel = [num(data, 1, min(4, n)) for n in size]
    dilations = [
        num(data, 1, max(1, (n - 1) // (k - 1))) if dilate and k > 1 and one(data, 0, 0, 1) else 1
        for n, k in zip(size, kernel, strict=True)
    ]
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": nums(data, rank, 1, 3)}
    if any(d > 1 for d in dilations):
        found["dilations"] = dilations
    match one(data, "pads", "pads", "none", "SAME_UPPER", "SAME_LOWER", "VALID"):
        case "pads":
            found["pads"] = [num(data, 0, k - 1) for k in kernel * 2]
        case "none":
            pass
        case "VALID":
            found["auto_pad"] = "VALID"
        case auto:
            # onnxruntime has no dilated or sparser SAME
            found |= {"auto_pad": auto, "dilations": [1] * rank}
            found["strides"] = [min(s, k) for s, k in zip(found["strides"], kernel, strict=True)]
    return found


def conv(data: Draw) -> Op:
    shape = image(data, num(data, 1, 2))
    groups = one(data, 1, 1, 2, 3, "depthwise")
    if groups == "depthwise":
        groups = int(shape[1])
    shape[1] = groups * num(data, 1, 3)
    attributes = window(data, [int(n) for n in shape[2:]])
    if one(data, 0, 1) and "auto_pad" not in attributes:
        attributes["pads"] = nums(data, 2 * (len(shape) - 2), 0, 4)
    outputs = groups * num(data, 1, 3)
    w = grid(data, outputs, int(shape[1]) // groups, *attributes["kernel_shape"])
    weights = {"w": w}
    if one(data, 0, 1):
        weights["b"] = grid(data, outputs)
    return Op(
        [make_node("Conv", ["x", *weights], ["y"], group=groups, **attributes)],
        {"x": shape},
        weights,
    )


def gemm(data: Draw) -> Op:
    k, n, trans = num(data, 1, 20), num(data, 1, 7), num(data, 0, 1)
    w = grid(data, n, k)
    weights = {"w": w if trans else np.ascontiguousarray(w.T)}
    if one(data, 0, 1):
        shape = one(data, (n,), (1, n), (1,), ())
        weights["c"] = reals(data, *shape)
    factors = {"alpha": one(data, 1.0, 0.5, 2.0), "beta": one(data, 1.0, 0.0, -1.5)}
    node = make_node("Gemm", ["x", *weights], ["y"], transB=trans, **factors)
    return Op([node], {"x": ["N", k]}, weights)


def matmul(data: Draw) -> Op:
    # by one column, a bias looks like any scalar and is taken into a table
    k, n = num(data, 1, 20), num(data, 2, 7)
    weights = {"w": np.ascontiguousarray(grid(data, n, k).T)}
    shape = one(data, ["N", k], ["N", num(data, 1, 4), k])
    if one(data, 0, 1):
        weights["b"] = reals(data, *one(data, (n,), (1, n), (1,)))
        nodes = [make_node("MatMul", ["x", "w"], ["m"]), make_node("Add", ["m", "b"], ["y"])]
        return Op(nodes, {"x": shape}, weights)
    return Op([make_node("MatMul", ["x", "w"], ["y"])], {"x": shape}, weights)


def binary(op: str) -> Callable[[Draw], Op]:
    def make(data: Draw) -> Op:
        shape = ["N", *nums(data, num(data, 1, 3), 1, 5)]
        node = make_node(op, ["x", "z"], ["y"])
        match one(data, "same", "broadcast", "twice", "constant", "left"):
            case "same":
                return Op([node], {"x": shape, "z": shape}, {})
            case "broadcast":
                x = ["N", *(one(data, 1, n) for n in shape[1:])]
                z = ["N", *(one(data, 1, n) for n in shape[1:])]
                return Op([node], {"x": x, "z": z}, {})
            case "twice":
                return Op([make_node(op, ["x", "x"], ["y"])], {"x": shape}, {})
            case side:
                # at least one axis of two entries, else it is a factor per tensor, which folds away
                shape = ["N", num(data, 2, 4), num(data, 2, 4), *shape[1:2]]
                c = grid(data, *(int(n) for n in shape[1:])).reshape(-1)
                c = np.ascontiguousarray(c.reshape([int(n) for n in shape[1:]]))
                c = np.round(c * 64).clip(-127, 127).astype(np.float32) / 64
                names = ["z", "x"] if side == "left" else ["x", "z"]
                return Op([make_node(op, names, ["y"])], {"x": shape}, {"z": c})

    return make


def unary(op: str, **attributes: Any) -> Callable[[Draw], Op]:
    def make(data: Draw) -> Op:
        chosen = {k: v(data) if callable(v) else v for k, v in attributes.items()}
        shape = ["N", *nums(data, num(data, 1, 3), 1, 6)]
        return Op([make_node(op, ["x"], ["y"], **chosen)], {"x": shape}, {})

    return make


def factor(data: Draw) -> float:
    return data.draw(st.floats(0.0625, 1.5, width=32))


def clip(data: Draw) -> Op:
    # bounds may cross: then all is the upper one
    lo, hi = (data.draw(st.floats(-3, 3, width=32)) for _ in range(2))
    match one(data, "both", "both", "lo", "hi", "six"):
        case "both":
            weights = {"lo": np.float32(lo), "hi": np.float32(hi)}
            node = make_node("Clip", ["x", "lo", "hi"], ["y"])
        case "lo":
            weights, node = {"lo": np.float32(lo)}, make_node("Clip", ["x", "lo"], ["y"])
        case "hi":
            weights, node = {"hi": np.float32(hi)}, make_node("Clip", ["x", "", "hi"], ["y"])
        case _:
            weights = {"lo": np.float32(0), "hi": np.float32(6)}
            node = make_node("Clip", ["x", "lo", "hi"], ["y"])
    return Op([node], {"x": ["N", *nums(data, 2, 1, 9)]}, weights)  # type: ignore[arg-type]


def chain(*calls: str, **weights: float) -> Callable[[Draw], Op]:
    """`s = Sigmoid x`: operators one after the other, with scalar constants."""

    def make(data: Draw) -> Op:
        nodes = []
        for call in calls:
            out, expression = call.split(" = ")
            op, *names = expression.split()
            nodes.append(make_node(op, names, [out]))
        scalars = {k: np.float32(v) for k, v in weights.items()}
        return Op(nodes, {"x": ["N", *nums(data, 2, 1, 9)]}, scalars)  # type: ignore[arg-type]

    return make


SILU = chain("s = Sigmoid x", "y = Mul x s")
HARD_SWISH = chain(
    "a = Add x three", "c = Clip a zero six", "m = Mul x c", "y = Div m six", zero=0, three=3, six=6
)
GELU_ERF = chain(
    "d = Div x root", "e = Erf d", "a = Add e one", "m = Mul x a", "y = Mul m half",
    root=2**0.5, one=1.0, half=0.5,
)  # fmt: skip
GELU_TANH = chain(
    "p = Pow x three", "k = Mul p cube", "s = Add x k", "r = Mul s root", "t = Tanh r", "a = Add t one",
    "m = Mul x a", "y = Mul m half", three=3.0, cube=0.044715, root=(2 / np.pi) ** 0.5, one=1.0, half=0.5,
)  # fmt: skip


def pool(op: str) -> Callable[[Draw], Op]:
    def make(data: Draw) -> Op:
        shape = image(data, num(data, 1, 2))
        attributes = window(data, [int(n) for n in shape[2:]], dilate=op == "MaxPool")
        if "auto_pad" not in attributes:
            attributes["ceil_mode"] = num(data, 0, 1)
        if op == "AveragePool":
            attributes["count_include_pad"] = num(data, 0, 1)
        return Op([make_node(op, ["x"], ["y"], **attributes)], {"x": shape}, {})

    return make


def reduce_mean(data: Draw) -> Op:
    rank = num(data, 1, 2)
    axes = [2 + i - one(data, 0, rank + 2) for i in range(rank)]
    node = make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=num(data, 0, 1))
    return Op([node], {"x": image(data, rank)}, {"axes": np.array(axes)})


def softmax(data: Draw) -> Op:
    shape = ["N", *nums(data, num(data, 1, 3), 1, 6)]
    axis = one(data, *range(1, len(shape)), -1)
    return Op([make_node("Softmax", ["x"], ["y"], axis=axis)], {"x": shape}, {})


def concat(data: Draw) -> Op:
    shape = ["N", *nums(data, num(data, 1, 3), 1, 5)]
    axis = num(data, 1, len(shape) - 1)
    inputs = {}
    for name in ("x", "z", "u")[: num(data, 2, 3)]:
        inputs[name] = [num(data, 1, 4) if i == axis else n for i, n in enumerate(shape)]
    axis -= one(data, 0, len(shape))
    return Op([make_node("Concat", list(inputs), ["y"], axis=axis)], inputs, {})


def pad(data: Draw) -> Op:
    shape = ["N", *nums(data, num(data, 1, 3), 1, 5)]
    rank = len(shape)
    pads = [0 if i % rank == 0 else num(data, 0, 3) for i in range(2 * rank)]
    value = np.float32(one(data, 0.0, data.draw(st.floats(-2, 2, width=32))))
    if one(data, 0, 1):
        axes = list(range(rank - 1, 0, -1))
        chosen = [pads[a] for a in axes] + [pads[rank + a] for a in axes]
        weights = {"p": np.array(chosen), "v": value, "a": np.array(axes)}
        return Op([make_node("Pad", ["x", "p", "v", "a"], ["y"])], {"x": shape}, weights)  # type: ignore[dict-item]
    weights = {"p": np.array(pads), "v": value}
    return Op([make_node("Pad", ["x", "p", "v"], ["y"])], {"x": shape}, weights)  # type: ignore[dict-item]


def slice_(data: Draw) -> Op:
    shape = ["N", *nums(data, num(data, 1, 3), 2, 6)]
    axes = sorted({num(data, 1, len(shape) - 1) for _ in range(2)})
    rows = []
    for a in axes:
        n = int(shape[a])
        first = num(data, 0, n - 1)
        last = num(data, first + 1, n)
        rows.append(
            (
                first - one(data, 0, n),
                one(data, last, last + 99 if last == n else last),
                num(data, 1, 2),
            )
        )
    starts, ends, steps = (np.array(c) for c in zip(*rows, strict=True))
    weights = {"s": starts, "e": ends, "a": np.array(axes), "t": steps}
    return Op([make_node("Slice", ["x", *weights], ["y"])], {"x": shape}, weights)


def reshape(data: Draw) -> Op:
    shape = ["N", *nums(data, num(data, 1, 3), 1, 6)]
    left, target = int(np.prod([int(n) for n in shape[1:]])), []
    for _ in range(num(data, 1, 3)):
        target.append(one(data, *(d for d in range(1, left + 1) if left % d == 0)))
        left //= target[-1]
    batch = one(data, 0, -1)
    # -1 in front merges what is left into the batch axis
    target = [-1, *target] if batch else [0, *target, left]
    return Op([make_node("Reshape", ["x", "s"], ["y"])], {"x": shape}, {"s": np.array(target)})


def flatten(data: Draw) -> Op:
    return Op([make_node("Flatten", ["x"], ["y"], axis=1)], {"x": image(data, num(data, 0, 2))}, {})


def squeeze(data: Draw) -> Op:
    axes = sorted({num(data, 1, 3) for _ in range(2)})
    shape = [1 if i in axes else n for i, n in enumerate(["N", *nums(data, 3, 1, 5)])]
    return Op([make_node("Squeeze", ["x", "a"], ["y"])], {"x": shape}, {"a": np.array(axes)})


def unsqueeze(data: Draw) -> Op:
    axes = sorted({num(data, 1, 3) for _ in range(2)})
    return Op(
        [make_node("Unsqueeze", ["x", "a"], ["y"])],
        {"x": ["N", *nums(data, 2, 1, 5)]},
        {"a": np.array(axes)},
    )


def transpose(data: Draw) -> Op:
    shape = ["N", *nums(data, num(data, 1, 3), 1, 5)]
    rest = data.draw(st.permutations(range(1, len(shape))))
    return Op([make_node("Transpose", ["x"], ["y"], perm=[0, *rest])], {"x": shape}, {})


OPERATORS: dict[str, Callable[[Draw], Op]] = {
    "Conv": conv,
    "Gemm": gemm,
    "MatMul": matmul,
    "Add": binary("Add"),
    "Sub": binary("Sub"),
    "Mul": binary("Mul"),
    "Relu": unary("Relu"),
    "Clip": clip,
    "LeakyRelu": unary("LeakyRelu", alpha=factor),
    "Sigmoid": unary("Sigmoid"),
    "HardSigmoid": unary("HardSigmoid", alpha=factor, beta=factor),
    "HardSwish": unary("HardSwish"),
    "HardSwish in parts": HARD_SWISH,
    "Tanh": unary("Tanh"),
    "SiLU": SILU,
    "Gelu": unary("Gelu"),
    "Gelu by tanh": unary("Gelu", approximate="tanh"),
    "Gelu in parts": GELU_ERF,
    "Gelu by tanh in parts": GELU_TANH,
    "MaxPool": pool("MaxPool"),
    "AveragePool": pool("AveragePool"),
    "GlobalAveragePool": lambda data: Op(
        [make_node("GlobalAveragePool", ["x"], ["y"])], {"x": image(data, num(data, 1, 2))}, {}
    ),
    "ReduceMean": reduce_mean,
    "Softmax": softmax,
    "Concat": concat,
    "Pad": pad,
    "Slice": slice_,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Transpose": transpose,
    "Identity": unary("Identity"),
}


@pytest.mark.parametrize("operator", OPERATORS)
@CASES
@given(data=st.data())
def test_operator_is_half_a_step_from_float(operator: str, data: Draw) -> None:
    op = OPERATORS[operator](data)
    place = Place(output=Int(one(data, 8, 16)), per_channel=one(data, True, True, False))
    case = prepare_or_skip(op, num(data, 0, 1 << 32), place)
    judge(case, integer(case), original=place.per_channel)


def prepare_or_skip(op: Op, seed: int, place: Place | None = None) -> Case:
    """The case, unless its window is one that ONNX and its runtimes do not agree about."""
    try:
        return prepare(op.model, seed, place)
    except Unsupported as e:
        if any(reason in str(e) for reason in ("place differently", "runtimes disagree")):
            assume("ceil_mode" not in str([a.name for a in op.nodes[0].attribute]))
        raise


@pytest.mark.parametrize("operator", ["Conv", "Gemm", "MatMul"])
@CASES
@given(data=st.data())
def test_result_in_steps_of_its_accumulator_is_exact(operator: str, data: Draw) -> None:
    """No rounding at all: every product, zero point and bias is seen to the last unit."""
    op = OPERATORS[operator](data)

    def fix(case: Case) -> None:
        scale = case.quantizer(weight_of(case)).scale[0]
        case.set("y", scale=(case.quantizer("x").scale[0] * scale,))

    place = Place(output=Int(24), per_channel=False)
    whole = {n: np.round(w * 64).clip(-127, 127) / 64 for n, w in op.weights.items()}
    op = replace(op, weights={n: w.astype(np.float32) for n, w in whole.items()})
    case = prepare(op.model, num(data, 0, 1 << 32), place, fix=fix)
    done = integer(case)
    for node in done.graph.nodes:
        if isinstance(node.op, Rescale):
            assert set(node.op.accs[0].multiplier) == {1 << 30}
    errors = judge(case, done, original=True)
    unit = case.quantizer("y").scale[0]
    biased = [w for n, w in op.weights.items() if n != "w"]
    off = max((float(np.abs(b / unit - np.rint(b / unit)).max()) for b in biased), default=0.0)
    assert errors["y"] <= off + 1e-6


def weight_of(case: Case) -> str:
    """The one weight, under the name that the passes gave it."""
    (name,) = [s.tensor for s in case.plan.slots.values() if s.kind is Kind.WEIGHT]
    return name


# --- a wrong graph is found -------------------------------------------------------------------------------------


def example(name: str) -> tuple[Case, Integerized]:
    rng = np.random.default_rng(3)
    w = (rng.integers(-127, 128, (4, 3, 3, 3)) / 64).astype(np.float32)
    x: Inputs = {"x": ["N", 3, 6, 6]}
    node: dict[str, list[onnx.NodeProto]] = {
        "Conv": [make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])],
        "Relu": [make_node("Relu", ["x"], ["y"])],
        "Add": [make_node("Add", ["x", "z"], ["y"])],
        "Sub": [make_node("Sub", ["x", "z"], ["y"])],
        "Mul": [make_node("Mul", ["x", "z"], ["y"])],
        "AveragePool": [
            make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        ],
        "Pad": [make_node("Pad", ["x", "p"], ["y"])],
    }
    inputs = {**x, "z": ["N", 3, 6, 6]} if name in ("Add", "Sub", "Mul") else x
    weights: dict[str, Any] = {
        "Conv": {"w": w, "b": (rng.integers(-99, 99, 4) / 64).astype(np.float32)},
        "Pad": {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    }.get(name, {})

    def fix(case: Case) -> None:
        case.set("x", zero_point=(-37,), scale=(2.0**-6,))
        case.feeds["x"] = ((case.codes["x"] + 37) / 64).astype(np.float32)
        if name == "Conv":
            case.set("w", scale=(2.0**-6,) * 4, zero_point=(0,) * 4, axis=0)

    case = prepare(build(node[name], inputs, weights), 5, fix=fix)
    return case, integer(case)


def off_by_one(node: Node) -> bool:
    if not isinstance(node.op, Rescale) or node.op.hi == node.op.lo:
        return False
    node.op = replace(node.op, zero_point=node.op.zero_point + 1)
    return True


@pytest.mark.parametrize("name", ["Conv", "Relu", "Add", "Sub", "Mul", "AveragePool"])
def test_one_unit_added_to_every_result_is_found(name: str) -> None:
    case, done = example(name)
    judge(case, done)
    assert mutate(done.graph, off_by_one)
    with pytest.raises(AssertionError):
        judge(case, done)


@pytest.mark.parametrize("name", ["Conv", "Relu", "Add", "Sub", "Mul", "AveragePool"])
def test_rounding_constant_left_out_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, done = example(name)

    def floored(accs: Any, vals: Any, f: Any, *rest: Any) -> Any:
        """Take half a unit off first: what is added back is what was left out."""
        less = (arith.Val((1,), 0), -(np.int64(1) << (f - 1)))
        return honest(accs, [*vals, less], f, *rest)

    honest = arith.rescale
    monkeypatch.setattr(arith, "rescale", floored)
    with pytest.raises(AssertionError):
        judge(case, done)


@pytest.mark.parametrize("name", ["Conv", "Pad"])
def test_border_filled_with_0_instead_of_the_zero_point_is_found(name: str) -> None:
    case, done = example(name)

    def zero(node: Node) -> bool:
        match node.op:
            case Conv():
                node.op = replace(node.op, pad_value=0)
            case Pad():
                node.op = replace(node.op, value=0)
            case _:
                return False
        return True

    assert mutate(done.graph, zero)
    with pytest.raises(AssertionError):
        judge(case, done)


def test_bias_off_by_one_is_found() -> None:
    """Where the result is as fine as the accumulator, one unit of a bias is one unit of the result."""
    rng = np.random.default_rng(0)
    w = (rng.integers(-127, 128, (3, 8)) / 64).astype(np.float32)
    model = build([make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"x": ["N", 8]}, {"w": w})

    def fix(case: Case) -> None:
        unit = case.quantizer("x").scale[0] * case.quantizer(weight_of(case)).scale[0]
        case.set("y", scale=(unit,))

    case = prepare(model, 1, Place(output=Int(24), per_channel=False), fix=fix)
    done = integer(case)
    assert judge(case, done)["y"] == 0.0
    (bias,) = [v for v in done.graph.constants() if v.name.endswith(":bias")]
    bias.const = bias.constant + np.array([0, 1, 0], np.int32)
    with pytest.raises(AssertionError):
        judge(case, done)


# --- what cannot be ---------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[list[onnx.NodeProto], Inputs, dict[str, NDArray[Any]], str]] = {
    "Conv over three axes": (
        [make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", name="it")],
        {"x": ["N", 2, 4, 4, 4]}, {"w": np.ones((3, 2, 3, 3, 3))}, "one or two axes",
    ),
    "Conv whose weights are computed": (
        [make_node("Conv", ["x", "z"], ["y"], name="it")],
        {"x": ["N", 2, 4, 4], "z": [3, 2, 1, 1]}, {}, "computed at run time",
    ),
    "Gemm that transposes its rows": (
        [make_node("Gemm", ["x", "w"], ["y"], transA=1, name="it")],
        {"x": [4, 4]}, {"w": np.ones((4, 4))}, "transpose the operand",
    ),
    "Gemm that adds a column": (
        [make_node("Gemm", ["x", "w", "c"], ["y"], transB=1, name="it")],
        {"x": [3, 4]}, {"w": np.ones((3, 4)), "c": np.ones((3, 1))}, "one row",
    ),
    "MatMul by a vector": (
        [make_node("MatMul", ["x", "w"], ["y"], name="it")],
        {"x": ["N", 4]}, {"w": np.ones(4)}, "constant matrix",
    ),
    "MatMul by a stack": (
        [make_node("MatMul", ["x", "w"], ["y"], name="it")],
        {"x": [2, 2, 4]}, {"w": np.ones((2, 4, 5))}, "constant matrix",
    ),
    "MatMul from the left": (
        [make_node("MatMul", ["w", "x"], ["y"], name="it")],
        {"x": ["N", 4, 3]}, {"w": np.ones((4, 4))}, "computed at run time",
    ),
    "AveragePool with dilations": (
        [make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], dilations=[2, 2], pads=[2] * 4, name="it")],
        {"x": ["N", 2, 7, 7]}, {}, "dilations",
    ),
    "AveragePool that counts what rounding up adds": (
        [make_node("AveragePool", ["x"], ["y"], kernel_shape=[3], strides=[3], ceil_mode=1, count_include_pad=1,
                   name="it")],
        {"x": ["N", 2, 7]}, {}, "ceil_mode=0",
    ),
    "MaxPool with indices": (
        [make_node("MaxPool", ["x"], ["m", "i"], kernel_shape=[2], name="it"),
         make_node("Cast", ["i"], ["f"], to=1), make_node("Add", ["m", "f"], ["y"])],
        {"x": ["N", 2, 7]}, {}, "indices",
    ),
    "ReduceMean over channels": (
        [make_node("ReduceMean", ["x", "a"], ["y"], name="it")],
        {"x": ["N", 2, 7, 7]}, {"a": np.array([1])}, "ReduceMean",
    ),
    "operands of different rank": (
        [make_node("Relu", ["x"], ["r"]), make_node("Add", ["r", "z"], ["y"], name="it")],
        {"x": [1, 4, 6], "z": [4, 6]}, {}, "Unsqueeze",
    ),
    "Concat along the batch": (
        [make_node("Concat", ["x", "z"], ["y"], axis=0, name="it")],
        {"x": [1, 4], "z": [1, 4]}, {}, "batch",
    ),
    "Softmax along the batch": (
        [make_node("Softmax", ["x"], ["y"], axis=0, name="it")], {"x": ["N", 1]}, {}, "batch",
    ),
    "Transpose of the batch": (
        [make_node("Transpose", ["x"], ["y"], perm=[1, 0], name="it")], {"x": [2, 4]}, {}, "batch",
    ),
    "Slice of the batch": (
        [make_node("Slice", ["x", "s", "e", "a"], ["y"], name="it")],
        {"x": [4, 3]}, {"s": np.array([1]), "e": np.array([3]), "a": np.array([0])}, "batch",
    ),
    "Pad of the batch": (
        [make_node("Pad", ["x", "p"], ["y"], name="it")], {"x": [4, 3]}, {"p": np.array([1, 0, 0, 0])}, "batch",
    ),
    "Pad by reflection": (
        [make_node("Pad", ["x", "p"], ["y"], mode="reflect", name="it")],
        {"x": ["N", 3, 5]}, {"p": np.array([0, 0, 1, 0, 0, 1])}, "reflect",
    ),
    "Pad that cuts": (
        [make_node("Pad", ["x", "p"], ["y"], name="it")],
        {"x": ["N", 3, 5]}, {"p": np.array([0, 0, -1, 0, 0, 1])}, "negative",
    ),
    "Slice backwards": (
        [make_node("Slice", ["x", "s", "e", "a", "t"], ["y"], name="it")],
        {"x": ["N", 5]}, {"s": np.array([-1]), "e": np.array([-9]), "a": np.array([1]), "t": np.array([-1])},
        "negative step",
    ),
    "Reshape that mixes samples": (
        [make_node("Reshape", ["x", "s"], ["y"], name="it")],
        {"x": ["N", 4, 6]}, {"s": np.array([-1, 48])}, "mixes samples",
    ),
    "Reshape that fixes the batch": (
        [make_node("Reshape", ["x", "s"], ["y"], name="it")],
        {"x": ["N", 4, 6]}, {"s": np.array([8, 6])}, "mixes samples",
    ),
    "Reshape to a scalar": (
        [make_node("Reshape", ["x", "s"], ["r"], name="it"), make_node("Relu", ["r"], ["y"])],
        {"x": [1, 1]}, {"s": np.zeros(0, np.int64)}, "scalar",
    ),
    "table without an exact meaning": (
        [make_node("Mul", ["x", "c"], ["m"]), make_node("Det", ["m"], ["y"], name="it")],
        {"x": ["N", 4, 4]}, {"c": np.float32(2)}, "Det",
    ),
    "operator that nobody has": (
        [make_node("CumSum", ["x", "a"], ["y"], name="it")], {"x": ["N", 4]}, {"a": np.array(1)}, "CumSum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_integer_form_is_refused_with_its_node(name: str) -> None:
    nodes, inputs, weights, reason = REFUSED[name]
    typed = {n: w.astype(np.float32) if w.dtype == np.float64 else w for n, w in weights.items()}
    with pytest.raises(Unsupported) as caught:
        integer(prepare(build(nodes, inputs, typed), rows=1))
    sentence = str(caught.value)
    assert "node it" in sentence
    assert reason in sentence
    assert "\n" not in sentence


def test_output_that_is_a_constant_is_refused() -> None:
    nodes = [make_node("Relu", ["x"], ["y"]), make_node("Neg", ["c"], ["z"])]
    model = build(nodes, {"x": ["N", 3]}, {"c": np.ones(3, np.float32)}, ["y", "z"])
    with pytest.raises(Unsupported, match="output z is a constant"):
        integer(prepare(model))


def test_accumulator_beyond_32_bits_is_refused() -> None:
    w = np.full((1, 140_000), 127 / 64, np.float32)
    node = make_node("Gemm", ["x", "w"], ["y"], transB=1, name="too long")
    case = prepare(build([node], {"x": ["N", 140_000]}, {"w": w}), rows=1)
    with pytest.raises(Unsupported, match=r"node too long: .*32 bits"):
        integer(case)
    # fewer bits of weights help, as it says
    narrow = Place(weights=Int(4))
    case = prepare(build([node], {"x": ["N", 140_000]}, {"w": w}), place=narrow, rows=1)
    judge(case, integer(case))


def test_plan_that_is_no_integer_plan_is_refused() -> None:
    """A plan file is edited by people."""
    rng = np.random.default_rng(0)
    w = (rng.integers(-127, 128, (4, 4)) / 64).astype(np.float32)
    nodes = [
        make_node("Gemm", ["x", "w"], ["g"], transB=1, name="gemm"),
        make_node("Softmax", ["g"], ["y"], name="softmax"),
    ]
    model = build(nodes, {"x": ["N", 4]}, {"w": w})
    bad: list[tuple[str, dict[str, Any], str]] = [
        ("w", {"scale": (0.5,) * 4, "zero_point": (0, 0, 1, 0), "axis": 0}, "zero point"),
        ("w", {"scale": (0.5,) * 4, "zero_point": (0,) * 4, "axis": 1}, "axis"),
        ("w", {"scale": (0.5,) * 3, "zero_point": (0,) * 3, "axis": 0}, "3 scales"),
        ("x", {"scale": (0.5, 0.5), "zero_point": (0, 0), "axis": 1}, "2 scales"),
        ("x", {"format": Int(8, signed=False)}, "uint8"),
        ("g", {"format": Int(24)}, "softmax"),
        ("y", {"scale": (0.5,)}, "Softmax"),
    ]
    for tensor, changes, reason in bad:
        case = prepare(model)
        case.set(weight_of(case) if tensor == "w" else tensor, **changes)
        with pytest.raises(Unsupported, match=reason):
            integer(case)
    case = prepare(model)
    del case.plan.quantizers["g"]
    with pytest.raises(QcompileError, match="g has no quantizer"):
        integer(case)


# --- the same plan, the same bytes ------------------------------------------------------------------------------


PROGRAM = """
import sys, hashlib, numpy as np
from onnx.helper import make_node as N
from tests.oracle import build, integer, prepare
from qcompile.ir import text
rng = np.random.default_rng(0)
w = (rng.integers(-127, 128, (4, 3, 3, 3)) / 64).astype(np.float32)
v = (rng.integers(-127, 128, (4, 4, 3, 3)) / 64).astype(np.float32)
nodes = [N("Conv", ["x", "w"], ["c"], pads=[1] * 4), N("Sigmoid", ["c"], ["s"]), N("Mul", ["c", "s"], ["m"]),
         N("Conv", ["m", "v"], ["d"], pads=[1] * 4), N("Conv", ["m", "v"], ["e"], pads=[1] * 4),
         N("Add", ["d", "e"], ["a"]), N("Concat", ["a", "m"], ["y"], axis=1)]
done = integer(prepare(build(nodes, {"x": ["N", 3, 5, 5]}, {"w": w, "v": v}), 4))
parts = [text.dump(done.graph), *(f"{c.name} {c.constant.tobytes().hex()}" for c in done.graph.constants())]
parts.append(repr(sorted(done.multiplier_errors.items())) + repr(sorted(done.origins.items())))
print(hashlib.sha256("\\n".join(parts).encode()).hexdigest())
"""


def test_one_plan_gives_one_graph_whatever_the_hash_seed() -> None:
    seen = set()
    for seed in ("0", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=os.getcwd(),
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(done.stdout)
    assert len(seen) == 1


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.sampled_from(sorted(OPERATORS)), st.data())
def test_integerizing_twice_gives_the_same_text_and_constants(operator: str, data: Draw) -> None:
    op = OPERATORS[operator](data)
    case = prepare_or_skip(op, 0)
    first, second = integer(case), integer(case)
    assert described(first.graph) == described(second.graph)
    assert first.origins == second.origins
    assert first.multiplier_errors == second.multiplier_errors


def described(graph: Graph) -> list[str]:
    return [
        text.dump(graph),
        *(f"{c.name} {c.constant.tobytes().hex()}" for c in graph.constants()),
    ]


# --- fewer multipliers ------------------------------------------------------------------------------------------


def weight(n: int) -> int:
    """Nonzero digits of the canonical signed digit form (Prodinger 2000: those of 3n differ from n's there)."""
    return (n ^ (3 * n)).bit_count()


def within(digits: int, bits: int) -> list[int]:
    """All sums of at most `digits` powers of two with signs, by adding them up."""
    found = {0}
    for _ in range(digits):
        found |= {n + s * (1 << p) for n in found for p in range(bits + 1) for s in (1, -1)}
    return sorted(n for n in found if n >= 0)


LIMITS = [(k, shifts) for k in (1, 2, 3) for shifts in (False, True)] + [(None, True)]


@pytest.mark.parametrize(("digits", "one_shift"), LIMITS)
@given(st.lists(st.integers(1, 1 << 24), min_size=1, max_size=5), st.integers(0, 30))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_multipliers_are_the_nearest_of_few_digits_or_of_one_unit(
    digits: int | None, one_shift: bool, numerators: list[int], down: int
) -> None:
    scales = tuple(Fraction(n, 1 << down) for n in numerators)
    near = arith.Multipliers(digits, one_shift).near(scales, 10)
    most = max(scales)
    for scale, got in zip(scales, near, strict=True):
        top = most if one_shift else scale
        unit = Fraction(1, 1 << 60)
        while unit * (1 << 10) <= top:
            unit *= 2
        whole = got / unit
        assert whole.denominator == 1
        assert 1 <= whole <= 1 << 10
        choice = within(digits, 10) if digits else list(range((1 << 10) + 1))
        assert abs(got - scale) == min(abs(n * unit - scale) for n in choice if n)
        if digits:
            assert weight(int(whole)) <= digits
        if digits and not one_shift:
            assert abs(got - scale) / scale <= Fraction(3, 2 * 4**digits + 1) + Fraction(1, 1 << 10)


@pytest.mark.parametrize(("digits", "one_shift"), LIMITS)
@given(data=st.data(), count=st.integers(1, 4), skip=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_rescale_is_the_exact_product_rounded_once(
    digits: int | None, one_shift: bool, data: Draw, count: int, skip: bool
) -> None:
    limits = arith.Multipliers(digits, one_shift)
    scales = tuple(Fraction(num(data, 1, 1 << 20), 1 << num(data, 16, 30)) for _ in range(count))
    bound = tuple(num(data, 1, 1 << 20) for _ in range(count))
    values = [arith.ValOperand(Fraction(num(data, 1 << 8, 1 << 16), 1 << 15), 5, -128, 127)]
    values = values if skip else []
    try:
        operand = arith.AccOperand(scales, bound)
        fit = arith.fit_rescale([operand], values, bits=16, multipliers=limits)
    except arith.NoRoom:
        assume(False)
    wanted, beside = limits.near(scales, 16), [limits.near((v.scale,), 16)[0] for v in values]
    op = Rescale(fit.accs, fit.vals, fit.f, 1, -128, 127, DType.I8)
    if skip and one_shift:
        assert len(fit.f) == 1
    errors = [abs(w - s) / s for w, s in zip(wanted, scales, strict=True)]
    for c in range(count):
        f = fit.f[c % len(fit.f)]
        accs = [bound[c], -bound[c], 0, 1, -1, num(data, -bound[c], bound[c])]
        x = np.zeros((len(accs), count), np.int32)
        x[:, c] = accs
        codes = np.full((len(accs), count), num(data, -128, 127), np.int8)
        got = op.run(x, codes) if skip else op.run(x)
        for a, code, y in zip(accs, codes[:, c], got[:, c], strict=True):
            total = a * wanted[c] * 2**f // 1
            for v, s in zip(values, beside, strict=True):
                n = (s * 2**f + Fraction(1, 2)) // 1
                errors.append(abs(Fraction(n, 1 << f) - v.scale) / v.scale)
                total += n * (int(code) - v.zero_point)
            assert y == min(max((total + 2 ** (f - 1)) // 2**f + 1, -128), 127)
    assert fit.multiplier_error == max(errors)


@pytest.mark.parametrize(
    ("options", "digits"),
    [
        ({"requant": "khot"}, 3),
        ({"requant": "khot", "digits": 2}, 2),
        ({"requant": "khot", "digits": 1, "shifts": "layer"}, 1),
        ({"shifts": "layer"}, 16),
    ],
)
def test_a_network_has_the_multipliers_it_was_asked_for(
    options: dict[str, Any], digits: int
) -> None:
    rng = np.random.default_rng(7)
    nodes = [
        make_node("Conv", ["x", "u", "b"], ["p"]),
        make_node("Relu", ["p"], ["q"]),
        make_node("Conv", ["q", "v"], ["r"]),
        make_node("Add", ["r", "q"], ["y"]),
    ]
    u = rng.normal(size=(6, 3, 1, 1)) * 2.0 ** rng.uniform(-3, 3, (6, 1, 1, 1))
    weights = {
        "u": u.astype(np.float32),
        "b": rng.normal(size=6).astype(np.float32),
        "v": rng.normal(size=(6, 6, 1, 1)).astype(np.float32),
    }
    case = prepare(build(nodes, {"x": ["N", 3, 4, 4]}, weights), 3)
    done = integer(case, **options)
    rescales = [n.op for n in done.graph.nodes if isinstance(n.op, Rescale)]
    for op in rescales:
        rows = [m for t in (*op.accs, *op.vals) for m in t.multiplier]
        assert all(weight(abs(m)) <= digits for m in rows)
        if options.get("shifts") == "layer" and op.vals:
            assert len(op.f) == 1
    worst = max(done.multiplier_errors.values())
    assert worst <= 3 / (2 * 4**digits + 1) + 2**-8
    (plain, mine) = (
        border.run_graph(g, border.encode(g, case.feeds))["y"].astype(np.int64)
        for g in (integer(case).graph, done.graph)
    )
    signal = np.linalg.norm(plain - case.quantizer("y").zero_point[0])
    assert np.linalg.norm(mine - plain) <= 3 * worst * signal + 2 * np.sqrt(plain.size)
