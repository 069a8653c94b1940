"""Which tile of each layer is the fastest here: the best few by the model are built into programs and timed there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from qcompile.errors import QcompileError
from qcompile.ir import Graph
from qcompile.program import emitted
from qcompile.target import Placement

from ..c import build
from ..c.kernel import LINE
from ..c.storage import Storage
from . import isa, program
from .tunable import Tunable

CANDIDATES = 6
"""Tiles of a layer that are timed."""

_NAME = "tuned"
_ROUNDS = 9
_SLICE_MS = 30
_SECONDS = 600
_GAIN = 0.97
"""A tile takes the place of the model's where it needs less than this share of its time: less is noise."""


@dataclass(frozen=True, slots=True)
class _Layers:
    """Layers with several tiles: the signature of each by the value it stores, the tiles of each signature."""

    signatures: Mapping[str, str]
    tiles: Mapping[str, Sequence[str]]


def tune(
    graph: Graph, has: isa.Isa, *, placement: Placement, known: Mapping[str, str]
) -> dict[str, str]:
    """The tile of every layer of which there are several, by signature: what is `known` stays."""
    layers = _layers(graph, has, placement.threads)
    tiles = {s: known[s] for s in layers.tiles if s in known}
    unknown = {s: names for s, names in layers.tiles.items() if s not in known}
    if not unknown:
        return tiles
    # limits would make other layers of it
    place = replace(placement, max_ram=None, max_flash=None)
    with TemporaryDirectory(dir=build.workspace()) as folder:
        programs = [
            _built(
                graph,
                has,
                Path(folder, str(at)),
                replace(place, tiles=tiles | {s: n[at % len(n)] for s, n in unknown.items()}),
            )
            for at in range(min(CANDIDATES, max(map(len, unknown.values()))))
        ]
        times = _times(programs, layers)
    for signature, names in unknown.items():
        tiles[signature] = _fastest(names, [spent[signature] for spent in times])
    return tiles


def _layers(graph: Graph, has: isa.Isa, threads: int) -> _Layers:
    signatures: dict[str, str] = {}
    tiles: dict[str, Sequence[str]] = {}
    storage = Storage(graph, program.kernels(has, threads), LINE)
    for step, kernel in zip(storage.steps, storage.kernels, strict=True):
        if isinstance(kernel, Tunable) and len(names := kernel.tiles(step)) > 1:
            signatures[step.output.name] = kernel.signature(step)
            tiles[kernel.signature(step)] = names[:CANDIDATES]
    return _Layers(signatures, tiles)


def _built(graph: Graph, has: isa.Isa, folder: Path, placement: Placement) -> build.Build:
    """A whole program with these tiles, built to tell the time of its layers."""
    model = program.lower(graph, has, name=_NAME, vectors=(), placement=placement)
    around = build.support_files(graph, name=_NAME, family="x86", flags=(), model=model.files)
    folder.mkdir()
    for path, content in {**model.files, **around}.items():
        (folder / path).write_bytes(content)
    made = build.Build(folder, _NAME, program.toolchain(has))
    _ = made.profile
    return made


def _times(programs: Sequence[build.Build], layers: _Layers) -> list[dict[str, float]]:
    """Nanoseconds of all layers of a signature, for each program; all take turns, so that all meet the same load."""
    stored = [emitted(one.folder).values for one in programs]
    seen: list[dict[str, list[float]]] = [{s: [] for s in layers.tiles} for _ in programs]
    for _ in range(_ROUNDS):
        for one, ids, spent in zip(programs, stored, seen, strict=True):
            times = _profile(one)
            total = dict.fromkeys(layers.tiles, 0.0)
            for value, signature in layers.signatures.items():
                total[signature] += times[ids[value]]
            for signature, ns in total.items():
                spent[signature].append(ns)
    # what else runs here only adds to a time
    return [{s: min(ns) for s, ns in spent.items()} for spent in seen]


def _profile(one: build.Build) -> dict[int, float]:
    """Nanoseconds by trace id."""
    done = build.call([str(one.profile), str(_SLICE_MS)], seconds=_SECONDS)
    if done.returncode:
        raise QcompileError(f"a program to be timed failed: {build.first_lines(done.stderr)}")
    rows = (line.split() for line in done.stdout.decode().splitlines())
    return {int(number): float(ns) for number, ns in rows}


def _fastest(names: Sequence[str], times: Sequence[float]) -> str:
    """The tile that took the least time; the model's, which is the first, unless another is clearly faster."""
    taken = dict(zip(names, times, strict=False))
    found = min(taken, key=taken.__getitem__)
    return found if taken[found] < _GAIN * taken[names[0]] else names[0]
