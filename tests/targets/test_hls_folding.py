"""Lanes and FIFO depths that are chosen keep bounds and limits, none alone is cheaper; folding.json is strict."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fpga_resources
from qcompile.errors import BadInput, BudgetExceeded
from qcompile.ir import DType, Graph, Port
from qcompile.target import Fabric
from qcompile.targets.hls import depths, devices, resources, token, units
from qcompile.targets.hls.folding import Folding, solve
from qcompile.targets.hls.legalise import legalise
from qcompile.targets.hls.pipeline import Pipeline
from qcompile.targets.hls.rates import Limits, Rates
from tests.targets.test_families import network
from tests.targets.test_pipeline import KINDS, SPATIAL, Net, divisors, foldings, residual

PART = devices.DEFAULT
ALL = Limits(PART.dsp, PART.bram18, PART.lut)

RATES = {graph: Rates(graph(), PART) for graph in (network, residual)}


def bound(made: Pipeline) -> int:
    return max(map(token.work, made.ops))


def price(made: Pipeline, limits: Limits) -> float:
    """What a pipeline takes of the limits, its FIFOs as shallow as can be."""
    shallow = made.with_depths(dict.fromkeys(made.fifos, units.DEPTH))
    taken = resources.total(shallow, PART.family)
    return taken.dsp / limits.dsp + taken.bram18 / limits.bram18 + taken.lut / limits.lut


def check_rates(graph: Graph, interval: int) -> None:
    """What is chosen keeps the interval and takes what it is said to; no other fold of one layer is cheaper."""
    rates = Rates(graph, PART)
    chosen = rates.choose(interval, ALL)
    assert chosen is not None
    folding = rates.folding(chosen)
    made = legalise(graph, folding)
    assert bound(made) <= interval
    said = rates.total(chosen)
    taken = resources.total(made.with_depths(dict.fromkeys(made.fifos, units.DEPTH)), PART.family)
    assert (said.dsp, said.bram18) == (taken.dsp, taken.bram18)
    assert said.lut == pytest.approx(taken.lut)
    cost = price(made, ALL)
    extents = {op.layer: op.extent for op in made.ops if op.fold is not None}
    for layer, (o, k) in extents.items():
        for fold in product(divisors(o), divisors(k)):
            other = legalise(graph, {**folding, layer: fold})
            assert bound(other) > interval or price(other, ALL) >= cost - 1e-9, (layer, fold)


@pytest.mark.parametrize("interval", [31104, 15552, 4000, 1300])
def test_no_single_layer_of_a_network_could_be_cheaper(interval: int) -> None:
    check_rates(network(), interval)


@given(data=st.data(), kind=KINDS, spatial=SPATIAL)
@settings(max_examples=8, deadline=None)
def test_no_single_layer_of_a_random_network_could_be_cheaper(
    data: st.DataObject, kind: DType, spatial: tuple[int, ...]
) -> None:
    net = Net(data, (*spatial, data.draw(st.sampled_from([1, 2, 4, 6]))), kind)
    y = net.rescale(net.conv(net.x, net.int(1, 6), 4), DType.I8)
    y = net.rescale(net.conv(y, net.int(1, 6), 4), DType.I8)
    net.graph.add_output(Port("y", 0.1, 0), y)
    wanted = data.draw(st.sampled_from(Rates(net.graph, PART).intervals))
    check_rates(net.graph, wanted)


@pytest.mark.parametrize("graph", [network, residual])
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_layers_and_what_joins_them_are_the_whole_pipeline(
    graph: Callable[[], Graph], data: st.DataObject
) -> None:
    made = legalise(graph())
    wanted = {**made.folding, **data.draw(foldings(made))}
    rates = RATES[graph]
    chosen = {
        layer: next(c for c in found if c.fold == wanted.get(layer, (1, 1)))
        for layer, found in rates.choices.items()
    }
    built = legalise(graph(), wanted)
    taken = resources.total(built.with_depths(dict.fromkeys(built.fifos, units.DEPTH)), PART.family)
    said = rates.total(chosen)
    assert (said.dsp, said.bram18) == (taken.dsp, taken.bram18)
    assert said.lut == pytest.approx(taken.lut)
    joints = [rates.joint(e, chosen[e.source], chosen[e.sink])[1] for e in rates.edges]
    assert max([c.work for c in chosen.values()] + joints) == bound(built)


def test_a_converter_between_unlike_lanes_may_be_the_slowest() -> None:
    layer = fpga_resources.Layer(random.Random(1), (4, 4, 1))
    y = layer.rescale(layer.conv(layer.x, 6, 1, 1, 0, 8))
    layer.pipeline(layer.rescale(layer.conv(y, 1, 1, 1, 0, 8)))
    rates = Rates(layer.graph, PART)
    first, second = rates.choices
    chosen = {
        name: next(c for c in rates.choices[name] if c.fold == fold)
        for name, fold in ((first, (3, 1)), (second, (1, 2)))
    }
    assert [c.work for c in chosen.values()] == [32, 48]
    (edge,) = rates.edges
    # three lanes become two through one
    assert rates.joint(edge, chosen[first], chosen[second])[1] == 96
    assert bound(legalise(layer.graph, rates.folding(chosen))) == 96
    within = rates.choose(48, ALL)
    assert within is not None
    assert bound(legalise(layer.graph, rates.folding(within))) <= 48


@given(dsp=st.integers(8, 60), bram=st.integers(4, 40), lut=st.integers(2500, 9000))
@settings(max_examples=12, deadline=None)
def test_limits_are_kept_and_more_of_them_is_never_slower(dsp: int, bram: int, lut: int) -> None:
    rates = RATES[network]
    found = rates.fastest(Limits(dsp, bram, lut))
    assert found is not None
    interval, chosen = found
    made = legalise(network(), rates.folding(chosen))
    made = made.with_depths(dict.fromkeys(made.fifos, units.DEPTH))
    taken = resources.total(made, PART.family)
    assert taken.dsp <= dsp
    assert taken.bram18 <= bram
    assert taken.lut <= lut
    assert bound(made) <= interval
    roomy = rates.fastest(Limits(2 * dsp, 2 * bram, 2 * lut))
    assert roomy is not None
    assert roomy[0] <= interval


def test_the_fastest_design_is_the_fastest_of_all_foldings_that_fit() -> None:
    graph, limits = residual(), Limits(20, 10, 3000)
    found = Rates(graph, PART).fastest(limits)
    assert found is not None
    fits = []
    for fold in product(divisors(4), divisors(36)):
        made = legalise(graph, {"conv": fold})
        made = made.with_depths(dict.fromkeys(made.fifos, units.DEPTH))
        if limits.hold(resources.total(made, PART.family)):
            fits.append(bound(made))
    assert found[0] == min(fits)


# ------------------------------------------------------------------------------ designs


def test_without_a_wish_half_of_the_part_is_taken_at_most() -> None:
    design = solve(network(), Fabric(part="xc7z010")).design
    assert 20 < design.dsp <= 40
    assert design.bram18 <= 60
    assert design.lut <= 8800


def test_a_rate_that_anything_reaches_makes_every_unit_as_small_as_can_be() -> None:
    solved = solve(network(), Fabric(target_fps=1))
    assert set(solved.pipeline.folding.values()) == {(1, 1)}
    assert solved.device == PART
    assert solved.timing.interval == bound(solved.pipeline) == 31104


def test_a_rate_is_reached_or_refused_with_what_could_be() -> None:
    solved = solve(network(), Fabric(target_fps=20_000, clock_mhz=50))
    assert solved.timing.interval <= 2500
    assert solved.design.images_per_second >= 20_000
    slower = solve(network(), Fabric(target_fps=5_000, clock_mhz=50))
    assert slower.design.dsp < solved.design.dsp
    with pytest.raises(
        BudgetExceeded, match=r"out of reach of xc7z010 at 50 MHz .* \d+ are reached"
    ):
        solve(network(), Fabric(part="xc7z010", target_fps=1e6, clock_mhz=50))
    with pytest.raises(BudgetExceeded, match="DSP blocks of 2"):
        solve(network(), Fabric(max_dsp=2))


def test_a_design_says_what_its_pipeline_takes() -> None:
    solved = solve(network(), Fabric(part="LFE5U-45F-6BG381C", max_dsp=30))
    design = solved.design
    assert design.part == "lfe5u-45f"
    assert design.available == {"dsp": 72, "bram18": 108, "lut": 44_000, "ff": 44_000}
    assert design.dsp == sum(u.dsp for u in design.units) <= 30
    assert {u.layer: (u.pe, u.simd) for u in design.units if u.kind == "MatrixVector"}.items() <= (
        solved.pipeline.folding.items()
    )
    assert {f.name: f.depth for f in design.fifos} == solved.folding.fifos
    assert all(f.peak <= f.depth for f in design.fifos)
    assert max(u.cycles for u in design.units) <= design.interval
    # the whole design again, from its file
    again = solve(network(), Fabric(folding=solved.folding.dumps()))
    assert again.folding == solved.folding
    assert again.timing.cycles == solved.timing.cycles


# ------------------------------------------------------------------------------ depths


@pytest.mark.parametrize("fold", [(1, 1), (1, 2), (2, 4), (4, 9)])
def test_fifos_are_as_deep_as_the_interval_needs(fold: tuple[int, int]) -> None:
    made = legalise(residual(), {"conv": fold})
    endless = made.with_depths({n: 512 for n in made.fifos})
    fitted, timing = depths.fit(made)
    assert timing.interval == token.simulate(endless).interval == token.simulate(fitted).interval
    assert fitted.fifos.keys() == made.fifos.keys()
    for name, s in fitted.fifos.items():
        if s.depth > units.DEPTH:
            less = token.simulate(fitted.with_depths({name: s.depth - 1}), 3)
            assert less.stuck or less.interval > timing.interval, name


@pytest.mark.parametrize("interval", [31104, 5000, 2000, 1300])
def test_fifos_of_a_network_keep_the_interval_of_endless_ones(interval: int) -> None:
    rates = RATES[network]
    chosen = rates.choose(interval, ALL)
    assert chosen is not None
    made = legalise(network(), rates.folding(chosen))
    endless = token.simulate(made.with_depths({n: 1 << 12 for n in made.fifos}), 3)
    shallow = token.simulate(made.with_depths(dict.fromkeys(made.fifos, units.DEPTH)), 3)
    fitted, timing = depths.fit(made)
    assert bound(made) <= timing.interval == endless.interval <= shallow.interval
    assert timing.cycles == token.simulate(fitted, 3).cycles


@pytest.mark.parametrize("fold", [(1, 1), (2, 4)])
def test_an_arm_holds_what_the_other_needs(fold: tuple[int, int]) -> None:
    made = legalise(residual(), {"conv": fold})
    wanted = depths.held(made)
    (fork,) = (op for op in made.ops if isinstance(op, units.Fork))
    window, skip = fork.outputs
    assert wanted[window.name] == 0
    # the first pixel of a 3 x 3 convolution padded by one needs a row and two pixels, the word that leaves among them
    assert wanted[skip.name] >= (made.inputs[0].stream.width + 2) * window.folds
    deep = made.with_depths({skip.name: wanted[skip.name]})
    assert not token.simulate(deep, 2).stuck


def test_a_fifo_that_is_too_small_is_named_with_the_depth_that_would_do() -> None:
    graph = residual()
    solved = solve(graph, Fabric(target_fps=1))
    (fork,) = (op for op in solved.pipeline.ops if isinstance(op, units.Fork))
    skip = fork.outputs[1].name
    small = replace(solved.folding, fifos={skip: 3})
    with pytest.raises(BadInput, match=rf"{skip} needs \d+ words, not 3") as error:
        solve(graph, Fabric(folding=small.dumps()))
    enough = int(str(error.value).split(f"{skip} needs ")[1].split()[0])
    moved = solve(graph, Fabric(folding=replace(small, fifos={skip: enough}).dumps()))
    assert moved.pipeline.fifos[skip].depth == enough
    with pytest.raises(BadInput, match="needs"):
        solve(graph, Fabric(folding=replace(small, fifos={skip: enough - 1}).dumps()))


def test_given_depths_stay_as_they_are() -> None:
    solved = solve(network(), Fabric(target_fps=1))
    name = next(iter(solved.folding.fifos))
    folding = replace(solved.folding, fifos={name: 77}, clock_mhz=50.0, part="xc7a35t")
    again = solve(network(), Fabric(folding=folding.dumps()))
    assert again.pipeline.fifos[name].depth == 77
    assert (again.device.name, again.clock_mhz) == ("xc7a35t", 50.0)
    wrong = replace(folding, fifos={name + "x": 4})
    with pytest.raises(BadInput, match=f"did you mean {name}"):
        solve(network(), Fabric(folding=wrong.dumps()))
    with pytest.raises(BadInput, match="nolayer"):
        solve(network(), Fabric(folding=replace(folding, layers={"nolayer": (1, 1)}).dumps()))


# ------------------------------------------------------------------------------ folding.json

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FOLDINGS = st.builds(
    Folding,
    st.sampled_from(list(devices.DEVICES)),
    st.floats(1, 2000),
    st.dictionaries(NAMES, st.tuples(st.integers(1, 65536), st.integers(1, 65536)), max_size=5),
    st.dictionaries(NAMES, st.integers(1, 1 << 20), max_size=5),
)


@given(FOLDINGS)
def test_a_folding_is_read_as_it_was_written(folding: Folding) -> None:
    text = folding.dumps()
    again = Folding.loads(text)
    assert again == folding
    assert list(again.layers) == list(folding.layers)
    assert again.dumps() == text


GOOD = {
    "version": 1,
    "part": "xc7z020clg400-1",
    "clock_mhz": 100,
    "layers": {"a": {"pe": 1, "simd": 2}},
    "fifos": {"x": 2},
}


def test_fifos_may_be_left_out_and_a_part_may_have_its_package() -> None:
    text = json.dumps({k: v for k, v in GOOD.items() if k != "fifos"})
    assert Folding.loads(text) == Folding("xc7z020", 100.0, {"a": (1, 2)}, {})


HOSTILE = {
    "empty": "",
    "no object": "[]",
    "deep": "[" * 100_000,
    "long": " " * (5 << 20),
    "twice": json.dumps(GOOD)[:-1] + ', "part": "xc7z010"}',
    "a long number": json.dumps(GOOD).replace("100", "1" * 5000),
    "no number": json.dumps(GOOD).replace("100", "NaN"),
    "endless": json.dumps(GOOD).replace("100", "1e999"),
} | {
    f"{change}": json.dumps(GOOD | change)
    for change in (
        {"version": 2},
        {"version": True},
        {"version": 1.0},
        {"part": 7},
        {"part": "xc7z9999"},
        {"clock_mhz": "100"},
        {"clock_mhz": True},
        {"clock_mhz": 0},
        {"layers": []},
        {"layers": {"a": [1, 2]}},
        {"layers": {"a": {"pe": 1}}},
        {"layers": {"a": {"pe": 1, "simd": 1, "more": 1}}},
        {"layers": {"a": {"pe": 0, "simd": 1}}},
        {"layers": {"a": {"pe": 1.5, "simd": 1}}},
        {"layers": {"a": {"pe": True, "simd": 1}}},
        {"layers": {"a": {"pe": 1, "simd": 1 << 40}}},
        {"layers": {"a" * 5000: {"pe": 1, "simd": 1}}},
        {"fifos": {"x": 0}},
        {"fifos": {"x": 1 << 40}},
        {"fifos": {"x": None}},
        {"fifos": None},
        {"comment": "no"},
    )
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_folding_is_refused_in_a_sentence(case: str) -> None:
    with pytest.raises(BadInput) as error:
        Folding.loads(HOSTILE[case])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
