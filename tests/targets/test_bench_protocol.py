"""The benchmark program: its protocol, and that it quantizes and dequantizes as ONNX does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from qcompile.ir import DType, Graph, Port, Reshape, TensorType
from qcompile.targets.c import build

SIZE = 4096
SCALE = np.float32(0.037)


def emitted(folder: Path, kind: DType, zero: int, work: str = "") -> Path:
    """A model that hands its input through; `work` is C that runs in every call."""
    g = Graph("echo")
    x = g.add_input(Port("x", float(SCALE), zero), TensorType(kind, (1, SIZE)))
    g.add_output(Port("y", float(SCALE), zero), g.add(Reshape((-1, SIZE)), x, name="y"))
    ctype = f"{'' if kind.signed else 'u'}int{kind.bits}_t"
    border = "".join(
        f"#define ECHO_{p}_0_SIZE {SIZE}\n#define ECHO_{p}_0_SCALE {SCALE!s}f\n"
        f"#define ECHO_{p}_0_ZERO {zero}\n"
        for p in ("INPUT", "OUTPUT")
    )
    files = {
        "model.h": "#include <stdint.h>\n#define ECHO_ARENA_BYTES 16u\n#define ECHO_ARENA_ALIGN 16u\n"
        "#define ECHO_ARENA __attribute__((aligned(16)))\n"
        f"{border}int echo_run(const {ctype} *x, {ctype} *y, void *arena);\n",
        "model.c": f'#include "model.h"\n#include <string.h>\n'
        f"int echo_run(const {ctype} *x, {ctype} *y, void *arena)\n{{\n    {work}\n"
        f"    memcpy(y, x, {SIZE * kind.bytes});\n    return arena == 0 ? -1 : 0;\n}}\n",
        "vectors.h": "",
        "weights.h": "",
    }
    around = build.support_files(g, name="echo", family="x86", flags=["-march=x86-64"])
    for name, content in {**around, **{k: v.encode() for k, v in files.items()}}.items():
        (folder / name).write_bytes(content)
    return folder


def make_bench(folder: Path) -> str:
    subprocess.run(
        ["make", "-C", str(folder), "bench"], check=True, timeout=60, stdout=subprocess.DEVNULL
    )
    return str(folder / "bench")


@pytest.mark.parametrize("arguments", [[], ["raw"]])
def test_it_answers_every_line_until_zero(tmp_path: Path, arguments: list[str]) -> None:
    bench = make_bench(emitted(tmp_path, DType.I8, -3))
    process = subprocess.Popen(
        [bench, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        for ms in ("3", "1.5", "0.001"):
            process.stdin.write(f"{ms}\n")
            process.stdin.flush()
            wall, cpu = (float(n) for n in process.stdout.readline().split())
            assert wall > 0
            assert cpu > 0
        process.stdin.write("0\n9\n")
        process.stdin.close()
        assert process.stdout.read() == ""
    assert process.returncode == 0


def test_the_end_of_the_input_ends_it(tmp_path: Path) -> None:
    bench = make_bench(emitted(tmp_path, DType.I8, 0))
    done = subprocess.run([bench], input=b"", capture_output=True, check=True, timeout=60)
    assert done.stdout == b"ready\n"


def test_another_argument_is_refused(tmp_path: Path) -> None:
    bench = make_bench(emitted(tmp_path, DType.I8, 0))
    done = subprocess.run([bench, "fast"], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.endswith(b"usage: " + bench.encode() + b" [raw]\n")


def test_a_slice_lasts_about_as_long_as_asked_and_counts_every_call(tmp_path: Path) -> None:
    """Each call adds one to a counter that the model prints at a call the protocol cannot reach by itself."""
    work = (
        "static long calls; extern int puts(const char *); extern int printf(const char *, ...);"
        'if (++calls % 1000 == 0) { printf("calls %ld\\n", calls); }'
        "for (volatile int i = 0; i < 20000; i++) { }"
    )
    bench = make_bench(emitted(tmp_path, DType.I8, 0, work))
    done = subprocess.run(
        [bench, "raw"], input="20\n200\n0\n", text=True, capture_output=True, check=True, timeout=60
    )
    answers = [line for line in done.stdout.splitlines() if "calls" not in line]
    assert answers[0] == "ready"
    cpu = float(answers[2].split()[1])
    made = 1000 * sum("calls" in line for line in done.stdout.splitlines())
    assert 100e6 < cpu * (made + 1000)
    assert cpu * made < 400e6


def test_it_converts_as_onnx_does(tmp_path: Path) -> None:
    """Ties, both ends of the range and far beyond it, against onnxruntime's QuantizeLinear and DequantizeLinear."""
    rng = np.random.default_rng(5)
    for kind, zero, code in (
        (DType.I8, -3, onnx.TensorProto.INT8),
        (DType.U8, 128, onnx.TensorProto.UINT8),
        (DType.I16, 0, onnx.TensorProto.INT16),
    ):
        folder = tmp_path / str(kind)
        folder.mkdir()
        emitted(folder, kind, zero)
        steps = np.concatenate(
            [
                np.arange(-700, 700) / np.float32(2),
                rng.uniform(kind.lo - 9, kind.hi + 9, SIZE - 1404),
                [1e30, -1e30, 3.4e38, 0.0],
            ]
        ).astype(np.float32)
        x = (steps * SCALE).astype(np.float32)
        codes, reals = converted(folder, x, kind)
        expected = through_onnx(x, zero, kind, code)
        assert np.array_equal(codes, expected[0])
        assert np.array_equal(reals, expected[1])


def converted(
    folder: Path, x: NDArray[np.float32], kind: DType
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """What bench.c makes of x: the codes and the reals of one call."""
    (folder / "probe.c").write_text(
        '#define main timing\n#include "bench.c"\n#undef main\n'
        "int main(void)\n{\n"
        "    if (fread(real_input0, sizeof real_input0, 1, stdin) != 1 || call(0) != 0) {\n"
        "        return 1;\n    }\n"
        "    fwrite(input0, sizeof input0, 1, stdout);\n"
        "    fwrite(real_output0, sizeof real_output0, 1, stdout);\n    return 0;\n}\n"
    )
    probe = str(folder / "probe")
    sources = [str(folder / "probe.c"), str(folder / "model.c")]
    subprocess.run(["gcc", "-std=c99", "-O3", *sources, "-o", probe], check=True, timeout=60)
    out = subprocess.run(
        [probe], input=x.tobytes(), capture_output=True, check=True, timeout=60
    ).stdout
    return np.frombuffer(out, kind.numpy, SIZE), np.frombuffer(out[SIZE * kind.bytes :], np.float32)


def through_onnx(
    x: NDArray[np.float32], zero: int, kind: DType, code: int
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    h = onnx.helper
    scale = onnx.numpy_helper.from_array(np.array(SCALE), "s")
    point = onnx.numpy_helper.from_array(np.array(zero, kind.numpy), "z")
    model = h.make_model(
        h.make_graph(
            [
                h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                h.make_node("DequantizeLinear", ["q", "s", "z"], ["r"]),
            ],
            "g",
            [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [SIZE])],
            [
                h.make_tensor_value_info("q", code, [SIZE]),
                h.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [SIZE]),
            ],
            [scale, point],
        ),
        opset_imports=[h.make_opsetid("", 21)],
        ir_version=10,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    q, r = session.run(None, {"x": x})
    return np.asarray(q), np.asarray(r)
