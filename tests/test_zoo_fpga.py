"""The zoo's networks as designs of logic: C simulation and Verilog equal the integer graph, cycles are those predicted.

`benchmarks/fpga.py` does the same with more images and formats.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile import border, driver, pipeline, target
from qcompile.job import Job
from qcompile.options import Options
from qcompile.target import Fabric, Placement
from qcompile.verify import verify
from tests.test_zoo import NETWORKS, load_data

pytestmark = pytest.mark.zoo

IMAGES = 8
PUBLISHED_US = 27_300
"""RN07 by hls4ml on a Pynq-Z2 (MLPerf Tiny v0.7, open division): its XC7Z020 has 220 DSP blocks, 280 RAMB18."""


@pytest.mark.parametrize(
    ("name", "weights", "activations", "most"),
    [
        ("resnet8", "int8", "int8", 220),
        ("kws", "int4", "int4", 64),
        ("ad", "int8", "int8", 64),
    ],
)
def test_designs_are_exact_in_every_simulation(
    name: str, weights: str, activations: str, most: int, zoo: Path, tmp_path: Path
) -> None:
    if name == "ad":
        folder = "mlperf-tiny-ad-autoencoder"
        calibration = evaluation = (
            np.random.default_rng(0).normal(size=(64, 640)).astype(np.float32)
        )
    else:
        folder = NETWORKS[name].folder
        calibration, evaluation, _ = load_data(zoo, name)
    dtype = NETWORKS[name].input_dtype if name in NETWORKS else "int8"
    options = Options(
        input_dtype=dtype, output_dtype="int8", name=name, weights=weights, activations=activations,
        first_last="int8",
    )  # fmt: skip
    model = zoo / folder / "model.onnx"
    job = Job.checked(model, "hls", "fast", tmp_path / "out", {}, options)
    port = driver.read_model(model)[0].graph.input[0].name
    side = driver.prepare(job, pipeline.Context())
    data = driver.open_samples(job, side, [{port: calibration[:128]}], pipeline.Context())
    driver.calibrate(job, side, data, pipeline.Context())
    graph = driver.to_integers(job, side).graph
    chip = target.get("hls")
    made = chip.lower(
        graph, name=name, cpu="any", vectors=(), placement=Placement(fabric=Fabric(max_dsp=most))
    )
    for path, content in made.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    runner = chip.runner(tmp_path, graph, name=name, cpu="any")
    codes = border.encode(graph, {port: evaluation[:IMAGES]})
    found = verify(graph, runner, [codes], trace=1)
    assert (found.samples, found.mismatches) == (IMAGES, 0), found.first
    assert found.intermediates >= 9
    # a note stands for cycles that were compared; without verilator there would be no others
    assert [(o.samples, o.mismatches, bool(o.note)) for o in found.others] == [
        (IMAGES, 0, True),
        (IMAGES, 0, False),
    ]
    assert chip.certify(tmp_path, name=name, cpu="any").clean
    assert made.design is not None
    assert made.design.dsp <= most
    if most == 220:
        assert made.design.bram18 <= 280
        assert made.design.lut * (1 + made.design.lut_error) <= 53_200
        assert made.design.latency_us < PUBLISHED_US / 20
