"""The no-float certificate is green on integer code and red on every kind of floating point, per architecture."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile.errors import QcompileError
from qcompile.target import FloatCertificate
from qcompile.targets.c.certify import inspect

ZIG = (sys.executable, "-m", "ziglang", "cc")
COMPILERS = {
    "x86": ("gcc", "-O2"),
    "x86-avx512": (*ZIG, "-target", "x86_64-linux-gnu", "-mcpu=x86_64_v4+avx512vnni", "-O3"),
    "arm": (*ZIG, "-target", "aarch64-linux-musl", "-mcpu=generic+dotprod", "-O3"),
}


def inspected(folder: Path, text: str, compiler: str, suffix: str = ".c") -> FloatCertificate:
    source = folder / f"x{suffix}"
    source.write_text(text)
    made = folder / "x.o"
    command = [*COMPILERS[compiler], "-c", str(source), "-o", str(made)]
    subprocess.run(command, check=True, timeout=60)
    return inspect(made.read_bytes(), "x.o")


INTEGER = """
#include <stdint.h>
#include <string.h>
int32_t dot(const int8_t *restrict a, const int8_t *restrict b)
{
    int32_t sum = 0;
    for (int i = 0; i < 256; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}
void rescale(const int32_t *restrict x, int8_t *restrict y, int32_t m)
{
    for (int i = 0; i < 256; i++) {
        int32_t t = (int32_t)(((int64_t)x[i] * m) >> 32);
        t = (t + 64) >> 7;
        y[i] = (int8_t)(t < -128 ? -128 : t > 127 ? 127 : t);
    }
}
void copy(int8_t *to, const int8_t *from, long n) { memcpy(to, from, (unsigned long)n); memset(to, 0, 64); }
void ones(int32_t *x) { for (int i = 0; i < 64; i++) { x[i] = 0x40000000; } }
"""


@pytest.mark.parametrize("compiler", COMPILERS)
def test_integer_code_is_clean(tmp_path: Path, compiler: str) -> None:
    found = inspected(tmp_path, INTEGER, compiler)
    assert found.findings == ()
    assert found.clean
    assert found.instructions > 20


PLANTS = {
    "float multiply": "volatile float v; void plant(void) { v = v * 3.0f; }",
    "double division": "double v; void plant(void) { v = 1.0 / v; }",
    "comparison": "int plant(float a, float b) { return a < b; }",
    "from int": "float plant(int a) { return (float)a; }",
    "to int": "int plant(double a) { return (int)a; }",
    "precision": "double plant(float a) { return a; }",
    "square root": "float plant(float a) { return __builtin_sqrtf(a); }",
    "vectorised": "void plant(float *a) { for (int i = 0; i < 64; i++) a[i] += 1.5f; }",
    "long double": "long double plant(long double a, long double b) { return a * b; }",
}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_float_is_found(tmp_path: Path, compiler: str, what: str) -> None:
    found = inspected(tmp_path, INTEGER + PLANTS[what], compiler)
    assert not found.clean
    assert all("plant" in f or "symbol" in f for f in found.findings)
    assert found.findings[0].startswith("x.o: ")


@pytest.mark.parametrize(
    "call",
    [
        "float __addsf3(float, float); float f(float a) { return __addsf3(a, a); }",
        "int __fixdfsi(double); int (*f)(double) = __fixdfsi;",
        "double __floatsidf(int); double (*f)(int) = __floatsidf;",
        "float __aeabi_fadd(float, float); float (*f)(float, float) = __aeabi_fadd;",
        "double __extendsfdf2(float); double (*f)(float) = __extendsfdf2;",
        "int __ltdf2(double, double); int (*f)(double, double) = __ltdf2;",
        "double __hexagon_adddf3(double, double); double (*f)(double, double) = __hexagon_adddf3;",
        "float expf(float); float (*f)(float) = expf;",
        "double floor(double); double (*f)(double) = floor;",
        "long lrint(double); long (*f)(double) = lrint;",
        "static int tanhl(void) { return 3; } int (*f)(void) = tanhl;",
    ],
)
@pytest.mark.parametrize("compiler", ["x86", "arm"])
def test_a_floating_point_routine_is_found(tmp_path: Path, compiler: str, call: str) -> None:
    name = re.search(r"(\w+)\(", call)
    assert name is not None
    found = inspected(tmp_path, INTEGER + call, compiler)
    assert f"x.o: symbol {name[1]} is a floating-point routine" in found.findings


def test_soft_float_code_is_found_by_its_symbols(tmp_path: Path) -> None:
    """A multiplication without a float unit: no instruction shows it, only the routine it calls."""
    code = "void plant(long double *p) { p[0] = p[1] * p[2]; }"
    found = inspected(tmp_path, INTEGER + code, "arm")
    assert found.findings == ("x.o: symbol __multf3 is a floating-point routine",)


NAMES = ["name_run", "memcpy", "memset", "model_exp", "exponent", "round_shift", "clamp", "_start"]


def test_ordinary_names_are_no_floating_point_routines(tmp_path: Path) -> None:
    code = "\n".join(f"int {n}(void) {{ return 1; }}" for n in NAMES if not n.startswith("mem"))
    assert inspected(tmp_path, code, "x86").clean


X86_FLOAT = """
    addss %xmm1, %xmm0; mulps %xmm1, %xmm0; divsd %xmm1, %xmm0; sqrtpd %xmm1, %xmm0; maxss %xmm1, %xmm0
    cmpltps %xmm1, %xmm0; cmpsd $1, %xmm1, %xmm0; ucomiss %xmm1, %xmm0; comisd %xmm1, %xmm0
    cvtsi2ss %eax, %xmm0; cvttsd2si %xmm0, %eax; cvtps2dq %xmm1, %xmm0; cvtss2sd %xmm1, %xmm0
    rcpps %xmm1, %xmm0; rsqrtss %xmm1, %xmm0; haddps %xmm1, %xmm0; dpps $1, %xmm1, %xmm0
    roundss $1, %xmm1, %xmm0; addsubpd %xmm1, %xmm0
    vaddps %ymm1, %ymm2, %ymm0; vfmadd231ss %xmm1, %xmm2, %xmm0; vcvtdq2ps %ymm1, %ymm0
    vcmpps $1, %ymm1, %ymm2, %ymm0; vrndscaleps $1, %zmm1, %zmm0; vmulpd %zmm1, %zmm2, %zmm0
    vscalefps %zmm1, %zmm2, %zmm0
    vgetexpps %zmm1, %zmm0; vfpclassps $1, %zmm1, %k1; vrcp14ps %zmm1, %zmm0; vcvtph2ps %xmm1, %ymm0
    fldl (%rax); faddp; fmulp; fsqrt; fildl (%rax); fistpl (%rax); fstpl (%rax); fucomip %st(1), %st
"""
X86_INTEGER = """
    movaps %xmm1, %xmm0; movss (%rax), %xmm0; movsd %xmm0, (%rax); movmskps %xmm0, %eax; movd %xmm0, %eax
    xorps %xmm0, %xmm0; andps %xmm1, %xmm0; andnpd %xmm1, %xmm0; orps %xmm1, %xmm0
    unpcklps %xmm1, %xmm0; shufps $1, %xmm1, %xmm0; blendps $1, %xmm1, %xmm0; insertps $1, %xmm1, %xmm0
    pmaxsd %xmm1, %xmm0; pminsd %xmm1, %xmm0; pabsd %xmm1, %xmm0; pmaddwd %xmm1, %xmm0; psignd %xmm1, %xmm0
    packssdw %xmm1, %xmm0; pmulld %xmm1, %xmm0; paddsw %xmm1, %xmm0; psadbw %xmm1, %xmm0
    vpmaxsd %ymm1, %ymm2, %ymm0; vpabsd %ymm1, %ymm0; vpdpbusd %zmm1, %zmm2, %zmm0; vpdpwssd %zmm1, %zmm2, %zmm0
    vpermilps $1, %ymm1, %ymm0; vpermpd $1, %ymm1, %ymm0; vpermps %ymm1, %ymm2, %ymm0
    vbroadcastss %xmm1, %ymm0; vextractf128 $1, %ymm1, %xmm0; vinsertf128 $1, %xmm1, %ymm2, %ymm0
    vmaskmovps %ymm1, %ymm2, (%rax); vgatherdps %ymm1, (%rax,%ymm2), %ymm0; vblendmps %zmm1, %zmm2, %zmm0
    vcompressps %zmm1, %zmm0; vshuff32x4 $1, %zmm1, %zmm2, %zmm0; vxorps %ymm1, %ymm2, %ymm0; vmovups %zmm0, (%rax)
    vpternlogd $1, %zmm1, %zmm2, %zmm0; vpmovusdb %zmm0, %xmm0; vzeroupper; rep stosl; movsl; cmpsl; push %rax; lodsl
    imul %rax, %rcx; cltd; bswap %eax; endbr64; clflush (%rax); cmovs %eax, %ecx
"""
ARM_FLOAT = """
    fadd s0, s1, s2; fmul v0.4s, v1.4s, v2.4s; fdiv d0, d1, d2; fsqrt s0, s1; fmadd s0, s1, s2, s3
    fmla v0.4s, v1.4s, v2.4s; fcmp s0, s1; fccmp s0, s1, #0, eq; fcmgt v0.4s, v1.4s, v2.4s; fmax s0, s1, s2
    fneg s0, s1; fabs s0, s1
    scvtf s0, w0; ucvtf v0.4s, v1.4s; fcvtzs w0, s0; fcvt d0, s0; fcvtns v0.4s, v1.4s; frintn s0, s1; frecpe s0, s1
    frsqrte v0.4s, v1.4s; faddp s0, v1.2s; fcvtn v0.4h, v1.4s; fabd s0, s1, s2; fminnm s0, s1, s2
"""
ARM_INTEGER = """
    fmov s0, w0; fmov w0, s0; fmov v0.4s, #2.0; fcsel s0, s1, s2, eq; ldr s0, [x0]; str q0, [x0]; mov v0.16b, v1.16b
    movi v0.4s, #0; bfi w0, w1, #3, #4; bfxil w0, w1, #3, #4; sdot v0.4s, v1.16b, v2.4b[0]; smlal v0.4s, v1.4h, v2.4h
    sqdmulh v0.4s, v1.4s, v2.4s; srshl v0.4s, v1.4s, v2.4s; sqxtn v0.8b, v1.8h; urecpe v0.4s, v1.4s; smull x0, w1, w2
    smulh x0, x1, x2; madd w0, w1, w2, w3; addv s0, v1.4s; uzp1 v0.16b, v1.16b, v2.16b; tbl v0.16b, {v1.16b}, v2.16b
"""


def lines(listing: str) -> list[str]:
    return [line.strip() for line in re.split(r"[;\n]", listing) if line.strip()]


@pytest.mark.parametrize(
    ("compiler", "listing", "floats"),
    [
        ("x86-avx512", X86_FLOAT, True),
        ("x86-avx512", X86_INTEGER, False),
        ("arm", ARM_FLOAT, True),
        ("arm", ARM_INTEGER, False),
    ],
)
def test_each_instruction_is_judged_rightly(
    tmp_path: Path, compiler: str, listing: str, floats: bool
) -> None:
    """One function per instruction: one finding each where it calculates in floating point, none otherwise."""
    wanted = lines(listing)
    code = ".text\n" + "".join(
        f".globl f{i}\n.type f{i}, %function\nf{i}: {line}\n" for i, line in enumerate(wanted)
    )
    found = inspected(tmp_path, code, compiler, ".s")
    assert found.instructions == len(wanted)
    named = [int(f.split()[1].removeprefix("f")) for f in found.findings]
    assert named == (list(range(len(wanted))) if floats else [])


@pytest.mark.parametrize(
    ("compiler", "junk"), [("x86", ".byte 0x06, 0x06"), ("arm", ".inst 0xffffffff")]
)
def test_bytes_that_do_not_decode_are_found(tmp_path: Path, compiler: str, junk: str) -> None:
    clean = inspected(tmp_path, ".text\nf: nop\n", compiler, ".s")
    assert clean.clean
    found = inspected(tmp_path, f".text\nf: nop\n{junk}\nnop\n", compiler, ".s")
    assert any("does not decode" in f for f in found.findings)


def test_no_code_is_no_certificate(tmp_path: Path) -> None:
    assert not inspected(tmp_path, "int x;", "x86").clean


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QcompileError, match="no ELF"):
        inspect(b"MZ\x90\x00", "x.exe")
    command = [
        *ZIG,
        "-target",
        "riscv64-linux-musl",
        "-c",
        "-x",
        "c",
        "-",
        "-o",
        str(tmp_path / "r.o"),
    ]
    subprocess.run(command, input=b"int x(void) { return 1; }", check=True, timeout=60)
    with pytest.raises(QcompileError, match="EM_RISCV"):
        inspect((tmp_path / "r.o").read_bytes(), "r.o")
