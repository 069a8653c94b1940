"""Where fuzzing begins: small valid files of every kind that is read, made anew each time."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompile import driver, pipeline
from qcompile import plan as plans
from qcompile.ir import text
from qcompile.job import Job
from qcompile.options import Options
from tests.foreign.workbench import Pairs, Workbench
from tests.node_cases import NAMED, cases

MOST_BYTES = 20_000


def network() -> onnx.ModelProto:
    """Two convolutions, a skip and a dense layer."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3), "g": (2, 16)}
    weights = {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "v"], ["d"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["d", "r"], ["a"], "add"),
        helper.make_node("MaxPool", ["a"], ["m"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["m"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "g"], ["l"], "dense", transB=1),
        helper.make_node("Softmax", ["l"], ["y"], "soft"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("y", 1, ["N", 2])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rounded() -> onnx.ModelProto:
    """A convolution between QuantizeLinear and DequantizeLinear."""
    p = Pairs()
    codes = np.arange(-9, 9).reshape(3, 2, 3).astype(np.int8)[:, :, :1, None]
    x = p.pair("x", 0.1, 100)
    w = p.weight("w", codes, [0.1, 0.2, 0.3], axis=0)
    p.op("Conv", [x, w, p.weight("b", np.int32([5, -6, 7]), 0.01)], "c")
    p.pair("c", 0.2, 0, "y")
    return Workbench().model(p.nodes, p.constants, {"x": ["N", 2, 4, 4]})


@cache
def prepared() -> tuple[Job, driver.FloatSide, driver.Choice]:
    """The network with its plan complete."""
    job = Job.checked(network().SerializeToString(), "x86", "fast", None, {}, Options(jobs=1))
    context = pipeline.Context(resumable=False)
    side = driver.prepare(job, context)
    data = driver.open_samples(job, side, None, context)
    return job, side, driver.calibrate(job, side, data, context)


def models() -> Iterator[bytes]:
    """ONNX's own operator tests, a whole network and one that is quantized already."""
    yield network().SerializeToString()
    yield rounded().SerializeToString()
    seen: dict[str, int] = {}
    for case in cases():
        if len(case.operators) != 1 or case.operators[0] not in NAMED:
            continue
        data = case.model.SerializeToString()
        count = seen[case.operators[0]] = seen.get(case.operators[0], 0) + 1
        if count <= 4 and len(data) < MOST_BYTES:
            yield data


def arrays() -> Iterator[bytes]:
    """Arrays of several types and orders, as .npy."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 4, 4)).astype(np.float32)
    for a in (
        x,
        x.transpose(0, 2, 3, 1),
        np.asfortranarray(x),
        (x * 9).astype(np.int8),
        x[0],
        x.astype(np.float64),
    ):
        file = io.BytesIO()
        np.save(file, a)
        yield file.getvalue()


def archives() -> Iterator[bytes]:
    """The same as .npz, with labels, packed and not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 4, 4)).astype(np.float32)
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(
            file,
            x=x,
            y=np.arange(4),
            train=np.array([0, 2]),
            mask=np.array([True, False, True, True]),
        )
        yield file.getvalue()
    file = io.BytesIO()
    np.savez(file, anything=np.asfortranarray(x))
    yield file.getvalue()


def descriptions() -> Iterator[bytes]:
    """Data sets in words, for the network's input and data.npz beside."""
    yield b'file = "data.npz"\nlabels = "y"\nindex = "train"\nmetric = "top1"\n'
    yield (
        b'file = "data.npz"\nlabels = "y"\nindex = "mask"\n[inputs.x]\nkey = "x"\nlayout = "nchw"\nscale = 0.5\n'
        b"zero_point = 3\nmean = [0.1, 0.2, 0.3]\nstd = [1.0, 2, 0.5]\n"
    )
    yield b'file = "data.npz"\n[inputs.x]\nkey = "x"\nlayout = "nhwc"\nmean = 0.5\nstd = [2]\n'


def recipes() -> Iterator[bytes]:
    """The shipped ones."""
    for file in resources.files("qcompile.recipes").iterdir():
        if file.name.endswith(".toml"):
            yield file.read_bytes()


def saved_plans() -> Iterator[bytes]:
    """The plan of the network."""
    _, side, _ = prepared()
    yield plans.dump(side.plan).encode()


def encodings() -> Iterator[bytes]:
    """AIMET's two formats, for the network."""
    ends = {"max": 2.0, "min": -1.0, "offset": -85, "scale": 0.01176}
    one = {"bitwidth": 8, "dtype": "int", "is_symmetric": "False", **ends}
    many = [{**one, "is_symmetric": "True", "offset": -128, "scale": 0.0078, "max": 1.0}] * 4
    old = {
        "version": "0.6.1",
        "activation_encodings": {"x": [one], "r": [one], "a": [one]},
        "param_encodings": {"w": many, "b": [one]},
    }
    plain = {"bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False}
    whole = {**plain, "offset": [-85], "scale": [0.0117]}
    rows = {**plain, "enc_type": "PER_CHANNEL", "offset": [-128] * 4, "scale": [0.01] * 4}
    new = {
        "version": "1.0.0",
        "activation_encodings": [{**whole, "name": "x"}, {**whole, "name": "r"}],
        "param_encodings": [{**rows, "name": "w"}],
    }
    yield from (json.dumps(made, indent=1).encode() for made in (old, new))


def graphs() -> Iterator[bytes]:
    """The text of an integer graph whose constants are all in it."""
    yield (
        b'graph "g" free\n  %x: int8[1x2x2x1] = input "x" scale 0.5 zero -3\n  %w: int8[1x1x1x2] = const [1, -2]\n'
        b'  return %x as "y" scale 0.5 zero 0\n'
    )
    job, side, _ = prepared()
    yield text.dump(driver.to_integers(job, side).graph).encode()


def foldings() -> Iterator[bytes]:
    """A folding of a design."""
    yield json.dumps(
        {
            "version": 1, "part": "xc7z020", "clock_mhz": 100.0,
            "layers": {"dense": {"pe": 2, "simd": 8}}, "fifos": {"l0_window": 2},
        },
        indent=1,
    ).encode()  # fmt: skip


KINDS = {
    "model": models, "npy": arrays, "npz": archives, "description": descriptions, "recipe": recipes,
    "plan": saved_plans, "encodings": encodings, "graph": graphs, "folding": foldings,
}  # fmt: skip


def write(kind: str, folder: Path) -> int:
    """Put the seeds of a kind into a folder; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(KINDS[kind]())
    for i, data in enumerate(found):
        (folder / f"seed-{i:04}").write_bytes(data)
    return len(found)


def calibration() -> Path:
    """A folder with data.npz for descriptions."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "data.npz").write_bytes(next(archives()))
    return folder
