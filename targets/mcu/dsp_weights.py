"""How the weights of a sum lie in flash: four or eight in a word, in the order in which registers unpack them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.ir import ops

from ..c.kernel import Step, constant
from .dsp_rescale import HEADER, HERE

NIBBLE_HEADER = HERE / "dsp_nibbles.h"
"""The micro-kernels for weights of at most four bits."""

BLOCK = 4
"""Depths that the activations are widened and interleaved by."""


@dataclass(frozen=True)
class Packing:
    """One way to pack, and the micro-kernels that unpack it."""

    prefix: str
    headers: tuple[Path, ...]
    bits: tuple[int, int]
    per_word: int

    def suits(self, step: Step) -> bool:
        """Are the weights as wide as these micro-kernels want them?"""
        low, high = self.bits
        return low <= step.node.inputs[1].type.dtype.bits <= high

    def words(self, step: Step) -> int:
        """Words of weights in one channel."""
        return -(-depth(step) // self.per_word)

    def patch_words(self, step: Step) -> int:
        """Words of widened activations that are read for one pixel."""
        return self.words(step) * self.per_word // 2

    def pack(self, step: Step) -> NDArray[np.int32]:
        """The words of each channel."""
        weights = constant(step.node, 1)
        rows = weights.reshape(len(weights), -1).astype(np.int8)
        rows = np.pad(rows, ((0, 0), (0, BLOCK * blocks_of(step) - rows.shape[1])))
        if self.per_word == BLOCK:
            return np.ascontiguousarray(rows).view("<i4").astype(np.int32)
        nibbles = (rows + 8).astype(np.uint32)
        # what fills the last word is no weight: its activations are not there
        nibbles = np.pad(nibbles, ((0, 0), (0, 8 * self.words(step) - nibbles.shape[1])))
        ordered = nibbles.reshape(len(rows), -1, 8)[:, :, (0, 1, 4, 5, 2, 3, 6, 7)]
        shifted = ordered << np.arange(0, 32, 4, dtype=np.uint32)
        packed: NDArray[np.int32] = np.bitwise_or.reduce(shifted, axis=2).view(np.int32)
        return packed

    def sums_of_five(self, step: Step) -> int:
        """Instructions that sum up all channels at five pixels."""
        words, outputs = self.words(step), step.output.type.shape[-1]
        rounds = -(-words * self.per_word // 32)
        if self.per_word == BLOCK:
            return outputs * (7 + 15 * words + 3 * rounds)
        return 22 + 14 * blocks_of(step) + outputs * (10 + 32 * words + 3 * rounds)

    def sums_of_one(self, step: Step, at_once: int) -> int:
        """Instructions that sum up all channels at one pixel, `at_once` in a call."""
        words, outputs = self.words(step), step.output.type.shape[-1]
        groups, calls = -(-outputs // 4), -(-outputs // at_once)
        rounds = -(-words * self.per_word // 16)
        if self.per_word == BLOCK:
            return 22 * calls + groups * (13 + 18 * words + 2 * rounds)
        return calls * (32 + 5 * blocks_of(step)) + groups * (13 + 35 * words + 3 * rounds)


BYTES = Packing("dsp", (HEADER,), (5, 8), 4)
NIBBLES = Packing("dsp_nibble", (HEADER, NIBBLE_HEADER), (2, 4), 8)


def multiplies(step: Step) -> bool:
    """A dense Conv or a MatMul whose activations fit int16."""
    op = step.node.op
    if not (isinstance(op, ops.MatMul) or (isinstance(op, ops.Conv) and op.groups == 1)):
        return False
    kind = step.node.inputs[0].type.dtype
    return kind.bits <= (16 if kind.signed else 8)


def depth(step: Step) -> int:
    """Products in one sum."""
    return math.prod(step.node.inputs[1].type.shape[1:])


def blocks_of(step: Step) -> int:
    """Blocks of activations of one pixel."""
    return -(-depth(step) // BLOCK)
