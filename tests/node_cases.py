"""ONNX's own operator tests (onnx.backend.test) as networks: compiled, run as integers, compared with their outputs.

Every input but the first becomes a constant, except for operators of two tensors. A network is quantized from the
case's own inputs. Its output may be off by what rounding does: the float model is run again with every rounded tensor
and constant moved by up to one step, several times; twice the largest change of the output, and one step, is the bound.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile import border, driver, pipeline
from qcompile.errors import QcompileError
from qcompile.ir import Array, Graph
from qcompile.job import Job
from qcompile.onnx import frontend
from qcompile.onnx.simplify import simplify
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
    compiled: bool = False

    @property
    def passed(self) -> bool:
        """Is every output within its bound?"""
        return self.compiled and self.error <= 1.0


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
        with patch.object(frontend, "_simplify_elsewhere", simplify):
            # ONNX's own tests do not crash ONNX: no process for each
            side = driver.prepare(job, context)
        shapes = {str(v.name): v.shape.numpy() for v in side.model.graph.inputs if v.shape}
        try:
            arrays = {
                k: np.asarray(v).astype(np.float32).reshape(shapes[k])
                for k, v in case.inputs.items()
            }
        except (TypeError, ValueError):
            return Outcome(case, refused="the case's input is no array of numbers")
        data = driver.open_samples(job, side, [arrays], context)
        driver.calibrate(job, side, data, context)
        graph = driver.to_integers(job, side).graph
    except QcompileError as e:
        return Outcome(case, refused=str(e))
    results = border.decode(graph, graph.run(border.encode(graph, arrays)))
    worst = 0.0
    bounds = _bounds(side, arrays)
    for port, _ in graph.outputs:
        try:
            wanted = np.asarray(case.outputs[port.name], np.float64)
        except (TypeError, ValueError):
            return Outcome(case, refused=f"the case's output {port.name} is no array of numbers")
        got = results[port.name].reshape(wanted.shape)
        bound = bounds[port.name] + port.scale
        if wanted.dtype != np.float64 or wanted.size:
            worst = max(worst, float(np.max(np.abs(got - wanted), initial=0.0)) / bound)
    return Outcome(case, graph, worst, compiled=True)


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


# --- the page ---------------------------------------------------------------------------------------------------

NAMED = frozenset(
    """Abs Acos Acosh Add ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Concat Conv
    ConvTranspose Cos Cosh DepthToSpace Div Elu Erf Exp Expand Flatten Floor GRU Gather Gelu Gemm GlobalAveragePool
    GlobalMaxPool HardSigmoid HardSwish Identity InstanceNormalization LRN LSTM LayerNormalization LeakyRelu Log MatMul
    Max MaxPool Min Mish Mul Neg PRelu Pad Pow Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape Resize Round Selu
    Shrink Sigmoid Sign Sin Sinh Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh
    ThresholdedRelu Tile Transpose Unsqueeze""".split()
)
"""What the compiler promises to take, within the limits that the page states."""

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operators.md"

_HEAD = """# Operators

Made by `python -m tests.node_cases --write`; `make test` fails where it is out of date. Do not edit.

Every operator of ONNX {version}'s own test-suite (`onnx.backend.test`, the {count} cases that consist of one node): how
many of its cases compile and give, as integers, the case's output within what rounding may change; which attributes
those cases set; and why the others are refused. Every input but the first is made a constant, except for operators of
two tensors. The bound: the float model is run again with every rounded tensor and constant moved by up to one step
(8-bit activations); twice the largest change of an output, and one step of it, is what it may be off. No case is off by
more: what does not compile is refused before anything runs, with the sentence below.

Of the {named} cases of operators that are meant to be taken, {good} pass ({share:.1f} %). Other numbers than float32
(half, double, integers that are fed) are taken as float32. A model that has no batch axis, or mixes what stands on axis
0, gets a batch axis of its own: its inputs and outputs have one axis more.

| operator | passed | of | attributes in passing cases |
|---|---:|---:|---|
"""


def by_operator() -> dict[str, list[Case]]:
    """The cases of one node, by its operator."""
    found: dict[str, list[Case]] = {}
    for case in cases():
        if len(case.model.graph.node) == 1:
            found.setdefault(case.operators[0], []).append(case)
    return dict(sorted(found.items()))


def row(operator: str, outcomes: Sequence[Outcome]) -> str:
    """The table's row of an operator."""
    passed = [o for o in outcomes if o.passed]
    used = sorted({a.name for o in passed for a in o.case.model.graph.node[0].attribute})
    return f"| {operator} | {len(passed)} | {len(outcomes)} | {', '.join(used)} |"


def refusals(operator: str, outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each sentence that refuses cases of an operator."""
    reasons: dict[str, list[str]] = {}
    for o in outcomes:
        if not o.passed:
            said = o.refused or f"off by {o.error:.1f} bounds"
            reasons.setdefault(_sentence(said), []).append(o.case.name.removeprefix("test_"))
    return [
        f"- **{operator}**: {why} ({len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for why, names in reasons.items()
    ]


def _sentence(text: str) -> str:
    """Without the parts that name a node, which the tests leave without names, or places in other programs."""
    text = re.sub(r"/\S+/onnx/", "onnx/", text)
    text = re.sub(r"^node '?\S*'? ?\(?\w*\)?:? ", "", text)
    return text if len(text) <= 220 else text[:217] + "..."


def page(found: Mapping[str, Sequence[Outcome]]) -> str:
    """The whole page."""
    named = [o for operator, outcomes in found.items() if operator in NAMED for o in outcomes]
    good = sum(o.passed for o in named)
    head = _HEAD.format(
        version=onnx.__version__.rsplit(".", 1)[0],
        count=sum(map(len, found.values())),
        named=len(named),
        good=good,
        share=100 * good / len(named),
    )
    taken = {k: v for k, v in found.items() if any(o.passed for o in v)}
    others = {k: v for k, v in found.items() if k not in taken}
    lines = [row(k, v) for k, v in taken.items()]
    lines += ["", "## Refused cases of these operators", ""]
    lines += [line for k, v in taken.items() for line in refusals(k, v)]
    lines += ["", "## Operators none of whose cases is taken", ""]
    lines += [line for k, v in others.items() for line in refusals(k, v)]
    return head + "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or say whether it is up to date."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        known = by_operator()
        every = [(k, i) for k, v in known.items() for i in range(len(v))]
        made = list(pool.map(_attempt_at, every, chunksize=8))
    found: dict[str, list[Outcome]] = {k: [] for k in known}
    for (operator, _), outcome in zip(every, made, strict=True):
        found[operator].append(outcome)
    text = page(found)
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit("docs/operators.md is out of date: run python -m tests.node_cases --write")


def _attempt_at(place: tuple[str, int]) -> Outcome:
    """A case's outcome; its graph stays where it was made."""
    case = by_operator()[place[0]][place[1]]
    try:
        outcome = attempt(case)
    except Exception as e:
        raise AssertionError(f"{case.name}: {e!r}") from e
    return replace(outcome, graph=None)


if __name__ == "__main__":
    main()
