"""Footprints: sizes as the object has them, and a stack bound that the painted stack of a real run never passes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from qcompile import target as families
from qcompile.ir import Conv, DType, Graph, Port, Rescale, TensorType, arith
from qcompile.targets.c import build
from qcompile.targets.c.footprint import LIBRARY_STACK, footprint

NAME = "net"
EMULATED = ["arm", "cortex-m0", "cortex-m3", "cortex-m55"]

HEAD = """
#include "model.h"
void *memcpy(void *, const void *, __SIZE_TYPE__);
#define APART __attribute__((noinline))
#define USE(p) __asm__ volatile("" : : "r"(p) : "memory")
"""
TAKE = "volatile unsigned char room[%d]; room[0] = 1; USE(room);"
"""A function's frame holds at least so many bytes."""


def graph() -> Graph:
    """A convolution with enough registers in use that they spill."""
    rng = np.random.default_rng(5)
    g = Graph(NAME)
    x = g.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 9, 9, 5)))
    w = rng.integers(-127, 128, (7, 3, 3, 5)).astype(np.int8)
    b = rng.integers(-99, 99, 7).astype(np.int32)
    y = g.add(
        Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 0),
        x,
        g.constant(w, TensorType(DType.I8, w.shape), "weight"),
        g.constant(b, TensorType(DType.I32, b.shape), "bias"),
        name="y.acc",
    )
    operand = arith.AccOperand(tuple(Fraction(1, 3000 + i) for i in range(7)), (1 << 24,) * 7)
    fit = arith.fit_rescale([operand], [], bits=16)
    g.add_output(
        Port("y", 0.1, 0),
        g.add(Rescale(fit.accs, fit.vals, fit.f, 0, -128, 127, DType.I8), y, name="y"),
    )
    g.verify()
    return g


def emitted(folder: Path, family: str, model: str = "", runner: str = "") -> build.Build:
    target = families.get(family)
    cpu = target.cpus[0]
    for name, data in target.lower(graph(), name=NAME, cpu=cpu, vectors=()).files.items():
        (folder / name).write_bytes(data)
    if model:
        body = HEAD + model + "\nint net_run(const int8_t *x, int8_t *y, void *arena)\n{ %s }\n"
        (folder / "model.c").write_text(body % "top(); return x == y || !arena;")
    if runner:
        (folder / "runner.c").write_text(runner)
    made = target.runner(folder, graph(), name=NAME, cpu=cpu).build  # type: ignore[attr-defined]
    assert isinstance(made, build.Build)
    return made


TREE = f"""
static APART void leaf(void) {{ {TAKE % 200} }}
static APART void small(void) {{ {TAKE % 40} leaf(); USE(0); }}
static APART void wide(void) {{ {TAKE % 230} }}
static APART void top(void) {{ small(); wide(); USE(0); }}
"""


@pytest.mark.parametrize("family", ["x86", *EMULATED])
def test_the_deepest_path_counts(tmp_path: Path, family: str) -> None:
    """Two small frames under one another are deeper than the largest."""
    found = footprint(emitted(tmp_path, family, TREE))
    assert found.deepest == ("net_run", "top", "small", "leaf")
    assert found.stack is not None
    assert 240 <= found.stack <= 240 + 4 * 40


COPY = f"""
static unsigned char memory[3000];
static APART void top(void) {{ {TAKE % 64} USE(memory);
    memcpy((void *)room, memory, (__SIZE_TYPE__)sizeof room / 2); USE(room);
    volatile __SIZE_TYPE__ size = 9; memcpy(memory, (void *)room, size); USE(0); }}
"""


@pytest.mark.parametrize("family", EMULATED)
def test_library_routines_have_an_allowance_and_statics_are_seen(
    tmp_path: Path, family: str
) -> None:
    found = footprint(emitted(tmp_path, family, COPY))
    assert found.statics == 3000
    assert found.stack is not None
    assert 64 + LIBRARY_STACK <= found.stack <= 64 + LIBRARY_STACK + 80
    assert "memcpy" in found.deepest[-1]


FAR = f"""
static APART void top(void) {{ {TAKE % 100} volatile int n = 9;
    for (int i = 0; i < 5; i++) {{ {"n = n * 3;" * 500} USE(&n); }} }}
"""


def test_a_long_jump_is_no_call(tmp_path: Path) -> None:
    """Armv6-M jumps far with its call instruction."""
    made = emitted(tmp_path, "cortex-m0", FAR)
    found = footprint(made)
    assert found.stack is not None
    assert 100 <= found.stack <= 160


UNBOUNDED = {
    "recursion": """
static void other(int n);
static APART void self(int n) { if (n) { other(n - 1); USE(&n); } }
static APART void other(int n) { if (n) { self(n - 1); USE(&n); } }
static APART void top(void) { self(3); }
""",
    "itself": """
static APART int self(int n) { USE(&n); return n ? self(n - 1) * 3 + self(n / 2) : 0; }
static APART void top(void) { self(3); }
""",
    "pointer": """
static APART void one(void) { USE(0); }
static void (*volatile which)(void) = one;
static APART void top(void) { which(); USE(0); }
""",
    "grows": """
static APART void top(void) { volatile int n = 9; char room[n]; USE(room); }
""",
    "not known": """
void elsewhere(void);
static APART void top(void) { elsewhere(); USE(0); }
""",
}


@pytest.mark.parametrize("family", ["x86", *EMULATED])
@pytest.mark.parametrize("what", UNBOUNDED)
def test_what_has_no_bound_gets_none(tmp_path: Path, family: str, what: str) -> None:
    made = emitted(tmp_path, "arm" if family == "x86" else family)
    body = HEAD + UNBOUNDED[what] + "\nint net_run(const int8_t *x, int8_t *y, void *arena)\n"
    (tmp_path / "model.c").write_text(body + "{ top(); return x == y || !arena; }\n")
    found = footprint(build.Build(tmp_path, NAME, made.toolchain))
    assert found.stack is None
    assert what in found.unbounded
    assert found.code > 0


@pytest.mark.parametrize("family", EMULATED)
def test_sizes_are_those_of_the_sections(tmp_path: Path, family: str) -> None:
    made = emitted(tmp_path, family)
    found = footprint(made)
    assert found.statics == 0
    with made.model.open("rb") as file:
        sections = {s.name: s["sh_size"] for s in ELFFile(file).iter_sections()}
    code = sum(size for name, size in sections.items() if name.startswith(".text"))
    constants = sum(size for name, size in sections.items() if name.startswith(".rodata"))
    assert found.code == code > 200
    assert constants >= 7 * 9 * 5
    assert constants <= found.constants <= constants + 400  # tables for unwinding


LARGE = f"static APART void top(void) {{ {TAKE % 3000} }}"

PAINTED = """
#include "host.h"
#include "model.h"
#ifdef __hexagon__
#define STACK_POINTER "%0 = r29"
#else
#define STACK_POINTER "mov %0, sp"
#endif
#define BYTES 8192
static int8_t input[NET_INPUT_0_SIZE], output[NET_OUTPUT_0_SIZE];
static uint8_t arena[NET_ARENA_BYTES] __attribute__((aligned(NET_ARENA_ALIGN)));
int main(void)
{
    volatile uint8_t *top;
    uint32_t untouched = 0;
    __asm__ volatile(STACK_POINTER : "=r"(top));
    for (int i = 1; i <= BYTES; i++) {
        top[-i] = 0x5A;
    }
    if (net_run(input, output, arena) != 0) {
        return 1;
    }
    while (untouched < BYTES && top[(int)untouched - BYTES] == 0x5A) {
        untouched++;
    }
    untouched = BYTES - untouched;
    return host_write(&untouched, sizeof untouched);
}
"""


@pytest.mark.parametrize("family", EMULATED)
@pytest.mark.parametrize("model", ["", TREE, COPY, LARGE], ids=["network", "tree", "copy", "large"])
def test_no_run_takes_more_than_the_bound(tmp_path: Path, family: str, model: str) -> None:
    made = emitted(tmp_path, family, model, PAINTED)
    found = footprint(made)
    emulator = made.toolchain.emulator
    done = build.call([*emulator, str(made.program)], seconds=60)
    assert done.returncode == 0
    used = int.from_bytes(done.stdout[:4], "little")
    assert found.stack is not None
    assert 0 < used <= found.stack <= used + LIBRARY_STACK + 24
