from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.memory import Task, max_live, order, plan

ALIGN = 16
Case = tuple[list[Task], dict[str, int]]


@st.composite
def cases(draw: st.DrawFn, most: int = 12) -> Case:
    """Kernel calls in a legal order, buffers of few sizes so that they may be taken over, some without a size."""
    names = ["in0", "in1"]
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, most))):
        reads = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)))
        reuse = tuple(r for r in reads if draw(st.booleans()))
        tasks.append(Task(reads, f"b{i}", draw(st.sampled_from([0, 0, 1, 100])), reuse))
        names.append(f"b{i}")
    sizes = {n: draw(st.sampled_from([1, 16, 17, 64, 64, 64, 1000])) for n in names}
    for outside in draw(st.lists(st.sampled_from(names), max_size=2)):
        sizes.pop(outside, None)
    return tasks, sizes


def alive(tasks: list[Task], at: int) -> set[str]:
    """The buffers whose bytes matter while task `at` runs, found by looking at every task."""
    written = {t.writes: i for i, t in enumerate(tasks)}
    needed = {tasks[at].writes}
    for i, task in enumerate(tasks):
        needed |= {r for r in task.reads if written.get(r, -1) <= at <= i}
    return needed


@settings(deadline=None, derandomize=True, max_examples=120)
@given(cases())
def test_no_two_live_buffers_overlap(case: Case) -> None:
    tasks, sizes = case
    made = plan(tasks, sizes, ALIGN)
    assert made.offsets.keys() == sizes.keys() & {n for t in tasks for n in (*t.reads, t.writes)}
    for at, task in enumerate(tasks):
        spans = [
            (made.offsets[n], made.offsets[n] + sizes[n], n) for n in alive(tasks, at) if n in sizes
        ]
        if task.scratch:
            spans.append((made.scratch[at], made.scratch[at] + task.scratch, "scratch"))
        for start, end, name in spans:
            assert start % ALIGN == 0
            assert end <= made.peak
            for other_start, other_end, other in spans:
                handed_over = made.taken.get(name) == other or made.taken.get(other) == name
                if name != other and not (handed_over and task.writes in (name, other)):
                    assert end <= other_start or other_end <= start, (at, name, other)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(cases())
def test_only_a_dying_operand_of_the_same_size_is_taken_over(case: Case) -> None:
    tasks, sizes = case
    made = plan(tasks, sizes, ALIGN)
    for result, operand in made.taken.items():
        at = next(i for i, t in enumerate(tasks) if t.writes == result)
        assert operand in tasks[at].reuse
        assert sizes[operand] == sizes[result]
        assert made.offsets[operand] == made.offsets[result]
        assert all(operand not in t.reads for t in tasks[at + 1 :])
    assert len(set(made.taken.values())) == len(made.taken)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(cases())
def test_peak_is_at_least_what_lives_at_once(case: Case) -> None:
    tasks, sizes = case
    made = plan(tasks, sizes, ALIGN)
    least = 0
    for at, task in enumerate(tasks):
        homes = {n for n in alive(tasks, at) if n in sizes}
        homes -= {made.taken[task.writes]} if task.writes in made.taken else set()
        rounded = [-(-sizes[n] // ALIGN) * ALIGN for n in homes] + [
            -(-task.scratch // ALIGN) * ALIGN
        ]
        least = max(least, sum(rounded))
    assert max_live(tasks, sizes, ALIGN) == least
    assert least <= made.peak <= sum(sizes.values()) + sum(t.scratch + 2 * ALIGN for t in tasks) * 2


def legal(tasks: list[Task], candidate: tuple[int, ...]) -> bool:
    place = {tasks[i].writes: at for at, i in enumerate(candidate)}
    return all(place.get(r, -1) < at for at, i in enumerate(candidate) for r in tasks[i].reads)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(cases())
def test_order_is_legal_and_never_worse(case: Case) -> None:
    tasks, sizes = case
    found = order(tasks, sizes, ALIGN)
    assert sorted(found) == list(range(len(tasks)))
    assert legal(tasks, tuple(found))
    assert max_live([tasks[i] for i in found], sizes, ALIGN) <= max_live(tasks, sizes, ALIGN)
    assert order(tasks, sizes, ALIGN) == found


@settings(deadline=None, derandomize=True, max_examples=50)
@given(cases(most=4))
def test_order_of_a_small_graph_is_the_best_there_is(case: Case) -> None:
    tasks, sizes = case
    best = min(
        max_live([tasks[i] for i in p], sizes, ALIGN)
        for p in permutations(range(len(tasks)))
        if legal(tasks, p)
    )
    assert max_live([tasks[i] for i in order(tasks, sizes, ALIGN)], sizes, ALIGN) == best


def test_branches_run_one_after_the_other() -> None:
    """Two wide values that shrink to small ones: never both wide ones at once."""
    tasks = [
        Task(("x",), "wide a"),
        Task(("x",), "wide b"),
        Task(("wide a",), "small a"),
        Task(("wide b",), "small b"),
        Task(("small a", "small b"), "y"),
    ]
    sizes = {"wide a": 1024, "wide b": 1024, "small a": 16, "small b": 16, "y": 16}
    assert plan(tasks, sizes).peak == 2048 + 16
    assert plan([tasks[i] for i in order(tasks, sizes)], sizes).peak == 1024 + 32


def test_a_chain_needs_two_buffers_and_in_place_one() -> None:
    sizes = {f"b{i}": 64 for i in range(6)}
    chain = [Task((f"b{i}",), f"b{i + 1}") for i in range(5)]
    assert plan(chain, sizes).peak == 128
    assert plan([Task(t.reads, t.writes, reuse=t.reads) for t in chain], sizes).peak == 64
