"""folding.json: how a design is folded and how deep its FIFOs are, to be read, edited and followed; and who makes it.

The file names the part, the clock, (pe, simd) of every layer and the words of every FIFO:

    {"version": 1, "part": "xc7z020", "clock_mhz": 100.0,
     "layers": {"dense": {"pe": 2, "simd": 8}}, "fifos": {"l0_window": 2}}

FIFOs that it does not name get their depths as if there were no file, layers that it does not name have one of each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import NoReturn

from qcompile.errors import BadInput, BudgetExceeded
from qcompile.ir import Graph
from qcompile.target import CLOCK_MHZ, Design, Fabric

from . import depths, devices
from .devices import Device
from .legalise import legalise
from .pipeline import Pipeline
from .rates import Choice, Limits, Rates
from .resources import Cost, describe, total
from .token import Timing

VERSION = 1
LARGEST = 4 << 20
"""Bytes of the longest folding.json that is read."""

_PE, _DEPTH, _NAMES, _LETTERS = 1 << 16, 1 << 20, 100_000, 4096
_CLOCKS = (1.0, 2000.0)
_CONVERTER = re.compile(r"_(wide|narrow)$")
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Folding:
    """What folding.json holds."""

    part: str
    clock_mhz: float
    layers: Mapping[str, tuple[int, int]]
    fifos: Mapping[str, int] = field(default_factory=dict)

    def dumps(self) -> str:
        """The file's text, in the order of the layers and FIFOs."""
        made = {
            "version": VERSION,
            "part": self.part,
            "clock_mhz": self.clock_mhz,
            "layers": {n: {"pe": pe, "simd": simd} for n, (pe, simd) in self.layers.items()},
            "fifos": dict(self.fifos),
        }
        return json.dumps(made, indent=2) + "\n"

    @staticmethod
    def loads(text: str) -> Folding:
        """Read the file's text; BadInput says what is wrong with it."""
        if len(text) > LARGEST:
            _refuse(f"it has more than {LARGEST} characters")
        try:
            made: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            _refuse(f"it is no JSON ({str(error)[:80]})")
        top = _object(made, "the file", {"version", "part", "clock_mhz", "layers"}, {"fifos"})
        _integer(top["version"], "the version", VERSION, VERSION)
        part, clock = top["part"], top["clock_mhz"]
        if not isinstance(part, str):
            _refuse("the part is no text")
        if isinstance(clock, bool) or not isinstance(clock, int | float):
            _refuse("clock_mhz is no number")
        if not _CLOCKS[0] <= clock <= _CLOCKS[1]:
            _refuse(f"clock_mhz is not between {_CLOCKS[0]:g} and {_CLOCKS[1]:g}")
        layers = {}
        for name, entry in _names(top["layers"], "layers").items():
            pair = _object(entry, f"layer {name[:80]}", {"pe", "simd"}, set())
            pe, simd = (
                _integer(pair[k], f"{k} of layer {name[:80]}", 1, _PE) for k in ("pe", "simd")
            )
            layers[name] = (pe, simd)
        fifos = {
            name: _integer(depth, f"the depth of FIFO {name[:80]}", 1, _DEPTH)
            for name, depth in _names(top.get("fifos", {}), "fifos").items()
        }
        return Folding(devices.find(part).name, float(clock), layers, fifos)


def _refuse(why: str) -> NoReturn:
    raise BadInput(f"the folding cannot be read: {why}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _names(x: object, what: str) -> dict[str, object]:
    """An object with names of its own."""
    if not isinstance(x, dict):
        _refuse(f"{what} is no object")
    if len(x) > _NAMES or any(len(name) > _LETTERS for name in x):
        _refuse(f"{what} has too many or too long names")
    return x


def _object(x: object, what: str, needed: set[str], allowed: set[str]) -> dict[str, object]:
    """An object with the needed keys and no others but those allowed."""
    if not isinstance(x, dict):
        _refuse(f"{what} is no object")
    if lack := sorted(needed - x.keys()):
        _refuse(f"{what} has no {lack[0]}")
    if more := sorted(x.keys() - needed - allowed):
        _refuse(f"{what} has an unknown key {more[0][:80]!r}")
    return x


def _integer(x: object, what: str, lo: int, hi: int) -> int:
    if isinstance(x, bool) or not isinstance(x, int) or not lo <= x <= hi:
        _refuse(f"{what} is no integer from {lo} to {hi}")
    return x


# ------------------------------------------------------------------------------ designs


@dataclass(frozen=True, eq=False)
class Solved:
    """A pipeline with its lanes and depths, what it is for, and its timing by the cycle model."""

    pipeline: Pipeline
    device: Device
    clock_mhz: float
    timing: Timing

    @property
    def folding(self) -> Folding:
        """The file that gives this design again."""
        fifos = {name: s.depth for name, s in self.pipeline.fifos.items()}
        return Folding(self.device.name, self.clock_mhz, self.pipeline.folding, fifos)

    @property
    def design(self) -> Design:
        """What is said of it."""
        return describe(self.pipeline, self.device, self.clock_mhz, self.timing)


def solve(graph: Graph, fabric: Fabric) -> Solved:
    """The design for a graph: as its folding says, or cheap for a rate, or fast within limits or half of the part.

    BudgetExceeded where the rate cannot be reached or the part is too small.
    """
    if fabric.folding is not None:
        return _followed(graph, fabric, Folding.loads(fabric.folding))
    device = devices.DEFAULT if fabric.part is None else devices.find(fabric.part)
    clock = _clock(CLOCK_MHZ if fabric.clock_mhz is None else fabric.clock_mhz)
    limits = Limits(
        device.dsp if fabric.max_dsp is None else min(fabric.max_dsp, device.dsp),
        device.bram18 if fabric.max_bram is None else min(fabric.max_bram, device.bram18),
        device.lut if fabric.max_lut is None else min(fabric.max_lut, device.lut),
    )
    search = _Search(graph, device, clock, limits)
    if fabric.target_fps is not None:
        return search.at(fabric.target_fps)
    if fabric.max_dsp is None and fabric.max_bram is None and fabric.max_lut is None:
        return replace(search, limits=limits.half).fitting()
    return search.fastest()


def _clock(mhz: float) -> float:
    if not _CLOCKS[0] <= mhz <= _CLOCKS[1]:
        raise BadInput(f"a clock of {mhz:g} MHz is not between {_CLOCKS[0]:g} and {_CLOCKS[1]:g}")
    return float(mhz)


def _followed(graph: Graph, fabric: Fabric, folding: Folding) -> Solved:
    device = devices.find(folding.part if fabric.part is None else fabric.part)
    made = legalise(graph, folding.layers)
    # width converters come and go with the lanes of their neighbours
    known = {n: d for n, d in folding.fifos.items() if n in made.fifos or not _CONVERTER.search(n)}
    for name in known:
        if name not in made.fifos:
            near = get_close_matches(name, made.fifos, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(f"the folding names FIFO {name[:80]}, which this design has not{hint}")
    limits = Limits(device.dsp, device.bram18, device.lut)
    _fit(made.with_depths(known), device, limits)
    made, timing = depths.fit(made, known)
    _fit(made, device, limits)
    clock = folding.clock_mhz if fabric.clock_mhz is None else _clock(fabric.clock_mhz)
    return Solved(made, device, clock, timing)


def _fit(made: Pipeline, device: Device, limits: Limits) -> None:
    """BudgetExceeded where a design is larger than its part."""
    over = [
        f"{has:,} {what} of {most:,}"
        for what, (has, most) in limits.exceeded(total(made, device.family)).items()
    ]
    if over:
        raise BudgetExceeded(f"the design does not fit {device.name}: it takes {', '.join(over)}")


@dataclass
class _Search:
    graph: Graph
    device: Device
    clock_mhz: float
    limits: Limits

    def __post_init__(self) -> None:
        self.rates = Rates(self.graph, self.device)

    def fitted(self, made: Pipeline) -> tuple[Pipeline, Device, float, Timing]:
        """With depths and timing."""
        made, timing = depths.fit(made)
        return made, self.device, self.clock_mhz, timing

    def built(self, chosen: Mapping[str, Choice]) -> Solved:
        """The design of these choices."""
        return Solved(*self.fitted(legalise(self.graph, self.rates.folding(chosen))))

    def fastest(self) -> Solved:
        """The fastest design within the limits."""
        left = self.limits
        for _ in range(_ATTEMPTS):
            found = self.rates.fastest(left)
            if found is None:
                break
            made = self.built(found[1])
            taken = total(made.pipeline, self.device.family)
            if self.limits.hold(taken):
                return made
            # what the choices did not know of: mostly the FIFOs of residual arms
            known = self.rates.total(found[1])
            left = self.limits.less(
                Cost(
                    max(0, taken.dsp - known.dsp),
                    max(0, taken.bram18 - known.bram18),
                    max(0.0, taken.lut - known.lut),
                )
            )
        self._too_much()

    def fitting(self) -> Solved:
        """The fastest design within the limits, or the smallest where none is."""
        try:
            return self.fastest()
        except BudgetExceeded:
            whole = Limits(self.device.dsp, self.device.bram18, self.device.lut)
            made = Solved(*self.fitted(legalise(self.graph)))
            _fit(made.pipeline, self.device, whole)
            return made

    def at(self, fps: float) -> Solved:
        """The cheapest design found that makes so many images a second."""
        if not (math.isfinite(fps) and fps > 0):
            raise BadInput(f"{fps:g} images a second is no rate")
        cycles = wanted = math.floor(self.clock_mhz * 1e6 / fps)
        for _ in range(_ATTEMPTS):
            chosen = self.rates.choose(cycles, self.limits)
            if chosen is None:
                break
            made = self.built(chosen)
            fits = self.limits.hold(total(made.pipeline, self.device.family))
            if made.timing.interval <= wanted and fits:
                return made
            if not fits:
                break
            # gaps between images are no unit's work
            cycles = cycles * wanted // made.timing.interval - 1
        best = self.fastest()
        if best.timing.interval <= wanted:
            return best
        reach = best.design.images_per_second
        raise BudgetExceeded(
            f"{fps:,.10g} images a second are out of reach of {self.device.name} at {self.clock_mhz:g} MHz"
            f" within the limits; {math.floor(reach)} are reached with an interval of {best.timing.interval} cycles"
        )

    def _too_much(self) -> NoReturn:
        made = legalise(self.graph)
        taken = total(made, self.device.family)
        over = [f"{has} {n} of {most}" for n, (has, most) in self.limits.exceeded(taken).items()]
        raise BudgetExceeded(
            f"no design of this model that was found fits {self.device.name} within the limits:"
            f" with one product at a time it takes {', '.join(over) or 'less, but not with its FIFOs'}"
        )
