"""How far each stage is from the float model: float, fake-quantized, integer, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qcompile import border
from qcompile.integerized import Integerized
from qcompile.ir import Array, Graph, Value
from qcompile.onnx.execute import FloatSession
from qcompile.plan import QuantPlan

if TYPE_CHECKING:
    import onnx
    import onnx_ir


Batch = Mapping[str, NDArray[np.generic]]


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


@dataclass(slots=True)
class Stages:
    """Errors of one tensor after fake quantization and in the integer graph, and how much of it is out of range."""

    fake_quant: Error = field(default_factory=Error)
    integer: Error = field(default_factory=Error)
    clipped: int = 0
    count: int = 0

    @property
    def clipped_percent(self) -> float:
        """Share of float values outside the range the codes can hold."""
        return 100.0 * self.clipped / max(self.count, 1)


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


def measure(
    model: onnx_ir.Model,
    fake_quant: onnx.ModelProto,
    plan: QuantPlan,
    integerized: Integerized,
    batches: Iterable[Batch],
    threads: int = 1,
    channels_last: bool = False,
) -> Measured:
    """Run float model, QDQ model and integer graph side by side on batches of float inputs in the model's layout."""
    import onnx_ir

    graph, origins = integerized.graph, integerized.origins
    outputs = [port.name for port, _ in graph.outputs]
    tensors = list(dict.fromkeys([*(o.tensor for o in origins.values()), *outputs]))
    computed = {v.name for node in model.graph for v in node.outputs} | {
        v.name for v in model.graph.inputs
    }
    tensors = [t for t in tensors if t in computed]
    floats = FloatSession(model, tensors, threads)
    made = [t for t in tensors if t not in {v.name for v in model.graph.inputs}]
    fakes = FloatSession(onnx_ir.from_proto(fake_quant), made, threads)
    result = Measured(tensors={t: Stages() for t in tensors})
    agreed = dict.fromkeys(outputs, 0)
    counted = dict.fromkeys(outputs, 0)
    for batch in batches:
        real = floats.run(batch)
        fake = fakes.run(batch)
        codes = border.encode(graph, border.to_channels_last(batch) if channels_last else batch)
        result.samples += len(next(iter(codes.values())))

        def seen(
            value: Value, array: Array, real: Mapping[str, NDArray[np.float32]] = real
        ) -> None:
            origin = origins.get(value.name)
            if origin is None or origin.tensor not in result.tensors:
                return
            back = np.argsort(origin.axes)
            _count(
                result.tensors[origin.tensor],
                real[origin.tensor],
                array.transpose(back),
                plan,
                origin.tensor,
            )

        for name in made:
            result.tensors[name].fake_quant.add(
                real[name].astype(np.float64), fake[name].astype(np.float64)
            )
        decoded = border.decode(graph, _rows(graph, codes, seen))
        got = border.to_channels_first(decoded) if channels_last else decoded
        for name in outputs:
            stage = result.tensors[name]
            r = real[name].astype(np.float64)
            if stage.count == 0 or name not in {o.tensor for o in origins.values()}:
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
    graph: Graph, codes: Mapping[str, Array], seen: Callable[[Value, Array], None]
) -> dict[str, Array]:
    if graph.free_batch:
        return graph.run(codes, on_value=seen)
    return border.run_graph(graph, codes)


def _count(
    stage: Stages, real: NDArray[np.float32], codes: Array, plan: QuantPlan, tensor: str
) -> None:
    q = plan.of(tensor)
    if q is None or real.shape != codes.shape:
        return
    r = real.astype(np.float64)
    scale, zero = q.scale[0], q.zero_point[0]
    stage.integer.add(r, (codes.astype(np.float64) - zero) * scale)
    lo, hi = (q.format.lo - zero - 0.5) * scale, (q.format.hi - zero + 0.5) * scale
    stage.clipped += int(((r < lo) | (r > hi)).sum())
    stage.count += r.size
