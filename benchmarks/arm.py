"""Executed instructions of emitted programs on AArch64 beside the best peer's, in the emulator; writes a page's table.

    python benchmarks/arm.py FOLDER [--python PEERS/bin/python] [--peers ../shared/peers] [--cpus neoverse-n1,max]
        [--write docs/performance.md] [MODEL ...]

FOLDER keeps models (made by PEERS, an environment with onnx and numpy, unless they are there) and their integer graphs,
from which later runs go on. One inference of random codes is counted, twice: a run that counts another number the
second time, or whose results are not the integer graph's, is refused. The peers' counts are those of `a64.json`, and
the best is the lowest of an engine whose results were right. With --write, rows of what was not measured stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import qcompile
from qcompile import bench, target
from qcompile.ir import Graph
from qcompile.targets.c import run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.cpu import MODELS  # noqa: E402

BEGIN, END = "<!-- arm: begin -->", "<!-- arm: end -->"
PACKAGES = ("qcompile", "ziglang")
# As a64.json calls the processors.
CPUS: Mapping[str, str] = {
    "neoverse-n1": "neoverse-n1",
    "max": "max,sve=off,sme=off",
    "cortex-a72": "cortex-a72",
}
HEAD = (
    "network", "processor", "ours", "ours / MAC", "best peer", "peer", "ours / peer", "goal", "",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A speed model as a64.json calls it, and the most that is wanted of its instructions, with dot products."""

    model: str
    goal: float


PEERS: Mapping[str, Peer] = {
    "mlperf_ad": Peer("fcae", 0.7),
    "mlperf_dscnn": Peer("dscnn", 0.7),
    "mlperf_vww": Peer("vww", 0.75),
    "mlperf_resnet8": Peer("resnet8", 0.85),
    "mobilenetv2": Peer("mobilenetv2", 0.85),
    "resnet18": Peer("resnet18", 0.9),
}
PLAIN_GOAL = 1.0
"""The most that is wanted on a processor without dot products."""


def graph_of(name: str, folder: Path) -> Graph:
    """The model's integer graph, made here unless it was before."""
    place = folder / f"{name}-graph"
    if not place.exists():
        qcompile.compile(str(folder / f"{name}.onnx"), "onnx", "random", "fast", place)
    return qcompile.load(place).graph


def counted(graph: Graph, cpu: str, place: Path) -> tuple[int, int]:
    """Instructions and multiply-accumulates of one inference, counted twice."""
    family = target.get("arm")
    lowered = family.lower(graph, name="net", cpu=cpu, vectors=())
    place.mkdir(parents=True, exist_ok=True)
    for name, data in lowered.files.items():
        (place / name).write_bytes(data)
    runner = family.runner(place, graph, name="net", cpu=cpu)
    assert isinstance(runner, run.Program)
    codes = bench.any_codes(graph)
    expected, got = graph.run(codes), runner.run(codes)
    if any(not np.array_equal(expected[port.name], got[port.name]) for port, _ in graph.outputs):
        raise SystemExit(
            f"{place.name}: the results are not the integer graph's; this does not count"
        )
    first, second = runner.count(codes), runner.count(codes)
    if first != second:
        raise SystemExit(f"{place.name}: counted {first.total:,}, then {second.total:,}")
    return first.total, first.macs


def best(rows: Sequence[Mapping[str, object]], model: str, cpu: str) -> tuple[int, str]:
    """The fewest instructions of an engine whose results were right, and its name."""
    known = [
        (int(str(row["instructions"])), str(row["engine"]))
        for row in rows
        if (row["model"], row["cpu"], row["correct"]) == (model, cpu, True)
    ]
    if not known:
        raise SystemExit(f"no peer was counted on {model}, {cpu}")
    return min(known)


def line(name: str, cpu: str, total: int, macs: int, peer: tuple[int, str]) -> str:
    """One row in Markdown."""
    goal = PLAIN_GOAL if cpu == "cortex-a72" else PEERS[name].goal
    ratio = total / peer[0]
    cells = (
        MODELS[name].title, cpu, f"{total:,}", f"{total / macs:.3f}", f"{peer[0]:,}", peer[1], f"{ratio:.2f}",
        f"{goal:.2f}", "met" if ratio <= goal else "missed",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    """Emulator, compiler and versions, in a sentence."""
    said = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True)
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in PACKAGES)
    return f"{said.stdout.splitlines()[0]} on {platform.machine()}; {versions}, -O3."


def written(page: str, lines: Sequence[str]) -> str:
    """The page with these rows in its table, in the order of the models; rows of other networks stay."""
    if BEGIN not in page or END not in page:
        raise SystemExit(f"the page has no place for the table: {BEGIN} ... {END}")
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    order = [(MODELS[name].title, cpu) for name in PEERS for cpu in CPUS]

    def of(row: str) -> tuple[str, str]:
        title, cpu = row.split(" | ")[:2]
        return title.removeprefix("| "), cpu

    kept = {of(row): row for row in table.splitlines() if row.startswith("| ") and of(row) in order}
    kept |= {of(row): row for row in lines}
    head = [f"| {' | '.join(HEAD)} |", "|---|---|" + "---:|" * 3 + "---|" + "---:|" * 2 + "---|"]
    rows = [kept[key] for key in order if key in kept]
    return f"{before}{BEGIN}\n{machine()}\n\n" + "\n".join([*head, *rows]) + f"\n{END}{after}"


def main() -> None:
    """Count, print, and write the page where one is named."""
    parser = argparse.ArgumentParser(
        description="Generated C for AArch64 beside the best runtimes."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, help="of an environment that makes the models")
    parser.add_argument("--peers", type=Path, default=ROOT.parent / "shared" / "peers")
    parser.add_argument("--cpus", default=",".join(CPUS))
    parser.add_argument("--write", type=Path)
    parser.add_argument("models", nargs="*", default=list(PEERS))
    given = parser.parse_intermixed_args()
    cpus = given.cpus.split(",")
    if unknown := (set(given.models) - PEERS.keys()) | (set(cpus) - CPUS.keys()):
        parser.error(
            f"{', '.join(sorted(unknown))} is unknown; there are {', '.join((*PEERS, *CPUS))}"
        )
    given.folder.mkdir(parents=True, exist_ok=True)
    missing = [m for m in given.models if not (given.folder / f"{m}.onnx").exists()]
    if missing and given.python is None:
        parser.error(f"{', '.join(missing)} must be made first: give --python")
    if missing:
        make = [given.python, given.peers / "make_models.py", given.folder, "--only", *missing]
        subprocess.run(make, check=True)
    peers = json.loads((given.peers / "a64.json").read_text())["rows"]
    lines = []
    for name in given.models:
        graph = graph_of(name, given.folder)
        for cpu in cpus:
            total, macs = counted(graph, cpu, given.folder / f"{name}-{cpu}")
            lines.append(line(name, cpu, total, macs, best(peers, PEERS[name].model, CPUS[cpu])))
            print(lines[-1], flush=True)
            if given.write is not None:
                given.write.write_text(written(given.write.read_text(), lines))


if __name__ == "__main__":
    main()
