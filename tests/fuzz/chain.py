"""A network through the whole chain: float model, integer graph, C that equals it; or a refusal in a sentence."""

from __future__ import annotations

import os
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompile import border, driver, pipeline
from qcompile.data import InputSpec
from qcompile.errors import BadInput, Unsupported
from qcompile.ir import Graph
from qcompile.job import Job
from qcompile.onnx import frontend
from qcompile.onnx.simplify import simplify
from qcompile.options import Options
from tests.fuzz.networks import Network
from tests.fuzz.readers import sentence
from tests.native import check
from tests.oracle import build, execute

Array = NDArray[np.generic]


def compiled(network: Network) -> Graph | str:
    """The integer graph, or the sentence that refuses the network; anything else is raised."""
    context = pipeline.Context(resumable=False)
    try:
        job = Job.checked(
            network.model, "x86", network.recipe, None, {}, Options(jobs=1).but(network.options)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with patch.object(frontend, "_simplify_elsewhere", simplify):
                side = driver.prepare(job, context)
            samples = [_fitting(network.samples, driver.specs(side.model))]
        data = driver.open_samples(job, side, samples, context)
        driver.calibrate(job, side, data, context)
        return driver.to_integers(job, side).graph
    except (BadInput, Unsupported) as e:
        return sentence(e)


def _fitting(samples: Mapping[str, Array], inputs: Sequence[InputSpec]) -> dict[str, Array]:
    """The samples in the shapes the model has after import, which may have a batch axis of its own."""
    made = {}
    for spec in inputs:
        given = samples[spec.name]
        rest = tuple(n for n in spec.shape[1:] if isinstance(n, int))
        fits = given.ndim == len(spec.shape) and given.shape[1:] == rest
        made[spec.name] = given if fits else np.resize(given, (spec.shape[0] or 1, *rest))
    rows = min(map(len, made.values()))
    return {name: a[:rows] for name, a in made.items()}


def agrees(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    weights: Mapping[str, object] | None = None,
    outputs: Sequence[str] = ("y",),
    recipe: str = "fast",
    share: float = 0.03,
    options: Mapping[str, str] | None = None,
) -> None:
    """Every output of the integer graph is within a share of its range of what onnxruntime makes of the model."""
    rng = np.random.default_rng(0)
    model = build(nodes, inputs, {k: np.asarray(v) for k, v in (weights or {}).items()}, outputs)
    samples = {
        n: rng.normal(size=[d if isinstance(d, int) else 2 for d in shape]).astype(np.float32)
        for n, shape in inputs.items()
    }
    graph = compiled(Network(model, samples, recipe, dict(options or {}), ()))
    assert isinstance(graph, Graph), graph
    ranked = {p.name: v.type.shape for p, v in graph.inputs}
    fed = {n: a if a.ndim == len(ranked[n]) else a[None] for n, a in samples.items()}
    results = border.decode(graph, graph.run(border.encode(graph, fed)))
    for name, wanted in zip(outputs, execute(model, samples), strict=True):
        got = results[name].reshape(wanted.shape)
        worst = np.abs(got - wanted).max(initial=0.0)
        assert worst <= share * (float(np.ptp(wanted)) or 1e-3), f"{name} is off by {worst}"


def equal_in_c(graphs: Sequence[Graph]) -> None:
    """AssertionError unless the portable C of every graph gives all its values, sanitizers quiet."""
    with tempfile.TemporaryDirectory() as folder:
        check(graphs, Path(folder))


def whole(network: Network) -> str | None:
    """Compile to a folder as a user does, everything verified; the sentence of a refusal."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with warnings.catch_warnings(), patch.object(frontend, "_simplify_elsewhere", simplify):
                warnings.simplefilter("ignore")
                driver.compile(
                    network.model, "x86", None, network.recipe, Path(folder) / "out", **network.options
                )  # fmt: skip
        except (BadInput, Unsupported) as e:
            return sentence(e)
    return None


def forked(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What the front end's own process does, in a copy of this one, which need not import anything first."""
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            try:
                made, code = simplify(proto).SerializeToString(), 0
            except (BadInput, Unsupported) as e:
                made, code = str(e).encode(), e.exit_code
            except BaseException:
                made, code = traceback.format_exc().encode(), 1
            answer.write(made)
            answer.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        answer.seek(0)
        said = answer.read()
    match os.waitstatus_to_exitcode(status):
        case 0:
            return onnx.load_model_from_string(said)
        case BadInput.exit_code:
            raise BadInput(said.decode())
        case Unsupported.exit_code:
            raise Unsupported(said.decode())
        case 1:
            raise AssertionError(said.decode())
        case code:
            raise BadInput(f"the model crashes the ONNX libraries (code {code})")


def damaged(model: bytes, *, as_users_do: bool) -> str | None:
    """A model that may be anything, through the front end to C; the sentence of a refusal."""
    context = pipeline.Context(resumable=False)
    elsewhere = frontend._simplify_elsewhere if as_users_do else forked
    try:
        job = Job.checked(model, "x86", "fast", None, {"N": 2}, Options(jobs=1, samples=2))
        with (
            warnings.catch_warnings(),
            patch.object(frontend, "_simplify_elsewhere", elsewhere),
        ):
            warnings.simplefilter("ignore")
            graph = driver.build(job, None, context).integerized.graph
    except (BadInput, Unsupported) as e:
        return sentence(e)
    graph.verify()
    return None
