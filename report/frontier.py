"""Where memory runs out: the length that the law predicts, tried on the GPU in processes in which nothing failed."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from attnlib.core import Machine, Shape
from attnlib.laws import Variant, bytes_needed
from attnlib.memory.allocator import observe
from attnlib.memory.fit import at_length, largest_seq_len
from attnlib.timing.measure import out_of_memory
from attnlib.timing.sweep import Job
from attnlib.timing.worker import Worker

ROOM = ["memory_bytes", "taken_bytes", "libraries_bytes"]  # see `trial`
POOL = ["requested_bytes", "allocated_bytes", "reserved_bytes"]
CELL = ["batch", "heads", "head_dim", "seq_len", "memory_bytes"]  # the numbers of a row of `cells`
FOUND = ["predicted_seq_len", "found_seq_len", "trials", "need_bytes"]
SEARCH = [*CELL[:3], *ROOM, *FOUND, *POOL, "tried_bytes"]  # of a row of `search`


@dataclass(frozen=True)
class Case:
    """A frontier to look for."""

    variant: Variant
    shape: Shape  # whatever its N
    phase: str  # "forward", or "backward" for both
    memory_bytes: int  # 0 for all there is
    allocator: str  # its pool: "expandable", one range whose free pages can be given back, or "default", pieces


def frontier_cases(memory_bytes, phases, head_dims, *, variants, dtypes=("float32",), pool="expandable", lengths=(1,)):
    """A Case for each of `variants`, length, width, dtype and phase, at batch 8 and one head."""
    shapes = [Shape(8, 1, n, d, dtype) for n in lengths for d in head_dims for dtype in dtypes]
    return [Case(one, shape, phase, memory_bytes, pool) for one in variants for shape in shapes for phase in phases]


def trial(case: Case, device: str) -> dict:
    """Run one case at its shape in this process, which must not have touched the GPU before, if the room is to be told.

    Returns `fits`, None where less memory is free than the case asks for; `memory_bytes`, what the process may take
    from the driver; `taken_bytes`, what the driver's context, the kernels' code and other processes had before;
    `libraries_bytes`, the libraries' workspaces; and, where it does not fit, POOL at that moment and `tried_bytes`."""
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{case.allocator == 'expandable'}")
    gc.collect()
    torch.cuda.empty_cache()  # of an earlier trial
    variant, shape, (free, total) = case.variant, case.shape, torch.cuda.mem_get_info(device)
    if case.memory_bytes > free:
        return {"fits": None}
    if case.memory_bytes:
        torch.cuda.set_per_process_memory_fraction(case.memory_bytes / total, device)
    small = Shape(1, 1, 16, shape.head_dim, shape.dtype, shape.causal)
    observe(variant, *variant.inputs(small, device), causal=shape.causal, backward=True)
    torch.cuda.empty_cache()
    free, held = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
    room = case.memory_bytes or free + held, total - free - held, torch.cuda.memory_allocated(device)
    row = {"fits": True, **dict(zip(ROOM, room, strict=True))}

    def at_failure(_, tried, *__):
        stats = torch.cuda.memory_stats(device)
        row.update({name: stats[f"{name}.all.current"] for name in POOL}, tried_bytes=tried)

    torch._C._cuda_attach_out_of_memory_observer(at_failure)
    try:
        observe(variant, *variant.inputs(shape, device), causal=shape.causal, backward=case.phase == "backward")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        row["fits"] = False
    return row


def tried(case: Case, seq_len: int, device: str, worker: Worker) -> dict:
    """`trial` of a case at `seq_len`, in a process in which nothing failed before."""
    case = replace(case, shape=at_length(case.shape, seq_len))
    found = worker.call_again(trial, case, device, timeout_s=300)
    if found["fits"] is None:  # what an earlier trial has left may lack
        worker.stop()
        found = worker.call_again(trial, case, device, timeout_s=300)
    if not found["fits"]:
        worker.stop()
    return found


def search(case: Case, device: str) -> list[dict]:
    """The row of one case: the largest N by the law and that ran, what was lost at the next; none without the memory.

    The law's N and the next are tried first. Where they do not run and fail as predicted, what the pool was seen to
    lose gives the next guess, down to one that runs, and bisection finds the N from which it does not: to the token or,
    where one MiB holds many, to that MiB. It is 1 where nothing ran."""
    variant, seen = case.variant, dict[int, dict]()

    def longest(lost: int) -> int:
        return largest_seq_len(variant, case.shape, room - lost, case.phase, device)

    def fits(seq_len: int) -> bool:
        if seq_len not in seen:
            seen[seq_len] = tried(case, seq_len, device, worker)
        return seen[seq_len]["fits"]

    with Worker() as worker:
        fits(2)  # cuDNN refuses a single key
        start = seen[2]
        if start["fits"] is None:
            return []
        room = start["memory_bytes"] - start["libraries_bytes"]

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
        need = bytes_needed(variant, at_length(case.shape, high), device, case.phase) + start["libraries_bytes"]
        row = name_of(case) | {name: start[name] for name in ROOM}
        row |= dict(zip(FOUND, (predicted, low, len(seen) - 1, need), strict=True))
        return [row | {name: seen[high].get(name) for name in (*POOL, "tried_bytes")}]


def name_of(case: Case) -> dict:
    """The columns that name a case."""
    row = {"variant": case.variant.name, **case.shape.columns(), "phase": case.phase, "allocator": case.allocator}
    return {name: value for name, value in row.items() if name != "seq_len"}


def cells(cases: Sequence[Case], device: str) -> list[dict]:
    """The rows of cases tried in turn in one process, as programs go through a grid; none where memory lacks."""
    rows = []
    with Worker() as worker:
        for case in cases:
            found = worker.call_again(trial, case, device, timeout_s=300)
            row = name_of(case) | {"seq_len": case.shape.seq_len}
            rows += [] if found["fits"] is None else [row | {name: found[name] for name in ("memory_bytes", "fits")}]
    return rows


def search_jobs(cases: Iterable[Case], device: str) -> Sequence[Job]:
    """`search` of each case: they start processes of their own, as many at once as memory has room for."""
    claims = ((case, case.memory_bytes or 2**62) for case in cases)  # all there is: alone
    return [Job(words(case), search, (case, device), claim_bytes=claim, here=True) for case, claim in claims]


def grid_jobs(cases: Iterable[Case], device: str) -> Sequence[Job]:
    """`cells` of all lengths of each variant, width and memory."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(words(case), []).append(case)
    jobs = []
    for name, group in groups.items():
        # they may need less than they may have, though a pool holds more than the law says
        most = max(bytes_needed(case.variant, case.shape, Machine("cuda"), case.phase) for case in group)
        claim = min(group[0].memory_bytes, 2 * most + 2**30)
        jobs.append(Job(name, cells, (group, device), claim_bytes=claim, here=True))
    return jobs


def words(case: Case) -> str:
    """A case in words, without its length."""
    return " ".join(map(str, [*name_of(case).values(), case.memory_bytes]))
