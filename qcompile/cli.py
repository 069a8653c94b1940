"""The command line: `qcompile model.onnx --target=arm`, and the other verbs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompile.errors import BadInput, QcompileError, ToolchainMissing, VerificationMismatch
from qcompile.options import Options

if TYPE_CHECKING:
    from qcompile.report.terminal import Terminal

INTERRUPTED = 130
VOICE = "Output"

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A float ONNX model.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="An output folder of qcompile.")]
Calib = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|random",
        help="Calibration data: .npz, .npy, a folder of them or a .toml description. "
        "Without it samples are made up, and every report says so.",
    ),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Use at most this many samples.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
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
    str, typer.Option(metavar="FORMAT", help="Format of activations, int4 or int8.")
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
Threads = Annotated[int, typer.Option(min=1, help="Threads of the float network's runs.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=VOICE)
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Every stage, and tracebacks.", rich_help_panel=VOICE),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results and errors only.", rich_help_panel=VOICE)
]
NoColor = Annotated[
    bool,
    typer.Option("--no-color", help="No colours; NO_COLOR does the same.", rich_help_panel=VOICE),
]

app = typer.Typer(
    name="qcompile",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`qcompile MODEL.onnx --target=arm` is short for `qcompile compile MODEL.onnx --target=arm`.",
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
    except typer.BadParameter.__mro__[1] as e:
        return _refuse(_usage(e), BadInput.exit_code)
    return code if isinstance(code, int) else 0 if given else BadInput.exit_code


def with_verb(arguments: Sequence[str]) -> list[str]:
    """The arguments with their verb first: the one that is there, else `compile`."""
    verbs = {command.name for command in app.registered_commands if command.name}
    asking = [a for a in arguments if not a.startswith("-")]
    if not asking and set(arguments) <= {"-h", "--help", "--version"}:
        return list(arguments)
    at = next(i for i, a in enumerate([*arguments, "model"]) if not a.startswith("-"))
    word = arguments[at] if at < len(arguments) else ""
    if word in verbs:
        return [word, *arguments[:at], *arguments[at + 1 :]]
    if at == 0 and Path(word).name == word and not Path(word).suffix and not Path(word).exists():
        near = get_close_matches(word, verbs, n=1)
        hint = (
            f"; did you mean {near[0]}?" if near else f"; the verbs are {', '.join(sorted(verbs))}"
        )
        raise BadInput(f"'{word}' is neither a verb nor a file{hint}")
    return ["compile", *arguments]


def _usage(error: Exception) -> str:
    """What the parser found wrong, in our words where a name is misspelt."""
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        near = error.possibilities or []
        hint = f"; did you mean {' or '.join(sorted(near))}?" if near else ""
        return f"there is no option {option}{hint}"
    said: str = error.format_message() if hasattr(error, "format_message") else str(error)
    return said


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
        except KeyboardInterrupt:
            code = _failed(terminal, "interrupted", "nothing was written", INTERRUPTED)
        except BrokenPipeError:
            raise
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
        str, typer.Option("--target", "-t", help="What to compile for; see `qcompile targets`.")
    ] = "x86",
    cpu: Annotated[
        str | None, typer.Option(help="A processor of the target; default: its safe baseline.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Output folder; default ./MODEL-TARGET."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option(help="Replace an output folder that is not empty.")
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
    strict: Annotated[
        bool, typer.Option("--strict", help="A missing compiler or emulator is an error.")
    ] = False,
    min_sqnr: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Fail when an output is less accurate than this."),
    ] = None,
    verify_samples: Annotated[
        int, typer.Option(min=1, help="Samples on which the program is compared.")
    ] = 32,
    trace_samples: Annotated[
        int, typer.Option(min=0, help="Samples on which every intermediate is compared.")
    ] = 2,
    name: Annotated[
        str | None, typer.Option(help="Prefix of the C names; default: from the file name.")
    ] = None,
    threads: Threads = 1,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Compile a model to a verified integer program (the verb may be left out)."""
    with _session(f"compiling {model.name}", json, verbose, quiet, no_color) as terminal:
        options = Options(
            cpu=cpu, name=name, weights=weights, activations=activations, first_last=first_last,
            per_channel=per_channel, method=method, overrides=overrides(override or ()),
            input_dtype=input_dtype, output_dtype=output_dtype, io_layout=io_layout, samples=samples,
            seed=seed, threads=threads, verify_samples=verify_samples, trace_samples=trace_samples,
            plan=plan, require_verified=strict, min_sqnr=min_sqnr,
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
