"""ONNX's own operator tests (onnx.backend.test) as networks: compiled, run as integers, compared with their outputs.

Every input but the first becomes a constant, except for operators of two tensors. A network is quantized from the
case's own inputs. Its output may be off by what rounding does: the float model is run again with every rounded tensor
and constant moved by up to one step, several times; twice the largest change of the output, and one step, is the bound.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile import border, driver, pipeline
from qcompile.errors import QcompileError, Unsupported
from qcompile.ir import Array, Graph
from qcompile.job import Job
from qcompile.options import Options

PAIRS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mod", "Sum", "Mean", "And", "Or", "Xor"}
)
"""Operators whose inputs are all fed."""
_TURNS = 6


@dataclass(frozen=True)
class Case:
    """A model of one operator (or of the operators its definition consists of), inputs and wanted outputs."""

    name: str
    operators: tuple[str, ...]
    model: onnx.ModelProto
    inputs: dict[str, NDArray[np.generic]]
    outputs: dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Outcome:
    """What became of a case: a graph and its largest error in units of the bound, or the sentence that refuses it."""

    case: Case
    graph: Graph | None = None
    error: float = 0.0
    refused: str = ""

    @property
    def passed(self) -> bool:
        """Is every output within its bound?"""
        return self.graph is not None and self.error <= 1.0


@cache
def cases() -> tuple[Case, ...]:
    """All of them, by name; made anew by the collector, for the package ships no data of node tests."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    return tuple(sorted((_case(c) for c in found), key=lambda c: c.name))


def _case(found: object) -> Case:
    model = onnx.ModelProto()
    model.CopyFrom(found.model)  # type: ignore[attr-defined]
    ins, outs = found.data_sets[0]  # type: ignore[attr-defined]
    names = [v.name for v in model.graph.input]
    operators = tuple(dict.fromkeys(n.op_type for n in model.graph.node))
    inputs = dict(zip(names, ins, strict=False))
    if operators and operators[0] not in PAIRS:
        for name in names[1:]:
            array = inputs[name]
            if isinstance(array, np.ndarray | np.generic):
                constant = numpy_helper.from_array(np.asarray(array), name)
                model.graph.initializer.append(constant)
                inputs.pop(name)
        kept = [v for v in model.graph.input if v.name in inputs]
        del model.graph.input[:]
        model.graph.input.extend(kept)
    outputs = dict(zip((v.name for v in model.graph.output), outs, strict=False))
    return Case(found.name, operators, model, inputs, outputs)  # type: ignore[attr-defined]


def attempt(case: Case) -> Outcome:
    """Compile a case and compare."""
    context = pipeline.Context()
    try:
        job = Job.checked(case.model.SerializeToString(), "x86", "fast", None, {}, Options())
        side = driver.prepare(job, context)
        shapes = {str(v.name): v.shape.numpy() for v in side.model.graph.inputs if v.shape}
        arrays = {
            k: np.asarray(v).astype(np.float32).reshape(shapes[k]) for k, v in case.inputs.items()
        }
        data = driver.open_samples(job, side, [arrays], context)
        driver.calibrate(job, side, data, context)
        graph = driver.to_integers(job, side).graph
    except QcompileError as e:
        return Outcome(case, refused=str(e))
    results = border.decode(graph, graph.run(border.encode(graph, arrays)))
    worst = 0.0
    bounds = _bounds(side, arrays)
    for port, _ in graph.outputs:
        wanted = np.asarray(case.outputs[port.name], np.float64)
        got = results[port.name].reshape(wanted.shape)
        bound = bounds[port.name] + port.scale
        if wanted.dtype != np.float64 or wanted.size:
            worst = max(worst, float(np.max(np.abs(got - wanted), initial=0.0)) / bound)
    return Outcome(case, graph, worst)


def _bounds(side: driver.FloatSide, arrays: dict[str, Array]) -> dict[str, float]:
    """Twice the largest change of every output when all that is rounded moves by up to a step."""
    import onnx_ir as ir

    proto = ir.to_proto(side.model)
    rng = np.random.default_rng(0)
    steps = {
        member: np.asarray(side.plan.quantizers[slot.tensor].scale)
        for slot in side.plan.slots.values()
        for member in slot.members
        if slot.tensor in side.plan.quantizers
    }
    outputs = [v.name for v in proto.graph.output]
    real = {
        str(v.name)
        for node in side.model.graph
        for v in node.outputs
        if v.dtype == ir.DataType.FLOAT
    }
    plain = onnxruntime.InferenceSession(proto.SerializeToString(), _quiet()).run(outputs, arrays)
    bound = dict.fromkeys(outputs, 0.0)
    for _ in range(_TURNS):
        moved = onnx.ModelProto()
        moved.CopyFrom(proto)
        for tensor in moved.graph.initializer:
            if tensor.name in steps:
                array = numpy_helper.to_array(tensor)
                wide = steps[tensor.name].max()
                noise = rng.uniform(-wide, wide, array.shape).astype(array.dtype)
                tensor.CopyFrom(numpy_helper.from_array(array + noise, tensor.name))
        nodes = []
        for node in moved.graph.node:
            nodes.append(node)
            for i, name in enumerate(node.output):
                if name in steps and name in real:
                    node.output[i] = f"{name}.still"
                    nodes += _noise(name, float(steps[name].max()), int(rng.integers(1 << 30)))
        del moved.graph.node[:]
        moved.graph.node.extend(nodes)
        fed = {
            k: v
            + rng.uniform(-1, 1, v.shape).astype(v.dtype) * float(steps.get(k, np.zeros(1)).max())
            for k, v in arrays.items()
        }
        changed = onnxruntime.InferenceSession(moved.SerializeToString(), _quiet()).run(
            outputs, fed
        )
        for name, a, b in zip(outputs, plain, changed, strict=True):
            apart = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            bound[name] = max(
                bound[name], 2 * float(np.max(apart[np.isfinite(apart)], initial=0.0))
            )
    return bound


def _noise(name: str, step: float, seed: int) -> list[onnx.NodeProto]:
    """The tensor `name` from `name.still`, each entry moved by up to a step."""
    return [
        helper.make_node(
            "RandomUniformLike",
            [f"{name}.still"],
            [f"{name}.noise"],
            low=-step,
            high=step,
            seed=float(seed),
        ),
        helper.make_node("Add", [f"{name}.still", f"{name}.noise"], [name]),
    ]


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return options


__all__ = ["Case", "Outcome", "Unsupported", "attempt", "cases"]
