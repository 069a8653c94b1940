"""Reading an ONNX file that nobody vouches for: size, structure, external data, domains, expansion."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx

from qcompile.errors import BadInput, Unsupported
from qcompile.onnx import classical, weights

MAX_MODEL_BYTES = 2**31 - 1
"""The largest model read, large weights in files beside it not counted: what one protobuf message can hold."""

MAX_NODES = 200_000
"""The most nodes a graph may have once its functions are expanded."""

MAX_ELEMENTS = 2**30
"""The most elements a value may have for one sample: more than any network, less than a machine's memory."""

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})


def read(
    source: str | os.PathLike[str] | bytes, domains: frozenset[str] = frozenset()
) -> onnx.ModelProto:
    """Return a model of standard operators, all but its large weights in memory; it may still be inconsistent.

    Operators of `domains` are let in too.
    """
    folder: Path | None = None
    if isinstance(source, bytes):
        what, data = "the model", source
    else:
        path = Path(source)
        what = f"{str(path)!r}"
        data = _read_file(path, MAX_MODEL_BYTES, what)
        folder = path.resolve().parent
    if len(data) > MAX_MODEL_BYTES:
        raise BadInput(_too_large(what))
    model = _parsed(data, what)
    if not model.HasField("graph"):
        raise BadInput(f"{what} is not an ONNX model: it holds no graph")
    _refuse_broken_text(model, what)
    _load_external(model, folder, MAX_MODEL_BYTES - len(data))
    _refuse_other_sizes(model)
    _refuse_bare_nodes(model)
    classical.in_standard_operators(model)
    refuse_foreign_operators(model, domains)
    _refuse_expansion(model)
    return model


def external_files(source: str | os.PathLike[str]) -> list[Path]:
    """The files beside a model that hold values of its tensors, in the order of their names in it."""
    path = Path(source)
    what = f"{str(path)!r}"
    model = _parsed(_read_file(path, MAX_MODEL_BYTES, what), what)
    folder = path.resolve().parent
    named = {
        entry.value: tensor.name
        for tensor in _tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [_inside(f"tensor {named[location]!r}", location, folder) for location in sorted(named)]


def _parsed(data: bytes, what: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as e:
        # protobuf has its own error classes, another set in each of its implementations.
        raise BadInput(f"{what} is not an ONNX model or is cut short: {e}") from e
    return model


def _read_file(path: Path, limit: int, what: str) -> bytes:
    try:
        # A device or a pipe has no size to check and may never end.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{what} is not a file; give the path of an ONNX file")
        if status.st_size > limit:
            raise BadInput(_too_large(what))
        return path.read_bytes()
    except FileNotFoundError as e:
        raise BadInput(f"{what} does not exist") from e
    except (OSError, ValueError) as e:
        raise BadInput(f"{what} cannot be read: {e}") from e


def _too_large(what: str) -> str:
    most = f"{MAX_MODEL_BYTES} bytes, the most that is read"
    return f"{what} is larger than {most}; keep large weights in a file beside it"


def _refuse_broken_text(message: onnx.ModelProto | onnx.AttributeProto, what: str) -> None:
    """Names and attributes that are not UTF-8 would be bytes where everyone expects text."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            texts = (value,) if isinstance(value, str | bytes) else value
            if any(isinstance(text, bytes) for text in texts):
                raise BadInput(f"{what} is not an ONNX model: field {field.name!r} is not text")
        elif isinstance(message, onnx.AttributeProto) and field.type == field.TYPE_BYTES:
            for text in (value,) if isinstance(value, bytes) else value:
                try:
                    text.decode()
                except UnicodeDecodeError as e:
                    raise BadInput(
                        f"attribute {message.name!r} is not text ({e}); the model is damaged"
                    ) from e
        elif field.type == field.TYPE_MESSAGE:
            for inner in (value,) if hasattr(value, "ListFields") else value:
                _refuse_broken_text(inner, what)


def _attribute_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(holder: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in holder.node:
        yield node
        for graph in _attribute_graphs(node):
            yield from _nodes(graph)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _attribute_graphs(node):
            yield from _graphs(inner)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = list(_graphs(model.graph))
    for f in model.functions:
        graphs += [g for n in f.node for inner in _attribute_graphs(n) for g in _graphs(inner)]
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    attributes = [a for f in model.functions for a in f.attribute_proto]
    for holder in (model.graph, *model.functions):
        attributes += [a for node in _nodes(holder) for a in node.attribute]
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)


def _load_external(model: onnx.ModelProto, folder: Path | None, budget: int) -> None:
    """Fetch what lies in other files; large weights, seen to be there, stay there and get an absolute path."""
    large = {t.name for t in weights.detachable(model)}
    own = len(model.graph.initializer)
    for i, tensor in enumerate(_tensors(model)):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        what = f"tensor {tensor.name!r}"
        if folder is None:
            raise BadInput(
                f"{what} keeps its values in another file, which a model given as bytes cannot"
                " have; give the path of the model instead"
            )
        entries = {e.key: e.value for e in tensor.external_data}
        path, offset, length = _external_place(what, entries, folder)
        del tensor.external_data[:]
        # the graph's own initializers come first
        if i < own and tensor.name in large:
            _refuse_other_size(tensor, length)
            for key, value in (("location", str(path)), ("offset", str(offset))):
                tensor.external_data.add(key=key, value=value)
            continue
        if length > budget:
            raise BadInput(_too_large("the model"))
        budget -= length
        try:
            with path.open("rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(length)
        except OSError as e:
            raise BadInput(_unread(what, entries.get("location", ""), e)) from e
        tensor.data_location = onnx.TensorProto.DEFAULT


def _inside(what: str, location: str, folder: Path) -> Path:
    """The file of that location; BadInput where it is not in the folder."""
    try:
        path = (folder / location).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as e:
        raise BadInput(_unread(what, location, e)) from e
    parts = Path(location.replace("\\", "/")).parts
    # Resolving follows symbolic links, so a link that leaves the folder is caught too.
    if Path(location).is_absolute() or ".." in parts or not path.is_relative_to(folder):
        raise BadInput(
            f"{what} keeps its values in {location!r}, outside the model's folder; external data"
            " is only read from files inside it"
        )
    return path


def _unread(what: str, location: str, why: object) -> str:
    return f"{what} keeps its values in {location!r}, which cannot be read: {why}"


def _external_place(what: str, entries: dict[str, str], folder: Path) -> tuple[Path, int, int]:
    """File, offset and length of a tensor's values, all of which are there."""
    location = entries.get("location", "")
    path = _inside(what, location, folder)
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
        size = path.stat().st_size
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a file")
        if length < 0:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"bytes {offset} to {offset + length} are not in its {size} bytes")
    except (OSError, ValueError) as e:
        raise BadInput(_unread(what, location, e)) from e
    return path, offset, length


def _refuse_other_sizes(model: onnx.ModelProto) -> None:
    """ONNX's checker lets more values pass than a shape has; nobody else does."""
    for tensor in _tensors(model):
        if tensor.raw_data:
            _refuse_other_size(tensor, len(tensor.raw_data))


def _refuse_other_size(tensor: onnx.TensorProto, length: int) -> None:
    size = _ITEM_BYTES.get(tensor.data_type)
    if size is None:
        return
    wanted = size * math.prod(tensor.dims)
    if length != wanted:
        raise BadInput(
            f"tensor {tensor.name!r} has {length} bytes of values where its shape"
            f" {list(tensor.dims)} takes {wanted}; the model is damaged"
        )


def _refuse_bare_nodes(model: onnx.ModelProto) -> None:
    """Every operator has a result, and those of ai.onnx.ml an operand: the first of each is read unasked."""
    for holder in (model.graph, *model.functions):
        for node in _nodes(holder):
            lacks = "result" if not node.output else "operand" if not node.input else ""
            if lacks == "result" or (lacks and node.domain == classical.DOMAIN):
                raise BadInput(
                    f"node {node.name or node.op_type!r} ({node.op_type}) has no {lacks}; the model is damaged"
                )


_ITEM_BYTES = {
    onnx.TensorProto.DataType.Value(kind): size
    for size, kinds in {
        1: "BOOL INT8 UINT8",
        2: "BFLOAT16 FLOAT16 INT16 UINT16",
        4: "FLOAT INT32 UINT32",
        8: "DOUBLE INT64 UINT64",
    }.items()
    for kind in kinds.split()
}


def refuse_foreign_operators(model: onnx.ModelProto, domains: frozenset[str] = frozenset()) -> None:
    """Raise Unsupported at an operator that is neither standard, nor the model's own, nor of `domains`."""
    known = STANDARD_DOMAINS | domains
    local = {(f.domain, f.name) for f in model.functions}
    for holder in (model.graph, *model.functions):
        for node in _nodes(holder):
            if node.domain not in known and (node.domain, node.op_type) not in local:
                raise Unsupported(
                    f"node {node.name or '/'.join(node.output)!r} is {node.op_type!r} of domain"
                    f" {node.domain!r}, which is not a standard ONNX operator; export the model"
                    " with standard operators only"
                )
            if node.op_type.startswith("Sequence") or node.op_type in _SEQUENCE_OPERATORS:
                raise Unsupported(
                    f"node {node.name or '/'.join(node.output)!r} is a {node.op_type}, which works"
                    " on sequences or optional values; only tensors are compiled"
                )


_SEQUENCE_OPERATORS = frozenset(
    {
        "ConcatFromSequence",
        "SplitToSequence",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
    }
)


def _refuse_expansion(model: onnx.ModelProto) -> None:
    """Refuse functions that call themselves or each other so often that inlining would not end."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    open_calls: set[tuple[str, str]] = set()

    def size(holder: onnx.GraphProto | onnx.FunctionProto) -> int:
        total = 0
        for node in _nodes(holder):
            key = (node.domain, node.op_type)
            if key in functions and key not in sizes:
                if key in open_calls or len(open_calls) > 100:
                    raise BadInput(
                        f"function {node.op_type!r} of domain {node.domain!r} calls itself or is"
                        " nested more than 100 deep"
                    )
                open_calls.add(key)
                sizes[key] = size(functions[key])
                open_calls.discard(key)
            total += sizes.get(key, 1)
        return total

    nodes = size(model.graph)
    if nodes > MAX_NODES:
        raise BadInput(f"the model has {nodes} nodes; more than {MAX_NODES} are not read")
