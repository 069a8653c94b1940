"""Large constants in a file of their own: the same program, and no build takes another file for it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompile import target as families
from qcompile.errors import BadInput
from qcompile.ir import Array, DType, Graph, MatMul, Port, Rescale, TensorType, arith
from qcompile.target import Lowered, Placement
from qcompile.targets.c import binary, build
from qcompile.targets.c.text import numbers
from tests.targets.test_families import STRICT, ZIG, ZIG_FOR_ARM, make, same

NAME = "net"
FILES = {"weights.bin", "weights.S", "weights.sha256"}
PLACES = [("x86", "generic"), ("arm", "cortex-a53")]


def network(sizes: Sequence[int] = (1100, 1000, 72, 10)) -> Graph:
    """Dense layers: with these sizes one array of 1.05 MiB, one of 70 KiB and small ones."""
    rng = np.random.default_rng(1)
    g = Graph(NAME)
    y = g.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, sizes[0])))
    for i, (k, n) in enumerate(pairwise(sizes)):
        w = rng.integers(-127, 128, (n, k)).astype(np.int8)
        b = rng.integers(-1000, 1000, n).astype(np.int32)
        acc = g.add(
            MatMul(),
            y,
            g.constant(w, TensorType(DType.I8, w.shape), f"w{i}"),
            g.constant(b, TensorType(DType.I32, b.shape), f"b{i}"),
            name=f"acc{i}",
        )
        # the standard deviation of a sum becomes 40 codes or so
        step = Fraction(1, 90 * int(k**0.5))
        fit = arith.fit_rescale([arith.AccOperand((step,), (1 << 25,))], [], bits=16)
        op = Rescale(fit.accs, fit.vals, fit.f, 0, -128, 127, DType.I8)
        y = g.add(op, acc, name=f"dense{i}")
    g.add_output(Port("y", 0.1, 0), y)
    g.verify()
    return g


def feeds(rows: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(rows).integers(-128, 128, (rows, 1100)).astype(np.int8)}


def lowered(family: str, cpu: str, name: str = NAME, **place: str) -> Lowered:
    vectors = [{k: v[i : i + 1] for k, v in feeds(2).items()} for i in range(2)]
    return families.get(family).lower(
        network(), name=name, cpu=cpu, vectors=vectors, placement=Placement(**place)
    )


def emitted(folder: Path, family: str = "x86", cpu: str = "generic", **place: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in lowered(family, cpu, **place).files.items():
        (folder / name).write_bytes(content)
    return folder


def constants(files: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
    """What weights.S takes: offset and bytes by name."""
    found = re.findall(r"^ +constant (\w+), (\d+), (\d+)$", files["weights.S"].decode(), re.M)
    return {name: (int(at), int(size)) for name, at, size in found}


@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    st.sampled_from([np.int8, np.uint8, np.int16, np.int32]),
    st.sampled_from([1, 2, 19, 20, 21, 40, 333]),
    st.integers(0, 1 << 30),
    st.integers(0, 31),
)
@example(np.int32, 40, 0, 0)
def test_numbers_are_written_as_python_writes_them(
    kind: type[np.signedinteger], size: int, seed: int, shift: int
) -> None:
    limits = np.iinfo(kind)
    rng = np.random.default_rng(seed)
    data = (rng.integers(limits.min, limits.max, size, endpoint=True) >> shift).astype(kind)
    data[:2] = (limits.max, limits.min if seed % 3 == 0 else 0)[: data[:2].size]
    words = ["(-2147483647 - 1)" if n == -(1 << 31) else str(n) for n in data.tolist()]
    lines = [", ".join(words[i : i + 20]) for i in range(0, size, 20)]
    assert numbers(data) == ",\n".join(lines)


def test_long_arrays_are_written_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(-128, 128, 1000).astype(np.int8)
    whole = numbers(data)
    monkeypatch.setattr("qcompile.targets.c.text._AT_ONCE", 60)
    assert numbers(data) == whole


@pytest.mark.parametrize(("family", "cpu"), PLACES)
def test_large_constants_are_in_the_binary_and_no_others(family: str, cpu: str) -> None:
    files = lowered(family, cpu).files
    assert files.keys() >= FILES
    assert files == lowered(family, cpu).files
    content, found = files["weights.bin"], constants(files)
    digest = hashlib.sha256(content).hexdigest()
    assert files["weights.sha256"].decode() == f"{digest}  weights.bin\n"
    assert all(at % 64 == 0 and size >= 1 << 16 for at, size in found.values())
    ends = [at + size + -size % 64 for at, size in found.values()]
    assert [0, *ends[:-1]] == [at for at, _ in found.values()]
    assert ends[-1] == len(content)
    header = files["weights.h"].decode()
    declared = re.findall(r"^NET_APART const \w+ (\w+)\[\d+\];$", header, re.M)
    assert declared == list(found)
    assert len(found) == 2
    assert all(name.startswith("net_layer_") for name in found)
    assert len(header) < 60_000
    other = lowered(family, cpu, name="other").files
    assert not constants(other).keys() & found.keys()


def test_small_models_and_firmware_keep_their_initialisers() -> None:
    small = network((1100, 900, 40, 10))
    assert sum(v.type.bytes for v in small.constants()) < 1 << 20
    made = families.get("x86").lower(small, name=NAME, cpu="generic", vectors=())
    assert not FILES & made.files.keys()
    assert b"weights.S" not in made.files["Makefile"] + made.files["CMakeLists.txt"]
    for family in ("cortex-m4", "hexagon"):
        target = families.get(family)
        made = target.lower(network(), name=NAME, cpu=target.cpus[0], vectors=())
        assert not FILES & made.files.keys()
        assert len(made.files["weights.h"]) > 2_000_000


@pytest.mark.parametrize(("family", "cpu"), PLACES)
@pytest.mark.parametrize("sanitize", [False, True], ids=["shipped", "sanitized"])
def test_the_program_equals_the_graph(
    tmp_path: Path, family: str, cpu: str, sanitize: bool
) -> None:
    g, codes = network(), feeds(5)
    folder = emitted(tmp_path / "out", family, cpu)
    runner = families.get(family).runner(folder, g, name=NAME, cpu=cpu, sanitize=sanitize)
    golden = g.run(codes)
    assert same(runner.run(codes), golden)
    if not sanitize:
        traced = runner.trace(codes)
        assert np.array_equal(traced["dense2"], golden["y"])


@pytest.mark.parametrize(("family", "cpu"), PLACES)
def test_what_was_built_is_measured_whole(tmp_path: Path, family: str, cpu: str) -> None:
    target, made = families.get(family), lowered(family, cpu)
    folder = emitted(tmp_path / "out", family, cpu)
    taken = target.footprint(folder, name=NAME, cpu=cpu)
    assert taken is not None
    assert made.weight_bytes <= taken.constants < made.weight_bytes + 8192
    assert taken.stack is not None, taken.unbounded
    assert taken.stack < 16384
    certificate = target.certify(folder, name=NAME, cpu=cpu)
    assert certificate is not None
    assert certificate.clean


OTHERS = {
    "flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "short": lambda data: data[:-64],
    "long": lambda data: data + bytes(64),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("how", OTHERS)
def test_no_build_takes_another_binary(tmp_path: Path, how: str) -> None:
    folder = emitted(tmp_path / "out")
    good = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(OTHERS[how](good))
    with pytest.raises(BadInput, match=r"weights\.bin is damaged or another network's"):
        families.get("x86").runner(folder, network(), name=NAME, cpu="generic")
    done = run_make(folder, "weights.o")
    assert done.returncode != 0
    assert "weights.bin: FAILED" in done.stdout
    assert not (folder / "weights.o").exists()
    done = configure(folder)
    assert done.returncode != 0
    assert "weights.bin is damaged or another network's" in done.stderr
    (folder / "weights.bin").unlink()
    with pytest.raises(BadInput, match=r"is not what qcompile wrote: .*weights\.bin"):
        families.get("x86").runner(folder, network(), name=NAME, cpu="generic")


def test_a_binary_that_changed_with_its_digest_is_built_anew(tmp_path: Path) -> None:
    """The cache of builds and the compiler's own see the content, not the name."""
    folder = emitted(tmp_path / "out")
    golden = network().run(feeds(3))

    def results() -> dict[str, Array]:
        runner = families.get("x86").runner(folder, network(), name=NAME, cpu="generic")
        return runner.run(feeds(3))

    assert same(results(), golden)
    content = bytearray((folder / "weights.bin").read_bytes())
    at, size = list(constants({"weights.S": (folder / "weights.S").read_bytes()}).values())[-1]
    content[at : at + size] = bytes(size)
    (folder / "weights.bin").write_bytes(content)
    (folder / "weights.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  weights.bin\n")
    assert not same(results(), golden)


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def configure(folder: Path) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(folder / "made", ignore_errors=True)
    command = ["cmake", "-S", str(folder), "-B", str(folder / "made")]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("family", "cpu", "options"), [("x86", "generic", ()), ("arm", "cortex-a53", ZIG_FOR_ARM)]
)
def test_make_builds_without_a_warning_and_the_self_test_passes(
    tmp_path: Path, family: str, cpu: str, options: Sequence[str]
) -> None:
    folder = emitted(tmp_path / "out", family, cpu)
    out = make(folder, *options, f"CFLAGS={STRICT}", "test")
    assert "weights.bin: OK" in out
    assert "net: 2 vectors, 0 mismatches" in out.splitlines()


def test_cmake_builds_elsewhere_and_looks_again_when_the_binary_changes(tmp_path: Path) -> None:
    folder = emitted(tmp_path / "out")
    done = configure(folder)
    assert done.returncode == 0, done.stderr
    build_ = ["cmake", "--build", str(folder / "made")]
    done = subprocess.run(build_, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = ["ctest", "--test-dir", str(folder / "made"), "--output-on-failure"]
    done = subprocess.run(tests, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    content = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(OTHERS["flipped"](content))
    done = subprocess.run(build_, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    assert "weights.bin is damaged or another network's" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("platform", "prefix"),
    [("x86_64-macos", b"_"), ("aarch64-macos", b"_"), ("x86_64-windows-gnu", b"")],
)
def test_other_object_formats_take_it_too(tmp_path: Path, platform: str, prefix: bytes) -> None:
    """Mach-O and COFF by clang: the names as that platform's C has them, and all the bytes."""
    folder = emitted(tmp_path / "out")
    command = [*ZIG.split(), "cc", "-target", platform, "-c", "weights.S", "-o", "weights.o"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = (folder / "weights.o").read_bytes()
    assert (folder / "weights.bin").read_bytes()[: 1 << 20] in made
    for name in constants({"weights.S": (folder / "weights.S").read_bytes()}):
        assert prefix + name.encode() in made


def test_a_section_of_its_own_holds_all_constants(tmp_path: Path) -> None:
    folder = emitted(tmp_path / "out", weights_section=".model_weights")
    toolchain = build.Toolchain(build.find("gcc", "cc") or (sys.executable,), ("-fPIC",))
    made = build.Build(folder, NAME, toolchain)
    held = 0
    for path in (made.model, *made.constants):
        with path.open("rb") as file:
            section = ELFFile(file).get_section_by_name(".model_weights")
            assert section is not None
            assert section["sh_flags"] == 2, "allocated, neither written nor executed"
            held += section["sh_size"]
    # compilers fold small arrays into the code
    assert held > lowered("x86", "generic").weight_bytes - 4096


def test_the_stack_of_a_program_stays_out_of_reach_of_code(tmp_path: Path) -> None:
    folder = emitted(tmp_path / "out")
    toolchain = build.Toolchain(build.find("gcc", "cc") or (sys.executable,), ("-fPIC",))
    library = build.Build(folder, NAME, toolchain).library
    with library.open("rb") as file:
        elf = ELFFile(file)
        (stack,) = (s for s in elf.iter_segments() if s["p_type"] == "PT_GNU_STACK")
        assert not stack["p_flags"] & 1
        symbols = elf.get_section_by_name(".dynsym")
        exported = {s.name for s in symbols.iter_symbols() if s["st_shndx"] != "SHN_UNDEF"}
        assert not elf.get_section_by_name(".rela.dyn") or "net_run" in exported
    assert not any("layer" in name for name in exported)


def test_the_threshold_counts_all_constants_and_then_each() -> None:
    assert binary.threshold(network()) == 1 << 16
    assert binary.threshold(network((1100, 900, 40, 10))) is None


def test_zig_takes_the_binary_from_another_folder(tmp_path: Path) -> None:
    folder = emitted(tmp_path / "out")
    zig = build.find_zig()
    assert zig is not None
    toolchain = build.Toolchain(zig, ("-mcpu=x86_64", "-fPIC"), shared=("-shared", "-nostdlib"))
    made = build.Build(folder, NAME, toolchain)
    (first,) = made.constants
    assert (folder / "weights.bin").read_bytes() in first.read_bytes()
    assert replace(made, options=("-g",)).library.is_file()
