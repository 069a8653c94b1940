"""The files around an emitted model: they compile without a warning, run, trace, and refuse what is wrong.

The model is written by hand here, so that neither the emitter nor its kernels stand in for the expected values.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qcompile.errors import BadInput, QcompileError, ToolchainMissing, VerificationMismatch
from qcompile.ir import Array, DType, Graph, Lut, Mul, Port, TensorType
from qcompile.targets.c import build, run

NAME = "tiny"
STORED = {"h": 7, "p": 3}
FAMILIES = ("x86", "arm")
STRICT = ("-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")

MODEL_H = """\
#ifndef TINY_MODEL_H
#define TINY_MODEL_H
#include <stdint.h>
#define TINY_ARENA_BYTES 32u
#define TINY_ARENA_ALIGN 16u
#define TINY_ARENA __attribute__((aligned(16)))
#define TINY_INPUTS 2
#define TINY_OUTPUTS 2
#define TINY_INPUT_0_SIZE 6
#define TINY_INPUT_0_SCALE 0.25f
#define TINY_INPUT_0_ZERO -3
#define TINY_INPUT_1_SIZE 6
#define TINY_INPUT_1_SCALE 0.007843138f
#define TINY_INPUT_1_ZERO 0
#define TINY_OUTPUT_0_SIZE 6
#define TINY_OUTPUT_0_SCALE 0.001f
#define TINY_OUTPUT_0_ZERO 0
#define TINY_OUTPUT_1_SIZE 6
#define TINY_OUTPUT_1_SCALE 0.002f
#define TINY_OUTPUT_1_ZERO 0
int tiny_run(const int8_t *input0, const uint8_t *input1, int16_t *output0, int32_t *output1,
             void *arena);
#ifdef TINY_TRACE
#define TINY_STORED 8u
void tiny_trace(uint32_t id, const void *data, uint32_t bytes);
#endif
#endif
"""

MODEL_C = """\
#include "model.h"
#include <stddef.h>
#include <string.h>
int tiny_run(const int8_t *input0, const uint8_t *input1, int16_t *output0, int32_t *output1,
             void *arena)
{
    int16_t *h = arena;
    if (input0 == NULL || input1 == NULL || output0 == NULL || output1 == NULL || arena == NULL ||
        (uintptr_t)arena % TINY_ARENA_ALIGN != 0) {
        return -1;
    }
    for (int i = 0; i < 6; i++) {
        h[i] = (int16_t)(input0[i] * 7 - 5);
    }
#ifdef TINY_TRACE
    tiny_trace(7u, h, 12u);
#endif
    for (int i = 0; i < 6; i++) {
        output1[i] = (input0[i] + 3) * (input1[i] - 10);
    }
#ifdef TINY_TRACE
    tiny_trace(3u, output1, 24u);
#endif
    memcpy(output0, h, 12u);
    return 0;
}
"""


def graph() -> Graph:
    g = Graph(NAME)
    x = g.add_input(Port("a", 0.25, -3), TensorType(DType.I8, (1, 6)))
    y = g.add_input(Port("b */", 0.007843138, 0), TensorType(DType.U8, (1, 6)))
    ramp = (np.arange(-128, 128) * 7 - 5).astype(np.int16)
    table = g.constant(ramp, TensorType(DType.I16, (256,)), "table")
    g.add_output(Port("wide", 0.001, 0), g.add(Lut(), x, table, name="h"))
    g.add_output(Port("product", 0.002, 0), g.add(Mul(-3, 10), x, y, name="p"))
    return g


def vectors_h(rows: int) -> str:
    feeds = data(rows)
    results = graph().run(feeds)

    def table(kind: str, name: str, array: Array) -> str:
        lines = ", ".join("{" + ", ".join(map(str, row)) + "}" for row in array.tolist())
        return f"static const {kind} tiny_vector_{name}[{rows}][6] = {{{lines}}};\n"

    return (
        f"#include <stdint.h>\n#define TINY_VECTORS {rows}u\n"
        + table("int8_t", "input_0", feeds["a"])
        + table("uint8_t", "input_1", feeds["b */"])
        + table("int16_t", "output_0", results["wide"])
        + table("int32_t", "output_1", results["product"])
    )


def data(rows: int) -> dict[str, Array]:
    rng = np.random.default_rng(rows)
    return {
        "a": rng.integers(-128, 128, (rows, 6)).astype(np.int8),
        "b */": rng.integers(0, 256, (rows, 6)).astype(np.uint8),
    }


OWN = {"x86": [], "arm": [build.HERE / "host_linux_aarch64.c", *build.BARE_LINUX]}


def emitted(folder: Path, family: str, model: str = MODEL_C) -> Path:
    flags = {"x86": ["-march=x86-64"], "arm": ["-mcpu=generic"]}[family]
    files = build.support_files(graph(), name=NAME, family=family, flags=flags, own=OWN[family])
    own = {
        "model.c": model, "model.h": MODEL_H, "vectors.h": vectors_h(3), "weights.h": "",
        "program.json": json.dumps(
            {"values": STORED, "stores": [], "pieces": {}, "layers": []}
        ),
    }  # fmt: skip
    for name, content in {**files, **{k: v.encode() for k, v in own.items()}}.items():
        (folder / name).write_bytes(content)
    return folder


def zig(target: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "ziglang", "cc", "-target", target)


def toolchain(family: str) -> build.Toolchain:
    if family == "x86":
        return build.Toolchain(("gcc",), ("-march=x86-64",))
    return build.Toolchain(
        zig("aarch64-linux-musl"),
        ("-mcpu=generic", "-fno-stack-protector"),
        link=("-nostdlib", "-static"),
        host="host_linux_aarch64.c",
        emulator=("qemu-aarch64", "-cpu", "cortex-a53"),
    )


def program(folder: Path, family: str, options: tuple[str, ...] = ()) -> run.Program:
    made = build.Build(folder, NAME, toolchain(family), options)
    return run.Program(made, graph())


def same(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("rows", [0, 1, 65])
def test_a_program_gives_what_the_graph_gives(tmp_path: Path, family: str, rows: int) -> None:
    runner = program(emitted(tmp_path, family), family)
    assert same(runner.run(data(rows)), graph().run(data(rows)))


def test_a_library_gives_what_the_graph_gives(tmp_path: Path) -> None:
    made = build.Build(emitted(tmp_path, "x86"), NAME, toolchain("x86"))
    runner = run.Library(made, graph())
    for rows in (0, 1, 65):
        assert same(runner.run(data(rows)), graph().run(data(rows)))
    assert set(runner.trace(data(1))) == {"h", "p", "wide", "product"}


def test_the_static_batch_is_filled_up_and_cut(tmp_path: Path) -> None:
    """The same program seen as one that takes two rows of three."""
    g = Graph(NAME)
    x = g.add_input(Port("a", 0.25, -3), TensorType(DType.I8, (2, 3)))
    y = g.add_input(Port("b */", 0.007843138, 0), TensorType(DType.U8, (2, 3)))
    table = g.constant(
        (np.arange(-128, 128) * 7 - 5).astype(np.int16), TensorType(DType.I16, (256,)), "table"
    )
    g.add_output(Port("wide", 0.001, 0), g.add(Lut(), x, table, name="h"))
    g.add_output(Port("product", 0.002, 0), g.add(Mul(-3, 10), x, y, name="p"))
    made = build.Build(emitted(tmp_path, "x86"), NAME, toolchain("x86"))
    feeds = {k: v.reshape(-1, 3)[:5] for k, v in data(3).items()}
    for runner in (
        run.Library(made, g),
        run.Program(made, g),
    ):
        assert same(runner.run(feeds), g.run(feeds))
    g.free_batch = False
    fixed = {k: v[:2] for k, v in feeds.items()}
    assert same(run.Library(made, g).run(fixed), g.run(fixed))
    with pytest.raises(BadInput, match="takes int8"):
        run.Library(made, g).run(feeds)


def test_a_trace_holds_every_stored_value(tmp_path: Path, family: str) -> None:
    values: dict[str, Array] = {}
    feeds = data(11)
    ports = graph().run(feeds, on_value=lambda v, x: values.update({v.name: x}))
    assert same(program(emitted(tmp_path, family), family).trace(feeds), {**ports, **values})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tiny_trace(7u, h, 12u);", ""),
        ("tiny_trace(7u, h, 12u);", "tiny_trace(7u, h, 10u);"),
        ("tiny_trace(7u, h, 12u);", "tiny_trace(8u, h, 12u);"),
        ("tiny_trace(7u, h, 12u);", "tiny_trace(7u, h, 12u); tiny_trace(7u, h, 12u);"),
    ],
)
def test_a_trace_that_is_not_whole_is_refused(tmp_path: Path, before: str, after: str) -> None:
    assert before in MODEL_C
    runner = program(emitted(tmp_path, "x86", MODEL_C.replace(before, after)), "x86")
    with pytest.raises(VerificationMismatch, match="the trace of tiny"):
        runner.trace(data(2))


def test_a_changed_source_is_built_again(tmp_path: Path) -> None:
    first = program(emitted(tmp_path, "x86"), "x86").run(data(4))
    changed = program(emitted(tmp_path, "x86", MODEL_C.replace("* 7 - 5", "* 7 - 4")), "x86")
    assert np.array_equal(changed.run(data(4))["wide"], first["wide"] + 1)


def test_builds_of_several_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "x86")
    good: list[bool] = []

    def work() -> None:
        good.append(same(program(folder, "x86").run(data(2)), graph().run(data(2))))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert good == [True] * 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"b */": np.zeros((3, 6), np.uint8)}, "different numbers of rows"),
        ({"a": np.zeros((2, 6), np.int32)}, "takes int8"),
        ({"a": np.zeros((2, 5), np.int8)}, "takes int8"),
        ({}, "not given"),
    ],
)
def test_wrong_feeds_are_refused(tmp_path: Path, change: dict[str, Array], why: str) -> None:
    feeds = {**data(2), **change} if change else {"a": data(2)["a"]}
    made = build.Build(emitted(tmp_path, "x86"), NAME, toolchain("x86"))
    for runner in (
        run.Library(made, graph()),
        run.Program(made, graph()),
    ):
        with pytest.raises(BadInput, match=why):
            runner.run(feeds)


BIG: dict[str, Array] = {"a": np.full((1, 6), 100, np.int8), "b */": np.full((1, 6), 1, np.uint8)}
PLANTED: dict[str, tuple[Callable[[str], str], str]] = {
    "arena too small": (
        lambda c: c.replace("h[i] = ", "h[i + 14] = "),
        "global-buffer-overflow",
    ),
    "output too small": (lambda c: c.replace("output1[i]", "output1[i + 1]"), "buffer-overflow"),
    "signed overflow": (
        lambda c: c.replace("(input0[i] + 3)", "(input0[i] + 2147483647)"),
        "signed integer overflow",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_sanitizers_report_what_is_planted(tmp_path: Path, fault: str) -> None:
    change, report = PLANTED[fault]
    assert change(MODEL_C) != MODEL_C
    runner = program(emitted(tmp_path, "x86", change(MODEL_C)), "x86", build.SANITIZE)
    with pytest.raises(VerificationMismatch, match=report):
        runner.run(BIG)


def test_undefined_behaviour_traps_on_arm(tmp_path: Path) -> None:
    clean = program(emitted(tmp_path, "arm"), "arm", build.TRAP)
    assert same(clean.run(BIG), graph().run(BIG))
    change, _ = PLANTED["signed overflow"]
    runner = program(emitted(tmp_path, "arm", change(MODEL_C)), "arm", build.TRAP)
    with pytest.raises(VerificationMismatch, match="died of SIG"):
        runner.run(BIG)


def test_a_model_that_refuses_or_crashes_is_a_mismatch(tmp_path: Path, family: str) -> None:
    refuses = MODEL_C.replace("return 0;", "return -1;")
    with pytest.raises(VerificationMismatch, match="exit status 3"):
        program(emitted(tmp_path, family, refuses), family).run(data(1))
    crashes = MODEL_C.replace("return 0;", "*(volatile int *)0 = 1; return 0;")
    with pytest.raises(VerificationMismatch, match="died of SIG"):
        program(emitted(tmp_path, family, crashes), family).run(data(1))


def test_a_source_that_does_not_compile_is_said(tmp_path: Path) -> None:
    with pytest.raises(QcompileError, match=r"cannot build tiny.*\n(.*\n)*.*error"):
        program(emitted(tmp_path, "x86", MODEL_C + "nonsense"), "x86")


def test_uninitialised_memory_does_not_read_as_zero(tmp_path: Path, family: str) -> None:
    reads = MODEL_C.replace("h[i] = (int16_t)(input0[i] * 7 - 5);", "")
    got = program(emitted(tmp_path, family, reads), family).run(data(1))
    assert np.all(got["wide"].view(np.uint16) == 0xA5A5)


COMPILERS = {
    "gcc": ("x86", ("gcc",)),
    "clang": ("x86", zig("x86_64-linux-gnu")),
    "clang-aarch64": ("arm", zig("aarch64-linux-musl")),
}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("traced", [False, True])
def test_every_file_compiles_without_a_warning(tmp_path: Path, compiler: str, traced: bool) -> None:
    family, command = COMPILERS[compiler]
    folder = emitted(tmp_path, family)
    sources = sorted(folder.glob("*.c"))
    assert {s.name for s in sources} >= {"runner.c", "selftest.c", "bench.c", "host_posix.c"}
    for source in sources:
        if source.name == "profile.c" and not traced:
            continue
        options = ["-std=c99", "-O2", *STRICT, *(["-DTINY_TRACE"] if traced else [])]
        done = subprocess.run(
            [*command, *options, "-c", str(source), "-o", str(tmp_path / "x.o")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


ZIG_MAKE = (
    f"CC={' '.join(zig('aarch64-linux-musl'))}",
    f"AR={sys.executable} -m ziglang ar",
    "HOST=host_linux_aarch64.c",
    "LDFLAGS=-nostdlib -static",
)
MAKE: dict[str, tuple[str, ...]] = {"x86": (), "arm": ZIG_MAKE}


def test_make_builds_the_library_and_runs_the_self_test(tmp_path: Path, family: str) -> None:
    folder = emitted(tmp_path, family)
    before = {p.name for p in folder.iterdir()}
    assert make(folder, *MAKE[family]).returncode == 0
    assert (folder / "libtiny.a").read_bytes().startswith(b"!<arch>")
    done = make(folder, *MAKE[family], "test")
    assert done.returncode == 0, done.stderr
    assert "tiny: 3 vectors, 0 mismatches" in done.stdout.splitlines()
    assert make(folder, *MAKE[family], "clean").returncode == 0
    assert {p.name for p in folder.iterdir()} == before


def test_the_self_test_names_the_first_difference(tmp_path: Path, family: str) -> None:
    folder = emitted(tmp_path, family)
    expected = graph().run(data(3))["product"]
    wrong = str(expected[1, 4])
    text = (folder / "vectors.h").read_text()
    rows = text.splitlines()
    at = next(i for i, line in enumerate(rows) if "output_1" in line)
    head, tail = rows[at].split("{{")
    cells = [row.split(", ") for row in tail.removesuffix("}};").split("}, {")]
    assert cells[1][4] == wrong
    cells[1][4] = "-2147483647 - 1"
    rows[at] = head + "{{" + "}, {".join(", ".join(row) for row in cells) + "}};"
    (folder / "vectors.h").write_text("\n".join(rows) + "\n")
    done = make(folder, *MAKE[family], "test")
    assert done.returncode != 0
    assert (
        f"tiny: vector 1, output 1, element 4: {wrong} instead of -2147483648"
        in done.stdout.splitlines()
    )


def test_the_make_runner_speaks_the_same_protocol(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "x86")
    assert make(folder, "runner").returncode == 0
    feeds = data(2)
    stdin = b"".join(feeds["a"][i].tobytes() + feeds["b */"][i].tobytes() for i in range(2))
    done = subprocess.run(
        [str(folder / "runner")], input=stdin, capture_output=True, check=True, timeout=60
    )
    golden = graph().run(feeds)
    assert done.stdout == b"".join(
        golden["wide"][i].tobytes() + golden["product"][i].tobytes() for i in range(2)
    )
    cut = subprocess.run(
        [str(folder / "runner")], input=stdin[:-1], capture_output=True, check=False, timeout=60
    )
    assert cut.returncode == 2


def test_cmake_builds_and_tests(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "x86")
    for command in (
        ["cmake", "-S", str(folder), "-B", str(folder / "b")],
        ["cmake", "--build", str(folder / "b")],
        ["ctest", "--test-dir", str(folder / "b"), "-V"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
    assert "tiny: 3 vectors, 0 mismatches" in done.stdout
    assert (folder / "b" / "libtiny.a").exists()


def test_the_freestanding_memory_functions(tmp_path: Path) -> None:
    """Every copy, move, fill and comparison of a few bytes against Python's slices."""
    (tmp_path / "t.c").write_text(
        """
        #include "host.h"
        #include <string.h>
        int main(void)
        {
            unsigned char b[12], job[4];
            while (host_read(job, 4) == 4) {
                for (unsigned i = 0; i < 12; i++) {
                    b[i] = (unsigned char)(i * 29u);
                }
                unsigned char *to = b + job[1], *from = b + job[2];
                void *(*volatile move)(void *, const void *, size_t) = memmove;
                void *(*volatile copy)(void *, const void *, size_t) = memcpy;
                void *(*volatile set)(void *, int, size_t) = memset;
                int (*volatile compare)(const void *, const void *, size_t) = memcmp;
                int result = 0;
                switch (job[0]) {
                case 0: result = move(to, from, job[3]) == to; break;
                case 1: result = copy(to, from, job[3]) == to; break;
                case 2: result = set(to, -3, job[3]) == to; break;
                default: result = compare(to, from, job[3]); break;
                }
                job[0] = (unsigned char)result;
                if (host_write(job, 1) != 0 || host_write(b, 12) != 0) {
                    return 1;
                }
            }
            return 0;
        }
        """
    )
    for name in ("host.h", "host_bare.h", "host_linux.h", "host_linux_aarch64.c"):
        shutil.copy(Path(build.__file__).parent / name, tmp_path)
    chain = toolchain("arm")
    made = build.Build(tmp_path, "t", chain)
    objects = [str(made.object(s)) for s in ("t.c", "host_linux_aarch64.c")]
    binary = str(tmp_path / "t")
    subprocess.run([*chain.command, *chain.link, *objects, "-o", binary], check=True, timeout=60)
    jobs = [
        (op, to, start, size)
        for op in range(4)
        for to in range(4)
        for start in range(4)
        for size in (0, 1, 5, 8)
        if op != 1 or abs(to - start) >= size or to == start
    ]
    done = subprocess.run(
        [*chain.emulator, binary],
        input=bytes(b for job in jobs for b in job),
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert len(done.stdout) == 13 * len(jobs)
    for i, (op, to, start, size) in enumerate(jobs):
        b = bytearray((k * 29) % 256 for k in range(12))
        x, y = bytes(b[to : to + size]), bytes(b[start : start + size])
        if op < 2:
            b[to : to + size] = y
        elif op == 2:
            b[to : to + size] = bytes([253]) * size
        result = (x > y) - (x < y) if op == 3 else 1
        assert done.stdout[13 * i : 13 * i + 13] == bytes([result % 256]) + bytes(b)


def test_no_workspace_is_left_behind(tmp_path: Path) -> None:
    folder = emitted(tmp_path, "x86")
    script = f"""
import os, tempfile
from pathlib import Path
from qcompile.targets.c import build, run
b = build.Build(Path({str(folder)!r}), "tiny", build.Toolchain(("gcc",), ()))
print(b.program.parent)
if os.fork() == 0:
    raise SystemExit
os.wait()
assert b.program.exists()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    used = Path(done.stdout.strip())
    assert used.parent == tmp_path
    assert not used.exists()


def test_the_files_are_the_same_every_time() -> None:
    def files(family: str) -> dict[str, bytes]:
        flags = ["-mcpu=generic"]
        return build.support_files(graph(), name=NAME, family=family, flags=flags, own=OWN[family])

    for family in FAMILIES:
        assert files(family) == files(family)
    assert files("arm").keys() - files("x86").keys() == {
        "host_linux_aarch64.c", "host_bare.h", "host_linux.h",
    }  # fmt: skip
    assert not any(b"b */" in text for text in files("arm").values())


def test_a_stopped_emulator_is_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_RUN_SECONDS", 1)
    endless = MODEL_C.replace("return 0;", "for (;;) { *(volatile uint8_t *)arena = 1; }")
    runner = program(emitted(tmp_path, "arm", endless), "arm")
    with pytest.raises(QcompileError, match="stopped after 1 s"):
        runner.run(data(1))


def test_a_missing_emulator_is_said(tmp_path: Path) -> None:
    made = build.Build(
        emitted(tmp_path, "x86"),
        NAME,
        replace(toolchain("x86"), emulator=("no-such-emulator",)),
    )
    with pytest.raises(ToolchainMissing, match="no-such-emulator is not installed"):
        run.Program(made, graph()).run(data(1))


def test_a_missing_c_library_is_said(tmp_path: Path) -> None:
    bare = build.Toolchain(("gcc",), ("-nostdinc", "-isystem", str(tmp_path)))
    made = build.Build(emitted(tmp_path, "x86"), NAME, bare)
    with pytest.raises(ToolchainMissing, match="apt-get install gcc libc6-dev"):
        _ = made.model
