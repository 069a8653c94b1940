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
    "x86-avx512": (
        *(*ZIG, "-target", "x86_64-linux-gnu"),
        *("-mcpu=x86_64_v4+avx512vnni+avxvnni", "-O3"),
    ),
    "arm": (*ZIG, "-target", "aarch64-linux-musl", "-mcpu=generic+dotprod", "-O3"),
    "cortex-m0": (*ZIG, "-target", "thumb-freestanding-eabi", "-mcpu=cortex_m0", "-O3"),
    "cortex-m4": (*ZIG, "-target", "thumb-freestanding-eabihf", "-mcpu=cortex_m4", "-O3"),
    "cortex-m55": (
        *(*ZIG, "-target", "thumb-freestanding-eabihf"),
        *("-mcpu=cortex_m55+mve_fp+fullfp16+fp_armv8d16", "-O3"),
    ),
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
void *memcpy(void *, const void *, __SIZE_TYPE__);
void *memset(void *, int, __SIZE_TYPE__);
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
@pytest.mark.parametrize("compiler", ["x86", "arm", "cortex-m4"])
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


@pytest.mark.parametrize(
    "routine",
    ["fadd", "fsub", "frsub", "fmul", "fdiv", "fcmpeq", "cfcmple", "f2iz", "f2d", "i2f", "ul2d", "dmul", "d2lz", "h2f"],
)  # fmt: skip
def test_every_soft_float_routine_of_the_arm_abi_is_found(tmp_path: Path, routine: str) -> None:
    code = f"void __aeabi_{routine}(void); void (*f)(void) = __aeabi_{routine};"
    found = inspected(tmp_path, INTEGER + code, "cortex-m0")
    assert found.findings == (f"x.o: symbol __aeabi_{routine} is a floating-point routine",)


def test_constants_between_functions_are_no_code(tmp_path: Path) -> None:
    """Thumb keeps constants beside the code that loads them; these would be `vadd.f32 s0, s1, s2` and `vcmp.f16`."""
    code = ".syntax unified\n.text\n.thumb\nf: ldr r0, =0x0a81ee30\n nop\n.pool\n.word 0x0f02fe31\ng: nop\n"
    found = inspected(tmp_path, code, "cortex-m55", ".s")
    assert found.clean
    assert found.instructions == 3
    planted = code.replace(".word 0x0f02fe31", ".inst.w 0xfe310f02")
    assert not inspected(tmp_path, planted, "cortex-m55", ".s").clean


def test_predicated_floats_are_found(tmp_path: Path) -> None:
    code = ".syntax unified\n.text\n.thumb\n"
    for block in (
        "it eq\nvaddeq.f32 s0, s1, s2",
        "vpst\nvaddt.f32 q0, q1, r2",
        "vpt.f16 ge, q0, r1\nvmovt q0, q1",
    ):
        assert len(inspected(tmp_path, code + block, "cortex-m55", ".s").findings) == 1
    for block in ("it eq\nvmoveq.f32 s0, s1", "vpt.i32 eq, q0, r1\nvaddt.i32 q0, q1, r2"):
        assert inspected(tmp_path, code + block, "cortex-m55", ".s").clean


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
    {vex} vpdpbusd %ymm1, %ymm2, %ymm0; {vex} vpdpbusds %xmm1, %xmm2, %xmm9
    {vex} vpdpwssd (%rax), %ymm12, %ymm0; {vex} vpdpwssds 8(%rsp), %ymm2, %ymm0
    {vex} vpdpbusd 800(%r12), %ymm2, %ymm0; {vex} vpdpbusd (%r13), %ymm2, %ymm0
    {vex} vpdpbusd 8(,%rax,4), %ymm2, %ymm0; {vex} vpdpbusd (%r13,%r12), %ymm2, %ymm0
    {vex} vpdpbusd (%rip), %ymm2, %ymm0; vpmovsdb %zmm0, (%rax){%k1}; vpmovwb %zmm1, %ymm0
    vmovdqu8 (%rax), %zmm0{%k1}{z}; vmovdqu16 %ymm0, (%rax){%k2}; vmovdqa64 %zmm1, 64(%rsp)
    vmovaps %zmm1, (%rsp); kmovq %rax, %k1; kshiftrd $1, %k1, %k2; vpsllvd %zmm1, %zmm2, %zmm0
    vpermi2d %zmm1, %zmm2, %zmm0; vpshufd $245, %zmm1, %zmm0{%k1}; vextracti64x4 $1, %zmm1, %ymm0
    valignd $1, %zmm1, %zmm2, %zmm0; vpsravd %zmm1, %zmm2, %zmm0; vpmaskmovd %ymm1, %ymm2, (%rax)
    vpdpbusd (%rax){1to16}, %zmm2, %zmm0; vdbpsadbw $1, %ymm1, %ymm2, %ymm0
    vtestps %ymm1, %ymm0; vtestpd %xmm1, %xmm0; vptest %ymm1, %ymm0; vptestnmd %zmm1, %zmm0, %k1
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


HELIUM_FLOAT = """
    vadd.f32 q0, q1, q2; vadd.f16 q7, q1, q2; vadd.f32 q0, q1, r2; vadd.f16 q3, q1, r12; vsub.f32 q0, q1, q2
    vsub.f16 q0, q6, r2; vmul.f32 q0, q1, q2; vmul.f16 q0, q1, q2; vmul.f32 q0, q1, r2; vmul.f16 q5, q1, r2
    vfma.f32 q0, q1, q2; vfma.f16 q0, q1, q2; vfma.f32 q0, q1, r2; vfma.f16 q0, q1, r2; vfms.f32 q0, q1, q2
    vfms.f16 q0, q1, q2; vfmas.f32 q0, q1, r2; vfmas.f16 q0, q1, r2; vabd.f32 q0, q1, q2; vabd.f16 q0, q1, q2
    vabs.f32 q0, q1; vabs.f16 q0, q1; vneg.f32 q0, q1; vneg.f16 q0, q1; vcadd.f32 q0, q1, q2, #90
    vcadd.f16 q0, q1, q2, #270; vcmla.f32 q0, q1, q2, #90; vcmla.f16 q0, q1, q2, #270; vcmul.f32 q0, q1, q2, #0
    vcmul.f32 q0, q1, q2, #90; vcmul.f16 q0, q1, q2, #180; vcmul.f16 q0, q1, q2, #270; vcmp.f32 gt, q0, q1
    vcmp.f16 eq, q0, q1; vcmp.f32 ne, q0, q1; vcmp.f32 le, q0, r1; vcmp.f16 ne, q0, r1; vcmp.f32 ge, q0, r12
    vcmp.f16 lt, q0, zr; vmaxnm.f32 q0, q1, q2; vminnm.f16 q0, q1, q2; vmaxnma.f32 q0, q1; vminnma.f16 q0, q1
    vmaxnmv.f32 r0, q1; vminnmv.f16 r0, q1; vmaxnmav.f32 r0, q1; vminnmav.f16 r0, q1; vcvt.f32.s32 q0, q1
    vcvt.f32.u32 q0, q1; vcvt.s32.f32 q0, q1; vcvt.u16.f16 q0, q1; vcvt.f32.s32 q0, q1, #3; vcvt.s32.f32 q0, q1, #3
    vcvt.u16.f16 q0, q1, #3; vcvt.f16.s16 q0, q1, #16; vcvta.s32.f32 q0, q1; vcvtn.u32.f32 q0, q1
    vcvtp.s16.f16 q0, q1; vcvtm.u16.f16 q0, q1; vcvtb.f16.f32 q0, q1; vcvtt.f16.f32 q0, q1; vcvtb.f32.f16 q0, q1
    vcvtt.f32.f16 q0, q1; vrintn.f32 q0, q1; vrintx.f16 q0, q1; vrinta.f32 q0, q1; vrintz.f32 q0, q1
    vrintm.f16 q0, q1; vrintp.f32 q0, q1
"""
VFP_FLOAT = """
    vadd.f32 s0, s1, s2; vadd.f64 d0, d1, d2; vadd.f16 s0, s1, s2; vsub.f32 s0, s1, s2; vmul.f32 s0, s1, s2
    vnmul.f32 s0, s1, s2; vmla.f32 s0, s1, s2; vmls.f32 s0, s1, s2; vnmla.f32 s0, s1, s2; vfma.f32 s0, s1, s2
    vfms.f64 d0, d1, d2; vfnma.f32 s0, s1, s2; vdiv.f32 s0, s1, s2; vsqrt.f32 s0, s1; vabs.f32 s0, s1
    vneg.f32 s0, s1; vcmp.f32 s0, s1; vcmpe.f32 s0, #0; vcmp.f64 d0, d1; vcvt.f32.s32 s0, s1; vcvt.s32.f32 s0, s1
    vcvtr.s32.f32 s0, s1; vcvt.f64.f32 d0, s1; vcvt.f32.s32 s0, s0, #3; vcvta.s32.f32 s0, s1; vcvtb.f32.f16 s0, s1
    vcvtt.f16.f32 s0, s1; vrintz.f32 s0, s1; vrinta.f32 s0, s1; vmaxnm.f32 s0, s1, s2; vminnm.f32 s0, s1, s2
"""
HELIUM_INTEGER = """
    vmladava.s8 r0, q1, q2; vmladavax.s16 r0, q1, q2; vmladava.u8 r0, q1, q2; vmlsdav.s16 r0, q1, q2
    vmlaldava.s16 r0, r1, q1, q2; vrmlaldavha.s32 r0, r1, q1, q2; vldrb.s8 q0, [r0], #16; vldrb.s32 q0, [r0, q1]
    vldrw.u32 q0, [r0]; vldrh.s32 q0, [r0, q1, uxtw #1]; vstrb.32 q0, [r0]; vstrb.8 q0, [r0], #16
    vstrw.32 q0, [r0, q1, uxtw #2]; vldrd.u64 q0, [q1, #8]; vldrw.u32 q0, [q1, #4]!; vldrd.u64 q0, [r0, q1]
    vld20.8 {q0, q1}, [r0]; vld21.8 {q0, q1}, [r0]!; vld40.8 {q0, q1, q2, q3}, [r0]; vst40.8 {q0, q1, q2, q3}, [r0]
    vadd.i32 q0, q1, q2; vadd.i32 q0, q1, r2; vsub.i16 q0, q1, q2; vmul.i32 q0, q1, q2; vmul.i32 q0, q1, r2
    vmla.i32 q0, q1, r2; vmlas.i32 q0, q1, r2; vqdmulh.s32 q0, q1, q2; vqrdmulh.s32 q0, q1, r3; vmulh.s32 q0, q1, q2
    vrmulh.s32 q0, q1, q2; vmullb.s8 q0, q1, q2; vmullt.u16 q0, q1, q2; vmullb.p8 q0, q1, q2; vshl.s32 q0, q1, q2
    vrshl.s32 q0, q1, q2; vrshl.s32 q0, r2; vqrshl.s32 q0, q1, q2; vshr.s32 q0, q1, #3; vrshr.s32 q0, q1, #3
    vshl.i32 q0, q1, #3; vmax.s32 q0, q1, q2; vmin.s8 q0, q1, q2; vmaxv.s8 r0, q1; vmaxv.s32 r0, q1
    vmaxav.s8 r0, q1; vdup.8 q0, r1; vdup.32 q0, r1; vmov.i32 q0, #0; vmov.i8 q0, #5; vmvn.i32 q0, #5; vmov q0, q1
    vmov.32 q0[1], r2; vmov.u8 r2, q0[3]; vmov q0[2], q0[0], r1, r2; vmov r1, r2, q0[2], q0[0]; vand q0, q1, q2
    vorr q0, q1, q2; veor q0, q1, q2; vbic q0, q1, q2; vorn q0, q1, q2; vmvn q0, q1; vorr.i32 q0, #4
    vcmp.s32 gt, q0, q1; vcmp.i32 eq, q0, q1; vcmp.u8 hi, q0, r1; vcmp.i32 eq, q0, zr; vpsel q0, q1, q2; vpnot
    vctp.8 r0; vctp.32 r0; lctp; dls lr, r0; vidup.u32 q0, r2, #1; vddup.u16 q0, r2, #4; viwdup.u32 q0, r2, r3, #1
    vmovlb.s8 q0, q1; vmovlt.u16 q0, q1; vmovnb.i32 q0, q1; vqmovnb.s32 q0, q1; vqmovunb.s16 q0, q1; vrev64.8 q0, q1
    vrev32.8 q0, q1; vabs.s8 q0, q1; vneg.s8 q0, q1; vqabs.s8 q0, q1; vclz.i32 q0, q1; vcls.s32 q0, q1
    vaddv.s32 r0, q1; vaddva.s8 r0, q1; vaddlv.s32 r0, r1, q1; vabav.s8 r0, q1, q2; vabd.s8 q0, q1, q2
    vhadd.s8 q0, q1, q2; vhcadd.s8 q0, q1, q2, #90; vcadd.i8 q0, q1, q2, #90; vrhadd.s8 q0, q1, q2
    vqadd.s8 q0, q1, q2; vqsub.s8 q0, q1, r2; vsri.32 q0, q1, #3; vsli.32 q0, q1, #3; vshrnb.i32 q0, q1, #3
    vqrshrnb.s32 q0, q1, #3; vqrshrunb.s32 q0, q1, #3; vshllb.s8 q0, q1, #3; vshlc q0, r2, #3; vbrsr.8 q0, q1, r2
    vadc.i32 q0, q1, q2; vsbc.i32 q0, q1, q2; vadci.i32 q0, q1, q2; vqdmladh.s8 q0, q1, q2; vqrdmlsdh.s8 q0, q1, q2
    vqdmullb.s16 q0, q1, q2; vqdmullb.s16 q0, q1, r2; vqdmlah.s8 q0, q1, r2; vqrdmlash.s8 q0, q1, r2
    vminav.s8 r0, q1; vmaxa.s8 q0, q1; vmaxa.s32 q0, q1; vmrs r0, p0; vmsr p0, r0; vmrs r0, vpr; vldr p0, [r0]
    vpush {d8-d15}; vpop {d8-d15}; vldr d0, [r0]; vstr s0, [r0]; vldmia r0!, {d0-d3}; vmov s0, r0; vmov r0, r1, d0
    vmov.f32 s0, s1; vmov.f32 s0, #1.0; vmov.f64 d0, d1; vmrs APSR_nzcv, fpscr; vins.f16 s0, s1
    vseleq.f32 s0, s1, s2; csel r0, r1, r2, eq; cset r0, eq; asrl r0, r1, #4; lsll r0, r1, r2
    sqrshrl r0, r1, #64, r2; uqrshl r0, r2; urshr r0, #3; clrm {r0, r1}; smlad r0, r1, r2, r3; sxtb16 r0, r1, ror #8
    smmulr r0, r1, r2; pkhbt r0, r1, r2, lsl #16; ssat r0, #8, r1, asr #3; usada8 r0, r1, r2, r3
    smlal r0, r1, r2, r3; ldrd r0, r1, [r2], #8; bfi r0, r1, #3, #4; clz r0, r1; bkpt #0xab
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
        ("cortex-m55", HELIUM_FLOAT, True),
        ("cortex-m55", VFP_FLOAT, True),
        ("cortex-m55", HELIUM_INTEGER, False),
    ],
)
def test_each_instruction_is_judged_rightly(
    tmp_path: Path, compiler: str, listing: str, floats: bool
) -> None:
    """One function per instruction: one finding each where it calculates in floating point, none otherwise."""
    wanted = lines(listing)
    thumb = ".syntax unified\n.thumb\n" if compiler.startswith("cortex") else ""
    code = (
        thumb
        + ".text\n"
        + "".join(
            f".globl f{i}\n.type f{i}, %function\nf{i}: {line}\n" for i, line in enumerate(wanted)
        )
    )
    found = inspected(tmp_path, code, compiler, ".s")
    assert found.instructions == len(wanted)
    named = [int(f.split()[1].removeprefix("f")) for f in found.findings]
    assert named == (list(range(len(wanted))) if floats else [])


@pytest.mark.parametrize(
    ("compiler", "junk"),
    [
        ("x86", ".byte 0x06, 0x06"),
        ("arm", ".inst 0xffffffff"),
        ("cortex-m4", ".inst.n 0xde00 + 0x0f00\n.inst.w 0xffffffff"),
        ("cortex-m55", ".inst.w 0xfffff0ff"),
    ],
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
