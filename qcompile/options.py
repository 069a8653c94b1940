"""What a user may choose about one compilation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from qcompile.errors import BadInput
from qcompile.recipe import known_keys

DISPATCH = "dispatch"
"""The cpu that stands for several: a program for each, of which one is chosen as it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of `qcompile.compile`; formats are written as text (`int8`, `int4`), as on the command line.

    `features` refines `cpu`, comma-separated (`nodsp`). `plan` starts from a saved plan.toml instead of calibrating;
    `encodings` is AIMET's JSON file beside a float model. `require_verified` makes a missing compiler or emulator an
    error. `min_sqnr` is an accuracy gate in dB on the calibration samples. `weights_section` and `arena_section` are
    linker sections; `max_ram` and `max_flash` are limits in bytes on arena, inputs, outputs and stack together, and on
    code and constants together; `stack` bytes of max_ram are kept for the stack, as many as it was measured to take
    where None. `part` to `folding` are for designs of logic: what for, at which clock, how many images a second, what
    it may take, and a folding.json to follow. `threads` share the work of a call of the program; `jobs` are threads of
    the float network's runs while it is compiled. `tune` is the file of what was measured of layers, or `cache`: what
    it lacks is measured on this machine.
    """

    cpu: str | None = None
    features: str | None = None
    name: str | None = None
    weights: str = "int8"
    activations: str = "int8"
    first_last: str | None = None
    per_channel: bool = True
    method: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    input_dtype: str = "int8"
    output_dtype: str = "int16"
    io_layout: str = "model"
    samples: int | None = None
    seed: int = 0
    threads: int = 1
    jobs: int = 1
    verify_samples: int = 32
    trace_samples: int = 2
    plan: str | os.PathLike[str] | None = None
    encodings: str | os.PathLike[str] | None = None
    require_verified: bool = False
    min_sqnr: float | None = None
    weights_section: str | None = None
    arena_section: str | None = None
    max_ram: int | None = None
    max_flash: int | None = None
    stack: int | None = None
    part: str | None = None
    clock_mhz: float | None = None
    target_fps: float | None = None
    max_dsp: int | None = None
    max_bram: int | None = None
    max_lut: int | None = None
    folding: str | os.PathLike[str] | None = None
    tune: str | os.PathLike[str] | None = None

    def but(self, chosen: Mapping[str, object]) -> Options:
        """These options with some chosen anew; BadInput for a name that is none."""
        known_keys(chosen, tuple(f.name for f in fields(self)), "compile")
        for name, value in chosen.items():
            wanted = type(getattr(Options(), name))
            if wanted in (str, int, bool) and not isinstance(value, wanted):
                raise BadInput(
                    f"compile: {name} is a {wanted.__name__}, not {type(value).__name__}"
                )
        return replace(self, **chosen)  # type: ignore[arg-type]
