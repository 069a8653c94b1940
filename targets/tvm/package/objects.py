"""A network as object files with a plain C interface: no run-time library, no heap, for any chip LLVM knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm
from tvm import relax, s_tir, tirx

from . import loops
from .program import Network, Port

ALIGN = 64
"""What arena and constants are aligned to, and everything in them."""

_POINTER = tvm.ir.PointerType(tvm.ir.PrimType("uint8"))


@dataclass(frozen=True)
class _Call:
    """A function of loops and the tensors it is called with, by name."""

    function: tirx.PrimFunc
    symbol: str
    operands: tuple[str, ...]


class _Calls:
    """A network as calls in order, every tensor named.

    `bytes` has the size of each that a call makes, `offsets` where each constant is in `constants`.
    """

    def __init__(self, symbol: str, module: tvm.IRModule) -> None:
        main = module["main"]
        self.calls: list[_Call] = []
        self.results: list[str] = []
        self.bytes: dict[str, int] = {}
        self.constants = bytearray()
        self.offsets: dict[str, int] = {}
        self._stored: dict[bytes, str] = {}
        self._known = {v: f"input{i}" for i, v in enumerate(main.params)}
        numbers = {f: i for i, f in enumerate(v.name_hint for v in module.functions)}
        for binding in (b for block in main.body.blocks for b in block.bindings):
            value = binding.value
            if isinstance(value, relax.Tuple):
                self.results = [self._name(x) for x in value.fields]
            elif isinstance(value, tvm.ir.Call):
                hint = value.args[0].name_hint
                function, temporaries = _bare(module[hint])
                read = [self._name(x) for x in value.args[1].fields]
                made = [self._made(t.shape, t.dtype) for t in (binding.var.ty, *temporaries)]
                self._known[binding.var] = made[0]
                name = f"{symbol}_{numbers[hint]}_{hint[:40]}"
                self.calls.append(_Call(function, name, (*read, *made)))
            else:
                self._known[binding.var] = self._name(value)

    def _name(self, value: relax.Expr) -> str:
        if isinstance(value, relax.Var):
            return self._known[value]
        data = np.ascontiguousarray(value.value.numpy()).tobytes()
        if data not in self._stored:
            name = self._stored[data] = f"constant{len(self.offsets)}"
            self.offsets[name] = len(self.constants)
            self.constants += data + bytes(-len(data) % ALIGN)
        return self._stored[data]

    def _made(self, shape: Sequence[int], dtype: object) -> str:
        name = f"value{len(self.bytes)}"
        self.bytes[name] = int(np.dtype(str(dtype)).itemsize * np.prod([int(n) for n in shape]))
        return name

    def arena(self) -> tuple[dict[str, int], int]:
        """Where every intermediate begins, and the bytes of all together: the largest first, as low as it goes."""
        spans: dict[str, tuple[int, int]] = {}
        for at, call in enumerate(self.calls):
            for name in call.operands:
                if name in self.bytes and name not in self.results:
                    spans[name] = (spans.get(name, (at, at))[0], at)
        placed: dict[str, int] = {}
        for name in sorted(spans, key=lambda n: (-self.bytes[n], spans[n])):
            first, last = spans[name]
            beside = sorted(
                (offset, offset + _rounded(self.bytes[other]))
                for other, offset in placed.items()
                if spans[other][0] <= last and first <= spans[other][1]
            )
            at = 0
            for begin, end in beside:
                if at + self.bytes[name] <= begin:
                    break
                at = max(at, end)
            placed[name] = at
        return placed, max([0, *(at + _rounded(self.bytes[n]) for n, at in placed.items())])


def write(network: Network, folder: Path) -> None:
    """Put NAME.o, NAME_loops.o, NAME.h, NAME_constants.bin and NAME_constants.S, which includes it, into a folder."""
    chip = network.chip()
    module = loops.lower(network.module(), chip)
    calls = _Calls(network.name, module)
    entry, arena = _entry(network, calls)
    folder.mkdir(parents=True, exist_ok=True)
    # TVM tells LLVM that no two buffers of a module share memory, which is so in each function but not in the arena:
    # were entry and functions in one module, those would be inlined and their accesses moved across one another
    objects = {
        "": {f"{network.name}_run": entry},
        "_loops": {c.symbol: c.function for c in calls.calls},
    }
    for end, functions in objects.items():
        library = _build(functions, chip)
        library.write_to_file(str(folder / f"{network.name}{end}.o"), "o")
    (folder / f"{network.name}_constants.bin").write_bytes(calls.constants)
    (folder / f"{network.name}_constants.S").write_text(_assembly(network.name))
    (folder / f"{network.name}.h").write_text(_header(network, arena, len(calls.constants)))


def _rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _bare(function: tirx.PrimFunc) -> tuple[tirx.PrimFunc, list[tirx.Buffer]]:
    """The function on plain pointers, those to its temporaries last."""
    realize = function.body
    block = realize.block
    # one nest of loops keeps its accumulator to itself; several share whole tensors
    temporaries = list(block.alloc_buffers) if isinstance(block.body, tirx.SeqStmt) else []
    buffers = [*function.params, *temporaries]
    if temporaries:
        alone = s_tir.SBlock([], [], [], block.name_hint, block.body)
        realize = s_tir.SBlockRealize([], True, alone)
    pointers = [
        tirx.Var(f"p{i}", tvm.ir.PointerType(tvm.ir.PrimType(str(b.dtype))))
        for i, b in enumerate(buffers)
    ]
    declared = [tirx.DeclBuffer(b, data=p) for b, p in zip(buffers, pointers, strict=True)]
    body = tirx.SeqStmt([*declared, realize])
    return tirx.PrimFunc(pointers, body).with_attr("tirx.noalias", True), temporaries


def _entry(network: Network, calls: _Calls) -> tuple[tirx.PrimFunc, int]:
    """The function that calls the others one after the other, and the bytes of its arena."""
    names = [f"input{i}" for i in range(len(network.inputs))]
    names += [f"output{i}" for i in range(len(network.outputs))]
    pointers = {n: tirx.Var(n, _POINTER) for n in (*names, "arena", "constants")}
    offsets, arena = calls.arena()
    areas = {
        name: tirx.decl_buffer((max(size, 1),), "uint8", name=f"{name}_bytes")
        for name, size in (("arena", arena), ("constants", len(calls.constants)))
    }

    def place(name: str) -> tvm.ir.Expr:
        if name in calls.offsets:
            return tirx.address_of(areas["constants"][calls.offsets[name]])
        if name in offsets:
            return tirx.address_of(areas["arena"][offsets[name]])
        if name in calls.results and name in calls.bytes:
            return pointers[f"output{calls.results.index(name)}"]
        return pointers[name]

    steps: list[tirx.Stmt] = [tirx.DeclBuffer(b, data=pointers[n]) for n, b in areas.items()]
    steps += [
        tirx.Evaluate(tirx.call_extern("void", c.symbol, *map(place, c.operands)))
        for c in calls.calls
    ]
    for i, (name, port) in enumerate(zip(calls.results, network.outputs, strict=True)):
        if name not in calls.bytes or calls.results.index(name) != i:
            copied = tirx.call_extern(
                "void", "memcpy", pointers[f"output{i}"], place(name), port.bytes
            )
            steps.append(tirx.Evaluate(copied))
    return tirx.PrimFunc(list(pointers.values()), tirx.SeqStmt(steps)), arena


def _build(functions: dict[str, tirx.PrimFunc], chip: tvm.target.Target) -> tvm.runtime.Module:
    """LLVM's object of functions on plain pointers: the usual passes but those that add TVM's calling convention."""
    t, s = tirx.transform, s_tir.transform
    passes = [
        t.BindTarget(chip),
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.CompactBufferAllocation(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        t.StorageRewrite(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        t.LowerTVMBuiltin(),
        t.LowerIntrin(),
    ]
    named = {k: f.with_attr("global_symbol", k) for k, f in functions.items()}
    module = tvm.transform.Sequential(passes)(tvm.IRModule(named))
    return tvm.get_global_func("target.build.llvm")(module, chip)


def _ctype(port: Port) -> str:
    return f"{port.dtype}_t"


def _header(network: Network, arena: int, constants: int) -> str:
    guard = f"{network.name.upper()}_H"
    inputs = [f"const {_ctype(p)} *input{i}" for i, p in enumerate(network.inputs)]
    outputs = [f"{_ctype(p)} *output{i}" for i, p in enumerate(network.outputs)]
    said = "".join(
        f" * {kind}{i}: {p.dtype} [{' x '.join(map(str, p.shape))}]\n"
        for kind, ports in (("input", network.inputs), ("output", network.outputs))
        for i, p in enumerate(ports)
    )
    parameters = ",\n    ".join([*inputs, *outputs, "void *arena", "const void *constants"])
    macro = network.name.upper()
    return (
        f"#ifndef {guard}\n#define {guard}\n\n#include <stdint.h>\n\n"
        f"/* What every pointer is aligned to. */\n"
        f"#define {macro}_ALIGN {ALIGN}\n"
        f"#define {macro}_ARENA_BYTES {max(arena, 1)}\n"
        f"#define {macro}_CONSTANT_BYTES {constants}\n\n"
        f"/* What {network.name}_constants.S puts into a program. */\n"
        f"extern const unsigned char {network.name}_constants[];\n\n"
        f"/*\n{said} */\n"
        f"void {network.name}_run(\n    {parameters});\n\n#endif\n"
    )


def _assembly(name: str) -> str:
    return (
        f"    .section .rodata\n    .balign {ALIGN}\n    .global {name}_constants\n{name}_constants:\n"
        f'    .incbin "{name}_constants.bin"\n    .section .note.GNU-stack,"",%progbits\n'
    )
