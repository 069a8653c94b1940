"""A network that grows node by node: what ONNX's own inference finds inconsistent is left out."""

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
