"""The targets x86 and arm from graph to run: equal to the graph, certified, gated by cpu, plain about missing tools."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from qcompile import target as families
from qcompile.errors import BadInput, ToolchainMissing, VerificationMismatch
from qcompile.ir import (
    Array,
    Conv,
    DType,
    Graph,
    MatMul,
    MaxPool,
    Port,
    Rescale,
    Reshape,
    TensorType,
    Value,
    arith,
)
from qcompile.targets import arm
from qcompile.targets.c import build, run

NAME = "net"
PLACES = [
    ("x86", "generic"),
    ("x86", "native"),
    ("arm", "cortex-a53"),
    ("arm", "cortex-a76"),
    ("arm", "max"),
]
DEFAULTS = [("x86", "generic"), ("arm", "cortex-a53")]
STRICT = "-std=c99 -O2 -Wall -Wextra -Wconversion -Wshadow -Werror"


def network() -> Graph:
    """A small CNN: convolution, pooling, convolution, dense layer with 16-bit results."""
    rng = np.random.default_rng(0)
    g = Graph(NAME)

    def weights(name: str, *shape: int) -> tuple[Value, Value]:
        w = rng.integers(-127, 128, shape).astype(np.int8)
        b = rng.integers(-1000, 1000, shape[0]).astype(np.int32)
        return (
            g.constant(w, TensorType(DType.I8, w.shape), f"{name}.weight"),
            g.constant(b, TensorType(DType.I32, b.shape), f"{name}.bias"),
        )

    def rescale(x: Value, step: int, out: DType, name: str) -> Value:
        operand = arith.AccOperand((Fraction(1, step),), (1 << 24,))
        fit = arith.fit_rescale([operand], [], bits=16)
        op = Rescale(fit.accs, fit.vals, fit.f, 3, out.lo, out.hi, out)
        return g.add(op, x, name=name)

    def conv(x: Value, outputs: int, stride: int, name: str) -> Value:
        w, b = weights(name, outputs, 3, 3, x.type.shape[-1])
        op = Conv((stride, stride), (1, 1, 1, 1), (1, 1), 1, 3)
        return rescale(g.add(op, x, w, b, name=f"{name}.acc"), 3000, DType.I8, name)

    x = g.add_input(Port('image */ #include "x"', 0.1, 3), TensorType(DType.I8, (1, 12, 12, 3)))
    y = conv(x, 8, 1, "first")
    y = g.add(MaxPool((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)), y, name="pool")
    y = conv(y, 16, 2, "second")
    y = g.add(Reshape((-1, 144)), y, name="flat")
    y = g.add(MatMul(), y, *weights("dense", 10, 144), name="dense.acc")
    g.add_output(Port("<script>", 0.01, 3), rescale(y, 30, DType.I16, "dense"))
    g.verify()
    return g


def data(rows: int) -> dict[str, Array]:
    rng = np.random.default_rng(rows)
    codes = rng.integers(-128, 128, (rows, 12, 12, 3)).astype(np.int8)
    return {'image */ #include "x"': codes}


def emitted(folder: Path, family: str, cpu: str) -> Path:
    vectors = [{k: v[i : i + 1] for k, v in data(2).items()} for i in range(2)]
    lowered = families.get(family).lower(network(), name=NAME, cpu=cpu, vectors=vectors)
    for name, content in lowered.files.items():
        (folder / name).write_bytes(content)
    return folder


def same(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize(("family", "cpu"), PLACES)
def test_every_cpu_gives_what_the_graph_gives(tmp_path: Path, family: str, cpu: str) -> None:
    g, feeds = network(), data(9)
    runner = families.get(family).runner(emitted(tmp_path, family, cpu), g, name=NAME, cpu=cpu)
    values: dict[str, Array] = {}
    golden = g.run(feeds, on_value=lambda v, x: values.update({v.name: x}))
    assert same(runner.run(feeds), golden)
    traced = runner.trace(feeds)
    assert {"first", "pool", "second", "dense", "<script>"} <= traced.keys()
    assert same(traced, {k: {**golden, **values}[k] for k in traced})


@pytest.mark.parametrize(("family", "cpu"), DEFAULTS)
def test_undefined_behaviour_and_bad_memory_are_looked_for(
    tmp_path: Path, family: str, cpu: str
) -> None:
    folder = emitted(tmp_path, family, cpu)

    def run() -> dict[str, Array]:
        runner = families.get(family).runner(folder, network(), name=NAME, cpu=cpu, sanitize=True)
        return runner.run(data(3))

    assert same(run(), network().run(data(3)))
    source = (folder / "model.c").read_text()
    planted = source.replace(
        "return 0;", "volatile int most = 2147483647; most = most + 1; return 0;"
    )
    assert planted != source
    (folder / "model.c").write_text(planted)
    with pytest.raises(VerificationMismatch, match=r"signed integer overflow|died of SIG"):
        run()


@pytest.mark.parametrize(("family", "cpu"), PLACES)
def test_the_emitted_model_is_certified(tmp_path: Path, family: str, cpu: str) -> None:
    found = families.get(family).certify(emitted(tmp_path, family, cpu), name=NAME, cpu=cpu)
    assert found.findings == ()
    assert found.clean
    assert found.instructions > 500


PLANTS: dict[str, tuple[str, str]] = {
    "float multiplication": (
        "static volatile float planted = 0.5f; planted = planted * 3.0f;",
        "model.o: net_run has (v?mulss|fmul)",
    ),
    "double division": (
        "static volatile double planted = 0.5; planted = 1.0 / planted;",
        "model.o: net_run has (v?divsd|fdiv)",
    ),
    "call of a routine": (
        "{ extern int __fixdfsi(long); static volatile int planted; planted = __fixdfsi(planted); }",
        "model.o: symbol __fixdfsi is a floating-point routine",
    ),
}


@pytest.mark.parametrize("what", PLANTS)
@pytest.mark.parametrize(("family", "cpu"), DEFAULTS)
def test_a_float_planted_in_the_emitted_model_is_found(
    tmp_path: Path, family: str, cpu: str, what: str
) -> None:
    code, finding = PLANTS[what]
    folder = emitted(tmp_path, family, cpu)
    source = (folder / "model.c").read_text()
    assert source.count("    return 0;\n}\n") == 1
    (folder / "model.c").write_text(
        source.replace("    return 0;\n}\n", f"    {code}\n    return 0;\n}}\n")
    )
    found = families.get(family).certify(folder, name=NAME, cpu=cpu)
    assert not found.clean
    assert [f for f in found.findings if re.match(finding, f)]


def test_a_dot_product_program_dies_where_there_is_no_dot_product(tmp_path: Path) -> None:
    """The emulator refuses what the chip would: the gate between the cpus is a real one."""
    folder = emitted(tmp_path, "arm", "max")
    g = network()

    def under(cpu: str) -> dict[str, Array]:
        chain = replace(arm._toolchain("max"), emulator=("qemu-aarch64", "-cpu", cpu))
        return run.Program(build.Build(folder, NAME, chain), g).run(data(2))

    assert same(under("max"), g.run(data(2)))
    with pytest.raises(VerificationMismatch, match=r"died of SIGILL in .*cortex-a53"):
        under("cortex-a53")


def make(folder: Path, *arguments: str) -> str:
    command = ["make", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


ZIG = f"{sys.executable} -m ziglang"
ZIG_FOR_ARM = (
    f"CC={ZIG} cc -target aarch64-linux-musl",
    f"AR={ZIG} ar",
    "HOST=host_linux_aarch64.c",
    "LDFLAGS=-nostdlib -static",
)


@pytest.mark.parametrize(
    ("family", "cpu", "options"),
    [
        ("x86", "generic", ()),
        ("arm", "cortex-a53", ZIG_FOR_ARM),
        ("arm", "max", ZIG_FOR_ARM),
    ],
)
def test_an_artifact_builds_without_a_warning_and_passes_its_self_test(
    tmp_path: Path, family: str, cpu: str, options: Sequence[str]
) -> None:
    out = make(emitted(tmp_path, family, cpu), *options, f"CFLAGS={STRICT}", "test")
    assert "net: 2 vectors, 0 mismatches" in out.splitlines()


def test_clang_builds_an_artifact_without_a_warning(tmp_path: Path) -> None:
    options = (f"CC={ZIG} cc -target x86_64-linux-gnu", f"AR={ZIG} ar", "TARGET_FLAGS=")
    objects = ("selftest.o", "runner.o", "bench.o", "host_posix.o")
    make(emitted(tmp_path, "x86", "generic"), *options, f"CFLAGS={STRICT}", "all", *objects)


@pytest.mark.parametrize(("family", "cpu"), PLACES)
def test_lowering_is_pure(family: str, cpu: str) -> None:
    def lower() -> Mapping[str, bytes]:
        made = families.get(family).lower(network(), name=NAME, cpu=cpu, vectors=[data(1)])
        return made.files

    first = lower()
    assert first == lower()
    assert {
        "model.c",
        "model.h",
        "weights.h",
        "vectors.h",
        "Makefile",
        "selftest.c",
    } <= first.keys()
    for name, content in first.items():
        assert b"*/ #include" not in content, name
        assert b"<script>" not in content, name


@pytest.mark.parametrize("family", ["x86", "arm"])
def test_an_unknown_cpu_is_refused(tmp_path: Path, family: str) -> None:
    target = families.get(family)
    calls: list[Callable[[], object]] = [
        lambda: target.lower(network(), name=NAME, cpu="z80", vectors=()),
        lambda: target.runner(tmp_path, network(), name=NAME, cpu="z80"),
        lambda: target.certify(tmp_path, name=NAME, cpu="z80"),
    ]
    for call in calls:
        with pytest.raises(BadInput, match=f"{family} knows no cpu 'z80'; choose one of"):
            call()


def test_this_machine_has_everything() -> None:
    assert not any(families.get(f).missing() for f in families.names())


def test_what_is_missing_is_said_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = emitted(tmp_path, "arm", "cortex-a53")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert families.get("x86").missing() == ()
    (lack,) = families.get("arm").missing()
    assert "apt-get install qemu-user" in lack
    with pytest.raises(ToolchainMissing, match="apt-get install qemu-user"):
        families.get("arm").runner(folder, network(), name=NAME, cpu="cortex-a53")
    assert families.get("arm").certify(folder, name=NAME, cpu="cortex-a53").clean
    monkeypatch.setattr(build, "find_zig", lambda: None)
    assert "pip install 'qcompile[toolchain]'" in families.get("arm").missing()[0]
    assert "apt-get install gcc" in families.get("x86").missing()[0]
    for family, cpu in DEFAULTS:
        target = families.get(family)
        with pytest.raises(ToolchainMissing, match=r"pip install 'qcompile\[toolchain\]'"):
            target.runner(folder, network(), name=NAME, cpu=cpu)


def test_zig_stands_in_for_the_compiler_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = emitted(tmp_path, "x86", "generic")
    monkeypatch.setenv("PATH", str(tmp_path))
    runner = families.get("x86").runner(folder, network(), name=NAME, cpu="generic")
    assert same(runner.run(data(2)), network().run(data(2)))
    assert families.get("x86").certify(folder, name=NAME, cpu="generic").clean
    with pytest.raises(ToolchainMissing, match="the sanitizers need gcc or clang"):
        families.get("x86").runner(folder, network(), name=NAME, cpu="generic", sanitize=True)


def test_x86_programs_need_an_x86_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(ToolchainMissing, match="x86-64 machine"):
        families.get("x86").runner(tmp_path, network(), name=NAME, cpu="generic")
