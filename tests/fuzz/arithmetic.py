"""Operators that compute, with any attributes; each adds itself to a network where it fits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.maker import Maker

PLAIN = tuple(
    """Relu Relu Relu LeakyRelu Elu Selu Celu Sigmoid HardSigmoid HardSwish Tanh Softplus Softsign Erf Exp Log Sqrt
    Reciprocal Abs Neg Sign Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Floor Ceil Round Gelu Mish ThresholdedRelu
    Shrink Identity Dropout""".split()
)
REDUCTIONS = tuple(
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare".split()
)


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    tail = large[len(large) - len(small) :]
    return len(small) <= len(large) and all(a in (1, b) for a, b in zip(small, tail, strict=True))


def elementwise(m: Maker) -> None:
    x = m.value()
    op = m.one(PLAIN)
    attributes = {}
    if op in ("LeakyRelu", "Elu", "Celu", "ThresholdedRelu", "Selu", "HardSigmoid") and m.yes():
        attributes["alpha"] = m.one((0.0, 0.1, 0.5, 1.0, 2.0) if op != "Celu" else (0.5, 1.0, 2.0))
    if op == "Gelu":
        attributes["approximate"] = m.one(("none", "tanh"))
    if op == "Shrink":
        attributes = {"lambd": m.one((0.0, 0.5, 1.0)), "bias": m.one((0.0, 0.5))}
    m.add(op, [x], **attributes)


def clip(m: Maker) -> None:
    lo, hi = sorted((m.one((-6.0, -1.0, 0.0)), m.one((0.5, 1.0, 6.0))))
    ends = [
        m.const(np.float32(lo)) if m.yes() else "",
        m.const(np.float32(hi)) if m.yes() else "",
    ]
    m.add("Clip", [m.value(), *ends])


def binary(m: Maker) -> None:
    x = m.value()
    shape = m.values[x]
    op = m.one(
        ("Add", "Add", "Sub", "Mul", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Sum", "Mean")
    )
    same = [n for n, s in m.values.items() if s == shape or not s or _broadcasts(s, shape)]
    if op not in ("PRelu", "Pow") and m.yes():
        other = m.one(same)
    else:
        kept = [n if m.yes() else 1 for n in shape]
        while kept and m.yes(3):
            kept.pop(0)
        if m.free and len(kept) == len(shape) and kept:
            kept[0] = 1
        other = (
            m.const(np.float32(m.one((2, 3, 0.5, 1, 0, -1)))) if op == "Pow" else m.weights(*kept)
        )
    pair = [x, other] if op in ("PRelu", "Pow") or m.yes() else [other, x]
    m.add(op, pair)


def conv(m: Maker) -> None:
    x = m.value(3)
    if x is None:
        return
    shape = m.values[x]
    c, space = shape[1], len(shape) - 2
    if space > 3:
        return
    kernel = [m.int(1, min(4, n + 2)) for n in shape[2:]]
    group = m.one([g for g in (1, 1, 2, 3, c) if c % g == 0])
    attributes = window(m, kernel)
    if m.yes(3):
        out = m.int(1, 4)
        w = m.weights(c, out, *kernel)
        if m.yes(3):
            attributes["output_padding"] = [m.int(0, 1)] * space
        bias = [m.weights(out * group)] if m.yes() else []
        m.add("ConvTranspose", [x, w, *bias], group=group, **attributes)
    else:
        out = group * m.int(1, 4)
        w = m.weights(out, c // group, *kernel)
        bias = [m.weights(out)] if m.yes() else []
        m.add("Conv", [x, w, *bias], group=group, **attributes)


def window(m: Maker, kernel: Sequence[int]) -> dict[str, object]:
    space = len(kernel)
    made: dict[str, object] = {"kernel_shape": list(kernel)}
    if m.yes():
        made["strides"] = [m.int(1, 3) for _ in range(space)]
    if m.yes(3):
        made["dilations"] = [m.int(1, 2) for _ in range(space)]
    match m.int(0, 3):
        case 0:
            made["auto_pad"] = m.one(("SAME_UPPER", "SAME_LOWER", "VALID"))
        case 1 | 2:
            made["pads"] = [m.int(0, max(0, k - 1)) for k in (*kernel, *kernel)]
    return made


def pool(m: Maker) -> None:
    x = m.value(3)
    if x is None:
        return
    shape = m.values[x]
    op = m.one(
        (
            "MaxPool",
            "AveragePool",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "LpPool",
            "GlobalLpPool",
        )
    )
    if op.startswith("Global"):
        m.add(op, [x])
        return
    attributes = window(m, [m.int(1, min(4, n)) for n in shape[2:]])
    attributes["ceil_mode"] = m.int(0, 1)
    if op == "AveragePool":
        attributes["count_include_pad"] = m.int(0, 1)
    if op == "LpPool":
        attributes["p"] = m.one((1, 2, 3))
    m.add(op, [x], **attributes)


def product(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    shape = m.values[x]
    if len(shape) == 2 and m.yes():
        out, trans = m.int(1, 6), m.int(0, 1)
        w = m.weights(*((out, shape[1]) if trans else (shape[1], out)))
        bias = [m.weights(*m.one(((out,), (1, out), (1,), ())))] if m.yes() else []
        scale = {"alpha": m.one((0.5, 2.0)), "beta": m.one((0.0, 0.5, 1.0))} if m.yes(3) else {}
        m.add("Gemm", [x, w, *bias], transB=trans, **scale)
        return
    others = [n for n, s in m.values.items() if len(s) >= 2 and s[-2] == shape[-1]]
    match m.int(0, 3):
        case 0 if others:
            m.add("MatMul", [x, m.one(others)])
        case 1 if len(shape) >= 2:
            m.add("MatMul", [m.weights(m.int(1, 5), shape[-2]), x])
        case 2 if len(shape) >= 3:
            m.add("MatMul", [x, m.weights(*shape[1:-2], shape[-1], m.int(1, 5))])
        case _:
            w = (
                m.weights(shape[-1], m.int(1, 6))
                if m.yes(5) or len(shape) > 1
                else m.weights(shape[-1])
            )
            m.add("MatMul", [x, w])


def reduction(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    rank = len(m.values[x])
    op = m.one(REDUCTIONS)
    axes = m.draw(
        st.lists(st.integers(-rank, rank - 1), max_size=rank, unique_by=lambda a: a % rank)
    )
    ends = [m.ints(axes)] if axes or m.yes() else []
    attributes = {"keepdims": m.int(0, 1)}
    if not axes and m.yes():
        attributes["noop_with_empty_axes"] = 1
    m.add(op, [x, *ends], **attributes)


def arg(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    if m.add(
        m.one(("ArgMax", "ArgMin")), [x], axis=m.axis(len(m.values[x])),
        keepdims=m.int(0, 1), select_last_index=m.int(0, 1),
    ):  # fmt: skip
        m.whole.append(m.nodes[-1].output[0])


def softmax(m: Maker) -> None:
    x = m.value(1)
    if x is not None:
        m.add(
            m.one(("Softmax", "Softmax", "LogSoftmax")),
            [x],
            axis=m.axis(len(m.values[x])),
        )


def normal(m: Maker) -> None:
    x = m.value(2)
    if x is None:
        return
    shape = m.values[x]
    c = shape[1]
    match m.int(0, 5):
        case 0:
            var = m.const(m.rng.random(c) + 0.1)
            m.add(
                "BatchNormalization",
                [x, m.weights(c), m.weights(c), m.weights(c), var],
            )
        case 1:
            m.add(
                "InstanceNormalization",
                [x, m.weights(c), m.weights(c)],
                epsilon=m.one((1e-5, 0.1)),
            )
        case 2:
            axis = m.int(1, len(shape) - 1)
            rest = [m.weights(*shape[axis:])] if m.yes() else []
            m.add("LayerNormalization", [x, m.weights(*shape[axis:]), *rest], axis=axis)
        case 3:
            groups = m.one([g for g in (1, 2, c) if c % g == 0])
            m.add("GroupNormalization", [x, m.weights(c), m.weights(c)], num_groups=groups)
        case 4:
            m.add(
                "LRN",
                [x],
                size=m.one((1, 3, 5)),
                alpha=m.one((1e-4, 0.5)),
                bias=m.one((1.0, 2.0)),
            )
        case _:
            m.add("MeanVarianceNormalization", [x], axes=m.one(([0, 2, 3], [2, 3], [1], [-1])))
