"""How long a call takes: the device's clock on a GPU, the host's on a CPU."""

import os
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from attnlib.rows import STATISTICS

PASSES = 100  # the published protocol's number of timed passes
CYCLES_PER_MS = 2_000_000  # of a waiting kernel, at about the highest clock that GPUs have
CACHE_BYTES = 256 * 2**20  # overwritten before each pass, more than any cache holds, as triton's do_bench does


def warm_up(functions: Sequence[Callable], device: str | torch.device) -> float:
    """Call each function, on a GPU twice. Returns the longest that the host took to launch the second call, in ms."""
    on_gpu, slowest = torch.device(device).type == "cuda", 0.0
    for fn in functions:
        fn()
        if on_gpu:
            torch.cuda.synchronize(device)
            begun = time.perf_counter()
            fn()
            slowest = max(slowest, 1e3 * (time.perf_counter() - begun))
    return slowest


def milliseconds(
    functions: Sequence[Callable], rounds: int, device: str | torch.device, wait_ms: float = 0.5
) -> np.ndarray:
    """`[rounds, len(functions)]`: each call's time, the functions taking turns in an order drawn for each round.

    On CUDA each call is queued behind a kernel that waits for `wait_ms`. What the host launches in that time runs at
    the device's pace alone; what takes longer to launch does not."""
    times, order = np.zeros((rounds, len(functions))), list(range(len(functions)))
    on_gpu, marks = torch.device(device).type == "cuda", []
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if on_gpu else None
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for which in order:
            if flush is None:
                begun = time.perf_counter_ns()
                functions[which]()
                times[turn, which] = (time.perf_counter_ns() - begun) / 1e6
                continue
            with torch.cuda.device(device):
                flush.zero_()
                torch.cuda._sleep(int(wait_ms * CYCLES_PER_MS))
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                functions[which]()
                end.record()
            marks.append((turn, which, start, end))
    if on_gpu:
        torch.cuda.synchronize(device)
    for turn, which, start, end in marks:
        times[turn, which] = start.elapsed_time(end)
    return times


def time_passes(fn: Callable, device: str | torch.device, budget_s: float) -> list[float]:
    """Milliseconds of up to 100 calls of `fn`, as many as fit in `budget_s` seconds, at least one, after warm-ups.

    On CUDA by triton.testing.do_bench: device events, the L2 cache flushed before each pass, six warm-ups of its own.
    On the CPU by torch.utils.benchmark.Timer with all of torch's threads, after five warm-ups (fewer where they alone
    would use up half the budget); where a pass is shorter than about a millisecond each figure is the mean over a block
    of passes. Where fewer than six passes fit, by `milliseconds`, which needs no more of them."""
    on_gpu, begun, estimate_s = torch.device(device).type == "cuda", time.perf_counter(), 0.0
    for _ in range(2 if on_gpu else 5):
        started = time.perf_counter()
        fn()
        if on_gpu:
            torch.cuda.synchronize(device)
        estimate_s = time.perf_counter() - started
        if time.perf_counter() - begun > budget_s / 2:
            break
    if estimate_s > budget_s / 6:
        return milliseconds([fn], max(1, int(budget_s / estimate_s)), device)[:, 0].tolist()
    span_s = min(budget_s, PASSES * estimate_s)
    if on_gpu:
        from triton.testing import do_bench

        with torch.cuda.device(device):
            return do_bench(fn, warmup=0, rep=1e3 * span_s, return_mode="all")[:PASSES]
    from torch.utils.benchmark import Timer  # not at the top: it counts GPUs, and no fork could then use one

    timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    return [1e3 * s for s in timer.blocked_autorange(min_run_time=span_s).times[:PASSES]]


def longest_kernel(fn: Callable, device: str | torch.device) -> str:
    """The name of the kernel that one call of `fn` spends most time in; on the CPU, of PyTorch's operator."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to stderr each time
    on_gpu = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as seen:
        fn()
        if on_gpu:
            torch.cuda.synchronize(device)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in seen.key_averages() if not on_gpu or event.device_type != DeviceType.CPU]
    return max(events, key=lambda event: getattr(event, time_of)).key if events else ""


def statistics(phase: str, times_ms: Sequence[float]) -> dict[str, float]:
    """The columns of one timed phase: median, 20th and 80th percentile, mean, standard deviation, number of samples."""
    median_and_ends = np.quantile(times_ms, [0.5, 0.2, 0.8]).tolist()
    figures = (*median_and_ends, float(np.mean(times_ms)), float(np.std(times_ms)), len(times_ms))
    return dict(zip((f"{phase}_ms{name}" for name in STATISTICS), figures, strict=True))
