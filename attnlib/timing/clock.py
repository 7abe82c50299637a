"""How long a call takes, by two clocks that are told apart.

The device's (`milliseconds`, `time_passes`): each call is queued behind a kernel that waits until the host has launched
all of it, so that only the device's work counts. The user's (`alone`, `in_a_row`): what the host waits for, its own
launches included. On a CPU they are one."""

import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attnlib.core import UserError
from attnlib.rows import STATISTICS

PASSES, WARM_UPS = 100, 5  # the published protocol's numbers of timed passes and of those before them
FEWEST = 5  # passes that a mean and a deviation are told of
CYCLES_PER_MS = 2_000_000  # of a waiting kernel, at about the highest clock that GPUs have
LONGEST_WAIT_MS = 10.0  # of time_passes: a call with thousands of launches is not hidden whole, or it would take hours
CACHE_BYTES = 256 * 2**20  # overwritten before each pass, more than any cache holds, as triton's do_bench does
FEWEST_CACHE_BYTES = 4 * 2**20  # where there is no memory for that


def settle(device: str | torch.device) -> None:
    """Wait until the device has done what was launched."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def estimate(fn: Callable, device: str | torch.device, budget_s: float) -> tuple[float, float]:
    """Seconds that one call takes, and milliseconds that the host takes to launch it (0 on a CPU): the least of up to
    WARM_UPS calls, each alone, no more of them once half of `budget_s` is spent, but one at least; on a GPU, where the
    first pays for memory and modules, two, unless it took `budget_s` by itself."""
    on_gpu, taken, launched = torch.device(device).type == "cuda", list[float](), list[float]()
    settle(device)
    while len(taken) < WARM_UPS:
        begun = time.perf_counter()
        fn()
        launched.append(time.perf_counter() - begun)
        settle(device)
        taken.append(time.perf_counter() - begun)
        if sum(taken) >= budget_s / (1 + (len(taken) > on_gpu)):
            break
    return min(taken), 1e3 * min(launched) * on_gpu


def fitting(seconds: float, budget_s: float) -> int:
    """How many calls of so many seconds fit in a budget: at least one, at most PASSES."""
    return min(PASSES, max(1, int(budget_s / seconds)))


def queue(
    functions: Sequence[Callable], order: Sequence[int], device: str | torch.device, wait_ms: float, cache_bytes: int
) -> list[tuple[Any, Any]]:
    """Launch `functions` on a GPU in an order, each behind a flush of its caches and a kernel that waits.

    Returns the event before and the event after each. Raises torch.OutOfMemoryError."""
    marks = []
    with torch.cuda.device(device):
        flush = torch.empty(cache_bytes, dtype=torch.int8, device=device)
        for which in order:
            flush.zero_()
            torch.cuda._sleep(int(wait_ms * CYCLES_PER_MS))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            functions[which]()
            end.record()
            marks.append((start, end))
    return marks


def taking_turns(count: int, rounds: int) -> list[tuple[int, int]]:
    """`(round, which)` of `count` functions that take turns, in an order drawn for each round."""
    order, turns = list(range(count)), list[tuple[int, int]]()
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        turns += [(turn, which) for which in order]
    return turns


def milliseconds_alone(functions: Sequence[Callable], rounds: int, device: str | torch.device) -> np.ndarray:
    """`[rounds, len(functions)]`: each call's time on the user's clock, made of an idle device and waited for, the
    functions `taking_turns`."""
    times = np.zeros((rounds, len(functions)))
    for turn, which in taking_turns(len(functions), rounds):
        times[turn, which] = in_a_row(functions[which], device, 1)
    return times


def milliseconds(
    functions: Sequence[Callable], rounds: int, device: str | torch.device, wait_ms: float = 0.5
) -> np.ndarray:
    """`[rounds, len(functions)]`: each call's time on the device's clock, the functions `taking_turns`.

    On CUDA each call is queued behind a kernel that waits for `wait_ms`. What the host launches in that time runs at
    the device's pace alone; what takes longer to launch does not. Raises torch.OutOfMemoryError where the calls do not
    fit beside FEWEST_CACHE_BYTES."""
    if torch.device(device).type == "cpu":
        return milliseconds_alone(functions, rounds, device)
    times, turns = np.zeros((rounds, len(functions))), taking_turns(len(functions), rounds)
    marks, cache_bytes = None, CACHE_BYTES
    while marks is None:
        try:
            marks = queue(functions, [which for _, which in turns], device, wait_ms, cache_bytes)
        except torch.OutOfMemoryError:
            if cache_bytes <= FEWEST_CACHE_BYTES:
                raise
        cache_bytes //= 4  # out here, where nothing holds the tensors of the calls that failed
    torch.cuda.synchronize(device)
    for place, (start, end) in zip(turns, marks, strict=True):
        times[place] = start.elapsed_time(end)
    return times


def time_passes(fn: Callable, device: str | torch.device, passes: int, launch_ms: float = 0.25) -> list[float]:
    """Milliseconds on the device's clock of `passes` calls, one sample each; `estimate` is to have called `fn` before.

    On CUDA each waits twice the `launch_ms` that the host takes to launch it, up to LONGEST_WAIT_MS. On the CPU with
    all of torch's threads."""
    return milliseconds([fn], passes, device, min(LONGEST_WAIT_MS, 2 * launch_ms))[:, 0].tolist()


def typical_ms(fn: Callable, device: str | torch.device, budget_s: float, quantile: float = 0.5) -> float:
    """The median, or another quantile, of `time_passes`, of as many calls as fit in `budget_s` seconds, three at
    least."""
    seconds, launch_ms = estimate(fn, device, budget_s)
    return float(np.quantile(time_passes(fn, device, max(3, fitting(seconds, budget_s)), launch_ms), quantile))


def in_a_row(fn: Callable, device: str | torch.device, calls: int) -> float:
    """Milliseconds on the user's clock of one of `calls` calls made one after another, and waited for at the end."""
    settle(device)
    begun = time.perf_counter()
    for _ in range(calls):
        fn()
    settle(device)
    return 1e3 * (time.perf_counter() - begun) / calls


def alone(fn: Callable, device: str | torch.device, passes: int) -> list[float]:
    """Milliseconds on the user's clock of `passes` calls, each made of an idle device and waited for."""
    return milliseconds_alone([fn], passes, device)[:, 0].tolist()


def graphed(fn: Callable, device: str | torch.device) -> Callable[[], None]:
    """A function that replays what one call of `fn` launches, as a CUDA graph: without the host's work for each kernel.

    Captured as PyTorch's notes on CUDA graphs say, after calls on the same stream. A backward pass is to go through
    operations that `fn` itself has recorded, and no other record of operations on the same inputs may be alive. Raises
    UserError on a CPU, and where `fn` does what a graph cannot hold, such as waiting for the device: measure no memory
    in that process then, whose allocator may take the capture to go on (PyTorch's pull request 180395)."""
    if torch.device(device).type != "cuda":
        raise UserError("a CUDA graph needs a CUDA GPU")
    with torch.cuda.device(device):
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):  # left also where the capture fails, which stays on its stream then
                for _ in range(3):
                    fn()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, stream=side):
                    fn()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"no CUDA graph can be made of it: {text}") from error
        torch.cuda.current_stream().wait_stream(side)
    graph.reads = fn  # and its inputs, which must live as long; what the graph writes lies in a pool of its own
    return graph.replay


def watched(calls: Callable[[], Any], device: str | torch.device) -> Any:
    """PyTorch's profiler, after it has watched `calls` and waited for their end."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to stderr each time
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (torch.device(device).type == "cuda")]
    with profile(activities=activities, acc_events=True) as seen:
        calls()
        settle(device)
    return seen


def longest_kernel(fn: Callable, device: str | torch.device) -> str:
    """The name of the kernel that one call of `fn` spends most time in; on the CPU, of PyTorch's operator."""
    on_gpu = torch.device(device).type == "cuda"
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = watched(fn, device).key_averages()
    kernels = [event for event in events if not on_gpu or event.device_type != DeviceType.CPU]
    return max(kernels, key=lambda event: getattr(event, time_of)).key if kernels else ""


def statistics(phase: str, times_ms: Sequence[float]) -> dict[str, float]:
    """The columns of one timed phase: median, 20th and 80th percentile, mean, standard deviation, number of samples."""
    median_and_ends = np.quantile(times_ms, [0.5, 0.2, 0.8]).tolist()
    figures = (*median_and_ends, float(np.mean(times_ms)), float(np.std(times_ms)), len(times_ms))
    return dict(zip((f"{phase}_ms{name}" for name in STATISTICS), figures, strict=True))
