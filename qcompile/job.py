"""The settings of one compilation, all checked before any work."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile import manifest, recipe, target
from qcompile.errors import BadInput, QcompileError
from qcompile.formats import Int, parse_format
from qcompile.options import DISPATCH, Options
from qcompile.recipe import Recipe
from qcompile.target import Fabric, Placement, Target, Tunable

IMPORT = "import"
"""The recipe for models that another tool has quantized; the default one gives way to it."""

_RESERVED = frozenset({".text", ".data", ".bss", ".rodata", ".vectors", "COMMON"})
_MOST_FOLDING = 1 << 20
_SECTION = re.compile(r"[.A-Za-z_][.A-Za-z0-9_]{0,63}")

Model = str | os.PathLike[str] | bytes

INPUT_DTYPES: Mapping[str, Int] = {"int8": Int(8), "uint8": Int(8), "int16": Int(16)}
OUTPUT_DTYPES: Mapping[str, Int] = {"int8": Int(8), "int16": Int(16), "int32": Int(24)}
"""An int32 output holds 24 significant bits: what one rescale can promise."""


@dataclass(frozen=True, slots=True)
class Job:
    """One compilation: every setting, checked before any work."""

    source: Model
    target: Target
    cpu: str
    recipe: Recipe
    output: Path
    input_dims: Mapping[str, int]
    options: Options
    name: str

    @property
    def placement(self) -> Placement:
        """Where the program's data lies and what it may take."""
        given = self.options
        return Placement(
            given.weights_section,
            given.arena_section,
            given.max_ram,
            given.max_flash,
            given.stack or 0,
            self._fabric if self.target.fabric else None,
            given.threads,
        )

    @property
    def _fabric(self) -> Fabric:
        given = self.options
        return Fabric(
            given.part,
            given.clock_mhz,
            given.target_fps,
            given.max_dsp,
            given.max_bram,
            given.max_lut,
            None if given.folding is None else _text(given.folding),
        )

    @classmethod
    def checked(
        cls,
        source: Model,
        target_name: str,
        recipe_name: str | os.PathLike[str],
        output: str | os.PathLike[str] | None,
        input_dims: Mapping[str, int],
        options: Options,
    ) -> Job:
        """Raise BadInput at the first setting that cannot be."""
        if not isinstance(source, str | bytes | os.PathLike):
            raise BadInput(
                f"a model is a path or bytes, not {type(source).__name__}; give model.SerializeToString()"
            )
        chosen = target.get(target_name)
        features = [f for f in (options.features or "").split(",") if f]
        cpu = "+".join([options.cpu or chosen.cpus[0], *features])
        if cpu == DISPATCH and cpu not in chosen.cpus:
            raise BadInput(
                f"--dispatch is not for {chosen.name}: its programs are for one processor, which --cpu names"
            )
        if cpu not in chosen.cpus and cpu in target.names():
            raise BadInput(f"{cpu} is a target of its own: --target {cpu}")
        recipe.one_of(cpu, tuple(chosen.cpus), f"target {target_name}: --cpu and --features")
        recipe.one_of(options.io_layout, ("model", "nhwc"), "--io-layout")
        recipe.one_of(options.input_dtype, tuple(INPUT_DTYPES), "--input-dtype")
        recipe.one_of(options.output_dtype, tuple(OUTPUT_DTYPES), "--output-dtype")
        for flag, text in (("--weights", options.weights), ("--first-last", options.first_last)):
            if text is not None and (not parse_format(text).signed or parse_format(text).bits > 8):
                raise BadInput(f"{flag} takes int2 to int8, not {text}")
        recipe.one_of(options.activations, ("int4", "int8", "int16"), "--activations")
        for flag, section in (
            ("--weights-section", options.weights_section),
            ("--arena-section", options.arena_section),
        ):
            if section is not None and not _SECTION.fullmatch(section):
                raise BadInput(
                    f"{flag} takes the name of a linker section, such as .ext_flash, not {section!r}"
                )
            if section in _RESERVED:
                raise BadInput(
                    f"{flag} takes a section of its own, and {section} is the compiler's"
                )
        if options.weights_section is not None and options.weights_section == options.arena_section:
            raise BadInput(
                "--weights-section and --arena-section are two: one is read, the other written"
            )
        for what, count in (
            ("--samples", options.samples),
            ("--threads", options.threads),
            ("--jobs", options.jobs),
            ("--max-ram", options.max_ram),
            ("--max-flash", options.max_flash),
        ):
            if count is not None and count < 1:
                raise BadInput(f"{what} is at least 1, not {count}")
        _check_kind(chosen, options)
        decided = options.encodings is not None or _rounds(source)
        if recipe_name == "default" and decided:
            recipe_name = IMPORT
        name = identifier(options.name or _title(source))
        place = Path(output) if output is not None else Path(f"{name}-{target_name}")
        return cls(
            source, chosen, cpu, recipe.load(recipe_name), place, dict(input_dims), options, name
        )


def _check_kind(chosen: Target, options: Options) -> None:
    """Raise BadInput where an option is for designs of logic and the target for programs, or the other way round."""
    logic = {
        "--part": options.part,
        "--clock-mhz": options.clock_mhz,
        "--target-fps": options.target_fps,
        "--max-dsp": options.max_dsp,
        "--max-bram": options.max_bram,
        "--max-lut": options.max_lut,
        "--folding": options.folding,
    }
    memory = {
        "--max-ram": options.max_ram,
        "--max-flash": options.max_flash,
        "--weights-section": options.weights_section,
        "--arena-section": options.arena_section,
    }
    for flag, given in (memory if chosen.fabric else logic).items():
        if given is not None:
            raise BadInput(
                f"{flag} is not for {chosen.name}, which is a design of logic: --max-dsp, --max-bram and --max-lut are"
                if chosen.fabric
                else f"{flag} is not for {chosen.name}, which is a program: it is for --target=hls"
            )
    if options.threads > 1 and not chosen.threads:
        raise BadInput(
            f"--threads is not for {chosen.name}: its programs run on one processor core"
        )
    if options.tune is not None and not isinstance(chosen, Tunable):
        raise BadInput(f"--tune is not for {chosen.name}: its layers have no tiles to measure")
    for flag in ("--clock-mhz", "--target-fps"):
        rate = logic[flag]
        least, most = (1.0, 2000.0) if flag == "--clock-mhz" else (1e-3, 1e9)
        if isinstance(rate, int | float) and not least <= rate <= most:
            raise BadInput(f"{flag} lies between {least:g} and {most:g}, not {rate:g}")
    for flag in ("--max-dsp", "--max-bram", "--max-lut"):
        limit = logic[flag]
        if isinstance(limit, int) and limit < 0:
            raise BadInput(f"{flag} is not negative, as {limit} is")
    if options.folding is not None:
        for flag in ("--target-fps", "--max-dsp", "--max-bram", "--max-lut"):
            if logic[flag] is not None:
                raise BadInput(f"--folding says how large the design is; leave out {flag}")


def _text(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, "rb") as f:
            content = f.read(_MOST_FOLDING + 1)
        if len(content) > _MOST_FOLDING:
            raise BadInput(f"the folding {path} has more than {_MOST_FOLDING:,} bytes")
        return content.decode()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"cannot read the folding {path}: {e}") from e


def _rounds(source: Model) -> bool:
    """Is a model quantized already? Only one whose bytes speak of it is parsed to find out."""
    from qcompile import foreign
    from qcompile.onnx.reader import read

    marks = (b"DequantizeLinear", b"QuantizeLinear", b"qonnx.custom_op", b"finn.custom_op")
    try:
        if isinstance(source, bytes):
            speaks = any(mark in source for mark in marks)
        else:
            with open(source, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                speaks = any(data.find(mark) >= 0 for mark in marks)
        return speaks and foreign.detect(read(source, foreign.DOMAINS)) is not None
    except (OSError, ValueError, QcompileError):
        # what is wrong with the model is said where it is loaded
        return False


def _title(source: Model) -> str:
    """The file's name; where that is just `model.onnx`, its folder's."""
    if isinstance(source, bytes):
        return "model"
    path = Path(source)
    return path.stem if path.stem != "model" else path.absolute().parent.name or "model"


def identifier(text: str) -> str:
    """A C identifier in lower case made from any text."""
    word = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40] or "model"
    return f"m{word}" if word[0].isdigit() else word


def sha256_of(source: Model) -> str:
    """The digest of a model's bytes, or of its file and then the files of its external data, sorted by name."""
    if isinstance(source, bytes):
        return manifest.sha256(source)
    with open(source, "rb") as f:
        whole = hashlib.file_digest(f, "sha256")
    for path in _beside(source):
        with path.open("rb") as f:
            hashlib.file_digest(f, lambda: whole)
    return whole.hexdigest()


def _beside(source: str | os.PathLike[str]) -> Sequence[Path]:
    """The files of a model's external data; only a model that speaks of places is parsed to find out."""
    from qcompile.onnx.reader import external_files

    if not Path(source).stat().st_size:
        return ()
    with open(source, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        speaks = data.find(b"location") >= 0
    return external_files(source) if speaks else ()
