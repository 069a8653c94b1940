"""The command line: `qcompile model.onnx --target=arm`, and the other verbs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from typer.core import TyperGroup

from qcompile.errors import (
    BadInput,
    QcompileError,
    ToolchainMissing,
    Unsupported,
    VerificationMismatch,
)
from qcompile.formats import parse_format
from qcompile.options import DISPATCH, Options

if TYPE_CHECKING:
    from qcompile.report.terminal import Terminal

INTERRUPTED = 130
VOICE_FLAGS = {"-v", "--verbose", "-q", "--quiet", "--json", "--no-color"}
ROOT_FLAGS = {"-h", "--help", "--version"}
# Releases of typer differ in where they keep the errors of the command line; this one is public in all.
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[1])

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A float ONNX model.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="An output folder of qcompile.")]
Calib = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|random",
        help="Calibration data: .npz, .npy, .csv, .wav, .raw, a folder or .txt list of these, ONNX test data, or a "
        ".toml description, which images need. "
        "Without it samples are made up, and every report says so.",
    ),
]
Samples = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Use so many samples, drawn with the seed.")
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of everything that is drawn.")]
Dims = Annotated[
    list[str] | None,
    typer.Option("--input-dim", metavar="NAME=N", help="Fix a free dimension. Repeatable."),
]
Recipe = Annotated[
    str, typer.Option("--recipe", metavar="NAME|PATH", help="What is done; see `qcompile recipes`.")
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        "--calib-method",
        metavar="NAME",
        help="Calibration method; default: the recipe's.",
    ),
]
Weights = Annotated[str, typer.Option(metavar="FORMAT", help="Format of weights, int2 to int8.")]
Activations = Annotated[
    str, typer.Option(metavar="FORMAT", help="Format of activations, int4, int8 or int16.")
]
FirstLast = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT", help="Format of the first and the last layer, where it differs."
    ),
]
PerChannel = Annotated[
    bool, typer.Option("--per-channel/--no-per-channel", help="One weight scale per channel.")
]
Override = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB=FORMAT", help="Another format where a name matches. Repeatable."),
]
Encodings = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="AIMET's encodings of this model, taken as they are."),
]
Jobs = Annotated[int, typer.Option(min=1, metavar="N", help="Threads of the float network's runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Every stage, and tracebacks."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results, warnings and errors only.")]
NoColor = Annotated[
    bool,
    typer.Option("--no-color", help="No colours; NO_COLOR does the same."),
]

app = typer.Typer(
    name="qcompile",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    subcommand_metavar="(MODEL.onnx | COMMAND) [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="qcompile MODEL.onnx --target=arm is short for qcompile compile MODEL.onnx --target=arm.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    command = typer.main.get_command(app)
    try:
        code = command.main(with_verb(given or ["--help"]), "qcompile", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except QcompileError as e:
        return _refuse(str(e), e.exit_code)
    except USAGE_ERROR as e:
        return _refuse(_usage(e), BadInput.exit_code)
    return (code or 0) if given else BadInput.exit_code


def with_verb(arguments: Sequence[str]) -> list[str]:
    """The arguments with their verb first: the one that is there, else `compile`."""
    if set(arguments) <= ROOT_FLAGS:
        return list(arguments)
    verbs = cast(TyperGroup, typer.main.get_command(app)).commands
    at = next((i for i, a in enumerate(arguments) if a not in VOICE_FLAGS), len(arguments))
    word = arguments[at] if at < len(arguments) else ""
    if word in verbs:
        return [word, *arguments[:at], *arguments[at + 1 :]]
    if word.isidentifier() and not Path(word).exists():
        near = get_close_matches(word, verbs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(verbs)}"
        raise BadInput(f"'{word}' is neither a verb nor a file; {hint}")
    return ["compile", *arguments]


def _usage(error: Exception) -> str:
    """What the parser found wrong, in our words where a name is misspelt."""
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        near = get_close_matches(option, error.possibilities or [], n=1)
        return f"there is no option {option}; " + (
            f"did you mean {near[0]}?" if near else f"{_help(error)} lists them"
        )
    said: str = error.format_message() if hasattr(error, "format_message") else str(error)
    return f"{said.rstrip('.')}; see {_help(error)}"


def _help(error: Exception) -> str:
    path = getattr(getattr(error, "ctx", None), "command_path", "qcompile")
    return f"`{path} --help`"


def _refuse(sentence: str, code: int) -> int:
    from qcompile.report.terminal import Terminal

    Terminal(as_json=False, verbose=False, quiet=True, color=True, stage="").fail("error", sentence)
    return code


@contextmanager
def _session(
    stage: str, as_json: bool, verbose: bool, quiet: bool, no_color: bool
) -> Iterator[Terminal]:
    """Run a verb; whatever goes wrong becomes one line and the documented exit code."""
    from qcompile.report.terminal import Terminal

    with Terminal(
        as_json=as_json, verbose=verbose, quiet=quiet, color=not no_color, stage=stage
    ) as terminal:
        try:
            yield terminal
        except QcompileError as e:
            code = _failed(terminal, "error", str(e), e.exit_code)
        except (typer.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            code = _failed(terminal, "interrupted", "stopped before the end", INTERRUPTED)
        except OSError as e:
            where = f"'{e.filename}': " if e.filename else ""
            code = _failed(terminal, "error", f"{where}{e.strerror or e}", BadInput.exit_code)
        except Exception as e:
            what = "; ".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", ())])
            hint = "" if verbose else "; run again with -v and report it"
            code = _failed(terminal, "internal error", f"{what}{hint}", QcompileError.exit_code)
        else:
            return
    raise typer.Exit(code)


def _failed(terminal: Terminal, kind: str, sentence: str, code: int) -> int:
    if terminal.verbose:
        terminal.traceback()
    terminal.fail(kind, sentence)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qcompile {version('qcompile')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile float ONNX models to verified integer-only programs."""


@app.command("compile")
def compile_(
    model: Model,
    target: Annotated[
        str,
        typer.Option(
            "--target", "-t", metavar="NAME", help="What to compile for; see `qcompile targets`."
        ),
    ] = "x86",
    cpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A processor of the target; default: its safe baseline."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="What the processor lacks or has, as `nodsp`."),
    ] = None,
    dispatch: Annotated[
        bool,
        typer.Option("--dispatch", help="Programs for several processors, chosen as it runs."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Output folder; default ./MODEL-TARGET."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output folder that is not empty.")
    ] = False,
    calib: Calib = None,
    samples: Samples = None,
    seed: Seed = 0,
    input_dim: Dims = None,
    recipe: Recipe = "default",
    method: Method = None,
    weights: Weights = "int8",
    activations: Activations = "int8",
    first_last: FirstLast = None,
    per_channel: PerChannel = True,
    override: Override = None,
    input_dtype: Annotated[
        str, typer.Option(metavar="int8|uint8|int16", help="Type of the program's inputs.")
    ] = "int8",
    output_dtype: Annotated[
        str, typer.Option(metavar="int8|int16|int32", help="Type of the program's outputs.")
    ] = "int16",
    io_layout: Annotated[
        str, typer.Option(metavar="model|nhwc", help="Layout of the program's inputs and outputs.")
    ] = "model",
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.toml", help="Start from a saved plan instead of calibrating."),
    ] = None,
    encodings: Encodings = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A missing compiler or emulator is an error.")
    ] = False,
    min_sqnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Fail when an output is less accurate than this."),
    ] = None,
    verify_samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples on which the program is compared.")
    ] = 32,
    trace_samples: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Samples on which every intermediate is compared."),
    ] = 2,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Prefix of the C names; default: from the file name."),
    ] = None,
    weights_section: Annotated[
        str | None, typer.Option(metavar="SECTION", help="Linker section of the constants.")
    ] = None,
    arena_section: Annotated[
        str | None, typer.Option(metavar="SECTION", help="Linker section of the arena.")
    ] = None,
    max_ram: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="Arena, inputs, outputs and stack fit in so much; 64K is 65536."
        ),
    ] = None,
    max_flash: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Code and constants fit in so much."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="FPGA to design for, as xc7z020; default: that one."),
    ] = None,
    clock_mhz: Annotated[
        float | None, typer.Option(metavar="MHZ", help="Clock of the design; default 100.")
    ] = None,
    target_fps: Annotated[
        float | None, typer.Option(metavar="N", help="Images a second that the design reaches.")
    ] = None,
    max_dsp: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="DSP blocks the design may take.")
    ] = None,
    max_bram: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="18-kbit block RAMs it may take.")
    ] = None,
    max_lut: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="LUTs it may take, by the model.")
    ] = None,
    folding: Annotated[
        Path | None,
        typer.Option(metavar="FOLDING.json", help="Follow this folding, as a design wrote it."),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|cache",
            help="Measure layers here and take the fastest; the file keeps what was measured.",
        ),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, metavar="N", help="Threads that share a call of the program.")
    ] = 1,
    jobs: Jobs = 1,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Compile a model to a verified integer program.

    The verb may be left out: `qcompile MODEL.onnx` compiles.
    """
    with _session(f"compiling {model.name}", json, verbose, quiet, no_color) as terminal:
        options = Options(
            cpu=processor(cpu, dispatch), features=features, name=name,
            weights=weights, activations=activations, first_last=first_last,
            per_channel=per_channel, method=method, overrides=overrides(override or ()),
            input_dtype=input_dtype, output_dtype=output_dtype, io_layout=io_layout, samples=samples,
            seed=seed, threads=threads, jobs=jobs, verify_samples=verify_samples, trace_samples=trace_samples,
            plan=plan, encodings=encodings, require_verified=strict, min_sqnr=min_sqnr,
            weights_section=weights_section, arena_section=arena_section,
            max_ram=size("--max-ram", max_ram), max_flash=size("--max-flash", max_flash),
            part=part, clock_mhz=clock_mhz, target_fps=target_fps, max_dsp=max_dsp, max_bram=max_bram,
            max_lut=max_lut, folding=folding, tune=tune,
        )  # fmt: skip
        dims = dimensions(input_dim or ())
        from qcompile import driver
        from qcompile.report import tables

        artifact = driver.compile(
            model, target, calib, recipe, output, dims,
            force=force, options=options, log=terminal.log,
        )  # fmt: skip
        report = artifact.report
        terminal.result(report, *tables.compiled(report, artifact.folder))


@app.command()
def inspect(
    model: Model,
    input_dim: Dims = None,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Show what a model is made of, and what has no integer form.

    The exit code is 3 if anything has none.
    """
    with _session(f"reading {model.name}", json, verbose, quiet, no_color) as terminal:
        dims = dimensions(input_dim or ())
        from qcompile import verbs
        from qcompile.report import tables

        found = verbs.inspect(model, input_dims=dims)
        terminal.result(found, *tables.inspected(found, every_slot=verbose))
        if found["unsupported"]:
            raise typer.Exit(Unsupported.exit_code)


@app.command()
def quantize(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Output folder; default ./MODEL-qdq."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output folder that is not empty.")
    ] = False,
    calib: Calib = None,
    samples: Samples = None,
    seed: Seed = 0,
    input_dim: Dims = None,
    recipe: Recipe = "default",
    method: Method = None,
    weights: Weights = "int8",
    activations: Activations = "int8",
    first_last: FirstLast = None,
    per_channel: PerChannel = True,
    override: Override = None,
    jobs: Jobs = 1,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Calibrate only: write the QDQ model and the plan.

    Both go to a folder, as qdq.onnx (which onnxruntime runs) and plan.toml (which --plan takes).
    """
    with _session(f"quantizing {model.name}", json, verbose, quiet, no_color) as terminal:
        options = Options(
            weights=weights, activations=activations, first_last=first_last, per_channel=per_channel,
            method=method, overrides=overrides(override or ()), samples=samples, seed=seed, jobs=jobs,
        )  # fmt: skip
        dims = dimensions(input_dim or ())
        from qcompile import job, verbs
        from qcompile.report import tables

        place = output or Path(f"{job.identifier(model.stem)}-qdq")
        folder = verbs.quantize(
            model, calib, place, recipe, dims, options, force=force, log=terminal.log
        )
        files = sorted(str(f) for f in folder.iterdir())
        terminal.result({"folder": str(folder), "files": files}, tables.facts([("wrote", files)]))


@app.command()
def analyze(
    model: Model,
    target: Annotated[
        str,
        typer.Option(
            "--target", "-t", metavar="NAME", help="What to compile for; see `qcompile targets`."
        ),
    ] = "x86",
    cpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A processor of the target; default: its safe baseline."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write report.html and report.json there."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output folder that is not empty.")
    ] = False,
    calib: Calib = None,
    samples: Samples = None,
    rows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Samples of every leave-one-out run.")
    ] = 64,
    seed: Seed = 0,
    input_dim: Dims = None,
    recipe: Recipe = "default",
    method: Method = None,
    weights: Weights = "int8",
    activations: Activations = "int8",
    first_last: FirstLast = None,
    per_channel: PerChannel = True,
    override: Override = None,
    input_dtype: Annotated[
        str, typer.Option(metavar="int8|uint8|int16", help="Type of the program's inputs.")
    ] = "int8",
    output_dtype: Annotated[
        str, typer.Option(metavar="int8|int16|int32", help="Type of the program's outputs.")
    ] = "int16",
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.toml", help="Start from a saved plan instead of calibrating."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A missing compiler or emulator is an error.")
    ] = False,
    jobs: Jobs = 1,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Show where a model loses accuracy, why, and which flag buys it back.

    Takes the options of `compile`. The exit code is 5 if the program differs from the integer graph.
    """
    with _session(f"analyzing {model.name}", json, verbose, quiet, no_color) as terminal:
        options = Options(
            cpu=cpu, weights=weights, activations=activations, first_last=first_last,
            per_channel=per_channel, method=method, overrides=overrides(override or ()),
            input_dtype=input_dtype, output_dtype=output_dtype, samples=samples, seed=seed,
            jobs=jobs, plan=plan, require_verified=strict,
        )  # fmt: skip
        dims = dimensions(input_dim or ())
        from qcompile import verbs
        from qcompile.report import tables, verdict

        found = verbs.analyze(
            model, target, calib, recipe, output, dims, options,
            rows=rows, force=force, log=terminal.log,
        )  # fmt: skip
        terminal.result(found, *tables.analyzed(found, output))
        exact = verdict.bit_exact(found)
        if exact.state == "fail":
            raise VerificationMismatch(exact.sentence)


@app.command()
def verify(
    folder: Folder,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH|random", help="Samples to compare on; without it made-up ones."),
    ] = None,
    samples: Samples = None,
    seed: Seed = 0,
    trace: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Samples on which every intermediate is compared."),
    ] = 2,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="Build with address and undefined-behaviour checks.")
    ] = False,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Compare a compiled program with its integer graph.

    Every output on every sample and every stored intermediate on some, bit for bit; the exit code is 5
    if anything differs.
    """
    with _session(f"verifying {folder}", json, verbose, quiet, no_color) as terminal:
        from qcompile import verbs
        from qcompile.report import tables

        found, origin = verbs.verify(
            folder,
            data,
            samples=samples,
            seed=seed,
            trace=trace,
            sanitize=sanitize,
        )
        terminal.result(asdict(found) | {"origin": origin}, tables.verified(found, origin))
        if not found.ok:
            raise VerificationMismatch(f"the program differs from the integer graph: {found.first}")


@app.command("eval")
def eval_(
    folder: Folder,
    data: Annotated[
        str, typer.Option(metavar="PATH", help="Samples, with labels and a metric in a .toml.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The float model, where it is no longer in its place."),
    ] = None,
    samples: Samples = None,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Measure a compiled program against its float model.

    Metric (where the data have labels), agreement of the largest entries, SQNR.
    """
    with _session(f"evaluating {folder}", json, verbose, quiet, no_color) as terminal:
        from qcompile import verbs
        from qcompile.report import tables

        found = verbs.evaluate(folder, data, model=model, samples=samples)
        terminal.result(found, *tables.evaluated(found))


@app.command()
def bench(
    folder: Folder,
    milliseconds: Annotated[
        int,
        typer.Option(
            "--ms", min=1, max=600_000, metavar="N", help="Run for about so many milliseconds."
        ),
    ] = 1000,
    raw: Annotated[
        bool, typer.Option("--raw", help="Without quantizing inputs and dequantizing outputs.")
    ] = False,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Time one inference of a compiled program here; in an emulator, count what it executes.

    A design of logic has its cycles in its report; they are shown unit by unit.
    """
    with _session(f"timing {folder}", json, verbose, quiet, no_color) as terminal:
        from qcompile import bench as benches
        from qcompile.report import tables

        if (design := benches.design(folder)) is not None:
            terminal.result(design, *tables.designed(design))
            return
        if benches.emulated(folder):
            counts = benches.executed(folder)
            terminal.result(
                {"total": counts.total, "macs": counts.macs, **asdict(counts)},
                tables.counted(counts),
            )
            return
        timing = benches.bench(folder, milliseconds=milliseconds, raw=raw)
        layers = benches.profile(folder, milliseconds=milliseconds)
        terminal.result(
            {**asdict(timing), **asdict(layers)}, tables.profiled(layers), tables.timed(timing)
        )


@app.command()
def targets(
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """List what can be compiled for."""
    with _session("looking", json, verbose, quiet, no_color) as terminal:
        from qcompile import verbs
        from qcompile.report import tables

        found = verbs.targets()
        terminal.result(
            [{"name": n, "summary": s, "cpus": list(cpus)} for n, s, cpus in found],
            tables.table(("target", "what it is", "--cpu (the first is the default)"), found),
        )


@app.command()
def recipes(
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """List the recipes that ship with qcompile."""
    with _session("looking", json, verbose, quiet, no_color) as terminal:
        from qcompile import verbs
        from qcompile.report import tables

        found = verbs.recipes()
        terminal.result(
            [{"name": name, "summary": summary} for name, summary in found],
            tables.table(("recipe", "what it does"), found),
        )


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Option("--target", "-t", metavar="NAME", help="Look at one target only.")
    ] = None,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Check that compilers and emulators are installed.

    The exit code is 6 if one is missing.
    """
    with _session("looking", json, verbose, quiet, no_color) as terminal:
        from qcompile import verbs
        from qcompile.report import tables
        from qcompile.target import get

        wanted = None if target is None else get(target).name
        found = [(n, list(lacks)) for n, lacks in verbs.doctor() if wanted in (None, n)]
        terminal.result(
            [{"target": name, "missing": lacks} for name, lacks in found], tables.examined(found)
        )
        if any(lacks for _, lacks in found):
            raise typer.Exit(ToolchainMissing.exit_code)


@app.command()
def reproduce(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="manifest.json of an output folder.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The float model, where it is no longer in its place."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Calibrate again instead of starting from the plan."),
    ] = None,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Compile again from a manifest and compare every byte.

    It starts from the plan beside the manifest; with --calib it calibrates again. The exit code is 5 if any
    byte differs.
    """
    with _session(f"reproducing {manifest}", json, verbose, quiet, no_color) as terminal:
        from qcompile import verbs
        from qcompile.report import tables

        found = verbs.reproduce(manifest, model=model, calibration=calib, log=terminal.log)
        terminal.result(
            {"identical": found.identical, "files": dict(found.files)},
            tables.table(("file", "made again it is"), found.files),
        )
        if not found.identical:
            changed = [path for path, state in found.files if state != "same"]
            raise VerificationMismatch(
                f"{len(changed)} of {len(found.files)} files came out otherwise: {', '.join(changed[:5])}"
            )


def dimensions(pairs: Sequence[str]) -> dict[str, int]:
    """Sizes by dimension name, from NAME=N."""
    dims: dict[str, int] = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        if not name or not number.isascii() or not number.isdigit() or int(number) < 1:
            raise BadInput(
                f"--input-dim takes NAME=N with N at least 1, as in batch=1, not '{pair}'"
            )
        if dims.setdefault(name, int(number)) != int(number):
            raise BadInput(f"--input-dim gives '{name}' two sizes, {dims[name]} and {number}")
    return dims


def processor(cpu: str | None, dispatch: bool) -> str | None:
    """What is compiled for, from --cpu and --dispatch."""
    if dispatch and cpu is not None:
        raise BadInput(
            f"--dispatch chooses the processor as the program runs, and --cpu={cpu} before; leave one out"
        )
    return DISPATCH if dispatch else cpu


def overrides(pairs: Sequence[str]) -> dict[str, str]:
    """Formats by glob, from GLOB=FORMAT."""
    formats: dict[str, str] = {}
    for pair in pairs:
        glob, _, text = pair.rpartition("=")
        if not glob:
            raise BadInput(f"--override takes GLOB=FORMAT, as in 'conv1*=int16', not '{pair}'")
        parse_format(text)
        formats[glob] = text
    return formats


def size(flag: str, text: str | None) -> int | None:
    """Bytes from text such as 49152, 48K or 1M; KB and KiB are the same K."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+)(?:([KM])(?:i?B)?)?", text, re.ASCII | re.IGNORECASE)
    if found is None:
        raise BadInput(f"{flag} takes bytes, as 49152, 48K or 1M, not '{text}'")
    return int(found[1]) << {"": 0, "K": 10, "M": 20}[(found[2] or "").upper()]
