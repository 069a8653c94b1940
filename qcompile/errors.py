"""What can go wrong, one class per documented exit code.

Every message is one sentence or two for a person: what, where (node name), why, what to do.
"""

from __future__ import annotations

from typing import ClassVar


class QcompileError(Exception):
    """A failure the user is told about in a sentence; exit code 1 unless a subclass says otherwise."""

    exit_code: ClassVar[int] = 1


class BadInput(QcompileError):
    """The model, the data, a file or an option is not usable: exit code 2."""

    exit_code = 2


class Unsupported(QcompileError):
    """The model needs something that has no integer form here: exit code 3."""

    exit_code = 3


class AccuracyGate(QcompileError):
    """The compiled program is further from the float model than was allowed: exit code 4."""

    exit_code = 4


class VerificationMismatch(QcompileError):
    """An emitted program differs from the integer graph: exit code 5."""

    exit_code = 5


class ToolchainMissing(QcompileError):
    """A compiler or an emulator is not installed: exit code 6."""

    exit_code = 6


class BudgetExceeded(QcompileError):
    """The program does not fit the stated memory, or a design its part or rate: exit code 7."""

    exit_code = 7
