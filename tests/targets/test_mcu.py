"""Cortex-M: what is emitted runs in the emulator, under both compilers, and is firmware its owner can live with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile import target as families
from qcompile.errors import ToolchainMissing, VerificationMismatch
from qcompile.target import Placement
from qcompile.targets import mcu
from qcompile.targets.c import build
from qcompile.verify import verify
from tests.targets.test_families import NAME, STRICT, data, network, same

CORES = [(name, cpu) for name in mcu.TARGETS for cpu in mcu.TARGETS[name].cpus]
ROOT = Path(__file__).parent.parent.parent


def emitted(
    folder: Path, core: str, cpu: str = "", placement: Placement = families.ANYWHERE
) -> Path:
    vectors = [{k: v[i : i + 1] for k, v in data(2).items()} for i in range(2)]
    found = families.get(core)
    lowered = found.lower(
        network(), name=NAME, cpu=cpu or found.cpus[0], vectors=vectors, placement=placement
    )
    for name, content in lowered.files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def gcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Debian's cross compiler build instead of zig."""
    monkeypatch.setattr(build, "find_zig", lambda: None)


def gives_the_graph(folder: Path, core: str, cpu: str) -> None:
    g, feeds = network(), data(5)
    for sanitize in (False, True):
        runner = families.get(core).runner(folder, g, name=NAME, cpu=cpu, sanitize=sanitize)
        assert same(runner.run(feeds), g.run(feeds))
    found = verify(g, families.get(core).runner(folder, g, name=NAME, cpu=cpu), [feeds])
    assert found.ok
    assert found.intermediates >= 4


@pytest.mark.parametrize(("core", "cpu"), CORES)
def test_every_core_gives_what_the_graph_gives(tmp_path: Path, core: str, cpu: str) -> None:
    gives_the_graph(emitted(tmp_path, core, cpu), core, cpu)


@pytest.mark.usefixtures("gcc")
@pytest.mark.parametrize(("core", "cpu"), CORES)
def test_every_core_with_gcc(tmp_path: Path, core: str, cpu: str) -> None:
    gives_the_graph(emitted(tmp_path, core, cpu), core, cpu)


def test_mcu_is_the_cortex_m4() -> None:
    assert families.get("mcu").name == "cortex-m4"
    assert "SMLAD" in families.get("mcu").summary or "DSP" in families.get("mcu").summary


@pytest.mark.parametrize("core", ["cortex-m3", "cortex-m4", "cortex-m55"])
def test_the_emitted_makefile_tests_builds_and_cleans(tmp_path: Path, core: str) -> None:
    folder = emitted(tmp_path, core)

    def make(*arguments: str) -> str:
        done = subprocess.run(
            ["make", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    strict = "CFLAGS=-std=c99 -O2 -Wall -Wextra -Wconversion -Wshadow -Wundef -Werror"
    assert f"{NAME}: 2 vectors, 0 mismatches" in make("test", strict)
    assert "model.o" in make("size")
    make("example", "STARTUP=host_cortex_m.o", "SCRIPT=emulator.ld")
    make("clean")
    assert not list(folder.glob("*.o"))


def test_the_makefile_takes_zig_as_it_says(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "cortex-m4")
    said = re.search(r"^#   (make test CC=.*?\n#.*?)$", (folder / "Makefile").read_text(), re.M)
    assert said is not None
    command = said[1].replace("\n#", "\n").replace("python3", sys.executable)
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 vectors, 0 mismatches" in done.stdout


def compiles(folder: Path, source: str, *flags: str) -> str:
    """What gcc says against a file of the folder; nothing where it compiles."""
    command = ["arm-none-eabi-gcc", *STRICT.split(), "-mcpu=cortex-m4", "-mthumb", *flags]
    done = subprocess.run(
        [*command, "-c", source, "-o", "/dev/null"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    return done.stderr


def test_a_too_small_arena_does_not_compile(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "cortex-m4")
    header = folder / "model.h"
    found = re.search(r"ARENA_BYTES (\d+)u", header.read_text())
    assert found is not None
    needed = int(found[1])
    assert not compiles(folder, "main.c", f"-DARENA_BYTES={needed}u")
    assert "assert_arena_is_large_enough" in compiles(
        folder, "main.c", f"-DARENA_BYTES={needed - 1}u"
    )
    assert not compiles(folder, "model.c")
    header.write_text(header.read_text().replace(f"{needed}u", f"{needed - 16}u"))
    assert "arena_holds_every_buffer" in compiles(folder, "model.c")


def test_constants_are_as_large_as_the_header_says(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "cortex-m4")
    header = folder / "model.h"
    text = header.read_text()
    found = re.search(r"WEIGHT_BYTES (\d+)u", text)
    assert found is not None
    header.write_text(text.replace(found[0], f"WEIGHT_BYTES {int(found[1]) - 1}u"))
    assert "constants_take_what_the_header_says" in compiles(folder, "model.c")


def test_data_lies_where_it_is_told(tmp_path: Path) -> None:
    from elftools.elf.elffile import ELFFile

    wish = Placement(weights_section=".ext_flash", arena_section=".fast_ram")
    folder = emitted(tmp_path, "cortex-m4", placement=wish)
    gives_the_graph(folder, "cortex-m4", "cortex-m4")
    chain = mcu.CortexM("cortex-m4")._toolchain("cortex-m4", folder)
    with build.Build(folder, NAME, chain).program.open("rb") as file:
        sizes = {s.name: s["sh_size"] for s in ELFFile(file).iter_sections()}
    made = families.get("cortex-m4").lower(
        network(), name=NAME, cpu="cortex-m4", vectors=(), placement=wish
    )
    assert sizes[".fast_ram"] == made.arena_bytes
    assert made.weight_bytes <= sizes[".ext_flash"] < made.weight_bytes + 64


# ------------------------------------------------------------------------------------- the host layer


HOST_TEST = r"""
#include "host.h"
#include <stdint.h>
void *memmove(void *to, const void *from, size_t size);
int memcmp(const void *a, const void *b, size_t size);
static unsigned char a[64], b[64];
static volatile int zero = 0;
int main(void) {
    unsigned char got[8];
    for (int from = 0; from < 5; from++)
        for (int to = 0; to < 5; to++)
            for (int n = 0; n < 20; n++) {
                for (int i = 0; i < 64; i++) { a[i] = (unsigned char)(i + 1); b[i] = 0; }
                if (memcpy(b + to, a + from, (size_t)n) != b + to) return 10;
                for (int i = 0; i < 64; i++)
                    if (b[i] != (i >= to && i < to + n ? from + i - to + 1 : 0)) return 11;
                if (memset(b + to, 0x1C3, (size_t)n) != b + to) return 12;
                for (int i = 0; i < 64; i++)
                    if (b[i] != (i >= to && i < to + n ? 0xC3 : 0)) return 13;
                memmove(a + to, a + from, (size_t)n);
                for (int i = 0; i < 64; i++)
                    if (a[i] != (i >= to && i < to + n ? from + i - to + 1 : i + 1)) return 14;
            }
    if (memcmp("abcd", "abcd", 4) != 0 || memcmp("abcd", "abce", 4) >= 0 || memcmp("b", "a", 1) <= 0) return 15;
    if (sizeof "x" == 2 && FAULT) { *(volatile int *)(uintptr_t)0xFFFFFFF1u = zero; }
    while (host_read(got, 3) == 3)
        if (host_write(got, 3) != 0) return 16;
    return 7;
}
"""


@pytest.mark.parametrize("core", ["cortex-m0", "cortex-m3", "cortex-m4", "cortex-m55"])
def test_the_host_layer(tmp_path: Path, core: str) -> None:
    folder = emitted(tmp_path, core)
    chip = mcu.CortexM(core)
    chain = chip._toolchain(core, folder)
    for fault, status in ((0, 7), (1, 99)):
        (folder / "t.c").write_text(HOST_TEST)
        made = build.Build(folder, NAME, chain, (f"-DFAULT={fault}",))
        objects = [str(made.object(s)) for s in ("t.c", "host_cortex_m.c")]
        program = tmp_path / f"t{fault}"
        subprocess.run([*chain.command, *chain.link, *objects, "-o", str(program)], check=True)
        done = subprocess.run(
            [*chip._emulator(core), str(program)],
            input=bytes(range(256)) * 30, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        assert done.stdout == ((bytes(range(256)) * 30)[: 256 * 30] if not fault else b"fault\n")


def test_a_program_that_faults_is_a_mismatch(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "cortex-m4")
    source = (folder / "model.c").read_text()
    broken = source.replace("return 0;\n}", '__asm__ volatile("udf #0");\n    return 0;\n}')
    assert broken != source
    (folder / "model.c").write_text(broken)
    runner = families.get("mcu").runner(folder, network(), name=NAME, cpu="cortex-m4")
    with pytest.raises(VerificationMismatch, match="exit status 99"):
        runner.run(data(1))


def test_overflow_traps_in_the_sanitized_build(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "cortex-m3")
    source = (folder / "model.c").read_text()
    broken = source.replace(
        "    return 0;\n}", "    return (int)(INT32_MAX + output0[0] * output0[0] + 1 != 5) - 1;\n}"
    )
    assert broken != source
    (folder / "model.c").write_text(broken)
    g, feeds = network(), data(1)
    plain = families.get("cortex-m3").runner(folder, g, name=NAME, cpu="cortex-m3")
    assert same(plain.run(feeds), g.run(feeds))
    strict = families.get("cortex-m3").runner(folder, g, name=NAME, cpu="cortex-m3", sanitize=True)
    with pytest.raises(VerificationMismatch, match="exit status 99"):
        strict.run(feeds)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = emitted(tmp_path, "cortex-m4")
    monkeypatch.setenv("PATH", str(tmp_path))
    chip = families.get("cortex-m4")
    (lack,) = chip.missing()
    assert "apt-get install qemu-system-arm" in lack
    with pytest.raises(ToolchainMissing, match="apt-get install qemu-system-arm"):
        chip.runner(folder, network(), name=NAME, cpu="cortex-m4")
    monkeypatch.setattr(build, "find_zig", lambda: None)
    assert "gcc-arm-none-eabi" in chip.missing()[0]


# ---------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("core", ["cortex-m0", "cortex-m4", "cortex-m55"])
def test_misra_deviations_are_those_the_manual_lists(tmp_path: Path, core: str) -> None:
    folder = emitted(tmp_path, core)
    manual = (ROOT / "docs" / "targets" / "mcu.md").read_text()
    rows = re.findall(r"^\| (\d+\.\d+.*?) \| (?:advisory|required) ", manual, re.M)
    listed = {rule for row in rows for rule in re.findall(r"\d+\.\d+", row)}
    assert listed
    helium = ["-D__ARM_FEATURE_MVE=1"] if core == "cortex-m55" else []
    done = subprocess.run(
        ["cppcheck", "--addon=misra", "--std=c99", "-q", "-D__GNUC__=12", *helium, "-I.", "--template={id}", "model.c"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = set(re.findall(r"misra-c2012-(\d+\.\d+)", done.stderr))
    assert found
    assert found <= listed, found - listed


def test_firmware_names_no_library_but_memcpy_and_memset(tmp_path: Path) -> None:
    from elftools.elf.elffile import ELFFile

    allowed = {
        "memcpy",
        "memset",
        "__aeabi_memcpy",
        "__aeabi_memcpy4",
        "__aeabi_memset",
        "__aeabi_memclr",
    }
    for core in ("cortex-m3", "cortex-m4", "cortex-m55"):
        (tmp_path / core).mkdir()
        folder = emitted(tmp_path / core, core)
        chain = mcu.CortexM(core)._toolchain(core, folder)
        with build.Build(folder, NAME, chain).model.open("rb") as file:
            symbols = ELFFile(file).get_section_by_name(".symtab").iter_symbols()
            wanted = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF" and s.name}
        assert wanted <= allowed, wanted - allowed
