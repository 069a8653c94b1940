"""Writing C: names and strings that cannot escape, numbers, arrays, index expressions, layout, templates."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import jinja2
import numpy as np

from qcompile.ir import Array, DType, TensorType

HERE = Path(__file__).parent
_NUMBERS_PER_LINE = 20
_AT_ONCE = _NUMBERS_PER_LINE << 14


def c_type(kind: DType) -> str:
    """The C type that holds one element."""
    return f"{'' if kind.signed else 'u'}int{kind.bytes * 8}_t"


def c_int(n: int) -> str:
    """A literal of value n; INT32_MIN has none of its own."""
    return "(-2147483647 - 1)" if n == -(1 << 31) else str(n)


def c_string(text: str) -> str:
    """A string literal: what is no letter or digit stands as an octal escape, so nothing can end it early."""
    safe = (chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03o}" for b in text.encode())
    return '"' + "".join(safe) + '"'


def c_comment(text: str) -> str:
    """Text fit for the inside of a comment."""
    return re.sub(r"[^A-Za-z0-9_.:/ -]", "_", text)[:80]


def type_comment(kind: TensorType) -> str:
    """A type in a comment: int8 [1 x 32 x 32 x 16]."""
    return f"{kind.dtype} [{' x '.join(map(str, kind.shape))}]"


class Names:
    """Identifiers of one scope, each given once."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def fresh(self, *parts: str) -> str:
        """An identifier like the parts joined, whatever characters they hold, that nothing else is called."""
        words = (re.sub(r"[^A-Za-z0-9]+", "_", part).strip("_")[:40] for part in parts)
        stem = "_".join(word for word in words if word)
        name, count = stem, 1
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name


def numbers(data: Array) -> str:
    """The elements as initialisers, wrapped."""
    flat = data.ravel()
    parts = (_written(flat[at : at + _AT_ONCE]) for at in range(0, flat.size, _AT_ONCE))
    return ",\n".join(parts)


def _written(flat: Array) -> str:
    """One array of characters, a row for each number: sign, digits, comma and space; blanks are left out."""
    wide = flat.astype(np.int64)
    if flat.size == 0 or wide.min() == -(1 << 31):
        words = [c_int(n) for n in wide.tolist()]
        rows = range(0, len(words), _NUMBERS_PER_LINE)
        return ",\n".join(", ".join(words[i : i + _NUMBERS_PER_LINE]) for i in rows)
    rest = np.abs(wide).astype(np.uint32)
    width = len(str(rest.max()))
    cells = np.empty((flat.size, width + 3), np.uint8)
    used = np.ones(cells.shape, np.bool_)
    cells[:, 0], used[:, 0] = ord("-"), wide < 0
    for i in range(width, 0, -1):
        cells[:, i] = rest % 10 + ord("0")
        used[:, i] = (rest > 0) | (i == width)
        rest //= 10
    cells[:, -2:] = ord(","), ord(" ")
    cells[_NUMBERS_PER_LINE - 1 :: _NUMBERS_PER_LINE, -1] = ord("\n")
    used[-1, -2:] = False
    return cells[used].tobytes().decode("ascii")


def array_type(data: Array) -> str:
    """The C type of an array's elements."""
    return c_type(DType.of(data.dtype.itemsize * 8, np.issubdtype(data.dtype, np.signedinteger)))


def array(name: str, data: Array, prefix: str) -> str:
    """Definition of a constant array of at least one element; `prefix` may say where it lies."""
    return (
        f"static {prefix} const {array_type(data)} {name}[{data.size}] = {{\n{numbers(data)}\n}};\n"
    )


def affine(terms: Iterable[tuple[str, int]], constant: int = 0) -> str:
    """The sum of variable * factor and a constant; a variable may be a literal."""
    parts = []
    for variable, factor in terms:
        if variable.isdigit():
            constant += int(variable) * factor
        elif factor:
            parts.append(variable if factor == 1 else f"{variable} * {factor}")
    if constant or not parts:
        parts.append(str(constant))
    return " + ".join(parts).replace("+ -", "- ")


def at(pointer: str, index: str) -> str:
    """Pointer arithmetic."""
    return pointer if index == "0" else f"{pointer} + {index}"


def cast(kind: str, pointer: str, offset: int) -> str:
    """Bytes at an aligned offset, seen as elements of a type."""
    return f"({kind} *)(void *)" + (f"({pointer} + {offset})" if offset else pointer)


def minus(expression: str, zero: int) -> str:
    """Subtraction of a number."""
    if zero == 0:
        return expression
    return f"{expression} {'-' if zero > 0 else '+'} {abs(zero)}"


def layout(source: str) -> str:
    """The same source indented by its braces, without runs of blank lines."""
    lines: list[str] = []
    depth = 0
    for raw in source.splitlines():
        line = raw.strip()
        if not line and (not lines or not lines[-1] or lines[-1].endswith("{")):
            continue
        depth -= (closing := len(line) - len(line.lstrip("}")))
        if closing and lines and not lines[-1]:
            lines.pop()
        if line.startswith("*"):
            line = " " + line
        flush = not line or line.startswith("#")
        lines.append(line if flush else "    " * depth + line)
        depth += line.count("{") - line.count("}") + closing
    return "\n".join(lines).rstrip("\n") + "\n"


@lru_cache
def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(template: str, folder: Path = HERE, /, **values: object) -> str:
    """The text of a template in `folder`; an undefined name is an error."""
    return _environment(folder).get_template(template).render(**values)
