"""Generated C beside onnxruntime, OpenVINO and LiteRT on this machine, in one interleaved run; writes a page's tables.

    python benchmarks/cpu.py FOLDER --python PEERS/bin/python [--peers ../shared/peers] [--threads 1] [--rounds 15]
        [--write docs/performance.md] [MODEL ...]

PEERS is an environment with onnx, onnxruntime, openvino, nncf, ai-edge-litert and onnxsim; FOLDER keeps models and
compiled programs, from which later runs go on. All take turns in slices of some ten milliseconds; what counts is the
median of process CPU time for an inference, of wall time with several threads. A call of ours takes and gives float
tensors as a call of onnxruntime's and OpenVINO's does; beside LiteRT, whose models take and give int8, ours does too.
A run in which a peer did not start is refused.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import qcompile

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- cpu: begin -->", "<!-- cpu: end -->"
FLOAT, RAW = "qcompile", "qcompile_raw"
PACKAGES = ("onnxruntime", "openvino", "nncf", "ai-edge-litert")


@dataclass(frozen=True)
class Model:
    """A speed model: the ratio to the best peer that is wanted, and whether LiteRT has an official model of it."""

    title: str
    goal: float
    tflite: bool = False


MODELS: Mapping[str, Model] = {
    "mlperf_ad": Model("FC autoencoder", 1.3, True),
    "mlperf_dscnn": Model("ds-cnn", 1.4, True),
    "mlperf_vww": Model("MobileNetV1-0.25 (vww)", 1.4, True),
    "mlperf_resnet8": Model("resnet8", 1.15, True),
    "mobilenetv2": Model("MobileNetV2", 1.3),
    "light_shufflenet": Model("ShuffleNet", 1.3),
    "light_squeezenet": Model("SqueezeNet", 1.1),
    "resnet18": Model("ResNet-18", 1.0),
    "light_resnet50": Model("ResNet-50", 1.0),
}


@dataclass(frozen=True)
class Row:
    """Microseconds of every engine for one model."""

    model: str
    mmac: float
    us: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """The smallest of the peers' times over ours: above 1 is faster than every one of them."""
        beside = {"litert_int8": RAW}
        return min(
            time / self.us[beside.get(engine, FLOAT)]
            for engine, time in self.us.items()
            if engine not in (FLOAT, RAW)
        )


def program(name: str, folder: Path, threads: int) -> Path:
    """The folder of the model's program for this machine, verified when it was compiled, with its `bench` built."""
    place = folder / f"{name}-{threads}"
    if not place.exists():
        model = folder / f"{name}.onnx"
        qcompile.compile(str(model), "x86", "random", "fast", place, cpu="native", log=print)
    subprocess.run(["make", "-s", "-C", str(place), "bench"], check=True)
    return place


def measured(name: str, given: argparse.Namespace) -> Row:
    """One interleaved run of all engines."""
    ours = program(name, given.folder, given.threads) / "bench"
    known = MODELS[name]
    engines = ["ort_u8s8", "ov_int8", *(["litert_int8"] if known.tflite else [])]
    result = given.folder / f"{name}.json"
    command = [
        str(given.python), str(given.peers / "bench_peers.py"), str(given.folder / f"{name}.onnx"),
        "--engines", ",".join(engines), "--rounds", str(given.rounds), "--threads", str(given.threads),
        "--work", str(given.folder / "peers"), "--json", str(result),
        "--cmd", f"{FLOAT}={ours}", f"{RAW}={ours} raw",
    ]  # fmt: skip
    if known.tflite:
        command += ["--tflite", f"{name}=-,{given.peers / 'tflite' / name}.tflite"]
    subprocess.run(command, check=True)
    row = json.loads(result.read_text())[0]
    if lack := [e for e in (*engines, FLOAT, RAW) if e not in row["med_ns"]]:
        raise SystemExit(f"{name}: {', '.join(lack)} did not start; this run does not count")
    return Row(name, row["mmac"], {e: ns / 1e3 for e, ns in row["med_ns"].items()})


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    head = (
        "network", "MMAC", "ours, us", "onnxruntime, us", "OpenVINO, us", "ours int8, us", "LiteRT int8, us",
        "best peer / ours", "goal", "", "GMAC/s",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        known, us = MODELS[row.model], row.us
        lite = f"{us['litert_int8']:,.1f}" if "litert_int8" in us else "-"
        cells = (
            known.title, f"{row.mmac:,.1f}", f"{us[FLOAT]:,.1f}", f"{us['ort_u8s8']:,.1f}", f"{us['ov_int8']:,.1f}",
            f"{us[RAW]:,.1f}", lite, f"{row.ratio:.2f}", f"{known.goal:.2f}",
            "met" if row.ratio >= known.goal else "missed", f"{row.mmac * 1e3 / us[RAW]:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(python: Path) -> str:
    """Processor, compiler and versions, in a sentence."""
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info)
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=True)
    code = "import sys, importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    versions = subprocess.run(
        [python, "-c", code, *PACKAGES], capture_output=True, text=True, check=True
    )
    ours = f"qcompile {metadata.version('qcompile')}"
    processor = name[1] if name else platform.machine()
    return f"{processor}; {compiler.stdout.splitlines()[0]}; {ours}, {versions.stdout.strip()}."


def main() -> None:
    """Measure, print, and write the page where one is named."""
    parser = argparse.ArgumentParser(description="Generated C beside the best runtimes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--python", type=Path, required=True, help="of an environment with the peers"
    )
    parser.add_argument("--peers", type=Path, default=ROOT.parent / "shared" / "peers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", type=Path)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    given = parser.parse_intermixed_args()
    if unknown := set(given.models) - MODELS.keys():
        parser.error(
            f"no model is called {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}"
        )
    given.folder.mkdir(parents=True, exist_ok=True)
    missing = [m for m in given.models if not (given.folder / f"{m}.onnx").exists()]
    if missing:
        make = [given.python, given.peers / "make_models.py", given.folder, "--only", *missing]
        subprocess.run(make, check=True)
    page = f"{machine(given.python)}\n\n{table([measured(m, given) for m in given.models])}\n"
    print(page)
    if given.write is not None:
        text = given.write.read_text()
        if BEGIN not in text or END not in text:
            sys.exit(f"{given.write} has no place for the table: {BEGIN} ... {END}")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        given.write.write_text(f"{before}{BEGIN}\n{page}{END}{after}")


if __name__ == "__main__":
    main()
