"""The emitted HLS C++, compiled with g++, gives what the pipeline and the graph give, stream by stream."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import qcompile
from qcompile.errors import Unsupported
from qcompile.ir import Array, Graph
from qcompile.targets.hls import cplusplus
from qcompile.targets.hls.cplusplus import emit
from qcompile.targets.hls.cplusplus_sim import CSim
from qcompile.targets.hls.legalise import Folding, legalise
from qcompile.targets.hls.pipeline import Pipeline
from qcompile.targets.hls.units import MatrixVector
from tests.strategies import HAVE_UNITS, feeds, graphs, singles
from tests.targets.test_families import data, network

SHIM = Path(cplusplus.__file__).parent / "shim"
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
STRICT = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
FOLDING: Folding = {"first.acc": (4, 9), "pool": (2, 1), "dense.acc": (5, 24)}


def vendor() -> Path:
    """The Apache-2.0 headers that hls4ml carries; `make tools` installs it, and without it tests fail."""
    if "HLS_AP_TYPES" in os.environ:
        return Path(os.environ["HLS_AP_TYPES"])
    spec = importlib.util.find_spec("hls4ml")
    assert spec is not None, "pip install --no-deps hls4ml"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "templates/vivado/ap_types"


def write(files: Mapping[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def check(graph: Graph, sim: CSim, codes: Mapping[str, Array], traces: int = 2) -> None:
    """Outputs of all rows against the graph, every stream of some against the pipeline."""
    want, got = graph.run(codes), sim.run(codes)
    assert want.keys() == got.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    for i in range(min(traces, len(next(iter(codes.values()))))):
        row = {name: x[i] for name, x in codes.items()}
        expected, words = sim.pipeline.trace(row), sim.trace(row)
        assert words.keys() == expected.keys()
        for name, w in expected.items():
            np.testing.assert_array_equal(words[name], w, err_msg=name)


# ------------------------------------------------------------------- random networks


@dataclass(frozen=True)
class Member(CSim):
    """One of many networks in one program, which its number selects."""

    number: int = 0

    @cached_property
    def traced(self) -> Path:
        script = self.folder / "traced"
        script.write_text(f'#!/bin/sh\nexec "{self.folder.parent / "all"}" {self.number}\n')
        script.chmod(0o755)
        return script

    @property
    def program(self) -> Path:
        raise AssertionError("it was built with all others")


def together(pipelines: Sequence[Pipeline], folder: Path) -> list[Member]:
    """Compile many networks at once, each in a namespace; what they all include comes first."""
    shutil.rmtree(folder, ignore_errors=True)
    members = []
    text = ["#include <cstdlib>", "#define QC_TRACE_STREAMS"]
    for i, p in enumerate(pipelines):
        place = write(emit(p, f"net{i}", []), folder / f"net{i}")
        members.append(Member(place, p, f"net{i}", number=i))
        if i == 0:
            text += [f'#include "net0/firmware/qc_{h}.h"' for h in ("kernels", "words")]
        text += [f"namespace n{i} {{", f'#include "net{i}/firmware/net{i}.cpp"']
        text += [f'#include "net{i}/net{i}_run.cpp"', "}"]
    cases = "".join(f"case {i}: return n{i}::main();" for i in range(len(members)))
    text.append(f"int main(int, char **a) {{ switch (std::atoi(a[1])) {{ {cases} }} return 2; }}")
    (folder / "all.cpp").write_text("\n".join(text))
    flags = ["-std=c++14", "-O0", *STRICT, "-Wno-unused-function", "-fsanitize=undefined"]
    flags += ["-fno-sanitize-recover=all", "-I.", "-Inet0/shim"]
    command = ["g++", *flags, "all.cpp", "-o", "all"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return members


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def folded(draw: st.DataObject, graph: Graph) -> Pipeline:
    """With any divisors for the layers."""
    folding = {
        op.layer: tuple(draw.draw(st.sampled_from(divisors(n))) for n in op.extent)
        for op in legalise(graph).ops
        if op.fold is not None
    }
    return legalise(graph, folding)  # type: ignore[arg-type]


@given(draw=st.data(), seed=st.integers(0, 99))
@settings(
    max_examples=3,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_random_networks_are_exact_in_every_stream(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject, seed: int
) -> None:
    made: list[tuple[Graph, Pipeline]] = []
    wanted: list[st.SearchStrategy[Graph]] = [
        *map(singles, HAVE_UNITS),
        *[graphs(operators=HAVE_UNITS)] * 6,
    ]
    for strategy in wanted:
        graph = draw.draw(strategy)
        try:
            made.append((graph, folded(draw, graph)))
        except Unsupported:
            continue
    folder = tmp_path_factory.mktemp("all")
    for member, (graph, pipeline) in zip(together([p for _, p in made], folder), made, strict=True):
        for codes in feeds(graph, seed)[:3]:
            row = {name: x[0] for name, x in codes.items()}
            expected, words = pipeline.trace(row), member.trace(row)
            assert words.keys() == expected.keys()
            for name, w in expected.items():
                np.testing.assert_array_equal(words[name], w, err_msg=name)
            golden = graph.run(codes)
            for p in pipeline.outputs:
                np.testing.assert_array_equal(
                    p.receive(words[p.stream.name]), golden[p.name][0], err_msg=p.name
                )


# -------------------------------------------------------------------- known networks


@pytest.mark.parametrize("folding", [None, FOLDING])
def test_a_small_network_is_exact_and_clean_of_undefined_behaviour(
    tmp_path: Path, folding: Folding | None
) -> None:
    pipeline = legalise(network(), folding)
    place = write(emit(pipeline, "net", []), tmp_path)
    check(network(), CSim(place, pipeline, "net", options=(*SANITIZE, *STRICT)), data(9))


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [("digits-resnet", "int2", "int4")],
)
def test_shipped_networks_are_exact(
    tmp_path: Path, models: Path, name: str, weights: str, activations: str
) -> None:
    artifact = qcompile.compile(
        models / name / "model.onnx",
        calibration=models / name / "calib.toml",
        output=tmp_path / "out",
        weights=weights,
        activations=activations,
    )
    graph = artifact.graph
    ((port, value),) = graph.inputs
    kind = value.type.dtype
    rng = np.random.default_rng(1)
    rows = rng.integers(kind.lo, kind.hi + 1, (6, *value.type.shape[1:])).astype(kind.numpy)
    rows[0], rows[1] = kind.lo, kind.hi
    # all products of a result at once: words of hundreds of bits
    folding = {
        op.layer: (divisors(op.extent[0])[1 % len(divisors(op.extent[0]))], op.extent[1])
        for op in legalise(graph).ops
        if op.fold is not None
    }
    pipeline = legalise(graph, folding)
    place = write(emit(pipeline, "net", []), tmp_path / "hls")
    check(graph, CSim(place, pipeline, "net"), {port.name: rows}, traces=1)


def test_other_headers_give_the_same(tmp_path: Path) -> None:
    pipeline = legalise(network(), FOLDING)
    place = write(emit(pipeline, "net", []), tmp_path)
    sim = CSim(place, pipeline, "net", headers=vendor(), options=("-w",))
    check(network(), sim, data(9))


# -------------------------------------------------------------------- the test bench


def worst(pipeline: Pipeline) -> Array:
    """An image whose middle pixels drive one channel of the first layer as far as it goes."""
    op = next(o for o in pipeline.ops if isinstance(o, MatrixVector))
    reach = np.where(op.weights > 0, 127, -128) * op.weights
    channel = int((reach.sum(axis=1) + op.bias).argmax())
    most = int(reach[channel].sum() + op.bias[channel])
    assert most >= 1 << (op.acc_bits - 2)  # it needs every bit
    patch = np.where(op.weights[channel] > 0, 127, -128).reshape(3, 3, 3)
    row = np.zeros((12, 12, 3), np.int8)
    row[4:7, 4:7] = patch
    return row[None]


def bench(folder: Path) -> Path:
    pipeline = legalise(network(), FOLDING)
    (name,) = data(1)
    codes = {name: np.concatenate([data(3)[name], worst(pipeline)])}
    return write(emit(pipeline, "net", [codes]), folder)


def csim(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "csim", "CXXFLAGS=-O0", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("headers", ["shim", "vendor"])
def test_the_test_bench_passes(tmp_path: Path, headers: str) -> None:
    types = [] if headers == "shim" else [f"AP_TYPES={vendor()}"]
    done = csim(bench(tmp_path), *types)
    assert done.returncode == 0, done.stderr
    assert "4 images, 0 mismatching words" in done.stdout


def _rounding(text: str) -> str:
    return re.sub(r"(> total = ap_int<\d+>)\(\d+\)", r"\1(0)", text, count=1)


def _rows(text: str) -> str:
    """The ring of the first window loses a row."""
    row = int(re.findall(r"row_words = (\d+);", text)[0])
    words = int(re.findall(r"ring_words = (\d+);", text)[0])
    top = int(re.findall(r"first_top = (\d+);", text)[0])
    text = text.replace(f"ring_words = {words};", f"ring_words = {words - row};", 1)
    return text.replace(f"first_top = {top};", f"first_top = {top - row};", 1)


def _accumulator(text: str) -> str:
    """The first one loses a bit, wherever its width is written."""
    wide = int(re.findall(r"typedef ap_int<(\d+)> acc_t;", text)[0])
    start = text.index("struct l0_matvec_config")
    end = text.index("struct ", start + 1)
    part = text[start:end].replace(f"ap_int<{wide}> acc", f"ap_int<{wide - 1}> acc")
    return text[:start] + part.replace(f"ap_int<{wide}> x0", f"ap_int<{wide - 1}> x0") + text[end:]


def _zero(text: str) -> str:
    return text.replace("fill = 3;", "fill = 2;", 1)


@pytest.mark.parametrize("fault", [_rounding, _rows, _accumulator, _zero])
def test_the_test_bench_finds_faults(tmp_path: Path, fault: Callable[[str], str]) -> None:
    place = bench(tmp_path) / "firmware/parameters.h"
    sound = place.read_text()
    broken = fault(sound)
    assert broken != sound
    place.write_text(broken)
    done = csim(tmp_path)
    assert done.returncode != 0
    assert re.search(r"image \d+: word \d+ of out0 is", done.stdout), done.stderr


def test_the_test_bench_wants_whole_images(tmp_path: Path) -> None:
    place = bench(tmp_path)
    assert csim(place).returncode == 0
    sent, expected = place / "tb_data/in0.dat", place / "tb_data/out0.dat"
    lines = sent.read_text().splitlines()
    for content in ("\n".join(lines[:-1]), ""):
        sent.write_text(content)
        assert csim(place).returncode != 0
    sent.write_text("\n".join(lines))
    expected.write_text("\n".join(expected.read_text().splitlines()[:-1]))
    assert csim(place).returncode != 0


def test_no_dividers_and_no_paths(tmp_path: Path) -> None:
    files = emit(legalise(network(), FOLDING), "net", [])
    for name, content in files.items():
        if name.startswith("firmware/") and name != "firmware/qc_words.h":
            code = re.sub(r"/\*.*?\*/|//.*?$|#.*?$", "", content.decode(), flags=re.S | re.M)
            assert "/" not in code, name
            assert "%" not in code, name
        assert b"/tmp" not in content
    assert emit(legalise(network(), FOLDING), "net", []) == files


# --------------------------------------------------------------------------- the shim


def _type(width: int, signed: bool) -> str:
    return f"ap_{'' if signed else 'u'}int<{width}>"


def _wrap(x: int, width: int, signed: bool) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if signed and x >> (width - 1) else x


def _constant(x: int, width: int) -> str:
    return f'"0x{x & ((1 << width) - 1):x}"'


def arithmetic(seed: int, count: int) -> tuple[str, list[int]]:
    """A program that prints results of operators as 256 bits, and what Python says they are."""
    rng = random.Random(seed)
    widths = [1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 70, 96, 97, 127, 128]
    lines: list[str] = []
    results: list[int] = []

    def show(expression: str, value: int) -> None:
        lines.append(f"show({expression});")
        results.append(value)

    for _ in range(count):
        (wa, sa), (wb, sb) = ((rng.choice(widths), rng.random() < 0.5) for _ in range(2))
        extremes = [0, 1, -1, 1 << (wa - 1), (1 << (wa - 1)) - 1]
        a = _wrap(rng.choice([*extremes, rng.getrandbits(wa)]), wa, sa)
        b = _wrap(rng.choice([0, 1, -1, 1 << (wb - 1), rng.getrandbits(wb)]), wb, sb)
        lines.append(
            f"{{ {_type(wa, sa)} a({_constant(a, wa)}); {_type(wb, sb)} b({_constant(b, wb)});"
        )
        show("a + b", a + b)
        show("a - b", a - b)
        show("a * b", a * b)
        show("-a", -a)
        for op in ("<", "<=", ">", ">=", "==", "!="):
            show(f"ap_uint<1>(a {op} b)", int(eval(f"a {op} b")))
        show("ap_uint<1>(a < 5)", int(a < 5))
        if sa or wa <= 64:
            # the other headers say no for wider unsigned numbers
            show("ap_uint<1>(-7LL <= a)", int(a >= -7))
        show("a + 1000", a + 1000)
        n = rng.randrange(wa)
        show(f"a >> {n}", a >> n)
        show(f"a << {n}", _wrap(a << n, wa, sa))
        show(f"{_type(wb, sb)}(a)", _wrap(a, wb, sb))
        lo = rng.randrange(wa)
        hi = rng.randrange(lo, wa)
        cut = (a >> lo) & ((1 << (hi - lo + 1)) - 1)
        show(f"{_type(128, False)}(a.range({hi}, {lo}))", cut)
        show("ap_int<64>(a.to_int64())", _wrap(a, 64, True))
        show("ap_int<32>(a.to_int())", _wrap(a, 32, True))
        lines.append(f"a.range({hi}, {lo}) = b;")
        mask = ((1 << (hi - lo + 1)) - 1) << lo
        a = _wrap((a & ~mask) | ((b << lo) & mask), wa, sa)
        show("a", a)
        lines.append("a += b;")
        a = _wrap(a + b, wa, sa)
        show("a", a)
        lines.append("}")
    head = (
        '#include "ap_int.h"\n#include <cstdio>\n'
        "template <class T> void show(const T &x) {\n"
        "ap_int<288> wide = x;\n"
        "for (int lo = 256; lo >= 0; lo -= 32)\n"
        'std::printf("%08x", unsigned(wide.range(lo + 31, lo).to_uint()));\n'
        'std::printf("\\n"); }\n'
    )
    return head + "int main() {\n" + "\n".join(lines) + "\n}\n", results


@pytest.mark.parametrize("headers", ["shim", "vendor"])
def test_integers_of_any_width(tmp_path: Path, headers: str) -> None:
    text, results = arithmetic(7, 40 if headers == "shim" else 25)
    (tmp_path / "a.cpp").write_text(text)
    shim = headers == "shim"
    folder = SHIM if shim else vendor()
    flags = ["-std=c++14", "-O0", *(("-fsanitize=address,undefined", *STRICT) if shim else ("-w",))]
    flags += ["-fno-sanitize-recover=all"] if shim else []
    done = subprocess.run(
        ["g++", *flags, f"-I{folder}", "a.cpp", "-o", "a"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[:3000]
    ran = subprocess.run(
        ["./a"], cwd=tmp_path, capture_output=True, env={"ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert ran.returncode == 0, ran.stderr.decode()[:3000]
    got = [_wrap(int(line, 16), 288, True) for line in ran.stdout.split()]
    assert got == results


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("s.write(1); s.read();", ""),
        ("s.read();", "read while it is empty"),
        ("s.write(1);", "nobody read"),
    ],
)
def test_a_stream_is_read_as_often_as_it_is_written(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "a.cpp").write_text(
        f'#include "hls_stream.h"\nint main() {{ hls::stream<int> s("s"); {body} }}\n'
    )
    command = ["g++", "-std=c++14", f"-I{SHIM}", "a.cpp", "-o", "a"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./a"], cwd=tmp_path, capture_output=True, text=True)
    assert said in done.stderr
    assert (done.returncode == 0) == (not said)
