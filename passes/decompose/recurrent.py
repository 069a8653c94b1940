"""LSTM, GRU and RNN, unrolled: the input's products for all steps at once, then every step by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.onnx.edit import constant, operand

from .expression import Expression, Floats

Step = Callable[[ir.Value], ir.Value]
MOST_STEPS = 4096


class Recurrence:
    """One recurrent node: its sizes, its constants and what its activations are."""

    def __init__(self, e: Expression, gates: int) -> None:
        a = e.node.attributes
        self.e = e
        self.batch_first = a.get_int("layout", 0) == 1
        self.x = e.input(0) if self.batch_first else e.transpose(e.input(0), (1, 0, 2))
        self.rows, self.steps = e.shape(self.x)[0], e.size(self.x, 1)
        self.weight, self.recurrent = self._constant(1), self._constant(2)
        self.hidden = self.recurrent.shape[2]
        self.directions = len(self.weight)
        bias = e.constant(3, "a bias")
        self.bias = (
            np.zeros((self.directions, 2 * gates * self.hidden))
            if bias is None
            else np.asarray(bias, np.float64)
        )
        self.clip = a.get_float("clip", 0.0)
        lengths = e.integers(4, "sequence lengths")
        if lengths is not None and set(lengths) != {self.steps}:
            raise e.refuse("with sequences of different lengths has no integer form here; pad them")
        if self.steps > MOST_STEPS:
            raise e.refuse(
                f"over {self.steps} steps is too long to unroll; {MOST_STEPS} are the most"
            )

    def _constant(self, index: int) -> NDArray[np.float64]:
        array = self.e.constant(index, "weights")
        assert array is not None
        return np.asarray(array, np.float64)

    def order(self, direction: int) -> Sequence[int]:
        """The steps in the order a direction takes them."""
        reverse = self.e.node.attributes.get_string("direction", "forward") == "reverse"
        steps = range(self.steps)
        return steps[::-1] if reverse or direction == 1 else steps

    def initial(self, index: int, direction: int) -> ir.Value | None:
        """The state before the first step as [rows, hidden]; None where it is zero."""
        value = operand(self.e.node, index)
        if value is None:
            return None
        array = constant(value)
        if array is not None:
            axis = 1 if self.batch_first else 0
            state = np.take(np.asarray(array, np.float32), direction, axis=axis)
            return self.e.floats(state, f"state{index}") if state.any() else None
        states = value if self.batch_first else self.e.transpose(value, (1, 0, 2))
        return self.e.reshape(
            self.e.slice(states, 1, direction, direction + 1), (self.rows, self.hidden)
        )

    def projected(self, weight: Floats, bias: Floats) -> Callable[[int], ir.Value]:
        """The input times weights [gates * hidden, width] plus bias, by step."""
        e = self.e
        made = e.plus(e.matmul(self.x, weight.T), bias)
        return lambda t: e.reshape(e.slice(made, 1, t, t + 1), (self.rows, len(bias)))

    def gate(self, sums: ir.Value, index: int) -> ir.Value:
        """The columns of one gate."""
        return self.e.slice(sums, 1, index * self.hidden, (index + 1) * self.hidden)

    def _clipped(self, step: Step) -> Step:
        """A function of what lies within the node's limits."""
        if not self.clip:
            return step
        e, limits = self.e, [self.e.floats(n, "limit") for n in (-self.clip, self.clip)]
        return lambda x: step(e.op("Clip", x, *limits, shape=e.shape(x)))

    def activations(self, defaults: Sequence[str], direction: int) -> list[Step]:
        """The functions of one direction, of operands that are clipped where the node says so."""
        a, count = self.e.node.attributes, len(defaults)
        names = [*(a.get_strings("activations") or [*defaults] * self.directions)]
        alphas, betas = (
            list(a.get_floats(k) or ()) for k in ("activation_alpha", "activation_beta")
        )
        made: list[Step] = []
        for i, name in enumerate(names):
            step = self._function(name, alphas, betas)
            # onnxruntime clips what the gates read, not the cell state that an LSTM shows
            made.append(step if i % count == 2 else self._clipped(step))
            if i >= (direction + 1) * count:
                break
        return made[direction * count : (direction + 1) * count]

    def _function(self, name: str, alphas: list[float], betas: list[float]) -> Step:
        e = self.e

        def take(numbers: list[float], default: float) -> float:
            return numbers.pop(0) if numbers else default

        match name.lower():
            case "relu" | "tanh" | "sigmoid" | "softsign" | "softplus" as plain:
                return lambda x: e.unary(plain.capitalize(), x)
            case "leakyrelu":
                slope = take(alphas, 0.01)
                return lambda x: e.unary("LeakyRelu", x, alpha=slope)
            case "elu":
                slope = take(alphas, 1.0)
                return lambda x: e.unary("Elu", x, alpha=slope)
            case "thresholdedrelu":
                slope = take(alphas, 1.0)
                return lambda x: e.unary("ThresholdedRelu", x, alpha=slope)
            case "hardsigmoid":
                slope, offset = take(alphas, 0.2), take(betas, 0.5)
                return lambda x: e.unary("HardSigmoid", x, alpha=slope, beta=offset)
            case "affine":
                slope, offset = take(alphas, 1.0), take(betas, 0.0)
                return lambda x: e.plus(e.times(x, slope), offset)
            case "scaledtanh":
                slope, inner = take(alphas, 1.0), take(betas, 1.0)
                return lambda x: e.times(e.unary("Tanh", e.times(x, inner)), slope)
            case _:
                raise e.refuse(f"with the activation {name} has no integer form here")

    def outputs(
        self, states: list[list[ir.Value]], lasts: list[list[ir.Value]]
    ) -> list[ir.Value | None]:
        """Y of states by direction and time, then every last state, as the node's outputs."""
        e, n, hidden = self.e, self.rows, self.hidden
        found: list[ir.Value | None] = [None]
        used = [bool(v.uses()) or v.is_graph_output() for v in e.node.outputs]
        if used[0]:
            ways = [e.concat([e.reshape(h, (n, 1, 1, hidden)) for h in row], 1) for row in states]
            y = e.concat(ways, 2)
            found[0] = y if self.batch_first else e.transpose(y, (1, 2, 0, 3))
        for i, row in enumerate(lasts):
            if i + 1 >= len(used) or not used[i + 1]:
                found.append(None)
                continue
            last = e.concat([e.reshape(h, (n, 1, hidden)) for h in row], 1)
            found.append(last if self.batch_first else e.transpose(last, (1, 0, 2)))
        return found[: len(used)]


def lstm(e: Expression) -> list[ir.Value | None]:
    """LSTM -> its equations (ONNX operator specification: gates i, o, f, c; peepholes)."""
    r = Recurrence(e, 4)
    n, peep = r.hidden, e.constant(7, "peepholes")
    coupled = e.node.attributes.get_int("input_forget", 0)
    states, hs, cs = [], [], []
    for d in range(r.directions):
        f, g, h_of = r.activations(("Sigmoid", "Tanh", "Tanh"), d)
        project = r.projected(r.weight[d], r.bias[d][: 4 * n] + r.bias[d][4 * n :])
        own = e.floats(r.recurrent[d].T, "recurrent")
        h, c = r.initial(5, d), r.initial(6, d)
        pi, po, pf = np.split(np.zeros(3 * n) if peep is None else peep[d], 3)
        row: dict[int, ir.Value] = {}
        for t in r.order(d):
            sums = project(t)
            if h is not None:
                sums = e.tied(e.binary("Add", e.matmul(h, own), sums), f"{d} sums")
            i, o, forget, new = (r.gate(sums, k) for k in range(4))
            if c is not None and peep is not None:
                i = e.tied(e.binary("Add", i, e.times(c, pi)), f"{d} into i")
                forget = e.tied(e.binary("Add", forget, e.times(c, pf)), f"{d} into f")
            i = e.tied(f(i), f"{d} i")
            forget = e.tied(e.plus(e.times(i, -1.0), 1.0) if coupled else f(forget), f"{d} f")
            new = e.tied(e.binary("Mul", i, e.tied(g(new), f"{d} g")), f"{d} new")
            if c is not None:
                kept = e.tied(e.binary("Mul", forget, c), f"{d} kept")
                new = e.binary("Add", kept, new)
            c = e.tied(new, f"{d} c")
            if peep is not None:
                o = e.tied(e.binary("Add", o, e.times(c, po)), f"{d} into o")
            shown = e.tied(h_of(c), f"{d} shown")
            h = row[t] = e.tied(e.binary("Mul", e.tied(f(o), f"{d} o"), shown), f"{d} h")
        assert h is not None
        assert c is not None
        states.append([row[t] for t in range(r.steps)])
        hs.append(h)
        cs.append(c)
    return r.outputs(states, [hs, cs])


def gru(e: Expression) -> list[ir.Value | None]:
    """GRU -> its equations (ONNX operator specification: gates z, r, h)."""
    r = Recurrence(e, 3)
    n, linear = r.hidden, e.node.attributes.get_int("linear_before_reset", 0)
    states, hs = [], []
    for d in range(r.directions):
        f, g = r.activations(("Sigmoid", "Tanh"), d)
        wb, rb = r.bias[d][: 3 * n], r.bias[d][3 * n :]
        inner = np.concatenate((rb[: 2 * n], np.zeros(n) if linear else rb[2 * n :]))
        project = r.projected(r.weight[d], wb + inner)
        gates = e.floats(r.recurrent[d][: 2 * n].T, "gates")
        own = e.floats(r.recurrent[d][2 * n :].T, "recurrent")
        h = r.initial(5, d)
        row: dict[int, ir.Value] = {}
        for t in r.order(d):
            sums = project(t)
            new = r.gate(sums, 2)
            if h is None:
                z = f(r.gate(sums, 0))
                if linear and rb[2 * n :].any():
                    reset = e.tied(f(r.gate(sums, 1)), f"{d} r")
                    new = e.binary("Add", new, e.times(reset, rb[2 * n :]))
            else:
                both = e.binary("Add", e.matmul(h, gates), e.slice(sums, 1, 0, 2 * n))
                e.tied(both, f"{d} sums")
                z = f(r.gate(both, 0))
                reset = e.tied(f(r.gate(both, 1)), f"{d} r")
                if linear:
                    inside = e.tied(e.plus(e.matmul(h, own), rb[2 * n :]), f"{d} inside")
                    rest = e.tied(e.binary("Mul", reset, inside), f"{d} rest")
                else:
                    rest = e.matmul(e.tied(e.binary("Mul", reset, h), f"{d} reset"), own)
                new = e.binary("Add", rest, new)
            e.tied(z, f"{d} z")
            new = e.tied(g(e.tied(new, f"{d} into g")), f"{d} g")
            other = e.tied(e.plus(e.times(z, -1.0), 1.0), f"{d} 1-z")
            fresh = e.tied(e.binary("Mul", other, new), f"{d} fresh")
            if h is not None:
                kept = e.tied(e.binary("Mul", z, h), f"{d} kept")
                fresh = e.binary("Add", fresh, kept)
            h = row[t] = e.tied(fresh, f"{d} h")
        assert h is not None
        states.append([row[t] for t in range(r.steps)])
        hs.append(h)
    return r.outputs(states, [hs])


def rnn(e: Expression) -> list[ir.Value | None]:
    """RNN -> its equation."""
    r = Recurrence(e, 1)
    n, states, hs = r.hidden, [], []
    for d in range(r.directions):
        (f,) = r.activations(("Tanh",), d)
        project = r.projected(r.weight[d], r.bias[d][:n] + r.bias[d][n:])
        own = e.floats(r.recurrent[d].T, "recurrent")
        h = r.initial(5, d)
        row: dict[int, ir.Value] = {}
        for t in r.order(d):
            sums = project(t)
            if h is not None:
                sums = e.tied(e.binary("Add", e.matmul(h, own), sums), f"{d} sums")
            h = row[t] = e.tied(f(r.gate(sums, 0)), f"{d} h")
        assert h is not None
        states.append([row[t] for t in range(r.steps)])
        hs.append(h)
    return r.outputs(states, [hs])
