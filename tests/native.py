"""Many emitted programs in one executable: every stored value against the interpreter."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qcompile.ir import Array, Graph
from qcompile.ir.text import dump
from qcompile.target import Lowered, Placement
from qcompile.targets.c.emit import lower
from qcompile.targets.c.kernel import Kernel
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.c.text import HERE
from tests.strategies import feeds

WARNINGS = (
    "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wundef", "-Werror",
)  # fmt: skip
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ZIG = (sys.executable, "-m", "ziglang", "cc")
_OUTPUT = 0x80000000

_CASE = """
#include "{n}/model.h"
#include "{n}/vectors.h"
static uint8_t {n}_arena[{N}_ARENA_BYTES] __attribute__((aligned({N}_ARENA_ALIGN)));
{outputs}
void {n}_trace(uint32_t id, const void *data, uint32_t bytes) {{ frame({at}, id, data, bytes); }}
static int {n}_case(void) {{
    for (uint32_t v = 0; v < {N}_VECTORS; ++v) {{
        memset({n}_arena, 0xA5, sizeof {n}_arena);
        if ({n}_run({arguments}, {n}_arena) != 0) return 3;
        {compare}
    }}
    return 0;
}}
"""

_HEAD = """
#include "host.h"
#include <stdint.h>
#include <string.h>
static void frame(uint32_t at, uint32_t id, const void *data, uint32_t bytes) {
    const uint32_t head[3] = {at, id, bytes};
    (void)host_write(head, sizeof head);
    (void)host_write(data, bytes);
}
"""


def check(
    graphs: Sequence[Graph],
    folder: Path,
    *,
    compiler: Sequence[str] = ("gcc", *SANITIZED),
    warnings: Sequence[str] = WARNINGS,
    link: Sequence[str] = (),
    kernels: Sequence[Kernel] = PORTABLE,
    host: str | Path = "host_posix.c",
    emulator: Sequence[str] = (),
    seed: int = 0,
    threads: int = 1,
) -> list[str]:
    """Build and run; AssertionError names the first graph and value that differ. Gives the kernels that were used."""
    main, programs, vectors = [_HEAD], [], []
    for at, graph in enumerate(graphs):
        n = f"case{at}"
        vectors.append(feeds(graph, seed + at))
        place = Placement(threads=threads)
        lowered = lower(
            graph, name=n, isa="test", vectors=vectors[-1], kernels=kernels, placement=place
        )
        programs.append(lowered)
        (folder / n).mkdir()
        for path, data in lowered.files.items():
            (folder / n / path).write_bytes(data)
        main.append(_case(graph, n, at))
    calls = " ".join(
        f"if (case{at}_case() != 0) return {at % 250 + 1};" for at in range(len(graphs))
    )
    main.append(f"int main(void) {{ {calls} return 0; }}")
    for source in ("host.h", "host_bare.h", "host_linux.h", host):
        (folder / Path(source).name).write_bytes((HERE / source).read_bytes())
    (folder / "main.c").write_text("".join(main))

    def build(*arguments: str) -> None:
        command = [*compiler, *arguments]
        built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr[:4000]

    objects = {f"case{at}.o": [*warnings, f"-DCASE{at}_TRACE", f"case{at}/model.c"]
               for at in range(len(graphs))}  # fmt: skip
    objects |= {"main.o": ["main.c"], "host.o": [Path(host).name]}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: build(*objects[name], "-c", "-o", name), objects))
    build(*objects, *link, "-o", "program")
    ran = subprocess.run(
        [*emulator, str(folder / "program")],
        cwd=folder, capture_output=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    _compare(graphs, programs, vectors, ran.stdout)
    where = f"graph {ran.returncode - 1}:\n{dump(graphs[min(ran.returncode, len(graphs)) - 1])}"
    assert ran.returncode == 0, ran.stderr.decode(errors="replace")[:3000] + where
    return [layer.kernel for program in programs for layer in program.layers]


def _case(graph: Graph, n: str, at: int) -> str:
    outputs, compare, arguments = [], [], []
    for i in range(len(graph.inputs)):
        arguments.append(f"{n}_vector_input_{i}[v]")
    for i, (_, v) in enumerate(graph.outputs):
        kind = f"{'' if v.type.dtype.signed else 'u'}int{v.type.dtype.bytes * 8}_t"
        out, size = f"{n}_output{i}", f"{n.upper()}_OUTPUT_{i}_BYTES"
        outputs.append(f"static {kind} {out}[{n.upper()}_OUTPUT_{i}_SIZE];")
        compare.append(f"frame({at}, {_OUTPUT + i}u, {out}, {size});")
        compare.append(f"for (uint32_t i = 0; i < {n.upper()}_OUTPUT_{i}_SIZE; ++i)")
        compare.append(f"if ({out}[i] != {n}_vector_output_{i}[v][i]) return 1;")
        arguments.append(out)
    return _CASE.format(
        n=n, N=n.upper(), at=at, outputs="\n".join(outputs), compare="\n".join(compare),
        arguments=", ".join(arguments),
    )  # fmt: skip


def _compare(
    graphs: Sequence[Graph],
    programs: Sequence[Lowered],
    vectors: Sequence[Sequence[dict[str, Array]]],
    trace: bytes,
) -> None:
    frames: dict[tuple[int, int], list[bytes]] = {}
    at = 0
    while at < len(trace):
        case, value, size = struct.unpack_from("<III", trace, at)
        frames.setdefault((case, value), []).append(trace[at + 12 : at + 12 + size])
        at += 12 + size
    for case, graph in enumerate(graphs):
        stored = programs[case].stored
        for turn, row in enumerate(vectors[case]):
            seen: dict[str, Array] = {}
            results = graph.run(row, on_value=lambda v, a, seen=seen: seen.update({v.name: a}))
            wanted = [(stored[name], name, a) for name, a in seen.items() if name in stored]
            wanted += [
                (_OUTPUT + i, p.name, results[p.name]) for i, (p, _) in enumerate(graph.outputs)
            ]
            for value, name, array in wanted:
                got = frames.get((case, value), [])
                assert len(got) > turn, f"graph {case} stopped before {name}:\n{dump(graph)}"
                assert got[turn] == array.tobytes(), (
                    f"graph {case}, vector {turn}, value {name}:\n{dump(graph)}"
                )
