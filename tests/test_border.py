"""Between real numbers and codes: onnxruntime's QuantizeLinear and DequantizeLinear are the measure."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompile.border import decode, dequantize, encode, quantize, run_graph
from qcompile.errors import BadInput
from qcompile.ir import DType, Graph, Port, Rescale, TensorType
from qcompile.ir.arith import Val
from tests.oracle import execute

CASES = settings(deadline=None, derandomize=True, max_examples=100)
TYPES = {DType.I8: TensorProto.INT8, DType.U8: TensorProto.UINT8, DType.I16: TensorProto.INT16}
DTYPES = st.sampled_from(list(TYPES))
SCALES = st.floats(2.0**-20, 2.0**10, width=32)
REALS = st.floats(-(2.0**60), 2.0**60, width=32)


def linear(op: str, dtype: DType, port: Port, x: NDArray[Any]) -> NDArray[Any]:
    """What onnxruntime makes of it."""
    kind = TYPES[dtype]
    quantizes = op == "QuantizeLinear"
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "s", "z"], ["y"])],
        "border",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT if quantizes else kind, x.shape)],
        [helper.make_tensor_value_info("y", kind if quantizes else TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor("s", TensorProto.FLOAT, (), [port.scale]),
            helper.make_tensor("z", kind, (), [port.zero_point]),
        ],
    )
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return execute(model.SerializeToString(), {"x": x})[0]


@CASES
@given(
    DTYPES,
    SCALES,
    st.integers(-(1 << 15), 1 << 15),
    st.lists(REALS, min_size=1, max_size=50),
    st.booleans(),
)
def test_quantize_is_onnxruntimes(
    dtype: DType, scale: float, zero: int, xs: list[float], halves: bool
) -> None:
    port = Port("x", scale, min(max(zero, dtype.lo), dtype.hi))
    x = np.array(xs, np.float32)
    if halves:
        # multiples of half a step: the ties
        x = (np.arange(-300, 300, dtype=np.float64) / 2 * scale).astype(np.float32)
    got = quantize(x, port, TensorType(dtype, x.shape))
    assert got.dtype == dtype.numpy
    np.testing.assert_array_equal(got, linear("QuantizeLinear", dtype, port, x))


@CASES
@given(DTYPES, SCALES, st.integers(-128, 127))
def test_dequantize_is_onnxruntimes_and_exact(dtype: DType, scale: float, zero: int) -> None:
    port = Port("y", scale, zero - dtype.lo if dtype is DType.U8 else zero)
    port = Port("y", scale, min(max(port.zero_point, dtype.lo), dtype.hi))
    codes = np.linspace(dtype.lo, dtype.hi, 97).astype(dtype.numpy)
    real = dequantize(codes, port)
    assert real.dtype == np.float64
    for code, value in zip(codes, real, strict=True):
        assert Fraction(float(value)) == (int(code) - port.zero_point) * Fraction(scale)
    ort = linear("DequantizeLinear", dtype, port, codes)
    np.testing.assert_array_equal(real.astype(np.float32), ort)


@CASES
@given(st.sampled_from([DType.I4, DType.I8, DType.U8, DType.I16]), SCALES)
def test_codes_survive_the_way_there_and_back(dtype: DType, scale: float) -> None:
    port = Port("x", scale, dtype.hi // 3)
    codes = np.arange(dtype.lo, dtype.hi + 1, 1 if dtype.bits <= 8 else 97).astype(dtype.numpy)
    kind = TensorType(dtype, codes.shape)
    np.testing.assert_array_equal(quantize(dequantize(codes, port), port, kind), codes)


def test_codes_of_few_bits_saturate_at_their_own_ends() -> None:
    kind = TensorType(DType.I4, (3,))
    got = quantize(np.array([-1e9, 0.0, 1e9]), Port("x", 0.5, 1), kind)
    assert got.tolist() == [-8, 1, 7]


# --- whole graphs -----------------------------------------------------------------------------------------------


def doubled(*, free: bool = True, rows: int = 1) -> Graph:
    """y = 2 x and z = 2 u in codes."""
    graph = Graph("double", free_batch=free)
    double = Rescale((), (Val((4,), 1),), (1,), 0, -128, 127, DType.I8)
    for name, result, width in (("x", "y", 3), ("u u", "z", 2)):
        x = graph.add_input(Port(name, 0.5, 1), TensorType(DType.I8, (rows, width)))
        graph.add_output(Port(result, 0.25, 0), graph.add(double, x, name=result))
    return graph


def feeds(rows: int, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    made = {
        "x": rng.normal(size=(rows, 3)).astype(np.float32),
        "u u": np.ones((rows, 2), np.float32),
    }
    return {**made, **{k.replace("_", " "): v for k, v in changes.items()}}


def test_any_number_of_rows_of_any_kind_of_number() -> None:
    graph = doubled()
    for rows in (1, 2, 7):
        for dtype in (np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_):
            fed = {n: x.astype(dtype) for n, x in feeds(rows).items()}
            codes = encode(graph, fed)
            np.testing.assert_array_equal(
                codes["x"], np.clip(np.rint(fed["x"].astype(np.float64) / 0.5) + 1, -128, 127)
            )
            real = decode(graph, run_graph(graph, codes))
            want = np.clip((codes["x"].astype(int) - 1) * 2, -128, 127) * 0.25
            np.testing.assert_array_equal(real["y"], want)


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_fixed_batch_runs_batch_by_batch(rows: int) -> None:
    fixed = doubled(free=False, rows=2)
    codes = encode(fixed, feeds(rows))
    got, want = run_graph(fixed, codes), run_graph(doubled(), codes)
    assert got.keys() == want.keys() == {"y", "z"}
    for name, y in want.items():
        np.testing.assert_array_equal(got[name], y)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"uu": np.ones((2, 2))}, "no input 'uu'; did you mean 'u u'"),
    "nothing like it": ({"qqqqq": np.ones((2, 2))}, "no input 'qqqqq'; inputs: 'x', 'u u'"),
    "missing": ({"x": None}, "input 'x' is missing"),
    "too many axes": (
        {"x": np.ones((2, 3, 1))},
        r"input 'x' takes shape \[N, 3\], not \[2, 3, 1\]",
    ),
    "too few axes": ({"x": np.ones(3)}, r"takes shape \[N, 3\], not \[3\]"),
    "scalar": ({"x": np.float32(1)}, r"takes shape \[N, 3\], not \[\]"),
    "other width": ({"x": np.ones((2, 4))}, r"takes shape \[N, 3\], not \[2, 4\]"),
    "no rows": ({"x": np.ones((0, 3))}, r"takes shape \[N, 3\], not \[0, 3\]"),
    "text": ({"x": np.array([["a"] * 3] * 2)}, "takes numbers, not <U1"),
    "complex": ({"x": np.ones((2, 3), complex)}, "takes numbers, not complex128"),
    "objects": ({"x": np.ones((2, 3), object)}, "takes numbers, not object"),
    "NaN": ({"x": np.array([[1, 1, 1], [1, np.nan, 1]])}, "NaN or infinity in sample 1"),
    "infinity": ({"x": np.array([[1, -np.inf, 1], [1, 1, 1]])}, "NaN or infinity in sample 0"),
    "other rows": ({"x": np.ones((3, 3))}, r"different numbers of samples: \[2, 3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_an_input_is_said(name: str) -> None:
    changes, reason = BAD[name]
    fed = {n: x for n, x in {**feeds(2), **changes}.items() if x is not None}
    with pytest.raises(BadInput, match=reason):
        encode(doubled(), fed)


def test_rows_that_do_not_fill_a_fixed_batch_are_refused() -> None:
    with pytest.raises(BadInput, match="takes shape"):
        encode(doubled(free=False, rows=2), feeds(3))


@pytest.mark.parametrize("x", [3e38, -3e38, 1e300, -1e300])
def test_reals_beyond_float32_saturate(x: float) -> None:
    port, kind = Port("x", 2.0**-10, 0), TensorType(DType.I8, (1,))
    assert quantize(np.array([x]), port, kind).tolist() == [127 if x > 0 else -128]
