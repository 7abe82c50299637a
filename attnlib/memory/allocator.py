"""The allocator's account: what PyTorch's allocator saw while a variant ran, on CUDA and on the CPU."""

import gc
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from attnlib.calling import ordinary
from attnlib.laws import ACCOUNTS, Variant


class Usage(NamedTuple):
    """What an allocator saw, in bytes; the first two `{account: bytes}`, above what was there at the start."""

    requested: dict[str, int]  # each of ACCOUNTS as requested; no backward peak if there was no backward pass
    allocated: dict[str, int]  # the same in the blocks that were given out for it (CUDA only)
    total: int  # all that is allocated after the forward pass, in blocks (CUDA only)
    reserved: int  # the most that was held from the driver (CUDA only: the CPU has no pool)


def watch_cuda(passes: Iterator[None], device: torch.device) -> Usage:
    """By the CUDA caching allocator's own counters, read at the end of each pass."""

    def counters() -> dict[str, int]:
        torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        torch.cuda.reset_peak_memory_stats(device)
        return stats

    def accounts(kind: str) -> dict[str, int]:
        current, peak = f"{kind}_bytes.all.current", f"{kind}_bytes.all.peak"
        figures = ends[0][current], *(end[peak] for end in ends)
        return {account: nbytes - start[current] for account, nbytes in zip(ACCOUNTS, figures, strict=False)}

    # autograd's own thread lets go of the last gradients in its own time: give it an empty task to wait for
    empty = torch.zeros(0, device=device, requires_grad=True)
    torch.autograd.grad(empty * 1, empty, torch.zeros(0, device=device))
    start, ends = counters(), [counters() for _ in passes]
    total, reserved = ends[0]["allocated_bytes.all.current"], max(end["reserved_bytes.all.peak"] for end in ends)
    return Usage(accounts("requested"), accounts("allocated"), total, reserved)


def watch_cpu(passes: Iterator[None]) -> Usage:
    """By the record that torch.profiler keeps of each allocation and release."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to stderr each time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        for _ in passes:
            with record_function("end of a pass"):
                pass
    figures, alive, highest = list[int](), 0, 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            highest = max(highest, alive)
        elif event.name() == "end of a pass":
            figures += [highest] if figures else [alive, highest]
            highest = alive
    return Usage(dict(zip(ACCOUNTS, figures, strict=False)), {}, 0, 0)


@ordinary()
def observe(variant: Variant, *inputs: torch.Tensor, causal: bool, backward: bool) -> Usage:
    """One forward pass, and one backward pass if asked for, under the eyes of the allocator of the inputs' device.
    inputs: what `variant.inputs` makes, `[B, H, N, D]` each of q, k, v. Run something small first, so that the
    libraries' workspaces exist. Raises torch.OutOfMemoryError where it does not fit."""

    def passes() -> Iterator[None]:
        o = variant.fn(*inputs, causal=causal)
        yield
        if backward:
            torch.autograd.grad(o, inputs, torch.randn_like(o))
            yield

    device, collecting = inputs[0].device, gc.isenabled()
    gc.disable()  # garbage of earlier runs must not be freed under our eyes
    try:
        return watch_cpu(passes()) if device.type == "cpu" else watch_cuda(passes(), device)
    finally:
        if collecting:
            gc.enable()


def account(variant: Variant, *inputs: torch.Tensor, causal: bool, backward: bool) -> dict[str, int]:
    """What `observe` sees, as the columns of a row: `saved_bytes`, `forward_peak_bytes`, `backward_peak_bytes`.
    `memory_before_backward_bytes` is all that is allocated then, inputs and library workspaces included, as published
    reports print it; `reserved_peak_bytes` is there on CUDA only."""
    seen = observe(variant, *inputs, causal=causal, backward=backward)
    total = seen.total or seen.requested["saved"] + sum(x.nbytes for x in inputs)
    figures = {f"{account}_bytes": nbytes for account, nbytes in seen.requested.items()}
    reserved = {"reserved_peak_bytes": seen.reserved} if seen.reserved else {}
    return {"memory_before_backward_bytes": total, **figures, **reserved}
