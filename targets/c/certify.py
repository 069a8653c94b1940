"""The no-float certificate: what an object file's instructions and symbols say about floating point.

Arithmetic, comparison and conversion of floating-point numbers are findings, and so is every byte that does not
decode. Moving bits through the registers that also hold floats is not: compilers copy and clear integers that way.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module

import capstone
from elftools.common.exceptions import ELFError
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from qcompile.errors import QcompileError
from qcompile.target import FloatCertificate


@dataclass(frozen=True, slots=True)
class Instruction:
    """A decoded instruction or packet: `floats` if it calculates, compares or converts in floating point."""

    address: int
    size: int
    text: str
    floats: bool


Decoder = Callable[[bytes, int], Iterator[Instruction]]
"""Decodes code that lies at an address; it ends early where bytes are no instruction."""

# SSE and AVX say at the end of the mnemonic what they calculate in: packed or scalar, double, single, half, bfloat16.
_X86_FLOAT_SUFFIX = re.compile(r"(p|s)[sdh]$|bf16$|bf8s?$|hf8s?$")
# These move, select, combine or test bits, whatever they are said to hold. After its v, an integer instruction begins
# with p, and so do AVX's float permutations, which move as well; 3DNow! (pf..., pi2f...) is the exception.
_X86_MOVES = re.compile(
    r"mov|and|or|xor|test|unpck|shuf|blend|broadcast|insert|extract|gather|scatter|compress|expand"
    r"|p(?!f|i2f|mulhrw$|swapd$)|maskmov"
)
# Conversions, and the whole of x87.
_X86_ALWAYS = re.compile(r"cvt|f")
_X86_VECTOR = re.compile(r"\b[xyz]?mm\d")

# AArch64 begins every floating-point mnemonic with f, bfloat16's with bf; bf also begins the integer bit-field moves.
_A64_FLOAT = re.compile(r"f|[su]cvtf|bf(cvt|dot|mmla|mlal|ml[as]|add|sub|mul|clamp|max|min|scale)")
_A64_MOVES = frozenset({"fmov", "fcsel", "fcpy", "fdup"})


_UNKNOWN = "unknown"
_AVX_VNNI = ("vpdpbusd", "vpdpbusds", "vpdpwssd", "vpdpwssds")


def _avx_vnni(code: bytes, at: int) -> tuple[str, int]:
    """Name and size of an integer instruction that capstone does not know; a size of 0 where there is none.

    AVX-VNNI's four are VEX.66.0F38.W0 50 to 53, a register or memory operand following (Intel SDM volume 2, VPDPBUSD).
    """
    prefix, kind, width, opcode, modrm = code[at : at + 5].ljust(5, b"\0")
    if prefix != 0xC4 or kind & 0x1F != 2 or width & 0x83 != 1 or not 0x50 <= opcode <= 0x53:
        return "", 0
    mode, base, size = modrm >> 6, modrm & 7, 5
    if mode < 3 and base == 4:
        base = code[at + size] & 7 if at + size < len(code) else 0
        size += 1
    size += {0: 4 if base == 5 else 0, 1: 1, 2: 4}.get(mode, 0)
    return _AVX_VNNI[opcode - 0x50], size if at + size <= len(code) else 0


def _x86(code: bytes, base: int) -> Iterator[Instruction]:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.skipdata_setup = (_UNKNOWN, lambda _, size, at, more: _avx_vnni(code, at)[1], None)
    decoder.skipdata = True
    for address, size, mnemonic, operands in decoder.disasm_lite(code, base):
        if mnemonic == _UNKNOWN:
            yield Instruction(address, size, _avx_vnni(code, address - base)[0], False)
        else:
            yield Instruction(
                address, size, f"{mnemonic} {operands}", _x86_float(mnemonic, operands)
            )


def _x86_float(mnemonic: str, operands: str) -> bool:
    plain = mnemonic.split()[-1].removeprefix("v")
    if _X86_ALWAYS.match(plain):
        return True
    if not _X86_VECTOR.search(operands) or _X86_MOVES.match(plain):
        return False
    return _X86_FLOAT_SUFFIX.search(plain) is not None


def _a64_float(mnemonic: str, operands: str) -> bool:
    return mnemonic not in _A64_MOVES and _A64_FLOAT.match(mnemonic) is not None


# VFP, NEON and Helium name the number format; what moves or selects whole registers names it too.
_ARM_FLOAT = re.compile(
    r"v(?!mov|ins|sel|dup|ldr|str)\w+(?:\.\w+)?\.(?:f(?:16|32|64)|bf16)", re.IGNORECASE
)


def _arm_float(mnemonic: str) -> bool:
    return _ARM_FLOAT.match(mnemonic) is not None


# Helium's instructions outside the encodings that it shares with NEON lie where other cores have coprocessors 14 and 15
# (Armv8-M Architecture Reference Manual, C2.3.7: first halfword 111x 111x, bits 11 to 9 of the second 111). Integers of
# 8, 16 and 32 bits have sizes 00, 01 and 10 there; size 11 of the same instruction is the floating-point one, whose
# bit 28 tells single from half precision. Each row: mask and value of both halfwords.
_HELIUM_FLOAT = (
    (0xEFB1, 0xEE30, 0x0F70, 0x0F40),  # VADD, VSUB with a scalar
    (0xEFB1, 0xEE31, 0x1F70, 0x0E60),  # VMUL with a scalar
    (0xEFB1, 0xEE31, 0x0F70, 0x0E40),  # VFMA, VFMAS with a scalar
    (0xEFB1, 0xEE30, 0x0F50, 0x0E00),  # VCMUL
    (0xEFBF, 0xEE3F, 0x0F51, 0x0E01),  # VCVTB, VCVTT; VMAXNMA, VMINNMA
    (0xEFFD, 0xEEEC, 0x0F51, 0x0F00),  # VMAXNMV, VMINNMV, VMAXNMAV, VMINNMAV
)
_HELIUM_COMPARE = (0xEFB1, 0xEE31, 0x0F10, 0x0F00)  # VCMP, VPT; and VPSEL, VPNOT, VPST in the gaps


def _helium_float(first: int, second: int) -> bool:
    """Whether an instruction of Helium's own encodings calculates in floating point."""

    def has(row: tuple[int, int, int, int]) -> bool:
        return first & row[0] == row[1] and second & row[2] == row[3]

    if has(_HELIUM_COMPARE):
        # Condition 01x is an unsigned comparison, which floats lack: VPSEL. A scalar 13 is VPNOT or VPST.
        with_scalar = second & 0x40 != 0
        unsigned = not second & 0x1000 and bool(second & (0x20 if with_scalar else 0x01))
        return not unsigned and not (with_scalar and second & 0xF == 0xD)
    return any(map(has, _HELIUM_FLOAT))


def _armv8_1m(first: int, second: int) -> str:
    """What an instruction that capstone does not know is, if Armv8.1-M has it; nothing otherwise."""
    if first & 0xEC00 == 0xEC00 and first & 0xFF00 not in (0xEF00, 0xFF00):
        if second & 0x0E00 == 0x0E00:
            return "vector instruction"
        if first & 0xFFE0 == 0xEEE0 and second & 0x0FFF == 0x0A10:
            return "vmrs or vmsr"
    if first & 0xF800 == 0xF000 and second & 0xD001 == 0xC001:
        return "low-overhead loop instruction"
    return ""


def _thumb(code: bytes, base: int) -> Iterator[Instruction]:
    decoder = capstone.Cs(
        capstone.CS_ARCH_ARM,
        capstone.CS_MODE_THUMB | capstone.CS_MODE_MCLASS | capstone.CS_MODE_V8,
    )
    at = 0
    while at < len(code):
        for address, size, mnemonic, operands in decoder.disasm_lite(code[at:], base + at):
            at = address - base + size
            first, second = _halfwords(code, at - 4) if size == 4 else (0, 0)
            floats = _arm_float(mnemonic) or _helium_float(first, second)
            yield Instruction(address, size, f"{mnemonic} {operands}", floats)
        if at + 4 > len(code):
            return
        first, second = _halfwords(code, at)
        if not (kind := _armv8_1m(first, second)):
            return
        text = f"{kind} {first:04x} {second:04x}"
        yield Instruction(base + at, 4, text, _helium_float(first, second))
        at += 4


def _halfwords(code: bytes, at: int) -> tuple[int, int]:
    return int.from_bytes(code[at : at + 2], "little"), int.from_bytes(
        code[at + 2 : at + 4], "little"
    )


def _by_capstone(arch: int, mode: int, floats: Callable[[str, str], bool]) -> Decoder:
    def decode(code: bytes, base: int) -> Iterator[Instruction]:
        for address, size, mnemonic, operands in capstone.Cs(arch, mode).disasm_lite(code, base):
            yield Instruction(address, size, f"{mnemonic} {operands}", floats(mnemonic, operands))

    return decode


_DECODERS: Mapping[str, Decoder] = {
    "EM_X86_64": _x86,
    "EM_AARCH64": _by_capstone(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM, _a64_float),
    "EM_ARM": _thumb,
}
_FAMILY_DECODERS: Mapping[str, str] = {"EM_QDSP6": "qcompile.targets.hexagon.decode"}
"""Modules of families that decode their own machine's code: each has a Decoder `instructions`."""


def decoder(machine: str, label: str) -> Decoder:
    """The decoder of an ELF machine; `label` names the file where there is none."""
    if machine in _FAMILY_DECODERS:
        family: Decoder = import_module(_FAMILY_DECODERS[machine]).instructions
        return family
    if machine not in _DECODERS:
        raise QcompileError(f"{label} is for {machine}, which cannot be certified yet")
    return _DECODERS[machine]


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


# What lies at a mapping symbol: Arm or Thumb or AArch64 code, or data.
_MAPPING = re.compile(r"\$[atdx](?:\..*)?")


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
    odd = 1 if elf["e_machine"] == "EM_ARM" else 0
    return sorted((at & ~odd, name) for at, name in found)


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


def code_ranges(elf: ELFFile, index: int) -> list[tuple[int, int]]:
    """Begin and end, within a section, of what its mapping symbols call code: Arm keeps constants between functions."""
    size = elf.get_section(index)["sh_size"]
    base = elf.get_section(index)["sh_addr"]
    marks = sorted(
        (s["st_value"] - base, s.name[1] != "d")
        for table in elf.iter_sections()
        if isinstance(table, SymbolTableSection)
        for s in table.iter_symbols()
        if s["st_shndx"] == index and _MAPPING.fullmatch(s.name)
    )
    if elf["e_machine"] not in ("EM_ARM", "EM_AARCH64") or not marks:
        return [(0, size)]
    if marks[0][0] > 0:
        marks.insert(0, (0, True))
    ends = [at for at, _ in marks[1:]] + [size]
    return [(at, end) for (at, code), end in zip(marks, ends, strict=True) if code and at < end]


def inspect(data: bytes, label: str) -> FloatCertificate:
    """Say what one ELF file holds; `label` names it in the findings, which give the first of each kind per function."""
    try:
        elf = ELFFile(io.BytesIO(data))
    except ELFError as error:
        raise QcompileError(f"{label} is no ELF file, so it cannot be certified: {error}") from None
    decode = decoder(elf["e_machine"], label)
    findings = list(_symbols(elf, label))
    count = 0
    for index, section in enumerate(elf.iter_sections()):
        if not section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR or section["sh_type"] == "SHT_NOBITS":
            continue
        code, base = section.data(), section["sh_addr"]
        functions = _functions(elf, index)
        where, seen = section.name, set[tuple[str, str]]()
        for begin, end in code_ranges(elf, index):
            at = begin
            for instruction in decode(code[begin:end], base + begin):
                count += 1
                at = instruction.address - base + instruction.size
                while functions and functions[0][0] <= instruction.address:
                    where = functions.pop(0)[1]
                kind = instruction.text.split()[0]
                if instruction.floats and (where, kind) not in seen:
                    seen.add((where, kind))
                    findings.append(
                        f"{label}: {where} has {instruction.text} at {instruction.address:#x}"
                    )
            if at < end:
                findings.append(f"{label}: {section.name} does not decode at {base + at:#x}")
    return FloatCertificate(count, tuple(findings))
