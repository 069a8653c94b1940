"""Large weights lie in files, mapped while they are read, and stay out of the messages that the ONNX libraries work on.

What a pass makes of a large weight goes to a temporary file (in TMPDIR), so that a model may be larger than the memory:
what is resident is the weight at hand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from qcompile.errors import BadInput, Unsupported
from qcompile.scratch import common, give_back

Array = NDArray[np.generic]
_Number = TypeVar("_Number", bound=np.generic)
_Message = TypeVar("_Message", onnx.ModelProto, onnx.GraphProto)

LARGE_BYTES = 1 << 20
"""Smaller weights stay in messages: shapes and indices among them settle what is inferred."""

FILED_BYTES = 8 << 20
"""Smaller weights are held in memory once they are read."""

WHOLE_BYTES = 512 << 20
"""With fewer bytes of large weights, a model is run as a whole."""

BLOCK = 1 << 20
"""Numbers of a large weight that are worked on at a time."""


# --- files ------------------------------------------------------------------------------------------------------


def filed(
    file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic], name: str
) -> ir.TensorProtocol:
    """Values in a file; every reading maps them anew and lets go of them after, BadInput if it has changed."""
    seen = _state(file)

    def read() -> ir.TensorProtocol:
        try:
            mapped = np.memmap(file, dtype, "r", offset, shape)
        except (OSError, ValueError) as e:
            raise BadInput(f"tensor {name!r}: {str(file)!r} cannot be read any more: {e}") from e
        if _state(file) != seen:
            raise BadInput(f"tensor {name!r}: {str(file)!r} has changed since it was opened")
        return ir.Tensor(np.asarray(mapped), name=name)

    kind = ir.DataType.from_numpy(dtype)
    return ir.LazyTensor(read, kind, ir.Shape(shape), name=name)


def _state(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


def kept(array: Array, name: str) -> ir.TensorProtocol:
    """The values as a tensor, which holds them in memory or in a temporary file; BadInput without room for one."""
    # `ascontiguousarray` gives a scalar an axis
    whole = np.asarray(array, order="C")
    if array.nbytes < FILED_BYTES:
        return ir.Tensor(whole, name=name)
    place, shape, dtype = common(), array.shape, array.dtype
    start = place.append([whole.reshape(-1).view(np.uint8).data])
    size = array.nbytes

    def read() -> ir.TensorProtocol:
        mapped = np.frombuffer(place.mapped(start, size), dtype)
        return ir.Tensor(mapped.reshape(shape), name=name)

    return ir.LazyTensor(read, ir.DataType.from_numpy(dtype), ir.Shape(shape), name=name)


def by_rows(
    array: Array, dtype: np.dtype[_Number], made: Callable[[Array, slice], Array]
) -> NDArray[_Number]:
    """`made` of a few rows at a time: what it holds meanwhile does not grow with the array."""
    if not array.ndim or array.size <= BLOCK:
        return made(array, slice(None)).astype(dtype)
    result = np.empty(array.shape, dtype)
    step = max(1, BLOCK * len(array) // array.size)
    for at in range(0, len(array), step):
        rows = slice(at, at + step)
        result[rows] = made(array[rows], rows)
    return result


# --- messages that were read ------------------------------------------------------------------------------------


def detachable(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Initializers that only the graph's nodes need: float32, large, each with a name of its own."""
    names = Counter(t.name for t in model.graph.initializer)
    return [
        t
        for t in model.graph.initializer
        if names[t.name] == 1
        and t.name
        and t.data_type == onnx.TensorProto.FLOAT
        and min(t.dims, default=0) > 0
        and math.prod(t.dims) * 4 >= LARGE_BYTES
    ]


def detach(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """A copy without its large float32 weights, as inputs instead, and these weights by name; `model` stays whole."""
    found = [t for t in detachable(model) if _whole(t)]
    large = {t.name for t in found}
    if sum(4 * math.prod(t.dims) for t in found) >= WHOLE_BYTES:
        give_back()
    light = onnx.ModelProto()
    _copy(model, light, "graph")
    _copy(model.graph, light.graph, "initializer")
    weights: dict[str, ir.TensorProtocol] = {}
    for tensor in model.graph.initializer:
        if tensor.name not in large:
            light.graph.initializer.append(tensor)
            continue
        weights[tensor.name] = _tensor(tensor)
        light.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    return light, weights


def attach(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> bool:
    """Put weights back where inputs stood for them, unused ones excepted; is a node made of constants alone now?"""
    graph = model.graph
    back = [value for value in graph.inputs if value.name in weights]
    for value in back:
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            value.const_value = weights[str(value.name)]
            graph.register_initializer(value)
    return any(
        all(v is None or v.is_initializer() for v in node.inputs)
        for value in back
        for node in value.consumers()
    )


def array(tensor: onnx.TensorProto) -> Array:
    """The values of a tensor that `read` let pass, those in a file included."""
    return _tensor(tensor).numpy() if _outside(tensor) else numpy_helper.to_array(tensor)


def unchecked(tensor: onnx.TensorProto) -> bool:
    """Does it lie in a file that `read` has not seen? Its own names of files are absolute, ONNX's relative."""
    place = next((e.value for e in tensor.external_data if e.key == "location"), "")
    return _outside(tensor) and not Path(place).is_absolute()


def _outside(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _tensor(tensor: onnx.TensorProto) -> ir.TensorProtocol:
    """The values of a large float32 tensor."""
    shape, kind = tuple(tensor.dims), np.dtype("<f4")
    if not _outside(tensor):
        return kept(np.frombuffer(tensor.raw_data, kind).reshape(shape), tensor.name)
    entries = {e.key: e.value for e in tensor.external_data}
    place, offset = Path(entries["location"]), int(entries.get("offset", "0"))
    return filed(place, offset, shape, kind, tensor.name)


def _whole(tensor: onnx.TensorProto) -> bool:
    """Is it as long as its shape says? The checker words what is wrong with any other."""
    return _outside(tensor) or len(tensor.raw_data) == math.prod(tensor.dims) * 4


def _copy(source: _Message, target: _Message, left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        _set(target, field.name, value)


def _set(target: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    if hasattr(value, "MergeFrom"):
        getattr(target, name).MergeFrom(value)
    else:
        setattr(target, name, value)


# --- messages that are written ----------------------------------------------------------------------------------

MAX_BYTES = 2**31 - 1
"""The most that anybody reads as one message."""


def light(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The message of a model in which large constants are but named and shaped, and these constants by name."""
    shown = model.clone()
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in shown.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= LARGE_BYTES:
            large[name] = tensor
            value.const_value = ir.ExternalTensor(
                "elsewhere",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )
    return ir.to_proto(shown), large


def named(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """The message of a large constant without its values, as `light` has it."""
    message = onnx.TensorProto(
        name=name, data_type=int(tensor.dtype), dims=list(tensor.shape.numpy())
    )
    message.data_location = onnx.TensorProto.EXTERNAL
    message.external_data.add(key="location", value="elsewhere")
    return message


def written(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """The message of a constant with its values."""
    return numpy_helper.from_array(np.ascontiguousarray(tensor.numpy()), name)


def complete(proto: onnx.ModelProto, large: Mapping[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """The message of `light` with its large constants in it; in place."""
    for tensor in proto.graph.initializer:
        if tensor.name in large:
            tensor.CopyFrom(written(tensor.name, large[tensor.name]))
    return proto


def streamed(
    proto: onnx.ModelProto, large: Mapping[str, ir.TensorProtocol]
) -> Iterator[bytes | memoryview]:
    """What `complete` makes, serialized with its fields in order, with one large constant in memory at a time.

    Unsupported where that is more than one message can hold.
    """
    heads = [_head(t, large.get(t.name)) for t in proto.graph.initializer]
    first, last = _around(proto.graph, "initializer")
    total = len(first) + sum(len(h) for h in heads) + len(last)
    total += sum(large[t.name].nbytes for t in proto.graph.initializer if t.name in large)
    before, after = _around(proto, "graph")
    before += _tag(proto, "graph", total)
    if (size := len(before) + total + len(after)) > MAX_BYTES:
        raise Unsupported(
            f"the exported ONNX files would have {size} bytes, and no message of ONNX may have more than {MAX_BYTES}; "
            "give the model in parts, or with fewer bits for its weights"
        )
    yield before + first
    for tensor, head in zip(proto.graph.initializer, heads, strict=True):
        yield head
        if tensor.name in large:
            array = np.ascontiguousarray(large[tensor.name].numpy())
            yield array.reshape(-1).view(np.uint8).data
    yield last + after


def _head(tensor: onnx.TensorProto, large: ir.TensorProtocol | None) -> bytes:
    """An initializer as the graph holds it, up to a large one's values, which come last."""
    if large is None:
        body, size = bytes(tensor.SerializeToString(deterministic=True)), 0
    else:
        shell = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        size = large.nbytes
        body = bytes(shell.SerializeToString(deterministic=True)) + _tag(shell, "raw_data", size)
    return _tag(onnx.GraphProto(), "initializer", len(body) + size) + body


def _around(message: _Message, field: str) -> tuple[bytes, bytes]:
    """The fields before one and those after it."""
    number = message.DESCRIPTOR.fields_by_name[field].number
    parts = type(message)(), type(message)()
    for known, value in message.ListFields():
        if known.number != number:
            _set(parts[known.number > number], known.name, value)
    first, last = (bytes(p.SerializeToString(deterministic=True)) for p in parts)
    return first, last


def _tag(message: _Message | onnx.TensorProto, field: str, size: int) -> bytes:
    """What precedes a field of so many bytes."""
    number = message.DESCRIPTOR.fields_by_name[field].number
    return _varint(number << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit of a byte says that another follows."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def opened(proto: onnx.ModelProto, large: Mapping[str, ir.TensorProtocol]) -> ir.Model:
    """The model of a message that `light` made, its large constants where they were."""
    model = ir.from_proto(proto)
    for name, value in model.graph.initializers.items():
        if name in large:
            value.const_value = large[name]
    return model
