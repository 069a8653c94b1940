"""Between real numbers and codes at a program's border, exactly as ONNX QuantizeLinear and DequantizeLinear say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.ir import Array, Graph, Port, TensorType


def quantize(x: NDArray[np.generic], port: Port, kind: TensorType) -> Array:
    """Codes of real numbers: float32 division by the scale, round half to even, add the zero point, saturate."""
    with np.errstate(over="ignore"):
        steps = np.rint(x.astype(np.float32) / np.float32(port.scale)).astype(np.float64)
    codes: Array = np.clip(steps + port.zero_point, kind.dtype.lo, kind.dtype.hi).astype(
        kind.dtype.numpy
    )
    return codes


def dequantize(codes: Array, port: Port) -> NDArray[np.float64]:
    """Real numbers of codes, exact in float64."""
    real: NDArray[np.float64] = (codes.astype(np.float64) - port.zero_point) * port.scale
    return real


def encode(graph: Graph, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, Array]:
    """Codes for every input of the graph, rows on the first axis.

    Raises BadInput for a missing or unknown name, a wrong shape, NaN or infinity, and rows that do not agree.
    """
    known = [port.name for port, _ in graph.inputs]
    for name in feeds:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BadInput(
                f"the model has no input {name!r}; {hint}inputs: {', '.join(map(repr, known))}"
            )
    codes: dict[str, Array] = {}
    rows: set[int] = set()
    for port, value in graph.inputs:
        if port.name not in feeds:
            raise BadInput(f"input {port.name!r} is missing")
        x = np.asarray(feeds[port.name])
        shape = value.type.shape
        if (
            x.ndim != len(shape)
            or x.shape[1:] != shape[1:]
            or x.shape[0] % shape[0]
            or x.shape[0] == 0
        ):
            lead = "N" if shape[0] == 1 else f"{shape[0]} * N"
            sizes = ", ".join([lead, *map(str, shape[1:])])
            raise BadInput(f"input {port.name!r} takes shape [{sizes}], not {list(x.shape)}")
        if x.dtype.kind not in "fiub":
            raise BadInput(f"input {port.name!r} takes numbers, not {x.dtype}")
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            row = int(np.argwhere(~np.isfinite(x))[0][0])
            raise BadInput(f"input {port.name!r} has NaN or infinity in sample {row}")
        rows.add(x.shape[0] // shape[0])
        codes[port.name] = quantize(x, port, value.type)
    if len(rows) > 1:
        raise BadInput(f"the inputs have different numbers of samples: {sorted(rows)}")
    return codes


def decode(graph: Graph, codes: Mapping[str, Array]) -> dict[str, NDArray[np.float64]]:
    """Real numbers of every output."""
    return {port.name: dequantize(codes[port.name], port) for port, _ in graph.outputs}


def end_to_end(real: NDArray[np.float32], program: NDArray[np.generic]) -> NDArray[np.float64]:
    """Float results as a program gives them: what counts no samples on its leading axis is joined along it."""
    merged = real.reshape(-1, *real.shape[2:]) if real.ndim > program.ndim else real
    return merged.astype(np.float64)


def whole(graph: Graph, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Feeds cut to a multiple of the batch the graph takes at once."""
    steps = {port.name: value.type.shape[0] for port, value in graph.inputs}
    return {k: x[: len(x) // steps.get(k, 1) * steps.get(k, 1)] for k, x in feeds.items()}


def to_channels_last(feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Tensors of a channels-first model as an artifact with `--io-layout nhwc` takes them."""
    return {k: np.moveaxis(x, 1, -1) if x.ndim > 2 else x for k, x in feeds.items()}


def to_channels_first(results: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """The inverse of `to_channels_last`."""
    return {k: np.moveaxis(x, -1, 1) if x.ndim > 2 else x for k, x in results.items()}


def run_graph(
    graph: Graph,
    codes: Mapping[str, Array],
    run: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None,
) -> dict[str, Array]:
    """The integer graph (or `run`, which equals it) on any rows; one batch at a time where its batch is fixed."""
    execute = graph.run if run is None else run
    if graph.free_batch:
        return execute(codes)
    step = {port.name: value.type.shape[0] for port, value in graph.inputs}
    count = min(len(codes[name]) // n for name, n in step.items())
    parts = [
        execute({name: codes[name][i * n : (i + 1) * n] for name, n in step.items()})
        for i in range(count)
    ]
    return {port.name: np.concatenate([p[port.name] for p in parts]) for port, _ in graph.outputs}
