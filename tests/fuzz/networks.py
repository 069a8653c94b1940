"""Random small networks of the operators that are taken, with any attributes ONNX's own inference finds consistent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
MOST_ELEMENTS = 1500
Array = NDArray[np.generic]
Draw = Callable[[st.SearchStrategy], object]


@dataclass(frozen=True)
class Network:
    """A model, samples for it, and how it is to be compiled."""

    model: bytes
    samples: dict[str, Array]
    recipe: str
    options: dict[str, object]
    nodes: tuple[str, ...]


@dataclass
class Maker:
    """Adds nodes to each other's results; what ONNX's inference refuses is left out."""

    draw: Draw
    rng: np.random.Generator
    free: bool
    batch: int
    values: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def one(self, choices: Sequence):
        return self.draw(st.sampled_from(list(choices)))

    def int(self, lo: int, hi: int) -> int:
        return self.draw(st.integers(lo, hi))

    def yes(self, of: int = 2) -> bool:
        return self.int(1, of) == of

    def const(self, array: object) -> str:
        """A constant by name; real numbers are float32."""
        made = np.asarray(array)
        if made.dtype == np.float64:
            made = made.astype(np.float32)
        name = f"k{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(made, name))
        return name

    def ints(self, values: Sequence[int]) -> str:
        return self.const(np.asarray(list(values), np.int64))

    def weights(self, *shape: int) -> str:
        """Numbers of any size, now and then all alike, with zeros or none."""
        made = self.rng.normal(0, self.one((0.3, 1.0, 1.0, 0.02, 20.0)), shape)
        match self.int(0, 9):
            case 0:
                made = np.full(shape, self.one((0.0, 1.0, -2.5)))
            case 1:
                made = made * (self.rng.random(shape) < 0.5)
            case 2:
                made = np.abs(made) + 0.1
        return self.const(made)

    def value(self, least: int = 0) -> str | None:
        """One of the values there are, of at least so many axes, most likely a late one."""
        found = [n for n, s in self.values.items() if len(s) >= least]
        if not found:
            return None
        return found[max(0, len(found) - 1 - self.one((0, 0, 0, 0, 1, 1, 2, 3)))]

    def add(self, op: str, inputs: Sequence[str], count: int = 1, **attributes: object) -> bool:
        """Was the node consistent, and its results neither empty nor large?"""
        given = {k: v for k, v in attributes.items() if v is not None}
        outputs = [f"v{len(self.nodes)}_{i}" for i in range(count)]
        node = helper.make_node(
            op, list(inputs), outputs, f"{op.lower()}{len(self.nodes)}", **given
        )
        constants = {t.name: t for t in self.constants}
        types, data = {}, {}
        for name in filter(None, inputs):
            if name in constants:
                t = constants[name]
                types[name] = helper.make_tensor_type_proto(t.data_type, list(t.dims))
                data[name] = t
            else:
                types[name] = helper.make_tensor_type_proto(1, list(self.values[name]))
        try:
            schema = onnx.defs.get_schema(op, OPSET)
            found = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                types,
                data,
                opset_imports=[helper.make_opsetid("", OPSET)],
                ir_version=10,
            )
        except Exception:
            return False
        made = {}
        for name in outputs:
            kind = found.get(name)
            if kind is None or not kind.tensor_type.HasField("shape"):
                return False
            shape = tuple(d.dim_value for d in kind.tensor_type.shape.dim)
            if (
                any(n < 1 for n in shape)
                or np.prod(shape, dtype=np.int64) > MOST_ELEMENTS
                or len(shape) > 6
            ):
                return False
            made[name] = (kind.tensor_type.elem_type, shape)
        self.nodes.append(node)
        self.values |= {n: s for n, (kind, s) in made.items() if kind == TensorProto.FLOAT}
        return True

    def feed(self, shape: Sequence[int]) -> None:
        name = f"x{len(self.inputs)}"
        self.inputs.append(name)
        self.values[name] = tuple(shape)

    def axis(self, rank: int) -> int:
        return self.int(-rank, rank - 1)

    # --- one operator each ------------------------------------------------------------------------------

    def elementwise(self) -> None:
        x = self.value()
        op = self.one(PLAIN)
        attributes = {}
        if (
            op in ("LeakyRelu", "Elu", "Celu", "ThresholdedRelu", "Selu", "HardSigmoid")
            and self.yes()
        ):
            attributes["alpha"] = self.one(
                (0.0, 0.1, 0.5, 1.0, 2.0) if op != "Celu" else (0.5, 1.0, 2.0)
            )
        if op == "Gelu":
            attributes["approximate"] = self.one(("none", "tanh"))
        if op == "Shrink":
            attributes = {"lambd": self.one((0.0, 0.5, 1.0)), "bias": self.one((0.0, 0.5))}
        self.add(op, [x], **attributes)

    def clip(self) -> None:
        lo, hi = sorted((self.one((-6.0, -1.0, 0.0)), self.one((0.5, 1.0, 6.0))))
        ends = [
            self.const(np.float32(lo)) if self.yes() else "",
            self.const(np.float32(hi)) if self.yes() else "",
        ]
        self.add("Clip", [self.value(), *ends])

    def binary(self) -> None:
        x = self.value()
        shape = self.values[x]
        op = self.one(
            ("Add", "Add", "Sub", "Mul", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Sum", "Mean")
        )
        same = [n for n, s in self.values.items() if s == shape or not s or _broadcasts(s, shape)]
        if op not in ("PRelu", "Pow") and self.yes():
            other = self.one(same)
        else:
            kept = [n if self.yes() else 1 for n in shape]
            while kept and self.yes(3):
                kept.pop(0)
            if self.free and len(kept) == len(shape) and kept:
                kept[0] = 1
            other = (
                self.const(np.float32(self.one((2, 3, 0.5, 1, 0, -1))))
                if op == "Pow"
                else self.weights(*kept)
            )
        pair = [x, other] if op in ("PRelu", "Pow") or self.yes() else [other, x]
        self.add(op, pair)

    def conv(self) -> None:
        x = self.value(3)
        if x is None:
            return
        shape = self.values[x]
        c, space = shape[1], len(shape) - 2
        if space > 3:
            return
        kernel = [self.int(1, min(4, n + 2)) for n in shape[2:]]
        group = self.one([g for g in (1, 1, 2, 3, c) if c % g == 0])
        attributes = self.window(kernel)
        if self.yes(3):
            out = self.int(1, 4)
            w = self.weights(c, out, *kernel)
            if self.yes(3):
                attributes["output_padding"] = [self.int(0, 1)] * space
            bias = [self.weights(out * group)] if self.yes() else []
            self.add("ConvTranspose", [x, w, *bias], group=group, **attributes)
        else:
            out = group * self.int(1, 4)
            w = self.weights(out, c // group, *kernel)
            bias = [self.weights(out)] if self.yes() else []
            self.add("Conv", [x, w, *bias], group=group, **attributes)

    def window(self, kernel: Sequence[int]) -> dict[str, object]:
        space = len(kernel)
        made: dict[str, object] = {"kernel_shape": list(kernel)}
        if self.yes():
            made["strides"] = [self.int(1, 3) for _ in range(space)]
        if self.yes(3):
            made["dilations"] = [self.int(1, 2) for _ in range(space)]
        match self.int(0, 3):
            case 0:
                made["auto_pad"] = self.one(("SAME_UPPER", "SAME_LOWER", "VALID"))
            case 1 | 2:
                made["pads"] = [self.int(0, max(0, k - 1)) for k in (*kernel, *kernel)]
        return made

    def pool(self) -> None:
        x = self.value(3)
        if x is None:
            return
        shape = self.values[x]
        op = self.one(
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
            self.add(op, [x])
            return
        attributes = self.window([self.int(1, min(4, n)) for n in shape[2:]])
        attributes["ceil_mode"] = self.int(0, 1)
        if op == "AveragePool":
            attributes["count_include_pad"] = self.int(0, 1)
        if op == "LpPool":
            attributes["p"] = self.one((1, 2, 3))
        self.add(op, [x], **attributes)

    def product(self) -> None:
        x = self.value(1)
        if x is None:
            return
        shape = self.values[x]
        if len(shape) == 2 and self.yes():
            out, trans = self.int(1, 6), self.int(0, 1)
            w = self.weights(*((out, shape[1]) if trans else (shape[1], out)))
            bias = [self.weights(*self.one(((out,), (1, out), (1,), ())))] if self.yes() else []
            scale = (
                {"alpha": self.one((0.5, 2.0)), "beta": self.one((0.0, 0.5, 1.0))}
                if self.yes(3)
                else {}
            )
            self.add("Gemm", [x, w, *bias], transB=trans, **scale)
            return
        others = [n for n, s in self.values.items() if len(s) >= 2 and s[-2] == shape[-1]]
        match self.int(0, 3):
            case 0 if others:
                self.add("MatMul", [x, self.one(others)])
            case 1 if len(shape) >= 2:
                self.add("MatMul", [self.weights(self.int(1, 5), shape[-2]), x])
            case 2 if len(shape) >= 3:
                self.add("MatMul", [x, self.weights(*shape[1:-2], shape[-1], self.int(1, 5))])
            case _:
                w = (
                    self.weights(shape[-1], self.int(1, 6))
                    if self.yes(5) or len(shape) > 1
                    else self.weights(shape[-1])
                )
                self.add("MatMul", [x, w])

    def reduction(self) -> None:
        x = self.value(1)
        if x is None:
            return
        rank = len(self.values[x])
        op = self.one(REDUCTIONS)
        axes = self.draw(
            st.lists(st.integers(-rank, rank - 1), max_size=rank, unique_by=lambda a: a % rank)
        )
        ends = [self.ints(axes)] if axes or self.yes() else []
        attributes = {"keepdims": self.int(0, 1)}
        if not axes and self.yes():
            attributes["noop_with_empty_axes"] = 1
        self.add(op, [x, *ends], **attributes)

    def arg(self) -> None:
        x = self.value(1)
        if x is None:
            return
        if self.add(
            self.one(("ArgMax", "ArgMin")), [x], axis=self.axis(len(self.values[x])),
            keepdims=self.int(0, 1), select_last_index=self.int(0, 1),
        ):  # fmt: skip
            self.whole.append(self.nodes[-1].output[0])

    def softmax(self) -> None:
        x = self.value(1)
        if x is not None:
            self.add(
                self.one(("Softmax", "Softmax", "LogSoftmax")),
                [x],
                axis=self.axis(len(self.values[x])),
            )

    def normal(self) -> None:
        x = self.value(2)
        if x is None:
            return
        shape = self.values[x]
        c = shape[1]
        match self.int(0, 5):
            case 0:
                var = self.const(self.rng.random(c) + 0.1)
                self.add(
                    "BatchNormalization",
                    [x, self.weights(c), self.weights(c), self.weights(c), var],
                )
            case 1:
                self.add(
                    "InstanceNormalization",
                    [x, self.weights(c), self.weights(c)],
                    epsilon=self.one((1e-5, 0.1)),
                )
            case 2:
                axis = self.int(1, len(shape) - 1)
                rest = [self.weights(*shape[axis:])] if self.yes() else []
                self.add("LayerNormalization", [x, self.weights(*shape[axis:]), *rest], axis=axis)
            case 3:
                groups = self.one([g for g in (1, 2, c) if c % g == 0])
                self.add(
                    "GroupNormalization", [x, self.weights(c), self.weights(c)], num_groups=groups
                )
            case 4:
                self.add(
                    "LRN",
                    [x],
                    size=self.one((1, 3, 5)),
                    alpha=self.one((1e-4, 0.5)),
                    bias=self.one((1.0, 2.0)),
                )
            case _:
                self.add(
                    "MeanVarianceNormalization", [x], axes=self.one(([0, 2, 3], [2, 3], [1], [-1]))
                )

    def reshape(self) -> None:
        x = self.value()
        shape = self.values[x]
        match self.int(0, 5):
            case 0:
                self.add(
                    "Flatten",
                    [x],
                    axis=self.axis(len(shape) + 1) if self.yes(3) and shape else None,
                )
            case 1:
                ones = [i for i, n in enumerate(shape) if n == 1 and (i or not self.free)]
                self.add("Squeeze", [x, *([self.ints(ones)] if self.yes() else [])])
            case 2:
                rank = len(shape) + 1
                self.add("Unsqueeze", [x, self.ints([self.axis(rank)])])
            case 3 if len(shape) >= 2:
                self.add("Reshape", [x, self.ints([0, -1])])
            case 4 if len(shape) >= 2:
                rest = int(np.prod(shape[1:]))
                by = self.one([d for d in range(1, rest + 1) if rest % d == 0])
                lead = self.one((0, -1)) if self.free else shape[0]
                self.add("Reshape", [x, self.ints([lead, by, rest // by])])
            case _:
                total = int(np.prod(shape))
                by = self.one([d for d in range(1, total + 1) if total % d == 0])
                self.add("Reshape", [x, self.ints([by, -1])])

    def transpose(self) -> None:
        x = self.value(2)
        if x is not None:
            rank = len(self.values[x])
            rest = self.draw(st.permutations(range(1, rank)))
            whole = self.draw(st.permutations(range(rank)))
            self.add("Transpose", [x], perm=[0, *rest] if self.yes(4) is False else whole)

    def concat(self) -> None:
        x = self.value(1)
        if x is None:
            return
        shape = self.values[x]
        axis = (
            self.axis(len(shape))
            if self.yes(4)
            else self.int(min(1, len(shape) - 1), len(shape) - 1)
        )
        at = axis % len(shape)
        fit = [n for n, s in self.values.items() if len(s) == len(shape) and all(
            a == b for i, (a, b) in enumerate(zip(s, shape, strict=True)) if i != at)]  # fmt: skip
        parts = [x, *(self.one(fit) for _ in range(self.int(0, 2)))]
        if self.yes(3) and not (self.free and at):
            part = list(shape)
            part[at] = self.int(1, 3)
            parts.insert(self.int(0, len(parts)), self.weights(*part))
        self.add("Concat", parts, axis=axis)

    def split(self) -> None:
        x = self.value(1)
        if x is None:
            return
        shape = self.values[x]
        axis = self.axis(len(shape))
        n = shape[axis]
        count = self.int(1, min(3, n))
        if self.yes():
            self.add("Split", [x], count, axis=axis, num_outputs=count)
        else:
            cuts = sorted(
                self.draw(st.lists(st.integers(1, n), min_size=count - 1, max_size=count - 1))
            )
            sizes = np.diff([0, *cuts, n])
            self.add("Split", [x, self.ints(sizes)], count, axis=axis)

    def slice(self) -> None:
        x = self.value(1)
        if x is None:
            return
        shape = self.values[x]
        axes = self.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
        starts = [self.int(-shape[a] - 1, shape[a]) for a in axes]
        steps = [self.one((1, 1, 2, 3, -1, -2)) for _ in axes]
        ends = [self.one((shape[a], 2**63 - 1, shape[a] - 1, -1) if s > 0 else (-(2**63), -1, 0, -shape[a] - 1))
                for a, s in zip(axes, steps, strict=True)]  # fmt: skip
        self.add(
            "Slice", [x, self.ints(starts), self.ints(ends), self.ints(axes), self.ints(steps)]
        )

    def pad(self) -> None:
        x = self.value(1)
        if x is None:
            return
        shape = self.values[x]
        mode = self.one(("constant", "constant", "reflect", "edge", "wrap"))
        most = [2 if mode == "constant" else min(2, n - 1) for n in shape]
        least = -1 if mode == "constant" and self.yes(4) else 0
        pads = [self.int(least, max(m, 0)) if i or self.yes(6) else 0 for i, m in enumerate(most)]
        more = [self.int(least, max(m, 0)) if i or self.yes(6) else 0 for i, m in enumerate(most)]
        fill = (
            [self.const(np.float32(self.one((0.0, 1.5, -3.0))))]
            if mode == "constant" and self.yes()
            else []
        )
        self.add("Pad", [x, self.ints([*pads, *more]), *fill], mode=mode)

    def move(self) -> None:
        x = self.value(1)
        if x is None:
            return
        shape = self.values[x]
        match self.int(0, 6):
            case 0:
                target = [self.one((1, 2, 3)) if n == 1 else self.one((n, 1)) for n in shape]
                if self.yes(3):
                    target.insert(0, self.int(1, 2))
                self.add("Expand", [x, self.ints(target)])
            case 1:
                self.add(
                    "Tile",
                    [
                        x,
                        self.ints(
                            [
                                1 if i == 0 and self.free else self.int(1, 2)
                                for i in range(len(shape))
                            ]
                        ),
                    ],
                )
            case 2 | 3:
                axis = self.axis(len(shape))
                n = shape[axis]
                dims = self.one(((), (1,), (3,), (2, 2)))
                picked = self.rng.integers(-n, n, dims)
                self.add("Gather", [x, self.const(np.asarray(picked, np.int64))], axis=axis)
            case 4:
                self.add("DepthToSpace", [x], blocksize=2, mode=self.one(("DCR", "CRD")))
            case 5:
                self.add("SpaceToDepth", [x], blocksize=2)
            case _:
                self.add("CumSum", [x, self.const(np.int64(self.axis(len(shape))))])

    def resize(self) -> None:
        x = self.value(2)
        if x is None:
            return
        shape = self.values[x]
        mode = self.one(("nearest", "linear", "cubic"))
        attributes: dict[str, object] = {
            "mode": mode,
            "coordinate_transformation_mode": self.one(
                (
                    "half_pixel",
                    "half_pixel_symmetric",
                    "pytorch_half_pixel",
                    "align_corners",
                    "asymmetric",
                )
            ),
        }
        if mode == "nearest":
            attributes["nearest_mode"] = self.one(
                ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
            )
        if mode == "cubic" and self.yes():
            attributes |= {
                "cubic_coeff_a": self.one((-0.5, -0.75)),
                "exclude_outside": self.int(0, 1),
            }
        if mode != "nearest" and self.yes(3):
            attributes["antialias"] = 1
        lead = 1 if self.yes(8) else 2
        changed = range(min(lead, len(shape) - 1), len(shape))
        if self.yes():
            scales = [
                self.one((0.5, 0.6, 1.0, 1.5, 2.0, 3.0)) if i in changed else 1.0
                for i in range(len(shape))
            ]
            self.add("Resize", [x, "", self.const(np.float32(scales))], **attributes)
        else:
            axes = [i for i in range(len(shape)) if i in changed]
            sizes = [self.int(1, 6) for _ in axes]
            attributes["axes"] = axes
            if self.yes(3):
                attributes["keep_aspect_ratio_policy"] = self.one(
                    ("not_larger", "not_smaller", "stretch")
                )
            self.add("Resize", [x, "", "", self.ints(sizes)], **attributes)

    def recurrent(self) -> None:
        x = self.value(3)
        if x is None or len(self.values[x]) != 3:
            return
        shape = self.values[x]
        op, gates = self.one((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
        hidden = self.int(1, 4)
        direction = self.one(("forward", "reverse", "bidirectional"))
        ways = 2 if direction == "bidirectional" else 1
        layout = 0
        attributes: dict[str, object] = {
            "hidden_size": hidden,
            "direction": direction,
            "layout": layout,
        }
        if shape[0] > 6:
            return
        if op == "GRU":
            attributes["linear_before_reset"] = self.int(0, 1)
        if op == "LSTM" and self.yes(4):
            attributes["input_forget"] = 1
        w, r = (
            self.weights(ways, gates * hidden, shape[-1]),
            self.weights(ways, gates * hidden, hidden),
        )
        b = self.weights(ways, 2 * gates * hidden) if self.yes() else ""
        start = self.weights(ways, shape[1], hidden) if self.yes(3) and not self.free else ""
        given = [x, w, r, b, "", start]
        if op == "LSTM":
            given += [self.weights(ways, shape[1], hidden) if start else ""]
            given += [self.weights(ways, 3 * hidden) if self.yes(3) else ""]
        while given[-1] == "":
            given.pop()
        self.add(op, given, 3 if op == "LSTM" and self.yes() else self.int(1, 2), **attributes)

    def rare(self) -> None:
        """What is refused, mostly."""
        x = self.value(2)
        if x is None:
            return
        match self.int(0, 4):
            case 0:
                self.add("Hardmax", [x])
            case 1:
                self.add("Trilu", [x], upper=self.int(0, 1))
            case 2:
                self.add("ReduceProd", [x])
            case 3:
                self.add("Einsum", [x], equation="ij->ji")
            case _:
                self.add("Where", [self.const(np.bool_(True)), x, x])


PLAIN = tuple(
    """Relu Relu Relu LeakyRelu Elu Selu Celu Sigmoid HardSigmoid HardSwish Tanh Softplus Softsign Erf Exp Log Sqrt
    Reciprocal Abs Neg Sign Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Floor Ceil Round Gelu Mish ThresholdedRelu
    Shrink Identity Dropout""".split()
)
REDUCTIONS = tuple(
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare".split()
)
KINDS = (
    "elementwise", "elementwise", "clip", "binary", "binary", "conv", "conv", "pool", "product", "reduction", "arg",
    "softmax", "normal", "reshape", "transpose", "concat", "split", "slice", "pad", "move", "resize", "recurrent",
)  # fmt: skip


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    tail = large[len(large) - len(small) :]
    return len(small) <= len(large) and all(a in (1, b) for a, b in zip(small, tail, strict=True))


@st.composite
def networks(draw: Draw, most: int = 6) -> Network:
    """A few operators on each other's results, compiled in any of the ways there are."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    free = draw(st.booleans())
    batch = 2 if free else draw(st.integers(1, 3))
    maker = Maker(draw, rng, free, batch)
    shapes = (
        (batch, maker.int(1, 6), maker.int(1, 7), maker.int(1, 7)),
        (batch, maker.int(1, 6), maker.int(1, 8)),
        (maker.int(1, 5), 1, maker.int(1, 6)),
        (batch, maker.int(1, 12)),
        (batch, maker.int(1, 3), maker.int(1, 4), maker.int(1, 4), maker.int(1, 4)),
    )
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        maker.feed(maker.one((*shapes[:1] * 3, *shapes)))
    for _ in range(draw(st.integers(1, most))):
        getattr(maker, maker.one((*KINDS, "rare") if maker.yes(12) else KINDS))()
    if not maker.nodes:
        maker.add("Relu", [maker.inputs[0]])
    made = [n for n in maker.values if n not in maker.inputs]
    chosen = made[-1:]
    chosen += (
        [maker.one(made) for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2))))] if made else []
    )
    outputs = [(n, 1) for n in dict.fromkeys(chosen)] + [(n, 7) for n in maker.whole[-1:]]
    read = {n for node in maker.nodes for n in node.input}
    graph = helper.make_graph(
        maker.nodes,
        "fuzzed",
        [
            helper.make_tensor_value_info(
                n, 1, ["N" if free and i == 0 else d for i, d in enumerate(maker.values[n])]
            )
            for n in maker.inputs
        ],
        [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs],
        [t for t in maker.constants if t.name in read],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    spread = maker.one((1.0, 1.0, 0.1, 5.0, 300.0))
    shift = maker.one((0.0, 0.0, 1.0, -3.0))
    times = draw(st.sampled_from((1, 2, 4))) if free else 1
    shapes = {n: (times * maker.values[n][0], *maker.values[n][1:]) for n in maker.inputs}
    samples = {n: rng.normal(shift, spread, s).astype(np.float32) for n, s in shapes.items()}
    options: dict[str, object] = {}
    for key, choices in CHOICES.items():
        if maker.yes(6):
            options[key] = maker.one(choices)
    recipe = maker.one(("fast", "fast", "default", "data-free", "fixed-point", "fixed-point-khot"))
    return Network(
        model.SerializeToString(), samples, recipe, options, tuple(n.op_type for n in maker.nodes)
    )


CHOICES: dict[str, tuple[object, ...]] = {
    "weights": ("int2", "int3", "int4", "int6"),
    "activations": ("int4", "int16"),
    "first_last": ("int8",),
    "per_channel": (False,),
    "method": ("minmax", "mse", "entropy", "percentile"),
    "input_dtype": ("uint8", "int16"),
    "output_dtype": ("int8", "int32"),
    "io_layout": ("nhwc",),
}
