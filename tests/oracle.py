"""Judge integer graphs by onnxruntime's float operators, layer by layer.

`cut` makes a float model in which every quantized tensor is fed with what the integer graph really computed, so that
each layer is judged alone: it may be off by half an output step plus what its multipliers state, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile import border
from qcompile.formats import Int
from qcompile.ir import Array, Graph, Rescale, Value
from qcompile.onnx import frontend
from qcompile.passes.calibrate import symmetric_scales
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold import Fold
from qcompile.passes.integerize import Integerized, integerize
from qcompile.passes.layers import (
    Join,
    Layer,
    Linear,
    Operand,
    Rescaled,
    SoftmaxLayer,
    Table,
    View,
    initializer,
    partition,
)
from qcompile.passes.outline import Outline
from qcompile.passes.place import Place
from qcompile.passes.widen import Widen
from qcompile.pipeline import Context
from qcompile.plan import Kind, Quantizer, QuantPlan, Slot, affine

Real = NDArray[np.float64]
Feeds = Mapping[str, NDArray[np.float32]]
Nodes = Sequence[onnx.NodeProto]

ROWS = 3


def build(
    nodes: Nodes,
    inputs: Mapping[str, Sequence[int | str]],
    weights: Mapping[str, NDArray[np.generic]] | None = None,
    outputs: Sequence[str] = ("y",),
) -> bytes:
    """A model of opset 21; the shapes of its outputs are inferred."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(n, 1, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, 1, None) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True).SerializeToString()


def execute(model: bytes, feeds: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    """What onnxruntime computes, without its optimizations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return cast(list[NDArray[np.generic]], session.run(None, dict(feeds)))


@dataclass
class Case:
    """A float model with its plan, on the way to its integer graph."""

    original: bytes
    model: ir.Model
    plan: QuantPlan
    rng: np.random.Generator
    place: Place
    feeds: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    codes: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    nhwc: bool = False

    @property
    def fused(self) -> bool:
        return self.place.residual == "accumulator"

    def quantizer(self, name: str) -> Quantizer:
        q = self.plan.of(name)
        assert q is not None, name
        return q


def prepare(
    data: bytes,
    seed: int = 0,
    place: Place | None = None,
    *,
    rows: int = ROWS,
    shrink: float | None = None,
    fix: Callable[[Case], None] | None = None,
) -> Case:
    """Run the passes and choose a plan: inputs and weights on their lattice, activations by a rough range."""
    model, plan, place = frontend.load(data, isolated=False), QuantPlan(), place or Place()
    for p in (Fold(), Outline(), Canonicalize(), place):
        p(model, plan, Context())
    case = Case(data, model, plan, np.random.default_rng(seed), place)
    for slot in plan.slots.values():
        if slot.kind is Kind.INPUT:
            _input(case, slot, rows)
        elif slot.kind is Kind.WEIGHT:
            plan.quantizers[slot.tensor] = _weight(model, slot)
    if fix is not None:
        fix(case)
    _ranges(case, shrink)
    Widen(fuse_residual=case.fused)(model, plan, Context())
    return case


def _input(case: Case, slot: Slot, rows: int) -> None:
    """Codes drawn over the whole format, their extremes among them."""
    rng, fmt = case.rng, slot.format
    zero = int(rng.integers(fmt.lo, fmt.hi + 1))
    q = Quantizer(fmt, (2.0 ** int(rng.integers(-8, 3)),), (zero,))
    case.plan.quantizers[slot.tensor] = q
    value = next(v for v in case.model.graph.inputs if v.name == slot.tensor)
    assert value.shape is not None
    shape = [d if isinstance(d, int) else rows for d in value.shape.dims]
    codes = rng.integers(fmt.lo, fmt.hi + 1, shape)
    if rng.integers(2):
        codes = np.where(rng.integers(4, size=shape) == 0, rng.choice([fmt.lo, fmt.hi], shape), codes)
    case.codes[slot.tensor] = codes
    case.feeds[slot.tensor] = ((codes - zero) * q.scale[0]).astype(np.float32)


def _weight(model: ir.Model, slot: Slot) -> Quantizer:
    """Powers of two that represent the values exactly, else the range of the values."""
    values = np.asarray(model.graph.initializers[slot.tensor].const_value.numpy(), np.float64)
    rows = [values] if slot.axis is None else list(np.moveaxis(values, slot.axis, 0))
    scales = tuple(exact_step(r, slot.format) for r in rows)
    if any(s is None for s in scales):
        return Quantizer(
            slot.format,
            symmetric_scales(values, slot.axis, slot.format, "minmax"),
            (0,) * len(rows),
            slot.axis,
        )
    return Quantizer(slot.format, cast(tuple[float, ...], scales), (0,) * len(rows), slot.axis)


def exact_step(values: Real, fmt: Int) -> float | None:
    """The smallest power of two whose multiples the format can hold hold all values."""
    top = float(np.abs(values).max(initial=0.0))
    if top == 0.0:
        return 2.0**-8
    step = 2.0 ** (np.ceil(np.log2(top / fmt.hi)))
    codes = values / step
    return float(step) if np.array_equal(codes, np.rint(codes)) else None


def _ranges(case: Case, shrink: float | None) -> None:
    """Quantizers of activations from what the float model computes on the case's own feeds."""
    slots = [s for s in case.plan.open_slots()]
    if not slots:
        return
    made = {v.name for node in case.model.graph for v in node.outputs}
    names = {t: [m for m in dict.fromkeys((t, *s.members)) if m in made] for s in slots for t in [s.tensor]}
    proto = ir.to_proto(case.model)
    wanted = [n for group in names.values() for n in group]
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in wanted)
    seen = dict(zip(wanted, execute(proto.SerializeToString(), case.feeds), strict=True))
    for slot in slots:
        arrays = [seen[n] for n in names[slot.tensor]]
        lo, hi = (float(f(*(float(g(a)) for a in arrays), 0.0)) for f, g in ((min, np.min), (max, np.max)))
        room = shrink if shrink is not None else float(case.rng.choice([0.6, 1.0, 1.3]))
        case.plan.quantizers[slot.tensor] = affine(lo * room, hi * room, slot.format)


def integer(case: Case, **options: object) -> Integerized:
    return integerize(case.model, case.plan, residual=case.fused, **options)  # type: ignore[arg-type]


def dequantized(codes: Array, q: Quantizer) -> Real:
    real: Real = (codes.astype(np.float64) - q.zero_point[0]) * q.scale[0]
    return real


@dataclass
class Run:
    """What an integer graph computes on a case: tensors of the float model by name, and the raw outputs."""

    tensors: dict[str, Array]
    producers: dict[str, Value]
    outputs: dict[str, Array]


def run(case: Case, done: Integerized) -> Run:
    """Interpret, keeping the codes of every tensor of the float model in the float model's layout."""
    tensors: dict[str, Array] = {}
    producers: dict[str, Value] = {}

    def seen(value: Value, array: Array) -> None:
        origin = done.origins.get(value.name)
        if origin is not None:
            tensors[origin.tensor] = array.transpose(np.argsort(origin.axes))
            producers[origin.tensor] = value

    feeds = border.encode(done.graph, case.feeds)
    return Run(tensors, producers, done.graph.run(feeds, on_value=seen))


def cut(case: Case, kept: Mapping[str, Array]) -> dict[str, Real]:
    """Every tensor of `kept` as onnxruntime computes it from the kept tensors before it, weights as quantized."""
    proto = ir.to_proto(case.model)
    feeds: dict[str, NDArray[np.float32]] = dict(case.feeds)
    fed = {name: f"{name}.fed" for name in kept if name not in case.feeds}
    outputs = [v.name for v in proto.graph.output if v.name not in case.feeds]
    wanted = list(dict.fromkeys([*fed, *outputs]))
    for node in proto.graph.node:
        node.input[:] = [fed.get(n, n) for n in node.input]
    for name, inside in fed.items():
        array = dequantized(kept[name], case.quantizer(name)).astype(np.float32)
        feeds[inside] = array
        proto.graph.input.append(helper.make_tensor_value_info(inside, 1, array.shape))
    for t in proto.graph.initializer:
        slot, q = case.plan.slots.get(t.name), case.plan.of(t.name)
        if slot is not None and q is not None:
            t.CopyFrom(numpy_helper.from_array(_rounded(numpy_helper.to_array(t), q), t.name))
    read = {n for node in proto.graph.node for n in node.input}
    del proto.graph.value_info[:]
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in wanted)
    keep = [v for v in proto.graph.input if v.name in read]
    del proto.graph.input[:]
    proto.graph.input.extend(keep)
    for v in proto.graph.input:
        if v.name in case.feeds:
            v.CopyFrom(helper.make_tensor_value_info(v.name, 1, case.feeds[v.name].shape))
    feeds = {v.name: feeds[v.name] for v in proto.graph.input}
    got = execute(proto.SerializeToString(), feeds)
    return {n: a.astype(np.float64) for n, a in zip(wanted, got, strict=True)}


def _rounded(array: NDArray[np.generic], q: Quantizer) -> NDArray[np.float32]:
    scale, zero = np.array(q.scale, np.float64), np.array(q.zero_point, np.float64)
    if q.axis is not None:
        row = [-1 if i == q.axis else 1 for i in range(array.ndim)]
        scale, zero = scale.reshape(row), zero.reshape(row)
    codes = np.clip(np.rint(array / scale) + zero, q.format.lo, q.format.hi)
    return ((codes - zero) * scale).astype(np.float32)


def slack(case: Case, done: Integerized, layer: Layer, value: Value) -> float:
    """How many output steps a layer's result may be off the real result, by what it states."""
    match layer:
        case View(node=node):
            return 0.5 if node.op_type == "Pad" else 0.0
        case Table() | SoftmaxLayer():
            return 0.5 + (0.02 if isinstance(layer, SoftmaxLayer) else 0.0)
        case Join():
            return 0.5 + 1 / 32
        case Rescaled():
            pass
    q = case.quantizer(str(layer.out.name))
    op = value.producer.op if value.producer is not None else None
    assert isinstance(op, Rescale)
    step = q.scale[0]
    total, reach = 0.5, float(q.format.levels)
    for term in layer.terms:
        match term:
            case Operand(value=x):
                xq = case.quantizer(str(x.name))
                reach += xq.format.levels * xq.scale[0] / step
                total += 0.0 if len(layer.terms) == 1 and xq.scale == q.scale else 1 / 32
            case Linear(bias=bias, x=x, weight=w):
                array = initializer(bias)
                if array is not None:
                    sw = np.array(case.quantizer(str(w.name)).scale)
                    unit = sw * case.quantizer(str(x.name)).scale[0]
                    off = np.abs(array.ravel() / unit - np.rint(array.ravel() / unit))
                    total += float((off * unit).max()) / step
            case _:
                pass
    mixed = len(op.accs) > 0 and len(op.vals) > 0
    relative = 2.0 ** -(16 if q.format.bits <= 8 else 24) if mixed else done.multiplier_errors[str(layer.out.name)]
    if op.accs:
        total += relative * reach + len(op.accs) * 2.0 ** -min(op.f)
    return total


def judge(case: Case, done: Integerized) -> dict[str, float]:
    """Assert that every tensor is within its slack of onnxruntime's; return the largest errors in output steps."""
    got = run(case, done)
    layers = {str(x.out.name): x for x in partition(case.model, fuse_residual=case.fused)}
    kept = {n: a for n, a in got.tensors.items() if n in layers}
    want = cut(case, kept)
    errors: dict[str, float] = {}
    for name, codes in kept.items():
        bound = slack(case, done, layers[name], got.producers[name])
        errors[name] = compare(case, name, codes, want[name], bound)
    for port, value in done.graph.outputs:
        codes = got.outputs[port.name]
        if len(codes.shape) > 2 and case.nhwc:
            codes = np.moveaxis(codes, -1, 1)
        if port.name in kept:
            np.testing.assert_array_equal(codes, kept[port.name])
        elif port.name in case.codes:
            np.testing.assert_array_equal(codes, case.codes[port.name])
        else:
            layer = layers[port.name]
            maker = value.producer
            while isinstance(layer, Rescaled) and maker is not None and not isinstance(maker.op, Rescale):
                maker = maker.inputs[0].producer
            bound = slack(case, done, layer, value if maker is None else maker.output)
            errors[port.name] = compare(case, port.name, codes, want[port.name], bound)
    return errors


def compare(case: Case, name: str, codes: Array, real: Real, bound: float) -> float:
    """The largest error of codes in output steps, asserted to stay within a bound."""
    q = case.quantizer(name)
    assert codes.shape == real.shape, (name, codes.shape, real.shape)
    exact = np.clip(real / q.scale[0] + q.zero_point[0], q.format.lo, q.format.hi)
    error = float(np.abs(codes - exact).max(initial=0.0))
    tolerance = 1e-4 + 2e-6 * float(np.abs(real).max(initial=0.0)) / q.scale[0]
    assert error <= bound + tolerance, f"{name}: {error} > {bound} + {tolerance}"
    return error
