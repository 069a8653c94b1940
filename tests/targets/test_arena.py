"""The arena over time, as a lowered program reports it, is that of the graph and of the emitted source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcompile import driver
from qcompile.ir import Node, Reshape, Value
from qcompile.job import Job
from qcompile.options import Options
from qcompile.pipeline import Context


@pytest.fixture(scope="module")
def build(models: Path) -> driver.Build:
    folder = models / "digits-resnet"
    job = Job.checked(folder / "model.onnx", "x86", "fast", None, {}, Options(samples=8))
    return driver.build(job, folder / "calib.toml", Context())


def readers(value: Value) -> set[str]:
    """The layers that read a value, maybe reshaped."""
    found: set[str] = set()
    for node, _ in value.uses:
        found |= readers(node.output) if isinstance(node.op, Reshape) else {node.name}
    return found


def moved(node: Node | None) -> bool:
    return node is not None and isinstance(node.op, Reshape)


def test_values_live_from_the_step_that_makes_them_to_the_last_that_reads_them(
    build: driver.Build,
) -> None:
    lowered, graph = build.lowered, build.integerized.graph
    steps = [layer.name for layer in lowered.layers]
    values = {node.output.name: node.output for node in graph.nodes}
    outputs = {value for _, value in graph.outputs}
    buffers = {b.value: b for b in lowered.buffers if b.value is not None}
    made = {name: value for name, value in values.items() if name in lowered.stored}
    kept = {
        name for name, value in made.items() if value not in outputs and not moved(value.producer)
    }
    assert buffers.keys() == kept
    for name, b in buffers.items():
        value = values[name]
        assert value.producer is not None
        assert b.bytes == value.type.bytes
        assert b.first == steps.index(value.producer.name)
        assert b.last == max(steps.index(reader) for reader in readers(value))
    assert max(b.offset + b.bytes for b in lowered.buffers) == pytest.approx(
        lowered.arena_bytes, abs=63
    )


def test_offsets_are_those_of_the_source(build: driver.Build) -> None:
    source = build.lowered.files["model.c"].decode()
    homes = re.findall(r"\*const at_\w+ = .*\bmemory(?: \+ (\d+))?\)?;", source)
    assert len(homes) >= 4
    offsets = [b.offset for b in build.lowered.buffers if b.value is not None]
    assert sorted(int(n or 0) for n in homes) == sorted(offsets)


def test_scratch_memory_is_what_the_layers_ask_for(build: driver.Build) -> None:
    asked = {i: n for i, layer in enumerate(build.lowered.layers) if (n := layer.scratch_bytes)}
    scratch = [b for b in build.lowered.buffers if b.value is None]
    assert {b.first: b.bytes for b in scratch} == asked
    assert all(b.first == b.last for b in scratch)
    for b in scratch:
        for other in build.lowered.buffers:
            live = other is not b and other.first <= b.first <= other.last
            apart = other.offset >= b.offset + b.bytes or b.offset >= other.offset + other.bytes
            assert apart or not live
