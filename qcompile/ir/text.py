"""The text form of the integer graph: `parse(dump(g), constants(g))` is g again.

Names are quoted strings wherever they are not plain words, because a model's names are untrusted. An operator is
written as the Python expression of its dataclass and read back by walking that expression's syntax tree; nothing is
ever evaluated. Long constants stand by their digest and are looked up in a table.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from typing import get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput
from qcompile.ir.arith import Acc, Val
from qcompile.ir.graph import Graph, Port, Value
from qcompile.ir.ops import OPS, Op
from qcompile.ir.types import Array, DType, TensorType

_INLINE = 16
_CLASSES: dict[str, type] = {c.__name__: c for c in (*OPS, Acc, Val)}
_WORD = r"%(?:[A-Za-z0-9_.]+|\"(?:[^\"\\]|\\.)*\")"
_TYPE = r"u?int\d+\[[\dx]*\]"
# an operator holds no quotes, so what follows the first quote is names, whatever they look like
_NODE = rf"([^\"]*) \(((?:{_WORD}(?:, {_WORD})*)?)\) # (\".*\")"
_UNFIT = (ValueError, TypeError, KeyError, OverflowError, SyntaxError, RecursionError, MemoryError)
"""What reading hostile text raises; the last two come from Python's own parser, where it nests too deep."""


def digest(array: NDArray[np.generic]) -> str:
    """The name a long constant goes by."""
    whole = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    whole.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()[:24]


def constants(graph: Graph) -> dict[str, Array]:
    """The long constants of a graph by digest."""
    return {
        digest(v.const): v.const
        for v in graph.constants()
        if v.const is not None and v.const.size > _INLINE
    }


def dump(graph: Graph) -> str:
    """The whole graph as text, one line a value."""
    lines = [f"graph {json.dumps(graph.name)} {'free' if graph.free_batch else 'fixed'}"]
    for port, v in graph.inputs:
        lines.append(f"  {_name(v)}: {v.type} = input {_port(port)}")
    for v in graph.constants():
        assert v.const is not None
        body = str(v.const.ravel().tolist()) if v.const.size <= _INLINE else f"@{digest(v.const)}"
        lines.append(f"  {_name(v)}: {v.type} = const {body}")
    for node in graph.nodes:
        ins = ", ".join(_name(v) for v in node.inputs)
        lines.append(
            f"  {_name(node.output)}: {node.output.type} = {node.op!r} ({ins}) # {json.dumps(node.name)}"
        )
    for port, v in graph.outputs:
        lines.append(f"  return {_name(v)} as {_port(port)}")
    return "\n".join(lines) + "\n"


def parse(text: str, table: Mapping[str, Array] | None = None) -> Graph:
    """Read a graph back; BadInput names the line that does not fit."""
    lines = text.splitlines() or [""]
    env: dict[str, Value] = {}
    at = 0
    try:
        graph = _head(lines[at])
        while at + 1 < len(lines):
            at += 1
            _line(graph, env, lines[at].strip(), table or {})
        graph.verify()
    except _UNFIT as e:
        why = f"{e} is not known" if isinstance(e, KeyError) else str(e)
        raise BadInput(f"line {at + 1} of the integer graph: {why}") from None
    return graph


def _head(line: str) -> Graph:
    m = re.fullmatch(r"graph (\".*\") (free|fixed)", line)
    if m is None:
        raise ValueError('it begins with: graph "name" free|fixed')
    return Graph(json.loads(m[1]), m[2] == "free")


def _line(graph: Graph, env: dict[str, Value], line: str, table: Mapping[str, Array]) -> None:
    if m := re.fullmatch(rf"return ({_WORD}) as (.*)", line):
        graph.add_output(_read_port(m[2]), env[m[1]])
        return
    m = re.fullmatch(rf"({_WORD}): ({_TYPE}) = (.*)", line)
    if m is None:
        raise ValueError(f"cannot read {line[:60]!r}")
    word, kind, body = m[1], _read_type(m[2]), m[3]
    name = json.loads(word[1:]) if word.startswith('%"') else word[1:]
    if body.startswith("input "):
        env[word] = graph.add_input(_read_port(body[6:]), kind, name)
    elif body.startswith("const "):
        rest = body[6:]
        array = table[rest[1:]] if rest.startswith("@") else _elements(rest, kind)
        env[word] = graph.constant(array, kind, name)
    else:
        m = re.fullmatch(_NODE, body)
        if m is None:
            raise ValueError(f"cannot read {body[:60]!r}")
        op = _literal(ast.parse(m[1], mode="eval").body)
        if not isinstance(op, Op):
            raise ValueError(f"{m[1][:40]!r} is no operator")
        ins = [env[w] for w in re.findall(_WORD, m[2])]
        env[word] = graph.add(op, *ins, name=name, layer=json.loads(m[3]))
        if env[word].type != kind:
            raise TypeError(f"{name} is {env[word].type}, not {kind}")
    if env[word].name != name:
        raise ValueError(f"two values are called {name}")


def _elements(text: str, kind: TensorType) -> Array:
    row = json.loads(text)
    if not isinstance(row, list) or not all(type(n) is int for n in row):
        raise ValueError(f"{text[:60]!r} is no row of integers")
    return np.array(row, kind.dtype.numpy).reshape(kind.shape)


def _literal(node: ast.expr) -> object:
    match node:
        case ast.Constant(value=int() | bool() as v):
            return v
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as v)):
            return -v
        case ast.Tuple(elts=elts):
            return tuple(_literal(e) for e in elts)
        case ast.Name(id=name) if name in DType.__members__:
            return DType[name]
        case ast.Call(func=ast.Name(id=name), args=[], keywords=kws) if name in _CLASSES:
            return _made(_CLASSES[name], {str(k.arg): _literal(k.value) for k in kws})
        case _:
            raise ValueError(f"{ast.unparse(node)[:40]!r} has no place in an operator")


def _made(cls: type, fields: dict[str, object]) -> object:
    for name, kind in get_type_hints(cls).items():
        if name in fields and not _fits(fields[name], kind):
            raise ValueError(f"{name} of {cls.__name__} cannot be {str(fields[name])[:40]}")
    made: object = cls(**fields)
    return made


def _fits(value: object, kind: type) -> bool:
    if items := get_args(kind):
        return isinstance(value, tuple) and all(_fits(v, items[0]) for v in value)
    return type(value) is kind


def _name(v: Value) -> str:
    return f"%{v.name}" if re.fullmatch(r"[A-Za-z0-9_.]+", v.name) else f"%{json.dumps(v.name)}"


def _port(port: Port) -> str:
    return f"{json.dumps(port.name)} scale {float(port.scale)!r} zero {port.zero_point}"


def _read_port(text: str) -> Port:
    m = re.fullmatch(r"(\".*\") scale (\S+) zero (-?\d+)", text)
    if m is None:
        raise ValueError(f"cannot read the port {text[:60]!r}")
    return Port(json.loads(m[1]), float(m[2]), int(m[3]))


def _read_type(text: str) -> TensorType:
    m = re.fullmatch(r"(u?)int(\d+)\[([\dx]*)\]", text)
    if m is None:
        raise ValueError(f"{text!r} is no type")
    shape = tuple(int(n) for n in m[3].split("x")) if m[3] else ()
    return TensorType(DType.of(int(m[2]), not m[1]), shape)
