"""What a report claims, each claim as one verdict: proved, refuted, or not checked and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qcompile.report.wording import decibel, fraction, number, visible

State = Literal["pass", "fail", "open"]
Report = Mapping[str, object]

MADE_UP = {
    "random": "The calibration data are random noise (--calib random).",
    "synthetic": "No calibration data were given: synthetic samples were made up.",
}
ACCUMULATOR_BITS = 32
POOR_DB = 10.0
"""An output that is closer to the float network than this is not damaged."""
UNROUNDED_DB = 60.0
"""What a layer that reads nothing rounded is taken to begin with."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, whether it holds, and the sentence that says how that is known."""

    claim: str
    state: State
    sentence: str


def at(report: object, *keys: str) -> object:
    """What lies at this path of nested tables, None where something is missing."""
    for key in keys:
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def rows(report: object, *keys: str) -> list[Mapping[str, object]]:
    """The list of tables at this path, empty where there is none."""
    found = at(report, *keys)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    return [row for row in found if isinstance(row, Mapping)]


def texts(report: object, *keys: str) -> list[str]:
    """The list of names or sentences at this path, empty where there is none."""
    found = at(report, *keys)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    return [visible(str(item)) for item in found]


def count(report: object, *keys: str) -> int:
    """The integer at this path, 0 where there is none."""
    found = at(report, *keys)
    return found if isinstance(found, int) else 0


def finite(value: object) -> float | None:
    """The number that this is, None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def made_up(report: Report) -> str | None:
    """The loud sentence about data that nobody measured, None for real data."""
    if not at(report, "data", "marked"):
        return None
    origin = MADE_UP.get(str(at(report, "data", "origin")), "The calibration data were made up.")
    return (
        f"{origin} Every scale and every accuracy figure here rests on them: bit-exactness holds, "
        "accuracy on real inputs is unknown. Calibrate with real data before use."
    )


def verdicts(report: Report) -> list[Verdict]:
    """Every claim of the report, in the order a reader asks for them."""
    return [
        _integer_only(report),
        bit_exact(report),
        _onnx(report),
        _no_float(report),
        _no_overflow(report),
    ]


def headline(report: Report) -> Verdict | None:
    """What a reader must know first: which layer is worst, and does it matter; None where nothing was measured."""
    claim = "worst layer"
    if found := rows(report, "findings"):
        return Verdict(claim, "fail", _sentence(found[0].get("sentence")))
    outputs = [(o.get("name"), _ratio(o)) for o in rows(report, "accuracy", "outputs")]
    rated = [(name, db) for name, db in outputs if db is not None]
    layers = [(r.get("name"), db) for r in rows(report, "layers") if (db := _ratio(r)) is not None]
    if not rated or not layers:
        return None
    output, least = min(rated, key=lambda pair: pair[1])
    ends = f"output {visible(str(output))} has {decibel(least)} dB"
    if least < POOR_DB:
        layer, before, after = _steepest(report)
        return Verdict(
            claim,
            "fail",
            f"Only {decibel(least)} dB are left of output {visible(str(output))}: the program is far from the float "
            f"network. Most is lost in layer {visible(layer)}, where {decibel(before)} dB become {decibel(after)} dB.",
        )
    far, db = min(layers, key=lambda pair: pair[1])
    same = [o.get("agreement") for o in rows(report, "accuracy", "outputs")]
    shares = [share for share in same if isinstance(share, int | float)]
    agreed = f" and agrees in {fraction(min(shares))} of the samples" if shares else ""
    return Verdict(
        claim,
        "pass",
        f"No layer stands out. The one furthest from the float network is {visible(str(far))} with {decibel(db)} dB; "
        f"{ends}{agreed}.",
    )


def _steepest(report: Report) -> tuple[str, float, float]:
    """The layer that loses most of the ratio its operands had, with the ratio before and after it."""
    coverage = rows(report, "coverage")
    ratios: dict[object, float] = {}
    for row in rows(report, "layers"):
        if (db := _ratio(row)) is not None:
            ratios[row.get("name")] = min(db, ratios.get(row.get("name"), db))
    held: list[float] = []
    worst = ("", UNROUNDED_DB, UNROUNDED_DB)
    for i, row in enumerate(coverage):
        found = row.get("reads")
        reads = found if isinstance(found, Sequence) else []
        before = min(
            (held[p] for p in reads if isinstance(p, int) and 0 <= p < i), default=UNROUNDED_DB
        )
        after = ratios.get(row.get("layer"), before)
        held.append(after)
        if before - after > worst[1] - worst[2]:
            worst = (str(row.get("layer")), before, after)
    return worst


def _ratio(row: Mapping[str, object]) -> float | None:
    return finite(row.get("sqnr_integer_db"))


def _sentence(text: object) -> str:
    """With a capital at its beginning and a point at its end."""
    said = visible(str(text))
    return f"{said[:1].upper()}{said[1:]}."


def on_target(report: Report, layer: Mapping[str, object]) -> str:
    """What verification saw of the value of one layer."""
    if not at(report, "verification", "checked"):
        return "not run"
    if layer.get("name") == at(report, "verification", "first", "layer"):
        return "differs"
    if at(report, "verification", "apart") is not None:
        return "near"
    if count(report, "verification", "mismatches"):
        return "unknown"
    stored, tensor = at(report, "stored"), layer.get("tensor")
    if not isinstance(stored, Mapping) or tensor not in stored:
        return "fused"
    traced = count(report, "verification", "intermediates") > 0
    ends = any(output.get("name") == tensor for output in rows(report, "outputs"))
    return "identical" if traced or ends else "not traced"


def mismatch(report: Report) -> str | None:
    """Where the program first leaves the integer graph, None where it does not."""
    first = at(report, "verification", "first")
    if not isinstance(first, Mapping):
        return None
    where = {key: visible(str(value)) for key, value in first.items()}
    return (
        f"first in layer '{where.get('layer')}', value '{where.get('value')}', row {where.get('row')}, "
        f"element {where.get('index')}: the integer graph has {where.get('expected')}, "
        f"the program {where.get('got')}"
    )


def _integer_only(report: Report) -> Verdict:
    claim = "integer only"
    floats = texts(report, "float_operators")
    covered = [
        operators for row in rows(report, "coverage") if (operators := texts(row, "operators"))
    ]
    if floats:
        return Verdict(claim, "fail", f"{len(floats)} operators stay float: {', '.join(floats)}")
    return Verdict(
        claim,
        "pass",
        f"all {sum(map(len, covered))} float operators became integer arithmetic in {len(covered)} layers",
    )


def bit_exact(report: Report) -> Verdict:
    """Does the program equal the integer graph?"""
    claim = "program = integer graph"
    if not at(report, "verification", "checked"):
        return Verdict(claim, "open", _unchecked(at(report, "verification", "reason")))
    if at(report, "verification", "apart") is not None:
        return _near(report)
    samples = count(report, "verification", "samples")
    wrong = count(report, "verification", "mismatches")
    if wrong:
        sentence = f"{wrong:,} elements differ over {samples:,} samples; {mismatch(report)}"
        return Verdict(claim, "fail", sentence)
    for other in rows(report, "verification", "others"):
        if count(other, "mismatches"):
            return Verdict(
                claim,
                "fail",
                f"{visible(str(other.get('name')))}: {count(other, 'mismatches'):,} elements differ "
                f"over {count(other, 'samples'):,} samples",
            )
    sanitized = at(report, "verification", "sanitized")
    return Verdict(
        claim,
        "pass",
        f"every output of {samples:,} samples and {count(report, 'verification', 'intermediates')} "
        f"intermediate values are equal bit for bit; "
        + ("no sanitizer finding" if sanitized else "sanitizers were not run")
        + "".join(
            f"; {visible(str(o.get('name')))}: {o.get('samples')} samples, {o.get('mismatches')} elements differ"
            for o in rows(report, "verification", "others")
        ),
    )


def _near(report: Report) -> Verdict:
    """Is every layer of a model that computes with floats within its bound of the integer graph?"""
    claim = "layers near integer graph"
    samples, wrong = (count(report, "verification", key) for key in ("samples", "mismatches"))
    seen, allowed, ends = (
        count(report, "verification", "apart", key) for key in ("layers", "allowed", "outputs")
    )
    compared = count(report, "verification", "intermediates")
    if wrong or not compared:
        sentence = (
            f"{wrong:,} elements are beyond the bound of their layer over {samples:,} samples"
        )
        where = mismatch(report)
        return Verdict(claim, "fail", f"{sentence}; {where}" if where else sentence)
    same = at(report, "verification", "apart", "equal")
    share = number(100 * same, 6) if isinstance(same, float) else "0"
    return Verdict(
        claim,
        "pass",
        f"floating-point arithmetic, not equal bit for bit: on the same codes {compared} layers are at most {seen} "
        f"codes off ({allowed} allowed) over {samples:,} samples, {share} % of the codes are equal; "
        f"outputs are at most {ends} codes off end to end, for which there is no bound",
    )


def _onnx(report: Report) -> Verdict:
    claim = "integer.onnx = integer graph"
    samples = at(report, "verification", "onnx", "samples")
    if not isinstance(samples, int) or samples == 0:
        return Verdict(claim, "open", "not run")
    wrong = count(report, "verification", "onnx", "mismatches")
    if wrong:
        return Verdict(
            claim, "fail", f"{wrong:,} elements differ over {samples:,} samples in onnxruntime"
        )
    return Verdict(claim, "pass", f"{samples:,} samples are equal in onnxruntime, bit for bit")


def _no_float(report: Report) -> Verdict:
    design = at(report, "design") is not None
    claim = "no float type" if design else "no float instruction"
    found = at(report, "certificates", "no_float")
    if not at(found, "checked"):
        return Verdict(claim, "open", _unchecked(at(found, "reason")))
    findings = texts(found, "findings")
    if findings:
        return Verdict(claim, "fail", f"{len(findings)} found: {'; '.join(findings[:4])}")
    return Verdict(
        claim,
        "pass",
        f"{count(found, 'instructions'):,} {at(found, 'basis')}: no "
        + ("floating-point type" if design else "floating-point arithmetic, no soft-float symbol"),
    )


def _no_overflow(report: Report) -> Verdict:
    claim = "no accumulator overflows"
    bounds = rows(report, "certificates", "accumulators")
    if not bounds:
        return Verdict(claim, "open", "no layer accumulates")
    widest = max(bounds, key=lambda row: count(row, "bits"))
    sentence = (
        f"proved from the weights: the widest of {len(bounds)} layers, "
        f"'{visible(str(widest.get('layer')))}', needs {count(widest, 'bits')} of {ACCUMULATOR_BITS} bits"
    )
    error = at(report, "certificates", "rescale", "largest_multiplier_error")
    if isinstance(error, int | float):
        sentence += f"; multipliers are within {number(error, 3)} of their real scales"
    held = count(widest, "bits") <= ACCUMULATOR_BITS
    return Verdict(claim, "pass" if held else "fail", sentence)


def _unchecked(reason: object) -> str:
    return f"not checked: {visible(str(reason))}" if reason else "not checked"
