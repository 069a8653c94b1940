"""Arm Cortex-M: C for firmware without an operating system, run in qemu-system-arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.errors import BadInput, ToolchainMissing
from qcompile.ir import Graph
from qcompile.target import (
    ANYWHERE,
    Codes,
    FloatCertificate,
    Footprint,
    Lowered,
    Placement,
    Runner,
    Target,
)

from ..c import build, certify, emit, footprint, run
from ..c.kernel import Kernel
from ..c.kernels import PORTABLE
from . import dsp, mve

_HERE = Path(__file__).parent
_HOST = "host_cortex_m.c"
_SCRIPT = "emulator.ld"
_FILES = (_HOST, f"{_SCRIPT}.j2", "Makefile.j2", "CMakeLists.txt.j2", "main.c.j2")
_GET_COMPILER = (
    "install one: pip install 'qcompile[toolchain]', or apt-get install gcc-arm-none-eabi"
    " libnewlib-arm-none-eabi"
)
_GET_QEMU = "install the emulator: apt-get install qemu-system-arm"


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of a machine's memory, in bytes."""

    origin: int
    size: int

    @property
    def hex(self) -> str:
        """Where it begins."""
        return f"{self.origin:#010x}"

    @property
    def kib(self) -> int:
        """How large it is."""
        return self.size >> 10


_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """One of QEMU's boards: code, constants and data memory."""

    name: str
    rom: Region
    constants: Region
    ram: Region


def _mps2(board: str) -> Machine:
    return Machine(
        f"mps2-{board}",
        Region(0, 2 * _MIB),
        Region(2 * _MIB, 2 * _MIB),
        Region(0x20000000, 4 * _MIB),
    )


@dataclass(frozen=True, slots=True)
class Core:
    """A core with the kernels made for it, its flags for gcc and for zig, and the board that runs it here."""

    summary: str
    isa: str
    kernels: Sequence[Kernel]
    gcc: tuple[str, ...]
    float_abi: str
    zig: tuple[str, ...]
    machine: Machine


_SOFT = "-mfloat-abi=soft"
_AN505 = Machine(
    "mps2-an505",
    Region(0x10000000, 2 * _MIB),
    Region(0x10200000, 2 * _MIB),
    Region(0x38000000, 4 * _MIB),
)
# Its code memory holds half a MiB; constants of any network fit the DRAM.
_AN547 = Machine(
    "mps3-an547",
    Region(0, _MIB // 2),
    Region(0x60000000, 64 * _MIB),
    Region(0x21000000, 4 * _MIB),
)


def _core(
    summary: str,
    isa: str,
    kernels: Sequence[Kernel],
    gcc: str,
    zig: str,
    machine: Machine,
    float_abi: str = _SOFT,
) -> Core:
    abi = "eabihf" if float_abi.endswith("hard") else "eabi"
    return Core(
        summary,
        isa,
        kernels,
        (f"-mcpu={gcc}", "-mthumb"),
        float_abi,
        ("-target", f"thumb-freestanding-{abi}", f"-mcpu={zig}"),
        machine,
    )


_FAMILIES: Mapping[str, Mapping[str, Core]] = {
    "cortex-m0": {
        "cortex-m0": _core("Armv6-M", "portable", PORTABLE, "cortex-m0", "cortex_m0", _mps2("an385")),
        "cortex-m0plus": _core(
            "Armv6-M", "portable", PORTABLE, "cortex-m0plus", "cortex_m0plus", _mps2("an385")
        ),
    },
    "cortex-m3": {
        "cortex-m3": _core("Armv7-M", "portable", PORTABLE, "cortex-m3", "cortex_m3", _mps2("an385")),
    },
    "cortex-m4": {
        "cortex-m4": _core("DSP extension", "dsp", dsp.KERNELS, "cortex-m4", "cortex_m4", _mps2("an386")),
    },
    "cortex-m7": {
        "cortex-m7": _core("DSP extension", "dsp", dsp.KERNELS, "cortex-m7", "cortex_m7", _mps2("an500")),
    },
    "cortex-m33": {
        "cortex-m33": _core("DSP extension", "dsp", dsp.KERNELS, "cortex-m33", "cortex_m33+dsp", _AN505),
        "cortex-m33+nodsp": _core(
            "Armv8-M", "portable", PORTABLE, "cortex-m33+nodsp", "cortex_m33-dsp", _AN505
        ),
    },
    "cortex-m55": {
        "cortex-m55": _core(
            "Helium", "mve", mve.KERNELS, "cortex-m55", "cortex_m55+mve", _AN547, "-mfloat-abi=hard"
        ),
        "cortex-m55+nomve": _core(
            "DSP extension", "dsp", dsp.KERNELS, "cortex-m55+nomve", "cortex_m55-mve", _AN547
        ),
    },
}  # fmt: skip

_LANGUAGE = (
    "-std=c99",
    "-O2",
    "-ffunction-sections",
    "-fno-stack-protector",
    "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables",
)


@dataclass(frozen=True)
class CortexM:
    """C99 for one Cortex-M core, with the kernels of its extensions; programs bring start-up code and no C library."""

    name: str
    sanitizers: str = "undefined behaviour, by traps"
    fabric: bool = False
    threads: bool = False

    @property
    def summary(self) -> str:
        """What it is, in a line."""
        core = self._core(self.cpus[0])
        return f"C99 for {self.name} ({core.summary}), run in qemu-system-arm"

    @property
    def cpus(self) -> Sequence[str]:
        """Variants of the core; the first is the default."""
        return tuple(_FAMILIES[self.name])

    def _core(self, cpu: str) -> Core:
        cores = _FAMILIES[self.name]
        if cpu not in cores:
            raise BadInput(f"{self.name} knows no cpu '{cpu}'; choose one of {', '.join(cores)}")
        return cores[cpu]

    def lower(
        self,
        graph: Graph,
        *,
        name: str,
        cpu: str,
        vectors: Sequence[Codes],
        placement: Placement = ANYWHERE,
    ) -> Lowered:
        """Emit the program; pure."""
        core = self._core(cpu)
        model = emit.lower(
            graph,
            name=name,
            isa=core.isa,
            vectors=vectors,
            kernels=core.kernels,
            placement=placement,
        )
        around = build.support_files(
            graph,
            name=name,
            family=self.name,
            flags=core.gcc,
            own=[*(_HERE / f for f in _FILES), *build.BARE],
            without=("bench.c", "profile.c", "host_posix.c"),
            facts={
                "float_abi": core.float_abi,
                "zig": core.zig,
                "zig_link": " ".join(_no_library(core)),
                "machine": core.machine.name,
                "rom": core.machine.rom,
                "constants": core.machine.constants,
                "ram": core.machine.ram,
                "weights_section": placement.weights_section,
                "arena_section": placement.arena_section,
            },
        )
        return replace(model, files={**model.files, **around})

    def _toolchain(self, cpu: str, folder: Path, sanitize: bool = False) -> build.Toolchain:
        """A compiler for `cpu`, whose programs are linked as the emulator's board wants them."""
        core = self._core(cpu)
        link = ("-static", "-Wl,--entry=reset", "-T", str(folder.resolve() / _SCRIPT))
        if (zig := build.find_zig()) is not None:
            return build.Toolchain(
                (*zig, *core.zig),
                (),
                (*_no_library(core, sanitize), *link),
                host=_HOST,
                language=_LANGUAGE,
            )
        if (gcc := build.find("arm-none-eabi-gcc")) is not None:
            return build.Toolchain(
                gcc,
                (*core.gcc, core.float_abi),
                (*core.gcc, core.float_abi, "-nostartfiles", "-nolibc", *link),
                host=_HOST,
                language=_LANGUAGE,
            )
        raise ToolchainMissing(f"{self.name} has no compiler here: {_GET_COMPILER}")

    def _emulator(self, cpu: str) -> tuple[str, ...]:
        return emulator(self._core(cpu).machine)

    def runner(
        self, folder: Path, graph: Graph, *, name: str, cpu: str, sanitize: bool = False
    ) -> Runner:
        """Build a program for the emulator's board; with `sanitize`, one that traps at undefined behaviour."""
        toolchain = replace(self._toolchain(cpu, folder, sanitize), emulator=self._emulator(cpu))

        options = build.TRAP if sanitize else ()
        return run.Program(build.Build(folder, name, toolchain, options), graph)

    def certify(self, folder: Path, *, name: str, cpu: str) -> FloatCertificate:
        """Build the model's object and look for floating point in it."""
        model = build.Build(folder, name, self._toolchain(cpu, folder)).model
        return certify.inspect(model.read_bytes(), "model.o")

    def footprint(self, folder: Path, *, name: str, cpu: str) -> Footprint:
        """Build the model's object and measure it."""
        return footprint.footprint(build.Build(folder, name, self._toolchain(cpu, folder)))

    def missing(self) -> Sequence[str]:
        """What building and running here still needs."""
        cpu = self.cpus[0]
        lacks: list[str] = []
        for find in (lambda: self._toolchain(cpu, Path()), lambda: self._emulator(cpu)):
            try:
                find()
            except ToolchainMissing as lack:
                lacks.append(str(lack))
        return lacks


def _no_library(core: Core, sanitize: bool = False) -> tuple[str, ...]:
    """Zig's flags for a program without a C library, and where nothing calls it without the compiler's own either.

    Armv6-M multiplies 64 bits there, and code that is not optimised much may divide.
    """
    return ("-nostartfiles",) if sanitize or core.summary == "Armv6-M" else ("-nostdlib",)


def emulator(machine: Machine) -> tuple[str, ...]:
    """The command that runs a program on one of QEMU's boards: it reads standard input and writes standard output."""
    found = build.find("qemu-system-arm")
    if found is None:
        raise ToolchainMissing(f"Cortex-M programs cannot run here: {_GET_QEMU}")
    return (
        *found, "-M", machine.name, "-display", "none", "-serial", "none", "-monitor", "none",
        "-chardev", "file,id=console,path=/dev/stdout",
        "-semihosting-config", "enable=on,target=native,chardev=console,arg=model,arg=/dev/stdin",
        "-kernel",
    )  # fmt: skip


TARGETS: Mapping[str, Target] = {name: CortexM(name) for name in _FAMILIES}
"""What this family offers."""
