"""Compile a network that is mostly weights, and see how much memory that takes; prints a table.

    python benchmarks/large.py [--layers 24] [--width 5632] [--target x86] [--recipe fast] [--verify 8]

A multilayer perceptron of random numbers with external data, 3 GB by default, is written, compiled by the command line
in a process of its own, verified, and removed. What is counted is the greatest resident set that process or any it
started had: memory and mapped files. The bound is the model plus three times its largest layer. Model, output and
temporary files take about four times the model's size in TMPDIR, which must not lie in memory itself.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MIB = 1 << 20


def main() -> None:
    """Print what one compilation took; the exit code is 1 where it failed or took more than the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=5632)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--verify", type=int, default=8, help="samples that are compared")
    options = parser.parse_args()
    layer = 4 * options.width**2
    with tempfile.TemporaryDirectory(prefix="large-") as home:
        model = written(Path(home), options.layers, options.width)
        command = [
            sys.executable, "-m", "qcompile", str(model), f"--target={options.target}",
            f"--recipe={options.recipe}", "--calib=random", "--samples=32", f"--verify-samples={options.verify}",
            "--trace-samples=1", "-o", str(Path(home) / "out"),
        ]  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        took = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    bound = options.layers * layer + 3 * layer
    equal = [line for line in done.stderr.splitlines() if "mismatches" in line]
    print("\n".join(equal) or done.stderr[-2000:])
    print(
        "| weights, MiB | largest layer, MiB | bound, MiB | peak, MiB | seconds | CPU s |\n|---|---|---|---|---|---|"
    )
    print(
        f"| {options.layers * layer // MIB} | {layer // MIB} | {bound // MIB} | {used.ru_maxrss // 1024} "
        f"| {took:.0f} | {used.ru_utime + used.ru_stime:.0f} |"
    )
    sys.exit(done.returncode != 0 or used.ru_maxrss * 1024 > bound)


def written(home: Path, layers: int, width: int) -> Path:
    """A chain of square Gemms with Relu between them; the numbers keep the size of what goes through."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[TensorProto] = []
    value, offset = "x", 0
    with (home / "weights.data").open("wb") as file:
        for i in range(layers):
            weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
            weight.data_location = TensorProto.EXTERNAL
            for key, entry in (("location", "weights.data"), ("offset", str(offset))):
                weight.external_data.add(key=key, value=entry)
            weight.external_data.add(key="length", value=str(4 * width**2))
            for _ in range(width):
                row = rng.standard_normal(width, np.float32) * np.float32((2 / width) ** 0.5)
                offset += file.write(row.tobytes())
            bias = rng.standard_normal(width, np.float32) * np.float32(0.1)
            constants += [weight, numpy_helper.from_array(bias, f"b{i}")]
            nodes.append(
                helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], [f"g{i}"], f"fc{i}", transB=1)
            )
            value = f"g{i}"
            if i < layers - 1:
                nodes.append(helper.make_node("Relu", [value], [f"r{i}"], f"relu{i}"))
                value = f"r{i}"
    shape = ["N", width]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (home / "large.onnx").write_bytes(model.SerializeToString())
    return home / "large.onnx"


if __name__ == "__main__":
    main()
