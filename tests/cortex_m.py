"""Kernels for cores with the DSP extension, run in qemu-system-arm: what their tests have in common."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from qcompile.ir import Graph
from qcompile.target import LayerCount
from qcompile.targets import mcu
from qcompile.targets.c.kernel import Kernel
from qcompile.targets.c.text import render
from qcompile.targets.mcu.dsp import KERNELS, Dense, Pixels
from qcompile.targets.mcu.dsp_depthwise import Channels
from qcompile.targets.mcu.dsp_elementwise import Bytes
from qcompile.targets.mcu.dsp_pool import Largest, Mean
from tests.native import ZIG, check
from tests.strategies import feeds

Fault = tuple[str, str, Graph]
"""What stands in a header, what is put in its place, and a graph that must notice."""

CORE = mcu._FAMILIES["cortex-m4"]["cortex-m4"]
LANGUAGE = ("-O2", "-fno-stack-protector", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables")
COMPILERS = {
    "zig": (*ZIG, *CORE.zig, *LANGUAGE),
    "gcc": ("arm-none-eabi-gcc", *CORE.gcc, CORE.float_abi, *LANGUAGE),
}

# A batch is one build, so shrinking would build for minutes; a failure prints the one graph.
BATCHES = settings(
    deadline=None,
    derandomize=True,
    max_examples=3,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def run(
    graphs: Sequence[Graph], *, compiler: str = "zig", kernels: Sequence[Kernel] = KERNELS
) -> list[str]:
    """Build for a Cortex-M4 and compare every stored value; gives the kernels that were used."""
    machine = CORE.machine
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "emulator.ld")
        script.write_text(
            render(
                "emulator.ld.j2",
                Path(mcu.__file__).parent,
                machine=machine.name,
                rom=machine.rom,
                constants=machine.constants,
                ram=machine.ram,
                weights_section="",
                arena_section="",
            )
        )
        # the cases around the programs want a header that a bare compiler does not bring
        Path(folder, "include").mkdir()
        Path(folder, "include", "string.h").write_text(
            "#include <stddef.h>\nvoid *memcpy(void *, const void *, size_t);\n"
            "void *memset(void *, int, size_t);\n"
        )
        libraries = ("-nostdlib",) if compiler == "zig" else ("-nostartfiles", "-nolibc")
        return check(
            graphs,
            Path(folder),
            compiler=(*COMPILERS[compiler], "-isystem", "include"),
            link=(*libraries, "-static", "-Wl,--entry=reset", "-T", str(script)),
            kernels=kernels,
            host=Path(mcu.__file__).with_name("host_cortex_m.c"),
            emulator=mcu.emulator(machine),
        )


def notices(fault: Fault, header: Path, folder: Path, kernels: Sequence[Kernel] = KERNELS) -> None:
    """The graph's values differ once the header is wrong."""
    right, wrong, graph = fault
    text = header.read_text()
    assert right in text
    broken = folder / header.name
    broken.write_text("".join(line.replace(right, wrong) for line in text.splitlines(True)))
    wrongs = [
        replace(k, includes=tuple(broken if h == header else h for h in k.includes))
        if isinstance(k, Pixels | Dense | Channels | Bytes | Largest | Mean)
        else k
        for k in kernels
    ]
    with pytest.raises(AssertionError, match="graph 0"):
        run([graph], kernels=wrongs)


def counted(graph: Graph, folder: Path) -> LayerCount:
    """What the one layer of a graph executes."""
    target = mcu.TARGETS["cortex-m4"]
    lowered = target.lower(graph, name="net", cpu="cortex-m4", vectors=[])
    for path, data in lowered.files.items():
        (folder / path).write_bytes(data)
    program = target.runner(folder, graph, name="net", cpu="cortex-m4")
    (layer,) = program.count(feeds(graph, 0, 1)[0]).layers
    return layer
