"""The zoo's networks as firmware: exact on every embedded core, and smaller and faster than the best free kernels.

Instructions, RAM and flash of the peers stand in mcu.json beside the zoo.
"""

from __future__ import annotations

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
    return Network(name, graph, border.encode(graph, {port: evaluation[:8]}))


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
    assert (found.samples, found.mismatches) == (8, 0), found.first
    assert found.intermediates >= 9
    certificate = chip.certify(folder, name=network.name, cpu=chip.cpus[0])
    assert certificate.clean, certificate.findings


@pytest.mark.parametrize("core", CORES)
def test_every_core_is_exact(network: Network, core: str, tmp_path: Path) -> None:
    exact(network, core, tmp_path)


@pytest.mark.parametrize("network", SMALL, indirect=True)
def test_a_core_without_extensions_is_exact(network: Network, tmp_path: Path) -> None:
    exact(network, "cortex-m3", tmp_path)
