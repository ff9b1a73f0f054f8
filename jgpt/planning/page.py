"""A plan as text for people, and as a dictionary for programs.

Beside the data path: `jgpt.plan` prints one of them.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np

from jgpt.model.parameters import count_parameters
from jgpt.model.precision import dtype_name
from jgpt.planning.audit import Collective, collectives, products
from jgpt.planning.estimate import ACTIVATIONS, Estimate
from jgpt.planning.roofline import OpCost, Prediction
from jgpt.planning.summary import Plan
from jgpt.wording import GIB, format_count, format_duration

LABEL = 26  # columns of what a line is about


def page(plan: Plan, top: int) -> str:
    """Write a plan as a page, with the `top` ops that take longest."""
    found = plan.found
    sections = [_model(plan), "Memory of each device, GiB\n" + _memory(plan)]
    if found.prediction is not None:
        sections += [f"Speed ({plan.target.constants()})\n" + _speed(plan), _ops(found.prediction, top)]
    else:
        sections.append(f"Speed: {plan.target.constants()}.")
    sections.append("The whole run\n" + _run(plan))
    if plan.searched is not None:
        tried = sorted(plan.searched.tried.values(), key=lambda tried: tried.seconds or 0.0)
        sections.append("\n".join(["Tried", *(f"  {tried_row(one)}" for one in tried)]))
    return "\n\n".join([*sections, verdict(plan)])


def verdict(plan: Plan) -> str:
    """Say whether it fits, and what to take."""
    execution, best = plan.found.execution, plan.advice
    if plan.fits:
        line = f"It fits: {execution.described()}."
    else:
        over = (plan.found.peak - (plan.target.memory_bytes or 0)) / GIB
        line = f"It does not fit: {execution.described()} takes {over:.2f} GiB more than there is."
        if best is None:
            return f"{line}\nNothing does: {plan.refusal()}"
    return line if best is None else f"{line} The fastest found that fits:\n  {best.flags()}"


def tried_row(found: Estimate) -> str:
    """Write one estimate as a row: the execution, its memory, its speed."""
    speed = f"{found.tokens_per_second:9,.0f} tokens/s" if found.tokens_per_second else ""
    return f"{found.execution.described():<68}{found.peak / GIB:7.2f} GiB  {speed}".rstrip()


def _line(label: str, text: str) -> str:
    return f"  {label:<{LABEL}}{text}"


def _model(plan: Plan) -> str:
    parts, c = plan.found.parts, plan.config
    s = parts.shapes
    compute = np.dtype(parts.policy.compute).name
    adapters = f", {format_count(parts.adapters)} of LoRA beside them" if parts.adapters else ""
    lines = [
        _line("parameters", f"{format_count(count_parameters(s))}{adapters}"),
        _line("shape", f"layers {s.n_layers}, width {s.d_model}, heads {s.n_heads}, context {s.context_length}"),
        _line("vocabulary", f"{s.vocab_size:,} ({plan.vocabulary})"),
        _line("FLOPs a token", f"{format_count(parts.flops_per_token)}"),
        _line(
            "batch",
            f"{c.batch.global_batch_size} sequences of {parts.sequence_length} = devices {parts.strategy.shares}"
            f" x micro-batches {parts.accumulation} x {parts.rows}, {parts.tokens_per_step:,} tokens a step",
        ),
        _line("step", f"{plan.found.execution.described()}, computing in {compute}"),
    ]
    return "\n".join([f"Plan for {plan.target.kind} ({plan.target.name})", *lines])


def _memory(plan: Plan) -> str:
    found, limit = plan.found, plan.target.memory_bytes
    notes = {ACTIVATIONS: f"of them {found.logits / GIB:.2f} for the logits of one chunk" if found.logits else ""}
    lines = [
        _line(part, f"{size / GIB:6.2f}  {notes.get(part, '')}".rstrip())
        for part, size in found.memory.items()
        if size / GIB >= 0.005
    ]
    of = "" if limit is None else f"  of {limit / GIB:.2f}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    return "\n".join([*lines, _line("in all, at the peak", f"{found.peak / GIB:6.2f}{of}")])


def _speed(plan: Plan) -> str:
    found = plan.found
    assert found.prediction is not None and found.tokens_per_second is not None
    groups = sorted(found.prediction.by_group().items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {100 * s / found.prediction.seconds:.0f}%" for name, s in groups if s)
    peak = plan.target.chip.peak_flops[dtype_name(found.parts.policy.compute)]
    flops = found.parts.flops_per_token * found.tokens_per_second / len(plan.target.devices)
    mfu = f", MFU {100 * flops / peak:.0f}%" if peak else ""
    return "\n".join(
        [
            _line("a step", f"{found.prediction.seconds * 1e3:,.0f} ms"),
            _line("tokens a second", f"{found.tokens_per_second:,.0f}{mfu}"),
            _line("goes to", shares),
            *_program(found),
        ]
    )


def _program(found: Estimate) -> list[str]:
    """Say what the program multiplies and exchanges, and warn of what is slow."""
    assert found.program is not None
    counted = products(found.program)
    wide = sum(n for product, n in counted.items() if product.is_wide) if _compute(found) != "float32" else 0
    warning = f"; {wide} OF THEM NOT IN 16 BITS" if wide else ""
    return [
        _line("matrix products", ", ".join(f"{n} {product}" for product, n in counted.most_common()) + warning),
        *_exchanged(collectives(found.program)),
    ]


def _exchanged(found: list[Collective]) -> list[str]:
    """Say what the devices exchange in a step, in loops (over micro-batches, say) and once."""
    lines = []
    for label, in_loop in (("exchanged in loops", True), ("exchanged once a step", False)):
        those = [one for one in found if one.in_loop == in_loop]
        kinds = Counter[str]()
        for one in those:
            kinds[one.kind] += one.times
        size = sum(one.bytes * one.times for one in those)
        if those:
            lines.append(_line(label, f"{', '.join(f'{n} {kind}' for kind, n in kinds.items())}; {size / 1e6:,.1f} MB"))
    return lines


def _compute(found: Estimate) -> str:
    return np.dtype(found.parts.policy.compute).name


def _ops(prediction: Prediction, top: int) -> str:
    kinds = merge_layers(prediction)
    lines = [f"What takes longest ({top} of {len(kinds)} kinds of op; * stands for every layer)"]
    lines.append(f"  {'ms a step':>9}  {'share':>5}  {'times':>6}  {'waits for':<9}  {'group':<10}  op")
    for op in kinds[:top]:
        cost = f"{op.seconds * 1e3:9.1f}  {100 * op.seconds / prediction.seconds:4.1f}%  {op.times:6}"
        lines.append(f"  {cost}  {op.unit:<9}  {op.group:<10}  {op.kind} {op.op_name}")
    return "\n".join(lines)


def merge_layers(prediction: Prediction) -> list[OpCost]:
    """Add up the ops that do the same in every layer, the slowest first; `op_name` is the end of JAX's scopes."""
    same: dict[tuple[str, ...], list[OpCost]] = defaultdict(list)
    for op in prediction.ops:
        scopes = re.sub(r"\bh_\d+\b", "h_*", op.op_name).split("/")
        backward = "backward " if any(scope.startswith("transpose(") for scope in scopes) else ""
        same[op.kind, op.group, op.unit, backward + "/".join(scopes[-3:])].append(op)
    return sorted(
        (
            replace(
                ops[0],
                op_name=key[-1],
                times=sum(op.times for op in ops),
                bytes=sum(op.bytes for op in ops),
                flops=sum(op.flops for op in ops),
                seconds=sum(op.seconds for op in ops),
            )
            for key, ops in same.items()
        ),
        key=lambda op: -op.seconds,
    )


def _run(plan: Plan) -> str:
    o, steps, (count, size) = plan.config.optimizer, plan.steps, plan.checkpoints
    of = "" if o.total_steps else f", what {o.budget_hours:g} hours hold at this speed; training measures its own"
    if steps is None:
        lines = [_line("steps", f"what {o.budget_hours:g} hours hold; training measures its speed")]
    else:
        lines = [_line("steps", f"{steps:,}, {format_count(steps * plan.found.parts.tokens_per_step)} tokens{of}")]
    if plan.hours is not None:
        longest = plan.config.deadline_hours or plan.run_hours
        lines += [
            _line("time", f"{format_duration(plan.hours * 3600)}; evaluation, samples and saving come on top"),
            _line("runs", f"{plan.runs}, of {longest:g} hours at most"),
            _line("share of a week", f"{100 * plan.hours / plan.weekly_hours:.0f}% of {plan.weekly_hours:g} hours"),
        ]
    lines.append(_line("disk for checkpoints", f"{count * size / 1e9:.2f} GB: {count} of {size / 1e9:.2f}, one of them"
                       " being written"))  # fmt: skip
    return "\n".join(lines)


def as_dict(plan: Plan, top: int) -> dict[str, Any]:
    """Return the same facts for a program: bytes, seconds and hours as plain numbers."""
    found, (count, size) = plan.found, plan.checkpoints
    facts: dict[str, Any] = {
        "device": plan.target.name,
        "devices": plan.target.kind,
        "parameters": count_parameters(found.parts.shapes),
        "flops_per_token": found.parts.flops_per_token,
        "tokens_per_step": found.parts.tokens_per_step,
        "micro_batches": found.parts.accumulation,
        "choice": found.execution.overrides(),
        "memory_bytes": dict(found.memory),
        "peak_bytes": found.peak,
        "usable_bytes": plan.target.memory_bytes,
        "fits": plan.fits,
        "seconds_per_step": found.seconds,
        "tokens_per_second": found.tokens_per_second,
        "predicted_with": plan.target.constants(),
        "steps": plan.steps,
        "hours": plan.hours,
        "runs": plan.runs,
        "checkpoint_bytes": count * size,
        "compile_seconds": found.compile_seconds,
    }
    if found.prediction is not None:
        assert found.program is not None
        facts["matrix_products"] = {str(product): n for product, n in products(found.program).items()}
        facts["collectives"] = [one._asdict() for one in collectives(found.program)]
        facts["seconds_by_group"] = found.prediction.by_group()
        facts["top_ops"] = [vars(op) for op in merge_layers(found.prediction)[:top]]
    if plan.searched is not None:
        facts["tried"] = [
            one.execution.overrides() | {"peak_bytes": one.peak, "seconds_per_step": one.seconds}
            for one in plan.searched.tried.values()
        ]
        facts["advice"] = plan.advice.overrides() if plan.advice else None
    return facts
