"""What an emitted C program says of itself, for whoever runs, traces or times it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from qcompile.errors import BadInput
from qcompile.target import Layer, Piece

PROGRAM_FILE = "program.json"
"""Says under which id a trace build reports each value, which layers there are, and what each stores."""


class Emitted(msgspec.Struct, forbid_unknown_fields=True):
    """What the emitter says of its program: trace ids of values, which one each layer stores, rows, layers in order."""

    values: dict[str, int]
    stores: list[int]
    pieces: dict[str, Piece]
    layers: list[Layer]


def emitted(folder: Path) -> Emitted:
    """What the emitter said of the program in a folder; BadInput where it cannot be read or was changed."""
    place = folder / PROGRAM_FILE
    try:
        found = msgspec.json.decode(place.read_bytes(), type=Emitted)
    except (OSError, msgspec.DecodeError, RecursionError) as e:
        raise BadInput(f"cannot read {place}: {e}") from None
    numbers = [n for layer in found.layers for n in (layer.macs, layer.scratch_bytes, layer.cost)]
    ids = list(found.values.values())
    known = set(ids) >= set(found.stores) and len(found.stores) == len(found.layers)
    if len(set(ids)) < len(ids) or min([*ids, *numbers], default=0) < 0 or not known:
        raise BadInput(f"{place} is not what qcompile wrote: the folder was changed")
    return found
