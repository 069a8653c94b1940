"""What was measured of layers on a machine: the fastest tile of each, kept in a file from which it is taken again."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from qcompile.errors import BadInput
from qcompile.ir import Graph
from qcompile.target import Placement, Tunable

CACHE = "cache"
"""What stands for the file of this machine in the user's cache folder."""

_MOST_BYTES = 1 << 24


class Tuning(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The tile of each layer by its signature, and the processor and compiler with which it was measured."""

    machine: str
    tiles: dict[str, str]

    def dump(self) -> bytes:
        """The content of a file."""
        ordered = Tuning(self.machine, dict(sorted(self.tiles.items())))
        return msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n"


def tuned(
    target: Tunable, graph: Graph, *, cpu: str, placement: Placement, place: str | os.PathLike[str]
) -> tuple[Tuning, int]:
    """The tiles of a graph's layers, and how many of them were measured now; those are added to the file at `place`.

    What the file knows is taken as it is, wherever it was measured: the same file gives the same program everywhere.
    """
    machine = target.machine()
    file = _cached(machine) if os.fspath(place) == CACHE else Path(place)
    before = _read(file) or Tuning(machine, {})
    tiles = target.tune(graph, cpu=cpu, placement=placement, known=before.tiles)
    new = tiles.keys() - before.tiles.keys()
    if new and before.machine != machine:
        raise BadInput(
            f"{file} was measured on {before.machine}, and lacks {len(new)} layers of this model that cannot be added"
            f" on {machine}: take another file"
        )
    if new:
        _write(file, Tuning(machine, before.tiles | tiles))
    return Tuning(before.machine, tiles), len(new)


def _cached(machine: str) -> Path:
    """The machine's file in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(
        root, "qcompile", f"tuning-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
    )


def _read(file: Path) -> Tuning | None:
    """What a file says; None where there is none."""
    try:
        with file.open("rb") as f:
            content = f.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise BadInput(f"the tuning {file} has more than {_MOST_BYTES:,} bytes")
        return msgspec.json.decode(content, type=Tuning)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, RecursionError) as e:
        raise BadInput(f"cannot read the tuning {file}: {e}") from None


def _write(file: Path, content: Tuning) -> None:
    """Put a file in its place at once, so that no other process sees half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(content.dump())
        os.replace(scratch, file)
    except OSError as e:
        raise BadInput(f"cannot write the tuning {file}: {e}") from e
