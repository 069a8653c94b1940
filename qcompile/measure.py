"""How far each stage is from the float model, tensor by tensor: weights rounded, all rounded, integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qcompile import border
from qcompile.integerized import Integerized
from qcompile.ir import Array, Graph, Value
from qcompile.onnx.execute import FloatSession
from qcompile.onnx.weights import by_rows
from qcompile.plan import Kind, Quantizer, QuantPlan

if TYPE_CHECKING:
    import onnx
    import onnx_ir


Batch = Mapping[str, NDArray[np.generic]]

HISTOGRAM_BINS = 48
HISTOGRAM_VALUES = 1 << 13
"""Values of a tensor that one batch gives to its histogram, at most; extremes are over all."""


@dataclass(slots=True)
class Error:
    """Energy of a signal and of what a stage got wrong about it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, real: NDArray[np.float64], approximate: NDArray[np.float64]) -> None:
        """Count one more batch."""
        self.signal += float(np.square(real).sum())
        self.noise += float(np.square(real - approximate).sum())

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise ratio in dB; None where there is no signal or no noise."""
        if self.signal <= 0 or self.noise <= 0:
            return None
        return float(10 * np.log10(self.signal / self.noise))


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often values fall into equal bins between `lo` and `hi`."""

    lo: float
    hi: float
    counts: tuple[int, ...]


@dataclass(slots=True)
class Values:
    """The float values of one tensor: how many the codes cannot hold, and how they are distributed."""

    clipped: int = 0
    zeroed: int = 0
    nonzero: int = 0
    count: int = 0
    lo: float = np.inf
    hi: float = -np.inf
    kept: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, real: NDArray[np.float64], q: Quantizer) -> None:
        """Count one more batch against the quantizer of its tensor."""
        if not real.size:
            return
        row = [-1 if i == q.axis else 1 for i in range(real.ndim)] if q.axis is not None else []
        scale, zero = np.array(q.scale).reshape(row), np.array(q.zero_point).reshape(row)
        lo, hi = (q.format.lo - zero - 0.5) * scale, (q.format.hi - zero + 0.5) * scale
        self.clipped += int(((real < lo) | (real > hi)).sum())
        self.zeroed += int(((real != 0) & (np.rint(real / scale) == 0)).sum())
        self.nonzero += int(np.count_nonzero(real))
        self.count += real.size
        self.lo, self.hi = min(self.lo, float(real.min())), max(self.hi, float(real.max()))
        flat = real.reshape(-1)
        self.kept.append(flat[:: -(-flat.size // HISTOGRAM_VALUES)].astype(np.float32))

    @property
    def clipped_percent(self) -> float | None:
        """Share of the values outside the range the codes can hold; None where none were counted."""
        return 100.0 * self.clipped / self.count if self.count else None

    @property
    def zeroed_percent(self) -> float | None:
        """Share of the values other than 0 that the codes make 0; None where there are none."""
        return 100.0 * self.zeroed / self.nonzero if self.nonzero else None

    def histogram(self, bins: int = HISTOGRAM_BINS) -> Histogram | None:
        """The distribution of the values kept, from the least to the greatest value seen."""
        if not self.count:
            return None
        hi = self.hi if self.hi > self.lo else self.lo + 1.0
        # kept values are float32, and rounding may put the extremes outside
        values = np.clip(np.concatenate(self.kept).astype(np.float64), self.lo, hi)
        counts, _ = np.histogram(values, bins, (self.lo, hi))
        return Histogram(self.lo, hi, tuple(int(n) for n in counts))


@dataclass(slots=True)
class Stages:
    """Errors of one tensor with weights rounded, with all rounded, and in the integer graph; its float values."""

    weights: Error = field(default_factory=Error)
    fake_quant: Error = field(default_factory=Error)
    integer: Error = field(default_factory=Error)
    values: Values = field(default_factory=Values)


@dataclass(slots=True)
class Measured:
    """All tensors of a program on some samples, and how often the outputs' largest entries agree with float."""

    samples: int = 0
    tensors: dict[str, Stages] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)

    def worst_output(self) -> float | None:
        """The lowest SQNR among the outputs, in dB."""
        rated = [self.tensors[name].integer.sqnr_db for name in self.agreement]
        return min((r for r in rated if r is not None), default=None)


def restricted(model: onnx_ir.Model, plan: QuantPlan, kept: Collection[str]) -> QuantPlan:
    """The plan with no other slots rounded than those kept; decided biases go with their weights."""
    part = plan.copy()
    part.quantizers = {name: q for name, q in plan.quantizers.items() if name in kept}
    rounded = {
        str(node.outputs[0].name)
        for node in model.graph
        if len(node.inputs) > 1
        and (weight := node.inputs[1]) is not None
        and plan.owner(str(weight.name)) in kept
    }
    part.biases = {name: bias for name, bias in plan.biases.items() if name in rounded}
    return part


def rounded_model(model: onnx_ir.Model, plan: QuantPlan) -> onnx_ir.Model:
    """The fake-quantized model in float operators only: the same numbers as its QuantizeLinear and DequantizeLinear.

    Those let onnxruntime run products in integer kernels, which saturate on machines without VNNI; with constants
    rounded in place it rounds them once more, and where only weights are rounded it (1.31) loses a Conv before an Add.
    """
    import onnx
    from onnx import helper, numpy_helper

    from qcompile.onnx import qdq, weights
    from qcompile.onnx.integer import fresh_name

    proto, stored = qdq.written(model, plan)
    small = {t.name: t for t in proto.graph.initializer if t.name not in stored}
    large = dict(stored)
    constants: dict[str, NDArray[np.float32]] = {}
    nodes: list[onnx.NodeProto] = []
    taken = {v.name for v in proto.graph.input} | {t.name for t in proto.graph.initializer}
    taken.update(name for node in proto.graph.node for name in node.output)

    def known(name: str) -> NDArray[np.generic]:
        return stored[name].numpy() if name in stored else numpy_helper.to_array(small[name])

    def constant(hint: str, array: NDArray[np.generic]) -> str:
        name = fresh_name(hint, taken)
        constants[name] = np.asarray(array, np.float32)
        return name

    def chain(value: str, out: str, *steps: tuple[str, Sequence[str]]) -> None:
        """Apply operators of one operand and some constants, one after the other."""
        for i, (op, others) in enumerate(steps):
            result = out if i == len(steps) - 1 else fresh_name(f"{out}.{op}", taken)
            nodes.append(helper.make_node(op, [value, *others], [result]))
            value = result

    for node in proto.graph.node:
        if node.domain or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            nodes.append(node)
            continue
        source, scale, *rest = node.input
        out = node.output[0]
        steps = known(scale).astype(np.float64)
        zeros = known(rest[0]) if rest else np.zeros_like(steps)
        if node.op_type == "QuantizeLinear":
            held = np.iinfo(zeros.dtype.name)
            bounds = [
                constant(f"{out}.{w}", np.array(x)) for w, x in (("lo", held.min), ("hi", held.max))
            ]
            zero = constant(f"{out}.z", zeros)
            chain(source, out, ("Div", [scale]), ("Round", []), ("Add", [zero]), ("Clip", bounds))
        elif source in small or source in stored:
            codes = known(source)
            axis = {a.name: a.i for a in node.attribute}.get("axis", 1)
            row = [1] * codes.ndim
            if steps.ndim:
                row[axis] = -1
            values = _decoded(codes, zeros.astype(np.float64).reshape(row), steps.reshape(row))
            if values.nbytes < weights.LARGE_BYTES:
                constants[out] = values
            else:
                large[out] = weights.kept(values, out)
        else:
            wide = fresh_name(f"{out}.codes", taken)
            nodes.append(helper.make_node("Cast", [source], [wide], to=onnx.TensorProto.FLOAT))
            chain(wide, out, ("Sub", [constant(f"{out}.z", zeros)]), ("Mul", [scale]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    read = {n for node in nodes for n in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    made = [n for n in large if n not in stored]
    proto.graph.initializer.extend(weights.named(n, large[n]) for n in made)
    needed = [t for t in proto.graph.initializer if t.name in read or t.name not in stored]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(needed)
    return weights.opened(proto, large)


def _decoded(
    codes: NDArray[np.generic], zeros: NDArray[np.float64], steps: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The real numbers of codes; zero points and scales have as many axes, or none."""

    def real(part: NDArray[np.generic], rows: slice) -> NDArray[np.float64]:
        zero, step = (a[rows] if a.ndim and len(a) > 1 else a for a in (zeros, steps))
        offset: NDArray[np.float64] = part.astype(np.float64) - zero
        return offset * step

    return by_rows(codes, np.dtype(np.float32), real)


def weight_slots(plan: QuantPlan) -> set[str]:
    """The slots of constants."""
    return {name for name, slot in plan.slots.items() if slot.kind is Kind.WEIGHT}


def measure(
    model: onnx_ir.Model,
    plan: QuantPlan,
    integerized: Integerized,
    batches: Iterable[Batch],
    threads: int = 1,
    channels_last: bool = False,
) -> Measured:
    """Run float model, QDQ model and integer graph side by side on batches of float inputs in the model's layout."""
    from qcompile.onnx import qdq

    graph, origins = integerized.graph, integerized.origins
    outputs = [port.name for port, _ in graph.outputs]
    tensors = list(dict.fromkeys([*(o.tensor for o in origins.values()), *outputs]))
    computed = {v.name for node in model.graph for v in node.outputs} | {
        v.name for v in model.graph.inputs
    }
    tensors = [t for t in tensors if t in computed]
    floats = FloatSession(model, tensors, threads)
    made = [t for t in tensors if t not in {v.name for v in model.graph.inputs}]
    fakes = FloatSession(qdq.fake_quantized(model, plan), made, threads)
    part = rounded_model(model, restricted(model, plan, weight_slots(plan)))
    halves = FloatSession(part, made, threads)
    rounded = {name: q for name in tensors if (q := plan.of(name)) is not None}
    followed: set[str] = set()
    result = Measured(tensors={t: Stages() for t in tensors})
    agreed = dict.fromkeys(outputs, 0)
    counted = dict.fromkeys(outputs, 0)
    for batch in batches:
        real = floats.run(batch)
        fake = fakes.run(batch)
        codes = border.encode(graph, border.to_channels_last(batch) if channels_last else batch)
        result.samples += len(next(iter(codes.values())))

        def seen(
            value: Value,
            array: Array,
            part: int,
            parts: int,
            real: Mapping[str, NDArray[np.float32]] = real,
        ) -> None:
            origin = origins.get(value.name)
            if origin is None or (q := rounded.get(origin.tensor)) is None:
                return
            held = array.transpose(np.argsort(origin.axes))
            whole = real[origin.tensor]
            if parts > 1 and (not held.ndim or len(whole) != parts * len(held)):
                return
            r = whole[part * len(held) : (part + 1) * len(held)] if parts > 1 else whole
            if r.shape == held.shape:
                followed.add(origin.tensor)
                approximate = (held.astype(np.float64) - q.zero_point[0]) * q.scale[0]
                result.tensors[origin.tensor].integer.add(r.astype(np.float64), approximate)

        half = halves.run(batch)
        for name, q in rounded.items():
            result.tensors[name].values.add(real[name].astype(np.float64), q)
        for name in made:
            r, stages = real[name].astype(np.float64), result.tensors[name]
            stages.weights.add(r, half[name].astype(np.float64))
            stages.fake_quant.add(r, fake[name].astype(np.float64))
        decoded = border.decode(graph, _rows(graph, codes, seen))
        got = border.to_channels_first(decoded) if channels_last else decoded
        for name in outputs:
            stage = result.tensors[name]
            r = border.end_to_end(real[name], got[name])
            if name not in followed:
                stage.integer.add(r, got[name].astype(np.float64))
            if r.shape != got[name].shape:
                raise ValueError(
                    f"{name} has shape {list(r.shape)} in float and {list(got[name].shape)} in integers"
                )
            agreed[name] += int((r.argmax(-1) == got[name].argmax(-1)).sum())
            counted[name] += r.argmax(-1).size
    result.agreement = {name: agreed[name] / max(counted[name], 1) for name in outputs}
    return result


def _rows(
    graph: Graph, codes: Mapping[str, Array], seen: Callable[[Value, Array, int, int], None]
) -> dict[str, Array]:
    """Outputs for all rows; values are seen with the place of their rows among parts of equal size."""
    if graph.free_batch:
        return graph.run(codes, on_value=lambda v, a: seen(v, a, 0, 1))
    port, value = graph.inputs[0]
    parts, place = len(codes[port.name]) // value.type.shape[0], count()

    def run(piece: Mapping[str, Array]) -> dict[str, Array]:
        part = next(place)
        return graph.run(piece, on_value=lambda v, a: seen(v, a, part, parts))

    return border.run_graph(graph, codes, run)
