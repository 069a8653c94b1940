"""Cost of calibration on a ResNet-50-class network: CPU time against plain float inference, and peak memory.

    python benchmarks/calibration.py [--samples 64] [--many 1024] [--rounds 3] [--methods mse ...]

Every figure comes from a process of its own, on one thread. CPU time is that of the whole call, the building of
the onnxruntime session and the search for ranges included, over that of a loop of plain onnxruntime inference
of the same samples in the same round; the median of the rounds is printed. Peak memory is the resident set
while samples stream by, loading left out, so that it shows what grows. `--many 0` skips it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir

    from qcompile.passes.ranges import Method
    from qcompile.plan import QuantPlan

METHODS: tuple[Method, ...] = ("minmax", "moving-average", "percentile", "entropy", "mse")
HISTOGRAMS = METHODS[2:]
DISTINCT_IMAGES = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64, help="samples of a timed run")
    parser.add_argument(
        "--many", type=int, default=1024, help="samples of the run compared for memory"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    cases = [
        (m, every)
        for m in options.methods
        for every in ((False, True) if m in HISTOGRAMS else (True,))
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder, "model.onnx"))
        ask(model=model, method="build", every=True, samples=0)
        ratios: dict[tuple[Method, bool], list[float]] = {case: [] for case in cases}
        plain: list[float] = []
        peaks: dict[tuple[Method, bool], float] = {}
        for _ in range(options.rounds):
            floor = ask(model=model, method="plain", every=True, samples=options.samples)
            plain.append(floor["cpu"])
            for method, every in cases:
                run = ask(model=model, method=method, every=every, samples=options.samples)
                ratios[method, every].append(run["cpu"] / floor["cpu"])
                peaks[method, every] = run["peak"]
        print(
            f"plain onnxruntime: {statistics.median(plain):.2f} s of CPU for {options.samples} samples"
        )
        print(
            f"{'method':16}{'elements':>16}{'CPU ratio':>11}{'peak MiB':>10}{'many':>8}{'growth':>8}"
        )
        for method, every in cases:
            peak, many, growth = peaks[method, every], "-", "-"
            if options.many:
                long = ask(model=model, method=method, every=every, samples=options.many)["peak"]
                many, growth = f"{long:.0f}", f"{100 * (long / peak - 1):+.1f}%"
            which = "all" if every else "subsample"
            ratio = statistics.median(ratios[method, every])
            print(
                f"{method:16}{which:>16}{ratio:11.3f}{peak:10.0f}{many:>8}{growth:>8}", flush=True
            )


def ask(**case: str | bool | int) -> dict[str, float]:
    """What a fresh process measures."""
    command = [sys.executable, __file__, "--child", json.dumps(case)]
    answer: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True).stdout
    )
    return answer


def measure(model: str, method: Any, every: bool, samples: int) -> dict[str, float]:
    """Run one case in this process."""
    if method == "build":
        build(Path(model))
        return {}
    images = Images(samples)
    if method == "plain":
        import onnxruntime

        start = time.process_time()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for image in images:
            session.run(None, image)
    else:
        import onnx_ir as ir

        from qcompile.data import InputSpec, open_data
        from qcompile.passes.calibrate import Calibrate
        from qcompile.pipeline import Context

        graph = ir.load(model)
        plan = slots(graph)
        spec = InputSpec("image", ("N", 3, 224, 224), np.dtype(np.float32))
        data = open_data(images, [spec])
        calibrate = (
            Calibrate(method=method, elements=0, threads=1)
            if every
            else Calibrate(method=method, threads=1)
        )
        start = time.process_time()
        calibrate(graph, plan, Context(data))
    return {"cpu": time.process_time() - start, "peak": peak_mib()}


class Images:
    """The same few noise images over and over, as often as asked."""

    def __init__(self, samples: int) -> None:
        rng = np.random.default_rng(0)
        self._images = [
            rng.standard_normal((1, 3, 224, 224), np.float32) for _ in range(DISTINCT_IMAGES)
        ]
        self._samples = samples
        self._next = 0

    def rewind(self) -> None:
        """Begin again."""
        self._next = 0

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next image, None at the end."""
        i, self._next = self._next, self._next + 1
        if i == 2:
            Path("/proc/self/clear_refs").write_text("5")
        return {"image": self._images[i % DISTINCT_IMAGES]} if i < self._samples else None


def peak_mib() -> float:
    """The largest resident set since the first images."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def slots(model: onnx_ir.Model) -> QuantPlan:
    """The places a compiler rounds at: the image, every activation and every weight."""
    from qcompile.formats import Int
    from qcompile.plan import Kind, QuantPlan, Slot

    plan = QuantPlan({"image": Slot("image", Kind.INPUT, Int(8))})
    for node in model.graph:
        out = str(node.outputs[0].name)
        if node.op_type in ("Relu", "GlobalAveragePool") or out.endswith("_skip"):
            plan.slots[out] = Slot(out, Kind.ACTIVATION, Int(8))
        if node.op_type == "Gemm":
            plan.slots[out] = Slot(out, Kind.OUTPUT, Int(16))
        if node.op_type in ("Conv", "Gemm") and (weight := node.inputs[1]) is not None:
            name = str(weight.name)
            plan.slots[name] = Slot(name, Kind.WEIGHT, Int(8, narrow=True), axis=0)
    return plan


def build(path: Path) -> None:
    """Write a bottleneck residual network of the shape of ResNet-50, with random weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def parameter(name: str, shape: tuple[int, ...], spread: float) -> str:
        weights.append(
            numpy_helper.from_array(
                rng.standard_normal(shape, np.float32) * np.float32(spread), name
            )
        )
        return name

    def convolve(
        x: str, name: str, inputs: int, outputs: int, size: int, stride: int, gain: float
    ) -> str:
        kernel = parameter(
            f"{name}_w", (outputs, inputs, size, size), (gain / (inputs * size * size)) ** 0.5
        )
        bias = parameter(f"{name}_b", (outputs,), 0.1)
        nodes.append(
            helper.make_node(
                "Conv",
                [x, kernel, bias],
                [name],
                kernel_shape=[size, size],
                strides=[stride, stride],
                pads=[size // 2] * 4,
            )
        )
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    x = node("Relu", [convolve("image", "stem", 3, 64, 7, 2, 2.0)], "stem_relu")
    x = node("MaxPool", [x], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            at = f"stage{stage}_block{block}"
            skip = x if block else convolve(x, f"{at}_skip", channels, 4 * width, 1, stride, 1.0)
            y = node("Relu", [convolve(x, f"{at}_reduce", channels, width, 1, 1, 2.0)], f"{at}_a")
            y = node("Relu", [convolve(y, f"{at}_conv", width, width, 3, stride, 2.0)], f"{at}_b")
            y = convolve(y, f"{at}_expand", width, 4 * width, 1, 1, 0.5)
            x = node("Relu", [node("Add", [y, skip], f"{at}_sum")], f"{at}_out")
            channels = 4 * width
    x = node("Flatten", [node("GlobalAveragePool", [x], "mean")], "flat")
    kernel, bias = (
        parameter("classes_w", (1000, channels), 0.02),
        parameter("classes_b", (1000,), 0.1),
    )
    node("Gemm", [x, kernel, bias], "logits", transB=1)
    graph = helper.make_graph(
        nodes,
        "bottleneck",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


if __name__ == "__main__":
    main()
