"""A copy of a convolution's operand between its borders, so that no tap has to be looked for."""

from __future__ import annotations

from dataclasses import dataclass

from ..c.text import affine, at
from ..c.window import Window

VECTOR = 16


@dataclass(frozen=True)
class Image:
    """Rows of `columns` pixels; a reader may go on for a vector behind the last."""

    window: Window
    columns: int

    @staticmethod
    def of(window: Window) -> Image:
        """What all windows together span."""
        x = window.x
        return Image(window, (x.out - 1) * x.stride + (x.kernel - 1) * x.dilation + 1)

    @property
    def rows(self) -> int:
        """Of one image of the batch."""
        y = self.window.y
        return (y.out - 1) * y.stride + (y.kernel - 1) * y.dilation + 1

    @property
    def pitch(self) -> int:
        """Bytes of a row."""
        return self.columns * self.window.channels

    @property
    def left(self) -> int:
        """Bytes of border before each row."""
        return min(self.window.x.pad, self.columns) * self.window.channels

    @property
    def top(self) -> int:
        """Rows of border above."""
        return min(self.window.y.pad, self.rows)

    @property
    def row(self) -> int:
        """Bytes copied from a row of the operand."""
        return max(0, min(self.window.x.size * self.window.channels, self.pitch - self.left))

    @property
    def copied(self) -> int:
        """Rows copied."""
        return max(0, min(self.window.y.size, self.rows - self.top))

    @property
    def bottom(self) -> int:
        """Rows of border below."""
        return self.rows - self.top - self.copied

    @property
    def bytes(self) -> int:
        """The image, the left border that follows its last row, and what a reader needs."""
        return self.rows * self.pitch + self.left + VECTOR

    @property
    def cost(self) -> int:
        """Instructions of the copy: four for 64 bytes, and those around."""
        return self.rows * (self.pitch // 16 + 24) * self.window.batch

    def source(self, x: str) -> str:
        """C of the first row of one image of the batch."""
        w = self.window
        n = "n" if w.batch > 1 else "0"
        return at(x, affine([(n, w.y.size * w.x.size * w.channels)]))

    @property
    def given(self) -> str:
        """Arguments that say what is copied: rows, their bytes and pitch."""
        return f"{self.copied}, {self.row}, {self.window.x.size * self.window.channels}"

    def copy(self, x: str, pad_value: int) -> str:
        """C that makes it."""
        after = max(0, self.bottom * self.pitch - self.left)
        return (
            f"neon_frame(image, {self.source(x)}, {self.given}, {self.top * self.pitch + self.left},"
            f" {self.pitch - self.row}, {after}, {pad_value});"
        )
