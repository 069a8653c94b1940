"""Tiles that are measured: which are tried, which is taken, what is kept, and that results stay what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile import target as families
from qcompile import tuning, verbs
from qcompile.errors import BadInput
from qcompile.ir import Graph
from qcompile.job import Job
from qcompile.options import DISPATCH, Options
from qcompile.target import ANYWHERE, Placement, Tunable
from qcompile.targets.c import build
from qcompile.targets.c.emit import fuse
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.x86 import isa, tune
from qcompile.targets.x86.depthwise import Depthwise
from qcompile.targets.x86.gemm import Gemm
from tests.native import check
from tests.targets import test_x86_depthwise as depthwises
from tests.targets.test_families import NAME, data, network, same
from tests.targets.test_x86_gemm import drawn, plain
from tests.test_tiny import tiny

HAS = isa.native() or isa.AVX2
CPU = HAS.name


def candidates(graph: Graph, kernel: Gemm | Depthwise, take: int) -> dict[str, str]:
    """A tile for every layer that the kernel can do: `take` of them on from the first, round and round."""
    steps = [step for step in fuse(graph) if kernel.matches(step)]
    names = {kernel.signature(step): kernel.tiles(step) for step in steps}
    return {signature: tiles[take % len(tiles)] for signature, tiles in names.items()}


def test_any_tile_gives_what_the_graph_gives(tmp_path: Path) -> None:
    here = plain(isa.AVX512_VNNI)
    graphs = [*map(drawn, range(60, 64)), *map(depthwises.chain, range(2))]
    taken: set[str] = set()
    for take in (1, 7):
        tiles: dict[str, str] = {}
        for kernel in (Gemm(here.isa), Depthwise(here.isa)):
            for graph in graphs:
                tiles |= candidates(graph, kernel, take)
        taken |= set(tiles.values())
        kernels = (
            replace(depthwises.Chosen(here.isa), tuned=tiles),
            replace(here.kernels[0], tuned=tiles),
            *PORTABLE,
        )
        (tmp_path / str(take)).mkdir()
        check(graphs, tmp_path / str(take), compiler=here.compiler, kernels=kernels)
    assert {"joined", "upright"} & {word for name in taken for word in name.split()}
    assert len(taken) > 12


def test_layers_of_one_signature_have_the_same_tiles_and_no_other_have() -> None:
    kernel = Gemm(HAS)
    found: dict[str, list[str]] = {}
    for seed in range(40):
        for step in fuse(drawn(seed)):
            if kernel.matches(step):
                tiles = kernel.tiles(step)
                assert len(set(tiles)) == len(tiles)
                assert found.setdefault(kernel.signature(step), tiles) == tiles
    assert len(found) > 60
    assert not found.keys() & {
        Gemm(HAS, 2).signature(step) for step in fuse(drawn(1)) if kernel.matches(step)
    }


def faked(monkeypatch: pytest.MonkeyPatch, shares: Mapping[int, float], most: int = 4) -> list[int]:
    """A clock by which programs, whose numbers it keeps, take a share of the time of the first."""
    asked: list[int] = []

    def times(one: build.Build) -> dict[int, float]:
        number = int(one.folder.name)
        asked.append(number)
        load = 1.0 + (len(asked) % 3) / 10  # what else runs on the machine
        return {i: 100.0 * shares.get(number, 1.5) * load for i in range(64)}

    monkeypatch.setattr(tune, "_profile", times)
    monkeypatch.setattr(tune, "CANDIDATES", most)
    monkeypatch.setattr(build.Build, "profile", Path())
    return asked


def ranked() -> dict[str, list[str]]:
    """The tiles of the network's layers, by what a kernel of its own says of them."""
    layers: dict[str, list[str]] = {}
    for step in fuse(network()):
        able = [k for k in (Gemm(HAS), Depthwise(HAS)) if k.matches(step)]
        layers |= {k.signature(step): k.tiles(step) for k in able}
    return layers


@pytest.mark.parametrize(("share", "wins"), [(0.5, 2), (0.99, 0)])
def test_the_fastest_is_taken_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, share: float, wins: int
) -> None:
    asked = faked(monkeypatch, {0: 1.0, 2: share})
    found = tune.tune(network(), HAS, placement=ANYWHERE, known={})
    layers = ranked()
    assert found
    assert all(found[s] == layers[s][wins] for s in found if len(layers[s]) > 4)
    assert any(len(layers[s]) > 4 for s in found)
    assert asked == list(range(4)) * (len(asked) // 4)


def test_what_is_known_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = faked(monkeypatch, {0: 1.0, 1: 0.1})
    first = tune.tune(network(), HAS, placement=ANYWHERE, known={})
    assert asked
    asked.clear()
    assert tune.tune(network(), HAS, placement=ANYWHERE, known=first) == first
    assert not asked
    (one, *_), kept = first, dict(first)
    kept[one] = ranked()[one][3]
    again = tune.tune(network(), HAS, placement=ANYWHERE, known={**kept, "another": "1x1x1"})
    assert again == kept


def test_layers_are_measured_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "CANDIDATES", 2)
    x86, g = families.get("x86"), network()
    assert isinstance(x86, Tunable)
    found = x86.tune(g, cpu=CPU, placement=ANYWHERE, known={})
    layers = ranked()
    assert found.keys() == {s for s, tiles in layers.items() if len(tiles) > 1}
    assert all(name in layers[s][:2] for s, name in found.items())
    assert "cc" in x86.machine() or "zig" in x86.machine()


def test_a_tuned_program_is_another_with_the_same_results(tmp_path: Path) -> None:
    x86, g = families.get("x86"), network()
    tiles = {s: names[3 % len(names)] for s, names in ranked().items()}

    def files(chosen: Mapping[str, str]) -> Mapping[str, bytes]:
        place = Placement(tiles=chosen)
        return x86.lower(g, name=NAME, cpu=CPU, vectors=(), placement=place).files

    assert files(tiles)["model.c"] != files({})["model.c"]
    assert files(tiles) == files(dict(reversed(tiles.items())))
    assert files({"no such layer": "1x1x1"}) == files({})
    for name, content in files(tiles).items():
        (tmp_path / name).write_bytes(content)
    runner = x86.runner(tmp_path, g, name=NAME, cpu=CPU)
    assert same(runner.run(data(5)), g.run(data(5)))
    with pytest.raises(BadInput, match=r"tile '9x9x9' for .*, which is none of gemm"):
        files(dict.fromkeys(tiles, "9x9x9"))


def test_every_program_of_a_dispatching_model_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, {0: 1.0, 1: 0.5})
    x86 = families.get("x86")
    assert isinstance(x86, Tunable)
    found = x86.tune(network(), cpu=DISPATCH, placement=ANYWHERE, known={})
    here = {n for n, has in isa.ISAS.items() if has.needs <= isa.features()}
    assert {s.split()[0].partition("-")[2] for s in found} == here


class Fake:
    """A target of two layers, one tile measured after the other."""

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self.measured: list[str] = []

    def machine(self) -> str:
        return self._machine

    def tune(
        self, graph: Graph, *, cpu: str, placement: Placement, known: Mapping[str, str]
    ) -> dict[str, str]:
        new = [s for s in ("layer a", "layer b") if s not in known]
        self.measured += new
        return {s: known.get(s, f"1x{len(s)}") for s in ("layer a", "layer b")}


def ask(fake: Fake, place: str | Path) -> tuple[tuning.Tuning, int]:
    return tuning.tuned(fake, network(), cpu=CPU, placement=ANYWHERE, place=place)


def test_a_file_keeps_what_was_measured(tmp_path: Path) -> None:
    file, here = tmp_path / "new" / "tiles.json", Fake("here")
    found, count = ask(here, file)
    assert (count, here.measured) == (2, ["layer a", "layer b"])
    said = json.loads(file.read_text())
    assert said == {"machine": "here", "tiles": {"layer a": "1x7", "layer b": "1x7"}}
    before = file.read_bytes()
    there = Fake("another machine")
    assert ask(there, file) == (found, 0)
    assert (there.measured, file.read_bytes()) == ([], before)
    assert [p.name for p in file.parent.iterdir()] == ["tiles.json"]


def test_another_machine_adds_nothing_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text('{"machine": "there", "tiles": {"layer a": "2x2", "of another model": "1x1"}}')
    with pytest.raises(BadInput, match=r"measured on there, and lacks 1 layers .* on here"):
        ask(Fake("here"), file)
    there = Fake("there")
    found, count = ask(there, file)
    assert (count, there.measured) == (1, ["layer b"])
    assert found.tiles == {"layer a": "2x2", "layer b": "1x7"}
    assert json.loads(file.read_text())["tiles"] == {**found.tiles, "of another model": "1x1"}


def test_each_machine_has_a_file_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for machine, count in (("here", 2), ("there", 2), ("here", 0)):
        assert ask(Fake(machine), "cache")[1] == count
    assert len(list((tmp_path / "qcompile").glob("tuning-*.json"))) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"machine": "here"}',
        b'{"machine": 1, "tiles": {}}',
        b'{"machine": "here", "tiles": {"a": 1}}',
        b'{"machine": "here", "tiles": {}, "more": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
        b" " * ((1 << 24) + 1),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tiles.json"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"the tuning .*tiles\.json"):
        ask(Fake("here"), file)
    assert file.read_bytes() == content


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot (read|write) the tuning"):
        ask(Fake("here"), tmp_path / "file" / "tiles.json")
    with pytest.raises(BadInput, match="cannot read the tuning"):
        ask(Fake("here"), tmp_path)


def test_a_tuned_model_is_reproduced_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, {0: 1.0, 1: 0.5})
    samples = [{"x": np.random.default_rng(1).normal(size=(8, 2, 5, 5)).astype(np.float32)}]
    made = qcompile.compile(
        tiny(tmp_path / "tiny.onnx"), "x86", samples, "fast", tmp_path / "out",
        cpu=CPU, tune=tmp_path / "tiles.json", verify_samples=1,
    )  # fmt: skip
    kept = (made.folder / "tuning.json").read_bytes()
    assert json.loads(kept) == json.loads((tmp_path / "tiles.json").read_text())
    assert made.manifest["options"]["tune"] == "tuning.json"  # type: ignore[index]
    assert "tuning.json" in made.manifest["files"]  # type: ignore[operator]

    asked = faked(monkeypatch, {0: 1.0, 2: 0.1})
    assert verbs.reproduce(made.folder / "manifest.json").identical
    assert not asked
    (made.folder / "tuning.json").write_text('{"machine": "there", "tiles": {}}')
    with pytest.raises(BadInput, match="measured on there"):
        verbs.reproduce(made.folder / "manifest.json")
    (made.folder / "tuning.json").unlink()
    with pytest.raises(BadInput, match=r"cannot read .*tuning\.json"):
        verbs.reproduce(made.folder / "manifest.json")


@pytest.mark.parametrize("family", ["arm", "cortex-m4", "hls", "onnx", "tvm"])
def test_other_targets_have_nothing_to_tune(family: str) -> None:
    with pytest.raises(BadInput, match=rf"--tune is not for {family}"):
        Job.checked("model.onnx", family, "fast", None, {}, Options(tune="cache"))


def test_portable_code_has_nothing_to_tune() -> None:
    x86 = families.get("x86")
    assert isinstance(x86, Tunable)
    with pytest.raises(BadInput, match=r"--tune is for programs with vectors.*--cpu=generic"):
        x86.tune(network(), cpu="generic", placement=ANYWHERE, known={})
