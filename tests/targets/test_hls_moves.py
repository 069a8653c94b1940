"""Cuts of rows and columns and padding of channels: the pipeline, its C++ and its Verilog against the integer graph."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qcompile.errors import Unsupported
from qcompile.ir import DType, Graph, Pad, Port, Slice, TensorType, Value
from qcompile.targets.hls.legalise import legalise
from tests.strategies import feeds
from tests.targets.test_hls_cplusplus import together
from tests.targets.test_pipeline import KINDS, Net, each_folding, foldings
from tests.targets.test_token import agree

SIDES = st.integers(1, 7)


def cut(net: Net, x: Value) -> Value:
    """Every so many rows from the first to the last, and columns from any."""
    height, width, channels = x.type.shape[1:]
    left, steps = net.int(0, width - 1), (net.int(1, 3), net.int(1, 3), 1)
    last = (height - 1) // steps[0] * steps[0]
    ends = (net.int(last + 1, height), net.int(left + 1, width), channels)
    return net.graph.add(Slice((0, left, 0), ends, steps), x, name="cut")


def padded(net: Net, x: Value) -> Value:
    """With more channels on one side at least."""
    before, after = net.int(0, 6), net.int(1, 6)
    fill = net.int(x.type.dtype.lo, x.type.dtype.hi)
    return net.graph.add(Pad((0, 0, before, 0, 0, after), fill), x, name="pad")


def moved(data: st.DataObject) -> Graph:
    kind, height, width = data.draw(KINDS), *data.draw(st.tuples(SIDES, SIDES))
    net = Net(data, (height, width, data.draw(st.sampled_from([1, 2, 6]))), kind)
    y = padded(net, cut(net, net.x))
    z = net.rescale(net.conv(y, net.int(1, 4), 4), DType.I8)
    net.graph.add_output(Port("z", 0.1, 0), z)
    return net.graph


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_pipeline_and_its_verilog(data: st.DataObject, seed: int) -> None:
    graph = moved(data)
    each_folding(data, graph, seed)
    agree(legalise(graph, data.draw(foldings(legalise(graph)))), graph, seed)


@given(data=st.data(), seed=st.integers(0, 99))
@settings(
    max_examples=1,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_its_cplusplus(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int
) -> None:
    graphs = [moved(data) for _ in range(8)]
    made = [legalise(g, data.draw(foldings(legalise(g)))) for g in graphs]
    for member, graph in zip(together(made, tmp_path_factory.mktemp("all")), graphs, strict=True):
        codes = feeds(graph, seed)[0]
        words = member.trace({name: x[0] for name, x in codes.items()})
        (port,) = member.pipeline.outputs
        want = graph.run(codes)["z"][0]
        np.testing.assert_array_equal(port.receive(words[port.stream.name]), want)


@pytest.mark.parametrize(
    ("op", "sentence"),
    [
        (Slice((1, 0, 0), (4, 4, 2), (1, 1, 1)), "from the first row"),
        (Slice((0, 0, 0), (3, 4, 2), (1, 1, 1)), "to the last"),
        (Slice((0, 0, 0), (3, 4, 2), (3, 1, 1)), "to the last"),
        (Slice((0, 0, 1), (4, 4, 2), (1, 1, 1)), "along width"),
        (Pad((1, 0, 1, 0, 0, 0), 0), "not both"),
    ],
)
def test_what_is_no_window_is_refused(op: Slice | Pad, sentence: str) -> None:
    graph = Graph("moved")
    x = graph.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 4, 4, 2)))
    graph.add_output(Port("y", 0.1, 0), graph.add(op, x, name="moved"))
    with pytest.raises(Unsupported, match=sentence):
        legalise(graph)
