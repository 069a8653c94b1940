"""The command line: verbs, options, what is said where, exit codes. What the verbs do is tested elsewhere."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcompile import bench, driver, verbs
from qcompile.cli import dimensions, main, overrides, with_verb
from qcompile.errors import (
    AccuracyGate,
    BadInput,
    BudgetExceeded,
    QcompileError,
    ToolchainMissing,
    Unsupported,
    VerificationMismatch,
)
from qcompile.manifest import Reproduction
from qcompile.options import Options
from qcompile.target import Counts, LayerCount
from qcompile.verify import Mismatch, Verification

REPORT: dict[str, Any] = {
    "model": {"name": "digits"},
    "target": {"name": "arm", "cpu": "cortex-a53"},
    "recipe": {"name": "default"},
    "data": {"origin": "files", "marked": False},
    "warnings": ["input 'image' is 0 in every sample"],
    "coverage": [{"layer": "stem", "operators": ["Conv", "Relu"]}],
    "layers": [
        {
            "name": f"layer{i}",
            "tensor": f"t{i}",
            "kernel": "dot",
            "bits": 8,
            "macs": 9216,
            "sqnr_integer_db": 30.0 + i,
        }
        for i in range(9)
    ],
    "accuracy": {
        "samples": 64,
        "outputs": [
            {
                "name": "logits",
                "sqnr_integer_db": 36.8,
                "sqnr_fake_quant_db": 37.4,
                "agreement": 0.984375,
            }
        ],
    },
    "memory": {"arena_bytes": 4864, "weight_bytes": 20906},
    "verification": {"checked": True, "samples": 32, "mismatches": 0, "intermediates": 11},
    "stored": {f"t{i}": i for i in range(9)},
}

Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments: str) -> SimpleNamespace:
        code = main(arguments)
        said = capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    return call


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A compiler that remembers what it was asked for; `says` is what it does then."""
    seen = SimpleNamespace(given=(), named={}, report=REPORT, says=lambda log: None)

    def compile(*given: object, **named: Any) -> SimpleNamespace:
        seen.given, seen.named = given, named
        seen.says(named["log"])
        return SimpleNamespace(report=seen.report, folder=Path("out"))

    monkeypatch.setattr(driver, "compile", compile)
    return seen


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


# --- verbs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["m.onnx"], ["compile", "m.onnx"]),
        (["m.onnx", "--target=arm"], ["compile", "m.onnx", "--target=arm"]),
        (["--target", "arm", "m.onnx"], ["compile", "--target", "arm", "m.onnx"]),
        (["--name", "eval", "m.onnx"], ["compile", "--name", "eval", "m.onnx"]),
        (["-v", "m.onnx"], ["compile", "-v", "m.onnx"]),
        (["-v", "--json", "inspect", "m.onnx"], ["inspect", "-v", "--json", "m.onnx"]),
        (["verify", "-v"], ["verify", "-v"]),
        (["./inspect"], ["compile", "./inspect"]),
        (["-q"], ["compile", "-q"]),
        (["--version"], ["--version"]),
        (["-h"], ["-h"]),
        ([], []),
    ],
)
def test_the_implied_verb(given: Sequence[str], meant: Sequence[str]) -> None:
    assert with_verb(given) == list(meant)


def test_a_file_without_a_dot_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("network").touch()
    assert with_verb(["network"]) == ["compile", "network"]
    with pytest.raises(
        BadInput, match="'netwrk' is neither a verb nor a file; the verbs are compile"
    ):
        with_verb(["netwrk"])


def test_without_anything_it_explains_itself(run: Run) -> None:
    nothing, asked = run(), run("--help")
    assert (nothing.code, asked.code) == (2, 0)
    assert nothing.out == asked.out
    verbs = "compile inspect quantize verify eval bench targets recipes doctor reproduce"
    assert set(verbs.split()) <= {
        line.split()[0] for line in asked.out.splitlines() if line.startswith("  ")
    }


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("qcompile ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspct", "m.onnx"], "'inspct' is neither a verb nor a file; did you mean inspect?"),
        (["m.onnx", "--targt=arm"], "there is no option --targt; did you mean --target?"),
        (["m.onnx", "--zzz"], "there is no option --zzz; `qcompile compile --help` lists them"),
        (["compile"], "Missing argument 'MODEL'; see `qcompile compile --help`"),
        (["eval", "DIR"], "Missing option '--data'; see `qcompile eval --help`"),
        (["m.onnx", "--input-dim", "N"], "--input-dim takes NAME=N with N at least 1, as in batch=1, not 'N'"),
        (["m.onnx", "--override", "a=int99"], "integer formats have 2 to 32 bits, not 99"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(
    run: Run, compiler: SimpleNamespace, arguments: Sequence[str], sentence: str
) -> None:
    done = run(*arguments)
    assert (done.code, done.out, done.err) == (2, "", f"error: {sentence}\n")
    assert compiler.given == ()


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["--target=amr"], "did you mean arm?"), (["--recipe=defualt"], "did you mean default?")],
)
def test_unknown_names_meet_the_nearest(
    run: Run, models: Path, arguments: Sequence[str], near: str
) -> None:
    done = run(str(models / "digits-resnet/model.onnx"), *arguments)
    assert done.code == 2
    assert near in done.err
    assert done.err.count("\n") == 1


# --- options -------------------------------------------------------------------------------------


def test_defaults(run: Run, compiler: SimpleNamespace) -> None:
    assert run("m.onnx").code == 0
    assert compiler.given == (Path("m.onnx"), "x86", None, "default", None, {})
    assert compiler.named["options"] == Options()
    assert compiler.named["force"] is False


def test_every_option_reaches_the_compiler(run: Run, compiler: SimpleNamespace) -> None:
    line = (
        "compile m.onnx -t arm --cpu neoverse-n1 -o out --force --calib data.npz --samples 7 --seed 3 "
        "--input-dim N=2 --input-dim a=b=4 --recipe fast --calib-method mse --weights int4 --activations int4 "
        "--first-last int8 --no-per-channel --override conv1*=int16 --override a=b=int8 --input-dtype uint8 "
        "--output-dtype int32 --io-layout nhwc --plan plan.toml --strict --min-sqnr 20.5 --verify-samples 9 "
        "--trace-samples 0 --name net --threads 2 --jobs 3"
    )
    assert run(*line.split()).code == 0
    assert compiler.given == (
        Path("m.onnx"), "arm", "data.npz", "fast", Path("out"), {"N": 2, "a=b": 4},
    )  # fmt: skip
    assert compiler.named["force"] is True
    assert compiler.named["options"] == Options(
        cpu="neoverse-n1", name="net", weights="int4", activations="int4", first_last="int8", per_channel=False,
        method="mse", overrides={"conv1*": "int16", "a=b": "int8"}, input_dtype="uint8", output_dtype="int32",
        io_layout="nhwc", samples=7, seed=3, threads=2, jobs=3, verify_samples=9, trace_samples=0,
        plan=Path("plan.toml"), require_verified=True, min_sqnr=20.5,
    )  # fmt: skip


@pytest.mark.parametrize("pair", ["", "N", "=3", "N=", "N=0", "N=-1", "N=1.5", "N=²", "N=x"])
def test_a_dimension_is_a_name_and_a_size(pair: str) -> None:
    with pytest.raises(BadInput, match="NAME=N"):
        dimensions([pair])


def test_a_dimension_has_one_size() -> None:
    assert dimensions(["N=3", "N=3"]) == {"N": 3}
    with pytest.raises(BadInput, match="'N' two sizes, 3 and 4"):
        dimensions(["N=3", "N=4"])


@pytest.mark.parametrize("pair", ["conv1", "=int8", "conv1=", "conv1=in8"])
def test_an_override_is_a_glob_and_a_format(pair: str) -> None:
    with pytest.raises(BadInput):
        overrides([pair])


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput, 2),
        (Unsupported, 3),
        (AccuracyGate, 4),
        (VerificationMismatch, 5),
        (ToolchainMissing, 6),
        (BudgetExceeded, 7),
        (QcompileError, 1),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    run: Run, compiler: SimpleNamespace, error: type[QcompileError], code: int
) -> None:
    compiler.says = raising(error("node 'a\nb\x1b[31m' is [bold]wrong[/bold]"))
    done = run("m.onnx", "--json")
    assert (done.code, done.out) == (code, "")
    assert done.err == "error: node 'a b\\x1b[31m' is [bold]wrong[/bold]\n"


def test_a_traceback_takes_v(run: Run, compiler: SimpleNamespace) -> None:
    error = KeyError("lost")
    error.add_note("in pass Fold()")
    compiler.says = raising(error)
    brief, full = run("m.onnx"), run("m.onnx", "-v")
    assert (brief.code, full.code) == (1, 1)
    assert brief.err == (
        "internal error: KeyError: 'lost'; in pass Fold(); run again with -v and report it\n"
    )
    assert "Traceback (most recent call last)" in full.err
    assert full.err.endswith("\ninternal error: KeyError: 'lost'; in pass Fold()\n")


def test_a_file_that_cannot_be_used(run: Run, compiler: SimpleNamespace) -> None:
    compiler.says = raising(PermissionError(13, "Permission denied", "/private/x"))
    done = run("m.onnx")
    assert (done.code, done.err) == (2, "error: '/private/x': Permission denied\n")


def test_an_interrupt(run: Run, compiler: SimpleNamespace) -> None:
    compiler.says = raising(KeyboardInterrupt())
    done = run("m.onnx")
    assert (done.code, done.out) == (130, "")
    assert done.err == "interrupted: stopped before the end\n"


# --- what is said --------------------------------------------------------------------------------


def test_the_end_of_a_compilation(run: Run, compiler: SimpleNamespace) -> None:
    done = run("m.onnx", "-t", "arm")
    assert "digits for arm (cpu cortex-a53), recipe default" in done.out
    assert "all 2 float operators became integer arithmetic in 1 layers" in done.out
    assert "the 5 of 9 layers that are furthest from the float network" in done.out
    assert [f"layer{i}" in done.out for i in range(9)] == [i < 5 for i in range(9)]
    assert (
        "output logits: 36.8 dB against float (fake-quantized 37.4 dB), agreement 98.44 %"
        in done.out
    )
    assert "4.75 KiB working, 20.4 KiB weights and tables" in done.out
    assert "files   out (read report.html first)" in done.out
    assert done.out.endswith("warning: input 'image' is 0 in every sample\n")
    assert "\x1b" not in done.out + done.err
    assert "MADE-UP" not in done.out


@pytest.mark.parametrize("origin", ["random", "synthetic"])
def test_made_up_data_are_said_loudly(run: Run, compiler: SimpleNamespace, origin: str) -> None:
    compiler.report = REPORT | {"data": {"origin": origin, "marked": True}}
    assert "MADE-UP DATA: " in run("m.onnx", "-q").out


def test_hostile_names_are_only_shown(
    run: Run, compiler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    name = "[bold red]x[/] \x1b]0;title\x07 \u202egnp.exe :smile: \ud800"
    compiler.report = REPORT | {
        "model": {"name": name},
        "warnings": [name],
        "layers": [{"name": name, "tensor": name, "kernel": name, "sqnr_integer_db": 1.0}],
        "accuracy": {"outputs": [{"name": name}], "samples": 1},
    }
    compiler.says = lambda log: (log(name), log(f"warning: {name}"))
    done = run("m.onnx")
    seen = r"[bold red]x[/] \x1b]0;title\x07 \u202egnp.exe :smile: \ud800"
    assert done.code == 0
    assert done.out.count(seen) == 5
    assert done.err.count(seen) == 2
    assert not {"\x1b", "\x07", "\u202e"} & set(done.out + done.err)


def test_json_is_all_there_is(run: Run, compiler: SimpleNamespace) -> None:
    compiler.says = lambda log: log("fold: changed, 0.00 s")
    done = run("m.onnx", "--json")
    assert json.loads(done.out) == REPORT
    assert "fold: changed" in done.err


def test_how_much_is_said(run: Run, compiler: SimpleNamespace) -> None:
    compiler.says = lambda log: (log("fold: changed"), log("warning: odd data"))
    plain, quiet = run("m.onnx"), run("m.onnx", "-q")
    assert [line.split("s  ")[-1] for line in plain.err.splitlines()] == [
        "fold: changed",
        "warning: odd data",
    ]
    assert quiet.err == "warning: odd data\n"
    assert plain.out == quiet.out


def test_colours(run: Run, compiler: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    green = "\x1b[32m"
    assert green in run("m.onnx", "-q").out
    assert green not in run("m.onnx", "-q", "--no-color").out
    monkeypatch.setenv("NO_COLOR", "1")
    assert green not in run("m.onnx", "-q").out


# --- the other verbs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unsupported", "code"), [([], 0), ([("n", "Loop", "no integer form")], 3)]
)
def test_inspect(
    run: Run, monkeypatch: pytest.MonkeyPatch, unsupported: list[tuple[str, str, str]], code: int
) -> None:
    found = {
        "inputs": [{"name": "image", "shape": [None, 1, 8, 8], "dtype": "float32"}],
        "outputs": [{"name": "logits", "shape": [None, 10]}],
        "nodes": 16,
        "operators": {"Conv": 6, "Loop": 1},
        "parameters": 19562,
        "unsupported": [dict(zip(("node", "operator", "reason"), u, strict=True)) for u in unsupported],
        "slots": [{"tensor": "relu_0", "kind": "activation", "format": "int8"}],
        "warnings": [],
    }  # fmt: skip
    monkeypatch.setattr(verbs, "inspect", lambda model, *, input_dims: found | {"dims": input_dims})
    done = run("inspect", "m.onnx", "-v", "--input-dim", "N=1")
    assert done.code == code
    assert "N×1×8×8" in done.out
    assert "Conv 6, Loop 1" in done.out
    assert ("no integer form" in done.out) == (code == 3)
    assert ("relu_0" in done.out) == (code == 0)
    machine = run("inspect", "m.onnx", "--json", "--input-dim", "N=1")
    assert machine.code == code
    assert json.loads(machine.out) == found | {"dims": {"N": 1}}


def test_quantize(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def quantize(*given: object, force: bool, log: object) -> Path:
        seen.extend([*given, force])
        (tmp_path / "qdq.onnx").touch()
        return tmp_path

    monkeypatch.setattr(verbs, "quantize", quantize)
    done = run("quantize", "My Net.onnx", "--calib", "random", "--method", "minmax", "--force")
    assert done.code == 0
    assert str(tmp_path / "qdq.onnx") in done.out.replace("\n", "")
    assert seen == [
        Path("My Net.onnx"), "random", Path("my_net-qdq"), "default", {}, Options(method="minmax"), True,
    ]  # fmt: skip


@pytest.mark.parametrize("mismatches", [0, 2])
def test_verify(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mismatches: int) -> None:
    import numpy as np

    first = Mismatch("stem", "relu_0", 3, (0, 1), 4, 5) if mismatches else None
    shape = SimpleNamespace(type=SimpleNamespace(shape=(1, 2, 3)))
    seen: list[Any] = []

    def verify(samples: Any, *, sanitize: bool, trace: int) -> Verification:
        seen.extend([[batch["x"].shape for batch in samples], sanitize, trace])
        return Verification(5, mismatches, first, 11, sanitize)

    fake = SimpleNamespace(
        graph=SimpleNamespace(inputs=[(SimpleNamespace(name="x"), shape)]),
        verify=verify,
        manifest={},
    )
    monkeypatch.setattr(verbs, "load", lambda folder: fake)
    np.save(tmp_path / "x.npy", np.arange(48, dtype=np.float32).reshape(8, 2, 3))
    arguments = ["verify", "DIR", "--data", str(tmp_path / "x.npy"), "--samples", "5", "--sanitize"]
    done = run(*arguments)
    assert seen == [[(5, 2, 3)], True, 2]
    assert done.code == (5 if mismatches else 0)
    assert f"5 given samples, {mismatches} elements differ" in done.out
    assert ("layer stem: value relu_0[0, 1] of sample 3 is 5" in done.err) == bool(mismatches)
    machine = json.loads(run(*arguments, "--json").out)
    assert (machine["mismatches"], machine["origin"]) == (mismatches, "files")
    assert "made-up samples" in run("verify", "DIR").out


def test_eval(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"name": "logits", "samples": 400, "sqnr_db": 37.3, "agreement": 1.0, "metric": "top1",
           "float": 0.9925, "integer": 0.99, "delta_points": -0.25}  # fmt: skip
    found = {"outputs": [row], "samples": 400, "origin": "files", "marked": False}
    monkeypatch.setattr(
        verbs, "evaluate", lambda *given, **named: found | {"marked": given[1] == "random"}
    )
    done = run("eval", "DIR", "--data", "eval.toml")
    assert (
        done.out.split()[-8:] == "logits 400 37.3 100.00 % top1 99.25 % 99.00 % -0.25".split()[-8:]
    )
    assert "MADE-UP" not in done.out


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = [("x86", []), ("arm", ["qemu-aarch64 is missing: apt-get install qemu-user"])]
    monkeypatch.setattr(verbs, "doctor", lambda: lacks)
    done = run("doctor")
    assert done.code == 6
    assert "qemu-aarch64 is missing" in done.out
    assert run("doctor", "--target", "x86").code == 0
    assert run("doctor", "--target", "x68").code == 2
    assert json.loads(run("doctor", "--json").out)[0] == {"target": "x86", "missing": []}


def test_lists(run: Run) -> None:
    assert {t["name"] for t in json.loads(run("targets", "--json").out)} >= {"x86", "arm"}
    assert {r["name"] for r in json.loads(run("recipes", "--json").out)} >= {"default", "fast"}
    assert "cortex-a53" in run("targets").out
    assert "default" in run("recipes").out


@pytest.mark.parametrize(("state", "code"), [("same", 0), ("differs", 5), ("missing", 5)])
def test_reproduce(run: Run, monkeypatch: pytest.MonkeyPatch, state: str, code: int) -> None:
    monkeypatch.setattr(
        verbs,
        "reproduce",
        lambda *_, **__: Reproduction((("model.h", "same"), ("model.c", state))),
    )
    done = run("reproduce", "manifest.json")
    assert done.code == code
    assert (done.err == "error: 1 of 2 files came out otherwise: model.c\n") == (code == 5)


# --- bench ---------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A folder whose `make bench` makes the given shell script."""

    def write(script: str) -> Path:
        (tmp_path / "source").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "Makefile").write_text(
            "bench: source\n\tcp source bench && chmod +x bench\n"
            "profile peak:\n\tprintf '#!/bin/sh\\n%s\\n' '$($@)' > $@ && chmod +x $@\n"
            "profile = echo 0 400; echo 1 100.5\npeak = echo 4.0\n"
        )
        (tmp_path / "peak.c").touch()
        layer = {
            "name": "fc",
            "kernel": "dot",
            "function": "f",
            "macs": 402,
            "scratch_bytes": 0,
            "cost": 1,
        }
        told = {"values": {"x": 0, "y": 1}, "stores": [1], "pieces": {}, "layers": [layer]}
        (tmp_path / "program.json").write_text(json.dumps(told))
        return tmp_path

    monkeypatch.setattr(
        bench, "load", lambda folder: SimpleNamespace(target=SimpleNamespace(name="here"))
    )
    return write


def test_bench_speaks_the_protocol(run: Run, program: Callable[[str], Path]) -> None:
    folder = program('echo ready; read ms; echo "$ms.5 ${1:-812}"; read ms; test "$ms" = 0')
    done = run("bench", str(folder), "--ms", "2000")
    assert done.code == 0
    assert done.out.endswith(
        "812 ns of CPU time per inference (2.00 us elapsed), float in, float out\n"
    )
    # 402 products in 100.5 ns are 4 a nanosecond: all that the processor does
    assert re.search(r"fc +dot +402 +100\.5 ns +4\.0 +100 %", done.out)
    (folder / "source").write_text("#!/bin/sh\necho ready; test \"$1\" = raw && echo '20 10'\n")
    assert json.loads(run("bench", str(folder), "--raw", "--json").out) == {
        "wall_ns": 20.0, "cpu_ns": 10.0, "raw": True, "peak": 4.0,
        "layers": [{"name": "fc", "kernel": "dot", "macs": 402, "ns": 100.5}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "code", "sentence"),
    [
        ("echo hello", 1, "does not speak the bench protocol"),
        ("echo ready; echo 1 2; echo 'out of luck' >&2; exit 3", 1, "failed: out of luck"),
    ],
)
def test_bench_that_fails(
    run: Run, program: Callable[[str], Path], script: str, code: int, sentence: str
) -> None:
    done = run("bench", str(program(script)))
    assert done.code == code
    assert sentence in done.err


def test_bench_that_does_not_build(run: Run, program: Callable[[str], Path]) -> None:
    folder = program("")
    (folder / "Makefile").write_text("bench:\n\t@echo 'cc: not found' >&2; exit 1\n")
    assert run("bench", str(folder)).code == 6


def test_bench_counts_where_an_emulator_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "arm" if platform.machine() == "x86_64" else "x86"
    layer = LayerCount("stem", "dsp", 1728, 1500, 1534)
    opened = SimpleNamespace(
        target=SimpleNamespace(name=target),
        graph=SimpleNamespace(inputs=[]),
        runner=lambda: SimpleNamespace(count=lambda feeds: Counts("instructions", 9, (layer,))),
    )
    monkeypatch.setattr(bench, "load", lambda _: opened)
    done = run("bench", str(tmp_path))
    assert done.code == 0
    assert re.search(r"stem +dsp +1,728 +1,500 +1,534 +0.89", done.out)
    assert re.search(r"total +1,728 +1,543 +0.89", done.out)
    found = json.loads(run("bench", str(tmp_path), "--json").out)
    assert (found["total"], found["macs"], found["unit"]) == (1543, 1728, "instructions")
    assert found["layers"][0]["executed"] == 1534


# --- as a process --------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    heavy = ["onnx", "onnxruntime", "onnx_ir", "onnxscript", "scipy", "numpy", "networkx", "jinja2"]
    program = (
        "import sys; from qcompile.cli import main; codes = [main(['--help']), main(['compile', '--help'])]; "
        f"sys.exit(str(found) if (found := sorted(set({heavy}) & set(sys.modules))) else sum(codes))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qcompile", "no/such.onnx"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_an_old_terminal_gets_escapes_instead_of_a_crash() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qcompile", "inspect", "no/such-\u00fc\u4e2d.onnx"],
        capture_output=True, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"such-\\xfc\\u4e2d.onnx" in done.stderr
