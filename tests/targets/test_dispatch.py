"""One artifact for several processors: which program is called where, and that every one equals the graph."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcompile import bench
from qcompile import target as families
from qcompile.cli import processor
from qcompile.errors import BadInput
from qcompile.ir import Array
from qcompile.job import Job
from qcompile.options import Options
from qcompile.target import Placement
from qcompile.targets.c import binary, build
from qcompile.targets.x86 import dispatch, isa, program
from qcompile.verify import verify
from tests.targets.test_families import NAME, STRICT, ZIG, data, make, network, same

CPU = "dispatch"
HERE = [
    name
    for name, words in (
        ("avx512vnni", isa.AVX512_VNNI.needs),
        ("avxvnni", isa.AVX_VNNI.needs),
        ("avx2", isa.AVX2.needs),
    )
    if words <= isa.features()
] + ["portable"]

# As qemu calls what -march=x86-64-v3 may use.
V3 = (
    "cx16 lahf-lm popcnt sse3 sse4.1 sse4.2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
).split()

# Intel's manual, volume 2A, CPUID: leaf, subleaf, register (eax ebx ecx edx) and bit.
BITS = {
    "avx512f": (7, 0, 1, 16),
    "avx512dq": (7, 0, 1, 17),
    "avx512cd": (7, 0, 1, 28),
    "avx512bw": (7, 0, 1, 30),
    "avx512vl": (7, 0, 1, 31),
    "avx512_vnni": (7, 0, 2, 11),
    "avx_vnni": (7, 1, 0, 4),
    "osxsave": (1, 0, 2, 27),
}

# A processor that has everything but one bit; all else of <cpuid.h> is the compiler's.
LACKING = """
#include_next <cpuid.h>
static int lacking(unsigned leaf, unsigned sub, unsigned *a, unsigned *b, unsigned *c, unsigned *d)
{
    const unsigned all = ~0u;
    unsigned *const registers[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) *registers[i] = leaf == 7 && sub == 0 && i == 0 ? 1u : all;
    if (leaf == LEAF && sub == SUB) *registers[REGISTER] &= ~(1u << BIT);
    return 1;
}
#define __get_cpuid(leaf, a, b, c, d) lacking(leaf, 0, a, b, c, d)
#define __get_cpuid_count(leaf, sub, a, b, c, d) lacking(leaf, sub, a, b, c, d)
"""


def emitted(folder: Path, threads: int = 1) -> Path:
    vectors = [{k: v[i : i + 1] for k, v in data(2).items()} for i in range(2)]
    lowered = families.get("x86").lower(
        network(), name=NAME, cpu=CPU, vectors=vectors, placement=Placement(threads=threads)
    )
    for name, content in lowered.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    assert set(lowered.files) == {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
    }
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose constants lie in files of their own, built by its Makefile without a warning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary, "_ALL_BYTES", 1)
        patch.setattr(binary, "_EACH_BYTES", 256)
        made = emitted(tmp_path_factory.mktemp("dispatch"))
    assert len(list(made.glob("*/weights.bin"))) == 4
    make(made, f"CFLAGS={STRICT.replace('-O2', '-O1')}", "-j2", "selftest", "runner", "profile")
    return made


def test_every_program_that_runs_here_equals_the_graph(folder: Path) -> None:
    g, x86 = network(), families.get("x86")
    for sanitize in (False, True):
        runner = x86.runner(folder, g, name=NAME, cpu=CPU, sanitize=sanitize)
        found = verify(g, runner, [data(9)], trace=0 if sanitize else 2, sanitized=sanitize)
        assert found.ok, found.first
        assert found.intermediates == (0 if sanitize else 5)
        assert [(o.name, o.samples) for o in found.others] == [(name, 9) for name in HERE[1:]]


def test_one_wrong_program_is_told_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "wrong")
    source = tmp_path / "wrong" / "portable" / "model.c"
    text = source.read_text()
    source.write_text(text.replace("return 0;\n}", "output0[3] ^= 1;\n    return 0;\n}"))
    runner = families.get("x86").runner(tmp_path / "wrong", network(), name=NAME, cpu=CPU)
    found = verify(network(), runner, [data(4)], trace=0)
    assert {o.name: o.mismatches for o in found.others} == {
        **dict.fromkeys(HERE[1:-1], 0),
        "portable": 4,
    }
    assert found.mismatches == 0
    assert not found.ok


def test_all_objects_are_certified_and_measured(folder: Path, tmp_path: Path) -> None:
    x86 = families.get("x86")
    made = dispatch.made(folder, NAME)
    alone = [build.Build(c.folder, c.name, c.toolchain) for c in made.choices]
    whole, parts = x86.certify(folder, name=NAME, cpu=CPU), 0
    assert whole.clean
    taken = x86.footprint(folder, name=NAME, cpu=CPU)
    for one in alone:
        text = subprocess.run(["size", one.model], capture_output=True, text=True, check=True)
        parts += int(text.stdout.splitlines()[1].split()[0])
    assert taken.code > 0.8 * parts
    assert taken.stack is not None
    assert taken.deepest[0] == "net_run"
    assert taken.deepest[1] in {
        f"net_{name}_run" for name in ("avx512vnni", "avxvnni", "avx2", "portable")
    }

    shutil.copytree(folder, tmp_path / "float")
    source = tmp_path / "float" / "avxvnni" / "model.c"
    planted = "static volatile float planted; planted = planted * 3.0f;\n    return 0;\n}"
    source.write_text(source.read_text().replace("return 0;\n}", planted))
    found = x86.certify(tmp_path / "float", name=NAME, cpu=CPU)
    assert not found.clean
    assert any(f.startswith("avxvnni/model.o: net_avxvnni_run has vmulss") for f in found.findings)


def test_damaged_constants_of_any_program_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    place = tmp_path / "damaged" / "avx2" / "weights.bin"
    place.write_bytes(bytes([place.read_bytes()[0] ^ 1]) + place.read_bytes()[1:])
    with pytest.raises(BadInput, match=r"avx2/weights\.bin is damaged"):
        families.get("x86").runner(tmp_path / "damaged", network(), name=NAME, cpu=CPU)


def programs_run(folder: Path, cpu: str) -> list[str]:
    """The programs that the self-test ran in the emulator of a processor."""
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", cpu, folder / "selftest"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (cpu, done.stdout, done.stderr)
    return re.findall(r"(\w+): net: 2 vectors, 0 mismatches", done.stdout)


def test_a_processor_runs_what_it_has_instructions_for(folder: Path) -> None:
    ran = subprocess.run([folder / "selftest"], capture_output=True, text=True, check=True)
    assert re.findall(r"(\w+): net: 2 vectors, 0 mismatches", ran.stdout) == HERE
    assert programs_run(folder, "Haswell") == ["avx2", "portable"]
    assert programs_run(folder, "Nehalem") == ["portable"]
    for word in V3:
        assert programs_run(folder, f"Haswell,-{word}") == ["portable"], word


def test_an_illegal_instruction_would_be_seen(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "trusting")
    source = tmp_path / "trusting" / "model.c"
    source.write_text(re.sub(r"0x[0-9a-f]{8}u", "0x00000000u", source.read_text()))
    make(tmp_path / "trusting", "CFLAGS=-std=c99 -O1", "selftest")
    with pytest.raises(AssertionError, match="-4"):
        programs_run(tmp_path / "trusting", "Haswell")


def test_every_bit_counts(tmp_path: Path) -> None:
    """With a processor that has all but one feature; the wide registers are saved here wherever this runs."""
    emitted(tmp_path)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "cpuid.h").write_text(LACKING)
    parts = "".join(
        f"int {NAME}_{name}_run(const int8_t *i, int16_t *o, void *a) {{ (void)i; (void)o; (void)a; return 0; }}\n"
        for name in ("avx512vnni", "avxvnni", "avx2", "portable")
    )
    (tmp_path / "main.c").write_text(
        f'#include <stdio.h>\n#include "model.h"\n{parts}int main(void) {{ puts({NAME}_isa()); return 0; }}\n'
    )
    chosen = {}
    for word, where in BITS.items():
        macros = [
            f"-D{key}={n}" for key, n in zip(("LEAF", "SUB", "REGISTER", "BIT"), where, strict=True)
        ]
        subprocess.run(
            ["gcc", "-std=gnu99", "-I", "fake", *macros, "model.c", "main.c", "-o", "run"],
            cwd=tmp_path,
            check=True,
        )
        done = subprocess.run([tmp_path / "run"], capture_output=True, text=True, check=True)
        chosen[word] = done.stdout.strip()
    wide = "avx512vnni" if "avx512f" in isa.features() else "avxvnni"
    assert chosen == {
        **dict.fromkeys(BITS, "avxvnni"),
        "avx_vnni": wide,
        "osxsave": "portable",
    }


def test_the_choice_can_be_made(folder: Path) -> None:
    library = ctypes.CDLL(str(dispatch.made(folder, NAME).library))
    library.net_isa.restype = ctypes.c_char_p

    def use(name: bytes | None) -> int:
        return int(library.net_use(name))

    assert library.net_isa().decode() == HERE[0] == program.title(isa.native())
    lacking = [n for n in ("avx512vnni", "avxvnni", "avx2") if n not in HERE]
    for name in HERE:
        assert use(name.encode()) == 0
        assert library.net_isa().decode() == name
        for wrong in (*lacking, "sse2", ""):
            assert use(wrong.encode()) == -1
            assert library.net_isa().decode() == name
    assert use(None) == 0
    assert library.net_isa().decode() == HERE[0]


def test_layers_are_timed_of_the_program_that_ran(folder: Path, tmp_path: Path) -> None:
    found = bench.profile(folder, milliseconds=20)
    assert [layer.macs for layer in found.layers if layer.macs] == [31104, 10368, 1440]
    assert found.layers[0].kernel.endswith(HERE[0])
    assert found.peak is not None
    assert found.peak > 0
    shutil.copytree(folder, tmp_path / "changed")
    (tmp_path / "changed" / HERE[0] / "program.json").unlink()
    with pytest.raises(BadInput, match=rf"cannot read .*{HERE[0]}/program\.json"):
        bench.profile(tmp_path / "changed", milliseconds=20)


def test_threads_share_what_has_vectors(tmp_path: Path) -> None:
    made, g = emitted(tmp_path, threads=2), network()
    assert {p.parent.name for p in made.glob("*/threads.h")} == {"avx512vnni", "avxvnni", "avx2"}
    runner = families.get("x86").runner(made, g, name=NAME, cpu=CPU)
    expected: dict[str, Array] = g.run(data(5))
    assert same(runner.run(data(5)), expected)
    for way in runner.ways:
        assert same(way.run(data(5))[0], expected)


def test_cmake_builds_it_too(folder: Path, tmp_path: Path) -> None:
    generated = subprocess.run(
        ["cmake", "-S", folder, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Debug"],
        capture_output=True,
        check=False,
    )
    assert generated.returncode == 0, generated.stderr
    for command in (["cmake", "--build", tmp_path, "-j2"], ["ctest", "--test-dir", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_clang_builds_what_chooses_without_a_warning(folder: Path, tmp_path: Path) -> None:
    command = [*ZIG.split(), "cc", "-target", "x86_64-linux-gnu", *STRICT.split(), "-c", "model.c"]
    subprocess.run([*command, "-o", tmp_path / "model.o"], cwd=folder, check=True)


def test_dispatch_is_for_x86_and_in_place_of_a_cpu() -> None:
    assert processor(None, True) == CPU
    assert processor("avx2", False) == "avx2"
    assert processor(None, False) is None
    with pytest.raises(BadInput, match="--dispatch chooses the processor as the program runs"):
        processor("avx2", True)
    for family in ("arm", "cortex-m4", "hls", "onnx"):
        with pytest.raises(BadInput, match=rf"--dispatch is not for {family}"):
            Job.checked("model.onnx", family, "fast", None, {}, Options(cpu=CPU))


def test_a_machine_without_the_instructions_is_told(folder: Path) -> None:
    """What a process says that was asked for instructions that the machine lacks."""
    ran = subprocess.run(["qemu-x86_64", "-cpu", "Nehalem", folder / "runner", "avx2"], check=False)
    assert ran.returncode == 5


def test_lowering_is_pure() -> None:
    def lower() -> dict[str, bytes]:
        made = families.get("x86").lower(network(), name=NAME, cpu=CPU, vectors=[data(1)])
        return dict(made.files)

    assert lower() == lower()
