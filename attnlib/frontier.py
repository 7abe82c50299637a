"""Where memory runs out: the length that the law predicts, tried on the GPU in fresh processes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from attnlib import NAIVE, VARIANTS
from attnlib.core import Shape
from attnlib.fit import at_length, largest_seq_len, need
from attnlib.measure import out_of_memory
from attnlib.memory import observe
from attnlib.sweep import Worker, forkserver

POOL = ("requested", "allocated", "reserved")
SIZES = ["batch", "heads", "head_dim"]
FOUND = ["memory_bytes", "taken_bytes", "libraries_bytes", "predicted_seq_len", "found_seq_len", "trials", "need_bytes"]
SEARCH = [*SIZES, *FOUND, *(f"{name}_bytes" for name in (*POOL, "tried"))]  # the numbers of a row of `search`
CELL = [*SIZES, "seq_len", "memory_bytes"]  # of a row of `cell`


@dataclass(frozen=True)
class Case:
    """A frontier to look for: its `shape` without regard to N, the phase, the memory (0 for all there is), the pool.

    allocator: "expandable", where the pool is one growing range of addresses whose free pages can be given back, or
    "default", where it is made of pieces as they were first asked for.
    """

    variant: str
    shape: Shape
    phase: str
    memory_bytes: int
    allocator: str


def cases(memory_bytes, phases, head_dims, *, dtypes=("float32",), pool="expandable", lengths=(1,), names=NAIVE):
    """A Case for each variant in `names`, length, width, dtype and phase, at batch 8 and one head."""
    shapes = [Shape(8, 1, n, d, dtype) for n in lengths for d in head_dims for dtype in dtypes]
    return [Case(name, shape, phase, memory_bytes, pool) for name in names for shape in shapes for phase in phases]


def trial(case: Case, device: str) -> dict:
    """Run one case at its shape in this process, which must not have touched the GPU before.

    Returns `fits`; `memory_bytes`, what the process may take from the driver; `taken_bytes`, what the device had given
    to the driver's context, the kernels' code and other processes before; `libraries_bytes`, the workspaces that the
    libraries keep; and, where it does not fit, `requested_bytes`, `allocated_bytes` and `reserved_bytes` at the moment
    of failure and `tried_bytes`.
    """
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{case.allocator == 'expandable'}")
    variant, shape = VARIANTS[case.variant], case.shape
    total = torch.cuda.get_device_properties(device).total_memory
    if case.memory_bytes:
        torch.cuda.set_per_process_memory_fraction(case.memory_bytes / total, device)
    small = Shape(1, 1, 16, shape.head_dim, shape.dtype, shape.causal)
    observe(variant, *small.inputs(device), causal=shape.causal, backward=True)
    torch.cuda.empty_cache()
    free, held = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    row = {"fits": True, "memory_bytes": case.memory_bytes or free + held, "taken_bytes": total - free - held}
    row["libraries_bytes"] = torch.cuda.memory_allocated(device)

    def at_failure(_, tried, *__):
        stats = torch.cuda.memory_stats(device)
        row.update({f"{kind}_bytes": stats[f"{kind}_bytes.all.current"] for kind in POOL}, tried_bytes=tried)

    torch._C._cuda_attach_out_of_memory_observer(at_failure)
    try:
        observe(variant, *shape.inputs(device), causal=shape.causal, backward=case.phase == "backward")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        row["fits"] = False
    return row


def in_fresh_process(case: Case, seq_len: int, device: str) -> dict:
    """`trial` of a case at `seq_len`, in a process of its own."""
    case = Case(case.variant, at_length(case.shape, seq_len), case.phase, case.memory_bytes, case.allocator)
    with Worker(forkserver()) as worker:
        return worker.call_again(trial, case, device, timeout_s=300)


def search(case: Case, device: str) -> dict:
    """The row of one case: the largest N by the law, the largest that ran, and what was lost at the next one.

    The law's N and the next are tried first. Where they do not run and fail as predicted, what the pool was seen to
    lose gives the next guess, down to one that runs, and bisection finds the N from which it does not: to the token or,
    where one MiB holds many, to that MiB. It is 1 where nothing ran.
    """
    variant, start = VARIANTS[case.variant], in_fresh_process(case, 2, device)  # cuDNN refuses a single key
    seen, room = {2: start}, start["memory_bytes"] - start["libraries_bytes"]

    def longest(lost):
        return largest_seq_len(variant, case.shape, room - lost, case.phase, device)

    def fits(seq_len):
        if seq_len not in seen:
            seen[seq_len] = in_fresh_process(case, seq_len, device)
        return seen[seq_len]["fits"]

    low = predicted = longest(0)
    grain = step = max(1, predicted - longest(2**20))
    while low > 1 and not fits(low):
        lost = seen[low].get("reserved_bytes", 0) - seen[low].get("requested_bytes", 0)
        low, step = max(1, min(low - step, longest(lost))), 2 * step
    high, step = min((n for n, found in seen.items() if n > low and not found["fits"]), default=low + grain), grain
    while fits(high):  # against the law
        low, step = high, 2 * step
        high = low + step
    while high - low > grain:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    lost = {f"{name}_bytes": seen[high].get(f"{name}_bytes") for name in (*POOL, "tried")}
    return {
        **name_of(case),
        **{name: start[name] for name in ("memory_bytes", "taken_bytes", "libraries_bytes")},
        "predicted_seq_len": predicted,
        "found_seq_len": low,
        "trials": len(seen) - 1,
        "need_bytes": need(variant, at_length(case.shape, high), case.phase, device) + start["libraries_bytes"],
        **lost,
    }


def name_of(case: Case) -> dict:
    """The columns that name a case."""
    sizes = {name: size for name, size in case.shape.columns().items() if name != "seq_len"}
    return {"variant": case.variant, **sizes, "phase": case.phase, "allocator": case.allocator}


def cell(case: Case, device: str) -> dict:
    """The row of one case tried at its own shape."""
    found = in_fresh_process(case, case.shape.seq_len, device)
    return {**name_of(case), "seq_len": case.shape.seq_len, **{k: found[k] for k in ("memory_bytes", "fits")}}


def side_by_side(function, cases: list[Case], device: str) -> Iterator[dict]:
    """`function(case, device)` for each case in order, up to eight at once, as far as the free memory has room for.

    Cases that ask for more memory than is free are left out.
    """
    with Worker() as worker:
        free = worker.call(torch.cuda.mem_get_info, device)[0]
    room, left = threading.Condition(), [free]

    def run(case):
        claim = case.memory_bytes or free
        if function is cell:  # at a shape of its own it may need less, though a pool holds more than the law says
            claim = min(claim, 2 * need(VARIANTS[case.variant], case.shape, case.phase) + 2**30)
        with room:
            room.wait_for(lambda: left[0] >= claim)
            left[0] -= claim
        try:
            return function(case, device)
        finally:
            with room:
                left[0] += claim
                room.notify_all()

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(run, [case for case in cases if case.memory_bytes <= free])
