"""What a program may take of a chip: limits that hold, limits that are refused with what would do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile import checks, target, verbs
from qcompile.artifact import load
from qcompile.cli import size
from qcompile.errors import BadInput, BudgetExceeded
from qcompile.ir import Array, Conv, DType, Graph, Port, Rescale, TensorType, arith
from qcompile.job import Job
from qcompile.options import Options
from qcompile.target import Footprint, Placement
from qcompile.verify import verify

NAME = "digits-resnet"


@pytest.fixture(scope="module")
def compiled(models: Path, tmp_path_factory: pytest.TempPathFactory) -> qcompile.Artifact:
    model = models / NAME
    return qcompile.compile(
        model / "model.onnx", "mcu", model / "calib.toml", "fast",
        tmp_path_factory.mktemp("budget") / "out", samples=64,
    )  # fmt: skip


def memory(artifact: qcompile.Artifact) -> dict[str, int]:
    found = artifact.report["memory"]
    assert isinstance(found, dict)
    return found


def again(
    artifact: qcompile.Artifact, models: Path, place: Path, core: str = "mcu", **options: object
) -> qcompile.Artifact:
    model = models / NAME
    return qcompile.compile(
        model / "model.onnx", core, model / "calib.toml", "fast", place,
        plan=artifact.folder / "plan.toml", **options,
    )  # fmt: skip


def test_the_report_adds_up(compiled: qcompile.Artifact) -> None:
    m = memory(compiled)
    assert m["ram_bytes"] == sum(
        m[f"{part}_bytes"] for part in ("arena", "input", "output", "stack")
    )
    assert m["flash_bytes"] == m["code_bytes"] + m["constant_bytes"]
    assert m["weight_bytes"] <= m["constant_bytes"] < m["weight_bytes"] + 512
    assert (m["input_bytes"], m["output_bytes"]) == (64, 20)
    program = compiled.report["program"]
    assert isinstance(program, dict)
    assert (program["unit"], program["bands"]) == ("instructions", 1)
    counted = sum(layer["executed"] for layer in program["layers"])
    assert counted < program["executed"] < counted + 500


def test_exactly_what_it_takes_is_enough(
    compiled: qcompile.Artifact, models: Path, tmp_path: Path
) -> None:
    m = memory(compiled)
    kept = again(
        compiled, models, tmp_path / "out", max_ram=m["ram_bytes"], max_flash=m["flash_bytes"]
    )
    assert memory(kept) == m
    assert (kept.folder / "model.c").read_bytes() == (compiled.folder / "model.c").read_bytes()


def test_a_byte_of_flash_less_is_too_little(
    compiled: qcompile.Artifact, models: Path, tmp_path: Path
) -> None:
    flash = memory(compiled)["flash_bytes"]
    with pytest.raises(
        BudgetExceeded, match=f"{flash:,} bytes of flash .* --max-flash {flash} would do"
    ):
        again(compiled, models, tmp_path / "out", max_flash=flash - 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("core", ["mcu", "cortex-m55", "dsp"])
def test_ram_that_no_arrangement_fits_names_what_would_do(
    compiled: qcompile.Artifact, models: Path, tmp_path: Path, core: str
) -> None:
    with pytest.raises(BudgetExceeded, match="smallest that was found") as said:
        again(compiled, models, tmp_path / "out", core, max_ram=1024)
    found = re.search(r"--max-ram (\d+) would do", str(said.value))
    assert found is not None
    least = int(found[1])
    fits = again(compiled, models, tmp_path / "fits", core, max_ram=least)
    assert memory(fits)["ram_bytes"] <= least
    if core == "mcu":
        assert verbs.reproduce(fits.folder / "manifest.json").identical


def tower() -> Graph:
    """Convolutions over a map that is large at the beginning and small at the end."""
    graph, rng = Graph("tower", free_batch=False), np.random.default_rng(3)
    x = graph.add_input(Port("x", 1.0, 0), TensorType(DType.I8, (1, 32, 24, 4)))
    for at, (outputs, stride) in enumerate(((8, 1), (8, 2), (8, 2), (4, 2))):
        w = rng.integers(-127, 128, (outputs, 3, 3, x.type.shape[-1])).astype(np.int8)
        b = rng.integers(-999, 999, outputs).astype(np.int32)
        weights = graph.constant(w, TensorType(DType.I8, w.shape), f"w{at}")
        bias = graph.constant(b, TensorType(DType.I32, b.shape), f"b{at}")
        conv = Conv((stride, stride), (1, 1, 1, 1), (1, 1), 1, -3)
        made = graph.add(conv, x, weights, bias, name=f"acc{at}", layer=f"layer{at}")
        fit = arith.fit_rescale([arith.AccOperand((Fraction(1, 999),), (1 << 22,))], [], bits=16)
        rescale = Rescale(fit.accs, fit.vals, fit.f, -3, -128, 127, DType.I8)
        x = graph.add(rescale, made, name=f"y{at}", layer=f"layer{at}")
    graph.add_output(Port("y", 1.0, 0), x)
    return graph


@pytest.mark.parametrize("core", ["cortex-m3", "cortex-m4", "cortex-m55", "x86"])
def test_bands_save_memory_and_change_nothing(tmp_path: Path, core: str) -> None:
    graph, chip = tower(), target.get(core)
    cpu = chip.cpus[0]
    whole = chip.lower(graph, name="tower", cpu=cpu, vectors=())
    border = sum(v.type.bytes for _, v in (*graph.inputs, *graph.outputs))
    limit = whole.arena_bytes + border - 1000
    banded = chip.lower(
        graph, name="tower", cpu=cpu, vectors=(), placement=Placement(max_ram=limit)
    )
    assert banded.bands > 1
    assert banded.arena_bytes + border <= limit
    for name, content in banded.files.items():
        (tmp_path / name).write_bytes(content)
    batch = {"x": codes(graph, 3)}
    found = verify(graph, chip.runner(tmp_path, graph, name="tower", cpu=cpu), [batch])
    assert (found.samples, found.mismatches, found.intermediates) == (3, 0, 4), found.first


def test_a_fault_in_one_band_is_found_in_its_rows(tmp_path: Path) -> None:
    graph, chip = tower(), target.get("cortex-m4")
    placed = chip.lower(
        graph, name="tower", cpu="cortex-m4", vectors=(), placement=Placement(max_ram=7000)
    )
    for name, content in placed.files.items():
        (tmp_path / name).write_bytes(content)
    source = (tmp_path / "model.c").read_text()
    names = {number: name for name, number in placed.stored.items()}
    calls = [
        (call, placed.pieces[names[int(call[2])]])
        for call in re.finditer(r"^    (layer_.*;)\n    STORED\((\d+),", source, re.M)
        if names[int(call[2])] in placed.pieces
    ]
    call, piece = [(c, p) for c, p in calls if p.value == "y0"][-1]
    (tmp_path / "model.c").write_text(source[: call.start(1)] + source[call.end(1) :])
    runner = chip.runner(tmp_path, graph, name="tower", cpu="cortex-m4")
    found = verify(graph, runner, [{"x": codes(graph, 2)}])
    assert found.first is not None
    assert (found.first.layer, found.first.value) == ("layer0", "y0")
    assert piece.first <= found.first.index[0] < piece.last


def codes(graph: Graph, rows: int) -> Array:
    kind = graph.inputs[0][1].type
    draw = np.random.default_rng(5)
    return draw.integers(kind.dtype.lo, kind.dtype.hi + 1, (rows, *kind.shape[1:])).astype(
        kind.dtype.numpy
    )


def test_what_has_no_bound_keeps_no_budget(compiled: qcompile.Artifact, tmp_path: Path) -> None:
    taken = checks.Memory(100, 10, 10, 50, Footprint(10, 60, 0, None, (), "f calls itself"))
    assert (taken.ram, taken.flash) == (None, 70)
    job = Job.checked(b"", "mcu", "fast", tmp_path, {}, Options(max_ram=9999))
    with pytest.raises(BudgetExceeded, match="f calls itself"):
        checks._budgets(job, taken)
    with pytest.raises(BudgetExceeded, match="not built here"):
        checks._budgets(job, replace(taken, built=None))


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("49152", 49152),
        ("48K", 49152),
        ("48k", 49152),
        ("48KiB", 49152),
        ("48kb", 49152),
        ("1M", 1 << 20),
    ],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert size("--max-ram", text) == bytes_


@pytest.mark.parametrize("text", ["", "K", "-1", "1G", "1.5K", "12 K", "١"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--max-ram takes bytes"):
        size("--max-ram", text)


@pytest.mark.parametrize("section", ["", "a b", '"', ".x;y", "1x", "a" * 65])
def test_what_is_no_section_is_refused(section: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--weights-section takes the name"):
        Job.checked(b"", "mcu", "fast", tmp_path, {}, Options(weights_section=section))


def test_the_folder_says_what_it_was_compiled_with(
    compiled: qcompile.Artifact, models: Path, tmp_path: Path
) -> None:
    placed = again(
        compiled, models, tmp_path / "out", weights_section=".ext", arena_section=".fast"
    )
    assert 'section(".ext")' in (placed.folder / "weights.h").read_text()
    found = verbs.reproduce(placed.folder / "manifest.json")
    assert found.identical
    assert load(placed.folder).certify().clean


@pytest.mark.parametrize("section", [".text", ".data", ".bss", ".rodata", ".vectors"])
def test_sections_of_the_compiler_are_refused(section: str, tmp_path: Path) -> None:
    for options in (Options(weights_section=section), Options(arena_section=section)):
        with pytest.raises(BadInput, match="takes a section of its own"):
            Job.checked(b"", "mcu", "fast", tmp_path, {}, options)


def test_weights_and_arena_do_not_share_a_section(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="are two"):
        Job.checked(
            b"", "mcu", "fast", tmp_path, {}, Options(weights_section=".x", arena_section=".x")
        )


def test_a_core_named_as_a_cpu_says_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--target cortex-m7"):
        Job.checked(b"", "mcu", "fast", tmp_path, {}, Options(cpu="cortex-m7"))
    assert Job.checked(b"", "mcu", "fast", tmp_path, {}, Options(features=",")).cpu == "cortex-m4"


@pytest.mark.parametrize(
    "damage",
    [
        {"pieces": {"zz": {"value": "y1", "first": 3, "last": -7}}},
        {"pieces": {"zz": {"value": "y1", "first": 0, "last": 10**18}}},
        {"pieces": {"zz": {"value": "nobody", "first": 0, "last": 1}}},
        {"values": {"y0": 0, "y1": 0}},
        {"values": {"strange": 0}},
        {"layers": "none"},
    ],
)
def test_a_damaged_description_is_bad_input(tmp_path: Path, damage: dict[str, object]) -> None:
    graph, chip = tower(), target.get("cortex-m3")
    placed = chip.lower(graph, name="tower", cpu="cortex-m3", vectors=())
    for name, content in placed.files.items():
        (tmp_path / name).write_bytes(content)
    runner = chip.runner(tmp_path, graph, name="tower", cpu="cortex-m3")
    described = json.loads((tmp_path / "program.json").read_bytes())
    (tmp_path / "program.json").write_text(json.dumps(described | damage))
    with pytest.raises(BadInput, match=r"program\.json"):
        runner.trace({"x": codes(graph, 1)})


def test_a_name_like_a_piece_is_no_piece(tmp_path: Path) -> None:
    graph, chip = tower(), target.get("cortex-m4")
    named = Graph("tower", free_batch=False)
    copies = {v: named.add_input(port, v.type, v.name) for port, v in graph.inputs}
    copies |= {v: named.constant(v.constant, v.type, v.name) for v in graph.constants()}
    for node in graph.nodes:
        name = "y0[0:12]" if node.output.name == "y1" else node.output.name
        ins = (copies[v] for v in node.inputs)
        copies[node.output] = named.add(node.op, *ins, name=name, layer=node.name)
    for port, v in graph.outputs:
        named.add_output(port, copies[v])
    limit = Placement(max_ram=6500)
    placed = chip.lower(named, name="tower", cpu="cortex-m4", vectors=(), placement=limit)
    assert placed.pieces
    for name, content in placed.files.items():
        (tmp_path / name).write_bytes(content)
    runner = chip.runner(tmp_path, named, name="tower", cpu="cortex-m4")
    found = verify(named, runner, [{"x": codes(named, 2)}])
    assert (found.mismatches, found.intermediates) == (0, 4), found.first
