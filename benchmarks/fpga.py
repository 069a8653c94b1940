"""The zoo's networks as designs of logic: exact in every simulation, and what they take beside published accelerators.

    python benchmarks/fpga.py FOLDER [--images 32] [--max-dsp 220] [--formats int8,int8 int4,int4 int2,int4]
        [--zoo ../shared/zoo] [NETWORK ...]

FOLDER keeps each compiled network, from which later runs go on. Every network is designed for an XC7Z020 at 100 MHz,
the chip of the Pynq-Z2, within its resources. Compared with the integer graph are all words of all images in the C
simulation and in verilator, with and without random pauses; cycles are the Verilog's and the model's, which must
agree. Latencies are estimates as far as the clock goes: no design was placed for this chip. The published figures are
MLPerf Tiny v0.7's, open division, Pynq-Z2; each is another network for the same task, with narrower words.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import qcompile
from qcompile import border
from qcompile.target import Fabric, Placement, get
from qcompile.verify import verify

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.test_zoo import NETWORKS, load_data  # noqa: E402

PUBLISHED: Mapping[str, str] = {
    "ad": "AD08, hls4ml: 18.7 us",
    "kws": "KWS-W3A3, FINN: 17.5 us",
    "resnet8": "RN07, hls4ml: 27,300 us; CNV-W1A1, FINN: 1,510 us",
}
SHIPPED = ("digits-dscnn", "digits-resnet")
HEAD = (
    "network",
    "W/A",
    "images",
    "wrong words: C, Verilog, with pauses",
    "latency",
    "interval",
    "latency us",
    "images/s",
    "DSP",
    "BRAM18",
    "LUT",
    "published",
)


def data(name: str, zoo: Path) -> tuple[Path, NDArray[np.generic], NDArray[np.generic], str]:
    """The model, calibration and evaluation samples, and the type of its inputs."""
    if name in SHIPPED:
        folder = ROOT / "models" / name
        parts = [np.load(folder / f"{part}.npz") for part in ("calib", "eval")]
        calibration, evaluation = (p[p.files[0]] for p in parts)
        return folder / "model.onnx", calibration, evaluation, "int8"
    if name == "ad":
        noise = np.random.default_rng(0).normal(size=(512, 640)).astype(np.float32)
        return zoo / "mlperf-tiny-ad-autoencoder" / "model.onnx", noise[:128], noise[128:], "int8"
    calibration, evaluation, _ = load_data(zoo, name)
    network = NETWORKS[name]
    return (
        zoo / network.folder / "model.onnx",
        calibration[:256],
        evaluation,
        network.input_dtype,
    )


def row(
    name: str, formats: tuple[str, str], folder: Path, zoo: Path, images: int, most: int
) -> tuple[str, ...]:
    """One line of the table."""
    model, calibration, evaluation, kind = data(name, zoo)
    place = folder / f"{name}-{formats[0]}-{formats[1]}"
    if not place.exists():
        qcompile.compile(
            model, "x86", calibration, "fast", place, input_dtype=kind, output_dtype="int8",
            weights=formats[0], activations=formats[1], first_last="int8",
        )  # fmt: skip
    graph = qcompile.load(place).graph
    target = get("hls")
    started = time.perf_counter()
    limits = Placement(fabric=Fabric(max_dsp=most))
    made = target.lower(graph, name="net", cpu="any", vectors=(), placement=limits)
    solved = time.perf_counter() - started
    for path, content in made.files.items():
        (place / "logic" / path).parent.mkdir(parents=True, exist_ok=True)
        (place / "logic" / path).write_bytes(content)
    port = graph.inputs[0][0].name
    codes = border.encode(graph, {port: evaluation[:images]})
    runner = target.runner(place / "logic", graph, name="net", cpu="any")
    found = verify(graph, runner, [codes], trace=2)
    design = made.design
    assert design is not None
    wrong = [found.mismatches, *(o.mismatches for o in found.others)]
    samples = [found.samples, *(o.samples for o in found.others)]
    print(f"# {name} {formats}: designed in {solved:.0f} s", file=sys.stderr)
    return (
        name,
        "W{}A{}".format(*(f.removeprefix("int") for f in formats)),
        "/".join(map(str, samples)),
        ", ".join(map(str, wrong)),
        f"{design.latency:,}",
        f"{design.interval:,}",
        f"{design.latency_us:,.1f}",
        f"{design.images_per_second:,.0f}",
        str(design.dsp),
        str(design.bram18),
        f"{design.lut:,}",
        PUBLISHED.get(name, ""),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The zoo as designs of logic.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--max-dsp", type=int, default=220)
    parser.add_argument("--formats", nargs="+", default=["int8,int8"])
    parser.add_argument("--zoo", type=Path, default=ROOT.parent / "shared" / "zoo")
    parser.add_argument("networks", nargs="*", default=["resnet8", "kws", "ad"])
    given = parser.parse_intermixed_args()
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for name in given.networks:
        for pair in given.formats:
            weights, activations = pair.split(",")
            line = row(
                name, (weights, activations), given.folder, given.zoo, given.images, given.max_dsp
            )
            print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
