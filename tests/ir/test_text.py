"""The text form: a round trip for any graph and name, and a sentence for anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import BadInput
from qcompile.ir import DType, Graph, Lut, Mul, Port, TensorType
from qcompile.ir.text import constants, digest, dump, parse
from tests.strategies import OPERATORS, feeds, graphs, singles

I8 = DType.I8

HOSTILE = [
    '*/ #include "x"',
    "<script>alert(1)</script>",
    'a"b',
    "a\\",
    '\\"',
    "line\nbreak",
    "\r\n  return %x",
    "\u2028\x85\x0b\x0c\x1c",
    "q (%x) # ",
    'q (%x) # "y"',
    ") # ",
    "(",
    "",
    " ",
    "%",
    "@",
    "x: int8[1] = const [1]",
    "ż÷🙂",
    "\ud800",
    "__import__('os')",
    "$(rm -rf ~)",
]
NAMES = st.sampled_from(HOSTILE) | st.text(max_size=12) | st.sampled_from(["x", "y", "x.2", "a/b"])


@st.composite
def renamed(draw: st.DrawFn) -> Graph:
    """A random graph whose values, layers and ports have hostile names."""
    graph = draw(graphs(most=5))
    graph.name = draw(NAMES)
    taken: set[str] = set()

    def fresh() -> str:
        name = draw(NAMES)
        while name in taken:
            name += "'"
        taken.add(name)
        return name

    for v in (*graph.values(), *graph.constants()):
        v.name = fresh()
    for node in graph.nodes:
        node.name = draw(NAMES)
    scale, zero = st.floats(1e-30, 1e30), st.integers(-128, 127)
    graph.inputs = [(Port(fresh(), draw(scale), draw(zero)), v) for _, v in graph.inputs]
    graph.outputs = [(Port(fresh(), draw(scale), draw(zero)), v) for _, v in graph.outputs]
    return graph


def structure(graph: Graph) -> object:
    """All that a graph is, without identities."""
    return (
        graph.name,
        graph.free_batch,
        [(port, v.name, v.type) for port, v in graph.inputs],
        [(c.name, c.type, c.constant.dtype, c.constant.tolist()) for c in graph.constants()],
        [
            (n.op, [v.name for v in n.inputs], n.output.name, n.output.type, n.name)
            for n in graph.nodes
        ],
        [(port, v.name) for port, v in graph.outputs],
    )


def check_round_trip(graph: Graph) -> None:
    text = str(graph)
    again = parse(text, constants(graph))
    assert structure(again) == structure(graph)
    assert dump(again) == text
    assert text.isascii()
    for codes in feeds(graph, 0, count=2):
        got, want = again.run(codes), graph.run(codes)
        assert list(got) == list(want)
        assert all(np.array_equal(got[name], want[name]) for name in want)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(renamed())
def test_reading_what_was_written_gives_the_graph_again(graph: Graph) -> None:
    graph.verify()
    check_round_trip(graph)
    ports, constants_ = [*graph.inputs, *graph.outputs], list(graph.constants())
    assert len(str(graph).splitlines()) == 1 + len(ports) + len(constants_) + len(graph.nodes)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_with_any_attributes_comes_back(operator: str) -> None:
    @settings(deadline=None, derandomize=True, max_examples=10)
    @given(singles(operator))
    def check(graph: Graph) -> None:
        check_round_trip(graph)

    check()


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_come_back_unchanged(name: str) -> None:
    graph = Graph(name)
    x = graph.add_input(Port(name, 0.5, 1), TensorType(I8, (1, 4)))
    c = graph.constant(np.zeros((256,), np.int8), TensorType(I8, (256,)), name)
    y = graph.add(Lut(), x, c, name=name, layer=name)
    graph.add_output(Port(name, 0.5, 1), y)
    again = parse(str(graph), constants(graph))
    assert structure(again) == structure(graph)
    assert (again.name, again.inputs[0][0].name, again.nodes[0].name) == (name, name, name)


def test_a_value_may_be_called_otherwise_than_its_port() -> None:
    graph = Graph("late")
    c = graph.constant(np.array([[1, 2]], np.int8), TensorType(I8, (1, 2)), "x")
    x = graph.add_input(Port("x", 1.0, 0), TensorType(I8, (1, 2)))
    graph.add_output(Port("y", 1.0, 0), graph.add(Mul(0, 0), x, c, name="y"))
    assert x.name != "x"
    assert structure(parse(str(graph))) == structure(graph)


def test_every_dtype_and_exact_scales() -> None:
    for dtype in DType:
        graph = Graph("types", free_batch=False)
        scale = float(np.float32(0.1))
        x = graph.add_input(Port("x", scale, 0), TensorType(dtype, (2, 3)))
        ends = np.array([dtype.lo, dtype.hi], dtype.numpy)
        c = graph.constant(ends, TensorType(dtype, (2,)), "c")
        scalar = graph.constant(np.array(7, dtype.numpy) >> 3, TensorType(dtype, ()), "s")
        for port, v in (("x", x), ("c", c), ("s", scalar)):
            graph.add_output(Port(port, np.float64(scale), 0), v)
        again = parse(str(graph))
        assert structure(again) == structure(graph)
        assert again.outputs[0][0].scale == scale
        assert [v.const.dtype for v in again.constants() if v.const is not None] == [
            dtype.numpy
        ] * 2


def test_long_constants_stand_by_their_contents() -> None:
    x = np.arange(40, dtype=np.int8)
    assert digest(x) == digest(x.copy())
    assert len({digest(x), digest(x.reshape(4, 10)), digest(x.view(np.uint8)), digest(x + 1)}) == 4
    with pytest.raises(BadInput, match="is not known"):
        parse(f'graph "g" free\n  %c: int8[40] = const @{digest(x)}\n', {})


# --- what is refused --------------------------------------------------------------------------------------------

GOOD = """graph "g" free
  %x: int8[1x4] = input "x" scale 0.5 zero 0
  %w: int8[3x4] = const [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
  %b: int32[3] = const [1, 2, 3]
  %acc: int32[1x3] = MatMul() (%x, %w, %b) # "fc"
  %y: int8[1x3] = Rescale(accs=(Acc(multiplier=(1073741824,), pre_shift=(0,)),), vals=(), f=(8,), \
zero_point=0, lo=-128, hi=127, out=I8, spatial=False) (%acc) # "fc"
  return %y as "y" scale 0.5 zero 0
"""


def test_what_the_refused_are_variants_of_is_accepted() -> None:
    assert dump(parse(GOOD)) == GOOD


DEEP = 100_000
ACCS = "accs=(Acc(multiplier=(1073741824,), pre_shift=(0,)),)"
REFUSED: dict[str, tuple[str, str, int]] = {
    # what is replaced, by what, and the line that is named
    "nothing": (GOOD, "", 1),
    "no head": ('graph "g" free', "digraph", 1),
    "bad head string": ('graph "g" free', 'graph "\\x" free', 1),
    "head string twice": ('graph "g" free', 'graph "a" "b" free', 1),
    "free what": ('"g" free', '"g" maybe', 1),
    "blank line": ("  %b", "\n  %b", 4),
    "float type": ("%x: int8", "%x: float32", 2),
    "no such type": ("%x: int8", "%x: int9", 2),
    "bad shape": ("int8[1x4] =", "int8[1xx4] =", 2),
    "bad port": ("scale 0.5 zero 0\n  %w", "scale zero 0\n  %w", 2),
    "nan scale": ("scale 0.5 zero 0\n  %w", "scale nan zero 0\n  %w", 2),
    "no scale": ("scale 0.5 zero 0\n  %w", "scale 0.0 zero 0\n  %w", 2),
    "scale by code": ("scale 0.5 zero 0\n  %w", "scale exit() zero 0\n  %w", 2),
    "value defined twice": ("%w: int8", "%x: int8", 3),
    "name written twice": ("%w: int8", '%"x": int8', 3),
    "too few elements": ("[1, 2, 3]\n", "[1, 2]\n", 4),
    "code out of range": ("[1, 2, 3, 4,", "[128, 2, 3, 4,", 3),
    "code far out of range": ("[1, 2, 3]\n", f"[1, 2, {1 << 70}]\n", 4),
    "code beyond 4 bits": ("%w: int8[3x4] = const [1, 2", "%w: int4[3x4] = const [9, 2", 3),
    "float element": ("[1, 2, 3]\n", "[1, 2.5, 3]\n", 4),
    "text element": ("[1, 2, 3]\n", '[1, "2", 3]\n', 4),
    "bool element": ("[1, 2, 3]\n", "[1, true, 3]\n", 4),
    "nan element": ("[1, 2, 3]\n", "[1, NaN, 3]\n", 4),
    "no list": ("[1, 2, 3]\n", "3\n", 4),
    "deep list": ("[1, 2, 3]\n", "[" * DEEP + "\n", 4),
    "unknown digest": ("[1, 2, 3]\n", "@0123\n", 4),
    "unknown operand": ("(%x, %w, %b)", "(%x, %w, %z)", 5),
    "later operand": ("(%x, %w, %b)", "(%y, %w, %b)", 5),
    "missing operand": ("(%x, %w, %b)", "(%x, %w)", 5),
    "operands run together": ("(%x, %w, %b)", "(%x%w%b)", 5),
    "no operands": ("(%acc)", "", 6),
    "no layer": (' # "fc"\n  %y', "\n  %y", 5),
    "bad layer": ('# "fc"\n  %y', '# "\\q"\n  %y', 5),
    "wrong result": ("%acc: int32[1x3]", "%acc: int32[1x4]", 5),
    "unknown operator": ("MatMul()", "Exec()", 5),
    "no operator": ("MatMul()", "Acc(multiplier=(1,))", 5),
    "op by name": ("MatMul()", "MatMul", 5),
    "class outside the set": ("MatMul()", "Graph(name=1)", 5),
    "positional": ("MatMul()", "MatMul(1)", 5),
    "unknown field": ("MatMul()", "MatMul(k=1)", 5),
    "unpacked field": ("MatMul()", "MatMul(**MatMul())", 5),
    "field missing": ("lo=-128, ", "", 6),
    "import": ("MatMul()", "__import__('os').system('touch planted')", 5),
    "import in a field": ("zero_point=0", "zero_point=__import__('os')", 6),
    "attribute": ("out=I8", "out=I8.value", 6),
    "expression": ("zero_point=0", "zero_point=9**9**9**9", 6),
    "repeated": ("f=(8,)", "f=(8,)*999999999", 6),
    "shift": ("zero_point=0", "zero_point=1<<99999999999", 6),
    "comprehension": ("f=(8,)", "f=[i for i in (8,)]", 6),
    "lambda": ("MatMul()", "(lambda: MatMul())()", 5),
    "walrus": ("MatMul()", "(x := MatMul())", 5),
    "string field": ("zero_point=0", "zero_point='0'", 6),
    "float field": ("zero_point=0", "zero_point=0.0", 6),
    "none field": ("zero_point=0", "zero_point=None", 6),
    "bool for a number": ("zero_point=0", "zero_point=False", 6),
    "number for a bool": ("spatial=False", "spatial=0", 6),
    "number for a tuple": ("f=(8,)", "f=8", 6),
    "tuple for a number": ("lo=-128", "lo=(-128,)", 6),
    "number for an accumulator": (ACCS, "accs=(1,)", 6),
    "value for an accumulator": (ACCS, "accs=(Val(multiplier=(1,)),)", 6),
    "number for a type": ("out=I8", "out=8", 6),
    "no such dtype": ("out=I8", "out=F32", 6),
    "empty tuple": ("f=(8,)", "f=()", 6),
    "huge number": ("zero_point=0", "zero_point=" + "9" * 50_000, 6),
    "huge hex": ("zero_point=0", "zero_point=0x" + "f" * 50_000, 6),
    "huge tuple": ("f=(8,)", "f=(" + "8, " * DEEP + ")", 6),
    "deep tuple": ("f=(8,)", "f=" + "(" * DEEP + "8" + ",)" * DEEP, 6),
    "deep sign": ("zero_point=0", "zero_point=" + "-" * DEEP + "1", 6),
    "deep attribute": ("MatMul()", "a" + ".a" * DEEP, 5),
    "open bracket": ("MatMul()", "MatMul((", 5),
    "null": ("MatMul()", "MatMul(\0)", 5),
    "return of nothing": ("return %y", "return %z", 7),
    "bad return": ('as "y"', "as y", 7),
    "returned twice": ("zero 0\n", 'zero 0\n  return %y as "y" scale 0.5 zero 0\n', 3),
    "fed twice": ("  %w", '  %v: int8[1x4] = input "x" scale 0.5 zero 0\n  %w', 8),
    "a fixed row": ("%w: int8[3x4]", '%r: int8[1x2x2] = Reshape(shape=(1, 2, 2)) (%x) # ""\n  %w: int8[3x4]', 8),
    "garbage": ("  return", "  \x7f\xff return", 7),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_text_is_refused_with_its_line_and_never_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new, line = REFUSED[case]
    assert old in GOOD
    with pytest.raises(BadInput) as e:
        parse(GOOD.replace(old, new, 1))
    assert str(e.value).startswith(f"line {line} of the integer graph: ")
    assert len(str(e.value)) < 500
    assert not list(tmp_path.iterdir())


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.integers(0, len(GOOD)), st.integers(0, 12), st.text(max_size=6) | st.sampled_from(HOSTILE)
)
def test_any_damage_is_bad_input_or_a_graph(at: int, length: int, text: str) -> None:
    damaged = GOOD[:at] + text + GOOD[at + length :]
    try:
        graph = parse(damaged)
    except BadInput:
        return
    graph.verify()
    assert structure(parse(dump(graph))) == structure(graph)
