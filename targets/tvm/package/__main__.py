"""The commands of the package: python -m NAME_tvm show|run|object."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from .versions import INSTALL, lacks


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="print the Relax module")
    run = commands.add_parser("run", help="run rows of codes")
    run.add_argument(
        "inputs", type=Path, help="an .npz file with an array of codes for every input"
    )
    run.add_argument("outputs", type=Path, help="the .npz file to write")
    objects = commands.add_parser("object", help="build an object file with a plain C interface")
    objects.add_argument("folder", type=Path, help="where to put it, its header and its constants")
    commands.add_parser("serve", help="answer qcompile on standard input and output")
    return parser.parse_args()


def main() -> None:
    """Run one command."""
    arguments = _arguments()
    if found := lacks():
        sys.exit(f"{'; '.join(found)}: {INSTALL}")
    program = import_module(".program", __package__)
    network = import_module(".network", __package__).NETWORK
    match arguments.command:
        case "show":
            print(network.module().script())
        case "run":
            program.run(network, arguments.inputs, arguments.outputs)
        case "object":
            import_module(".objects", __package__).write(network, arguments.folder)
        case "serve":
            # what TVM prints must not mix with the answers
            answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            program.serve(network, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
