"""Running built programs: rows in, rows out, and every stored value on the way."""

from __future__ import annotations

import ctypes
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from qcompile.calls import Bytes, Calls
from qcompile.errors import BadInput, VerificationMismatch
from qcompile.ir import Array, Graph, TensorType, Value
from qcompile.program import PROGRAM_FILE, Emitted, emitted
from qcompile.target import Codes, Counts, Piece, Way

from .build import Build, call, first_lines
from .count import count

_RUN_SECONDS = 900
_OUTPUTS_ID = 0xFFFFFFFF
_CALLS_PER_PROCESS = 64
_TRACED_CALLS_PER_PROCESS = 8
_ALL = 1 << 62


def _cut(data: Bytes, values: Sequence[Value]) -> list[Bytes]:
    """Cut [calls, bytes of all values] into one [calls, bytes] for each."""
    ends = np.cumsum([v.type.bytes for v in values])
    return np.split(data, ends[:-1], axis=1)


class Program:
    """The emitted program as a process of its own, natively or in an emulator.

    Where the build chooses among several, `choice` is the one that runs, and `others` run here too.
    """

    def __init__(
        self, build: Build, graph: Graph, choice: str = "", others: Sequence[str] = ()
    ) -> None:
        self.build = build
        self._choice, self._others = choice, others
        self._graph = graph
        self._calls = Calls(graph)
        self._prepare()

    def _prepare(self) -> None:
        """Build what `run` needs, so that a missing tool shows before the first row."""
        _ = self.build.program

    def _speak(self, program: Path, packed: Bytes) -> bytes:
        done = call(
            [*self.build.toolchain.emulator, str(program), *filter(None, [self._choice])],
            seconds=_RUN_SECONDS,
            stdin=packed.tobytes(),
            # Leaks are looked for with ptrace, which containers forbid; the program allocates nothing.
            environment={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        )
        if done.returncode == 0:
            return done.stdout
        if done.returncode < 0:
            how = f"died of {signal.Signals(-done.returncode).name}"
        else:
            how = f"stopped with exit status {done.returncode}"
        where = " ".join(self.build.toolchain.emulator)
        raise VerificationMismatch(
            f"the built program {self.build.name} {how}{f' in {where}' if where else ''}:\n"
            f"{first_lines(done.stderr)}"
        )

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        packed, rows = self._calls.pack(feeds)
        calls = np.concatenate(packed, axis=1)
        values = [v for _, v in self._graph.outputs]
        size = sum(v.type.bytes for v in values)
        parts = [np.empty((0, size), np.uint8)]
        for at in range(0, len(calls), _CALLS_PER_PROCESS):
            block = calls[at : at + _CALLS_PER_PROCESS]
            answer = self._speak(self.build.program, block)
            if len(answer) != len(block) * size:
                raise VerificationMismatch(
                    f"the built program {self.build.name} wrote {len(answer)} bytes instead of {len(block) * size}"
                )
            parts.append(np.frombuffer(answer, np.uint8).reshape(len(block), size))
        return self._outputs(_cut(np.concatenate(parts), values), rows)

    def _outputs(self, data: Sequence[Bytes], rows: int) -> dict[str, Array]:
        return {
            port.name: self._calls.unpack(value.type, part, rows)
            for (port, value), part in zip(self._graph.outputs, data, strict=True)
        }

    @cached_property
    def _emitted(self) -> Emitted:
        return emitted(self.build.folder / self._choice)

    def count(self, feeds: Codes) -> Counts:
        """What one call executes in the emulator, layer by layer; ToolchainMissing where it runs natively."""
        return count(self.build, self._graph, feeds, self._emitted.layers)

    def trace(self, feeds: Codes) -> dict[str, Array]:
        """Every stored value by name, and the outputs by port name unless a stored value has that name."""
        packed, rows = self._calls.pack(feeds)
        calls = np.concatenate(packed, axis=1)
        by_id = self._stored_types()
        outputs = [v for _, v in self._graph.outputs]
        sizes = {i: kind.bytes for i, (_, kind) in by_id.items()}
        sizes[_OUTPUTS_ID] = sum(v.type.bytes for v in outputs)
        frames: dict[int, list[Bytes]] = {
            i: [np.empty((0, size), np.uint8)] for i, size in sizes.items()
        }
        for at in range(0, len(calls), _TRACED_CALLS_PER_PROCESS):
            block = calls[at : at + _TRACED_CALLS_PER_PROCESS]
            answer = self._speak(self.build.traced, block)
            for i, payload in _frames(self.build.name, answer, sizes, len(block)):
                frames[i].append(np.frombuffer(payload, np.uint8).reshape(1, -1))
        joined = {i: np.concatenate(parts) for i, parts in frames.items()}
        ports = self._outputs(_cut(joined.pop(_OUTPUTS_ID), outputs), rows)
        values = {
            name: self._calls.unpack(kind, joined[i], rows) for i, (name, kind) in by_id.items()
        }
        return {**ports, **values}

    @cached_property
    def pieces(self) -> Mapping[str, Piece]:
        """Stored values that are rows of a value of the graph, by their own names."""
        return self._emitted.pieces

    @property
    def ways(self) -> Sequence[Way]:
        """The same program with another of its choices; none where it makes no choice."""
        return [Way(other, _ALL, self._other(other)) for other in self._others]

    def _other(self, choice: str) -> Callable[[Codes], tuple[dict[str, Array], str]]:
        program = Program(self.build, self._graph, choice)
        return lambda feeds: (program.run(feeds), "")

    def _stored_types(self) -> dict[int, tuple[str, TensorType]]:
        """Name and type of every stored value by its trace id; BadInput where one is none of the graph's."""
        kinds = {v.name: v.type for v in self._graph.values()}
        said = self.build.folder / self._choice / PROGRAM_FILE
        for name, piece in self.pieces.items():
            whole = kinds.get(piece.value)
            if (
                whole is None
                or len(whole.shape) < 2
                or not 0 <= piece.first < piece.last <= whole.shape[1]
            ):
                raise BadInput(
                    f"{said} says that {name} is rows {piece.first} to {piece.last} of"
                    f" {piece.value}, which has none such: the folder was changed"
                )
            if name not in kinds:
                lead, _, *rest = whole.shape
                kinds[name] = TensorType(whole.dtype, (lead, piece.last - piece.first, *rest))
        ids = self._emitted.values
        strange = next((name for name in ids if name not in kinds), None)
        if strange is not None:
            raise BadInput(f"{said} names a value {strange} that the graph has not")
        return {i: (name, kinds[name]) for name, i in ids.items()}


def _frames(
    name: str, answer: bytes, sizes: Mapping[int, int], calls: int
) -> list[tuple[int, bytes]]:
    """Cut a trace into frames; every value must come once for every call."""
    frames: list[tuple[int, bytes]] = []
    at = 0
    while at + 8 <= len(answer):
        i, size = struct.unpack_from("<II", answer, at)
        if sizes.get(i) != size:
            raise VerificationMismatch(
                f"the trace of {name} has {size} bytes for value {i}, which takes {sizes.get(i, 'none')}"
            )
        frames.append((i, answer[at + 8 : at + 8 + size]))
        at += 8 + size
    seen = sorted(i for i, _ in frames)
    if at != len(answer) or seen != sorted([*sizes] * calls):
        raise VerificationMismatch(
            f"the trace of {name} does not hold every stored value once: {len(frames)} frames "
            f"instead of {len(sizes) * calls}"
        )
    return frames


class Library(Program):
    """The emitted program inside this process; only a trace runs as a process of its own."""

    def _prepare(self) -> None:
        library = ctypes.CDLL(str(self.build.library))
        self._entry = library[f"{self.build.name}_run"]
        self._entry.restype = ctypes.c_int

    def run(self, feeds: Codes) -> dict[str, Array]:
        """Codes in, codes out, for any number of rows."""
        packed, rows = self._calls.pack(feeds)
        calls = len(packed[0])
        results = [np.empty((calls, v.type.bytes), np.uint8) for _, v in self._graph.outputs]
        align = self.build.number("ARENA_ALIGN")
        # A kernel that reads what nobody wrote meets these bytes, not lucky zeros.
        memory = np.full(self.build.number("ARENA_BYTES") + align, 0xA5, np.uint8)
        arena = ctypes.c_void_p(memory.ctypes.data + -memory.ctypes.data % align)
        arrays = [*packed, *results]
        starts = [a.ctypes.data for a in arrays]
        steps = [a.shape[1] for a in arrays]
        for i in range(calls):
            places = (ctypes.c_void_p(a + i * s) for a, s in zip(starts, steps, strict=True))
            if (status := self._entry(*places, arena)) != 0:
                raise VerificationMismatch(f"{self.build.name}_run returned {status}")
        return self._outputs(results, rows)
