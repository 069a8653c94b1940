"""From Relax operators to loops: one nest an operator, with rescaling inside the nest that makes its accumulators."""

from __future__ import annotations

import tvm
from tvm import relax, s_tir, tirx


def lower(module: tvm.IRModule, chip: tvm.target.Target) -> tvm.IRModule:
    """Operators become functions of loops, fused where one feeds the next."""
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    with chip:
        module = tvm.transform.Sequential(passes)(module)
    for name, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc):
            module.update_func(name, _nested(function))
    return module


def _nested(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Elementwise steps stand where they are read, and an accumulator lives for one element of the result alone."""
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root):
        try:
            schedule.compute_inline(block)
        except s_tir.schedule.ScheduleError:
            continue  # a sum, or the result
    left = schedule.get_child_blocks(root)
    if len(left) == 2 and _shape(schedule, left[0]) == _shape(schedule, left[1]):
        schedule.compute_at(left[0], schedule.get_loops(left[1])[-1])
    return schedule.mod["main"]


def _shape(schedule: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> list[int]:
    return [int(n) for n in schedule.get(block).writes[0].source.shape]


def executable(module: tvm.IRModule, chip: tvm.target.Target) -> tvm.runtime.Executable:
    """The module built for TVM's virtual machine."""
    cpu = relax.backend.cpu_generic
    passes = [*cpu.pipeline.dataflow_lower_passes(chip), *cpu.finalize_passes(chip)]
    return tvm.compile(
        lower(module, chip), target=chip, relax_pipeline=tvm.transform.Sequential(passes)
    )
