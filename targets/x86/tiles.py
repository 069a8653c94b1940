"""Which tiles of registers a matrix product can have, and the cycles of each by a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .isa import Isa

_WIDEST = 14
_LATENCY = 5.0
"""Cycles before a sum may be added to again."""
_BROADCAST = 0.5
"""Cycles of loading one word to all lanes, whatever their number."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What the registers hold at once: `rows` x `columns` output pixels by `vectors` of channels."""

    rows: int
    columns: int
    vectors: int

    @property
    def sums(self) -> int:
        """Registers of sums."""
        return self.rows * self.columns * self.vectors

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.vectors}"


def _cycles(isa: Isa, tile: Tile, steps: int, vectors: int) -> float:
    """What one tile takes, `vectors` of its channels being there."""
    pixels = tile.rows * tile.columns
    loads = vectors * isa.load_cost + pixels * _BROADCAST
    work = pixels * vectors * isa.dot_cost + (pixels + vectors) * isa.work
    inner = max(work, loads, _LATENCY * isa.dot_cost)
    return steps * (inner + 0.5) + pixels * vectors * isa.epilogue_cost + 12


def parts(total: int, size: int) -> list[tuple[int, int]]:
    """(how many, how large) of the whole parts and the rest."""
    return [p for p in ((total // size, size), (1, total % size)) if p[0] and p[1]]


@lru_cache(maxsize=4096)
def ranked(
    isa: Isa, height: int, width: int, outputs: int, steps: int
) -> tuple[tuple[Tile, float], ...]:
    """All tiles and the cycles of an image's channels with each by the model, the fastest first."""
    vectors = -(-outputs // isa.lanes)

    def cycles(tile: Tile) -> float:
        return sum(
            many_v * many_r * many_c * _cycles(isa, Tile(r, c, v), steps, v)
            for many_v, v in parts(vectors, tile.vectors)
            for many_r, r in parts(height, tile.rows)
            for many_c, c in parts(width, tile.columns)
        )

    found = [(tile, cycles(tile)) for tile in _tiles(isa, height, width, vectors)]
    return tuple(sorted(found, key=lambda f: (f[1], -f[0].sums)))


def _tiles(isa: Isa, height: int, width: int, vectors: int) -> Iterator[Tile]:
    for v in range(1, min(vectors, isa.sums // 2, 8) + 1):
        for columns in range(1, min(width, _WIDEST) + 1):
            most = min(height, _WIDEST // columns) if columns == width else 1
            for rows in range(1, most + 1):
                tile = Tile(rows, columns, v)
                if tile.sums + v * isa.held <= isa.sums:
                    yield tile
