"""The target tvm: what TVM builds of the Relax module equals the integer graph, as do the objects it makes of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from importlib import import_module, metadata
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile import border, driver, pipeline, target
from qcompile.artifact import Artifact, load
from qcompile.errors import BadInput, ToolchainMissing, Unsupported, VerificationMismatch
from qcompile.ir import (
    Array,
    Conv,
    DType,
    Graph,
    MatMul,
    Port,
    Rescale,
    Reshape,
    TensorType,
    arith,
)
from qcompile.ir.arith import Acc, Val
from qcompile.job import Job
from qcompile.options import Options
from qcompile.target import Placement
from qcompile.targets import tvm as family
from qcompile.targets.tvm.objects import Objects, compiler
from qcompile.targets.tvm.package import versions
from qcompile.verify import verify
from tests import strategies
from tests.conftest import ROOT
from tests.targets.test_families import NAME, data, network, same
from tests.test_zoo import NETWORKS, load_data

TVM = target.get("tvm")
SERIAL = count()
FEW = settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
ELSEWHERE = {
    "aarch64": "EM_AARCH64",
    "cortex-m4": "EM_ARM",
    "cortex-m55": "EM_ARM",
    "hexagon": "EM_QDSP6",
    "riscv64": "EM_RISCV",
}


def emitted(folder: Path, graph: Graph, name: str = NAME, cpu: str = "generic") -> Path:
    for path, content in TVM.lower(graph, name=name, cpu=cpu, vectors=()).files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@contextmanager
def package(graph: Graph) -> Iterator[tuple[Path, str]]:
    """The emitted package inside this process, under a name of its own."""
    name = f"graph{next(SERIAL)}"
    with tempfile.TemporaryDirectory() as folder:
        emitted(Path(folder), graph, name)
        sys.path.insert(0, folder)
        try:
            yield Path(folder), name
        finally:
            sys.path.remove(folder)
            for module in [m for m in sys.modules if m.startswith(f"{name}_tvm")]:
                del sys.modules[module]


def part(name: str, module: str) -> object:
    return import_module(f"{name}_tvm.{module}")


def equal(graph: Graph, rows: list[dict[str, Array]], *, trace: bool) -> None:
    """Every output on every row, and with `trace` every operator's result."""
    with package(graph) as (_, name):
        described = part(name, "network").NETWORK
        program = part(name, "program").Program(described, trace=trace)
        for row in rows:
            values: list[Array] = []
            outputs = graph.run(row, on_value=lambda _, x, values=values: values.append(x))
            got = program(*(row[port.name] for port, _ in graph.inputs))
            wanted = [outputs[port.name] for port, _ in graph.outputs]
            for mine, golden in zip(got, wanted + values if trace else wanted, strict=True):
                assert mine.dtype == golden.dtype
                np.testing.assert_array_equal(mine, golden)


# -------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("operator", strategies.OPERATORS)
def test_every_operator_is_exact(operator: str) -> None:
    @FEW
    @given(strategies.singles(operator), st.integers(0, 1 << 32))
    def check(graph: Graph, seed: int) -> None:
        equal(graph, strategies.feeds(graph, seed), trace=True)

    check()


@FEW
@given(strategies.graphs(), st.integers(0, 1 << 32))
def test_what_tvm_fuses_is_exact(graph: Graph, seed: int) -> None:
    equal(graph, strategies.feeds(graph, seed), trace=False)


def linked_equal(graph: Graph, rows: list[dict[str, Array]], cpu: str = "generic") -> None:
    """Every output of the objects on every row."""
    cc = compiler()
    assert cc is not None
    with package(graph) as (folder, name):
        described = replace(part(name, "network").NETWORK, target=family.CPUS[cpu])
        part(name, "objects").write(described, folder / "made")
        made = Objects(folder, name)
        vars(made)["place"] = folder / "made"
        for row in rows:
            assert same(made.run(cc, graph, row), graph.run(row))


@FEW
@given(strategies.graphs(), st.integers(0, 1 << 32))
def test_objects_are_exact(graph: Graph, seed: int) -> None:
    linked_equal(graph, strategies.feeds(graph, seed))


def test_objects_are_exact_where_layers_follow_one_another_in_the_same_bytes() -> None:
    """Inlined into one function, LLVM would move a layer's stores across the loads of the next."""
    rng = np.random.default_rng(0)
    graph = Graph("chain")
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 128)))
    fit = arith.fit_rescale([arith.AccOperand((Fraction(1, 512),), (1 << 22,))], [], bits=16)
    op = Rescale(fit.accs, (), fit.f, 0, -128, 127, DType.I8)
    for at in range(10):
        w = rng.integers(-127, 128, (128, 128)).astype(np.int8)
        b = rng.integers(-1000, 1000, 128).astype(np.int32)
        weights = graph.constant(w, TensorType(DType.I8, w.shape), f"w{at}")
        bias = graph.constant(b, TensorType(DType.I32, b.shape), f"b{at}")
        x = graph.add(op, graph.add(MatMul(), x, weights, bias, name=f"a{at}"), name=f"y{at}")
    graph.add_output(Port("y", 1.0, 0), x)
    linked_equal(graph, strategies.feeds(graph, 0), "native")


def test_an_accumulator_at_its_bound_is_not_widened_wrongly() -> None:
    """Products and bias reach 2**31 - 1 and its negative, where TVM moves a cast past the sum."""
    graph = Graph("edge")
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 1)))
    w = graph.constant(np.array([[-128], [127]], np.int8), TensorType(DType.I8, (2, 1)), "w")
    room = (1 << 31) - 1 - np.array([128 * 128, 127 * 128])
    bias = (room * np.array([1, -1])).astype(np.int32)
    b = graph.constant(bias, TensorType(DType.I32, (2,)), "b")
    acc = graph.add(MatMul(), x, w, b, name="acc")
    graph.add_output(Port("y", 1.0, 0), acc)
    fit = arith.fit_rescale(
        [arith.AccOperand((Fraction(1, 1 << 24),), ((1 << 31) - 1,))], [], bits=16
    )
    op = Rescale(fit.accs, (), fit.f, 0, -128, 127, DType.I8)
    graph.add_output(Port("z", 1.0, 0), graph.add(op, acc, name="z"))
    graph.verify()
    rows = [{"x": np.array([[n]], np.int8)} for n in (-128, -1, 0, 127)]
    equal(graph, rows, trace=False)


@pytest.mark.parametrize("f", [(1,), (22,), (1, 20)])
def test_ties_go_up(f: tuple[int, ...]) -> None:
    """Every odd code is halfway, as a value and as an accumulator."""
    graph = Graph("ties")
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (256, 2)))
    eye = graph.constant(np.eye(2, dtype=np.int8), TensorType(DType.I8, (2, 2)), "w")
    none = graph.constant(np.zeros(2, np.int32), TensorType(DType.I32, (2,)), "b")
    acc = graph.add(MatMul(), x, eye, none, name="acc")
    halves = tuple(1 << (n - 1) for n in f)
    room = {"zero_point": 3, "lo": -128, "hi": 127, "out": DType.I8}
    # acc << (n + 1) times 2**30 >> 32 is acc * 2**(n - 1)
    first = Rescale((Acc((1 << 30,), tuple(n + 1 for n in f)),), (), f, **room)
    graph.add_output(Port("acc", 1.0, 0), graph.add(first, acc, name="of acc"))
    then = Rescale((), (Val(halves, 0),), f, **room)
    graph.add_output(Port("val", 1.0, 0), graph.add(then, x, name="of value"))
    codes = np.stack([np.arange(-128, 128)] * 2, axis=1).astype(np.int8)
    wanted = (codes.astype(np.int64) + 1) // 2 + 3
    np.testing.assert_array_equal(graph.run({"x": codes})["acc"], wanted)
    equal(graph, [{"x": codes}], trace=False)


def test_constants_keep_their_type() -> None:
    """Left to itself, relax.const cuts int64 to 32 bits."""
    operators = import_module("qcompile.targets.tvm.package.operators")
    wide = np.array([1 << 40, 5, -(1 << 62)], np.int64)
    np.testing.assert_array_equal(operators.typed(wide).value.numpy(), wide)
    assert operators.typed(np.int64(1 << 40)).value.numpy().shape == ()
    line = (operators.LINE_CONSTANT, operators.LINE_SLOPE, operators.NEWTON_STEPS)
    assert line == (arith.LINE_CONSTANT, arith.LINE_SLOPE, arith.NEWTON_STEPS)
    root = (operators.ROOT_CONSTANT, operators.ROOT_SLOPE, operators.ROOT_STEPS)
    assert root == (arith.ROOT_CONSTANT, arith.ROOT_SLOPE, arith.ROOT_STEPS)


def test_the_build_for_this_processor_gives_what_the_graph_gives(tmp_path: Path) -> None:
    graph, feeds, cpu = network(), data(5), "native"
    runner = TVM.runner(emitted(tmp_path, graph, cpu=cpu), graph, name=NAME, cpu=cpu)
    values: dict[str, Array] = {}
    golden = graph.run(feeds, on_value=lambda v, x: values.update({v.name: x}))
    assert same(runner.run(feeds), golden)
    assert same(runner.trace(feeds), {**golden, **values})
    (objects,) = runner.ways
    assert same(objects.run(feeds)[0], golden)
    certificate = TVM.certify(tmp_path, name=NAME, cpu=cpu)
    assert certificate is not None
    assert certificate.clean, certificate.findings
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".npz", *[".py"] * 8]


# ----------------------------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def artifact(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder, options = models / "digits-dscnn", Options(samples=32, verify_samples=8)
    place = tmp_path_factory.mktemp("tvm") / "out"
    return driver.compile(
        folder / "model.onnx", "tvm", folder / "calib.toml", "fast", place, options=options
    )


def test_a_compiled_network_is_verified(artifact: Artifact) -> None:
    report = artifact.report
    checked = report["verification"]
    assert isinstance(checked, dict)
    assert (checked["samples"], checked["mismatches"]) == (8, 0)
    assert checked["intermediates"] == len(artifact.graph.nodes)
    assert [(o["name"], o["samples"], o["mismatches"]) for o in checked["others"]] == [
        ("the objects", 8, 0)
    ]
    certificate = load(artifact.folder).certify()
    assert certificate is not None
    assert certificate.clean


def exact(folder: Path, graph: Graph, codes: Mapping[str, Array], rows: int) -> None:
    runner = TVM.runner(emitted(folder, graph), graph, name=NAME, cpu="generic")
    found = verify(graph, runner, [codes], trace=1)
    assert (found.samples, found.mismatches) == (rows, 0), found.first
    assert found.intermediates == len(graph.nodes)
    assert [(o.samples, o.mismatches) for o in found.others] == [(rows, 0)]


def integers(model: Path, calibration: object, place: Path, **chosen: str) -> Graph:
    job = Job.checked(model, "tvm", "fast", place / "out", {}, Options(name=NAME, **chosen))
    return driver.build(job, calibration, pipeline.Context()).integerized.graph


def test_a_residual_network_is_exact(models: Path, tmp_path: Path) -> None:
    folder = models / "digits-resnet"
    graph = integers(folder / "model.onnx", folder / "calib.toml", tmp_path)
    rows = strategies.feeds(graph, 0, 4)
    exact(tmp_path, graph, {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}, 4)


@pytest.mark.zoo
@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_the_zoo_are_exact(zoo: Path, tmp_path: Path, name: str) -> None:
    calibration, evaluation, _ = load_data(zoo, name)
    model = zoo / NETWORKS[name].folder / "model.onnx"
    port = driver.read_model(model)[0].graph.input[0].name
    samples = [{port: calibration[:64]}]
    graph = integers(model, samples, tmp_path, input_dtype=NETWORKS[name].input_dtype)
    exact(tmp_path, graph, border.encode(graph, {port: evaluation[:4]}), 4)


# ------------------------------------------------------------------------------------------ files


def test_lowering_is_deterministic_and_needs_no_tvm() -> None:
    first, second = (TVM.lower(network(), name=NAME, cpu="native", vectors=()) for _ in range(2))
    assert first == second
    script = (
        "import sys; from tests.targets.test_families import network; from qcompile import target\n"
        "target.get('tvm').lower(network(), name='net', cpu='native', vectors=())\n"
        "assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_no_name_of_a_model_is_code() -> None:
    """Names that end strings, are Python's words, hold no letter, or are those of the file itself."""
    graph = Graph("hostile")
    names = ['a"""\nimport os', "class", "q", "graph", "", "1", "\u00e9\udc80", "q\\"]
    for name in names:
        x = graph.add_input(Port(name, 1.0, 0), TensorType(DType.I8, (1, 2)), f"{name} in")
        y = graph.add(Reshape((-1, 2, 1)), x, name=name)
        graph.add_output(Port(name, 1.0, 0), y)
    rng = np.random.default_rng(0)
    rows = [{n: rng.integers(-128, 128, (1, 2)).astype(np.int8) for n in names}]
    equal(graph, rows, trace=True)


def test_the_package_runs_arrays_of_codes(tmp_path: Path) -> None:
    graph, feeds = network(), data(3)
    emitted(tmp_path, graph)
    np.savez(tmp_path / "in.npz", **feeds)
    command = [sys.executable, "-B", "-m", f"{NAME}_tvm", "run", "in.npz", "out.npz"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with np.load(tmp_path / "out.npz") as file:
        assert same(dict(file), graph.run(feeds))


def test_the_module_names_no_type_of_real_numbers() -> None:
    with package(network()) as (_, name):
        shown = part(name, "network").NETWORK.module().script()
    assert "R.nn.conv2d" in shown
    assert "float" not in shown


@pytest.mark.parametrize("cpu", ELSEWHERE)
def test_objects_for_other_chips_need_no_library(cpu: str) -> None:
    with package(network()) as (folder, name):
        described = replace(part(name, "network").NETWORK, target=family.CPUS[cpu])
        part(name, "objects").write(described, folder / "made")
        defined: set[str] = set()
        wanted: set[str] = set()
        for path in sorted((folder / "made").glob("*.o")):
            with path.open("rb") as file:
                elf = ELFFile(file)
                assert elf["e_machine"] == ELSEWHERE[cpu]
                for symbol in elf.get_section_by_name(".symtab").iter_symbols():
                    absent = symbol["st_shndx"] == "SHN_UNDEF"
                    (wanted if absent else defined).add(symbol.name)
        assert f"{name}_run" in defined
        # Arm's tables for unwinding name a routine of the compiler's library
        assert wanted - defined <= {"", "memcpy", "memset", "__aeabi_unwind_cpp_pr0"}
        if cpu != "riscv64":
            made = Objects(folder, name)
            vars(made)["place"] = folder / "made"
            assert made.certificate().clean


# --------------------------------------------------------------------------------------- refusals


def test_the_extra_has_the_pins_that_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [f"{name}=={version}" for name, version in versions.PINS.items()]
    assert extras["optional-dependencies"]["tvm"] == wanted
    assert TVM.missing() == ()
    installed = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15.post2"}
    monkeypatch.setattr(metadata, "version", installed.__getitem__)
    with pytest.raises(
        ToolchainMissing, match=r"apache-tvm-ffi 0\.1\.15\.post2 .* 'qcompile\[tvm\]'"
    ):
        TVM.runner(Path(), network(), name=NAME, cpu="generic")

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert "apache-tvm is not installed" in TVM.missing()[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("raise TypeError('no')", "TypeError: no"),
    ],
)
def test_a_process_that_dies_is_told_of(tmp_path: Path, line: str, said: str) -> None:
    emitted(tmp_path, network())
    place = tmp_path / f"{NAME}_tvm" / "network.py"
    place.write_text(f"{line}\n{place.read_text()}")
    runner = TVM.runner(tmp_path, network(), name=NAME, cpu="generic")
    with pytest.raises(VerificationMismatch, match=said):
        runner.run(data(1))


def test_graphs_that_are_not_proved_are_refused() -> None:
    graph = Graph("wide")
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 1)))
    w = graph.constant(np.array([[1]], np.int8), TensorType(DType.I8, (1, 1)), "w")
    b = graph.constant(np.array([(1 << 31) - 1], np.int32), TensorType(DType.I32, (1,)), "b")
    graph.add_output(Port("y", 1.0, 0), graph.add(MatMul(), x, w, b, name="y", layer="dense"))
    with pytest.raises(Unsupported, match="dense"):
        TVM.lower(graph, name=NAME, cpu="generic", vectors=())


def test_windows_over_more_axes_than_tvm_has_are_refused() -> None:
    graph = Graph("deep")
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 2, 2, 2, 2, 1)))
    w = graph.constant(np.ones((1,) * 6, np.int8), TensorType(DType.I8, (1,) * 6), "w")
    b = graph.constant(np.zeros(1, np.int32), TensorType(DType.I32, (1,)), "b")
    ones = (1, 1, 1, 1)
    y = graph.add(Conv(ones, (0,) * 8, ones), x, w, b, name="y", layer="fourth dimension")
    graph.add_output(Port("y", 1.0, 0), y)
    with pytest.raises(Unsupported, match="fourth dimension"):
        TVM.lower(graph, name=NAME, cpu="generic", vectors=())


def test_what_is_not_for_tvm_is_refused(tmp_path: Path) -> None:
    graph = network()
    with pytest.raises(BadInput, match="cortex-m9"):
        TVM.lower(graph, name=NAME, cpu="cortex-m9", vectors=())
    with pytest.raises(BadInput, match="--max-ram"):
        TVM.lower(graph, name=NAME, cpu="native", vectors=(), placement=Placement(max_ram=1))
    with pytest.raises(ToolchainMissing, match="cortex-m4"):
        TVM.runner(tmp_path, graph, name=NAME, cpu="cortex-m4")
    with pytest.raises(ToolchainMissing, match="sanitizers"):
        TVM.runner(tmp_path, graph, name=NAME, cpu="native", sanitize=True)
    runner = TVM.runner(emitted(tmp_path, graph), graph, name=NAME, cpu="generic")
    with pytest.raises(BadInput, match="int16"):
        runner.run({k: x.astype(np.int16) for k, x in data(1).items()})
    with pytest.raises(ToolchainMissing, match="natively"):
        runner.count(data(1))
    with pytest.raises(BadInput, match="net_tvm"):
        TVM.runner(tmp_path / "none", graph, name=NAME, cpu="generic").run(data(1))
