"""A pipeline as a folder of HLS C++: Vitis-style sources, a test bench that fails, build files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qcompile.ir import Array
from qcompile.targets.c.text import layout, render

from .cplusplus_layers import comment, layer, word
from .pipeline import Pipeline
from .units import Fork, Stream

HERE = Path(__file__).parent
_COPIED = {
    "qc_kernels.h": "firmware/qc_kernels.h",
    "qc_words.h": "firmware/qc_words.h",
    "shim/ap_int.h": "shim/ap_int.h",
    "shim/hls_stream.h": "shim/hls_stream.h",
}
PART, CLOCK_NS = "xc7z020clg400-1", 10.0
"""What project.tcl says where nothing else is known."""


def emit(
    pipeline: Pipeline,
    name: str,
    vectors: Sequence[Mapping[str, Array]],
    part: str = PART,
    clock_ns: float = CLOCK_NS,
) -> dict[str, bytes]:
    """The files of the folder hls/, whose test bench compares with what the pipeline gives for `vectors`.

    `name` is an identifier: the top function, its files and its namespace. Every vector holds any number of rows.
    `part` and `clock_ns` are for project.tcl.
    """
    inputs = [p.stream for p in pipeline.inputs]
    outputs = [p.stream for p in pipeline.outputs]
    arguments = {s.name: f"in{i}" for i, s in enumerate(inputs)}
    arguments |= {s.name: f"out{i}" for i, s in enumerate(outputs)}
    layers = [layer(op, arguments) for op in pipeline.ops]
    facts = {
        "name": name,
        "NAME": name.upper(),
        "model": comment(pipeline.name),
        "inputs": [_port(s, arguments[s.name]) for s in inputs],
        "outputs": [_port(s, arguments[s.name]) for s in outputs],
        "ports": [
            (arguments[p.stream.name], comment(p.name), _words_of(p.stream), p)
            for p in (*pipeline.inputs, *pipeline.outputs)
        ],
        "fifos": [
            {
                "name": n,
                "type": f"{n}_t",
                "word": word(s),
                "depth": _depth(pipeline, s),
                "comment": _words_of(s),
            }
            for n, s in pipeline.fifos.items()
        ],
        "layers": [
            {
                "name": made.name,
                "config": made.config,
                "call": made.call,
                "traced": [arguments.get(s.name, s.name) for s in op.outputs],
                "weights": bool(made.tables),
            }
            for op, made in zip(pipeline.ops, layers, strict=True)
        ],
        "arguments": ", ".join(arguments.values()),
        "part": part,
        "clock": f"{clock_ns:g}",
    }
    texts = {
        f"firmware/{name}.cpp": "top.cpp.j2",
        f"firmware/{name}.h": "top.h.j2",
        "firmware/defines.h": "defines.h.j2",
        "firmware/parameters.h": "parameters.h.j2",
        f"{name}_test.cpp": "test.cpp.j2",
        f"{name}_run.cpp": "run.cpp.j2",
    }
    plain = {
        "project.tcl": "project.tcl.j2",
        "build_prj.tcl": "build_prj.tcl.j2",
        "Makefile": "hls.mk.j2",
        "README.md": "hls.md.j2",
    }
    files = {path: layout(render(t, HERE, **facts)).encode() for path, t in texts.items()}
    files |= {path: render(t, HERE, **facts).encode() for path, t in plain.items()}
    files |= {path: (HERE / source).read_bytes() for source, path in _COPIED.items()}
    for made in layers:
        if made.tables:
            text = render("weights_header.j2", HERE, net=name, name=made.name, tables=made.tables)
            files[f"firmware/weights/{made.name}.h"] = text.encode()
    return files | _vectors(pipeline, arguments, vectors)


def _depth(pipeline: Pipeline, s: Stream) -> int:
    """The words of a FIFO in the C++, whose windows take rows ahead of need: an arm of a fork holds an image.

    Then no arm stops its fork before the units where the arms meet have all of the image.
    """
    behind = {arm.name for op in pipeline.ops if isinstance(op, Fork) for arm in op.outputs}
    return max(s.depth, s.words) if s.name in behind else s.depth


def _vectors(
    pipeline: Pipeline, arguments: Mapping[str, str], vectors: Sequence[Mapping[str, Array]]
) -> dict[str, bytes]:
    """The words of every port, image after image, in hexadecimal digits."""
    ports = [p.stream for p in (*pipeline.inputs, *pipeline.outputs)]
    lines: dict[str, list[str]] = {s.name: [] for s in ports}
    for codes in vectors:
        for i in range(len(codes[pipeline.inputs[0].name])):
            env = pipeline.trace({p.name: codes[p.name][i] for p in pipeline.inputs})
            for s in ports:
                digits = -(-s.word_bits // 4)
                lines[s.name] += [f"{w:0{digits}x}" for w in s.pack(env[s.name])]
    return {
        f"tb_data/{arguments[n]}.dat": ("\n".join(rows) + "\n").encode()
        for n, rows in lines.items()
    }


def _words_of(s: Stream) -> str:
    kind = f"{'' if s.signed else 'u'}int{s.bits}"
    return f"{s.words} words of {s.lanes} {kind}"


def _port(s: Stream, argument: str) -> Mapping[str, object]:
    return {
        "name": argument,
        "type": f"{argument}_t",
        "word": word(s),
        "words": s.words,
        "comment": _words_of(s),
    }
