"""Instructions that selection and attention are said to take on Cortex-M, against what the emulator executes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.ir import DType, Graph, Port, TensorType, Value, ops
from qcompile.targets import mcu
from tests.strategies import feeds


def layers() -> Graph:
    """One of each kernel and of each of its forms, as large as networks have them."""
    graph = Graph("layers", free_batch=False)

    def operand(*shape: int, dtype: DType = DType.I8) -> Value:
        name = f"x{len(graph.inputs)}"
        return graph.add_input(Port(name, 1.0, 0), TensorType(dtype, shape))

    def add(name: str, op: ops.Op, *values: Value) -> None:
        graph.add_output(Port(name, 1.0, 0), graph.add(op, *values, name=name))

    image, other = operand(1, 8, 8, 32), operand(1, 8, 8, 32)
    add("run", ops.Take(3, tuple(range(16))), image)
    add("rows", ops.Take(1, (0, 0, 1, 1, 2, 2, 3, 3)), image)
    add("elements", ops.Take(1, tuple(i ^ 1 for i in range(512))), operand(1, 512))
    add("largest", ops.Extreme(True), image, other)
    add("smallest", ops.Extreme(False), *(operand(1, 512, dtype=DType.I16) for _ in range(2)))
    add("place", ops.ArgExtreme(3, True, False), image)
    add("places", ops.ArgExtreme(1, False, True), operand(1, 20, 64))
    left, right = operand(1, 4, 16, 32), operand(1, 4, 32, 16)
    add("products", ops.BatchMatMul(0, 0), left, right)
    add("centred", ops.BatchMatMul(3, 5), left, right)
    add("rows of 8", ops.Normalize(8, 5, DType.I16), operand(1, 16, 8))
    add("rows of 64", ops.Normalize(8, 5, DType.I16), operand(1, 16, 64, dtype=DType.I16))
    return graph


@pytest.mark.parametrize("core", ["cortex-m4", "cortex-m55"])
def test_predicted_is_within_three_tenths_of_executed(core: str, tmp_path: Path) -> None:
    graph, target = layers(), mcu.TARGETS[core]
    for path, data in target.lower(graph, name="net", cpu=core, vectors=[]).files.items():
        (tmp_path / path).write_bytes(data)
    program = target.runner(tmp_path, graph, name="net", cpu=core)
    counted = program.count(feeds(graph, 0, 1)[0]).layers
    assert len(counted) == len(graph.outputs)
    for layer in counted:
        assert 0.7 < layer.predicted / layer.executed < 1.3, layer
