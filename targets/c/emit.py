"""The integer graph as one C99 program: steps, kernels, memory, files.

The graph's accumulators and rescales must be proved (`qcompile.ir.proof`): the code trusts them to stay in 32 bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from qcompile.ir import Array, Graph, Value, arith
from qcompile.ir.text import digest
from qcompile.program import PROGRAM_FILE
from qcompile.target import ANYWHERE, Buffer, Codes, Layer, Lowered, Piece, Placement

from . import bands, binary
from . import kernel as k
from .interface import Interface
from .kernels import PORTABLE
from .storage import Storage, fuse
from .text import (
    Names,
    array,
    at,
    c_comment,
    c_type,
    cast,
    layout,
    render,
    type_comment,
)

__all__ = ["fuse", "lower"]


def lower(
    graph: Graph,
    *,
    name: str,
    isa: str,
    vectors: Sequence[Codes],
    kernels: Sequence[k.Kernel] = PORTABLE,
    placement: Placement = ANYWHERE,
    hosted: bool = False,
) -> Lowered:
    """Emit `name`_run and what it needs; `isa` says in the sources what the kernels were made for.

    `vectors.h` holds the vectors and what the graph makes of them. The large constants of a `hosted` program may lie in
    a file of their own. Raises Unsupported naming the node.
    """
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is None:
        raise ValueError(f"{name!r} is no C identifier")
    banded = bands.Banded(graph)
    if placement.max_ram is not None:
        banded = bands.fit(
            graph, kernels, placement.max_ram - placement.stack, k.LINE if hosted else k.ALIGN
        )
    program = _Program(banded.graph, name, isa, kernels, hosted, placement.threads)
    made = program.files(vectors, placement, banded.pieces)
    # its parts refer to each other, and packed weights should not wait for the collector
    program.arrays.clear()
    return replace(made, bands=banded.count)


class _Program:
    """One lowering: everything that the templates ask for."""

    def __init__(
        self,
        graph: Graph,
        name: str,
        isa: str,
        kernels: Sequence[k.Kernel],
        hosted: bool,
        threads: int,
    ) -> None:
        self.graph, self.name, self.isa, self.threads = graph, name, isa, threads
        self.names = Names([f"{name}_run", f"{name}_trace"])
        self.arrays: dict[str, tuple[str, Array]] = {}
        self.large = binary.threshold(graph) if hosted else None
        self.functions: dict[str, str] = {}
        self.align = k.LINE if hosted else k.ALIGN
        self.storage = Storage(graph, kernels, self.align)
        self.steps, self.kernels = self.storage.steps, self.storage.kernels
        self.plan = self.storage.plan()
        self.arena = max(self.plan.peak, self.align)
        self.pointers = self._pointers()

    def _pointers(self) -> dict[Value, str]:
        """What `run` calls the memory of inputs, outputs and arena buffers."""
        names = Names(["memory", "arena"])
        pointers = {v: f"input{i}" for i, (_, v) in reversed([*enumerate(self.graph.inputs)])}
        for step in self.steps:
            whole, offset = self.storage.views.whole(step.output)
            if (port := self.storage.claimed.get(whole)) is not None:
                pointers[step.output] = at(f"output{port}", str(offset))
            else:
                pointers[step.output] = names.fresh("at", step.output.name)
        return pointers

    def _pointer(self, value: Value) -> str:
        """The C expression for a value's first element in `run`."""
        root, offset = self.storage.views.root(value)
        if root.const is not None:
            return self._constant(root.const, root.name)
        first, _ = next(self.storage.views.pieces(root))
        return at(self.pointers[first], str(offset))

    def _constant(self, data: Array, *name: str) -> str:
        """The C array of these elements; equal arrays are one."""
        data = np.ascontiguousarray(data)
        found = digest(data.reshape(-1))
        if found not in self.arrays:
            # the linker sees what lies in a file of its own, so its name carries the program's
            own = (self.name,) if self._apart(data) else ()
            self.arrays[found] = (self.names.fresh(*own, "layer", *name), data)
        return self.arrays[found][0]

    def _apart(self, data: Array) -> bool:
        """Does this array lie in a file of its own?"""
        return self.large is not None and data.nbytes >= self.large

    def _function(self, index: int) -> tuple[str, str, str]:
        """Definition, name and call of one step's function; no definition where an equal function is there."""
        step, kernel = self.steps[index], self.kernels[index]
        made = step.output.name
        taken = self.plan.taken.get(made)
        crossed = {name for result, name in self.plan.crossed if result == made}
        scratch = kernel.scratch(step)
        operands: dict[Value, str] = {}
        parameters: list[str] = []
        arguments: list[str] = []
        for v in step.reads:
            root, _ = self.storage.views.root(v)
            buffers = {name for name, _ in self.storage.buffers(v)}
            if root.const is not None:
                if v not in kernel.packed(step):
                    operands[v] = self._constant(root.const, root.name)
            elif taken in buffers:
                operands[v] = "y"
            else:
                operands[v] = f"x{len(parameters) or ''}"
                restrict = "" if buffers & crossed else "restrict "
                parameters.append(f"const {c_type(v.type.dtype)} *{restrict}{operands[v]}")
                arguments.append(self._pointer(v))
        layer = k.Layer(
            step,
            operands,
            lambda role, data: self._constant(data, step.name, role),
            scratch,
        )
        restrict = "" if crossed else "restrict "
        parameters.append(f"{c_type(step.output.type.dtype)} *{restrict}y")
        arguments.append(self._pointer(step.output))
        if scratch.regions:
            parameters.append("unsigned char *restrict scratch")
            arguments.append(at("memory", str(self.plan.scratch[index])))
        if k.shared(kernel, step):
            parameters.append("int thread")
            arguments.append("thread")
        code = f"({', '.join(parameters)})\n{{\n{kernel.body(layer)}\n}}\n"
        definition = ""
        if code not in self.functions:
            self.functions[code] = self.names.fresh("layer", step.name)
            comment = self._comment(step, kernel, taken is not None, bool(crossed))
            definition = f"/* {comment} */\nstatic LAYER void {self.functions[code]}{code}"
        name = self.functions[code]
        return definition, name, f"{name}({', '.join(arguments)});"

    def _comment(self, step: k.Step, kernel: k.Kernel, taken: bool, crossed: bool) -> str:
        node = step.node
        parts = [type(node.op).__name__ + (" and Rescale" if step.rescale else "")]
        reads = " and ".join(type_comment(v.type) for v in (*node.inputs[:2], *step.terms))
        parts.append(f"of {reads} to {type_comment(step.output.type)}")
        if step.macs:
            parts.append(f"{step.macs} multiply-accumulates")
        if taken:
            parts.append("in place")
        if crossed:
            parts.append("written over what has been read")
        return f"{c_comment(step.name)}: {', '.join(parts)} ({kernel.name})"

    def files(
        self, vectors: Sequence[Codes], placement: Placement, pieces: Mapping[str, Piece]
    ) -> Lowered:
        """Render everything."""
        functions, calls, called, stored = self._code()
        apart = binary.Binary([(n, data) for n, data in self.arrays.values() if self._apart(data)])
        weight_bytes = sum(data.nbytes for _, data in self.arrays.values())
        interface = Interface(
            self.graph,
            self.name,
            self.isa,
            self.arena,
            self.align,
            self.threads,
            len(stored),
            weight_bytes,
            placement,
        )
        common = interface.facts
        texts = {
            "arith.h": render(
                "arith.h.j2",
                constant=arith.LINE_CONSTANT,
                slope=arith.LINE_SLOPE,
                steps=arith.NEWTON_STEPS,
                root={
                    "constant": arith.ROOT_CONSTANT,
                    "slope": arith.ROOT_SLOPE,
                    "three": arith.ROOT_THREE,
                    "steps": arith.ROOT_STEPS,
                },
            ),
            **({"threads.h": render("threads.h.j2", **common)} if self.threads > 1 else {}),
            "model.c": render(
                "model.c.j2",
                **common,
                graph_name=c_comment(self.graph.name),
                includes=[
                    f'"{header.name}"' if isinstance(header, Path) else header
                    for header in self._headers()
                ],
                functions=functions,
                calls=calls,
                homes=[
                    f"{c_type(v.type.dtype)} *const {self.pointers[v]} ="
                    f" {cast(c_type(v.type.dtype), 'memory', self.plan.offsets[v.name])};"
                    for v in (step.output for step in self.steps)
                    if v.name in self.plan.offsets
                ],
                layout=self._arena_comment(),
                macs=sum(step.macs for step in self.steps),
                sizes=" +\n".join(f"sizeof({name})" for name, _ in self.arrays.values()) or "0",
            ),
            "weights.h": render(
                "weights.h.j2",
                **common,
                apart=apart.rows,
                arrays=[
                    array(name, data, f"{self.name.upper()}_CONSTANT")
                    for name, data in self.arrays.values()
                    if not self._apart(data)
                ],
            ),
        }
        files = {path: layout(text).encode() for path, text in texts.items()}
        files |= {"model.h": interface.header(), "vectors.h": interface.vectors(vectors)}
        layers = [
            Layer(
                step.name,
                kernel.name,
                function,
                step.macs,
                kernel.scratch(step).bytes,
                kernel.cost(step),
            )
            for step, kernel, function in zip(self.steps, self.kernels, called, strict=True)
        ]
        program = {
            "values": stored,
            "stores": [stored[step.output.name] for step in self.steps],
            "pieces": {name: asdict(piece) for name, piece in pieces.items()},
            "layers": [asdict(layer) for layer in layers],
        }
        files |= apart.files(self.name, placement.weights_section)
        files[PROGRAM_FILE] = (json.dumps(program, indent=1) + "\n").encode()
        files |= {h.name: h.read_bytes() for h in self._headers() if isinstance(h, Path)}
        return Lowered(
            files=files,
            arena_bytes=self.arena,
            weight_bytes=weight_bytes,
            stored=stored,
            fused=[step.node.output.name for step in self.steps if step.rescale is not None],
            layers=layers,
            pieces=pieces,
            buffers=self._buffers(),
        )

    def _buffers(self) -> list[Buffer]:
        """The arena over time: values in the order they are made, each step's scratch after its result."""
        spans, sizes = self.storage.spans, self.storage.sizes
        found = []
        for i, (step, kernel) in enumerate(zip(self.steps, self.kernels, strict=True)):
            name = step.output.name
            if name in self.plan.offsets:
                found.append(Buffer(name, self.plan.offsets[name], sizes[name], *spans[name]))
            if scratch := kernel.scratch(step).bytes:
                found.append(Buffer(None, self.plan.scratch[i], scratch, i, i))
        return found

    def _headers(self) -> list[str | Path]:
        """What the kernels in use include, each once."""
        return list(dict.fromkeys(i for kernel in self.kernels for i in kernel.includes))

    def _code(self) -> tuple[list[str], list[str], list[str], dict[str, int]]:
        """Functions of the layers, statements of `run`, which function each step calls, trace ids in order."""
        functions: list[str] = []
        called: list[str] = []
        calls: list[str] = []
        stored: dict[str, int] = {}
        views = self.storage.views
        parts = {join: {p.name for p, _ in views.pieces(join.output)} for join in views.joins}

        def trace(value: Value) -> None:
            stored[value.name] = len(stored)
            pointer, size = self._pointer(value), value.type.bytes
            calls.append(f"STORED({stored[value.name]}, {pointer}, {size});")
            trace_aliases(value)

        def alone(statement: str) -> str:
            return statement if self.threads == 1 else f"if (thread == 0) {{\n{statement}\n}}"

        together = False

        def trace_aliases(value: Value) -> None:
            for user, _ in value.uses:
                if user in views.nodes and user not in views.joins:
                    trace(user.output)

        for v in (*(v for _, v in self.graph.inputs), *self.graph.constants()):
            trace_aliases(v)
        for index, step in enumerate(self.steps):
            definition, function, call = self._function(index)
            called.append(function)
            if definition:
                functions.append(definition)
            before, together = together, k.shared(self.kernels[index], step)
            if index and (before or together):
                calls.append("meet();")
            calls.append(call if together else alone(call))
            trace(step.output)
            for join in [join for join, names in parts.items() if names <= stored.keys()]:
                del parts[join]
                trace(join.output)
        for i, (_, v) in enumerate(self.graph.outputs):
            if self.storage.claimed.get(views.root(v)[0]) != i:
                if together:
                    calls.append("meet();")
                    together = False
                copy = f"memcpy(output{i}, {self._pointer(v)}, {v.type.bytes});"
                calls.append(alone(copy))
        return functions, calls, called, stored

    def _arena_comment(self) -> list[tuple[int, int, str]]:
        """(offset, bytes, what) of everything in the arena, in order of execution."""
        rows = []
        for step, kernel, scratch in zip(self.steps, self.kernels, self.plan.scratch, strict=True):
            made = step.output
            if made.name in self.plan.offsets:
                rows.append((self.plan.offsets[made.name], made.type.bytes, c_comment(made.name)))
            if size := kernel.scratch(step).bytes:
                rows.append((scratch, size, f"scratch of {c_comment(step.name)}"))
        return rows
