"""The cycle model against Icarus Verilog, cycle by cycle, on random layers and foldings; FIFOs that are too small."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import Unsupported
from qcompile.ir import DType, Graph, Port
from qcompile.targets.hls import token, units, verilog
from qcompile.targets.hls.legalise import legalise
from qcompile.targets.hls.pipeline import Pipeline
from qcompile.targets.hls.rtlsim import icarus
from tests.strategies import feeds, singles
from tests.targets.test_families import network
from tests.targets.test_pipeline import KINDS, SPATIAL, Net, foldings, residual


def rows(graph: Graph, seed: int, count: int) -> verilog.Vectors:
    codes = feeds(graph, seed)
    return {name: np.concatenate([c[name] for c in codes])[:count] for name in codes[0]}


def emitted(made: Pipeline, vectors: verilog.Vectors, folder: Path) -> None:
    for name, data in verilog.emit(made, "top", vectors).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def agree(made: Pipeline, graph: Graph, seed: int) -> None:
    """The words with and without pauses, the cycles without."""
    vectors = rows(graph, seed, 4)
    with TemporaryDirectory() as name:
        emitted(made, vectors, Path(name))
        differ, cycles = icarus(Path(name), 0)
        assert differ == 0
        if len(made.outputs) == 1:
            timing = token.simulate(made, len(cycles))
            assert timing.cycles == cycles
            assert timing.interval >= max(map(token.work, made.ops))
        differ, _ = icarus(Path(name), seed + 1)
        assert differ == 0


@pytest.mark.parametrize(
    "operator", ["conv", "matmul", "rescale", "lut", "maxpool", "sumpool", "softmax", "concat"]
)
@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_every_unit_takes_the_cycles_it_is_said_to(
    operator: str, data: st.DataObject, seed: int
) -> None:
    graph = data.draw(singles(operator))
    with contextlib.suppress(Unsupported):
        made = legalise(graph)
        agree(legalise(graph, data.draw(foldings(made))), graph, seed)


@given(data=st.data(), kind=KINDS, spatial=SPATIAL, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_windows_with_any_pads_strides_and_dilations(
    data: st.DataObject, kind: DType, spatial: tuple[int, ...], seed: int
) -> None:
    net = Net(data, (*spatial, data.draw(st.sampled_from([1, 2, 3, 6]))), kind)
    groups = data.draw(st.sampled_from([1, net.x.type.shape[-1]]))
    y = net.rescale(net.conv(net.x, groups * net.int(1, 3), net.int(2, 8), groups), DType.I8)
    net.graph.add_output(Port("y", 0.1, 0), y)
    made = legalise(net.graph)
    agree(legalise(net.graph, data.draw(foldings(made))), net.graph, seed)


@pytest.mark.parametrize("fold", [None, (1, 2), (2, 2), (4, 9), (2, 36)])
def test_a_residual_network_with_the_smallest_fifos(fold: tuple[int, int] | None) -> None:
    graph = residual()
    made = legalise(graph, None if fold is None else {"conv": fold})
    small = token.fitted(made)
    agree(small, graph, 3)
    (fork,) = (op for op in small.ops if isinstance(op, units.Fork))
    arm = fork.outputs[1]
    assert units.DEPTH < arm.depth < made.fifos[arm.name].depth
    # one word less costs cycles; two words are a deadlock, in the model and in the simulation
    before = token.simulate(small)
    less = token.simulate(small.with_depths({arm.name: arm.depth - 1}))
    assert less.cycles != before.cycles
    dead = small.with_depths({arm.name: units.DEPTH})
    timing = token.simulate(dead)
    assert not timing.cycles
    assert arm.name in timing.stuck
    with TemporaryDirectory() as name:
        emitted(dead, rows(graph, 1, 1), Path(name))
        assert icarus(Path(name), 0) == (-1, ())


def test_a_stuck_pipeline_cannot_be_fitted() -> None:
    made = legalise(residual())
    (fork,) = (op for op in made.ops if isinstance(op, units.Fork))
    with pytest.raises(ValueError, match=fork.outputs[1].name):
        token.fitted(made.with_depths({fork.outputs[1].name: units.DEPTH}))


def test_more_images_follow_at_the_same_interval() -> None:
    timing = token.simulate(legalise(network()), 6)
    gaps = {b - a for a, b in pairwise(timing.cycles)}
    assert gaps == {timing.interval} == {31104}
    assert timing.latency == 34139
