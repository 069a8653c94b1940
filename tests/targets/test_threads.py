"""Programs of several threads: the same results for any number of them, and no memory that two use at once."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from qcompile import target as families
from qcompile.errors import BadInput
from qcompile.ir import DType, Graph
from qcompile.job import Job
from qcompile.options import Options
from qcompile.target import Placement
from qcompile.targets.c import build, emit
from qcompile.targets.c.emit import fuse
from qcompile.targets.c.kernel import Step
from qcompile.targets.c.kernels import PORTABLE
from qcompile.targets.x86 import elementwise, isa, sweep
from qcompile.targets.x86.gemm import Gemm
from tests.native import check
from tests.targets import test_x86_depthwise as depthwises
from tests.targets import test_x86_elementwise as elements
from tests.targets import test_x86_pool as pools
from tests.targets.test_families import NAME, data, network, same
from tests.targets.test_x86_gemm import drawn, plain, way

RACES = ("-O1", "-g", "-fsanitize=thread", "-pthread")


@dataclass(frozen=True)
class Together(Gemm):
    """The kernel wherever it matches, and always by all threads."""

    def cost(self, step: Step) -> int:
        return 0

    def shares(self, step: Step) -> bool:
        return True


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_shared_layers_equal_the_graph(tmp_path: Path, threads: int) -> None:
    here = way("words")
    kernels = (Together(here.isa, threads), *PORTABLE)
    graphs = [*map(drawn, range(40, 46))]
    check(graphs, tmp_path, compiler=here.compiler, kernels=kernels, threads=threads)


def tall(seed: int) -> Graph:
    """Windows on an image of many rows: every thread has two rows of tiles or more, mostly."""
    maker = pools.Pools(seed)
    x = maker.input(DType.I8, (int(maker.one(1, 2)), 47, 6, int(maker.one(8, 24, 70))))
    return maker.done(
        *(maker.layer(x, DType.I8) for _ in range(4)), *(maker.largest(x) for _ in range(2))
    )


@pytest.mark.parametrize("threads", [2, 3])
def test_shared_rows_and_elements_equal_the_graph_and_do_not_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(sweep, "_WORTH", 1)
    monkeypatch.setattr(elementwise, "_WORTH", 1)
    here = plain(isa.AVX512_VNNI)
    kernels = [
        kernel(here.isa, threads) for kernel in (depthwises.Chosen, pools.Chosen, elements.Chosen)
    ]
    graphs = [
        *map(tall, range(3)),
        *map(depthwises.chain, range(2)),
        *map(elements.chain, range(3)),
        elements.drawn(5),
    ]
    compiler = (*here.compiler, *RACES)
    check(graphs, tmp_path, compiler=compiler, kernels=(*kernels, *PORTABLE), threads=threads)
    shared = [
        sum(k.matches(step) and k.shares(step) for g in graphs for step in fuse(g)) for k in kernels
    ]
    assert min(shared) >= 3, shared


def raced(folder: Path, *, fault: str = "") -> str:
    """What the race detector says of a run of a small network by two threads; `fault` is taken out of the program."""
    here = plain(isa.AVX512_VNNI)
    kernels = (Together(here.isa, 2), *PORTABLE)
    lowered = emit.lower(
        network(),
        name=NAME,
        isa="test",
        vectors=(),
        kernels=kernels,
        placement=Placement(threads=2),
    )
    around = build.support_files(network(), name=NAME, family="x86", flags=())
    for name, content in {**around, **lowered.files}.items():
        (folder / name).write_bytes(content)
    source = (folder / "model.c").read_text()
    assert source.count(fault) or not fault
    (folder / "model.c").write_text(source.replace(fault, "") if fault else source)
    command = [
        *here.compiler,
        *RACES,
        "-std=c99",
        "model.c",
        "runner.c",
        "host_posix.c",
        "-o",
        "run",
    ]
    subprocess.run(command, cwd=folder, check=True)
    feeds = np.concatenate([x.reshape(4, -1) for x in data(4).values()], axis=1).tobytes()
    ran = subprocess.run([folder / "run"], input=feeds, capture_output=True, check=False)
    golden = network().run(data(4))
    if not fault:
        assert ran.returncode == 0
        assert ran.stdout == b"".join(row.tobytes() for x in golden.values() for row in x)
    return ran.stderr.decode()


def test_no_memory_is_used_by_two_threads_at_once(tmp_path: Path) -> None:
    assert raced(tmp_path) == ""


def test_a_meeting_left_out_is_found(tmp_path: Path) -> None:
    assert "data race" in raced(tmp_path, fault="meet();")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_what_the_graph_gives(tmp_path: Path, threads: int) -> None:
    x86, g = families.get("x86"), network()
    place = Placement(threads=threads)
    lowered = x86.lower(g, name=NAME, cpu="native", vectors=(), placement=place)
    for name, content in lowered.files.items():
        (tmp_path / name).write_bytes(content)
    runner = x86.runner(tmp_path, g, name=NAME, cpu="native")
    assert ("threads.h" in lowered.files) is (threads > 1)
    for rows in (1, 9, 2):
        assert same(runner.run(data(rows)), g.run(data(rows)))
    traced = runner.trace(data(3))
    assert np.array_equal(traced["<script>"], g.run(data(3))["<script>"])


def test_nothing_is_allocated_but_threads(tmp_path: Path) -> None:
    place = Placement(threads=2)
    lowered = families.get("x86").lower(
        network(), name=NAME, cpu="avx2", vectors=(), placement=place
    )
    for name, content in lowered.files.items():
        (tmp_path / name).write_bytes(content)
    command = ["gcc", "-std=c99", "-O2", *isa.AVX2.flags, "-c", "model.c", "-o", "model.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with (tmp_path / "model.o").open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        wanted = {s.name for s in table.iter_symbols() if s["st_shndx"] == "SHN_UNDEF"} - {""}
    assert all(n.startswith(("pthread_", "sched_yield", "mem", "_GLOBAL_OFFSET")) for n in wanted)


def test_portable_code_has_one_thread() -> None:
    with pytest.raises(
        BadInput, match=r"--threads needs vectors.*choose one of avx512vnni, avxvnni, avx2"
    ):
        families.get("x86").lower(
            network(), name=NAME, cpu="generic", vectors=(), placement=Placement(threads=2)
        )


@pytest.mark.parametrize("family", ["arm", "cortex-m4", "hexagon", "hls", "onnx", "tvm"])
def test_other_targets_have_one_thread(family: str) -> None:
    with pytest.raises(BadInput, match=rf"--threads is not for {family}"):
        Job.checked("model.onnx", family, "fast", None, {}, Options(threads=2))
