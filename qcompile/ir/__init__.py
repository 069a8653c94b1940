"""The integer graph: types, operators, graph, text form, interpreter and proofs."""

from qcompile.ir.graph import Graph, Node, Port, Value
from qcompile.ir.ops import (
    Concat,
    Conv,
    Lut,
    MatMul,
    MaxPool,
    Mul,
    Op,
    Pad,
    Rescale,
    Reshape,
    Slice,
    Softmax,
    SumPool,
    Transpose,
)
from qcompile.ir.types import Array, DType, TensorType

__all__ = [
    "Array",
    "Concat",
    "Conv",
    "DType",
    "Graph",
    "Lut",
    "MatMul",
    "MaxPool",
    "Mul",
    "Node",
    "Op",
    "Pad",
    "Port",
    "Rescale",
    "Reshape",
    "Slice",
    "Softmax",
    "SumPool",
    "TensorType",
    "Transpose",
    "Value",
]
