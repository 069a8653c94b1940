"""What the zoo's networks take on embedded cores, in emulators: instructions, flash and RAM beside the best peer's.

    python benchmarks/mcu.py FOLDER [--cores m4,m55,hexagon] [--zoo ../shared/zoo] [--peers ../shared/peers/mcu.json]
        [NETWORK ...]

FOLDER keeps each compiled network, from which later runs go on: its integer graph is the same for every core. Counted
is one inference of random codes; where a softmax or a loop looks at data, others differ by a few instructions. RAM is
arena, inputs, outputs and the bound of the stack. A peer's columns are the ratio to the best of its builds in that one
respect, so that no single build has all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import qcompile
from qcompile import bench, target
from qcompile.ir import Graph
from qcompile.targets.c import build, certify, footprint, run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.test_zoo import NETWORKS, load_data  # noqa: E402

CORES = {"m4": "cortex-m4", "m7": "cortex-m7", "m55": "cortex-m55", "hexagon": "hexagon"}
FOLDERS = {name: network.folder for name, network in NETWORKS.items()} | {
    "ad": "mlperf-tiny-ad-autoencoder"
}
HEAD = (
    "network",
    "core",
    "unit",
    "executed",
    "per MAC",
    "code",
    "constants",
    "RAM",
    "of it stack",
    "no float",
)
RATIOS = ("instructions", "text_bytes", "rodata_bytes", "ram_bytes")


def graph_of(name: str, folder: Path, zoo: Path) -> Graph:
    """The network's integer graph, compiled here unless it was before."""
    place = folder / name
    if not place.exists():
        data: NDArray[np.float32] | None = load_data(zoo, name)[0] if name in NETWORKS else None
        kind = NETWORKS[name].input_dtype if name in NETWORKS else "int8"
        model = str(zoo / FOLDERS[name] / "model.onnx")
        qcompile.compile(model, "x86", data, "fast", place, input_dtype=kind)
    return qcompile.load(place).graph


def measured(graph: Graph, core: str, place: Path) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The cells of a row, and instructions, code, constants and RAM as numbers."""
    family = target.get(CORES[core])
    cpu = family.cpus[0]
    lowered = family.lower(graph, name="net", cpu=cpu, vectors=())
    place.mkdir(parents=True, exist_ok=True)
    for name, data in lowered.files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    runner = family.runner(place, graph, name="net", cpu=cpu)
    assert isinstance(runner, run.Program)
    made: build.Build = runner.build
    counts = runner.count(bench.any_codes(graph))
    taken = footprint.footprint(made)
    clean = certify.inspect(made.model.read_bytes(), "model.o").clean
    ports = sum(v.type.bytes for _, v in (*graph.inputs, *graph.outputs))
    ram = lowered.arena_bytes + ports + taken.statics + (taken.stack or 0)
    cells = (
        counts.unit, f"{counts.total:,}", f"{counts.total / counts.macs:.2f}", f"{taken.code:,}",
        f"{taken.constants:,}", f"{ram:,}", taken.unbounded or f"{taken.stack:,}", "yes" if clean else "NO",
    )  # fmt: skip
    return cells, (counts.total, taken.code, taken.constants, ram)


def ratios(
    peers: Sequence[Mapping[str, object]], name: str, core: str, ours: Sequence[float]
) -> Iterator[str]:
    """Ours divided by the best peer's, in each respect that was measured."""
    mine = [row for row in peers if (row["model"], row["core"]) == (name, core)]
    for key, value in zip(RATIOS, ours, strict=True):
        known = [float(str(row[key])) for row in mine if row[key] is not None]
        yield f"{value / min(known):.2f}" if known else "-"


def main() -> None:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description="The zoo on embedded cores.")
    parser.add_argument("folder", type=Path, help="keeps the compiled networks")
    parser.add_argument("--zoo", type=Path, default=ROOT.parent / "shared" / "zoo")
    parser.add_argument("--peers", type=Path, default=ROOT.parent / "shared" / "peers" / "mcu.json")
    parser.add_argument("--cores", default="m4,m55,hexagon")
    parser.add_argument("networks", nargs="*", default=list(FOLDERS))
    given = parser.parse_intermixed_args()
    peers = json.loads(given.peers.read_text())["rows"]
    head = (*HEAD, *(f"{key.removesuffix('_bytes')} / peer" for key in RATIOS))
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in given.networks:
        graph = graph_of(name, given.folder, given.zoo)
        for core in given.cores.split(","):
            cells, ours = measured(graph, core, given.folder / f"{name}-{core}")
            row = (name, core, *cells, *ratios(peers, name, core, ours))
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
