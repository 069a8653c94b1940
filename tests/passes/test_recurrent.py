"""LSTM, GRU and RNN spelled out compute in float what onnxruntime's own operators compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile.onnx import frontend
from qcompile.passes.decompose import Decompose, open_batch
from qcompile.pipeline import Context
from qcompile.plan import QuantPlan

Floats = NDArray[np.float32]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ACTIVATIONS = {
    "LSTM": (["Sigmoid", "Tanh", "Tanh"], ["HardSigmoid", "Softsign", "Relu"]),
    "GRU": (["Sigmoid", "Tanh"], ["HardSigmoid", "Softsign"]),
    "RNN": (["Tanh"], ["Relu"]),
}


@dataclass(frozen=True)
class Cell:
    """One recurrent node, and which of its optional operands it has."""

    op: str
    steps: int
    rows: int
    width: int
    hidden: int
    direction: str
    linear: bool
    bias: bool
    state: bool
    peepholes: bool
    coupled: bool
    clip: float
    other: bool
    seed: int

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    def attributes(self) -> dict[str, object]:
        found: dict[str, object] = {"hidden_size": self.hidden, "direction": self.direction}
        if self.op == "GRU":
            found["linear_before_reset"] = int(self.linear)
        if self.op == "LSTM":
            found["input_forget"] = int(self.coupled)
        if self.clip:
            found["clip"] = self.clip
        if self.other:
            found["activations"] = ACTIVATIONS[self.op][1] * self.directions
        return found

    def weights(self, layout: int) -> dict[str, Floats]:
        """Constants by operand name, states in the layout's order."""
        rng = np.random.default_rng(self.seed)
        d, n, g = self.directions, self.hidden, GATES[self.op]
        state = (d, self.rows, n)
        shapes = {
            "W": (d, g * n, self.width),
            "R": (d, g * n, n),
            "B": (d, 2 * g * n),
            "h": state,
            "c": state,
            "P": (d, 3 * n),
        }
        found = {k: rng.uniform(-1, 1, s).astype(np.float32) for k, s in shapes.items()}
        if layout:
            found |= {k: found[k].swapaxes(0, 1) for k in "hc"}
        return found

    def operands(self) -> list[str]:
        """The names of the node's operands, empty where one is left out."""
        names = ["x", "W", "R", "B" if self.bias else "", "", "h" if self.state else ""]
        if self.op == "LSTM":
            names += ["c" if self.state else "", "P" if self.peepholes else ""]
        return names

    def model(self, layout: int) -> onnx.ModelProto:
        """The node alone, all its outputs leaving."""
        t, n, d, h = self.steps, self.rows, self.directions, self.hidden
        shape = [n, t, self.width] if layout else [t, n, self.width]
        outs = {"Y": [n, t, d, h] if layout else [t, d, n, h]}
        last = [n, d, h] if layout else [d, n, h]
        outs |= {"Yh": last} | ({"Yc": last} if self.op == "LSTM" else {})
        extra: dict[str, object] = {"layout": 1} if layout else {}
        node = helper.make_node(
            self.op, self.operands(), list(outs), "cell", **self.attributes(), **extra
        )
        return proto([node], {"x": shape}, outs, self.weights(layout))


@st.composite
def cells(draw: st.DrawFn) -> Cell:
    return Cell(
        op=draw(st.sampled_from(sorted(GATES))),
        steps=draw(st.integers(1, 4)),
        rows=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 5)),
        direction=draw(st.sampled_from(["forward", "reverse", "bidirectional"])),
        linear=draw(st.booleans()),
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
        peepholes=draw(st.booleans()),
        coupled=draw(st.booleans()),
        clip=draw(st.sampled_from([0.0, 0.75])),
        other=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def proto(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]] | dict[str, list[int]],
    outputs: dict[str, list[int]] | dict[str, list[int | str]],
    constants: dict[str, NDArray[np.generic]] | dict[str, Floats],
) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in outputs.items()],
        [numpy_helper.from_array(v, k) for k, v in constants.items() if k in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, x: Floats) -> list[Floats]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [np.asarray(y) for y in session.run(None, {"x": x})]


def spelled_out(model: onnx.ModelProto) -> ir.Model:
    """The model without composite operators."""
    made = frontend.load(model.SerializeToString(), isolated=False)
    Decompose()(made, QuantPlan(), Context())
    assert not {n.op_type for n in made.graph} & GATES.keys()
    return made


@settings(max_examples=50, deadline=None)
@given(cell=cells(), layout=st.integers(0, 1))
def test_the_equations_are_onnxruntimes(cell: Cell, layout: int) -> None:
    x = np.random.default_rng(cell.seed + 1).normal(size=(cell.steps, cell.rows, cell.width))
    x = x.astype(np.float32)
    # onnxruntime has no batch-first layout: it runs the other one
    expected = run(cell.model(0), x)
    made = spelled_out(cell.model(layout))
    given_shape = made.graph.inputs[0].shape
    assert given_shape is not None
    fed = x.swapaxes(0, 1) if layout else x
    got = run(ir.to_proto(made), fed.reshape([int(str(n)) for n in given_shape]))
    if layout:
        expected = [expected[0].transpose(2, 0, 1, 3), *(y.swapaxes(0, 1) for y in expected[1:])]
    for e, g in zip(expected, got, strict=True):
        np.testing.assert_allclose(g.reshape(e.shape), e, rtol=0, atol=1e-5)


def exported(op: str, layers: int, both: bool, take: str) -> onnx.ModelProto:
    """What PyTorch writes for a batch-first stack with an open batch, and a Gemm on its last state or all steps."""
    rng, n, width, steps = np.random.default_rng(layers), 4, 3, 5
    d, g = 1 + both, GATES[op]
    direction = "bidirectional" if both else "forward"
    constants: dict[str, NDArray[np.generic]] = {
        "one": np.array([1]),
        "zero": np.array([0]),
        "last": np.array(-1),
        "merge": np.array([0, 0, -1]),
        "F": rng.uniform(-1, 1, (n * d, 2)).astype(np.float32),
        "Fb": rng.uniform(-1, 1, 2).astype(np.float32),
    }
    nodes = [helper.make_node("Transpose", ["x"], ["x0"], perm=[1, 0, 2])]
    for i in range(layers):
        fan = n * d if i else width
        for key, shape in (("W", (d, g * n, fan)), ("R", (d, g * n, n)), ("B", (d, 2 * g * n))):
            constants[f"{key}{i}"] = rng.uniform(-1, 1, shape).astype(np.float32)
        nodes.append(
            helper.make_node(
                op,
                [f"x{i}", f"W{i}", f"R{i}", f"B{i}"],
                [f"y{i}", f"h{i}"],
                hidden_size=n,
                direction=direction,
            )
        )
        if both:
            nodes += [
                helper.make_node("Transpose", [f"y{i}"], [f"t{i}"], perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"t{i}", "merge"], [f"x{i + 1}"]),
            ]
        else:
            nodes.append(helper.make_node("Squeeze", [f"y{i}", "one"], [f"x{i + 1}"]))
    shape: list[int | str] = ["N", 2]
    if take == "state":
        assert not both
        nodes.append(helper.make_node("Concat", [f"h{i}" for i in range(layers)], ["hs"], axis=0))
        nodes.append(helper.make_node("Gather", ["hs", "last"], ["end"], axis=0))
    else:
        nodes.append(helper.make_node("Transpose", [f"x{layers}"], ["turned"], perm=[1, 0, 2]))
        if take == "last":
            nodes.append(helper.make_node("Gather", ["turned", "last"], ["end"], axis=1))
        else:
            nodes.append(helper.make_node("Relu", ["turned"], ["end"]))
            shape = ["N", steps, 2]
    nodes += [
        helper.make_node("MatMul", ["end", "F"], ["product"]),
        helper.make_node("Add", ["product", "Fb"], ["y"]),
    ]
    return proto(nodes, {"x": ["N", steps, width]}, {"y": shape}, constants)


@pytest.mark.parametrize("op", sorted(GATES))
@pytest.mark.parametrize(
    ("layers", "both", "take"),
    [
        (1, False, "state"),
        (2, False, "state"),
        (2, False, "last"),
        (2, True, "all"),
        (1, True, "last"),
    ],
)
def test_an_open_batch_stays_open(op: str, layers: int, both: bool, take: str) -> None:
    model = exported(op, layers, both, take)
    made = spelled_out(model)
    assert open_batch(made) is None
    assert Counter(n.op_type for n in made.graph)["Transpose"] == 0
    x = np.random.default_rng(0).normal(size=(3, 5, 3)).astype(np.float32)
    (expected,), (got,) = run(model, x), run(ir.to_proto(made), x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_the_steps_of_a_compiled_lstm_share_their_integers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(32, 5, 3)).astype(np.float32)
    model = exported("LSTM", 1, False, "all")
    # compile itself compares the program and integer.onnx with the integer graph
    artifact = qcompile.compile(model.SerializeToString(), "x86", x, output=tmp_path / "out")
    constants = [v.const for n in artifact.golden.graph.nodes for v in n.inputs]
    recurrent = [c.tobytes() for c in constants if c is not None and c.shape in {(4, 16), (16, 4)}]
    assert (len(recurrent), len(set(recurrent))) == (4, 1)
    (expected,) = run(model, x)
    error = artifact.run({"x": x})["y"] - expected
    assert np.abs(error).max() < 0.05 * np.abs(expected).max()


def test_time_in_front_at_the_border_leaves_one_sample() -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0, 2])]
    model = proto(nodes, {"x": ["N", 5, 3]}, {"y": [5, "N", 3]}, {})
    assert open_batch(spelled_out(model)) == "N"
