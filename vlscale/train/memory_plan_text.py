"""The plan of a run in words: one table a run. Time appears only where somebody gave the rates it is made of."""

from dataclasses import dataclass

from vlscale.train.comm import in_units
from vlscale.train.memory_plan import RunPlan


@dataclass(frozen=True)
class Rates:
    """What one rank keeps up, measured or promised by whoever gives them; None: not known."""

    tflops: float | None = None  # 10^12 operations a second
    gigabytes: float | None = None  # 10^9 bytes received a second


def render(plans: list[RunPlan], rates: Rates) -> str:
    return "\n\n".join(_one(plan, rates) for plan in plans)


def _one(plan: RunPlan, rates: Rates) -> str:
    name = f"{plan.name}: " if plan.name else ""
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    lines = [f"{name}{ranks}, {plan.local_batch_size} pairs a rank, ZeRO-{plan.zero_stage}, {plan.dtype}"]
    lines.append(f"  parameters                     {plan.parameters:>15,} ({plan.learned:,} learn)")
    if plan.length:
        lines.append(f"  steps                          {plan.length:>15}")
    if plan.comm:
        lines.append(f"  losses meet other ranks by     {plan.comm}")
    lines.append("  memory of a rank")
    lines += [_line(what, count) for what, count in plan.memory.items() if count]
    lines += [_line(f"{what} (host)", count) for what, count in plan.host_memory.items()]
    moment = max(plan.moments, key=plan.moments.__getitem__)
    lines.append(_line(f"peak, in {moment}", plan.peak))
    if plan.traffic:
        lines.append("  received by a rank in a step")
        lines += [_line(what, count) for what, count in plan.traffic.items() if count]
    lines.append("  operations of a rank in a step")
    lines += [f"    {what:<28} {count / 1e12:>15,.3f} TFLOP" for what, count in plan.operations.items() if count]
    lines.append("  " + _time(plan, rates))
    return "\n".join([*lines, *(f"  note: {note}" for note in plan.notes)])


def _line(what: str, count: int) -> str:
    number, unit = in_units(count).split()
    return f"    {what:<28} {number:>15} {unit}"


def _time(plan: RunPlan, rates: Rates) -> str:
    needs_wire = plan.world_size > 1
    if rates.tflops is None or (needs_wire and rates.gigabytes is None):
        missing = "--tflops" if not needs_wire else "--tflops and --gigabytes"
        return f"time of a step: not estimated; give what a rank keeps up, {missing}"
    arithmetic = sum(plan.operations.values()) / (rates.tflops * 1e12)
    wire = sum(plan.traffic.values()) / (rates.gigabytes * 1e9) if needs_wire else 0.0
    given = f"{rates.tflops:g} TFLOP/s" + (f" and {rates.gigabytes:g} GB/s" if needs_wire else "")
    return (
        f"time of a step, from the given {given}, nothing overlapped, data not counted: {arithmetic + wire:.3g} s "
        f"({arithmetic:.3g} s of arithmetic, {wire:.3g} s on the wire)"
    )
