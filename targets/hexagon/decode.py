"""Hexagon machine code, as far as the no-float certificate needs it: packets, and which words calculate in floats.

Bits 15 and 14 of a word say where its packet ends. 00 is a duplex, two instructions of a compact set that has no
floats, and ends the packet; 11 ends it too. A word that extends the constant of the next one matches nothing here.
Instructions that only make a constant are moves of bits.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..c.certify import Instruction

_PARSE = 0xC000
_DUPLEX = 0x0000

_TABLE = """
ffe13fe0 88400020 Rd=convert_d2sf(Rss)
ffe13fe0 88000020 Rd=convert_df2sf(Rss)
ffe13fe0 88600020 Rd=convert_df2uw(Rss)
ffe13fe0 88a00020 Rd=convert_df2uw(Rss):chop
ffe13fe0 88800020 Rd=convert_df2w(Rss)
ffe13fe0 88e00020 Rd=convert_df2w(Rss):chop
ffe03fe0 8b600000 Rd=convert_sf2uw(Rs)
ffe03fe0 8b600020 Rd=convert_sf2uw(Rs):chop
ffe03fe0 8b800000 Rd=convert_sf2w(Rs)
ffe03fe0 8b800020 Rd=convert_sf2w(Rs):chop
ffe13fe0 88200020 Rd=convert_ud2sf(Rss)
ffe03fe0 8b200000 Rd=convert_uw2sf(Rs)
ffe03fe0 8b400000 Rd=convert_w2sf(Rs)
ffe13fe1 80e00060 Rdd=convert_d2df(Rss)
ffe13fe1 80e00000 Rdd=convert_df2d(Rss)
ffe13fe1 80e000c0 Rdd=convert_df2d(Rss):chop
ffe13fe1 80e00020 Rdd=convert_df2ud(Rss)
ffe13fe1 80e000e0 Rdd=convert_df2ud(Rss):chop
ffe03fe1 84800080 Rdd=convert_sf2d(Rs)
ffe03fe1 848000c0 Rdd=convert_sf2d(Rs):chop
ffe03fe1 84800000 Rdd=convert_sf2df(Rs)
ffe03fe1 84800060 Rdd=convert_sf2ud(Rs)
ffe03fe1 848000a0 Rdd=convert_sf2ud(Rs):chop
ffe13fe1 80e00040 Rdd=convert_ud2df(Rss)
ffe03fe1 84800020 Rdd=convert_uw2df(Rs)
ffe03fe1 84800040 Rdd=convert_w2df(Rs)
ffe121e1 e8000060 Rdd=dfadd(Rss,Rtt)
ffe13c1c dc800010 Pd=dfclass(Rss,#u5)
ffe121fc d2e00000 Pd=dfcmp.eq(Rss,Rtt)
ffe121fc d2e00040 Pd=dfcmp.ge(Rss,Rtt)
ffe121fc d2e00020 Pd=dfcmp.gt(Rss,Rtt)
ffe121fc d2e00060 Pd=dfcmp.uo(Rss,Rtt)
ffe121e1 e8800060 Rdd=dfsub(Rss,Rtt)
ffe020e0 eb000000 Rd=sfadd(Rs,Rt)
ffe020fc 85e00000 Pd=sfclass(Rs,#u5)
ffe020fc c7e00060 Pd=sfcmp.eq(Rs,Rt)
ffe020fc c7e00000 Pd=sfcmp.ge(Rs,Rt)
ffe020fc c7e00080 Pd=sfcmp.gt(Rs,Rt)
ffe020fc c7e00020 Pd=sfcmp.uo(Rs,Rt)
ffe020e0 ebc00020 Rd=sffixupd(Rs,Rt)
ffe020e0 ebc00000 Rd=sffixupn(Rs,Rt)
ffe03fe0 8ba00000 Rd=sffixupr(Rs)
ffe03f80 8be00000 Rd,Pe=sfinvsqrta(Rs)
ffe020e0 eb800000 Rd=sfmax(Rs,Rt)
ffe020e0 eb800020 Rd=sfmin(Rs,Rt)
ffe020e0 eb400000 Rd=sfmpy(Rs,Rt)
ffe020e0 ef000080 Rx+=sfmpy(Rs,Rt)
ffe020e0 ef0000a0 Rx-=sfmpy(Rs,Rt)
ffe020e0 ef0000c0 Rx+=sfmpy(Rs,Rt):lib
ffe020e0 ef0000e0 Rx-=sfmpy(Rs,Rt):lib
ffe02080 ef600080 Rx+=sfmpy(Rs,Rt,Pu):scale
ffe02080 ebe00080 Rd,Pe=sfrecipa(Rs,Rt)
ffe020e0 eb000020 Rd=sfsub(Rs,Rt)
ffe121e1 e8200060 Rdd=dfmax(Rss,Rtt)
ffe121e1 e8c00060 Rdd=dfmin(Rss,Rtt)
ffe121e1 e8400060 Rdd=dfmpyfix(Rss,Rtt)
ffe121e1 ea800060 Rxx+=dfmpyhh(Rss,Rtt)
ffe121e1 ea000060 Rxx+=dfmpylh(Rss,Rtt)
ffe121e1 e8a00060 Rdd=dfmpyll(Rss,Rtt)
ffff20e0 1e052080 Vd.hf=Vu.h
ffff20e0 1e052040 Vd.h=Vu.hf
ffff20e0 1e042060 Vd.hf=Vu.qf16
ffff20e0 1e042000 Vd.sf=Vu.qf32
ffff20e0 1e052020 Vd.w=Vu.sf
ffff20e0 1e052060 Vd.sf=Vu.w
ffff21e0 1e0420c0 Vd.hf=Vuu.qf32
ffff20e0 1e062080 Vd.hf=vabs(Vu.hf)
ffff20e0 1e0620a0 Vd.sf=vabs(Vu.sf)
ffe020e1 1d4020c0 Vdd.sf=vadd(Vu.bf,Vv.bf)
ffe020e0 1fa020e0 Vd.hf=vadd(Vu.hf,Vv.hf)
ffe020e0 1f602060 Vd.qf16=vadd(Vu.hf,Vv.hf)
ffe020e1 1f802080 Vdd.sf=vadd(Vu.hf,Vv.hf)
ffe020e0 1f602080 Vd.qf16=vadd(Vu.qf16,Vv.hf)
ffe020e0 1f602040 Vd.qf16=vadd(Vu.qf16,Vv.qf16)
ffe020e0 1fa02000 Vd.qf32=vadd(Vu.qf32,Vv.qf32)
ffe020e0 1fa02040 Vd.qf32=vadd(Vu.qf32,Vv.sf)
ffe020e0 1fa02020 Vd.qf32=vadd(Vu.sf,Vv.sf)
ffe020e0 1f8020c0 Vd.sf=vadd(Vu.sf,Vv.sf)
ffe020fc 1c802078 Qd=vcmp.gt(Vu.bf,Vv.bf)
ffe020fc 1c8020d0 Qx&=vcmp.gt(Vu.bf,Vv.bf)
ffe020fc 1c8020f0 Qx^=vcmp.gt(Vu.bf,Vv.bf)
ffe020fc 1c802038 Qx|=vcmp.gt(Vu.bf,Vv.bf)
ffe020fc 1c802074 Qd=vcmp.gt(Vu.hf,Vv.hf)
ffe020fc 1c8020cc Qx&=vcmp.gt(Vu.hf,Vv.hf)
ffe020fc 1c8020ec Qx^=vcmp.gt(Vu.hf,Vv.hf)
ffe020fc 1c802034 Qx|=vcmp.gt(Vu.hf,Vv.hf)
ffe020fc 1c802070 Qd=vcmp.gt(Vu.sf,Vv.sf)
ffe020fc 1c8020c8 Qx&=vcmp.gt(Vu.sf,Vv.sf)
ffe020fc 1c8020e8 Qx^=vcmp.gt(Vu.sf,Vv.sf)
ffe020fc 1c802030 Qx|=vcmp.gt(Vu.sf,Vv.sf)
ffff20e1 1e042040 Vdd.hf=vcvt(Vu.b)
ffff20e0 1e0420e0 Vd.hf=vcvt(Vu.h)
ffff20e0 1e062000 Vd.h=vcvt(Vu.hf)
ffff20e0 1e052000 Vd.uh=vcvt(Vu.hf)
ffff20e1 1e042080 Vdd.sf=vcvt(Vu.hf)
ffe020e0 1fc020c0 Vd.b=vcvt(Vu.hf,Vv.hf)
ffe020e0 1fc020a0 Vd.ub=vcvt(Vu.hf,Vv.hf)
ffe020e0 1d402060 Vd.bf=vcvt(Vu.sf,Vv.sf)
ffe020e0 1f602020 Vd.hf=vcvt(Vu.sf,Vv.sf)
ffff20e1 1e042020 Vdd.hf=vcvt(Vu.ub)
ffff20e0 1e0420a0 Vd.hf=vcvt(Vu.uh)
ffe020e0 1fa020c0 Vd.sf=vdmpy(Vu.hf,Vv.hf)
ffe020e0 1c402060 Vx.sf+=vdmpy(Vu.hf,Vv.hf)
ffe020e0 1c602040 Vd.hf=vfmax(Vu.hf,Vv.hf)
ffe020e0 1c602060 Vd.sf=vfmax(Vu.sf,Vv.sf)
ffe020e0 1c602000 Vd.hf=vfmin(Vu.hf,Vv.hf)
ffe020e0 1c602020 Vd.sf=vfmin(Vu.sf,Vv.sf)
ffff20e0 1e062040 Vd.hf=vfneg(Vu.hf)
ffff20e0 1e062060 Vd.sf=vfneg(Vu.sf)
ffe020e0 1d4020e0 Vd.bf=vmax(Vu.bf,Vv.bf)
ffe020e0 1fc02060 Vd.hf=vmax(Vu.hf,Vv.hf)
ffe020e0 1fc02020 Vd.sf=vmax(Vu.sf,Vv.sf)
ffe020e0 1d402000 Vd.bf=vmin(Vu.bf,Vv.bf)
ffe020e0 1fc02080 Vd.hf=vmin(Vu.hf,Vv.hf)
ffe020e0 1fc02040 Vd.sf=vmin(Vu.sf,Vv.sf)
ffe020e1 1d402080 Vdd.sf=vmpy(Vu.bf,Vv.bf)
ffe020e1 1d002000 Vxx.sf+=vmpy(Vu.bf,Vv.bf)
ffe020e0 1f802060 Vd.hf=vmpy(Vu.hf,Vv.hf)
ffe020e0 1fe02080 Vd.qf16=vmpy(Vu.hf,Vv.hf)
ffe020e1 1fe020e0 Vdd.qf32=vmpy(Vu.hf,Vv.hf)
ffe020e1 1f802040 Vdd.sf=vmpy(Vu.hf,Vv.hf)
ffe020e0 1c402040 Vx.hf+=vmpy(Vu.hf,Vv.hf)
ffe020e1 1c402020 Vxx.sf+=vmpy(Vu.hf,Vv.hf)
ffe020e0 1fe020a0 Vd.qf16=vmpy(Vu.qf16,Vv.hf)
ffe020e1 1f802000 Vdd.qf32=vmpy(Vu.qf16,Vv.hf)
ffe020e0 1fe02060 Vd.qf16=vmpy(Vu.qf16,Vv.qf16)
ffe020e1 1fe020c0 Vdd.qf32=vmpy(Vu.qf16,Vv.qf16)
ffe020e0 1fe02000 Vd.qf32=vmpy(Vu.qf32,Vv.qf32)
ffe020e0 1fe02020 Vd.qf32=vmpy(Vu.sf,Vv.sf)
ffe020e0 1f802020 Vd.sf=vmpy(Vu.sf,Vv.sf)
ffe020e1 1d4020a0 Vdd.sf=vsub(Vu.bf,Vv.bf)
ffe020e0 1f602000 Vd.hf=vsub(Vu.hf,Vv.hf)
ffe020e0 1f6020c0 Vd.qf16=vsub(Vu.hf,Vv.hf)
ffe020e1 1f8020a0 Vdd.sf=vsub(Vu.hf,Vv.hf)
ffe020e0 1f6020e0 Vd.qf16=vsub(Vu.qf16,Vv.hf)
ffe020e0 1f6020a0 Vd.qf16=vsub(Vu.qf16,Vv.qf16)
ffe020e0 1fa02060 Vd.qf32=vsub(Vu.qf32,Vv.qf32)
ffe020e0 1fa020a0 Vd.qf32=vsub(Vu.qf32,Vv.sf)
ffe020e0 1fa02080 Vd.qf32=vsub(Vu.sf,Vv.sf)
ffe020e0 1f8020e0 Vd.sf=vsub(Vu.sf,Vv.sf)
ffff20e0 1c6620c0 Vd.f8=vabs(Vu.f8)
ffe020e1 1f800080 Vdd.hf=vadd(Vu.f8,Vv.f8)
ffff20e1 1e0520a0 Vdd.hf=vcvt(Vu.f8)
ffe020e0 1fe02040 Vd.f8=vcvt(Vu.hf,Vv.hf)
ffff20e1 1ed520c0 Vdd.hf=vcvt2(Vu.b)
ffe020e0 1ac020c0 Vd.b=vcvt2(Vu.hf,Vv.hf)
ffe020e0 1ac020e0 Vd.ub=vcvt2(Vu.hf,Vv.hf)
ffff20e1 1ed520e0 Vdd.hf=vcvt2(Vu.ub)
ffe020e0 1c6020a0 Vd.f8=vfmax(Vu.f8,Vv.f8)
ffe020e0 1c602080 Vd.f8=vfmin(Vu.f8,Vv.f8)
ffff20e0 1c6620e0 Vd.f8=vfneg(Vu.f8)
ffe020e1 1f8000c0 Vdd.hf=vmpy(Vu.f8,Vv.f8)
ffe020e1 1f8000e0 Vxx.hf+=vmpy(Vu.f8,Vv.f8)
ffe020e0 1a002060 Vd.qf16=vmpy(Vu.hf,Rt.hf)
ffe020e0 1a002040 Vd.qf16=vmpy(Vu.qf16,Rt.hf)
ffe020e0 1a002020 Vd.qf32=vmpy(Vu.sf,Rt.sf)
ffe020e1 1f8000a0 Vdd.hf=vsub(Vu.f8,Vv.f8)
"""
"""Mask, value and syntax of every instruction that calculates, compares or converts: scalars to v67, vectors to v79."""

_FLOATS = [
    (int(mask, 16), int(value, 16), syntax)
    for mask, value, syntax in (line.split(None, 2) for line in _TABLE.split("\n") if line)
]


def floats(word: int) -> str | None:
    """The syntax of the floating-point instruction that a word is; None for everything else."""
    if word & _PARSE == _DUPLEX:
        return None
    return next((syntax for mask, value, syntax in _FLOATS if word & mask == value), None)


def instructions(code: bytes, base: int) -> Iterator[Instruction]:
    """The words of code that lies at `base`; a last packet without an end is left out."""
    begun: list[Instruction] = []
    for at in range(0, len(code) - 3, 4):
        word = int.from_bytes(code[at : at + 4], "little")
        found = floats(word)
        begun.append(Instruction(base + at, 4, found or f"word {word:08x}", found is not None))
        if word & _PARSE in (_DUPLEX, _PARSE):
            yield from begun
            begun = []
