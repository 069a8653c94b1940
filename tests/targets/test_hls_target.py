"""A design from the command's side: options, folding.json there and back, both simulations in one verification."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qcompile import driver, target, verbs
from qcompile.artifact import Artifact, load
from qcompile.bench import any_codes
from qcompile.errors import BadInput, BudgetExceeded
from qcompile.job import Job
from qcompile.options import Options
from qcompile.target import Fabric, Placement
from qcompile.targets.hls import devices
from qcompile.targets.hls.rtlsim import icarus
from tests.targets.test_families import data, network
from tests.test_report import documented, leaves

SMALL = {"samples": 16, "verify_samples": 4, "trace_samples": 1}


def compiled(models: Path, place: Path, **chosen: object) -> Artifact:
    network = models / "digits-dscnn"
    options = Options().but({**SMALL, **chosen})
    return driver.compile(
        network / "model.onnx", "fpga", network / "calib.toml", "fast", place, options=options
    )


@pytest.fixture(scope="module")
def design(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Within 40 DSP blocks."""
    return compiled(models, tmp_path_factory.mktemp("design") / "out", max_dsp=40)


def fact(report: object, *path: str) -> object:
    for key in path:
        assert isinstance(report, dict)
        report = report[key]
    return report


def test_a_report_tells_of_the_design_and_of_both_simulations(design: Artifact) -> None:
    report = design.report
    fields = {path for path, _ in leaves(report["design"], "design")}
    assert fields == {path for path in documented() if path.startswith("design.")}
    dsp = fact(report, "design", "dsp")
    assert isinstance(dsp, int)
    assert 30 < dsp <= 40
    others = fact(report, "verification", "others")
    assert isinstance(others, list)
    assert [(o["samples"], o["mismatches"]) for o in others] == [(4, 0), (4, 0)]
    assert others[0]["note"] == "every image in the cycle that was predicted"


def test_reproduce_finds_every_byte(design: Artifact) -> None:
    assert verbs.reproduce(design.folder / "manifest.json").identical


def test_an_edited_folding_is_followed(design: Artifact) -> None:
    text = json.loads((design.folder / "folding.json").read_text())
    name, fold = next((n, f) for n, f in text["layers"].items() if f["pe"] * f["simd"] > 1)
    text["layers"][name] = {"pe": 1, "simd": 1}
    del text["fifos"]
    place = Placement(fabric=Fabric(folding=json.dumps(text), clock_mhz=50))
    made = design.target.lower(
        design.graph, name="again", cpu="any", vectors=[any_codes(design.graph)], placement=place
    )
    written = json.loads(made.files["folding.json"])
    assert written["layers"] == text["layers"]
    assert written["layers"][name] != fold
    assert written["clock_mhz"] == 50
    assert made.design is not None
    before = fact(design.report, "design", "latency")
    assert isinstance(before, int)
    assert made.design.latency > before
    followed = Placement(fabric=Fabric(folding=made.files["folding.json"].decode()))
    again = design.target.lower(
        design.graph, name="again", cpu="any", vectors=[any_codes(design.graph)], placement=followed
    )
    assert again.files == made.files


def test_verilog_that_differs_is_found(design: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(design.folder, folder)
    memory = next((folder / "rtl").glob("*_matvec_weights.mem"))
    first, *rest = memory.read_text().splitlines()
    memory.write_text("\n".join([f"{int(first, 16) ^ 1:0{len(first)}x}", *rest]) + "\n")
    port, value = design.graph.inputs[0]
    rows = np.random.default_rng(0).normal(size=(4, *value.type.shape[1:])).astype(np.float32)
    found = load(folder).verify({port.name: rows})
    assert found.mismatches == 0
    assert [o.mismatches > 0 for o in found.others] == [True, True]
    assert not found.ok
    assert found.first is not None


def test_a_rate_out_of_reach_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded, match="images a second"):
        compiled(models, tmp_path / "out", target_fps=1e9, max_dsp=40)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "chosen", "sentence"),
    [
        ("x86", {"part": "xc7z020"}, "--part is not for x86"),
        ("arm", {"max_dsp": 4}, "--max-dsp is not for arm"),
        ("hls", {"max_ram": 4096}, "--max-ram is not for hls"),
        ("hls", {"weights_section": ".flash"}, "--weights-section is not for hls"),
        ("hls", {"clock_mhz": 0.0}, "--clock-mhz lies between"),
        ("hls", {"target_fps": float("nan")}, "--target-fps lies between"),
        ("hls", {"max_lut": -1}, "--max-lut is not negative"),
    ],
)
def test_options_that_do_not_fit_the_target(
    kind: str, chosen: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        Job.checked(b"", kind, "fast", tmp_path, {}, Options().but(chosen))


@pytest.mark.parametrize(
    "chosen", [{"max_dsp": 9}, {"target_fps": 9.0}, {"max_bram": 9}, {"max_lut": 9}]
)
def test_a_folding_and_another_size_are_refused(chosen: dict[str, object], tmp_path: Path) -> None:
    options = Options().but({"folding": "folding.json", **chosen})
    with pytest.raises(BadInput, match="--folding says how large"):
        Job.checked(b"", "hls", "fast", tmp_path, {}, options)


@pytest.mark.parametrize("name", ["module", "qc_fifo", "std"])
def test_any_name_will_do(name: str, tmp_path: Path) -> None:
    graph, chip = network(), target.get("hls")
    small = Placement(fabric=Fabric(target_fps=1))
    made = chip.lower(graph, name=name, cpu="any", vectors=[data(1)], placement=small)
    for path, content in made.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert icarus(tmp_path / "rtl", 1)[0] == 0
    done = subprocess.run(["make", "csim", "CXXFLAGS=-O0"], cwd=tmp_path / "hls", check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("part", "code", "nextpnr"),
    [
        (None, "xc7z020clg400-1", "--45k"),
        ("xc7z020clg484-2", "xc7z020clg484-2", "--45k"),
        ("XC7Z020-3", "xc7z020clg400-3", "--45k"),
        ("xc7a100t", "xc7a100tcsg324-1", "--45k"),
        ("lfe5um-85f", "lfe5um-85f-6bg381c", "--um-85k"),
        ("lfe5u-25f-6bg256c", "lfe5u-25f-6bg256c", "--25k"),
    ],
)
def test_parts_by_their_ordering_codes(part: str | None, code: str, nextpnr: str) -> None:
    device = devices.find(part or "xc7z020")
    assert devices.ordered(part, device) == code
    assert device.nextpnr(80).split() == [nextpnr, "--speed", "6", "--freq", "80"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]", b'{"version": 2}', b"0" * (2 << 20)])
def test_a_folding_that_is_none_is_refused(content: bytes, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "folding.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="folding"):
        compiled(models, tmp_path / "out", folding=path)
    assert not (tmp_path / "out").exists()
