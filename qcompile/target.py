"""What a target is: it lowers the integer graph to files, and runs what it lowered where it can.

A target never changes a value: what it cannot run it refuses (`Unsupported`), naming the node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol, runtime_checkable

from qcompile.errors import BadInput
from qcompile.ir import Array, Graph

Codes = Mapping[str, Array]
"""Integer tensors by port name; the first axis counts rows."""

CLOCK_MHZ = 100.0
"""What a design of logic is clocked with unless its user knows better."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """What a design of logic is made for: a part, a clock, a rate to reach, limits on what it may take.

    `folding` is the text of a folding.json to follow, whose part and clock count where none are named here. Without a
    rate the design is the fastest within the limits; without limits either, within half of the part.
    """

    part: str | None = None
    clock_mhz: float | None = None
    target_fps: float | None = None
    max_dsp: int | None = None
    max_bram: int | None = None
    max_lut: int | None = None
    folding: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a program's data lies and how many bytes it may take: linker sections, limits on RAM and flash.

    `stack` bytes of the RAM are not for buffers. `fabric` is for targets that are designs of logic, `threads` for those
    with an operating system: so many share the work of a call. `tiles` are what was measured for a Tunable target.
    """

    weights_section: str | None = None
    arena_section: str | None = None
    max_ram: int | None = None
    max_flash: int | None = None
    stack: int = 0
    fabric: Fabric | None = None
    threads: int = 1
    tiles: Mapping[str, str] = field(default_factory=dict)


ANYWHERE = Placement()
"""Default sections, no limits."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a design: results at once, products in each, cycles an image keeps it busy, logic it takes."""

    name: str
    layer: str
    kind: str
    pe: int
    simd: int
    cycles: int
    dsp: int
    bram18: int
    lut: int


@dataclass(frozen=True, slots=True)
class Fifo:
    """A stream between two units: words of `bits` bits it holds at most, and how many it ever held in the model."""

    name: str
    bits: int
    depth: int
    peak: int


@dataclass(frozen=True, slots=True)
class Design:
    """A design of logic before synthesis: cycles are exact for the Verilog, DSP blocks too, LUTs are a model's.

    `latency` counts cycles until the first image is out, `interval` those between images; LUTs are off by `lut_error`,
    a share: the larger of a unit's median error and a whole network's largest. `available` has what the part offers.
    """

    part: str
    clock_mhz: float
    latency: int
    interval: int
    units: tuple[Unit, ...]
    fifos: tuple[Fifo, ...]
    dsp: int
    bram18: int
    lut: int
    lut_error: float
    available: Mapping[str, int]

    @property
    def latency_us(self) -> float:
        """Microseconds until the first image is out, at the clock that was asked for."""
        return self.latency / self.clock_mhz

    @property
    def images_per_second(self) -> float:
        """Images a second in a steady flow, at the clock that was asked for."""
        return self.clock_mhz * 1e6 / self.interval


@dataclass(frozen=True, slots=True)
class Layer:
    """One step of the lowered program, for the report; equal steps may share a `function` of the sources.

    `cost` is what its kernel was chosen by: where programs are counted in an emulator, the predicted count.
    """

    name: str
    kernel: str
    function: str
    macs: int
    scratch_bytes: int
    cost: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes of the arena that hold a value from step `first` to step `last`, or a step's scratch memory: no `value`."""

    value: str | None
    offset: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first` to `last`, exclusive, of the graph's value of that name: what one band of a program computes."""

    value: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Lowered:
    """An emitted program. `files` are deterministic bytes by relative path; no clock, path or host name is in them.

    `stored` gives the trace id of every value that reaches memory; `fused` names those that never do. Where layers run
    in `bands` of rows, `pieces` says of names that the graph does not know what they are. `buffers` is the arena over
    time, steps counted as `layers` are. `design` tells of logic.
    """

    files: Mapping[str, bytes]
    arena_bytes: int
    weight_bytes: int
    stored: Mapping[str, int]
    fused: Sequence[str]
    layers: Sequence[Layer]
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    bands: int = 1
    buffers: Sequence[Buffer] = ()
    design: Design | None = None


@dataclass(frozen=True, slots=True)
class FloatCertificate:
    """What disassembling the built objects showed: `instructions` decoded, and the float ones and symbols found.

    Where there are no objects, `basis` says what was counted instead.
    """

    instructions: int
    findings: Sequence[str] = field(default_factory=tuple)
    basis: str = "instructions of the object files were decoded"

    @property
    def clean(self) -> bool:
        """No floating-point arithmetic and no soft-float symbol was found."""
        return self.instructions > 0 and not self.findings


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of an object file's model: `code` and `constants` in flash, `statics` in RAM.

    `stack` is the most that NAME_run takes with everything it calls, and `deepest` the path of functions on which it
    does; where no bound can be stated, `stack` is None and `unbounded` says why. Constants are all that is loaded and
    neither code nor written: tables for unwinding belong to them. Another `compiler` gives other numbers.
    """

    code: int
    constants: int
    statics: int
    stack: int | None
    deepest: tuple[str, ...]
    unbounded: str = ""
    compiler: str = ""


@dataclass(frozen=True, slots=True)
class LayerCount:
    """What one layer executes, beside its multiply-accumulates and what its kernel's cost model said."""

    name: str
    kernel: str
    macs: int
    predicted: int
    executed: int

    @property
    def per_mac(self) -> float | None:
        """Executed for each multiply-accumulate, where there are any."""
        return self.executed / self.macs if self.macs else None


@dataclass(frozen=True, slots=True)
class Counts:
    """What one inference executes in an emulator, in `unit`s: instructions, or packets where they are issued so.

    Layers are in order; `entry` is what the function that calls them executes itself.
    """

    unit: str
    entry: int
    layers: tuple[LayerCount, ...]

    @property
    def total(self) -> int:
        """Everything from the first instruction of NAME_run to its last."""
        return self.entry + sum(layer.executed for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(layer.macs for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Way:
    """Another way to run what was emitted: `run` gives the outputs of at most `rows` rows, and what else was seen."""

    name: str
    rows: int
    run: Callable[[Codes], tuple[dict[str, Array], str]]


class Runner(Protocol):
    """A built program that can be run here, natively or in an emulator."""

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """Stored values that are rows of a value of the graph, by their own names."""
        ...

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        ...

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every stored value by name, rows first, from the trace build of the same sources; outputs too."""
        ...

    def count(self, feeds: Codes) -> Counts:
        """What one call executes, layer by layer; ToolchainMissing where nothing counts."""
        ...

    @property
    def ways(self) -> Sequence[Way]:
        """Other ways to run what was emitted that can be had here; none for a program."""
        ...


@runtime_checkable
class FloatRunner(Runner, Protocol):
    """A runner that computes with floats; `trace` gives the codes of what it rounds, which need not be the graph's."""

    @property
    def slack(self) -> Mapping[str, int]:
        """How many codes each value may be off where its layer reads the same codes, by the value's name."""
        ...


class Target(Protocol):
    """A family of chips."""

    @property
    def name(self) -> str:
        """What `--target` calls it."""
        ...

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        ...

    @property
    def cpus(self) -> Sequence[str]:
        """What `--cpu` takes; the first is the default."""
        ...

    @property
    def sanitizers(self) -> str:
        """What the sanitized build looks for; empty where there is none."""
        ...

    @property
    def fabric(self) -> bool:
        """Is what it emits a design of logic, not a program?"""
        ...

    @property
    def threads(self) -> bool:
        """Can several threads share a call of its programs?"""
        ...

    def lower(
        self,
        graph: Graph,
        *,
        name: str,
        cpu: str,
        vectors: Sequence[Codes],
        placement: Placement = ANYWHERE,
    ) -> Lowered:
        """Emit the program called `name` (a C identifier), with `vectors` (one row each) in its self-test; pure.

        Where no arrangement of its buffers fits the RAM that `placement` allows, it is the smallest there is.
        """
        ...

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build what `lower` emitted into `folder`, to be run here; ToolchainMissing says what to install."""
        ...

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate | None:
        """Build the objects and look for floating point in them; None where there are no objects."""
        ...

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint | None:
        """Build the objects and measure what they take of a chip; None where there are no objects."""
        ...

    def missing(self) -> Sequence[str]:
        """What building and running here still needs, a sentence each; empty when all is there."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A target whose layers can be measured on the machine that runs them, instead of predicted."""

    def machine(self) -> str:
        """Processor and compiler, on which the times of a layer depend."""
        ...

    def tune(
        self, graph: Graph, *, cpu: str, placement: Placement, known: Mapping[str, str]
    ) -> dict[str, str]:
        """The tile of every layer of which there are several kinds, by the layer's signature.

        Those that are `known` stay, all others are measured here; ToolchainMissing where they cannot be.
        """
        ...


_FAMILIES: Mapping[str, str] = {
    "x86": "x86",
    "arm": "arm",
    "cortex-m0": "mcu",
    "cortex-m3": "mcu",
    "cortex-m4": "mcu",
    "cortex-m7": "mcu",
    "cortex-m33": "mcu",
    "cortex-m55": "mcu",
    "hexagon": "hexagon",
    "hls": "hls",
    "tvm": "tvm",
    "onnx": "onnx",
    "qdq": "onnx",
}
"""Every target and the folder of its family."""

ALIASES: Mapping[str, str] = {"mcu": "cortex-m4", "dsp": "hexagon", "fpga": "hls"}
"""Other names that targets go by."""


def names() -> list[str]:
    """The targets there are."""
    return list(_FAMILIES)


def get(name: str) -> Target:
    """Return the target called `name`; BadInput with the nearest name otherwise."""
    name = ALIASES.get(name, name)
    if name not in _FAMILIES:
        from difflib import get_close_matches

        known = [*_FAMILIES, *ALIASES]
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise BadInput(f"there is no target '{name}'; {hint}targets: {', '.join(known)}")
    family = import_module(f"qcompile.targets.{_FAMILIES[name]}")
    found: Mapping[str, Target] = family.TARGETS
    return found[name]
