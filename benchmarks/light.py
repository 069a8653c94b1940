"""Compile the networks that the onnx package carries for its own tests, and check each on x86; prints a table.

    python benchmarks/light.py [--target x86] [--recipe fast] [--samples 16] [--verify 4]
        [--write docs/models.md] [MODEL ...]

They are the real graphs of AlexNet, DenseNet, ... with the opsets and file versions of their time; a single constant
stands for the weights, so accuracy means nothing here, while every kernel's work does. Samples are drawn at random.
Every network is compiled in a process of its own, which compares the program with the integer graph bit for bit on
`--verify` samples and every intermediate on one. CPU time and peak memory (of the largest process) include
the C compiler, the sanitized build and the programs that are run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx.backend.test

MODELS = Path(onnx.backend.test.__file__).parent / "data" / "light"
BEGIN, END = "<!-- light: written by benchmarks/light.py -->\n", "<!-- light: end -->\n"


@dataclass(frozen=True)
class Row:
    """What became of one network."""

    model: str
    operators: str
    parameters: str
    macs: str
    outcome: str
    seconds: float
    cpu: float
    peak: float

    def line(self) -> str:
        """A row of the table."""
        return (
            f"| {self.model} | {self.operators} | {self.parameters} | {self.macs} | {self.outcome} "
            f"| {self.seconds:.0f} | {self.cpu:.0f} | {self.peak:.0f} |"
        )


HEAD = (
    "| network | float operators | parameters, M | MMAC | program = integer graph | seconds | CPU s | peak MiB |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print the table, or run one network where `--child` asks for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names without light_; default: all")
    parser.add_argument("--target", default="x86")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument(
        "--samples", type=int, default=16, help="samples that ranges are taken from"
    )
    parser.add_argument("--verify", type=int, default=4, help="samples that are compared")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    flags = [
        f"--target={options.target}", f"--recipe={options.recipe}", f"--samples={options.samples}",
        f"--verify-samples={options.verify}", "--trace-samples=1", "--calib=random",
    ]  # fmt: skip
    if options.child:
        print(json.dumps(compiled(options.child, flags)))
        return
    found = sorted(path.stem.removeprefix("light_") for path in MODELS.glob("light_*.onnx"))
    print(HEAD)
    rows = []
    for name in options.models or found:
        own = [sys.executable, __file__, "--child", name, *sys.argv[1:]]
        shown = subprocess.run(own, stdout=subprocess.PIPE, check=True).stdout
        rows.append(Row(**json.loads(shown)))
        print(rows[-1].line(), flush=True)
    if options.write:
        options.write.write_text(
            replaced(options.write.read_text(), [HEAD, *(r.line() for r in rows)])
        )


def compiled(name: str, flags: Sequence[str]) -> dict[str, str | float]:
    """Compile one network and tell what it cost; this process has no other children."""
    with tempfile.TemporaryDirectory() as folder:
        source = MODELS / f"light_{name}.onnx"
        command = [sys.executable, "-m", "qcompile", "compile", str(source), *flags]
        start = time.monotonic()
        run = subprocess.run(
            [*command, "--strict", "--json", "-o", f"{folder}/out"], capture_output=True, text=True
        )
        seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(run.stdout) if run.returncode == 0 else {}
    about = report.get("model", {"nodes": "", "parameters": "", "macs": ""})
    outcome = "equal" if report else " ".join(run.stderr.splitlines()[-1:])
    return {
        "model": name,
        "operators": str(about["nodes"]),
        "parameters": f"{about['parameters'] / 1e6:.1f}" if report else "",
        "macs": f"{about['macs'] / 1e6:.0f}" if report else "",
        "outcome": outcome,
        "seconds": seconds,
        "cpu": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss / 1024,
    }


def replaced(page: str, lines: Sequence[str]) -> str:
    """The page with another table between its marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after


if __name__ == "__main__":
    main()
