"""Which kernel takes the time: passes under PyTorch's profiler, by kernel or by operator, and what each should take."""

import re
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from attnlib import VARIANTS
from attnlib.core import PHASES, Machine, Shape
from attnlib.laws import Variant
from attnlib.memory.ledger import ledger
from attnlib.rows import POINT, shape_of
from attnlib.timing.clock import CACHE_BYTES, WARM_UPS, estimate, fitting, graphed, time_passes, watched
from attnlib.timing.sweep import Job, Row, point_name
from report.floor import operations

PROFILE = ["seq_len", "head_dim", "place", "calls", "ms", "pass_ms"]  # the numbers of a row of `profiled`
# what autograd does to tensors with data in place of an operation that it does to those without
TWINS = {"add": "add_", "scatter": "scatter_", "new_zeros": "zeros"}


def operation(event: Any, names: Mapping[str, str]) -> Any:
    """The outermost operation called one of `names` that a profiler's event is part of, else the event itself."""
    found = above = event
    while above := above.cpu_parent:
        found = above if above.name in names else found
    return found


def by_operation(events: Iterable[Any], names: Mapping[str, str], on_gpu: bool) -> list[Row]:
    """`phase, place, op, kernel, calls, ms` of the fastest pass: for each operation, in their order, its kernels; on a
    CPU PyTorch's operators, each without those that it calls. pass_ms: the phase from its mark's start to its end.
    names: `{event: operation}`."""
    ordered = sorted(events, key=lambda event: event.time_range.start)
    # a GPU shows marks a second time
    marks = [event for event in ordered if event.name in PHASES and event.device_type == DeviceType.CPU]
    passes: list[dict[tuple, list[float]]] = [{} for mark in marks if mark.name == "forward"]
    for event in ordered:
        start, own = event.time_range.start, [(event.name, event.self_cpu_time_total)]
        inside = [at for at, mark in enumerate(marks) if mark.time_range.start < start <= mark.time_range.end]
        spent = [(kernel.name, kernel.duration) for kernel in event.kernels] if on_gpu else own
        for kernel, microseconds in spent if inside else ():
            op = operation(event, names)
            name = names.get(op.name, op.name.removeprefix("aten::"))
            key = marks[inside[0]].name, op.time_range.start, name, kernel
            passes[inside[0] // 2].setdefault(key, []).append(microseconds / 1e3)
    at, fastest = min(filter(itemgetter(1), enumerate(passes)), key=lambda one: sum(map(sum, one[1].values())))
    whole = {mark.name: mark.time_range.elapsed_us() / 1e3 for mark in marks[2 * at : 2 * at + 2]}
    places = {start: place for place, start in enumerate(dict.fromkeys(key[1] for key in fastest))}
    return [
        {"phase": phase, "place": places[start], "op": op, "kernel": kernel, "calls": len(ms), "ms": sum(ms)}
        | {"pass_ms": whole[phase]}
        for (phase, start, op, kernel), ms in fastest.items()
    ]


def profiled(variant: Variant, shape: Shape, device: str) -> list[Row]:
    """A row for each kernel of a forward and a backward pass with cold caches: the shape's columns, `phase, op, kernel`
    and PROFILE. pass_ms: the whole phase, the fastest too, as a CUDA graph (backward: what it adds to a graph of both);
    on a CPU, where one pass may take half as long again as the next, that same one under the profiler. Raises UserError
    where no graph can be made: measure no memory in that process then."""
    on_gpu = torch.device(device).type == "cuda"
    inputs = variant.inputs(shape, device)
    do = torch.randn_like(inputs[0])

    def forward() -> torch.Tensor:
        return variant.fn(*inputs, causal=shape.causal)

    def both() -> None:
        with record_function("forward"):
            o = forward()
        with record_function("backward"):
            torch.autograd.grad(o, inputs, do)

    def by_clock() -> list[float]:
        found = []
        for call in (forward, both) if on_gpu else ():
            timed = graphed(call, device)
            found.append(min(time_passes(timed, device, count)))
            del timed  # a graph holds all that it writes
            torch.cuda.empty_cache()
        return found

    def passes() -> None:
        for _ in range(count):
            flush.zero_()
            both()

    # as many passes as graphs as under the profiler, before it and after it, so that neither has a warmer device
    count = max(3, min(4 * WARM_UPS, fitting(estimate(both, device, 0.5)[0], 0.5)))
    flush = torch.empty(CACHE_BYTES if on_gpu else 1, dtype=torch.int8, device=device)
    before, events, after = by_clock(), watched(passes, device).events(), by_clock()
    ops = {row["op"] for row in ledger(variant, shape, device)} if variant.ledgered else set()
    names = {f"aten::{twin}": op for op in ops for twin in (op, TWINS.get(op, op))}
    rows = by_operation(events, names, on_gpu)
    if on_gpu:
        first, whole = map(min, before, after)
        times = {"forward": first, "backward": whole - first}
        rows = [row | {"pass_ms": times[row["phase"]]} for row in rows]
    return [{"variant": variant.name, **shape.columns(), **row} for row in rows]


def profile_jobs(points: Iterable[tuple[Variant, Shape]], device: str) -> list[Job]:
    """`profiled` of each point, in a process that measures no memory."""
    return [Job(point_name(*point), profiled, (*point, device), process="profile") for point in points]


def by_ledger(variant: Variant, shape: Shape, machine: Machine) -> pd.DataFrame:
    """A ledger by operation, `phase, op, turn` (its number among those of that name), `traffic_bytes, flops, regime`
    and `least_ms` at the ceilings; a step inside of an operation is part of it."""
    found: list[Row] = []
    for row in operations(variant, shape, machine):
        mine = {name: row[name] for name in ("phase", "op", "traffic_bytes", "flops", "regime")} | {
            "least_ms": row["execution_ms"]
        }
        if found and "(in " in found[-1]["op"]:
            step = found.pop()
            mine |= {name: mine[name] + step[name] for name in ("traffic_bytes", "least_ms")}
        found.append(mine)
    frame = pd.DataFrame(found)
    return frame.assign(turn=frame.groupby(["phase", "op"]).cumcount())


def anatomy(rows: pd.DataFrame, machine: Machine) -> pd.DataFrame:
    """Of profiled rows each operation that a ledger knows: the point's columns, `by_ledger`, the `kernel` that took
    most of it, its `ms`, `share` (least_ms ÷ ms) and `excess_ms` above what it takes at least."""
    found = []
    for _, point in rows.groupby([*POINT], sort=False):
        row = point.iloc[0].to_dict()
        ops = (
            point.sort_values("ms")
            .groupby(["phase", "place", "op"], as_index=False)
            .agg(kernel=("kernel", "last"), ms=("ms", "sum"))
        )
        known = by_ledger(VARIANTS[row["variant"]], shape_of(row), machine)
        # what checkpoint breaks off is no operation of the ledger: the shortest ones of a name are left out
        many = ops.set_index(["phase", "op"]).index.map(known.groupby(["phase", "op"]).size()).fillna(0)
        ops = ops[ops.groupby(["phase", "op"])["ms"].rank(ascending=False, method="first") <= many]
        ops = ops.assign(turn=ops.groupby(["phase", "op"]).cumcount(), **{name: row[name] for name in [*POINT]})
        found.append(ops.merge(known, on=["phase", "op", "turn"]))
    every = pd.concat(found, ignore_index=True)
    return every.assign(share=every["least_ms"] / every["ms"], excess_ms=every["ms"] - every["least_ms"])


def adds_up(rows: pd.DataFrame, least_ms: float = 0.1) -> pd.Series:
    """The sum of kernels over the pass, of each forward pass, and each forward and backward pass, that takes so long:
    what was timed as a whole."""
    by_phase = rows.groupby([*POINT, "phase"], sort=False).agg(ms=("ms", "sum"), whole=("pass_ms", "first"))
    timed = pd.concat([by_phase.query("phase == 'forward'"), by_phase.groupby([*POINT], sort=False).sum()])
    return (timed["ms"] / timed["whole"])[timed["whole"] >= least_ms]


def short_name(kernel: str) -> str:
    """A kernel's name without its return type, name spaces, template arguments, and what follows its tile."""
    bare = re.sub(r"^void |\(anonymous namespace\)::|aten::", "", kernel)
    return re.sub(r"(?<=\d)_(stage|warps|knob).*", "", re.sub(r"[<(].*", "", bare).split("::")[-1])
