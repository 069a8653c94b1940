"""Operators that move and pick values, recurrent ones, and a few that are refused; see arithmetic.py."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.maker import Maker


def reshape(m: Maker) -> None:
    x = m.value()
    shape = m.values[x]
    match m.int(0, 5):
        case 0:
            m.add(
                "Flatten",
                [x],
                axis=m.axis(len(shape) + 1) if m.yes(3) and shape else None,
            )
        case 1:
            ones = [i for i, n in enumerate(shape) if n == 1 and (i or not m.free)]
            m.add("Squeeze", [x, *([m.ints(ones)] if m.yes() else [])])
        case 2:
            rank = len(shape) + 1
            m.add("Unsqueeze", [x, m.ints([m.axis(rank)])])
        case 3 if len(shape) >= 2:
            m.add("Reshape", [x, m.ints([0, -1])])
        case 4 if len(shape) >= 2:
            rest = int(np.prod(shape[1:]))
            by = m.one([d for d in range(1, rest + 1) if rest % d == 0])
            lead = m.one((0, -1)) if m.free else shape[0]
            m.add("Reshape", [x, m.ints([lead, by, rest // by])])
        case _:
            total = int(np.prod(shape))
            by = m.one([d for d in range(1, total + 1) if total % d == 0])
            m.add("Reshape", [x, m.ints([by, -1])])


def transpose(m: Maker) -> None:
    x = m.value(2)
    if x is not None:
        rank = len(m.values[x])
        rest = m.draw(st.permutations(range(1, rank)))
        whole = m.draw(st.permutations(range(rank)))
        m.add("Transpose", [x], perm=[0, *rest] if m.yes(4) is False else whole)


def concat(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    shape = m.values[x]
    axis = m.axis(len(shape)) if m.yes(4) else m.int(min(1, len(shape) - 1), len(shape) - 1)
    at = axis % len(shape)
    fit = [n for n, s in m.values.items() if len(s) == len(shape) and all(
        a == b for i, (a, b) in enumerate(zip(s, shape, strict=True)) if i != at)]  # fmt: skip
    parts = [x, *(m.one(fit) for _ in range(m.int(0, 2)))]
    if m.yes(3) and not (m.free and at):
        part = list(shape)
        part[at] = m.int(1, 3)
        parts.insert(m.int(0, len(parts)), m.weights(*part))
    m.add("Concat", parts, axis=axis)


def split(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    shape = m.values[x]
    axis = m.axis(len(shape))
    n = shape[axis]
    count = m.int(1, min(3, n))
    if m.yes():
        m.add("Split", [x], count, axis=axis, num_outputs=count)
    else:
        cuts = sorted(m.draw(st.lists(st.integers(1, n), min_size=count - 1, max_size=count - 1)))
        sizes = np.diff([0, *cuts, n])
        m.add("Split", [x, m.ints(sizes)], count, axis=axis)


def sliced(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    shape = m.values[x]
    axes = m.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    starts = [m.int(-shape[a] - 1, shape[a]) for a in axes]
    steps = [m.one((1, 1, 2, 3, -1, -2)) for _ in axes]
    ends = [m.one((shape[a], 2**63 - 1, shape[a] - 1, -1) if s > 0 else (-(2**63), -1, 0, -shape[a] - 1))
            for a, s in zip(axes, steps, strict=True)]  # fmt: skip
    m.add("Slice", [x, m.ints(starts), m.ints(ends), m.ints(axes), m.ints(steps)])


def pad(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    shape = m.values[x]
    mode = m.one(("constant", "constant", "reflect", "edge", "wrap"))
    most = [2 if mode == "constant" else min(2, n - 1) for n in shape]
    least = -1 if mode == "constant" and m.yes(4) else 0
    pads = [m.int(least, max(n, 0)) if i or m.yes(6) else 0 for i, n in enumerate(most)]
    more = [m.int(least, max(n, 0)) if i or m.yes(6) else 0 for i, n in enumerate(most)]
    fill = [m.const(np.float32(m.one((0.0, 1.5, -3.0))))] if mode == "constant" and m.yes() else []
    m.add("Pad", [x, m.ints([*pads, *more]), *fill], mode=mode)


def move(m: Maker) -> None:
    x = m.value(1)
    if x is None:
        return
    shape = m.values[x]
    match m.int(0, 6):
        case 0:
            target = [m.one((1, 2, 3)) if n == 1 else m.one((n, 1)) for n in shape]
            if m.yes(3):
                target.insert(0, m.int(1, 2))
            m.add("Expand", [x, m.ints(target)])
        case 1:
            m.add(
                "Tile",
                [
                    x,
                    m.ints([1 if i == 0 and m.free else m.int(1, 2) for i in range(len(shape))]),
                ],
            )
        case 2 | 3:
            axis = m.axis(len(shape))
            n = shape[axis]
            dims = m.one(((), (1,), (3,), (2, 2)))
            picked = m.rng.integers(-n, n, dims)
            m.add("Gather", [x, m.const(np.asarray(picked, np.int64))], axis=axis)
        case 4:
            m.add("DepthToSpace", [x], blocksize=2, mode=m.one(("DCR", "CRD")))
        case 5:
            m.add("SpaceToDepth", [x], blocksize=2)
        case _:
            m.add("CumSum", [x, m.const(np.int64(m.axis(len(shape))))])


def resize(m: Maker) -> None:
    x = m.value(2)
    if x is None:
        return
    shape = m.values[x]
    mode = m.one(("nearest", "linear", "cubic"))
    attributes: dict[str, object] = {
        "mode": mode,
        "coordinate_transformation_mode": m.one(
            (
                "half_pixel",
                "half_pixel_symmetric",
                "pytorch_half_pixel",
                "align_corners",
                "asymmetric",
            )
        ),
    }
    if mode == "nearest":
        attributes["nearest_mode"] = m.one(
            ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        )
    if mode == "cubic" and m.yes():
        attributes |= {
            "cubic_coeff_a": m.one((-0.5, -0.75)),
            "exclude_outside": m.int(0, 1),
        }
    if mode != "nearest" and m.yes(3):
        attributes["antialias"] = 1
    lead = 1 if m.yes(8) else 2
    changed = range(min(lead, len(shape) - 1), len(shape))
    if m.yes():
        scales = [
            m.one((0.5, 0.6, 1.0, 1.5, 2.0, 3.0)) if i in changed else 1.0
            for i in range(len(shape))
        ]
        m.add("Resize", [x, "", m.const(np.float32(scales))], **attributes)
    else:
        axes = [i for i in range(len(shape)) if i in changed]
        sizes = [m.int(1, 6) for _ in axes]
        attributes["axes"] = axes
        if m.yes(3):
            attributes["keep_aspect_ratio_policy"] = m.one(("not_larger", "not_smaller", "stretch"))
        m.add("Resize", [x, "", "", m.ints(sizes)], **attributes)


def recurrent(m: Maker) -> None:
    x = m.value(3)
    if x is None or len(m.values[x]) != 3:
        return
    shape = m.values[x]
    op, gates = m.one((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
    hidden = m.int(1, 4)
    direction = m.one(("forward", "reverse", "bidirectional"))
    ways = 2 if direction == "bidirectional" else 1
    layout = 0
    attributes: dict[str, object] = {
        "hidden_size": hidden,
        "direction": direction,
        "layout": layout,
    }
    if shape[0] > 6:
        return
    if op == "GRU":
        attributes["linear_before_reset"] = m.int(0, 1)
    if op == "LSTM" and m.yes(4):
        attributes["input_forget"] = 1
    w, r = (
        m.weights(ways, gates * hidden, shape[-1]),
        m.weights(ways, gates * hidden, hidden),
    )
    b = m.weights(ways, 2 * gates * hidden) if m.yes() else ""
    start = m.weights(ways, shape[1], hidden) if m.yes(3) and not m.free else ""
    given = [x, w, r, b, "", start]
    if op == "LSTM":
        given += [m.weights(ways, shape[1], hidden) if start else ""]
        given += [m.weights(ways, 3 * hidden) if m.yes(3) else ""]
    while given[-1] == "":
        given.pop()
    m.add(op, given, 3 if op == "LSTM" and m.yes() else m.int(1, 2), **attributes)


def rare(m: Maker) -> None:
    """What is refused, mostly."""
    x = m.value(2)
    if x is None:
        return
    match m.int(0, 4):
        case 0:
            m.add("Hardmax", [x])
        case 1:
            m.add("Trilu", [x], upper=m.int(0, 1))
        case 2:
            m.add("ReduceProd", [x])
        case 3:
            m.add("Einsum", [x], equation="ij->ji")
        case _:
            m.add("Where", [m.const(np.bool_(True)), x, x])
