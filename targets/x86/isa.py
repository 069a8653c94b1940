"""What the x86 kernels know of a vector instruction set: its lanes, its registers, the header that speaks it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
_ROWS = HERE / "vectors_rows.h"


@dataclass(frozen=True, slots=True)
class Isa:
    """A vector instruction set; `lanes` are int32 numbers in a register, costs are cycles of one instruction.

    `spare` registers of all hold the operands of a product, `held` a vector of weights, the others sums; `work` is what
    preparing an operand takes of the time of products. `headers` are included in their order. `small` is the same
    with a product for weights of which two neighbours, by any activations, stay in 16 bits. `needs` are the words of
    /proc/cpuinfo for what the compiler may use by `flags`, or by `zig` where it is zig. Where `words`, DOT_AT takes
    weights as int16.
    """

    name: str
    lanes: int
    registers: int
    spare: int
    held: int
    dot_cost: float
    load_cost: float
    epilogue_cost: float
    headers: tuple[Path, ...]
    flags: tuple[str, ...]
    zig: str
    needs: frozenset[str]
    work: float = 0.0
    dot: str = "DOT"
    small: Isa | None = None
    words: bool = False

    @property
    def sums(self) -> int:
        """Registers that may hold sums."""
        return self.registers - self.spare


# What -march=x86-64-v3 and -v4 let a compiler use, as /proc/cpuinfo calls it (x86-64 psABI, 3.1.1).
_V3 = frozenset(
    "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe".split()
)
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

AVX512_VNNI = Isa(
    name="avx512vnni",
    lanes=16,
    registers=32,
    spare=1,
    held=1,
    dot_cost=1.0,
    load_cost=1.0,
    epilogue_cost=5.0,
    headers=(_ROWS, HERE / "vectors_avx512vnni.h"),
    flags=("-march=x86-64-v4", "-mavx512vnni"),
    zig="-mcpu=x86_64_v4+avx512vnni",
    needs=_V4 | {"avx512_vnni"},
)
AVX_VNNI = Isa(
    name="avxvnni",
    lanes=8,
    registers=16,
    spare=1,
    held=1,
    dot_cost=0.5,
    load_cost=0.5,
    epilogue_cost=3.0,
    headers=(_ROWS, HERE / "vectors_ymm.h", HERE / "vectors_avxvnni.h"),
    flags=("-march=x86-64-v3", "-mavxvnni"),
    zig="-mcpu=x86_64_v3+avxvnni",
    needs=_V3 | {"avx_vnni"},
)
_AVX2_SMALL = Isa(
    name="avx2",
    lanes=8,
    registers=16,
    spare=3,
    held=1,
    dot_cost=0.75,
    load_cost=0.5,
    epilogue_cost=3.0,
    headers=(_ROWS, HERE / "vectors_ymm.h", HERE / "vectors_avx2.h"),
    flags=("-march=x86-64-v3",),
    zig="-mcpu=x86_64_v3",
    needs=_V3,
    work=0.25,
    dot="DOT_SMALL",
)
AVX2 = replace(
    _AVX2_SMALL, held=2, dot_cost=1.0, work=0.75, dot="DOT", small=_AVX2_SMALL, words=True
)

ISAS: Mapping[str, Isa] = {isa.name: isa for isa in (AVX512_VNNI, AVX_VNNI, AVX2)}
"""By the name that `--cpu` takes, the fastest first."""


def features() -> frozenset[str]:
    """What this machine's processor has, in the words of /proc/cpuinfo; nothing where there is none."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    return frozenset(_said().get("flags", "").split())


def processor() -> str:
    """Which processor this machine has."""
    said = _said()
    numbers = [f"{key} {said[key]}" for key in ("cpu family", "model", "stepping") if key in said]
    return ", ".join([said.get("model name", platform.machine()), *numbers])


def _said() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    rows = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in rows}


def native() -> Isa | None:
    """The fastest of them that this machine has; None where it has none, or cannot say."""
    has = features()
    return next((isa for isa in ISAS.values() if isa.needs <= has), None)
