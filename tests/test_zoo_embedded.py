"""The zoo's networks as firmware: exact on every embedded core, and smaller and faster than the best free kernels.

Instructions, RAM and flash of the peers stand in mcu.json beside the zoo.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qcompile import border, driver, pipeline, target
from qcompile.ir import Array, Graph
from qcompile.job import Job
from qcompile.options import Options
from qcompile.target import Lowered
from qcompile.verify import verify
from tests.test_zoo import NETWORKS, load_data

pytestmark = pytest.mark.zoo

NAMES = ("resnet8", "kws", "ad", "resnet20")
CORES = ("cortex-m4", "cortex-m7", "cortex-m55", "hexagon")
SMALL = ("kws", "ad")
"""What a core without any extension is asked to run."""


@dataclass(frozen=True)
class Network:
    name: str
    graph: Graph
    samples: dict[str, Array]


@pytest.fixture(scope="module", params=NAMES)
def network(
    request: pytest.FixtureRequest, zoo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Network:
    """The whole network, its trailing Softmax included, as integers."""
    name: str = request.param
    if name == "ad":
        folder = "mlperf-tiny-ad-autoencoder"
        calibration = evaluation = (
            np.random.default_rng(0).normal(size=(64, 640)).astype(np.float32)
        )
    else:
        folder = NETWORKS[name].folder
        calibration, evaluation, _ = load_data(zoo, name)
    dtype = NETWORKS[name].input_dtype if name in NETWORKS else "int8"
    model = zoo / folder / "model.onnx"
    # The peers' networks have int8 results.
    options = Options(input_dtype=dtype, output_dtype="int8", name=name)
    job = Job.checked(model, "mcu", "fast", tmp_path_factory.mktemp(name) / "out", {}, options)
    port = driver.read_model(model)[0].graph.input[0].name
    made = driver.build(job, [{port: calibration[:128]}], pipeline.Context())
    graph = made.integerized.graph
    return Network(name, graph, border.encode(graph, {port: evaluation[:32]}))


def lowered(network: Network, core: str, folder: Path) -> Lowered:
    chip = target.get(core)
    made = chip.lower(network.graph, name=network.name, cpu=chip.cpus[0], vectors=())
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    return made


def exact(network: Network, core: str, folder: Path) -> None:
    chip = target.get(core)
    lowered(network, core, folder)
    runner = chip.runner(folder, network.graph, name=network.name, cpu=chip.cpus[0])
    found = verify(network.graph, runner, [network.samples], trace=2)
    assert (found.samples, found.mismatches) == (32, 0), found.first
    assert found.intermediates >= 9
    certificate = chip.certify(folder, name=network.name, cpu=chip.cpus[0])
    assert certificate.clean, certificate.findings


@pytest.mark.parametrize("core", CORES)
def test_every_core_is_exact(network: Network, core: str, tmp_path: Path) -> None:
    exact(network, core, tmp_path)


@pytest.mark.parametrize("network", SMALL, indirect=True)
def test_a_core_without_extensions_is_exact(network: Network, tmp_path: Path) -> None:
    exact(network, "cortex-m3", tmp_path)


# ------------------------------------------------------------------------------------------- bars


INSTRUCTIONS = {
    ("resnet8", "m4"): 0.7, ("kws", "m4"): 0.75, ("ad", "m4"): 0.85,
    ("resnet8", "m55"): 0.8, ("kws", "m55"): 0.6, ("ad", "m55"): 0.9,
}  # fmt: skip
"""At most so many of the instructions of CMSIS-NN's best build."""

ARENA = {"resnet8": 49_728, "kws": 16_000}
"""The least that CMSIS-NN's arena can be, inputs, outputs and scratch included, without operators in place."""


@pytest.mark.parametrize("network", ["resnet8", "kws", "ad"], indirect=True)
@pytest.mark.parametrize("core", ["m4", "m55"])
def test_firmware_beats_the_peers(network: Network, core: str, zoo: Path, tmp_path: Path) -> None:
    chip = target.get(f"cortex-{core}")
    cpu = chip.cpus[0]
    made = lowered(network, chip.name, tmp_path)
    runner = chip.runner(tmp_path, network.graph, name=network.name, cpu=cpu)
    row = {name: codes[:1] for name, codes in network.samples.items()}
    counts = runner.count(row)
    assert runner.count(row) == counts
    peers = json.loads((zoo.parent / "peers" / "mcu.json").read_text())["rows"]
    mine = [
        p for p in peers if (p["model"], p["core"], p["stack"]) == (network.name, core, "CMSIS-NN")
    ]
    best = min(p["instructions"] for p in mine)
    assert counts.total <= INSTRUCTIONS[network.name, core] * best
    taken = chip.footprint(tmp_path, name=network.name, cpu=cpu)
    assert taken.statics == 0
    for key, ours in (("text_bytes", taken.code), ("rodata_bytes", taken.constants)):
        known = [p[key] for p in mine if p[key] is not None]
        assert not known or ours <= min(known)
    if network.name in ARENA:
        border = sum(v.type.bytes for _, v in (*network.graph.inputs, *network.graph.outputs))
        assert taken.stack is not None
        assert made.arena_bytes + border + taken.stack < ARENA[network.name]
    predicted = sum(layer.predicted for layer in counts.layers)
    assert abs(predicted - counts.total) <= 0.1 * counts.total


@pytest.mark.parametrize("network", ["resnet8"], indirect=True)
def test_hvx_takes_a_sixth_of_portable_packets(network: Network, tmp_path: Path) -> None:
    from qcompile.targets.c.emit import lower

    chip = target.get("hexagon")
    packets = {}
    for kind in ("hvx", "portable"):
        folder = tmp_path / kind
        folder.mkdir()
        lowered(network, "hexagon", folder)
        if kind == "portable":
            plain = lower(network.graph, name=network.name, isa=kind, vectors=())
            for name, content in plain.files.items():
                (folder / name).write_bytes(content)
        runner = chip.runner(folder, network.graph, name=network.name, cpu=chip.cpus[0])
        row = {name: codes[:1] for name, codes in network.samples.items()}
        counts = runner.count(row)
        assert counts.unit == "packets"
        packets[kind] = counts.total
    assert packets["hvx"] <= packets["portable"] / 6
