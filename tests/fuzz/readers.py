"""Readers of files that nobody vouches for, fed with bytes: what comes out is a result or a documented error."""

from __future__ import annotations

import contextlib
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx

from qcompile import data, driver, foreign, npz, recipe
from qcompile import plan as plans
from qcompile.errors import BadInput, Unsupported
from qcompile.ir import text
from qcompile.onnx import frontend, reader
from qcompile.targets.hls.folding import Folding
from tests.fuzz import mutate, seeds

DOCUMENTED = (BadInput, Unsupported)
"""What a file may be refused with: exit codes 2 and 3."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """A documented refusal, in a sentence, is fine; anything else goes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DOCUMENTED as e:
        sentence(e)


def sentence(error: Exception) -> str:
    """What a refusal says, which must be something that a terminal can print."""
    said = str(error)
    said.encode()
    assert said.strip(), "a refusal says nothing"
    return said


class _Elsewhere(Exception):
    """The model has come as far as the ONNX libraries."""


def model(content: bytes) -> None:
    """The front end up to the ONNX libraries, which work in a process of their own; and models quantized already."""
    with refusals():
        foreign.open(reader.read(content, foreign.DOMAINS))
    with (
        refusals(),
        contextlib.suppress(_Elsewhere),
        patch.object(frontend, "_simplify_elsewhere", _stop),
    ):
        frontend.load(content, input_dims={"N": 2}, warn=lambda sentence: None)


def _stop(proto: onnx.ModelProto) -> onnx.ModelProto:
    raise _Elsewhere


def npy(content: bytes) -> None:
    """One array as samples of an input."""
    _samples("data.npy", content)


def npz_(content: bytes) -> None:
    """Several arrays, some of them samples."""
    _samples("data.npz", content)


_INPUTS = [data.InputSpec("x", (None, 3, 4, 4), np.dtype(np.float32))]


def _samples(name: str, content: bytes) -> None:
    file = _folder() / name
    file.write_bytes(content)
    with refusals():
        for array in npz.open_arrays(file).values():
            if array.nbytes <= 1 << 20:
                array.whole()
                for _ in array.blocks(np.arange(array.shape[0] if array.shape else 0), 3):
                    pass
    with refusals():
        read_samples(file)


def read_samples(source: Path) -> None:
    found = data.open_data(source, _INPUTS, samples=100)
    for batch in found:
        for array in batch.values():
            assert array.dtype == np.float32
            assert array.shape[1:] == (3, 4, 4)
            assert np.all(np.isfinite(array))


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


@cache
def _beside() -> Path:
    return seeds.calibration()


def description(content: bytes) -> None:
    """A description of a data set, and the data as it says."""
    file = _beside() / "data.toml"
    file.write_bytes(content)
    with refusals():
        read_samples(file)


def recipe_(content: bytes) -> None:
    """A recipe, and the passes it names."""
    file = _folder() / "recipe.toml"
    file.write_bytes(content)
    with refusals():
        parsed = recipe.load(file)
        job = replace(seeds.prepared()[0], recipe=parsed)
        for step in parsed.steps:
            driver.passes(job, [s for s in step.variants if s is not None])


def plan(content: bytes) -> None:
    """A saved plan, taken over by a model and made an integer graph."""
    job, side, _ = seeds.prepared()
    file = _folder() / "plan.toml"
    file.write_bytes(content)
    with refusals():
        saved = plans.read(file)
        assert plans.parse(plans.dump(saved)) == saved
        fresh = replace(side, model=side.model.clone(), plan=side.plan.copy())
        fresh.plan.quantizers.clear()
        fresh.plan.biases.clear()
        driver._adopt(fresh, file)
        driver.to_integers(job, fresh)


def encodings(content: bytes) -> None:
    """AIMET's encodings of a network."""
    with refusals():
        foreign.encodings(content, _network())


@cache
def _network() -> onnx.ModelProto:
    return seeds.network()


@cache
def _constants() -> dict:
    job, side, _ = seeds.prepared()
    return text.constants(driver.to_integers(job, side).graph)


def graph(content: bytes) -> None:
    """The text of an integer graph; what is read writes and reads back the same."""
    with refusals():
        try:
            words = content.decode()
        except UnicodeDecodeError:
            return
        made = text.dump(text.parse(words, _constants()))
        assert text.dump(text.parse(made, _constants())) == made


def folding(content: bytes) -> None:
    """The folding of a design."""
    with refusals():
        try:
            words = content.decode()
        except UnicodeDecodeError:
            return
        made = Folding.loads(words).dumps()
        assert Folding.loads(made).dumps() == made


TARGETS: dict[str, Callable[[bytes], None]] = {
    "model": model, "npy": npy, "npz": npz_, "description": description, "recipe": recipe_, "plan": plan,
    "encodings": encodings, "graph": graph, "folding": folding,
}  # fmt: skip


def mutated(kind: str, content: bytes, rng: random.Random) -> bytes:
    """The content changed so that it stays of its kind."""
    match kind:
        case "model":
            proto = onnx.ModelProto()
            try:
                proto.ParseFromString(content)
                return mutate.message(proto, rng, rng.randint(1, 4)).SerializeToString()
            except Exception:
                return mutate.damaged(content, rng)
        case "npy":
            return mutate.array(content, rng)
        case "npz":
            return mutate.archive(content, rng)
        case _:
            return mutate.text(content, rng)
