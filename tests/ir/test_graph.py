"""The graph keeps its promises, notices when they are broken, and interprets in little memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest

from qcompile.ir import (
    Array,
    Concat,
    Conv,
    DType,
    Graph,
    Lut,
    MatMul,
    Mul,
    Port,
    Reshape,
    Slice,
    TensorType,
    Transpose,
    Value,
)

I8, I32 = DType.I8, DType.I32


def flat(n: int, rows: int = 1) -> TensorType:
    return TensorType(I8, (rows, n))


def table(graph: Graph, by: int, name: str = "table") -> Value:
    """The function x -> x + by, wrapped into 8 bits."""
    entries = (np.arange(-128, 128) + by + 128) % 256 - 128
    return graph.constant(entries.astype(np.int8), TensorType(I8, (256,)), name)


def chain(length: int = 3) -> Graph:
    """x -> x + 1 -> x + 2 -> ..., named y1, y2, ..."""
    graph = Graph("chain")
    value = graph.add_input(Port("x", 0.5, 0), flat(4))
    one = table(graph, 1)
    for i in range(length):
        value = graph.add(Lut(), value, one, name=f"y{i + 1}")
    graph.add_output(Port("y", 0.5, 0), value)
    return graph


def named(graph: Graph, name: str) -> Value:
    return next(v for v in (*graph.values(), *graph.constants()) if v.name == name)


# --- building and editing ---------------------------------------------------------------------------------------


def test_names_are_unique_whatever_is_asked_for() -> None:
    graph = Graph("names")
    x = graph.add_input(Port("x", 1.0, 0), flat(4))
    made = [graph.add(Reshape((-1, 4)), x, name="x") for _ in range(3)]
    made.append(graph.add(Reshape((-1, 4)), x, name="x.2"))
    made.append(table(graph, 0, "x"))
    names = [v.name for v in (x, *made)]
    assert len(set(names)) == len(names)
    assert names[0] == "x"
    graph.verify()


def test_an_operator_that_does_not_fit_leaves_no_trace() -> None:
    graph = chain(1)
    before = str(graph)
    with pytest.raises(TypeError, match="cannot be reshaped"):
        graph.add(Reshape((-1, 5)), named(graph, "x"), name="z")
    assert str(graph) == before
    graph.verify()
    assert graph.add(Reshape((-1, 2, 2)), named(graph, "x"), name="z").name == "z"


def test_uses_know_every_operand_place() -> None:
    graph = Graph("twice")
    x = graph.add_input(Port("x", 1.0, 0), flat(4))
    y = graph.add(Concat(1), x, x, name="y")
    assert y.producer is not None
    assert list(x.uses) == [(y.producer, 0), (y.producer, 1)]
    graph.add_output(Port("y", 1.0, 0), y)
    graph.verify()


def test_replace_moves_every_user_and_output() -> None:
    graph = chain(3)
    y1, y2, y3, one = (named(graph, n) for n in ("y1", "y2", "y3", "table"))
    graph.add_output(Port("also", 0.5, 0), y2)
    at = graph.nodes.index(next(n for n in graph.nodes if n.output is y2)) + 1
    other = graph.insert(at, Lut(), y1, one, name="other")
    graph.replace(y2, other)
    assert not y2.uses
    assert list(other.uses) == [(y3.producer, 0)]
    assert [v for _, v in graph.outputs] == [y3, other]
    graph.verify()
    assert y2.producer is not None
    graph.erase(y2.producer)
    graph.verify()
    assert [n.output.name for n in graph.nodes] == ["y1", "other", "y3"]
    assert graph.run({"x": np.zeros((1, 4), np.int8)})["y"].tolist() == [[3] * 4]


def test_replace_by_itself_changes_nothing() -> None:
    graph = chain(2)
    graph.replace(named(graph, "y1"), named(graph, "y1"))
    graph.verify()
    assert len(named(graph, "y1").uses) == 1


@pytest.mark.parametrize("name", ["y1", "y3"])
def test_erase_refuses_what_is_read(name: str) -> None:
    graph = chain(3)
    node = named(graph, name).producer
    assert node is not None
    with pytest.raises(ValueError, match=f"{name} is still read"):
        graph.erase(node)
    graph.verify()


def test_erase_forgets_the_uses_of_its_operands_and_its_name() -> None:
    graph = chain(1)
    y1 = named(graph, "y1")
    extra = graph.add(Concat(1), y1, y1, name="extra")
    assert extra.producer is not None
    graph.erase(extra.producer)
    assert not y1.uses
    graph.verify()
    assert graph.add(Reshape((-1, 4)), y1, name="extra").name == "extra"


def test_constants_are_copied_frozen_and_in_range() -> None:
    graph = Graph("constants")
    array = np.arange(6, dtype=np.int8).reshape(2, 3).T
    value = graph.constant(array, TensorType(I8, (3, 2)), "c")
    array[0, 0] = 9
    assert value.constant[0, 0] == 0
    assert value.constant.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        value.constant[0, 0] = 1
    scalar = graph.constant(np.array(3, np.int32), TensorType(I32, ()), "s")
    assert scalar.constant.shape == ()
    with pytest.raises(TypeError, match="constant c is int8"):
        graph.constant(array, TensorType(I32, (3, 2)), "c")
    with pytest.raises(TypeError, match="constant c is int8"):
        graph.constant(array, TensorType(I8, (2, 3)), "c")
    for wrong in (8, -9):
        with pytest.raises(TypeError, match=r"constant w holds .*int4"):
            graph.constant(np.array([0, wrong], np.int8), TensorType(DType.I4, (2,)), "w")
    with pytest.raises(TypeError, match="x is no constant"):
        _ = graph.add_input(Port("x", 1.0, 0), flat(1)).constant


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_port_has_a_positive_scale(scale: float) -> None:
    with pytest.raises(ValueError, match="scale of in is positive"):
        Port("in", scale, 0)


# --- verify -----------------------------------------------------------------------------------------------------


def swap_nodes(graph: Graph) -> None:
    graph.nodes.reverse()


def drop_node(graph: Graph) -> None:
    del graph.nodes[1]


def repeat_node(graph: Graph) -> None:
    graph.nodes.append(graph.nodes[0])


def stale_shape(graph: Graph) -> None:
    named(graph, "y1").type = flat(5)


def stale_type(graph: Graph) -> None:
    named(graph, "y3").type = TensorType(DType.I16, (1, 4))


def unfit_input(graph: Graph) -> None:
    named(graph, "x").type = TensorType(DType.I16, (1, 4))


def lost_use(graph: Graph) -> None:
    named(graph, "y1").uses.clear()


def lost_use_of_constant(graph: Graph) -> None:
    one = named(graph, "table")
    del one.uses[graph.nodes[1], 1]


def stale_use(graph: Graph) -> None:
    named(graph, "y3").uses[graph.nodes[0], 0] = None


def unrecorded_operand(graph: Graph) -> None:
    node = graph.nodes[2]
    node.inputs = (named(graph, "x"), node.inputs[1])


def same_name(graph: Graph) -> None:
    named(graph, "y2").name = "y1"


def name_of_input(graph: Graph) -> None:
    named(graph, "y2").name = "x"


def name_of_constant(graph: Graph) -> None:
    named(graph, "table").name = "y3"


def wrong_producer(graph: Graph) -> None:
    named(graph, "y2").producer = graph.nodes[0]


def foreign_output(graph: Graph) -> None:
    graph.outputs.append((Port("z", 1.0, 0), Value("z", flat(4))))


def output_of_erased(graph: Graph) -> None:
    graph.nodes.pop()


def two_outputs_of_one_name(graph: Graph) -> None:
    graph.add_output(Port("y", 1.0, 0), named(graph, "y1"))


def two_inputs_of_one_name(graph: Graph) -> None:
    graph.add_input(Port("x", 1.0, 0), flat(4))


BROKEN: dict[Callable[[Graph], None], str] = {
    swap_nodes: "before it is made",
    drop_node: "y3 reads y2 before it is made",
    repeat_node: "not made by y1 alone",
    stale_shape: "y1: stale result type",
    stale_type: "y3: stale result type",
    unfit_input: "a table wants at most 8 bits",
    lost_use: "y1 does not know its users",
    lost_use_of_constant: "table does not know its users",
    stale_use: "y3 does not know its users",
    unrecorded_operand: "does not know its users",
    same_name: "two values are called y1",
    name_of_input: "two values are called x",
    name_of_constant: "two values are called y3",
    wrong_producer: "y2 is not made by y2 alone",
    foreign_output: "output z is never made",
    output_of_erased: "output y is never made",
    two_outputs_of_one_name: "two outputs are called y",
    two_inputs_of_one_name: "two inputs are called x",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda b: b.__name__)
def test_verify_names_the_broken_promise(breaks: Callable[[Graph], None]) -> None:
    graph = chain(3)
    graph.verify()
    breaks(graph)
    with pytest.raises(TypeError, match=BROKEN[breaks]):
        graph.verify()


def reshape_to_one_row(graph: Graph, x: Value) -> Value:
    return graph.add(Reshape((1, 2, 2)), x, name="y")


def mix_rows_by_broadcast(graph: Graph, x: Value) -> Value:
    c = graph.constant(np.ones((3, 1, 4), np.int8), TensorType(I8, (3, 1, 4)), "c")
    return graph.add(Mul(0, 0), x, c, name="y")


@pytest.mark.parametrize("build", [reshape_to_one_row, mix_rows_by_broadcast])
def test_a_free_batch_is_free_everywhere(build: Callable[[Graph, Value], Value]) -> None:
    def made(free: bool) -> Graph:
        graph = Graph("rows", free_batch=free)
        y = build(graph, graph.add_input(Port("x", 1.0, 0), flat(4)))
        graph.add_output(Port("y", 1.0, 0), y)
        return graph

    made(free=False).verify()
    with pytest.raises(TypeError, match=r"y does not take any number of rows|cannot be reshaped"):
        made(free=True).verify()


# --- run --------------------------------------------------------------------------------------------------------


def small_network(free: bool = True, rows: int = 1) -> Graph:
    """Conv, flatten in another order, MatMul; the first value is an output too, and so is a constant."""
    graph = Graph("net", free_batch=free)
    rng = np.random.default_rng(0)
    x = graph.add_input(Port("image", 0.1, -3), TensorType(I8, (rows, 4, 4, 2)))

    def weights(shape: tuple[int, ...], name: str) -> Value:
        return graph.constant(
            rng.integers(-127, 128, shape).astype(np.int8), TensorType(I8, shape), name
        )

    def bias(n: int, name: str) -> Value:
        return graph.constant(
            rng.integers(-99, 99, n).astype(np.int32), TensorType(I32, (n,)), name
        )

    head = graph.add(Slice((0, 0, 0), (4, 4, 1), (1, 1, 1)), x, name="head")
    conv = Conv((1, 1), (1, 1, 1, 1), (1, 1), 2, -3)
    graph.add_output(
        Port("map", 0.1, 0),
        graph.add(conv, x, weights((4, 3, 3, 1), "w"), bias(4, "b"), name="map"),
    )
    turned = graph.add(Transpose((0, 3, 1, 2)), x, name="turned")
    row = graph.add(Reshape((-1, 32)), turned, name="row")
    y = graph.add(MatMul(), row, weights((3, 32), "v"), bias(3, "c"), name="logits")
    graph.add_output(Port("logits", 0.1, 0), y)
    graph.add_output(Port("first", 0.1, -3), head)
    return graph


def test_run_gives_every_row_what_it_gives_alone() -> None:
    graph = small_network()
    graph.verify()
    x = np.random.default_rng(1).integers(-128, 128, (5, 4, 4, 2)).astype(np.int8)
    together = graph.run({"image": x})
    assert list(together) == ["map", "logits", "first"]
    for n in range(5):
        alone = graph.run({"image": x[n : n + 1]})
        for name, y in together.items():
            assert np.array_equal(alone[name], y[n : n + 1])
    none = graph.run({"image": x[:0]})
    assert {name: y.shape[0] for name, y in none.items()} == dict.fromkeys(together, 0)


def test_run_refuses_other_types_shapes_and_codes() -> None:
    graph = small_network(free=False, rows=2)
    graph.verify()
    good = np.zeros((2, 4, 4, 2), np.int8)
    graph.run({"image": good})
    with pytest.raises(TypeError, match="input image takes int8, not int16"):
        graph.run({"image": good.astype(np.int16)})
    for wrong in (good[:1], good[:, :3], good[..., None]):
        with pytest.raises(TypeError, match="input image takes int8"):
            graph.run({"image": wrong})
    with pytest.raises(KeyError, match="image"):
        graph.run({})
    narrow = Graph("narrow")
    x = narrow.add_input(Port("x", 1.0, 0), TensorType(DType.I4, (1, 2)))
    narrow.add_output(Port("y", 1.0, 0), x)
    assert narrow.run({"x": np.array([[-8, 7]], np.int8)})["y"].tolist() == [[-8, 7]]
    for code in (-9, 8):
        with pytest.raises(TypeError, match="int4, -8 to 7"):
            narrow.run({"x": np.array([[0, code]], np.int8)})


def test_a_constant_can_be_returned() -> None:
    graph = Graph("constant", free_batch=False)
    x = graph.add_input(Port("x", 1.0, 0), flat(2))
    c = graph.constant(np.array([[5, 6]], np.int8), flat(2), "c")
    graph.add_output(Port("c", 1.0, 0), c)
    graph.add_output(Port("x", 1.0, 0), x)
    graph.verify()
    assert list(graph.constants()) == [c]
    assert graph.run({"x": np.zeros((1, 2), np.int8)})["c"].tolist() == [[5, 6]]


def test_constants_come_once_in_order_of_first_use() -> None:
    graph = chain(3)
    extra = table(graph, 2, "other")
    graph.add_output(Port("z", 0.5, 0), graph.add(Lut(), named(graph, "y1"), extra, name="z"))
    assert [c.name for c in graph.constants()] == ["table", "other"]


def test_run_shows_every_result_and_keeps_none_too_long() -> None:
    """Of a chain only the operand and the result of the running node are alive, and a result nobody reads is not."""
    graph = chain(30)
    unread = graph.insert(1, Lut(), named(graph, "y1"), named(graph, "table"), name="unread")
    graph.add_output(Port("early", 0.5, 0), named(graph, "y2"))
    shown: list[str] = []
    refs: dict[str, weakref.ref[Array]] = {}
    most = 0

    def watch(value: Value, result: Array) -> None:
        nonlocal most
        shown.append(value.name)
        refs[value.name] = weakref.ref(result)
        alive = {name for name, ref in refs.items() if ref() is not None}
        if len(shown) > 3:
            assert unread.name not in alive
        most = max(most, len(alive))

    result = graph.run({"x": np.zeros((1, 4), np.int8)}, on_value=watch)
    assert shown == [n.output.name for n in graph.nodes]
    assert most <= 3  # operand, result, and y2, which is returned
    assert result["y"].tolist() == [[30] * 4]
    assert result["early"].tolist() == [[2] * 4]
