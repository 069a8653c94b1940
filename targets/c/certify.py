"""The no-float certificate: what an object file's instructions and symbols say about floating point.

Arithmetic, comparison and conversion of floating-point numbers are findings, and so is every byte that does not
decode. Moving bits through the registers that also hold floats is not: compilers copy and clear integers that way.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import capstone
from elftools.common.exceptions import ELFError
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from qcompile.errors import QcompileError
from qcompile.target import FloatCertificate

# SSE and AVX say at the end of the mnemonic what they calculate in: packed or scalar, double, single, half, bfloat16.
_X86_FLOAT_SUFFIX = re.compile(r"(p|s)[sdh]$|bf16$|bf8s?$|hf8s?$")
# These move, select or combine bits, whatever they are said to hold. After its v, an integer instruction begins with p,
# and so do AVX's float permutations, which move as well; 3DNow! (pf..., pi2f...) is the exception.
_X86_MOVES = re.compile(
    r"mov|and|or|xor|unpck|shuf|blend|broadcast|insert|extract|gather|scatter|compress|expand"
    r"|p(?!f|i2f|mulhrw$|swapd$)|maskmov"
)
# Conversions, and the whole of x87.
_X86_ALWAYS = re.compile(r"cvt|f")
_X86_VECTOR = re.compile(r"\b[xyz]?mm\d")

# AArch64 begins every floating-point mnemonic with f, bfloat16's with bf; bf also begins the integer bit-field moves.
_A64_FLOAT = re.compile(r"f|[su]cvtf|bf(cvt|dot|mmla|mlal|ml[as]|add|sub|mul|clamp|max|min|scale)")
_A64_MOVES = frozenset({"fmov", "fcsel", "fcpy", "fdup"})


def _x86_float(mnemonic: str, operands: str) -> bool:
    plain = mnemonic.split()[-1].removeprefix("v")
    if _X86_ALWAYS.match(plain):
        return True
    if not _X86_VECTOR.search(operands) or _X86_MOVES.match(plain):
        return False
    return _X86_FLOAT_SUFFIX.search(plain) is not None


def _a64_float(mnemonic: str, operands: str) -> bool:
    return mnemonic not in _A64_MOVES and _A64_FLOAT.match(mnemonic) is not None


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How to decode a machine's code and which of its instructions calculate in floating point."""

    arch: int
    mode: int
    floats: Callable[[str, str], bool]


_ARCHITECTURES = {
    "EM_X86_64": _Architecture(capstone.CS_ARCH_X86, capstone.CS_MODE_64, _x86_float),
    "EM_AARCH64": _Architecture(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM, _a64_float),
}

_SOFT_FLOAT = re.compile(
    # libgcc and compiler-rt: modes h, s, d, t, x, k and b name the number formats.
    r"__(?:add|sub|mul|div|neg|cmp|eq|ne|lt|le|gt|ge|unord|powi)[hsdtxkb]f[23]"
    r"|__fix(?:uns)?[hsdtxkb]f[sdt]i|__float(?:un|uns)?[sdt]i[hsdtxkb]f"
    r"|__(?:extend|trunc)[hsdtxkb]f[hsdtxkb]f2|__(?:mul|div)[hsdtxk]c3"
    r"|__(?:hexagon|qdsp)_\w*[sd]f\w*"
    r"|__aeabi_(?:[fd](?:add|r?sub|mul|div|neg|cmp\w+|2\w+)|c[fd]r?cmp\w+|u?[il]2[fd]|h2f\w*)"
    r"|__gnu_[fhd]2[fhd]_\w+"
)
_LIBM = re.compile(
    r"(?:a?(?:sin|cos|tan)h?|atan2|exp2?|expm1|log(?:10|1p|2|b)?|ilogb|pow|sqrt|cbrt|hypot|erfc?|[lt]gamma"
    r"|ceil|floor|trunc|round|rint|nearbyint|ll?r(?:ound|int)|fmod|remainder|remquo|copysign|nan|nextafter"
    r"|nexttoward|fdim|fmax|fmin|fabs|fma|frexp|ldexp|modf|scalbl?n)[fl]?"
)


def _soft_float(symbol: str) -> bool:
    return _SOFT_FLOAT.fullmatch(symbol) is not None or _LIBM.fullmatch(symbol) is not None


def _functions(elf: ELFFile, section: int) -> list[tuple[int, str]]:
    """Address and name of every function of a section, by address."""
    found = []
    for table in elf.iter_sections():
        if isinstance(table, SymbolTableSection):
            found += [
                (s["st_value"], s.name)
                for s in table.iter_symbols()
                if s["st_info"]["type"] == "STT_FUNC" and s["st_shndx"] == section
            ]
    return sorted(found)


def _symbols(elf: ELFFile, label: str) -> Iterator[str]:
    names = {
        s.name
        for table in elf.iter_sections()
        if isinstance(table, SymbolTableSection)
        for s in table.iter_symbols()
    }
    for name in sorted(names):
        if _soft_float(name):
            yield f"{label}: symbol {name} is a floating-point routine"


def inspect(data: bytes, label: str) -> FloatCertificate:
    """Say what one ELF file holds; `label` names it in the findings, which give the first of each kind per function."""
    try:
        elf = ELFFile(io.BytesIO(data))
    except ELFError as error:
        raise QcompileError(f"{label} is no ELF file, so it cannot be certified: {error}") from None
    machine = _ARCHITECTURES.get(elf["e_machine"])
    if machine is None:
        raise QcompileError(f"{label} is for {elf['e_machine']}, which cannot be certified yet")
    findings = list(_symbols(elf, label))
    count = 0
    decoder = capstone.Cs(machine.arch, machine.mode)
    for index, section in enumerate(elf.iter_sections()):
        if not section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR or section["sh_type"] == "SHT_NOBITS":
            continue
        code, base = section.data(), section["sh_addr"]
        functions = _functions(elf, index)
        at, where, seen = 0, section.name, set[tuple[str, str]]()
        for address, size, mnemonic, operands in decoder.disasm_lite(code, base):
            count += 1
            at = address - base + size
            while functions and functions[0][0] <= address:
                where = functions.pop(0)[1]
            if machine.floats(mnemonic, operands) and (where, mnemonic) not in seen:
                seen.add((where, mnemonic))
                findings.append(f"{label}: {where} has {mnemonic} {operands} at {address:#x}")
        if at < len(code):
            findings.append(f"{label}: {section.name} does not decode at {base + at:#x}")
    return FloatCertificate(count, tuple(findings))
