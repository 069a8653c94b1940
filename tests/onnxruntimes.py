"""integer.onnx in other onnxruntimes than this one: the oldest it promises, and a machine without VNNI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from qcompile.ir import Array

ROOT = Path(__file__).parent.parent
Feeds = Mapping[str, Array]

RUNNER = """
import glob, os, sys
import numpy as np
import onnxruntime as ort

wrong, count = [], 0
for path in sorted(glob.glob(os.path.join(sys.argv[1], "*.onnx"))):
    data = np.load(path[:-5] + ".npz")
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = level
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [v.name for v in session.get_inputs()]
        arrays = [data["arr_%d" % i] for i in range(len(data.files))]
        results = session.run(None, dict(zip(names, arrays)))
        for want, got in zip(arrays[len(names):], results):
            count += 1
            if got.dtype != want.dtype or got.shape != want.shape or (got != want).any():
                wrong.append("%s %s" % (os.path.basename(path), level))
print("onnxruntime", ort.__version__, "compared", count, "wrong", wrong)
"""


def save(folder: Path, name: str, model: onnx.ModelProto, feeds: Feeds, results: Feeds) -> None:
    (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    arrays = {f"in{i}": a for i, a in enumerate(feeds.values())}
    arrays |= {f"out{i}": a for i, a in enumerate(results.values())}
    np.savez(folder / f"{name}.npz", *feeds.values(), *results.values())


def compare(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        [*command, "-c", RUNNER, str(folder)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def oldest() -> str:
    """The interpreter of the environment with onnxruntime 1.20."""
    path = os.environ.get("QCOMPILE_ORT120") or str(ROOT / ".venv-ort120" / "bin" / "python")
    assert Path(path).is_file(), (
        f"no onnxruntime 1.20 at {path}: run make tools or set QCOMPILE_ORT120"
    )
    return path


def haswell() -> list[str]:
    """This interpreter on an emulated CPU with AVX2 and without VNNI, where mixed signs saturate."""
    emulator = shutil.which("qemu-x86_64")
    assert emulator is not None, "no qemu-x86_64: run make tools"
    return [emulator, "-cpu", "Haswell", sys.executable]
