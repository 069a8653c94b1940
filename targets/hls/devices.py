"""The parts that a design can be made for, and what they offer.

Zynq-7000 figures are those of AMD's product tables in DS190, 7 series of DS180 (DSP48E1 slices, RAMB18E1 blocks: two to
each of 36 kbit, LUTs of 6 inputs, flip-flops); ECP5 figures those of Lattice's FPGA-DS-02012 (18 x 18 multipliers, EBR
blocks of 18 kbit, LUTs of 4 inputs, which the table counts in thousands, with a flip-flop each). UltraScale parts are
not among them: they have other DSP blocks and RAM, for which nothing here was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from qcompile.errors import BadInput

from .multipliers import Family


@dataclass(frozen=True, slots=True)
class Device:
    """A part: its DSP blocks, 18-kbit block RAMs, LUTs, flip-flops, and the end of an ordering code for it."""

    name: str
    family: Family
    dsp: int
    bram18: int
    lut: int
    ff: int
    package: str

    def nextpnr(self, clock_mhz: float) -> str:
        """What chooses it, or an ECP5 part where it is none, for nextpnr-ecp5."""
        size = self.name.removeprefix("lfe5u").replace("-", "").replace("f", "k")
        chosen = size.replace("m", "um-", 1) if size.startswith("m") else size
        return f"--{chosen if self.family == 'ecp5' else '45k'} --speed 6 --freq {clock_mhz:g}"

    @property
    def available(self) -> Mapping[str, int]:
        """What it offers, by name."""
        return {"dsp": self.dsp, "bram18": self.bram18, "lut": self.lut, "ff": self.ff}


DEVICES: Mapping[str, Device] = {
    d.name: d
    for d in (
        Device("xc7z007s", "xc7", 66, 100, 14_400, 28_800, "clg400-1"),
        Device("xc7z010", "xc7", 80, 120, 17_600, 35_200, "clg400-1"),
        Device("xc7z020", "xc7", 220, 280, 53_200, 106_400, "clg400-1"),
        Device("xc7z030", "xc7", 400, 530, 78_600, 157_200, "fbg484-1"),
        Device("xc7z045", "xc7", 900, 1090, 218_600, 437_200, "ffg900-2"),
        Device("xc7a35t", "xc7", 90, 100, 20_800, 41_600, "csg324-1"),
        Device("xc7a50t", "xc7", 120, 150, 32_600, 65_200, "csg324-1"),
        Device("xc7a75t", "xc7", 180, 210, 47_200, 94_400, "csg324-1"),
        Device("xc7a100t", "xc7", 240, 270, 63_400, 126_800, "csg324-1"),
        Device("xc7a200t", "xc7", 740, 730, 134_600, 269_200, "sbg484-1"),
        Device("xc7k70t", "xc7", 240, 270, 41_000, 82_000, "fbg484-1"),
        Device("xc7k160t", "xc7", 600, 650, 101_400, 202_800, "fbg484-1"),
        Device("xc7k325t", "xc7", 840, 890, 203_800, 407_600, "ffg900-2"),
        Device("lfe5u-12f", "ecp5", 28, 32, 12_000, 12_000, "-6bg381c"),
        Device("lfe5u-25f", "ecp5", 28, 56, 24_000, 24_000, "-6bg381c"),
        Device("lfe5u-45f", "ecp5", 72, 108, 44_000, 44_000, "-6bg381c"),
        Device("lfe5u-85f", "ecp5", 156, 208, 84_000, 84_000, "-6bg381c"),
        Device("lfe5um-25f", "ecp5", 28, 56, 24_000, 24_000, "-6bg381c"),
        Device("lfe5um-45f", "ecp5", 72, 108, 44_000, 44_000, "-6bg381c"),
        Device("lfe5um-85f", "ecp5", 156, 208, 84_000, 84_000, "-6bg381c"),
    )
}
"""Every part by name."""

DEFAULT = DEVICES["xc7z020"]
"""The part of a design for which none is named."""

# what follows a part's name: a low-power letter, a package and pins, a speed grade and a temperature range
_ORDERED = {
    "xc7": re.compile(
        r"(?:[li]?[a-z]{2,3}\d{3,4})?(?:-[1-3](?:[a-z]{1,2}|[a-z]{2,3}\d{3,4}[a-z]?)?)?"
    ),
    "ecp5": re.compile(r"(?:-[5-9](?:[a-z]{2}\d{3}[cia]?)?)?"),
}


def ordered(text: str | None, device: Device) -> str:
    """The ordering code: what was given, completed by a common package and speed grade."""
    given = "" if text is None else text.strip().lower().removeprefix(device.name)
    if device.family == "ecp5":
        return device.name + (given or device.package)
    package, _, grade = given.partition("-")
    usual, _, speed = device.package.partition("-")
    return f"{device.name}{package or usual}-{grade or speed}"


def find(text: str) -> Device:
    """The part of a name or of an ordering code such as xc7z020clg400-1; BadInput with the nearest otherwise."""
    wanted = text.strip().lower()
    for name, device in DEVICES.items():
        if wanted.startswith(name) and _ORDERED[device.family].fullmatch(wanted[len(name) :]):
            return device
    near = get_close_matches(wanted[:12], DEVICES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise BadInput(f"there is no part '{text[:40]}'; {hint}parts: {', '.join(DEVICES)}")
