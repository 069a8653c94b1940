"""Executed instructions: what hand-written assembly must execute, and what the emulator's single-step log has."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from qcompile import target as families
from qcompile.errors import BadInput, QcompileError, ToolchainMissing
from qcompile.ir import DType, Graph, MatMul, Port, Rescale, Reshape, TensorType, arith
from qcompile.target import Counts, Layer, LayerCount
from qcompile.targets.c import build, count

NAME = "net"
EMULATED = [("arm", "cortex-a53"), ("cortex-m3", "cortex-m3")]
FEEDS = {"x": np.arange(16, dtype=np.int8).reshape(1, 16)}

FIRST, SHARED = 250, 30
"""Turns of the loops below; a loop of n turns executes 2 n instructions."""

A64 = """
__asm__(".text\\n.global net_run\\n.type net_run, %function\\n"
"net_run: stp x29, x30, [sp, #-16]!\\n bl shared\\n"
" bl layer_first.constprop.0\\n bl layer_second\\n bl layer_first.constprop.0\\n"
" mov w0, #0\\n ldp x29, x30, [sp], #16\\n ret\\n.size net_run, . - net_run\\n"
".type layer_first.constprop.0, %function\\n"
"layer_first.constprop.0: mov x9, #FIRST\\n1: subs x9, x9, #1\\n b.ne 1b\\n ret\\n"
".type layer_second, %function\\n"
"layer_second: stp x29, x30, [sp, #-16]!\\n bl shared\\n bl layer_third\\n ldp x29, x30, [sp], #16\\n ret\\n"
".type layer_third, %function\\nlayer_third: ret\\n"
".type shared, %function\\nshared: mov x9, #SHARED\\n2: subs x9, x9, #1\\n b.ne 2b\\n ret\\n"
".type layer_unused, %object\\nlayer_unused: .word 0\\n");
"""
THUMB = """
__asm__(".syntax unified\\n.text\\n.thumb\\n.global net_run\\n.thumb_func\\n.type net_run, %function\\n"
"net_run: push {r4, lr}\\n bl shared\\n"
" bl layer_first.constprop.0\\n bl layer_second\\n bl layer_first.constprop.0\\n"
" nop\\n movs r0, #0\\n pop {r4, pc}\\n.size net_run, . - net_run\\n"
".thumb_func\\n.type layer_first.constprop.0, %function\\n"
"layer_first.constprop.0: movs r0, #FIRST\\n1: subs r0, #1\\n bne 1b\\n bx lr\\n"
".thumb_func\\n.type layer_second, %function\\n"
"layer_second: push {r4, lr}\\n bl shared\\n bl layer_third\\n nop\\n pop {r4, pc}\\n"
".thumb_func\\n.type layer_third, %function\\nlayer_third: bx lr\\n"
".thumb_func\\n.type shared, %function\\nshared: movs r0, #SHARED\\n2: subs r0, #1\\n bne 2b\\n bx lr\\n"
".type layer_unused, %object\\nlayer_unused: .word 0\\n");
"""


def network() -> Graph:
    """Two dense layers."""
    rng = np.random.default_rng(3)
    g = Graph(NAME)
    y = g.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 16)))
    for name, inputs, outputs in (("a", 16, 12), ("b", 12, 5)):
        w = rng.integers(-127, 128, (outputs, inputs)).astype(np.int8)
        b = rng.integers(-99, 99, outputs).astype(np.int32)
        weight = g.constant(w, TensorType(DType.I8, w.shape), f"{name}.weight")
        bias = g.constant(b, TensorType(DType.I32, b.shape), f"{name}.bias")
        y = g.add(MatMul(), y, weight, bias, name=f"{name}.acc")
        operand = arith.AccOperand((Fraction(1, 500),), (1 << 24,))
        fit = arith.fit_rescale([operand], [], bits=16)
        op = Rescale(fit.accs, fit.vals, fit.f, 0, -128, 127, DType.I8)
        y = g.add(op, y, name=name)
    g.add_output(Port("y", 0.1, 0), y)
    g.verify()
    return g


def echo() -> Graph:
    g = Graph(NAME)
    x = g.add_input(Port("x", 0.1, 0), TensorType(DType.I8, (1, 16)))
    g.add_output(Port("y", 0.1, 0), g.add(Reshape((-1, 16)), x, name="y"))
    return g


def built(folder: Path, family: str, cpu: str, graph: Graph, model: str = "") -> build.Build:
    target = families.get(family)
    for name, data in target.lower(graph, name=NAME, cpu=cpu, vectors=()).files.items():
        (folder / name).write_bytes(data)
    if model:
        (folder / "model.c").write_text('#include "model.h"\n' + model)
    runner = target.runner(folder, graph, name=NAME, cpu=cpu)
    made = runner.build  # type: ignore[attr-defined]
    assert isinstance(made, build.Build)
    return made


def layers(*names: str) -> list[Layer]:
    functions = {"again": "layer_first"}
    return [
        Layer(name, "by hand", functions.get(name, f"layer_{name.strip('/')}"), 5, 0, 7)
        for name in names
    ]


@pytest.fixture(scope="module", params=EMULATED, ids=lambda place: place[0])
def handmade(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> build.Build:
    family, cpu = request.param
    code = (A64 if family == "arm" else THUMB).replace("#FIRST", f"#{FIRST}")
    code = code.replace("#SHARED", f"#{SHARED}")
    return built(tmp_path_factory.mktemp(family), family, cpu, echo(), code)


ALONE, CALLED = 2 * FIRST + 2, 2 * SHARED + 2
ENTRY = 8 + CALLED
"""`net_run` has eight instructions; what it calls that is no layer is its own."""


def test_every_layer_is_what_was_written(handmade: build.Build) -> None:
    """A function called twice is two layers; one that a layer calls belongs to it, layer or not."""
    found = count.count(handmade, echo(), FEEDS, layers("/first", "second", "again"))
    wanted = (
        LayerCount("/first", "by hand", 5, 7, ALONE),
        LayerCount("second", "by hand", 5, 7, 5 + CALLED + 1),
        LayerCount("again", "by hand", 5, 7, ALONE),
    )
    assert found == Counts("instructions", ENTRY, wanted)
    assert found.total == 2 * ALONE + 6 + CALLED + ENTRY


def test_a_layer_whose_call_was_dropped_executes_nothing(handmade: build.Build) -> None:
    found = count.count(handmade, echo(), FEEDS, layers("first", "dropped", "second", "again"))
    assert [layer.executed for layer in found.layers] == [ALONE, 0, 6 + CALLED, ALONE]


def test_layers_that_were_not_called_are_an_error(handmade: build.Build) -> None:
    with pytest.raises(QcompileError, match="called 3 layer functions, not those of its 4 layers"):
        count.count(handmade, echo(), FEEDS, layers(*"abcd"))


def logged(made: build.Build, folder: Path) -> Counter[str]:
    """Instructions of each function of one inference, from the emulator's log of single steps."""
    emulator, *arguments = made.toolchain.emulator
    log = folder / "log"
    step = ["-singlestep", "-d", "exec,nochain", "-D", str(log)]
    subprocess.run(
        [emulator, *step, *arguments, str(made.program)],
        input=FEEDS["x"].tobytes(), check=True, timeout=120, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    names = re.findall(r"^Trace .*\] (\S+)", log.read_text(), re.MULTILINE)
    begin = names.index(f"{NAME}_run")
    return Counter(names[begin : names.index("main", begin)])


@pytest.mark.parametrize(("family", "cpu"), EMULATED)
def test_a_network_is_counted_as_the_log_has_it(tmp_path: Path, family: str, cpu: str) -> None:
    g = network()
    made = built(tmp_path, family, cpu, g)
    found = count.count(made, g, FEEDS, layers("a", "b"))
    assert count.count(made, g, FEEDS, layers("a", "b")) == found
    wanted = logged(made, tmp_path)
    assert found.total == wanted.total() > 100
    assert found.entry == wanted[f"{NAME}_run"]
    functions = sorted(n for n in wanted if n.startswith("layer_"))
    assert len(functions) == 2
    assert all(c.executed >= wanted[f] > 0 for c, f in zip(found.layers, functions, strict=True))


def test_a_native_program_is_not_counted(tmp_path: Path) -> None:
    made = built(tmp_path, "x86", "generic", network())
    with pytest.raises(ToolchainMissing, match="only an emulator can count"):
        count.count(made, network(), FEEDS, layers("a", "b"))


def test_feeds_are_those_of_one_call(handmade: build.Build) -> None:
    for feeds in ({}, {"x": FEEDS["x"].astype(np.int16)}, {"x": np.zeros((2, 16), np.int8)}):
        with pytest.raises(BadInput, match="one call takes"):
            count.count(handmade, echo(), feeds, ["a", "b"])


def test_the_plugin_speaks_the_emulators_interface(
    handmade: build.Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU refuses a plugin of the interface that it has not, and the error says so."""
    emulator = handmade.toolchain.emulator[0]
    other = 8 if count._major(emulator) >= 9 else 9
    monkeypatch.setattr(count, "_major", lambda emulator: other)
    count.plugin.cache_clear()
    with pytest.raises(ToolchainMissing, match="takes no plugin"):
        count.count(handmade, echo(), FEEDS, layers("a", "b"))
    count.plugin.cache_clear()


def test_a_program_that_stops_is_an_error(handmade: build.Build) -> None:
    emulator = (handmade.toolchain.emulator[0], "--no-such-option")
    broken = replace(handmade, toolchain=replace(handmade.toolchain, emulator=emulator))
    with pytest.raises(QcompileError, match="does not run"):
        count.count(broken, echo(), FEEDS, layers("a", "b"))
