"""How many words the FIFOs hold: few, but enough for the interval that the units' work allows, never too few to go on.

Depths are found with the cycle model, in runs each of which takes as long as words are many that streams carry. There
are no more of them than `RUNS` allows, always in the same order: a large pipeline may keep deeper FIFOs than it must.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import BadInput

from . import units
from .pipeline import Pipeline
from .token import Timing, simulate, work
from .units import Op, Stream

Words = NDArray[np.int64]

RUNS = 6_000_000
"""Words of all streams that the runs of a search may carry together."""

MOST = 512
"""Words that a FIFO holds at most which is not an arm of a fork."""

_LEVELS = (16, 64, MOST)
_SPARE = 8
_IMAGES = 3
_NAMED = 4
"""FIFOs that are too small together, at most, for which the depths that would do are looked for."""


def fit(pipeline: Pipeline, given: Mapping[str, int] | None = None) -> tuple[Pipeline, Timing]:
    """The pipeline with its FIFOs' depths, and its timing; `given` are depths that stay.

    BadInput where nothing would move for one of these, with the depth that would do.
    """
    search = _Search(pipeline, given or {})
    if search.timing.stuck:
        raise BadInput(_too_small(search.made, given or {}, search.timing.stuck))
    search.deepen()
    search.lower()
    return search.made, search.timing


class _Search:
    """A pipeline whose depths are being found; `made` is the best so far."""

    def __init__(self, pipeline: Pipeline, given: Mapping[str, int]) -> None:
        self._left = RUNS
        self._words = {n: s.words for n, s in pipeline.fifos.items()}
        self._bound = max(map(work, pipeline.ops))
        arms = _arms(pipeline)
        self._arms = [n for n in arms if n not in given]
        self._others = [n for n in pipeline.fifos if n not in given and n not in set(arms)]
        bound = held(pipeline)
        self._least = dict.fromkeys(self._others, units.DEPTH)
        self._least |= {
            n: max(units.DEPTH, min(bound[n] + _SPARE, self._whole(n))) for n in self._arms
        }
        rows = {
            n: self._least[n] + s.width * s.folds
            for n, s in pipeline.fifos.items()
            if n in self._arms
        }
        roomy = {n: min(d, self._whole(n)) for n, d in rows.items()}
        self.made = pipeline.with_depths(self._least | roomy | dict(given))
        self.timing = self._run(self.made)
        if self.timing.stuck:
            # what holds more than its way tells is not an arm alone
            self.made = self.made.with_depths({n: self._whole(n) for n in self._arms})
            self.timing = self._run(self.made)

    def _whole(self, name: str) -> int:
        """The depth at which a FIFO holds an image."""
        return max(units.DEPTH, self._words[name])

    def _run(self, pipeline: Pipeline) -> Timing:
        timing = simulate(pipeline, _IMAGES)
        # what is stuck is so soon
        images = 1 if timing.stuck else _IMAGES
        self._left -= images * sum(self._words.values())
        return timing

    def _attempt(self, depths: Mapping[str, int]) -> bool:
        """Take depths if the interval is no longer with them."""
        tried = self.made.with_depths(depths)
        timing = self._run(tried)
        if timing.stuck or timing.interval > self.timing.interval:
            return False
        self.made, self.timing = tried, timing
        return True

    def deepen(self) -> None:
        """All FIFOs deeper until the interval is that of the work, or more words are no help."""
        for depth in _LEVELS:
            free = self._arms or self._others
            if not free or self.timing.interval <= self._bound or self._left <= 0:
                break
            deeper = {n: min(depth, self._whole(n)) for n in self._others}
            if depth > _LEVELS[0]:
                deeper |= {n: self._whole(n) for n in self._arms}
            self._attempt(deeper)

    def lower(self) -> None:
        """No FIFO deeper than it ever was full; then groups of them as shallow as can be, halved where that costs."""
        names = [*self._arms, *self._others]
        peaks = {n: max(units.DEPTH, self.timing.peaks[n]) for n in names}
        # one that is never fuller does not feel its depth; one that was full may have to stay as it is
        if any(peaks[n] < self.made.fifos[n].depth for n in names) and not self._attempt(peaks):
            self._attempt({n: min(p + 1, self.made.fifos[n].depth) for n, p in peaks.items()})
        self._shrink([self._by_bits(self._arms), self._by_bits(self._others)])
        # what the arms hold at least says too much where windows on both ways hold words as well
        self._least = dict.fromkeys(names, units.DEPTH)
        self._shrink([[n] for n in self._by_bits(names)])

    def _shrink(self, groups: list[list[str]]) -> None:
        while groups and self._left > 0:
            group = [n for n in groups.pop(0) if self.made.fifos[n].depth > self._least[n]]
            if not group or self._attempt({n: self._least[n] for n in group}):
                continue
            if len(group) > 1:
                groups += [group[: len(group) // 2], group[len(group) // 2 :]]
            else:
                self._bisect(group[0])

    def _by_bits(self, names: Sequence[str]) -> list[str]:
        """The largest first."""

        def bits(name: str) -> int:
            s = self.made.fifos[name]
            return s.depth * s.word_bits

        return sorted(names, key=lambda n: (-bits(n), n))

    def _bisect(self, name: str) -> None:
        low, high = self._least[name] + 1, self.made.fifos[name].depth
        while low < high and self._left > 0:
            middle = (low + high) // 2
            if self._attempt({name: middle}):
                high = middle
            else:
                low = middle + 1


def _arms(pipeline: Pipeline) -> list[str]:
    """The FIFOs behind forks: one holds what its way is shorter than another."""
    return [s.name for op in pipeline.ops if isinstance(op, units.Fork) for s in op.outputs]


def held(pipeline: Pipeline) -> dict[str, int]:
    """Words that each arm of a fork holds at least before the arms meet again, where the units take no time.

    That is how many more words of the fork the other arms need for the same word of the unit where they meet.
    """
    most: dict[str, int] = {}
    for at, fork in enumerate(pipeline.ops):
        if not isinstance(fork, units.Fork):
            continue
        # by stream: words of the fork that each of its words needs, and the arms on which it depends
        needs: dict[str, tuple[Words, frozenset[str]]] = {
            s.name: (np.arange(1, s.words + 1), frozenset([s.name])) for s in fork.outputs
        }
        most |= dict.fromkeys((s.name for s in fork.outputs), 0)
        for op in pipeline.ops[at + 1 :]:
            known = [(s, *needs[s.name]) for s in op.inputs if s.name in needs]
            if not known:
                continue
            made = [(_needed(op, s, need), arms) for s, need, arms in known]
            worst = np.maximum.reduce([need for need, _ in made])
            for need, arms in made:
                # what another arm needs more waits here, but for what this input has given for the word before
                ahead = worst - np.concatenate([[0], need[:-1]])
                waits = int(ahead[worst > need].max(initial=0))
                for arm in arms:
                    most[arm] = max(most[arm], waits)
            every = frozenset().union(*(arms for _, arms in made))
            needs |= {s.name: (worst, every) for s in op.outputs}
            if len(every) == len(fork.outputs):
                break
    return most


def _needed(op: Op, s: Stream, need: Words) -> Words:
    """Words of the fork for each output word of a unit, by those for each word of one of its inputs."""
    y = op.output
    match op:
        case units.Window():
            source = np.maximum.accumulate(np.where(op.sources < 0, 0, op.sources))
            return need[source]
        case units.Softmax():
            last = (np.arange(y.words) // y.channels + 1) * y.channels - 1
        case units.MatrixVector() if s.name == op.inputs[0].name:
            last = (np.arange(y.words) // y.folds + 1) * (s.words // y.pixels) - 1
        case units.GlobalSum() if s.name == op.inputs[0].name:
            last = np.arange(y.words) + s.words - y.words
        case units.Concat():
            last = np.minimum((np.arange(y.words) // y.folds + 1) * s.folds, s.words) - 1
        case units.ChannelPad():
            before, read, after = op.runs
            pixel, at = np.divmod(np.arange(y.words), before + read + after)
            last = np.maximum(pixel * read + np.clip(at - before + 1, 0, read) - 1, 0)
        case _:
            # word for word, or several for one
            last = -(-(np.arange(1, y.words + 1) * s.words) // y.words) - 1
    return need[last]


def _too_small(made: Pipeline, given: Mapping[str, int], stuck: Sequence[str]) -> str:
    """Which of the given depths stops a pipeline, and how deep its FIFO must be for all to move."""
    full = [n for n in stuck if n in given]
    for names in (*([n] for n in full), full, list(given)):
        roomy = made.with_depths({n: max(units.DEPTH, made.fifos[n].words) for n in names})
        if simulate(roomy, 1).stuck:
            continue
        if len(names) > _NAMED:
            some = ", ".join(full[:_NAMED])
            return (
                f"with the folding's FIFO depths nothing moves any more: {some} and others are too small;"
                " leave them out of fifos to have them sized"
            )
        # the first image shows the depth: all later ones come behind it
        wanted = {n: _least(roomy, n, given[n]) for n in names}
        said = " and ".join(
            f"{n} needs {d} words, not {given[n]}" for n, d in wanted.items() if d > given[n]
        )
        return f"with the folding's FIFO depths nothing moves any more: {said}"
    return f"nothing moves in this design any more: {', '.join(stuck)} are full"


def _least(roomy: Pipeline, name: str, low: int) -> int:
    """The smallest depth of one FIFO with which all moves."""
    high = roomy.fifos[name].depth
    while low < high:
        middle = (low + high) // 2
        if simulate(roomy.with_depths({name: middle}), 2).stuck:
            low = middle + 1
        else:
            high = middle
    return high
