from __future__ import annotations

from itertools import permutations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.memory import Plan, Task, max_live, order, plan

ALIGN = 16
Case = tuple[list[Task], dict[str, int]]
Tied = dict[str, tuple[str, int]]


@st.composite
def cases(draw: st.DrawFn, most: int = 12) -> Case:
    """Kernel calls in a legal order, buffers of few sizes so that they may be taken over, some without a size."""
    names = ["in0", "in1"]
    tasks: list[Task] = []
    for i in range(draw(st.integers(1, most))):
        reads = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)))
        reuse = tuple(r for r in reads if draw(st.booleans()))
        trails = tuple(
            (r, draw(st.sampled_from([0, 5, 48, 2000]))) for r in reads if draw(st.booleans())
        )
        scratch = draw(st.sampled_from([0, 0, 1, 100]))
        tasks.append(Task(reads, f"b{i}", scratch, reuse, trails))
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


def dies(tasks: list[Task], at: int, name: str) -> bool:
    return all(name not in t.reads for t in tasks[at + 1 :])


def check(tasks: list[Task], sizes: dict[str, int], made: Plan, tied: Tied) -> None:
    """Whatever lives at once is apart, but for a result and an operand of its task that allows it."""
    assert made.offsets.keys() == sizes.keys() & {n for t in tasks for n in (*t.reads, t.writes)}
    for at, task in enumerate(tasks):
        spans = {n: (made.offsets[n], sizes[n]) for n in alive(tasks, at) if n in sizes}
        if task.scratch:
            spans["scratch"] = (made.scratch[at], task.scratch)
        for name, (start, size) in spans.items():
            assert start % ALIGN == 0 or name in tied
            assert 0 <= start <= start + size <= made.peak
            for other, (other_start, other_size) in spans.items():
                if (
                    name >= other
                    or start + size <= other_start
                    or other_start + other_size <= start
                ):
                    continue
                operand = name if task.writes == other else other
                gap = made.offsets[operand] - made.offsets[task.writes]
                assert task.writes in (name, other), (at, name, other)
                assert dies(tasks, at, operand), (at, name, other)
                taken = operand in task.reuse and sizes[operand] == sizes[task.writes] and gap == 0
                trails = [d for n, d in task.trails if n == operand]
                assert taken or gap >= max(0, trails[0]), (at, name, other, gap)
                assert taken == (made.taken.get(task.writes) == operand)
                assert taken or (task.writes, operand) in made.crossed


@settings(deadline=None, derandomize=True, max_examples=100)
@given(cases())
def test_no_two_live_buffers_overlap_without_leave(case: Case) -> None:
    tasks, sizes = case
    check(tasks, sizes, plan(tasks, sizes, ALIGN), {})


@st.composite
def ties(draw: st.DrawFn) -> tuple[list[Task], dict[str, int], Tied]:
    """Cases in which several results are parts of one value, at offsets that are not aligned."""
    tasks, sizes = draw(cases())
    made = [t.writes for t in tasks if t.writes in sizes]
    tied: Tied = {}
    for tie in range(draw(st.integers(0, 2))):
        free = [n for n in made if n not in tied]
        parts = draw(st.lists(st.sampled_from(free), max_size=4, unique=True)) if free else []
        at = draw(st.integers(0, 20))
        for name in parts:
            tied[name] = (f"tie{tie}", at)
            at += sizes[name] + draw(st.sampled_from([0, 0, 3]))
    return tasks, sizes, tied


@settings(deadline=None, derandomize=True, max_examples=60)
@given(ties())
def test_what_is_tied_keeps_its_distances(case: tuple[list[Task], dict[str, int], Tied]) -> None:
    tasks, sizes, tied = case
    made = plan(tasks, sizes, ALIGN, tied)
    check(tasks, sizes, made, tied)
    starts: dict[str, set[int]] = {}
    for name, (tie, offset) in tied.items():
        starts.setdefault(tie, set()).add(made.offsets[name] - offset)
    assert all(len(s) == 1 and s.pop() % ALIGN == 0 for s in starts.values())
    assert max_live(tasks, sizes, ALIGN, tied) <= made.peak


@settings(deadline=None, derandomize=True, max_examples=60)
@given(cases())
def test_pairs_that_share_are_named(case: Case) -> None:
    tasks, sizes = case
    made = plan(tasks, sizes, ALIGN)
    for result, operand in [*made.taken.items(), *made.crossed]:
        at = next(i for i, t in enumerate(tasks) if t.writes == result)
        assert dies(tasks, at, operand)
        gap = made.offsets[operand] - made.offsets[result]
        if made.taken.get(result) == operand:
            assert operand in tasks[at].reuse
            assert gap == 0
            assert sizes[operand] == sizes[result]
        else:
            assert dict(tasks[at].trails)[operand] <= gap < sizes[result]
    assert len(set(made.taken.values())) == len(made.taken)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(cases())
def test_peak_is_at_least_what_lives_at_once(case: Case) -> None:
    """Without leave to overlap, what lives at once is the sum of it."""
    tasks, sizes = [Task(t.reads, t.writes, t.scratch, t.reuse) for t in case[0]], case[1]
    made = plan(tasks, sizes, ALIGN)
    least = 0
    for at, task in enumerate(tasks):
        homes = {n for n in alive(tasks, at) if n in sizes}
        shared = [
            n
            for n in task.reuse
            if dies(tasks, at, n) and sizes.get(n) == sizes.get(task.writes, -1)
        ]
        homes -= set(shared[:1])
        rounded = [-(-sizes[n] // ALIGN) * ALIGN for n in homes]
        least = max(least, sum(rounded) + -(-task.scratch // ALIGN) * ALIGN)
    assert max_live(tasks, sizes, ALIGN) == least
    assert least <= made.peak <= sum(sizes.values()) + sum(t.scratch + 2 * ALIGN for t in tasks) * 2


@settings(deadline=None, derandomize=True, max_examples=60)
@given(cases())
def test_leave_to_overlap_never_costs(case: Case) -> None:
    tasks, sizes = case
    strict = [Task(t.reads, t.writes, t.scratch) for t in tasks]
    assert plan(tasks, sizes, ALIGN).peak <= plan(strict, sizes, ALIGN).peak
    assert max_live(tasks, sizes, ALIGN) <= max_live(strict, sizes, ALIGN)
    assert max_live(tasks, sizes, ALIGN) <= plan(tasks, sizes, ALIGN).peak


def permitted(tasks: list[Task], sizes: dict[str, int], offsets: dict[str, int]) -> bool:
    """By the definition of a task, pair by pair."""
    for at, task in enumerate(tasks):
        homes = sorted(n for n in alive(tasks, at) if n in sizes)
        for a, b in product(homes, homes):
            if a >= b or offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]:
                continue
            if task.writes not in (a, b):
                return False
            operand = b if task.writes == a else a
            gap = offsets[operand] - offsets[task.writes]
            same = operand in task.reuse and sizes[operand] == sizes[task.writes] and gap == 0
            after = any(n == operand and gap >= max(0, d) for n, d in task.trails)
            if not dies(tasks, at, operand) or not (same or after):
                return False
    return True


@st.composite
def tiny(draw: st.DrawFn) -> Case:
    names, tasks = ["in"], []
    for i in range(draw(st.integers(2, 4))):
        reads = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)))
        reuse = tuple(r for r in reads if draw(st.integers(0, 3)) == 0)
        trails = tuple((r, draw(st.integers(0, 3))) for r in reads if draw(st.booleans()))
        tasks.append(Task(reads, f"b{i}", 0, reuse, trails))
        names.append(f"b{i}")
    return tasks, {n: draw(st.integers(1, 3)) for n in names[1:]}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(tiny())
def test_a_plan_of_few_buffers_is_the_best_there_is(case: Case) -> None:
    tasks, sizes = case
    names = list(sizes)
    made = plan(tasks, sizes, 1)
    assert permitted(tasks, sizes, dict(made.offsets))
    for peak in range(made.peak):
        room = [range(peak - sizes[n] + 1) for n in names]
        for places in product(*room):
            assert not permitted(tasks, sizes, dict(zip(names, places, strict=True))), peak


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


def test_a_chain_slides_down_by_its_distances() -> None:
    """Every result begins a little before its operand; going back up would cost a whole buffer."""
    sizes = {f"b{i}": 1000 for i in range(1, 6)}
    chain = [Task((f"b{i}",), f"b{i + 1}", trails=((f"b{i}", 64),)) for i in range(5)]
    made = plan(chain, sizes)
    assert made.peak == 1008 + 4 * 64
    assert len(made.crossed) == 4
    assert max_live(chain, sizes, 16) == 1008 + 64


def test_one_buffer_is_preferred_to_two_that_share() -> None:
    chain = [
        Task((f"b{i}",), f"b{i + 1}", reuse=(f"b{i}",), trails=((f"b{i}", 0),)) for i in range(4)
    ]
    made = plan(chain, {f"b{i}": 64 for i in range(5)})
    assert made.peak == 64
    assert len(made.taken) == 4
    assert not made.crossed


def test_parts_are_made_where_they_belong() -> None:
    """While the first part is made, the memory of the last one is free."""
    tasks = [
        Task(("x",), "wide 0"),
        Task(("wide 0",), "part 0"),
        Task(("x",), "wide 1"),
        Task(("wide 1",), "part 1"),
        Task(("part 0", "part 1"), "y"),
    ]
    sizes = {"wide 0": 100, "wide 1": 60, "part 0": 20, "part 1": 52}
    made = plan(tasks, sizes, 16, {"part 0": ("whole", 0), "part 1": ("whole", 20)})
    assert made.offsets["part 1"] == made.offsets["part 0"] + 20
    assert made.peak == 80 + 64
